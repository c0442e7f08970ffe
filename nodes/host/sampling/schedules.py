"""Schedules by name, ours and the host's own, and the flow shift of a MODEL."""

import copy
from collections.abc import Callable
from typing import Any

import comfy.model_sampling
import comfy.samplers
import torch
from torch import Tensor

from ....dcm_core.errors import ScheduleError, check_choice
from ....dcm_core.families import PRESETS
from ....dcm_core.routing import Setup
from ....dcm_core.schedule import AUTO, DCM_GRID, EVEN, GENERIC, check_shift, levels_for, make_sigmas
from .setup import setup_of
from .switch import KEY as SIDES_KEY

EULER = "euler"


def schedule_names() -> list[str]:
    """The schedules to choose from: ours, the host's own, and last the one that only old graphs use."""
    ours = [AUTO, *PRESETS, EVEN, DCM_GRID]
    return [*ours, *(name for name in comfy.samplers.SCHEDULER_NAMES if name not in (*ours, GENERIC)), GENERIC]


def sampler_names() -> list[str]:
    return list(comfy.samplers.SAMPLER_NAMES)


def choose_sigmas(
    chosen: str,
    steps: int,
    shift: float,
    denoise: float,
    model: Any = None,
    sampler_name: str = EULER,
    *,
    detail_model: Any = None,
    widget: str = "schedule",
) -> tuple[Tensor, list[str]]:
    """The sigmas of a schedule by name, and notes about them for the user.

    Args:
        model: a prepared MODEL, or one that will be prepared with detail_model.
        widget: the name of the widget for `chosen`.

    Raises:
        ScheduleError: settings that give no schedule.
    """
    check_choice(widget, chosen, schedule_names(), ScheduleError)
    setup = Setup() if model is None else setup_of(model, detail_model)
    schedule = setup.schedule(chosen)
    if schedule is None:
        raise ScheduleError(
            f"{widget} is {chosen}, but no model is connected to read the schedule from. Connect a model, or choose another {widget}."
        )
    sampling = None if model is None else lambda: shifted(model, shift)
    sigmas = sigmas_of(schedule, steps, shift, denoise, sampling, sampler_name)
    notes = setup.notes(chosen)
    if model is not None and chosen in comfy.samplers.SCHEDULER_NAMES and not has_shift(model):
        notes.append("This model has no flow shift, so shift is ignored")
    return sigmas, notes


def sigmas_of(
    schedule: str | tuple[float, ...],
    steps: int,
    shift: float,
    denoise: float,
    sampling: Callable[[], Any] | None = None,
    sampler_name: str = EULER,
) -> Tensor:
    """The sigmas of a resolved schedule, see `Setup.schedule`.

    Args:
        sampling: returns the model's shifted `model_sampling`, which the host's own schedulers need.
    """
    if not isinstance(schedule, str) or schedule in (EVEN, DCM_GRID):
        return make_sigmas(schedule, steps, shift, denoise)
    if sampling is None:
        raise ScheduleError(
            f"{schedule} is one of ComfyUI's own schedulers, which need a model. Connect a model, or choose {EVEN}."
        )
    return host_sigmas(sampling(), schedule, steps, denoise, sampler_name)


def host_sigmas(sampling: Any, scheduler: str, steps: int, denoise: float, sampler_name: str = EULER) -> Tensor:
    """The sigmas that KSampler uses for a `model_sampling`, a scheduler and a sampler."""
    discard = sampler_name in comfy.samplers.KSampler.DISCARD_PENULTIMATE_SIGMA_SAMPLERS
    sigmas = comfy.samplers.calculate_sigmas(sampling, scheduler, levels_for(steps, denoise) + discard).cpu()
    if discard:
        sigmas = torch.cat([sigmas[:-2], sigmas[-1:]])
    return sigmas[-(steps + 1) :]


def flow_sampling(shift: float) -> Any:
    """The `model_sampling` of the host's Wan and HunyuanVideo models."""
    sampling = comfy.model_sampling.ModelSamplingDiscreteFlow()
    sampling.set_parameters(shift=check_shift(shift))
    return sampling


def has_shift(model: Any) -> bool:
    return isinstance(model.get_model_object("model_sampling"), comfy.model_sampling.ModelSamplingDiscreteFlow)


def shifted(model: Any, shift: float) -> Any:
    """A MODEL's `model_sampling` with this flow shift; unchanged for models without one."""
    sampling = model.get_model_object("model_sampling")
    if not has_shift(model):
        return sampling
    sampling = copy.deepcopy(sampling)
    sampling.set_parameters(shift=check_shift(shift), multiplier=sampling.multiplier)
    return sampling


def with_shift(model: Any, chosen: str, shift: float) -> Any:
    """A clone of a prepared MODEL with this flow shift on both sides, as by ModelSamplingSD3, for schedules that use it.

    Besides the noise levels, it changes when prompts with a start or end percent apply, and some samplers' first step.

    Returns:
        The MODEL itself for the schedules of DCM experts.
    """
    return _shift_all(model, shift) if sets_shift(setup_of(model).schedule(chosen)) else model


def sets_shift(schedule: str | tuple[float, ...] | None) -> bool:
    """Whether a resolved schedule (`Setup.schedule`) also sets the model's own shift. Those of DCM experts do not."""
    return isinstance(schedule, str) and schedule != DCM_GRID


def _shift_all(model: Any, shift: float) -> Any:
    clone = model.clone()
    clone.add_object_patch("model_sampling", shifted(model, shift))
    if sides := clone.get_attachment(SIDES_KEY):
        clone.set_attachments(SIDES_KEY, sides.with_models(lambda other: _shift_all(other, shift)))
    return clone
