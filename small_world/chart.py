"""Draw how near each method comes to the base's many steps, against the calls of the model that it makes."""

from collections.abc import Mapping
from typing import Any

from PIL import Image

from dcm_core.inspection.plot import add_legend, as_picture, new_axes

# a line through the base's steps, a point for each pair of experts
EXPERTS = {"one expert": "#b58cff", "two experts": "#f2a33c", "+ GAN and feature matching": "#4cb3ff"}
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
    axes, colours = new_axes(*size, "dark", measure)
    axes.set(xscale="log", yscale="log", xlabel="calls of the model", ylabel=f"{measure} (lower is nearer)")
    parts = {"base": (colours.text, base)} | {
        title: (colour, [rows[title]]) for title, colour in EXPERTS.items() if title in rows
    }
    for title, (colour, points) in parts.items():
        calls, values, errors = zip(*points, strict=True)
        axes.errorbar(calls, values, errors, color=colour, marker="o", capsize=2, label=title)
    shown = sorted({calls for _, points in parts.values() for calls, _, _ in points})
    axes.set_xticks(shown, [f"{calls:g}" for calls in shown])
    axes.minorticks_off()
    add_legend(axes, colours, place="upper right")
    return as_picture(axes.figure)


def charts(
    table: Mapping[str, Mapping[str, Any]], measures: tuple[str, ...] = ("latent distance", "spectrum error")
) -> Image.Image:
    """Charts side by side."""
    parts = [chart(table, measure) for measure in measures]
    whole = Image.new("RGB", (sum(part.width for part in parts), parts[0].height))
    for place, part in enumerate(parts):
        whole.paste(part, (place * part.width, 0))
    return whole


def _value(value: Any) -> tuple[float, float]:
    return (float(value), 0.0) if isinstance(value, (int, float)) else (float(value[0]), float(value[1]))
