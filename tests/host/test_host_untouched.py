"""The host's own modules and classes stay as they are, but for the length of a training run."""

import sys

import pytest

SIGMAS = [1.0, 0.992, 0.982, 0.949, 0.905, 0.81, 0.0]
HOST_MODULES = {
    "comfy",
    "comfy_api",
    "comfy_extras",
    "comfy_execution",
    "execution",
    "folder_paths",
    "latent_preview",
    "server",
}


def ours():
    """What of the host's modules and classes is the pack's."""
    return {
        f"{path}.{name}"
        for path, module in list(sys.modules.items())
        if path.partition(".")[0] in HOST_MODULES
        for owner in (module, *(v for v in vars(module).values() if isinstance(v, type) and v.__module__ == path))
        for name, value in vars(owner).items()
        if str(getattr(value, "__module__", "")).startswith("dcm_pack")
    }


@pytest.mark.parametrize("stacked", [True, False])
def test_sampling_with_experts_changes_nothing_of_the_host(wan, module, random_expert, sample, stacked):
    model, found = wan(), []
    attach = module("nodes.host.experts.attach").attach_experts
    experts = attach(model, random_expert(model, "semantic", 1), random_expert(model), stacked=stacked)
    model.model.diffusion_model.register_forward_hook(lambda *_: found.append(ours()))
    sample(experts, SIGMAS)
    assert found == 6 * [set()]
    assert ours() == set()


def test_training_puts_back_what_it_changes(model, module):
    with module("nodes.host.training.base").differentiable(model), module("nodes.host.compat").gradients():
        assert ours() >= {"comfy.ops.fp8_linear", "comfy.model_management.get_offload_stream"}
    assert ours() == set()
