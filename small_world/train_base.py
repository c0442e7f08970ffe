"""Train the small world's base: the host's Wan 2.1 transformer, tiny, by plain flow matching.

    COMFYUI_PATH=... python small_world/train_base.py <folder with vae.safetensors>

A base that is there already is kept.
"""

import argparse
import math
import time
from pathlib import Path

from host import pack

# isort: split
import torch
import torch.nn.functional as F
from comfy.latent_formats import Wan21
from comfy.ldm.wan.model import WanModel
from comfy.ldm.wan.vae import WanVAE
from torch import Tensor, nn
from train_vae import make_vae
from world import CAPTIONS, TEXT_WIDTH, clips, embed, render

from dcm_core.files.tensor_file import TensorFile
from dcm_core.files.writing import write_tensors
from dcm_core.schedule import TIMESTEPS, shift_sigma

WIDTH, LAYERS, HEADS = 128, 6, 1
CLIPS, ENCODED_AT_ONCE, BATCH = 3600, 16, 16
STEPS = 10_500
LEARNING_RATE, DECAY, SHIFT, NO_CAPTION = 2e-3, 0.999, 4.0, 0.1


def make_transformer() -> WanModel:
    """The host's class with Wan's own initial weights."""
    model = WanModel(
        dim=WIDTH, ffn_dim=4 * WIDTH, num_heads=HEADS, num_layers=LAYERS, text_dim=TEXT_WIDTH, operations=nn
    )
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    nn.init.xavier_uniform_(model.patch_embedding.weight.flatten(1))
    for layer in (*model.text_embedding, *model.time_embedding):
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=0.02)
    nn.init.zeros_(model.head.head.weight)
    for owner in (*model.blocks, model.head):
        nn.init.normal_(owner.modulation, std=1 / math.sqrt(WIDTH))
    return model


def load_vae(folder: Path) -> WanVAE:
    """The small world's VAE."""
    vae = make_vae()
    file = TensorFile(folder / "vae.safetensors")
    vae.load_state_dict({name: file.read(name) for name in file.shapes})
    return vae


@torch.no_grad()
def encode_clips(folder: Path, count: int, seed: int) -> Tensor:
    """Latents of the training clips as the transformer sees them, (count, 16, frames, height, width); kept in the folder."""
    path = folder / "latents.safetensors"
    if not path.exists():
        vae = load_vae(folder)
        scenes = clips(count, seed)
        parts = [scenes[start : start + ENCODED_AT_ONCE] for start in range(0, count, ENCODED_AT_ONCE)]
        latents = torch.cat(
            [Wan21().process_in(vae.encode(torch.stack([render(scene) for scene in part]))) for part in parts]
        )
        write_tensors(path, {"latents": latents.half()}, {})
    return TensorFile(path).read("latents").float()


def flow_matching_loss(model: WanModel, x0: Tensor, context: Tensor, generator: torch.Generator) -> Tensor:
    """MSE of the velocity `noise - x0` at random noise levels."""
    sigma = shift_sigma(torch.rand(len(x0), generator=generator), SHIFT)
    noise = torch.randn(x0.shape, generator=generator)
    level = sigma.view(-1, 1, 1, 1, 1)
    options = {"optimized_attention_override": pack("nodes.host.training.base").gradient_attention}
    velocity = model(torch.lerp(x0, noise, level), TIMESTEPS * sigma, context, transformer_options=options)
    return F.mse_loss(velocity, noise - x0)


def make_optimizer(model: WanModel) -> torch.optim.Optimizer:
    """AdamW, with a learning rate of its own for what takes in the words.

    Adam moves every weight by about the learning rate, and an output by that times its inputs: the 4096 of a word would throw the
    first layer of the text about until no unit answers to some words, and the base never learns them.
    """
    words = model.text_embedding[0].weight
    rest = [parameter for parameter in model.parameters() if parameter is not words]
    groups = [{"params": rest, "lr": LEARNING_RATE}, {"params": [words], "lr": LEARNING_RATE * WIDTH / TEXT_WIDTH}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.01)


def train(model: WanModel, latents: Tensor, steps: int, seed: int) -> nn.Module:
    """Train it; returns the averaged model."""
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(DECAY))
    optimizer = make_optimizer(model)
    peaks = [group["lr"] for group in optimizer.param_groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peaks, total_steps=steps, pct_start=0.03)
    # all captions have the same number of words; no caption is as many zeros
    texts = torch.stack([embed(text).float() for text in CAPTIONS])
    generator = torch.Generator().manual_seed(seed)
    started, mean = time.monotonic(), 0.0
    for step in range(1, steps + 1):
        chosen = torch.randint(len(latents), (BATCH,), generator=generator)
        keep = torch.rand(BATCH, generator=generator) >= NO_CAPTION
        # clips lie in the order of the captions
        context = texts[chosen % len(texts)] * keep.view(-1, 1, 1)
        loss = flow_matching_loss(model, latents[chosen], context, generator)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average.update_parameters(model)
        mean += (loss.item() - mean) * max(0.005, 1 / step)
        if step % 200 == 0:
            print(f"base step {step} loss {mean:.4f}, {time.monotonic() - started:.0f} s", flush=True)
    return average.module


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    path = args.folder / "base.safetensors"
    if path.exists():
        return
    latents = encode_clips(args.folder, CLIPS, args.seed)
    torch.manual_seed(args.seed)
    trained = train(make_transformer(), latents, STEPS, args.seed)
    write_tensors(path, {name: tensor.detach().bfloat16() for name, tensor in trained.state_dict().items()}, {})


if __name__ == "__main__":
    main()
