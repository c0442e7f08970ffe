"""The Euler loop: straight paths, a linear equation, the official code's latents."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dcm_core.errors import ScheduleError
from dcm_core.families import HUNYUAN_VIDEO, WAN
from dcm_core.sampling import sample_euler
from dcm_core.schedule import generic_sigmas

SHAPE = (2, 3, 2, 4, 5)


def randn(seed):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(st.integers(1, 50), st.floats(0.1, 50))
def test_a_straight_path_ends_at_the_clean_latent_in_any_number_of_steps(steps, shift):
    noise, clean = randn(0), randn(1)
    seen = []
    out = sample_euler(
        lambda x, t: noise - clean, noise, generic_sigmas(steps, shift).double(), lambda i, d: seen.append(d)
    )
    torch.testing.assert_close(out, clean)
    assert len(seen) == steps
    for denoised in seen:
        torch.testing.assert_close(denoised, clean)


def test_a_linear_velocity_multiplies():
    """v = a x gives x_n = x_0 * prod(1 + a (sigma_next - sigma))."""
    sigmas, noise, a = WAN.preset.sigmas.double(), randn(2), 0.7
    expected = noise * (1 + a * sigmas.diff()).prod()
    torch.testing.assert_close(sample_euler(lambda x, t: a * x, noise, sigmas), expected)


def test_model_sees_timesteps_of_the_whole_batch_and_the_callback_each_estimate():
    calls, estimates = [], []

    def model(x, t):
        calls.append((x, t))
        return x * t.view(-1, 1, 1, 1, 1) / 1000

    sigmas = HUNYUAN_VIDEO.preset.sigmas
    noise = randn(3).float()
    before = noise.clone()
    sample_euler(model, noise, sigmas, lambda step, denoised: estimates.append((step, denoised)))
    assert torch.equal(noise, before)
    assert [t.shape for _, t in calls] == [(2,)] * 4
    assert [t[0].item() for _, t in calls] == pytest.approx(HUNYUAN_VIDEO.preset.timesteps)
    assert [step for step, _ in estimates] == [0, 1, 2, 3]
    for (x, t), (_, denoised) in zip(calls, estimates, strict=True):
        torch.testing.assert_close(denoised, x - (t[0] / 1000) ** 2 * x)


@pytest.mark.parametrize("name, family", [("wan_tiny", WAN), ("hy_tiny", HUNYUAN_VIDEO)])
def test_official_velocities_give_the_official_latents(recipe, name, family):
    expected = recipe.expected(name)
    states = []

    def official(x, t):
        step = len(states)
        assert t[0].item() == pytest.approx(family.preset.timesteps[step])
        states.append(x)
        return expected[f"velocity.{step}"]

    last = sample_euler(official, expected["noise"], family.preset.sigmas)
    for step, state in enumerate([*states[1:], last]):
        assert ((state - expected[f"latent.{step}"]).norm() / state.norm()).item() < 1e-6, step


def test_refuses_rising_sigmas_before_any_call():
    def model(x, t):
        raise AssertionError("called")

    with pytest.raises(ScheduleError, match="have to fall"):
        sample_euler(model, randn(0), torch.tensor([0.5, 0.9, 0.0]))
