"""Safetensors files: written whole or not at all, with numbers that fit their dtype."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dcm_core.errors import CheckpointError
from dcm_core.files import unfinished
from dcm_core.files.tensor_file import TensorFile
from dcm_core.files.writing import write_stream, write_tensors

from .test_tensor_file import entries_of, left_in

ROOT = Path(__file__).parents[3]


def test_wrong_announcements_leave_nothing(tmp_path):
    path = tmp_path / "x.safetensors"
    one, two = torch.ones(2), torch.ones(3)
    for entries, tensors, message in (
        ({"a": one, "b": two}, [("a", one)], "b is missing from the tensors written to"),
        ({"a": one}, [("a", two)], r"\(3,\); expected a torch.float32 \(2,\)"),
        ({"a": one}, [("b", one)], "expected a torch.float32"),
        ({"a": one}, [("a", one.half())], "expected a torch.float32"),
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
    monkeypatch.setattr(unfinished.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10**6})())

    def never():
        raise AssertionError("work began")
        yield

    with pytest.raises(CheckpointError, match=r"x\.safetensors needs 4,000\.0 MB, but .* has 1\.0 MB free"):
        write_stream(tmp_path / "x.safetensors", {"a": (torch.float32, (10**9,))}, never(), {})
    assert left_in(tmp_path) == []


def test_missing_folder(tmp_path):
    with pytest.raises(CheckpointError, match=r"The folder .*nowhere does not exist\. Create it"):
        write_tensors(tmp_path / "nowhere" / "x.safetensors", {}, {})


def test_half_a_surrogate_in_the_metadata(tmp_path):
    write_tensors(tmp_path / "x.safetensors", {"a": torch.ones(1)}, {"clip": "é \udcff \U0001f600"})
    assert TensorFile(tmp_path / "x.safetensors").metadata == {"clip": "é ? \U0001f600"}


@pytest.mark.skipif(os.name != "posix", reason="needs the modes of POSIX")
def test_others_may_read_what_the_umask_lets_them(tmp_path, monkeypatch):
    """As for any new file, and without a moment in which the umask is another: it is that of every thread."""
    before = os.umask(0o027)
    try:
        with monkeypatch.context() as patched:
            patched.delattr(os, "umask")
            write_tensors(tmp_path / "x.safetensors", {"a": torch.ones(1)}, {})
        assert (tmp_path / "x.safetensors").stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(before)


@pytest.mark.parametrize("name", [244 * "x" + ".safetensors", 241 * "x" + ".safetensors"])
def test_a_long_name(tmp_path, name):
    """A name that the system takes is written; another is refused in words."""
    if len(name) < 255:
        write_tensors(tmp_path / name, {"a": torch.ones(1)}, {})
        assert left_in(tmp_path) == [name]
    else:
        with pytest.raises(CheckpointError, match=r"cannot be written \(.*\)\. Check that .* the name is not too long"):
            write_tensors(tmp_path / name, {"a": torch.ones(1)}, {})
        assert left_in(tmp_path) == []


def test_a_file_that_something_holds_is_kept(tmp_path, monkeypatch):
    (tmp_path / "x.safetensors").write_bytes(b"old")

    def held(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "replace", held)
    with pytest.raises(
        CheckpointError, match=r"x\.safetensors cannot be written \(Permission denied\).* no other program has"
    ):
        write_tensors(tmp_path / "x.safetensors", {"a": torch.ones(1)}, {})
    assert left_in(tmp_path) == ["x.safetensors"] and (tmp_path / "x.safetensors").read_bytes() == b"old"


MEASURE = """
import sys
from dcm_core.files.tensor_file import TensorFile
from dcm_core.files.writing import write_stream
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
