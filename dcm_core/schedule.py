"""Flow-matching noise levels: shift, the solver grid, few-step schedules and presets.

Units: a sigma is a noise level from 1 (pure noise) to 0 (clean), `x_sigma = sigma * noise + (1 - sigma) * x0`;
a timestep is `1000 * sigma`; a schedule is a float32 tensor of n + 1 falling sigmas whose last is 0.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor

from .errors import ScheduleError, counted

# Schedules by name; what `auto` and `generic` stand for depends on the models: `routing.Setup.schedule`.
AUTO, EVEN, DCM_GRID, GENERIC = "auto", "even", "DCM grid", "generic"

TIMESTEPS = 1000
# As many as KSampler takes steps.
MOST_LEVELS = 10_000
DEFAULT_SHIFT = 17.0
DEFAULT_POINTS = 50

Number = TypeVar("Number", float, Tensor)


@dataclass(frozen=True)
class Preset:
    """A released model's sampling settings: its timesteps (largest first) and its boundary (a sigma)."""

    name: str
    title: str
    timesteps: tuple[float, ...]
    boundary: float

    @property
    def sigmas(self) -> Tensor:
        """Sigmas of the schedule, shape (steps + 1,), the last 0."""
        return sigmas_from_timesteps(self.timesteps)


def shift_sigma(sigma: Number, shift: float) -> Number:
    """Move a uniform noise level towards noise: `shift * s / (1 + (shift - 1) * s)`."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def sigmas_from_timesteps(timesteps: Sequence[float]) -> Tensor:
    """Schedule of the given timesteps (largest first) with the final 0, shape (len(timesteps) + 1,)."""
    return torch.cat([torch.tensor(timesteps, dtype=torch.float64) / TIMESTEPS, torch.zeros(1)]).float()


def check_shift(shift: float) -> float:
    """Return `shift` if noise levels can be shifted by it.

    Raises:
        ScheduleError: not finite, or below 1e-3.
    """
    if not (math.isfinite(shift) and shift >= 1e-3):
        raise ScheduleError(
            f"shift is {shift}; it has to be a positive number (DCM: {DEFAULT_SHIFT:g}, Wan 2.2: 5 to 12)."
        )
    return shift


def solver_sigmas(shift: float = DEFAULT_SHIFT, points: int = DEFAULT_POINTS) -> Tensor:
    """The `points` noise levels the consistency models are trained on, largest first, shape (points,).

    Every (1000 / points)-th of 1000 shifted uniform levels; with the defaults i = 20, 40 ... 1000.

    Raises:
        ScheduleError: shift below 1e-3, or points outside 1 .. 1000.
    """
    check_shift(shift)
    if not 1 <= points <= TIMESTEPS:
        raise ScheduleError(
            f"points is {points}; it has to lie in 1 .. {TIMESTEPS} (the released models use {DEFAULT_POINTS})."
        )
    stride = TIMESTEPS // points
    index = stride * torch.arange(points, 0, -1, dtype=torch.float64) + (TIMESTEPS - stride * points)
    return shift_sigma(index / TIMESTEPS, shift).float()


def generic_sigmas(steps: int, shift: float = DEFAULT_SHIFT, points: int = DEFAULT_POINTS) -> Tensor:
    """Schedule of `steps` levels spread evenly over the solver grid, shape (steps + 1,).

    Raises:
        ScheduleError: fewer than 1 step, or more steps than grid points.
    """
    if not 1 <= steps <= points:
        raise ScheduleError(
            f"steps is {steps}; the schedule `{DCM_GRID}` takes 1 .. {counted(points, 'step')}, picked from {points} trained noise "
            f"levels. Choose fewer steps, or the schedule `{EVEN}`."
        )
    index = torch.arange(steps) * points // steps
    return torch.cat([solver_sigmas(shift, points)[index], torch.zeros(1)])


def even_sigmas(steps: int, shift: float, denoise: float = 1.0) -> Tensor:
    """Schedule of `steps` evenly spaced levels `shift(1 - i / steps)`, shape (steps + 1,): what full flow models are made for.

    With denoise below 1 the last `steps` of `int(steps / denoise)` steps, as in KSampler.

    Raises:
        ScheduleError: steps, shift or denoise out of range.
    """
    levels = levels_for(steps, denoise)
    index = torch.arange(steps, -1, -1, dtype=torch.float64)
    return shift_sigma(index / levels, check_shift(shift)).float()


def levels_for(steps: int, denoise: float) -> int:
    """How many steps a whole schedule has of which `steps` start at a lower noise level: KSampler's `int(steps / denoise)`.

    Raises:
        ScheduleError: steps outside 1 .. 1000, or denoise outside (0, 1] or too small.
    """
    if not 1 <= steps <= TIMESTEPS:
        raise ScheduleError(f"steps is {steps}; it has to lie in 1 .. {TIMESTEPS}.")
    check_denoise(denoise)
    # KSampler's own tolerance
    levels = steps if denoise > 0.9999 else int(steps / denoise)
    if levels > MOST_LEVELS:
        raise ScheduleError(
            f"denoise is {denoise}, too small for {counted(steps, 'step')}. Raise it to {steps / MOST_LEVELS:g} or more."
        )
    return levels


def check_denoise(denoise: float) -> float:
    """Return `denoise` if something is left to sample.

    Raises:
        ScheduleError: outside (0, 1].
    """
    if not 0 < denoise <= 1:
        raise ScheduleError(f"denoise is {denoise}; it has to lie above 0 and at most at 1. Use 1 for a new video.")
    return denoise


def last_part(sigmas: Tensor, denoise: float) -> Tensor:
    """The last `denoise` share of a schedule's steps (at least one), so that every level stays a trained one.

    Raises:
        ScheduleError: denoise outside (0, 1].
    """
    steps = len(sigmas) - 1
    return sigmas[steps - max(1, round(steps * check_denoise(denoise))) :]


def make_sigmas(schedule: str | Sequence[float], steps: int, shift: float, denoise: float) -> Tensor:
    """The sigmas of `even`, `DCM grid`, or of fixed timesteps, which need no `steps` and `shift`.

    Raises:
        ScheduleError: settings that give no schedule.
    """
    if schedule == EVEN:
        return even_sigmas(steps, shift, denoise)
    # levels that experts are trained on stay: denoise leaves steps out
    return last_part(generic_sigmas(steps, shift) if schedule == DCM_GRID else sigmas_from_timesteps(schedule), denoise)


def check_sigmas(sigmas: Tensor) -> Tensor:
    """Return `sigmas` if they can be sampled.

    Raises:
        ScheduleError: no step, values that are not finite or lie outside 0 .. 1, or values that do not fall.
    """
    if sigmas.ndim != 1 or len(sigmas) < 2:
        raise ScheduleError(
            f"The sigmas hold {counted(max(0, sigmas.numel() - 1), 'step')} (shape {tuple(sigmas.shape)}); "
            "at least one step, that is two falling values, is needed. Check the scheduler, its steps and its denoise."
        )
    values = sigmas.tolist()
    listed = ", ".join(f"{value:.4g}" for value in values[:8]) + (", ..." if len(values) > 8 else "")
    if not all(math.isfinite(value) and 0 <= value <= 1 + 1e-6 for value in values):
        raise ScheduleError(
            f"The sigmas are {listed}; a flow model's noise levels lie between 1 and 0. "
            "Use DCM Scheduler, or a scheduler that takes the MODEL."
        )
    if any(later >= earlier for earlier, later in pairwise(values)):
        raise ScheduleError(f"The sigmas are {listed}; they have to fall from step to step. Check what feeds `sigmas`.")
    return sigmas
