"""The losses of both stages (paper, sections 3.3 and 3.4). Each is a mean over all elements."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

HUBER_C = 1e-3
# Distance of the frames that the temporal coherence loss compares.
TEMPORAL_OFFSET = 3


def pseudo_huber(prediction: Tensor, target: Tensor, c: float = HUBER_C) -> Tensor:
    """mean( sqrt((prediction - target)^2 + c^2) - c )."""
    return ((prediction.float() - target.float()).square().add(c * c).sqrt() - c).mean()


def temporal_coherence(prediction: Tensor, target: Tensor, offset: int = TEMPORAL_OFFSET) -> Tensor:
    """MSE of the differences between latent frames `offset` apart; 0 for videos that are too short.

    Args:
        prediction, target: (batch, channels, frames, height, width).
    """
    if prediction.shape[2] <= offset:
        return prediction.new_zeros(())

    def motion(video: Tensor) -> Tensor:
        return video[:, :, offset:].float() - video[:, :, :-offset].float()

    return F.mse_loss(motion(prediction), motion(target))


def generator_hinge(fake: Sequence[Tensor]) -> Tensor:
    """mean over heads of relu(1 - D(fake)): the student's loss."""
    return torch.stack([F.relu(1 - score.float()).mean() for score in fake]).mean()


def discriminator_hinge(real: Sequence[Tensor], fake: Sequence[Tensor]) -> Tensor:
    """mean over heads of relu(1 + D(fake)) + relu(1 - D(real)): the discriminator's loss."""
    terms = [F.relu(1 + b.float()).mean() + F.relu(1 - a.float()).mean() for a, b in zip(real, fake, strict=True)]
    return torch.stack(terms).mean()


def feature_matching(fake: Sequence[Tensor], real: Sequence[Tensor]) -> Tensor:
    """Mean over features of their MSE. The real features get no gradient."""
    return torch.stack([F.mse_loss(a.float(), b.float().detach()) for a, b in zip(fake, real, strict=True)]).mean()
