"""Experts that were trained on two models: where they may be attached, and with what sampled."""

import dataclasses

import pytest
import torch

from ..small_models import FP8, native_wan

TIMESTEPS = (1000.0, 960.0, 800.0, 500.0)
STRENGTHS = {"semantic_strength": 1.0, "detail_strength": 1.0, "boundary": 0.0}
NO_FILES = {"semantic_lora": "none", "detail_lora": "none"}


@pytest.fixture(scope="module")
def bases(wan):
    return {side: wan(layers=1, seed=seed) for side, seed in (("semantic", 1), ("detail", 2))}


@pytest.fixture(scope="module")
def pair(bases, module):
    halves = module("nodes.host.experts.halves")
    known = {side: halves.model_fingerprint(model) for side, model in bases.items()}
    return module("dcm_core.pair").make_pair(known, 0.875, TIMESTEPS)


@pytest.fixture(scope="module")
def experts(bases, pair, random_expert):
    """side -> an expert of the pair."""
    return {
        side: dataclasses.replace(
            random_expert(model, side, replaced=False),
            boundary=0.875,
            timesteps=TIMESTEPS,
            pair=pair,
            source=f"my_{side}.safetensors",
        )
        for side, model in bases.items()
    }


@pytest.fixture(scope="module")
def attach(module):
    return module("nodes.host.experts.attach").attach_experts


@pytest.fixture(scope="module")
def attached(bases, experts, attach):
    """side -> its model with its expert."""
    return {side: attach(model, **{side: experts[side]}) for side, model in bases.items()}


def sampled(node, model, detail_model=None, **more):
    """What DCM Sampler says."""
    latent, text = {"samples": torch.zeros(1, 16, 2, 4, 6)}, [[torch.zeros(1, 3, 4096), {}]]
    settings = {"seed": 0, "schedule": "auto", "steps": 4, "cfg": 1.0, "denoise": 1.0, **more}
    found = node("DCMSampler", model=model, detail_model=detail_model, positive=text, latent_image=latent, **settings)
    return found.ui.as_dict()["text"][0]


# DCM Attach Experts


@pytest.mark.parametrize("side", ["semantic", "detail"])
def test_an_expert_on_the_other_model_is_refused(side, node, bases, experts):
    other = {"semantic": "detail", "detail": "semantic"}[side]
    names = {"semantic": "high-noise", "detail": "low-noise"}
    error = (
        rf"'my_{side}\.safetensors' is a {side} expert that was trained on the {names[side]} model of two models, but this is the "
        rf"{names[other]} model\. Attach it to the {names[side]} model, and the {other} expert"
    )
    with pytest.raises(ValueError, match=error):
        node("DCMAttachExperts", model=bases[other], **NO_FILES, **STRENGTHS, **{f"{side}_expert": experts[side]})


def test_an_expert_in_a_row_of_the_other_model_is_refused(module, node, bases, experts):
    """Each belongs in the row of its own model; the wrong row is named."""
    table = module("nodes.host.experts.table").attach_table
    values = {"unit": "sigma", "lora": "none", "strength": "1", "cfg": 0.0}

    def rows(first, second):
        high = node("DCMExpert", name="high", start=1.0, end=0.875, expert=experts[first], **values).result[0]
        low = {"name": "low", "start": 0.875, "end": 0.0, "expert": experts[second], "model": bases["detail"]}
        return node("DCMExpert", rows=high, **low, **values).result[0]

    table(bases["semantic"], rows("semantic", "detail"))
    for wrong, message in (
        (rows("detail", "detail"), r"row 'high' .*'my_detail\.safetensors' is a detail expert .* the high-noise model"),
        (rows("semantic", "semantic"), r"row 'low' .*'my_semantic\.safetensors' .* but this is the low-noise model"),
    ):
        with pytest.raises(ValueError, match=message):
            table(bases["semantic"], wrong)


def test_both_experts_on_one_model_are_refused(attach, bases, experts, random_expert):
    error = r"'my_semantic\.safetensors' was trained on the high-noise model .* '(my|another)_detail\.safetensors' cannot be attached"
    plain = dataclasses.replace(random_expert(bases["semantic"], "detail"), source="another_detail.safetensors")
    for detail in (experts["detail"], plain):
        with pytest.raises(ValueError, match=error):
            attach(bases["semantic"], experts["semantic"], detail)


def test_a_model_in_another_precision_is_recognised(attach, experts, pair, module, pack):
    import comfy.sd

    halves = module("nodes.host.experts.halves")
    for dtype in (torch.bfloat16, FP8):
        low = comfy.sd.load_diffusion_model_state_dict(native_wan(2, layers=1), model_options={"dtype": dtype})
        assert halves.model_fingerprint(low) != pair.detail
        attach(low, detail=experts["detail"])
        with pytest.raises(ValueError, match=r"but this is the low-noise model"):
            attach(low, semantic=experts["semantic"])


def test_loras_on_a_model_do_not_hide_it(attach, bases, experts):
    low = bases["detail"].clone()
    low.add_patches({"diffusion_model.blocks.0.self_attn.q.bias": ("diff", (torch.ones(256),))})
    attach(low, detail=experts["detail"])
    with pytest.raises(ValueError, match=r"but this is the low-noise model"):
        attach(low, semantic=experts["semantic"])


def test_another_model_is_warned_about(attach, wan, experts, caplog):
    attach(wan(layers=1, seed=8), semantic=experts["semantic"])
    assert (
        "'my_semantic.safetensors' was trained on a high-noise model of two models, and this model is neither"
        in caplog.text
    )


# DCM Sampler


def test_a_pair_is_sampled_at_its_own_levels(node, attached):
    assert sampled(node, *attached.values()).startswith("step 1-2 semantic, 3-4 detail, boundary 0.875")


def test_models_in_each_other_s_place_are_refused(node, attached, bases):
    error = (
        r"detail_model is the high-noise model of the two that 'my_|model is the low-noise model of the two that 'my_"
    )
    for model, detail_model in (
        (attached["detail"], attached["semantic"]),
        (attached["detail"], bases["semantic"]),
        (bases["detail"], attached["semantic"]),
        (bases["detail"].clone(), attached["detail"]),
        (attached["semantic"], bases["semantic"].clone()),
    ):
        with pytest.raises(ValueError, match=error):
            sampled(node, model, detail_model)


def test_experts_of_other_trainings_are_refused(node, attach, bases, attached, experts, module, pair):
    other = module("dcm_core.pair").make_pair(pair.bases, 0.9, TIMESTEPS)
    detail = dataclasses.replace(experts["detail"], pair=other, boundary=0.9, source="other_detail.safetensors")
    low = attach(bases["detail"], detail=detail)
    error = (
        rf"model \('my_semantic\.safetensors'\) and detail_model \('other_detail\.safetensors'\) do not belong together: .*"
        rf"{pair.id}, that of the second {other.id}.*Choose two files of one training"
    )
    with pytest.raises(ValueError, match=error):
        sampled(node, attached["semantic"], low)
    with pytest.raises(ValueError, match="do not belong together"):
        node(
            "DCMGuider", model=attached["semantic"], detail_model=low, positive=[[torch.zeros(1, 3, 4096), {}]], cfg=1.0
        )


@pytest.mark.parametrize(("side", "missing"), [("semantic", "detail_model"), ("detail", "model")])
def test_a_missing_half_is_said(side, missing, node, attached, bases):
    models = {**bases, side: attached[side]}
    said = sampled(node, *models.values())
    assert f"Warning: 'my_{side}.safetensors' was trained together with a" in said and f"not on {missing}." in said
    if side == "semantic":
        assert "Warning: 'my_semantic.safetensors'" in sampled(node, attached[side])


def test_a_half_can_be_sampled_alone_by_other_nodes(node, attached):
    """With DCM Split Sigmas and a sampler for each half."""
    node("DCMGuider", model=attached["detail"], positive=[[torch.zeros(1, 3, 4096), {}]], cfg=1.0)
