"""Text embeddings in files: what comes back is what went in, bit for bit."""

import json

import hypothesis
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dcm_core.errors import DCMError
from dcm_core.files.conditioning import describe_conditioning, load_conditioning, save_conditioning
from dcm_core.files.tensor_file import TensorFile
from dcm_core.files.values import is_finite
from dcm_core.files.writing import write_tensors

from ..mangled import mangled, timed

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool, torch.float8_e4m3fn]


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype is b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))
    return type(a) is type(b) and a == b


def assert_same(a, b):
    assert len(a) == len(b)
    for (embedding, extras), (embedding_again, extras_again) in zip(a, b, strict=True):
        assert same(embedding, embedding_again)
        assert extras.keys() == extras_again.keys()
        assert all(same(value, extras_again[name]) for name, value in extras.items())


def prompt(width=8, **extras):
    return [[torch.randn(1, 5, width, generator=torch.Generator().manual_seed(0)), extras]]


@st.composite
def tensors(draw, dtypes=DTYPES, dims=None):
    dtype, count = draw(st.sampled_from(dtypes)), dims or draw(st.integers(1, 4))
    shape = draw(st.lists(st.integers(1, 3), min_size=count, max_size=count))
    size = torch.Size(shape).numel() * dtype.itemsize
    raw = draw(st.binary(min_size=size, max_size=size))
    tensor = (
        torch.tensor([byte % 2 if dtype is torch.bool else byte for byte in raw], dtype=torch.uint8)
        .view(dtype)
        .reshape(shape)
    )
    hypothesis.assume(not tensor.is_floating_point() or is_finite(tensor))
    return tensor


numbers = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8)
)
extras = st.dictionaries(st.text(max_size=6) | st.sampled_from(["a.b", "cond", "0"]), numbers | tensors(), max_size=4)
embeddings = tensors([dtype for dtype in DTYPES if dtype.is_floating_point], 3)


@given(entries=st.lists(st.tuples(embeddings, extras), min_size=1, max_size=3))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much], max_examples=100)
def test_round_trip(tmp_path, entries):
    conditioning = [list(entry) for entry in entries]
    save_conditioning(tmp_path / "x.safetensors", conditioning)
    assert_same(conditioning, load_conditioning(tmp_path / "x.safetensors"))


def test_a_real_one(tmp_path):
    pooled = torch.randn(1, 768, dtype=torch.float16)[:, ::2]
    conditioning = prompt(
        pooled_output=pooled, attention_mask=torch.ones(1, 5, dtype=torch.int64), guidance=6.0, hooks=None
    )
    save_conditioning(tmp_path / "x.safetensors", conditioning, prompt="a cat")
    assert_same(conditioning, load_conditioning(tmp_path / "x.safetensors"))
    assert TensorFile(tmp_path / "x.safetensors").metadata["prompt"] == "a cat"


def test_a_tensor_of_a_training_run_is_saved_as_data(tmp_path):
    embedding = torch.ones(1, 2, 3, requires_grad=True)
    save_conditioning(tmp_path / "x.safetensors", [[embedding * 2, {}]])
    loaded = load_conditioning(tmp_path / "x.safetensors")[0][0]
    assert not loaded.requires_grad and loaded.tolist() == [[[2.0] * 3] * 2]


class ControlNet:
    pass


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("control", ControlNet(), "ControlNet"),
        ("hooks", [ControlNet()], "list"),
        ("reference_latents", [torch.ones(1)], "list"),
        ("area", (8, 8, 0, 0), "tuple"),
        ("model_conds", {}, "dict"),
        ("callback", print, "builtin_function"),
    ],
)
def test_more_than_data_is_refused(tmp_path, name, value, kind):
    with pytest.raises(
        DCMError, match=f"contains `{name}`, a {kind}.*Save the conditioning right after the text encoder"
    ):
        save_conditioning(tmp_path / "x.safetensors", prompt(**{name: value}))
    assert not list(tmp_path.iterdir())


def test_an_empty_one_is_refused(tmp_path):
    with pytest.raises(DCMError, match="conditioning is empty"):
        save_conditioning(tmp_path / "x.safetensors", [])


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"0.cond": torch.ones(1)}, {})
    with pytest.raises(DCMError, match="is not a saved conditioning"):
        load_conditioning(path)
    path.write_bytes(b"PK\x03\x04 a pickle")
    with pytest.raises(DCMError, match="pickle"):
        load_conditioning(path)
    with pytest.raises(DCMError, match="does not exist"):
        load_conditioning(tmp_path / "none.safetensors")


@pytest.mark.parametrize(
    ("keys", "values"),
    [
        (["0.cond"], None),
        (["0.cond"], "no json"),
        (["0.cond"], "{}"),
        (["0.cond"], '{"a": 1}'),
        (["0.cond"], "[1]"),
        (["0.cond"], "[]"),
        ([], "[]"),
        (["0.pooled"], "[{}]"),
        (["1.cond"], "[{}]"),
        (["x.cond"], "[{}]"),
        (["-1.cond"], "[{}]"),
        (["cond"], "[{}]"),
        ([], '[{"cond": 5}]'),
    ],
)
def test_damaged_files_are_refused(tmp_path, keys, values):
    metadata = {"format": "dcm-conditioning"} | ({"values": values} if values is not None else {})
    write_tensors(tmp_path / "x.safetensors", {key: torch.ones(1, 1, 1) for key in keys}, metadata)
    with pytest.raises(DCMError, match="damaged conditioning file"):
        load_conditioning(tmp_path / "x.safetensors")


NAN, ONES = float("nan"), torch.ones(1, 5, 8)
WRONG = {
    "nan": ([[ONES * NAN, {}]], "its embedding of entry 0 has NaN or infinite values"),
    "infinite": ([[ONES, {}], [ONES / 0, {}]], "its embedding of entry 1 has NaN or infinite values"),
    "no tokens": ([[torch.ones(1, 0, 8), {}]], r"embedding 0 is torch\.float32 of shape \(1, 0, 8\)"),
    "no batch": (
        [[torch.ones(5, 8), {}]],
        r"embedding 0 is torch\.float32 of shape \(5, 8\); expected numbers by batch, token and width",
    ),
    "whole numbers": ([[torch.ones(1, 5, 8, dtype=torch.int64), {}]], r"embedding 0 is torch\.int64"),
    "pooled nan": ([[ONES, {"pooled_output": torch.ones(1, 8) * NAN}]], "pooled_output of entry 0 has NaN"),
    "pooled": (
        [[ONES, {"pooled_output": torch.ones(2, 8)}]],
        r"pooled_output of entry 0 has shape \(2, 8\), which does not fit",
    ),
    "pooled empty": ([[ONES, {"pooled_output": torch.ones(1, 0)}]], r"pooled_output of entry 0 has shape \(1, 0\)"),
    "pooled deep": (
        [[ONES, {"pooled_output": torch.ones(1, 8, 2)}]],
        r"pooled_output of entry 0 has shape \(1, 8, 2\)",
    ),
    "mask": (
        [[ONES, {"attention_mask": torch.ones(1, 4)}]],
        r"attention_mask of entry 0 has shape \(1, 4\), which does not fit",
    ),
    "number": ([[ONES, {"guidance": NAN}]], "guidance of entry 0 is nan; expected a finite number"),
    "list": ([[ONES, {"guidance": [1]}]], "guidance of entry 0 is a list"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_no_sampler_could_use_is_refused(tmp_path, case):
    conditioning, message = WRONG[case]
    if case != "list":  # refused by its kind
        with pytest.raises(DCMError, match=f"The conditioning cannot be saved: {message}"):
            save_conditioning(tmp_path / "x.safetensors", conditioning)
    assert not list(tmp_path.iterdir())
    tensors, values = {}, []
    for index, (embedding, extras) in enumerate(conditioning):
        values.append({name: value for name, value in extras.items() if not isinstance(value, torch.Tensor)})
        tensors |= {
            str(index): embedding,
            **{f"{index}.{name}": value for name, value in extras.items() if name not in values[-1]},
        }
    write_tensors(tmp_path / "x.safetensors", tensors, {"format": "dcm-conditioning", "values": json.dumps(values)})
    # numbers that are none are not even JSON
    said = "Its metadata entry 'values' is not valid JSON .NaN is not a number" if case == "number" else message
    with pytest.raises(DCMError, match=f"damaged conditioning file.*{said}"):
        load_conditioning(tmp_path / "x.safetensors")


@given(data=st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
def test_mangled_files_are_read_or_refused(tmp_path, data):
    path = tmp_path / "x.safetensors"
    tensors = {"0": torch.ones(1, 2, 3), "0.pooled_output": torch.ones(1, 4), "1": torch.ones(1, 5, 3).half()}
    mangled(
        path,
        tensors,
        {"format": "dcm-conditioning", "version": "1", "values": '[{"guidance": 6.0}, {}]', "prompt": "a cat"},
        data,
    )
    with timed():
        try:
            conditioning = load_conditioning(path)
        except DCMError as error:
            assert str(path) in str(error)
        else:
            assert all(isinstance(extras, dict) and is_finite(embedding) for embedding, extras in conditioning)
            describe_conditioning(conditioning)


def test_description():
    assert describe_conditioning(prompt()) == "1 prompt, 5 tokens of width 8, torch.float32"
    assert describe_conditioning(prompt() * 2).startswith("2 prompts, ")
