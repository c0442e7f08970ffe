"""The measures of the small world, on videos and sets whose truth is known."""

import pytest
import torch
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


def test_energy_distance_of_equal_sets_is_nothing(modules):
    points = torch.randn(20, 3, 4, generator=torch.Generator().manual_seed(0))
    assert modules[0].energy_distance(points, points) == pytest.approx((0, 0), abs=1e-12)


def test_energy_distance_is_without_bias_and_knows_its_error(modules):
    """Two sets of one distribution: around zero over many draws, as far as the standard error says."""
    generator = torch.Generator().manual_seed(0)
    shared = [torch.randn(60, 5, generator=generator) for _ in range(200)]
    found = torch.tensor(
        [
            modules[0].energy_distance(
                points + 0.3 * torch.randn(60, 5, generator=generator),
                points + 0.3 * torch.randn(60, 5, generator=generator),
            )
            for points in shared
        ]
    )
    values, errors = found.T
    assert values.mean().abs() < 3 * values.std() / len(values) ** 0.5
    assert 0.5 < errors.mean() / values.std() < 3


def test_energy_distance_of_shifted_points(modules):
    """On a line, points at 0 and at 1 are as far apart as can be: 2 E|a - b| = 2."""
    value, error = modules[0].energy_distance(torch.zeros(10, 1), torch.ones(10, 1))
    assert value == pytest.approx(2) and error == pytest.approx(0, abs=1e-6)


def test_energy_distance_far_from_the_origin(modules):
    """It is the same wherever the points are."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 30, 50, generator=generator, dtype=torch.float64)
    value, error = modules[0].energy_distance(a, b + 1)
    assert modules[0].energy_distance(a + 1000, b + 1001) == pytest.approx((value, error), rel=1e-6)
    assert value > 0.05
