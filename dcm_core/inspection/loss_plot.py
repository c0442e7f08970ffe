"""Plot a loss of a training run over its steps."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from PIL import Image

from ..errors import counted
from .plot import COLOURS, GRID, Canvas, Point, round_step

MEAN, EACH = COLOURS["semantic"], "#6d7080"
# Weight of a new step in the running mean.
WEIGHT = 0.03
# A loss is drawn on a log scale if its highest value divided by its lowest is at least this.
LOG_RATIO = 20
# Magnitudes that can be drawn. Smaller values are drawn as 0, larger ones as the largest.
SMALLEST, LARGEST = 1e-300, 1e300


@dataclass(frozen=True)
class Scale:
    """An axis.

    Attributes:
        marks: rising values, each with a line and a label. The first and the last are the ends of the axis.
        labels: a text for each mark.
    """

    marks: tuple[float, ...]
    labels: tuple[str, ...]
    log: bool = False

    def share(self, value: float) -> float:
        """Position of a value: 0 at the lower end, 1 at the upper end. Values outside are moved to the end."""
        low, high = self.marks[0], self.marks[-1]
        value = min(max(value, low), high)
        if self.log:
            low, high, value = (math.log10(number) for number in (low, high, value))
        return (value - low) / (high - low)


def plot_losses(history: Sequence[Mapping[str, float]], term: str, width: int = 768, height: int = 432) -> Image.Image:
    """Plot a loss over the steps: every value faint, the running mean strong, and the latest of both as numbers.

    Positive losses over a wide range are drawn on a log scale. Steps whose loss is NaN or infinite leave a gap and are counted.

    Args:
        history: for each step, its number `step` and its losses by name. Steps without `term` are skipped.
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
    """The lowest and the highest value to draw. A few outliers must not flatten the rest.

    The rest is all values but the lowest and the highest 2%. Outliers are further away than the span of the rest.
    """
    few = len(ordered) // 50
    places = [math.log10(value) for value in ordered] if ordered[0] > 0 else ordered
    first, last = places[few], places[-1 - few]
    near = [
        value for value, place in zip(ordered, places, strict=True) if 2 * first - last <= place <= 2 * last - first
    ]
    return near[0], near[-1]


def scale_of(low: float, high: float) -> Scale:
    """An axis for values from `low` to `high`. Its ends are round numbers around them."""
    if low > 0 and high / low >= LOG_RATIO:
        return _log_scale(low, high)
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        # a constant line is drawn in the middle
        half = max(abs(low) / 2, SMALLEST) if low else 1.0
        low, high = low - half, high + half
    step = round_step((high / 4 - low / 4) or SMALLEST)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    marks = tuple(number * step for number in range(first, last + 1))
    magnitude = math.floor(math.log10(max(abs(marks[0]), abs(marks[-1]))))
    # enough digits to tell the labels apart; thousands are written in full
    digits = max(magnitude - math.floor(math.log10(step)), min(magnitude, 5) if magnitude < 6 else 0) + 1
    return Scale(marks, tuple(f"{mark:.{digits}g}" for mark in marks))


def _log_scale(low: float, high: float) -> Scale:
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    every = math.ceil((last - first) / 6)
    if every > 1:
        powers = range(first, first + every * math.ceil((last - first) / every) + 1, every)
        marks = [float(f"1e{power}") for power in powers]
    else:
        # with few powers of ten, 2 and 5 get marks too
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
    """Label the lower axis. Returns a function from a step to its position on it, from 0 to 1."""
    unit, first, last = canvas.unit, steps[0], steps[-1]
    widest = canvas.draw.textlength(f"{last:,.0f}", font=canvas.font)
    # half of the last label extends past the axis
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
    """Steps and losses, split at steps without a finite loss."""
    parts: list[list[Point]] = [[]]
    for step, value in entries:
        if math.isfinite(value):
            parts[-1].append((step, _drawable(value)))
        elif parts[-1]:
            parts.append([])
    return [part for part in parts if part]
