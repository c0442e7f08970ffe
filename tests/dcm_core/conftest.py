"""Small files in the release's layout: the golden key lists with every width divided by 32."""

import json
import math
import sys
import time
import zlib
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from dcm_core.convert import convert_release
from dcm_core.families import FAMILIES

GOLDEN = Path(__file__).parents[1] / "golden"
KEY_LISTS = {"wan": "wan_tiny", "hunyuan_video": "hy_tiny"}


def release_shapes(family):
    """Key -> shape of a small release."""
    keys = json.loads((GOLDEN / f"{KEY_LISTS[family.name]}.keys.json").read_text())
    return {key: tuple(size // 32 if size >= 64 else size for size in shape) for key, shape in keys.items()}


def make_release(family, dtype=torch.bfloat16):
    """A small release; a tensor's values depend on its key alone."""
    tensors = {}
    for key, shape in release_shapes(family).items():
        generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
        tensors[key] = (torch.randn(shape, generator=generator) / math.sqrt(shape[-1])).to(dtype)
    return tensors


def without_experts(family, tensors):
    """The semantic base of a release in plain diffusers layout."""
    return {
        key.replace(".base_layer.", "."): tensor
        for key, tensor in tensors.items()
        if ".lora_" not in key and family.detail_source(key) is None
    }


@contextmanager
def limits(seconds=2, megabytes=500):
    """What a reader may take of any file, however mangled: processor time, and growth of the process beyond its largest so far."""
    started, before = time.process_time(), peak_megabytes()
    yield
    assert time.process_time() - started < seconds
    assert peak_megabytes() - before < megabytes


def peak_megabytes():
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


@pytest.fixture(params=FAMILIES.values(), ids=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def release(family):
    return make_release(family)


@pytest.fixture
def base(family, release):
    return without_experts(family, release)


@pytest.fixture
def converted(save, release, tmp_path):
    """The base file and the expert file of the small release."""
    paths = tmp_path / "base.safetensors", tmp_path / "expert.safetensors"
    convert_release(save(release), *paths)
    return paths
