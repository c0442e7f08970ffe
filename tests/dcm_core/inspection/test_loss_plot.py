"""A loss plot says what its numbers say: labels that are whole and different, curves where the values lie."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ImageColor

from dcm_core.inspection.loss_plot import EACH, MEAN, plot_losses, scale_of
from dcm_core.inspection.plot import Canvas

from .test_plot import empty, header_height, pixels


def losses(*values, term="loss", first=1):
    """A history of one term."""
    return [{"step": step, term: value} for step, value in enumerate(values, first)]


@pytest.fixture
def words(monkeypatch):
    """The texts that were drawn since the test began."""
    drawn, text = [], Canvas.text

    def kept(self, place, words, *args):
        drawn.append(words)
        text(self, place, words, *args)

    monkeypatch.setattr(Canvas, "text", kept)
    return drawn


def near(image, colour):
    """Where a pixel below the header is about of this colour, smoothed or not: bool, (height, width)."""
    found = (pixels(image).int() - torch.tensor(ImageColor.getrgb(colour))).abs().amax(-1) < 40
    found[: 2 * header_height(image)] = False
    return found


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


def cut_off(image):
    """Is anything drawn up to the image's border?"""
    inside = empty(image)[1:-1, 1:-1]
    return empty(image).logical_not().sum() != inside.logical_not().sum()


@pytest.mark.parametrize(("width", "height"), [(768, 432), (400, 225)])
@pytest.mark.parametrize("name", HISTORIES)
def test_nothing_is_cut_off(width, height, name):
    image = plot_losses(losses(*HISTORIES[name], first=10**6), "loss", width, height)
    assert (image.size, image.mode) == ((width, height), "RGB")
    assert not cut_off(image)


@settings(max_examples=60, deadline=2000)
@given(st.lists(st.floats(), max_size=30), st.integers(1, 10**7))
def test_any_history_can_be_drawn(values, first):
    assert not cut_off(plot_losses(losses(*values, first=first), "loss", 384, 216))


@given(st.floats(-1e300, 1e300), st.floats(-1e300, 1e300))
def test_the_labels_of_a_scale_are_its_marks(one, other):
    low, high = sorted(0.0 if abs(value) < 1e-300 else value for value in (one, other))
    scale = scale_of(low, high)
    assert 2 <= len(scale.marks) <= 12 and list(scale.marks) == sorted(set(scale.marks))
    assert len(set(scale.labels)) == len(scale.labels)
    apart = min(later - earlier for earlier, later in zip(scale.marks, scale.marks[1:], strict=False))
    for label, mark in zip(scale.labels, scale.marks, strict=True):
        assert float(label) == pytest.approx(mark, rel=1e-6 if scale.log else 0, abs=0 if scale.log else 0.01 * apart)
    for value, at_least, at_most in ((low, 0, 0.5), (high, 0.5, 1)):
        assert at_least <= scale.share(value) <= at_most or low == high


def test_labels_are_plain_numbers():
    assert scale_of(3.1e-06, 8.63e-06).labels == ("2e-06", "4e-06", "6e-06", "8e-06", "1e-05")
    assert scale_of(0.0, 1.0).labels == ("0", "0.5", "1")
    assert scale_of(1000.0, 5000.0).labels == ("1000", "2000", "3000", "4000", "5000")
    assert scale_of(0.02, 0.9).labels == ("0.02", "0.05", "0.1", "0.2", "0.5", "1")
    assert scale_of(2e-05, 0.5).labels == ("1e-05", "0.0001", "0.001", "0.01", "0.1", "1")
    assert scale_of(1e-20, 1.0).labels == ("1e-20", "1e-16", "1e-12", "1e-08", "0.0001", "1")


def test_axes_and_newest_values_are_named(words):
    plot_losses(losses(2.0, 1.0, 8.63e-06, term="feature_matching", first=100), "feature_matching")
    assert {"step", "feature matching (log scale)", "each step, last 8.63e-06", "running mean, last 1"} <= set(words)
    assert {"100", "101", "102", "1e-06", "1"} <= set(words)
    words.clear()
    plot_losses(losses(2.0, 1.0), "loss")
    assert "loss" in words and "(log scale)" not in " ".join(words)


def test_steps_without_a_number_are_counted_and_a_gap(words):
    image = plot_losses(losses(1.0, 1.1, 1.3, math.nan, 1.3, 1.1, 1.0), "loss")
    assert "1 step NaN or infinite" in words
    # the mean's line goes from one end of the axis to the other
    along = near(image, MEAN).any(0).nonzero().flatten()
    middle, each = (along[0] + along[-1]) // 2, near(image, EACH)[: level_rows(image)[-1]].any(0)
    assert (
        not each[middle - 30 : middle + 30].any()
        and each[along[0] : middle - 130].any()
        and each[middle + 130 : along[-1]].any()
    )
    plot_losses(losses(1.0, math.nan, math.inf), "loss")
    assert "2 steps NaN or infinite" in words
    plot_losses(losses(math.nan), "loss")
    assert "every value is NaN or infinite" in words


def level_rows(image):
    """The rows of the levels, the highest first."""
    rows = (~empty(image))[:, image.width // 2 : -image.width // 10].float().mean(1) > 0.9
    found = rows.nonzero().flatten().tolist()
    return [row for row in found if row - 1 not in found]


def height_of_mean(image, across):
    """Row of the running mean at a share of its way."""
    curve = near(image, MEAN)
    columns = curve.any(0).nonzero().flatten()
    return curve[:, columns[round(across * (len(columns) - 1))]].nonzero().float().mean().item()


@pytest.mark.parametrize(("width", "height"), [(768, 432), (640, 640)])
def test_the_mean_of_a_loss_lies_where_its_values_say(width, height):
    image = plot_losses(losses(0.0, 1.0), "loss", width, height)
    highest, middle, lowest = level_rows(image)
    assert highest + lowest == pytest.approx(2 * middle, abs=2)
    # the mean goes from 0 to 1 / 2
    for across in (0.1, 0.5, 0.9):
        assert height_of_mean(image, across) == pytest.approx(lowest + across * (middle - lowest), abs=6)


def test_on_a_log_scale_equal_ratios_are_equal_lengths():
    image = plot_losses(losses(1e-2, 1e-6), "loss")
    rows = level_rows(image)
    # the mean of both is 5e-3: 0.3 of a power of ten below the top of four
    assert height_of_mean(image, 1.0) == pytest.approx(rows[0] + 0.075 * (rows[-1] - rows[0]), abs=6)


def test_one_wild_step_does_not_flatten_the_rest(words):
    image = plot_losses(losses(*[0.0, 1.0] * 50, 1000.0), "loss")
    highest, middle, _ = level_rows(image)
    assert height_of_mean(image, 0.5) == pytest.approx(middle, abs=8)
    assert empty(image)[2 * header_height(image) : highest - 3, image.width // 2 :].all(), (
        "cut off at the highest level"
    )
    assert "1 step off the scale" in words


def test_the_first_steps_of_a_loss_that_falls_are_on_the_scale(words):
    plot_losses(losses(*[math.exp(-step / 100) for step in range(300)]), "loss")
    assert not any("off the scale" in text for text in words)


def test_a_loss_s_picture_is_of_its_own_values():
    history = losses(3.0, 1.0, 2.0)
    more = [{**entry, "other": 9.0} for entry in history] + [{"step": 4, "other": 1.0}]
    image = plot_losses(history, "loss")
    assert plot_losses(more, "loss").tobytes() == image.tobytes() != plot_losses(more, "other").tobytes()


def test_a_single_step_is_a_point_and_none_an_empty_picture(words):
    for values in ([2.0], []):
        words.clear()
        image = plot_losses(losses(*values), "loss")
        assert near(image, MEAN).any() == bool(values)
        assert ("no values yet" in words) == (not values)
        assert not level_rows(image) or values
