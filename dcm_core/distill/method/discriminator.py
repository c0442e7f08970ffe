"""The discriminator: a small head on each of the frozen teacher's features (paper, section 3.4)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..backbone import Backbone
from ..config import TrainingConfig
from ..memory import total
from ..student import CASTING

HIDDEN = 1024
GROUPS = 32
SLOPE = 0.01


class Head(nn.Module):
    """1x1 convolutions over the (height, width) grid of each latent frame. They give one score per token, for any grid size."""

    def __init__(self, width: int, hidden: int = HIDDEN):
        super().__init__()
        self.conv1 = nn.Sequential(CASTING.Conv2d(width, hidden, 1), nn.GroupNorm(GROUPS, hidden))
        self.conv2 = nn.Sequential(CASTING.Conv2d(hidden, hidden, 1), nn.GroupNorm(GROUPS, hidden))
        self.conv_out = CASTING.Conv2d(hidden, 1, 1)

    def forward(self, feature: Tensor) -> Tensor:
        """feature: (batch x frames, width, height, width) -> scores (batch x frames, 1, height, width)."""
        x = F.leaky_relu(self.conv1(feature), SLOPE)
        x = x + F.leaky_relu(self.conv2(x), SLOPE)
        return self.conv_out(x)


class Discriminator(nn.Module):
    """One head for each feature.

    Args:
        gradient_checkpointing: keep only the features for the backward pass, and compute the heads again one at a time.
    """

    def __init__(self, features: int, width: int, hidden: int = HIDDEN, gradient_checkpointing: bool = False):
        super().__init__()
        self.gradient_checkpointing = gradient_checkpointing
        self.heads = nn.ModuleList(Head(width, hidden) for _ in range(features))

    def forward(self, features: Sequence[Tensor], grid: tuple[int, int, int]) -> list[Tensor]:
        """Scores of each feature (batch, tokens, width) of a video of `grid` = (frames, height, width) tokens."""
        frames, height, width = grid

        def scores(head: Head, feature: Tensor) -> Tensor:
            return head(rearrange(feature.float(), "b (f h w) c -> (b f) c h w", f=frames, h=height, w=width))

        each = zip(self.heads, features, strict=True)
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return [checkpoint(scores, head, feature, use_reentrant=False) for head, feature in each]
        return [scores(head, feature) for head, feature in each]


def make_discriminator(backbone: Backbone, config: TrainingConfig) -> Discriminator:
    """A discriminator for the backbone's features. The seed determines its initial weights."""
    width = backbone.module.get_submodule(backbone.family.text_module).out_features
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return Discriminator(
            len(backbone.feature_blocks()), width, config.discriminator_width, config.gradient_checkpointing
        )


def discriminator_size(backbone: Backbone, config: TrainingConfig) -> int:
    """Size of the run's discriminator in bytes; 0 without one."""
    if not config.adversarial:
        return 0
    with torch.device("meta"):
        return total(make_discriminator(backbone, config).parameters())
