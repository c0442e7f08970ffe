"""Experts from LoRA files as people have them: every kind of name, tensor and setting is placed, left out with a note, or named."""

import json
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dcm_core.errors import CheckpointError, DCMError, ExpertError
from dcm_core.experts.expert import expert_to_state_dict
from dcm_core.experts.match import AnyModel, Target, match_expert
from dcm_core.experts.reader import WrongSideError, read_expert, read_release
from dcm_core.families import FAMILIES, HUNYUAN_VIDEO, WAN
from dcm_core.files.checkpoint import recognise
from dcm_core.files.mapped import views
from dcm_core.files.tensor_file import TensorFile
from dcm_core.inspection.inspect import inspect_file

from ..conftest import limits, release_shapes

SHAPES = {
    "patch_embedding.weight": (256, 16, 1, 2, 2),
    "patch_embedding.bias": (256,),
    "blocks.0.self_attn.q.weight": (4, 4),
    "blocks.0.self_attn.q.bias": (4,),
    "blocks.0.self_attn.norm_q.weight": (4,),
    "blocks.0.cross_attn.k.weight": (4, 4),
    "blocks.0.modulation": (1, 6, 4),
    "blocks.0.ffn.0.weight": (8, 4),
    "head.modulation": (1, 2, 4),
    "head.head.weight": (8, 4),
}
VACE_SHAPES = {
    "vace_patch_embedding.weight": (4, 96, 1, 2, 2),
    "vace_blocks.0.self_attn.q.weight": (4, 4),
    "vace_blocks.0.ffn.2.weight": (4, 8),
    "vace_blocks.0.before_proj.weight": (4, 4),
    "vace_blocks.0.after_proj.weight": (4, 4),
    "vace_blocks.0.modulation": (1, 6, 4),
}
Q = "blocks.0.self_attn.q"


def randn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def pair(module, rows=4, columns=4, rank=2, down="lora_A.weight", up="lora_B.weight"):
    separator = "" if down.startswith("_") else "."
    return {f"{module}{separator}{down}": randn(rank, columns), f"{module}{separator}{up}": randn(rows, rank)}


def read(tensors, shapes=SHAPES, family=WAN, role="semantic", metadata=(), path=None):
    return read_expert(tensors, dict(metadata), role, family, shapes, path)


def change(expert, name, shape):
    """What an expert adds to a tensor."""
    total = torch.zeros(shape) + torch.as_tensor(expert.diff.get(name, 0)).float()
    for update in expert.low_rank.get(name.removesuffix(".weight"), ()):
        total[update.start : update.start + len(update.up)] += update.scale * update.up.float() @ update.down.float()
    return total


@pytest.mark.parametrize("given", [None, views])
def test_the_expert_of_a_release(family, save, release, given):
    file = TensorFile(save({f"transformer.{key}": tensor for key, tensor in release.items()}))
    expert = read_release(file, recognise(file), given and given(file))
    preset = family.preset
    assert (expert.family, expert.role, expert.notes) == (family.name, "detail", ())
    assert (expert.boundary, expert.timesteps) == (preset.boundary, preset.timesteps)
    assert expert.ranks == (8,)
    assert sum(len(updates) for updates in expert.low_rank.values()) == sum(".lora_A." in key for key in release)
    assert all(update.scale == 2 for updates in expert.low_rank.values() for update in updates)
    last = "head.head" if family is WAN else "final_layer.linear"
    assert torch.equal(expert.replaced[f"{last}.weight"], release["proj_out_lora.weight"])
    assert torch.equal(expert.replaced[f"{last}.bias"], release["proj_out_lora.bias"])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_release_whose_expert_has_weights_that_are_no_numbers(save, release, value):
    key = next(k for k in release if ".lora_B." in k)
    release[key][0, 0] = value
    file = TensorFile(save(release))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: NaN or infinite values in 1 tensor: .*lora_B"):
        read_release(file, recognise(file))


@pytest.mark.parametrize(
    "name",
    [
        "lora_unet_blocks_0_self_attn_q",
        "lora_unet__blocks_0_self_attn_q",
        "lora_unet_blocks_0.self_attn.q",
        "lora_unet_blocks_0_self_attn_q_",
        "lora_transformer_blocks_0_attn1_to_q",
        "lycoris_blocks_0_attn1_to_q",
        "lora_unet_diffusion_model_blocks_0_self_attn_q",
        "pipe.dit.blocks.0.self_attn.q",
        "dit.blocks.0.self_attn.q",
        "module.blocks.0.self_attn.q",
        "model.blocks.0.self_attn.q",
        "base_model.model.blocks.0.self_attn.q",
        "transformer.base_model.model.blocks.0.attn1.to_q",
        "model.diffusion_model.blocks.0.self_attn.q",
        "module.blocks.0._orig_mod.self_attn.q",
        "_fsdp_wrapped_module.blocks.0._checkpoint_wrapped_module.self_attn.q",
        "transformer.blocks.0.attn1.to_q",
        "unet.blocks.0.attn1.to_q",
        Q,
    ],
)
def test_names_of_a_module(name, tmp_path, save):
    expert = read(pair(name))
    assert list(expert.low_rank) == [Q]
    found = inspect_file(save(pair(name)))
    assert (found.family, found.known) == ("Wan 2.1", "2 of 2")


def test_every_flat_name_is_the_name_with_dots(family):
    """No two modules of a family have one flat name."""
    for key_map in (family.native_map, family.alias_map, family.key_map):
        for rule in key_map.rules:
            module = rule.source.replace("{n}", "7")
            assert key_map.find_flat(module.replace(".", "_")).target == key_map.find_module(module).target


@pytest.mark.parametrize("ending", ["w_norm", "diff"])
def test_the_difference_of_a_norm(ending):
    assert read({f"diffusion_model.blocks.0.self_attn.norm_q.{ending}": randn(4)}).diff.keys() == {
        "blocks.0.self_attn.norm_q.weight"
    }
    assert read({f"diffusion_model.{Q}.b_norm": randn(4)}).diff.keys() == {f"{Q}.bias"}


@pytest.mark.parametrize("module", ["blocks.0", "diffusion_model.blocks.0", "lora_unet_blocks_0", "head"])
def test_the_difference_of_a_modulation(module):
    name = "head.modulation" if module == "head" else "blocks.0.modulation"
    value = randn(*SHAPES[name])
    expert = read({f"{module}.diff_m": value})
    assert list(expert.diff) == [name] and torch.equal(expert.diff[name], value)


@pytest.mark.parametrize("adapter", ["", ".default", ".my_adapter"])
@pytest.mark.parametrize(("alpha", "scale"), [(None, 1), (6.0, 3)])
def test_a_bias_of_an_adapter_has_the_scale_of_its_weights(adapter, alpha, scale):
    lora = pair(Q, down=f"lora_A{adapter}.weight", up=f"lora_B{adapter}.weight") | {
        f"{Q}.lora_B{adapter}.bias": randn(4)
    }
    expert = read(lora | ({f"{Q}.alpha": torch.tensor(alpha)} if alpha else {}))
    assert expert.low_rank[Q][0].scale == scale
    torch.testing.assert_close(expert.diff[f"{Q}.bias"], scale * randn(4))


def test_what_peft_saves_beside_its_lora():
    """`modules_to_save`, whole layers under plain names; with `bias` the base's own biases."""
    lora = pair(f"base_model.model.{Q}", down="lora_A.weight", up="lora_B.weight")
    lora |= {
        "base_model.model.transformer.proj_out.weight": randn(8, 4),
        "base_model.model.blocks.0.attn1.norm_q.weight": randn(4),
        f"base_model.model.{Q}.base_layer.bias": randn(4),
    }
    expert = read(lora)
    assert list(expert.low_rank) == [Q]
    assert set(expert.replaced) == {"head.head.weight", "blocks.0.self_attn.norm_q.weight", f"{Q}.bias"}
    with pytest.raises(ExpertError, match="do not fit this"):
        read({"proj_out.weight": randn(8, 4)})


@pytest.mark.parametrize(
    ("name", "up", "down"),
    [
        ("patch_embedding.weight", (256, 4), (4, 64)),
        ("patch_embedding.weight", (256, 4, 1, 1, 1), (4, 16, 1, 2, 2)),
        ("blocks.0.ffn.0.weight", (8, 2, 1, 1), (2, 4, 1, 1)),
        ("blocks.0.modulation", (1, 2), (2, 24)),
        ("blocks.0.modulation", (6, 2), (2, 4)),
        ("blocks.0.self_attn.norm_q.weight", (4, 2), (2, 1)),
        (f"{Q}.bias", (4, 2), (2, 1)),
    ],
)
def test_matrices_are_brought_into_the_shape_of_the_tensor(name, up, down):
    module = name.removesuffix(".weight")
    expert = read({f"{module}.lora_up.weight": randn(*up), f"{module}.lora_down.weight": randn(*down)})
    expected = (randn(*up).flatten(1) @ randn(*down).flatten(1)).reshape(SHAPES[name])
    torch.testing.assert_close(change(expert, name, SHAPES[name]), expected)


@pytest.mark.parametrize(
    ("module", "down", "mid"),
    [
        ("patch_embedding", (2, 16), (2, 2, 2, 2)),
        ("patch_embedding", (2, 16, 1, 1, 1), (2, 2, 1, 2, 2)),
        (Q, (2, 4), (2, 2, 1, 1)),
    ],
)
def test_a_tucker_core(module, down, mid):
    shape = SHAPES[f"{module}.weight"]
    tensors = {"lora_down.weight": randn(*down), "lora_mid.weight": randn(*mid), "lora_up.weight": randn(shape[0], 2)}
    tensors["alpha"] = torch.tensor(4)
    expert = read({f"{module}.{key}": value for key, value in tensors.items()})
    full = torch.einsum("or,rl...,li->oi...", randn(shape[0], 2), randn(*mid), randn(*down).flatten(1))
    torch.testing.assert_close(change(expert, f"{module}.weight", shape), 2 * full.reshape(shape))


def test_a_reshape_that_changes_nothing():
    lora = pair(Q) | {f"{Q}.reshape_weight": torch.tensor([4, 4])}
    assert list(read(lora).low_rank) == [Q]
    with pytest.raises(
        ExpertError, match=rf"changes the shape of {Q}\.weight to \[4, 8\]; in the model it is \[4, 4\]"
    ):
        read(pair(Q) | {f"{Q}.reshape_weight": torch.tensor([4, 8])})


@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16, torch.float64]
)
def test_dtypes(dtype):
    lora = {key: value.to(dtype) for key, value in pair(Q).items()} | {f"{Q}.diff": randn(4, 4).to(dtype)}
    expert, plain = read(lora), read({key: value.float() for key, value in lora.items()})
    torch.testing.assert_close(change(expert, f"{Q}.weight", (4, 4)), change(plain, f"{Q}.weight", (4, 4)))


def test_fp8_parts_of_a_fused_layer_with_scales_of_their_own():
    shapes, lora = {"double_blocks.0.img_attn.qkv.weight": (12, 4)}, {}
    for name, alpha in (("to_q", 2), ("to_k", 4)):
        lora |= {k: v.to(torch.float8_e4m3fn) for k, v in pair(f"transformer_blocks.0.attn.{name}").items()}
        lora[f"transformer_blocks.0.attn.{name}.alpha"] = torch.tensor(alpha)
    expert = read(lora, shapes, HUNYUAN_VIDEO)
    again = read(expert_to_state_dict(expert, shapes)[0], shapes, HUNYUAN_VIDEO)
    whole = [change(e, "double_blocks.0.img_attn.qkv.weight", (12, 4)) for e in (expert, again)]
    torch.testing.assert_close(*whole, atol=0.02, rtol=0.02)
    assert whole[0][4:8].abs().sum() > whole[0][:4].abs().sum() > 0 == whole[0][8:].abs().sum()


@pytest.mark.parametrize(
    ("name", "native"),
    [
        ("vace_blocks.0.attn1.to_q", "vace_blocks.0.self_attn.q"),
        ("vace_blocks.0.ffn.net.2", "vace_blocks.0.ffn.2"),
        ("vace_blocks.0.proj_in", "vace_blocks.0.before_proj"),
        ("vace_blocks.0.proj_out", "vace_blocks.0.after_proj"),
        ("lora_unet_vace_blocks_0_self_attn_q", "vace_blocks.0.self_attn.q"),
    ],
)
def test_vace_blocks(name, native):
    rows, columns = VACE_SHAPES[f"{native}.weight"]
    module = name if name.startswith("lora_") else f"transformer.{name}"
    assert list(read(pair(module, rows, columns), SHAPES | VACE_SHAPES).low_rank) == [native]


@pytest.mark.parametrize(
    "naming",
    [
        ["blocks.0.cross_attn.k_img", "blocks.0.cross_attn.v_img", "img_emb.proj.1"],
        ["blocks.0.attn2.add_k_proj", "blocks.0.attn2.add_v_proj", "condition_embedder.image_embedder.ff.net.0.proj"],
        ["lora_unet_blocks_0_cross_attn_k_img", "lora_unet_blocks_0_cross_attn_v_img", "lora_unet_img_emb_proj_1"],
    ],
)
def test_image_layers_that_the_model_lacks_are_left_out_and_named(naming):
    lora = pair(Q) | {f"{Q}.alpha": torch.tensor(2.0)}
    for module in naming:
        lora |= pair(module)
    lora["diffusion_model.blocks.0.cross_attn.norm_k_img.diff"] = randn(4)
    expert = read(lora)
    assert list(expert.low_rank) == [Q] and not expert.diff
    (note,) = expert.notes
    assert note.startswith("left out 7 tensors: image layers, which this model does not have (")
    match = match_expert({key: tuple(value.shape) for key, value in lora.items()}, WAN, SHAPES)
    assert (match.fitting, match.misfits) == (3, {}) and "image layers, which this model does not have: " in str(match)
    assert Target("Model", WAN, SHAPES).takes({key: tuple(value.shape) for key, value in lora.items()}, WAN)


def test_other_layers_that_only_some_models_have():
    (note,) = read(pair(Q) | {f"{Q}.alpha": torch.tensor(2.0)} | pair("vace_blocks.3.attn1.to_q")).notes
    assert "VACE layers" in note
    shapes = {"double_blocks.0.img_attn.proj.weight": (4, 4)}
    lora = (
        pair("double_blocks.0.img_attn.proj")
        | {"double_blocks.0.img_attn.proj.alpha": torch.tensor(2)}
        | pair("guidance_in.in_layer")
    )
    assert "guidance layers" in read(lora, shapes, HUNYUAN_VIDEO).notes[0]


@pytest.mark.parametrize(
    "module",
    [
        "lora_te_text_model_encoder_layers_0_mlp_fc1",
        "lora_te1_text_model_encoder_layers_0_mlp_fc1",
        "lora_prior_te_text_projection",
        "text_encoder.text_model.encoder.layers.0.mlp.fc1",
        "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q",
        "text_encoders.x.y",
        "te1.text_model.encoder.layers.0.mlp.fc1",
        "clip_l.transformer.text_model.encoder.layers.0.mlp.fc1",
        "umt5xxl.transformer.shared",
    ],
)
def test_what_belongs_on_a_text_encoder_is_left_out_and_named(module):
    own = pair(Q) | {f"{Q}.alpha": torch.tensor(2.0)}
    expert = read(own | pair(module))
    assert list(expert.low_rank) == [Q]
    (note,) = expert.notes
    assert note.startswith("left out 2 tensors: text encoder LoRA, which belongs on the text encoder (")
    with pytest.raises(ExpertError, match=r"has no tensors for this Wan 2\.1 model, only text encoder LoRA \("):
        read(pair(module))


def test_one_layer_too_deep_is_no_layer_to_do_without():
    with pytest.raises(ExpertError, match=r"2 of 4 tensors do not fit this Wan 2\.1 model: blocks\.9"):
        read(pair(Q) | pair("blocks.9.self_attn.q"))


@pytest.mark.parametrize(
    ("metadata", "files", "extra", "scale", "notes"),
    [
        ({}, {}, {}, 1, ["no alpha: scale 1"]),
        ({}, {}, {f"{Q}.alpha": torch.tensor(6)}, 3, []),
        (
            {},
            {"lora_config.json": {"lora_params": {"lora_rank": 2, "lora_alpha": 8}}},
            {},
            4,
            ["scale 4 from lora_config.json"],
        ),
        ({}, {"adapter_config.json": {"lora_alpha": 8, "r": 2}}, {}, 4, ["scale 4 from adapter_config.json"]),
        ({}, {"adapter_config.json": {"lora_alpha": 8, "r": 2}}, {f"{Q}.alpha": torch.tensor(6)}, 3, []),
        (
            {},
            {"adapter_config.json": {"lora_alpha": 8, "r": 16}},
            {},
            1,
            ["adapter_config.json is for another rank and was not used", "no alpha: scale 1"],
        ),
        (
            {},
            {"adapter_config.json": {"lora_alpha": 8, "use_rslora": True}},
            {},
            8 / math.sqrt(2),
            ["scale 5.65685 from adapter_config.json"],
        ),
        (
            {},
            {"adapter_config.json": {"lora_alpha": 8, "alpha_pattern": {"self_attn.q": 2}}},
            {},
            1,
            ["scale 1 from adapter_config.json"],
        ),
        (
            {"lora_adapter_metadata": '{"transformer.lora_alpha": 10}'},
            {},
            {},
            5,
            ["scale 5 from its metadata lora_adapter_metadata"],
        ),
        ({"lora_config": '{"r": 2, "lora_alpha": 10}'}, {}, {}, 5, ["scale 5 from its metadata lora_config"]),
        ({"ss_network_alpha": "1"}, {}, {}, 1, ["no alpha: scale 1"]),
    ],
)
def test_scale(metadata, files, extra, scale, notes, save):
    lora = pair(Q) | extra
    path = save(lora, "pytorch_lora_weights.safetensors", metadata)
    for name, values in files.items():
        path.with_name(name).write_text(json.dumps(values))
    expert = read(lora, metadata=metadata, path=path)
    assert expert.low_rank[Q][0].scale == pytest.approx(scale)
    assert list(expert.notes) == notes
    assert inspect_file(path).alpha == ("; ".join(notes) or "6"), "Inspect says the same"


def test_a_released_part_says_its_scale():
    expert = read(pair("transformer.blocks.0.attn1.to_q", down="lora_A.lora1.weight", up="lora_B.lora1.weight"))
    assert expert.low_rank[Q][0].scale == 2 and expert.notes == ("no alpha: scale 2 (as released)",)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            {f"{Q}.hada_w1_a": randn(2, 2)},
            r"has 1 LoHa tensor \(blocks.*\), which cannot be used here\. Expected plain LoRA.*LoraLoaderModelOnly",
        ),
        (
            {f"{Q}.lokr_w1": randn(2, 2), f"{Q}.lora_magnitude_vector": randn(2)},
            "1 LoKr tensor .* and 1 PEFT DoRA tensor",
        ),
        ({f"{Q}.diff": randn(4, 4), "blocks.0.attn1.to_q.diff": randn(4, 4)}, "are for the same tensor"),
        ({f"{Q}.diff_b": randn(4), f"{Q}.bias.diff": randn(4)}, "are for the same tensor"),
        (
            {f"{Q}.lora_down.weight": randn(2, 4), f"{Q}.lora_up.weight": randn(4, 3)},
            r"halves do not fit each other: \(2, 4\) and \(4, 3\)",
        ),
        (
            {f"{Q}.lora_down.weight": randn(2, 8), f"{Q}.lora_up.weight": randn(2, 2)},
            r"shapes \(2, 8\) and \(2, 2\); the model's .*\(4, 4\)",
        ),
        ({f"{Q}.lora_B.bias": randn(4)}, "is half of a LoRA layer"),
        (
            {f"{Q}.diff": torch.ones(4, 4, dtype=torch.int8)},
            "1 tensor stored as torch.int8, .*Quantised LoRAs are not supported",
        ),
        (pair(Q) | {f"{Q}.alpha": torch.tensor(math.nan)}, "NaN or infinite"),
    ],
)
def test_what_is_wrong_is_named(tensors, message):
    with pytest.raises(ExpertError, match=message):
        read(tensors)


def test_the_wrong_side_says_its_own():
    with pytest.raises(WrongSideError, match="This is a detail expert, not a semantic expert") as caught:
        read(pair(Q), metadata={"dcm.expert": "detail"})
    assert caught.value.side == "detail"


KEYS = [key for family in FAMILIES.values() for key in release_shapes(family)]
names = (
    st.sampled_from(KEYS)
    | st.sampled_from(
        [*SHAPES, Q, "blocks.999.self_attn.q", "lora_unet_blocks_0_self_attn_q", "blocks.0.cross_attn.k_img"]
    )
    | st.text(max_size=12)
    | st.sampled_from([f"blocks.{9 * 10**40}.x", "." * 400, "lora_unet_" + "_" * 300, ".lora_A" * 60, "model." * 80])
)
endings = st.sampled_from(
    [
        "",
        *(
            f".{ending}"
            for ending in (
                "lora_A.weight",
                "lora_B.weight",
                "lora_B.x.bias",
                "lora_down.weight",
                "lora_up.weight",
                "lora_mid.weight",
                "alpha",
                "reshape_weight",
                "diff",
                "diff_b",
                "diff_m",
                "w_norm",
                "b_norm",
                "set_weight",
                "dora_scale",
                "lokr_w1",
                "weight",
                "bias",
            )
        ),
    ]
)
shapes = st.lists(st.integers(0, 5), max_size=5) | st.sampled_from([[2, 4], [4, 2], [4, 4], [4], []])
dtypes = st.sampled_from([torch.float32, torch.float8_e4m3fn, torch.int8, torch.int64, torch.bool])
texts = st.sampled_from(["wan", "detail", "1", "8", "abc", "nan", "[1000.0]", "{", "[" * 5000]) | st.text(max_size=8)
facts = st.dictionaries(
    st.sampled_from([f"dcm.{f}" for f in ("family", "expert", "format", "tensors", "boundary", "timesteps")]), texts
)


@given(
    entries=st.lists(st.tuples(names, endings, shapes, dtypes), max_size=12),
    whole=st.booleans(),
    facts=facts,
    value=st.sampled_from([0.0, 1.0, math.nan, math.inf]),
    settings_text=texts,
    lora_text=texts,
)
@settings(suppress_health_check=list(HealthCheck), max_examples=250, deadline=None)
def test_mangled_files_are_read_or_refused(save, entries, whole, facts, value, settings_text, lora_text):
    tensors = {name + ending: torch.full(shape, value).to(dtype) for name, ending, shape, dtype in entries}
    tensors |= pair(Q) if whole else {}
    tensors.pop("__metadata__", None)
    metadata = facts | {"lora_adapter_metadata": lora_text} if lora_text != "1" else facts
    path = save(tensors, "x.safetensors", metadata)
    path.with_name("adapter_config.json").write_text(settings_text, errors="replace")
    with limits():
        for family in FAMILIES.values():
            for shapes in (SHAPES, AnyModel(family)):
                try:
                    read(tensors, shapes, family, "detail", metadata, path)
                except DCMError as error:
                    assert len(str(error)) < 2500
        assert str(inspect_file(path, Target("Model", WAN, SHAPES)))


def test_many_blocks_and_long_names_take_no_time(save):
    """A block index beyond the model's, or a thousand of them, cost nothing."""
    tensors = {
        f"diffusion_model.blocks.{n}.self_attn.q.{end}": torch.ones(1)
        for n in range(0, 2000)
        for end in ("diff", "diff_b")
    }
    path = save(tensors)
    with limits():
        inspect_file(path, Target("Model", WAN, SHAPES))
        with pytest.raises(ExpertError, match="do not fit this"):
            read(tensors)
    deep = pair("blocks.999.self_attn.q")
    with limits(seconds=0.5):
        assert inspect_file(save(deep)).known == "2 of 2"
