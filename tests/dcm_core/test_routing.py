"""Which expert owns a noise level, at the boundary to the last bit."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dcm_core.errors import ScheduleError
from dcm_core.families import FAMILIES, HUNYUAN_VIDEO, WAN
from dcm_core.routing import check_boundary, is_detail, plan_steps, split_sigmas

# the release's own rule: detail is active when int(t) <= this
LAST_DETAIL = {WAN: 978, HUNYUAN_VIDEO: 981}


def as_sigma(timestep):
    return torch.tensor(timestep, dtype=torch.float64).div(1000).float()


@pytest.mark.parametrize("family, timestep, detail", [
    (WAN, 979.0, False),
    (WAN, 978.99, True),
    (WAN, 978.0, True),
    (HUNYUAN_VIDEO, 982.0, False),
    (HUNYUAN_VIDEO, 981.99, True),
    (HUNYUAN_VIDEO, 981.0, True),
])
def test_sides_around_the_released_boundaries(family, timestep, detail):
    assert is_detail(as_sigma(timestep), family.preset.boundary).item() is detail


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_every_whole_timestep_falls_where_the_release_puts_it(family):
    timesteps = torch.arange(1001, dtype=torch.float64)
    expected = timesteps <= LAST_DETAIL[family]
    for sigmas in (timesteps / 1000, (timesteps / 1000).float(), timesteps.float() / 1000, timesteps.float() * 1e-3):
        assert torch.equal(is_detail(sigmas, family.preset.boundary), expected)


@pytest.mark.parametrize("boundary", [WAN.preset.boundary, HUNYUAN_VIDEO.preset.boundary, 0.875, 0.9])
def test_a_float_either_side_of_the_boundary_is_the_boundary(boundary):
    """The float32 of a boundary may lie below it; it still belongs to the semantic side."""
    at = np.float32(boundary)
    around = torch.tensor([np.nextafter(at, np.float32(1)), at, np.nextafter(at, np.float32(0))])
    assert not is_detail(around, boundary).any()
    assert is_detail(torch.tensor(boundary - 1e-5), boundary)


@pytest.mark.parametrize("family, semantic, detail, text", [
    (WAN, 3, 3, "step 1-3 semantic, 4-6 detail, boundary 0.979"),
    (HUNYUAN_VIDEO, 2, 2, "step 1-2 semantic, 3-4 detail, boundary 0.982"),
])
def test_plan_of_the_released_schedules(family, semantic, detail, text):
    plan = plan_steps(family.preset.sigmas, family.preset.boundary)
    assert (plan.semantic, plan.detail, plan.steps) == (semantic, detail, semantic + detail)
    assert str(plan) == text
    assert [plan.side(step) for step in range(plan.steps)] == ["semantic"] * semantic + ["detail"] * detail


@pytest.mark.parametrize("sigmas, text", [
    ([0.9, 0.0], "step 1 detail, boundary 0.979"),
    ([1.0, 0.99, 0.98], "step 1-2 semantic, boundary 0.979"),
    ([1.0, 0.5, 0.0], "step 1 semantic, 2 detail, boundary 0.979"),
])
def test_plan_names_single_steps_and_leaves_out_an_empty_side(sigmas, text):
    assert str(plan_steps(torch.tensor(sigmas), 0.979)) == text


falling = st.lists(st.floats(0, 1, width=32), min_size=2, max_size=30, unique=True).map(lambda v: sorted(v, reverse=True))


@given(falling, st.floats(0.001, 0.999))
def test_every_step_has_one_owner_and_the_sides_do_not_mix(values, boundary):
    sigmas = torch.tensor(values)
    plan = plan_steps(sigmas, boundary)
    owners = is_detail(sigmas[:-1], boundary).tolist()
    assert [plan.side(step) == "detail" for step in range(plan.steps)] == owners
    assert owners == sorted(owners)


@given(falling, st.floats(0.001, 0.999))
def test_split_is_one_trajectory_in_two_stretches(values, boundary):
    sigmas = torch.tensor(values)
    plan = plan_steps(sigmas, boundary)
    if not (plan.semantic and plan.detail):
        with pytest.raises(ScheduleError, match="side is empty"):
            split_sigmas(sigmas, boundary)
        return
    high, low = split_sigmas(sigmas, boundary)
    assert high[-1] == low[0]
    assert torch.equal(torch.cat([high, low[1:]]), sigmas)
    assert not is_detail(high[:-1], boundary).any() and is_detail(low[:-1], boundary).all()


@pytest.mark.parametrize("sigmas, side", [([0.9, 0.5, 0.0], "semantic"), ([1.0, 0.99, 0.0], "detail")])
def test_split_names_the_empty_side(sigmas, side):
    with pytest.raises(ScheduleError, match=rf"The {side} .*0\.979"):
        split_sigmas(torch.tensor(sigmas), 0.979)


@pytest.mark.parametrize("boundary", [0, 1, -0.1, 1.5, 979, math.nan, math.inf])
def test_boundary_outside_the_open_interval_is_refused(boundary):
    for refused in (lambda: check_boundary(boundary), lambda: plan_steps(WAN.preset.sigmas, boundary)):
        with pytest.raises(ScheduleError, match=r"boundary is .* between 0 and 1"):
            refused()


def test_plan_refuses_what_cannot_be_sampled():
    with pytest.raises(ScheduleError, match="have to fall"):
        plan_steps(torch.tensor([0.5, 0.9, 0.0]), 0.979)
