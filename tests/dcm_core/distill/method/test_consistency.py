"""A consistency step in closed form: with velocities that are known, both sides are."""

import torch

from dcm_core.distill.backbone import Text
from dcm_core.distill.method.consistency import Batch, Networks, add_noise, euler, guided, predict
from dcm_core.distill.method.phases import Phases

PHASES = Phases("semantic", 0.8, shift=5.0, count=2)
TEXT, NO_TEXT = Text(torch.ones(1, 1, 1)), Text(torch.zeros(1, 1, 1))


def make_batch(count=3):
    generator = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(count, 2, 3, 2, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    return Batch(x0, TEXT, NO_TEXT, noise, PHASES.draw(count, generator))


def straight(batch):
    """The velocity of the straight line that each video lies on."""
    return lambda x, sigma, text: batch.noise - batch.x0


def test_on_straight_lines_both_sides_are_the_line_s_point_at_the_phase_s_end():
    batch = make_batch()
    pred, target = predict(Networks(*[straight(batch)] * 3), batch, PHASES, cfg=5.0)
    expected = add_noise(batch.x0, batch.noise, PHASES.ends(batch.index))
    torch.testing.assert_close(pred, expected)
    torch.testing.assert_close(target, expected)


def test_each_network_has_its_own_part():
    """pred = x_k + (end - k) s; target = x_k + (prev - k) t + (end - prev) g, of constant velocities s, t, g."""
    batch = make_batch()
    pred, target = predict(
        Networks(*(lambda x, sigma, text, v=v: torch.full_like(x, v) for v in (1.0, 10.0, 100.0))),
        batch,
        PHASES,
        cfg=0.0,
    )
    sigma, previous, end = PHASES.sigmas[batch.index], PHASES.previous[batch.index], PHASES.ends(batch.index)
    x = add_noise(batch.x0, batch.noise, sigma)
    shape = (-1, 1, 1, 1, 1)
    torch.testing.assert_close(pred - x, (end - sigma).view(shape).expand_as(x).double())
    torch.testing.assert_close(
        target - x, (10 * (previous - sigma) + 100 * (end - previous)).view(shape).expand_as(x).double()
    )


def test_networks_are_asked_at_the_levels_of_their_videos():
    batch, asked = make_batch(), {}

    def note(name):
        def velocity(x, sigma, text):
            asked[name] = sigma
            return x

        return velocity

    predict(Networks(note("student"), note("teacher"), note("target")), batch, PHASES, cfg=0.0)
    sigma, previous = PHASES.sigmas[batch.index], PHASES.previous[batch.index]
    assert (
        torch.equal(asked["student"], sigma)
        and torch.equal(asked["teacher"], sigma)
        and torch.equal(asked["target"], previous)
    )


def test_only_the_prediction_has_a_gradient():
    batch, weight = make_batch(), torch.ones((), dtype=torch.float64, requires_grad=True)
    pred, target = predict(Networks(*[lambda x, sigma, text: weight * x] * 3), batch, PHASES, cfg=1.0)
    assert pred.requires_grad and not target.requires_grad


def test_guidance():
    """v_cond + w (v_cond - v_uncond); without it the negative text is not asked for."""
    batch, asked = make_batch(), []

    def teacher(x, sigma, text):
        asked.append(float(text.context))
        return torch.full_like(x, 3.0 if text is TEXT else 1.0)

    for cfg in (5.0, 1.0, 0.5):
        assert (guided(teacher, batch.x0, PHASES.sigmas[batch.index], batch, cfg) == 3 + cfg * (3 - 1)).all()
        assert asked == [1.0, 0.0]
        asked.clear()
    assert (guided(teacher, batch.x0, PHASES.sigmas[batch.index], batch, 0.0) == 3).all()
    assert asked == [1.0]


def test_levels_are_each_video_s_own():
    x0, noise = torch.zeros(2, 1, 1, 1, 1), torch.ones(2, 1, 1, 1, 1)
    assert add_noise(x0, noise, torch.tensor([0.25, 1.0])).flatten().tolist() == [0.25, 1.0]
    assert euler(noise, noise, torch.tensor([1.0, 0.5]), torch.tensor([0.5, 0.5])).flatten().tolist() == [0.5, 1.0]
