"""A picture says what its numbers say."""

import pytest
import torch
from PIL import ImageColor

from dcm_core.errors import ScheduleError
from dcm_core.families import WAN
from dcm_core.inspection.magnitude import Profile
from dcm_core.inspection.plot import BACKGROUND, COLOURS, NEUTRAL, Canvas, plot_profile, plot_schedule
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
        end = of_colour(image, colour)[: header_height(image)].any(0).nonzero()[-1].item()
        assert empty(image)[: header_height(image), end + 5 : end + 8].all(), "between a dot and its words"


def test_words_have_the_size_of_their_font():
    heights = []
    for units in (4, 8):
        for small in (False, True):
            canvas = Canvas(400, 400, (5, 5, 5, 5), text=units)
            canvas.text(canvas.at(0.5, 0.5), "H", "mm", canvas.small if small else None)
            heights.append(empty(canvas.finished()).logical_not().any(1).sum().item())
    # a capital letter takes seven tenths of its font's size, smoothing a row or so more
    assert heights == pytest.approx([0.7 * size + 2 for size in (16, 0.81 * 16, 32, 0.81 * 32)], abs=2)


def test_semantic_steps_lie_left_of_detail_steps():
    image = plot_schedule(WAN.preset.sigmas, WAN.preset.boundary)
    assert centre(image, COLOURS["semantic"]) < 0.5 < centre(image, COLOURS["detail"])


@pytest.mark.parametrize(("boundary", "only"), [(0.5, "semantic"), (0.9999, "detail")])
def test_a_side_without_steps_is_not_drawn(boundary, only):
    image = plot_schedule(torch.tensor([0.999, 0.9, 0.8, 0.7]), boundary)
    for side, colour in COLOURS.items():
        assert of_colour(image, colour)[header_height(image) :].any() == (side == only)


@pytest.mark.parametrize(
    ("owners", "seen"),
    [
        (("base", "base"), []),
        (("semantic", "semantic"), ["semantic"]),
        (("semantic", "base"), ["semantic"]),
        (("base", "detail"), ["detail"]),
    ],
)
def test_no_expert_is_drawn_that_does_not_run(owners, seen):
    image = plot_schedule(WAN.preset.sigmas, 0.979 if owners[0] != owners[1] else None, owners=owners)
    assert [side for side, colour in COLOURS.items() if of_colour(image, colour).any()] == seen
    assert of_colour(image, NEUTRAL).any() == ("base" in owners)


def test_without_a_boundary_no_line_is_drawn():
    """And nothing else differs: the line and its words are a few rows."""
    with_line, without = (
        plot_schedule(torch.tensor([0.4, 0.3, 0.0]), boundary, owners=("base", "base")) for boundary in (0.8, None)
    )
    rows = (pixels(with_line) != pixels(without)).any(-1).any(1).nonzero()
    assert 5 < rows.max() - rows.min() < with_line.height / 10


def test_moving_the_boundary_changes_the_picture():
    first, second = (plot_schedule(generic_sigmas(10), boundary).tobytes() for boundary in (0.5, 0.95))
    assert first != second


def test_refuses_what_has_no_plan():
    with pytest.raises(ScheduleError, match="expected values that fall"):
        plot_schedule(torch.tensor([0.1, 0.5]), 0.979)
    with pytest.raises(ScheduleError, match="boundary"):
        plot_schedule(WAN.preset.sigmas, 1.0)


GROUPS = {"in": 1, "blocks": 4, "out": 1}
DEEP = {"in": 1, "double_blocks": 20, "single_blocks": 40, "out": 1}


def profile_of(experts, groups=GROUPS, relative=True, unmeasured=()):
    return Profile(groups, experts, relative, {str(column): column for column in unmeasured}, ())


def bar(image, colour):
    """Left, right and height of what has this colour below the header, in pixels."""
    found = of_colour(image, colour)[image.height // 5 :]
    across = found.any(0).nonzero()
    return across.min().item(), across.max().item(), found.any(1).sum().item()


@pytest.mark.parametrize(("width", "height"), [(768, 432), (640, 360), (480, 216)])
@pytest.mark.parametrize("title", ["a.safetensors", "long " * 100])
@pytest.mark.parametrize("relative", [True, False])
def test_nothing_of_a_profile_is_cut_off(width, height, title, relative):
    sizes = {(group, index): 0.013 * (1 + index % 7) for group, count in DEEP.items() for index in range(count)}
    profile = profile_of({"semantic": sizes, "detail": sizes}, DEEP, relative, [("in", 0)])
    image = plot_profile(profile, title, width, height)
    assert (image.size, image.mode) == ((width, height), "RGB")
    inside = empty(image)[1:-1, 1:-1]
    assert empty(image).logical_not().sum() == inside.logical_not().sum()


def test_bars_are_as_high_as_the_changes():
    heights = [
        bar(
            plot_profile(profile_of({"semantic": {("blocks", 0): 0.04}, "detail": {("blocks", 1): size}}), "x"),
            COLOURS["detail"],
        )[2]
        for size in (0.01, 0.02, 0.04)
    ]
    assert heights[2] > 200
    assert heights == pytest.approx([heights[2] / 4, heights[2] / 2, heights[2]], abs=6), "but for smoothed edges"


def test_blocks_lie_from_left_to_right_between_embedders_and_head():
    lefts = []
    for column in [("in", 0), ("blocks", 0), ("blocks", 3), ("out", 0)]:
        left, right, _ = bar(plot_profile(profile_of({"detail": {column: 1.0}}), "x"), COLOURS["detail"])
        assert not lefts or left > lefts[-1]
        lefts.append(right)


def test_experts_stand_beside_each_other_in_their_colours():
    image = plot_profile(profile_of({"semantic": {("blocks", 1): 0.1}, "detail": {("blocks", 1): 0.1}}), "x")
    semantic, detail = (bar(image, COLOURS[side]) for side in ("semantic", "detail"))
    assert semantic[1] < detail[0] <= semantic[1] + 8
    assert semantic[2] == detail[2]


def test_what_is_unknown_is_marked():
    sizes = {"detail": {("blocks", 1): 2.0}}
    plain, marked = (
        plot_profile(profile_of(sizes, relative=False, unmeasured=columns), "x") for columns in ((), [("in", 0)])
    )
    differs = (pixels(plain).int() - pixels(marked)).abs().amax(-1)[100:] > 8
    assert differs.any() and differs.any(0).nonzero().max() < plain.width / 3, (
        "a mark where the embedders' bar would be"
    )


def test_without_an_expert_no_bar_is_drawn():
    for profile in (None, profile_of({}), profile_of({"detail": {}}), profile_of({"detail": {("blocks", 0): 0.0}})):
        image = plot_profile(profile, "x")
        assert not any(of_colour(image, colour).any() for colour in COLOURS.values())
        assert not empty(image).all()
