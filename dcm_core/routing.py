"""Which expert runs at a noise level, and what follows from the models of a run. Sampling and training both use this.

The semantic expert runs at sigma >= boundary, the detail expert below the boundary (paper, section 3.2).
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from torch import Tensor

from .errors import ExpertError, ScheduleError, counted
from .families import PRESETS, Family
from .schedule import AUTO, DCM_GRID, EVEN, GENERIC, check_sigmas
from .text import given

Side = Literal["semantic", "detail"]
# What runs a step: an active expert or rows of an expert table, by name, or a model without any.
Owner = str
SIDES: tuple[Side, Side] = ("semantic", "detail")
BASE: Owner = "base"
SIDE_TITLES = {"semantic": "semantic (high-noise) side", "detail": "detail (low-noise) side"}

# In float32, timestep / 1000 may be one float smaller than the boundary it equals.
SIGMA_TOLERANCE = 1e-6
# Files and widgets store boundaries as text.
SAME_BOUNDARY = 1e-6


def check_boundary(boundary: float) -> float:
    """Return `boundary` if it lies within the noise levels.

    Raises:
        ScheduleError: outside (0, 1).
    """
    if not (math.isfinite(boundary) and 0 < boundary < 1):
        raise ScheduleError(
            f"boundary is {boundary}, the sigma where the detail expert takes over; expected more than 0 and less than 1 "
            "(Wan 2.1: 0.979, HunyuanVideo: 0.982). Where a widget allows 0, it uses the expert's own boundary."
        )
    return boundary


def is_detail(sigma: Tensor, boundary: float) -> Tensor:
    """True where the detail expert runs at `sigma`; same shape as `sigma`."""
    return sigma < boundary - SIGMA_TOLERANCE


def own_boundary(experts: Iterable[float | None], chosen: float | None = None) -> float | None:
    """The boundary of experts on a model: `chosen`, else the one they were trained for, else None.

    Raises:
        ExpertError: the experts were trained for different boundaries, and none is chosen.
    """
    found = sorted({boundary for boundary in experts if boundary})
    if not chosen and found and found[-1] - found[0] > SAME_BOUNDARY:
        raise ExpertError(
            f"The experts were trained for different boundaries ({found[0]:g} and {found[-1]:g}). Choose two that were trained together, "
            "or set `boundary` here."
        )
    return chosen or (found[0] if found else None)


def own_timesteps(experts: Iterable[tuple[float, ...] | None]) -> tuple[float, ...] | None:
    """The timesteps that experts were made for: the first that are known."""
    return next((timesteps for timesteps in experts if timesteps), None)


@dataclass(frozen=True)
class Setup:
    """The models and experts of a run, and what follows from them.

    Attributes:
        seen: the MODEL itself was inspected, so `family` None means another family. Otherwise only its files and widgets are known.
        family: family of the model; None if it has no DCM experts or is unknown.
        two_models: there are two full models with their own weights (Wan 2.2 A14B).
        two_sides: the low-noise side has a different MODEL (weights, LoRAs or experts).
        takes_image: whether the model takes an image; None if unknown.
        semantic, detail: whether the attached expert is active; None if none is attached. Strength 0 makes it inactive.
        stacked: the semantic expert is active on both sides.
        timesteps, boundary: the experts' own values; None if they have none.
    """

    family: Family | None = None
    seen: bool = False
    two_models: bool = False
    two_sides: bool = False
    takes_image: bool | None = None
    semantic: bool | None = None
    detail: bool | None = None
    stacked: bool = True
    timesteps: tuple[float, ...] | None = None
    boundary: float | None = None

    @property
    def attached(self) -> bool:
        """Whether any expert is attached, active or not."""
        return self.semantic is not None or self.detail is not None

    @property
    def owners(self) -> tuple[Owner, Owner]:
        """What runs the steps at or above the boundary, and those under it."""
        if self.two_sides:
            return SIDES
        # with a detail expert alone, the base itself is the semantic expert
        high: Owner = "semantic" if self.semantic or (self.semantic is None and self.detail) else BASE
        if self.detail:
            return high, "detail"
        return high, high if self.stacked else BASE

    def boundary_for(self, chosen: float | None) -> float | None:
        """The sigma where the detail side begins: `chosen`, else the experts' own, else the family's default, else None."""
        if chosen or self.boundary:
            return check_boundary(chosen or self.boundary)
        if self.family is None:
            return None
        if self.two_models and self.family.pair_boundary:
            return self.family.pair_boundary.get(self.takes_image)
        return self.family.preset.boundary

    def schedule(self, chosen: str) -> str | tuple[float, ...] | None:
        """The schedule that `chosen` stands for: fixed timesteps, or the name of a spacing.

        auto uses the experts' own timesteps, else the family's. Two full models and other families get even spacing.
        It is None if the model is unknown.

        generic uses the DCM grid for DCM experts or if nothing is known, else even spacing.
        """
        if chosen == AUTO:
            if self.timesteps:
                return self.timesteps
            if self.family is not None and not self.two_models:
                return self.family.preset.timesteps
            return EVEN if self.seen or self.two_models else None
        if chosen == GENERIC:
            # on two full models, a LoRA counts as a DCM expert only if its file says so
            of_dcm = self.attached and (self.timesteps or not self.two_models)
            return DCM_GRID if of_dcm or self == Setup() else EVEN
        return PRESETS.get(chosen, chosen)

    def changes(self, two_cfgs: bool = False) -> bool:
        """Whether anything changes at the boundary: what runs the steps, or the cfg."""
        return two_cfgs or self.owners[0] != self.owners[1]

    def plan(self, sigmas: Tensor, boundary: float | None, two_cfgs: bool = False) -> "Plan":
        """What runs each step; see `plan_steps`."""
        return plan_steps(sigmas, boundary if self.changes(two_cfgs) else None, self.owners)

    def notes(self, chosen: str) -> list[str]:
        """What the user should know about a schedule: settings without effect, or too few steps for a plain base."""
        schedule = self.schedule(chosen)
        if schedule is None or isinstance(schedule, str):
            return []
        notes = []
        if chosen == AUTO and not (self.semantic or self.detail):
            notes.append(
                f"Warning: no expert is active, and a plain model needs more than {counted(len(schedule), 'step')}. Attach experts, or "
                f"set schedule to {EVEN} and steps to 20 or more."
            )
        return [*notes, f"{chosen}: steps and shift are not used"]


@dataclass(frozen=True)
class Plan:
    """What runs each step.

    Attributes:
        stretches: (owner, number of steps) in the order of the steps. An owner without steps has 0.
        boundary: None if nothing changes at one.
    """

    stretches: tuple[tuple[Owner, int], ...]
    boundary: float | None = None

    @property
    def steps(self) -> int:
        return sum(count for _, count in self.stretches)

    @property
    def by_step(self) -> list[Owner]:
        """What runs each step."""
        return [owner for owner, count in self.stretches for _ in range(count)]

    @property
    def idle(self) -> list[Owner]:
        """The owners without a step."""
        return [owner for owner, count in self.stretches if not count]

    def side(self, step: int) -> Owner:
        """What runs a step, counted from 0."""
        return self.by_step[step]

    @property
    def parts(self) -> list[tuple[str, Owner]]:
        """The stretches that have steps, as text and owner: [("step 1-3 semantic", "semantic"), ("4-6 detail", "detail")]."""
        found: list[tuple[str, Owner]] = []
        last = 0
        for owner, count in self.stretches:
            if count:
                first, last = last + 1, last + count
                steps = f"{first}-{last}" if last > first else f"{first}"
                found.append((f"{steps} {owner}" if found else f"step {steps} {owner}", owner))
        return found

    def __str__(self) -> str:
        words = [words for words, _ in self.parts]
        return ", ".join(words if self.boundary is None else [*words, f"boundary {self.boundary:g}"])


def plan_steps(sigmas: Tensor, boundary: float | None, owners: tuple[Owner, Owner] = SIDES) -> Plan:
    """The plan of a schedule. The sigma where a step starts decides who runs it; without a boundary, the first owner runs all.

    Raises:
        ScheduleError: the sigmas cannot be sampled, or the boundary is outside (0, 1).
    """
    steps = check_sigmas(sigmas)[:-1]
    if boundary is None:
        return Plan(((owners[0], len(steps)),))
    low = int(is_detail(steps, check_boundary(boundary)).sum())
    return Plan(((owners[0], len(steps) - low), (owners[1], low)), boundary)


def split_sigmas(sigmas: Tensor, *boundaries: float) -> tuple[Tensor, ...]:
    """Split one trajectory at falling boundaries into parts, highest noise first. Each part ends where the next begins.

    Raises:
        ScheduleError: as for `plan_steps`, boundaries that do not fall, or a part without steps.
    """
    starts = check_sigmas(sigmas)[:-1]
    if any(low >= high for high, low in pairwise(map(check_boundary, boundaries))):
        raise ScheduleError(f"The boundaries are {_listed(boundaries)}; expected values that fall, such as 0.9, 0.5.")
    cuts = [0, *(int((~is_detail(starts, boundary)).sum()) for boundary in boundaries), len(starts)]
    for number, (first, last) in enumerate(pairwise(cuts)):
        if first == last:
            part = f"part {number + 1} of {len(cuts) - 1}" if len(boundaries) > 1 else SIDE_TITLES[SIDES[number]]
            raise ScheduleError(
                f"The {part} has no steps: they start at sigma {sigmas[0]:.4g} to {sigmas[-2]:.4g}, and the "
                f"{'boundary is' if len(boundaries) == 1 else 'boundaries are'} {_listed(boundaries)}. "
                "Choose boundaries between them, or sample without splitting."
            )
    return tuple(sigmas[first : last + 1] for first, last in pairwise(cuts))


def parse_boundaries(text: str) -> tuple[float, ...]:
    """Boundaries from a widget: "", "0.7" or "0.7, 0.4".

    Raises:
        ScheduleError: something else than numbers.
    """
    try:
        return tuple(map(float, text.replace(",", " ").split()))
    except (AttributeError, ValueError) as error:
        raise ScheduleError(
            f"more_boundaries is {given(text)}; expected falling sigmas, such as 0.7, 0.4, or nothing."
        ) from error


def _listed(boundaries: Iterable[float]) -> str:
    return ", ".join(f"{boundary:g}" for boundary in boundaries)
