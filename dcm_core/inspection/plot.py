"""Draw a schedule (noise levels over steps, coloured by the expert that owns them), and how much each expert changes each
block.

Each plot is a matplotlib figure, and an image of it. matplotlib is imported when something is drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ParamSpec

from PIL import Image
from torch import Tensor

from ..errors import DCMError, check_choice
from ..routing import BASE, Owner, Plan
from .magnitude import AFTER, BEFORE, Profile

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Arguments = ParamSpec("Arguments")
# A power of two: sizes in pixels are exact.
DPI = 64
# Letters of so many pixels where the shorter side has so many.
LETTERS, SIDE = 13, 432


@dataclass(frozen=True)
class Theme:
    """Colours of a plot.

    Attributes:
        experts: role -> colour.
        neutral: colour of a model without an expert.
        others: colours of the rows of an expert table, in their order.
    """

    background: str
    text: str
    grid: str
    experts: Mapping[str, str]
    neutral: str
    others: tuple[str, ...]

    def palette(self, owners: Iterable[Owner]) -> dict[Owner, str]:
        """A colour for each owner: its expert's, the base's, or the next of the others."""
        others = [owner for owner in dict.fromkeys(owners) if owner not in self.experts and owner != BASE]
        spare = {owner: self.others[index % len(self.others)] for index, owner in enumerate(others)}
        return {**self.experts, BASE: self.neutral, **spare}


# Told apart by hue and by lightness.
OTHERS = {
    "dark": ("#5fd38d", "#ff7a90", "#c9a6ff", "#f5e05c", "#7fe3e0", "#ff9e64", "#b5d56a", "#e58fd9"),
    "light": ("#157a43", "#c2234a", "#7242c9", "#7d6b00", "#007c85", "#a64b00", "#4f7300", "#9b2f8f"),
}
THEMES = {
    "dark": Theme(
        "#1e1f26", "#d7d9e0", "#3a3c48", {"semantic": "#f2a33c", "detail": "#4cb3ff"}, "#8a8d99", OTHERS["dark"]
    ),
    "light": Theme(
        "#ffffff", "#22242b", "#d5d7de", {"semantic": "#b56a00", "detail": "#0b6fc0"}, "#6d7080", OTHERS["light"]
    ),
}
DARK = "dark"


def new_axes(width: int, height: int, theme: str, title: str) -> tuple[Axes, Theme]:
    """Axes of a figure of this size in pixels, in the colours of a theme.

    Raises:
        DCMError: a theme that is none.
    """
    # not above: it takes a second
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    colours = THEMES[check_choice("theme", theme, THEMES, DCMError)]
    size = LETTERS * min(max(min(width, height) / SIDE, 0.5), 3) * 72 / DPI
    figure = Figure((width / DPI, height / DPI), dpi=DPI, layout="constrained", facecolor=colours.background)
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set_facecolor(colours.background)
    axes.tick_params(colors=colours.text, labelsize=0.85 * size)
    axes.grid(color=colours.grid)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_color(colours.grid)
    for axis in (axes.xaxis, axes.yaxis):
        axis.label.set(color=colours.text, fontsize=size)
        axis.get_offset_text().set(color=colours.text, fontsize=0.85 * size)
    # a name may contain what would be read as mathematics
    axes.set_title(title, loc="left", color=colours.text, fontsize=1.1 * size, parse_math=False)
    return axes, colours


def add_legend(axes: Axes, colours: Theme, title: str | None = None, place: str = "best") -> None:
    size = axes.xaxis.label.get_fontsize()
    legend = axes.legend(
        loc=place,
        title=title,
        fontsize=0.85 * size,
        title_fontsize=0.85 * size,
        labelcolor=colours.text,
        framealpha=0.8,
    )
    legend.get_title().set_color(colours.text)
    legend.get_frame().set(facecolor=colours.background, edgecolor=colours.grid)


def as_picture(figure: Figure) -> Image.Image:
    figure.canvas.draw()
    return Image.frombytes("RGBA", figure.canvas.get_width_height(), bytes(figure.canvas.buffer_rgba())).convert("RGB")


def pictured(draw: Callable[Arguments, Figure]) -> Callable[Arguments, Image.Image]:
    """A function that draws a figure, as one that returns an image of it."""
    return lambda *args, **kwargs: as_picture(draw(*args, **kwargs))


def schedule_figure(sigmas: Tensor, plan: Plan, width: int = 768, height: int = 432, theme: str = DARK) -> Figure:
    """The noise levels over the steps, coloured by who runs which step.

    Args:
        plan: the plan of these sigmas.
    """
    axes, colours = new_axes(width, height, theme, "Noise schedule")
    levels = sigmas.tolist()
    colour_of = colours.palette(plan.by_step)
    first = 0
    for (words, owner), count in zip(plan.parts, (count for _, count in plan.stretches if count), strict=True):
        last = first + count
        axes.plot(
            range(first, last + 1),
            levels[first : last + 1],
            color=colour_of[owner],
            marker="o",
            # the level where it ends is the next one's, or none's
            markevery=range(count),
            label=words,
        )
        first = last
    if plan.boundary is not None:
        axes.axhline(
            plan.boundary, color=colours.text, linestyle="--", linewidth=1, label=f"boundary {plan.boundary:g}"
        )
    axes.set(
        xlabel="steps done", ylabel="noise level σ", xlim=(-0.02 * plan.steps, 1.02 * plan.steps), ylim=(-0.02, 1.04)
    )
    axes.xaxis.get_major_locator().set_params(integer=True)
    add_legend(axes, colours, place="lower left")
    return axes.figure


plot_schedule = pictured(schedule_figure)


def profile_figure(
    profile: Profile | None, title: str, width: int = 768, height: int = 432, theme: str = DARK
) -> Figure:
    """A bar for each expert at each block, the embedders before and the output head after them; None: no expert."""
    axes, colours = new_axes(width, height, theme, shortened(title, width))
    if not profile or not any(size for sizes in profile.experts.values() for size in sizes.values()):
        says = "no change to show" if profile else "no expert"
        axes.text(0.5, 0.5, says, color=colours.text, ha="center", va="center", transform=axes.transAxes)
        axes.set(xticks=[], yticks=[])
        return axes.figure
    places = columns(profile.groups)
    bar = 0.8 / len(profile.experts)
    colour_of = colours.palette(profile.experts)
    for number, (expert, sizes) in enumerate(profile.experts.items()):
        across = [places[column] + (number + 0.5) * bar - 0.4 for column in sizes]
        axes.bar(across, list(sizes.values()), bar, color=colour_of[expert], label=expert)
    for column in profile.unmeasured.values():
        axes.annotate("?", (places[column], 0), color=colours.text, ha="center", va="bottom")
    size = "size of the change / size of the weights" if profile.relative else "size of the change (Frobenius norm)"
    axes.set(xlabel="block", ylabel=size.replace(" / ", " /\n").replace(" (", "\n("))
    if profile.relative:
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")
    axes.grid(visible=False, axis="x")
    _name_columns(axes, profile.groups, places)
    add_legend(axes, colours, "? needs the base" if profile.unmeasured else None)
    return axes.figure


plot_profile = pictured(profile_figure)


def columns(groups: Mapping[str, int]) -> dict[tuple[str, int], int]:
    """Where each column stands on the axis, a place free between two groups."""
    places: dict[tuple[str, int], int] = {}
    place = 0
    for group, count in groups.items():
        places |= {(group, index): place + index for index in range(count)}
        place += count + bool(count)
    return places


def _name_columns(axes: Axes, groups: Mapping[str, int], places: Mapping[tuple[str, int], int]) -> None:
    """The name of a group below its columns, with the numbers of about twenty of them all."""
    every = next(step for step in (1, 2, 5, 10, 20, 50, 100, 1000) if len(places) / step <= 24)
    marks: dict[int, str] = {}
    for group, count in groups.items():
        for index in range(count):
            if group in (BEFORE, AFTER):
                marks[places[group, index]] = group
            elif index % every == 0:
                name = group.removesuffix("s").replace("_", " ")
                marks[places[group, index]] = f"{index}\n{name}" if index == 0 else str(index)
    axes.set_xticks(list(marks), list(marks.values()))
    axes.set_xlim(-1, max(places.values()) + 1)


def shortened(title: str, width: int) -> str:
    """The title, its end left out where it would be wider than a picture of so many pixels."""
    most = width // 9
    return title if len(title) <= most else f"{title[: most - 3]}..."
