"""Run the host's sampler and note where it passes: the reference's way, and a model's estimates on it and on its own."""

from collections.abc import Callable, Sequence
from typing import Any

import comfy.samplers
import torch
from torch import Tensor

from ....dcm_core.evaluation.measures import euler_state
from ..sampling.run import run

# Told after every model call.
Tick = Callable[[], None]


def estimates_at(latents: Sequence[Tensor]) -> Any:
    """A SAMPLER that asks the model at latents of its own choice, one for each step, and samples nothing.

    The callback gets the denoised estimate of each.
    """

    def sample(model: Any, x: Tensor, sigmas: Tensor, extra_args: dict, callback: Any, disable: bool) -> Tensor:
        for step, latent in enumerate(latents):
            latent = latent.to(x)
            denoised = model(latent, sigmas[step] * x.new_ones(len(x)), **extra_args)
            callback({"i": step, "x": latent, "denoised": denoised})
        return x

    return comfy.samplers.KSAMPLER(sample)


def reference_way(
    guider: Any, latent: dict, sigmas: Tensor, wanted: Sequence[float], seed: int, tick: Tick
) -> tuple[list[Tensor], dict]:
    """Sample the reference by Euler steps.

    Args:
        sigmas: its own noise levels, from the first one of `wanted` or above it, to 0.
        wanted: falling noise levels; the last is 0.

    Returns:
        Its latents at the wanted levels as the model sees them, on the CPU, and the sampled latent for a VAE.
    """
    levels = sigmas.tolist()
    way: list[Tensor] = []

    def note(step: int, denoised: Tensor, x: Tensor, steps: int) -> None:
        start, end = levels[step], levels[step + 1]
        # the last step reaches 0, and each step the levels above its end
        while len(way) < len(wanted) and (wanted[len(way)] > end or end == 0):
            way.append(euler_state(x, denoised, start, wanted[len(way)]).float().cpu())
        tick()

    result, _ = run(guider, latent, comfy.samplers.sampler_object("euler"), sigmas, seed, None, note)
    return way, result


def model_way(guider: Any, latent: dict, sigmas: Tensor, seed: int, tick: Tick) -> tuple[list[Tensor], dict]:
    """Sample a model by Euler steps. Returns the denoised estimate of each step on the CPU, and the latent for a VAE."""
    estimates: list[Tensor] = []
    result, _ = run(
        guider, latent, comfy.samplers.sampler_object("euler"), sigmas, seed, None, _keeping(estimates, tick)
    )
    return estimates, result


def estimates_on(
    guider: Any, latent: dict, way: Sequence[Tensor], sigmas: Tensor, seed: int, tick: Tick
) -> list[Tensor]:
    """The denoised estimates of a model at the latents of a way, one for each step of `sigmas`, on the CPU."""
    estimates: list[Tensor] = []
    run(guider, latent, estimates_at(way[: len(sigmas) - 1]), sigmas, seed, None, _keeping(estimates, tick))
    return estimates


def _keeping(estimates: list[Tensor], tick: Tick) -> Callable[..., None]:
    def note(step: int, denoised: Tensor, x: Tensor, steps: int) -> None:
        # a copy: samplers may reuse the tensor
        estimates.append(denoised.float().to("cpu", copy=True))
        tick()

    return note


def frames_of(vae: Any, samples: Tensor) -> Tensor:
    """The decoded frames of one latent (1, channels, frames, height, width): (3, frames, height, width) from -1 to 1."""
    frames = vae.decode(samples)
    frames = frames.reshape(-1, *frames.shape[-3:])
    return torch.movedim(frames[..., :3].float().cpu() * 2 - 1, -1, 0).clamp(-1, 1)
