"""Which expert owns a noise level, at the boundary to the last bit."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dcm_core.errors import ExpertError, ScheduleError
from dcm_core.families import FAMILIES, HUNYUAN_VIDEO, PRESETS, WAN
from dcm_core.routing import (
    SIDES,
    Setup,
    check_boundary,
    is_detail,
    own_boundary,
    own_timesteps,
    parse_boundaries,
    plan_steps,
    split_sigmas,
)

# the release's own rule: detail is active when int(t) <= this
LAST_DETAIL = {WAN: 978, HUNYUAN_VIDEO: 981}


def as_sigma(timestep):
    return torch.tensor(timestep, dtype=torch.float64).div(1000).float()


@pytest.mark.parametrize(
    "family, timestep, detail",
    [
        (WAN, 979.0, False),
        (WAN, 978.99, True),
        (WAN, 978.0, True),
        (HUNYUAN_VIDEO, 982.0, False),
        (HUNYUAN_VIDEO, 981.99, True),
        (HUNYUAN_VIDEO, 981.0, True),
    ],
)
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


@pytest.mark.parametrize(
    "family, semantic, detail, text",
    [
        (WAN, 3, 3, "step 1-3 semantic, 4-6 detail, boundary 0.979"),
        (HUNYUAN_VIDEO, 2, 2, "step 1-2 semantic, 3-4 detail, boundary 0.982"),
    ],
)
def test_plan_of_the_released_schedules(family, semantic, detail, text):
    plan = plan_steps(family.preset.sigmas, family.preset.boundary)
    assert plan.stretches == (("semantic", semantic), ("detail", detail)) and plan.steps == semantic + detail
    assert str(plan) == text
    assert [plan.side(step) for step in range(plan.steps)] == ["semantic"] * semantic + ["detail"] * detail


@pytest.mark.parametrize(
    "sigmas, text",
    [
        ([0.9, 0.0], "step 1 detail, boundary 0.979"),
        ([1.0, 0.99, 0.98], "step 1-2 semantic, boundary 0.979"),
        ([1.0, 0.5, 0.0], "step 1 semantic, 2 detail, boundary 0.979"),
    ],
)
def test_plan_names_single_steps_and_leaves_out_an_empty_side(sigmas, text):
    assert str(plan_steps(torch.tensor(sigmas), 0.979)) == text


falling = st.lists(st.floats(0, 1, width=32), min_size=2, max_size=30, unique=True).map(
    lambda v: sorted(v, reverse=True)
)


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
    if plan.idle:
        with pytest.raises(ScheduleError, match="side has no steps"):
            split_sigmas(sigmas, boundary)
        return
    high, low = split_sigmas(sigmas, boundary)
    assert high[-1] == low[0]
    assert torch.equal(torch.cat([high, low[1:]]), sigmas)
    assert not is_detail(high[:-1], boundary).any() and is_detail(low[:-1], boundary).all()


@given(falling, st.lists(st.floats(0.001, 0.999), min_size=1, max_size=5, unique=True))
def test_parts_of_several_boundaries_follow_each_other(values, boundaries):
    sigmas, boundaries = torch.tensor(values), sorted(boundaries, reverse=True)
    starts = sigmas[:-1]
    owners = sum(is_detail(starts, boundary).int() for boundary in boundaries)
    if len(set(owners.tolist())) <= len(boundaries):
        with pytest.raises(ScheduleError, match="has no steps"):
            split_sigmas(sigmas, *boundaries)
        return
    parts = split_sigmas(sigmas, *boundaries)
    assert [len(part) - 1 for part in parts] == owners.bincount().tolist()
    assert all(torch.equal(first[-1], second[0]) for first, second in pairwise(parts))
    assert torch.equal(torch.cat([parts[0], *(part[1:] for part in parts[1:])]), sigmas)


def test_boundaries_have_to_fall():
    with pytest.raises(ScheduleError, match=r"The boundaries are 0\.5, 0\.7; expected values that fall"):
        split_sigmas(WAN.preset.sigmas, 0.5, 0.7)
    assert parse_boundaries("0.7, 0.4 0.2") == (0.7, 0.4, 0.2) and parse_boundaries(" ") == ()
    for text in ("high", "0.5; 0.2", None):
        with pytest.raises(ScheduleError, match=r"more_boundaries is .*; expected falling sigmas"):
            parse_boundaries(text)


@pytest.mark.parametrize("sigmas, side", [([0.9, 0.5, 0.0], "semantic"), ([1.0, 0.99, 0.0], "detail")])
def test_split_names_the_empty_side(sigmas, side):
    with pytest.raises(ScheduleError, match=rf"The {side} .*0\.979"):
        split_sigmas(torch.tensor(sigmas), 0.979)


@pytest.mark.parametrize("boundary", [0, 1, -0.1, 1.5, 979, math.nan, math.inf])
def test_boundary_outside_the_open_interval_is_refused(boundary):
    for refused in (lambda: check_boundary(boundary), lambda: plan_steps(WAN.preset.sigmas, boundary)):
        with pytest.raises(ScheduleError, match=r"boundary is .* expected more than 0 and less than 1"):
            refused()


def test_plan_refuses_what_cannot_be_sampled():
    with pytest.raises(ScheduleError, match="expected values that fall"):
        plan_steps(torch.tensor([0.5, 0.9, 0.0]), 0.979)


PLAIN = Setup(WAN, takes_image=False)
PAIR = Setup(WAN, two_models=True, two_sides=True, takes_image=False)
EXPERTS = Setup(WAN, semantic=True, detail=True, timesteps=(900.0, 500.0), boundary=0.7)
LORA = Setup(WAN, semantic=True)


@pytest.mark.parametrize(
    "setup, owners",
    [
        (PLAIN, ("base", "base")),
        (PAIR, SIDES),
        (EXPERTS, SIDES),
        # a detail expert alone is on a semantic base; a semantic expert at strength 0 is left out
        (Setup(WAN, detail=True), SIDES),
        (Setup(WAN, semantic=False, detail=True), ("base", "detail")),
        # a stacked semantic expert works on both sides
        (Setup(WAN, semantic=True), ("semantic", "semantic")),
        (Setup(WAN, semantic=True, detail=False), ("semantic", "semantic")),
        (Setup(WAN, semantic=True, stacked=False), ("semantic", "base")),
        (Setup(WAN, semantic=True, detail=False, stacked=False), ("semantic", "base")),
        (Setup(WAN, semantic=True, detail=True, stacked=False), SIDES),
        (Setup(WAN, semantic=False, detail=False), ("base", "base")),
        (Setup(WAN, detail=False), ("base", "base")),
    ],
)
def test_only_what_works_owns_a_side(setup, owners):
    assert setup.owners == owners
    plan = setup.plan(WAN.preset.sigmas, 0.979)
    assert [plan.side(step) for step in range(6)] == 3 * [owners[0]] + 3 * [owners[1]]
    assert (plan.boundary is None) == (owners[0] == owners[1])


@pytest.mark.parametrize(
    "setup, two_cfgs, text",
    [
        (EXPERTS, False, "step 1-3 semantic, 4-6 detail, boundary 0.979"),
        (LORA, False, "step 1-6 semantic"),
        (PLAIN, False, "step 1-6 base"),
        (PLAIN, True, "step 1-3 base, 4-6 base, boundary 0.979"),
    ],
)
def test_a_plan_names_a_boundary_where_something_changes(setup, two_cfgs, text):
    assert str(setup.plan(WAN.preset.sigmas, 0.979, two_cfgs)) == text


@pytest.mark.parametrize(
    "setup, given, boundary",
    [
        (EXPERTS, 0.5, 0.5),
        (EXPERTS, 0, 0.7),
        (PLAIN, 0, 0.979),
        (PLAIN, None, 0.979),
        (Setup(HUNYUAN_VIDEO), 0, 0.982),
        (PAIR, 0, 0.875),
        (Setup(WAN, two_models=True, takes_image=True), 0, 0.9),
        (Setup(WAN, two_models=True), 0, None),
        (Setup(), 0, None),
        (Setup(), 0.6, 0.6),
        (Setup(HUNYUAN_VIDEO, two_models=True, takes_image=False), 0, 0.982),
        (Setup(WAN, two_models=True, takes_image=False, boundary=0.979), 0, 0.979),
    ],
)
def test_the_boundary_is_the_given_one_then_the_experts_then_the_models(setup, given, boundary):
    assert setup.boundary_for(given) == boundary
    with pytest.raises(ScheduleError, match=r"boundary is 1\.5"):
        setup.boundary_for(1.5)


@pytest.mark.parametrize(
    "experts, given, boundary",
    [
        ((), None, None),
        ((None, None), 0.0, None),
        ((None, 0.7), None, 0.7),
        ((0.7, 0.7 + 5e-7), 0.0, 0.7),
        ((None,), 0.5, 0.5),
        ((0.9, 0.7), 0.5, 0.5),
    ],
)
def test_experts_boundary_is_the_given_one_or_what_they_were_made_for(experts, given, boundary):
    assert own_boundary(experts, given) == boundary


def test_experts_of_different_boundaries():
    with pytest.raises(ExpertError, match=r"different boundaries \(0\.7 and 0\.9\)"):
        own_boundary((0.9, None, 0.7))
    with pytest.raises(ExpertError, match="different boundaries"):
        own_boundary((0.7, 0.7 + 2e-6), 0.0)


def test_experts_timesteps_are_the_first_that_are_known():
    assert own_timesteps((None, (900.0, 500.0), (800.0,))) == (900.0, 500.0)
    assert own_timesteps((None,)) is None


@pytest.mark.parametrize(
    "setup, auto, generic",
    [
        (EXPERTS, (900.0, 500.0), "DCM grid"),
        (LORA, WAN.preset.timesteps, "DCM grid"),
        (Setup(WAN, detail=True), WAN.preset.timesteps, "DCM grid"),
        (PLAIN, WAN.preset.timesteps, "even"),
        (PAIR, "even", "even"),
        # LoRAs on two models say nothing; DCM experts do
        (Setup(WAN, two_models=True, semantic=True), "even", "even"),
        (Setup(WAN, two_models=True, semantic=True, timesteps=(900.0,)), (900.0,), "DCM grid"),
        (Setup(seen=True), "even", "even"),
        (Setup(two_models=True), "even", "even"),
        # of a model that is not known
        (Setup(), None, "DCM grid"),
        (Setup(semantic=True), None, "DCM grid"),
        (Setup(semantic=True, timesteps=(900.0,)), (900.0,), "DCM grid"),
    ],
)
def test_the_schedule_is_what_the_models_are_made_for(setup, auto, generic):
    assert (setup.schedule("auto"), setup.schedule("generic")) == (auto, generic)
    assert [setup.schedule(name) for name in ("even", "DCM grid", "simple")] == ["even", "DCM grid", "simple"]
    assert {name: setup.schedule(name) for name in PRESETS} == PRESETS


@pytest.mark.parametrize(
    "setup, warned",
    [
        (EXPERTS, False),
        (LORA, False),
        (PLAIN, True),
        (Setup(WAN, semantic=False, detail=False), True),
        (Setup(WAN, two_sides=True), True),
    ],
)
def test_auto_says_what_it_does_not_use_and_warns_without_experts(setup, warned):
    *warning, last = setup.notes("auto")
    assert last == "auto: steps and shift are not used"
    assert bool(warning) == warned
    if warned:
        assert warning[0].startswith("Warning: no expert is active, and a plain model needs more than 6 steps.")


def test_schedules_that_use_every_setting_say_nothing():
    assert PAIR.notes("auto") == []
    assert [note for name in ("even", "DCM grid", "generic", "simple") for note in PLAIN.notes(name)] == []
    assert PLAIN.notes("HunyuanVideo 4 steps") == ["HunyuanVideo 4 steps: steps and shift are not used"]
