"""Two full models: what belongs to a side stays on it, and nothing is left behind, whatever goes wrong."""

import copy

import pytest
import torch

from ..compare import by_sigma, relative

SIGMAS = [1.0, 0.96, 0.9, 0.8, 0.6, 0.3, 0.0]
BOUNDARY = 0.875


@pytest.fixture(scope="module")
def switch(module):
    return module("nodes.host.sampling.switch")


@pytest.fixture(scope="module")
def high(wan):
    return wan(seed=1, layers=1)


@pytest.fixture(scope="module")
def low(wan):
    return wan(seed=2, layers=1)


@pytest.fixture
def pair(switch, high, low):
    return switch.with_sides(high, switch.two_sides(BOUNDARY, low))


def visits(sigmas):
    """A sampler that asks for these noise levels in turn."""
    import comfy.samplers

    def walk(denoise, x, _, extra_args=None, callback=None, disable=None):
        for sigma in sigmas:
            x = 0.5 * x + 0.5 * denoise(x, torch.tensor([sigma], device=x.device).expand(len(x)), **extra_args)
        return x

    return comfy.samplers.KSAMPLER(walk)


def guide(model, sampler, cond=None, **extras):
    """Run a sampler object over MODEL."""
    import comfy.samplers

    guider = comfy.samplers.CFGGuider(model)
    guider.inner_set_conds({"positive": [[torch.ones(1, 4, 4096), extras]]})
    noise = torch.randn(1, 16, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return guider.sample(noise, torch.zeros_like(noise), sampler, torch.tensor(SIGMAS), disable_pbar=True, seed=0)


def record_loads(monkeypatch, high, low):
    """Names of the models of each load_models_gpu call, as they come."""
    import comfy.model_management as management

    events, load = [], management.load_models_gpu
    names = {id(high.model): "high", id(low.model): "low"}

    def record(models, *args, **kwargs):
        events.append([names[id(m.model)] for m in models if id(m.model) in names])
        return load(models, *args, **kwargs)

    monkeypatch.setattr(management, "load_models_gpu", record)
    return events


def state(patcher):
    """What the host keeps of a MODEL besides its weights."""
    return {
        "wrappers": copy.copy(patcher.wrappers),
        "callbacks": copy.copy(patcher.callbacks),
        "options": sorted(patcher.model_options),
        "hooks": dict(patcher.hook_patches),
        "backup": patcher.hook_patches_backup,
        "mode": patcher.hook_mode,
        "patches": dict(patcher.patches),
        "attachments": dict(patcher.attachments),
        "current": patcher.model.current_patcher,
    }


@pytest.mark.parametrize(
    "sampler", ["euler_cfg_pp", "dpmpp_2s_ancestral", "dpmpp_2m_sde", "deis", "lcm", "er_sde", "heunpp2"]
)
def test_more_samplers_equal_the_reference(pair, high, low, sample, sampler):
    cfg = 2.0 if "cfg_pp" in sampler else 1.0
    assert (
        relative(
            sample(pair, SIGMAS, sampler, cfg=cfg), sample(by_sigma(high, low, BOUNDARY), SIGMAS, sampler, cfg=cfg)
        )
        < 1e-6
    )


@pytest.mark.parametrize(
    ("sampler", "switches"), [("euler", 1), ("heun", 1), ("dpmpp_2m", 1), ("uni_pc", 1), ("res_multistep", 1)]
)
def test_no_sampler_loads_a_model_twice(pair, high, low, sample, monkeypatch, sampler, switches):
    loads = record_loads(monkeypatch, high, low)
    sample(pair, SIGMAS, sampler)
    assert loads == [["high"], ["low"]][: 1 + switches]


def test_going_back_loads_only_on_a_change_of_side(pair, high, low, monkeypatch):
    loads = record_loads(monkeypatch, high, low)
    out = guide(pair, visits([0.96, 0.9, 0.5, 0.4, 0.96, 0.9, 0.5]))
    assert loads == [["high"], ["low"], ["high"], ["low"]]
    assert relative(out, guide(by_sigma(high, low, BOUNDARY), visits([0.96, 0.9, 0.5, 0.4, 0.96, 0.9, 0.5]))) < 1e-6


@pytest.mark.parametrize("detail_cfg", [None, 1.5])
def test_a_first_model_without_a_step_is_not_loaded(switch, high, low, monkeypatch, detail_cfg):
    import comfy.samplers

    def run(guider, sigmas):
        conds = {"positive": torch.ones(1, 4, 4096), "negative": torch.zeros(1, 4, 4096)}
        guider.inner_set_conds({name: [[cond, {"hooks": lora_hook(low)}]] for name, cond in conds.items()})
        noise = torch.randn(2, 16, 1, 4, 4, generator=torch.Generator().manual_seed(0))
        euler, mask = comfy.samplers.sampler_object("euler"), torch.ones(1, 1, 4, 4)
        mask[..., 2:] = 0
        with torch.inference_mode():
            return guider.sample(
                noise,
                noise.flip(0),
                euler,
                torch.tensor(sigmas),
                denoise_mask=mask,
                callback=seen,
                disable_pbar=True,
                seed=0,
            )

    def seen(step, *_):
        steps.append(step)

    steps = []
    before = [state(high), state(low)]
    plain = comfy.samplers.CFGGuider(low)
    plain.set_cfg(detail_cfg or 3.0)
    guider = switch.SidesGuider(switch.with_sides(high, switch.two_sides(BOUNDARY, low, detail_cfg)))
    guider.set_cfg(3.0)
    expected = run(plain, SIGMAS[3:])
    loads = record_loads(monkeypatch, high, low)
    assert torch.equal(run(guider, SIGMAS[3:]), expected)
    assert loads == [["low"]] and steps == [0, 1, 2, 0, 1, 2]
    assert [state(high), state(low)] == before
    run(guider, SIGMAS[2:])
    assert loads[1:] == [["high"], ["low"]]


def test_boundary_itself_belongs_to_the_first_model(pair, high, low, monkeypatch):
    at = torch.tensor(BOUNDARY).item()
    loads = record_loads(monkeypatch, high, low)
    guide(pair, visits([at]))
    assert loads == [["high"]]
    guide(pair, visits([at - 1e-5]))
    assert loads == [["high"], ["high"], ["low"]]


def on_a_small_card(model):
    """A clone that the host takes for one on a device with memory of its own."""
    clone = model.clone()
    clone.load_device = torch.device("cpu:0")  # the host never frees plain "cpu"
    return clone


def test_host_evicts_the_first_model_when_memory_is_short(switch, high, low, sample, monkeypatch):
    import comfy.model_management as management

    expected = sample(by_sigma(high, low, BOUNDARY), SIGMAS)
    management.unload_all_models()
    loaded, load = {}, management.load_models_gpu

    def load_without_room(*args, **kwargs):
        with monkeypatch.context() as patch:
            patch.setattr(
                management, "get_free_memory", lambda dev=None, torch_free_too=False: (0, 0) if torch_free_too else 0
            )
            return load(*args, **kwargs)

    monkeypatch.setattr(management, "load_models_gpu", load_without_room)
    pair = switch.with_sides(on_a_small_card(high), switch.two_sides(BOUNDARY, on_a_small_card(low)))
    out = sample(
        pair,
        SIGMAS,
        callback=lambda step, *_: loaded.update({step: [m.model.model for m in management.current_loaded_models]}),
    )
    for step, (present, absent) in {2: (high, low), 3: (low, high)}.items():
        assert present.model in loaded[step], step
        assert absent.model not in loaded[step], step
    assert relative(out, expected) < 1e-6


def test_each_side_has_its_own_options(switch, high, low, sample):
    seen = []

    def watch(name):
        def post(args):
            seen.append((name, round(args["sigma"][0].item(), 3)))
            return args["denoised"]

        return post

    first, second = high.clone(), low.clone()
    first.set_model_sampler_post_cfg_function(watch("first"))
    second.set_model_sampler_post_cfg_function(watch("second"))
    sample(switch.with_sides(first, switch.two_sides(BOUNDARY, second)), SIGMAS)
    assert seen == [("first", 1.0), ("first", 0.96), ("first", 0.9), ("second", 0.8), ("second", 0.6), ("second", 0.3)]


def test_a_function_both_models_share_runs_once_a_step(switch, high, low, sample):
    seen = []

    def post(args):
        seen.append(args["sigma"][0].item())
        return args["denoised"]

    first, second = high.clone(), low.clone()
    for model in (first, second):
        model.set_model_sampler_post_cfg_function(post)
    sample(switch.with_sides(first, switch.two_sides(BOUNDARY, second)), SIGMAS)
    assert seen == pytest.approx(SIGMAS[:-1])


def test_one_base_with_a_lora_for_each_side(switch, wan, sample):
    """The same weights on both sides, patched anew at the switch, do what two copies do."""
    one, other = wan(seed=1, layers=1), wan(seed=1, layers=1)
    before = {name: tensor.clone() for name, tensor in one.model.state_dict().items()}
    first, second = with_patch(one, 1), with_patch(one, 2)
    out = sample(switch.with_sides(first, switch.two_sides(BOUNDARY, second)), SIGMAS)
    assert torch.equal(out, sample(switch.with_sides(first, switch.two_sides(BOUNDARY, with_patch(other, 2))), SIGMAS))
    assert not torch.equal(out, sample(first, SIGMAS))
    sample(one, SIGMAS[-2:])
    assert all(torch.equal(before[name], tensor) for name, tensor in one.model.state_dict().items())


def with_patch(model, seed):
    """A clone with a difference on one weight, as a LoRA loader adds it."""
    key = "diffusion_model.blocks.0.ffn.0.weight"
    shape = model.model.state_dict()[key].shape
    clone = model.clone()
    clone.add_patches({key: ("diff", (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05,))}, 1.0)
    return clone


def lora_hook(model, strength=1.0):
    """A core hook LoRA on one layer."""
    import comfy.hooks

    name = "diffusion_model.blocks.0.ffn.0"
    rows, width = model.model.state_dict()[f"{name}.weight"].shape
    generator = torch.Generator().manual_seed(5)
    lora = {
        f"{name}.lora_up.weight": torch.randn(rows, 2, generator=generator),
        f"{name}.lora_down.weight": torch.randn(2, width, generator=generator) / width**0.5,
    }
    return comfy.hooks.create_hook_lora(lora, strength, 0.0)


def test_hooks_of_the_prompt_work_on_both_sides_and_are_taken_off(pair, high, low):
    before = [state(high), state(low)]
    plain = guide(pair, visits([0.96, 0.5]))
    hooked = guide(pair, visits([0.96, 0.5]), hooks=lora_hook(low))
    assert relative(hooked, plain) > 1e-3
    assert relative(hooked, guide(pair, visits([0.96, 0.5]), hooks=lora_hook(low))) == 0
    assert [state(high), state(low)] == before
    assert torch.equal(guide(pair, visits([0.96, 0.5])), plain)


class Movable:
    """A wrapper with weights of its own, which the host moves with the model."""

    def __init__(self):
        self.moves = []

    def __call__(self, executor, *args, **kwargs):
        return executor(*args, **kwargs)

    def to(self, where):
        self.moves.append(where)
        return self


def test_what_belongs_to_the_second_model_is_moved_as_the_hosts_own_sampling_moves_it(switch, high, low):
    from comfy.patcher_extension import WrappersMP

    moves = []
    for run in (lambda model: model, lambda model: switch.with_sides(high, switch.two_sides(BOUNDARY, model))):
        movable, model = Movable(), low.clone()
        model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "movable", movable)
        guide(run(model), visits([0.5]))
        moves.append(movable.moves)
    assert moves[0] == moves[1]
    assert moves[0][-1] == low.offload_device


class Control:
    """As the host's ControlNets: ready between pre_run and cleanup, for the model it was made ready for."""

    previous_controlnet = extra_hooks = None
    multigpu_clones: dict = {}  # noqa: RUF012 - as newer hosts', always empty here

    def __init__(self):
        self.model, self.calls = None, []

    def pre_run(self, model, percent_to_timestep):
        self.model = model

    def get_control(self, x, t, cond, batched, transformer_options):
        self.calls.append((round(t[0].item(), 3), self.model))

    def cleanup(self):
        self.model = None

    def get_models(self):
        return []

    def get_extra_hooks(self):
        return []

    def inference_memory_requirements(self, dtype):
        return 0


def test_control_is_ready_for_the_model_that_runs(pair, high, low):
    control = Control()
    guide(pair, visits([0.96, 0.5, 0.9, 0.4]), control=control)
    assert control.calls == [(0.96, high.model), (0.5, low.model), (0.9, high.model), (0.4, low.model)]
    assert control.model is None


@pytest.mark.parametrize("fails", ["load_models_gpu", "process_conds", "pre_run"])
def test_second_model_that_cannot_be_made_ready_leaves_nothing(pair, high, low, sample, monkeypatch, fails):
    import comfy.model_management as management
    import comfy.samplers

    whole, plain = sample(pair, SIGMAS), sample(low, SIGMAS)
    before = [state(high), state(low)]

    def refusing(function, is_second):
        def call(*args, **kwargs):
            if is_second(args[0]):
                raise MemoryError("no room")
            return function(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        if fails == "load_models_gpu":
            patch.setattr(
                management, fails, refusing(management.load_models_gpu, lambda models: models[0].model is low.model)
            )
        elif fails == "process_conds":
            patch.setattr(
                comfy.samplers, fails, refusing(comfy.samplers.process_conds, lambda model: model is low.model)
            )
        else:
            patch.setattr(low, fails, lambda: refusing(None, lambda _: True)(low))
        with pytest.raises(MemoryError, match="no room"):
            sample(pair, SIGMAS)
    assert [state(high), state(low)] == before
    assert torch.equal(sample(pair, SIGMAS), whole)
    assert torch.equal(sample(low, SIGMAS), plain)


@pytest.mark.parametrize("step", [0, 2, 3, 5])
def test_error_in_any_step_leaves_guider_and_models_as_they_were(pair, high, low, switch, step):
    import comfy.samplers

    before = [state(high), state(low), state(pair)]
    model = switch.with_sides(pair, switch.two_sides(BOUNDARY, low, detail_cfg=1.0))
    guider = comfy.samplers.CFGGuider(model)
    guider.inner_set_conds({"positive": [[torch.ones(1, 4, 4096), {}]], "negative": [[torch.zeros(1, 4, 4096), {}]]})
    guider.set_cfg(3.0)
    noise = torch.randn(1, 16, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    euler = comfy.samplers.sampler_object("euler")

    def run(callback=None):
        with torch.inference_mode():
            return guider.sample(
                noise,
                torch.zeros_like(noise),
                euler,
                torch.tensor(SIGMAS),
                callback=callback,
                disable_pbar=True,
                seed=0,
            )

    def fail(index, *_):
        if index == step:
            raise RuntimeError("stopped here")

    whole = run()
    with pytest.raises(RuntimeError, match="stopped here"):
        run(fail)
    assert guider.cfg == 3.0
    assert not hasattr(guider, switch.STATE)
    assert [state(high), state(low), state(pair)] == before
    assert torch.equal(run(), whole), "the same guider samples again"


def test_pair_can_be_cloned_and_given_a_lora(pair, switch, high, low, sample):
    """What users put after it (LoRA, model sampling) goes to the first model and keeps the switch."""
    before_the_switch = switch.with_sides(with_patch(high, 3), switch.two_sides(BOUNDARY, low))
    assert torch.equal(sample(with_patch(pair, 3), SIGMAS), sample(before_the_switch, SIGMAS))


def test_sides_put_on_twice_count_once(pair, switch, high, low, sample):
    again = switch.with_sides(pair, switch.two_sides(0.5, low))
    assert torch.equal(sample(again, SIGMAS), sample(switch.with_sides(high, switch.two_sides(0.5, low)), SIGMAS))
    assert not torch.equal(sample(again, SIGMAS), sample(pair, SIGMAS))


def with_prediction(model, base, kind):
    """A clone with another kind of noise level."""
    import comfy.model_sampling

    clone = model.clone()
    sampling = type("ModelSampling", (getattr(comfy.model_sampling, base), getattr(comfy.model_sampling, kind)), {})
    clone.add_object_patch("model_sampling", sampling(model.model.model_config))
    return clone


def test_sides_may_have_shifts_of_their_own_but_one_prediction(switch, high, low):
    import comfy_extras.nodes_model_advanced as nodes

    shifted = nodes.ModelSamplingSD3().patch(low, shift=8.0)[0]
    assert switch.with_sides(high, switch.two_sides(BOUNDARY, shifted)) is not None
    for base, kind in (("ModelSamplingContinuousEDM", "V_PREDICTION"), ("ModelSamplingDiscreteFlow", "X0")):
        with pytest.raises(ValueError, match="cannot share one trajectory: their prediction is"):
            switch.with_sides(high, switch.two_sides(BOUNDARY, with_prediction(low, base, kind)))


def test_a_prediction_outside_a_sampling_run_is_a_clear_error(pair):
    """Other packs' samplers may call a guider's prediction without the host's `sample`."""
    import comfy.sampler_helpers
    import comfy.samplers

    guider = comfy.samplers.CFGGuider(pair)
    guider.model_options = comfy.model_patcher.create_model_options_clone(pair.model_options)
    comfy.sampler_helpers.prepare_model_patcher(pair, {}, guider.model_options)
    with pytest.raises(ValueError, match=r"cannot switch models or cfg .* SamplerCustomAdvanced"):
        guider(torch.zeros(1, 16, 1, 4, 4), torch.ones(1))
