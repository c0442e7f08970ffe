"""DCMCompare in the host: what it asks the models, what it finds of models that are known, and what it refuses."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ..compare import calls_of

SHIPPED = Path(__file__).parents[3] / "small_world" / "models"
COND, OTHER, WIDE = (
    [[torch.randn(1, 5, width, generator=torch.Generator().manual_seed(seed)), {}]]
    for seed, width in ((4, 4096), (5, 4096), (6, 768))
)
DEFAULTS = {
    "positive": COND,
    "seed": 3,
    "seeds": 2,
    "schedule": "even",
    "steps": 4,
    "cfg": 1.0,
    "reference_steps": 8,
    "reference_cfg": 1.0,
    "shift": 3.0,
}


@pytest.fixture(scope="module")
def base(wan):
    return wan(seed=1, layers=1)


@pytest.fixture(scope="module")
def other(wan):
    return wan(seed=2, layers=1)


@pytest.fixture(scope="module")
def routed(module, base, random_expert):
    attach = module("nodes.host.experts.attach").attach_experts
    semantic, detail = (random_expert(base, role, seed) for seed, role in enumerate(("semantic", "detail")))
    return attach(base, semantic, detail, boundary=0.8, stacked=False)


@pytest.fixture(scope="module")
def compare(module):
    return module("nodes.host.evaluation.compare")


def latent(rows=1):
    return {"samples": torch.zeros(rows, 16, 3, 6, 8)}


@pytest.fixture(scope="module")
def run(node):
    return lambda model, **inputs: node(
        "DCMCompare", **{"model": model, "latent_image": latent(), **DEFAULTS, **inputs}
    )


def data(output):
    return json.loads(output.result[1])


@pytest.fixture
def calls(base, other):
    """(which model, rows) of every call of a transformer."""
    with calls_of(base=base, other=other) as seen:
        yield seen


def test_a_model_beside_itself_has_no_distance(run, base):
    found = data(run(base, steps=8, seeds=3))
    assert [step["own"]["value"] for step in found["steps"]] == pytest.approx([0] * 8, abs=1e-4)
    assert [step["distance"]["value"] for step in found["steps"]] == pytest.approx([0] * 8, abs=1e-4)
    for measure in found["measures"]:
        assert measure["value"]["value"] == pytest.approx(float(measure["kind"] == "ratio"), abs=1e-3), measure
    assert all(entry["value"]["value"] == pytest.approx(0, abs=1e-5) for entry in found["sets"])
    assert found["videos"] == 3 and not found["decoded"]


def test_few_steps_of_the_same_model_are_off(run, base):
    found = data(run(base))
    assert all(step["own"]["value"] > 1e-3 for step in found["steps"])
    assert all(step["owner"] == "base" and step["plain"] is None is step["factor"] for step in found["steps"])


def test_steps_have_their_owners_and_what_runs_beside_the_boundary(run, routed):
    found = data(run(routed))
    levels = found["settings"]["sigmas"]
    owners = ["semantic" if level >= 0.8 else "detail" for level in levels[:-1]]
    assert [step["owner"] for step in found["steps"]] == owners and set(owners) == {"semantic", "detail"}
    first = owners.index("detail")
    beside = {number: step["other"][0] for number, step in enumerate(found["steps"]) if step["other"]}
    assert beside == {first - 1: "detail", first: "semantic"}
    assert all(step["plain"]["value"] > 0 and step["factor"] for step in found["steps"])


def test_the_steps_of_an_expert_table_have_their_rows(module, run, base, random_expert):
    table, span = module("nodes.host.experts.table"), module("dcm_core.table").Span
    rows = [
        table.ChosenRow(name, span("steps", first, last), (table.ChosenExpert((1.0,), trained=random_expert(base)),))
        for name, first, last in (("high", 1, 1), ("low", 3, 4))
    ]
    found = data(run(table.attach_table(base, rows)))
    assert [step["owner"] for step in found["steps"]] == ["high", "base", "low", "low"]
    assert all(not step["other"] for step in found["steps"])


def test_the_calls_are_those_that_are_needed(run, routed, calls):
    """8 of the reference, 4 each of the plain model, the model on the reference's way and on its own, 2 beside the boundary."""
    run(routed, latent_image=latent(2))
    assert calls == [("base", 2)] * 2 * (8 + 3 * 4 + 2)
    calls.clear()
    run(routed, positive_2=OTHER, seeds=1, negative=OTHER, reference_cfg=2.0)
    assert sum(rows for _, rows in calls) == 2 * (2 * 8 + 3 * 4 + 2)


def test_another_model_can_be_the_reference_and_runs_first(run, base, other, calls):
    found = data(run(base, reference_model=other, steps=8))
    assert calls == [("other", 1)] * 2 * 8 + [("base", 1)] * 2 * 2 * 8
    assert found["steps"][0]["own"]["value"] > 0.01


def test_the_reference_shares_the_model_s_weights(compare, routed):
    reference = compare.reference_of(routed, None, 1.0, 8, 3.0)
    assert reference.model.model is routed.model and not reference.model.get_additional_models()


def test_the_model_is_unchanged(run, routed, base):
    before = {name: value.clone() for name, value in base.model.diffusion_model.state_dict().items()}
    run(routed)
    after = base.model.diffusion_model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert not any("forward" in part.__dict__ for part in base.model.diffusion_model.modules())


def test_a_way_is_the_sampler_s(compare, module, base):
    """At its own levels it has the sampler's latents; between them those of shorter Euler steps; at 0 the video."""
    way = module("nodes.host.evaluation.way")
    sigmas = torch.tensor([1.0, 0.8, 0.5, 0.0])
    guider = module("nodes.host.sampling.run").make_guider(base, COND, None, 1.0)
    seen, ticks = [], []

    def note(step, denoised, x, steps):
        seen.append((x.clone(), denoised.clone()))

    module("nodes.host.sampling.run").run(guider, latent(), None, sigmas, 7, None, note)
    found, result = way.reference_way(
        guider, latent(), sigmas, [1.0, 0.9, 0.8, 0.5, 0.3, 0.0], 7, lambda: ticks.append(1)
    )
    assert len(ticks) == 3
    for index, step in ((0, 0), (2, 1), (3, 2)):
        assert torch.equal(found[index], seen[step][0])
    torch.testing.assert_close(found[1], torch.lerp(seen[0][0], seen[1][0], 0.5))
    assert torch.equal(found[5], seen[2][1])
    torch.testing.assert_close(base.model.process_latent_in(result["samples"]), found[5], rtol=1e-5, atol=1e-5)


def test_an_estimate_on_the_way_is_the_model_s_at_that_latent(module, base):
    """The estimates on a model's own way are those of its sampling."""
    way, make_guider = module("nodes.host.evaluation.way"), module("nodes.host.sampling.run").make_guider
    sigmas, guider = torch.tensor([1.0, 0.7, 0.4, 0.0]), make_guider(base, COND, None, 1.0)
    latents, _ = way.reference_way(guider, latent(), sigmas, sigmas.tolist(), 7, int)
    ran, _ = way.model_way(guider, latent(), sigmas, 7, int)
    asked = way.estimates_on(guider, latent(), latents, sigmas, 7, int)
    for first, second in zip(ran, asked, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-4)


def test_every_video_has_its_own_seed_which_is_the_sampler_s(node, compare, module, base):
    task = compare.Task([COND, OTHER], None, latent(), seed=5, seeds=2)
    assert [(number, seed) for number, _, seed in task.each()] == [(0, 5), (1, 6), (2, 7), (3, 8)]
    assert [positive is OTHER for _, positive, _ in task.each()] == [False, False, True, True]
    sampled = node(
        "DCMSampler",
        model=base,
        positive=COND,
        latent_image=latent(),
        seed=6,
        schedule="even",
        steps=4,
        cfg=1.0,
        denoise=1.0,
        shift=3.0,
    ).result[0]["samples"]
    candidate, _ = compare.with_schedule(base, "even", 4, 3.0, 1.0)
    guider = module("nodes.host.sampling.run").make_guider(candidate.model, COND, None, 1.0)
    _, result = module("nodes.host.evaluation.way").model_way(guider, latent(), candidate.sigmas, 6, int)
    assert torch.equal(result["samples"], sampled)


def test_the_bar_counts_every_call_and_the_log_says_how_far_it_is(run, routed, every_update, caplog):
    import comfy.utils

    seen, before = [], comfy.utils.PROGRESS_BAR_HOOK
    comfy.utils.set_progress_bar_global_hook(lambda value, total, *_, **__: seen.append((value, total)))
    try:
        with caplog.at_level(logging.INFO):
            run(routed)
    finally:
        comfy.utils.set_progress_bar_global_hook(before)
    calls = 2 * (8 + 3 * 4 + 2)
    assert seen == [(done, calls) for done in range(1, calls + 1)]
    assert sum("model calls" in line for line in caplog.messages) == 10


def test_it_can_be_interrupted(run, base, calls):
    import comfy.model_management as management

    hook = base.model.diffusion_model.register_forward_hook(
        lambda *_: management.interrupt_current_processing() if len(calls) == 3 else None
    )
    try:
        with pytest.raises(management.InterruptProcessingException):
            run(base)
    finally:
        hook.remove()
        management.interrupt_current_processing(False)
    assert len(calls) == 3


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"reference_cfg": 2.0}, "cfg is 2, but no negative is connected"),
        ({"positive_3": WIDE}, "positive has text embeddings of width 768"),
        ({"latent_image": {"samples": torch.ones(1, 4, 3, 6, 8)}}, "latent_image has shape"),
        ({"start_image": torch.zeros(1, 8, 8, 3)}, "start_image is connected, but no vae"),
        ({"vae": SimpleNamespace(latent_channels=48)}, "vae decodes latents of 48 channels, but the model's have 16"),
        ({"seeds": 0}, "seeds is 0"),
        ({"seeds": 1001}, "seeds is 1001"),
        ({"seed": -1}, "seed is -1"),
        ({"shift": float("nan")}, "shift is nan"),
        ({"reference_steps": 0}, "steps is 0"),
        ({"schedule": "nothing"}, "schedule is 'nothing'"),
    ],
)
def test_bad_input_is_refused_before_any_call(run, base, calls, inputs, message):
    with pytest.raises(ValueError, match=message):
        run(base, **{"latent_image": {"samples": torch.ones(1, 16, 3, 6, 8)}, **inputs})
    assert calls == []


def test_a_reference_of_other_latents_is_refused(compare, base):
    class Other:
        latent_channels = 48

    model = SimpleNamespace(get_model_object=lambda name: Other())
    with pytest.raises(ValueError, match=r"different latents \(Wan21 and Other\)"):
        compare.reference_of(base, model, 1.0, 8, 3.0)


def test_sigmas_that_end_above_0_are_refused(compare, base):
    with pytest.raises(ValueError, match=r"The last sigma is 0\.5; expected 0"):
        compare.make_candidate(base, torch.tensor([1.0, 0.5]), 1.0)


def test_a_video_of_no_numbers_is_refused(run, base):
    broken = base.clone()
    broken.set_model_sampler_post_cfg_function(lambda args: args["denoised"] * torch.nan)
    with pytest.raises(ValueError, match="The video of the model has NaN or infinite values"):
        run(broken, reference_model=base)


@pytest.fixture(scope="module")
def vae(pack):
    import comfy.sd
    from safetensors.torch import load_file

    return comfy.sd.VAE(sd=load_file(SHIPPED / "vae" / "zz_dcm_small_world_vae.safetensors"))


def test_with_a_vae_frames_are_compared(run, base, vae):
    output = run(base, vae=vae, start_image=torch.rand(1, 100, 64, 3), seeds=2)
    found = data(output)
    assert found["decoded"] and [entry["name"] for entry in found["measures"]] == [
        "motion",
        "sharpness",
        "contrast",
        "saturation",
        "flicker",
        "contrast drift",
        "saturation drift",
        "first-frame fidelity",
    ]
    plot, shown = output.result[0], output.ui
    assert plot.shape[0] == 1 and plot.shape[-1] == 3 and 0 <= plot.min() < plot.max() <= 1
    assert "measured on decoded frames" in shown["text"][0] and len(shown["images"]) == 1
    assert all(finding in shown["text"][0] for finding in found["findings"])


def test_decoded_frames_are_those_of_the_host(module, vae):
    samples = torch.randn(1, 16, 3, 6, 8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        frames = module("nodes.host.evaluation.way").frames_of(vae, samples)
        expected = vae.decode(samples)[0].permute(3, 0, 1, 2) * 2 - 1
    assert torch.equal(frames, expected.cpu()) and frames.shape == (3, 9, 48, 64)


def test_a_start_image_is_cut_and_scaled_as_the_model_saw_it(compare):
    image = torch.zeros(1, 20, 40, 3)
    image[:, :, 10:30] = 1
    assert torch.equal(compare.start_frame(image, 10, 10), torch.ones(3, 10, 10))
