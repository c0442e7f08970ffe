"""The sampling nodes: plan, seed, progress, masks, and what they refuse."""

import math
import re

import pytest
import torch

from ..compare import relative

COND = [[torch.randn(1, 5, 4096, generator=torch.Generator().manual_seed(4)), {}]]
DEFAULTS = {"seed": 3, "schedule": "auto", "steps": 6, "cfg": 1.0, "denoise": 1.0}


def latent(batch=1, frames=2, channels=16, **extra):
    return {"samples": torch.zeros(batch, channels, frames, 4, 6), **extra}


@pytest.fixture(scope="module")
def base(wan):
    return wan(seed=1)


@pytest.fixture(scope="module")
def routed(module, base, random_expert):
    return module("nodes.host.experts.attach").attach_experts(base, detail=random_expert(base))


@pytest.fixture(scope="module")
def run(node):
    def call(model, **kwargs):
        inputs = {"model": model, "positive": COND, "latent_image": latent(), **DEFAULTS, **kwargs}
        return node("DCMSampler", **inputs)

    return call


def lines(output):
    """The plan and the notes on the schedule; below them stands the time taken."""
    *found, took = output.ui.as_dict()["text"][0].splitlines()
    assert re.fullmatch(r"(1 step|\d+ steps) in \d+\.\d s, \d+\.\d\d s a step", took)
    return found


def text(output):
    return lines(output)[0]


def core_sample(model, sigmas, seed, samples, negative=COND, cfg=1.0, sampler="euler", mask=None):
    import comfy.sample
    import comfy.samplers

    noise = comfy.sample.prepare_noise(samples, seed)
    with torch.inference_mode():
        return comfy.sample.sample_custom(
            model,
            noise,
            cfg,
            comfy.samplers.sampler_object(sampler),
            sigmas,
            COND,
            negative,
            samples,
            noise_mask=mask,
            disable_pbar=True,
            seed=seed,
        )


def test_same_as_the_core_sampler_without_experts(run, base):
    sigmas = torch.tensor([1.0, 0.8, 0.4, 0.0])
    out = run(base, sigmas=sigmas, negative=COND)
    assert torch.equal(out.result[0]["samples"], core_sample(base, sigmas, 3, latent()["samples"]))
    assert text(out) == "3 steps, no experts attached"


def test_same_as_ksampler_on_its_own_sigmas(run, base):
    import comfy.sample
    import comfy.samplers

    samples = latent()["samples"]
    noise = comfy.sample.prepare_noise(samples, 7)
    with torch.inference_mode():
        expected = comfy.sample.sample(
            base, noise, 4, 1.0, "euler", "simple", COND, COND, samples, seed=7, disable_pbar=True
        )
    sigmas = comfy.samplers.calculate_sigmas(base.get_model_object("model_sampling"), "simple", 4)
    assert torch.equal(run(base, sigmas=sigmas, seed=7, negative=COND).result[0]["samples"], expected)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "step 1-3 semantic, 4-6 detail, boundary 0.979"),
        ({"schedule": "HunyuanVideo 4 steps", "boundary": 0.982}, "step 1-2 semantic, 3-4 detail, boundary 0.982"),
        ({"schedule": "generic", "steps": 8}, "step 1-3 semantic, 4-8 detail, boundary 0.979"),
        ({"denoise": 0.5}, "step 1-3 detail, boundary 0.979 (the semantic side has no step)"),
        ({"sigmas": torch.tensor([1.0, 0.5, 0.0]), "boundary": 0.7}, "step 1 semantic, 2 detail, boundary 0.7"),
    ],
)
def test_plan(run, routed, settings, expected):
    assert text(run(routed, **settings)) == expected


@pytest.mark.parametrize(
    ("strengths", "stacked", "expected"),
    [
        ((1.0, 0.0), True, "step 1-6 semantic"),
        ((1.0, 0.0), False, "step 1-3 semantic, 4-6 base, boundary 0.979"),
        ((0.0, 1.0), True, "step 1-3 base, 4-6 detail, boundary 0.979"),
        ((0.0, 0.0), True, "6 steps, experts at strength 0"),
        ((1.0, None), True, "step 1-6 semantic"),
    ],
)
def test_no_expert_is_named_that_does_not_work(run, module, base, random_expert, strengths, stacked, expected):
    experts = {
        side: random_expert(base, side, seed)
        for seed, side in enumerate(("semantic", "detail"))
        if strengths[seed] is not None
    }
    settings = {f"{side}_strength": strengths[side == "detail"] for side in experts}
    model = module("nodes.host.experts.attach").attach_experts(base, **experts, **settings, stacked=stacked)
    plan, *notes = lines(run(model))
    assert plan == expected
    assert bool([note for note in notes if note.startswith("Warning")]) == (strengths == (0.0, 0.0))


def test_a_cfg_of_the_detail_side_is_named(run, base, routed):
    settings = {"negative": COND, "cfg": 3.0, "detail_cfg": 1.0}
    assert text(run(routed, **settings)) == "step 1-3 semantic, 4-6 detail, boundary 0.979, detail cfg 1"
    assert text(run(base, **settings)) == "step 1-3 base, 4-6 base, boundary 0.979, detail cfg 1"


def test_auto_says_what_it_does_not_use_and_that_a_plain_base_needs_more_steps(run, routed, base, wan):
    unused = "auto: steps and shift are not used"
    assert lines(run(routed, steps=20)) == ["step 1-3 semantic, 4-6 detail, boundary 0.979", unused]
    plan, warning, note = lines(run(base, steps=20))
    assert (plan, note) == ("6 steps, no experts attached", unused)
    assert warning.startswith("Warning: no expert is active, and a plain model needs more than 6 steps. Attach experts")
    for settings in ({"schedule": "even"}, {"sigmas": torch.tensor([1.0, 0.5, 0.0])}, {"detail_model": wan(seed=2)}):
        assert len(lines(run(base, steps=3, **settings))) == 1, settings


def ksampler(model, name, scheduler, steps, shift, denoise=1.0, positive=COND, samples=None):
    """The host's KSampler behind ModelSamplingSD3."""
    from comfy_extras.nodes_model_advanced import ModelSamplingSD3

    from nodes import common_ksampler

    shifted = ModelSamplingSD3().patch(model, shift)[0]
    given = {"samples": latent()["samples"] if samples is None else samples}
    with torch.inference_mode():
        return common_ksampler(shifted, 3, steps, 2.0, name, scheduler, positive, COND, given, denoise=denoise)[0][
            "samples"
        ]


@pytest.mark.parametrize("name", ["euler", "uni_pc", "dpm_2", "er_sde", "dpmpp_2m_sde"])
@pytest.mark.parametrize("scheduler", ["simple", "beta"])
def test_a_sampler_and_a_scheduler_by_name_are_ksampler_s(run, base, name, scheduler):
    """Also for samplers that leave out the last but one level, and that read the model's shift."""
    out = run(base, schedule=scheduler, sampler_name=name, steps=5, shift=3.0, cfg=2.0, negative=COND)
    assert torch.equal(out.result[0]["samples"], ksampler(base, name, scheduler, 5, 3.0))
    assert text(out) == "5 steps, no experts attached"


def test_a_prompt_for_a_part_of_the_run_ends_where_it_does_in_ksampler(run, base):
    parts = [
        [COND[0][0], {"start_percent": 0.0, "end_percent": 0.4}],
        [2 * COND[0][0], {"start_percent": 0.4, "end_percent": 1.0}],
    ]
    settings = {"schedule": "simple", "steps": 5, "shift": 3.0, "cfg": 2.0, "negative": COND, "positive": parts}
    assert torch.equal(
        run(base, **settings).result[0]["samples"], ksampler(base, "euler", "simple", 5, 3.0, positive=parts)
    )


@pytest.mark.parametrize("schedule", ["even", "simple"])
def test_denoise_is_ksampler_s(run, base, schedule):
    given = torch.randn(1, 16, 2, 4, 6, generator=torch.Generator().manual_seed(8))
    settings = {
        "latent_image": {"samples": given},
        "steps": 4,
        "shift": 3.0,
        "cfg": 2.0,
        "negative": COND,
        "denoise": 0.5,
    }
    ours = run(base, schedule=schedule, **settings).result[0]["samples"]
    assert relative(ours, ksampler(base, "euler", "simple", 4, 3.0, 0.5, samples=given)) < 1e-5


def test_both_models_are_shifted(run, base, wan):
    """As by ModelSamplingSD3 before each: the first prompt ends in the middle of the detail side."""
    import comfy.samplers
    from comfy_extras.nodes_model_advanced import ModelSamplingSD3

    parts = [
        [COND[0][0], {"start_percent": 0.0, "end_percent": 0.6}],
        [2 * COND[0][0], {"start_percent": 0.6, "end_percent": 1.0}],
    ]
    low = wan(seed=2)
    ours = run(base, detail_model=low, positive=parts, schedule="simple", steps=4, shift=3.0)
    assert text(ours) == "step 1-2 semantic, 3-4 detail, boundary 0.875"
    first, second = (ModelSamplingSD3().patch(model, 3.0)[0] for model in (base, low))
    sigmas = comfy.samplers.calculate_sigmas(first.get_model_object("model_sampling"), "simple", 4)
    theirs = run(first, detail_model=second, positive=parts, sigmas=sigmas)
    assert torch.equal(ours.result[0]["samples"], theirs.result[0]["samples"])


def test_a_connected_sampler_overrides_the_name(run, routed):
    import comfy.samplers

    heun = run(routed, sampler=comfy.samplers.sampler_object("heun"), sampler_name="uni_pc").result[0]["samples"]
    assert torch.equal(heun, run(routed, sampler_name="heun").result[0]["samples"])
    assert not torch.equal(heun, run(routed).result[0]["samples"])


def test_boundary_widget_moves_the_switch(run, routed, base):
    moved = run(routed, boundary=0.5).result[0]["samples"]
    assert not torch.equal(moved, run(routed).result[0]["samples"])
    assert routed.get_attachment("dcm").boundary == 0.979


def test_other_sampler_nodes_route_too(run, routed, base):
    sigmas = torch.tensor([1.0, 0.99, 0.9, 0.5, 0.0])
    ours = run(routed, sigmas=sigmas, negative=COND).result[0]["samples"]
    assert torch.equal(ours, core_sample(routed, sigmas, 3, latent()["samples"]))
    assert not torch.equal(ours, core_sample(base, sigmas, 3, latent()["samples"]))


def test_guider_and_scheduler_equal_the_sampler(node, run, routed):
    sigmas = node("DCMScheduler", model=routed, preset="auto", steps=6, shift=17.0, denoise=1.0).result[0]
    guider = node("DCMGuider", model=routed, positive=COND, cfg=1.0).result[0]
    import comfy.sample
    import comfy.samplers

    samples = latent()["samples"]
    with torch.inference_mode():
        out = guider.sample(
            comfy.sample.prepare_noise(samples, 3),
            samples,
            comfy.samplers.sampler_object("euler"),
            sigmas,
            seed=3,
            disable_pbar=True,
        )
    assert torch.equal(out.cpu(), run(routed).result[0]["samples"])


def test_split_run_is_the_whole_run(node, routed, run):
    """High sigmas, then low sigmas without new noise: the same trajectory in two of the host's sampler nodes."""
    sigmas = node("DCMScheduler", model=routed, preset="auto", steps=6, shift=17.0, denoise=1.0).result[0]
    high, low, *_ = node("DCMSplitSigmas", sigmas=sigmas, boundary=0.979).result
    assert torch.equal(high[-1:], low[:1])
    assert (len(high), len(low)) == (4, 4)
    import comfy.samplers

    guider = node("DCMGuider", model=routed, positive=COND, cfg=1.0).result[0]
    import comfy.sample

    samples = latent()["samples"]
    with torch.inference_mode():
        middle = guider.sample(
            comfy.sample.prepare_noise(samples, 3),
            samples,
            comfy.samplers.sampler_object("euler"),
            high,
            seed=3,
            disable_pbar=True,
        )
        out = guider.sample(
            torch.zeros_like(samples), middle, comfy.samplers.sampler_object("euler"), low, seed=3, disable_pbar=True
        )
    whole = run(routed).result[0]["samples"]
    assert relative(out, whole) < 1e-4


def test_mask_batch_and_extras_are_kept(run, routed):
    mask = torch.zeros(1, 1, 2, 4, 6)
    mask[..., 3:] = 1
    start = torch.randn(2, 16, 2, 4, 6, generator=torch.Generator().manual_seed(8))
    given = {"samples": start, "noise_mask": mask, "batch_index": [5, 6], "note": "kept"}
    out = run(routed, latent_image=given, denoise=0.6).result[0]
    torch.testing.assert_close(out["samples"][..., :3], start[..., :3], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(out["samples"][..., 3:], start[..., 3:])
    assert out["note"] == "kept"
    assert torch.equal(given["samples"], start)
    alone = {"samples": start[1:], "noise_mask": mask, "batch_index": [6]}
    torch.testing.assert_close(
        run(routed, latent_image=alone, denoise=0.6).result[0]["samples"], out["samples"][1:], rtol=1e-4, atol=1e-4
    )


def test_empty_latent_of_a_four_channel_node_is_widened(run, routed):
    assert run(routed, latent_image=latent(channels=4)).result[0]["samples"].shape == (1, 16, 2, 4, 6)


def test_one_progress_bar_runs_across_the_switch(run, base, wan, monkeypatch, every_update):
    import comfy.utils

    seen, bars = [], []
    monkeypatch.setattr(
        comfy.utils, "PROGRESS_BAR_HOOK", lambda value, total, preview, **_: seen.append((value, total))
    )
    original = comfy.utils.ProgressBar.__init__
    monkeypatch.setattr(
        comfy.utils.ProgressBar, "__init__", lambda self, *a, **k: (bars.append(a), original(self, *a, **k))[1]
    )
    run(base, detail_model=wan(seed=2), schedule="generic")
    assert seen == [(step, 6) for step in range(1, 7)]
    assert len(bars) == 1


@pytest.mark.parametrize("schedule", ["auto", "generic", "even", "Wan 2.2 4 steps (lightx2v)"])
def test_two_models_in_the_sampler_node(run, base, wan, module, schedule):
    """Levels that the 4-step LoRA pairs are made for."""
    low = wan(seed=2)
    out = run(base, detail_model=low, schedule=schedule, steps=4, shift=5.0)
    assert text(out) == "step 1-2 semantic, 3-4 detail, boundary 0.875"
    switch = module("nodes.host.sampling.switch")
    sigmas = torch.tensor([1.0, 0.9375, 5 / 6, 0.625, 0.0])
    pair = switch.with_sides(base, switch.two_sides(0.875, low))
    assert torch.equal(out.result[0]["samples"], core_sample(pair, sigmas, 3, latent()["samples"], negative=COND))


def test_the_last_steps_alone_load_the_second_model_alone(run, node, base, wan, monkeypatch):
    import comfy.model_management as management
    import comfy.samplers
    import comfy_extras.nodes_custom_sampler as core

    low, loaded, load = wan(seed=2), [], management.load_models_gpu

    def record(models, *args, **kwargs):
        loaded.extend(patcher.model for patcher in models)
        return load(models, *args, **kwargs)

    monkeypatch.setattr(management, "load_models_gpu", record)
    sigmas = torch.tensor([0.8, 0.4, 0.0])
    out = run(base, detail_model=low, sigmas=sigmas)
    assert text(out) == "step 1-2 detail, boundary 0.875 (the semantic side has no step)"
    guider = node("DCMGuider", model=base, positive=COND, cfg=1.0, detail_model=low).result[0]
    noise = core.Noise_RandomNoise(3)
    with torch.inference_mode():
        core.SamplerCustomAdvanced.execute(noise, guider, comfy.samplers.sampler_object("euler"), sigmas, latent())
    assert loaded == [low.model, low.model]
    assert torch.equal(out.result[0]["samples"], run(low, sigmas=sigmas).result[0]["samples"])


def test_the_boundary_is_the_second_models_too(run, routed):
    """The same model twice, each with experts: one expert owns each step, whichever model runs it."""
    # the second of these steps lies between this boundary and the experts' own
    settings = {"schedule": "generic", "steps": 6, "shift": 17.0, "boundary": 0.99}
    twice = run(routed, detail_model=routed.clone(), **settings)
    assert text(twice) == "step 1 semantic, 2-6 detail, boundary 0.99"
    assert torch.equal(twice.result[0]["samples"], run(routed, **settings).result[0]["samples"])


def test_one_model_connected_twice_is_one(run, base):
    out = run(base, detail_model=base.clone())
    assert text(out) == "6 steps, no experts attached"
    assert torch.equal(out.result[0]["samples"], run(base).result[0]["samples"])


def test_the_same_weights_twice_are_not_wan_2_2(run, base):
    """With a LoRA on one side there are two sides, at the boundary of Wan 2.1."""
    other = base.clone()
    other.add_patches(
        {"diffusion_model.head.head.weight": ("diff", (torch.ones(64, base.model.diffusion_model.dim) / 9,))}
    )
    out = run(base, detail_model=other)
    assert text(out) == "step 1-3 semantic, 4-6 detail, boundary 0.979"
    assert not torch.equal(out.result[0]["samples"], run(base).result[0]["samples"])


def test_a_clone_with_a_copy_of_the_weights_is_the_same_model(module, base, wan):
    """As newer hosts make one for torch.compile."""
    if not hasattr(base, "clone_base_uuid"):
        pytest.skip("clones of this ComfyUI share the weights")
    copied = base.clone(model_override=wan(seed=1).get_clone_model_override())
    assert not base.is_clone(copied)
    assert module("nodes.host.sampling.run").prepare_model(base, detail_model=copied)[1] == 0.979


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cfg": 3.0}, "cfg is 3, but no negative is connected"),
        ({"detail_cfg": 3.0}, "detail_cfg is 3, but no negative is connected"),
        (
            {"positive": [[torch.zeros(1, 5, 768), {}]]},
            "width 768 .* takes 4096. Load the text encoder with type `wan`",
        ),
        ({"latent_image": {"samples": torch.ones(1, 4, 2, 4, 6)}}, "but the model takes 5 dimensions with 16 channels"),
        ({"latent_image": {"samples": torch.ones(1, 16, 8)}}, "but the model takes 5 dimensions"),
        ({"sigmas": torch.tensor([0.5, 0.9, 0.0])}, "expected values that fall from step to step"),
        ({"sigmas": torch.tensor([])}, "have 0 steps"),
        ({"sigmas": torch.tensor([14.6, 3.0, 0.0])}, "expected a flow model's noise levels, between 1 and 0"),
        ({"sigmas": torch.tensor([1.0, float("nan"), 0.0])}, "expected a flow model's noise levels, between 1 and 0"),
        ({"denoise": 0.0}, "denoise is 0.0"),
        ({"schedule": "fast"}, r"schedule is 'fast'; choose one of auto, Wan 2\.1 6 steps"),
        ({"schedule": ["auto"]}, r"schedule is \['auto'\]; choose one of"),
        ({"sampler_name": "eular"}, "sampler_name is 'eular'; choose one of euler, "),
        ({"sampler_name": None}, "sampler_name is None; choose one of"),
        ({"schedule": "even", "steps": 0}, "steps is 0; expected 1 to 1000"),
        ({"schedule": "even", "shift": 0.0}, "shift is 0.0"),
        ({"schedule": "simple", "shift": math.nan}, "shift is nan"),
        ({"schedule": "simple", "denoise": 0.0}, "denoise is 0.0"),
        ({"schedule": "simple", "denoise": 1e-9}, "denoise is 1e-09, which is too small for 6 steps"),
        ({"boundary": 1.0}, "boundary is 1.0"),
        ({"schedule": "generic", "steps": 0}, "steps is 0"),
    ],
)
def test_bad_input_is_refused_before_sampling(run, routed, settings, message, monkeypatch):
    import comfy.samplers

    monkeypatch.setattr(comfy.samplers.CFGGuider, "sample", lambda *_, **__: pytest.fail("sampling began"))
    with pytest.raises(ValueError, match=message):
        run(routed, **settings)


def test_scheduler_without_a_model(node):
    settings = {"steps": 6, "shift": 17.0, "denoise": 1.0}
    sigmas = node("DCMScheduler", preset="HunyuanVideo 4 steps", **settings).result[0]
    assert sigmas.tolist() == pytest.approx([1, 0.992, 0.9818, 0.9124, 0])
    with pytest.raises(ValueError, match="no model is connected"):
        node("DCMScheduler", preset="auto", **settings)


def test_split_refuses_an_empty_side(node):
    for sigmas, side in (([0.9, 0.5, 0.0], "semantic"), ([1.0, 0.99], "detail")):
        with pytest.raises(ValueError, match=f"The {side} .* side has no steps"):
            node("DCMSplitSigmas", sigmas=torch.tensor(sigmas), boundary=0.979)


def test_plot(node, routed):
    sigmas = torch.tensor([1.0, 0.99, 0.5, 0.0])
    image = node("DCMSchedulePlot", sigmas=sigmas, boundary=0.0, width=320, height=200, model=routed).result[0]
    assert image.shape == (1, 200, 320, 3)
    assert 0 <= image.min() < image.max() <= 1
    with pytest.raises(ValueError, match="Set boundary"):
        node("DCMSchedulePlot", sigmas=sigmas, boundary=0.0, width=320, height=200)
