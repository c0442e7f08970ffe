"""Noise levels: closed forms, the released schedules, what is refused."""

import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dcm_core.errors import ScheduleError
from dcm_core.families import HUNYUAN_VIDEO, PRESETS, WAN
from dcm_core.schedule import (
    check_sigmas,
    even_sigmas,
    generic_sigmas,
    last_part,
    levels_for,
    make_sigmas,
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


@pytest.mark.parametrize(
    "family, timesteps",
    [
        (WAN, [1000, 992, 982, 949, 905, 810]),
        (HUNYUAN_VIDEO, [1000, 992, 981.8, 912.4]),
    ],
)
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


@pytest.mark.parametrize(
    "steps, shift, expected",
    [
        (4, 5.0, [1000, 937.5, 2500 / 3, 625, 0]),
        (8, 5.0, [1000, 8750 / 9, 937.5, 6250 / 7, 2500 / 3, 750, 625, 1250 / 3, 0]),
        (3, 1.0, [1000, 2000 / 3, 1000 / 3, 0]),
        (1, 8.0, [1000, 0]),
    ],
)
def test_even_spacing_by_hand(steps, shift, expected):
    sigmas = even_sigmas(steps, shift)
    assert sigmas.dtype == torch.float32
    assert (1000 * sigmas).tolist() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("steps", [4, 8])
def test_the_presets_of_two_models_are_even_spacing_at_shift_5(steps):
    timesteps = PRESETS[f"Wan 2.2 {steps} steps (lightx2v)"]
    torch.testing.assert_close(sigmas_from_timesteps(timesteps), even_sigmas(steps, 5.0), rtol=0, atol=1e-7)


@given(st.integers(1, 100), shifts, st.floats(0.01, 1))
def test_even_spacing_is_even_before_the_shift(steps, shift, denoise):
    sigmas = even_sigmas(steps, shift, denoise).double()
    levels = levels_for(steps, denoise)
    assert len(sigmas) == steps + 1 and sigmas[-1] == 0
    undone = shift_sigma(sigmas, 1 / shift)
    torch.testing.assert_close(
        undone, torch.arange(steps, -1, -1) / levels, rtol=0, atol=1e-5 * max(shift, 1 / shift), check_dtype=False
    )
    if denoise == 1:
        assert sigmas[0] == 1


@pytest.mark.parametrize(
    "steps, denoise, levels",
    [(4, 1, 4), (4, 0.99995, 4), (4, 0.999, 4), (4, 0.5, 8), (20, 0.3, 66), (1, 0.01, 100), (1000, 1, 1000)],
)
def test_denoise_takes_as_many_levels_as_ksampler(steps, denoise, levels):
    assert levels_for(steps, denoise) == levels
    assert torch.equal(even_sigmas(steps, 3.0, denoise), even_sigmas(levels, 3.0)[-(steps + 1) :])


@pytest.mark.parametrize(
    "settings, message",
    [
        ((0, 5.0), "steps is 0; expected 1 to 1000"),
        ((1001, 5.0), "steps is 1001"),
        ((4, 0.0), "shift is 0.0"),
        ((4, math.nan), "shift is nan"),
        ((4, 5.0, 0.0), "denoise is 0.0"),
        ((4, 5.0, 1.01), "denoise is 1.01"),
        ((4, 5.0, math.nan), "denoise is nan"),
        ((4, 5.0, 1e-12), "denoise is 1e-12, which is too small for 4 steps. Raise it to 0.0004"),
    ],
)
def test_even_spacing_refuses(settings, message):
    with pytest.raises(ScheduleError, match=re.escape(message)):
        even_sigmas(*settings)


def test_each_schedule_makes_its_own_of_denoise():
    assert torch.equal(make_sigmas("even", 4, 5.0, 0.5), even_sigmas(4, 5.0, 0.5))
    assert torch.equal(make_sigmas("DCM grid", 4, 5.0, 0.5), generic_sigmas(4, 5.0)[-3:])
    assert torch.equal(make_sigmas(WAN.preset.timesteps, 20, 5.0, 0.5), WAN.preset.sigmas[-4:])


@pytest.mark.parametrize("denoise, kept", [(1, 6), (0.99, 6), (0.5, 3), (0.34, 2), (0.17, 1), (0.01, 1)])
def test_last_part_keeps_trained_levels(denoise, kept):
    sigmas = WAN.preset.sigmas
    assert torch.equal(last_part(sigmas, denoise), sigmas[6 - kept :])


@pytest.mark.parametrize("denoise", [0, -0.5, 1.01, math.nan])
def test_last_part_refuses(denoise):
    with pytest.raises(ScheduleError, match="denoise"):
        last_part(WAN.preset.sigmas, denoise)


@pytest.mark.parametrize("steps", [0, -1, 51])
def test_generic_refuses_steps(steps):
    with pytest.raises(ScheduleError, match=rf"steps is {steps}; .* 1 to 50"):
        generic_sigmas(steps)


@pytest.mark.parametrize("shift", [0.0, -17.0, math.inf, math.nan])
def test_grid_refuses_shift(shift):
    with pytest.raises(ScheduleError, match="shift"):
        solver_sigmas(shift)


@pytest.mark.parametrize("points", [0, 1001])
def test_grid_refuses_points(points):
    with pytest.raises(ScheduleError, match="points"):
        solver_sigmas(points=points)


falling = st.lists(st.floats(0, 1, width=32), min_size=2, max_size=30, unique=True).map(
    lambda v: sorted(v, reverse=True)
)


@given(falling)
def test_any_falling_list_can_be_sampled(values):
    sigmas = torch.tensor(values)
    assert check_sigmas(sigmas) is sigmas


@given(falling, st.data())
def test_a_rise_or_a_standstill_anywhere_is_refused(values, data):
    at = data.draw(st.integers(0, len(values) - 2))
    values[at] = values[at + 1]
    with pytest.raises(ScheduleError, match="expected values that fall"):
        check_sigmas(torch.tensor(values))
    with pytest.raises(ScheduleError, match="expected values that fall"):
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
