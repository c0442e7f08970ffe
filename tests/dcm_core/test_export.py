"""Experts for other tools: loaded with PEFT and diffusers themselves, layer by layer against the expert's own arithmetic."""

import copy
import json
import math
import shutil
from dataclasses import replace

import peft
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from dcm_core.convert import convert_release
from dcm_core.errors import DCMError
from dcm_core.experts.expert import Expert, LowRank, merged, write_expert
from dcm_core.experts.reader import read_expert
from dcm_core.export import DIFFUSERS, PEFT, export_expert
from dcm_core.families import HUNYUAN_VIDEO, WAN
from dcm_core.families.keymap import unfuse
from dcm_core.files import unfinished
from dcm_core.files.metadata import level_entries, read_metadata
from dcm_core.files.tensor_file import TensorFile
from dcm_core.pair import make_pair
from dcm_core.release import write_release

from .conftest import make_release, without_experts
from .test_convert import Interrupted, never

TOLERANCE = 1e-6


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Norm(nn.Module):
    """Any norm: its tensors."""

    def __init__(self, tensors):
        super().__init__()
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor.clone()))


def tree(tensors):
    """A model in diffusers' names that holds these tensors."""
    root, layers = nn.Module(), {}
    for key, tensor in tensors.items():
        module, _, param = key.rpartition(".")
        layers.setdefault(module, {})[param] = tensor
    for name, own in sorted(layers.items()):
        parent = root
        for part in name.split(".")[:-1]:
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent._modules[part]
        if "weight" not in own:  # a block, or the root, with a parameter of its own
            holder = parent._modules.setdefault(name.split(".")[-1], nn.Module()) if name else root
            for param, tensor in own.items():
                holder.register_parameter(param, nn.Parameter(tensor.clone()))
            continue
        if own["weight"].ndim == 5:
            layer = nn.Conv3d(own["weight"].shape[1], own["weight"].shape[0], own["weight"].shape[2:])
        elif own["weight"].ndim == 2:
            layer = nn.Linear(*own["weight"].shape[::-1], bias="bias" in own)
        else:
            layer = Norm(own)
        layer.load_state_dict(own)
        parent.add_module(name.split(".")[-1], layer)
    return root.requires_grad_(False)


@pytest.fixture
def base(family):
    """The small release's base in diffusers' names, float32."""
    return {key: tensor.float() for key, tensor in without_experts(family, make_release(family)).items()}


@pytest.fixture
def files(family, save, tmp_path):
    """Base and expert of the small release in float32."""
    paths = tmp_path / "base.safetensors", tmp_path / "expert.safetensors"
    convert_release(save(make_release(family, torch.float32)), *paths)
    return paths


@pytest.fixture
def written(files, tmp_path):
    """written(expert) -> its file."""

    def write(expert):
        path = tmp_path / f"{expert.role}.safetensors"
        write_expert(path, expert, TensorFile(files[0]).shapes)
        return path

    return write


def read(path, family, shapes, role=None):
    file = TensorFile(path)
    return read_expert(file.read_all(), file.metadata, role or file.metadata["dcm.expert"], family, shapes, path)


def with_expert(expert, native, family):
    """The tensors of base and expert in diffusers' names."""
    found = {}
    for name in native:
        weight = native.get(name.rpartition(".")[0] + ".weight", torch.zeros(1))
        width = weight.shape[1] if weight.ndim > 1 else 0
        found |= unfuse(family.key_map.sources_of_tensor(name), merged(expert, name, native.__getitem__), width)
    return found


def assert_answers(model, tensors):
    """Every layer of the model gives what a layer with these tensors gives; a norm has them."""
    for key, weight in tensors.items():
        module, _, param = key.rpartition(".")
        if param != "weight":
            continue
        layer, bias = model.get_submodule(module), tensors.get(f"{module}.bias")
        if weight.ndim == 1:
            assert torch.equal(layer.weight, weight) and (bias is None or torch.equal(layer.bias, bias)), module
            continue
        x = randn(3, *weight.shape[1:])
        wanted = F.linear(x, weight, bias) if weight.ndim == 2 else F.conv3d(x, weight, bias)
        assert (layer(x) - wanted).norm() <= TOLERANCE * wanted.norm(), module


def loaded_with_peft(model, folder, said):
    """As the text of the export says."""
    if "ModuleDict" in said:
        peft.PeftModel.from_pretrained(nn.ModuleDict({"transformer": model}), str(folder))
        return model
    return peft.PeftModel.from_pretrained(model, str(folder)).base_model.model


def random_semantic(family, shapes, files):
    """Low-rank updates of every linear of the blocks, each of its own rank and scale, biases, and a norm that is replaced."""
    low_rank, diff, replaced = {}, {}, {}
    for number, (name, shape) in enumerate(sorted(shapes.items())):
        module, _, param = name.rpartition(".")
        if param != "weight" or len(shape) != 2 or ".norm" in name:
            continue
        rank, scale = 1 + number % 3, (0.5, 1.0, 2.0, 1.3)[number % 4]
        low_rank[module] = (LowRank(randn(rank, shape[1], seed=number), randn(shape[0], rank, seed=number), scale),)
        if number % 2 and f"{module}.bias" in shapes:
            diff[f"{module}.bias"] = randn(shape[0], seed=number + 1)
    norm = "blocks.0.norm3" if family is WAN else "txt_in.individual_token_refiner.blocks.0.norm1"
    replaced = {f"{norm}.{param}": randn(*shapes[f"{norm}.{param}"], seed=3) for param in ("weight", "bias")}
    return Expert(family.name, "semantic", low_rank, replaced, diff, boundary=0.9, timesteps=(1000.0, 500.0))


# PEFT


def test_peft_loads_a_released_detail_expert(family, files, base, tmp_path):
    said = str(export_expert(files[1], tmp_path / "peft", PEFT))
    assert sorted(path.name for path in (tmp_path / "peft").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert "Left out" not in said and "layers replaced" in said
    native = load_file(files[0])
    expert = read(files[1], family, {name: tuple(tensor.shape) for name, tensor in native.items()})
    tensors = with_expert(expert, {name: tensor.float() for name, tensor in native.items()}, family)
    plain = with_expert(Expert(family.name, "detail"), native, family)
    assert sum(not torch.equal(tensors[name], plain[name]) for name in plain) > 20
    assert_answers(loaded_with_peft(tree(plain), tmp_path / "peft", said), tensors)


def test_peft_loads_ranks_scales_biases_and_replaced_layers(family, files, written, tmp_path):
    native = load_file(files[0])
    shapes = {name: tuple(tensor.shape) for name, tensor in native.items()}
    expert = random_semantic(family, shapes, files)
    found = export_expert(written(expert), tmp_path / "peft", PEFT)
    assert not found.left_out and len(found.replaced) == 1
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["rank_pattern"] and config["alpha_pattern"] and config["lora_bias"]
    plain = with_expert(Expert(family.name, "semantic"), native, family)
    model = loaded_with_peft(tree(plain), tmp_path / "peft", str(found))
    assert_answers(model, with_expert(expert, native, family))


def test_an_adapter_comes_back_as_the_expert(family, files, tmp_path):
    export_expert(files[1], tmp_path / "peft", PEFT)
    shapes = TensorFile(files[0]).shapes
    found, wanted = (read(path, family, shapes) for path in (tmp_path / "peft" / "adapter_model.safetensors", files[1]))
    assert (found.boundary, found.timesteps, found.role) == (wanted.boundary, wanted.timesteps, "detail")
    assert found.low_rank.keys() == wanted.low_rank.keys() and found.replaced.keys() == wanted.replaced.keys()
    assert all(torch.equal(found.replaced[name], tensor) for name, tensor in wanted.replaced.items())
    for module, pairs in wanted.low_rank.items():
        ours = sorted(found.low_rank[module], key=lambda pair: pair.start)
        for mine, theirs in zip(ours, pairs, strict=True):
            assert (mine.scale, mine.start) == (theirs.scale, theirs.start)
            assert torch.equal(mine.down, theirs.down) and torch.equal(mine.up, theirs.up)


@pytest.mark.parametrize(("to", "file"), [(PEFT, "adapter_model.safetensors"), (DIFFUSERS, "")])
def test_an_expert_of_two_models_stays_one(to, file, files, save, tmp_path):
    pair = make_pair({"semantic": (1.0, 2.0), "detail": (1.0, 3.0)}, 0.875, (1000.0,))
    levels = level_entries(0.875, (1000.0,), pair)
    half = save(load_file(files[1]), "half.safetensors", TensorFile(files[1]).metadata | levels)
    export_expert(half, tmp_path / "out", to)
    assert read_metadata(TensorFile(tmp_path / "out" / file).metadata).pair == pair


def test_a_release_gives_its_detail_expert(family, files, save, tmp_path):
    source = save(make_release(family, torch.float32), "release.safetensors")
    for number, path in enumerate((source, files[1])):
        export_expert(path, tmp_path / f"{number}", PEFT)
    one, other = (load_file(tmp_path / f"{number}" / "adapter_model.safetensors") for number in range(2))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    facts = TensorFile(tmp_path / "0" / "adapter_model.safetensors").metadata
    assert facts["dcm.expert"] == "detail" and float(facts["dcm.boundary"]) == family.preset.boundary


def test_a_peft_adapter_goes_into_a_release(family, files, save, tmp_path):
    """The ways out are ways in."""
    export_expert(files[1], tmp_path / "peft", PEFT)
    write_release(files[0], tmp_path / "peft" / "adapter_model.safetensors", tmp_path / "back.safetensors")
    back, release = load_file(tmp_path / "back.safetensors"), make_release(family, torch.float32)
    assert back.keys() == release.keys() and all(torch.equal(back[key], release[key]) for key in release)


def test_what_peft_has_no_form_for_is_named(family, files, written, tmp_path):
    shapes = TensorFile(files[0]).shapes
    modulation = "blocks.0.modulation" if family is WAN else "double_blocks.0.img_attn.norm.query_norm.scale"
    image = family.convolutions[0]
    linear = "blocks.0.ffn.0" if family is WAN else "double_blocks.0.img_mlp.0"
    other = "blocks.0.ffn.2" if family is WAN else "double_blocks.0.img_mlp.2"
    # a parameter of no layer, or rows of a fused bias that no weight tells apart
    loose = "head.modulation" if family is WAN else "double_blocks.0.txt_attn.qkv.bias"
    rows, columns = shapes[f"{linear}.weight"]
    expert = Expert(
        family.name,
        "semantic",
        {linear: (LowRank(randn(2, columns), randn(rows, 2), 1.0),)},
        replaced={name: randn(*shapes[name]) for name in (f"{other}.bias", loose)},
        diff={name: randn(*shapes[name]) for name in (modulation, f"{image}.weight", f"{other}.weight")},
    )
    found = export_expert(written(expert), tmp_path / "peft", PEFT)
    names = [p.source for name in (*expert.replaced, *expert.diff) for p in family.key_map.sources_of_tensor(name)]
    assert list(found.left_out) == sorted(names) and len(names) == (5 if family is WAN else 7)
    assert f"{len(names)} tensors of" in str(found) and "Results will differ" in str(found)
    keys = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert len(keys) == 2 and all(".lora_" in key for key in keys)


# diffusers


def transformers(family):
    """(a small transformer of diffusers, the pipeline's mixin that loads LoRAs)."""
    diffusers = pytest.importorskip("diffusers")
    from diffusers.loaders import lora_pipeline

    torch.manual_seed(0)
    if family is WAN:
        return diffusers.WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=16,
            freq_dim=32,
            ffn_dim=40,
            num_layers=2,
            rope_max_seq_len=32,
        ), lora_pipeline.WanLoraLoaderMixin
    return diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=1,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(4, 4, 4),
    ), lora_pipeline.HunyuanVideoLoraLoaderMixin


@pytest.fixture
def small(family, save, tmp_path):
    """(the transformer, its mixin, its base file, native tensors)."""
    model, mixin = transformers(family)
    base = tmp_path / "tiny.safetensors"
    convert_release(save(model.state_dict(), "diffusers.safetensors"), base, tmp_path / "none.safetensors")
    return model.requires_grad_(False), mixin, base, load_file(base)


def small_detail(family, native):
    """A detail expert as the release's, of rank 3 at scale 2."""
    low_rank, replaced = {}, {}
    for number, name in enumerate(sorted(native)):
        pieces = family.key_map.sources_of_tensor(name)
        if any(piece.source.startswith(tuple(f"{m}." for m in family.detail_modules)) for piece in pieces):
            replaced[name] = randn(*native[name].shape, seed=number)
        module = name.removesuffix(".weight")
        width = native[name].shape[-1]
        parts = [p for p in family.key_map.sources_of(module) if family.lora_target_pattern.fullmatch(p.source)]
        if parts and name.endswith(".weight"):
            low_rank[module] = tuple(
                LowRank(randn(3, width, seed=number), randn(width, 3, seed=number + p), 2.0, p * width)
                for p in range(len(parts))
            )
    return Expert(family.name, "detail", low_rank, replaced, boundary=0.9)


def test_diffusers_loads_the_lora_part(family, small, tmp_path):
    model, mixin, base, native = small
    shapes = TensorFile(base).shapes
    expert = small_detail(family, native)
    write_expert(tmp_path / "expert.safetensors", expert, shapes)
    found = export_expert(tmp_path / "expert.safetensors", tmp_path / "lora.safetensors", DIFFUSERS)
    replaced = {piece.source for name in expert.replaced for piece in family.key_map.sources_of_tensor(name)}
    assert set(found.left_out) == replaced and "proj_out" in str(found)
    load_as_pipelines_do(model, mixin, tmp_path)
    assert_answers(model, with_expert(replace(expert, replaced={}), native, family))


def test_diffusers_loads_ranks_scales_and_biases(family, small, tmp_path):
    model, mixin, base, native = small
    shapes = TensorFile(base).shapes
    expert = replace(random_semantic(family, shapes, None), replaced={})
    write_expert(tmp_path / "expert.safetensors", expert, shapes)
    found = export_expert(tmp_path / "expert.safetensors", tmp_path / "lora.safetensors", DIFFUSERS)
    assert not found.left_out
    load_as_pipelines_do(model, mixin, tmp_path)
    assert_answers(model, with_expert(expert, native, family))


def load_as_pipelines_do(model, mixin, folder):
    state_dict, metadata = mixin.lora_state_dict(str(folder), weight_name="lora.safetensors", return_lora_metadata=True)
    assert all("lora" in key for key in state_dict) and metadata is None
    mixin.load_lora_into_transformer(state_dict, model, metadata=metadata)


def test_a_transformer_of_diffusers_takes_a_peft_adapter(family, small, tmp_path):
    model, _, base, native = small
    expert = small_detail(family, native)
    write_expert(tmp_path / "expert.safetensors", expert, TensorFile(base).shapes)
    said = str(export_expert(tmp_path / "expert.safetensors", tmp_path / "peft", PEFT))
    assert_answers(loaded_with_peft(model, tmp_path / "peft", said), with_expert(expert, native, family))


def test_the_official_code_s_model_takes_a_release(family, small, tmp_path):
    """Built as its scripts build it: an adapter called lora1 on a transformer of diffusers, and copies of its own layers."""
    model, _, base, native = small
    expert = small_detail(family, native)
    write_expert(tmp_path / "expert.safetensors", expert, TensorFile(base).shapes)
    write_release(base, tmp_path / "expert.safetensors", tmp_path / "release.safetensors", rank=128)
    config = peft.LoraConfig(r=128, lora_alpha=256, target_modules=["to_k", "to_q", "to_v", "to_out.0"])
    model.add_adapter(config, adapter_name="lora1")
    for name in family.detail_modules:
        setattr(model, f"{name}_lora", copy.deepcopy(getattr(model, name)))
    model.load_state_dict(load_file(tmp_path / "release.safetensors"), strict=True)
    tensors = with_expert(expert, native, family)
    own = tuple(f"{name}." for name in family.detail_modules)
    moved = {}
    for key, tensor in tensors.items():
        top = next((name for name in family.detail_modules if key.startswith(f"{name}.")), None)
        moved[key.replace(top, f"{top}_lora", 1) if top else key] = tensor
    assert any(key.startswith(own) for key in tensors)
    assert_answers(model, moved)


def test_a_diffusers_file_comes_back(family, files, tmp_path):
    found = export_expert(files[1], tmp_path / "lora.safetensors", DIFFUSERS)
    shapes = TensorFile(files[0]).shapes
    back, wanted = (read(path, family, shapes) for path in (found.path, files[1]))
    assert not back.replaced and back.boundary == wanted.boundary
    native = load_file(files[0])
    for module in wanted.low_rank:
        name = f"{module}.weight"
        torch.testing.assert_close(
            merged(back, name, native.__getitem__), merged(wanted, name, native.__getitem__), rtol=1e-5, atol=1e-5
        )


def test_diffusers_files_have_one_rank_and_no_alpha(family, files, written, tmp_path):
    """Older versions of diffusers scale layers of another rank wrongly."""
    shapes = TensorFile(files[0]).shapes
    export_expert(written(random_semantic(family, shapes, files)), tmp_path / "lora.safetensors", DIFFUSERS)
    tensors = load_file(tmp_path / "lora.safetensors")
    assert {tensor.shape[0] for key, tensor in tensors.items() if "lora_A" in key} == {3}
    assert all(key.startswith("transformer.") and ".lora_" in key for key in tensors)


# what is refused


@pytest.mark.parametrize("to", [PEFT, DIFFUSERS])
def test_files_that_are_no_experts(family, files, save, written, tmp_path, to):
    whole = Expert(
        family.name, "semantic", replaced={f"{family.head}.{'head' if family is WAN else 'linear'}.bias": randn(8)}
    )
    shapes = TensorFile(files[0]).shapes
    name = next(iter(whole.replaced))
    whole.replaced[name] = randn(*shapes[name])
    unknown = save({"layer.lora_A.weight": randn(2, 2), "layer.lora_B.weight": randn(2, 2)}, "unknown.safetensors")
    dora = save(
        {
            f"transformer.{family.key_map.sources_of(next(iter(read(files[1], family, shapes).low_rank)))[0].source}.dora_scale": randn(
                1
            )
        }
        | load_file(files[1]),
        "dora.safetensors",
    )
    broken = save({key: tensor * math.nan for key, tensor in load_file(files[1]).items()}, "nan.safetensors")
    for path, message in (
        (files[0], r"base\.safetensors is native layout; expected an expert file"),
        (tmp_path / "nowhere.safetensors", "does not exist"),
        (unknown, r"unknown\.safetensors: Its layers are neither Wan's nor HunyuanVideo's"),
        (written(whole), r"semantic\.safetensors has no LoRA, only replaced layers"),
        (dora, "1 DoRA tensor"),
        (broken, r"nan\.safetensors: NaN or infinite"),
    ):
        with pytest.raises(DCMError, match=message):
            export_expert(path, tmp_path / "out", to, progress=never)
    with pytest.raises(DCMError, match="dtype is fp8, which does not work for a LoRA"):
        export_expert(files[1], tmp_path / "out", to, torch.float8_e4m3fn, progress=never)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("to", [PEFT, DIFFUSERS])
def test_existing_files_are_kept(files, tmp_path, to):
    out = tmp_path / "out"
    export_expert(files[1], out, to)
    before = {path: path.read_bytes() for path in (out.iterdir() if to == PEFT else [out])}
    with pytest.raises(DCMError, match=r"already exists?"):
        export_expert(files[1], out, to)
    with pytest.raises(DCMError, match="and different from the input"):
        export_expert(out / "adapter_model.safetensors" if to == PEFT else out, out, to, overwrite=True)
    assert {path: path.read_bytes() for path in before} == before
    export_expert(files[1], out, to, torch.float16, overwrite=True)
    path = out / "adapter_model.safetensors" if to == PEFT else out
    assert set(TensorFile(path).dtypes.values()) == {torch.float16}


@pytest.mark.parametrize("to", [PEFT, DIFFUSERS])
@pytest.mark.parametrize("calls", [0, 20])
def test_an_interrupt_leaves_nothing(files, tmp_path, to, calls):
    seen = []

    def stop(*done):
        seen.append(done)
        if len(seen) > calls:
            raise Interrupted

    before = sorted(tmp_path.iterdir())
    with pytest.raises(Interrupted):
        export_expert(files[1], tmp_path / "out", to, progress=stop)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("to", [PEFT, DIFFUSERS])
def test_a_full_disk(files, tmp_path, to, monkeypatch):
    monkeypatch.setattr(unfinished.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 10))
    with pytest.raises(DCMError, match="MB free"):
        export_expert(files[1], tmp_path / "out", to, progress=never)
    assert not (tmp_path / "out").exists()


def test_folders_that_cannot_be_made(files, tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "no" / "such"):
        with pytest.raises(DCMError, match="cannot be created"):
            export_expert(files[1], out, PEFT, progress=never)


def test_hunyuan_layers_whose_names_end_alike_keep_their_own(save, tmp_path):
    """PEFT compares the ends of names; without another root it would ask for every block's proj_out."""
    files = tmp_path / "base.safetensors", tmp_path / "expert.safetensors"
    convert_release(save(make_release(HUNYUAN_VIDEO, torch.float32)), *files)
    said = str(export_expert(files[1], tmp_path / "peft", PEFT))
    assert 'ModuleDict({"transformer": pipe.transformer})' in said
    model = tree(without_experts(HUNYUAN_VIDEO, make_release(HUNYUAN_VIDEO, torch.float32)))
    loaded_with_peft(model, tmp_path / "peft", said)
    saved = [name for name, module in model.named_modules() if hasattr(module, "modules_to_save")]
    assert len(saved) == 8 and all(name.startswith(HUNYUAN_VIDEO.detail_modules) for name in saved)
