"""Read a safetensors file tensor by tensor, at any size.

Memory use is about one tensor, even for files larger than memory. The safetensors library checks a file, but tensors are
read at their offsets, because the library would map all of it (`mapped` does that).
"""

import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CheckpointError
from .checksum import CHECKSUM, Checksum

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
        return tensor_bytes(self.dtypes[key], self.shapes[key])

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


def tensor_bytes(dtype: torch.dtype, shape: Sequence[int]) -> int:
    """Size in bytes of a tensor."""
    count = dtype.itemsize
    for size in shape:
        count *= size
    return count


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
