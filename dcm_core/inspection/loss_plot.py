"""Draw a loss of a training run over its steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ..errors import counted
from .plot import DARK, add_legend, new_axes, pictured

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Weight of a new step in the running mean.
WEIGHT = 0.03
# From where on a loss is drawn over the logarithm: its highest value over its lowest.
LOG_RATIO = 20
# Magnitudes that can be drawn; what is smaller is drawn as 0, what is larger as the largest.
SMALLEST, LARGEST = 1e-300, 1e300


def loss_figure(
    history: Sequence[Mapping[str, float]], term: str, width: int = 768, height: int = 432, theme: str = DARK
) -> Figure:
    """A loss over the steps: every value faint, the running mean strong, the newest of both in numbers.

    Positive losses that change much are drawn over the logarithm. Steps whose loss is NaN or infinite are a gap, and counted.

    Args:
        history: for each step its `step` and losses by name; steps without `term` are passed over.
    """
    axes, colours = new_axes(width, height, theme, _title(term))
    axes.set(xlabel="step", ylabel=_title(term))
    axes.xaxis.get_major_locator().set_params(integer=True)
    entries = [(entry["step"], entry[term]) for entry in history if term in entry]
    finite = [(step, _drawable(value)) for step, value in entries if math.isfinite(value)]
    if not finite:
        says = "every value is NaN or infinite" if entries else "no values yet"
        axes.text(0.5, 0.5, says, color=colours.text, ha="center", va="center", transform=axes.transAxes)
        return axes.figure
    steps, values = zip(*finite, strict=True)
    means = _running_mean(values)
    low, high = _range(sorted(values))
    if low > 0 and high / low >= LOG_RATIO:
        axes.set_yscale("log")
    # NaN is a gap
    drawn = [_drawable(value) if math.isfinite(value) else math.nan for _, value in entries]
    # a single step is a point
    look = {"marker": "o" if len(values) == 1 else None}
    axes.plot(
        [step for step, _ in entries],
        drawn,
        color=colours.neutral,
        lw=1,
        label=f"each step, last {values[-1]:.3g}",
        **look,
    )
    axes.plot(
        steps, means, color=colours.experts["semantic"], lw=2, label=f"running mean, last {means[-1]:.3g}", **look
    )
    if len(entries) == 1:
        axes.set_xlim(steps[0] - 1, steps[0] + 1)
    axes.set_ylim(*_with_margin(low, high, axes.get_yscale() == "log"))
    missing, beyond = len(entries) - len(finite), sum(not low <= value <= high for value in values)
    notes = [f"{counted(missing, 'step')} NaN or infinite"] * bool(missing) + [
        f"{counted(beyond, 'step')} off the scale"
    ] * bool(beyond)
    add_legend(axes, colours, ", ".join(notes) or None, place="upper right")
    return axes.figure


plot_losses = pictured(loss_figure)


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


def _with_margin(low: float, high: float, log: bool) -> tuple[float, float]:
    """The ends of an axis that shows all of these; a single value lies in the middle."""
    if log:
        room = (high / low) ** 0.05
        return low / room, high * room
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        room = abs(low) / 2 or 1.0
    else:
        # the difference of the largest numbers is none
        room = 0.05 * high - 0.05 * low
    return low - room, high + room


def _running_mean(values: Sequence[float]) -> list[float]:
    mean, means = values[0], []
    for count, value in enumerate(values, start=1):
        mean += (value - mean) * max(WEIGHT, 1 / count)
        means.append(mean)
    return means
