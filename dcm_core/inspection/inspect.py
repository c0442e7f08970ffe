"""Describe a file: layout, family, experts, rank, dtype, boundary, and keys that are missing or unknown."""

import json
import math
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import CheckpointError, ExpertError, name_some
from ..experts.match import AnyModel, Target, expert_part, match_expert
from ..experts.updates import DefaultScale
from ..families import Family
from ..families.keymap import Shape
from ..families.lora_names import LoraKey, is_release_part, split_key
from ..files.checkpoint import Contents, Layout, recognise
from ..files.metadata import ExpertMetadata, read_metadata
from ..files.tensor_file import Progress, TensorFile
from ..text import LINE_LENGTH, given, one_line

# How many alphas are read, and how many different ones are listed.
MOST_READ, MOST_ALPHAS = 2000, 6


@dataclass(frozen=True)
class Inspection:
    """The description of a file.

    Attributes:
        unplaced: keys of a LoRA in an unknown naming.
        two_models: the id that its file shares with the expert of the other one of two models.
        known: how many of a LoRA's keys its family has a layer for.
        fits: how many of the expert's keys fit the model it was compared with.
        checksum: the checksum of one of our own files, if its content matches.
        problem: what is wrong with the file, or None.
    """

    path: str
    layout: str
    family: str | None
    experts: tuple[str, ...]
    tensors: int
    gigabytes: float
    dtypes: dict[str, int]
    ranks: tuple[int, ...]
    alpha: str | None
    boundary: str | None
    timesteps: str | None
    two_models: str | None
    unplaced: tuple[str, ...]
    known: str | None
    fits: str | None
    checksum: str | None
    problem: str | None

    def __str__(self) -> str:
        lines = {
            "file": self.path,
            "layout": self.layout,
            "family": self.family or "unknown",
            "experts": ", ".join(self.experts) or "none",
            "tensors": f"{self.tensors} ({self.gigabytes:.3f} GB)",
            "dtypes": ", ".join(f"{name} x {count}" for name, count in self.dtypes.items()),
            "rank": ", ".join(map(str, self.ranks)) or "none",
            "alpha": self.alpha,
            "boundary": self.boundary,
            "timesteps": self.timesteps,
            "two models": self.two_models,
            "odd keys": name_some(self.unplaced) if self.unplaced else None,
            "known keys": self.known,
            "fit model": self.fits,
            "checksum": self.checksum,
            "problem": self.problem,
        }
        return in_lines(lines)


def in_lines(lines: Mapping[str, str | None]) -> str:
    """One line for each known value."""
    return "\n".join(
        f"{name:>10}: {one_line(value, LINE_LENGTH)}" for name, value in lines.items() if value is not None
    )


def inspect_file(path: str | os.PathLike, target: Target | None = None, progress: Progress | None = None) -> Inspection:
    """Describe a safetensors file. For an incomplete or damaged model, `problem` says what is wrong.

    A file with a checksum is read completely.

    Args:
        target: the model to compare its expert with.
        progress: called with (bytes done, bytes in all); may raise to interrupt.

    Raises:
        CheckpointError: the file cannot be read at all.
    """
    file = TensorFile(path)
    problem = None
    try:
        contents = recognise(file)
    except CheckpointError as error:
        contents, problem = Contents(Layout.OTHER), str(error)
    checksum = f"{file.checksum}, matches" if file.checksum else None
    try:
        file.verify(progress)
    except CheckpointError as error:
        checksum, problem = None, problem or str(error)
    names = {key: split_key(key) for key in file.shapes}
    metadata = ExpertMetadata()
    family, expert = expert_part(file, contents)
    shapes = {key: file.shapes[source] for key, source in expert.items()}
    preset = family.preset if family and contents.layout is Layout.RELEASE else None
    is_lora = contents.layout is Layout.EXPERT
    scales: tuple[str, ...] = (f"{family.lora_scale:g} x rank, as released",) if preset else ()
    try:
        metadata = read_metadata(file.metadata)
        scales = _default_scales(file, shapes, family) if is_lora and family else scales
    except ExpertError as error:
        problem = problem or str(error)
    said = metadata.family and given(metadata.family)
    return Inspection(
        path=str(file.path),
        layout=contents.layout.value,
        family=family.title if family else said,
        experts=_experts(metadata, contents),
        tensors=len(file),
        gigabytes=sum(map(file.nbytes, file.shapes)) / 1e9,
        dtypes=dict(Counter(str(dtype).removeprefix("torch.") for dtype in file.dtypes.values()).most_common()),
        ranks=_ranks(file, metadata, names),
        alpha="; ".join(filter(None, (_alpha(file, metadata, names), *scales))) or None,
        boundary=repr(metadata.boundary) if metadata.boundary else f"{preset.boundary:g}" if preset else None,
        timesteps=json.dumps(timesteps) if (timesteps := metadata.timesteps or (preset and preset.timesteps)) else None,
        two_models=metadata.pair.id if metadata.pair else None,
        unplaced=tuple(key for key, name in names.items() if name is None) if is_lora else (),
        known=str(match_expert(shapes, family, AnyModel(family))) if is_lora and family else None,
        fits=target.say(shapes, family) if target and expert else None,
        checksum=checksum,
        problem=problem,
    )


def _ranks(file: TensorFile, metadata: ExpertMetadata, names: Mapping[str, LoraKey | None]) -> tuple[int, ...]:
    """The ranks of its LoRA. In our own files this is the rank of one update, before fused modules are stacked."""
    if metadata.rank is not None:
        return (metadata.rank,)
    downs = (file.shapes[key] for key, name in names.items() if name and name.kind == "down")
    return tuple(sorted({shape[0] for shape in downs if shape}))


def _alpha(file: TensorFile, metadata: ExpertMetadata, names: Mapping[str, LoraKey | None]) -> str | None:
    """The alpha in its metadata, else the alphas it stores."""
    if metadata.alpha is not None:
        return f"{metadata.alpha:g}"
    keys = [key for key, name in names.items() if name and name.kind == "alpha" and math.prod(file.shapes[key]) == 1]
    values = sorted({float(file.read(key).float().item()) for key in keys[:MOST_READ]})
    shown = [f"{value:g}" for value in values[:MOST_ALPHAS]]
    return ", ".join(shown) + (f" and {len(values) - MOST_ALPHAS} more" if len(values) > MOST_ALPHAS else "") or None


def _default_scales(file: TensorFile, shapes: Mapping[str, Shape], family: Family) -> tuple[str, ...]:
    """The scales that are used for layers of a LoRA without a stored alpha.

    Raises:
        ExpertError: its trainer's settings cannot be read.
    """
    scale = DefaultScale(family, file.metadata, file.path, released=is_release_part(shapes, family))
    for site in match_expert(shapes, family, AnyModel(family)).sites:
        if "down" in site.keys and "alpha" not in site.keys:
            scale(site.piece.source, shapes[site.keys["down"]][0])
    return scale.notes


def _experts(metadata: ExpertMetadata, contents: Contents) -> tuple[str, ...]:
    if contents.layout is Layout.RELEASE:
        return ("semantic", "detail")
    if metadata.side:
        return (metadata.side,)
    return ("unknown",) if contents.layout is Layout.EXPERT else ()
