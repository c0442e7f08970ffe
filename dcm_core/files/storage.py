"""One safetensors file: read tensor by tensor, or written as a stream, whatever its size.

Resident memory stays at about one tensor, also for files larger than the memory: the safetensors library checks a file,
tensors are then read at their offsets (it would map the whole file; `mapped` does), and what is written goes to disk as it
is made.
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

# Bytes, enough for 80,000 tensors; a crafted header could take all memory.
MAX_HEADER = 8 * 2**20

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
        checksum: what our own files say of themselves (see `checksum`), None in others.
        shapes, dtypes: of every tensor, by key.
        offsets: where each tensor begins in the file.

    Raises:
        CheckpointError: anything but a complete safetensors file.
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
            with safe_open(self.path, framework="np"):  # refuses what is damaged
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
            # a pickle's or a page's first byte may also begin a header's length
            if start.startswith(mark) and start[8:9] != b"{":
                raise CheckpointError(
                    f"{self.path} is {what}; only .safetensors files are read. Download or convert the safetensors version."
                )
        length = int.from_bytes(start[:8], "little")
        if MAX_HEADER < length < self.path.stat().st_size:
            raise CheckpointError(
                f"{self.path} has a header of {length / 1e6:,.0f} MB; expected at most {MAX_HEADER / 1e6:.0f} MB. Remove its metadata, or "
                "download the file again."
            )

    def _read_header(self) -> None:
        """Take up what the safetensors library has found sound."""
        with self.path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        self.metadata = header.pop("__metadata__", None) or {}
        for key, entry in header.items():
            self.shapes[key], self.dtypes[key] = tuple(entry["shape"]), self._dtype(key, entry["dtype"])
            begin, end = entry["data_offsets"]
            self.offsets[key] = 8 + length + begin
            if end - begin != self.nbytes(key):  # of two entries of one name the library may have checked the other
                raise ValueError(
                    f"{key} has {end - begin} bytes, its shape {self.shapes[key]} needs {self.nbytes(key)}"
                )

    def _file_state(self) -> tuple[int, int, int]:
        """Changes when the file does."""
        found = self.path.stat()
        return found.st_ino, found.st_size, found.st_mtime_ns

    def refuse_changed(self) -> None:
        """Raises CheckpointError if the file is not the one that was opened."""
        if self._file_state() != self._state:
            raise CheckpointError(f"{self.path} has changed since it was opened. Load it again.")

    def _dtype(self, key: str, name: str) -> torch.dtype:
        if name not in DTYPES:
            raise CheckpointError(f"{self.path}: {key} is stored as {name}; expected one of {', '.join(DTYPES)}.")
        return DTYPES[name]

    def __len__(self) -> int:
        return len(self.shapes)

    def nbytes(self, key: str) -> int:
        """Size of a stored tensor in bytes."""
        return _nbytes(self.dtypes[key], self.shapes[key])

    @contextmanager
    def _opened(self) -> Iterator[Callable[[str], bytearray]]:
        """Gives what reads the bytes of a tensor."""

        def read(key: str) -> bytearray:
            data = bytearray(self.nbytes(key))
            file.seek(self.offsets[key])
            file.readinto(data)  # what is cut off is told of at the end
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
            CheckpointError: a file that changed since it was opened.
        """
        with self._opened() as read:
            return self._tensor(key, read(key))

    def read_all(self) -> dict[str, Tensor]:
        """All tensors, in memory; verified where the file has a checksum.

        Raises:
            CheckpointError: a file that changed since it was opened, or is not as it was written.
        """
        return {key: self._tensor(key, data) for key, data in self._verified()}

    def verify(self, progress: Progress | None = None) -> None:
        """Read everything and keep nothing, if the file has a checksum.

        Args:
            progress: called with (bytes done, bytes in all) after each tensor; may raise to interrupt.

        Raises:
            CheckpointError: as for `read_all`.
        """
        if self.checksum is not None:
            for _ in self._verified(progress):
                pass

    def _verified(self, progress: Progress | None = None) -> Iterator[tuple[str, bytearray]]:
        """The bytes of every tensor; after the last they have been found to be those that were written."""
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
                f"{self.path} is damaged: its content does not match the checksum it was written with ({self.checksum}, now {found}). "
                "Copy, download or make the file again."
            )


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
    target: str | os.PathLike | Unfinished,
    entries: Entries,
    tensors: Iterable[tuple[str, Tensor]],
    metadata: Mapping[str, str],
    progress: Progress | None = None,
) -> None:
    """Write a safetensors file with a checksum while its tensors are being made.

    It appears under its name only when it is complete; on any exception nothing is left behind.

    Args:
        target: its path, or the file itself where the caller gives it its name.
        entries: key -> (dtype, shape) of all that will come, in the order it will come.
        tensors: the tensors, in the same order.
        progress: called with (bytes done, bytes in all) after each tensor; may raise to interrupt.

    Raises:
        NoRoomError: too little room on the disk.
        CheckpointError: a file that cannot be written, or a tensor that is not as announced.
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
                    f"{key} is {tensor.dtype} {tuple(tensor.shape)}; {name} {dtype} {tuple(shape)} was announced."
                )
            data = bytes_of(tensor)
            checksum.add(key, NAMES[dtype], shape, data)
            file.write(data)
            done += _nbytes(dtype, shape)
            if progress is not None:
                progress(done, total)
        if (left := next(announced, None)) is not None:
            raise CheckpointError(f"{left[0]} was announced for {file.path} but never came.")
        # the header comes first in the file and is known last
        file.write(str(checksum).encode(), at=header.index(EMPTY.encode()))


@contextmanager
def _opened(target: str | os.PathLike | Unfinished, nbytes: int) -> Iterator[Unfinished]:
    if isinstance(target, Unfinished):
        yield target
    else:
        with unfinished_file(Path(target), nbytes) as file:
            yield file


def _header(entries: Entries, metadata: Mapping[str, str]) -> bytes:
    # the checksum's place is the first in the file
    description: dict[str, object] = {"__metadata__": {CHECKSUM: EMPTY, **metadata}}
    offset = 0
    for key, (dtype, shape) in entries.items():
        end = offset + _nbytes(dtype, shape)
        if dtype not in NAMES:
            raise CheckpointError(f"{key} is {dtype}, which no safetensors file holds. Convert it first.")
        description[key] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(description, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _plain(text: str) -> str:
    """Half a surrogate (of a file name that is no UTF-8) would make a header that nobody reads."""
    return text.encode(errors="replace").decode()


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
