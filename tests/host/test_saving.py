"""A MODEL whose experts a saved file would lack is not saved in silence."""

import pytest
import torch
from safetensors.torch import load_file

from .compare import relative

MESSAGE = r"has DCM experts attached, which ComfyUI's save nodes cannot save.*Save the model from before DCM Attach Experts.*DCM Convert"
SIGMAS = [1.0, 0.9, 0.0]


@pytest.fixture(scope="module")
def attach(module):
    return module("nodes.host.experts.attach")


@pytest.fixture(scope="module")
def save(pack, tmp_path_factory):
    """Save a MODEL as the host's node does; returns the files written."""
    import folder_paths
    from comfy_extras.nodes_model_merging import ModelSave

    folder = tmp_path_factory.mktemp("saved")

    def run(model, name):
        before, folder_paths.output_directory = folder_paths.output_directory, str(folder)
        try:
            with torch.inference_mode():
                ModelSave().save(model, name)
        finally:
            folder_paths.output_directory = before
        return sorted(folder.glob(f"{name}*"))

    return run


def renewed(model):
    return model


def cloned(model):
    return model.clone().clone()


def patched(model):
    clone = model.clone()
    clone.add_patches({"diffusion_model.blocks.0.ffn.0.weight": ("diff", (torch.ones(512, 256),))}, 0.1)
    return clone


@pytest.mark.parametrize("then", [renewed, cloned, patched])
@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("stacked", [False, True])
def test_a_model_with_routed_experts_is_not_saved(attach, wan, random_expert, sample, save, then, sampled, stacked):
    base = wan()
    model = then(attach.attach_experts(base, random_expert(base, "semantic", 1), random_expert(base), stacked=stacked))
    name = f"{then.__name__}{sampled}{stacked}"
    first = sample(model, SIGMAS) if sampled else None
    with pytest.raises(ValueError, match=MESSAGE):
        save(model, name)
    assert save(base, f"{name}_base") and not [path for path in save(base, name) if "_00002_" in path.name]
    if sampled:
        assert torch.equal(sample(model, SIGMAS), first)


def test_what_a_file_can_hold_is_saved(attach, wan, random_expert, save):
    """A semantic expert that is an ordinary LoRA on the base; and a model whose experts were taken off again."""
    base = wan()
    semantic = random_expert(base, "semantic", 1, replaced=False)
    name = "blocks.0.self_attn.q"
    (update,) = semantic.low_rank[name]
    own = base.model.state_dict()[f"diffusion_model.{name}.weight"].clone()
    key = f"model.diffusion_model.{name}.weight"
    (path,) = save(attach.attach_experts(base, semantic), "stacked")
    torch.testing.assert_close(load_file(path)[key], own + update.scale * update.up @ update.down)
    (path,) = save(attach.detach_experts(attach.attach_experts(base, semantic, random_expert(base))), "detached")
    assert torch.equal(load_file(path)[key], own)


def test_a_patcher_that_writes_its_patches_at_every_load_is_sampled(attach, wan, random_expert, sample):
    """As ComfyUI-GGUF's does."""
    base = wan()

    class Writing(type(base)):
        def load(self, *args, force_patch_weights=False, **kwargs):
            super().load(*args, force_patch_weights=True, **kwargs)

    experts = random_expert(base, "semantic", 1, replaced=False), random_expert(base)
    expected = sample(attach.attach_experts(wan(), *experts), SIGMAS)
    base.__class__ = Writing
    assert relative(sample(attach.attach_experts(base, *experts), SIGMAS), expected) < 1e-6
