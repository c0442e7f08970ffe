"""Route each model call to the expert that owns its noise level.

A stateless APPLY_MODEL wrapper puts the expert's forwards in place for the length of one call.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import comfy.ops
import torch
from torch import Tensor, nn

from ...dcm_core.adapters import in_place
from ...dcm_core.errors import ExpertError
from ...dcm_core.routing import is_detail

KEY = "dcm"

CACHE_NOTE = (
    "A step cache (EasyCache, TeaCache or the like) is on this model. It may carry the semantic expert's result over the boundary: "
    "leave it out, a run has few steps."
)


@dataclass(frozen=True)
class AttachedExperts:
    """What a MODEL carries.

    Attributes:
        own_boundary: the boundary is the experts' or the user's; otherwise the family's usual one.
        semantic, detail: a line about each expert, None without it.
        stacked: the detail expert works on top of the semantic one (as released), not beside it.
        strengths: side -> strength of the experts that are routed.
        own_patches: base tensor -> the semantic expert's patches on it, to tell them from the user's.
    """

    family: str
    boundary: float
    own_boundary: bool
    timesteps: tuple[float, ...] | None
    stacked: bool
    semantic: str | None
    detail: str | None
    strengths: Mapping[str, float] = field(default_factory=dict)
    own_patches: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)


def attached_experts(model: Any) -> AttachedExperts | None:
    """The experts a MODEL carries, None without any."""
    return model.get_attachment(KEY)


def step_cache_note(model: Any) -> str:
    """What to tell the user of a step cache on a MODEL with experts, "" where there is none.

    Nodes that answer a call with an earlier one's result leave a wrapper or an option with "cache" in its name; some only the
    threshold of TeaCache.
    """
    names = {name for wrappers in model.wrappers.values() for name in wrappers} | set(model.model_options["transformer_options"])
    cached = any("cache" in str(name).lower() or name == "rel_l1_thresh" for name in names)
    return CACHE_NOTE if cached and attached_experts(model) is not None else ""


def add_linear(linear: nn.Module, out: Tensor, x: Tensor, alpha: float) -> None:
    """Add `alpha linear(x)` to `out` with the weight as the host casts it: from wherever it was offloaded, with its patches."""
    weight, bias, stream = comfy.ops.cast_bias_weight(linear, x, offloadable=True)
    out.addmm_(x, weight.t(), alpha=alpha)
    # the host may give its place to others again
    comfy.ops.uncast_bias_weight(linear, weight, bias, stream)


def route_call(executor: Any, x: Tensor, t: Tensor, *args: Any, **kwargs: Any) -> Any:
    """APPLY_MODEL wrapper: run one model call with the expert that owns its sigma `t` (batch,)."""
    patcher = executor.class_obj.current_patcher
    facts = attached_experts(patcher) if patcher is not None else None
    if facts is None:
        raise ExpertError(
            "The DCM experts of this MODEL are gone: another node took it apart after they were attached. "
            "Put DCM Attach Experts (or DCM Load Model) after that node."
        )
    detail = is_detail(t, facts.boundary)
    rows = int(detail.sum())  # one wait for the device, not one for each question
    if rows in (0, len(t)):
        with expert_in_place(patcher, facts, "detail" if rows else "semantic"):
            return executor(x, t, *args, **kwargs)
    with expert_in_place(patcher, facts, "semantic"):
        semantic = executor(x, t, *args, **kwargs)
    with expert_in_place(patcher, facts, "detail"):
        out = executor(x, t, *args, **kwargs)
    return torch.where(detail.view(-1, *[1] * (out.ndim - 1)), out, semantic)


def expert_in_place(patcher: Any, facts: AttachedExperts, side: str) -> AbstractContextManager[None]:
    """For the length of the block the side's experts answer in the base's place."""
    experts = [p.model for p in patcher.get_additional_models_with_key(KEY)]
    present = {expert.role for expert in experts}
    if missing := sorted(set(facts.strengths) - present):
        raise ExpertError(f"The {missing[0]} expert of this MODEL is missing. Attach it again with DCM Attach Experts.")
    working = [(expert, facts.strengths[expert.role]) for expert in experts if side in expert.sides]
    return in_place(patcher.model.diffusion_model, working, add_linear)
