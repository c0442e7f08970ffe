"""An expert under training: what it starts as, what it gives back, and PEFT's LoRA as an independent reference."""

import pytest
import torch
from torch import nn

from dcm_core.distill.student import Student, make_fixed, new_detail, new_semantic
from dcm_core.errors import ExpertError
from dcm_core.experts.expert import Expert, LowRank, merged
from dcm_core.experts.modules import add_linear
from dcm_core.experts.placing import in_place
from dcm_core.families import HUNYUAN_VIDEO, WAN

WIDTH = 8


def linears(*names, rows=WIDTH):
    torch.manual_seed(0)
    return {name: nn.Linear(WIDTH, rows) for name in names}


WAN_MODULES = linears(
    "blocks.0.self_attn.q",
    "blocks.0.self_attn.o",
    "blocks.0.cross_attn.k",
    "blocks.0.ffn.0",
    "time_embedding.0",
    "text_embedding.2",
    "head.head",
)
HUNYUAN_MODULES = {
    **linears("double_blocks.0.img_attn.qkv", "double_blocks.0.txt_attn.qkv", rows=3 * WIDTH),
    **linears("double_blocks.0.img_attn.proj", "time_in.in_layer", "final_layer.linear"),
    **linears("single_blocks.0.linear1", rows=7 * WIDTH),
    **linears("single_blocks.0.linear2"),
}


def generator():
    return torch.Generator().manual_seed(1)


def test_a_new_detail_expert_has_the_release_s_sites():
    expert = new_detail(WAN, WAN_MODULES, 2, 4.0, generator())
    assert set(expert.low_rank) == {"blocks.0.self_attn.q", "blocks.0.self_attn.o", "blocks.0.cross_attn.k"}
    replaced = {name.rpartition(".")[0] for name in expert.replaced}
    assert replaced == {"time_embedding.0", "text_embedding.2", "head.head"}
    assert torch.equal(expert.replaced["head.head.weight"], WAN_MODULES["head.head"].weight)


def test_pairs_on_every_linear_of_the_blocks_beside_the_release_s_sites_elsewhere():
    modules = {**HUNYUAN_MODULES, **linears("txt_in.individual_token_refiner.blocks.0.self_attn.proj")}
    new = {
        every: new_detail(HUNYUAN_VIDEO, modules, 2, 4.0, generator(), every_linear=every) for every in (False, True)
    }
    added = set(new[True].low_rank) - set(new[False].low_rank)
    assert added == {"single_blocks.0.linear2", "double_blocks.0.txt_attn.qkv"}
    assert "txt_in.individual_token_refiner.blocks.0.self_attn.proj" in new[True].low_rank
    # q, k and v keep pairs of their own, the feed-forward rows beside them get one
    rows = {
        name: [(update.start, len(update.up)) for update in updates] for name, updates in new[True].low_rank.items()
    }
    assert rows["single_blocks.0.linear1"] == [(0, WIDTH), (WIDTH, WIDTH), (2 * WIDTH, WIDTH), (3 * WIDTH, 4 * WIDTH)]
    assert rows["double_blocks.0.img_attn.qkv"] == [(0, WIDTH), (WIDTH, WIDTH), (2 * WIDTH, WIDTH)]
    assert rows["double_blocks.0.txt_attn.qkv"] == [(0, 3 * WIDTH)]
    assert set(new[True].replaced) == set(new[False].replaced)
    detail = new_detail(WAN, WAN_MODULES, 2, 4.0, generator(), every_linear=True).low_rank
    semantic = new_semantic(WAN, WAN_MODULES, 2, 4.0, generator()).low_rank
    assert set(detail) == set(semantic)
    # each is drawn once, in the same order
    assert all(torch.equal(detail[name][0].down, semantic[name][0].down) for name in semantic)


def test_fused_layers_get_a_pair_for_each_of_q_k_and_v():
    expert = new_detail(HUNYUAN_VIDEO, HUNYUAN_MODULES, 2, 4.0, generator())
    starts = {name: [update.start for update in updates] for name, updates in expert.low_rank.items()}
    assert starts == {
        "double_blocks.0.img_attn.qkv": [0, 8, 16],
        "double_blocks.0.img_attn.proj": [0],
        "single_blocks.0.linear1": [0, 8, 16],
    }
    assert {name.rpartition(".")[0] for name in expert.replaced} == {"time_in.in_layer", "final_layer.linear"}


@pytest.mark.parametrize("new", [new_semantic, new_detail])
def test_a_new_pair_begins_like_a_linear_layer(new):
    """Its down as torch begins a linear of as many inputs: uniform within 1 / sqrt(inputs)."""
    modules = {
        name: nn.Linear(inputs, 4) for name, inputs in (("blocks.0.self_attn.q", 16), ("blocks.0.self_attn.o", 400))
    }
    expert = new(WAN, modules, 64, 128.0, generator())
    for name, (update,) in expert.low_rank.items():
        bound = modules[name].in_features ** -0.5
        assert 0.95 * bound < update.down.abs().max() <= bound and abs(update.down.mean()) < 0.1 * bound
        assert not update.up.any() and update.scale == 2.0


@pytest.mark.parametrize(
    ("family", "modules"), [(WAN, WAN_MODULES), (HUNYUAN_VIDEO, HUNYUAN_MODULES)], ids=["wan", "hunyuan"]
)
@pytest.mark.parametrize("side", ["semantic", "detail"])
def test_a_new_expert_changes_nothing_and_comes_back_as_it_was(family, modules, side):
    root = nn.Module()
    for name, module in modules.items():
        parent = root
        *path, last = name.split(".")
        for part in path:
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent._modules[part]
        parent.add_module(last, module)
    new = new_semantic if side == "semantic" else new_detail
    expert = new(family, modules, 2, 4.0, generator())
    student = Student(expert, modules, torch.device("cpu"))
    x = torch.randn(3, WIDTH)
    before = {name: module(x) for name, module in modules.items()}
    with in_place(root, student.working):
        for name, module in modules.items():
            assert torch.allclose(module(x), before[name], atol=1e-7), name
    result = student.to_expert()
    assert set(result.low_rank) == set(expert.low_rank) and set(result.replaced) == set(expert.replaced)
    for name, updates in result.low_rank.items():
        for ours, theirs in zip(updates, expert.low_rank[name], strict=True):
            assert torch.equal(ours.down, theirs.down) and torch.equal(ours.up, theirs.up)
            assert (ours.scale, ours.start) == (2.0, theirs.start)


def test_checkpoints_of_earlier_versions_name_the_parameters_so():
    expert = new_detail(WAN, {**WAN_MODULES, **linears("time_embedding.2")}, 2, 4.0, generator())
    expert.replaced["blocks.0.modulation"] = torch.ones(1, 6)
    block = nn.Module()
    block.register_parameter("modulation", nn.Parameter(torch.zeros(1, 6)))
    modules = {**WAN_MODULES, **linears("time_embedding.2"), "blocks.0": block}
    low_rank = [f"low_rank.sites.{i}.branch.{name}.weight" for i in range(3) for name in ("down", "ups.0")]
    replaced = [f"replaced.sites.{i}.replaced.{name}" for i in range(4) for name in ("weight", "bias")]
    names = [name for name, _ in Student(expert, modules, torch.device("cpu")).named_parameters()]
    assert names == [*low_rank, "replaced.bare.0", *replaced]


def test_the_same_output_and_gradients_as_peft():
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    base = nn.Linear(WIDTH, WIDTH)
    down, up = torch.randn(2, WIDTH), torch.randn(WIDTH, 2)
    expert = Expert("wan", "detail", {"q": (LowRank(down, up, 2.0),)})
    root = nn.ModuleDict({"q": base})
    student = Student(expert, {"q": base}, torch.device("cpu"))
    x = torch.randn(5, WIDTH)
    with in_place(root, student.working):
        ours = root["q"](x)
    ours.square().sum().backward()
    site = student.low_rank.sites[0].branch
    copied = nn.ModuleDict({"q": nn.Linear(WIDTH, WIDTH)})
    copied.load_state_dict(root.state_dict())
    theirs = peft.inject_adapter_in_model(peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q"]), copied)
    theirs.q.lora_A["default"].weight.data.copy_(down)
    theirs.q.lora_B["default"].weight.data.copy_(up)
    out = theirs["q"](x)
    out.square().sum().backward()
    assert torch.allclose(ours, out, atol=1e-6)
    assert torch.allclose(site.down.weight.grad, theirs.q.lora_A["default"].weight.grad, rtol=1e-5)
    assert torch.allclose(site.ups[0].weight.grad, theirs.q.lora_B["default"].weight.grad, rtol=1e-5)


def test_low_precision_bases_take_float32_experts():
    base = nn.Linear(WIDTH, WIDTH).bfloat16()
    modules = {"blocks.0.self_attn.q": base, "head.head": nn.Linear(WIDTH, WIDTH).bfloat16()}
    student = Student(new_detail(WAN, modules, 2, 4.0, generator()), modules, torch.device("cpu"))
    assert all(value.dtype is torch.float32 for _, value in student.named_parameters())
    x = torch.randn(3, WIDTH, dtype=torch.bfloat16)
    for part in (student.low_rank.sites[0], student.replaced.sites[0]):
        out = part(x, base.forward, 1.0, add_linear)
        assert out.dtype is torch.bfloat16
        out.float().square().sum().backward()
    assert all(value.grad is not None for _, value in student.named_parameters())


def test_a_finished_expert_in_the_base_s_dtype_is_half_as_large_and_does_the_same():
    modules = {
        "blocks.0.self_attn.q": nn.Linear(WIDTH, WIDTH).bfloat16(),
        "head.head": nn.Linear(WIDTH, WIDTH).bfloat16(),
    }
    expert = new_detail(WAN, modules, 2, 4.0, generator())
    root = nn.ModuleDict({"head": nn.ModuleDict({"head": modules["head.head"]})})
    root["blocks"] = nn.ModuleList(
        [nn.ModuleDict({"self_attn": nn.ModuleDict({"q": modules["blocks.0.self_attn.q"]})})]
    )
    expert.low_rank["blocks.0.self_attn.q"][0].up.normal_(generator=generator())
    x = torch.randn(3, WIDTH).bfloat16()
    outputs = []
    for dtype in (torch.float32, torch.bfloat16):
        working = make_fixed(expert, modules, torch.device("cpu"), dtype)
        ((part, _),) = working
        assert {(value.dtype, value.requires_grad) for value in part.parameters()} == {(dtype, False)}
        with torch.no_grad(), in_place(root, working):
            outputs.append(torch.cat([module(x) for module in modules.values()]))
    assert torch.equal(*outputs) and not torch.equal(outputs[0], torch.cat([module(x) for module in modules.values()]))


def test_a_finished_expert_may_hold_anything():
    """Pairs of several scales, differences, a bare parameter: what an extracted LoRA has."""
    torch.manual_seed(4)
    root = nn.ModuleDict({"block": nn.ModuleDict({"q": nn.Linear(WIDTH, WIDTH), "k": nn.Linear(WIDTH, WIDTH)})})
    root["block"].register_parameter("modulation", nn.Parameter(torch.randn(1, 6)))
    layers, scales = ("block.q", "block.k"), (0.5, 2.0)
    pairs = {
        name: (LowRank(torch.randn(2, WIDTH), torch.randn(WIDTH, 2), scale),)
        for name, scale in zip(layers, scales, strict=True)
    }
    diff = {"block.q.bias": torch.randn(WIDTH), "block.modulation": torch.randn(1, 6)}
    expert = Expert("wan", "semantic", pairs, diff=diff)
    expected = {
        name: merged(expert, name, dict(root.named_parameters()).__getitem__) for name, _ in root.named_parameters()
    }
    x, modules = torch.randn(3, WIDTH), dict(root.named_modules())
    with torch.no_grad(), in_place(root, make_fixed(expert, modules, torch.device("cpu"), torch.float32)):
        for name in layers:
            out = torch.nn.functional.linear(x, expected[f"{name}.weight"], expected[f"{name}.bias"])
            assert torch.allclose(modules[name](x), out, atol=1e-5), name
        assert torch.allclose(root["block"].modulation, expected["block.modulation"])


def test_copies_start_from_the_semantic_expert_s_layers():
    """Also from one that changes them by a pair and a difference; what is trained is not an extract of it."""
    modules = {"time_embedding.0": nn.Linear(WIDTH, WIDTH), "head.head": nn.Linear(WIDTH, WIDTH)}
    pair = LowRank(torch.randn(2, WIDTH), torch.randn(WIDTH, 2), 0.5)
    semantic = Expert(
        "wan",
        "semantic",
        {"time_embedding.0": (pair,)},
        {"head.head.weight": torch.ones(WIDTH, WIDTH)},
        {"time_embedding.0.bias": torch.ones(WIDTH)},
    )
    copies = new_detail(WAN, modules, 2, 4.0, generator(), semantic).replaced
    base = modules["time_embedding.0"]
    assert torch.allclose(copies["time_embedding.0.weight"], base.weight + 0.5 * pair.up @ pair.down, atol=1e-6)
    assert torch.allclose(copies["time_embedding.0.bias"], base.bias + 1)
    assert torch.equal(copies["head.head.weight"], torch.ones(WIDTH, WIDTH))
    assert torch.equal(copies["head.head.bias"], modules["head.head"].bias)


def test_ema():
    expert = new_semantic(WAN, WAN_MODULES, 2, 4.0, generator())
    student = Student(expert, WAN_MODULES, torch.device("cpu"))
    ema = student.make_ema()
    start = [value.clone() for value in ema.parameters()]
    for value in student.parameters():
        value.data += 1
    ema.update_ema(student, 0.75)
    for value, old in zip(ema.parameters(), start, strict=True):
        assert torch.allclose(value, old + 0.25, atol=1e-6) and not value.requires_grad


def test_an_alpha_that_a_file_has_rounded_is_one_alpha():
    """Fused layers store three times the alpha over three times the rank."""
    alphas = [torch.tensor(value, dtype=torch.float32).item() / rank for value, rank in ((0.1, 16), (0.1 * 3, 48))]
    assert alphas[0] != alphas[1]
    pairs = [LowRank(torch.zeros(2, WIDTH), torch.zeros(WIDTH, 2), scale) for scale in alphas]
    expert = Expert("wan", "semantic", {"blocks.0.self_attn.q": (pairs[0],), "blocks.0.self_attn.o": (pairs[1],)})
    assert Student(expert, WAN_MODULES, torch.device("cpu")).scale == pytest.approx(0.1 / 16)


def test_experts_that_cannot_be_trained_on_are_refused():
    pair = LowRank(torch.zeros(2, WIDTH), torch.zeros(WIDTH, 2), 1.0)
    other = LowRank(torch.zeros(2, WIDTH), torch.zeros(WIDTH, 2), 2.0)
    device = torch.device("cpu")
    mixed = Expert("wan", "semantic", {"blocks.0.self_attn.q": (pair,), "blocks.0.self_attn.o": (other,)})
    with pytest.raises(ExpertError, match=r"alpha / rank differs between layers"):
        Student(mixed, WAN_MODULES, device)
    with pytest.raises(ExpertError, match="adds full differences"):
        Student(Expert("wan", "semantic", diff={"head.head.weight": torch.zeros(8, 8)}), WAN_MODULES, device)
    with pytest.raises(ExpertError, match=r"The model has no blocks\.9\.q"):
        Student(Expert("wan", "semantic", {"blocks.9.q": (pair,)}), WAN_MODULES, device)
