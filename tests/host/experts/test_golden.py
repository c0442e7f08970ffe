"""Exact to the official code, through the host's own model classes and samplers."""

import pytest
import torch

from ..compare import relative

RELEASES = {"wan_tiny": "wan", "hy_tiny": "hunyuan_video"}
TOLERANCE = 1e-5


def conditioning(expected):
    """The golden text as the host passes it; of masked text only the valid tokens."""
    context = expected["context"].float()
    if "mask" not in expected:
        return [[context, {}]]
    valid = int(expected["mask"].sum())
    return [[context[:, :valid], {"pooled_output": expected["pooled"], "guidance": 6.0}]]


@pytest.fixture(scope="module", params=RELEASES)
def golden(request, module, releases, recipe):
    """(model with experts in float32, expected tensors, family) of a release, loaded by the pack's own loader."""
    load = module("nodes.host.experts.load")
    load.WEIGHT_DTYPES["float32"] = {"dtype": torch.float32}
    model, _ = load.load_model(releases[request.param], "float32")
    del load.WEIGHT_DTYPES["float32"]
    family = module("dcm_core.families").FAMILIES[RELEASES[request.param]]
    return model, recipe.expected(request.param), family


def velocity(model, x, sigma, cond):
    """The transformer's own output at one noise level, through the host's sampling machinery."""
    import comfy.samplers

    outputs = []
    hook = model.model.diffusion_model.register_forward_hook(lambda module, args, output: outputs.append(output))

    def one_call(denoise, x, sigmas, extra_args=None, callback=None, disable=None):
        denoise(x, sigmas[:1].expand(len(x)), **extra_args)
        return x

    guider = comfy.samplers.CFGGuider(model)
    guider.inner_set_conds({"positive": cond})
    try:
        with torch.inference_mode():
            guider.sample(
                x / sigma, torch.zeros_like(x), comfy.samplers.KSAMPLER(one_call), torch.tensor([sigma, 0.0]), seed=0
            )
    finally:
        hook.remove()
    return outputs[0].float()


def test_velocity_on_each_side_of_the_boundary(golden):
    model, expected, _ = golden
    cond = conditioning(expected)
    probes = {key: float(key.removeprefix("probe.")) for key in expected if key.startswith("probe.")}
    assert len(probes) == 5
    for key, timestep in probes.items():
        assert relative(velocity(model, expected["noise"], timestep / 1000, cond), expected[key]) < TOLERANCE, key


def test_every_step_of_the_schedule(golden):
    model, expected, family = golden
    import comfy.samplers

    noise, starts = expected["noise"], []
    guider = comfy.samplers.CFGGuider(model)
    guider.inner_set_conds({"positive": conditioning(expected)})
    with torch.inference_mode():
        out = guider.sample(
            noise,
            torch.zeros_like(noise),
            comfy.samplers.sampler_object("euler"),
            family.preset.sigmas,
            callback=lambda step, denoised, x, steps: starts.append(x),
            seed=0,
        )
    states = [*starts[1:], model.model.process_latent_in(out)]
    assert len(states) == len(family.preset.timesteps)
    for step, state in enumerate(states):
        assert relative(state, expected[f"latent.{step}"]) < TOLERANCE, step


def test_sampler_node_gives_the_official_video(golden, node, monkeypatch):
    model, expected, family = golden
    import comfy.sample

    noise = expected["noise"]
    monkeypatch.setattr(comfy.sample, "prepare_noise", lambda *_: noise)
    output = node(
        "DCMSampler",
        model=model,
        positive=conditioning(expected),
        latent_image={"samples": torch.zeros_like(noise)},
        seed=0,
        schedule="auto",
        steps=6,
        cfg=1.0,
        denoise=1.0,
    )
    steps = len(family.preset.timesteps)
    latent = model.model.process_latent_in(output.result[0]["samples"])
    assert relative(latent, expected[f"latent.{steps - 1}"]) < TOLERANCE
    half = steps // 2
    assert output.ui.as_dict()["text"][0].startswith(f"step 1-{half} semantic, {half + 1}-{steps} detail, boundary ")


def test_initial_noise_is_the_release_s(golden):
    _, expected, _ = golden
    import comfy.sample

    latent = torch.zeros_like(expected["noise"])
    for seed in (40, 1024):
        generator = torch.Generator().manual_seed(seed)
        assert torch.equal(comfy.sample.prepare_noise(latent, seed), torch.randn(latent.shape, generator=generator))
