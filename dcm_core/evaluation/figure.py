"""A comparison as one picture: the error of each step, the videos beside the reference's, and what that means. Also a search."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

from PIL import Image

from ..inspection.plot import DARK, add_legend, as_picture, new_axes, pictured
from ..text import one_line
from .report import Report, Value
from .search import Trial

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 640, 400
# Lines of the text, their height in pixels, and letters in a line.
LINES, LINE, LETTERS = 14, 24, 150
# Ratios beyond these are drawn at the edge.
LEAST, LARGEST = 0.25, 4.0


def _error(value: Value) -> float:
    return value.error if math.isfinite(value.error) else 0.0


def steps_figure(report: Report, width: int = WIDTH, height: int = HEIGHT, theme: str = DARK) -> Figure:
    """A bar for what each step loses, in the colour of what runs it. Beside it the plain model, and the distance of the run itself."""
    axes, colours = new_axes(width, height, theme, "Where it is lost")
    named, colour_of = set(), colours.palette(step.owner for step in report.steps)
    for step in report.steps:
        label = None if step.owner in named else one_line(step.owner, 24)
        named.add(step.owner)
        axes.bar(
            step.number,
            step.own.value,
            0.6,
            yerr=_error(step.own),
            color=colour_of[step.owner],
            ecolor=colours.text,
            label=label,
        )
    if all(step.plain is not None for step in report.steps):
        places = [step.number for step in report.steps]
        axes.plot(
            places,
            [step.plain.value for step in report.steps],
            ls="",
            marker="_",
            ms=22,
            mew=2,
            color=colours.text,
            label="plain model",
        )
    axes.plot(
        [step.number for step in report.steps],
        [step.distance.value for step in report.steps],
        color=colours.neutral,
        marker="o",
        label="distance of the run",
    )
    axes.set(xlabel="step", ylabel="distance from the reference", xlim=(0.4, len(report.steps) + 0.6))
    axes.set_ylim(bottom=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(visible=False, axis="x")
    add_legend(axes, colours)
    return axes.figure


def measures_figure(report: Report, width: int = WIDTH, height: int = HEIGHT, theme: str = DARK) -> Figure:
    """Each ratio as a point on a line where 100 % is the reference."""
    axes, colours = new_axes(width, height, theme, "Compared with the reference")
    shown = [measure for measure in report.measures if measure.kind == "ratio"]
    for place, measure in enumerate(reversed(shown)):
        ratio = min(max(measure.value.value, LEAST), LARGEST)
        near = not measure.value.differs(1, 0.05)
        axes.errorbar(
            ratio,
            place,
            xerr=min(_error(measure.value), ratio - LEAST / 2),
            color=colours.experts["detail"] if near else colours.experts["semantic"],
            marker="o",
            ms=9,
            capsize=4,
        )
        axes.annotate(
            measure.value.percent(), (ratio, place), (0, 9), textcoords="offset points", ha="center", color=colours.text
        )
    axes.axvline(1, color=colours.text, linestyle="--", linewidth=1)
    axes.set_xscale("log")
    ratios = [min(max(measure.value.value, LEAST), LARGEST) for measure in shown] or [1.0]
    low, high = min(0.5, 0.85 * min(ratios)), max(2.0, 1.18 * max(ratios))
    ticks = [tick for tick in (0.25, 0.5, 0.7, 1, 1.4, 2, 4) if low <= tick <= high]
    axes.set_xticks(ticks, [f"{100 * tick:g}%" for tick in ticks])
    axes.minorticks_off()
    axes.set_yticks(range(len(shown)), [measure.name for measure in reversed(shown)])
    axes.set(xlim=(low, high), ylim=(-0.6, max(len(shown), 1) - 0.2))
    return axes.figure


def text_figure(report: Report, width: int = 2 * WIDTH, theme: str = DARK) -> Figure:
    """The findings, one to a line."""
    lines = [
        line
        for finding in str(report).split("\n")
        for line in textwrap.wrap(finding, LETTERS, subsequent_indent="    ")
    ]
    lines = lines if len(lines) <= LINES else [*lines[: LINES - 1], "..."]
    axes, colours = new_axes(width, LINE * (len(lines) + 1), theme, "")
    axes.set_axis_off()
    axes.figure.set_layout_engine("none")
    axes.set_position((0, 0, 1, 1))
    for number, line in enumerate(lines):
        axes.text(
            0.015,
            1 - (number + 0.5) / len(lines) * 0.96 - 0.02,
            line,
            color=colours.text,
            fontsize=13 * 72 / axes.figure.dpi,
            va="center",
            parse_math=False,
        )
    return axes.figure


def trials_figure(trials: Sequence[Trial], width: int = 768, height: int = 432, theme: str = DARK) -> Figure:
    """The distance of each trial over the model calls, and the lowest so far."""
    axes, colours = new_axes(width, height, theme, "Search")
    finite = [trial for trial in trials if math.isfinite(trial.distance)]
    calls, distances = [trial.calls for trial in finite], [trial.distance for trial in finite]
    lowest = list(accumulate(distances, min))
    axes.plot(calls, distances, ls="", marker="o", color=colours.neutral, label="trials")
    axes.step(calls, lowest, where="post", color=colours.experts["detail"], lw=2, label="lowest so far")
    if finite:
        best = lowest.index(lowest[-1])
        axes.plot(
            calls[best],
            distances[best],
            ls="",
            marker="o",
            ms=10,
            color=colours.experts["semantic"],
            label=f"best, {distances[best]:.4g}",
        )
    axes.set(xlabel="model calls", ylabel="distance from the reference")
    axes.margins(0.05)
    axes.xaxis.get_major_locator().set_params(integer=True)
    add_legend(axes, colours)
    return axes.figure


plot_trials = pictured(trials_figure)


def plot_report(report: Report, theme: str = DARK) -> Image.Image:
    """Both plots beside each other, the findings under them."""
    plots = [as_picture(draw(report, theme=theme)) for draw in (steps_figure, measures_figure, text_figure)]
    picture = Image.new("RGB", (2 * WIDTH, HEIGHT + plots[2].height))
    for plot, place in zip(plots, ((0, 0), (WIDTH, 0), (0, HEIGHT)), strict=True):
        picture.paste(plot, place)
    return picture
