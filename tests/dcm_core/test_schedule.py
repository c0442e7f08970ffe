"""Noise levels: closed forms, the released schedules, what is refused."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dcm_core.errors import ScheduleError
from dcm_core.families import HUNYUAN_VIDEO, WAN
from dcm_core.schedule import (
    check_sigmas,
    generic_sigmas,
    last_part,
    shift_sigma,
    sigmas_from_timesteps,
    solver_sigmas,
)

unit = st.floats(0, 1)
shifts = st.floats(0.01, 100)


@given(unit, shifts)
def test_shift_keeps_the_ends_and_is_undone_by_its_inverse(sigma, shift):
    assert shift_sigma(0.0, shift) == 0
    assert shift_sigma(1.0, shift) == pytest.approx(1, abs=1e-12)
    assert shift_sigma(shift_sigma(sigma, shift), 1 / shift) == pytest.approx(sigma, abs=1e-9)


@given(shifts, shifts, unit)
def test_shifts_multiply(first, second, sigma):
    assert shift_sigma(shift_sigma(sigma, first), second) == pytest.approx(shift_sigma(sigma, first * second), abs=1e-9)


@pytest.mark.parametrize("family, timesteps", [
    (WAN, [1000, 992, 982, 949, 905, 810]),
    (HUNYUAN_VIDEO, [1000, 992, 981.8, 912.4]),
])
def test_released_schedules(family, timesteps):
    sigmas = family.preset.sigmas
    assert sigmas.dtype == torch.float32
    # the float32 nearest to t / 1000, not a float32 division's
    assert sigmas.tolist() == [*np.float32(np.array(timesteps) / 1000).tolist(), 0]
    assert torch.equal(sigmas, sigmas_from_timesteps(timesteps))


def test_solver_grid_is_the_training_grid():
    sigmas = solver_sigmas()
    assert sigmas.shape == (50,) and sigmas.dtype == torch.float32
    assert sigmas[0] == 1
    assert sigmas[50 - 35].item() == pytest.approx(0.97541, abs=5e-6)  # sigma_prev[35], where the semantic phase ends
    assert sigmas[50 - 36].item() == pytest.approx(0.9776, abs=5e-5)
    assert sigmas[-1].item() == pytest.approx(17 * 0.02 / (1 + 16 * 0.02))


def test_solver_grid_of_all_levels_ends_at_the_smallest():
    sigmas = solver_sigmas(points=1000)
    assert sigmas.shape == (1000,)
    assert sigmas[-1].item() == pytest.approx(0.0167, abs=5e-5)  # spec: sigma_prev[0]


@given(st.integers(1, 1000), shifts)
def test_solver_grid_falls_from_one(points, shift):
    sigmas = solver_sigmas(shift, points).double()
    assert sigmas[0] == 1 and sigmas[-1] > 0
    assert len(sigmas) == points and bool((sigmas.diff() < 0).all())


@pytest.mark.parametrize("steps", range(1, 51))
def test_generic_schedule_takes_every_level_the_official_code_takes(steps):
    index = np.floor(np.linspace(0, 50, steps, endpoint=False)).astype(int)
    expected = torch.cat([solver_sigmas()[torch.from_numpy(index)], torch.zeros(1)])
    assert torch.equal(generic_sigmas(steps), expected)
    check_sigmas(generic_sigmas(steps))


def test_generic_schedule_by_hand():
    sigmas = generic_sigmas(2, shift=3.0, points=4)
    assert sigmas.tolist() == pytest.approx([1, 3 * 0.5 / (1 + 2 * 0.5), 0])


@pytest.mark.parametrize("denoise, kept", [(1, 6), (0.99, 6), (0.5, 3), (0.34, 2), (0.17, 1), (0.01, 1)])
def test_last_part_keeps_trained_levels(denoise, kept):
    sigmas = WAN.preset.sigmas
    assert torch.equal(last_part(sigmas, denoise), sigmas[6 - kept:])


@pytest.mark.parametrize("denoise", [0, -0.5, 1.01, math.nan])
def test_last_part_refuses(denoise):
    with pytest.raises(ScheduleError, match="denoise"):
        last_part(WAN.preset.sigmas, denoise)


@pytest.mark.parametrize("steps", [0, -1, 51])
def test_generic_refuses_steps(steps):
    with pytest.raises(ScheduleError, match=rf"steps is {steps}; .* 1 \.\. 50"):
        generic_sigmas(steps)


@pytest.mark.parametrize("shift", [0.0, -17.0, math.inf, math.nan])
def test_grid_refuses_shift(shift):
    with pytest.raises(ScheduleError, match="shift"):
        solver_sigmas(shift)


@pytest.mark.parametrize("points", [0, 1001])
def test_grid_refuses_points(points):
    with pytest.raises(ScheduleError, match="points"):
        solver_sigmas(points=points)


falling = st.lists(st.floats(0, 1, width=32), min_size=2, max_size=30, unique=True).map(lambda v: sorted(v, reverse=True))


@given(falling)
def test_any_falling_list_can_be_sampled(values):
    sigmas = torch.tensor(values)
    assert check_sigmas(sigmas) is sigmas


@given(falling, st.data())
def test_a_rise_or_a_standstill_anywhere_is_refused(values, data):
    at = data.draw(st.integers(0, len(values) - 2))
    values[at] = values[at + 1]
    with pytest.raises(ScheduleError, match="have to fall"):
        check_sigmas(torch.tensor(values))
    with pytest.raises(ScheduleError, match="have to fall"):
        check_sigmas(torch.tensor(sorted(values)))


@given(falling, st.data(), st.sampled_from([math.nan, math.inf, -math.inf, -0.1, 14.6]))
def test_a_level_outside_the_unit_interval_is_refused(values, data, bad):
    values[data.draw(st.integers(0, len(values) - 1))] = bad
    with pytest.raises(ScheduleError, match="between 1 and 0"):
        check_sigmas(torch.tensor(values))


@pytest.mark.parametrize("sigmas", [torch.zeros(0), torch.ones(1), torch.ones(2, 3), torch.tensor(1.0)])
def test_a_list_without_a_step_is_refused(sigmas):
    with pytest.raises(ScheduleError, match="at least one step"):
        check_sigmas(sigmas)
