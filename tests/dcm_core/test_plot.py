"""The schedule's picture says what the plan says."""

import pytest
import torch
from PIL import ImageColor

from dcm_core.errors import ScheduleError
from dcm_core.families import WAN
from dcm_core.plot import BACKGROUND, COLOURS, plot_schedule
from dcm_core.schedule import generic_sigmas


def pixels(image):
    """uint8, (height, width, 3)."""
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.height, image.width, 3)


def of_colour(image, colour):
    """Where a pixel has exactly this colour: bool, (height, width)."""
    return (pixels(image) == torch.tensor(ImageColor.getrgb(colour), dtype=torch.uint8)).all(-1)


def header_height(image):
    return min(image.size) // 10


def centre(image, colour):
    """Horizontal centre of a colour below the header, as a share of the width."""
    return of_colour(image, colour)[header_height(image) :].any(0).nonzero().float().mean().item() / image.width


def empty(image):
    """Where nothing is drawn: bool, (height, width); smoothing may ring a little."""
    background = torch.tensor(ImageColor.getrgb(BACKGROUND))
    return ((pixels(image).int() - background).abs() < 8).all(-1)


@pytest.mark.parametrize(("width", "height"), [(256, 144), (256, 512), (1024, 144), (768, 432), (640, 640)])
@pytest.mark.parametrize("steps", [1, 6, 50])
def test_nothing_is_cut_off(width, height, steps):
    image = plot_schedule(generic_sigmas(steps), 0.979, width, height)
    assert image.size == (width, height)
    assert image.mode == "RGB"
    inside = empty(image)[1:-1, 1:-1]
    assert empty(image).logical_not().sum() == inside.logical_not().sum()


@pytest.mark.parametrize(("width", "height"), [(768, 432), (640, 640), (512, 768)])
def test_the_words_of_the_header_do_not_touch(width, height):
    image = plot_schedule(generic_sigmas(50), 0.9, width, height)
    for colour in COLOURS.values():
        dot = of_colour(image, colour)[: header_height(image)].any(0).nonzero()[0].item()
        assert empty(image)[: header_height(image), dot - 12 : dot - 5].all()


def test_semantic_steps_lie_left_of_detail_steps():
    image = plot_schedule(WAN.preset.sigmas, WAN.preset.boundary)
    assert centre(image, COLOURS["semantic"]) < 0.5 < centre(image, COLOURS["detail"])


@pytest.mark.parametrize(("boundary", "only"), [(0.5, "semantic"), (0.9999, "detail")])
def test_a_side_without_steps_is_not_drawn(boundary, only):
    image = plot_schedule(torch.tensor([0.999, 0.9, 0.8, 0.7]), boundary)
    for side, colour in COLOURS.items():
        assert of_colour(image, colour)[header_height(image) :].any() == (side == only)


def test_moving_the_boundary_changes_the_picture():
    first, second = (plot_schedule(generic_sigmas(10), boundary).tobytes() for boundary in (0.5, 0.95))
    assert first != second


def test_refuses_what_has_no_plan():
    with pytest.raises(ScheduleError, match="have to fall"):
        plot_schedule(torch.tensor([0.1, 0.5]), 0.979)
    with pytest.raises(ScheduleError, match="boundary"):
        plot_schedule(WAN.preset.sigmas, 1.0)
