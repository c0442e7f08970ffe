"""Which expert owns a noise level. Sampling and training both ask here.

The semantic expert owns sigma >= boundary, the detail expert the rest (paper, section 3.2).
"""

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from .errors import ScheduleError
from .schedule import check_sigmas

Side = Literal["semantic", "detail"]

# timestep / 1000 in float32 may land one float below the boundary it equals.
SIGMA_TOLERANCE = 1e-6


def check_boundary(boundary: float) -> float:
    """Return `boundary` if it splits the noise levels.

    Raises:
        ScheduleError: outside (0, 1).
    """
    if not (math.isfinite(boundary) and 0 < boundary < 1):
        raise ScheduleError(
            f"boundary is {boundary}; it is the sigma where the detail expert takes over and has to lie between 0 and 1, "
            "exclusive (Wan 2.1: 0.979, HunyuanVideo: 0.982). Where 0 is offered, 0 means the expert's own."
        )
    return boundary


def is_detail(sigma: Tensor, boundary: float) -> Tensor:
    """True where the detail expert owns `sigma`; same shape as `sigma`."""
    return sigma < boundary - SIGMA_TOLERANCE


@dataclass(frozen=True)
class Plan:
    """Who runs which step: the first `semantic` steps, then `detail` more."""

    semantic: int
    detail: int
    boundary: float

    @property
    def steps(self) -> int:
        return self.semantic + self.detail

    def side(self, step: int) -> Side:
        """The expert of a step counted from 0."""
        return "semantic" if step < self.semantic else "detail"

    def __str__(self) -> str:
        parts = []
        for side, first, last in (("semantic", 1, self.semantic), ("detail", self.semantic + 1, self.steps)):
            if last >= first:
                parts.append(f"{first}-{last} {side}" if last > first else f"{first} {side}")
        return f"step {', '.join(parts)}, boundary {self.boundary:g}"


def plan_steps(sigmas: Tensor, boundary: float) -> Plan:
    """The plan of a schedule; a step belongs to the owner of the sigma it starts from.

    Raises:
        ScheduleError: sigmas that cannot be sampled, or a boundary outside (0, 1).
    """
    steps = check_sigmas(sigmas)[:-1]
    detail = int(is_detail(steps, check_boundary(boundary)).sum())
    return Plan(len(steps) - detail, detail, boundary)


def split_sigmas(sigmas: Tensor, boundary: float) -> tuple[Tensor, Tensor]:
    """The two stretches of one trajectory: (high, low), `high` ending where `low` begins.

    Raises:
        ScheduleError: as `plan_steps`, and when one side would have no step.
    """
    plan = plan_steps(sigmas, boundary)
    if not plan.semantic or not plan.detail:
        empty = "semantic (high-noise)" if not plan.semantic else "detail (low-noise)"
        raise ScheduleError(
            f"The {empty} side is empty: the steps start at sigma {sigmas[0]:.4g} .. {sigmas[-2]:.4g} and the boundary is "
            f"{boundary:g}. Choose a boundary between them, or sample without splitting."
        )
    return sigmas[: plan.semantic + 1], sigmas[plan.semantic:]
