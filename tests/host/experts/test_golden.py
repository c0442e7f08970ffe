"""Exact to the official code, through the host's own model classes and samplers."""

import pytest
import torch

from ...golden.recipe import RELEASES
from ..compare import relative

TOLERANCE = 1e-5


@pytest.fixture(scope="module", params=RELEASES)
def golden(request, module, releases, recipe):
    """(model with experts in float32, expected tensors, conditioning, metadata) of a release, loaded by the pack's own loader."""
    load = module("nodes.host.experts.load")
    load.WEIGHT_DTYPES["float32"] = {"dtype": torch.float32}
    model, _ = load.load_model(releases[request.param], "float32")
    del load.WEIGHT_DTYPES["float32"]
    return model, recipe.expected(request.param), recipe.conditioning(request.param), recipe.metadata(request.param)


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
    model, expected, cond, metadata = golden
    probes = {key: float(key.removeprefix("probe.")) for key in expected if key.startswith("probe.")}
    assert min(probes.values()) <= metadata["boundary"] < max(probes.values())
    for key, timestep in probes.items():
        assert relative(velocity(model, expected["noise"], timestep / 1000, cond), expected[key]) < TOLERANCE, key


def test_every_step_of_the_schedule(golden):
    model, expected, cond, metadata = golden
    import comfy.samplers

    noise, starts = expected["noise"], []
    guider = comfy.samplers.CFGGuider(model)
    guider.inner_set_conds({"positive": cond})
    with torch.inference_mode():
        out = guider.sample(
            noise,
            torch.zeros_like(noise),
            comfy.samplers.sampler_object("euler"),
            torch.tensor([*metadata["timesteps"], 0.0]) / 1000,
            callback=lambda step, denoised, x, steps: starts.append(x),
            seed=0,
        )
    states = [*starts[1:], model.model.process_latent_in(out)]
    for step, state in enumerate(states):
        assert relative(state, expected[f"latent.{step}"]) < TOLERANCE, step
    assert len(states) == sum(key.startswith("latent.") for key in expected)


def test_sampler_node_gives_the_official_video(golden, node):
    model, expected, cond, metadata = golden
    timesteps = metadata["timesteps"]
    output = node(
        "DCMSampler",
        model=model,
        positive=cond,
        latent_image={"samples": torch.zeros_like(expected["noise"])},
        seed=metadata["seed"],
        schedule="auto",
        steps=len(timesteps),
        cfg=1.0,
        denoise=1.0,
    )
    latent = model.model.process_latent_in(output.result[0]["samples"])
    assert relative(latent, expected[f"latent.{len(timesteps) - 1}"]) < TOLERANCE
    # the official code compares whole timesteps
    semantic = sum(int(timestep) > metadata["boundary"] for timestep in timesteps)
    text = output.ui.as_dict()["text"][0]
    assert text.startswith(f"step 1-{semantic} semantic, {semantic + 1}-{len(timesteps)} detail, boundary ")


def test_initial_noise_is_the_release_s(golden):
    _, expected, _, metadata = golden
    import comfy.sample

    noise = expected["noise"]
    assert torch.equal(comfy.sample.prepare_noise(torch.zeros_like(noise), metadata["seed"]), noise)
