"""The noise levels used in training, and the ends of its consistency phases (paper, section 3.2).

The solver points (schedule.solver_sigmas) are numbered from the cleanest: sigma[0] < ... < sigma[points - 1] = 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ...errors import ScheduleError
from ...routing import Side, check_boundary, is_detail
from ...schedule import DEFAULT_POINTS, DEFAULT_SHIFT, TIMESTEPS, shift_sigma, solver_sigmas

# Sides in the order of their noise, the cleanest first.
SIDES: tuple[Side, ...] = ("detail", "semantic")


@dataclass(frozen=True)
class Phases:
    """An expert's solver points, split into consistency phases.

    Attributes:
        side: the expert. Its points are exactly those where sampling uses it (`routing.is_detail`).
        boundary: sigma where the detail expert takes over.
        count: number of phases of this expert. Each ends where the next cleaner one begins.
        steps: sigmas of the sampling steps the expert is trained for. If a side has as many steps as phases, each phase is one
            step and ends at the point nearest to the next step. Otherwise the points are divided evenly.
        shared: whether one expert is trained for all noise levels, with `count` phases on each side of the boundary. `side` is
            then only the name it is saved under.
        entry_share: share of the drawn points that are the noisiest of a phase, where a sampling step enters it.

    Raises:
        ScheduleError: a side has no points, or fewer points than phases.
    """

    side: Side
    boundary: float
    shift: float = DEFAULT_SHIFT
    points: int = DEFAULT_POINTS
    count: int = 1
    shared: bool = False
    steps: tuple[float, ...] = ()
    entry_share: float = 0.0

    def __post_init__(self) -> None:
        check_boundary(self.boundary)
        for side in SIDES if self.shared else (self.side,):
            points = len(self._points_of(side))
            if not points:
                raise ScheduleError(
                    f"The boundary {self.boundary:g} leaves the {side} expert no noise level to train on: the {self.points} points "
                    f"of shift {self.shift:g} lie between {float(self.sigmas[0]):.4g} and 1. Move the boundary or change the shift."
                )
            if not 1 <= self.count <= points:
                raise ScheduleError(
                    f"phases is {self.count}, but the {side} expert has {points} points; expected 1 to {points}."
                )

    @cached_property
    def sigmas(self) -> Tensor:
        """sigma[k], rising, shape (points,)."""
        return solver_sigmas(self.shift, self.points).flip(0)

    @cached_property
    def previous(self) -> Tensor:
        """The next cleaner level of each point: sigma[k - 1]. For k = 0 it is the cleanest of all 1000 levels."""
        cleanest = torch.tensor([shift_sigma(1 / TIMESTEPS, self.shift)], dtype=torch.float32)
        return torch.cat([cleanest, self.sigmas[:-1]])

    @cached_property
    def owned(self) -> Tensor:
        """Indices of the expert's points, rising."""
        return torch.arange(self.points) if self.shared else self._points_of(self.side)

    def _points_of(self, side: Side) -> Tensor:
        """Indices of the points where sampling uses a side, rising."""
        return self._are_of(side, self.sigmas).nonzero().flatten()

    def _are_of(self, side: Side, sigmas: Tensor) -> Tensor:
        """Whether sampling uses a side at each of the noise levels."""
        return is_detail(sigmas, self.boundary) == (side == "detail")

    @cached_property
    def starts(self) -> Tensor:
        """For each of the expert's points, the cleanest point of its phase."""
        return torch.cat([part[:1].expand(len(part)) for part in self._phases])

    @cached_property
    def entries(self) -> Tensor:
        """The noisiest point of each phase, rising."""
        return torch.cat([part[-1:] for part in self._phases])

    @cached_property
    def _phases(self) -> list[Tensor]:
        """The points of each phase, rising."""
        return [part for side in (SIDES if self.shared else (self.side,)) for part in self._parts(side)]

    def _parts(self, side: Side) -> Sequence[Tensor]:
        """A side's points, split into phases, the cleanest first."""
        points = self._points_of(side)
        steps = torch.tensor(self.steps, dtype=self.sigmas.dtype)
        steps = steps[self._are_of(side, steps)].sort().values
        if len(steps) == self.count:
            nearest = (self.sigmas[points, None] - steps[:-1]).abs().argmin(0)
            parts = points.tensor_split(nearest + 1)
            if all(map(len, parts)):
                return parts
        return points.tensor_split(self.count)

    def ends(self, index: Tensor) -> Tensor:
        """sigma at the ends of the phases of the points `index` (batch,)."""
        return self.previous[self.starts[index - self.owned[0]]]

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Points drawn uniformly from the expert's points, except for `entry_share` drawn from the entries; (count,)."""
        index = self.owned[torch.randint(len(self.owned), (count,), generator=generator)]
        if not self.entry_share:
            return index
        entry = self.entries[torch.randint(len(self.entries), (count,), generator=generator)]
        return torch.where(torch.rand(count, generator=generator) < self.entry_share, entry, index)

    def draw_above_phase(self, index: Tensor, generator: torch.Generator) -> Tensor:
        """For each point, one of the expert's points, drawn uniformly from those whose `previous` is at or above its phase's end."""
        first = self.starts[index - self.owned[0]]
        last = int(self.owned[-1])
        return first + (torch.rand(len(index), generator=generator) * (last + 1 - first)).long()
