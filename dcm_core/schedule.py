"""Flow-matching noise levels: shift, the solver grid, few-step schedules and presets.

A sigma is a noise level from 1 (pure noise) to 0 (clean): `x_sigma = sigma * noise + (1 - sigma) * x0`.
A timestep is `1000 * sigma`. A schedule is a float32 tensor of n + 1 falling sigmas that ends with 0.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor

from .errors import ScheduleError, counted

# Names of schedules. What `auto` and `generic` stand for depends on the models: see `routing.Setup.schedule`.
AUTO, EVEN, DCM_GRID, GENERIC = "auto", "even", "DCM grid", "generic"

TIMESTEPS = 1000
# KSampler's limit on steps.
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
        """Sigmas of the schedule, shape (steps + 1,); the last is 0."""
        return sigmas_from_timesteps(self.timesteps)


def shift_sigma(sigma: Number, shift: float) -> Number:
    """Move a uniform noise level towards noise: `shift * s / (1 + (shift - 1) * s)`."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def sigmas_from_timesteps(timesteps: Sequence[float]) -> Tensor:
    """The sigmas of `timesteps` (largest first) and a final 0, shape (len(timesteps) + 1,)."""
    return torch.cat([torch.tensor(timesteps, dtype=torch.float64) / TIMESTEPS, torch.zeros(1)]).float()


def check_shift(shift: float) -> float:
    """Return `shift` if it is a usable value.

    Raises:
        ScheduleError: not finite, or below 1e-3.
    """
    if not (math.isfinite(shift) and shift >= 1e-3):
        raise ScheduleError(f"shift is {shift}; expected a positive number (DCM: {DEFAULT_SHIFT:g}, Wan 2.2: 5 to 12).")
    return shift


def solver_sigmas(shift: float = DEFAULT_SHIFT, points: int = DEFAULT_POINTS) -> Tensor:
    """The `points` noise levels the consistency models are trained on, largest first, shape (points,).

    These are every (1000 / points)-th of 1000 shifted uniform levels: i = 20, 40 ... 1000 by default.

    Raises:
        ScheduleError: shift below 1e-3, or points outside 1 .. 1000.
    """
    check_shift(shift)
    if not 1 <= points <= TIMESTEPS:
        raise ScheduleError(f"points is {points}; expected 1 to {TIMESTEPS} (released models: {DEFAULT_POINTS}).")
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
            f"steps is {steps}; the schedule `{DCM_GRID}` takes 1 to {counted(points, 'step')}, picked from {points} trained noise "
            f"levels. Choose fewer steps, or the schedule `{EVEN}`."
        )
    index = torch.arange(steps) * points // steps
    return torch.cat([solver_sigmas(shift, points)[index], torch.zeros(1)])


def even_sigmas(steps: int, shift: float, denoise: float = 1.0) -> Tensor:
    """Schedule of `steps` evenly spaced levels `shift(1 - i / steps)`, shape (steps + 1,), for full flow models.

    With denoise below 1, these are the last `steps` of `int(steps / denoise)` steps, as in KSampler.

    Raises:
        ScheduleError: steps, shift or denoise out of range.
    """
    levels = levels_for(steps, denoise)
    index = torch.arange(steps, -1, -1, dtype=torch.float64)
    return shift_sigma(index / levels, check_shift(shift)).float()


def levels_for(steps: int, denoise: float) -> int:
    """Length of the full schedule whose last `steps` steps are sampled: KSampler's `int(steps / denoise)`.

    Raises:
        ScheduleError: steps outside 1 .. 1000, or denoise outside (0, 1] or too small.
    """
    if not 1 <= steps <= TIMESTEPS:
        raise ScheduleError(f"steps is {steps}; expected 1 to {TIMESTEPS}.")
    check_denoise(denoise)
    # KSampler's own tolerance
    levels = steps if denoise > 0.9999 else int(steps / denoise)
    if levels > MOST_LEVELS:
        raise ScheduleError(
            f"denoise is {denoise}, which is too small for {counted(steps, 'step')}. Raise it to {steps / MOST_LEVELS:g} or more."
        )
    return levels


def check_denoise(denoise: float) -> float:
    """Return `denoise` if it leaves something to sample.

    Raises:
        ScheduleError: outside (0, 1].
    """
    if not 0 < denoise <= 1:
        raise ScheduleError(f"denoise is {denoise}; expected more than 0 and at most 1. Use 1 for a new video.")
    return denoise


def last_part(sigmas: Tensor, denoise: float) -> Tensor:
    """The last `denoise` share of a schedule's steps, at least one. Every level stays one that the expert was trained on.

    Raises:
        ScheduleError: denoise outside (0, 1].
    """
    steps = len(sigmas) - 1
    return sigmas[steps - max(1, round(steps * check_denoise(denoise))) :]


def make_sigmas(schedule: str | Sequence[float], steps: int, shift: float, denoise: float) -> Tensor:
    """The sigmas of `even`, `DCM grid` or fixed timesteps. Fixed timesteps ignore `steps` and `shift`.

    Raises:
        ScheduleError: a setting is out of range.
    """
    if schedule == EVEN:
        return even_sigmas(steps, shift, denoise)
    # denoise leaves steps out, so that experts only see levels they were trained on
    return last_part(generic_sigmas(steps, shift) if schedule == DCM_GRID else sigmas_from_timesteps(schedule), denoise)


def check_sigmas(sigmas: Tensor) -> Tensor:
    """Return `sigmas` if they can be sampled.

    Raises:
        ScheduleError: there is no step, or values are not finite, outside 0 to 1, or not falling.
    """
    if sigmas.ndim != 1 or len(sigmas) < 2:
        raise ScheduleError(
            f"The sigmas have {counted(max(0, sigmas.numel() - 1), 'step')} (shape {tuple(sigmas.shape)}); "
            "expected at least one step, which takes two falling values. Check the scheduler, its steps and its denoise."
        )
    values = sigmas.tolist()
    listed = ", ".join(f"{value:.4g}" for value in values[:8]) + (", ..." if len(values) > 8 else "")
    if not all(math.isfinite(value) and 0 <= value <= 1 + 1e-6 for value in values):
        raise ScheduleError(
            f"The sigmas are {listed}; expected a flow model's noise levels, between 1 and 0. "
            "Use DCM Scheduler, or a scheduler that takes the MODEL."
        )
    if any(later >= earlier for earlier, later in pairwise(values)):
        raise ScheduleError(
            f"The sigmas are {listed}; expected values that fall from step to step. Check the input `sigmas`."
        )
    return sigmas
