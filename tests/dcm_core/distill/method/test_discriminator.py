"""The discriminator's heads."""

import pytest
import torch

from dcm_core.distill.memory import Alive
from dcm_core.distill.method.discriminator import Discriminator


@pytest.mark.parametrize("grid", [(1, 1, 1), (2, 3, 5), (5, 4, 4)])
def test_a_score_for_every_token_of_any_grid(grid):
    discriminator = Discriminator(2, 16, hidden=64)
    frames, height, width = grid
    scores = discriminator([torch.randn(3, frames * height * width, 16)] * 2, grid)
    assert [score.shape for score in scores] == [(3 * frames, 1, height, width)] * 2


def test_frames_are_judged_apart():
    torch.manual_seed(0)
    discriminator = Discriminator(1, 16, hidden=64)
    video = torch.randn(1, 2 * 6, 16)
    changed = video.clone()
    changed[:, 6:] = 0
    before, after = (discriminator([v], (2, 2, 3))[0] for v in (video, changed))
    assert torch.equal(before[0], after[0]) and not torch.equal(before[1], after[1])


def test_its_tensors_are_the_official_ones(recipe):
    official = {
        key.replace(".0.conv", ".conv", 1): tuple(shape)
        for key, shape in recipe.keys("wan_train")["discriminator"].items()
    }
    ours = {key: tuple(value.shape) for key, value in Discriminator(2, 256).state_dict().items()}
    assert ours == official


def test_checkpointing_keeps_less_and_changes_nothing():
    """Scores, and gradients of features and weights; of four heads' activations, about one head's is kept."""
    features = [
        torch.randn(1, 400, 16, generator=torch.Generator().manual_seed(seed), requires_grad=True) for seed in range(4)
    ]
    plain, light = (Discriminator(4, 16, hidden=64, gradient_checkpointing=flag) for flag in (False, True))
    light.load_state_dict(plain.state_dict())
    found, kept = [], []
    for discriminator in (plain, light):
        wanted = [*features, *discriminator.parameters()]
        for tensor in discriminator.parameters():
            tensor.grad = torch.zeros_like(tensor)
        with Alive(torch.device("cpu")) as alive:
            scores = discriminator(features, (1, 20, 20))
            gradients = torch.autograd.grad(sum(score.square().mean() for score in scores), wanted)
        found.append([*scores, *gradients])
        kept.append(alive.most)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert kept[1] < 0.5 * kept[0]
