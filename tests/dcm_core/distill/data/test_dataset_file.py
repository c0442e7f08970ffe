"""Training data in one file."""

import json
import weakref

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from dcm_core.distill.data.dataset import TensorDataset
from dcm_core.distill.data.dataset_file import read_dataset, write_dataset
from dcm_core.errors import CheckpointError, DCMError
from dcm_core.files.tensor_file import TensorFile
from dcm_core.files.values import is_finite
from dcm_core.files.writing import write_tensors

from ...mangled import mangled, timed


def text(seed, **extras):
    return [[torch.randn(1, 3, 8, generator=torch.Generator().manual_seed(seed)).bfloat16(), extras]]


@pytest.fixture
def data():
    latents = [torch.full((2, 1, 2, 2), float(value)) for value in range(4)]
    texts = [text(0, pooled_output=torch.ones(1, 4).bfloat16(), guidance=6.0), text(1), text(1)]
    return TensorDataset(latents, texts, [0, 1, 2, 0], text(9))


def test_what_is_written_comes_back(data, tmp_path):
    write_dataset(tmp_path / "data.safetensors", data)
    back = read_dataset(tmp_path / "data.safetensors")
    assert len(back) == 4 and back.buckets == data.buckets
    for index in range(4):
        assert torch.equal(back.latent(index).float(), data.latent(index))
        (context, extras), (wanted, wanted_extras) = back.conditioning(index)[0], data.conditioning(index)[0]
        assert torch.equal(context, wanted) and set(extras) == set(wanted_extras)
    assert back.conditioning(0)[0][1]["guidance"] == 6.0
    assert torch.equal(back.unconditional()[0][0], data.unconditional()[0][0])


def test_image_conditionings_come_back(data, tmp_path):
    images = [
        {"concat_latent_image": torch.full((1, 2, 1, 2, 2), float(index)), "mask": torch.ones(1)} for index in range(4)
    ]
    latents, texts = [data.latent(index) for index in range(4)], [text(0)]
    write_dataset(tmp_path / "data.safetensors", TensorDataset(latents, texts, [0] * 4, text(9), images))
    back = read_dataset(tmp_path / "data.safetensors")
    assert all(set(back.image(index)) == set(images[index]) for index in range(4))
    assert all(
        torch.equal(back.image(index)["concat_latent_image"].float(), images[index]["concat_latent_image"])
        for index in range(4)
    )
    write_dataset(tmp_path / "text.safetensors", data)
    assert read_dataset(tmp_path / "text.safetensors").image(0) == {}


def test_several_captions_empty_text_and_sample_prompts_come_back(data, tmp_path):
    latents, texts = [data.latent(index) for index in range(2)], [text(0), text(1)]
    given = TensorDataset(latents, texts, [[0, 1], 1], text(9), (), text(3), [text(1), text(4)])
    write_dataset(tmp_path / "data.safetensors", given)
    back = read_dataset(tmp_path / "data.safetensors")
    assert [back.captions(index) for index in range(2)] == [2, 1]
    pairs = [(back.conditioning(0, 0), text(0)), (back.conditioning(0, 1), text(1)), (back.empty(), text(3))]
    pairs += [*zip(back.sample_prompts(), [text(1), text(4)], strict=True)]
    assert all(torch.equal(ours[0][0], theirs[0][0]) for ours, theirs in pairs)
    write_dataset(tmp_path / "old.safetensors", data)
    assert read_dataset(tmp_path / "old.safetensors").empty() is None


def test_texts_that_differ_in_a_number_alone_are_two(tmp_path):
    texts = [text(0, guidance=6.0), text(0, guidance=3.0)]
    write_dataset(tmp_path / "data.safetensors", TensorDataset([torch.ones(2, 1, 2, 2)] * 2, texts, [0, 1], text(9)))
    back = read_dataset(tmp_path / "data.safetensors")
    assert [back.conditioning(index)[0][1]["guidance"] for index in range(2)] == [6.0, 3.0]


class Fresh(TensorDataset):
    """Data that is made when it is asked for; `most` is how many latents were there at once."""

    most = 0

    def latent(self, index):
        latent = super().latent(index).clone()
        self.alive = [one for one in getattr(self, "alive", []) if one() is not None] + [weakref.ref(latent)]
        self.most = max(self.most, len(self.alive))
        return latent


def test_no_more_than_a_clip_is_held(data, tmp_path):
    fresh = Fresh([data.latent(0).bfloat16()] * 8, [text(1)], [0] * 8, text(9))
    write_dataset(tmp_path / "data.safetensors", fresh)
    assert 1 <= fresh.most <= 2
    back = read_dataset(tmp_path / "data.safetensors")
    assert len({back.latent(index).untyped_storage().data_ptr() for index in range(8)}) == 1, "views of one mapped file"


def test_equal_texts_are_written_once(data, tmp_path):
    write_dataset(tmp_path / "data.safetensors", data)
    with safe_open(tmp_path / "data.safetensors", "pt") as file:
        assert len([key for key in list(file.keys()) if key.endswith(".context")]) == 3


def test_other_and_damaged_files_are_refused(data, tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(DCMError, match=r"is not a dataset file\. Choose a file that DCM Save Dataset wrote"):
        read_dataset(tmp_path / "other.safetensors")
    save_file({"latent.0": torch.zeros(1)}, tmp_path / "damaged.safetensors", {"format": "dcm-dataset", "facts": "{}"})
    with pytest.raises(DCMError, match="damaged dataset file"):
        read_dataset(tmp_path / "damaged.safetensors")


def test_texts_of_the_same_tokens_in_another_order_are_two(data, tmp_path):
    tokens = text(3)[0][0]
    both = TensorDataset([data.latent(0)] * 2, [[[tokens, {}]], [[tokens.flip(1), {}]]], [0, 1], text(9))
    write_dataset(tmp_path / "data.safetensors", both)
    back = read_dataset(tmp_path / "data.safetensors")
    assert torch.equal(back.conditioning(1)[0][0], tokens.flip(1)) and torch.equal(back.conditioning(0)[0][0], tokens)


def test_progress_tells_every_clip_and_can_interrupt(data, tmp_path):
    told = []
    write_dataset(tmp_path / "data.safetensors", data, progress=lambda *done: told.append(done))
    read_dataset(tmp_path / "data.safetensors", lambda *done: told.append(done))
    # 0 while it is verified, which may be interrupted, too
    assert [done for done in told if done[0]] == 2 * [(1, 4), (2, 4), (3, 4), (4, 4)] and (0, 4) in told

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_dataset(tmp_path / "other.safetensors", data, progress=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["data.safetensors"]


FACTS = {"which": [0, 1, 0], "unconditional": 1, "texts": [{"guidance": 6.0}, {}]}


def content(**changed):
    tensors = {f"latent.{index}": torch.full((2, 1, 2, 2), float(index)) for index in range(3)}
    tensors |= {f"text.{index}.context": torch.ones(1, 3, 8) for index in range(2)} | {
        "text.0.pooled_output": torch.ones(1, 4)
    }
    return {name: value for name, value in (tensors | changed).items() if value is not None}


NAN = float("nan")
WRONG = {
    "nan": ({"latent.1": torch.full((2, 1, 2, 2), NAN)}, {}, r"latent\.1 has NaN or infinite values"),
    "channels": (
        {"latent.1": torch.ones(3, 1, 2, 2)},
        {},
        r"latent\.1 is .* shape \(3, 1, 2, 2\); expected .* as in latent\.0",
    ),
    "flat": ({"latent.0": torch.ones(2, 2, 2)}, {}, r"latent\.0 is torch\.float32 of shape \(2, 2, 2\)"),
    "empty": ({"latent.2": torch.ones(2, 0, 2, 2)}, {}, r"latent\.2 is torch\.float32 of shape \(2, 0, 2, 2\)"),
    "whole": ({"latent.2": torch.ones(2, 1, 2, 2, dtype=torch.int32)}, {}, r"latent\.2 is torch\.int32"),
    "text nan": ({"text.1.context": torch.full((1, 3, 8), NAN)}, {}, "its embedding of entry 1 has NaN"),
    "no tokens": ({"text.1.context": torch.ones(1, 0, 8)}, {}, r"embedding 1 is torch\.float32 of shape \(1, 0, 8\)"),
    "widths": ({"text.1.context": torch.ones(1, 3, 6)}, {}, "its texts have the widths 6, 8; expected one"),
    "pooled": ({"text.0.pooled_output": torch.ones(2, 4)}, {}, r"pooled_output of entry 0 has shape \(2, 4\)"),
    "missing": ({"latent.1": None}, {}, r"latent\.1"),
    "no context": ({"text.1.context": None}, {}, "context"),
    "stray": ({"latent.7": torch.ones(2, 1, 2, 2)}, {}, r"latent\.7 does not belong to any text"),
    "stray text": ({"text.2.context": torch.ones(1, 3, 8)}, {}, r"text\.2\.context does not belong to any text"),
    "index": ({}, {"which": [0, 1, 2]}, "`which` has indices from 0 to 2; expected 0 to 1"),
    "negative": ({}, {"which": [0, -1, 1]}, "-1 is not the index of a text"),
    "fraction": ({}, {"which": [0, 0.5, 1]}, r"0\.5 is not the index of a text"),
    "flag": ({}, {"unconditional": True}, "True is not the index of a text"),
    "no clips": ({}, {"which": []}, "it has no clips"),
    "number": (
        {},
        {"texts": [{"guidance": NAN}, {}]},
        "Its metadata entry 'facts' is not valid JSON .NaN is not a number",
    ),
    "text": ({}, {"texts": ["a", "b"]}, "its texts are not a list of entries"),
    "texts": ({}, {"texts": 5}, "its texts are not a list of entries"),
    "no empty text": ({}, {"empty": 2}, "list index out of range"),
    "samples": ({}, {"sample_prompts": 1}, "1 is not a list of texts"),
    "no captions": (
        {},
        {"which": [0, [], 1]},
        "3 latents with 3 texts; expected at least one latent, and one text for each",
    ),
    "caption": ({}, {"which": [0, [1, -1], 1]}, "-1 is not the index of a text"),
    "image nan": ({"image.0.mask": torch.full((1,), NAN)}, {}, r"image\.0\.mask is not made of finite numbers"),
    "image of one": ({"image.0.mask": torch.ones(1)}, {}, "its clips have different parts of an image conditioning"),
    "stray image": ({"image.3.mask": torch.ones(1)}, {}, r"image\.3\.mask does not belong to any clip"),
    "no name": ({"image.0": torch.ones(1)}, {}, r"image\.0 does not belong to any clip"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_no_training_could_use_is_refused(tmp_path, case):
    tensors, facts, message = WRONG[case]
    path = tmp_path / "data.safetensors"
    write_tensors(path, content(**tensors), {"format": "dcm-dataset", "facts": json.dumps(FACTS | facts)})
    with pytest.raises(DCMError, match=f"data.safetensors is a damaged dataset file.*{message}"):
        read_dataset(path)


def test_numbers_that_the_file_cannot_hold_are_not_written(data, tmp_path):
    large = TensorDataset([data.latent(0) + 1e30], [text(1)], [0], text(9))
    with pytest.raises(CheckpointError, match=r"latent\.0 has values too large for torch\.float16"):
        write_dataset(tmp_path / "data.safetensors", large, torch.float16)
    assert not list(tmp_path.iterdir())


def test_a_changed_number_is_noticed(data, tmp_path):
    path = tmp_path / "data.safetensors"
    write_dataset(path, data)
    raw = bytearray(path.read_bytes())
    raw[TensorFile(path).offsets["latent.2"]] ^= 1
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"data\.safetensors is damaged: .*checksum"):
        read_dataset(path)


def test_many_texts_are_read_in_time(tmp_path):
    count = 5000
    tensors = {f"latent.{index}": torch.ones(1, 1, 1, 1) for index in range(count)}
    tensors |= {f"text.{index}.context": torch.ones(1, 1, 1) for index in range(count)}
    facts = {"which": list(range(count)), "unconditional": 0, "texts": [{}] * count}
    write_tensors(tmp_path / "x.safetensors", tensors, {"format": "dcm-dataset", "facts": json.dumps(facts)})
    with timed(5):
        assert len(read_dataset(tmp_path / "x.safetensors")) == count


@given(data=st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)
def test_mangled_files_are_read_or_refused(tmp_path, data):
    path = tmp_path / "x.safetensors"
    mangled(path, content(), {"format": "dcm-dataset", "version": "1", "facts": json.dumps(FACTS)}, data)
    with timed():
        try:
            found = read_dataset(path)
        except DCMError as error:
            assert str(path) in str(error)
        else:
            assert all(is_finite(found.latent(index)) and found.conditioning(index)[0] for index in range(len(found)))
