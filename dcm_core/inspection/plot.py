"""Plot a schedule (noise levels over steps, coloured by the expert that runs them), or how much each expert changes each
block.
"""

import math
from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..routing import SIDES, Owner, plan_steps
from .magnitude import AFTER, BEFORE, Profile

BACKGROUND, GRID, TEXT = "#1e1f26", "#3a3c48", "#d7d9e0"
COLOURS = {"semantic": "#f2a33c", "detail": "#4cb3ff"}
NEUTRAL = "#8a8d99"  # a model without an expert
SCALE = 2  # drawn larger and scaled down, for smooth lines

Point = tuple[float, float]


class Canvas:
    """An image to draw on. Positions are in its enlarged pixels; widths, radii and margins are in `unit`s.

    Attributes:
        unit: one hundredth of the shorter side.
        left, top, right, bottom: edges of the box inside the margins.
        font, small: the font at `text` units, and a smaller one.
    """

    def __init__(self, width: int, height: int, margins: tuple[float, float, float, float], text: float = 4.2):
        self.size = width, height
        self.image = Image.new("RGB", (width * SCALE, height * SCALE), BACKGROUND)
        self.draw = ImageDraw.Draw(self.image)
        self.unit = min(width, height) * SCALE / 100
        self.font, self.small = (ImageFont.load_default(size=size * self.unit) for size in (text, 0.81 * text))
        left, top, right, bottom = (margin * self.unit for margin in margins)
        self.left, self.top, self.right, self.bottom = left, top, self.image.width - right, self.image.height - bottom

    def at(self, across: float, up: float) -> Point:
        """A position in the box: (0, 0) is the lower left corner, (1, 1) the upper right one."""
        return self.left + (self.right - self.left) * across, self.bottom - (self.bottom - self.top) * up

    def line(self, points: Sequence[Point], colour: str, width: float) -> None:
        self.draw.line(points, fill=colour, width=max(1, round(width * self.unit)))

    def dot(self, centre: Point, colour: str, radius: float = 1.4) -> None:
        x, y, radius = *centre, radius * self.unit
        self.draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=colour)

    def text(self, place: Point, text: str, anchor: str, font: ImageFont.FreeTypeFont | None = None) -> None:
        self.draw.text(place, text, fill=TEXT, font=font or self.font, anchor=anchor)

    def level(self, up: float, label: str, font: ImageFont.FreeTypeFont | None = None, gap: float = 1.5) -> None:
        """A line across the box with its label on the left."""
        x, y = self.at(0, up)
        self.line([(x, y), (self.right, y)], GRID, 0.25)
        self.text((x - gap * self.unit, y), label, "rm", font)

    def legend(self, y: float, colours: Mapping[str, str]) -> None:
        """Labels in a row, each after a dot in its colour."""
        x = self.left
        for text, colour in colours.items():
            self.dot((x, y), colour)
            self.text((x + 3 * self.unit, y), text, "lm")
            x += self.draw.textlength(text, font=self.font) + 8 * self.unit

    def shortened(self, text: str) -> str:
        """The text, cut if it is wider than the box."""
        shown = text
        while text and self.draw.textlength(shown, font=self.font) > self.right - self.left:
            text = text[:-1]
            shown = f"{text}..."
        return shown

    def finished(self) -> Image.Image:
        return self.image.resize(self.size, Image.Resampling.LANCZOS)


def plot_schedule(
    sigmas: Tensor, boundary: float | None, width: int = 768, height: int = 432, owners: tuple[Owner, Owner] = SIDES
) -> Image.Image:
    """Plot a schedule at a size in pixels, coloured by what runs each step (see `routing.plan_steps`).

    Raises:
        ScheduleError: the sigmas cannot be sampled, or the boundary is outside (0, 1).
    """
    plan = plan_steps(sigmas, boundary, owners)
    canvas = Canvas(width, height, (13, 14, 5, 13.5))
    unit = canvas.unit
    points = [canvas.at(step / plan.steps, sigma) for step, sigma in enumerate(sigmas.tolist())]
    for sigma in (0, 0.25, 0.5, 0.75, 1):
        canvas.level(sigma, f"{sigma:g}", gap=2.5)
    if boundary is not None:
        _dashed(canvas, boundary)
        below = boundary > 0.5  # the label is put on the side of the line with room
        x, y = canvas.at(0, boundary)
        canvas.text((x + unit, y + (unit if below else -unit)), f"boundary {boundary:g}", "la" if below else "ld")
    canvas.legend(5 * unit, {words: COLOURS.get(owner, NEUTRAL) for words, owner in plan.parts})
    every = max(1, round(plan.steps / 12))
    for step in range(plan.steps):
        colour = COLOURS.get(plan.side(step), NEUTRAL)
        canvas.line(points[step : step + 2], colour, 0.9)
        canvas.dot(points[step], colour)
        if step % every == 0:
            canvas.text((canvas.at((step + 0.5) / plan.steps, 0)[0], canvas.bottom + 2 * unit), str(step + 1), "ma")
    canvas.dot(points[-1], TEXT, 1.1)
    canvas.text((canvas.at(0.5, 0)[0], canvas.bottom + 7 * unit), "step", "ma")
    return canvas.finished()


def _dashed(canvas: Canvas, up: float) -> None:
    x, y = canvas.at(0, up)
    while x < canvas.right:
        canvas.line([(x, y), (min(x + 2 * canvas.unit, canvas.right), y)], TEXT, 1 / 3)
        x += 3.5 * canvas.unit


def plot_profile(profile: Profile | None, title: str, width: int = 768, height: int = 432) -> Image.Image:
    """Plot one bar for each expert and block, with the embedders first and the output head last. None means no expert."""
    canvas = Canvas(width, height, (14, 27, 3, 16), text=5.2)
    unit = canvas.unit
    canvas.text((canvas.left, 5 * unit), canvas.shortened(title), "lm")
    every = [size for sizes in profile.experts.values() for size in sizes.values()] if profile else []
    highest = max(every, default=0.0)
    if not highest:
        canvas.text(canvas.at(0.5, 0.5), "no change to show" if profile else "no expert", "mm")
        return canvas.finished()
    step = round_step(highest / 4)
    lines = math.ceil(highest / step - 1e-9)
    for line in range(lines + 1):
        canvas.level(line / lines, f"{100 * line * step:g}%" if profile.relative else f"{line * step:g}", canvas.small)
    canvas.legend(13 * unit, {name: COLOURS.get(name, TEXT) for name in profile.experts})
    says = "size of the change / size of the weights" if profile.relative else "size of the change (Frobenius norm)"
    says += ", ? needs the base" if profile.unmeasured else ""
    canvas.text((canvas.left, 20 * unit), says, "lm", canvas.small)
    _bars(canvas, profile, lines * step)
    return canvas.finished()


def _bars(canvas: Canvas, profile: Profile, highest: float) -> None:
    unit, bottom = canvas.unit, canvas.bottom
    groups = {group: count for group, count in profile.groups.items() if count}
    # a gap of one column before and after each group
    column = (canvas.right - canvas.left) / (sum(groups.values()) + len(groups))
    bar = min(0.8 * column / len(profile.experts), 10 * unit)
    every = round_step(max(1.0, 9 * unit / column))
    x = canvas.left + column / 2
    for group, count in groups.items():
        single = group in (BEFORE, AFTER)
        name = group if single else group.removesuffix("s").replace("_", " ")
        canvas.text((x + count * column / 2, bottom + (2 if single else 8) * unit), name, "ma", canvas.small)
        for index in range(count):
            if not single and index % every == 0:
                canvas.text((x + column / 2, bottom + 2 * unit), str(index), "ma", canvas.small)
            for number, (expert, sizes) in enumerate(profile.experts.items()):
                if (group, index) in sizes:
                    start = x + column / 2 + (number - len(profile.experts) / 2) * bar
                    top = canvas.at(0, sizes[group, index] / highest)[1]
                    canvas.draw.rectangle([start, top, start + bar, bottom], fill=COLOURS.get(expert, TEXT))
            if (group, index) in profile.unmeasured.values():
                canvas.text((x + column / 2, bottom - unit), "?", "md", canvas.small)
            x += column
        x += column


def round_step(value: float) -> float:
    """The next larger 1, 2 or 5 times a power of ten."""
    power = 10 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= value * (1 - 1e-9))
