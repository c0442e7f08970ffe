"""The host's bypass LoRAs beside experts: as its ordinary ones, on layers that an expert replaces, too."""

import pytest
import torch

from ..compare import relative

SIGMAS = [1.0, 0.992, 0.9, 0.5, 0.0]


@pytest.fixture(scope="module")
def attach(module):
    return module("nodes.host.experts.attach")


@pytest.fixture(scope="module")
def loaders(pack):
    """The host's ordinary and its bypass loader."""
    import comfy.sd

    if not hasattr(comfy.sd, "load_bypass_lora_for_models"):
        pytest.skip("this ComfyUI has no bypass LoRAs")
    return comfy.sd.load_lora_for_models, comfy.sd.load_bypass_lora_for_models


def lora(seed, *layers):
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer, rows, columns in layers:
        tensors[f"diffusion_model.{layer}.lora_A.weight"] = torch.randn(4, columns, generator=generator) / columns**0.5
        tensors[f"diffusion_model.{layer}.lora_B.weight"] = torch.randn(rows, 4, generator=generator) / 4
    return tensors


REPLACED = ("head.head", 64, 256)
ROUTED = ("blocks.0.self_attn.q", 256, 256)
OTHER = ("blocks.1.ffn.0", 512, 256)


@pytest.mark.parametrize("layers", [(REPLACED,), (ROUTED,), (REPLACED, ROUTED, OTHER)])
@pytest.mark.parametrize("strength", [1.0, 0.5])
@pytest.mark.parametrize("lora_first", [True, False])
def test_a_bypass_lora_does_what_the_ordinary_one_does(
    loaders, attach, wan, random_expert, sample, layers, strength, lora_first
):
    results = []
    for loader in loaders:
        base = wan()
        model = loader(base, None, lora(2, *layers), 0.8, 0.0)[0] if lora_first else base
        model = attach.attach_experts(model, detail=random_expert(base), detail_strength=strength)
        model = model if lora_first else loader(model, None, lora(2, *layers), 0.8, 0.0)[0]
        results.append(sample(model, SIGMAS))
        plain = sample(attach.attach_experts(base, detail=random_expert(base), detail_strength=strength), SIGMAS)
        assert not [n for n, m in base.model.named_modules() if "forward" in m.__dict__ and m.forward.__self__ is not m]
    ordinary, bypass = results
    assert relative(bypass, ordinary) < 1e-5
    assert relative(bypass, plain) > 1e-3
