"""Safetensors files: read exactly or refused with a reason; written whole or not at all."""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from dcm_core import storage
from dcm_core.errors import CheckpointError
from dcm_core.storage import TensorFile, cast, each_read, is_finite, temporary_file, write_stream, write_tensors

ROOT = Path(__file__).parents[2]
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
    dtypes=st.lists(st.sampled_from([torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.bool]), min_size=6, max_size=6),
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
        (lambda path: path.write_bytes(b""), "no whole safetensors file"),
        (lambda path: path.write_bytes(b"1234567"), "no whole safetensors file"),
        (lambda path: path.write_bytes(bytes(64)), "no whole safetensors file"),
        (lambda path: path.write_bytes(b"\xff" * 64), "no whole safetensors file"),
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
    with pytest.raises(CheckpointError, match="no whole safetensors file"):
        TensorFile(path)


@pytest.mark.parametrize("change", [-1, -16, 1, 1000])
def test_data_of_another_length_than_the_header_says(tmp_path, change):
    path = raw_file(tmp_path / "x.safetensors", {"a": FOUR}, bytes(16 + change))
    with pytest.raises(CheckpointError, match=r"no whole safetensors file .* bytes\)\. Download it again"):
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
    with pytest.raises(CheckpointError, match="a cannot be read"):
        file.read("a")
    path.unlink()
    with pytest.raises(CheckpointError, match="a cannot be read"):
        file.read("a")


@given(data=st.data())
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_mangled_files_are_read_or_refused(tmp_path, data):
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"a": torch.ones(3, 2), "b": torch.ones(4, dtype=torch.float8_e5m2)}, {"k": "v"})
    content = bytearray(path.read_bytes())
    match data.draw(st.sampled_from(["cut", "flip", "insert", "header"])):
        case "cut":
            content = content[: data.draw(st.integers(0, len(content) - 1))]
        case "flip":
            for place in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=4)):
                content[place] = data.draw(st.integers(0, 255))
        case "insert":
            place = data.draw(st.integers(0, len(content)))
            content[place:place] = data.draw(st.binary(min_size=1, max_size=20))
        case "header":
            json_like = st.recursive(st.none() | st.integers() | st.text(max_size=5), lambda x: st.lists(x) | st.dictionaries(st.text(), x))
            header = json.dumps(data.draw(json_like)).encode()
            content = struct.pack("<Q", len(header)) + header
    path.write_bytes(content)
    try:
        file = TensorFile(path)
        tensors = file.read_all()
    except CheckpointError as error:
        assert str(path) in str(error)
    else:
        assert entries_of(tensors) == {key: (file.dtypes[key], file.shapes[key]) for key in file.shapes}


# writing


def test_wrong_announcements_leave_nothing(tmp_path):
    path = tmp_path / "x.safetensors"
    one, two = torch.ones(2), torch.ones(3)
    for entries, tensors, message in (
        ({"a": one, "b": two}, [("a", one)], "b was announced"),
        ({"a": one}, [("a", two)], r"\(3,\); a torch.float32 \(2,\) was announced"),
        ({"a": one}, [("b", one)], "was announced"),
        ({"a": one}, [("a", one.half())], "was announced"),
        ({"a": one}, [("a", one), ("b", two)], "b"),
    ):
        with pytest.raises(CheckpointError, match=message):
            write_stream(path, entries_of(entries), iter(tensors), {})
        assert left_in(tmp_path) == []


def test_a_dtype_that_no_file_holds(tmp_path):
    with pytest.raises(CheckpointError, match="complex128"):
        write_tensors(tmp_path / "x.safetensors", {"a": torch.ones(2, dtype=torch.complex128)}, {})
    assert left_in(tmp_path) == []


class Interrupted(BaseException):
    """As the host's own interrupt: no Exception."""


@pytest.mark.parametrize("error", [Interrupted, KeyboardInterrupt, SystemExit, OSError, RuntimeError])
@pytest.mark.parametrize("where", ["tensors", "progress"])
def test_an_exception_leaves_what_was_there(tmp_path, error, where):
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"old": torch.ones(1)}, {})
    before = path.read_bytes()
    tensors = {"a": torch.ones(4), "b": torch.ones(4)}

    def stop(*_):
        raise error

    def broken():
        yield "a", tensors["a"]
        stop()

    with pytest.raises(error):
        if where == "tensors":
            write_stream(path, entries_of(tensors), broken(), {})
        else:
            write_stream(path, entries_of(tensors), iter(tensors.items()), {}, stop)
    assert left_in(tmp_path) == ["x.safetensors"]
    assert path.read_bytes() == before


def test_the_target_appears_only_when_complete(tmp_path):
    path = tmp_path / "x.safetensors"
    tensors = {"a": torch.ones(4), "b": torch.ones(6)}
    seen = []

    def watch(done, total):
        seen.append((done, total))
        assert not path.exists()
        assert not [name for name in left_in(tmp_path) if name.endswith(".safetensors")]

    write_stream(path, entries_of(tensors), iter(tensors.items()), {}, watch)
    assert seen == [(16, 40), (40, 40)]
    assert left_in(tmp_path) == ["x.safetensors"]


@pytest.mark.skipif(os.name != "posix", reason="POSIX file modes")
def test_files_have_the_usual_mode(tmp_path):
    write_tensors(tmp_path / "x.safetensors", {"a": torch.ones(1)}, {})
    (tmp_path / "usual").write_bytes(b"")
    assert (tmp_path / "x.safetensors").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_disk_room_is_checked_first(tmp_path, monkeypatch):
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10**6})())

    def never():
        raise AssertionError("work began")
        yield

    with pytest.raises(CheckpointError, match=r"needs? 4\.0 GB, but .* has 0\.0 GB free"):
        write_stream(tmp_path / "x.safetensors", {"a": (torch.float32, (10**9,))}, never(), {})
    assert left_in(tmp_path) == []


def test_missing_folder(tmp_path):
    with pytest.raises(CheckpointError, match=r"The folder .*nowhere does not exist\. Create it"):
        write_tensors(tmp_path / "nowhere" / "x.safetensors", {}, {})


def test_temporary_file_needs_no_content(tmp_path):
    with pytest.raises(Interrupted), temporary_file(tmp_path / "x"):
        raise Interrupted
    assert left_in(tmp_path) == []


@pytest.mark.parametrize("name", [244 * "x" + ".safetensors", 241 * "x" + ".safetensors"])
def test_a_long_name(tmp_path, name):
    """A name that the system takes is written; another is refused in words."""
    if len(name) < 255:
        write_tensors(tmp_path / name, {"a": torch.ones(1)}, {})
        assert left_in(tmp_path) == [name]
    else:
        with pytest.raises(CheckpointError, match=r"cannot be written \(.*\)\. See that .* the name is not too long"):
            write_tensors(tmp_path / name, {"a": torch.ones(1)}, {})
        assert left_in(tmp_path) == []


def test_a_file_that_something_holds_is_kept(tmp_path, monkeypatch):
    (tmp_path / "x.safetensors").write_bytes(b"old")

    def held(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "replace", held)
    with pytest.raises(CheckpointError, match=r"x\.safetensors cannot be written \(Permission denied\).* no program holds the file open"):
        write_tensors(tmp_path / "x.safetensors", {"a": torch.ones(1)}, {})
    assert left_in(tmp_path) == ["x.safetensors"] and (tmp_path / "x.safetensors").read_bytes() == b"old"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_finite(dtype):
    assert is_finite(torch.tensor([0.0, -1.5, torch.finfo(dtype).max, torch.finfo(dtype).tiny]).to(dtype))
    assert not is_finite(torch.tensor([1.0, float("nan")]).to(dtype))


def test_a_cast_that_loses_values_is_refused():
    large = torch.tensor([1e5])
    assert cast("a", large, torch.bfloat16).dtype is torch.bfloat16
    assert torch.equal(cast("n", torch.tensor([7]), torch.int32), torch.tensor([7], dtype=torch.int32))
    with pytest.raises(CheckpointError, match=r"a has values too large for torch\.float16\. Choose bfloat16 or float32"):
        cast("a", large, torch.float16)


MEASURE = """
import sys
from dcm_core.storage import TensorFile, write_stream
def peak():
    # not getrusage: its maximum is inherited from the process that started this one
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
source, target = sys.argv[1:]
file = TensorFile(source)
file.read(next(iter(file.shapes)))
before = peak()
entries = {key: (file.dtypes[key], file.shapes[key]) for key in file.shapes}
write_stream(target, entries, ((key, file.read(key)) for key in entries), {})
print(peak() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")
def test_copying_a_file_needs_memory_for_one_tensor(tmp_path):
    path = tmp_path / "big.safetensors"
    count, size = 30, 8 * 2**20
    entries = {f"t{i}": (torch.uint8, (size,)) for i in range(count)}
    one = torch.ones(size, dtype=torch.uint8)
    write_stream(path, entries, ((key, one) for key in entries), {})
    command = [sys.executable, "-c", MEASURE, str(path), str(tmp_path / "copy.safetensors")]
    grown = int(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout) / 1024
    assert path.stat().st_size > 240 * 2**20
    assert grown < 60, f"{grown:.0f} MiB more for tensors of 8 MiB"
