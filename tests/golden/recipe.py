"""Rebuild the inputs behind the golden numbers in this folder.

A tensor is a function of its name: float32 standard normals of numpy's PCG64 seeded with crc32(name), scaled, rounded
to bfloat16. So the key lists (*.keys.json, key -> shape) are all that has to be kept.
"""

import json
import math
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

FOLDER = Path(__file__).parent


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
    """Key -> shape of a golden model: wan_tiny, hy_tiny, wan_train."""
    return json.loads((FOLDER / f"{model}.keys.json").read_text())


def release(model: str) -> dict[str, Tensor]:
    """A whole checkpoint in the release's layout."""
    return {key: weight(key, shape) for key, shape in keys(model).items()}


def expected(model: str) -> dict[str, Tensor]:
    """The official code's numbers."""
    return load_file(FOLDER / f"{model}.expected.safetensors")
