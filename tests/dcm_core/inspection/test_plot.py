"""What a plot of a schedule or of experts shows: data, words and colours of its axes, and that nothing of it is cut off."""

import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from PIL import ImageColor

from dcm_core.errors import DCMError
from dcm_core.families import WAN
from dcm_core.inspection.magnitude import Profile
from dcm_core.inspection.plot import (
    THEMES,
    plot_profile,
    plot_schedule,
    profile_figure,
    schedule_figure,
)
from dcm_core.routing import Plan, plan_steps
from dcm_core.schedule import generic_sigmas

ROOT = Path(__file__).parents[3]
DARK = THEMES["dark"]


def words(figure):
    """Every text of the figure that says something."""
    from matplotlib.text import Text

    return {text.get_text() for text in figure.findobj(Text) if text.get_text()}


def legend(figure):
    """Label -> colour of what it names."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    return {label: colour_of(handle) for handle, label in zip(handles, labels, strict=True)}


def colour_of(artist):
    from matplotlib.colors import to_hex

    return to_hex(artist[0].get_facecolor() if hasattr(artist, "patches") else artist.get_color())


def cut_off(image, background):
    """Is anything drawn at the image's border?"""
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.height, image.width, 3).int()
    drawn = (pixels - torch.tensor(ImageColor.getrgb(background))).abs().amax(-1) >= 8
    return bool(torch.cat([drawn[0], drawn[-1], drawn[:, 0], drawn[:, -1]]).any())


def contrast(first, second):
    """As the WCAG define it."""

    def luminance(colour):
        parts = [part / 255 for part in ImageColor.getrgb(colour)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    bright, dark = sorted((luminance(first), luminance(second)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


RELEASED = plan_steps(WAN.preset.sigmas, WAN.preset.boundary)


@pytest.mark.parametrize("theme", THEMES)
def test_colours_are_seen_on_their_background(theme):
    """Lines of 3:1, words of 4.5:1."""
    theme = THEMES[theme]
    assert contrast(theme.text, theme.background) >= 4.5
    for colour in (*theme.experts.values(), theme.neutral, *theme.others):
        assert contrast(colour, theme.background) >= 3


def test_drawing_is_loaded_when_something_is_drawn():
    code = "import sys, dcm_core.inspection.plot, dcm_core.inspection.loss_plot; print('matplotlib' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "False"


def test_no_window_is_opened():
    """pyplot would keep every figure, and ask for a screen."""
    plot_schedule(WAN.preset.sigmas, RELEASED)
    assert "matplotlib.pyplot" not in sys.modules


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize(("width", "height"), [(256, 144), (256, 512), (1024, 144), (768, 432), (4096, 2160)])
@pytest.mark.parametrize("steps", [1, 6, 50])
def test_nothing_is_cut_off(width, height, steps, theme):
    sigmas = generic_sigmas(steps)
    image = plot_schedule(sigmas, plan_steps(sigmas, 0.979), width, height, theme=theme)
    assert (image.size, image.mode) == ((width, height), "RGB")
    assert not cut_off(image, THEMES[theme].background)


@pytest.mark.parametrize("theme", THEMES)
def test_a_schedule_s_lines_are_its_noise_levels_in_the_colours_of_their_owners(theme):
    sigmas = WAN.preset.sigmas
    figure = schedule_figure(sigmas, RELEASED, theme=theme)
    (axes,) = figure.axes
    semantic, detail, boundary = axes.get_lines()
    # each side ends where the next begins
    assert semantic.get_xydata().tolist() == [[step, pytest.approx(sigmas[step].item())] for step in range(4)]
    assert detail.get_xydata().tolist() == [[step, pytest.approx(sigmas[step].item())] for step in range(3, 7)]
    assert set(boundary.get_ydata()) == {WAN.preset.boundary}
    colours = THEMES[theme]
    assert legend(figure) == {
        "step 1-3 semantic": colours.experts["semantic"],
        "4-6 detail": colours.experts["detail"],
        f"boundary {WAN.preset.boundary:g}": colours.text,
    }
    assert {"Noise schedule", "steps done", "noise level σ"} <= words(figure)
    assert axes.get_ylim()[0] <= 0 and axes.get_ylim()[1] >= 1


@pytest.mark.parametrize("steps", [1, 2, 6, 50])
def test_steps_are_counted_in_whole_numbers(steps):
    sigmas = generic_sigmas(steps)
    figure = schedule_figure(sigmas, plan_steps(sigmas, 0.9))
    (axes,) = figure.axes
    low, high = axes.get_xlim()
    assert all(tick == round(tick) for tick in axes.get_xticks() if low <= tick <= high)


@pytest.mark.parametrize(
    ("boundary", "owners", "seen"),
    [
        (0.5, ("semantic", "detail"), {"step 1-3 semantic"}),
        (0.9999, ("semantic", "detail"), {"step 1-3 detail"}),
        (None, ("base", "base"), {"step 1-3 base"}),
        (0.85, ("semantic", "base"), {"step 1-2 semantic", "3 base"}),
        (0.85, ("base", "detail"), {"step 1-2 base", "3 detail"}),
    ],
)
def test_only_what_runs_is_drawn(boundary, owners, seen):
    sigmas = torch.tensor([0.999, 0.9, 0.8, 0.0])
    figure = schedule_figure(sigmas, plan_steps(sigmas, boundary, owners))
    shown = legend(figure)
    if boundary is not None:
        assert shown.pop(f"boundary {boundary:g}") == DARK.text
    assert set(shown) == seen
    for label, colour in shown.items():
        assert colour == DARK.experts.get(label.split()[-1], DARK.neutral)


def test_an_unknown_theme_is_refused():
    with pytest.raises(DCMError, match="theme is 'pink'; choose one of dark, light"):
        plot_schedule(WAN.preset.sigmas, RELEASED, theme="pink")


@pytest.mark.parametrize("theme", THEMES)
def test_rows_of_a_table_have_colours_of_their_own(theme):
    names = ["high", "base", "mid", "detail", "mid + style", "low"]
    sigmas = torch.linspace(1, 0, len(names) + 1)
    figure = schedule_figure(sigmas, Plan(tuple((name, 1) for name in names)), theme=theme)
    shown = {label.partition(" ")[2].removeprefix("1 "): colour for label, colour in legend(figure).items()}
    assert len(set(shown.values())) == len(names) == len(shown)
    colours = THEMES[theme]
    assert shown["detail"] == colours.experts["detail"] and shown["base"] == colours.neutral
    assert [shown[name] for name in ("high", "mid", "mid + style", "low")] == list(colours.others[:4])


GROUPS = {"in": 1, "blocks": 4, "out": 1}
DEEP = {"in": 1, "double_blocks": 20, "single_blocks": 40, "out": 1}


def profile_of(experts, groups=GROUPS, relative=True, unmeasured=()):
    return Profile(groups, experts, relative, {str(column): column for column in unmeasured}, ())


@pytest.mark.parametrize(("width", "height"), [(768, 432), (640, 360), (480, 216)])
@pytest.mark.parametrize("title", ["a.safetensors", "long " * 100, "$x_1$ costs $5"])
@pytest.mark.parametrize("relative", [True, False])
def test_nothing_of_a_profile_is_cut_off(width, height, title, relative):
    sizes = {(group, index): 0.013 * (1 + index % 7) for group, count in DEEP.items() for index in range(count)}
    profile = profile_of({"semantic": sizes, "detail": sizes}, DEEP, relative, [("in", 0)])
    image = plot_profile(profile, title, width, height)
    assert (image.size, image.mode) == ((width, height), "RGB")
    assert not cut_off(image, DARK.background)


def bars(figure):
    """Expert -> [(left, right, height), ...]."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    return {
        label: [(bar.get_x(), bar.get_x() + bar.get_width(), bar.get_height()) for bar in handle]
        for handle, label in zip(handles, labels, strict=True)
    }


def test_bars_are_the_changes_from_embedders_to_head():
    sizes = {("in", 0): 0.04, ("blocks", 0): 0.01, ("blocks", 3): 0.02, ("out", 0): 0.03}
    (found,) = bars(profile_figure(profile_of({"detail": sizes}), "x")).values()
    assert [height for _, _, height in found] == list(sizes.values())
    assert all(left < right < after for (left, right, _), (after, _, _) in pairwise(found))
    # the embedders and the head stand apart, the blocks one beside the other
    centres = [(left + right) / 2 for left, right, _ in found]
    assert centres == pytest.approx([0, 2, 5, 7])


@pytest.mark.parametrize("theme", THEMES)
def test_experts_stand_beside_each_other_in_their_colours(theme):
    sizes = {("blocks", 1): 0.1}
    figure = profile_figure(profile_of({"semantic": sizes, "detail": sizes}), "a file", theme=theme)
    assert legend(figure) == dict(THEMES[theme].experts)
    ((_, end, _),), ((start, _, _),) = bars(figure).values()
    assert end == pytest.approx(start)
    assert {"a file", "block", "size of the change /\nsize of the weights", "in", "out", "0\nblock"} <= words(figure)


def test_sizes_are_shares_or_norms():
    sizes = {"detail": {("blocks", 1): 0.1}}
    relative, absolute = (profile_figure(profile_of(sizes, relative=relative), "x") for relative in (True, False))
    for figure in (relative, absolute):
        figure.canvas.draw()
    assert "10%" in words(relative)
    assert not any(word.endswith("%") for word in words(absolute))
    assert "size of the change\n(Frobenius norm)" in words(absolute)


def test_what_is_unknown_is_marked():
    figure = profile_figure(profile_of({"detail": {("blocks", 1): 2.0}}, unmeasured=[("in", 0)]), "x")
    (mark,) = (text for text in figure.axes[0].texts if text.get_text() == "?")
    assert mark.xy == (0, 0)
    assert "? needs the base" in words(figure)


@pytest.mark.parametrize(
    ("profile", "says"),
    [
        (None, "no expert"),
        (profile_of({}), "no change to show"),
        (profile_of({"detail": {}}), "no change to show"),
        (profile_of({"detail": {("blocks", 0): 0.0}}), "no change to show"),
    ],
)
def test_without_an_expert_no_bar_is_drawn(profile, says):
    figure = profile_figure(profile, "x")
    assert says in words(figure) and bars(figure) == {}
    assert plot_profile(profile, "x").size == (768, 432)
