"""Route each model call to the expert for its noise level.

An APPLY_MODEL wrapper installs the expert's forwards for one call.
"""

import logging
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import RLock
from typing import Any
from weakref import WeakKeyDictionary

import comfy.ops
import torch
from torch import Tensor, nn

from ....dcm_core.errors import ExpertError, name_some
from ....dcm_core.experts.modules import RoutedExpert, is_compiled
from ....dcm_core.experts.placing import in_place, unanswered
from ....dcm_core.families import FAMILIES
from ....dcm_core.pair import Pair
from ....dcm_core.routing import Side, is_detail
from ....dcm_core.text import LOGGER
from ..compat import ACTIVATIONS, NEWEST_TRIED, host_version

logger = logging.getLogger(LOGGER)

KEY = "dcm"

# One lock per base: a call installs forwards on it and removes them, which two threads must not do at once.
LOCKS: MutableMapping[Any, Any] = WeakKeyDictionary()

CACHE_NOTE = (
    "A step cache (EasyCache, TeaCache or similar) is on this model. It may reuse the semantic expert's result after the boundary. "
    "Remove it: with few steps it saves little."
)


@dataclass(frozen=True)
class AttachedExperts:
    """The experts attached to a MODEL.

    Attributes:
        own_boundary: whether the boundary is the experts' or the user's, not the family's default.
        semantic, detail: a line about each expert, or None.
        stacked: the detail expert works on top of the semantic one (as released), not independently.
        strengths: side -> strength of each routed expert.
        own_patches: base tensor -> the semantic expert's patches on it, to tell them from the user's.
        halves: side -> file of an expert for one of two models, and what it knows of both.
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
    halves: Mapping[Side, tuple[str, Pair]] = field(default_factory=dict)


def attached_experts(model: Any) -> AttachedExperts | None:
    """The experts attached to a MODEL, or None."""
    return model.get_attachment(KEY)


def step_cache_note(model: Any) -> str:
    """The warning about a step cache on a MODEL with experts; "" without one.

    Nodes that reuse the result of an earlier call leave a wrapper or an option with "cache" in its name, or only TeaCache's threshold.
    """
    names = {name for wrappers in model.wrappers.values() for name in wrappers} | set(
        model.model_options["transformer_options"]
    )
    cached = any("cache" in str(name).lower() or name == "rel_l1_thresh" for name in names)
    return CACHE_NOTE if cached and attached_experts(model) is not None else ""


def add_linear(linear: nn.Module, out: Tensor, x: Tensor, alpha: float) -> None:
    """Add `alpha linear(x)` to `out`. The host casts the weight, from wherever it is offloaded, with its patches."""
    weight, bias, stream = comfy.ops.cast_bias_weight(linear, x, offloadable=True)
    out.addmm_(x, weight.t(), alpha=alpha)
    # the host may reuse its buffer
    comfy.ops.uncast_bias_weight(linear, weight, bias, stream)


def route_call(executor: Any, x: Tensor, t: Tensor, *args: Any, **kwargs: Any) -> Any:
    """APPLY_MODEL wrapper: run one model call with the expert for its sigma `t` (batch,)."""
    patcher = executor.class_obj.current_patcher
    facts = attached_experts(patcher) if patcher is not None else None
    if facts is None:
        raise ExpertError(
            "This model has lost its DCM experts: another node removed them after they were attached. "
            "Put DCM Attach Experts (or DCM Load Model) after that node."
        )

    def run(side: Side) -> Any:
        with expert_in_place(patcher, facts, side):
            return executor(x, t, *args, **kwargs)

    detail = is_detail(t, facts.boundary)
    rows = int(detail.sum())  # waits for the device only once
    if rows in (0, len(t)):
        return run("detail" if rows else "semantic")
    semantic, out = run("semantic"), run("detail")
    return torch.where(detail.view(-1, *[1] * (out.ndim - 1)), out, semantic)


@contextmanager
def expert_in_place(patcher: Any, facts: AttachedExperts, side: Side) -> Iterator[None]:
    """Within the block, the side's experts run in the base. In a run's first call, all of them must be used."""
    experts = [p.model for p in patcher.get_additional_models_with_key(KEY)]
    present = {expert.role for expert in experts}
    if missing := sorted(set(facts.strengths) - present):
        raise ExpertError(f"The {missing[0]} expert of this model is missing. Attach it again with DCM Attach Experts.")
    working = [(expert, facts.strengths[expert.role]) for expert in experts if side in expert.sides]
    root = patcher.model.diffusion_model
    with LOCKS.setdefault(patcher.model, RLock()):
        watch = any(side not in expert.checked for expert, _ in working)
        bare = watch and not has_compiled(patcher)
        with in_place(root, working, add_linear, ACTIVATIONS, watch, bare):
            yield
        if watch:
            check_answers(patcher, facts, side, [expert for expert, _ in working], bare)


def has_compiled(model: Any) -> bool:
    """Whether a MODEL is compiled: by the host's wrapper, or around or in a module."""
    return any("compile" in str(key) for wrappers in model.wrappers.values() for key in wrappers) or any(
        is_compiled(module) or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.model.diffusion_model.modules()
    )


def check_answers(patcher: Any, facts: AttachedExperts, side: Side, experts: list[RoutedExpert], bare: bool) -> None:
    """Stop a run whose first call on a side skipped a layer of the experts.

    Raises:
        ExpertError: names the layers and the ComfyUI version.
    """
    family = FAMILIES[facts.family]
    required = {rule.target.partition(".")[0] for rule in family.DIFFUSERS_TO_NATIVE if not rule.optional}
    lost, resting = unanswered(patcher.model.diffusion_model, experts, required, bare)
    if (lost or resting) and step_cache_note(patcher):
        return  # the cache may have answered this call; the next one is checked instead
    if lost:
        raise ExpertError(
            f"ComfyUI {host_version()} did not use {len(lost)} of the layers that the {side} side's experts change: {name_some(lost)}. "
            f"The experts would have no effect there. Update ComfyUI-DCM. If that does not help, use ComfyUI {NEWEST_TRIED}, or remove "
            "nodes that replace or skip layers of this model."
        )
    if resting:
        logger.info(
            "The model did not use %s in this run, so the %s side's experts have no effect there.",
            name_some(resting),
            side,
        )
    unknown = set() if bare else {name for expert in experts for name in expert.bare_names}
    if unknown:
        logger.info("With torch.compile on, ComfyUI-DCM cannot check whether the model uses %s.", name_some(unknown))
    for expert in experts:
        expert.checked.add(side)
