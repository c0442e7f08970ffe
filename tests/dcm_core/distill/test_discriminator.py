"""The discriminator's heads."""

import pytest
import torch

from dcm_core.distill.discriminator import Discriminator


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
    official = {key.replace(".0.conv", ".conv", 1): tuple(shape) for key, shape in recipe.keys("wan_train")["discriminator"].items()}
    ours = {key: tuple(value.shape) for key, value in Discriminator(2, 256).state_dict().items()}
    assert ours == official
