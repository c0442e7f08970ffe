"""Which expert owns a noise level, and what follows from the models of a run. Sampling, plans and training ask here.

The semantic expert owns sigma >= boundary, the detail expert the rest (paper, section 3.2).
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from .errors import ExpertError, ScheduleError, counted
from .families import PRESETS, Family
from .schedule import AUTO, DCM_GRID, EVEN, GENERIC, check_sigmas

Side = Literal["semantic", "detail"]
# Who runs a step: an active expert, or a model without one.
Owner = Literal["semantic", "detail", "base"]
SIDES: tuple[Owner, Owner] = ("semantic", "detail")

# timestep / 1000 in float32 may land one float below the boundary it equals.
SIGMA_TOLERANCE = 1e-6
# Boundaries go through text in files and widgets.
SAME_BOUNDARY = 1e-6


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


def own_boundary(experts: Iterable[float | None], given: float | None = None) -> float | None:
    """The boundary of experts on a model: the one given with them, else the one they were made for; None where neither is known.

    Raises:
        ExpertError: experts that were made for different ones, and none is given.
    """
    found = sorted({boundary for boundary in experts if boundary})
    if not given and found and found[-1] - found[0] > SAME_BOUNDARY:
        raise ExpertError(
            f"The experts were made for different boundaries ({found[0]:g} and {found[-1]:g}), so that between these one of them is "
            "wrong. Choose experts of one pair, or set `boundary` here."
        )
    return given or (found[0] if found else None)


def own_timesteps(experts: Iterable[tuple[float, ...] | None]) -> tuple[float, ...] | None:
    """The timesteps that experts were made for, the first that are known."""
    return next((timesteps for timesteps in experts if timesteps), None)


@dataclass(frozen=True)
class Setup:
    """The models and experts of a run, and what follows from them.

    Attributes:
        seen: the MODEL itself was looked at, so that no family means another family; else only what its files and widgets say is known.
        family: of the model; None for a model that has no DCM experts, or is not known.
        two_models: two full models with weights of their own (Wan 2.2 A14B).
        two_sides: the low-noise side has a MODEL that differs in anything: weights, LoRAs, experts.
        takes_image: whether the model takes an image; None where that is not known.
        semantic, detail: whether the attached expert works, None where none is attached. An expert at strength 0 does not.
        stacked: the semantic expert works on both sides.
        timesteps, boundary: the experts' own, None where they name none.
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
        """Who runs the steps from the boundary upwards, and those below it."""
        if self.two_sides:
            return SIDES
        # a detail expert alone works beside the semantic expert that the base is
        high: Owner = "semantic" if self.semantic or (self.semantic is None and self.detail) else "base"
        if self.detail:
            return high, "detail"
        return high, high if self.stacked else "base"

    def boundary_for(self, given: float | None) -> float | None:
        """The sigma where the detail side begins: as given, else the experts' own, else the usual one; None if there is none."""
        if given or self.boundary:
            return check_boundary(given or self.boundary)
        if self.family is None:
            return None
        if self.two_models and self.family.pair_boundary:
            return self.family.pair_boundary.get(self.takes_image)
        return self.family.preset.boundary

    def schedule(self, chosen: str) -> str | tuple[float, ...] | None:
        """The schedule that counts where `chosen` is asked for: fixed timesteps, or the name of a spacing.

        auto: the experts' own, else the family's, else (two full models, other families) even spacing; None where the model is not
        known. generic: the DCM grid for DCM experts or where nothing is known, else even spacing.
        """
        if chosen == AUTO:
            if self.timesteps:
                return self.timesteps
            if self.family is not None and not self.two_models:
                return self.family.preset.timesteps
            return EVEN if self.seen or self.two_models else None
        if chosen == GENERIC:
            # a LoRA on one of two full models is no DCM expert unless its file says so
            of_dcm = self.attached and (self.timesteps or not self.two_models)
            return DCM_GRID if of_dcm or self == Setup() else EVEN
        return PRESETS.get(chosen, chosen)

    def changes(self, two_cfgs: bool = False) -> bool:
        """Whether anything changes at the boundary: who runs the steps, or the cfg."""
        return two_cfgs or self.owners[0] != self.owners[1]

    def plan(self, sigmas: Tensor, boundary: float | None, two_cfgs: bool = False) -> "Plan":
        """Who runs which step; as `plan_steps`."""
        return plan_steps(sigmas, boundary if self.changes(two_cfgs) else None, self.owners)

    def notes(self, chosen: str) -> list[str]:
        """What the user has to know of a chosen schedule: settings without effect, a base that needs more steps."""
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
    """Who runs which step: the first `semantic` steps, then `detail` more.

    Attributes:
        boundary: None where nothing changes from step to step.
        owners: who runs the steps of each side.
    """

    semantic: int
    detail: int
    boundary: float | None
    owners: tuple[Owner, Owner] = SIDES

    @property
    def steps(self) -> int:
        return self.semantic + self.detail

    def side(self, step: int) -> Owner:
        """Who runs a step counted from 0."""
        return self.owners[step >= self.semantic]

    @property
    def parts(self) -> list[tuple[str, Owner]]:
        """The sides that have steps, in words and by owner: [("step 1-3 semantic", "semantic"), ("4-6 detail", "detail")]."""
        found = []
        for owner, first, last in zip(self.owners, (1, self.semantic + 1), (self.semantic, self.steps), strict=True):
            if last >= first:
                steps = f"{first}-{last}" if last > first else f"{first}"
                found.append((f"{steps} {owner}" if found else f"step {steps} {owner}", owner))
        return found

    def __str__(self) -> str:
        words = [words for words, _ in self.parts]
        return ", ".join(words if self.boundary is None else [*words, f"boundary {self.boundary:g}"])


def plan_steps(sigmas: Tensor, boundary: float | None, owners: tuple[Owner, Owner] = SIDES) -> Plan:
    """The plan of a schedule; a step belongs to the owner of the sigma it starts from. Without a boundary all are the first owner's.

    Raises:
        ScheduleError: sigmas that cannot be sampled, or a boundary outside (0, 1).
    """
    steps = check_sigmas(sigmas)[:-1]
    detail = 0 if boundary is None else int(is_detail(steps, check_boundary(boundary)).sum())
    return Plan(len(steps) - detail, detail, boundary, owners)


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
    return sigmas[: plan.semantic + 1], sigmas[plan.semantic :]
