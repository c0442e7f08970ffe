"""The measures, on videos, sets and steps whose values are known."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dcm_core.evaluation import measures


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def waves(cycles, size=(32, 32), frames=4, speed=0.0, amplitude=1.0):
    """A wave across the picture, `speed` of its lengths further in each frame: (3, frames, height, width)."""
    across = torch.arange(size[1], dtype=torch.float64) / size[1]
    phase = cycles * across - speed * torch.arange(frames, dtype=torch.float64)[:, None]
    return amplitude * torch.sin(2 * math.pi * phase)[None, :, None].expand(3, frames, *size)


def test_energy_distance_of_equal_sets_is_nothing():
    points = random(20, 3, 4)
    assert measures.energy_distance(points, points) == pytest.approx((0, 0), abs=1e-12)


def test_energy_distance_is_without_bias_and_knows_its_error():
    """Two sets of one distribution: around zero over many draws, as far as the standard error says."""
    generator = torch.Generator().manual_seed(0)
    shared = [torch.randn(60, 5, generator=generator) for _ in range(200)]
    found = torch.tensor(
        [
            measures.energy_distance(
                points + 0.3 * torch.randn(60, 5, generator=generator),
                points + 0.3 * torch.randn(60, 5, generator=generator),
            )
            for points in shared
        ]
    )
    values, errors = found.T
    assert values.mean().abs() < 3 * values.std() / len(values) ** 0.5
    assert 0.5 < errors.mean() / values.std() < 3


def test_energy_distance_of_shifted_points():
    """On a line, points at 0 and at 1 are as far apart as can be: 2 E|a - b| = 2."""
    value, error = measures.energy_distance(torch.zeros(10, 1), torch.ones(10, 1))
    assert value == pytest.approx(2) and error == pytest.approx(0, abs=1e-6)


def test_energy_distance_far_from_the_origin():
    """It is the same wherever the points are."""
    a, b = random(2, 30, 50)
    value, error = measures.energy_distance(a, b + 1)
    assert measures.energy_distance(a + 1000, b + 1001) == pytest.approx((value, error), rel=1e-6)
    assert value > 0.05


def test_energy_distance_of_two_points_has_no_error():
    value, error = measures.energy_distance(torch.zeros(2, 1), torch.ones(2, 1))
    assert value == pytest.approx(2) and error == math.inf


def test_motion_of_a_wave():
    """The difference of two sines a phase p apart is 2 sin(p / 2) of a cosine, whose root mean square is 1 / sqrt 2."""
    video = waves(2, speed=0.1)
    assert measures.motion(video) == pytest.approx(math.sqrt(2) * math.sin(math.pi * 0.1))
    assert measures.motion(0.6 * video) == pytest.approx(0.6 * measures.motion(video))
    assert measures.motion(waves(2)) == measures.motion(video[:, :1]) == 0


@given(st.floats(0.1, 2))
def test_motion_scales_with_what_moves(factor):
    """Frames brought nearer to their mean by a factor move by that factor."""
    video = random(3, 5, 6, 6)
    mean = video.mean(1, keepdim=True)
    slow = mean + factor * (video - mean)
    assert measures.motion(slow) == pytest.approx(factor * measures.motion(video))


def test_motion_difference():
    video = random(3, 5, 6, 6)
    assert measures.motion_difference(video, video + 7) == pytest.approx(0, abs=1e-12)
    assert measures.motion_difference(2 * video, video) == pytest.approx(float(video.diff(dim=1).abs().mean()))


def test_flicker_is_of_what_stands_still():
    """The left half jumps, the right half gets 0.2 brighter and darker in turn."""
    video = torch.zeros(3, 6, 8, 8, dtype=torch.float64)
    video[:, 1::2, :, :4] = 1
    still = measures.still_places(video)
    assert still[:, 4:].all() and not still[:, :4].any()
    video[:, 1::2, :, 4:] = 0.2
    assert measures.flicker(video, measures.still_places(video)) == pytest.approx(0.2)


def test_edge_strength_of_stripes():
    stripes = torch.tensor([0.0, 1.0]).repeat(4).expand(3, 2, 8, 8)
    assert measures.edge_strength(stripes) == pytest.approx(1)


@pytest.mark.parametrize("size", [(32, 32), (32, 64), (64, 32)])
def test_spectrum_has_a_wave_at_its_frequency(size):
    """Cycles are counted over the shorter side, in any direction."""
    cycles = 5 * size[1] // 32
    found = measures.spectrum(waves(cycles, size)[None])
    assert len(found) == 15 and int(found.argmax()) == 5 - 1
    assert measures.spectrum(2 * waves(cycles, size)[None])[4] - found[4] == pytest.approx(2 * math.log(2))


def test_sharpness_is_of_the_fine_half():
    """Half the amplitude of the high frequencies is half the sharpness; the low ones do not count."""
    picture = random(1, 3, 2, 32, 32)
    frequency = torch.fft.fftfreq(32) * 32
    radius = torch.hypot(frequency[:, None], frequency[None]).round()
    for chosen, expected in ((radius > 7, 0.5), (radius <= 7, 1.0)):
        changed = torch.fft.ifft2(torch.fft.fft2(picture) * torch.where(chosen, 0.5, 1.0)).real
        found = measures.sharpness(measures.spectrum(changed), measures.spectrum(picture))
        assert found == pytest.approx(expected, rel=1e-6)


def test_saturation_and_contrast():
    red = torch.tensor([1.0, -1.0, -1.0]).view(3, 1, 1, 1).expand(3, 2, 4, 4)
    assert measures.saturation(red).tolist() == [1, 1]
    assert measures.saturation(torch.full((3, 2, 4, 4), 0.3)).tolist() == [0, 0]
    half = torch.cat([torch.ones(3, 2, 4, 2), -torch.ones(3, 2, 4, 2)], -1)
    assert measures.contrast(half).tolist() == [1, 1]
    assert measures.contrast(red).tolist() == [0, 0]


def test_drift_is_the_change_from_first_to_last_frame():
    assert measures.drift(torch.tensor([1.0, 1.5, 2.0])) == pytest.approx(1 / 1.5)
    assert measures.drift(torch.tensor([2.0, 1.0, 2.0])) == pytest.approx(0)
    assert measures.drift(torch.tensor([2.0])) == 0


def test_psnr():
    frame = torch.zeros(3, 4, 4)
    assert measures.psnr(frame, frame + 0.2) == pytest.approx(20)
    assert measures.psnr(frame, frame) == math.inf


def test_a_state_between_two_euler_steps_is_on_the_line():
    x, denoised = random(2, 1, 4, 2, 3, 3)
    for sigma in (0.8, 0.5, 0.2):
        # Euler: x + (sigma - start) (x - D) / start
        expected = x + (sigma - 0.8) * (x - denoised) / 0.8
        torch.testing.assert_close(measures.euler_state(x, denoised, 0.8, sigma), expected)
    assert torch.equal(measures.euler_state(x, denoised, 0.8, 0.8), x)
    assert torch.equal(measures.euler_state(x, denoised, 0.8, 0.0), denoised)


@given(st.floats(0.05, 0.95), st.floats(0, 0.9))
def test_a_step_with_its_target_lands_on_the_reference(start, share):
    end = share * start
    before, after = random(2, 1, 4, 2, 3, 3)
    target = measures.step_target(before, after, start, end)
    torch.testing.assert_close(measures.euler_state(before, target, start, end), after, atol=1e-9, rtol=1e-7)


def test_a_target_is_the_mean_of_the_estimates_on_the_way():
    """Weighted by 1 / sigma²: the reference's Euler steps from 0.9 over 0.6 and 0.5 to 0.3."""
    levels, x = [0.9, 0.6, 0.5, 0.3], random(2, 3)
    estimates, way = random(3, 2, 3, seed=1), [x]
    for start, end, estimate in zip(levels[:-1], levels[1:], estimates, strict=True):
        way.append(measures.euler_state(way[-1], estimate, start, end))
    weights = torch.tensor([1 / end - 1 / start for start, end in pairwise(levels)])
    expected = (weights[:, None, None] * estimates).sum(0) / weights.sum()
    torch.testing.assert_close(measures.step_target(way[0], way[-1], 0.9, 0.3), expected)


@pytest.mark.parametrize("strength", [0.6, 1.0, 1.5])
def test_an_effect_of_another_strength_has_its_inverse_as_factor(strength):
    without, target = random(2, 3, 16, 4)
    product, size, needed = measures.change_sums(without + strength * (target - without), without, target).T
    torch.testing.assert_close(product / size, torch.full((3,), 1 / strength, dtype=torch.float64))
    torch.testing.assert_close(needed * strength**2, size)
