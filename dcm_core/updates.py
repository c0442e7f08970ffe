"""What an expert does to each tensor of its base, read from its file or from the modules it was made into, a layer at a time."""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from .adapters import RoutedExpert
from .checkpoint import Contents
from .errors import ExpertError
from .experts import LowRank, place_low_rank, split_fused, stack_updates
from .families import Family
from .keymap import Piece
from .lora_names import Kind, Shapes, is_release_part
from .match import any_model, expert_part, match_expert, tensor_name
from .storage import Progress, TensorFile


@dataclass(frozen=True)
class Update:
    """What an expert does to one tensor of its base, or to the rows of it that begin at `start`.

    Attributes:
        name: native tensor name.
        replaced: stands in the tensor's place; the others are added to it.
    """

    name: str
    low_rank: LowRank | None = None
    diff: Tensor | None = None
    replaced: Tensor | None = None
    start: int = 0

    @property
    def rows(self) -> int:
        tensor = next(t for t in (self.replaced, self.diff, self.low_rank and self.low_rank.up) if t is not None)
        return tensor.shape[0] if tensor.ndim else 1


def file_updates(
    file: TensorFile,
    contents: Contents,
    shapes: Shapes | None = None,
    peft_config: Mapping | None = None,
    progress: Progress | None = None,
) -> Iterator[Update]:
    """The updates of the expert in a file, the tensors of one layer in memory at a time; misfits are left out.

    Args:
        shapes: native tensor names and shapes of the model it goes on, if there is one.
    """
    family, expert = expert_part(file, contents)
    if family is None:
        return
    keys = {name: file.shapes[key] for name, key in expert.items()}
    shapes = shapes or any_model(family, keys)
    default_scale = DefaultScale(family, file.metadata, peft_config, released=is_release_part(keys, family))
    sites = match_expert(keys, family, shapes).sites
    for done, site in enumerate(sites, start=1):
        tensors = {kind: file.read(expert[key]) for kind, key in site.keys.items()}
        yield from site_updates(site.piece, tensors, family, shapes, default_scale)
        if progress is not None:
            progress(done, len(sites))


class DefaultScale:
    """alpha / rank of a pair that stores no alpha: PEFT's or diffusers' configuration, else the release's, else 1."""

    def __init__(self, family: Family, metadata: Mapping[str, str], peft_config: Mapping | None, released: bool):
        self.config = peft_config or _diffusers_config(metadata) or {}
        self.fallback = family.lora_scale if released else 1.0

    def __call__(self, module: str, rank: int) -> float:
        alpha = self.config.get("lora_alpha")
        for pattern, value in (self.config.get("alpha_pattern") or {}).items():
            if re.fullmatch(rf"(.*\.)?({pattern})", module):
                alpha = value
        if alpha is None:
            return self.fallback
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)


def _diffusers_config(metadata: Mapping[str, str]) -> dict:
    """The LoRA configuration diffusers stores as JSON in a file's metadata, keys without their `transformer.`."""
    try:
        config = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    except json.JSONDecodeError as error:
        raise ExpertError(f"The metadata `lora_adapter_metadata` is no JSON ({error}). Save the LoRA again.") from error
    return {key.removeprefix("transformer."): value for key, value in config.items()}


def site_updates(
    piece: Piece, tensors: Mapping[Kind, Tensor], family: Family, shapes: Shapes, default_scale: DefaultScale
) -> Iterator[Update]:
    """What a site's tensors, which fit the model, do to it."""
    weight, bias = (tensor_name(piece, kind, shapes) for kind in ("diff", "diff_b"))
    known = (shapes.get(weight, ()), *(tensors[kind].shape for kind in ("down", "diff") if kind in tensors))
    start = (piece.part or 0) * next((shape[1] for shape in known if len(shape) > 1), 0)
    whole = {kind: piece.in_native_order(tensor) for kind, tensor in tensors.items() if kind not in ("down", "up", "alpha")}
    diff = whole.get("diff")
    if "down" in tensors:
        down, up = tensors["down"], tensors["up"]
        scale = default_scale(piece.source, down.shape[0]) if "alpha" not in tensors else tensors["alpha"].item() / down.shape[0]
        updates = split_fused(piece.target, [place_low_rank(piece, down, up, scale)], family)
        together = diff is not None and diff.shape == (up.shape[0], *down.shape[1:])
        yield from low_rank_updates(weight, updates, diff if together else None, start)
        diff = None if together else diff
    if diff is not None:
        yield Update(weight, diff=diff, start=start)
    if "diff_b" in whole:
        yield Update(bias, diff=whole["diff_b"], start=start)
    for kind, name in (("set_weight", weight), ("set_bias", bias)):
        if kind in whole:
            yield Update(name, replaced=whole[kind])


def low_rank_updates(name: str, updates: Sequence[LowRank], diff: Tensor | None = None, start: int = 0) -> Iterator[Update]:
    """Each low-rank update of a tensor; with a difference of the rows from `start`, the sum of all."""
    if diff is None:
        yield from (Update(name, update, start=update.start) for update in updates)
    else:
        down, up, alpha = stack_updates([replace(update, start=update.start - start) for update in updates], diff.shape[0])
        yield Update(name, LowRank(down, up, alpha / down.shape[0], start), diff, start=start)


def routed_updates(expert: RoutedExpert, tensors: Mapping[str, Tensor]) -> Iterator[Update]:
    """The updates of an expert that is attached.

    Args:
        tensors: parameter name -> value; a host may keep the unpatched ones aside.
    """
    for index, (name, site) in enumerate(zip(expert.names, expert.sites, strict=True)):
        stem = f"sites.{index}"
        diff = tensors.get(f"{stem}.diff.weight")
        if site.branch is not None:
            downs = tensors[f"{stem}.branch.down.weight"].split(site.branch.ranks)
            ups = (tensors[f"{stem}.branch.ups.{number}.weight"] for number in range(len(downs)))
            pairs = [LowRank(down, up, 1.0, start) for start, down, up in zip(site.branch.starts, downs, ups, strict=True)]
            yield from low_rank_updates(f"{name}.weight", pairs, diff)
        elif diff is not None:
            yield Update(f"{name}.weight", diff=diff)
        if f"{stem}.diff.bias" in tensors:
            yield Update(f"{name}.bias", diff=tensors[f"{stem}.diff.bias"])
        for param in ("weight", "bias"):
            if (replaced := tensors.get(f"{stem}.replaced.{param}")) is not None:
                yield Update(f"{name}.{param}", replaced=replaced)
    for index, (name, replaced) in enumerate(zip(expert.bare_names, expert.bare_replaced, strict=True)):
        yield Update(name, **{"replaced" if replaced else "diff": tensors[f"bare.{index}"]})
