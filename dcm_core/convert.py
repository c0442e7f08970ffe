"""Convert a released checkpoint to a native base file and an expert file, tensor by tensor."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .checkpoint import Contents, Layout, check_finite, detail_expert, each_native, recognise
from .errors import CheckpointError
from .experts import write_expert
from .keymap import fused_shape
from .storage import Progress, TensorFile, temporary_file, write_stream

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
        lines = [f"{self.family} base: {self.base} ({self.base_tensors} tensors)"]
        lines += [f"{self.expert_line}: {self.expert}"] if self.expert else ["no expert in the file"]
        return "\n".join(lines)


def convert_release(
    source: str | os.PathLike,
    base: str | os.PathLike,
    expert: str | os.PathLike,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
    overwrite: bool = False,
) -> Conversion:
    """Convert a diffusers-layout file: its base to native names, its detail expert (releases) to an expert file.

    Both files appear only when both are complete. Memory: about one tensor plus the expert.

    Args:
        dtype: of the written base, None to keep; fp8 is for the blocks' matrices only, the rest then stays as it is.
            The expert is never reduced to fp8.
        progress: called with (bytes read, bytes in all); may raise to interrupt.

    Raises:
        CheckpointError: a file that needs no conversion or is incomplete, or a target that exists.
    """
    source, base, expert = Path(source), Path(base), Path(expert)
    file = TensorFile(source)
    contents = recognise(file)
    if contents.matched is None:
        raise CheckpointError(
            f"{source} is {contents.layout.value}; only diffusers-layout model files are converted. Load it as it is."
        )
    released = contents.layout is Layout.RELEASE
    targets = [base, expert] if released else [base]
    _check_targets(source, targets, overwrite)
    found = detail_expert(file, contents) if released else None
    with temporary_file(base) as base_part:
        _write_base(file, contents, base_part, dtype, progress)
        if found is not None:
            kept = dtype if dtype is not None and dtype.itemsize > 1 else None
            write_expert(expert, found, contents.native_shapes(file), kept)
    return Conversion(contents.family.title, base, len(contents.matched), expert if found else None, str(found))


def _check_targets(source: Path, targets: list[Path], overwrite: bool) -> None:
    resolved = [target.resolve() for target in targets]
    if source.resolve() in resolved or len(set(resolved)) < len(resolved):
        raise CheckpointError(f"The outputs {', '.join(map(str, targets))} must be different files, and not the input {source}.")
    existing = [str(target) for target in targets if target.exists()]
    if existing and not overwrite:
        raise CheckpointError(f"{' and '.join(existing)} exists already. Choose another name, or allow overwriting.")


def _write_base(file: TensorFile, contents: Contents, path: Path, dtype: torch.dtype | None, progress: Progress | None) -> None:
    entries = {}
    for target, pieces in contents.matched.items():
        shape = fused_shape([file.shapes[piece.source] for piece in pieces])
        entries[target] = (_target_dtype(target, file.dtypes[pieces[0].source], shape, dtype), shape)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for target, tensor in each_native(file, contents, progress):
            check_finite(file, {target: tensor})
            yield target, tensor.to(entries[target][0])

    metadata = {"dcm.family": contents.family.name}
    if contents.layout is Layout.RELEASE:
        metadata |= {"dcm.expert": "semantic", "dcm.boundary": repr(contents.family.preset.boundary)}
    write_stream(path, entries, tensors(), metadata)


def _target_dtype(name: str, stored: torch.dtype, shape: tuple[int, ...], dtype: torch.dtype | None) -> torch.dtype:
    if dtype is None or not stored.is_floating_point:
        return stored
    if dtype.itemsize == 1 and not (len(shape) == FP8_MIN_DIM and "blocks." in name):
        return stored
    return dtype
