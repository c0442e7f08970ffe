"""The release's sampler: Euler steps along the predicted velocity (paper, section 3.1)."""

from collections.abc import Callable
from itertools import pairwise

from torch import Tensor

from .schedule import TIMESTEPS, check_sigmas

Velocity = Callable[[Tensor, Tensor], Tensor]


def sample_euler(
    model: Velocity, noise: Tensor, sigmas: Tensor, callback: Callable[[int, Tensor], None] | None = None
) -> Tensor:
    """Integrate `x_next = x + (sigma_next - sigma) * velocity` from noise to the last sigma.

    Args:
        model: takes x (batch, channels, frames, height, width) and timesteps (batch,); returns the velocity, like x.
        noise: x at sigmas[0], float32.
        sigmas: falling noise levels, shape (steps + 1,).
        callback: called after each step with its index and the denoised estimate `x - sigma * velocity`.
    """
    x = noise
    check_sigmas(sigmas)
    for step, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        velocity = model(x, (TIMESTEPS * sigma).expand(len(x)))
        if callback is not None:
            callback(step, x - sigma * velocity)
        x = x + (sigma_next - sigma) * velocity
    return x
