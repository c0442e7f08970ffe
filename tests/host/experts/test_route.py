"""A call goes to its expert with every layer of it, or the run stops; and one base is in one call at a time."""

import dataclasses
import json
import threading
import time

import pytest
import torch
from torch import nn

from ..compare import relative
from ..small_models import linears, native_wan

SIGMAS = [1.0, 0.992, 0.9, 0.5, 0.0]
DETAIL_SIGMAS = SIGMAS[2:]


@pytest.fixture(scope="module")
def attach(module):
    return module("nodes.host.experts.attach")


@pytest.fixture(scope="module")
def route(module):
    return module("nodes.host.experts.route")


@pytest.fixture
def base(wan):
    return wan()


@pytest.fixture
def on_layers(module):
    """Make an expert with a low-rank pair on some layers: on_layers(model, names)."""
    experts, attach = module("dcm_core.experts.expert"), module("nodes.host.experts.attach")

    def make(model, names, **tensors):
        shapes, generator = attach.module_shapes(model), torch.Generator().manual_seed(5)
        low_rank = {}
        for name in names:
            rows, width = shapes[f"{name}.weight"]
            down, up = (torch.randn(shape, generator=generator) / shape[-1] ** 0.5 for shape in ((4, width), (rows, 4)))
            low_rank[name] = (experts.LowRank(down, up, 1.0),)
        return experts.Expert("wan", "detail", low_rank, boundary=0.979, **tensors)

    return make


def past(layer):
    """Have the layer's weight used without a call of its forward, as a host's fused kernels do."""
    layer.__class__ = type(
        "Past", (type(layer),), {"__call__": lambda self, x: nn.functional.linear(x, self.weight, self.bias)}
    )


def untouched(model):
    parameters = all(type(value) is nn.Parameter for _, value in model.model.named_parameters())
    return parameters and not [name for name, part in model.model.named_modules() if "forward" in part.__dict__]


def test_a_layer_that_the_host_passes_by_stops_the_run(attach, base, random_expert, sample, monkeypatch):
    import comfyui_version

    monkeypatch.setattr(comfyui_version, "__version__", "9.8.7")
    routed = attach.attach_experts(base, random_expert(base, "semantic", 1, replaced=False), random_expert(base))
    sample(routed, SIGMAS)
    past(base.model.diffusion_model.blocks[1].cross_attn.o)
    steps = []
    message = r"ComfyUI 9\.8\.7 did not use 1 of the layers that the detail expert changes: blocks\.1\.cross_attn\.o\."
    with pytest.raises(ValueError, match=message):
        sample(routed, SIGMAS, callback=lambda step, *_: steps.append(step))
    assert steps == [0, 1] and untouched(base)


def test_a_layer_of_an_independent_semantic_expert_stops_the_run_at_its_first_call(attach, base, random_expert, sample):
    independent = attach.attach_experts(base, random_expert(base, "semantic", 1), random_expert(base), stacked=False)
    past(base.model.diffusion_model.blocks[0].self_attn.q)
    steps = []
    with pytest.raises(ValueError, match=r"the semantic expert changes: blocks\.0\.self_attn\.q\."):
        sample(independent, SIGMAS, callback=lambda step, *_: steps.append(step))
    assert steps == []


def test_a_block_that_does_not_read_its_modulation_stops_the_run(attach, base, on_layers, sample):
    block = base.model.diffusion_model.blocks[1]
    plain, own = type(block), block.modulation

    class Past(plain):
        def forward(self, *args, **kwargs):
            routed = self._parameters["modulation"]
            self._parameters["modulation"] = own
            try:
                return super().forward(*args, **kwargs)
            finally:
                self._parameters["modulation"] = routed

    detail = on_layers(
        base, ["blocks.1.ffn.0"], diff={f"blocks.{n}.modulation": torch.ones(1, 6, 256) for n in range(2)}
    )
    routed = attach.attach_experts(base, detail=detail)
    sample(routed, DETAIL_SIGMAS)
    block.__class__ = Past
    with pytest.raises(ValueError, match=r"the detail expert changes: blocks\.1\.modulation\."):
        sample(routed, DETAIL_SIGMAS)
    assert untouched(base)


def test_only_the_first_call_of_a_side_in_a_run_is_watched(attach, route, base, random_expert, sample, monkeypatch):
    routed = attach.attach_experts(base, random_expert(base, "semantic", 1), random_expert(base), stacked=False)
    seen = []
    check = route.check_answers
    monkeypatch.setattr(
        route,
        "check_answers",
        lambda patcher, facts, names, *rest: (seen.append(*names), check(patcher, facts, names, *rest)),
    )
    for _ in range(2):
        sample(routed, SIGMAS, cfg=3.0)
    assert seen == ["semantic", "detail"] * 2


def skip_block(model, index):
    clone = model.clone()
    clone.add_object_patch(f"diffusion_model.blocks.{index}.forward", lambda x, *args, **kwargs: x)
    return clone


def test_a_block_that_a_node_skips_is_said_in_the_log(attach, base, random_expert, sample, caplog):
    routed = skip_block(attach.attach_experts(base, detail=random_expert(base)), 1)
    with caplog.at_level("INFO"):
        sample(routed, SIGMAS)
    (line,) = [message for message in caplog.messages if "did not use" in message]
    assert (
        "blocks.1.cross_attn.o, blocks.1.cross_attn.q, blocks.1.cross_attn.v and 3 more" in line
        and "the detail expert" in line
    )
    assert "torch.compile" not in caplog.text


def test_a_model_of_which_no_block_runs_stops_the_run(attach, base, random_expert, sample):
    routed = skip_block(skip_block(attach.attach_experts(base, detail=random_expert(base)), 0), 1)
    with pytest.raises(ValueError, match="did not use 12 of the layers"):
        sample(routed, SIGMAS)


def test_a_call_that_a_step_cache_answers_is_no_error(attach, base, random_expert, sample):
    from comfy_extras.nodes_easycache import EasyCacheNode

    routed = attach.attach_experts(base, detail=random_expert(base))
    cached = EasyCacheNode.execute(routed, reuse_threshold=3.0, start_percent=0.0, end_percent=1.0, verbose=False).args[
        0
    ]
    calls = []
    whole = sample(routed, SIGMAS)
    out = sample(cached, SIGMAS, callback=lambda step, *_: calls.append(step))
    assert len(calls) == 4 and relative(out, whole) > 1e-3  # it has carried a result over the boundary


def test_compiled_blocks_are_checked_but_for_their_bare_parameters(attach, base, on_layers, sample, caplog):
    torch.compiler.reset()  # other tests' code counts towards its limit
    names = [f"blocks.{n}.{layer}" for n in range(2) for layer in ("ffn.0", "ffn.2", "self_attn.q")]
    tensors = {"blocks.0.modulation": torch.full((1, 6, 256), 0.1)}
    detail = on_layers(base, names, diff=tensors)
    plain = sample(attach.attach_experts(base, detail=detail), SIGMAS)
    blocks = base.model.diffusion_model.blocks
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph

    for index in range(len(blocks)):
        blocks[index] = torch.compile(blocks[index], backend=backend)
    routed = attach.attach_experts(base, detail=detail)
    with caplog.at_level("INFO"):
        assert relative(sample(routed, SIGMAS), plain) < 1e-6
    assert [m for m in caplog.messages if "torch.compile" in m] == [
        "With torch.compile on, ComfyUI-DCM cannot check whether the model uses blocks.0.modulation."
    ]
    made = len(compiled)
    assert relative(sample(routed, SIGMAS), plain) < 1e-6
    assert len(compiled) == made > 0
    torch.compiler.reset()
    past(blocks[1]._orig_mod.self_attn.q)
    with pytest.raises(ValueError, match=r"expert changes: blocks\.1\.self_attn\.q\."):
        sample(attach.attach_experts(base, detail=detail), SIGMAS)


def test_a_model_compiled_by_the_host_s_node_is_checked(attach, base, random_expert, sample):
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    detail = random_expert(base)
    plain = sample(attach.attach_experts(base, detail=detail), SIGMAS)
    routed = attach.attach_experts(base, detail=detail)
    set_torch_compile_wrapper(routed, backend="eager")
    assert relative(sample(routed, SIGMAS), plain) < 1e-5
    past(base.model.diffusion_model.blocks[1].self_attn.q)
    again = attach.attach_experts(base, detail=detail)
    set_torch_compile_wrapper(again, backend="eager")
    with pytest.raises(ValueError, match=r"expert changes: blocks\.1\.self_attn\.q\."):
        sample(again, SIGMAS)


@pytest.fixture
def int8(pack):
    """A Wan base whose feed-forwards are stored in int8, as newer hosts read them."""
    import comfy.sd

    state = native_wan()
    plain = comfy.sd.load_diffusion_model_state_dict(dict(state))
    if type(plain.model.diffusion_model.blocks[0].ffn).forward is nn.Sequential.forward:
        pytest.skip("this ComfyUI calls every layer of Wan's feed-forward")
    tensors = {name: value.bfloat16() for name, value in state.items()}
    for name in linears(state):
        if ".ffn." in name:
            scale = state[f"{name}.weight"].abs().amax(1, keepdim=True) / 127
            tensors[f"{name}.weight"] = (state[f"{name}.weight"] / scale).round().to(torch.int8)
            tensors[f"{name}.weight_scale"] = scale
            settings = json.dumps({"format": "int8_tensorwise"}).encode()
            tensors[f"{name}.comfy_quant"] = torch.tensor(list(settings), dtype=torch.uint8)
    return comfy.sd.load_diffusion_model_state_dict(tensors)


def test_an_int8_base_whose_feed_forward_reads_its_weight_itself(attach, int8, on_layers, sample):
    blocks = int8.model.diffusion_model.blocks
    feed_forward = type(blocks[0].ffn)
    assert feed_forward.forward is not nn.Sequential.forward
    assert type(blocks[0].ffn[2].weight).__name__ == "QuantizedTensor"
    names = [f"blocks.{n}.ffn.2" for n in range(2)]
    detail = on_layers(int8, names)
    plain = sample(int8, SIGMAS)
    routed = sample(attach.attach_experts(int8, detail=detail), SIGMAS)
    # the same pairs by the layers' own outputs, the feed-forward run layer by layer
    calls = [
        block.ffn[2].register_forward_hook(added(detail.low_rank[f"blocks.{n}.ffn.2"][0]))
        for n, block in enumerate(blocks)
    ]
    own, feed_forward.forward = feed_forward.forward, nn.Sequential.forward
    try:
        reference = sample(int8, DETAIL_SIGMAS, latent=None)
    finally:
        feed_forward.forward = own
        for call in calls:
            call.remove()
    low = sample(attach.attach_experts(int8, detail=detail), DETAIL_SIGMAS)
    assert relative(low, reference) < 1e-3
    assert relative(routed, plain) > 1e-2
    assert torch.equal(sample(int8, SIGMAS), plain)


def added(update):
    return lambda layer, args, out: out + (update.scale * args[0].float() @ update.down.T @ update.up.T).to(out)


@pytest.mark.parametrize("threads", [2, 5])
def test_samplings_of_one_base_at_the_same_time_leave_nothing(attach, base, random_expert, threads):
    import comfy.model_management as management

    models = [
        attach.attach_experts(base, random_expert(base, "semantic", 9), random_expert(base), stacked=False)
        for _ in range(threads)
    ]
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    management.load_models_gpu(
        [*models[:1], *(expert for model in models for expert in model.get_nested_additional_models())]
    )
    models[0].pre_run()
    x, context = torch.randn(1, 16, 1, 4, 4), torch.randn(1, 3, 4096)
    barrier, results, errors = threading.Barrier(threads), {}, []
    slow = base.model.diffusion_model.head.register_forward_pre_hook(lambda *_: time.sleep(0.002))

    def call(index, sigma):
        with torch.inference_mode():
            return base.model.apply_model(
                x, torch.tensor([sigma]), c_crossattn=context, transformer_options={"wrappers": models[index].wrappers}
            )

    def run(index):
        try:
            barrier.wait()
            results[index] = [call(index, sigma) for sigma in (0.99, 0.5) * 5]
        except Exception as error:
            errors.append(error)

    workers = [threading.Thread(target=run, args=(index,)) for index in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=600)
    slow.remove()
    assert errors == [] and untouched(base)
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.model.state_dict().items())
    alone = [call(0, sigma) for sigma in (0.99, 0.5) * 5]
    assert all(torch.equal(a, b) for found in results.values() for a, b in zip(found, alone, strict=True))


def test_a_routed_call_inside_a_routed_call_goes_on(attach, base, random_expert, sample):
    """As guidance nodes do that call the model again amid a call."""
    from comfy.patcher_extension import WrappersMP

    routed = attach.attach_experts(base, detail=random_expert(base))
    plain = sample(routed, SIGMAS)
    inner = []

    def again(executor, x, t, context, clip, time, options, **kwargs):
        if not inner:
            inner.append(None)
            inner[0] = base.model.apply_model(x, t / 1000, c_crossattn=context, transformer_options=dict(options))
        return executor(x, t, context, clip, time, options, **kwargs)

    routed.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "again", again)
    done = []
    worker = threading.Thread(target=lambda: done.append(sample(routed, SIGMAS)), daemon=True)
    worker.start()
    worker.join(timeout=600)
    assert done and torch.equal(done[0], plain) and inner[0] is not None and untouched(base)


def test_two_bases_do_not_wait_for_each_other(attach, route, wan, random_expert):
    bases = [wan(), wan()]
    locks = []
    for base in bases:
        routed = attach.attach_experts(base, detail=random_expert(base))
        clone = attach.attach_experts(base, detail=random_expert(base, seed=1))
        with route.experts_in_place(routed, attach.attached_experts(routed), ()):
            locks.append(route.LOCKS[base.model])
        assert route.LOCKS[clone.model] is locks[-1]
    assert locks[0] is not locks[1]


def test_an_expert_with_another_strength_is_watched_too(attach, base, random_expert, sample):
    routed = attach.attach_experts(
        base, detail=dataclasses.replace(random_expert(base), boundary=0.99), detail_strength=0.5
    )
    past(base.model.diffusion_model.head.head)
    with pytest.raises(ValueError, match=r"expert changes: head\.head\."):
        sample(routed, SIGMAS)
