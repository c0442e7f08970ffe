"""Experts on a MODEL: exact, reversible, in any sampler, and nothing of the base ever changes."""

import dataclasses
import itertools
import threading

import pytest
import torch

from ..compare import by_sigma, relative

SIGMAS = [1.0, 0.992, 0.982, 0.949, 0.905, 0.81, 0.0]
SAMPLERS = ["euler", "heun", "dpmpp_2m", "uni_pc", "res_multistep", "euler_ancestral", "dpmpp_2s_ancestral", "lcm"]


@pytest.fixture(scope="module")
def attach(module):
    return module("nodes.host.experts.attach")


@pytest.fixture(scope="module")
def base(wan):
    return wan()


def merged(wan, attach, experts, strengths=None, **kwargs):
    """A model with the experts' changes written into its weights."""
    model = wan(**kwargs)
    state = model.model.diffusion_model.state_dict()
    for expert, strength in zip(experts, strengths or [1.0] * len(experts), strict=True):
        for name, updates in expert.low_rank.items():
            for update in updates:
                state[f"{name}.weight"][update.start : update.start + update.up.shape[0]] += (
                    strength * update.scale * update.up @ update.down
                )
        for name, tensor in expert.replaced.items():
            state[name].lerp_(tensor, strength)
        for name, tensor in expert.diff.items():
            state[name] += strength * tensor
    return model


def untouched(model, before):
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.model.state_dict().items())
    assert not [name for name, m in model.model.named_modules() if "forward" in m.__dict__]


def copy_of(model):
    return {name: tensor.clone() for name, tensor in model.model.state_dict().items()}


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_routed_equals_merged_in_every_sampler(wan, attach, base, random_expert, sample, sampler):
    detail = random_expert(base)
    routed = attach.attach_experts(base, detail=detail)
    reference = by_sigma(base, merged(wan, attach, [detail]), 0.979)
    assert relative(sample(routed, SIGMAS, sampler), sample(reference, SIGMAS, sampler)) < 1e-6


@pytest.mark.parametrize(
    ("shape", "batch", "size", "rank"),
    [({"width": 128, "layers": 1}, 1, (1, 4, 4), 1), ({"width": 384, "layers": 3}, 2, (3, 5, 7), 16)],
)
def test_other_shapes(wan, attach, random_expert, sample, shape, batch, size, rank):
    base = wan(**shape)
    detail = random_expert(base, rank=rank)
    reference = by_sigma(base, merged(wan, attach, [detail], **shape), 0.979)
    out = sample(attach.attach_experts(base, detail=detail), SIGMAS, batch=batch, size=size)
    assert relative(out, sample(reference, SIGMAS, batch=batch, size=size)) < 1e-6


@pytest.mark.parametrize("strength", [0.0, 0.4, 1.3])
def test_strength(wan, attach, base, random_expert, sample, strength):
    detail = random_expert(base)
    routed = attach.attach_experts(base, detail=detail, detail_strength=strength)
    reference = by_sigma(base, merged(wan, attach, [detail], [strength]), 0.979)
    assert relative(sample(routed, SIGMAS), sample(reference, SIGMAS)) < 1e-6


def test_stacked_and_independent_experts(wan, attach, base, random_expert, sample):
    semantic, detail = random_expert(base, "semantic", 1, replaced=False), random_expert(base, "detail", 2)
    stacked = attach.attach_experts(base, semantic, detail)
    independent = attach.attach_experts(base, semantic, detail, stacked=False)
    high, low, both = (
        merged(wan, attach, [semantic]),
        merged(wan, attach, [detail]),
        merged(wan, attach, [semantic, detail]),
    )
    assert relative(sample(stacked, SIGMAS), sample(by_sigma(high, both, 0.979, base), SIGMAS)) < 1e-5
    assert relative(sample(independent, SIGMAS), sample(by_sigma(high, low, 0.979, base), SIGMAS)) < 1e-6


@pytest.mark.parametrize("strength", [0.5, 0.0, -1.0])
def test_strength_of_a_stacked_expert_that_replaces_layers(wan, attach, base, random_expert, sample, strength):
    """The host's own patching would write them whole."""
    semantic, detail = random_expert(base, "semantic", 1), random_expert(base, "detail", 2)
    stacked = attach.attach_experts(base, semantic, detail, semantic_strength=strength)
    high, both = merged(wan, attach, [semantic], [strength]), merged(wan, attach, [semantic, detail], [strength, 1.0])
    assert relative(sample(stacked, SIGMAS), sample(by_sigma(high, both, 0.979, base), SIGMAS)) < 1e-5


@pytest.mark.parametrize("stacked", [True, False])
def test_bare_parameters_convolutions_and_norms(wan, attach, base, random_expert, sample, module, stacked):
    """What the host's own patching leaves out in silence (a block's modulation) counts too, on its side."""
    generator = torch.Generator().manual_seed(3)
    names = [
        n
        for n in attach.module_shapes(base)
        if n.endswith(("modulation", "norm_q.weight", "norm3.bias")) or "patch" in n
    ]
    shapes = attach.module_shapes(base)
    diff = {name: 0.1 * torch.randn(shapes[name], generator=generator) for name in names}
    semantic = module("dcm_core.experts.expert").Expert("wan", "semantic", diff=diff)
    detail = random_expert(base, "detail", 2)
    high = merged(wan, attach, [semantic])
    low = merged(wan, attach, [semantic, detail] if stacked else [detail])
    before = copy_of(base)
    out = sample(attach.attach_experts(base, semantic, detail, stacked=stacked), SIGMAS)
    assert relative(out, sample(by_sigma(high, low, 0.979, base), SIGMAS)) < 1e-5
    untouched(base, before)
    assert not [n for n, m in base.model.named_modules() if "modulation" in m.__dict__]


def test_what_the_host_would_drop_from_a_stacked_expert_is_an_error(attach, base, random_expert, sample):
    """A pair and a difference on one tensor: the host keeps only one; routed, both count."""
    name = "blocks.0.self_attn.q.weight"
    both = dataclasses.replace(random_expert(base, "semantic", replaced=False), diff={name: torch.eye(256) * 3})
    with pytest.raises(ValueError, match=r"could not apply 1 .* blocks\.0\.self_attn\.q\.weight"):
        attach.attach_experts(base, both)
    without = dataclasses.replace(both, diff={})
    independent = [sample(attach.attach_experts(base, expert, stacked=False), SIGMAS) for expert in (both, without)]
    assert relative(*independent) > 1e-4


def test_base_is_bit_identical_after_everything(attach, base, random_expert, sample):
    before = copy_of(base)
    plain = sample(base, SIGMAS)
    routed = attach.attach_experts(base, random_expert(base, "semantic", 1), random_expert(base), stacked=False)
    first = sample(routed, SIGMAS)
    untouched(base, before)
    assert torch.equal(sample(base, SIGMAS), plain)
    assert torch.equal(sample(routed, SIGMAS), first)
    assert not torch.equal(first, plain)


@pytest.mark.parametrize("step", [1, 4])
def test_exceptions_and_interrupts_leave_nothing(attach, base, random_expert, sample, step):
    import comfy.model_management as management

    before = copy_of(base)
    routed = attach.attach_experts(base, detail=random_expert(base))

    def fail(index, *_):
        if index == step:
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        sample(routed, SIGMAS, callback=fail)
    untouched(base, before)

    def interrupt(index, *_):
        if index == step:
            management.interrupt_current_processing(True)

    with pytest.raises(management.InterruptProcessingException):
        sample(routed, SIGMAS, callback=interrupt)
    untouched(base, before)


def test_exception_inside_the_transformer(attach, base, random_expert, sample, monkeypatch):
    before = copy_of(base)
    routed = attach.attach_experts(base, detail=random_expert(base))
    block = base.model.diffusion_model.blocks[1]
    monkeypatch.setattr(type(block), "forward", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sample(routed, SIGMAS[3:])
    untouched(base, before)


@pytest.mark.parametrize(
    ("boundary", "timestep", "detail"),
    [
        (0.979, 979.0, False),
        (0.979, 978.99, True),
        (0.979, 978.0, True),
        (0.982, 982.0, False),
        (0.982, 981.99, True),
        (0.982, 981.0, True),
    ],
)
def test_side_of_the_boundary(attach, base, random_expert, sample, boundary, timestep, detail):
    routed = attach.attach_experts(base, detail=random_expert(base), boundary=boundary)
    sigmas = [timestep / 1000, 0.0]
    assert torch.equal(sample(routed, sigmas), sample(base, sigmas)) != detail


def test_every_integer_timestep_falls_on_its_side(module):
    routing = module("dcm_core.routing")
    for boundary in range(1, 1000):
        sigmas = torch.arange(1, 1001, dtype=torch.float32) / 1000
        expected = torch.arange(1, 1001) < boundary
        assert torch.equal(routing.is_detail(sigmas, boundary / 1000), expected)


def test_rows_on_both_sides_in_one_batch(attach, base, random_expert):
    routed = attach.attach_experts(base, detail=random_expert(base))
    import comfy.model_management as management

    management.load_models_gpu([routed, *routed.get_nested_additional_models()])
    x, context = (torch.randn(shape, device=routed.load_device) for shape in ((2, 16, 1, 4, 4), (2, 3, 4096)))
    options = {"wrappers": routed.wrappers}

    def call(rows, sigmas):
        routed.pre_run()
        with torch.inference_mode():
            return routed.model.apply_model(
                x[rows],
                torch.tensor(sigmas, device=x.device),
                c_crossattn=context[rows],
                transformer_options=dict(options),
            )

    both = call([0, 1], [0.99, 0.5])
    torch.testing.assert_close(both[:1], call([0], [0.99]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(both[1:], call([1], [0.5]), rtol=1e-5, atol=1e-5)


def test_user_lora_before_or_after_attaching(wan, attach, base, random_expert, sample):
    """A LoRA on a replaced layer reaches the layer that stands in for it, whatever the order of the nodes."""
    detail = random_expert(base)
    key = "diffusion_model.head.head.weight"
    patch = {key: ("diff", (torch.randn(64, 256, generator=torch.Generator().manual_seed(5)) * 0.05,))}
    after = attach.attach_experts(base, detail=detail).clone()
    after.add_patches(patch, 0.8)
    before = base.clone()
    before.add_patches(patch, 0.8)
    before = attach.attach_experts(before, detail=detail)
    low = merged(wan, attach, [detail])
    for model in (low, high := wan()):
        model.model.state_dict()[key] += 0.8 * patch[key][1][0]
    reference = sample(by_sigma(high, low, 0.979, base), SIGMAS)
    plain = sample(attach.attach_experts(base, detail=detail), SIGMAS)
    for model in (after, before):
        out = sample(model, SIGMAS)
        assert relative(out, reference) < 1e-5
        assert relative(out, plain) > 1e-3
    assert torch.equal(sample(attach.attach_experts(base, detail=detail), SIGMAS), plain)


@pytest.mark.parametrize(("layer", "sides"), [("blocks.0.ffn.0", 2), ("head.head", 1)])
def test_a_hook_lora_works_on_the_base_s_own_layers(wan, attach, base, random_expert, sample, layer, sides):
    """On the detail side a layer that the expert replaces is without it."""
    import comfy.hooks

    detail, key = random_expert(base), f"diffusion_model.{layer}.weight"
    lora = {f"diffusion_model.{layer}.diff": torch.randn(base.model.state_dict()[key].shape) * 0.05}
    high, low = wan(), merged(wan, attach, [detail])
    for model in (high, low)[:sides]:
        model.model.state_dict()[key] += lora[f"diffusion_model.{layer}.diff"]
    routed = attach.attach_experts(base, detail=detail)
    out = sample(routed, SIGMAS, hooks=comfy.hooks.create_hook_lora(lora, 1.0, 0.0))
    assert relative(out, sample(by_sigma(high, low, 0.979, base), SIGMAS)) < 1e-5
    assert relative(out, sample(routed, SIGMAS)) > 1e-3


def test_a_user_s_lora_reaches_the_experts_of_clones_on_further_gpus(attach, base, random_expert, module):
    """Newer hosts keep them as additional models."""
    prepare = module("nodes.host.experts.prepare")
    key = "diffusion_model.head.head.weight"
    model, clone = (attach.attach_experts(base, detail=random_expert(base)) for _ in range(2))
    model.add_patches({key: ("diff", (torch.ones(64, 256),))}, 0.8)
    model.set_additional_models(prepare.GPU_CLONES, [clone])
    prepare.prepare_run(lambda *_: None, model)
    first, second = (owner.get_additional_models_with_key("dcm")[0].patches for owner in (model, clone))
    assert list(first) == list(second) != []


def test_last_attach_wins_and_detach_undoes(attach, base, random_expert, sample):
    first, second = random_expert(base, seed=1), random_expert(base, seed=2)
    twice = attach.attach_experts(attach.attach_experts(base, random_expert(base, "semantic", 3), first), detail=second)
    assert torch.equal(sample(twice, SIGMAS), sample(attach.attach_experts(base, detail=second), SIGMAS))
    assert torch.equal(sample(attach.detach_experts(twice), SIGMAS), sample(base, SIGMAS))


def test_clones_alternate(attach, base, random_expert, sample):
    models = [base, *(attach.attach_experts(base, detail=random_expert(base, seed=s)) for s in (1, 2))]
    once = [sample(model, SIGMAS) for model in models]
    again = [sample(model, SIGMAS) for model in reversed(models)][::-1]
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


def test_fp8_base(module, releases, sample, attach):
    """The expert computes in full precision over fp8 weights."""
    load = module("nodes.host.experts.load")
    model, _ = load.load_model(releases["wan_tiny"], "fp8_e4m3fn")
    assert model.model.get_dtype() is torch.float8_e4m3fn
    expert = model.get_additional_models_with_key("dcm")[0].model
    assert {p.dtype for p in expert.parameters()} <= {torch.bfloat16, torch.float16, torch.float32}
    full, _ = load.load_model(releases["wan_tiny"], "default")
    out, reference = sample(model, SIGMAS), sample(full, SIGMAS)
    assert relative(out, reference) < 0.2
    assert relative(sample(attach.detach_experts(model), SIGMAS), reference) > relative(out, reference)


def test_cond_and_uncond_in_one_batch(wan, attach, base, random_expert, sample):
    detail = random_expert(base)
    reference = by_sigma(base, merged(wan, attach, [detail]), 0.979)
    assert (
        relative(
            sample(attach.attach_experts(base, detail=detail), SIGMAS, cfg=3.0), sample(reference, SIGMAS, cfg=3.0)
        )
        < 1e-5
    )


def test_compiled_blocks_are_found(attach, wan, random_expert, sample):
    base = wan()
    detail = random_expert(base)
    plain = sample(attach.attach_experts(base, detail=detail), SIGMAS)
    blocks = base.model.diffusion_model.blocks
    for index in range(len(blocks)):
        blocks[index] = torch.compile(blocks[index], backend="eager")
    assert relative(sample(attach.attach_experts(base, detail=detail), SIGMAS), plain) < 1e-6


def test_lost_expert_is_an_error(attach, base, random_expert, sample):
    routed = attach.attach_experts(base, detail=random_expert(base))
    routed.remove_attachments("dcm")
    with pytest.raises(ValueError, match="This model has lost its DCM experts"):
        sample(routed, SIGMAS)
    routed = attach.attach_experts(base, detail=random_expert(base))
    routed.remove_additional_models("dcm")
    with pytest.raises(ValueError, match="detail expert of this model is missing"):
        sample(routed, SIGMAS)


def test_host_loads_and_counts_the_expert(attach, base, random_expert, sample):
    import comfy.model_management as management

    routed = attach.attach_experts(base, detail=random_expert(base))
    expert = routed.get_additional_models_with_key("dcm")[0]
    sample(routed, SIGMAS)
    assert any(
        loaded.model is not None and loaded.model.model is expert.model for loaded in management.current_loaded_models
    )
    assert expert.model_size() < 0.5 * base.model_size()
    assert not set(map(id, expert.model.parameters())) & set(map(id, base.model.parameters()))


def test_experts_are_built_where_the_host_makes_layers_without_tensors(
    attach, base, random_expert, sample, monkeypatch
):
    """Newer hosts do under dynamic VRAM, which is on for most cards."""
    management = pytest.importorskip("comfy.memory_management", reason="this host has no dynamic VRAM")
    semantic, detail = random_expert(base, "semantic"), random_expert(base, seed=1)
    expected = sample(attach.attach_experts(base, semantic, detail, stacked=False), SIGMAS)
    monkeypatch.setattr(management, "aimdo_enabled", True)
    routed = attach.attach_experts(base, semantic, detail, stacked=False)
    monkeypatch.undo()
    assert torch.equal(sample(routed, SIGMAS), expected)


def test_every_weight_that_the_host_brings_is_given_back(attach, base, random_expert, sample, monkeypatch):
    """Newer hosts keep its place in VRAM until then."""
    import comfy.ops

    routed = attach.attach_experts(base, detail=random_expert(base))
    out = []
    cast, uncast = comfy.ops.cast_bias_weight, comfy.ops.uncast_bias_weight

    def bring(layer, *args, **kwargs):
        out.append((id(layer), kwargs.get("offloadable", False)))
        return cast(layer, *args, **kwargs)

    monkeypatch.setattr(comfy.ops, "cast_bias_weight", bring)
    monkeypatch.setattr(
        comfy.ops, "uncast_bias_weight", lambda layer, *args: (out.remove((id(layer), True)), uncast(layer, *args))
    )
    sample(routed, SIGMAS)
    assert out == []


def test_experts_made_for_different_boundaries_are_refused(attach, base, random_expert):
    semantic, detail = random_expert(base, "semantic"), random_expert(base)
    other = dataclasses.replace(semantic, boundary=0.9)
    with pytest.raises(ValueError, match=r"different boundaries \(0\.9 and 0\.979\)"):
        attach.attach_experts(base, other, detail)
    assert attach.attached_experts(attach.attach_experts(base, other, detail, boundary=0.95)).boundary == 0.95
    unsaid = dataclasses.replace(detail, boundary=None)
    facts = attach.attached_experts(
        attach.attach_experts(base, dataclasses.replace(other, timesteps=(1000.0, 500.0)), unsaid)
    )
    assert facts.boundary == 0.9 and facts.timesteps == (1000.0, 500.0)


def test_copies_for_another_device_are_independent(attach, base, random_expert, sample, module, releases):
    """What newer hosts do to run one MODEL on several GPUs: `cached_patcher_init` makes a second of each."""
    routed = attach.attach_experts(base, detail=random_expert(base))
    sample(routed, SIGMAS)
    expert = routed.get_additional_models_with_key("dcm")[0]
    # the host's own places in memory, which only one may free
    for part, name in itertools.product((expert.model, expert.model.sites[0]), attach.HOST_STATE):
        setattr(part, name, threading.Lock())
    factory, arguments = expert.cached_patcher_init
    again = factory(*arguments, disable_dynamic=True).model
    assert not set(map(id, again.parameters())) & set(map(id, expert.model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), expert.model.parameters(), strict=True))
    assert expert.model.places and not again.places
    for name in attach.HOST_STATE:
        assert not hasattr(again, name) and not hasattr(again.sites[0], name)
        delattr(expert.model, name)
        delattr(expert.model.sites[0], name)
    path = module("nodes.host.folders").path_of("diffusion_models", releases["wan_tiny"])
    loaded = module("nodes.host.experts.load").load_base(path, "default")
    factory, arguments = loaded.cached_patcher_init
    second = factory(*arguments)
    assert second.model is not loaded.model
    assert all(torch.equal(a, b) for a, b in zip(second.model.parameters(), loaded.model.parameters(), strict=True))
