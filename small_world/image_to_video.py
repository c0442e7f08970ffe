"""Train the small world as image to video, and measure how well the first frame is kept. Nothing of it is shipped.

    COMFYUI_PATH=... python small_world/image_to_video.py <folder> [--base-steps 2000] [--steps 1000]

The shipped base gets input channels for an image and is trained further by flow matching, on clips with their first frames. Two experts
are then distilled from it. What is in the folder is kept.
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from host import pack

# isort: split
import comfy.samplers
import comfy.sd
import torch
import torch.nn.functional as F
from distill import BOUNDARY, DETAIL, SEMANTIC, SHIFT
from ship import MODELS
from torch import Tensor
from train_base import BATCH, NO_CAPTION
from train_base import SHIFT as TRAINING_SHIFT
from world import LATENT, clips, embed, render

dataset, tensor_file = pack("dcm_core.distill.data.dataset"), pack("dcm_core.files.tensor_file")
schedule, writing = pack("dcm_core.schedule"), pack("dcm_core.files.writing")
attach, sampling = pack("nodes.host.experts.attach"), pack("nodes.host.sampling.run")
image, training = pack("nodes.host.training.image"), pack("nodes.host.training.run")
gradient_attention = pack("nodes.host.training.base").gradient_attention

CLIPS, HELD_OUT = 384, 24
MASK = 4  # channels of the mask before those of the image
LEARNING_RATE = 5e-4


def shipped(kind: str, name: str) -> dict[str, Tensor]:
    """The tensors of a shipped file."""
    return tensor_file.TensorFile(MODELS / kind / f"zz_dcm_small_world_{name}.safetensors").read_all()


def load(weights: dict[str, Tensor]) -> Any:
    """A MODEL in float32."""
    return comfy.sd.load_diffusion_model_state_dict(dict(weights), model_options={"dtype": torch.float32})


def widened(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights with input channels for a mask and an image, which have no effect yet."""
    patches = weights["patch_embedding.weight"]
    more = patches.new_zeros(len(patches), MASK + LATENT[0], *patches.shape[2:])
    return weights | {"patch_embedding.weight": torch.cat([patches, more], 1)}


def make_data(vae: Any, count: int, seed: int) -> tuple[Any, Tensor]:
    """Clips with their first frames as images, and these frames (count, height, width, 3) from 0 to 1."""
    encode, latents, images, first, texts = image.image_encoder(image.FIRST, vae), [], [], [], []
    for scene in clips(count, seed):
        pixels = (render(scene).permute(1, 2, 3, 0) + 1) / 2
        with torch.inference_mode():
            latents.append(vae.encode(pixels)[0].clone())
        images.append(encode(pixels))
        first.append(pixels[0])
        texts.append([[embed(scene.caption)[None].float(), {}]])
    no_text = [[torch.zeros_like(texts[0][0][0]), {}]]
    return dataset.TensorDataset(latents, texts, range(count), no_text, images), torch.stack(first)


def train_base(model: Any, data: Any, steps: int, seed: int) -> None:
    """Train the MODEL's own weights by flow matching with images."""
    transformer, inputs = model.model.diffusion_model, image.image_inputs(model)
    shown = [data.latent(index)[None].clone().float() for index in range(len(data))]
    x0 = torch.cat([model.model.process_latent_in(latent) for latent in shown])
    concat = torch.cat([inputs(data.image(index), latent)[0] for index, latent in enumerate(shown)])
    context = torch.cat([data.conditioning(index)[0][0] for index in range(len(data))])
    optimizer = torch.optim.AdamW(transformer.requires_grad_(True).parameters(), betas=(0.9, 0.99), weight_decay=0.01)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    generator, started, mean = torch.Generator().manual_seed(seed), time.monotonic(), 0.0
    for step in range(1, steps + 1):
        chosen = torch.randint(len(x0), (BATCH,), generator=generator)
        sigma = schedule.shift_sigma(torch.rand(BATCH, generator=generator), TRAINING_SHIFT)
        noise = torch.randn((BATCH, *LATENT), generator=generator)
        words = context[chosen] * (torch.rand(BATCH, generator=generator) >= NO_CAPTION).view(-1, 1, 1)
        x = torch.cat([torch.lerp(x0[chosen], noise, sigma.view(-1, 1, 1, 1, 1)), concat[chosen]], 1)
        options = {"optimized_attention_override": gradient_attention}
        velocity = transformer(x, schedule.TIMESTEPS * sigma, words, transformer_options=options)
        loss = F.mse_loss(velocity, noise - x0[chosen])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(transformer.parameters(), 1.0)
        optimizer.step()
        rates.step()
        mean += (loss.item() - mean) * max(0.02, 1 / step)
        if step % 50 == 0:
            print(f"base step {step} loss {mean:.4f}, {time.monotonic() - started:.0f} s", flush=True)
    transformer.requires_grad_(False)


def load_base(folder: Path, data: Any, steps: int, seed: int) -> Any:
    """The image-to-video base, trained if it is not in the folder."""
    path = folder / "image_base.safetensors"
    if not path.exists():
        model = load(widened(shipped("diffusion_models", "base")))
        train_base(model, data, steps, seed)
        weights = {name: value.detach() for name, value in model.model.diffusion_model.state_dict().items()}
        writing.write_tensors(path, weights, {})
    return load(tensor_file.TensorFile(path).read_all())


@torch.inference_mode()
def first_frames(vae: Any, model: Any, data: Any, steps: int, with_image: bool = True) -> Tensor:
    """The first frame of a sample for each clip, (clips, height, width, 3)."""
    sigmas, sampler = schedule.generic_sigmas(steps, SHIFT), comfy.samplers.sampler_object("euler")
    found = []
    for index in range(len(data)):
        entries = image.host_values(data.image(index)) if with_image else {}
        guider = sampling.make_guider(model, [[data.conditioning(index)[0][0], entries]], None, 1.0)
        noise = torch.randn((1, *LATENT), generator=torch.Generator().manual_seed(index))
        latent = guider.sample(noise, torch.zeros_like(noise), sampler, sigmas, disable_pbar=True)
        found.append(vae.decode(latent)[0, 0])
    return torch.stack(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--base-steps", type=int, default=2000, help="of the base (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=1000, help="of each expert (default: %(default)s)")
    parser.add_argument("--clips", type=int, default=CLIPS, help="to train on (default: %(default)s)")
    parser.add_argument("--held-out", type=int, default=HELD_OUT, help="clips to measure with (default: %(default)s)")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    vae = comfy.sd.VAE(sd=shipped("vae", "vae"))
    data, _ = make_data(vae, args.clips, seed=0)
    held_out, given = make_data(vae, args.held_out, seed=1)
    base, experts = load_base(args.folder, data, args.base_steps, seed=0), []
    for config in (SEMANTIC, DETAIL):
        semantic = experts[0] if experts else None
        config = replace(config, steps=args.steps)
        result = training.train_expert(base, data, config, args.folder / f"image_{config.side}", semantic=semantic)
        experts.append(result.expert)
        print(f"{config.side} expert: {result.seconds:.0f} s", flush=True)
    text_base, pair = (
        load(shipped("diffusion_models", "base")),
        attach.attach_experts(base, *experts, boundary=BOUNDARY),
    )
    with torch.inference_mode():
        rebuilt = torch.stack([vae.decode(held_out.latent(index)[None])[0, 0] for index in range(len(held_out))])
    rows = {
        "the VAE alone": rebuilt,
        "text-to-video base, 50 steps": first_frames(vae, text_base, held_out, 50, with_image=False),
        "image-to-video base, 50 steps": first_frames(vae, base, held_out, 50),
        "image-to-video base, 6 steps": first_frames(vae, base, held_out, 6),
        "experts, 6 steps": first_frames(vae, pair, held_out, 6),
    }
    print(f"RMS between the first frame and the image, of {len(held_out)} held-out clips:")
    for name, found in rows.items():
        print(f"  {name}: {(found - given).square().mean().sqrt():.4f}")


if __name__ == "__main__":
    main()
