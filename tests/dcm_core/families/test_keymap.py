"""Key tables: complete on real key lists, invertible, free of collisions, loud about anything unknown."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dcm_core.errors import CheckpointError
from dcm_core.families import FAMILIES, HUNYUAN_VIDEO, WAN
from dcm_core.families.keymap import KeyMap, Piece, Rule, fuse, unfuse

from ..conftest import make_release, without_experts

GOLDEN = Path(__file__).parents[2] / "golden"
RELEASES = {"wan": "wan_tiny", "hunyuan_video": "hy_tiny"}


def semantic_keys(family):
    keys = json.loads((GOLDEN / f"{RELEASES[family.name]}.keys.json").read_text())
    return {k.replace(".base_layer", "") for k in keys if ".lora_" not in k and not family.detail_source(k)}


@pytest.fixture(params=FAMILIES.values(), ids=FAMILIES)
def family(request):
    return request.param


def test_real_key_list_is_matched_whole(family):
    report = family.key_map.match(semantic_keys(family))
    assert report.complete
    assert family.is_native(report.matched)
    assert sum(len(pieces) for pieces in report.matched.values()) == len(semantic_keys(family))


def test_table_inverts(family):
    for key in semantic_keys(family):
        piece = family.key_map.find(key)
        module = key.rpartition(".")[0]
        native = piece.target.rpartition(".")[0]
        sources = family.key_map.sources_of(native) or family.key_map.sources_of(piece.target)
        assert {module, key} & {source.source for source in sources}


def test_no_two_keys_become_one(family):
    places = [(p.target, p.part) for key in semantic_keys(family) if (p := family.key_map.find(key))]
    assert len(set(places)) == len(places)


@pytest.mark.parametrize(
    ("family", "key", "target", "part"),
    [
        (WAN, "blocks.29.attn2.to_out.0.bias", "blocks.29.cross_attn.o.bias", None),
        (WAN, "scale_shift_table", "head.modulation", None),
        (HUNYUAN_VIDEO, "transformer_blocks.7.attn.add_v_proj.weight", "double_blocks.7.txt_attn.qkv.weight", 2),
        (HUNYUAN_VIDEO, "single_transformer_blocks.39.proj_mlp.bias", "single_blocks.39.linear1.bias", 3),
        (
            HUNYUAN_VIDEO,
            "transformer_blocks.0.attn.norm_added_q.weight",
            "double_blocks.0.txt_attn.norm.query_norm.scale",
            None,
        ),
    ],
)
def test_known_places(family, key, target, part):
    piece = family.key_map.find(key)
    assert (piece.source, piece.target, piece.part) == (key, target, part)


def test_rows_of_the_parts_of_a_fused_layer():
    """As high as the input is wide, but for the last, which takes what remains: q, k, v and the rows of the perceptron."""
    found = {
        module: [piece.rows(4) for piece in HUNYUAN_VIDEO.key_map.sources_of(module)]
        for module in ("double_blocks.7.img_attn.qkv", "single_blocks.0.linear1", "single_blocks.0.linear2")
    }
    assert found == {
        "double_blocks.7.img_attn.qkv": [slice(0, 4), slice(4, 8), slice(8, None)],
        "single_blocks.0.linear1": [slice(0, 4), slice(4, 8), slice(8, 12), slice(12, None)],
        "single_blocks.0.linear2": [slice(0, None)],
    }


def test_videos_have_the_frame_rate_of_the_release():
    assert {name: family.fps for name, family in FAMILIES.items()} == {"wan": 16, "hunyuan_video": 24}


def test_patterns_are_anchored(family):
    for key in semantic_keys(family):
        assert family.key_map.find(f"x.{key}") is None
        assert family.key_map.find(f"{key}.x") is None


@given(data=st.data())
def test_mangled_key_lists_are_reported(data):
    family = data.draw(st.sampled_from(list(FAMILIES.values())))
    keys = sorted(semantic_keys(family))
    dropped = data.draw(st.sets(st.sampled_from(keys), max_size=3))
    added = data.draw(
        st.sets(st.text(min_size=1, max_size=20).filter(lambda k: family.key_map.find(k) is None), max_size=3)
    )
    report = family.key_map.match(set(keys) - dropped | added)
    assert set(report.unmatched) == added
    # HunyuanVideo's guidance embedder is not in every model
    required = {key for key in dropped if "guidance_embedder" not in key}
    assert required <= set(report.missing) <= dropped
    assert report.complete == (not report.missing and not added)


def test_missing_key_is_named(family):
    key = sorted(semantic_keys(family))[0]
    assert key in family.key_map.match(semantic_keys(family) - {key}).missing


def test_what_is_missing_is_named_in_the_same_order_every_time(family):
    half = sorted(semantic_keys(family))[::2]
    missing = family.key_map.match(half).missing
    assert len(missing) > 20 and list(missing) == sorted(missing)


def test_collision_is_an_error():
    key_map = KeyMap([Rule("a", "x"), Rule("b", "x")])
    with pytest.raises(CheckpointError, match=r"a\.weight, b\.weight would all become x\.weight"):
        key_map.match(["a.weight", "b.weight"])


def test_fuse_stacks_rows_and_swaps_halves():
    tensors = {"q": torch.zeros(2, 2), "k": torch.ones(2, 2), "s": torch.arange(4.0)}
    fused = fuse([Piece("q", "qkv", 0), Piece("k", "qkv", 1)], tensors)
    assert fused.tolist() == [[0, 0], [0, 0], [1, 1], [1, 1]]
    assert fuse([Piece("s", "t", swap_halves=True)], tensors).tolist() == [2, 3, 0, 1]


def test_what_was_fused_comes_apart_again(family):
    """Every native tensor of a small release: names, rows and the order of halves."""
    for weights in (make_release(family), make_release(family, torch.float32)):
        tensors = without_experts(family, weights)
        for target, pieces in family.key_map.match(tensors).matched.items():
            assert family.key_map.sources_of_tensor(target) == pieces
            fused = fuse(pieces, tensors)
            weight = target.rpartition(".")[0] + ".weight"
            beside = family.key_map.sources_of_tensor(weight)
            width = tensors[beside[0].source].shape[1] if beside and tensors[beside[0].source].ndim > 1 else 0
            for source, tensor in unfuse(pieces, fused, width):
                assert torch.equal(tensor, tensors[source]), source


def test_a_tensor_of_no_table_has_no_sources(family):
    assert family.key_map.sources_of_tensor("strange.weight") == []


def test_fuse_needs_every_part():
    with pytest.raises(CheckpointError, match="qkv needs all its parts, but the file only has k"):
        fuse([Piece("k", "qkv", 1)], {"k": torch.ones(2, 2)})
    with pytest.raises(CheckpointError, match="equal widths"):
        fuse([Piece("q", "qkv", 0), Piece("k", "qkv", 1)], {"q": torch.ones(2, 3), "k": torch.ones(2, 2)})
