"""One safetensors file: read tensor by tensor, or written as a stream, whatever its size.

Resident memory stays at about one tensor, also for files larger than the memory: the safetensors library checks a file,
tensors are then read at their offsets (it would map the whole file; `mapped` does), and what is written goes to disk as it
is made.
"""

import json
import os
import secrets
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import CheckpointError

Progress = Callable[[int, int], None]

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    **({"F8_E8M0": torch.float8_e8m0fnu} if hasattr(torch, "float8_e8m0fnu") else {}),
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "C64": torch.complex64,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}

# What temporary files are called.
PREFIX, SUFFIX = ".dcm.", ".part"

# How files that are given by mistake begin.
FOREIGN = (
    (b"PK\x03\x04", "a PyTorch pickle (or a zip)"),
    (b"\x80", "a pickle"),
    (b"GGUF", "a GGUF file"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself"),
    (b"<", "a web page, not the file itself"),
)


class TensorFile:
    """Read-only view of one safetensors file.

    Attributes:
        metadata: the file's string metadata.
        shapes, dtypes: of every tensor, by key.
        offsets: where each tensor begins in the file.

    Raises:
        CheckpointError: anything but a whole safetensors file.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        if not self.path.is_file():
            what = "is a folder" if self.path.is_dir() else "does not exist"
            raise CheckpointError(f"{self.path} {what}; expected a .safetensors file. Check the name.")
        self._refuse_foreign()
        try:
            with safe_open(self.path, framework="np") as file:
                self.metadata: dict[str, str] = dict(file.metadata() or {})
                for key in file.keys():  # noqa: SIM118 - not a dict
                    part = file.get_slice(key)
                    self.shapes[key] = tuple(part.get_shape())
                    self.dtypes[key] = self._dtype(key, str(part.get_dtype()))
            self.offsets = self._read_offsets()
            self._state = self._file_state()
        except (SafetensorError, OSError, ValueError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(
                f"{self.path} is no whole safetensors file ({error}; {self.path.stat().st_size:,} bytes). Download it again."
            ) from error

    def _refuse_foreign(self) -> None:
        try:
            with self.path.open("rb") as file:
                start = file.read(32)
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read ({error}). Check the file's permissions.") from error
        for mark, what in FOREIGN:
            # a pickle's or a page's first byte may also begin a header's length
            if start.startswith(mark) and start[8:9] != b"{":
                raise CheckpointError(
                    f"{self.path} is {what}; only .safetensors files are read. Download or convert the safetensors version."
                )

    def _file_state(self) -> tuple[int, int, int]:
        """Changes when the file does."""
        found = self.path.stat()
        return found.st_ino, found.st_size, found.st_mtime_ns

    def changed(self) -> bool:
        """True if the file is not the one that was opened."""
        return self._file_state() != self._state

    def _read_offsets(self) -> dict[str, int]:
        with self.path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        return {key: 8 + length + entry["data_offsets"][0] for key, entry in header.items() if key != "__metadata__"}

    def _dtype(self, key: str, name: str) -> torch.dtype:
        if name not in DTYPES:
            raise CheckpointError(f"{self.path}: {key} is stored as {name}; expected one of {', '.join(DTYPES)}.")
        return DTYPES[name]

    def __len__(self) -> int:
        return len(self.shapes)

    def nbytes(self, key: str) -> int:
        """Size of a stored tensor in bytes."""
        return _nbytes(self.dtypes[key], self.shapes[key])

    def read(self, key: str) -> Tensor:
        """One tensor, copied out of the file.

        Raises:
            CheckpointError: a file that changed since it was opened.
        """
        data = bytearray(self.nbytes(key))
        try:
            changed = self.changed()
            with self.path.open("rb") as file:
                file.seek(self.offsets[key])
                whole = file.readinto(data) == len(data)
        except OSError as error:
            raise CheckpointError(f"{self.path}: {key} cannot be read ({error}). Was the file moved? Load it again.") from error
        if changed or not whole:
            raise CheckpointError(f"{self.path}: {key} cannot be read: the file has changed since it was opened. Load it again.")
        flat = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
        return flat.view(self.dtypes[key]).reshape(self.shapes[key])

    def read_all(self, keys: Iterable[str] | None = None) -> dict[str, Tensor]:
        """The tensors called `keys`, all by default, in memory."""
        return {key: self.read(key) for key in (self.shapes if keys is None else keys)}


def _nbytes(dtype: torch.dtype, shape: Sequence[int]) -> int:
    count = dtype.itemsize
    for size in shape:
        count *= size
    return count


Entries = Mapping[str, tuple[torch.dtype, Sequence[int]]]


def file_size(entries: Entries, metadata: Mapping[str, str]) -> int:
    """Bytes of the file that will hold these tensors."""
    return len(_header(entries, metadata)) + sum(_nbytes(*entry) for entry in entries.values())


def write_stream(
    path: str | os.PathLike,
    entries: Entries,
    tensors: Iterable[tuple[str, Tensor]],
    metadata: Mapping[str, str],
    progress: Progress | None = None,
) -> None:
    """Write a safetensors file while its tensors are being made.

    It appears under its name only when it is complete; on any exception nothing is left behind.

    Args:
        entries: key -> (dtype, shape) of all that will come, in the order it will come.
        tensors: the tensors, in the same order.
        progress: called with (bytes done, bytes in all) after each tensor; may raise to interrupt.

    Raises:
        CheckpointError: too little room on the disk, or a tensor that is not as announced.
    """
    path = Path(path)
    header = _header(entries, metadata)
    total = sum(_nbytes(*entry) for entry in entries.values())
    with temporary_file(path, len(header) + total) as temporary, temporary.open("wb") as file:
        file.write(header)
        done = 0
        announced = iter(entries.items())
        for key, tensor in tensors:
            name, (dtype, shape) = next(announced, ("nothing", (None, ())))
            if (key, tensor.dtype, tuple(tensor.shape)) != (name, dtype, tuple(shape)):
                raise CheckpointError(f"{key} is {tensor.dtype} {tuple(tensor.shape)}; {name} {dtype} {tuple(shape)} was announced.")
            with _writing(path):
                file.write(bytes_of(tensor))
            done += _nbytes(dtype, shape)
            if progress is not None:
                progress(done, total)
        if (left := next(announced, None)) is not None:
            raise CheckpointError(f"{left[0]} was announced for {path} but never came.")
        # on the disk before it takes the name: a power cut leaves the old file or the new one
        with _writing(path):
            file.flush()
            os.fsync(file.fileno())


def _header(entries: Entries, metadata: Mapping[str, str]) -> bytes:
    description: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for key, (dtype, shape) in entries.items():
        end = offset + _nbytes(dtype, shape)
        if dtype not in NAMES:
            raise CheckpointError(f"{key} is {dtype}, which no safetensors file holds. Convert it first.")
        description[key] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    # half a surrogate (of a file name that is no UTF-8) would make a header that nobody reads
    text = json.dumps(description, ensure_ascii=False, separators=(",", ":")).encode(errors="replace")
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def check_room(sizes: Mapping[Path, int]) -> None:
    """See that the files (path -> bytes) can be written before any work is done.

    Raises:
        CheckpointError: a missing folder, or too little room on the disk they share.
    """
    disks: dict[int, list[Path]] = {}
    for path in sizes:
        if not path.parent.is_dir():
            raise CheckpointError(f"The folder {path.parent} does not exist. Create it, or choose another place for {path.name}.")
        disks.setdefault(path.parent.stat().st_dev, []).append(path)
    for paths in disks.values():
        needed, free = sum(sizes[path] for path in paths), shutil.disk_usage(paths[0].parent).free
        if free < needed:
            names = " and ".join(map(str, paths)) + (" need" if len(paths) > 1 else " needs")
            raise CheckpointError(
                f"{names} {needed / 1e9:.1f} GB, but {paths[0].parent} has {free / 1e9:.1f} GB free. Make room, or choose another disk."
            )


def bytes_of(tensor: Tensor) -> memoryview:
    """The values of a tensor as they are in memory."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def is_finite(tensor: Tensor) -> bool:
    """True if every value is a finite number; fp8 included."""
    if tensor.dtype.itemsize == 1:
        tensor = tensor.to(torch.float16)
    return bool(torch.isfinite(tensor).all())


def cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in another dtype.

    Raises:
        CheckpointError: values that are no numbers there.
    """
    value = tensor.to(dtype)
    if value.is_floating_point() and not is_finite(value):
        raise CheckpointError(f"{name} has values too large for {dtype}. Choose bfloat16 or float32.")
    return value


@contextmanager
def temporary_file(path: Path, nbytes: int = 0) -> Iterator[Path]:
    """A name beside `path` that takes its place if the block ends well and vanishes if not.

    Raises:
        CheckpointError: a missing folder, less free disk than `nbytes`, or a file that cannot be written.
    """
    check_room({path: nbytes})
    with _writing(path):
        # short: the whole name may have 255 bytes; opened plainly, as `tempfile` would leave the file to its owner alone
        temporary = path.parent / f"{PREFIX}{path.name[:32]}.{secrets.token_hex(8)}{SUFFIX}"
        temporary.open("xb").close()
    try:
        yield temporary
        with _writing(path):
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def unfinished(folder: Path, pattern: str) -> list[Path]:
    """Temporary files in a folder, of files called so, whose writers were killed or are at work."""
    return list(folder.glob(f"{PREFIX}{pattern}.*{SUFFIX}"))


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Tells what the system has against a file being written."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be written ({error.strerror}). See that its folder can be written to, that the disk has room, "
            "that the name is not too long, and that no program holds the file open."
        ) from error


def write_tensors(path: str | os.PathLike, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors that are in memory, as `write_stream`."""
    entries = {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()}
    write_stream(path, entries, iter(tensors.items()), metadata)


def each_read(
    file: TensorFile, keys: Iterable[str], progress: Progress | None = None, read: Callable[[str], Tensor] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """The tensors called `keys` one after the other, with progress in bytes; `read` gives them if not the file."""
    keys = list(keys)
    total, done = sum(file.nbytes(key) for key in keys), 0
    for key in keys:
        tensor = (read or file.read)(key)
        done += file.nbytes(key)
        if progress is not None:
            progress(done, total)
        yield key, tensor
