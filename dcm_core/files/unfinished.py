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
except ImportError:  # Windows, where nobody can remove a file that is open
    fcntl = None

logger = logging.getLogger(LOGGER)

# What an unfinished file is called. A name may have 255 bytes, so the final one is cut.
PREFIX, SUFFIX = ".dcm.", ".part"
KEPT = 32
# What a system says when a file does not fit: on the disk, in the user's share of it, or into one file.
TOO_LARGE = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}


class Unfinished:
    """A file that is being written beside the place it will take, locked so that nobody takes it for one that was left.

    Attributes:
        path: its final name.
        nbytes: how large it will be, as far as that is known.

    Raises:
        CheckpointError: a file that cannot be made.
    """

    def __init__(self, path: Path, nbytes: int = 0):
        self.path, self.nbytes = path, nbytes
        self._file: io.FileIO | None = None
        with self._told():
            self._place, self._file = _create(path)

    def write(self, data: bytes | memoryview, at: int | None = None) -> None:
        """Append bytes, or put them over those that begin at `at`.

        Raises:
            NoRoomError: a full disk.
            CheckpointError: anything else that the system has against it.
        """
        left = memoryview(data)
        with self._told():
            self._file.seek(0, os.SEEK_END) if at is None else self._file.seek(at)
            while left:  # the system may take a part only
                left = left[self._file.write(left) :]

    def finish(self) -> None:
        """Give the file its name.

        Raises:
            CheckpointError: as for `write`.
        """
        with self._told():
            # on the disk before it takes the name: a power cut leaves the old file or the new one
            os.fsync(self._file.fileno())
            if fcntl is None:  # an open file cannot be moved there; elsewhere it stays locked until it has its name
                self._file.close()
            self._place.replace(self.path)

    def close(self) -> None:
        """Leave nothing beside the place."""
        self._file.close()
        self._place.unlink(missing_ok=True)

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Says what the system has against the file, under its final name."""
        try:
            yield
        except OSError as error:
            if error.errno in TOO_LARGE:
                size = self.nbytes
                with suppress(OSError, AttributeError):
                    size = max(size, self._file.tell())
                    self._file.truncate(0)  # what is free then is what there was
                raise _no_room({self.path: size}, f"{self.path} cannot be written ({error.strerror}): ") from error
            raise CheckpointError(
                f"{self.path} cannot be written ({error.strerror}). Check that its folder can be written to, that the name is not "
                "too long, and that no other program has the file open."
            ) from error


def _create(path: Path) -> tuple[Path, io.FileIO]:
    while True:
        # opened plainly, as `tempfile` would leave the file to its owner alone
        place = path.parent / f"{PREFIX}{path.name[:KEPT]}.{secrets.token_hex(8)}{SUFFIX}"
        file = place.open("xb", buffering=0)
        if fcntl is not None:
            with suppress(OSError):  # some network drives have no locks
                fcntl.flock(file, fcntl.LOCK_EX)
        if place.exists():
            return place, file
        # before it was locked another process removed it
        file.close()


@contextmanager
def unfinished_file(path: Path, nbytes: int = 0) -> Iterator[Unfinished]:
    """A file that takes its name if the block ends well and vanishes if not.

    Raises:
        NoRoomError: less free disk than `nbytes`.
        CheckpointError: a missing folder, or a file that cannot be written.
    """
    check_room({path: nbytes})
    file = Unfinished(path, nbytes)
    try:
        yield file
        file.finish()
    finally:
        file.close()


def write_bytes(path: Path, data: bytes) -> None:
    """Write a small file, as `unfinished_file`."""
    with unfinished_file(path, len(data)) as file:
        file.write(data)


def check_targets(sources: Sequence[Path], targets: Sequence[Path], overwrite: bool) -> None:
    """See that files may be written before any work is done.

    Raises:
        CheckpointError: a target that is a source, two of one place, or one that exists without `overwrite`.
    """
    resolved = [target.resolve() for target in targets]
    if {source.resolve() for source in sources} & set(resolved) or len(set(resolved)) < len(resolved):
        inputs = f"the input{'s' if len(sources) > 1 else ''} {', '.join(map(str, sources))}"
        raise CheckpointError(f"The outputs {', '.join(map(str, targets))} must be different files, and not {inputs}.")
    existing = [str(target) for target in targets if target.exists()]
    if existing and not overwrite:
        verb = "exists" if len(existing) == 1 else "exist"
        raise CheckpointError(f"{' and '.join(existing)} {verb} already. Choose another name, or allow overwriting.")


def check_room(sizes: Mapping[Path, int]) -> None:
    """See that the files (path -> bytes) can be written before any work is done.

    What killed processes left of the same files is removed first.

    Raises:
        NoRoomError: too little room on the disk they share.
        CheckpointError: a missing folder.
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
    """Of files on one disk."""
    names = reason or " and ".join(map(str, sizes)) + " "
    need = "it needs" if reason else "need" if len(sizes) > 1 else "needs"
    return NoRoomError(
        f"{names}{need} {sum(sizes.values()) / 1e6:,.1f} MB, but {next(iter(sizes)).parent} has {_free(sizes) / 1e6:,.1f} MB free. "
        "Make room, or choose another disk."
    )


def remove_left(folder: Path, pattern: str) -> None:
    """Remove what killed processes left of the files called so (a glob pattern); what is being written stays."""
    for path in folder.glob(f"{PREFIX}{pattern}.*{SUFFIX}"):
        with suppress(OSError), ExitStack() as stack:
            if fcntl is not None:
                file = stack.enter_context(path.open("rb+"))
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while somebody writes
            size = path.stat().st_size
            path.unlink()
            logger.warning("Removed %s (%.1f MB): the process that was writing it has ended.", path, size / 1e6)
