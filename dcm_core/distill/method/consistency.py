"""One consistency step: the student's prediction of a phase's end, and its target (paper, section 3.1).

x_k    = sigma_k noise + (1 - sigma_k) x0
pred   = x_k + (sigma_end - sigma_k) student(x_k)
x_prev = x_k + (sigma_prev - sigma_k) teacher(x_k)          with classifier-free guidance
target = x_prev + (sigma_end - sigma_prev) target_network(x_prev)
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..backbone import Text
from .phases import Phases

Network = Callable[[Tensor, Tensor, Text], Tensor]


@dataclass(frozen=True)
class Batch:
    """The data of one step.

    Attributes:
        x0: clean latents in the transformer's scaling, (batch, channels, frames, height, width).
        text, no_text: the captions, and the negative prompt for classifier-free guidance.
        noise: like x0.
        index: solver points (batch,).
        level: solver points of the adversarial noise (batch,), whose `Phases.previous` is used.
        level_noise: the noise added there, like x0.
        clips: their indices in the dataset.
    """

    x0: Tensor
    text: Text
    no_text: Text
    noise: Tensor
    index: Tensor
    level: Tensor | None = None
    level_noise: Tensor | None = None
    clips: tuple[int, ...] = ()


@dataclass(frozen=True)
class Networks:
    """The three networks as velocity functions."""

    student: Network
    teacher: Network
    target: Network


def per_video(value: Tensor, like: Tensor) -> Tensor:
    """(batch,) -> (batch, 1, 1, 1, 1)."""
    return value.to(like).view(-1, *[1] * (like.ndim - 1))


def add_noise(x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """sigma noise + (1 - sigma) x0, with sigma (batch,)."""
    level = per_video(sigma, x0)
    return level * noise + (1 - level) * x0


def euler(x: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """x + (sigma_next - sigma) velocity, with the sigmas (batch,)."""
    return x + per_video(sigma_next - sigma, x) * velocity


def guided(teacher: Network, x: Tensor, sigma: Tensor, batch: Batch, cfg: float) -> Tensor:
    """v_cond + cfg (v_cond - v_uncond). With cfg 0 the teacher is called once."""
    cond = teacher(x, sigma, batch.text)
    return cond if cfg == 0 else cond + cfg * (cond - teacher(x, sigma, batch.no_text))


def predict(networks: Networks, batch: Batch, phases: Phases, cfg: float) -> tuple[Tensor, Tensor]:
    """(pred, target) at the ends of the batch's phases, both like x0. Only pred has a gradient."""
    sigma, previous, end = (
        values.to(batch.x0.device)
        for values in (phases.sigmas[batch.index], phases.previous[batch.index], phases.ends(batch.index))
    )
    x = add_noise(batch.x0, batch.noise, sigma)
    pred = euler(x, networks.student(x, sigma, batch.text), sigma, end)
    with torch.no_grad():
        x_previous = euler(x, guided(networks.teacher, x, sigma, batch, cfg), sigma, previous)
        target = euler(x_previous, networks.target(x_previous, previous, batch.text), previous, end)
    return pred, target
