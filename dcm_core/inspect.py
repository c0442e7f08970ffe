"""Say what a file is: layout, family, experts, rank, dtype, boundary, and keys that are missing or odd."""

import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from .checkpoint import Contents, Layout, recognise
from .errors import CheckpointError, name_some
from .lora_names import LoraKey, split_key
from .match import Target, any_model, expert_part, match_expert
from .storage import TensorFile
from .text import LINE_LENGTH, one_line


@dataclass(frozen=True)
class Inspection:
    """What a file is.

    Attributes:
        unplaced: keys of a LoRA that follow no known naming.
        known: how many of a LoRA's keys its family has a layer for.
        fits: how many of the expert's keys have a place in the model it was compared with.
        problem: None for a sound file.
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
    unplaced: tuple[str, ...]
    known: str | None
    fits: str | None
    problem: str | None

    def __str__(self) -> str:
        facts = {
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
            "odd keys": name_some(self.unplaced) if self.unplaced else None,
            "known keys": self.known,
            "fit model": self.fits,
            "problem": self.problem,
        }
        return in_lines(facts)


def in_lines(facts: Mapping[str, str | None]) -> str:
    """A line for each fact that is known."""
    return "\n".join(f"{name:>10}: {one_line(value, LINE_LENGTH)}" for name, value in facts.items() if value is not None)


def inspect_file(path: str | os.PathLike, target: Target | None = None) -> Inspection:
    """Look at a safetensors file; an incomplete model is described, with what is wrong in `problem`.

    Args:
        target: the model its expert is to go on.

    Raises:
        CheckpointError: a file that cannot be read at all.
    """
    file = TensorFile(path)
    problem = None
    try:
        contents = recognise(file)
    except CheckpointError as error:
        contents, problem = Contents(Layout.OTHER), str(error)
    names = {key: split_key(key) for key in file.shapes}
    said = file.metadata.get("dcm.family")
    family, expert = expert_part(file, contents)
    title = family.title if family else said
    shapes = {key: file.shapes[source] for key, source in expert.items()}
    preset = family.preset if family and contents.layout is Layout.RELEASE else None
    is_lora = contents.layout is Layout.EXPERT
    return Inspection(
        path=str(file.path),
        layout=contents.layout.value,
        family=title,
        experts=_experts(file, contents),
        tensors=len(file),
        gigabytes=sum(map(file.nbytes, file.shapes)) / 1e9,
        dtypes=dict(Counter(str(dtype).removeprefix("torch.") for dtype in file.dtypes.values()).most_common()),
        ranks=_ranks(file, names),
        alpha=_alpha(file, names) or (f"{family.lora_scale:g} x rank (the release's)" if preset else None),
        boundary=file.metadata.get("dcm.boundary") or (f"{preset.boundary:g}" if preset else None),
        timesteps=file.metadata.get("dcm.timesteps") or (json.dumps(preset.timesteps) if preset else None),
        unplaced=tuple(key for key, name in names.items() if name is None) if is_lora else (),
        known=str(match_expert(shapes, family, any_model(family, shapes))) if is_lora and family else None,
        fits=target.say(shapes, family) if target and expert else None,
        problem=problem,
    )


def _ranks(file: TensorFile, names: Mapping[str, LoraKey | None]) -> tuple[int, ...]:
    """Of our files the rank of one update, not of the stacked ones of fused modules."""
    said = file.metadata.get("dcm.rank", "")
    if said.isdecimal():
        return (int(said),)
    downs = (file.shapes[key] for key, name in names.items() if name and name.kind == "down")
    return tuple(sorted({shape[0] for shape in downs if shape}))


def _alpha(file: TensorFile, names: Mapping[str, LoraKey | None]) -> str | None:
    """As the file says it, else the alphas it stores."""
    if "dcm.alpha" in file.metadata:
        return file.metadata["dcm.alpha"]
    keys = (key for key, name in names.items() if name and name.kind == "alpha" and not file.shapes[key])
    return ", ".join(f"{value:g}" for value in sorted({file.read(key).item() for key in keys})) or None


def _experts(file: TensorFile, contents: Contents) -> tuple[str, ...]:
    if contents.layout is Layout.RELEASE:
        return ("semantic", "detail")
    role = file.metadata.get("dcm.expert")
    if role:
        return (role,)
    return ("not said",) if contents.layout is Layout.EXPERT else ()
