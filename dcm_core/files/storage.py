"""Read a safetensors file tensor by tensor, or write one as a stream, at any size.

Memory use is about one tensor, even for files larger than memory. The safetensors library checks a file, but tensors are
read at their offsets, because the library would map all of it (`mapped` does that). Written tensors go to disk at once.
"""

import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CheckpointError
from .checksum import CHECKSUM, EMPTY, Checksum
from .unfinished import Unfinished, unfinished_file
from .values import bytes_of

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

# Bytes, enough for 80,000 tensors. A crafted header could use up all memory.
MAX_HEADER = 8 * 2**20

# The first bytes of files that users choose by mistake.
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
        checksum: the checksum stored in our own files (see `checksum`); None in others.
        shapes, dtypes: key -> shape or dtype of a tensor.
        offsets: key -> where the tensor begins in the file.

    Raises:
        CheckpointError: it is not a complete safetensors file.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.metadata: dict[str, str] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self.offsets: dict[str, int] = {}
        if not self.path.is_file():
            what = "is a folder" if self.path.is_dir() else "does not exist"
            raise CheckpointError(f"{self.path} {what}; expected a .safetensors file. Check the name.")
        self._refuse_foreign()
        try:
            with safe_open(self.path, framework="np"):  # raises if the file is damaged
                self._read_header()
            self._state = self._file_state()
        except (SafetensorError, OSError, ValueError, RecursionError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(
                f"{self.path} is not a complete safetensors file ({error}; {self.path.stat().st_size:,} bytes). Download it again."
            ) from error
        self.checksum = self.metadata.pop(CHECKSUM, None)

    def _refuse_foreign(self) -> None:
        try:
            with self.path.open("rb") as file:
                start = file.read(32)
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read ({error}). Check the file's permissions.") from error
        for mark, what in FOREIGN:
            # the first byte of a pickle or a web page may also be part of a header's length
            if start.startswith(mark) and start[8:9] != b"{":
                raise CheckpointError(
                    f"{self.path} is {what}; expected a .safetensors file. Download or convert the safetensors version."
                )
        length = int.from_bytes(start[:8], "little")
        if MAX_HEADER < length < self.path.stat().st_size:
            raise CheckpointError(
                f"{self.path} has a header of {length / 1e6:,.0f} MB; expected at most {MAX_HEADER / 1e6:.0f} MB. Remove its metadata, or "
                "download the file again."
            )

    def _read_header(self) -> None:
        """Parse the header that the safetensors library has checked."""
        with self.path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        self.metadata = header.pop("__metadata__", None) or {}
        for key, entry in header.items():
            self.shapes[key], self.dtypes[key] = tuple(entry["shape"]), self._dtype(key, entry["dtype"])
            begin, end = entry["data_offsets"]
            self.offsets[key] = 8 + length + begin
            if end - begin != self.nbytes(key):  # with duplicate names, the library may have checked the other entry
                raise ValueError(
                    f"{key} has {end - begin} bytes, but its shape {self.shapes[key]} needs {self.nbytes(key)}"
                )

    def _file_state(self) -> tuple[int, int, int]:
        """A value that changes when the file does."""
        found = self.path.stat()
        return found.st_ino, found.st_size, found.st_mtime_ns

    def refuse_changed(self) -> None:
        """Raise CheckpointError if the file changed since it was opened."""
        if self._file_state() != self._state:
            raise CheckpointError(f"{self.path} has changed since it was opened. Load it again.")

    def _dtype(self, key: str, name: str) -> torch.dtype:
        if name not in DTYPES:
            raise CheckpointError(f"{self.path}: {key} is stored as {name}; expected one of {', '.join(DTYPES)}.")
        return DTYPES[name]

    def __len__(self) -> int:
        return len(self.shapes)

    def nbytes(self, key: str) -> int:
        """Size of a tensor in the file, in bytes."""
        return _nbytes(self.dtypes[key], self.shapes[key])

    @contextmanager
    def _opened(self) -> Iterator[Callable[[str], bytearray]]:
        """Open the file, and yield a function that reads the bytes of a tensor."""

        def read(key: str) -> bytearray:
            data = bytearray(self.nbytes(key))
            file.seek(self.offsets[key])
            file.readinto(data)  # a truncated file raises at the end of `_opened`
            return data

        try:
            with self.path.open("rb") as file:
                self.refuse_changed()
                yield read
                self.refuse_changed()
        except OSError as error:
            raise CheckpointError(
                f"{self.path} cannot be read ({error}). Was the file moved? Load it again."
            ) from error

    def _tensor(self, key: str, data: bytearray) -> Tensor:
        flat = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
        return flat.view(self.dtypes[key]).reshape(self.shapes[key])

    def read(self, key: str) -> Tensor:
        """One tensor, copied out of the file.

        Raises:
            CheckpointError: the file changed since it was opened.
        """
        with self._opened() as read:
            return self._tensor(key, read(key))

    def read_all(self) -> dict[str, Tensor]:
        """All tensors, in memory. If the file has a checksum, it is verified.

        Raises:
            CheckpointError: the file changed since it was opened, or does not match its checksum.
        """
        return {key: self._tensor(key, data) for key, data in self._verified()}

    def verify(self, progress: Progress | None = None) -> None:
        """Read the file and compare it with its checksum, if it has one. Nothing is kept.

        Args:
            progress: called with (bytes done, bytes in all) after each tensor; may raise to interrupt.

        Raises:
            CheckpointError: as for `read_all`.
        """
        if self.checksum is not None:
            for _ in self._verified(progress):
                pass

    def _verified(self, progress: Progress | None = None) -> Iterator[tuple[str, bytearray]]:
        """The bytes of every tensor. Once all are read, the checksum is compared."""
        found, done, total = Checksum(self.metadata), 0, sum(map(self.nbytes, self.shapes))
        with self._opened() as read:
            for key, shape in self.shapes.items():
                data = read(key)
                if self.checksum is not None:
                    found.add(key, NAMES[self.dtypes[key]], shape, data)
                done += len(data)
                if progress is not None:
                    progress(done, total)
                yield key, data
        if self.checksum not in (None, str(found)):
            raise CheckpointError(
                f"{self.path} is damaged: its content does not match its checksum ({self.checksum}, now {found}). "
                "Copy, download or save the file again."
            )


def _nbytes(dtype: torch.dtype, shape: Sequence[int]) -> int:
    count = dtype.itemsize
    for size in shape:
        count *= size
    return count


Entries = Mapping[str, tuple[torch.dtype, Sequence[int]]]


def file_size(entries: Entries, metadata: Mapping[str, str]) -> int:
    """Size in bytes of a file with these tensors."""
    return len(_header(entries, metadata)) + sum(_nbytes(*entry) for entry in entries.values())


def write_stream(
    target: str | os.PathLike | Unfinished,
    entries: Entries,
    tensors: Iterable[tuple[str, Tensor]],
    metadata: Mapping[str, str],
    progress: Progress | None = None,
) -> None:
    """Write a safetensors file with a checksum while its tensors are being computed.

    It appears under its name only when it is complete. An exception leaves no file.

    Args:
        target: its path, or an open file that the caller will finish.
        entries: key -> (dtype, shape) of all tensors, in the order of `tensors`.
        tensors: the tensors, in the same order.
        progress: called with (bytes done, bytes in all) after each tensor; may raise to interrupt.

    Raises:
        NoRoomError: there is not enough room on the disk.
        CheckpointError: the file cannot be written, or a tensor differs from its entry.
    """
    metadata = {_plain(name): _plain(value) for name, value in metadata.items()}
    header, checksum = _header(entries, metadata), Checksum(metadata)
    total = sum(_nbytes(*entry) for entry in entries.values())
    with _opened(target, len(header) + total) as file:
        file.write(header)
        done = 0
        announced = iter(entries.items())
        for key, tensor in tensors:
            name, (dtype, shape) = next(announced, ("nothing", (None, ())))
            if (key, tensor.dtype, tuple(tensor.shape)) != (name, dtype, tuple(shape)):
                raise CheckpointError(
                    f"{key} is {tensor.dtype} {tuple(tensor.shape)}; expected {name} {dtype} {tuple(shape)}."
                )
            data = bytes_of(tensor)
            checksum.add(key, NAMES[dtype], shape, data)
            file.write(data)
            done += _nbytes(dtype, shape)
            if progress is not None:
                progress(done, total)
        if (left := next(announced, None)) is not None:
            raise CheckpointError(f"{left[0]} is missing from the tensors written to {file.path}.")
        # the header is first in the file, but its checksum is known last
        file.write(str(checksum).encode(), at=header.index(EMPTY.encode()))


@contextmanager
def _opened(target: str | os.PathLike | Unfinished, nbytes: int) -> Iterator[Unfinished]:
    if isinstance(target, Unfinished):
        yield target
    else:
        with unfinished_file(Path(target), nbytes) as file:
            yield file


def _header(entries: Entries, metadata: Mapping[str, str]) -> bytes:
    # the checksum is the first entry of the file
    description: dict[str, object] = {"__metadata__": {CHECKSUM: EMPTY, **metadata}}
    offset = 0
    for key, (dtype, shape) in entries.items():
        end = offset + _nbytes(dtype, shape)
        if dtype not in NAMES:
            raise CheckpointError(f"{key} is {dtype}, which a safetensors file cannot store. Convert it first.")
        description[key] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(description, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _plain(text: str) -> str:
    """Replace surrogate halves (from file names that are not UTF-8), which would make the header unreadable."""
    return text.encode(errors="replace").decode()


def write_tensors(path: str | os.PathLike, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors that are in memory. See `write_stream`."""
    entries = {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()}
    write_stream(path, entries, iter(tensors.items()), metadata)


def each_read(
    file: TensorFile, keys: Iterable[str], progress: Progress | None = None, read: Callable[[str], Tensor] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """The tensors named by `keys`, one at a time, with progress in bytes. `read` replaces reading from the file."""
    keys = list(keys)
    total, done = sum(file.nbytes(key) for key in keys), 0
    for key in keys:
        tensor = (read or file.read)(key)
        done += file.nbytes(key)
        if progress is not None:
            progress(done, total)
        yield key, tensor
