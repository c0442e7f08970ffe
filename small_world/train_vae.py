"""Train the small world's VAE: Wan 2.1's architecture, narrow.

    COMFYUI_PATH=... python small_world/train_vae.py <output folder>

First on single frames (cheap, many), then on clips. Its latents have the mean and spread that the host takes away from a
Wan 2.1 latent, so that the transformer sees unit ones.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import host  # noqa: F401

# isort: split
import torch
import torch.nn.functional as F
from comfy.latent_formats import Wan21
from comfy.ldm.wan.vae import AttentionBlock, ResidualBlock, WanVAE
from torch import Tensor, nn
from world import clips, draw_scene, render

from dcm_core.files.writing import write_tensors

WIDTH = 8
NOISE, DECAY = 0.15, 0.99


@dataclass(frozen=True)
class Stage:
    """A part of the training: on `batch` pieces of `frames` frames of `size` by `size` pixels."""

    name: str
    steps: int
    batch: int
    frames: int
    size: int
    learning_rate: float
    loss: Callable[[Tensor, Tensor], Tensor]


def make_vae() -> WanVAE:
    """The architecture that the host's loader recognises, with torch's own initial weights."""
    vae = WanVAE(
        dim=WIDTH,
        z_dim=16,
        dim_mult=[1, 2, 4, 4],
        num_res_blocks=2,
        attn_scales=[],
        temperal_downsample=[False, True, True],
        dropout=0.0,
    )
    for module in vae.modules():
        if isinstance(module, (nn.Conv2d, nn.Conv3d)):
            pass_on_and_mix(module.weight)
            nn.init.zeros_(module.bias)
        if isinstance(module, ResidualBlock):
            nn.init.zeros_(module.residual[-1].weight)
        if isinstance(module, AttentionBlock):
            nn.init.zeros_(module.proj.weight)
        if isinstance(module, nn.Conv3d):
            # a quarter faster on a CPU
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last_3d)
    return vae


def pass_on_and_mix(weight: Tensor) -> None:
    """Every channel is passed on and a third of a random mixture is added, all from the newest frame (what a single frame
    taught serves a clip as it is); the frame doubler passes on to both its frames."""
    doubles = weight.shape[0] == 2 * weight.shape[1] and weight.shape[2:] == (3, 1, 1)
    newest = weight[:, :, -1] if weight.ndim == 5 else weight
    mixture = nn.init.kaiming_normal_(torch.empty_like(newest), nonlinearity="linear")
    nn.init.zeros_(weight)
    newest.data.copy_(nn.init.dirac_(torch.empty_like(newest), groups=2 if doubles else 1) + 0.3 * mixture)


def crops(stage: Stage, generator: torch.Generator) -> Tensor:
    """Random pieces of random clips, (batch, 3, frames, size, size)."""
    pieces = []
    for _ in range(stage.batch):
        video = render(draw_scene(generator))
        start, top, left = (
            int(torch.randint(whole - part + 1, (), generator=generator))
            for whole, part in zip(video.shape[1:], (stage.frames, stage.size, stage.size), strict=True)
        )
        pieces.append(video[:, start : start + stage.frames, top : top + stage.size, left : left + stage.size])
    return torch.stack(pieces)


def edges(video: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Differences between neighbours in time, height and width."""
    return video.diff(dim=2), video.diff(dim=3), video.diff(dim=4)


def sharp_loss(decoded: Tensor, video: Tensor) -> Tensor:
    """MSE of the pixels and of their differences, with some L1 for the last bit."""
    both = list(zip((decoded, *edges(decoded)), (video, *edges(video)), strict=True))
    return sum(F.mse_loss(a, b) for a, b in both) + 0.2 * sum(F.l1_loss(a, b) for a, b in both)


@torch.no_grad()
def give_latents_the_host_s_scale(vae: WanVAE, seed: int) -> None:
    """Fold mean and spread of the latents into the 1x1x1 convolutions on both sides of them; nothing else changes."""
    latents = torch.cat([vae.encode(render(scene)[None]) for scene in clips(96, seed)])
    mean, std = latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4))
    wanted = Wan21()
    wanted_mean, wanted_std = wanted.latents_mean.flatten(), wanted.latents_std.flatten()
    scale = wanted_std / std
    vae.conv1.weight[:16] *= scale.view(-1, 1, 1, 1, 1)
    vae.conv1.bias[:16] = (vae.conv1.bias[:16] - mean) * scale + wanted_mean
    weight = vae.conv2.weight.flatten(1)
    vae.conv2.bias += weight @ (mean - wanted_mean / scale)
    vae.conv2.weight /= scale.view(1, -1, 1, 1, 1)


STAGES = (
    Stage("frames", 1200, 16, 1, 32, 2e-3, F.mse_loss),
    Stage("clips", 500, 8, 5, 32, 2e-3, F.mse_loss),
    Stage("long clips", 400, 4, 9, 48, 1.5e-3, sharp_loss),
)


def train(seed: int) -> WanVAE:
    torch.manual_seed(seed)
    vae = make_vae()
    average = torch.optim.swa_utils.AveragedModel(vae, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(DECAY))
    generator = torch.Generator().manual_seed(seed)
    for stage in STAGES:
        optimizer = torch.optim.AdamW(vae.parameters(), lr=stage.learning_rate, betas=(0.9, 0.99), weight_decay=0)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, stage.learning_rate, total_steps=stage.steps, pct_start=0.05
        )
        started, mean = time.monotonic(), 0.0
        for step in range(1, stage.steps + 1):
            video = crops(stage, generator)
            latent = vae.encode(video)
            noisy = latent + NOISE * latent.detach().std() * torch.randn(latent.shape, generator=generator)
            decoded = vae.decode(noisy)
            loss = stage.loss(decoded, video) + 1e-4 * latent.square().mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            average.update_parameters(vae)
            mean += (F.l1_loss(decoded, video).item() - mean) * max(0.02, 1 / step)
            if step % 50 == 0:
                print(
                    f"vae {stage.name} step {step} mean L1 {mean:.4f}, {time.monotonic() - started:.0f} s", flush=True
                )
    trained = average.module
    give_latents_the_host_s_scale(trained, seed + 1)
    return trained


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    vae = train(args.seed)
    tensors = {name: tensor.detach().contiguous() for name, tensor in vae.state_dict().items()}
    args.output.mkdir(parents=True, exist_ok=True)
    write_tensors(args.output / "vae.safetensors", tensors, {})


if __name__ == "__main__":
    main()
