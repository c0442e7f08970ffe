"""What a comparison found: values with standard errors, what they mean in plain words, and a JSON for programs."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from ..errors import DCMError, counted
from ..text import one_line, plain
from .measures import energy_distance

FORMAT, VERSION = "dcm-report", 1
# A difference is named if it is larger than this share and than so many standard errors.
NOTABLE, ERRORS = 0.05, 2.0
# A strong expert is named if its best factor would remove this share of the error, a weak one if that factor is above this.
GAIN, WEAK = 0.2, 1.1
# A share of the distance that one part of the schedule must have to be named.
MOST = 0.5


@dataclass(frozen=True)
class Value:
    """A measured value and its standard error over the videos. The error of one video is infinite."""

    value: float
    error: float

    def exceeds(self, limit: float) -> bool:
        """Whether it is surely more than a limit. With one video, nothing is known of its error."""
        return self.value - (ERRORS * self.error if math.isfinite(self.error) else 0.0) > limit

    def differs(self, normal: float, by: float) -> bool:
        """Whether it is surely further than `by` from its normal value, as far as the error says."""
        away = abs(self.value - normal)
        return away > by and Value(away, self.error).exceeds(0.0)

    def percent(self) -> str:
        error = f" ± {100 * self.error:.0f}" if math.isfinite(self.error) and self.error >= 0.005 else ""
        return f"{100 * self.value:.0f}{error} %"

    def __str__(self) -> str:
        return f"{self.value:.3g}" + (f" ± {self.error:.1g}" if math.isfinite(self.error) else "")


def ratio(numerators: Tensor, denominators: Tensor) -> Value:
    """The sum of one quantity over that of another, with a jackknife over the videos. Both: (videos,)."""
    above, below = numerators.double(), denominators.double()
    count, value = len(above), float(above.sum() / below.sum())
    if count < 2:
        return Value(value, math.inf)
    without = (above.sum() - above) / (below.sum() - below)
    error = (without - without.mean()).square().sum().mul((count - 1) / count).sqrt()
    return Value(value, float(error))


def mean(values: Tensor) -> Value:
    """The mean over the videos, (videos,), with its standard error."""
    return ratio(values, torch.ones_like(values))


@dataclass(frozen=True)
class Step:
    """One step of the schedule. Distances are shares of the standard deviation of the reference's final latent.

    Attributes:
        owner: what runs it, in words.
        distance: the global error, on the model's own way: from its denoised estimate to the one that would reach the reference.
        own: the local error: the same if the step starts where the reference is. It does not depend on earlier steps.
        plain: the local error of the model without experts; None if it has none.
        factor: the factor of the experts' effect that comes closest; None if there are no experts.
        factor_gain: the share of `own` that this factor would remove.
        other: beside a boundary, what runs the step on the other side, and its local error.
    """

    number: int
    sigma: float
    owner: str
    distance: Value
    own: Value
    plain: Value | None = None
    factor: Value | None = None
    factor_gain: float = 0.0
    other: tuple[str, Value] | None = None


@dataclass(frozen=True)
class Measure:
    """A measure of the videos.

    Attributes:
        value: a share of the reference's, or a difference from it; see `kind`.
        model, reference: the means of both.
        kind: `ratio` or `difference`.
        unit: the unit of the means and of a difference.
    """

    name: str
    value: Value
    model: float
    reference: float
    kind: str = "ratio"
    unit: str = ""


@dataclass(frozen=True)
class SetDistance:
    """The energy distance of two sets of videos.

    Attributes:
        share: the share of the largest value that it could have (Székely and Rizzo's coefficient of inhomogeneity), from 0 to 1.
    """

    name: str
    value: Value
    share: float


@dataclass(frozen=True)
class Report:
    """A comparison of a model with its reference.

    Attributes:
        run: who runs which step, in words.
        decoded: whether the measures are of decoded frames; else of latents.
        spectrum: amplitude for 1, 2 ... cycles over the shorter side of a frame, as a share of the reference's.
        settings: what was compared, for the JSON.
    """

    run: str
    reference: str
    videos: int
    decoded: bool
    steps: Sequence[Step]
    measures: Sequence[Measure]
    sets: Sequence[SetDistance]
    spectrum: Sequence[float] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        frames = "decoded frames" if self.decoded else "latents, as no VAE is connected"
        first = f"{self.run}\nReference: {self.reference}. {counted(self.videos, 'video')}, measured on {frames}."
        return plain("\n".join([first, *self.findings]))

    @property
    def findings(self) -> list[str]:
        """What the values say, the most important first."""
        found = [
            *self._motion(),
            *self._where(),
            *self._boundaries(),
            *self._strengths(),
            *self._others(),
            *self._sets(),
        ]
        if self.videos == 1:
            found.append("One video has no standard error. Use more seeds.")
        return found

    def measure(self, name: str) -> Measure | None:
        return next((measure for measure in self.measures if measure.name == name), None)

    def parts(self) -> list[list[Step]]:
        """The steps, those with the same owner that follow each other in one list."""
        return [list(steps) for _, steps in groupby(self.steps, key=lambda step: step.owner)]

    def _motion(self) -> list[str]:
        found = self.measure("motion")
        return [] if found is None else [f"{found.value.percent()} of the reference's motion"]

    def _where(self) -> list[str]:
        """Where the distance grows, and how much of the plain model's error each part corrects."""
        grown, last = [], 0.0
        for step in self.steps:
            grown.append(max(0.0, step.distance.value - last))
            last = max(last, step.distance.value)
        lines, total = [], sum(grown)
        parts = self.parts()
        shares = [sum(grown[step.number - 1] for step in part) / total if total else 0.0 for part in parts]
        share, part = max(zip(shares, parts, strict=True), key=lambda entry: entry[0])
        if len(parts) > 1 and share > MOST:
            lines.append(
                f"Most is lost in {numbers(part)}, run by {part[0].owner} ({100 * share:.0f} % of the distance)"
            )
        for part in parts:
            if all(step.plain is not None for step in part):
                own, without = (
                    sum(v.value**2 for v in values) for values in zip(*((s.own, s.plain) for s in part), strict=True)
                )
                corrected = 1 - math.sqrt(own / without) if without else 0.0
                verb = "reduces" if corrected >= 0 else "increases"
                lines.append(
                    f"{part[0].owner} {verb} the error of the plain model in {numbers(part)} by {100 * abs(corrected):.0f} %"
                )
        return lines

    def _boundaries(self) -> list[str]:
        """Steps beside a boundary that the other side runs better."""
        lines = []
        for step in self.steps:
            if self._misplaced(step):
                owner, value = step.other
                less = 100 * (1 - value.value / step.own.value)
                earlier = step.number > 1 and self.steps[step.number - 2].owner == owner
                advice = (
                    f"Lower the boundary to {step.sigma:.3g}"
                    if earlier
                    else f"Raise the boundary above {step.sigma:.3g}"
                )
                lines.append(
                    f"{step.owner} runs step {step.number}, where {owner} would lose {less:.0f} % less. {advice}"
                )
        return lines

    def _misplaced(self, step: Step) -> bool:
        if step.other is None:
            return False
        value = step.other[1]
        less = Value(step.own.value - value.value, math.hypot(step.own.error, value.error))
        return less.exceeds(NOTABLE * step.own.value)

    def _strengths(self) -> list[str]:
        """The part whose effect is most surely too small, and the one whose effect is most surely too large.

        One of each: an expert that is active everywhere shows in the steps of others.
        """
        weak: list[tuple[float, list[Step]]] = []
        strong: list[tuple[float, list[Step]]] = []
        for part in self.parts():
            known = [step for step in part if step.factor is not None and not self._misplaced(step)]
            if too_weak := [step for step in known if step.factor.exceeds(WEAK)]:
                weak.append((max(step.factor.value for step in too_weak), too_weak))
            if too_strong := [
                step
                for step in known
                if step.factor_gain > GAIN and Value(1 - step.factor.value, step.factor.error).exceeds(0)
            ]:
                strong.append((max(step.factor_gain for step in too_strong), too_strong))
        lines = []
        for found, what, advice, furthest in ((weak, "weak", "Raise", max), (strong, "strong", "Lower", min)):
            if found:
                steps = max(found, key=lambda entry: entry[0])[1]
                factor = furthest(step.factor.value for step in steps)
                lines.append(
                    f"{steps[0].owner} is too {what}: in {numbers(steps)}, its effect times {factor:.2f} comes closest. "
                    f"{advice} its strength"
                )
        return lines

    def _others(self) -> list[str]:
        """Measures that are not as the reference's."""
        lines = []
        for measure in self.measures:
            if measure.name == "motion":
                continue
            if measure.kind == "ratio" and measure.value.differs(1, NOTABLE):
                lines.append(f"{measure.value.percent()} of the reference's {measure.name}")
            if measure.kind == "difference" and measure.value.differs(0, NOTABLE if not measure.unit else 1.0):
                way = "more" if measure.value.value > 0 else "less"
                size = (
                    f"{abs(measure.value.value):.1f} {measure.unit}"
                    if measure.unit
                    else f"{100 * abs(measure.value.value):.0f} %"
                )
                lines.append(f"{size} {way} {measure.name} than the reference")
        return lines

    def _sets(self) -> list[str]:
        return [
            f"Energy distance of {found.name} from the reference's: {found.value} "
            f"({100 * max(0.0, found.share):.2g} % of the largest possible)"
            for found in self.sets
        ]

    def to_json(self) -> str:
        """The report for programs. Numbers that are not finite are null."""
        content = dataclasses.asdict(self)
        data = {"format": FORMAT, "version": VERSION, "findings": self.findings, **content}
        return json.dumps(_clean(data), indent=1, allow_nan=False)


def numbers(steps: Sequence[Step]) -> str:
    """`step 4`, or `steps 4 to 6`; steps apart from each other are listed."""
    found = [step.number for step in steps]
    if len(found) == 1:
        return f"step {found[0]}"
    if found == list(range(found[0], found[-1] + 1)):
        return f"steps {found[0]} to {found[-1]}"
    return f"steps {', '.join(map(str, found[:-1]))} and {found[-1]}"


def _clean(data: Any) -> Any:
    """Text that is safe to show, numbers that JSON has."""
    if isinstance(data, Mapping):
        return {one_line(name): _clean(value) for name, value in data.items()}
    if isinstance(data, list | tuple):
        return [_clean(value) for value in data]
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    return plain(data) if isinstance(data, str) else data


def compare_sets(name: str, found: Tensor, reference: Tensor) -> SetDistance | None:
    """The energy distance of two sets (videos, ...); None for one video, which is not a set."""
    if len(found) < 2:
        return None
    value, error = energy_distance(found, reference)
    between, count = torch.cdist(found.flatten(1).double(), reference.flatten(1).double()), len(found)
    largest = 2 * float(between.sum() - between.trace()) / (count * (count - 1)) / math.sqrt(reference[0].numel())
    return SetDistance(name, Value(value, error), value / largest if largest else 0.0)


def check_finite(latent: Tensor, who: str) -> Tensor:
    """Return the latent if all its values are finite.

    Raises:
        DCMError: NaN or infinite values.
    """
    if not bool(latent.isfinite().all()):
        raise DCMError(
            f"The video of the {who} has NaN or infinite values, so nothing can be compared. Check its cfg and the model's precision."
        )
    return latent
