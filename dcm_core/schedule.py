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

TIMESTEPS = 1000
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


def solver_sigmas(shift: float = DEFAULT_SHIFT, points: int = DEFAULT_POINTS) -> Tensor:
    """The `points` noise levels the consistency models are trained on, largest first, shape (points,).

    Every (1000 / points)-th of 1000 shifted uniform levels; with the defaults i = 20, 40 ... 1000.

    Raises:
        ScheduleError: shift below 1e-3, or points outside 1 .. 1000.
    """
    if not (math.isfinite(shift) and shift >= 1e-3):
        raise ScheduleError(f"shift is {shift}; it has to be a positive number (the released models use {DEFAULT_SHIFT:g}).")
    if not 1 <= points <= TIMESTEPS:
        raise ScheduleError(f"points is {points}; it has to lie in 1 .. {TIMESTEPS} (the released models use {DEFAULT_POINTS}).")
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
            f"steps is {steps}; this schedule takes 1 .. {counted(points, 'step')}, as it picks them from {points} trained noise levels. "
            "Choose fewer steps, or another scheduler for more."
        )
    index = torch.arange(steps) * points // steps
    return torch.cat([solver_sigmas(shift, points)[index], torch.zeros(1)])


def last_part(sigmas: Tensor, denoise: float) -> Tensor:
    """The last `denoise` share of a schedule's steps (at least one), so that every level stays a trained one.

    Raises:
        ScheduleError: denoise outside (0, 1].
    """
    if not 0 < denoise <= 1:
        raise ScheduleError(f"denoise is {denoise}; it has to lie above 0 and at most at 1. Use 1 for a new video.")
    steps = len(sigmas) - 1
    return sigmas[steps - max(1, round(steps * denoise)):]


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
