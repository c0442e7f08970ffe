"""Convert a released checkpoint to a native base file and an expert file, tensor by tensor."""

import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .errors import CheckpointError, counted
from .experts.expert import expert_entries, expert_metadata, write_expert
from .experts.reader import read_release
from .files.checkpoint import Contents, Layout, each_native, recognise, release_metadata
from .files.metadata import level_entries
from .files.tensor_file import Progress, TensorFile
from .files.unfinished import check_room, check_targets, unfinished_file
from .files.values import cast
from .files.writing import Entries, file_size, write_stream

KEEP = "keep"
DTYPES: dict[str, torch.dtype | None] = {
    KEEP: None,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "float8_e4m3fn": torch.float8_e4m3fn,
}
FP8_MIN_DIM = 2


@dataclass(frozen=True)
class Conversion:
    """What was written."""

    family: str
    base: Path
    base_tensors: int
    expert: Path | None
    expert_line: str

    def __str__(self) -> str:
        lines = [f"{self.family} base: {self.base} ({counted(self.base_tensors, 'tensor')})"]
        lines += [f"{self.expert_line}: {self.expert}"] if self.expert else ["There is no expert in the file."]
        return "\n".join(lines)


def convert_release(
    source: str | os.PathLike,
    base: str | os.PathLike,
    expert: str | os.PathLike,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
    overwrite: bool = False,
) -> Conversion:
    """Convert a diffusers-layout file: the base to native names, and a release's detail expert to an expert file.

    Both files appear only when both are complete. Memory: about one tensor plus the expert.

    Args:
        dtype: dtype of the written base; None keeps it. fp8 is only used for the blocks' matrices; other tensors keep
            their dtype. The expert is never reduced to fp8.
        progress: called with (bytes read, bytes in all); may raise to interrupt.

    Raises:
        CheckpointError: the file needs no conversion or is incomplete, or a target exists.
    """
    source, base, expert = Path(source), Path(base), Path(expert)
    file = TensorFile(source)
    contents = recognise(file)
    if contents.matched is None:
        raise CheckpointError(
            f"{source} is {contents.layout.value}; only diffusers-layout model files need conversion. Load the file directly."
        )
    released = contents.layout is Layout.RELEASE
    targets = [base, expert] if released else [base]
    check_targets([source], targets, overwrite)
    found = read_release(file, contents) if released else None
    shapes = contents.native_shapes(file)
    entries = _base_entries(file, contents, dtype)
    metadata = _base_metadata(file, contents)
    sizes = {base: file_size(entries, metadata)}
    expert_dtype = dtype if dtype is not None and dtype.itemsize > 1 else None
    if found is not None:
        expert_file = expert_entries(found, shapes, expert_dtype)
        sizes[expert] = file_size(expert_file, expert_metadata(found, len(expert_file)))
    # room for both files; each is checked again when it is started
    check_room(sizes)
    line = str(found)
    with ExitStack() as stack:
        base_file, *expert_files = [stack.enter_context(unfinished_file(target, sizes[target])) for target in targets]
        if found is not None:
            write_expert(expert_files[0], found, shapes, expert_dtype)
            # freed before the base's large tensors are read
            found = None
        write_stream(base_file, entries, _base_tensors(file, contents, entries, progress), metadata)
    return Conversion(contents.family.title, base, len(contents.matched), expert if released else None, line)


def _base_entries(file: TensorFile, contents: Contents, dtype: torch.dtype | None) -> Entries:
    stored = {target: file.dtypes[pieces[0].source] for target, pieces in contents.matched.items()}
    return {
        target: (_target_dtype(target, stored[target], shape, dtype), shape)
        for target, shape in contents.native_shapes(file).items()
    }


def _base_tensors(
    file: TensorFile, contents: Contents, entries: Entries, progress: Progress | None
) -> Iterator[tuple[str, Tensor]]:
    for target, tensor in each_native(file, contents, progress):
        yield target, cast(target, tensor, entries[target][0])


def _base_metadata(file: TensorFile, contents: Contents) -> dict[str, str]:
    metadata = {"dcm.family": contents.family.name}
    if contents.layout is Layout.RELEASE:
        metadata |= {"dcm.expert": "semantic", **level_entries(release_metadata(file, contents.family).boundary, None)}
    return metadata


def _target_dtype(name: str, stored: torch.dtype, shape: tuple[int, ...], dtype: torch.dtype | None) -> torch.dtype:
    if dtype is None or not stored.is_floating_point:
        return stored
    if dtype.itemsize == 1 and not (len(shape) == FP8_MIN_DIM and "blocks." in name):
        return stored
    return dtype
