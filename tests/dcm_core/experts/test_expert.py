"""Experts as data: the release's, our file, and every naming they may come in."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dcm_core.errors import ExpertError
from dcm_core.experts.expert import (
    Expert,
    LowRank,
    expert_id,
    expert_to_state_dict,
    place_low_rank,
    split_update,
    stack_updates,
    write_expert,
)
from dcm_core.experts.match import guess_family, match_expert
from dcm_core.experts.reader import check_sizes, read_expert
from dcm_core.families import FAMILIES, HUNYUAN_VIDEO, WAN
from dcm_core.families.keymap import Piece, fuse, fused_shape
from dcm_core.files.tensor_file import TensorFile

GOLDEN = Path(__file__).parents[2] / "golden"
RELEASES = {"wan": "wan_tiny", "hunyuan_video": "hy_tiny"}


def random_like(shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randn(tuple(shape), generator=generator) for key, shape in shapes.items()}


def release(family):
    """(detail tensors, what makes each native tensor of the base, native shapes of the base) of a small release."""
    keys = json.loads((GOLDEN / f"{RELEASES[family.name]}.keys.json").read_text())
    detail = {k: s for k, s in keys.items() if ".lora_" in k or family.detail_source(k)}
    semantic = {k.replace(".base_layer", ""): s for k, s in keys.items() if k not in detail}
    matched = family.key_map.match(semantic).matched
    shapes = {target: fused_shape([semantic[p.source] for p in pieces]) for target, pieces in matched.items()}
    return random_like(detail), matched, shapes


def read_detail(family):
    """(the expert of a small release, native shapes of its base)."""
    tensors, _, shapes = release(family)
    facts = {"dcm.boundary": "0.5", "dcm.timesteps": "[1000, 500]"}
    return read_expert(tensors, facts, "detail", family, shapes), shapes


@pytest.fixture(params=FAMILIES.values(), ids=FAMILIES)
def family(request):
    return request.param


def delta(expert, module, shape):
    """The full weight change of a module."""
    out = torch.zeros(shape)
    for update in expert.low_rank[module]:
        out[update.start : update.start + update.up.shape[0]] += update.scale * update.up.float() @ update.down.float()
    return out


def assert_same(a, b, shapes):
    assert a.low_rank.keys() == b.low_rank.keys()
    assert a.replaced.keys() == b.replaced.keys()
    for module in a.low_rank:
        shape = shapes[f"{module}.weight"]
        torch.testing.assert_close(delta(a, module, shape), delta(b, module, shape))
    for name, tensor in a.replaced.items():
        torch.testing.assert_close(tensor.float(), b.replaced[name].float(), rtol=0, atol=0)


def test_release_is_placed_whole(family):
    """Each layer changes as the diffusers layers that it is made of: W + 2 B A, or the copy in its place."""
    tensors, matched, shapes = release(family)
    expert, _ = read_detail(family)
    pairs = {key.split(".lora_")[0] for key in tensors if ".lora_" in key}
    copies = {family.detail_source(key): key for key in tensors if family.detail_source(key)}
    placed = set()
    for name, pieces in matched.items():
        module, sources = name.removesuffix(".weight"), [piece.source for piece in pieces]
        if sources[0] in copies:
            whole = fuse(pieces, {source: tensors[copies[source]] for source in sources})
            assert torch.equal(expert.replaced[name], whole), name
            placed.add(name)
        elif own := pairs & {source.removesuffix(".weight") for source in sources}:
            rows = [shapes[name][0]] if len(sources) == 1 else [shapes[name][1]] * 3
            rows += [shapes[name][0] - sum(rows)] if len(sources) > 3 else []
            dense = {source: torch.zeros(count, shapes[name][1]) for source, count in zip(sources, rows, strict=True)}
            for source in own:
                down, up = (tensors[f"{source}.lora_{part}.lora1.weight"] for part in "AB")
                dense[f"{source}.weight"] = 2 * up @ down
            torch.testing.assert_close(delta(expert, module, shapes[name]), fuse(pieces, dense), msg=name)
            placed.add(module)
    assert placed == {*expert.low_rank, *expert.replaced}
    assert expert.ranks == (8,)


def test_fused_rows_start_where_their_part_starts():
    updates = read_detail(HUNYUAN_VIDEO)[0].low_rank["single_blocks.1.linear1"]
    assert [update.start for update in updates] == [0, 256, 512]


def test_a_pair_s_rows_are_in_native_order():
    """HunyuanVideo's last modulation has its halves the other way round, so that a LoRA on it has, too."""
    down, up = torch.randn(2, 4), torch.randn(8, 2)
    piece = HUNYUAN_VIDEO.key_map.find_module("norm_out.linear")
    placed = place_low_rank(piece, down, up, 0.5)
    whole = fuse([replace(piece, source="whole")], {"whole": up @ down})
    torch.testing.assert_close(placed.up @ placed.down, whole)
    assert not torch.equal(placed.up, up)


def test_our_file_round_trips(family):
    expert, shapes = read_detail(family)
    stored, metadata = expert_to_state_dict(expert, shapes)
    again = read_expert(stored, metadata, "detail", family, shapes)
    assert_same(expert, again, shapes)
    assert again.boundary == expert.boundary
    assert again.timesteps == expert.timesteps == (1000, 500)
    assert again.ranks == (8,), "fused pairs are taken apart again"


def to_kohya(key):
    module, _, rest = key.removeprefix("diffusion_model.").rpartition(".lora_")
    return f"lora_unet_{module.replace('.', '_')}.lora_{rest}" if module else key


def diffusers_namings(detail):
    """The release's own keys as other tools would write them."""
    lora = {k: v for k, v in detail.items() if ".lora_" in k}
    yield "release keys", lora, 2.0
    yield "PEFT", {f"base_model.model.{k.replace('.lora1', '')}": v for k, v in lora.items()}, 1.0
    yield "PEFT, adapter name", {f"base_model.model.{k.replace('.lora1', '.default')}": v for k, v in lora.items()}, 1.0
    yield "diffusers", {f"transformer.{k.replace('.lora1', '')}": v for k, v in lora.items()}, 1.0
    old = {"lora_A.lora1": "lora.down", "lora_B.lora1": "lora.up"}
    renamed = {k.replace(*next(i for i in old.items() if i[0] in k)): v for k, v in lora.items()}
    yield "old diffusers", renamed, 1.0
    flat = {}
    for key, tensor in lora.items():
        module, rest = key.split(".lora_")
        flat[f"lora_unet_{module.replace('.', '_')}.lora_{'down' if rest[0] == 'A' else 'up'}.weight"] = tensor
    yield "kohya over diffusers names", flat, 1.0


def test_every_naming_means_the_same(family):
    detail, _, shapes = release(family)
    expert, _ = read_detail(family)
    for name, tensors, scale in diffusers_namings(detail):
        read = read_expert(tensors, {}, "detail", family, shapes)
        assert read.low_rank.keys() == expert.low_rank.keys(), name
        module = sorted(read.low_rank)[0]
        shape = shapes[f"{module}.weight"]
        torch.testing.assert_close(delta(read, module, shape), delta(expert, module, shape) * scale / 2, msg=name)


def test_native_namings(family):
    expert, shapes = read_detail(family)
    stored, _ = expert_to_state_dict(expert, shapes)
    lora = {k: v for k, v in stored.items() if "set_weight" not in k}
    expected = read_expert(lora, {}, "detail", family, shapes)
    kohya = {}
    for key, tensor in lora.items():
        module, dot, rest = key.removeprefix("diffusion_model.").partition(".lora_")
        if not dot:
            module, dot, rest = key.removeprefix("diffusion_model.").rpartition(".")
        kohya["lora_unet_" + module.replace(".", "_") + dot + rest] = tensor
    assert_same(read_expert(kohya, {}, "detail", family, shapes), expected, shapes)


def test_original_hunyuan_names():
    shapes = {"double_blocks.0.img_attn.qkv.weight": (12, 4)}
    tensors = {
        "transformer.double_blocks.0.img_attn_qkv.lora_A.weight": torch.ones(2, 4),
        "transformer.double_blocks.0.img_attn_qkv.lora_B.weight": torch.ones(12, 2),
    }
    assert "double_blocks.0.img_attn.qkv" in read_expert(tensors, {}, "semantic", HUNYUAN_VIDEO, shapes).low_rank


NORM = "double_blocks.0.img_attn.norm.query_norm"


@pytest.mark.parametrize(
    "key",
    [
        f"diffusion_model.{NORM}.diff",
        f"diffusion_model.{NORM}.scale.diff",
        f"lora_unet_{NORM}.diff".replace(".", "_", 4),
        "transformer.double_blocks.0.img_attn_q_norm.diff",
        "transformer.transformer_blocks.0.attn.norm_q.diff",
    ],
)
@pytest.mark.parametrize("name", [f"{NORM}.scale", f"{NORM}.weight"])
def test_a_hunyuan_norm_is_found_as_the_host_calls_it(key, name):
    expert = read_expert({key: torch.ones(4)}, {}, "semantic", HUNYUAN_VIDEO, {name: (4,)})
    assert list(expert.diff) == [name]
    assert match_expert({key: (4,)}, HUNYUAN_VIDEO, {name: (4,)}).misfits == {}
    assert guess_family({key: (4,)}, {}) is HUNYUAN_VIDEO


@pytest.mark.parametrize("name", [f"{NORM}.scale", f"{NORM}.weight"])
def test_a_hunyuan_norm_has_one_name_in_our_files(name):
    expert = Expert("hunyuan_video", "semantic", diff={name: torch.ones(4)})
    assert list(expert_to_state_dict(expert, {})[0]) == [f"diffusion_model.{NORM}.diff"]
    expert = Expert("hunyuan_video", "semantic", replaced={name: torch.ones(4)})
    assert list(expert_to_state_dict(expert, {})[0]) == [f"diffusion_model.{NORM}.set_weight"]


def wan_pair(rank=2, **extra):
    return {
        "diffusion_model.blocks.0.self_attn.q.lora_down.weight": torch.ones(rank, 4),
        "diffusion_model.blocks.0.self_attn.q.lora_up.weight": torch.ones(4, rank),
        **extra,
    }


WAN_SHAPES = {
    "blocks.0.self_attn.q.weight": (4, 4),
    "blocks.0.self_attn.q.bias": (4,),
    "blocks.0.modulation": (1, 6, 4),
    "head.head.weight": (8, 4),
    "head.head.bias": (8,),
}


def test_diffs_and_replacements():
    tensors = wan_pair(
        **{
            "diffusion_model.blocks.0.self_attn.q.diff_b": torch.ones(4),
            "diffusion_model.blocks.0.modulation.diff": torch.ones(1, 6, 4),
            "diffusion_model.head.head.set_weight": torch.ones(8, 4),
            "diffusion_model.head.head.bias.set_weight": torch.ones(8),
        }
    )
    expert = read_expert(tensors, {}, "semantic", WAN, WAN_SHAPES)
    assert set(expert.diff) == {"blocks.0.self_attn.q.bias", "blocks.0.modulation"}
    assert set(expert.replaced) == {"head.head.weight", "head.head.bias"}


def test_a_convolution_s_pair_and_difference_are_added():
    pair = {
        "patch_embedding.lora_A.weight": torch.ones(2, 3, 1, 2, 2),
        "patch_embedding.lora_B.weight": torch.ones(4, 2, 1, 1, 1),
    }
    tensors = pair | {"patch_embedding.diff": torch.ones(4, 3, 1, 2, 2)}
    expert = read_expert(tensors, {}, "semantic", WAN, {"patch_embedding.weight": (4, 3, 1, 2, 2)})
    assert torch.equal(expert.diff["patch_embedding.weight"], torch.full((4, 3, 1, 2, 2), 3.0))


def test_detail_copies_of_the_release_are_replacements():
    tensors = {"proj_out_lora.weight": torch.ones(8, 4), "proj_out_lora.bias": torch.ones(8)}
    assert set(read_expert(tensors, {}, "detail", WAN, WAN_SHAPES).replaced) == {"head.head.weight", "head.head.bias"}


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        ({}, {}, "has no tensors"),
        (wan_pair() | {"diffusion_model.blocks.9.x.lora_up.weight": torch.ones(1)}, {}, "1 of 3 tensors do not fit"),
        (
            {f"blocks.0.lora_{part}.weight": torch.ones(4, 4) for part in "AB"},
            {},
            r"2 of 2 tensors do not fit .*: blocks\.0\.lora_A",
        ),
        (wan_pair(rank=2) | {"blocks.0.self_attn.q.lora_A.weight": torch.ones(2, 4)}, {}, "are for the same tensor"),
        ({k: v for k, v in wan_pair().items() if "down" in k}, {}, "is half of a LoRA layer"),
        ({"blocks.0.self_attn.q.alpha": torch.tensor(1.0)}, {}, "alpha is half of a LoRA layer"),
        (wan_pair() | {"blocks.0.self_attn.q.dora_scale": torch.ones(4)}, {}, r"has 1 DoRA tensor \(.*dora_scale\)"),
        ({k: v * float("nan") for k, v in wan_pair().items()}, {}, "NaN or infinite"),
        ({k: torch.ones(3, 3) for k in wan_pair()}, {}, r"have shapes \(3, 3\) and \(3, 3\)"),
        (
            {"head.head.set_weight": torch.ones(2, 2)},
            {},
            r"has shape \(2, 2\); the model's head.head.weight is \(8, 4\)",
        ),
        (wan_pair(), {"dcm.family": "hunyuan_video"}, "is for HunyuanVideo, but the model is Wan 2.1"),
        (wan_pair(), {"dcm.expert": "detail"}, "This is a detail expert, not a semantic expert"),
        (wan_pair(), {"dcm.format": "9"}, "has format '9'; this version reads format 1"),
        (wan_pair(), {"dcm.format": "1", "dcm.tensors": "5"}, "has 2 tensors, but its metadata says 5"),
        (wan_pair(), {"dcm.boundary": "1.5"}, r"dcm\.boundary = '1\.5'; expected a number between 0 and 1"),
        (wan_pair(), {"lora_adapter_metadata": "{"}, "lora_adapter_metadata is not valid JSON"),
    ],
)
def test_bad_files(tensors, metadata, message):
    with pytest.raises(ValueError, match=message):
        read_expert(tensors, metadata, "semantic", WAN, WAN_SHAPES)


def test_an_expert_that_is_no_file_is_checked_for_its_sizes(family):
    expert, shapes = read_detail(family)
    check_sizes(expert, shapes)
    module, name = next(iter(expert.low_rank)), next(iter(expert.replaced))
    pair = expert.low_rank[module][-1]
    narrow = replace(pair, down=pair.down[:, 1:])
    short = replace(pair, up=pair.up[1:])
    for wrong in (narrow, short):
        with pytest.raises(
            ExpertError, match=rf"The LoRA of {module} has shapes .*; the model's {module} is \(.* of this size"
        ):
            check_sizes(replace(expert, low_rank={module: (wrong,)}), shapes)
    with pytest.raises(ExpertError, match=rf"{name} has shape \(1,\); the model's {name} is \("):
        check_sizes(replace(expert, replaced={name: torch.zeros(1)}), shapes)
    for lost in ({"low_rank": {"blocks.99.x": (pair,)}}, {"diff": {"blocks.99.x": torch.zeros(1)}}):
        with pytest.raises(ExpertError, match=r"the model's blocks\.99\.x is absent"):
            check_sizes(replace(expert, **lost), shapes)


def test_rows_of_a_fused_layer_have_their_sizes():
    """q, k, v as high as the input is wide, the feed-forward rows after them, or all of them."""
    module, shapes = "single_blocks.0.linear1", {"single_blocks.0.linear1.weight": (3 * 8 + 20, 8)}

    def check(rows, start):
        pair = LowRank(torch.zeros(2, 8), torch.zeros(rows, 2), 1.0, start)
        check_sizes(Expert("hunyuan_video", "detail", {module: (pair,)}), shapes)

    for rows, start in ((8, 0), (8, 16), (20, 24), (44, 0)):
        check(rows, start)
    for rows, start in ((20, 0), (21, 24), (68, 24)):
        with pytest.raises(ExpertError, match=rf"the model's {module} is \(44, 8\)"):
            check(rows, start)


def test_wrong_family_is_recognised_by_its_keys():
    tensors, *_ = release(HUNYUAN_VIDEO)
    *_, shapes = release(WAN)
    lora = {k: v for k, v in tensors.items() if ".lora_" in k and "single" in k}
    with pytest.raises(ExpertError, match=r"is for HunyuanVideo .* the model is Wan 2.1"):
        read_expert(lora, {}, "detail", WAN, shapes)


@given(
    seed=st.integers(0, 2**16),
    parts=st.integers(2, 4),
    width=st.integers(1, 5),
    extra=st.integers(0, 6),
    ranks=st.lists(st.integers(1, 3), min_size=1, max_size=4),
)
def test_stacking_is_exact_and_undone(seed, parts, width, extra, ranks):
    generator = torch.Generator().manual_seed(seed)
    updates = tuple(
        LowRank(
            torch.randn(r, width, generator=generator),
            torch.rand(width, r, generator=generator) + 0.1,
            0.5 + part,
            part * width,
        )
        for part, r in enumerate(ranks[:parts])
    )
    rows = parts * width + extra
    down, up, alpha = stack_updates(updates, rows)
    expected = delta(Expert("wan", "detail", {"m": updates}), "m", (rows, width))
    torch.testing.assert_close(alpha / len(down) * up @ down, expected)
    pieces = [Piece(f"{part}", "m", part, last=part == parts - 1) for part in range(parts)]
    split = split_update(LowRank(down, up, alpha / len(down)), pieces)
    torch.testing.assert_close(delta(Expert("wan", "detail", {"m": split}), "m", (rows, width)), expected)
    if len(updates) > 1:
        assert [u.rank for u in split] == [u.rank for u in updates]


@pytest.mark.parametrize("used", [2, 3])
@pytest.mark.parametrize("empty", [(), (0,), (0, 1), (0, 1, 2)])
def test_columns_of_zeros_stay_with_their_rows(used, empty):
    """An expert that was barely trained: which part a column is of shows in its place alone."""
    width, ranks = 4, 2
    updates = tuple(
        LowRank(torch.rand(ranks, width) + 1, torch.rand(width, ranks) + 1, 1.0, part * width) for part in range(used)
    )
    for part in range(used):
        updates[part].up[:, 0] = 0
        if part in empty:
            updates[part].up.zero_()
    down, up, alpha = stack_updates(updates, 4 * width)
    pieces = [Piece(f"{part}", "m", part, last=part == 3) for part in range(4)]
    split = split_update(LowRank(down, up, alpha / len(down)), pieces, used)
    assert [update.start for update in split] == [update.start for update in updates]
    for found, wanted in zip(split, updates, strict=True):
        assert torch.equal(found.down, wanted.down) and torch.equal(found.up, wanted.up)


@given(data=st.data())
def test_mangled_files_are_read_right_or_refused(data):
    expert, shapes = read_detail(WAN)
    stored, metadata = expert_to_state_dict(expert, shapes)
    key = data.draw(st.sampled_from(sorted(stored)))
    how = data.draw(st.sampled_from(["drop", "rename", "reshape", "nan"]))
    mangled = dict(stored)
    tensor = mangled.pop(key)
    if how == "rename":
        mangled[data.draw(st.text(max_size=12)) + key[20:]] = tensor
    elif how == "reshape":
        mangled[key] = tensor.new_zeros(*tensor.shape, 2) if tensor.ndim else tensor.new_zeros(3)
    elif how == "nan":
        mangled[key] = torch.full_like(tensor, float("nan"))
    with pytest.raises((ExpertError, ValueError, RuntimeError)) as caught:
        read_expert(mangled, metadata, "detail", WAN, shapes)
    assert caught.type is ExpertError


def test_what_replaces_the_base_s_tensors_can_be_written_in_another_dtype(tmp_path):
    pair = LowRank(torch.randn(2, 4), torch.randn(4, 2), 1.0)
    expert = Expert("wan", "detail", {"blocks.0.self_attn.q": (pair,)}, {"head.head.weight": torch.randn(4, 4)})
    path = tmp_path / "expert.safetensors"
    write_expert(path, expert, {"blocks.0.self_attn.q.weight": (4, 4)}, torch.bfloat16, torch.float16)
    dtypes = TensorFile(path).dtypes
    assert dtypes["diffusion_model.head.head.set_weight"] is torch.float16
    assert dtypes["diffusion_model.blocks.0.self_attn.q.lora_up.weight"] is torch.bfloat16
    assert dtypes["diffusion_model.blocks.0.self_attn.q.alpha"] is torch.float32, "a scale is not rounded"


def test_an_expert_s_id_is_of_all_it_does():
    down, up = torch.ones(2, 4), torch.ones(4, 2)
    experts = [
        Expert("wan", "semantic", {module: (LowRank(down, up, scale, start),)})
        for module, scale, start in (("q", 1.0, 0), ("q", 2.0, 0), ("k", 1.0, 0), ("q", 1.0, 4))
    ]
    assert len({expert_id(expert) for expert in experts}) == 4
    assert expert_id(experts[0]) == expert_id(
        Expert("wan", "semantic", {"q": (LowRank(down.clone(), up.clone(), 1.0),)})
    )


def test_an_expert_s_id_is_the_one_that_checkpoints_hold():
    """A run is resumed only if the expert it stands on has the id of its checkpoint."""
    pairs = {
        name: (LowRank(torch.ones(rank, 3), torch.ones(5, rank), 1.0),) for name, rank in (("q", 2), ("k", 4), ("v", 3))
    }
    semantic = Expert("wan", "semantic", pairs, diff={"q.bias": torch.ones(5)})
    detail = Expert("wan", "detail", replaced={"head.head.weight": torch.ones(5)})
    assert [expert_id(expert)[:16] for expert in (semantic, detail)] == ["e1d70a8e9668f5de", "7e46e1cebe5f1fea"]


def test_an_expert_says_what_it_holds():
    pairs = {"blocks.0.ffn.0": (LowRank(torch.zeros(4, 3), torch.zeros(5, 4), 1.0),)}
    assert str(Expert("wan", "detail", pairs)) == "detail expert: LoRA rank 4, 1 layer matched"
    whole = Expert("wan", "semantic", pairs, diff={"blocks.0.ffn.0.bias": torch.zeros(5)})
    assert str(whole) == "semantic expert: LoRA rank 4, 1 layer matched", "a layer counts once"
    both = pairs | {"blocks.1.ffn.0": (LowRank(torch.zeros(8, 3), torch.zeros(5, 8), 1.0),)}
    more = Expert(
        "wan", "semantic", both, {"head.head.weight": torch.zeros(5, 3)}, {"head.modulation": torch.zeros(1, 2, 3)}
    )
    assert str(more) == "semantic expert: LoRA rank 4 to 8, 4 layers matched"
    assert (
        str(Expert("wan", "detail", replaced={"head.head.weight": torch.zeros(5)}))
        == "detail expert: no LoRA, 1 layer matched"
    )
