"""The expert table: which experts, model and cfg each part of a run uses.

A row is active in an interval of noise levels. Two experts with one boundary are two rows, semantic and detail. Where rows overlap, their
experts stack in the order of the rows; where there is none, the base works alone.
"""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal, NamedTuple

from torch import Tensor

from .errors import ScheduleError, check_choice
from .routing import BASE, SIGMA_TOLERANCE, Owner, Plan, is_detail
from .schedule import check_sigmas
from .text import given

Unit = Literal["steps", "sigma", "percent"]
UNITS: tuple[Unit, ...] = ("steps", "sigma", "percent")
# Between the names of rows that overlap.
STACKED = " + "
# The largest step number and the most strengths that are read.
MOST_STEPS = 1000

# A percentage of the run -> the sigma where it begins, of a model's own schedule.
PercentToSigma = Callable[[float], float]


class Interval(NamedTuple):
    """Noise levels from `low` up to `high`: low <= sigma < high."""

    high: float
    low: float

    def interval(self, sigmas: Tensor | None, to_sigma: PercentToSigma) -> "Interval":
        """Itself, in any run; see `Span.interval`."""
        return self

    def covers(self, sigma: Tensor) -> Tensor:
        """True where the interval contains `sigma`; same shape."""
        return is_detail(sigma, self.high) & ~is_detail(sigma, self.low)


EVERYWHERE = Interval(math.inf, -math.inf)


@dataclass(frozen=True)
class Span:
    """The part of a run in which a row is active.

    Attributes:
        unit: what `start` and `end` are. With "sigma", noise levels from `start` down to `end`. The level `end` belongs to this row,
            and `start` to the row above it, as at a boundary. 1 and 0 are open ends. With "steps", the first and the last step,
            counted from 1. A step's intermediate levels belong to it. With "percent", a part of the model's noise schedule, as in
            the host's nodes.
        start, end: its bounds.

    Raises:
        ScheduleError: values that no run has, or in the wrong order.
    """

    unit: Unit = "sigma"
    start: float = 1.0
    end: float = 0.0

    def __post_init__(self) -> None:
        check_choice("unit", self.unit, UNITS, ScheduleError)
        start, end = self.start, self.end
        if self.unit == "steps":
            whole = all(math.isfinite(value) and value == int(value) for value in (start, end))
            if not (whole and 1 <= start <= end <= MOST_STEPS):
                raise ScheduleError(
                    f"start and end are {start:g} and {end:g}; expected the first and last step, counted from 1, such as 1 and 3."
                )
        elif self.unit == "sigma" and not 1 >= start > end >= 0:
            raise ScheduleError(
                f"start and end are {start:g} and {end:g}; expected noise levels that fall, from at most 1 to at least 0, "
                "such as 1 and 0.9."
            )
        elif self.unit == "percent" and not 0 <= start < end <= 1:
            raise ScheduleError(
                f"start and end are {start:g} and {end:g}; expected parts of the run that rise, from 0 to 1, such as 0 and 0.5."
            )

    def __str__(self) -> str:
        if self.unit == "steps":
            return f"step {self.start:g}" + (f" to {self.end:g}" if self.end > self.start else "")
        if self.unit == "percent":
            return f"{100 * self.start:g} to {100 * self.end:g} % of the run"
        return "all steps" if (self.start, self.end) == (1, 0) else f"sigma {self.start:g} to {self.end:g}"

    def interval(self, sigmas: Tensor | None, to_sigma: PercentToSigma) -> Interval:
        """Its noise levels in a run.

        Args:
            sigmas: all noise levels of the run, n + 1 values; only needed for steps.
            to_sigma: see `PercentToSigma`.

        Raises:
            ScheduleError: steps, and the run's noise levels are not known.
        """
        if self.unit == "sigma":
            return Interval(math.inf if self.start >= 1 else self.start, -math.inf if self.end <= 0 else self.end)
        if self.unit == "percent":
            return Interval(_up_to(self.start, to_sigma), _up_to(self.end, to_sigma))
        if sigmas is None:
            raise ScheduleError(
                "A row of the expert table uses steps, but this sampler node does not tell the model its noise levels. "
                "Set unit to sigma, or use DCM Sampler, KSampler or SamplerCustomAdvanced."
            )
        last = len(sigmas) - 1
        first, end = int(self.start) - 1, int(self.end)
        high = math.inf if first == 0 else _from(float(sigmas[first])) if first < last else -math.inf
        return Interval(high, -math.inf if end >= last else _from(float(sigmas[end])))


def _from(sigma: float) -> float:
    """The bound under which `sigma` lies, and no level that is clearly higher."""
    return sigma + 2 * SIGMA_TOLERANCE


def _up_to(percent: float, to_sigma: PercentToSigma) -> float:
    if percent <= 0:
        return math.inf
    return -math.inf if percent >= 1 else _from(to_sigma(percent))


class Use(NamedTuple):
    """An expert in a row.

    Attributes:
        expert: its name in the MODEL.
        strengths: one for each step of the row, from the first. The last one is kept for further steps.
    """

    expert: str
    strengths: tuple[float, ...]


@dataclass(frozen=True)
class Row:
    """One row of an expert table.

    Attributes:
        uses: its experts, in the order in which they stack.
        changes_more: whether it has a model or a cfg of its own.
    """

    name: str
    span: Span | Interval
    uses: tuple[Use, ...] = ()
    changes_more: bool = False

    @property
    def is_stepwise(self) -> bool:
        """Whether what it does depends on the steps of the run."""
        in_steps = isinstance(self.span, Span) and self.span.unit == "steps"
        return in_steps or any(len(strengths) > 1 for _, strengths in self.uses)


def two_rows(boundary: float, semantic: Sequence[Use], detail: Sequence[Use]) -> tuple[Row, Row]:
    """The rows of two experts with one boundary: semantic at sigma >= boundary, detail under it."""
    return (
        Row("semantic", Interval(math.inf, boundary), tuple(semantic)),
        Row("detail", Interval(boundary, -math.inf), tuple(detail)),
    )


def active_experts(
    rows: Iterable[Row], sigma: Tensor, sigmas: Tensor | None, to_sigma: PercentToSigma
) -> list[tuple[tuple[str, float], ...]]:
    """The experts that work at each `sigma` (batch,), in the order in which they stack, with their strengths.

    Strength 0 leaves an expert out.
    """
    found: list[list[tuple[str, float]]] = [[] for _ in sigma]
    for row in rows:
        if not row.uses:
            continue
        interval = row.span.interval(sigmas, to_sigma)
        for place in interval.covers(sigma).nonzero().flatten().tolist():
            found[place] += active_uses(row, interval, sigma[place], sigmas)
    return [tuple(experts) for experts in found]


def active_uses(row: Row, interval: Interval, sigma: Tensor, sigmas: Tensor | None) -> list[tuple[str, float]]:
    """The experts of a row at one of its noise levels, with their strengths; strength 0 leaves one out.

    Args:
        interval: the row's in this run.
        sigma: ().
    """
    found = []
    for expert, strengths in row.uses:
        # with one strength, the step does not matter
        step = step_in(interval, sigma, sigmas) if len(strengths) > 1 else 0
        if strength := strengths[min(step, len(strengths) - 1)]:
            found.append((expert, strength))
    return found


def step_in(interval: Interval, sigma: Tensor, sigmas: Tensor | None) -> int:
    """Which of an interval's steps a noise level belongs to, counted from 0.

    Raises:
        ScheduleError: the run's noise levels are not known.
    """
    if sigmas is None:
        raise ScheduleError(
            "A row of the expert table has one strength for each step, but this sampler node does not tell the model its noise "
            "levels. Set one strength, or use DCM Sampler, KSampler or SamplerCustomAdvanced."
        )
    starts = sigmas[:-1]
    step = max(int((starts > sigma - SIGMA_TOLERANCE).sum()) - 1, 0)
    return int(interval.covers(starts[:step]).sum())


def plan_rows(rows: Sequence[Row], sigmas: Tensor, to_sigma: PercentToSigma) -> Plan:
    """Which rows run each step; several names are joined by " + ". A step in which no row changes anything is the base's.

    Raises:
        ScheduleError: the sigmas cannot be sampled.
    """
    starts = check_sigmas(sigmas)[:-1]
    intervals = [(row, row.span.interval(sigmas, to_sigma)) for row in rows]
    names = [
        STACKED.join(
            row.name
            for row, interval in intervals
            if interval.covers(sigma) and (row.changes_more or active_uses(row, interval, sigma, sigmas))
        )
        or BASE
        for sigma in starts
    ]
    idle = [(row.name, 0) for row, interval in intervals if not interval.covers(starts).any()]
    stretches: list[tuple[Owner, int]] = [(name, len(list(steps))) for name, steps in groupby(names)]
    return Plan((*stretches, *idle), None)


def letters_of(owners: Iterable[Owner]) -> dict[Owner, str]:
    """A letter of its own for each row: the first one of its name that is free, else a digit. Rows that overlap show all of theirs."""
    owners, found = list(dict.fromkeys(owners)), {}
    for name in dict.fromkeys(name for owner in owners for name in owner.split(STACKED)):
        free = (letter.upper() for letter in (*name, *"123456789") if letter.isalnum())
        found[name] = next((letter for letter in free if letter not in found.values()), "")
    return {owner: "+".join(found[name] for name in owner.split(STACKED)) for owner in owners}


def parse_strengths(text: str, name: str = "strength") -> tuple[float, ...]:
    """Strengths from a widget: "1", or one for each step, "1, 1, 0.5".

    Raises:
        ScheduleError: something else than numbers from -10 to 10.
    """
    parts = re.split(r"[,;\s]+", text.strip(" ,;\n\t"), maxsplit=MOST_STEPS) if isinstance(text, str) else []
    try:
        strengths = tuple(map(float, parts))
    except ValueError:
        strengths = ()
    if not strengths or len(strengths) > MOST_STEPS or not all(abs(strength) <= 10 for strength in strengths):
        raise ScheduleError(
            f"{name} is {given(text)}; expected a number from -10 to 10, or one number for each step of the row, such as "
            "1, 1, 0.5, 0.5."
        )
    return strengths


def strengths_in_words(strengths: Sequence[float]) -> str:
    return ", ".join(f"{strength:g}" for strength in strengths)


def check_rows(rows: Sequence[tuple[Row, bool]]) -> None:
    """Refuse rows that clearly contradict each other. The rest is checked when a run starts.

    Args:
        rows: each row, and whether it has a full model of its own.

    Raises:
        ScheduleError: names both rows.
    """
    full = [row for row, has_model in rows if has_model]
    for index, first in enumerate(full):
        for second in full[index + 1 :]:
            if overlap(first.span, second.span):
                raise ScheduleError(
                    f"Rows {given(first.name)} and {given(second.name)} both have a full model, and their intervals overlap. Only "
                    "one model can run a step. Change start or end of one of them, or disconnect its model."
                )


def overlap(first: Span, second: Span) -> bool | None:
    """Whether two spans share steps. None if only the run can tell, as they have different units."""
    if Span() in (first, second):
        return True
    if first.unit != second.unit:
        return None
    if first.unit == "steps":
        return max(first.start, second.start) <= min(first.end, second.end)
    if first.unit == "sigma":
        return max(first.end, second.end) < min(first.start, second.start)
    return max(first.start, second.start) < min(first.end, second.end)
