"""The picture of a report shows its values, and nothing of it is cut off."""

import math

import pytest

from dcm_core.evaluation.figure import HEIGHT, WIDTH, measures_figure, plot_report, steps_figure, text_figure
from dcm_core.evaluation.report import Measure, SetDistance, Value
from dcm_core.inspection.plot import THEMES

from ..inspection.test_plot import cut_off, legend, words
from .test_report import report, step, sure

MEASURES = [
    Measure(name, Value(0.6 + 0.2 * n, 0.05), 1, 1) for n, name in enumerate(("motion", "sharpness", "contrast"))
]
FULL = report(
    *(step(number, plain=sure(0.3), factor=sure(1.3)) for number in range(1, 5)),
    measures=[*MEASURES, Measure("contrast drift", Value(0.3, 0.01), 1, 1, "difference")],
    sets=[SetDistance("videos", Value(0.01, 0.001), 0.1)],
)
BARE = report(*(step(number, owner="$x^2$ {row}") for number in range(1, 5)), videos=1)


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("found", [FULL, BARE], ids=["full", "bare"])
def test_nothing_is_cut_off(found, theme):
    image = plot_report(found, theme)
    assert image.width == 2 * WIDTH and image.height > HEIGHT
    for draw in (steps_figure, measures_figure):
        from dcm_core.inspection.plot import as_picture

        assert not cut_off(as_picture(draw(found, theme=theme)), THEMES[theme].background)


def test_bars_are_the_steps_own_errors():
    axes = steps_figure(FULL).axes[0]
    assert [bar.get_height() for container in axes.containers for bar in getattr(container, "patches", ())] == [
        pytest.approx(0.1)
    ] * 4
    assert {"semantic", "detail", "plain model", "distance of the run"} <= set(
        legend(steps_figure(FULL)).values()
    ) | set(words(steps_figure(FULL)))
    assert "plain model" not in words(steps_figure(BARE))


def test_ratios_have_their_percentages():
    said = words(measures_figure(FULL))
    assert {"60 ± 5 %", "80 ± 5 %", "100 ± 5 %", "motion", "sharpness"} <= set(said)
    assert "contrast drift" not in said


def test_every_finding_is_written():
    said = " ".join(words(text_figure(FULL)))
    assert all(finding in said for finding in FULL.findings)


def test_a_value_without_an_error_is_drawn():
    found = report(measures=[Measure("motion", Value(0.6, math.inf), 1, 1)], videos=1)
    assert "60 %" in words(measures_figure(found))
