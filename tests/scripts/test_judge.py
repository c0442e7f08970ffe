"""The measures of the small world, on videos whose truth is known."""

import pytest
from environment import ROOT


@pytest.fixture(scope="module")
def modules():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "small_world"))
        import judge
        import world

        yield judge, world


def test_drawn_clips_show_what_their_caption_names(modules):
    judge, world = modules
    scenes = world.clips(len(world.NAMES), seed=1)
    for scene in scenes:
        seen = judge.look(world.render(scene))
        assert seen.matches((scene.colour, scene.shape, scene.motion)) == (True, True, True), scene.caption
        assert judge.path_distance(seen.path, scene.path()) < 1, scene.caption
        assert judge.unevenness(seen.path) < 0.5, scene.caption


def test_the_ground_of_a_drawn_clip_stands_still(modules):
    judge, world = modules
    assert judge.flicker(world.render(world.clips(1, seed=2)[0])) < 1e-6
