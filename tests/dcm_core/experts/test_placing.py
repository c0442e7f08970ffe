"""Experts in a base's place: whatever the base is called by, and whoever did not answer is found."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dcm_core.errors import ExpertError
from dcm_core.experts.expert import Expert, LowRank
from dcm_core.experts.modules import RoutedExpert
from dcm_core.experts.placing import in_place, unanswered

WIDTH = 4
REQUIRED = ("embed", "blocks", "head")


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


class Fused(nn.Sequential):
    """As the host's feed-forward of Wan: it reads the last layer's weight and never calls the layer."""

    def forward(self, x):
        return nn.functional.linear(nn.functional.gelu(self[0](x)), self[2].weight, self[2].bias)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.modulation = nn.Parameter(randn(1, WIDTH))
        self.q = nn.Linear(WIDTH, WIDTH)
        self.ffn = Fused(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))

    def forward(self, x):
        return x + self.modulation * self.ffn(self.q(x))


class Model(nn.Module):
    """A base with what the real ones have: a list of blocks, and a part for an input that a call may lack."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.image = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x, image=None, skip=()):
        x = self.embed(x) if image is None else self.embed(x) + self.image(image)
        for index, block in enumerate(self.blocks):
            x = x if index in skip else block(x)
        return self.head(x)


SITES = ["embed", "image", "head", *(f"blocks.{n}.{layer}" for n in range(3) for layer in ("q", "ffn.0", "ffn.2"))]
BARE = [f"blocks.{n}.modulation" for n in range(3)]


def make(root, sites=SITES, bare=BARE):
    low_rank = {
        name: (LowRank(randn(2, WIDTH, seed=n), randn(WIDTH, 2, seed=n + 50), 0.5),) for n, name in enumerate(sites)
    }
    expert = Expert("wan", "detail", low_rank, diff={name: randn(1, WIDTH, seed=n) for n, name in enumerate(bare)})
    return RoutedExpert(expert, dict(root.named_modules()), nn, torch.float32, torch.device("cpu")), expert


def merged(expert):
    root = Model()
    with torch.no_grad():
        for name, (update,) in expert.low_rank.items():
            root.get_submodule(name).weight += update.scale * update.up @ update.down
        for name, tensor in expert.diff.items():
            root.get_parameter(name).add_(tensor)
    return root


def call(root, routed, x, watch=True, **kwargs):
    with torch.no_grad(), in_place(root, [(routed, 1.0)], watch=watch, watch_bare=watch):
        return root(x, **kwargs)


def untouched(root):
    own = [n for n, m in root.named_modules() if "forward" in m.__dict__]
    return own == [] and all(type(value) is nn.Parameter for value in root.parameters())


@pytest.mark.parametrize("watch", [False, True])
def test_a_layer_whose_container_reads_its_weight_is_routed(watch):
    root = Model()
    routed, expert = make(root)
    x, image = randn(5, WIDTH), randn(5, WIDTH, seed=1)
    with torch.no_grad():
        torch.testing.assert_close(call(root, routed, x, watch, image=image), merged(expert)(x, image))
    assert untouched(root)
    lost, resting = unanswered(root, [routed], REQUIRED, bare=True)
    assert lost | resting == (set() if watch else {*SITES, *BARE})


def test_in_a_part_of_the_base_alone():
    """As a block that computes again in a backward pass: its name begins no other's."""
    root = Model()
    root.blocks.extend(Block() for _ in range(8))
    sites = ["embed", *(f"blocks.{n}.q" for n in range(11))]
    routed, _ = make(root, sites, [f"blocks.{n}.modulation" for n in range(11)])
    before = dict(root.named_parameters())
    with in_place(root, [(routed, 1.0)], part="blocks.1"):
        assert [name for name, module in root.named_modules() if "forward" in module.__dict__] == ["blocks.1.q"]
        changed = {
            f"blocks.{n}.modulation"
            for n, block in enumerate(root.blocks)
            if block._parameters["modulation"] is not before[f"blocks.{n}.modulation"]
        }
    assert changed == {"blocks.1.modulation"} and untouched(root)


def test_containers_that_are_not_a_plain_row_of_layers_are_left_alone():
    class Scaled(Fused):
        def forward(self, x, scale=1.0):
            return scale * super().forward(x)

    root = Model()
    root.blocks[0].ffn.__class__ = Scaled
    root.blocks[1].ffn.forward = lambda x: x  # another pack's
    routed, _ = make(root)
    call(root, routed, randn(5, WIDTH))
    assert unanswered(root, [routed], REQUIRED, bare=True)[0] == {"blocks.0.ffn.2", "blocks.1.ffn.0", "blocks.1.ffn.2"}
    assert "forward" in root.blocks[1].ffn.__dict__ and "forward" not in root.blocks[0].ffn.__dict__


def bypass_a_layer(root):
    root.blocks[1].q = type(
        "Direct", (nn.Linear,), {"__call__": lambda self, x: nn.functional.linear(x, self.weight, self.bias)}
    )(WIDTH, WIDTH)


def bypass_a_layer_everywhere(root):
    for block in root.blocks:
        block.q.__class__ = type("Direct", (nn.Linear,), {"__call__": lambda self, x: x @ self.weight.T})


def bypass_all_blocks(root):
    root.forward = lambda x: root.head(root.embed(x))


def bypass_a_part_that_every_call_needs(root):
    root.forward = lambda x: nn.functional.linear(Model.forward(root, x), root.head.weight)
    head = root.head
    head.__class__ = type("Direct", (nn.Linear,), {"__call__": lambda self, x: x @ self.weight.T})


@pytest.mark.parametrize(
    ("plant", "lost"),
    [
        (bypass_a_layer, {"blocks.1.q"}),
        (bypass_a_layer_everywhere, {"blocks.0.q", "blocks.1.q", "blocks.2.q"}),
        (bypass_all_blocks, {name for name in SITES + BARE if name.startswith("blocks")}),
        (bypass_a_part_that_every_call_needs, {"head"}),
    ],
)
def test_layers_that_are_passed_by_are_found(plant, lost):
    root = Model()
    plant(root)
    routed, _ = make(root)
    call(root, routed, randn(5, WIDTH))
    assert unanswered(root, [routed], REQUIRED, bare=True) == (lost, {"image"})


def test_a_bare_parameter_that_is_read_past_its_name_is_found():
    root = Model()
    root.blocks[2].__class__ = type("Past", (Block,), {"forward": lambda self, x: x + own * self.ffn(self.q(x))})
    own = root.blocks[2].modulation
    routed, _ = make(root)
    call(root, routed, randn(5, WIDTH))
    assert unanswered(root, [routed], REQUIRED, bare=True)[0] == {"blocks.2.modulation"}
    assert unanswered(root, [routed], REQUIRED, bare=False)[0] == set()


def test_what_a_call_has_no_use_for_may_rest():
    root = Model()
    routed, _ = make(root)
    call(root, routed, randn(5, WIDTH), skip=(1,))
    resting = {"image", *(name for name in SITES + BARE if name.startswith("blocks.1."))}
    assert unanswered(root, [routed], REQUIRED, bare=True) == (set(), resting)


def test_one_of_two_experts_on_a_layer_is_enough():
    """The later one may replace the layer, so that the earlier one is not called."""
    root = Model()
    below, _ = make(root, ["head"], [])
    replaced = Expert("wan", "detail", replaced={"head.weight": randn(WIDTH, WIDTH), "head.bias": randn(WIDTH)})
    above = RoutedExpert(replaced, dict(root.named_modules()), nn, torch.float32, torch.device("cpu"))
    with torch.no_grad(), in_place(root, [(below, 1.0), (above, 1.0)], watch=True):
        root(randn(5, WIDTH))
    assert unanswered(root, [below, above], REQUIRED, bare=True) == (set(), set())


def test_a_second_expert_s_bare_parameter_is_on_top_of_the_first_s_and_notes_only_its_use():
    root = Model()
    (first, one), (second, two) = make(root, [], BARE[:1]), make(root, [], BARE[:1])
    with torch.no_grad(), in_place(root, [(first, 1.0), (second, 0.5)], watch=True, watch_bare=True):
        assert unanswered(root, [first, second], REQUIRED, bare=True)[0] == set(BARE[:1])
        value = root.blocks[0].modulation * 1
    torch.testing.assert_close(value, root.blocks[0].modulation + one.diff[BARE[0]] + 0.5 * two.diff[BARE[0]])
    assert type(value) is torch.Tensor
    assert unanswered(root, [first, second], REQUIRED, bare=True) == (set(), set())


class Wrapping:
    """As the host's bypass LoRA: it stands before a layer and adds to what that gives."""

    def __init__(self, module, weight):
        self.module, self.weight, self.original_forward = module, weight, module.forward
        module.forward = self.forward

    def forward(self, x):
        return self.original_forward(x) + x @ self.weight.T


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("strength", [1.0, 0.4])
def test_what_stands_before_a_layer_is_kept_where_the_layer_is_replaced(count, strength):
    root, x = Model(), randn(5, WIDTH)
    replaced = Expert(
        "wan", "detail", replaced={"head.weight": randn(WIDTH, WIDTH, seed=1), "head.bias": randn(WIDTH, seed=1)}
    )
    routed = RoutedExpert(replaced, dict(root.named_modules()), nn, torch.float32, torch.device("cpu"))
    with torch.no_grad():
        layer = torch.lerp(root.head(x), nn.functional.linear(x, *replaced.replaced.values()), strength)
        weights = [randn(WIDTH, WIDTH, seed=9 + n) for n in range(count)]
        hooks = [Wrapping(root.head, weight) for weight in weights]
        with in_place(root, [(routed, strength)]):
            torch.testing.assert_close(root.head(x), layer + sum(x @ weight.T for weight in weights))
    assert root.head.forward == hooks[-1].forward and hooks[0].original_forward.__func__ is nn.Linear.forward


class Gated(nn.Linear):
    """A layer that takes more than its input, as newer hosts' may."""

    def forward(self, x, gate=None, *, input_act=None, residual=None):
        assert input_act is None, "the activation was applied before"
        out = super().forward(x)
        out = out if gate is None else gate * out
        return out if residual is None else residual + out


@pytest.mark.parametrize("strength", [1.0, 0.3])
def test_further_arguments_reach_the_layer(strength):
    root = nn.ModuleDict({"a": Gated(WIDTH, WIDTH)})
    pair = LowRank(randn(2, WIDTH), randn(WIDTH, 2, seed=1), 0.5)
    operations = SimpleNamespace(Linear=Gated)
    routed = RoutedExpert(
        Expert("wan", "detail", {"a": (pair,)}), dict(root.named_modules()), nn, torch.float32, torch.device("cpu")
    )
    tensors = {"a.weight": randn(WIDTH, WIDTH, seed=3), "a.bias": randn(WIDTH, seed=3)}
    other = RoutedExpert(
        Expert("wan", "detail", replaced=tensors),
        dict(root.named_modules()),
        operations,
        torch.float32,
        torch.device("cpu"),
    )
    x, residual = randn(5, WIDTH), randn(5, WIDTH, seed=4)
    with torch.no_grad():
        expected = root["a"](x, residual=residual) + strength * 0.5 * (x @ pair.down.T) @ pair.up.T
        with in_place(root, [(routed, strength)]):
            torch.testing.assert_close(root["a"](x, residual=residual), expected)
        expected = residual + torch.lerp(root["a"](x, 2.0), 2 * nn.functional.linear(x, *tensors.values()), strength)
        with in_place(root, [(other, strength)]):
            torch.testing.assert_close(root["a"](x, 2.0, residual=residual), expected)


def test_an_activation_that_the_host_asks_of_the_layer_comes_before_the_expert_s_part_too():
    root = nn.ModuleDict({"a": Gated(WIDTH, WIDTH)})
    pair = LowRank(randn(2, WIDTH), randn(WIDTH, 2, seed=1), 0.5)
    routed = RoutedExpert(
        Expert("wan", "detail", {"a": (pair,)}), dict(root.named_modules()), nn, torch.float32, torch.device("cpu")
    )
    x = randn(5, WIDTH)
    with torch.no_grad(), in_place(root, [(routed, 1.0)], activations={"relu": torch.relu}):
        torch.testing.assert_close(root["a"](x, input_act="relu"), root["a"](torch.relu(x)))
        with pytest.raises(ExpertError, match=r"input_act='swish'.*does not support"):
            root["a"](x, input_act="swish")


class Fusing(nn.Linear):
    """A linear of newer hosts, which does what stands before and after it."""

    def forward(self, x, input_act=None, act_weight=None, act_eps=0.0, residual=None, residual_scale=None):
        if input_act is not None:
            x = ACTIVATIONS[input_act](*((x,) if act_weight is None else (x, act_weight, act_eps)))
        out = super().forward(x)
        return out if residual is None else torch.addcmul(residual, out, residual_scale)


ACTIVATIONS = {
    "relu": torch.relu,
    "rms_norm": lambda x, weight, eps: nn.functional.rms_norm(x, weight.shape, weight, eps),
}
BESIDES = {
    "none of it": {"input_act": None, "act_weight": None, "act_eps": 0.0, "residual": None, "residual_scale": None},
    "activation": {"input_act": "relu"},
    "norm": {"input_act": "rms_norm", "act_weight": randn(WIDTH, seed=6), "act_eps": 0.1},
    "residual": {"residual": randn(5, WIDTH, seed=4), "residual_scale": randn(WIDTH, seed=5)},
}
BESIDES["all of it"] = BESIDES["norm"] | BESIDES["residual"]


@pytest.mark.parametrize("besides", BESIDES.values(), ids=BESIDES)
@pytest.mark.parametrize("strength", [1.0, 0.3])
@pytest.mark.parametrize(
    ("paired", "replaced", "changed"),
    [
        (True, (), ()),
        (True, (), ("bias",)),
        (False, (), ("weight", "bias")),
        (False, ("weight", "bias"), ()),
        (False, ("weight",), ("bias",)),
    ],
)
def test_a_linear_that_does_more_gives_what_one_with_the_expert_merged_gives(
    paired, replaced, changed, strength, besides
):
    root = nn.ModuleDict({"a": Fusing(WIDTH, WIDTH)})
    tensors = {"weight": randn(WIDTH, WIDTH, seed=3), "bias": randn(WIDTH, seed=3)}
    pair = LowRank(randn(2, WIDTH), randn(WIDTH, 2, seed=1), 0.5)
    expert = Expert(
        "wan",
        "detail",
        {"a": (pair,)} if paired else {},
        {f"a.{name}": tensors[name] for name in replaced},
        {f"a.{name}": tensors[name] for name in changed},
    )
    routed = RoutedExpert(
        expert, dict(root.named_modules()), SimpleNamespace(Linear=Fusing), torch.float32, torch.device("cpu")
    )
    merged = copy.deepcopy(root["a"])
    with torch.no_grad():
        for name in replaced:
            getattr(merged, name).lerp_(tensors[name], strength)
        for name in changed:
            getattr(merged, name).add_(tensors[name], alpha=strength)
        if paired:
            merged.weight.add_(pair.up @ pair.down, alpha=strength * pair.scale)
        x = randn(5, WIDTH)
        with in_place(root, [(routed, strength)], activations=ACTIVATIONS):
            torch.testing.assert_close(root["a"](x, **besides), merged(x, **besides))


@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_compiled_code_is_known_from_its_making_and_not_made_again(whole, fullgraph):
    root = Model()
    routed, expert = make(root)
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph

    if whole:
        runner = torch.compile(root, backend=backend, fullgraph=fullgraph)
    else:
        runner = root
        for index, block in enumerate(root.blocks):
            root.blocks[index] = torch.compile(block, backend=backend, fullgraph=fullgraph)
    x, image = randn(5, WIDTH), randn(5, WIDTH, seed=1)
    counts = []
    for run in range(2):
        for step in range(3):
            with torch.no_grad(), in_place(root, [(routed, 1.0)], watch=step == 0):
                out = runner(x, image)
            if step == 0:
                assert unanswered(root, [routed], REQUIRED, bare=False) == (set(), set()), run
            counts.append(len(compiled))
    assert counts[0] > 0 and set(counts) == {counts[0]}
    with torch.no_grad():
        torch.testing.assert_close(out, merged(expert)(x, image))


def test_a_layer_that_compiled_code_passes_by_is_found():
    root = Model()
    bypass_a_layer(root)
    routed, _ = make(root, bare=[])
    for index, block in enumerate(root.blocks):
        root.blocks[index] = torch.compile(block, backend="eager")
    call(root, routed, randn(5, WIDTH))
    assert unanswered(root, [routed], REQUIRED, bare=True) == ({"blocks.1.q"}, {"image"})


def test_nothing_is_noted_after_the_first_call():
    root = Model()
    routed, _ = make(root)
    call(root, routed, randn(5, WIDTH))
    call(root, routed, randn(5, WIDTH), watch=False)
    assert routed.called == set()


def test_a_copy_has_notes_of_its_own():
    root = Model()
    routed, _ = make(root)
    call(root, routed, randn(5, WIDTH))
    again = copy.deepcopy(routed)
    assert routed.called and again.called == again.checked == set() and again.places == {}
    assert again.called is not routed.called
