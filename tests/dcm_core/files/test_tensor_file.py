"""Safetensors files: read exactly or refused with a reason."""

import json
import os
import struct
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from dcm_core.errors import CheckpointError
from dcm_core.files.checkpoint import recognise
from dcm_core.files.mapped import views
from dcm_core.files.tensor_file import TensorFile, each_read
from dcm_core.files.writing import write_tensors

from ..mangled import mangled, timed

ROOT = Path(__file__).parents[3]
# What torch knows and safetensors can hold.
HELD = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
    torch.uint16, torch.uint32, torch.uint64, torch.complex64,
]  # fmt: skip

FOUR = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def of_dtype(dtype, shape=(3, 5)):
    generator = torch.Generator().manual_seed(0)
    size = torch.Size(shape).numel() * dtype.itemsize
    raw = torch.randint(0, 2 if dtype is torch.bool else 256, (size,), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).reshape(shape)


def entries_of(tensors):
    return {key: (tensor.dtype, tensor.shape) for key, tensor in tensors.items()}


def raw_file(path, header, data=b""):
    """A file of any header (an object or bytes), correct or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def left_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_dtype_that_torch_has_not_is_named(tmp_path):
    header = json.dumps({"a": {"dtype": "F4", "shape": [8], "data_offsets": [0, 4]}}).encode()
    (path := tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with pytest.raises(CheckpointError, match=r"^\S*x\.safetensors: a is stored as F4; expected one of F64, F32"):
        TensorFile(path)


@pytest.mark.parametrize("dtype", HELD, ids=str)
def test_every_dtype_is_read_and_written_bit_for_bit(tmp_path, dtype):
    tensors = {"many": of_dtype(dtype), "one": of_dtype(dtype, ()), "none": of_dtype(dtype, (0, 4))}
    theirs, ours = tmp_path / "theirs.safetensors", tmp_path / "ours.safetensors"
    save_file(tensors, theirs)
    write_tensors(ours, tensors, {})
    for file in (TensorFile(theirs), TensorFile(ours)):
        assert set(file.shapes) == set(tensors)
        for key, tensor in file.read_all().items():
            assert tensor.dtype is dtype and file.dtypes[key] is dtype
            assert tuple(tensor.shape) == file.shapes[key] == tuple(tensors[key].shape)
            assert torch.equal(bits(tensor), bits(tensors[key]))
            assert file.nbytes(key) == tensor.nbytes
    assert set(load_file(ours)) == set(tensors), "the safetensors library reads what we write"


@given(
    shapes=st.lists(st.lists(st.integers(0, 4), max_size=4), max_size=6),
    names=st.lists(st.text(min_size=1, max_size=12), min_size=6, max_size=6, unique=True),
    metadata=st.dictionaries(st.text(max_size=8), st.text(max_size=8), max_size=3),
    dtypes=st.lists(
        st.sampled_from([torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.bool]), min_size=6, max_size=6
    ),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_written_is_read(tmp_path, shapes, names, metadata, dtypes):
    names = [name for name in names if name != "__metadata__"]
    tensors = {name: of_dtype(dtype, shape) for name, shape, dtype in zip(names, shapes, dtypes, strict=False)}
    path = tmp_path / "x.safetensors"
    write_tensors(path, tensors, metadata)
    file = TensorFile(path)
    assert file.metadata == metadata
    assert entries_of(file.read_all()) == entries_of(tensors)
    assert all(torch.equal(bits(file.read(key)), bits(tensor)) for key, tensor in tensors.items())


def test_strided_tensors_are_written_in_order(tmp_path):
    tensors = {"t": torch.arange(12.0).reshape(3, 4).T, "e": torch.ones(1).expand(3, 2)}
    write_tensors(tmp_path / "x.safetensors", tensors, {})
    read = TensorFile(tmp_path / "x.safetensors").read_all()
    assert all(torch.equal(read[key], tensor) for key, tensor in tensors.items())


def test_a_tensor_read_does_not_change_with_the_file(tmp_path):
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"a": torch.ones(4)}, {})
    tensor = TensorFile(path).read("a")
    path.write_bytes(bytes(path.stat().st_size))
    assert tensor.tolist() == [1, 1, 1, 1]


def test_reading_in_turn_reports_bytes(tmp_path):
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"a": torch.ones(4), "b": torch.ones(2, dtype=torch.bfloat16), "c": torch.ones(9)}, {})
    seen = []
    keys = [key for key, _ in each_read(TensorFile(path), ["b", "a"], lambda *done: seen.append(done))]
    assert keys == ["b", "a"]
    assert seen == [(4, 20), (20, 20)]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs sparse files and the size of memory")
def test_a_file_larger_than_the_memory(tmp_path):
    size = 2 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    big = {"dtype": "U8", "shape": [size], "data_offsets": [16, 16 + size]}
    path = raw_file(tmp_path / "x.safetensors", {"a": FOUR, "big": big}, struct.pack("<4f", 1, 2, 3, 4))
    with path.open("rb+") as file:
        file.truncate(path.stat().st_size + size)
    file = TensorFile(path)
    assert file.shapes["big"] == (size,)
    assert file.read("a").tolist() == [1, 2, 3, 4]


# refused input


def pickled(path):
    torch.save({"a": torch.ones(2)}, path)


def old_pickle(path):
    torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (pickled, "is a PyTorch pickle"),
        (old_pickle, "is a pickle"),
        (lambda path: path.write_bytes(b"GGUF" + bytes(100)), "is a GGUF file"),
        (lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid"), "Git LFS pointer"),
        (lambda path: path.write_bytes(b"<!DOCTYPE html><html>"), "a web page"),
        (lambda path: path.write_bytes(b""), "not a complete safetensors file"),
        (lambda path: path.write_bytes(b"1234567"), "not a complete safetensors file"),
        (lambda path: path.write_bytes(bytes(64)), "not a complete safetensors file"),
        (lambda path: path.write_bytes(b"\xff" * 64), "not a complete safetensors file"),
        (lambda path: path.mkdir(), "is a folder"),
        (lambda path: None, "does not exist"),
    ],
)
def test_files_given_by_mistake(tmp_path, make, message):
    path = tmp_path / "model.safetensors"
    make(path)
    with pytest.raises(CheckpointError, match=message) as caught:
        TensorFile(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "header",
    [
        b"not json at all",
        b"[1, 2]",
        b'{"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}',
        b"{\xff\xfe}",
        {"a": FOUR | {"data_offsets": [0, 15]}},
        {"a": FOUR | {"data_offsets": [16, 0]}},
        {"a": FOUR | {"data_offsets": [0, 2**63]}},
        {"a": FOUR | {"shape": [5]}},
        {"a": FOUR | {"shape": [-4]}},
        {"a": FOUR | {"shape": [2**62, 2**62]}},
        {"a": FOUR | {"dtype": "F33"}},
        {"a": {"dtype": "F32", "shape": [4]}},
        {"a": FOUR, "b": FOUR},
        {"a": FOUR, "b": FOUR | {"data_offsets": [8, 24]}},
        {"a": FOUR, "b": FOUR | {"data_offsets": [20, 36]}},
        {"a": FOUR, "__metadata__": {"format": 1}},
        {"a": FOUR, "__metadata__": []},
    ],
)
def test_wrong_headers(tmp_path, header):
    path = raw_file(tmp_path / "x.safetensors", header, bytes(16))
    with pytest.raises(CheckpointError, match="not a complete safetensors file"):
        TensorFile(path)


@pytest.mark.parametrize("change", [-1, -16, 1, 1000])
def test_data_of_another_length_than_the_header_says(tmp_path, change):
    path = raw_file(tmp_path / "x.safetensors", {"a": FOUR}, bytes(16 + change))
    with pytest.raises(CheckpointError, match=r"not a complete safetensors file .* bytes\)\. Download it again"):
        TensorFile(path)


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    path = raw_file(tmp_path / "x.safetensors", {"a": FOUR}, bytes(16))

    def refuse(*_args, **_kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(CheckpointError, match="Permission denied"):
        TensorFile(path)


@pytest.mark.parametrize("length", [0x3C, 0x80, 0x4B50 << 8])
def test_a_header_length_that_looks_like_another_format(tmp_path, length):
    text = json.dumps({"a": FOUR}).encode()
    raw_file(tmp_path / "x.safetensors", text + b" " * (length - len(text)), bytes(16))
    assert TensorFile(tmp_path / "x.safetensors").shapes == {"a": (4,)}


def test_a_file_that_changes_or_goes_while_open(tmp_path):
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"a": torch.ones(4)}, {})
    file = TensorFile(path)
    write_tensors(path, {"b": torch.ones(4)}, {})
    with pytest.raises(CheckpointError, match="has changed since it was opened"):
        file.read("a")
    path.unlink()
    with pytest.raises(CheckpointError, match=r"x\.safetensors cannot be read .*Was the file moved"):
        file.read("a")


def entry(shape, begin=0, end=0, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize("shape", [[1] * 70, [1] * 100_000, [2**62, 0, 2**62], [0, 2**63 - 1], [0] * 1000, [2**40, 0]])
def test_shapes_that_no_tensor_has(tmp_path, shape):
    size = 0 if 0 in shape else 4
    path = raw_file(tmp_path / "x.safetensors", {"a": entry(shape, 0, size)}, bytes(size))
    with timed():
        try:
            file = TensorFile(path)
            tensors = [file.read("a"), file.read_all()["a"], views(file)["a"]]
        except CheckpointError as error:
            assert str(path) in str(error)
        else:
            assert all(tuple(tensor.shape) == tuple(shape) for tensor in tensors)


def test_a_key_that_is_there_twice(tmp_path):
    """The library checks one of the two, and what is read has to be what was checked."""
    small, large = json.dumps(entry([1], 0, 4)), json.dumps(entry([2**40], 0, 4))
    for first, second in ((small, large), (large, small)):
        path = raw_file(tmp_path / "x.safetensors", f'{{"a":{first},"a":{second}}}'.encode(), bytes(4))
        try:
            assert TensorFile(path).read("a").shape == (1,)
        except CheckpointError as error:
            assert "not a complete safetensors file" in str(error)


def test_a_header_larger_than_any(tmp_path):
    """Its text alone would take all memory."""
    with (tmp_path / "x.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", 90_000_000) + b'{"a":')
        file.truncate(100_000_000)
    with timed(), pytest.raises(CheckpointError, match=r"x\.safetensors has a header of 90 MB; expected at most 8 MB"):
        TensorFile(tmp_path / "x.safetensors")


@pytest.mark.parametrize("many", ["keys", "metadata", "dimensions"])
def test_the_largest_headers(tmp_path, many):
    text = {
        "keys": lambda: ",".join(f'"{n:x}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}' for n in range(100_000)),
        "metadata": lambda: '"__metadata__":{' + ",".join(f'"{n:x}":""' for n in range(500_000)) + "}",
        "dimensions": lambda: '"a":{"dtype":"U8","shape":[0' + ",1" * 3_000_000 + '],"data_offsets":[0,0]}',
    }[many]()
    path = raw_file(tmp_path / "x.safetensors", f"{{{text}}}".encode())
    assert 5e6 < path.stat().st_size < 8e6
    with timed(4):
        try:
            TensorFile(path).read_all()
        except CheckpointError as error:
            assert str(path) in str(error)
    with timed(4), suppress(CheckpointError):
        recognise(TensorFile(path))


@given(data=st.data())
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_mangled_files_are_read_or_refused(tmp_path, data):
    """Also where they are mapped, recognised and inspected."""
    path = tmp_path / "x.safetensors"
    tensors = {
        "a": torch.ones(3, 2),
        "b": torch.ones(4, dtype=torch.float8_e5m2),
        "blocks.0.attn1.to_q.lora_A.weight": torch.ones(2, 2),
    }
    mangled(path, tensors, {"k": "v", "dcm.expert": "detail"}, data)
    with timed():
        try:
            file = TensorFile(path)
            tensors = file.read_all()
        except CheckpointError as error:
            assert str(path) in str(error)
            return
    assert entries_of(tensors) == {key: (file.dtypes[key], file.shapes[key]) for key in file.shapes}
    with timed():
        mapped = views(file)
    assert all(torch.equal(bits(mapped[key]), bits(tensor)) for key, tensor in tensors.items())
    with timed():
        try:
            recognise(file)
        except CheckpointError as error:
            assert str(path) in str(error)
