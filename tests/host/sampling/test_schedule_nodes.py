"""DCMScheduler, DCMSplitSigmas, DCMSchedulePlot, and where a schedule and a boundary come from."""

import dataclasses
import re

import pytest
import torch

from dcm_core.families import HUNYUAN_VIDEO, WAN
from dcm_core.routing import plan_steps
from dcm_core.schedule import even_sigmas, generic_sigmas

SETTINGS = {"preset": "auto", "steps": 5, "shift": 9.0, "denoise": 1.0}


@pytest.fixture(scope="module")
def sampling(module):
    return module("nodes.host.sampling.run")


@pytest.fixture(scope="module")
def setup(module):
    return module("nodes.host.sampling.setup")


@pytest.fixture(scope="module")
def base(wan):
    return wan(layers=1, width=128)


@pytest.fixture(scope="module")
def hunyuan(module, releases):
    return module("nodes.host.experts.load").load_model(releases["hy_tiny"], "default")[0]


@pytest.fixture(scope="module")
def routed(module, base, random_expert):
    """An expert with a schedule of its own."""
    expert = dataclasses.replace(random_expert(base), boundary=0.7, timesteps=(900.0, 600.0, 300.0))
    return module("nodes.host.experts.attach").attach_experts(base, detail=expert)


@pytest.fixture(scope="module")
def scheduler(node):
    return lambda model, **settings: node("DCMScheduler", model=model, **{**SETTINGS, **settings}).result[0]


@pytest.fixture(scope="module")
def said(node):
    """What the node shows."""
    return lambda model, **settings: (
        node("DCMScheduler", model=model, **{**SETTINGS, **settings}).ui.as_dict()["text"][0].splitlines()
    )


@pytest.mark.parametrize("family", [WAN, HUNYUAN_VIDEO], ids=lambda family: family.name)
def test_presets_are_the_releases_whatever_the_model(scheduler, base, family):
    assert torch.equal(scheduler(base, preset=family.preset.title), family.preset.sigmas)


def test_auto_is_the_experts_own_else_the_familys(scheduler, base, routed, hunyuan):
    assert scheduler(routed).tolist() == pytest.approx([0.9, 0.6, 0.3, 0])
    assert torch.equal(scheduler(base), WAN.preset.sigmas)
    assert torch.equal(scheduler(hunyuan), HUNYUAN_VIDEO.preset.sigmas)


@pytest.mark.parametrize("preset", ["auto", "generic", "even"])
def test_two_full_models_are_spaced_evenly(scheduler, module, wan, base, routed, preset):
    """As a prepared MODEL, and by the node's detail_model."""
    low = wan(seed=3, layers=1, width=128)
    pair, _ = module("nodes.host.sampling.run").prepare_model(base, detail_model=low)
    for models in ({"model": pair}, {"model": base, "detail_model": low}):
        assert torch.equal(
            scheduler(**models, preset=preset, steps=4, shift=5.0), torch.tensor([1.0, 0.9375, 5 / 6, 0.625, 0.0])
        )


def test_two_full_models_with_dcm_experts_keep_theirs(scheduler, wan, routed):
    low = wan(seed=3, layers=1, width=128)
    assert torch.equal(scheduler(routed, detail_model=low, preset="generic", steps=4), generic_sigmas(4, 9.0))
    assert scheduler(routed, detail_model=low).tolist() == pytest.approx([0.9, 0.6, 0.3, 0])
    assert scheduler(low, detail_model=routed).tolist() == pytest.approx([0.9, 0.6, 0.3, 0])


def test_only_auto_needs_a_model(scheduler):
    assert torch.equal(scheduler(None, preset=WAN.preset.title), WAN.preset.sigmas)
    with pytest.raises(ValueError, match="auto, but no model is connected"):
        scheduler(None)


def test_a_cfg_of_the_detail_side_leaves_the_schedule(scheduler, module, routed, base):
    sampling = module("nodes.host.sampling.run")
    for model in (base, routed):
        assert torch.equal(scheduler(sampling.prepare_model(model, detail_cfg=2.0)[0]), scheduler(model))


@pytest.mark.parametrize("preset", ["generic", "DCM grid"])
def test_the_grid_takes_steps_shift_and_denoise(scheduler, routed, preset):
    """generic is the grid with experts, and where no model tells what is sampled: graphs of earlier versions keep their numbers."""
    for model in (routed, None):
        assert torch.equal(scheduler(model, preset=preset, steps=6), generic_sigmas(6, 9.0))
        assert torch.equal(scheduler(model, preset=preset, denoise=0.4), generic_sigmas(5, 9.0)[-3:])


def test_generic_is_even_on_a_plain_model(scheduler, base):
    assert torch.equal(scheduler(base, preset="generic", steps=6), even_sigmas(6, 9.0))
    assert torch.equal(scheduler(base, preset="generic", denoise=0.4), even_sigmas(5, 9.0, 0.4))


def with_shift(model, shift):
    from comfy_extras.nodes_model_advanced import ModelSamplingSD3

    return ModelSamplingSD3().patch(model, shift)[0]


def ksampler_sigmas(model, scheduler, steps, denoise=1.0, sampler="euler"):
    import comfy.samplers

    return comfy.samplers.KSampler(model, steps, "cpu", sampler=sampler, scheduler=scheduler, denoise=denoise).sigmas


@pytest.fixture(scope="module")
def host_schedulers(pack):
    import comfy.samplers

    return list(comfy.samplers.SCHEDULER_NAMES)


@pytest.mark.parametrize("denoise", [1.0, 0.99, 0.7, 0.5, 0.31])
@pytest.mark.parametrize("steps", [4, 20])
@pytest.mark.parametrize("shift", [3.0, 8.0])
def test_even_is_ksampler_s_simple(scheduler, base, steps, shift, denoise):
    """To the rounding of simple, which picks from 1000 levels."""
    expected = ksampler_sigmas(with_shift(base, shift), "simple", steps, denoise)
    sigmas = scheduler(base, preset="even", steps=steps, shift=shift, denoise=denoise)
    assert len(sigmas) == steps + 1
    torch.testing.assert_close(sigmas, expected, rtol=0, atol=1.1e-3 * shift)


@pytest.mark.parametrize("denoise", [0.5, 0.2, 0.1])
def test_even_and_denoise_are_ksampler_s_where_a_thousand_levels_hold_them(scheduler, base, denoise):
    expected = ksampler_sigmas(with_shift(base, 5.0), "simple", 4, denoise)
    torch.testing.assert_close(
        scheduler(base, preset="even", steps=4, shift=5.0, denoise=denoise), expected, rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("denoise", [1.0, 0.6])
def test_every_scheduler_of_the_host_is_ksampler_s(scheduler, base, routed, hunyuan, host_schedulers, denoise):
    assert len(host_schedulers) >= 9
    for name in host_schedulers:
        for model in (base, routed, hunyuan):
            expected = ksampler_sigmas(with_shift(model, 3.0), name, 8, denoise)
            assert torch.equal(scheduler(model, preset=name, steps=8, shift=3.0, denoise=denoise), expected), name


def test_a_model_without_flow_shift_keeps_its_own_levels(scheduler, said, base):
    import comfy.model_sampling

    class Eps(comfy.model_sampling.ModelSamplingDiscrete, comfy.model_sampling.EPS):
        pass

    other = unknown(base)
    other.add_object_patch("model_sampling", Eps())
    assert torch.equal(scheduler(other, preset="karras", shift=3.0), ksampler_sigmas(other, "karras", 5))
    assert said(other, preset="karras")[1:] == ["This model has no flow shift, so shift is ignored"]
    assert said(base, preset="karras")[1:] == []


def test_the_node_shows_the_levels_and_what_is_not_used(said, routed, base, wan):
    assert said(routed, shift=0.0) == ["timesteps 900, 600, 300, 0", "auto: steps and shift are not used"]
    assert said(None, preset="Wan 2.2 4 steps (lightx2v)") == [
        "timesteps 1000, 937.5, 833.3, 625, 0",
        "Wan 2.2 4 steps (lightx2v): steps and shift are not used",
    ]
    assert (
        said(None, preset="Wan 2.2 8 steps (lightx2v)")[0]
        == "timesteps 1000, 972.2, 937.5, 892.9, 833.3, 750, 625, 416.7, 0"
    )
    assert said(base, preset="even", steps=4, shift=5.0) == ["timesteps 1000, 937.5, 833.3, 625, 0"]
    assert said(base, detail_model=wan(seed=3, layers=1, width=128), steps=4, shift=5.0) == [
        "timesteps 1000, 937.5, 833.3, 625, 0"
    ]
    _, warning, _ = said(base)
    assert re.match(r"Warning: no expert is active, and a plain model needs more than 6 steps", warning)


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
        "DCMSampler",
        model=routed,
        positive=cond,
        latent_image=latent,
        seed=9,
        schedule="auto",
        steps=6,
        cfg=1.0,
        denoise=1.0,
    ).result
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a["samples"], b["samples"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"preset": "DCM grid", "steps": 51}, "takes 1 to 50 steps"),
        ({"preset": "generic", "shift": 0.0}, "shift is 0"),
        ({"preset": "even", "steps": 1001}, "steps is 1001; expected 1 to 1000"),
        ({"denoise": 0.0}, "denoise is 0"),
        ({"preset": "even", "denoise": 0.0}, "denoise is 0"),
        ({"preset": "Karras"}, "preset is 'Karras'; choose one of auto, "),
        ({"preset": {}}, "preset is .*; choose one of auto, "),
    ],
)
def test_scheduler_refuses(scheduler, base, settings, message):
    with pytest.raises(ValueError, match=message):
        scheduler(base, **settings)


def test_the_host_s_schedulers_need_a_model(scheduler):
    with pytest.raises(
        ValueError, match=r"simple is one of ComfyUI's own schedulers, which need a model\. Connect a model"
    ):
        scheduler(None, preset="simple")


def test_boundary_as_given_then_the_experts_then_the_models(setup, base, routed, hunyuan, wan):
    image, low = wan(channels=36, layers=1, width=128), wan(seed=3, layers=1, width=128)
    assert setup.setup_of(routed).boundary_for(0.5) == 0.5
    assert setup.setup_of(routed).boundary_for(0) == 0.7
    assert setup.setup_of(routed, low).boundary_for(0) == setup.setup_of(low, routed).boundary_for(0) == 0.7
    assert setup.setup_of(base).boundary_for(0) == 0.979
    assert [setup.setup_of(model, low).boundary_for(0) for model in (base, image, hunyuan)] == [0.875, 0.9, 0.982]


def test_a_lora_of_any_kind_does_not_move_two_models_boundary(sampling, module, base, wan, random_expert):
    """On one half of Wan 2.2, by DCM Attach Experts: its file says nothing of a boundary."""
    attach = module("nodes.host.experts.attach")
    lora = dataclasses.replace(random_expert(base, "semantic"), boundary=None, timesteps=None)
    half = attach.attach_experts(base, lora)
    assert attach.attached_experts(half).boundary == 0.979
    pair, boundary = sampling.prepare_model(half, detail_model=wan(layers=1, width=128))
    assert boundary == attach.attached_experts(pair).boundary == 0.875
    for own in (
        attach.attach_experts(base, lora, boundary=0.979),
        attach.attach_experts(base, dataclasses.replace(lora, boundary=0.979)),
    ):
        assert sampling.prepare_model(own, detail_model=wan(layers=1, width=128))[1] == 0.979
    assert sampling.prepare_model(half)[1] == 0.979


def unknown(model):
    """A MODEL of a family that has no experts."""
    clone = model.clone()
    clone.add_object_patch("diffusion_model", torch.nn.Linear(2, 2))
    return clone


def test_other_models_have_to_be_given_a_boundary_for_two_sides(sampling, setup, base):
    assert setup.setup_of(unknown(base)).boundary_for(0) is None
    for two_sides in ({"detail_model": base}, {"detail_cfg": 2.0}):
        with pytest.raises(ValueError, match="boundary is 0, but this model has no default boundary"):
            sampling.prepare_model(unknown(base), **two_sides)


def test_split_is_at_the_boundary_of_the_release(node):
    high, low, *unused = node("DCMSplitSigmas", sigmas=WAN.preset.sigmas, boundary=0.979).result
    assert [len(part) for part in unused] == [0, 0, 0]
    assert high.tolist() == pytest.approx([1, 0.992, 0.982, 0.949])
    assert low.tolist() == pytest.approx([0.949, 0.905, 0.81, 0])
    with pytest.raises(ValueError, match=r"boundary is 1\.0"):
        node("DCMSplitSigmas", sigmas=WAN.preset.sigmas, boundary=1.0)
    sigmas = torch.linspace(1, 0, 11)
    parts = node("DCMSplitSigmas", sigmas=sigmas, boundary=0.85, more_boundaries="0.55, 0.25, 0.15").result
    assert [len(part) - 1 for part in parts] == [2, 3, 3, 1, 1]
    with pytest.raises(ValueError, match="more_boundaries has 4 values; expected at most 3"):
        node("DCMSplitSigmas", sigmas=sigmas, boundary=0.85, more_boundaries="0.5 0.4 0.3 0.2")


def test_plot_takes_the_models_boundary_and_gives_the_picture(node, module, routed):
    plot = module("dcm_core.inspection.plot").plot_schedule
    sigmas = generic_sigmas(8)
    shared = {"sigmas": sigmas, "width": 320, "height": 200}
    image = node("DCMSchedulePlot", boundary=0.0, model=routed, **shared).result[0]
    assert torch.equal(image, node("DCMSchedulePlot", boundary=0.7, **shared).result[0])
    assert not torch.equal(image, node("DCMSchedulePlot", boundary=0.9, model=routed, **shared).result[0])
    assert image.shape == (1, 200, 320, 3)
    assert image.dtype == torch.float32
    red, green, blue = (image[0] * 255).round().int().unbind(-1)
    drawn = plot(sigmas, plan_steps(sigmas, 0.7), 320, 200).getpixel((160, 100))
    assert (red[100, 160], green[100, 160], blue[100, 160]) == drawn
