"""Route each model call to the experts for its noise level.

An APPLY_MODEL wrapper installs the experts' forwards for one call.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
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
from ....dcm_core.routing import Side
from ....dcm_core.table import PercentToSigma, Row, active_experts
from ....dcm_core.text import LOGGER
from ..compat import ACTIVATIONS, NEWEST_TRIED, host_version

logger = logging.getLogger(LOGGER)

KEY = "dcm"

# Experts by name and strength, in the order in which they stack.
Working = tuple[tuple[str, float], ...]

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
        rows: which of them work where. Two experts with one boundary have the rows "semantic" and "detail".
        experts: name -> a line about each expert.
        lines: a line about each row of a table.
        boundary: sigma between semantic and detail; None for an expert table.
        own_boundary: whether the boundary is the experts' or the user's, not the family's default.
        stacked: the detail expert works on top of the semantic one (as released), not independently.
        own_patches: base tensor -> the semantic expert's patches on it, to tell them from the user's.
        halves: side -> file of an expert for one of two models, and what it knows of both.
    """

    family: str
    rows: tuple[Row, ...]
    experts: Mapping[str, str]
    lines: tuple[str, ...] = ()
    boundary: float | None = None
    own_boundary: bool = False
    timesteps: tuple[float, ...] | None = None
    stacked: bool = False
    own_patches: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    halves: Mapping[Side, tuple[str, Pair]] = field(default_factory=dict)

    @property
    def strengths(self) -> dict[str, float]:
        """Name -> strength of each routed expert; the largest one where rows or steps differ."""
        found: dict[str, float] = {}
        for row in self.rows:
            for name, strengths in row.uses:
                found[name] = max(*strengths, found.get(name, 0.0), key=abs)
        return found


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
    """APPLY_MODEL wrapper: run one model call with the experts for its sigma `t` (batch,)."""
    patcher = executor.class_obj.current_patcher
    facts = attached_experts(patcher) if patcher is not None else None
    if facts is None:
        raise ExpertError(
            "This model has lost its DCM experts: another node removed them after they were attached. "
            "Put DCM Attach Experts (or DCM Load Model) after that node."
        )

    def run(working: Working) -> Any:
        with experts_in_place(patcher, facts, working):
            return executor(x, t, *args, **kwargs)

    by_row = active_experts(
        facts.rows, t.cpu(), *_run_of(patcher, facts.rows, args, kwargs)
    )  # waits for the device only once
    out = None
    # one call for each combination; its rows are taken from the result
    for working in sorted(set(by_row), key=by_row.index):
        found = run(working)
        mine = torch.tensor([experts == working for experts in by_row], device=found.device)
        out = found if out is None else torch.where(mine.view(-1, *[1] * (found.ndim - 1)), found, out)
    return out


def _run_of(patcher: Any, rows: Iterable[Row], args: tuple, kwargs: dict) -> tuple[Tensor | None, PercentToSigma]:
    """The noise levels of the run that a call belongs to, if a row needs them and the sampler tells, and its model's schedule."""
    sigmas = None
    if any(row.is_stepwise for row in rows):
        # apply_model(x, t, c_concat, c_crossattn, control, transformer_options)
        options = kwargs.get("transformer_options", args[3] if len(args) > 3 else {})
        sigmas = options.get("sample_sigmas")
    return None if sigmas is None else sigmas.cpu(), patcher.get_model_object("model_sampling").percent_to_sigma


@contextmanager
def experts_in_place(patcher: Any, facts: AttachedExperts, working: Working) -> Iterator[None]:
    """Within the block, these experts run in the base. In a run's first call of a combination, all of them must be used."""
    present = {p.model.name: p.model for p in patcher.get_additional_models_with_key(KEY)}
    if missing := sorted(set(facts.strengths) - present.keys()):
        raise ExpertError(f"The {missing[0]} expert of this model is missing. Attach it again.")
    experts = [present[name] for name, _ in working]
    root, names = patcher.model.diffusion_model, frozenset(name for name, _ in working)
    with LOCKS.setdefault(patcher.model, RLock()):
        watch = any(names not in expert.checked for expert in experts)
        bare = watch and not has_compiled(patcher)
        in_row = zip(experts, (strength for _, strength in working), strict=True)
        with in_place(root, in_row, add_linear, ACTIVATIONS, watch, bare):
            yield
        if watch:
            check_answers(patcher, facts, names, experts, bare)


def has_compiled(model: Any) -> bool:
    """Whether a MODEL is compiled: by the host's wrapper, or around or in a module."""
    return any("compile" in str(key) for wrappers in model.wrappers.values() for key in wrappers) or any(
        is_compiled(module) or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.model.diffusion_model.modules()
    )


def check_answers(
    patcher: Any, facts: AttachedExperts, names: frozenset[str], experts: list[RoutedExpert], bare: bool
) -> None:
    """Stop a run whose first call with these experts skipped one of their layers.

    Raises:
        ExpertError: names the layers and the ComfyUI version.
    """
    family, whose = FAMILIES[facts.family], " and ".join(f"the {name} expert" for name in sorted(names))
    required = {rule.target.partition(".")[0] for rule in family.DIFFUSERS_TO_NATIVE if not rule.optional}
    lost, resting = unanswered(patcher.model.diffusion_model, experts, required, bare)
    if (lost or resting) and step_cache_note(patcher):
        return  # the cache may have answered this call; the next one is checked instead
    if lost:
        raise ExpertError(
            f"ComfyUI {host_version()} did not use {len(lost)} of the layers that {whose} changes: {name_some(lost)}. "
            f"It would have no effect there. Update ComfyUI-DCM. If that does not help, use ComfyUI {NEWEST_TRIED}, or remove "
            "nodes that replace or skip layers of this model."
        )
    if resting:
        logger.info(
            "The model did not use %s in this run, so %s has no effect there.",
            name_some(resting),
            whose,
        )
    unknown = set() if bare else {name for expert in experts for name in expert.bare_names}
    if unknown:
        logger.info("With torch.compile on, ComfyUI-DCM cannot check whether the model uses %s.", name_some(unknown))
    for expert in experts:
        expert.checked.add(names)
