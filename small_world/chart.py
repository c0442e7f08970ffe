"""Draw how near each method comes to the base's many steps, against the calls of the model that it makes."""

import math
from collections.abc import Mapping
from typing import Any

from PIL import Image

from dcm_core.inspection.plot import TEXT, Canvas, Point

# a line through the base's steps, a point for each pair of experts
EXPERTS = {"one expert": "#b58cff", "two experts": "#f2a33c", "+ GAN and feature matching": "#4cb3ff"}
Span = tuple[float, float]
# What is smaller is rounding: the reference against itself.
NOTHING = 1e-12


def chart(table: Mapping[str, Mapping[str, Any]], measure: str, size: tuple[int, int] = (576, 432)) -> Image.Image:
    """One measure (lower is nearer) over the calls, both on logarithmic axes, with standard errors.

    Args:
        table: method -> its measures, each a number or (number, standard error), and its `calls`.
    """
    rows = {
        title: (_value(row["calls"])[0], *_value(row[measure]))
        for title, row in table.items()
        if _value(row[measure])[0] > NOTHING
    }
    base = sorted(point for title, point in rows.items() if title.startswith("base"))
    points = {title: rows[title] for title in EXPERTS if title in rows}
    canvas = Canvas(*size, (17, 12, 5, 14))
    unit = canvas.unit
    shown = [*base, *points.values()]
    across = min(calls for calls, _, _ in shown) / 1.3, max(calls for calls, _, _ in shown) * 1.3
    up = (
        10 ** math.floor(math.log10(min(value for _, value, _ in shown))),
        10 ** math.ceil(math.log10(max(value for _, value, _ in shown))),
    )

    def at(calls: float, value: float) -> Point:
        return canvas.at(_share(calls, across), _share(max(value, up[0]), up))

    canvas.text((canvas.left, 5 * unit), measure, "lm")
    for power in range(round(math.log10(up[0])), round(math.log10(up[1])) + 1):
        canvas.level(_share(10.0**power, up), f"{10.0**power:g}")
    for calls in sorted({calls for calls, _, _ in shown}):
        canvas.text((at(calls, up[0])[0], canvas.bottom + 2 * unit), f"{calls:g}", "ma")
    canvas.text((canvas.at(0.5, 0)[0], canvas.bottom + 7 * unit), "calls of the model", "ma")
    canvas.line([at(calls, value) for calls, value, _ in base], TEXT, 0.7)
    legend = canvas.top + 2 * unit
    for title, colour, marks in (
        ("base", TEXT, base),
        *((title, EXPERTS[title], [point]) for title, point in points.items()),
    ):
        for calls, value, error in marks:
            canvas.line([at(calls, value - error), at(calls, value + error)], colour, 0.5)
            canvas.dot(at(calls, value), colour, 1.3)
        canvas.dot((canvas.right - 2 * unit, legend), colour, 1.3)
        canvas.text((canvas.right - 5 * unit, legend), title, "rm")
        legend += 5.5 * unit
    return canvas.finished()


def charts(
    table: Mapping[str, Mapping[str, Any]], measures: tuple[str, ...] = ("latent distance", "spectrum error")
) -> Image.Image:
    """Charts side by side."""
    parts = [chart(table, measure) for measure in measures]
    whole = Image.new("RGB", (sum(part.width for part in parts), parts[0].height))
    for place, part in enumerate(parts):
        whole.paste(part, (place * part.width, 0))
    return whole


def _value(value: Any) -> Span:
    return (float(value), 0.0) if isinstance(value, (int, float)) else (float(value[0]), float(value[1]))


def _share(value: float, span: Span) -> float:
    return math.log(value / span[0]) / math.log(span[1] / span[0])
