"""The noise levels that training draws from, and where its consistency phases end (paper, section 3.2).

The solver points (schedule.solver_sigmas) are numbered upwards from the cleanest: sigma[0] < ... < sigma[points - 1] = 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ...errors import ScheduleError
from ...routing import Side, check_boundary, is_detail
from ...schedule import DEFAULT_POINTS, DEFAULT_SHIFT, TIMESTEPS, shift_sigma, solver_sigmas

# From the cleanest level upwards.
SIDES: tuple[Side, ...] = ("detail", "semantic")


@dataclass(frozen=True)
class Phases:
    """An expert's share of the solver points, split into consistency phases.

    Attributes:
        side: the expert. It owns exactly the points that sampling gives it (`routing.is_detail`).
        boundary: sigma where the detail expert takes over.
        count: phases of this expert; each ends where the next cleaner one begins.
        steps: sigmas of the steps that the expert is for. Where a side has as many steps as phases, a phase is a step: it ends at
            the point nearest to the next step. Otherwise the points are shared out evenly.
        shared: one expert for all noise levels, with `count` phases on each side of the boundary; `side` only names what is stored.
        entry_share: share of the drawn points that are a phase's noisiest, where a step of sampling enters it.

    Raises:
        ScheduleError: a side without points, or more phases than points.
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
                    f"phases is {self.count}; the {side} expert owns {points} points. Choose 1 .. {points}."
                )

    @cached_property
    def sigmas(self) -> Tensor:
        """sigma[k], rising, shape (points,)."""
        return solver_sigmas(self.shift, self.points).flip(0)

    @cached_property
    def previous(self) -> Tensor:
        """The next cleaner level of each point: sigma[k - 1]; for k = 0 the cleanest of all 1000 levels."""
        cleanest = torch.tensor([shift_sigma(1 / TIMESTEPS, self.shift)], dtype=torch.float32)
        return torch.cat([cleanest, self.sigmas[:-1]])

    @cached_property
    def owned(self) -> Tensor:
        """Numbers of the expert's points, rising."""
        return torch.arange(self.points) if self.shared else self._points_of(self.side)

    def _points_of(self, side: Side) -> Tensor:
        """Numbers of the points that sampling gives to a side, rising."""
        return self._are_of(side, self.sigmas).nonzero().flatten()

    def _are_of(self, side: Side, sigmas: Tensor) -> Tensor:
        """Whether sampling gives each of the noise levels to a side."""
        return is_detail(sigmas, self.boundary) == (side == "detail")

    @cached_property
    def starts(self) -> Tensor:
        """For every owned point, the cleanest point of its phase."""
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
        """A side's points in phases, the cleanest first."""
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
        """sigma where the phases of the points `index` (batch,) end."""
        return self.previous[self.starts[index - self.owned[0]]]

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Points drawn uniformly from the expert's, but for the share of the phases' entries, (count,)."""
        index = self.owned[torch.randint(len(self.owned), (count,), generator=generator)]
        if not self.entry_share:
            return index
        entry = self.entries[torch.randint(len(self.entries), (count,), generator=generator)]
        return torch.where(torch.rand(count, generator=generator) < self.entry_share, entry, index)

    def draw_above_phase(self, index: Tensor, generator: torch.Generator) -> Tensor:
        """For each point one drawn uniformly from the expert's whose `previous` is no cleaner than the end of its phase."""
        first = self.starts[index - self.owned[0]]
        last = int(self.owned[-1])
        return first + (torch.rand(len(index), generator=generator) * (last + 1 - first)).long()
