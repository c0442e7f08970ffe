"""Draw a schedule (noise levels over steps, coloured by the expert that owns them), the losses of a training run, and how
much each expert changes each block.
"""

import math
from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .magnitude import AFTER, BEFORE, Profile
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
        dot(draw, at(step, values[step]), colour, 1.4 * unit)
        if step % every == 0:
            draw.text((at(step + 0.5, 0)[0], bottom + 2 * unit), str(step + 1), fill=TEXT, font=font, anchor="ma")
    dot(draw, at(plan.steps, values[-1]), TEXT, 1.1 * unit)
    draw.text(((left + right) / 2, bottom + 7 * unit), "step", fill=TEXT, font=font, anchor="ma")
    return image.resize((width, height), Image.Resampling.LANCZOS)


def dot(draw: ImageDraw.ImageDraw, centre: tuple[float, float], colour: str, radius: float) -> None:
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
        dot(draw, (x, y), COLOURS[part.rpartition(" ")[2]], 1.4 * unit)
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
        dot(draw, at(*points[0]), COLOURS["semantic"], 1.4 * unit)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def plot_profile(profile: Profile | None, title: str, width: int = 960, height: int = 432) -> Image.Image:
    """A bar for each expert at each block, the embedders before and the output head after them; None: no expert."""
    image = Image.new("RGB", (width * SCALE, height * SCALE), BACKGROUND)
    draw = ImageDraw.Draw(image)
    unit = min(width, height) * SCALE / 100
    font, small = (ImageFont.load_default(size=size * unit) for size in (4.2, 3.4))
    left, top, right, bottom = 12 * unit, 19 * unit, width * SCALE - 3 * unit, height * SCALE - 13 * unit
    draw.text((left, 5 * unit), _shortened(draw, title, right - left, font), fill=TEXT, font=font, anchor="lm")
    every = [size for sizes in profile.experts.values() for size in sizes.values()] if profile else []
    highest = max(every, default=0.0)
    if not highest:
        says = "no change to show" if profile else "no expert"
        draw.text(((left + right) / 2, (top + bottom) / 2), says, fill=TEXT, font=font, anchor="mm")
        return image.resize((width, height), Image.Resampling.LANCZOS)
    step = _round_step(highest / 4)
    lines = math.ceil(highest / step - 1e-9)
    for line in range(lines + 1):
        y = bottom - (bottom - top) * line / lines
        draw.line([(left, y), (right, y)], fill=GRID, width=max(1, round(unit / 4)))
        label = f"{100 * line * step:g}%" if profile.relative else f"{line * step:g}"
        draw.text((left - 1.5 * unit, y), label, fill=TEXT, font=small, anchor="rm")
    x = left
    for name in profile.experts:
        dot(draw, (x + 1.4 * unit, 12 * unit), COLOURS.get(name, TEXT), 1.4 * unit)
        draw.text((x + 4 * unit, 12 * unit), name, fill=TEXT, font=font, anchor="lm")
        x += draw.textlength(name, font=font) + 8 * unit
    says = "size of the change / size of the weights" if profile.relative else "size of the change (Frobenius norm)"
    says += ", ? needs the base" if profile.unmeasured else ""
    draw.text((right, 12 * unit), says, fill=TEXT, font=small, anchor="rm")
    _bars(draw, profile, (left, top, right, bottom), lines * step, unit, small)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def _bars(
    draw: ImageDraw.ImageDraw, profile: Profile, box: tuple[float, float, float, float], highest: float, unit: float,
    font: ImageFont.FreeTypeFont,
) -> None:
    left, top, right, bottom = box
    groups = {group: count for group, count in profile.groups.items() if count}
    # a gap before and after each group, as wide as a column
    column = (right - left) / (sum(groups.values()) + len(groups))
    bar = min(0.8 * column / len(profile.experts), 10 * unit)
    every = _round_step(max(1.0, 7 * unit / column))
    x = left + column / 2
    for group, count in groups.items():
        middle = x + count * column / 2
        single = group in (BEFORE, AFTER)
        name = group if single else f"{group.removesuffix('s').replace('_', ' ')}"
        draw.text((middle, bottom + (2 if single else 7) * unit), name, fill=TEXT, font=font, anchor="ma")
        for index in range(count):
            if not single and index % every == 0:
                draw.text((x + column / 2, bottom + 2 * unit), str(index), fill=TEXT, font=font, anchor="ma")
            for number, (expert, sizes) in enumerate(profile.experts.items()):
                if (group, index) in sizes:
                    start = x + column / 2 + (number - len(profile.experts) / 2) * bar
                    height = (bottom - top) * sizes[group, index] / highest
                    draw.rectangle([start, bottom - height, start + bar, bottom], fill=COLOURS.get(expert, TEXT))
            if (group, index) in profile.unmeasured.values():
                draw.text((x + column / 2, bottom - unit), "?", fill=TEXT, font=font, anchor="md")
            x += column
        x += column


def _round_step(value: float) -> float:
    """The next 1, 2 or 5 times a power of ten."""
    power = 10 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= value * (1 - 1e-9))


def _shortened(draw: ImageDraw.ImageDraw, text: str, width: float, font: ImageFont.FreeTypeFont) -> str:
    """The text, its end left out where it is too wide."""
    if draw.textlength(text, font=font) <= width:
        return text
    while text and draw.textlength(f"{text}...", font=font) > width:
        text = text[:-1]
    return f"{text}..."
