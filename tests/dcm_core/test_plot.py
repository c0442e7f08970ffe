"""The schedule's picture says what the plan says."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import ImageColor

from dcm_core.errors import ScheduleError
from dcm_core.families import WAN
from dcm_core.plot import BACKGROUND, COLOURS, plot_schedule
from dcm_core.schedule import generic_sigmas


def count(image, colour, box=None):
    """Pixels of exactly this colour."""
    wanted = ImageColor.getrgb(colour)
    return sum(n for n, seen in (image.crop(box) if box else image).getcolors(1 << 24) if seen == wanted)


def columns(image, colour):
    """Horizontal centre of a colour below the legend, as a share of the width."""
    wanted = torch.tensor(ImageColor.getrgb(colour), dtype=torch.uint8)
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.height, image.width, 3)
    body = (pixels == wanted).all(-1)[image.height // 9:]
    return body.any(0).nonzero().float().mean().item() / image.width


@given(st.integers(256, 700), st.integers(144, 500), st.integers(1, 50))
def test_any_size_and_number_of_steps(width, height, steps):
    image = plot_schedule(generic_sigmas(steps), 0.979, width, height)
    assert image.size == (width, height) and image.mode == "RGB"
    assert 0.3 < count(image, BACKGROUND) / (width * height) < 0.99


def test_semantic_steps_lie_left_of_detail_steps():
    image = plot_schedule(WAN.preset.sigmas, WAN.preset.boundary)
    assert columns(image, COLOURS["semantic"]) < 0.5 < columns(image, COLOURS["detail"])


@pytest.mark.parametrize("boundary, only", [(0.5, "semantic"), (0.9999, "detail")])
def test_a_side_without_steps_shows_only_in_the_legend(boundary, only):
    image = plot_schedule(torch.tensor([0.999, 0.9, 0.8, 0.7]), boundary)
    body = (0, image.height // 9, image.width, image.height)
    other = next(side for side in COLOURS if side != only)
    assert count(image, COLOURS[only], body) > 100
    assert count(image, COLOURS[other], body) == 0


def test_moving_the_boundary_changes_the_picture():
    first, second = (plot_schedule(generic_sigmas(10), boundary).tobytes() for boundary in (0.5, 0.95))
    assert first != second


def test_refuses_what_has_no_plan():
    with pytest.raises(ScheduleError, match="have to fall"):
        plot_schedule(torch.tensor([0.1, 0.5]), 0.979)
    with pytest.raises(ScheduleError, match="boundary"):
        plot_schedule(WAN.preset.sigmas, 1.0)
