"""What a file is, by its content alone, and its parts in native names."""

import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from dcm_core.errors import CheckpointError
from dcm_core.families import FAMILIES, HUNYUAN_VIDEO, WAN
from dcm_core.files.checkpoint import (
    PREFIXES,
    Layout,
    check_finite,
    each_native,
    recognise,
    semantic_state_dict,
)
from dcm_core.files.tensor_file import TensorFile

from ..conftest import make_release, release_shapes, without_experts


class Listing(TensorFile):
    """A file of which only the header exists."""

    def __init__(self, shapes, name="model.safetensors", dtypes=()):
        self.path, self.shapes, self.metadata = Path(name), dict(shapes), {}
        self.dtypes = dict.fromkeys(shapes, torch.bfloat16) | dict(dtypes)


def shapes_of(tensors):
    return {key: tuple(tensor.shape) for key, tensor in tensors.items()}


def native(family, tensors):
    """The native file of a diffusers-layout base."""
    return {target: torch.zeros(1) for target in family.key_map.match(tensors).matched}


# recognition


def test_release(family, save, release):
    contents = recognise(TensorFile(save(release)))
    assert (contents.layout, contents.family) == (Layout.RELEASE, family)
    detail = {key for key in release if ".lora_" in key or family.detail_source(key)}
    assert set(contents.detail) == detail
    used = [piece.source for pieces in contents.matched.values() for piece in pieces]
    assert sorted(used) == sorted(set(release) - detail), "every base tensor is used once"


def test_plain_diffusers(family, save, base):
    contents = recognise(TensorFile(save(base)))
    assert (contents.layout, contents.family, contents.detail) == (Layout.DIFFUSERS, family, {})


@pytest.mark.parametrize("name", ["wan.ckpt", "sd15.safetensors", "hunyuan-lora.safetensors"])
def test_the_name_means_nothing(family, name):
    assert recognise(Listing(release_shapes(family), name)).family is family


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes(family, save, release, base, prefix):
    file = TensorFile(save({prefix + key: tensor for key, tensor in release.items()}))
    contents = recognise(file)
    assert (contents.layout, contents.family) == (Layout.RELEASE, family)
    plain = TensorFile(save(base, "plain.safetensors"))
    expected = semantic_state_dict(plain, recognise(plain))
    actual = semantic_state_dict(file, contents)
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[key], expected[key]) for key in expected)


@pytest.mark.parametrize("prefix", ["", *PREFIXES])
def test_native(family, base, prefix):
    contents = recognise(Listing({prefix + key: (1,) for key in native(family, base)}))
    assert (contents.layout, contents.family, contents.matched) == (Layout.NATIVE, family, None)


def test_native_with_more_than_the_base_has(family, base):
    more = {key: (1,) for key in native(family, base)} | {"vace_blocks.0.x.weight": (1,), "scaled_fp8": (1,)}
    assert recognise(Listing(more)).layout is Layout.NATIVE


def test_native_with_a_cut_down_block(family, base):
    shapes = {key: (1,) for key in native(family, base)}
    key = next(k for k in sorted(shapes) if "blocks.1." in k and k.endswith(".weight") and not k.startswith("txt_in"))
    del shapes[key]
    refuse(shapes, family.title, f"1 tensor is missing ({key})")


@pytest.mark.parametrize("adapter", ["default", "0", "x_y"])
def test_the_adapter_may_have_another_name(family, adapter):
    shapes = {key.replace(".lora1.", f".{adapter}."): shape for key, shape in release_shapes(family).items()}
    assert recognise(Listing(shapes)).layout is Layout.RELEASE


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float8_e4m3fn])
def test_the_dtype_means_nothing(family, save, dtype):
    file = TensorFile(save(make_release(family, dtype)))
    contents = recognise(file)
    assert contents.layout is Layout.RELEASE
    assert all(tensor.dtype is dtype for _, tensor in each_native(file, contents))


LORA_FILES = {
    "ComfyUI": ("diffusion_model.blocks.{}.self_attn.q", ("lora_down.weight", "lora_up.weight", "alpha")),
    "kohya": ("lora_unet_blocks_{}_self_attn_q", ("lora_down.weight", "lora_up.weight", "alpha")),
    "diffusers": ("transformer.blocks.{}.attn1.to_q", ("lora_A.weight", "lora_B.weight")),
    "PEFT": ("base_model.model.blocks.{}.attn1.to_q", ("lora_A.default.weight", "lora_B.default.weight")),
    "full differences": ("diffusion_model.blocks.{}.self_attn.q", ("diff", "diff_b")),
    "DoRA": ("blocks.{}.attn1.to_q", ("lora_A.weight", "lora_B.weight", "dora_scale")),
}


@pytest.mark.parametrize(("module", "endings"), LORA_FILES.values(), ids=LORA_FILES)
def test_lora_files(module, endings):
    shapes = {f"{module.format(i)}.{ending}": (2, 2) for i in range(3) for ending in endings}
    assert recognise(Listing(shapes)).layout is Layout.EXPERT


def test_the_detail_part_of_a_release_alone_is_an_expert(family):
    shapes = {
        key: shape for key, shape in release_shapes(family).items() if ".lora_" in key or family.detail_source(key)
    }
    assert recognise(Listing(shapes)).layout is Layout.EXPERT


OTHERS = {
    "nothing": [],
    "an image model": ["input_blocks.0.0.weight", "middle_block.1.proj_in.weight", "out.2.weight"],
    "a diffusers image model": [
        "transformer_blocks.0.attn.to_q.weight",
        "x_embedder.weight",
        "proj_out.bias",
        "pos_embed.proj.weight",
    ],
    "a checkpoint of several models": ["model.norm.weight", "norm.weight", "model.diffusion_model.norm.weight"],
    "a LoRA-wrapped model of another kind": [
        f"layers.{i}.mlp.{part}"
        for i in range(9)
        for part in ("base_layer.weight", "lora_A.default.weight", "lora_B.default.weight")
    ],
}


@pytest.mark.parametrize("keys", OTHERS.values(), ids=OTHERS)
def test_anything_else_is_left_to_the_host(keys):
    assert recognise(Listing({key: (2, 2) for key in keys})).layout is Layout.OTHER


# files that are half one thing


def refuse(shapes, *messages, name="model.safetensors", dtypes=()):
    with pytest.raises(CheckpointError) as caught:
        recognise(Listing(shapes, name, dtypes))
    for message in (name, *messages):
        assert message in str(caught.value)
    return str(caught.value)


def test_any_missing_key_is_named(family):
    shapes = release_shapes(family)
    for key in sorted(shapes)[::5]:
        bare = key.replace(".base_layer.", ".")
        refuse({k: s for k, s in shapes.items() if k != key}, family.title, f"1 tensor is missing ({bare})")


def test_missing_keys_of_a_plain_file(family, base):
    shapes = shapes_of(base)
    keys = [key for key in shapes if key.endswith(".weight")][3:8]
    text = refuse(
        {k: s for k, s in shapes.items() if k not in keys}, "5 tensors are missing", "and 2 more", "no experts"
    )
    assert sum(key in text for key in keys) == 3


def test_keys_that_do_not_belong(family):
    refuse(release_shapes(family) | {"blocks.0.attn9.to_q.weight": (1,)}, "1 is unknown (blocks.0.attn9.to_q.weight)")


def test_a_lora_where_the_release_has_none(family):
    shapes = release_shapes(family)
    module = next(k for k in shapes if k.endswith(("ffn.net.2.weight", "ff.net.2.weight"))).removesuffix(".weight")
    extra = {f"{module}.lora_A.lora1.weight": (8, 8), f"{module}.lora_B.lora1.weight": (8, 8)}
    refuse(shapes | extra, "2 are unknown", f"{module}.lora_A.lora1.weight")


def test_a_release_without_its_detail_expert(family):
    shapes = {
        key: s for key, s in release_shapes(family).items() if ".lora_" not in key and not family.detail_source(key)
    }
    refuse(shapes, "are missing", "lora_A.lora1.weight", "both experts")


def test_a_release_without_its_own_layers(family):
    shapes = {key: shape for key, shape in release_shapes(family).items() if not family.detail_source(key)}
    text = refuse(shapes, "are missing")
    assert any(f"{module}_lora." in text for module in family.detail_modules)


def test_a_release_without_its_low_rank_part(family):
    shapes = {key: shape for key, shape in release_shapes(family).items() if ".lora_" not in key}
    refuse(shapes, "are missing", ".lora_A.")


def test_a_detail_copy_of_a_layer_the_base_lacks():
    refuse(
        release_shapes(WAN) | {(key := "condition_embedder_lora.image_embedder.norm1.weight"): (8,)},
        f"1 is unknown ({key})",
    )


def test_two_adapters(family):
    shapes = release_shapes(family)
    extra = {key.replace("lora1", "other"): shape for key, shape in shapes.items() if ".lora_" in key}
    refuse(shapes | extra, "adapters lora1, other")


def test_a_key_with_and_without_base_layer_or_prefix(family):
    shapes = release_shapes(family)
    key = next(k for k in shapes if ".base_layer." in k)
    refuse(shapes | {key.replace(".base_layer.", "."): shapes[key]}, "both with and without .base_layer")
    refuse(shapes | {f"transformer.{key}": shapes[key]}, "with and without a prefix")


def test_a_shard_says_so(family, base):
    shapes = dict(sorted(shapes_of(base).items())[: len(base) * 2 // 3])
    refuse(shapes, "are missing", "merge all shards", name="diffusion_pytorch_model-00001-of-00002.safetensors")


@pytest.mark.parametrize("part", ["lora_A", "lora_B", "copy"])
def test_shapes_that_do_not_fit_the_base(family, part):
    shapes = release_shapes(family)
    find = (lambda k: family.detail_source(k)) if part == "copy" else (lambda k: f".{part}." in k)
    key = next(k for k in shapes if find(k) and k.endswith(".weight"))
    refuse(shapes | {key: (shapes[key][0] + 1, *shapes[key][1:])}, "do not fit each other", key.split(".lora_")[0])
    refuse(shapes | {key: (*shapes[key], 1)}, "do not fit each other")
    refuse(shapes | {key: ()}, "do not fit each other")


def test_a_linear_with_an_impossible_shape(family):
    shapes = release_shapes(family)
    key = next(k for k in shapes if k.endswith("to_q.base_layer.weight"))
    refuse(shapes | {key: (8,)})


def test_fused_parts_of_different_widths():
    shapes = shapes_of(without_experts(HUNYUAN_VIDEO, make_release(HUNYUAN_VIDEO)))
    key = next(k for k in shapes if k.endswith("to_k.weight"))
    refuse(shapes | {key: (8, 9)}, key)


# What no other tensor of the file tells: the shape of a patch, and tables and inputs whose width only the model knows.
UNTOLD = re.compile(
    r"scale_shift_table|.*(embedding|embedder\.proj|linear_1|proj_in|norm1\.linear|norm1_context\.linear)\.weight"
    r"|.*(net\.0\.proj|to_add_out|norm(_added)?_[qk])\.weight"
)


def test_a_shape_that_differs_in_any_place_is_noticed(family):
    shapes = release_shapes(family)
    unnoticed = set()
    for key, shape in shapes.items():
        for axis, size in enumerate(shape):
            try:
                recognise(Listing(shapes | {key: (*shape[:axis], size + 1, *shape[axis + 1 :])}))
                unnoticed.add(key)
            except CheckpointError as error:
                # of two blocks that differ either may be meant
                module = re.sub(r"\d+", "N", re.sub(r"\.(weight|bias|lora_.*)$", "", key.replace(".base_layer", "")))
                assert module.replace("_lora", "") in re.sub(r"\d+", "N", str(error)).replace("_lora", "")
    assert not [key for key in unnoticed if not UNTOLD.fullmatch(key)]
    # where there are several blocks, none of theirs is left
    assert not [key for key in unnoticed if "blocks." in key and key.replace("blocks.0", "blocks.1") in shapes]


def test_a_type_that_differs(family):
    shapes = release_shapes(family)
    query = next(key for key in shapes if key.endswith("to_q.base_layer.weight"))
    whole = next(key for key in shapes if key.endswith("proj_out.bias"))
    refuse(shapes, f"{whole} is torch.int8, not floating-point", dtypes={whole: torch.int8})
    fused = family is HUNYUAN_VIDEO
    half = {query: torch.float16}
    if fused:
        refuse(shapes, "torch.float16 (", "but becomes part of", dtypes=half)
    else:
        assert recognise(Listing(shapes, dtypes=half)).layout is Layout.RELEASE, "a release of mixed precision"
    down = query.replace("base_layer", "lora_A.lora1")
    refuse(shapes, "do not fit each other", down, "torch.float32", "torch.bfloat16", dtypes={down: torch.float32})


def test_ranks_that_differ(family):
    shapes = release_shapes(family)
    down = next(key for key in shapes if ".lora_A." in key and "blocks.0" in key)
    up = down.replace("lora_A", "lora_B")
    rank = shapes[down][0]
    refuse(shapes | {up: (shapes[up][0], rank + 1)}, f"{up} has rank {rank + 1}, but {down} has rank {rank}")
    refuse(
        shapes | {down: (0, shapes[down][1]), up: (shapes[up][0], 0)},
        f"{down} has shape (0, {shapes[down][1]}), which is empty",
    )
    if down.replace("blocks.0", "blocks.1") in shapes:
        both = {down: (rank + 1, shapes[down][1]), up: (shapes[up][0], rank + 1)}
        refuse(shapes | both, ") in other blocks", "lora_A", "lora_B")


def test_an_empty_tensor():
    refuse(
        release_shapes(WAN) | {"scale_shift_table": (1, 2, 0)}, "scale_shift_table has shape (1, 2, 0), which is empty"
    )


def test_more_tensors_than_a_model_has():
    refuse(
        {f"blocks.{index}.x": (1,) for index in range(20_001)},
        "has 20001 tensors; expected at most 20000 in a model or LoRA",
    )


@given(data=st.data())
def test_mangled_files_are_whole_or_refused(data):
    family = data.draw(st.sampled_from(list(FAMILIES.values())))
    shapes = release_shapes(family)
    keys = sorted(shapes)
    for key in data.draw(st.sets(st.sampled_from(keys), max_size=4)):
        shape = shapes.pop(key)
        match data.draw(st.sampled_from(["drop", "rename", "reshape", "prefix"])):
            case "rename":
                shapes[data.draw(st.text(max_size=10)) + key[data.draw(st.integers(0, 30)) :]] = shape
            case "reshape":
                shapes[key] = tuple(data.draw(st.lists(st.integers(0, 9), max_size=3)))
            case "prefix":
                shapes[data.draw(st.sampled_from(PREFIXES)) + key] = shape
    try:
        contents = recognise(Listing(shapes))
    except CheckpointError:
        return
    assert contents.layout in (Layout.RELEASE, Layout.OTHER)
    if contents.layout is Layout.RELEASE:
        used = [p.source for pieces in contents.matched.values() for p in pieces] + list(contents.detail)
        assert sorted(used) == sorted(shapes), "nothing dropped, nothing used twice"


# the parts


def test_wan_in_native_names(save):
    base = without_experts(WAN, make_release(WAN))
    file = TensorFile(save(base))
    state_dict = semantic_state_dict(file, recognise(file))
    assert len(state_dict) == len(base)
    for ours, theirs in {
        "head.head.weight": "proj_out.weight",
        "head.modulation": "scale_shift_table",
        "blocks.1.modulation": "blocks.1.scale_shift_table",
        "blocks.1.cross_attn.o.bias": "blocks.1.attn2.to_out.0.bias",
        "blocks.0.norm3.weight": "blocks.0.norm2.weight",
        "time_projection.1.weight": "condition_embedder.time_proj.weight",
    }.items():
        assert torch.equal(state_dict[ours], base[theirs])


def test_hunyuan_video_in_native_names(save):
    base = without_experts(HUNYUAN_VIDEO, make_release(HUNYUAN_VIDEO))
    file = TensorFile(save(base))
    state_dict = semantic_state_dict(file, recognise(file))

    def rows(stem, *modules, param="weight"):
        return torch.cat([base[f"{stem}.{module}.{param}"] for module in modules])

    double, single = "transformer_blocks.0", "single_transformer_blocks.1"
    refiner = "context_embedder.token_refiner.refiner_blocks.1"
    scale, shift = base["norm_out.linear.weight"].chunk(2)
    for name, expected in {
        "double_blocks.0.img_attn.qkv.weight": rows(double, "attn.to_q", "attn.to_k", "attn.to_v"),
        "double_blocks.0.txt_attn.qkv.bias": rows(
            double, "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", param="bias"
        ),
        "single_blocks.1.linear1.weight": rows(single, "attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
        "single_blocks.1.norm.key_norm.scale": base[f"{single}.attn.norm_k.weight"],
        "txt_in.individual_token_refiner.blocks.1.self_attn.qkv.weight": rows(
            refiner, "attn.to_q", "attn.to_k", "attn.to_v"
        ),
        "final_layer.adaLN_modulation.1.weight": torch.cat([shift, scale]),
        "final_layer.linear.bias": base["proj_out.bias"],
    }.items():
        assert torch.equal(state_dict[name], expected), name


def test_shapes_are_known_before_reading(family, save, release):
    file = TensorFile(save(release))
    contents = recognise(file)
    assert contents.native_shapes(file) == shapes_of(semantic_state_dict(file, contents))


def test_each_tensor_is_read_once_and_counted(family, save, release, monkeypatch):
    file = TensorFile(save(release))
    read, seen = [], []
    original = TensorFile.read
    monkeypatch.setattr(TensorFile, "read", lambda self, key: read.append(key) or original(self, key))
    contents = recognise(file)
    assert not read, "the header says it all"
    semantic_state_dict(file, contents, lambda *done: seen.append(done))
    assert sorted(read) == sorted(set(release) - set(contents.detail))
    assert seen == sorted(seen)
    assert seen[-1] == (sum(release[key].nbytes for key in read),) * 2


def test_reading_can_be_interrupted(family, save, release):
    file = TensorFile(save(release))

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        semantic_state_dict(file, recognise(file), stop)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2]
)
def test_finite(tmp_path, dtype):
    good = torch.tensor([0.0, -1.5, torch.finfo(dtype).max, torch.finfo(dtype).tiny]).to(dtype)
    bad = torch.tensor([1.0, float("nan")]).to(dtype)
    save_file({"a": good}, tmp_path / "x.safetensors")
    file = TensorFile(tmp_path / "x.safetensors")
    check_finite(file, {"a": good, "i": torch.ones(2, dtype=torch.int64)})
    with pytest.raises(CheckpointError, match=r"x\.safetensors has NaN or infinite values in b\."):
        check_finite(file, {"a": good, "b": bad})


@pytest.mark.parametrize(
    "key", ["blocks.{}.attn1.to_q.weight", "blocks.{}.ffn.0.weight", "blocks.{}.self_attn.q.weight"]
)
@pytest.mark.parametrize("index", ["1000", "1" + 9 * "0", 5000 * "1"])
def test_a_block_that_no_model_has(save, key, index):
    """Looking for all blocks below it would take for ever."""
    assert recognise(TensorFile(save({key.format(index): torch.ones(2, 2)}))).layout is Layout.OTHER
