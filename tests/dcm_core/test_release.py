"""A base and its experts as one file in the release's layout: exact, complete, and only where that layout has a place."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from dcm_core.convert import convert_release
from dcm_core.errors import DCMError
from dcm_core.experts.expert import Expert, LowRank, merged, write_expert
from dcm_core.experts.reader import read_expert, read_release
from dcm_core.families import HUNYUAN_VIDEO, WAN
from dcm_core.files import unfinished, writing
from dcm_core.files.checkpoint import Layout, recognise, semantic_state_dict
from dcm_core.files.tensor_file import TensorFile
from dcm_core.pair import make_pair
from dcm_core.release import write_release

from .conftest import make_release
from .test_convert import MEASURE, ROOT, Interrupted, big_shapes, never


def same(path, tensors):
    found = load_file(path)
    assert found.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert found[key].dtype == tensor.dtype and torch.equal(found[key], tensor), key


def native(path):
    file = TensorFile(path)
    return semantic_state_dict(file, recognise(file))


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def shapes(converted):
    return TensorFile(converted[0]).shapes


@pytest.fixture
def expert(converted, shapes, family):
    """The small release's detail expert, from its file."""
    file = TensorFile(converted[1])
    return read_expert(file.read_all(), file.metadata, "detail", family, shapes)


@pytest.fixture
def joined(converted, shapes, tmp_path):
    """joined(expert, ...) -> (the tensors of base and expert as a release, what was said)."""

    def join(expert=None, semantic=None, **settings):
        paths = [converted[1], None]
        for index, given in enumerate((expert, semantic)):
            if given is not None:
                paths[index] = tmp_path / f"{given.role}.safetensors"
                write_expert(paths[index], given, shapes)
        out = tmp_path / "release.safetensors"
        said = write_release(converted[0], paths[0], out, paths[1], overwrite=True, **settings)
        return load_file(out), str(said)

    return join


# release -> files -> release


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_files_of_a_release_become_the_release_bit_for_bit(family, save, tmp_path, dtype):
    release = make_release(family, dtype)
    base, expert, back = (tmp_path / f"{name}.safetensors" for name in ("base", "expert", "back"))
    convert_release(save(release), base, expert)
    said = str(write_release(base, expert, back))
    same(back, release)
    assert family.title in said and str(back) in said and "LoRA rank 8" in said and "r=8, lora_alpha=16" in said
    assert recognise(TensorFile(back)).layout is Layout.RELEASE
    again = tmp_path / "again.safetensors", tmp_path / "again_expert.safetensors"
    convert_release(back, *again)
    assert load_file(again[0]).keys() == load_file(base).keys()
    same(again[1], load_file(expert))


@pytest.mark.parametrize("zeros", ["first column", "to_k", "everything"])
def test_columns_of_zeros_come_back(family, save, tmp_path, zeros):
    release = make_release(family)
    for key in release:
        if ".lora_B." in key and (zeros != "to_k" or "to_k" in key):
            release[key][:, : 1 if zeros == "first column" else None] = 0
    paths = [tmp_path / f"{name}.safetensors" for name in ("base", "expert", "back")]
    convert_release(save(release), *paths[:2])
    write_release(*paths)
    same(paths[2], release)


def test_a_base_in_any_layout_and_the_expert_out_of_a_release(family, save, release, base, converted, tmp_path):
    source, plain = save(release, "release.safetensors"), save(base, "plain.safetensors")
    for number, (model, detail) in enumerate(((source, converted[1]), (plain, converted[1]), (converted[0], source))):
        write_release(model, detail, tmp_path / f"{number}.safetensors")
        same(tmp_path / f"{number}.safetensors", release)


def test_the_golden_releases(recipe, save, tmp_path):
    for model in ("wan_tiny", "hy_tiny"):
        release = recipe.release(model)
        paths = [tmp_path / f"{model}_{name}.safetensors" for name in ("base", "expert", "back")]
        convert_release(save(release), *paths[:2])
        write_release(*paths)
        same(paths[2], release)


# experts of other forms


def test_a_semantic_expert_goes_into_the_base(family, save, tmp_path):
    release = make_release(family, torch.float32)
    base, expert, out = (tmp_path / f"{name}.safetensors" for name in ("base", "expert", "back"))
    convert_release(save(release), base, expert)
    weights = load_file(base)
    module = next(
        name.removesuffix(".weight") for name in sorted(weights) if name.endswith((".q.weight", ".qkv.weight"))
    )
    rows, columns = weights[f"{module}.weight"].shape
    whole = next(name for name in sorted(weights) if "modulation" in name)
    head = f"{family.head}.{'head' if family is WAN else 'linear'}.bias"
    semantic = Expert(
        family.name,
        "semantic",
        {module: (LowRank(randn(3, columns), randn(rows, 3), 0.75),)},
        replaced={whole: randn(*weights[whole].shape)},
        diff={head: randn(*weights[head].shape)},
    )
    file = tmp_path / "semantic.safetensors"
    write_expert(file, semantic, {name: tuple(tensor.shape) for name, tensor in weights.items()})
    write_release(base, expert, out, file)
    found = native(out)
    for name, tensor in weights.items():
        if name in (f"{module}.weight", whole, head):
            torch.testing.assert_close(found[name], merged(semantic, name, weights.__getitem__))
            assert not torch.equal(found[name], tensor)
        else:
            assert torch.equal(found[name], tensor), name
    assert torch.equal(found[whole], semantic.replaced[whole])


@pytest.mark.parametrize("scale", [2.0, 0.5, 1.0, 3.0])
def test_another_scale_and_layers_without_a_pair(family, expert, joined, shapes, scale):
    """The release stores no alpha: its scale is 2."""
    kept = dict(list(expert.low_rank.items())[::2])
    changed = {
        name: tuple(replace(pair, scale=scale, down=pair.down.float(), up=pair.up.float()) for pair in pairs)
        for name, pairs in kept.items()
    }
    tensors, _ = joined(replace(expert, low_rank=changed))
    found = detail_expert_of(family, tensors, shapes)
    for name, pairs in found.low_rank.items():
        for number, pair in enumerate(pairs):
            assert pair.scale == 2
            wanted = changed[name][number] if name in changed else None
            product = 0 * pair.up @ pair.down if wanted is None else scale * wanted.up @ wanted.down
            torch.testing.assert_close(2.0 * pair.up.float() @ pair.down.float(), product.float())


def detail_expert_of(family, tensors, shapes):
    detail = {key: tensor for key, tensor in tensors.items() if ".lora_" in key or family.detail_source(key)}
    return read_expert(detail, {}, "detail", family, shapes)


def test_layers_of_its_own_that_it_has_not_are_the_base_s(family, expert, joined, release):
    tensors, _ = joined(replace(expert, replaced={}))
    for key, tensor in tensors.items():
        source = family.detail_source(key)
        assert torch.equal(tensor, release[source] if source else release[key])


def test_what_it_adds_to_its_own_layers_goes_into_the_copies(family, expert, joined, shapes, release):
    module = "time_embedding.0" if family is WAN else "time_in.in_layer"
    rows, columns = shapes[f"{module}.weight"]
    pair = LowRank(randn(2, columns), randn(rows, 2), 1.5)
    bias = randn(rows, seed=1)
    added = replace(expert, replaced={}, low_rank=expert.low_rank | {module: (pair,)}, diff={f"{module}.bias": bias})
    tensors, _ = joined(added, dtype=torch.float32)
    source = family.key_map.sources_of(module)[0].source
    top = next(m for m in family.detail_modules if source.startswith(m))
    copy = source.replace(top, f"{top}_lora", 1)
    weight = release[f"{source}.weight"].float() + 1.5 * pair.up @ pair.down
    torch.testing.assert_close(tensors[f"{copy}.weight"], weight)
    torch.testing.assert_close(tensors[f"{copy}.bias"], release[f"{source}.bias"].float() + bias)
    assert torch.equal(tensors[f"{source}.weight"], release[f"{source}.weight"].float()), "the semantic expert's stays"


def test_a_rank_that_the_official_scripts_expect(family, joined, release):
    tensors, said = joined(rank=128)
    assert "LoRA rank 128" in said and "scripts" not in said
    for key, tensor in tensors.items():
        down, up = ".lora_A." in key, ".lora_B." in key
        own = tensor[:8] if down else tensor[:, :8] if up else tensor
        assert torch.equal(own, release[key])
        assert not (down and (tensor.shape[0] != 128 or tensor[8:].any()))
        assert not (up and (tensor.shape[1] != 128 or tensor[:, 8:].any()))
    with pytest.raises(DCMError, match=r"rank is 4, but the detail expert's LoRA has rank 8\. Set rank to at least 8"):
        joined(rank=4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_dtypes(joined, dtype):
    tensors, _ = joined(dtype=dtype)
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}


def test_a_boundary_of_its_own_is_in_the_file(family, expert, joined, save):
    tensors, said = joined(replace(expert, boundary=0.9, timesteps=(1000.0, 800.0)))
    assert "sigma 0.9" in said and f"{family.preset.boundary:g}" in said
    path = save(tensors, "x.safetensors", {"dcm.boundary": "0.9", "dcm.timesteps": "[1000.0, 800.0]"})
    file = TensorFile(path)
    found = read_release(file, recognise(file))
    assert (found.boundary, found.timesteps) == (0.9, (1000.0, 800.0))


def test_the_boundary_of_the_release_needs_no_word(family, converted, tmp_path):
    out = tmp_path / "r.safetensors"
    assert "sigma" not in str(write_release(*converted, out))
    facts = TensorFile(out).metadata
    assert facts["dcm.boundary"] == repr(family.preset.boundary) and facts["format"] == "pt"
    assert tuple(json.loads(facts["dcm.timesteps"])) == family.preset.timesteps


# what is refused, before anything is written


def refused(message, *paths, tmp_path, **settings):
    out = tmp_path / "out.safetensors"
    with pytest.raises(DCMError, match=message):
        write_release(*paths[:2], out, *paths[2:], **{"progress": never} | settings)
    assert not out.exists() and not list(tmp_path.glob(".dcm*"))


def test_changes_that_the_layout_has_no_place_for(family, expert, shapes, converted, tmp_path):
    feed_forward = "blocks.0.ffn.0" if family is WAN else "double_blocks.0.img_mlp.0"
    rows, columns = shapes[f"{feed_forward}.weight"]
    norm = "blocks.0.norm3.weight" if family is WAN else "txt_in.individual_token_refiner.blocks.0.norm1.weight"
    pair = (LowRank(randn(2, columns), randn(rows, 2), 1.0),)
    for change, name in (
        ({"low_rank": {feed_forward: pair}}, f"{feed_forward}.weight"),
        ({"replaced": {norm: randn(*shapes[norm])}}, norm),
        ({"diff": {norm: randn(*shapes[norm])}}, norm),
    ):
        file = tmp_path / "changed.safetensors"
        write_expert(file, replace(expert, **{"low_rank": {}, "replaced": {}} | change), shapes)
        refused(
            rf"changed\.safetensors changes 1 tensor that the official layout has no place for: {name}\. .*PEFT",
            converted[0],
            file,
            tmp_path=tmp_path,
        )


def test_rows_of_a_fused_layer_that_the_release_leaves_alone(save, tmp_path):
    """HunyuanVideo's linear1 is q, k, v and a feed-forward part, which the release has no LoRA on."""
    paths = tmp_path / "base.safetensors", tmp_path / "expert.safetensors"
    convert_release(save(make_release(HUNYUAN_VIDEO)), *paths)
    shapes = TensorFile(paths[0]).shapes
    name = "single_blocks.0.linear1"
    rows, columns = shapes[f"{name}.weight"]
    pair = LowRank(randn(2, columns), randn(rows - 3 * columns, 2), 1.0, 3 * columns)
    write_expert(paths[1], Expert("hunyuan_video", "detail", {name: (pair,)}), shapes)
    refused(r"no place for: single_transformer_blocks\.0\.proj_mlp\.weight", *paths, tmp_path=tmp_path)


def test_files_that_do_not_belong_together(save, converted, family, expert, shapes, tmp_path):
    other = HUNYUAN_VIDEO if family is WAN else WAN
    foreign = tmp_path / "foreign.safetensors", tmp_path / "foreign_expert.safetensors"
    convert_release(save(make_release(other)), *foreign)
    semantic = tmp_path / "semantic.safetensors"
    write_expert(semantic, replace(expert, role="semantic", boundary=0.5), shapes)
    small = save(
        {name: tensor.to(torch.float8_e4m3fn) for name, tensor in load_file(converted[0]).items()}, "fp8.safetensors"
    )
    half = tmp_path / "half.safetensors"
    pair = make_pair({"semantic": (1.0, 2.0), "detail": (1.0, 3.0)}, 0.875, (1000.0,))
    write_expert(half, replace(expert, pair=pair), shapes)
    odd = save(load_file(converted[0]) | {"strange.weight": torch.ones(1)}, "odd.safetensors")
    base, detail = converted
    for message, *paths in (
        (rf"foreign_expert\.safetensors: This expert is for {other.title}", base, foreign[1]),
        (r"semantic\.safetensors: This is a semantic expert, not a detail expert", base, semantic),
        (
            r"expert\.safetensors: This is a detail expert, not a semantic expert",
            base,
            detail,
            detail,
        ),
        (r"half\.safetensors was trained on one of two models .* one base\. Export each expert as", base, half),
        (r"for boundary 0\.9\d+, the semantic expert for 0\.5\. Choose two", base, detail, semantic),
        (r"expert or LoRA; expected a Wan or HunyuanVideo model file", detail, detail),
        (r"native layout; expected an expert file", base, base),
        (r"fp8\.safetensors is stored in fp8 .*Set dtype to bfloat16", small, detail),
        (r"odd\.safetensors has 1 tensor that the official layout has no place for: strange\.weight", odd, detail),
        (r"nowhere\.safetensors does not exist", base, tmp_path / "nowhere.safetensors"),
    ):
        refused(message, *paths, tmp_path=tmp_path)
    refused(
        "dtype is fp8, which the official code cannot run", base, detail, tmp_path=tmp_path, dtype=torch.float8_e4m3fn
    )
    write_release(small, detail, tmp_path / "fine.safetensors", dtype=torch.bfloat16)


def test_existing_files_and_inputs_are_kept(converted, tmp_path):
    before = [path.read_bytes() for path in converted]
    for out in converted:
        with pytest.raises(DCMError, match="must be different files, and different from the inputs"):
            write_release(*converted, out, overwrite=True)
    (out := tmp_path / "old.safetensors").write_bytes(b"old")
    with pytest.raises(DCMError, match="already exists"):
        write_release(*converted, out)
    assert out.read_bytes() == b"old" and [path.read_bytes() for path in converted] == before


def test_a_damaged_expert_is_refused(converted, tmp_path):
    data = bytearray(converted[1].read_bytes())
    data[-1] ^= 1
    converted[1].write_bytes(data)
    refused("is damaged", *converted, tmp_path=tmp_path)


def test_a_full_disk(converted, tmp_path, monkeypatch):
    monkeypatch.setattr(unfinished.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 10))
    refused(r"needs .* MB, but .* MB free", *converted, tmp_path=tmp_path)


@pytest.mark.parametrize("calls", [0, 40])
def test_an_interrupt_leaves_nothing(converted, tmp_path, calls):
    seen = []

    def stop(*done):
        seen.append(done)
        if len(seen) > calls:
            raise Interrupted

    with pytest.raises(Interrupted):
        write_release(*converted, tmp_path / "out.safetensors", progress=stop)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "base.safetensors",
        "expert.safetensors",
        "model.safetensors",
    ]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")
def test_memory_does_not_grow_with_the_file(tmp_path):
    entries = {key: (torch.bfloat16, shape) for key, shape in big_shapes().items()}
    source, base, expert, back = (tmp_path / f"{name}.safetensors" for name in ("r", "b", "e", "back"))
    writing.write_stream(
        source, entries, ((key, torch.ones(shape, dtype=dtype)) for key, (dtype, shape) in entries.items()), {}
    )
    convert_release(source, base, expert)
    script = MEASURE.replace("dcm_core.convert import convert_release", "dcm_core.release import write_release")
    script = script.replace("convert_release(", "write_release(")
    command = [sys.executable, "-c", script, *map(str, (base, expert, back))]
    grown = int(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout) / 1024
    assert back.stat().st_size > 200 * 2**20
    assert grown < 80, f"{grown:.0f} MiB more for a file of {back.stat().st_size / 2**20:.0f} MiB"
