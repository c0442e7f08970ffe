"""A routed expert does what the same change merged into the weights would do."""

import copy

import pytest
import torch
from torch import nn

from dcm_core.errors import ExpertError
from dcm_core.experts.expert import Expert, LowRank
from dcm_core.experts.modules import RoutedExpert, add_linear, find_module


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


@pytest.fixture
def base():
    torch.manual_seed(0)
    return nn.ModuleDict(
        {
            "qkv": nn.Linear(4, 12),
            "head": nn.Linear(4, 6),
            "norm": nn.RMSNorm(4),
            "ln": nn.LayerNorm(4),
            "conv": nn.Conv3d(1, 1, 1),
        }
    )


def build(expert, base):
    return RoutedExpert(expert, dict(base.named_modules()), nn, torch.float32, torch.device("cpu"))


def run(routed, base, name, x, strength=1.0):
    site = routed.sites[routed.names.index(name)]
    return site(x, base[name].forward, strength, add_linear)


def test_the_difference_of_a_bias_takes_no_weight(base):
    """An extracted LoRA has one on nearly every linear."""
    bias, pair = randn(12), LowRank(randn(2, 4), randn(12, 2, seed=1), 1.0)
    routed = build(Expert("wan", "semantic", {"qkv": (pair,)}, diff={"qkv.bias": bias}), base)
    assert sum(value.numel() for value in routed.parameters()) == 2 * 4 + 12 * 2 + 12
    x = randn(5, 4)
    with torch.no_grad():
        expected = base["qkv"](x) + 0.5 * (x @ pair.down.T @ pair.up.T + bias)
        assert torch.allclose(run(routed, base, "qkv", x, 0.5), expected, atol=1e-6)


UPDATES = (LowRank(randn(2, 4), randn(4, 2, seed=1), 0.5, 0), LowRank(randn(3, 4, seed=2), randn(4, 3, seed=3), 2.0, 8))


@pytest.mark.parametrize("strength", [1.0, 0.3, -2.0])
def test_low_rank_equals_merged(base, strength):
    routed = build(Expert("wan", "detail", low_rank={"qkv": UPDATES}), base)
    weight = base["qkv"].weight.detach().clone()
    for update in UPDATES:
        weight[update.start : update.start + 4] += strength * update.scale * update.up @ update.down
    x = randn(2, 5, 4)
    merged = nn.functional.linear(x, weight, base["qkv"].bias)
    torch.testing.assert_close(run(routed, base, "qkv", x, strength), merged)


@pytest.mark.parametrize("strength", [1.0, 0.25])
def test_replaced_answers_alone_or_interpolates(base, strength):
    weight, bias = randn(6, 4), randn(6)
    routed = build(Expert("wan", "detail", replaced={"head.weight": weight, "head.bias": bias}), base)
    x = randn(3, 4)
    expected = torch.lerp(base["head"](x), nn.functional.linear(x, weight, bias), strength)
    torch.testing.assert_close(run(routed, base, "head", x, strength), expected)
    assert routed.replaced_weights() == {"head.weight": "sites.0.replaced.weight", "head.bias": "sites.0.replaced.bias"}


@pytest.mark.parametrize("strength", [1.0, 0.25])
@pytest.mark.parametrize("param", ["weight", "bias"])
@pytest.mark.parametrize("name", ["head", "ln", "conv"])
def test_one_replaced_tensor_leaves_the_other_one_or_its_change(base, name, param, strength):
    other = {"weight": "bias", "bias": "weight"}[param]
    module = base[name]
    own, change = (randn(*getattr(module, p).shape, seed=s) for s, p in enumerate((param, other)))
    x = randn(2, 1, 3, 2, 2) if name == "conv" else randn(3, 5, 4)
    with torch.no_grad():
        plain = module(x)
        for diff in ({}, {f"{name}.{other}": change}):
            routed = build(Expert("wan", "detail", replaced={f"{name}.{param}": own}, diff=diff), base)
            out = run(routed, base, name, x, strength)
            merged = copy.deepcopy(module)
            getattr(merged, param).copy_(own)
            getattr(merged, other).add_(diff.get(f"{name}.{other}", 0))
            torch.testing.assert_close(out, torch.lerp(plain, merged(x), strength))


def test_a_replaced_bias_goes_with_a_low_rank_weight(base):
    routed = build(Expert("wan", "detail", {"qkv": UPDATES[:1]}, {"qkv.bias": randn(12)}), base)
    x = randn(3, 4)
    weight = base["qkv"].weight.detach().clone()
    weight[:4] += UPDATES[0].scale * UPDATES[0].up @ UPDATES[0].down
    torch.testing.assert_close(run(routed, base, "qkv", x), nn.functional.linear(x, weight, randn(12)))


@pytest.mark.parametrize("name", ["head", "norm", "ln", "conv"])
def test_diff_equals_merged(base, name):
    module = base[name]
    diff = {f"{name}.{p}": randn(*t.shape) for p, t in module.named_parameters()}
    routed = build(Expert("wan", "detail", diff=diff), base)
    x = randn(1, 1, 3, 2, 2) if name == "conv" else randn(3, 4)
    out = run(routed, base, name, x, 0.5)
    with torch.no_grad():
        for param, tensor in module.named_parameters():
            tensor += 0.5 * diff[f"{name}.{param}"]
    torch.testing.assert_close(out, module(x))


@pytest.mark.parametrize("kind", ["replaced", "diff"])
def test_bare_parameter(base, kind):
    base.modulation = nn.Parameter(randn(1, 6, 4))
    tensor = randn(1, 6, 4, seed=9)
    routed = build(Expert("wan", "detail", **{kind: {"block.modulation": tensor}}), nn.ModuleDict({"block": base}))
    ((module, name, value),) = routed.bare_values(nn.ModuleDict({"block": base}), 0.5)
    assert (module, name) == (base, "modulation")
    expected = base.modulation + 0.5 * (tensor if kind == "diff" else tensor - base.modulation)
    torch.testing.assert_close(value, expected)


def test_base_is_not_touched(base):
    before = {k: v.clone() for k, v in base.state_dict().items()}
    routed = build(Expert("wan", "detail", low_rank={"qkv": UPDATES}), base)
    run(routed, base, "qkv", randn(1, 4))
    assert all(torch.equal(v, before[k]) for k, v in base.state_dict().items())
    assert not set(map(id, routed.parameters())) & set(map(id, base.parameters()))


@pytest.mark.parametrize(
    ("expert", "message"),
    [
        (Expert("wan", "detail", low_rank={"gone": UPDATES}), "has no gone"),
        (Expert("wan", "detail", low_rank={"conv": UPDATES}), "conv cannot be switched"),
        (Expert("wan", "detail", diff={"norm.modulation": torch.ones(4)}), r"has no norm\.modulation"),
        (
            Expert("wan", "detail", {"head": UPDATES[:1]}, {"head.weight": torch.ones(6, 4)}),
            r"head\.weight is both replaced and changed",
        ),
        (Expert("wan", "detail", {}, *2 * [{"head.bias": torch.ones(6)}]), r"head\.bias is both replaced and changed"),
    ],
)
def test_what_cannot_be_routed_is_named(base, expert, message):
    with pytest.raises(ExpertError, match=message):
        build(expert, base)


def test_sites_are_found_through_compile_wrappers(base):
    class Wrapper(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self._orig_mod = inner

    root = Wrapper(nn.ModuleDict({"block": Wrapper(base)}))
    assert find_module(root, "block.qkv") is base["qkv"]
