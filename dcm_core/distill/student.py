"""The student: an expert's float32 tensors, trained on top of the frozen base."""

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..errors import ExpertError, name_some
from ..experts.expert import Expert, LowRank, merged
from ..experts.modules import LAYER_PARAMS, RoutedExpert, find_module, is_linear
from ..families import Family
from .backbone import Working
from .parallel import ALONE, Processes
from .sharding import Shard, divide, whole

# native tensor name -> its dequantised value
WeightOf = Callable[[str], Tensor]


def _casting(kind: type[nn.Module]) -> type[nn.Module]:
    """A subclass of the layer that computes in its input's dtype, while its weights stay float32."""

    class Casting(kind):
        def forward(self, x: Tensor) -> Tensor:
            if x.dtype == self.weight.dtype and not isinstance(self.weight, Shard):
                return super().forward(x)
            return functional_call(self, {name: whole(value, x.dtype) for name, value in self.named_parameters()}, (x,))

    return Casting


CASTING = SimpleNamespace(
    **{kind.__name__: _casting(kind) for kind in (nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.Conv2d, nn.Conv3d)}
)


class PreciseExpert(RoutedExpert):
    """Its bare parameters stay in its own dtype, since the base's may be too coarse to train in. `strength` is not used.

    Args:
        processes: the processes that its layers are divided among, if they are.
    """

    def __init__(
        self,
        expert: Expert,
        base: Mapping[str, nn.Module],
        dtype: torch.dtype,
        device: torch.device,
        processes: Processes,
    ):
        super().__init__(expert, base, CASTING, dtype, torch.device("meta") if processes.sharded else device)
        if processes.sharded:
            divide(self, processes, device)

    def bare_values(
        self, root: nn.Module, strength: float, prefix: str = ""
    ) -> Iterator[tuple[nn.Module, str, Tensor]]:
        for name, replaced, tensor in zip(self.bare_names, self.bare_replaced, self.bare, strict=True):
            if not name.startswith(prefix):
                continue
            module_name, _, attribute = name.rpartition(".")
            module = find_module(root, module_name)
            yield module, attribute, tensor if replaced else getattr(module, attribute).to(tensor) + tensor


class Student(nn.Module):
    """An expert in training.

    Low-rank updates are applied at `scale` = alpha / rank, which stays outside of the weights as in the paper's training. A
    replaced layer has no scale. Parameter names are those in saved checkpoints.

    Args:
        base: native name -> module of the base.

    Raises:
        ExpertError: the expert does not fit, its alpha / rank differs between layers, or it contains differences.
    """

    def __init__(
        self,
        expert: Expert,
        base: Mapping[str, nn.Module],
        device: torch.device,
        processes: Processes = ALONE,
    ):
        super().__init__()
        if expert.diff:
            raise ExpertError(
                f"The expert adds full differences ({name_some(expert.diff)}). Start training from a LoRA with replaced layers at most."
            )
        scales = sorted({update.scale for updates in expert.low_rank.values() for update in updates})
        # files store alphas in float32
        if scales and not math.isclose(scales[0], scales[-1], rel_tol=1e-6):
            raise ExpertError(
                f"The expert's alpha / rank differs between layers ({scales}); expected one value. Start from another expert."
            )
        self.scale = scales[0] if scales else 1.0
        self.without_tensors = dataclasses.replace(expert, low_rank={}, replaced={})
        unscaled = {
            name: tuple(dataclasses.replace(update, scale=1.0) for update in updates)
            for name, updates in expert.low_rank.items()
        }

        def build(**tensors: Any) -> PreciseExpert:
            part = Expert(expert.family, expert.role, **tensors)
            return PreciseExpert(part, base, torch.float32, device, processes).requires_grad_()

        self.low_rank, self.replaced = build(low_rank=unscaled), build(replaced=expert.replaced)

    @property
    def working(self) -> Working:
        """The expert for `Backbone.velocity`."""
        return ((self.low_rank, self.scale), (self.replaced, 1.0))

    def make_ema(self) -> "Student":
        """A copy without gradients, which `update_ema` updates."""
        return copy.deepcopy(self).requires_grad_(False)

    @torch.no_grad()
    def update_ema(self, student: "Student", decay: float) -> None:
        """self = decay self + (1 - decay) student."""
        for mine, theirs in zip(self.parameters(), student.parameters(), strict=True):
            mine.lerp_(theirs, 1 - decay)

    @torch.no_grad()
    def to_expert(self) -> Expert:
        """The trained expert, copied to the CPU."""
        low_rank: dict[str, tuple[LowRank, ...]] = {}
        for name, site in zip(self.low_rank.names, self.low_rank.sites, strict=True):
            downs = whole(site.branch.down.weight).split(site.branch.ranks)
            low_rank[name] = tuple(
                LowRank(_free(down), _free(up.weight), self.scale, start)
                for down, up, start in zip(downs, site.branch.ups, site.branch.starts, strict=True)
            )
        replaced = {
            name: _free(value) for name, value in zip(self.replaced.bare_names, self.replaced.bare, strict=True)
        }
        for name, site in zip(self.replaced.names, self.replaced.sites, strict=True):
            replaced |= {f"{name}.{param}": _free(value) for param, value in site.replaced.named_parameters()}
        return dataclasses.replace(self.without_tensors, low_rank=low_rank, replaced=replaced)


def _free(tensor: Tensor) -> Tensor:
    return whole(tensor).detach().to("cpu", copy=True).contiguous()


def make_fixed(
    expert: Expert,
    modules: Mapping[str, nn.Module],
    device: torch.device,
    dtype: torch.dtype,
    processes: Processes = ALONE,
) -> Working:
    """A finished expert that another is trained on top of. It may contain anything.

    Raises:
        ExpertError: it does not fit.
    """
    return ((PreciseExpert(expert, modules, dtype, device, processes).requires_grad_(False), 1.0),)


def new_semantic(
    family: Family,
    modules: Mapping[str, nn.Module],
    rank: int,
    alpha: float,
    generator: torch.Generator,
    weight_of: WeightOf | None = None,
) -> Expert:
    """A new semantic expert without effect: a LoRA on every linear layer of the blocks. Rank 0 makes it a full fine-tune.

    Args:
        weight_of: returns the base's weights, for those that `modules` does not store as plain numbers.
    """
    if rank == 0:
        weight_of = weight_of or _own_weights(modules)
        names = [name for module in modules for name in _parameter_names(module, modules[module])]
        return Expert(family.name, "semantic", replaced={name: _free(weight_of(name)).float() for name in names})
    names = _block_linears(family, modules)
    return Expert(
        family.name, "semantic", {name: (_new_low_rank(modules[name], rank, alpha, generator),) for name in names}
    )


def new_detail(
    family: Family,
    modules: Mapping[str, nn.Module],
    rank: int,
    alpha: float,
    generator: torch.Generator,
    semantic: Expert | None = None,
    weight_of: WeightOf | None = None,
    every_linear: bool = False,
) -> Expert:
    """A new detail expert without effect: a LoRA on the release's layers, and copies of embedders and head.

    Args:
        semantic: the expert it is trained on top of. The copies start from that expert's embedders and head.
        weight_of: see `new_semantic`.
        every_linear: put the LoRA on every linear layer of the blocks, including rows of fused ones that the release leaves out.
    """
    weight_of = weight_of or _own_weights(modules)
    low_rank: dict[str, tuple[LowRank, ...]] = {}
    replaced: dict[str, Tensor] = {}
    semantic = semantic or Expert(family.name, "semantic")
    complete = _block_linears(family, modules) if every_linear else []
    for name in [*complete, *(name for name in sorted(modules) if name not in complete)]:
        pieces = family.key_map.sources_of(name)
        released = [piece for piece in pieces if family.lora_target_pattern.fullmatch(piece.source)]
        rows = [piece.rows(modules[name].in_features) for piece in released]
        if name in complete:
            rows += _rest(modules[name], rows)
        if rows:
            low_rank[name] = tuple(_new_low_rank(modules[name], rank, alpha, generator, part) for part in rows)
        if any(piece.source.split(".")[0] in family.detail_modules for piece in pieces):
            for key in _parameter_names(name, modules[name]):
                replaced[key] = _free(merged(semantic, key, weight_of))
    return Expert(family.name, "detail", low_rank, replaced)


def _block_linears(family: Family, modules: Mapping[str, nn.Module]) -> list[str]:
    """The names of all linear layers of the blocks."""
    lists = tuple(f"{name}." for name in family.block_lists)
    return sorted(name for name, module in modules.items() if name.startswith(lists) and is_linear(module))


def _rest(module: nn.Module, rows: list[slice]) -> list[slice]:
    """The rows of a linear layer after `rows`, if any."""
    start = sum(len(range(*part.indices(module.out_features))) for part in rows)
    return [slice(start, None)] if start < module.out_features else []


def _parameter_names(name: str, module: nn.Module) -> list[str]:
    """Native names of a module's own parameters. For a linear layer, parameters that describe its storage are left out."""
    own = [param for param, _ in module.named_parameters(recurse=False)]
    if is_linear(module):
        own = [param for param in LAYER_PARAMS if getattr(module, param) is not None]
    return [f"{name}.{param}" if name else param for param in own]


def _own_weights(modules: Mapping[str, nn.Module]) -> WeightOf:
    def weight_of(name: str) -> Tensor:
        module, _, param = name.rpartition(".")
        return getattr(modules[module], param)

    return weight_of


def _new_low_rank(
    module: nn.Module, rank: int, alpha: float, generator: torch.Generator, rows: slice = slice(None)
) -> LowRank:
    """A new low-rank update for some `rows`: down is initialised like nn.Linear's weight, up is zero, so it has no effect."""
    bound = 1 / math.sqrt(module.in_features)
    down = torch.empty(rank, module.in_features).uniform_(-bound, bound, generator=generator)
    start, stop, _ = rows.indices(module.out_features)
    return LowRank(down, torch.zeros(stop - start, rank), alpha / rank, start)
