"""Sample videos of a run by the run itself, where all processes have to run the model together."""

from itertools import pairwise

import torch
from torch import Tensor

from ..routing import is_detail, split_sigmas
from ..schedule import sigmas_from_timesteps
from .backbone import Backbone, Working
from .batches import Batches
from .config import TrainingConfig


@torch.no_grad()
def sample_latents(
    backbone: Backbone,
    batches: Batches,
    config: TrainingConfig,
    all_steps: Working,
    detail_steps: Working,
    of_pair: bool,
) -> list[Tensor]:
    """The sample videos, by Euler steps on the expert's own schedule.

    With two models, only the steps of this one are made. The semantic expert's video is then its last estimate. The detail expert starts
    from a clip with noise.

    Args:
        all_steps, detail_steps: the experts at all steps, and those on the detail side alone.
        of_pair: whether the expert is one of two models'.
    """
    sigmas = sigmas_from_timesteps(config.timesteps(backbone.family))
    if of_pair:
        sigmas = split_sigmas(sigmas, config.boundary)[config.side == "detail"]
    latents = []
    for text, x0 in batches.samples():
        sigmas = sigmas.to(x0)
        noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(config.seed)).to(x0)
        x = sigmas[0] * noise + (1 - sigmas[0]) * x0
        for sigma, after in pairwise(sigmas):
            experts = (*all_steps, *(detail_steps if is_detail(sigma, config.boundary) else ()))
            velocity = backbone.velocity(x, sigma[None], text, experts)
            denoised, x = x - sigma * velocity, x + (after - sigma) * velocity
        latents.append(denoised.cpu())
    return latents
