"""Files that appear when they are complete: what killed writers leave, what live ones hold, full disks."""

import errno
import os
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from dcm_core.errors import CheckpointError, NoRoomError
from dcm_core.files import unfinished
from dcm_core.files.unfinished import Unfinished, check_room, remove_left, unfinished_file, write_bytes

from .test_tensor_file import left_in

ROOT = Path(__file__).parents[3]
POSIX = pytest.mark.skipif(os.name != "posix", reason="needs the locks of POSIX")

WRITER = """
    import sys, time
    from pathlib import Path
    from dcm_core.files.unfinished import unfinished_file
    with unfinished_file(Path(sys.argv[1])) as file:
        file.write(bytes(3_000_000))
        print("begun", flush=True)
        sys.stdin.readline()
"""


@pytest.fixture
def writer(tmp_path):
    """writer(name) -> a process that is writing that file until it is told to end."""
    started = []

    def start(name="x.safetensors"):
        command = [sys.executable, "-c", textwrap.dedent(WRITER), str(tmp_path / name)]
        process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout.readline() == "begun\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_it_needs_no_content(tmp_path):
    with pytest.raises(KeyboardInterrupt), unfinished_file(tmp_path / "x"):
        raise KeyboardInterrupt
    assert left_in(tmp_path) == []
    write_bytes(tmp_path / "x", b"")
    assert left_in(tmp_path) == ["x"]


def test_it_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    seen, path = [], tmp_path / "a.bin"
    real = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda number: seen.append((os.fstat(number).st_size, path.exists())) or real(number)
    )
    write_bytes(path, b"1234")
    assert seen == [(4, False)] and path.read_bytes() == b"1234"


def test_bytes_are_put_over_others(tmp_path):
    with unfinished_file(tmp_path / "x") as file:
        file.write(b"0123")
        file.write(b"ab", at=1)
        file.write(b"45")
    assert (tmp_path / "x").read_bytes() == b"0ab345"


@POSIX
@pytest.mark.parametrize("name", ["x.safetensors", "[a] *?.safetensors", 60 * "long" + ".safetensors"])
def test_what_a_killed_process_left_goes_with_the_next_write(tmp_path, writer, caplog, name):
    process = writer(name)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (left,) = left_in(tmp_path)
    write_bytes(tmp_path / "another.safetensors", b"other")
    assert left in left_in(tmp_path), "another file's"
    write_bytes(tmp_path / name, b"new")
    assert left_in(tmp_path) == sorted(["another.safetensors", name])
    assert f"Removed the unfinished file {tmp_path / left} (3.0 MB)" in caplog.text


@POSIX
def test_two_processes_that_write_the_same_file_do_not_disturb_each_other(tmp_path, writer, caplog):
    first, second = writer(), writer()
    assert len(left_in(tmp_path)) == 2
    write_bytes(tmp_path / "x.safetensors", b"ours")
    remove_left(tmp_path, "*")
    assert (tmp_path / "x.safetensors").read_bytes() == b"ours" and len(left_in(tmp_path)) == 3
    for process in (first, second):
        process.communicate("\n")
        assert process.returncode == 0
        assert (tmp_path / "x.safetensors").stat().st_size == 3_000_000
    assert left_in(tmp_path) == ["x.safetensors"] and not caplog.text


@POSIX
def test_a_file_that_is_removed_before_it_is_locked_is_made_again(tmp_path, monkeypatch):
    """Between the two moments another process may take it for one that was left."""
    lock, removed = unfinished.fcntl.flock, []

    def late(file, how):
        if not removed:
            removed.append(file.name)
            os.unlink(file.name)
        lock(file, how)

    monkeypatch.setattr(unfinished.fcntl, "flock", late)
    write_bytes(tmp_path / "x", b"1")
    assert removed and left_in(tmp_path) == ["x"]


@POSIX
def test_without_locks_nothing_is_taken_for_left(tmp_path, monkeypatch):
    """Some network drives have none."""

    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(unfinished.fcntl, "flock", none)
    with unfinished_file(tmp_path / "x"):
        write_bytes(tmp_path / "x", b"1")
        assert len(left_in(tmp_path)) == 2
    assert left_in(tmp_path) == ["x"]


def test_a_link_or_a_folder_of_such_a_name_is_no_file_that_was_left(tmp_path):
    (tmp_path / ".dcm.x.0123.part").mkdir()
    (tmp_path / "target").write_bytes(b"kept")
    if os.name == "posix":
        (tmp_path / ".dcm.x.4567.part").symlink_to(tmp_path / "target")
    write_bytes(tmp_path / "x", b"1")
    assert (tmp_path / "target").read_bytes() == b"kept" and (tmp_path / ".dcm.x.0123.part").is_dir()


# full disks


class Full:
    """As a file on a disk with room for so many bytes."""

    def __init__(self, file, room, error=errno.ENOSPC):
        self.file, self.room, self.error = file, room, error

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, data):
        if len(data) > self.room:
            if self.room == 0:
                raise OSError(self.error, os.strerror(self.error))
            data = data[: self.room]
        self.room -= len(data)
        return self.file.write(data)


@pytest.mark.parametrize("error", sorted(unfinished.TOO_LARGE))
def test_a_disk_that_fills_up_amid_the_writing(tmp_path, monkeypatch, error):
    """What was written in part is given back before it is said how much is free."""
    free = []
    monkeypatch.setattr(
        unfinished, "_free", lambda _: free.append(sum(p.stat().st_size for p in tmp_path.iterdir())) or 2_500_000
    )
    (tmp_path / "x.safetensors").write_bytes(b"old")
    message = re.escape(
        f"{tmp_path / 'x.safetensors'} cannot be written ({os.strerror(error)}): it needs 2.0 MB, but {tmp_path} has 2.5 MB free. "
        "Make room, or choose another disk."
    )
    with pytest.raises(NoRoomError, match=message), unfinished_file(tmp_path / "x.safetensors", 2_000_000) as file:
        file._file = Full(file._file, 1_500_000, error)
        file.write(bytes(1_000_000))
        file.write(bytes(1_000_000))
    assert free[-1] == 3
    assert left_in(tmp_path) == ["x.safetensors"] and (tmp_path / "x.safetensors").read_bytes() == b"old"


def test_a_system_that_takes_a_part_at_a_time(tmp_path):
    with unfinished_file(tmp_path / "x") as file:
        plain = file._file

        class Slow:
            def __getattr__(self, name):
                return getattr(plain, name)

            def write(self, data):
                return plain.write(data[:7])

        file._file = Slow()
        file.write(bytes(range(100)))
    assert (tmp_path / "x").read_bytes() == bytes(range(100))


def test_room_is_checked_for_all_files_of_a_disk_together(tmp_path, monkeypatch):
    monkeypatch.setattr(unfinished, "_free", lambda _: 1_500_000)
    check_room({tmp_path / "a": 1_000_000})
    with pytest.raises(NoRoomError, match=r"a and .*b need 2\.0 MB, but .* has 1\.5 MB free\. Make room"):
        check_room({tmp_path / "a": 1_000_000, tmp_path / "b": 1_000_000})
    with pytest.raises(CheckpointError, match="nowhere does not exist"):
        check_room({tmp_path / "nowhere" / "a": 1})


def test_room_that_a_killed_process_holds_is_given_back_first(tmp_path, monkeypatch):
    (tmp_path / ".dcm.x.0123456789abcdef.part").write_bytes(bytes(2_000_000))
    monkeypatch.setattr(unfinished, "_free", lambda _: 3_000_000 - sum(p.stat().st_size for p in tmp_path.iterdir()))
    write_bytes(tmp_path / "x", bytes(2_500_000))
    assert left_in(tmp_path) == ["x"]


def test_the_file_is_made_once_for_all_that_is_written(tmp_path):
    file = Unfinished(tmp_path / "x")
    file.write(b"1")
    (name,) = left_in(tmp_path)
    assert re.fullmatch(r"\.dcm\.x\.[0-9a-f]{16}\.part", name)
    file.finish()
    file.close()
    assert left_in(tmp_path) == ["x"]
