"""An expert as modules that run beside the base model's layers, or instead of them, in the steps of that expert.

The modules contain the expert's tensors only. The base weights are neither read nor written.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ExpertError, name_some
from ..families.lora_names import COMPILED
from .expert import Expert, LowRank

# (linear, out (rows, features), x (rows, in), alpha): out += alpha linear(x), in place
AddLinear = Callable[[nn.Linear, Tensor, Tensor, float], None]
Forward = Callable[..., Tensor]
# activations that a host may fuse into a linear's input, by name; norms also take their weight and eps
Activations = Mapping[str, Callable[..., Tensor]]
NONE: Activations = {}


def add_linear(linear: nn.Linear, out: Tensor, x: Tensor, alpha: float) -> None:
    """Add `alpha linear(x)` to `out`, on the device and in the dtype of `x`. Hosts with offloading pass their own function."""
    out.addmm_(x, linear.weight.to(x).t(), alpha=alpha)


class LowRankBranch(nn.Module):
    """All low-rank updates of one linear: one down projection, then one up projection for each update's rows.

    alpha / rank is folded into `up` when the weights are filled.
    """

    def __init__(self, updates: tuple[LowRank, ...], operations: Any, dtype: torch.dtype, device: torch.device):
        super().__init__()
        width = updates[0].down.shape[1]
        self.ranks = [update.rank for update in updates]
        self.starts = [update.start for update in updates]
        self.down = operations.Linear(width, sum(self.ranks), bias=False, dtype=dtype, device=device)
        self.ups = nn.ModuleList(
            operations.Linear(update.rank, update.up.shape[0], bias=False, dtype=dtype, device=device)
            for update in updates
        )
        self.down.weight = _parameter(torch.cat([update.down for update in updates]), dtype, device, copy=False)
        for up, update in zip(self.ups, updates, strict=True):
            up.weight = _parameter(update.up.float() * update.scale, dtype, device, copy=False)

    def add(self, out: Tensor, projected: Tensor, strength: float, add: AddLinear) -> None:
        """Add `strength * up(projected)` to `out` (..., rows) in place."""
        rows, hidden = out.view(-1, out.shape[-1]), projected.view(-1, projected.shape[-1])
        parts = hidden.split(self.ranks, dim=-1) if len(self.ranks) > 1 else (hidden,)
        for start, up, part in zip(self.starts, self.ups, parts, strict=True):
            add(up, rows[:, start : start + up.out_features], part, strength)


class Offset(nn.Module):
    """A difference of a linear's bias alone. It stands for a layer whose weight is all zeros."""

    def __init__(self, bias: nn.Parameter):
        super().__init__()
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (out,), to be added to (..., out)."""
        return self.bias.to(x)


class RoutedSite(nn.Module):
    """What an expert does at one module of the base.

    Attributes:
        replaced: the layer that replaces the base's at strength 1, and is interpolated with it at other strengths.
        kept: the base's tensor that is still used: "bias" for a replaced weight, "weight" for a replaced bias, else "".
        branch: low-rank updates, added to the base's output.
        diff: a module of differences, of the base's kind, or an `Offset`. Its output is added.
    """

    def __init__(
        self, replaced: nn.Module | None, branch: LowRankBranch | None, diff: nn.Module | None, kept: str = ""
    ):
        super().__init__()
        self.replaced, self.branch, self.diff, self.kept = replaced, branch, diff, kept

    def forward(
        self,
        x: Tensor,
        base: Forward,
        strength: float,
        add: AddLinear,
        *args: Any,
        activations: Activations = NONE,
        **kwargs: Any,
    ) -> Tensor:
        """Output of the module `base` with this expert applied; x: (..., in) -> (..., out).

        Newer hosts fuse an activation and a residual into a linear: `residual + residual_scale * linear(input_act(x))`. A norm
        as activation also gets `act_weight` and `act_eps`. Both are computed here, as the expert's part needs them too.

        Args:
            activations: name -> function, for `input_act`.
            args, kwargs: other arguments that the host passes to its layers.

        Raises:
            ExpertError: an unknown activation.
        """
        if not kwargs:  # the usual call, in every step of every site
            return self._routed(x, base, strength, add, *args)
        fused = {name: kwargs.pop(name, None) for name in FUSED}
        out = self._routed(_activated(x, fused, activations), base, strength, add, *args, **kwargs)
        residual, scale = fused["residual"], fused["residual_scale"]
        if residual is None:
            return out
        return residual + out if scale is None else torch.addcmul(residual, out, scale)

    def _routed(self, x: Tensor, base: Forward, strength: float, add: AddLinear, *args: Any, **kwargs: Any) -> Tensor:
        if self.replaced is not None:
            out = self._replacement(x, base, add, *args, **kwargs)
            return out if strength == 1 else torch.lerp(base(x, *args, **kwargs), out, strength)
        # computed before the base runs, as an fp8 linear may clamp its input in place
        branch, diff = self.branch, self.diff
        projected = branch.down(x) if branch is not None else None
        difference = diff(x) if diff is not None else None
        out = base(x, *args, **kwargs)
        if projected is not None:
            out = out.contiguous()
            branch.add(out, projected, strength, add)
        if difference is not None:
            out = out.add_(difference, alpha=strength)
        return out

    def _replacement(self, x: Tensor, base: Forward, add: AddLinear, *args: Any, **kwargs: Any) -> Tensor:
        """Output of the layer at strength 1 with its weight or bias replaced. The other tensor is the base's, patched or not."""
        projected = self.branch.down(x) if self.branch is not None else None
        difference = self.diff(x) if self.diff is not None else None
        out = self.replaced(x, *args, **kwargs)
        if self.kept:
            # for zeros a layer returns its bias, wherever the host stores that
            zeros = x.new_zeros(1, *(x.shape[1:] if hasattr(self.replaced, "kernel_size") else x.shape[-1:]))
            bias = base(zeros, *args, **kwargs)
            out = out + bias if self.kept == "bias" else base(x, *args, **kwargs) - bias + out
        if projected is not None:
            self.branch.add(out, projected, 1.0, add)
        return out if difference is None else out + difference


class RoutedExpert(nn.Module):
    """An expert built for one base model: a site for every layer it changes, a value for every bare parameter.

    Bare parameters are tensors that belong to a block itself and not to a layer (Wan's `modulation`).

    Args:
        base: native module name -> the base's module, for the types and sizes of the sites.
        operations: source of Linear, LayerNorm and so on (`torch.nn`, or the host's casting classes).
        dtype: dtype of the expert's weights, the one that the base computes in.
        device: where copies of its tensors are put. `meta` leaves each tensor where it is, uncopied.
        name: its name among the experts of a MODEL. The default is its role.

    Attributes:
        places: module name -> what `in_place` made for it lately.
        called: names that `in_place` saw in use during a watched call.
        checked: the combinations of experts in which all names were in use, in the current run.

    Raises:
        ExpertError: the expert does not fit the base's modules.
    """

    def __init__(
        self,
        expert: Expert,
        base: Mapping[str, nn.Module],
        operations: Any,
        dtype: torch.dtype,
        device: torch.device,
        name: str = "",
    ):
        super().__init__()
        self.name = name or expert.role
        _check_fits(expert, base)
        bare = bare_parameters(expert)
        self.bare_names = list(bare)
        self.bare_replaced = [name in expert.replaced for name in bare]
        self.bare = nn.ParameterList(_parameter(tensor, dtype, device) for tensor in bare.values())
        self.names: list[str] = sorted(_touched(expert))
        factory = SimpleNamespace(operations=operations, dtype=dtype, device=device)
        self.sites = nn.ModuleList(_make_site(name, expert, base[name], factory) for name in self.names)
        self.places: dict[str, list[Any]] = {}
        self.called: set[str] = set()
        self.checked: set[Hashable] = set()

    def __getstate__(self) -> dict[str, Any]:
        """A copy is for another base, so it starts without what was made for this one."""
        return self.__dict__ | {"places": {}, "called": set(), "checked": set()}

    def bare_values(
        self, root: nn.Module, strength: float, prefix: str = ""
    ) -> Iterator[tuple[nn.Module, str, Tensor]]:
        """(module, attribute, value with this expert applied) of every bare parameter whose name begins with `prefix`."""
        for name, replaced, tensor in zip(self.bare_names, self.bare_replaced, self.bare, strict=True):
            if not name.startswith(prefix):
                continue
            module_name, _, attribute = name.rpartition(".")
            module = find_module(root, module_name)
            base = getattr(module, attribute)
            own = tensor.to(base)
            yield module, attribute, torch.lerp(base, own, strength) if replaced else base + strength * own

    def replaced_weights(self) -> dict[str, str]:
        """Native tensor name -> name of the tensor here that replaces it."""
        found = {}
        for index, (name, site) in enumerate(zip(self.names, self.sites, strict=True)):
            if site.replaced is not None:
                found |= {f"{name}.{p}": f"sites.{index}.replaced.{p}" for p, _ in site.replaced.named_parameters()}
        return found


LAYER_PARAMS = ("weight", "bias")

# Keyword arguments of linears in newer hosts: see `RoutedSite.forward`.
FUSED = ("input_act", "act_weight", "act_eps", "residual", "residual_scale")

# The layers that can be routed, and the settings that create another of the same kind. All are linear in their weights,
# so the output of a layer of differences can be added to the base's output.
KINDS: dict[str, tuple[str, ...]] = {
    "Linear": ("in_features", "out_features"),
    "LayerNorm": ("normalized_shape", "eps"),
    "RMSNorm": ("eps",),
    "Conv2d": ("in_channels", "out_channels", "kernel_size", "stride", "padding"),
    "Conv3d": ("in_channels", "out_channels", "kernel_size", "stride", "padding"),
}


def bare_parameters(expert: Expert) -> dict[str, Tensor]:
    """Name -> each of the expert's tensors that is not a layer's weight or bias."""
    tensors = expert.replaced | expert.diff
    return {name: tensor for name, tensor in sorted(tensors.items()) if name.rpartition(".")[2] not in LAYER_PARAMS}


def _touched(expert: Expert) -> set[str]:
    names = (name.rpartition(".") for name in (*expert.replaced, *expert.diff))
    return set(expert.low_rank) | {module for module, _, param in names if param in LAYER_PARAMS}


def is_linear(module: nn.Module) -> bool:
    """True for the linear layers of PyTorch and of hosts, however they store their weight."""
    return hasattr(module, "in_features") and hasattr(module, "out_features")


def _kind(module: nn.Module) -> str:
    return "Linear" if is_linear(module) else type(module).__name__


def _check_fits(expert: Expert, base: Mapping[str, nn.Module]) -> None:
    names = _touched(expert)
    absent = [name for name in names if name not in base]
    absent += [
        name
        for name in bare_parameters(expert)
        if not hasattr(base.get(name.rpartition(".")[0]), name.rpartition(".")[2])
    ]
    if absent:
        raise ExpertError(f"The model has no {name_some(absent)}. Use an expert made for a model of this size.")
    other = [
        name
        for name in names
        if _kind(base[name]) not in KINDS or (name in expert.low_rank and not is_linear(base[name]))
    ]
    if other:
        raise ExpertError(
            f"{name_some(other)} cannot be switched during sampling. Leave these tensors out of the expert."
        )
    changed = {*expert.diff, *(f"{name}.weight" for name in expert.low_rank)}
    if twice := changed & expert.replaced.keys():
        raise ExpertError(
            f"{name_some(twice)} is both replaced and changed; expected one of the two. "
            "Convert or train the expert again."
        )


def _make_site(name: str, expert: Expert, base: nn.Module, factory: SimpleNamespace) -> RoutedSite:
    updates = expert.low_rank.get(name)
    branch = LowRankBranch(updates, factory.operations, factory.dtype, factory.device) if updates else None
    lacking = [p for p in LAYER_PARAMS if getattr(base, p, None) is not None and f"{name}.{p}" not in expert.replaced]
    replaced = _filled(name, expert.replaced, base, factory)
    return RoutedSite(
        replaced,
        branch,
        _filled(name, expert.diff, base, factory),
        lacking[0] if replaced is not None and lacking else "",
    )


def _filled(name: str, tensors: Mapping[str, Tensor], base: nn.Module, factory: SimpleNamespace) -> nn.Module | None:
    """A module like `base` with `tensors[name.weight]` and `tensors[name.bias]`. A missing one is zeros."""
    weight, bias = tensors.get(f"{name}.weight"), tensors.get(f"{name}.bias")
    if weight is None and bias is None:
        return None
    kind = _kind(base)
    if kind == "Linear" and weight is None:
        return Offset(_parameter(bias, factory.dtype, factory.device))
    settings = {name: getattr(base, name) for name in KINDS[kind]}
    if kind != "RMSNorm":
        settings["bias"] = bias is not None
    elif weight is not None:
        settings["normalized_shape"] = weight.shape
    module = getattr(factory.operations, kind)(**settings, dtype=factory.dtype, device=factory.device)
    if weight is None:
        weight = torch.zeros(module.weight.shape)
    module.weight = _parameter(weight, factory.dtype, factory.device)
    if bias is not None:
        module.bias = _parameter(bias, factory.dtype, factory.device)
    return module


def _activated(x: Tensor, fused: Mapping[str, Any], activations: Activations) -> Tensor:
    name = fused["input_act"]
    if name is None:
        return x
    if name not in activations:
        raise ExpertError(
            f"ComfyUI passes input_act={name!r} to a layer, which ComfyUI-DCM does not support. Update ComfyUI-DCM."
        )
    weight = fused["act_weight"]
    return activations[name](x) if weight is None else activations[name](x, weight, fused["act_eps"] or 0.0)


def _parameter(value: Tensor, dtype: torch.dtype, device: torch.device, copy: bool = True) -> nn.Parameter:
    """A copy of the value, to be set on a layer. Newer hosts create a Linear without tensors to copy into.

    Args:
        copy: False for a value that nothing else uses.
    """
    if device.type == "meta":
        return nn.Parameter(value.detach().to(dtype), requires_grad=False)
    return nn.Parameter(value.detach().to(device=device, dtype=dtype, copy=copy), requires_grad=False)


def inner_module(module: nn.Module) -> nn.Module:
    """The module without the wrapper of torch.compile."""
    return module._modules.get(COMPILED) or module


def is_compiled(module: nn.Module) -> bool:
    """True for the wrapper that torch.compile puts around a module."""
    return COMPILED in module._modules


def find_module(root: nn.Module, name: str) -> nn.Module:
    """The submodule called `name`, through every compiled wrapper on the way."""
    module = inner_module(root)
    for part in name.split("."):
        # getattr is ten times slower, and this runs for every site in every step
        module = inner_module(module._modules[part])
    return module
