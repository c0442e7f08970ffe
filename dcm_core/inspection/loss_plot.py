"""Draw a loss of a training run over its steps."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from PIL import Image

from ..errors import counted
from .plot import COLOURS, GRID, Canvas, Point, round_step

MEAN, EACH = COLOURS["semantic"], "#6d7080"
# Of a step in the running mean.
WEIGHT = 0.03
# From where on a loss is drawn over the logarithm: its highest value over its lowest.
LOG_RATIO = 20
# Magnitudes that can be drawn; what is smaller is drawn as 0, what is larger as the largest.
SMALLEST, LARGEST = 1e-300, 1e300


@dataclass(frozen=True)
class Scale:
    """Where a value lies on an axis.

    Attributes:
        marks: rising values with a line and a label each; the first and the last are the axis' ends.
        labels: a text for each mark.
    """

    marks: tuple[float, ...]
    labels: tuple[str, ...]
    log: bool = False

    def share(self, value: float) -> float:
        """0 at the lower end, 1 at the upper; what is beyond lies at the end."""
        low, high = self.marks[0], self.marks[-1]
        value = min(max(value, low), high)
        if self.log:
            low, high, value = (math.log10(number) for number in (low, high, value))
        return (value - low) / (high - low)


def plot_losses(history: Sequence[Mapping[str, float]], term: str, width: int = 768, height: int = 432) -> Image.Image:
    """A loss over the steps: every value faint, the running mean strong, the newest of both in numbers.

    Positive losses that change much are drawn over the logarithm. Steps whose loss is NaN or infinite are a gap, and counted.

    Args:
        history: for each step its `step` and losses by name; steps without `term` are passed over.
    """
    entries = [(entry["step"], entry[term]) for entry in history if term in entry]
    finite = [(step, _drawable(value)) for step, value in entries if math.isfinite(value)]
    canvas = Canvas(width, height, (4, 21, 6, 17), text=5.2)
    unit, values = canvas.unit, [value for _, value in finite]
    if not finite:
        canvas.text((canvas.left, 5 * unit), _title(term), "lm")
        canvas.text(canvas.at(0.5, 0.5), "every value is NaN or infinite" if entries else "no values yet", "mm")
        return canvas.finished()
    low, high = _range(sorted(values))
    scale = scale_of(low, high)
    missing, beyond = len(entries) - len(finite), sum(not low <= value <= high for value in values)
    notes = [f"{counted(missing, 'step')} NaN or infinite"] * bool(missing) + [
        f"{counted(beyond, 'step')} off the scale"
    ] * bool(beyond)
    canvas.text((canvas.left, 5 * unit), _title(term) + " (log scale)" * scale.log, "lm")
    canvas.text((canvas.right, 5 * unit), ", ".join(notes), "rm", canvas.small)
    means = _running_mean(values)
    canvas.legend(13 * unit, {f"each step, last {values[-1]:.3g}": EACH, f"running mean, last {means[-1]:.3g}": MEAN})
    canvas.left += max(canvas.draw.textlength(label, font=canvas.font) for label in scale.labels) + 2 * unit
    across = _steps_below(canvas, [step for step, _ in entries])
    for mark, label in zip(scale.marks, scale.labels, strict=True):
        canvas.level(scale.share(mark), label)
    for points in _unbroken(entries):
        _curve(canvas, [canvas.at(across(step), scale.share(value)) for step, value in points], EACH, 0.5)
    _curve(
        canvas,
        [canvas.at(across(step), scale.share(mean)) for (step, _), mean in zip(finite, means, strict=True)],
        MEAN,
        1.0,
    )
    return canvas.finished()


def _curve(canvas: Canvas, points: Sequence[Point], colour: str, width: float) -> None:
    if len(points) > 1:
        canvas.line(points, colour, width)
    else:
        canvas.dot(points[0], colour, 2 * width)


def _title(term: str) -> str:
    return term.replace("_", " ")


def _drawable(value: float) -> float:
    return 0.0 if abs(value) < SMALLEST else min(max(value, -LARGEST), LARGEST)


def _range(ordered: Sequence[float]) -> tuple[float, float]:
    """The lowest and the highest value to draw; a few wild ones far from the rest must not flatten it.

    The rest: all but the lowest and the highest fiftieth. Far: further than the rest's own span.
    """
    few = len(ordered) // 50
    places = [math.log10(value) for value in ordered] if ordered[0] > 0 else ordered
    first, last = places[few], places[-1 - few]
    near = [
        value for value, place in zip(ordered, places, strict=True) if 2 * first - last <= place <= 2 * last - first
    ]
    return near[0], near[-1]


def scale_of(low: float, high: float) -> Scale:
    """An axis for values from `low` to `high`, its ends round numbers outside of them."""
    if low > 0 and high / low >= LOG_RATIO:
        return _log_scale(low, high)
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        # no change to be seen: the line lies in the middle
        half = max(abs(low) / 2, SMALLEST) if low else 1.0
        low, high = low - half, high + half
    step = round_step((high / 4 - low / 4) or SMALLEST)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    marks = tuple(number * step for number in range(first, last + 1))
    magnitude = math.floor(math.log10(max(abs(marks[0]), abs(marks[-1]))))
    # enough digits that no two are the same; thousands in full
    digits = max(magnitude - math.floor(math.log10(step)), min(magnitude, 5) if magnitude < 6 else 0) + 1
    return Scale(marks, tuple(f"{mark:.{digits}g}" for mark in marks))


def _log_scale(low: float, high: float) -> Scale:
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    every = math.ceil((last - first) / 6)
    if every > 1:
        powers = range(first, first + every * math.ceil((last - first) / every) + 1, every)
        marks = [float(f"1e{power}") for power in powers]
    else:
        # 2 and 5 between few powers of ten
        between = (1, 2, 5) if last - first <= 2 else (1,)
        marks = [float(f"{digit}e{power}") for power in range(first, last + 1) for digit in between]
        marks = marks[sum(mark <= low for mark in marks[1:]) : len(marks) - sum(mark >= high for mark in marks[:-1])]
    return Scale(tuple(marks), tuple(f"{mark:g}" for mark in marks), log=True)


def _running_mean(values: Sequence[float]) -> list[float]:
    mean, means = values[0], []
    for count, value in enumerate(values, start=1):
        mean += (value - mean) * max(WEIGHT, 1 / count)
        means.append(mean)
    return means


def _steps_below(canvas: Canvas, steps: Sequence[float]) -> Callable[[float], float]:
    """Label the lower axis; where a step lies on it, as a share of its length."""
    unit, first, last = canvas.unit, steps[0], steps[-1]
    widest = canvas.draw.textlength(f"{last:,.0f}", font=canvas.font)
    # half of the last label is right of the axis
    canvas.right -= max(0, widest / 2 - 5 * unit)
    room = widest + 6 * unit
    every = max(1, round_step(max(1, last - first) * room / (canvas.right - canvas.left)))

    def share(step: float) -> float:
        return (step - first) / (last - first) if last > first else 0.5

    for mark in range(math.ceil(first / every), math.floor(last / every) + 1):
        x, y = canvas.at(share(mark * every), 0)
        canvas.line([(x, y), (x, y + unit)], GRID, 0.5)
        canvas.text((x, y + 2 * unit), f"{mark * every:,.0f}", "ma")
    canvas.text((canvas.at(0.5, 0)[0], canvas.bottom + 9 * unit), "step", "ma")
    return share


def _unbroken(entries: Sequence[tuple[float, float]]) -> list[list[Point]]:
    """Steps and losses in parts that no step without a finite loss interrupts."""
    parts: list[list[Point]] = [[]]
    for step, value in entries:
        if math.isfinite(value):
            parts[-1].append((step, _drawable(value)))
        elif parts[-1]:
            parts.append([])
    return [part for part in parts if part]
