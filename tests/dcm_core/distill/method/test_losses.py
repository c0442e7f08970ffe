"""The losses against closed forms."""

import pytest
import torch

from dcm_core.distill.method.losses import (
    discriminator_hinge,
    feature_matching,
    generator_hinge,
    pseudo_huber,
    temporal_coherence,
)


def video(*frames):
    """A video of 1x1 pixels, one channel: (1, 1, frames, 1, 1)."""
    return torch.tensor(frames, dtype=torch.float64).view(1, 1, -1, 1, 1)


def test_pseudo_huber_is_quadratic_near_zero_and_linear_far_away():
    zero = torch.zeros(1)
    assert pseudo_huber(zero, zero) == 0
    assert float(pseudo_huber(torch.tensor([1e-5]), zero)) == pytest.approx(1e-10 / (2 * 1e-3), rel=1e-2)
    assert float(pseudo_huber(torch.tensor([100.0]), zero)) == pytest.approx(100 - 1e-3, rel=1e-6)
    assert float(pseudo_huber(torch.tensor([3.0, 0.0]), torch.zeros(2), c=4.0)) == pytest.approx(0.5)


def test_temporal_coherence_compares_frames_three_apart():
    pred, target = video(0, 0, 0, 1, 2), video(0, 0, 0, 0, 0)
    # the differences are 1 - 0 and 2 - 0
    assert float(temporal_coherence(pred, target)) == pytest.approx((1 + 4) / 2)
    assert float(temporal_coherence(pred + 7, target)) == pytest.approx((1 + 4) / 2)


@pytest.mark.parametrize("frames", [1, 2, 3])
def test_short_videos_have_no_temporal_loss(frames):
    pred = torch.randn(2, 3, frames, 2, 2, requires_grad=True)
    assert temporal_coherence(pred, torch.zeros_like(pred)) == 0


def test_hinges():
    fake, real = [torch.tensor([2.0, 0.0]), torch.tensor([-3.0])], [torch.tensor([0.0]), torch.tensor([2.0])]
    assert float(generator_hinge(fake)) == pytest.approx(((0 + 1) / 2 + 4) / 2)
    assert float(discriminator_hinge(real, fake)) == pytest.approx(((3 + 1) / 2 + 1 + 0 + 0) / 2)


def test_feature_matching_has_no_gradient_to_the_real_side():
    fake, real = torch.zeros(2, 3, requires_grad=True), torch.full((2, 3), 2.0, requires_grad=True)
    loss = feature_matching([fake], [real])
    assert float(loss) == 4
    loss.backward()
    assert real.grad is None and torch.equal(fake.grad, torch.full((2, 3), -4 / 6))


def test_gradients():
    torch.manual_seed(0)
    pred, target, way = torch.randn(3, 1, 2, 5, 2, 2)
    pred.requires_grad_()
    for loss in (pseudo_huber, temporal_coherence):
        (gradient,) = torch.autograd.grad(loss(pred, target), pred)
        slope = (loss(pred + 1e-2 * way, target) - loss(pred - 1e-2 * way, target)) / 2e-2
        assert float((gradient * way).sum()) == pytest.approx(float(slope), rel=1e-2)
        assert loss(pred - 1e-2 * gradient, target) < loss(pred, target)
