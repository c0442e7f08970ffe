"""Two full models in one trajectory: exact, loaded only when needed, clean afterwards."""

from types import SimpleNamespace

import pytest
import torch

from ..compare import by_sigma, relative

SIGMAS = [1.0, 0.96, 0.9, 0.8, 0.6, 0.3, 0.0]
BOUNDARY = 0.875
SAMPLERS = ["euler", "heun", "dpmpp_2m", "uni_pc", "res_multistep", "euler_ancestral", "dpm_2"]


@pytest.fixture(scope="module")
def switch(module):
    return module("nodes.host.sampling.switch")


@pytest.fixture(scope="module")
def high(wan):
    return wan(seed=1)


@pytest.fixture(scope="module")
def low(wan):
    return wan(seed=2)


def pair(switch, high, low, **kwargs):
    return switch.with_sides(high, switch.two_sides(BOUNDARY, low, **kwargs))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_equals_reference(switch, high, low, sample, sampler):
    assert (
        relative(
            sample(pair(switch, high, low), SIGMAS, sampler), sample(by_sigma(high, low, BOUNDARY), SIGMAS, sampler)
        )
        < 1e-6
    )


@pytest.mark.parametrize("batch", [1, 2])
def test_batch_mask_and_image(switch, high, low, sample, batch):
    mask = torch.zeros(1, 1, 2, 6, 8)
    mask[..., 4:] = 1
    latent = torch.randn(batch, 16, 2, 6, 8, generator=torch.Generator().manual_seed(0))
    kwargs = {"mask": mask, "latent": latent, "cfg": 2.0}
    out = sample(pair(switch, high, low), SIGMAS[2:], **kwargs)
    assert relative(out, sample(by_sigma(high, low, BOUNDARY), SIGMAS[2:], **kwargs)) < 1e-6
    torch.testing.assert_close(out[..., :4], latent[..., :4], rtol=1e-4, atol=1e-4)


def test_second_model_is_loaded_at_the_switch_by_the_host(switch, high, low, sample, monkeypatch):
    import comfy.model_management as management

    events = []
    load = management.load_models_gpu

    def record(models, *args, **kwargs):
        events.append(
            ["high" if m.model is high.model else "low" for m in models if m.model in (high.model, low.model)]
        )
        return load(models, *args, **kwargs)

    monkeypatch.setattr(management, "load_models_gpu", record)
    sample(pair(switch, high, low), SIGMAS, callback=lambda step, *_: events.append(step))
    assert events == [["high"], 0, 1, 2, ["low"], 3, 4, 5]


def test_cfg_of_each_side(switch, high, low, sample):
    both = sample(pair(switch, high, low, detail_cfg=1.0), SIGMAS, cfg=4.0)
    states = {}
    sample(
        pair(switch, high, low), SIGMAS, cfg=4.0, callback=lambda i, denoised, x, total: states.setdefault(i, x.clone())
    )
    first = {}
    sample(
        pair(switch, high, low, detail_cfg=1.0),
        SIGMAS,
        cfg=4.0,
        callback=lambda i, d, x, t: first.setdefault(i, x.clone()),
    )
    assert all(torch.equal(first[i], states[i]) for i in range(4)), "the high side has its own cfg"
    x = states[3] * 1.0
    with torch.inference_mode():
        for i in range(3, 6):
            denoised = denoise_once(low, x, SIGMAS[i])
            x = x + (SIGMAS[i + 1] - SIGMAS[i]) * (x - denoised) / SIGMAS[i]
    assert relative(both, low.model.process_latent_out(x)) < 1e-5, "the low side runs at cfg 1"


def denoise_once(model, x, sigma):
    import comfy.samplers

    generator = torch.Generator().manual_seed(11)
    positive = [[torch.randn(1, 6, 4096, generator=generator), {}]]
    seen = []

    def one(denoise, state, sigmas, extra_args=None, callback=None, disable=None):
        seen.append(denoise(x.to(state.device), sigmas[:1].expand(len(x)), **extra_args))
        return state

    guider = comfy.samplers.CFGGuider(model)
    guider.inner_set_conds({"positive": positive})
    guider.sample(x, torch.zeros_like(x), comfy.samplers.KSAMPLER(one), torch.tensor([sigma, 0.0]), seed=0)
    return seen[0]


def test_one_sided_schedules(switch, high, low, sample):
    assert torch.equal(sample(pair(switch, high, low), SIGMAS[:3]), sample(high, SIGMAS[:3]))
    assert relative(sample(pair(switch, high, low), SIGMAS[3:]), sample(low, SIGMAS[3:])) < 1e-6


@pytest.mark.parametrize("step", [1, 4])
def test_exceptions_leave_everything_as_it_was(switch, high, low, sample, step):
    import comfy.model_management as management

    plain = sample(high, SIGMAS)
    whole = sample(pair(switch, high, low), SIGMAS)

    def fail(index, *_):
        if index == step:
            management.interrupt_current_processing(True)

    with pytest.raises(management.InterruptProcessingException):
        sample(pair(switch, high, low), SIGMAS, callback=fail)
    assert torch.equal(sample(high, SIGMAS), plain)
    assert torch.equal(sample(pair(switch, high, low), SIGMAS), whole)
    assert high.model.current_patcher is None or high.model.current_patcher.model is high.model


def test_experts_on_both_models(switch, module, high, low, wan, random_expert, sample):
    attach = module("nodes.host.experts.attach")
    first, second = random_expert(high, seed=1), random_expert(low, seed=2)
    a, b = (
        attach.attach_experts(high, detail=first, boundary=0.95),
        attach.attach_experts(low, detail=second, boundary=0.5),
    )
    out = sample(pair(switch, a, b), SIGMAS)
    assert relative(out, sample(pair(switch, high, low), SIGMAS)) > 1e-3
    head = sample(pair(switch, a, b), SIGMAS[:3])
    assert torch.equal(head, sample(a, SIGMAS[:3]))


def test_sampler_that_raises_sigma_goes_back(switch, high, low, sample):
    import comfy.samplers

    def there_and_back(denoise, x, sigmas, extra_args=None, callback=None, disable=None):
        for sigma in (0.96, 0.5, 0.96, 0.5):
            x = denoise(x, torch.tensor([sigma], device=x.device).expand(len(x)), **extra_args)
        return x

    name = comfy.samplers.KSAMPLER(there_and_back)
    outs = []
    for model in (pair(switch, high, low), by_sigma(high, low, BOUNDARY)):
        guider = comfy.samplers.CFGGuider(model)
        guider.inner_set_conds({"positive": [[torch.ones(1, 4, 4096), {}]]})
        with torch.inference_mode():
            outs.append(
                guider.sample(
                    torch.randn(1, 16, 1, 4, 4, generator=torch.Generator().manual_seed(0)),
                    torch.zeros(1, 16, 1, 4, 4),
                    name,
                    torch.tensor(SIGMAS),
                    seed=0,
                )
            )
    assert relative(*outs) < 1e-6


def test_models_of_two_devices_are_refused(switch, high, low):
    elsewhere = low.clone()
    elsewhere.load_device = torch.device("meta")
    refused = f"model runs on {high.load_device} and detail_model on meta, but both must run on the same device"
    with pytest.raises(ValueError, match=refused):
        switch.with_sides(high, switch.two_sides(BOUNDARY, elsewhere))


def test_models_that_do_not_fit(switch, module, high, releases):
    hunyuan, _ = module("nodes.host.experts.load").load_model(releases["hy_tiny"], "default")
    with pytest.raises(ValueError, match="cannot share one trajectory: their latent format is Wan21 and HunyuanVideo"):
        pair(switch, high, hunyuan)
    with pytest.raises(ValueError, match="detail_model already switches to a model of its own"):
        pair(switch, high, pair(switch, high, high))
    with pytest.raises(ValueError, match=r"boundary is 1\.5"):
        switch.with_sides(high, switch.two_sides(1.5, high))


def test_hooks_on_models_whose_weights_are_streamed(switch, high, low):
    """Newer hosts' patchers for that refuse hooks, and give another for it; here one that does as they do."""
    import comfy.hooks
    import comfy.model_patcher
    import comfy.samplers

    class Streaming(comfy.model_patcher.ModelPatcher):
        def is_dynamic(self):
            return True

        def patch_hook_weight_to_device(self, *_):
            raise RuntimeError("Hooks not implemented")

        def get_non_dynamic_delegate(self):
            delegate = self.clone()
            delegate.__class__ = comfy.model_patcher.ModelPatcher
            return delegate

    key = "diffusion_model.blocks.0.self_attn.q.weight"
    weight = dict(low.model.named_parameters())[key]
    hook = comfy.hooks.WeightHook(strength_model=1.0)
    hook.weights, hook.need_weight_init = {key: ("diff", (torch.ones_like(weight),))}, False
    hooks = comfy.hooks.HookGroup()
    hooks.add(hook)
    control = SimpleNamespace(get_extra_hooks=lambda: [hooks])
    assert switch.has_hooks({"positive": [{}], "negative": [{"control": control}]}) and not switch.has_hooks(
        {"positive": [{}]}
    )
    streaming = low.clone()
    streaming.__class__ = Streaming

    def out(detail, conditioning):
        # the newer guider gives the first model's patcher the same treatment
        guider = comfy.samplers.CFGGuider(pair(switch, high, detail))
        guider.inner_set_conds({"positive": conditioning})
        noise = torch.randn(1, 16, 1, 4, 4, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            return guider.sample(
                noise, torch.zeros_like(noise), comfy.samplers.sampler_object("euler"), torch.tensor(SIGMAS), seed=0
            )

    hooked, plain = [[torch.ones(1, 4, 4096), {"hooks": hooks}]], [[torch.ones(1, 4, 4096), {}]]
    found = out(streaming, hooked)
    assert torch.equal(found, out(low, hooked)) and relative(found, out(low, plain)) > 1e-4
    assert type(streaming) is Streaming and not streaming.hook_patches_backup
