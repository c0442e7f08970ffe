"""Write, remove and find the checkpoints of a run in its folder."""

import errno
import logging
import os
import re
import socket
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from torch import Tensor

from ..errors import CheckpointError, NoRoomError, counted
from ..families.keymap import Shape
from ..files.tensor_file import TensorFile
from ..files.unfinished import check_room, remove_left
from ..text import LOGGER
from .checkpoint_file import Checkpoint, read_checkpoint, write_checkpoint
from .config import TrainingConfig, TrainingError
from .parallel import Processes

try:
    import fcntl
except ImportError:  # Windows
    import msvcrt

    fcntl = None

logger = logging.getLogger(LOGGER)

PATTERN = "step_*.safetensors"
NAME = re.compile(r"step_\d{8}\.safetensors")
LOCK = "run.lock"
# What the system says of a lock that another process has.
HELD = {errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES, errno.EDEADLK}


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other runs out of the folder. The system releases the lock when its process ends, however it ends.

    Raises:
        TrainingError: another run uses the folder. The message says which.
        CheckpointError: the folder cannot be created or written to.
    """
    path = folder / LOCK
    with _writable(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = _open_locked(path)
    try:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}")
        file.flush()
        yield
    finally:
        # Windows cannot remove an open file; on other systems it stays locked until it is gone
        if fcntl is None:
            file.close()
        with suppress(OSError):
            path.unlink()
        file.close()


def _open_locked(path: Path) -> IO[str]:
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            _lock(file)
        except OSError as error:
            if error.errno not in HELD:
                logger.warning("%s has no file locks (%s). Do not start two runs in it.", path.parent, error.strerror)
                return file
            file.seek(0)
            holder = file.read().strip() or "its process is not known"
            file.close()
            raise TrainingError(
                f"{path.parent} is in use by another run: {holder}. Wait until it ends, or choose another name for this run."
            ) from error
        with suppress(OSError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        # its owner removed it before it was locked
        file.close()


def _lock(file: IO[str]) -> None:
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    else:
        # Windows keeps others from reading what is locked, so a byte far behind the text is locked
        file.seek(2**30)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)


@contextmanager
def _writable(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{folder} cannot be written to ({error}). Choose another place for the run's checkpoints."
        ) from error


def check_folder(folder: Path, size: int, count: int) -> None:
    """Create the folder, and check that it has room for `count` checkpoints of `size` bytes.

    Unfinished files of a killed run are removed.

    Raises:
        CheckpointError: the folder cannot be created or written to, or there is not enough room on the disk.
    """
    with _writable(folder):
        folder.mkdir(parents=True, exist_ok=True)
        remove_left(folder, PATTERN)
        with tempfile.TemporaryFile(dir=folder):
            pass
    missing = max(0, count - len(list(checkpoints_in(folder))))
    check_room({folder / PATTERN: missing * size})


def save_checkpoint(folder: Path, checkpoint: Checkpoint, keep: int, best_step: int = 0) -> Path:
    """Write a checkpoint, then remove older ones. The last `keep - 1` and the newest up to `best_step` stay.

    If the disk is full, all older ones but the newest are removed first.

    Raises:
        NoRoomError: there is not enough room on the disk. The newest checkpoint stays.
        CheckpointError: the file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = _path(folder, checkpoint.steps)
    try:
        write_checkpoint(path, checkpoint)
    except NoRoomError:
        spare = _sorted_until(folder, path)[:-1]
        if not spare:
            raise
        _remove(spare)
        write_checkpoint(path, checkpoint)
    before = _sorted_until(folder, path)
    good = [found for found in before if found <= _path(folder, best_step)]
    _remove(found for found in before[:-keep] if found not in good[-1:])
    return path


def _path(folder: Path, steps: int) -> Path:
    return folder / f"step_{steps:08d}.safetensors"


def _sorted_until(folder: Path, path: Path) -> list[Path]:
    """The checkpoints up to `path`, oldest first. Later ones belong to another run or are damaged."""
    return sorted(found for found in checkpoints_in(folder) if found <= path)


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            # in use by another program, such as a backup: it is removed with a later checkpoint
            logger.warning(
                "%s cannot be removed (%s). It will be tried again after the next checkpoint.", path, error.strerror
            )


def checkpoints_in(folder: Path) -> Iterator[Path]:
    """The checkpoints in a folder."""
    return (path for path in folder.glob(PATTERN) if NAME.fullmatch(path.name))


def check_resumable(folder: Path, config: TrainingConfig, identity: dict[str, str]) -> None:
    """Refuse a folder whose newest checkpoint this run cannot resume (`Checkpoint.check`). No weights are read.

    Raises:
        TrainingError: the checkpoint is of another run, or none can be read.
    """
    found = newest_checkpoint(folder, weights=False)
    if found is not None:
        path, saved = found
        saved.check(config, identity, path)


def newest_checkpoint(
    folder: Path, shapes: Mapping[str, Shape] | None = None, weights: bool = True
) -> tuple[Path, Checkpoint] | None:
    """The newest usable checkpoint; None if there are none. Unusable ones are skipped.

    Args:
        shapes: name -> shape of the run's tensors, if known.
        weights: whether to read the tensors too.

    Raises:
        TrainingError: there are checkpoints, but none is usable.
    """
    paths = sorted(checkpoints_in(folder), reverse=True)
    for path in paths:
        try:
            return path, read_checkpoint(path, shapes, weights)
        except CheckpointError as error:
            logger.warning("%s cannot be used (%s). Trying the checkpoint before it.", path, error)
    if paths:
        raise TrainingError(
            f"No checkpoint in {folder} can be used: {counted(len(paths), 'file')} tried (newest: {paths[0].name}; the log says why). Move "
            "them elsewhere to start over under this name, or choose another name."
        )
    return None


def in_all_processes(path: Path, loaded: dict[str, Tensor], processes: Processes) -> dict[str, Tensor]:
    """The tensors of a checkpoint, in all processes.

    Args:
        path: where this process would have it. On other machines the file may be missing, or another one; then it is sent.
        loaded: the tensors in the first process.
    """
    try:
        own = loaded or read_checkpoint(path).tensors
        checksum = TensorFile(path).checksum
    except CheckpointError:
        own, checksum = {}, None
    same = len(set(processes.gather((checksum, bool(own))))) == 1
    return own if same else processes.tensors_from_first(loaded)
