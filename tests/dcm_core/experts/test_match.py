"""Every key of an expert has its place in a model, or a reason why not."""

import re

import pytest
import torch

from dcm_core.convert import convert_release
from dcm_core.errors import ExpertError
from dcm_core.experts.match import ON_ATTACHING, AnyModel, Target, expert_part, guess_family, match_expert
from dcm_core.experts.reader import read_expert
from dcm_core.families import FAMILIES, HUNYUAN_VIDEO, WAN
from dcm_core.files.checkpoint import recognise
from dcm_core.files.tensor_file import TensorFile

Q = "diffusion_model.blocks.0.self_attn.q"
PAIR = {f"{Q}.lora_down.weight": (2, 8), f"{Q}.lora_up.weight": (8, 2), f"{Q}.alpha": ()}
SHAPES = {"blocks.0.self_attn.q.weight": (8, 8), "blocks.0.self_attn.q.bias": (8,), "head.modulation": (1, 2, 8)}


@pytest.fixture
def expert(save, release, tmp_path):
    """Keys and shapes of a converted expert file, and the native shapes of its base."""
    convert_release(save(release), tmp_path / "base.safetensors", tmp_path / "expert.safetensors")
    base = TensorFile(tmp_path / "base.safetensors").shapes
    return TensorFile(tmp_path / "expert.safetensors"), {
        name.removeprefix("diffusion_model."): shape for name, shape in base.items()
    }


def test_an_expert_fits_the_model_it_was_made_for(family, expert):
    file, shapes = expert
    match = match_expert(file.shapes, family, shapes)
    assert match.misfits == {}
    assert (match.fitting, str(match)) == (len(file), f"{len(file)} of {len(file)}")
    assert match_expert(file.shapes, family, AnyModel(family)).fitting == len(file)
    assert Target("Model", family, shapes).takes(file.shapes, family)


def test_the_expert_inside_a_release(family, save, release):
    file = TensorFile(save({f"transformer.{key}": tensor for key, tensor in release.items()}))
    contents = recognise(file)
    found, keys = expert_part(file, contents)
    assert found is family and set(keys.values()) <= set(file.shapes)
    match = match_expert({name: file.shapes[key] for name, key in keys.items()}, family, contents.native_shapes(file))
    assert match.misfits == {} and match.fitting == len(contents.detail)


def test_families_are_told_apart_without_metadata(family, expert, save, release):
    file, _ = expert
    other = next(f for f in FAMILIES.values() if f is not family)
    assert guess_family(file.shapes, {}) is family
    assert guess_family(file.shapes, {"dcm.family": other.name}) is other, "a file is what it says"
    kohya = {
        f"lora_unet_{key.removeprefix('diffusion_model.').rpartition('.lora_')[0].replace('.', '_')}.alpha": ()
        for key in file.shapes
        if ".lora_down" in key
    }
    assert guess_family(kohya, {}) is family
    assert guess_family({"unet.down.0.lora_A.weight": (2, 2)}, {}) is None


@pytest.mark.parametrize(
    ("changes", "reason", "count"),
    [
        ({f"{Q}.lora_down.weight": (2, 9)}, "another size", 3),
        ({f"{Q}.lora_up.weight": (9, 2)}, "another size", 3),
        ({f"{Q}.lora_up.weight": (8, 3)}, "half of a LoRA layer", 3),
        ({f"{Q}.lora_up.weight": None}, "half of a LoRA layer", 2),
        ({f"{Q}.lora_down.weight": (0, 8), f"{Q}.lora_up.weight": (8, 0)}, "half of a LoRA layer", 3),
        ({f"{Q}.lora_mid.weight": (2, 3)}, "half of a LoRA layer", 4),
        ({f"{Q}.lora_mid.weight": (2, 2, 2, 2)}, "another size", 4),
        ({f"{Q}.reshape_weight": (3,)}, "another size", 1),
        ({f"{Q}.lora_B.x.bias": (9,)}, "another size", 1),
        ({f"{Q}.alpha": (2,)}, "another size", 1),
        ({f"{Q}.dora_scale": (8,)}, "DoRA", 1),
        ({"diffusion_model.blocks.1.self_attn.q.diff": (8, 8)}, "no such layer", 1),
        ({"diffusion_model.head.modulation.diff_b": (8,)}, "no such layer", 1),
        ({"diffusion_model.head.modulation.diff": (1, 3, 8)}, "another size", 1),
        ({f"{Q}.set_weight": ()}, "another size", 1),
        ({"transformer.blocks.0.attn1.to_q.alpha": ()}, "duplicate", 1),
        ({"stranger": (1,)}, "no such layer", 1),
    ],
)
def test_what_does_not_fit_is_named_with_its_reason(changes, reason, count):
    keys = {key: shape for key, shape in (PAIR | changes).items() if shape is not None}
    match = match_expert(keys, WAN, SHAPES)
    assert {why: len(found) for why, found in match.misfits.items()} == {reason: count}
    assert match.fitting == len(keys) - count
    assert str(match).startswith(f"{len(keys) - count} of {len(keys)}; {ON_ATTACHING.get(reason, reason)}: ")
    with pytest.raises(ExpertError, match=re.escape(next(iter(changes)).partition(".lora_")[0])):
        read_expert({key: torch.ones(shape) for key, shape in keys.items()}, {}, "detail", WAN, SHAPES)


def test_whole_tensors_fit():
    keys = {f"{Q}.diff": (8, 8), f"{Q}.diff_b": (8,), "diffusion_model.head.modulation.set_weight": (1, 2, 8)}
    assert match_expert(PAIR | keys, WAN, SHAPES).misfits == {}


def test_parts_of_a_fused_layer():
    stem = "transformer.single_transformer_blocks.0"
    shapes = {"single_blocks.0.linear1.weight": (8 * 3 + 20, 8), "single_blocks.0.linear1.bias": (8 * 3 + 20,)}

    def misfits(module, rows):
        pair = {f"{stem}.{module}.lora_A.weight": (2, 8), f"{stem}.{module}.lora_B.weight": (rows, 2)}
        return match_expert(pair, HUNYUAN_VIDEO, shapes).misfits

    assert misfits("attn.to_k", 8) == misfits("proj_mlp", 20) == {}
    assert list(misfits("proj_mlp", 21)) == ["another size"]
    changes = {f"{stem}.attn.to_k.diff": (8, 8), f"{stem}.attn.to_k.diff_b": (8,)}
    assert match_expert(changes, HUNYUAN_VIDEO, shapes).misfits == {}
    for shape in ((8, 9), (37, 8)):
        wrong = changes | {f"{stem}.attn.to_k.diff": shape}
        assert list(match_expert(wrong, HUNYUAN_VIDEO, shapes).misfits) == ["another size"], shape
    rows = {f"{stem}.attn.to_k.set_weight": (8, 8)}
    assert list(match_expert(rows, HUNYUAN_VIDEO, shapes).misfits) == ["only some rows"], "rows are not replaced"


def test_a_model_it_is_not_for(family, expert):
    file, shapes = expert
    other = next(f for f in FAMILIES.values() if f is not family)
    said = Target("Model", other, {name: (1,) for name in shapes}).say(file.shapes, family)
    assert said == f"none: the expert is for {family.title}, but the model is {other.title}"
    said = Target("SDXL", None, {}).say(file.shapes, family)
    assert "the model is SDXL" in said and WAN.title in said
    assert not Target("SDXL", None, {}).takes(file.shapes, family)
    fits = Target("Model", family, shapes).say(file.shapes, None)
    assert fits == f"{len(file)} of {len(file)}"
    larger = {name: tuple(2 * size for size in shape) for name, shape in shapes.items()}
    assert not Target("Model", family, larger).takes(file.shapes, family)


def test_a_model_of_any_depth_costs_nothing():
    model = AnyModel(WAN)
    assert len(model) < 200 and "blocks.{n}.ffn.0.weight" in list(model)
    assert "blocks.999.self_attn.q.weight" in model and model["blocks.999.self_attn.q.weight"] == ()
    assert "blocks.1000.self_attn.q.weight" not in model and "blocks.7.self_attn.q.scale" not in model


def test_nothing_is_read(family, save, release, monkeypatch):
    file = TensorFile(save(release))
    monkeypatch.setattr(TensorFile, "read", lambda *a: pytest.fail("read"))
    contents = recognise(file)
    _, keys = expert_part(file, contents)
    assert match_expert(
        {name: file.shapes[key] for name, key in keys.items()}, family, contents.native_shapes(file)
    ).fitting
