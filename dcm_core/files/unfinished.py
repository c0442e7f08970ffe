"""Files that appear under their name only when they are complete."""

import errno
import glob
import io
import logging
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from ..errors import CheckpointError, NoRoomError
from ..text import LOGGER

try:
    import fcntl
except ImportError:  # Windows, where an open file cannot be removed
    fcntl = None

logger = logging.getLogger(LOGGER)

# Name of an unfinished file. Names may have up to 255 bytes, so the final name is cut.
PREFIX, SUFFIX = ".dcm.", ".part"
KEPT = 32
# Errors for a file that is too large for the disk, the user's quota or the file system.
TOO_LARGE = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}


class Unfinished:
    """A file that is being written beside its final place. It is locked, so that it does not look like a leftover.

    Attributes:
        path: its final name.
        nbytes: its expected size, 0 if unknown.

    Raises:
        CheckpointError: the file cannot be created.
    """

    def __init__(self, path: Path, nbytes: int = 0):
        self.path, self.nbytes = path, nbytes
        self._file: io.FileIO | None = None
        with self._told():
            self._place, self._file = _create(path)

    def write(self, data: bytes | memoryview, at: int | None = None) -> None:
        """Append bytes, or overwrite those from `at`.

        Raises:
            NoRoomError: the disk is full.
            CheckpointError: any other error of the system.
        """
        left = memoryview(data)
        with self._told():
            self._file.seek(0, os.SEEK_END) if at is None else self._file.seek(at)
            while left:  # the system may write only a part
                left = left[self._file.write(left) :]

    def finish(self) -> None:
        """Move the file to its final name.

        Raises:
            CheckpointError: as for `write`.
        """
        with self._told():
            # flushed to disk before the rename: a power cut leaves the old file or the new one
            os.fsync(self._file.fileno())
            # Windows cannot move an open file; on other systems it stays locked until it has its name
            if fcntl is None:
                self._file.close()
            self._place.replace(self.path)

    def close(self) -> None:
        """Close the file, and remove it if it is not finished."""
        self._file.close()
        self._place.unlink(missing_ok=True)

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Turn an error of the system into one that names the final file."""
        try:
            yield
        except OSError as error:
            if error.errno in TOO_LARGE:
                size = self.nbytes
                with suppress(OSError, AttributeError):
                    size = max(size, self._file.tell())
                    self._file.truncate(0)  # the message reports the free space without this file
                raise _no_room({self.path: size}, f"{self.path} cannot be written ({error.strerror}): ") from error
            raise CheckpointError(
                f"{self.path} cannot be written ({error.strerror}). Check that its folder can be written to, that the name is not "
                "too long, and that no other program has the file open."
            ) from error


def _create(path: Path) -> tuple[Path, io.FileIO]:
    while True:
        # `tempfile` would make the file readable by its owner only
        place = path.parent / f"{PREFIX}{path.name[:KEPT]}.{secrets.token_hex(8)}{SUFFIX}"
        file = place.open("xb", buffering=0)
        if fcntl is not None:
            with suppress(OSError):  # some network drives have no locks
                fcntl.flock(file, fcntl.LOCK_EX)
        if place.exists():
            return place, file
        # another process removed it before it was locked
        file.close()


@contextmanager
def unfinished_file(path: Path, nbytes: int = 0) -> Iterator[Unfinished]:
    """A file that gets its name if the block succeeds, and is removed if it fails.

    Raises:
        NoRoomError: the disk has less room than `nbytes`.
        CheckpointError: the folder is missing, or the file cannot be written.
    """
    check_room({path: nbytes})
    file = Unfinished(path, nbytes)
    try:
        yield file
        file.finish()
    finally:
        file.close()


def write_bytes(path: Path, data: bytes) -> None:
    """Write a small file. See `unfinished_file`."""
    with unfinished_file(path, len(data)) as file:
        file.write(data)


def check_targets(sources: Sequence[Path], targets: Sequence[Path], overwrite: bool) -> None:
    """Check that files may be written, before any work is done.

    Raises:
        CheckpointError: a target is also a source or another target, or it exists and `overwrite` is False.
    """
    resolved = [target.resolve() for target in targets]
    if {source.resolve() for source in sources} & set(resolved) or len(set(resolved)) < len(resolved):
        inputs = f"the input{'s' if len(sources) > 1 else ''} {', '.join(map(str, sources))}"
        raise CheckpointError(
            f"The outputs {', '.join(map(str, targets))} must be different files, and different from {inputs}."
        )
    existing = [str(target) for target in targets if target.exists()]
    if existing and not overwrite:
        verb = "exists" if len(existing) == 1 else "exist"
        raise CheckpointError(f"{' and '.join(existing)} already {verb}. Choose another name, or allow overwriting.")


def check_room(sizes: Mapping[Path, int]) -> None:
    """Check that there is room for the files (path -> bytes), before any work is done.

    Leftovers that killed processes left of the same files are removed first.

    Raises:
        NoRoomError: there is not enough room on a disk.
        CheckpointError: a folder is missing.
    """
    disks: dict[int, dict[Path, int]] = {}
    for path, size in sizes.items():
        if not path.parent.is_dir():
            raise CheckpointError(
                f"The folder {path.parent} does not exist. Create it, or choose another place for {path.name}."
            )
        remove_left(path.parent, glob.escape(path.name[:KEPT]))
        disks.setdefault(path.parent.stat().st_dev, {})[path] = size
    for files in disks.values():
        if _free(files) < sum(files.values()):
            raise _no_room(files)


def _free(sizes: Mapping[Path, int]) -> int:
    return shutil.disk_usage(next(iter(sizes)).parent).free


def _no_room(sizes: Mapping[Path, int], reason: str = "") -> NoRoomError:
    """The error for files on one disk."""
    names = reason or " and ".join(map(str, sizes)) + " "
    need = "it needs" if reason else "need" if len(sizes) > 1 else "needs"
    return NoRoomError(
        f"{names}{need} {sum(sizes.values()) / 1e6:,.1f} MB, but {next(iter(sizes)).parent} has {_free(sizes) / 1e6:,.1f} MB free. "
        "Make room, or choose another disk."
    )


def remove_left(folder: Path, pattern: str) -> None:
    """Remove leftovers of killed processes whose final names match a glob pattern. Files that are being written stay."""
    for path in folder.glob(f"{PREFIX}{pattern}.*{SUFFIX}"):
        with suppress(OSError), ExitStack() as stack:
            if fcntl is not None:
                file = stack.enter_context(path.open("rb+"))
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while another process writes
            size = path.stat().st_size
            path.unlink()
            logger.warning(
                "Removed the unfinished file %s (%.1f MB). The process that was writing it has ended.", path, size / 1e6
            )
