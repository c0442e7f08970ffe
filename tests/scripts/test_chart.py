"""The chart of the small world's measures."""

import pytest
from environment import ROOT


@pytest.fixture(scope="module")
def chart():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "small_world"))
        import chart

        yield chart


def rows_of(picture, colour):
    """The rows where a colour is, left of the legend."""
    wanted = tuple(int(colour[place : place + 2], 16) for place in (1, 3, 5))
    pixels = picture.load()
    return [y for y in range(picture.height) for x in range(picture.width // 2) if pixels[x, y] == wanted]


@pytest.mark.parametrize("order", [("one expert", "two experts"), ("two experts", "one expert")])
def test_what_is_nearer_is_drawn_lower(order, chart):
    table = {f"base, {calls} steps": {"calls": calls, "error": (1 / calls, 0.001)} for calls in (6, 10, 25)}
    table |= {"base, 50 steps": {"calls": 50, "error": 0.0}} | {
        title: {"calls": 6, "error": (value, 0.001)} for title, value in zip(order, (0.08, 0.02), strict=True)
    }
    picture = chart.chart(table, "error")
    farther, nearer = (rows_of(picture, chart.EXPERTS[title]) for title in order)
    assert farther and nearer and max(farther) < min(nearer)
    assert chart.charts(table, ("error", "error")).size == (2 * picture.width, picture.height)
