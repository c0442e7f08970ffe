"""Small random models of the real architectures, under the names a shipped workflow asks for.

    python scripts/tiny_models.py <models folder>

Run with the host's Python; COMFYUI_PATH names the host. The video they make is drifting colours: they show that every part
works, not what a trained model looks like.
"""

import math
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [os.environ["COMFYUI_PATH"], *sys.path, str(ROOT)]

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from dcm_core.families import WAN  # noqa: E402
from dcm_core.files.conditioning import save_conditioning  # noqa: E402
from dcm_core.files.writing import write_tensors  # noqa: E402

RELEASE = "diffusion_models/dcm_wan2.1_t2v_1.3B.safetensors"
VAE = "vae/wan_2.1_vae.safetensors"
PROMPT = "dcm_conditioning/prompt.safetensors"

WIDTH, LAYERS, FFN, RANK, TEXT, LATENT = 256, 2, 512, 8, 4096, 16


def wan_shapes(width: int = WIDTH, layers: int = LAYERS, ffn: int = FFN) -> dict[str, tuple[int, ...]]:
    """Key -> shape of the base in diffusers layout."""
    special = {
        "patch_embedding": (width, LATENT, 1, 2, 2),
        "condition_embedder.time_proj": (6 * width, width),
        "condition_embedder.time_embedder.linear_1": (width, 256),
        "condition_embedder.text_embedder.linear_1": (width, TEXT),
        "proj_out": (4 * LATENT, width),
        "ffn.net.0.proj": (ffn, width),
        "ffn.net.2": (width, ffn),
    }
    shapes: dict[str, tuple[int, ...]] = {"scale_shift_table": (1, 2, width)}
    for rule in WAN.DIFFUSERS_TO_NATIVE:
        if rule.optional or rule.source == "scale_shift_table":
            continue
        for index in range(layers) if "{n}" in rule.source else [0]:
            name = rule.source.replace("{n}", str(index))
            shape = next((value for end, value in special.items() if name.endswith(end)), (width, width))
            if name.endswith("scale_shift_table"):
                shapes[name] = (1, 6, width)
            elif "norm" in name:
                shapes |= {f"{name}.{param}": (width,) for param in rule.params}
            else:
                shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes


def random_weight(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """A weight that keeps activations at about unit size."""
    value = torch.randn(shape, generator=generator)
    if "norm" in name and name.endswith("weight"):
        value = 1 + 0.05 * value
    elif len(shape) == 1:
        value = 0.02 * value
    elif name.endswith("scale_shift_table"):
        value = 0.2 * value
    else:
        value = 0.7 * value / math.sqrt(math.prod(shape[1:]))
    return value.to(torch.bfloat16)


def wan_release(seed: int = 0) -> dict[str, Tensor]:
    """A checkpoint with both experts in the release's layout."""
    generator = torch.Generator().manual_seed(seed)
    release = {}
    for name, shape in wan_shapes().items():
        module = name.rpartition(".")[0]
        if WAN.lora_target_pattern.fullmatch(module):
            release[f"{module}.base_layer.{name.rpartition('.')[2]}"] = random_weight(name, shape, generator)
            if name.endswith("weight"):
                release[f"{module}.lora_A.lora1.weight"] = random_weight(name, (RANK, shape[1]), generator)
                release[f"{module}.lora_B.lora1.weight"] = 0.1 * random_weight(name, (shape[0], RANK), generator)
        else:
            release[name] = random_weight(name, shape, generator)
        copied = next((m for m in WAN.detail_modules if name.startswith(f"{m}.")), None)
        if copied:
            release[name.replace(copied, f"{copied}_lora", 1)] = release[name] + 0.1 * random_weight(
                name, shape, generator
            )
    return release


def vae_weight(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """A weight whose convolutions mix channels at random and blur in space and time, so that the video is soft colours."""
    if name.endswith("gamma"):
        return torch.ones(shape)
    if len(shape) == 1:
        return 0.02 * torch.randn(shape, generator=generator)
    weight = torch.randn(*shape[:2], *[1] * (len(shape) - 2), generator=generator) / math.sqrt(shape[1])
    for axis, size in enumerate(shape[2:], start=2):
        if size == 3:
            weight = weight * torch.tensor([0.25, 0.5, 0.25]).view([3 if i == axis else 1 for i in range(len(shape))])
    return weight


def wan_vae(seed: int = 0, width: int = 8) -> dict[str, Tensor]:
    """A VAE of Wan 2.1's architecture, narrow."""
    sys.argv = [sys.argv[0], "--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    from comfy.ldm.wan.vae import WanVAE

    vae = WanVAE(
        dim=width,
        z_dim=LATENT,
        dim_mult=[1, 2, 4, 4],
        num_res_blocks=2,
        attn_scales=[],
        temperal_downsample=[False, True, True],
        dropout=0.0,
    )
    generator = torch.Generator().manual_seed(seed)
    return {name: vae_weight(name, tuple(tensor.shape), generator) for name, tensor in vae.state_dict().items()}


def write(models: Path) -> None:
    """Write all files."""
    makers = {
        RELEASE: lambda path: write_tensors(path, wan_release(), {}),
        VAE: lambda path: write_tensors(path, wan_vae(), {}),
        PROMPT: lambda path: save_conditioning(
            path,
            [[torch.randn(1, 24, TEXT, generator=torch.Generator().manual_seed(1)).bfloat16(), {}]],
            "a random prompt",
        ),
    }
    for name, make in makers.items():
        path = models / name
        path.parent.mkdir(parents=True, exist_ok=True)
        make(path)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    write(Path(sys.argv[1]))
