"""What an expert does to each tensor of its base, one layer at a time, from its file or from its modules."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor

from ..families import Family
from ..families.keymap import Piece
from ..families.lora_names import LOW_RANK, Kind, Shapes, is_release_part
from ..files.checkpoint import Contents
from ..files.metadata import LoraSettings, lora_settings
from ..files.tensor_file import Progress, TensorFile
from .expert import LowRank, place_low_rank, split_fused, stack_updates
from .match import AnyModel, expert_part, match_expert, tensor_name
from .modules import RoutedExpert


@dataclass(frozen=True)
class Update:
    """What an expert does to one tensor of its base, or to its rows from `start`.

    Attributes:
        name: native tensor name.
        low_rank: one low-rank update. With `diff`, all updates of the same rows, because their sum counts.
        replaced: a tensor that replaces this one. Everything else is added to it.
    """

    name: str
    low_rank: tuple[LowRank, ...] = ()
    diff: Tensor | None = None
    replaced: Tensor | None = None
    start: int = 0

    @property
    def rows(self) -> int:
        tensors = (self.replaced, self.diff, *(update.up for update in self.low_rank))
        tensor = next(tensor for tensor in tensors if tensor is not None)
        return tensor.shape[0] if tensor.ndim else 1

    @property
    def total(self) -> LowRank | None:
        """The low-rank updates as one."""
        if self.diff is None or not self.low_rank:
            return next(iter(self.low_rank), None)
        moved = [replace(update, start=update.start - self.start) for update in self.low_rank]
        down, up, alpha = stack_updates(moved, self.rows)
        return LowRank(down, up, alpha / down.shape[0], self.start)


def file_updates(
    file: TensorFile, contents: Contents, shapes: Shapes | None = None, progress: Progress | None = None
) -> Iterator[Update]:
    """The updates of the expert in a file. The tensors of one layer are in memory at a time; misfits are left out.

    Args:
        shapes: native tensor name -> shape of the model it is compared with, if any.

    Raises:
        ExpertError: its trainer's settings cannot be read.
    """
    family, expert = expert_part(file, contents)
    if family is None:
        return
    keys = {name: file.shapes[key] for name, key in expert.items()}
    shapes = shapes or AnyModel(family)
    default_scale = DefaultScale(family, file.metadata, file.path, released=is_release_part(keys, family))
    sites = match_expert(keys, family, shapes).sites
    for done, site in enumerate(sites, start=1):
        tensors = {kind: file.read(expert[key]) for kind, key in site.keys.items()}
        yield from site_updates(site.piece, tensors, family, shapes, default_scale)
        if progress is not None:
            progress(done, len(sites))


class DefaultScale:
    """alpha / rank of layers that store no alpha: from the trainer's settings in the file or beside it, else the release's, else 1.

    Args:
        path: path of the file, to find settings beside it.
        released: the file follows the release's conventions.
    """

    def __init__(self, family: Family, metadata: Mapping[str, str], path: Path | None, released: bool):
        self.metadata, self.path = metadata, path
        self.fallback, self.whence = (family.lora_scale, "as released") if released else (1.0, "")
        self.found: dict[float, None] = {}
        self.assumed: dict[float, None] = {}

    @cached_property
    def settings(self) -> LoraSettings | None:
        """The trainer's settings, read when first needed. A file that stores its alphas does not need them."""
        return lora_settings(self.metadata, self.path)

    def __call__(self, module: str, rank: int) -> float:
        scale = self.settings.scale(module, rank) if self.settings is not None else None
        if scale is None:
            self.assumed[self.fallback] = None
            return self.fallback
        self.found[scale] = None
        return scale

    @property
    def notes(self) -> tuple[str, ...]:
        """Where the scales came from, one note each."""
        notes = []
        if self.found:
            lowest, highest = min(self.found), max(self.found)
            span = f"{lowest:g}" if lowest == highest else f"{lowest:g} to {highest:g}"
            notes.append(f"scale {span} from {self.settings.source}")
        elif self.settings is not None and self.assumed:
            notes.append(f"{self.settings.source} is for another rank and was not used")
        if self.assumed:
            notes.append(f"no alpha: scale {self.fallback:g}" + (f" ({self.whence})" if self.whence else ""))
        return tuple(notes)


def site_updates(
    piece: Piece, tensors: Mapping[Kind, Tensor], family: Family, shapes: Shapes, default_scale: DefaultScale
) -> Iterator[Update]:
    """The updates of a site whose tensors fit the model."""
    # fp8 has no arithmetic, and bfloat16 can represent each of its values
    small = {
        kind: tensor.bfloat16()
        for kind, tensor in tensors.items()
        if tensor.is_floating_point() and tensor.dtype.itemsize == 1
    }
    tensors = {**tensors, **small}
    weight, bias = (tensor_name(piece, kind, shapes) for kind in ("diff", "diff_b"))
    known = (shapes.get(weight, ()), *(tensors[kind].shape for kind in ("down", "diff") if kind in tensors))
    start = piece.rows(next((shape[1] for shape in known if len(shape) > 1), 0)).start
    whole = {kind: piece.in_native_order(tensor) for kind, tensor in tensors.items() if kind not in LOW_RANK}
    diff, bias_diff = whole.get("diff"), whole.get("diff_b")
    if "down" in tensors:
        down, up = _matrices(tensors)
        rank = tensors["down"].shape[0]
        scale = tensors["alpha"].item() / rank if "alpha" in tensors else default_scale(piece.source, rank)
        updates = split_fused(place_low_rank(piece, down, up, scale), piece.target, family)
        together = diff is not None and diff.shape[0] == up.shape[0] and math.prod(diff.shape[1:]) == down.shape[1]
        yield from low_rank_updates(weight, updates, diff if together else None, start)
        diff = None if together else diff
        if "up_bias" in tensors:
            scaled = piece.in_native_order(tensors["up_bias"]).float() * scale
            bias_diff = scaled if bias_diff is None else bias_diff + scaled
    if diff is not None:
        yield Update(weight, diff=diff, start=start)
    if bias_diff is not None:
        yield Update(bias, diff=bias_diff, start=start)
    if "diff_m" in whole:
        yield Update(tensor_name(piece, "diff_m", shapes), diff=whole["diff_m"])
    for kind, tensor in whole.items():
        if kind in ("set_weight", "set_bias"):
            yield Update(weight if kind == "set_weight" else bias, replaced=tensor)


def _matrices(tensors: Mapping[Kind, Tensor]) -> tuple[Tensor, Tensor]:
    """down (rank, in) and up (rows, rank) of a low-rank update, with kernels flattened. A Tucker core is multiplied into `down`."""
    down = rearrange(tensors["down"], "rank ... -> rank (...)")
    up = rearrange(tensors["up"], "rows ... -> rows (...)")
    if "mid" in tensors:
        core = torch.einsum("ji...,ik->jk...", tensors["mid"].float(), down.float())
        down = rearrange(core, "rank ... -> rank (...)")
    return down, up


def low_rank_updates(
    name: str, updates: Sequence[LowRank], diff: Tensor | None = None, start: int = 0
) -> Iterator[Update]:
    """Each low-rank update of a tensor. If the rows from `start` also have a difference, they come as one."""
    if diff is None:
        yield from (Update(name, (update,), start=update.start) for update in updates)
    else:
        yield Update(name, tuple(updates), diff, start=start)


def routed_updates(expert: RoutedExpert, tensors: Mapping[str, Tensor]) -> Iterator[Update]:
    """The updates of an attached expert.

    Args:
        tensors: parameter name -> unpatched value, which a host may store elsewhere.
    """
    for index, (name, site) in enumerate(zip(expert.names, expert.sites, strict=True)):
        stem = f"sites.{index}"
        diff = tensors.get(f"{stem}.diff.weight")
        if site.branch is not None:
            downs = tensors[f"{stem}.branch.down.weight"].split(site.branch.ranks)
            ups = (tensors[f"{stem}.branch.ups.{number}.weight"] for number in range(len(downs)))
            pairs = [
                LowRank(down, up, 1.0, start) for start, down, up in zip(site.branch.starts, downs, ups, strict=True)
            ]
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
