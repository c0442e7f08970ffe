"""Draw a schedule (noise levels over steps, coloured by the expert that owns them) and the losses of a training run."""

import math
from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .routing import Plan, plan_steps

BACKGROUND, GRID, TEXT = "#1e1f26", "#3a3c48", "#d7d9e0"
COLOURS = {"semantic": "#f2a33c", "detail": "#4cb3ff"}
SCALE = 2  # drawn larger and reduced: smooth lines


def plot_schedule(sigmas: Tensor, boundary: float, width: int = 768, height: int = 432) -> Image.Image:
    """The schedule as an image of the given size in pixels.

    Raises:
        ScheduleError: sigmas that cannot be sampled, or a boundary outside (0, 1).
    """
    plan = plan_steps(sigmas, boundary)
    image = Image.new("RGB", (width * SCALE, height * SCALE), BACKGROUND)
    draw = ImageDraw.Draw(image)
    unit = min(width, height) * SCALE / 100
    font = ImageFont.load_default(size=4.2 * unit)
    left, top, right, bottom = 13 * unit, 14 * unit, width * SCALE - 5 * unit, height * SCALE - 13.5 * unit

    def at(step: float, sigma: float) -> tuple[float, float]:
        return left + (right - left) * step / plan.steps, bottom - (bottom - top) * sigma

    for sigma in (0, 0.25, 0.5, 0.75, 1):
        draw.line([at(0, sigma), at(plan.steps, sigma)], fill=GRID, width=max(1, round(unit / 4)))
        draw.text((left - 2.5 * unit, at(0, sigma)[1]), f"{sigma:g}", fill=TEXT, font=font, anchor="rm")
    _dashed(draw, at(0, boundary), at(plan.steps, boundary), TEXT, unit)
    below = boundary > 0.5  # on the side of the line that has room
    draw.text((left + unit, at(0, boundary)[1] + (unit if below else -unit)), f"boundary {boundary:g}", fill=TEXT, font=font,
              anchor="la" if below else "ld")
    _legend(draw, plan, left, 5 * unit, unit, font)
    values = sigmas.tolist()
    every = max(1, round(plan.steps / 12))
    for step in range(plan.steps):
        colour = COLOURS[plan.side(step)]
        draw.line([at(step, values[step]), at(step + 1, values[step + 1])], fill=colour, width=round(0.9 * unit))
        _dot(draw, at(step, values[step]), colour, 1.4 * unit)
        if step % every == 0:
            draw.text((at(step + 0.5, 0)[0], bottom + 2 * unit), str(step + 1), fill=TEXT, font=font, anchor="ma")
    _dot(draw, at(plan.steps, values[-1]), TEXT, 1.1 * unit)
    draw.text(((left + right) / 2, bottom + 7 * unit), "step", fill=TEXT, font=font, anchor="ma")
    return image.resize((width, height), Image.Resampling.LANCZOS)


def _dot(draw: ImageDraw.ImageDraw, centre: tuple[float, float], colour: str, radius: float) -> None:
    x, y = centre
    draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=colour)


def _dashed(draw: ImageDraw.ImageDraw, start: tuple[float, float], end: tuple[float, float], colour: str, unit: float) -> None:
    x = start[0]
    while x < end[0]:
        draw.line([(x, start[1]), (min(x + 2 * unit, end[0]), start[1])], fill=colour, width=max(1, round(unit / 3)))
        x += 3.5 * unit


def _legend(draw: ImageDraw.ImageDraw, plan: Plan, x: float, y: float, unit: float, font: ImageFont.FreeTypeFont) -> None:
    """The plan in words, a dot in its colour before each side."""
    for part in str(plan).partition(", boundary")[0].split(", "):
        _dot(draw, (x, y), COLOURS[part.rpartition(" ")[2]], 1.4 * unit)
        draw.text((x + 3 * unit, y), part, fill=TEXT, font=font, anchor="lm")
        x += draw.textlength(part, font=font) + 8 * unit


def plot_losses(history: Sequence[Mapping[str, float]], term: str, width: int = 768, height: int = 432) -> Image.Image:
    """A loss over the steps: every value faint, their running mean strong.

    Args:
        history: for each step its `step` and losses by name; steps without `term` are passed over.
    """
    points = [(entry["step"], entry[term]) for entry in history if math.isfinite(entry.get(term, math.nan))]
    image = Image.new("RGB", (width * SCALE, height * SCALE), BACKGROUND)
    draw = ImageDraw.Draw(image)
    unit = min(width, height) * SCALE / 100
    font = ImageFont.load_default(size=4.2 * unit)
    left, top, right, bottom = 17 * unit, 12 * unit, width * SCALE - 5 * unit, height * SCALE - 12 * unit
    draw.text((left, 5 * unit), term.replace("_", " "), fill=TEXT, font=font, anchor="lm")
    if not points:
        return image.resize((width, height), Image.Resampling.LANCZOS)
    steps, values = zip(*points, strict=True)
    # one wild step must not flatten the rest
    ordered = sorted(values)
    low, high = min(ordered), ordered[min(len(ordered) - 1, int(0.98 * len(ordered)))]
    high = high if high > low else low + 1e-12

    def at(step: float, value: float) -> tuple[float, float]:
        across = (step - steps[0]) / max(1, steps[-1] - steps[0])
        return left + (right - left) * across, bottom - (bottom - top) * min(1.0, (value - low) / (high - low))

    for part in (0, 0.5, 1):
        value = low + part * (high - low)
        draw.line([at(steps[0], value), (right, at(steps[0], value)[1])], fill=GRID, width=max(1, round(unit / 4)))
        draw.text((left - 1.5 * unit, at(steps[0], value)[1]), f"{value:.3g}", fill=TEXT, font=font, anchor="rm")
    for step, anchor in ((steps[0], "la"), (steps[-1], "ra")):
        draw.text((at(step, low)[0], bottom + 3 * unit), f"{step:g}", fill=TEXT, font=font, anchor=anchor)
    mean, smooth = values[0], []
    for count, value in enumerate(values, start=1):
        mean += (value - mean) * max(0.03, 1 / count)
        smooth.append(mean)
    if len(points) > 1:
        draw.line([at(*point) for point in points], fill=GRID, width=max(1, round(0.5 * unit)))
        draw.line([at(*point) for point in zip(steps, smooth, strict=True)], fill=COLOURS["semantic"], width=round(0.9 * unit))
    else:
        _dot(draw, at(*points[0]), COLOURS["semantic"], 1.4 * unit)
    return image.resize((width, height), Image.Resampling.LANCZOS)
