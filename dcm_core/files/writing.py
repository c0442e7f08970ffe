"""Write a safetensors file as a stream, at any size.

Memory use is about one tensor. Each tensor goes to disk at once.
"""

import json
import os
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError
from .checksum import CHECKSUM, EMPTY, Checksum
from .tensor_file import NAMES, Progress, tensor_bytes
from .unfinished import Unfinished, unfinished_file
from .values import bytes_of

# Key -> (dtype, shape).
Entries = Mapping[str, tuple[torch.dtype, Sequence[int]]]


def file_size(entries: Entries, metadata: Mapping[str, str]) -> int:
    """Size in bytes of a file with these tensors."""
    return len(_header(entries, metadata)) + sum(tensor_bytes(*entry) for entry in entries.values())


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
    total = sum(tensor_bytes(*entry) for entry in entries.values())
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
            done += tensor_bytes(dtype, shape)
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
        end = offset + tensor_bytes(dtype, shape)
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
