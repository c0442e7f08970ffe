"""DCMScheduler, DCMSplitSigmas, DCMSchedulePlot, and where a schedule and a boundary come from."""

import dataclasses

import pytest
import torch

from dcm_core.families import HUNYUAN_VIDEO, WAN
from dcm_core.schedule import generic_sigmas

SETTINGS = {"preset": "auto", "steps": 5, "shift": 9.0, "denoise": 1.0}


@pytest.fixture(scope="module")
def sampling(module):
    return module("nodes.host.sampling")


@pytest.fixture(scope="module")
def base(wan):
    return wan(layers=1, width=128)


@pytest.fixture(scope="module")
def hunyuan(module, releases):
    return module("nodes.host.load").load_model(releases["hy_tiny"], "default")[0]


@pytest.fixture(scope="module")
def routed(module, base, random_expert):
    """An expert with a schedule of its own."""
    expert = dataclasses.replace(random_expert(base), boundary=0.7, timesteps=(900.0, 600.0, 300.0))
    return module("nodes.host.attach").attach_experts(base, detail=expert)


@pytest.fixture(scope="module")
def scheduler(node):
    return lambda model, **settings: node("DCMScheduler", model=model, **{**SETTINGS, **settings}).result[0]


@pytest.mark.parametrize("family", [WAN, HUNYUAN_VIDEO], ids=lambda family: family.name)
def test_presets_are_the_releases_whatever_the_model(scheduler, base, family):
    assert torch.equal(scheduler(base, preset=family.preset.title), family.preset.sigmas)


def test_auto_is_the_experts_own_else_the_familys(scheduler, base, routed, hunyuan):
    assert scheduler(routed).tolist() == pytest.approx([0.9, 0.6, 0.3, 0])
    assert torch.equal(scheduler(base), WAN.preset.sigmas)
    assert torch.equal(scheduler(hunyuan), HUNYUAN_VIDEO.preset.sigmas)


def test_auto_of_two_full_models_is_generic(scheduler, module, wan, base):
    switch = module("nodes.host.switch")
    pair = switch.with_sides(base, switch.Sides(0.875, wan(seed=3, layers=1, width=128)))
    assert torch.equal(scheduler(pair), generic_sigmas(5, 9.0))


def test_only_auto_needs_a_model(scheduler):
    assert torch.equal(scheduler(None, preset=WAN.preset.title), WAN.preset.sigmas)
    with pytest.raises(ValueError, match="auto, but no model is connected"):
        scheduler(None)


def test_a_cfg_of_the_detail_side_leaves_the_schedule(scheduler, module, routed, base):
    sampling = module("nodes.host.sampling")
    for model in (base, routed):
        assert torch.equal(scheduler(sampling.prepare_model(model, detail_cfg=2.0)[0]), scheduler(model))


def test_generic_takes_steps_shift_and_denoise(scheduler, base):
    assert torch.equal(scheduler(base, preset="generic"), generic_sigmas(5, 9.0))
    assert torch.equal(scheduler(base, preset="generic", denoise=0.4), generic_sigmas(5, 9.0)[-3:])


def test_a_schedule_routes_the_same_in_the_host_s_own_sampler(node, base, routed, scheduler):
    """SIGMAS of ours are SIGMAS of theirs: SamplerCustomAdvanced with DCMGuider is DCMSampler."""
    from comfy_extras.nodes_custom_sampler import Noise_RandomNoise, SamplerCustomAdvanced

    cond = [[torch.randn(1, 5, 4096, generator=torch.Generator().manual_seed(4)), {}]]
    latent = {"samples": torch.zeros(1, 16, 2, 4, 6)}
    import comfy.samplers

    guider = node("DCMGuider", model=routed, positive=cond, cfg=1.0).result[0]
    with torch.inference_mode():
        theirs = SamplerCustomAdvanced.execute(
            Noise_RandomNoise(9), guider, comfy.samplers.sampler_object("euler"), scheduler(routed), latent
        ).result
    ours = node(
        "DCMSampler", model=routed, positive=cond, latent_image=latent, seed=9, schedule="auto", steps=6, cfg=1.0, denoise=1.0
    ).result
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a["samples"], b["samples"])


@pytest.mark.parametrize(("settings", "message"), [
    ({"preset": "generic", "steps": 51}, "takes 1 .. 50 steps"),
    ({"preset": "generic", "shift": 0.0}, "shift is 0"),
    ({"denoise": 0.0}, "denoise is 0"),
])
def test_scheduler_refuses(scheduler, base, settings, message):
    with pytest.raises(ValueError, match=message):
        scheduler(base, **settings)


def test_boundary_as_given_then_the_experts_then_the_models(sampling, base, routed, hunyuan, wan):
    image = wan(channels=36, layers=1, width=128)
    assert sampling.choose_boundary(routed, 0.5, False) == 0.5
    assert sampling.choose_boundary(routed, 0.0, False) == 0.7
    assert sampling.choose_boundary(routed, 0.0, True) == 0.7
    assert sampling.choose_boundary(base, 0.0, False) == 0.979
    assert [sampling.choose_boundary(model, 0.0, True) for model in (base, image, hunyuan)] == [0.875, 0.9, 0.982]


def test_a_lora_of_any_kind_does_not_move_two_models_boundary(sampling, module, base, wan, random_expert):
    """On one half of Wan 2.2, by DCM Attach Experts: its file says nothing of a boundary."""
    attach = module("nodes.host.attach")
    lora = dataclasses.replace(random_expert(base, "semantic"), boundary=None, timesteps=None)
    half = attach.attach_experts(base, lora)
    assert attach.attached_experts(half).boundary == 0.979
    pair, boundary = sampling.prepare_model(half, detail_model=wan(layers=1, width=128))
    assert boundary == attach.attached_experts(pair).boundary == 0.875
    for own in (attach.attach_experts(base, lora, boundary=0.979), attach.attach_experts(base, dataclasses.replace(lora, boundary=0.979))):
        assert sampling.prepare_model(own, detail_model=wan(layers=1, width=128))[1] == 0.979
    assert sampling.prepare_model(half)[1] == 0.979


def unknown(model):
    """A MODEL of a family that has no experts."""
    clone = model.clone()
    clone.add_object_patch("diffusion_model", torch.nn.Linear(2, 2))
    return clone


def test_other_models_have_to_be_given_a_boundary_for_two_sides(sampling, base):
    assert sampling.choose_boundary(unknown(base), 0.0, False) is None
    for two_sides in ({"detail_model": base}, {"detail_cfg": 2.0}):
        with pytest.raises(ValueError, match="no usual boundary"):
            sampling.prepare_model(unknown(base), **two_sides)


def test_split_is_at_the_boundary_of_the_release(node):
    high, low = node("DCMSplitSigmas", sigmas=WAN.preset.sigmas, boundary=0.979).result
    assert high.tolist() == pytest.approx([1, 0.992, 0.982, 0.949])
    assert low.tolist() == pytest.approx([0.949, 0.905, 0.81, 0])
    with pytest.raises(ValueError, match=r"boundary is 1\.0"):
        node("DCMSplitSigmas", sigmas=WAN.preset.sigmas, boundary=1.0)


def test_plot_takes_the_models_boundary_and_gives_the_picture(node, module, routed):
    plot = module("dcm_core.plot").plot_schedule
    sigmas = generic_sigmas(8)
    shared = {"sigmas": sigmas, "width": 320, "height": 200}
    image = node("DCMSchedulePlot", boundary=0.0, model=routed, **shared).result[0]
    assert torch.equal(image, node("DCMSchedulePlot", boundary=0.7, **shared).result[0])
    assert not torch.equal(image, node("DCMSchedulePlot", boundary=0.9, model=routed, **shared).result[0])
    assert image.shape == (1, 200, 320, 3)
    assert image.dtype == torch.float32
    red, green, blue = (image[0] * 255).round().int().unbind(-1)
    drawn = plot(sigmas, 0.7, 320, 200).getpixel((160, 100))
    assert (red[100, 160], green[100, 160], blue[100, 160]) == drawn
