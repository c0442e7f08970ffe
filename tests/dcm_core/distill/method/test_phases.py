"""Noise levels and phases; the boundary is the one that sampling uses."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dcm_core.distill.config import TrainingConfig
from dcm_core.distill.method.phases import Phases
from dcm_core.errors import ScheduleError
from dcm_core.families import HUNYUAN_VIDEO, WAN
from dcm_core.routing import is_detail


def test_the_release_s_levels():
    semantic = Phases("semantic", 0.9765)
    assert semantic.sigmas[-1] == 1 and len(semantic.sigmas) == 50
    assert float(semantic.previous[0]) == pytest.approx(0.0167323, rel=1e-5)
    assert torch.equal(semantic.previous[1:], semantic.sigmas[:-1])
    assert semantic.owned.tolist() == list(range(35, 50))
    assert set(semantic.ends(semantic.owned).tolist()) == {float(semantic.sigmas[34])}
    detail = Phases("detail", 0.9765)
    assert detail.owned.tolist() == list(range(35))
    assert set(detail.ends(detail.owned).tolist()) == {float(detail.previous[0])}


@given(st.floats(0.05, 0.99), st.floats(1, 20), st.integers(10, 100), st.integers(1, 4))
def test_every_point_has_one_owner_and_phases_follow_each_other(boundary, shift, points, count):
    try:
        sides = [Phases(side, boundary, shift, points, count) for side in ("semantic", "detail")]
    except ScheduleError:
        return
    owned = torch.cat([phases.owned for phases in sides])
    assert sorted(owned.tolist()) == list(range(points))
    for phases in sides:
        assert (is_detail(phases.sigmas[phases.owned], boundary) == (phases.side == "detail")).all()
        ends = phases.ends(phases.owned)
        assert len(set(ends.tolist())) == count
        assert (ends <= phases.previous[phases.owned]).all() and (ends < phases.sigmas[phases.owned]).all()
        index = phases.draw(20, torch.Generator().manual_seed(0))
        assert set(index.tolist()) <= set(phases.owned.tolist())
        level = phases.draw_above_phase(index, torch.Generator().manual_seed(0))
        assert (phases.previous[level] >= phases.ends(index)).all() and set(level.tolist()) <= set(
            phases.owned.tolist()
        )


@pytest.mark.parametrize(
    ("family", "counts"), [(WAN, {"semantic": 3, "detail": 3}), (HUNYUAN_VIDEO, {"semantic": 2, "detail": 2})]
)
def test_as_many_phases_as_steps_end_where_the_steps_end(family, counts):
    """At the point nearest to each, and at the end of the side."""
    steps = [timestep / 1000 for timestep in family.preset.timesteps]
    for side, count in counts.items():
        phases = TrainingConfig(side, phases=count).for_family(family).make_phases(family)
        own = [step for step in steps if is_detail(torch.tensor(step), phases.boundary) == (side == "detail")]
        for step, following in pairwise(own):
            point = phases.owned[(phases.sigmas[phases.owned] - step).abs().argmin()]
            nearest = phases.sigmas[(phases.sigmas - following).abs().argmin()]
            assert float(phases.ends(point[None])) == float(nearest) == pytest.approx(following, abs=0.005)
        assert float(phases.ends(phases.owned[:1])) == float(phases.previous[phases.owned[0]])
        evenly = TrainingConfig(side, phases=count + 1).for_family(family).make_phases(family)
        assert [int(n) for n in evenly.starts.unique(return_counts=True)[1]] == [
            len(part) for part in evenly.owned.tensor_split(count + 1)
        ]


@pytest.mark.parametrize("shared", [False, True])
def test_a_share_of_the_points_is_where_phases_are_entered(shared):
    """Each phase's noisiest as often as the others'; without a share the draws are as they were."""
    count, share = 60_000, 0.6
    phases = Phases("semantic", 0.9, count=3, shared=shared, entry_share=share)
    plain = Phases("semantic", 0.9, count=3, shared=shared)
    parts = phases.owned.split(phases.starts.unique(return_counts=True)[1].tolist())
    entries = [int(part[-1]) for part in parts]
    assert phases.entries.tolist() == entries and len(entries) == (6 if shared else 3)
    drawn = phases.draw(count, torch.Generator().manual_seed(0))
    found = torch.bincount(drawn, minlength=50) / count
    expected = torch.zeros(50)
    expected[phases.owned] = (1 - share) / len(phases.owned)
    expected[entries] += share / len(entries)
    torch.testing.assert_close(found, expected, atol=0.005, rtol=0)
    draws = [torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)]
    uniform = plain.owned[torch.randint(len(plain.owned), (100,), generator=draws[1])]
    assert torch.equal(plain.draw(100, draws[0]), uniform)
    assert torch.equal(*(generator.get_state() for generator in draws))


def test_every_level_from_the_phase_s_end_to_the_top_is_drawn():
    phases = Phases("detail", 0.9765, count=5)
    for point in (0, 10, 34):
        index = torch.full((2000,), point)
        drawn = phases.draw_above_phase(index, torch.Generator().manual_seed(0))
        first = int(phases.starts[point - int(phases.owned[0])])
        assert drawn.unique().tolist() == list(range(first, int(phases.owned[-1]) + 1))


def test_a_batch_has_the_end_of_each_element():
    phases = Phases("detail", 0.9765, count=5)
    index = torch.tensor([0, 6, 7, 34])
    assert phases.ends(index).tolist() == [float(phases.previous[start]) for start in (0, 0, 7, 28)]


def test_one_expert_for_all_levels_has_the_phases_of_both():
    shared = Phases("semantic", 0.9, count=3, shared=True)
    assert shared.owned.tolist() == list(range(50))
    for side in ("semantic", "detail"):
        own = Phases(side, 0.9, count=3)
        assert torch.equal(shared.ends(own.owned), own.ends(own.owned))
    with pytest.raises(ScheduleError, match="leaves the detail expert no noise level"):
        Phases("semantic", 0.1, shared=True)


@pytest.mark.parametrize("boundary", [0.0, 1.0, 1.5, float("nan")])
def test_a_boundary_that_sampling_refuses_is_refused(boundary):
    with pytest.raises(ScheduleError, match=rf"boundary is {boundary}, .* expected more than 0 and less than 1"):
        Phases("detail", boundary)


def test_a_side_without_points_is_refused():
    with pytest.raises(ScheduleError, match=r"leaves the detail expert no noise level.*Move the boundary"):
        Phases("detail", 0.1)
    with pytest.raises(ScheduleError, match="phases is 99"):
        Phases("semantic", 0.9, count=99)
