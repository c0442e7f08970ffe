"""How much an expert changes each block: norms with a known answer, and every way to an expert gives the same ones."""

import json
import math
import re
import weakref

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from dcm_core.errors import CheckpointError, DCMError
from dcm_core.experts.expert import Expert, LowRank, write_expert
from dcm_core.experts.match import Target
from dcm_core.experts.modules import RoutedExpert
from dcm_core.experts.reader import read_expert, read_release
from dcm_core.experts.updates import Update, file_updates, routed_updates
from dcm_core.families import FAMILIES, HUNYUAN_VIDEO, WAN
from dcm_core.files.checkpoint import recognise, semantic_state_dict
from dcm_core.files.tensor_file import TensorFile
from dcm_core.inspection import magnitude
from dcm_core.inspection.magnitude import (
    Change,
    added_norm,
    column_of,
    difference_norm,
    file_profile,
    in_words,
    make_profile,
    measure,
    norm,
)

from ..conftest import release_shapes


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def dense_norm(low_rank, diff=None):
    value = low_rank.scale * low_rank.up.double().flatten(1) @ low_rank.down.double().flatten(1)
    return float((value + diff.double().flatten(1) if diff is not None else value).norm())


def test_a_pair_whose_product_is_known():
    pair = LowRank(torch.tensor([[0.0, 4.0, 3.0]]), torch.tensor([[6.0], [8.0]]), 0.5)
    assert added_norm(pair) == 0.5 * 5 * 10
    assert added_norm(None, torch.full((3, 3), -2.0)) == 6
    diff = -0.5 * pair.up @ pair.down
    assert added_norm(pair, diff) == pytest.approx(0, abs=1e-6)
    assert added_norm(pair, 2 * diff) == pytest.approx(25)


@given(
    rank=st.integers(1, 6),
    sizes=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    kernel=st.sampled_from([(), (1,), (2, 3)]),
    scale=st.floats(-8, 8, width=16),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    with_diff=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_equals_the_norm_of_the_product(rank, sizes, kernel, scale, dtype, with_diff, seed):
    out, width = sizes
    pair = LowRank(
        randn(rank, width, *kernel, seed=seed).to(dtype),
        randn(out, rank, *[1] * len(kernel), seed=seed + 1).to(dtype),
        scale,
    )
    diff = randn(out, width, *kernel, seed=seed + 2).to(dtype) if with_diff else None
    assert added_norm(pair, diff) == pytest.approx(dense_norm(pair, diff), rel=1e-5, abs=1e-3)


def test_columns_that_nearly_cancel_are_measured():
    """In float32 the Gram matrices would leave about 1 of noise here."""
    down, up = randn(1, 64), randn(64, 1)
    pair = LowRank(
        torch.cat([1000 * down, -1000 * down]).double(), torch.cat([up, up * (1 + 1e-6)], dim=1).double(), 1.0
    )
    assert added_norm(pair) == pytest.approx(dense_norm(pair), rel=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int8])
def test_norms_of_any_number_format(dtype):
    tensor = (4 * randn(7, 5)).to(dtype)
    assert norm(tensor) == pytest.approx(float(tensor.double().norm()), rel=1e-5)


def test_a_difference_is_measured_some_rows_at_a_time(monkeypatch):
    monkeypatch.setattr(magnitude, "ROWS", 3)
    a, b = randn(10, 4).bfloat16(), randn(10, 4, seed=1)
    assert difference_norm(a, b) == pytest.approx(float((a.float() - b).norm()), rel=1e-5)
    assert difference_norm(torch.tensor(3.0), torch.tensor(1.0)) == 2


def test_strength_counts_and_a_replacement_without_base_is_unknown():
    pair = LowRank(torch.ones(1, 2), torch.ones(2, 1), 1.0, start=2)

    def base(name, start, rows):
        return torch.full((6, 2), 3.0)[start : start + rows]

    assert measure(Update("w", (pair,), start=2), base, -0.5) == Change("w", 1.0, 6.0)
    assert measure(Update("w", replaced=torch.full((6, 2), 4.0)), base) == Change(
        "w", pytest.approx(12**0.5), pytest.approx(108**0.5)
    )
    assert measure(Update("w", replaced=torch.ones(6, 2)), magnitude.no_base) == Change("w", None, None)


def test_columns():
    assert column_of("blocks.12.ffn.0.weight", WAN) == ("blocks", 12)
    assert column_of("time_embedding.0.weight", WAN) == ("in", 0)
    assert column_of("head.head.bias", WAN) == ("out", 0)
    assert column_of("txt_in.individual_token_refiner.blocks.1.mlp.0.weight", HUNYUAN_VIDEO) == ("in", 0)
    assert column_of("single_blocks.3.linear1.weight", HUNYUAN_VIDEO) == ("single_blocks", 3)
    assert [in_words(column) for column in (("in", 0), ("single_blocks", 3), ("out", 0))] == [
        "the embedders",
        "single block 3",
        "the output head",
    ]


def test_a_block_is_the_root_of_its_squares_and_shares_need_every_base():
    changes = [Change("blocks.1.a", 3.0, 6.0), Change("blocks.1.b", 4.0, 8.0), Change("head.x", 1.0, 4.0)]
    profile = make_profile({"detail": changes}, WAN, ["blocks.2.a"])
    assert profile.relative and profile.experts == {"detail": {("blocks", 1): 0.5, ("out", 0): 0.25}}
    assert profile.groups == {"in": 1, "blocks": 3, "out": 1}
    assert profile.summary()["change"] == "detail 37.5% on average, most in block 1 (50%)"
    absolute = make_profile({"detail": changes, "semantic": [Change("blocks.0.a", 2.0, None)]}, WAN)
    assert not absolute.relative
    assert absolute.experts == {"detail": {("blocks", 1): 5.0, ("out", 0): 1.0}, "semantic": {("blocks", 0): 2.0}}
    assert "semantic norm 2 on average" in absolute.summary()["change"]
    assert not make_profile({"detail": [*changes, Change("blocks.0.a", 1.0, 0.0)]}, WAN).relative, (
        "nothing is a share of zeros"
    )


def test_what_cannot_be_measured_is_named():
    changes = [Change("head.x", None, None), Change("blocks.0.a", math.nan, 1.0), Change("blocks.0.b", 2.0, 1.0)]
    profile = make_profile({"detail": changes}, WAN)
    assert profile.unmeasured == {"head.x": ("out", 0)}
    assert profile.experts == {"detail": {("blocks", 0): 2.0}}
    assert "head.x" in profile.summary()["not shown"] and "blocks.0.a" in profile.summary()["broken"]


def column_of_key(family, key):
    """Where a diffusers key is shown, by its own name."""
    groups = {"blocks": "blocks", "transformer_blocks": "double_blocks", "single_transformer_blocks": "single_blocks"}
    if match := re.match(r"(\w+)\.(\d+)\.", key):
        return groups[match[1]], int(match[2])
    return ("out" if key.startswith(("proj_out", "norm_out")) else "in"), 0


def by_hand(family, release):
    """column -> (squared norm of the change, of the weights), from the release's own keys."""
    sums = {}
    for key, tensor in release.items():
        tensor = tensor.double()
        if ".lora_A." in key:
            module = key.partition(".lora_A.")[0]
            change = family.lora_scale * release[key.replace("lora_A", "lora_B")].double() @ tensor
            base = release[f"{module}.base_layer.weight"].double()
        elif source := family.detail_source(key):
            base = release[source].double()
            change = tensor - base
        else:
            continue
        total = sums.setdefault(column_of_key(family, key), [0.0, 0.0])
        total[0] += float(change.square().sum())
        total[1] += float(base.square().sum())
    return sums


def test_a_release_by_hand(family, save, release):
    profile = file_profile(save(release))
    assert profile.relative and not profile.unmeasured and not profile.broken
    expected = {column: (change / base) ** 0.5 for column, (change, base) in by_hand(family, release).items()}
    assert len(expected) > 3
    assert profile.experts == {"detail": pytest.approx(expected, rel=1e-5)}


def test_an_expert_file_alone_and_with_its_base(family, converted, release):
    alone = file_profile(converted[1])
    by_column = by_hand(family, release)
    blocks = {column: change**0.5 for column, (change, _) in by_column.items() if column[0] not in ("in", "out")}
    assert not alone.relative
    assert {column: alone.experts["detail"][column] for column in blocks} == pytest.approx(blocks, rel=1e-5)
    assert {column for column in alone.unmeasured.values()} == {("in", 0), ("out", 0)}

    base = TensorFile(converted[0])
    tensors = {name.removeprefix("diffusion_model."): base.read(name) for name in base.shapes}
    target = Target("Test", family, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    whole = file_profile(converted[1], target, lambda name, start, rows: tensors[name][start : start + rows])
    expected = {column: (change / own) ** 0.5 for column, (change, own) in by_column.items()}
    assert whole.relative and whole.experts == {"detail": pytest.approx(expected, rel=1e-5)}


def test_a_model_of_another_size_is_not_used(family, converted):
    def base(name, start, rows):
        raise AssertionError("asked for the weights of a model that does not fit")

    for shapes in ({}, {name: (3, 3) for name in recognise_native(converted[0])}):
        assert file_profile(converted[1], Target("Test", family, shapes), base) == file_profile(converted[1])


def recognise_native(path):
    return [name.removeprefix("diffusion_model.") for name in TensorFile(path).shapes]


def test_an_fp8_base_gives_no_shares(family, save, release):
    cast = {
        key: t.to(torch.float8_e4m3fn) if key.endswith((".base_layer.weight", ".proj_mlp.weight")) else t
        for key, t in release.items()
    }
    profile = file_profile(save(cast))
    assert not profile.relative and not profile.unmeasured
    expected = {column: change**0.5 for column, (change, _) in by_hand(family, release).items()}
    assert profile.experts == {"detail": pytest.approx(expected, rel=1e-5)}


def test_files_without_a_known_expert(save, base):
    assert file_profile(save(base)) is None
    assert file_profile(save({f"unet.down.0.attn.lora_{half}.weight": torch.ones(2, 2) for half in "AB"})) is None


def test_nan_is_named_and_the_rest_shown(family, save, release):
    key = next(key for key in release if ".lora_B." in key)
    release[key][0, 0] = math.nan
    profile = file_profile(save(release))
    assert len(profile.broken) == 1 and profile.experts["detail"]


def test_half_a_release_is_an_error(save, release):
    del release[next(key for key in release if ".lora_B." in key)]
    with pytest.raises(CheckpointError, match="1 tensor is missing"):
        file_profile(save(release))


def dense(updates, shapes):
    """native tensor name -> what is added to it; replacements as they are."""
    found = {}
    for update in updates:
        whole = found.setdefault(update.name, torch.zeros(shapes[update.name]))
        rows = slice(update.start, update.start + update.rows)
        for part in (update.replaced, update.diff):
            if part is not None:
                whole[rows] += part.float()
        if (pair := update.total) is not None:
            assert (pair.start, pair.up.shape[0]) == (update.start, update.rows)
            whole[rows] += pair.scale * pair.up.float() @ pair.down.float()
    return found


def dense_expert(expert, shapes):
    updates = [
        Update(f"{module}.weight", (update,), start=update.start)
        for module, found in expert.low_rank.items()
        for update in found
    ]
    updates += [Update(name, replaced=tensor) for name, tensor in expert.replaced.items()]
    updates += [Update(name, diff=tensor) for name, tensor in expert.diff.items()]
    return dense(updates, shapes)


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name])


def namings(family, release):
    """name of the naming -> (tensors, settings beside the file) of the release's expert in it."""
    detail = {key: tensor for key, tensor in release.items() if ".lora_" in key or family.detail_source(key)}
    pairs = {key.replace(".lora1", ""): tensor for key, tensor in detail.items() if ".lora_" in key}
    kohya = {}
    for key, tensor in pairs.items():
        module, _, half = key.partition(".lora_")
        stem = "lora_unet_" + module.replace(".", "_")
        kohya[f"{stem}.lora_{'down' if half[0] == 'A' else 'up'}.weight"] = tensor
        kohya[f"{stem}.alpha"] = torch.tensor(3.0)
    return {
        "release": (detail, None),
        "diffusers": ({f"transformer.{key}": tensor for key, tensor in pairs.items()}, None),
        "peft": (
            {f"base_model.model.{key}": tensor for key, tensor in pairs.items()},
            {"lora_alpha": 24, "use_rslora": True},
        ),
        "kohya": (kohya, None),
    }


@pytest.mark.parametrize("naming", ["release", "diffusers", "peft", "kohya"])
def test_every_naming_is_read_as_the_expert_is(family, save, release, naming):
    file = TensorFile(save(release))
    native = semantic_state_dict(file, recognise(file))
    shapes = {name: tuple(tensor.shape) for name, tensor in native.items()}
    tensors, settings = namings(family, release)[naming]
    lora = TensorFile(save(tensors, "lora.safetensors"))
    if settings is not None:
        lora.path.with_name("adapter_config.json").write_text(json.dumps(settings))
    expected = dense_expert(read_expert(tensors, {}, "detail", family, shapes, lora.path), shapes)
    for known in (shapes, None):  # with the model, and without
        assert_same(dense(file_updates(lora, recognise(lora), known), shapes), expected)


def test_differences_go_with_the_pair_of_their_layer(save):
    generator = torch.Generator().manual_seed(0)
    stem = "diffusion_model.double_blocks.0.img_attn.qkv"
    tensors = {
        f"{stem}.lora_down.weight": torch.randn(2, 4, generator=generator),
        f"{stem}.lora_up.weight": torch.randn(12, 2, generator=generator),
        f"{stem}.diff": torch.randn(12, 4, generator=generator),
        f"{stem}.diff_b": torch.randn(12, generator=generator),
    }
    file = TensorFile(save(tensors, metadata={"dcm.family": "hunyuan_video"}))
    found = {update.name: update for update in file_updates(file, recognise(file))}
    assert len(found) == 2
    value = tensors[f"{stem}.diff"] + tensors[f"{stem}.lora_up.weight"] @ tensors[f"{stem}.lora_down.weight"]
    pair = found["double_blocks.0.img_attn.qkv.weight"]
    assert measure(pair, magnitude.no_base).norm == pytest.approx(float(value.norm()), rel=1e-5)


def test_an_attached_expert_is_read_as_its_file(family, save, release):
    """Also low-rank rows of a fused layer beside a difference of all its rows."""
    file = TensorFile(save(release))
    contents = recognise(file)
    shapes = contents.native_shapes(file)
    expert = read_release(file, contents)
    fused = next(
        (module for module, updates in expert.low_rank.items() if len(updates) > 1), next(iter(expert.low_rank))
    )
    bare = {"wan": {"blocks.0.modulation": randn(*shapes["blocks.0.modulation"])}} if family is WAN else {}
    diff = {
        f"{fused}.weight": randn(*shapes[f"{fused}.weight"]),
        f"{fused}.bias": randn(*shapes[f"{fused}.bias"]),
        **bare.get("wan", {}),
    }
    expert = Expert(family.name, "detail", expert.low_rank, expert.replaced, diff)
    base = {}
    for name, shape in shapes.items():
        module, _, param = name.rpartition(".")
        if param == "weight" and len(shape) == 2:
            base[module] = nn.Linear(shape[1], shape[0], bias=f"{module}.bias" in shapes)
    if bare:
        base["blocks.0"] = nn.Module()
        base["blocks.0"].modulation = nn.Parameter(randn(*shapes["blocks.0.modulation"]))
    routed = RoutedExpert(expert, base, nn, torch.float32, torch.device("cpu"))
    assert_same(dense(routed_updates(routed, dict(routed.named_parameters())), shapes), dense_expert(expert, shapes))


def test_only_what_is_needed_is_read_and_let_go(family, save, release, monkeypatch):
    path = save(release)
    read, alive, most = TensorFile.read, [], [0]
    keys = []

    def watched(self, key):
        tensor = read(self, key)
        keys.append(key)
        alive.append(weakref.ref(tensor))
        most[0] = max(most[0], sum(there.nbytes for ref in alive if (there := ref()) is not None))
        return tensor

    monkeypatch.setattr(TensorFile, "read", watched)
    progress = []
    file_profile(path, progress=lambda *done: progress.append(done))
    assert len(keys) == len(set(keys)), "nothing is read twice"
    assert not [key for key in keys if "ff" in key]
    largest = max(tensor.nbytes for tensor in release.values())
    assert most[0] <= 3 * largest, "a layer and its base"
    assert most[0] < sum(release[key].nbytes for key in keys) / 2
    assert progress[-1][0] == progress[-1][1] == len(progress)


def test_a_written_expert_without_alpha_or_boundary(save, tmp_path):
    expert = Expert("wan", "semantic", {"blocks.0.self_attn.q": (LowRank(torch.ones(2, 4), torch.ones(4, 2), 0.25),)})
    write_expert(tmp_path / "e.safetensors", expert, {"blocks.0.self_attn.q.weight": (4, 4)})
    assert file_profile(tmp_path / "e.safetensors").experts == {"semantic": {("blocks", 0): 2.0}}


names = st.sampled_from(
    [key.partition(".lora_")[0] for family in FAMILIES.values() for key in list(release_shapes(family))[::9]]
)
pairs = [".lora_A.weight", ".lora_B.weight", ".lora_down.weight", ".lora_up.weight"]
endings = st.sampled_from([*pairs, "", ".alpha", ".diff", ".diff_b", ".set_weight", ".dora_scale"])


@given(
    keys=st.dictionaries(st.tuples(names, endings), st.lists(st.integers(0, 3), max_size=4), min_size=1, max_size=12)
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
def test_odd_files_give_a_profile_or_a_clear_error(save, keys):
    tensors = {name + ending: torch.ones(shape) for (name, ending), shape in keys.items()}
    try:
        profile = file_profile(save(tensors))
    except DCMError:
        return
    if profile is not None:
        assert all(math.isfinite(size) for sizes in profile.experts.values() for size in sizes.values())
