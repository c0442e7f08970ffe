"""A loss plot says what its numbers say: lines of the values, axes with names, ticks that are whole."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dcm_core.inspection.loss_plot import loss_figure, plot_losses
from dcm_core.inspection.plot import THEMES

from .test_plot import cut_off, legend, words


def losses(*values, term="loss", first=1):
    """A history of one term."""
    return [{"step": step, term: value} for step, value in enumerate(values, first)]


HISTORIES = {
    "tiny": [8.63e-06, 7.7e-06, 3.1e-06, 5e-06],
    "subnormal": [3e-310, 1e-309],
    "huge": [1.23456e38, 2.5e38, 3.4e38],
    "as large as can be": [1.7e308, -1.7e308],
    "single": [8.63e-06],
    "constant": [8.63e-06] * 50,
    "zero": [0.0] * 20,
    "negative": [-0.51, 0.2, -0.1234567],
    "a little of much": [1000000.0, 1000000.125, 1000000.25],
    "NaN between": [0.5, math.nan, 0.4, math.inf, 0.3, 0.2],
    "NaN alone": [math.nan],
    "long": [1 / step for step in range(1, 100_000, 7)],
}


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize(("width", "height"), [(768, 432), (400, 225)])
@pytest.mark.parametrize("name", HISTORIES)
def test_nothing_is_cut_off(width, height, name, theme):
    image = plot_losses(losses(*HISTORIES[name], first=10**6), "loss", width, height, theme)
    assert (image.size, image.mode) == ((width, height), "RGB")
    assert not cut_off(image, THEMES[theme].background)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(), max_size=30), st.integers(1, 10**7))
def test_any_history_can_be_drawn(values, first):
    assert not cut_off(plot_losses(losses(*values, first=first), "loss", 384, 216), THEMES["dark"].background)


def lines(figure):
    """Each step, the running mean: [(step, value), ...]."""
    return [line.get_xydata().tolist() for line in figure.axes[0].get_lines()]


def test_the_lines_are_the_values_and_their_running_mean():
    figure = loss_figure(losses(3.0, 1.0, 2.0, first=10), "loss")
    each, mean = lines(figure)
    assert each == [[10, 3.0], [11, 1.0], [12, 2.0]]
    assert mean == [[10, 3.0], [11, 2.0], [12, 2.0]]
    assert legend(figure) == {
        "each step, last 2": THEMES["dark"].neutral,
        "running mean, last 2": THEMES["dark"].experts["semantic"],
    }


def test_the_mean_settles_to_a_share_of_the_new_value():
    _, mean = lines(loss_figure(losses(*[0.0] * 99, 1.0), "loss"))
    assert mean[-1][1] == pytest.approx(0.03)


def test_axes_are_named_and_steps_are_whole_numbers():
    for count in (1, 2, 5, 200):
        figure = loss_figure(losses(*[1.0] * count, term="feature_matching"), "feature_matching")
        (axes,) = figure.axes
        assert (axes.get_title("left"), axes.get_xlabel(), axes.get_ylabel()) == (
            "feature matching",
            "step",
            "feature matching",
        )
        low, high = axes.get_xlim()
        shown = [tick for tick in axes.get_xticks() if low <= tick <= high]
        assert shown and all(tick == round(tick) for tick in shown)


def read(axes):
    """The labels of the upper axis' ticks as the numbers that a reader makes of them, and the places of the ticks."""
    axes.figure.canvas.draw()
    offset = axes.yaxis.get_offset_text().get_text().replace("\N{MINUS SIGN}", "-")
    factor, plus = 1.0, 0.0
    for part in offset.replace("+", " +").replace("-1e", " -1e").split():
        if part[0] in "+-":
            plus = float(part)
        else:
            factor = float(part)
    low, high = axes.get_ylim()
    ticks = [
        (float(label.get_text().replace("\N{MINUS SIGN}", "-")) * factor + plus, place)
        for label, place in zip(axes.get_yticklabels(), axes.get_yticks(), strict=True)
        if low <= place <= high
    ]
    return ticks


@pytest.mark.parametrize("name", ["tiny", "huge", "negative", "constant", "zero", "single"])
def test_a_tick_s_label_is_its_value(name):
    (axes,) = loss_figure(losses(*HISTORIES[name]), "loss").axes
    ticks = read(axes)
    assert len(ticks) >= 2
    for said, place in ticks:
        assert said == pytest.approx(place, rel=1e-6, abs=1e-12 * max(abs(place) for _, place in ticks))


def test_losses_that_change_much_are_drawn_over_the_logarithm():
    for values, scale in (([2.0, 1.0, 8.63e-06], "log"), ([2.0, 1.0], "linear"), ([2.0, 0.0], "linear")):
        (axes,) = loss_figure(losses(*values), "loss").axes
        assert axes.get_yscale() == scale
        low, high = axes.get_ylim()
        assert low < min(values) and high > max(values)


def test_steps_without_a_number_are_counted_and_a_gap():
    figure = loss_figure(losses(1.0, 1.1, 1.3, math.nan, 1.3, 1.1, 1.0), "loss")
    each, mean = lines(figure)
    assert "1 step NaN or infinite" in words(figure)
    assert math.isnan(each[3][1]) and [step for step, _ in mean] == [1, 2, 3, 5, 6, 7]
    assert "2 steps NaN or infinite" in words(loss_figure(losses(1.0, math.nan, math.inf), "loss"))
    assert "every value is NaN or infinite" in words(loss_figure(losses(math.nan), "loss"))
    assert "no values yet" in words(loss_figure(losses(), "loss"))


def test_one_wild_step_does_not_flatten_the_rest():
    figure = loss_figure(losses(*[0.0, 1.0] * 50, 1000.0), "loss")
    low, high = figure.axes[0].get_ylim()
    assert -0.2 < low < 0 and 1 < high < 1.2
    assert "1 step off the scale" in words(figure)


def test_the_first_steps_of_a_loss_that_falls_are_on_the_scale():
    figure = loss_figure(losses(*[math.exp(-step / 100) for step in range(300)]), "loss")
    assert not any("off the scale" in text for text in words(figure))
    assert figure.axes[0].get_ylim()[1] > 1


def test_a_loss_s_picture_is_of_its_own_values():
    history = losses(3.0, 1.0, 2.0)
    more = [{**entry, "other": 9.0} for entry in history] + [{"step": 4, "other": 1.0}]
    assert lines(loss_figure(more, "loss")) == lines(loss_figure(history, "loss"))
    assert [value for _, value in lines(loss_figure(more, "other"))[0]] == [9.0, 9.0, 9.0, 1.0]


def test_a_single_step_is_a_point():
    for count, marker in ((1, "o"), (2, "None")):
        each, mean = loss_figure(losses(*[2.0] * count), "loss").axes[0].get_lines()
        assert each.get_marker() == mean.get_marker() == marker
