"""What each stage lowers, put together by hand."""

import pytest
import torch

from dcm_core.distill.backbone import Features, Text
from dcm_core.distill.method.consistency import Batch, Networks, predict
from dcm_core.distill.method.losses import (
    discriminator_hinge,
    feature_matching,
    generator_hinge,
    pseudo_huber,
    temporal_coherence,
)
from dcm_core.distill.method.phases import Phases
from dcm_core.distill.method.stages import DetailStage, SemanticStage, renoise

TEXT = Text(torch.zeros(2, 1, 1))


class Judge(torch.nn.Linear):
    """A discriminator's form: logits of each feature."""

    def __init__(self):
        super().__init__(4, 1)

    def forward(self, features, grid):
        return [super(Judge, self).forward(feature) for feature in features]


def features_of(video, sigma, text):
    tokens = video.flatten(2).transpose(1, 2)
    return Features((tokens, tokens * 2), (tokens.tanh(),), tuple(video.shape[2:]))


@pytest.fixture
def weight():
    return torch.tensor(0.7, requires_grad=True)


@pytest.fixture
def networks(weight):
    return Networks(lambda x, sigma, text: weight * x, lambda x, sigma, text: 0.5 * x, lambda x, sigma, text: 0.6 * x)


def make_batch(phases):
    generator = torch.Generator().manual_seed(3)
    x0, noise, level_noise = (torch.randn(2, 4, 5, 2, 2, generator=generator) for _ in range(3))
    index = phases.draw(2, generator)
    return Batch(x0, TEXT, TEXT, noise, index, phases.draw_above_phase(index, generator), level_noise)


def test_semantic(networks):
    phases = Phases("semantic", 0.8, shift=5.0)
    batch = make_batch(phases)
    loss, terms = SemanticStage(phases, cfg=2.0, temporal_weight=3.0).losses(networks, batch)
    pred, target = predict(networks, batch, phases, 2.0)
    huber, temporal = pseudo_huber(pred, target), temporal_coherence(pred, target)
    assert torch.equal(terms["huber"], huber) and torch.equal(terms["temporal"], temporal) and temporal > 0
    torch.testing.assert_close(loss, huber + 3 * temporal)


def test_detail(networks, weight):
    phases = Phases("detail", 0.8, shift=5.0)
    batch, judge = make_batch(phases), Judge()
    stage = DetailStage(phases, cfg=0.0, adversarial_weight=0.1, gan_weight=5.0, feature_weight=10.0)
    loss, terms, discriminator_loss = stage.losses(networks, batch, features_of, judge)
    pred, target = predict(networks, batch, phases, 0.0)
    sigma, end = phases.previous[batch.level], phases.ends(batch.index)
    fake, real = (features_of(renoise(video, batch.level_noise, end, sigma), sigma, TEXT) for video in (pred, target))
    gan, matching = generator_hinge(judge(fake.raw, fake.grid)), feature_matching(fake.projected, real.projected)
    torch.testing.assert_close(loss, pseudo_huber(pred, target) + 0.1 * (5 * gan + 10 * matching))
    torch.testing.assert_close(
        discriminator_loss(), discriminator_hinge(judge(real.raw, real.grid), judge(fake.raw, fake.grid))
    )
    assert set(terms) == {"huber", "gan", "feature_matching"}


def test_student_and_discriminator_learn_from_their_own_loss_alone(networks, weight):
    phases = Phases("detail", 0.8, shift=5.0)
    judge = Judge()
    loss, _, discriminator_loss = DetailStage(phases, cfg=0.0).losses(networks, make_batch(phases), features_of, judge)
    loss.backward()
    assert weight.grad.abs() > 0 and all(value.grad is None for value in judge.parameters())
    weight.grad = None
    discriminator_loss().backward()
    assert weight.grad is None and all(value.grad.abs().sum() > 0 for value in judge.parameters())


@pytest.mark.parametrize("without", ["weight", "features"])
def test_detail_by_consistency_alone(without, networks):
    phases = Phases("detail", 0.8, shift=5.0)
    batch = make_batch(phases)
    stage = DetailStage(phases, adversarial_weight=0.0 if without == "weight" else 0.1)
    loss, terms, discriminator_loss = stage.losses(
        networks, batch, features_of if without == "weight" else None, Judge()
    )
    assert discriminator_loss is None and set(terms) == {"huber"}
    assert torch.equal(loss, pseudo_huber(*predict(networks, batch, phases, 5.0)))


def test_renoised_videos_are_as_noisy_as_noised_ones():
    """From a point at the level `end` on: the clean part is what noising to `sigma` leaves of it, and at `end` nothing is added."""
    video, noise = torch.ones(3, 1, 1, 1, 1), torch.zeros(3, 1, 1, 1, 1)
    end, sigma = torch.tensor([0.0, 0.5, 0.5]), torch.tensor([0.25, 0.75, 0.5])
    torch.testing.assert_close(renoise(video, noise, end, sigma).flatten(), torch.tensor([0.75, 0.5, 1.0]))
    torch.testing.assert_close(renoise(noise, video, end, sigma).flatten(), torch.tensor([0.25, 0.5, 0.0]))
