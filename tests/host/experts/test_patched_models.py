"""Experts on models that other nodes have patched, in the ways popular packs do it."""

import itertools
import types

import pytest
import torch

from ..compare import relative

SIGMAS = [1.0, 0.992, 0.982, 0.949, 0.905, 0.81, 0.0]
BLOCKS = "diffusion_model.blocks"


@pytest.fixture(scope="module")
def attach(module):
    return module("nodes.host.experts.attach")


@pytest.fixture
def base(wan):
    return wan()


def with_compiled_blocks(model):
    """A clone with its blocks exchanged for compiled ones, as compile nodes did before the host had a wrapper for it."""
    clone = model.clone()
    for index, block in enumerate(model.model.diffusion_model.blocks):
        clone.add_object_patch(f"{BLOCKS}.{index}", torch.compile(block, backend="eager"))
    return clone


@pytest.mark.parametrize("compiled_first", [True, False])
def test_a_stacked_semantic_expert_is_never_lost_in_compiled_blocks(
    attach, base, random_expert, sample, compiled_first
):
    """The host passes over LoRA patches there in silence."""
    semantic = random_expert(base, "semantic", replaced=False)
    if compiled_first:
        model = attach.attach_experts(with_compiled_blocks(base), semantic)
    else:
        model = with_compiled_blocks(attach.attach_experts(base, semantic))
    with pytest.raises(
        ValueError, match=rf"{BLOCKS}\.0, {BLOCKS}\.1 .*semantic expert would have no effect.*TorchCompileModel"
    ):
        sample(model, SIGMAS)


def test_routed_experts_work_in_compiled_blocks(attach, base, random_expert, sample):
    semantic, detail = random_expert(base, "semantic", 1), random_expert(base, "detail", 2)
    plain = sample(attach.attach_experts(base, semantic, detail, stacked=False), SIGMAS)
    compiled = attach.attach_experts(with_compiled_blocks(base), semantic, detail, stacked=False)
    assert relative(sample(compiled, SIGMAS), plain) < 1e-6


def test_experts_are_placed_while_a_compiled_clone_is_loaded(attach, base, wan, random_expert, sample):
    """A run with compiled blocks leaves them in the shared model until another clone is loaded."""
    semantic = random_expert(base, "semantic", replaced=False)
    expected = sample(attach.attach_experts(wan(), semantic), SIGMAS)
    sample(with_compiled_blocks(base), SIGMAS)
    compiled = list(base.model.diffusion_model.blocks)
    assert all("_orig_mod" in block._modules for block in compiled)
    model = attach.attach_experts(base, semantic)
    assert list(base.model.diffusion_model.blocks) == compiled
    assert relative(sample(model, SIGMAS), expected) < 1e-6


def doubled(self, x, context, *args, **kwargs):
    return 2 * type(self).forward(self, x, context, *args, **kwargs)


def with_other_attention(model):
    """A clone whose cross attention is another function over the same layers, as guidance on attention is done."""
    clone = model.clone()
    for index, block in enumerate(model.model.diffusion_model.blocks):
        clone.add_object_patch(f"{BLOCKS}.{index}.cross_attn.forward", types.MethodType(doubled, block.cross_attn))
    return clone


def test_experts_work_inside_an_exchanged_attention(attach, base, random_expert, sample):
    detail = random_expert(base)
    plain = sample(attach.attach_experts(base, detail=detail), SIGMAS)
    before = sample(attach.attach_experts(with_other_attention(base), detail=detail), SIGMAS)
    after = sample(with_other_attention(attach.attach_experts(base, detail=detail)), SIGMAS)
    assert torch.equal(before, after)
    assert relative(before, plain) > 1e-3
    assert relative(before, sample(with_other_attention(base), SIGMAS)) > 1e-3
    assert torch.equal(sample(attach.attach_experts(base, detail=detail), SIGMAS), plain)


def with_easy_cache(model):
    from comfy_extras.nodes_easycache import EasyCacheNode

    return EasyCacheNode.execute(model, reuse_threshold=0.2, start_percent=0.15, end_percent=0.95, verbose=False).args[
        0
    ]


def with_lazy_cache(model):
    from comfy_extras.nodes_easycache import LazyCacheNode

    return LazyCacheNode.execute(model, reuse_threshold=0.2, start_percent=0.15, end_percent=0.95, verbose=False).args[
        0
    ]


def with_threshold_of_tea_cache(model):
    clone = model.clone()
    clone.model_options["transformer_options"]["rel_l1_thresh"] = 0.2
    return clone


def nothing(model):
    return model


@pytest.mark.parametrize("experts_first", [True, False])
@pytest.mark.parametrize("patch", [with_easy_cache, with_lazy_cache, with_threshold_of_tea_cache, nothing])
def test_a_step_cache_is_told_once_in_the_log_and_on_the_node(
    attach, base, random_expert, node, caplog, patch, experts_first
):
    detail = random_expert(base)
    model = (
        patch(attach.attach_experts(base, detail=detail))
        if experts_first
        else attach.attach_experts(patch(base), detail=detail)
    )
    positive = [[torch.zeros(1, 6, 4096), {}]]
    settings = {"seed": 0, "schedule": "auto", "steps": 6, "cfg": 1.0, "denoise": 1.0}
    with caplog.at_level("WARNING"):
        out = node(
            "DCMSampler",
            model=model,
            positive=positive,
            latent_image={"samples": torch.zeros(1, 16, 1, 4, 4)},
            **settings,
        )
    told = [message for message in caplog.messages if "step cache" in message]
    assert len(told) == (patch is not nothing)
    assert ("step cache" in out.ui.as_dict()["text"][0]) == (patch is not nothing)


def test_a_step_cache_without_experts_is_nobodys_business(base, module, sample, caplog):
    with caplog.at_level("WARNING"):
        sample(with_easy_cache(base), SIGMAS)
    assert "step cache" not in caplog.text
    assert module("nodes.host.experts.route").step_cache_note(with_easy_cache(base)) == ""


def two_stages(called):
    """A second-order sampler in float64 that calls the model at each sigma and half way to the next, in the logarithm."""

    @torch.no_grad()
    def run(model, x, sigmas, extra_args=None, callback=None, disable=None):
        x, sigmas = x.double(), sigmas.double()

        def slope(x, sigma):
            called.append(sigma.item())
            denoised = model(x, sigma * x.new_ones([x.shape[0]]), **(extra_args or {}))
            return (x - denoised) / sigma

        for now, following in itertools.pairwise(sigmas):
            middle = (now * following).sqrt() if following > 0 else now / 2
            half = x + (middle - now) * slope(x, now)
            x = x + (following - now) * slope(half, middle)
        return x

    return run


def test_calls_between_the_steps_go_by_their_own_noise_level(attach, base, random_expert):
    """Semantic at 0.982, detail at 0.965 on the way to 0.949: the side is never that of the step."""
    import comfy.sample
    import comfy.samplers

    called, sides = [], []
    routed = attach.attach_experts(base, detail=random_expert(base))
    head = base.model.diffusion_model.head
    hook = head.register_forward_pre_hook(lambda module, inputs: sides.append("forward" in module.head.__dict__))
    latent = torch.zeros(1, 16, 2, 6, 8)
    condition = [[torch.randn(1, 6, 4096, generator=torch.Generator().manual_seed(11)), {}]]
    with torch.inference_mode():
        out = comfy.sample.sample_custom(
            routed,
            comfy.sample.prepare_noise(latent, 3),
            1.0,
            comfy.samplers.KSAMPLER(two_stages(called)),
            torch.tensor(SIGMAS),
            condition,
            condition,
            latent,
            disable_pbar=True,
            seed=3,
        )
    hook.remove()
    assert out.isfinite().all()
    assert len(called) == 12 and 0.95 < called[5] < 0.979 < called[4]
    assert sides == [sigma < 0.979 for sigma in called]


def test_patches_that_change_have_an_identity_of_their_own(attach, base, wan, random_expert, sample):
    """The host loads a model again only if its patches have another identity than those that are loaded."""
    stacked = attach.attach_experts(base, random_expert(base, "semantic"))
    assert attach.detach_experts(stacked).patches_uuid not in (stacked.patches_uuid, base.patches_uuid)

    model, sigmas = attach.attach_experts(base, detail=random_expert(base)), [1.0, 0.9, 0.0]

    def patched(model, strength):
        clone = model.clone()
        clone.add_patches({"diffusion_model.head.head.weight": ("diff", (torch.ones(64, 256),))}, strength)
        return clone

    for strength in (0.08, 0.05):
        clone = patched(model, strength)
        first = sample(clone, sigmas)
        alone = attach.attach_experts(wan(), detail=random_expert(base))
        assert torch.equal(first, sample(patched(alone, strength), sigmas)), "not the patches of the run before"
        (patcher,) = clone.get_additional_models_with_key("dcm")
        known = patcher.patches_uuid
        assert torch.equal(sample(clone, sigmas), first)
        assert patcher.patches_uuid == known, "the same patches are not loaded again"
