"""Rebuild the inputs behind the golden numbers in this folder.

A tensor is a function of its name: float32 standard normals of numpy's PCG64 seeded with crc32(name), scaled, rounded
to bfloat16. So the key lists (*.keys.json, key -> shape) are all that has to be kept.
"""

import json
import math
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

FOLDER = Path(__file__).parent


# The Wan 2.1 VAE's statistics, by which the training code normalises its latents.
WAN_MEAN = (
    -0.7571,
    -0.7089,
    -0.9113,
    0.1075,
    -0.1745,
    0.9653,
    -0.1517,
    1.5508,
    0.4134,
    -0.0715,
    0.5517,
    -0.3632,
    -0.1922,
    -0.9497,
    0.2503,
    -0.2921,
)
WAN_STD = (
    2.8184,
    1.4541,
    2.3275,
    2.6558,
    1.2196,
    1.7708,
    2.6052,
    2.0743,
    3.2687,
    2.1526,
    2.8652,
    1.5579,
    1.6382,
    1.1253,
    2.8251,
    1.9160,
)


def training_inputs(case: str, shape: Sequence[int], text_width: int) -> dict[str, Tensor]:
    """Float32 inputs of a case of wan_train: x0, noise (like x0), context, uncond (1, 16, text_width)."""
    mean, std = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in (WAN_MEAN, WAN_STD))
    return {
        "x0": (normals(f"{case}.latents", shape).float() - mean) / std,
        "noise": normals(f"{case}.noise", shape).float(),
        **{name: normals(f"{case}.{name}", (1, 16, text_width), 0.3).float() for name in ("context", "uncond")},
    }


def normals(name: str, shape: Sequence[int], scale: float = 1.0) -> Tensor:
    """The bfloat16 tensor called `name`."""
    generator = np.random.default_rng(zlib.crc32(name.encode()))
    values = generator.standard_normal(tuple(shape), dtype=np.float32) * np.float32(scale)
    return torch.from_numpy(values).to(torch.bfloat16)


def weight(key: str, shape: Sequence[int], name: str | None = None) -> Tensor:
    """A weight of a checkpoint; norm gains lie around 1."""
    name = name or key
    if key.endswith("scale_shift_table"):
        return normals(name, shape, 0.3)
    if len(shape) == 1:
        if "norm" in key and key.endswith(".weight"):
            return (1 + normals(name, shape, 0.1).float()).to(torch.bfloat16)
        return normals(name, shape, 0.05)
    return normals(name, shape, 0.05 if ".lora_B." in key else 0.7 / math.sqrt(math.prod(shape[1:])))


def keys(model: str) -> Mapping[str, Sequence[int]]:
    """Key -> shape of a golden model: wan_tiny, hy_tiny; of wan_train three such tables by part."""
    return json.loads((FOLDER / f"{model}.keys.json").read_text())


def release(model: str) -> dict[str, Tensor]:
    """A whole checkpoint in the release's layout."""
    return {key: weight(key, shape) for key, shape in keys(model).items()}


def discriminator(shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """The discriminator of wan_train, float32; its norm gains lie around 1."""
    tensors = {}
    for key, shape in shapes.items():
        gain = len(shape) == 1 and key.endswith("1.weight")
        scale = 0.7 / math.sqrt(max(1, math.prod(shape[1:]))) if len(shape) > 1 else (0.1 if gain else 0.05)
        tensors[key] = normals("disc." + key, shape, scale).float() + (1 if gain else 0)
    return tensors


def expected(model: str) -> dict[str, Tensor]:
    """The official code's numbers."""
    return load_file(FOLDER / f"{model}.expected.safetensors")


def metadata(model: str) -> dict[str, Any]:
    """How the official code made them: config, timesteps, boundary, and guidance where the model takes it."""
    with safe_open(FOLDER / f"{model}.expected.safetensors", "pt") as file:
        return {key: json.loads(value) for key, value in (file.metadata() or {}).items()}


def conditioning(model: str) -> list[list[Any]]:
    """The golden text as the host passes it; of masked text only the valid tokens."""
    tensors = expected(model)
    context, extras = tensors["context"].float(), {}
    if "mask" in tensors:
        context = context[:, : int(tensors["mask"].sum())]
        extras = {"pooled_output": tensors["pooled"].float(), "guidance": metadata(model)["guidance"]}
    return [[context, extras]]


def _families() -> dict[str, str]:
    names = (path.name.removesuffix(".expected.safetensors") for path in sorted(FOLDER.glob("*.expected.safetensors")))
    return {name: metadata(name)["config"]["arch"] for name in names if "config" in metadata(name)}


# Golden release -> its family.
RELEASES = _families()
