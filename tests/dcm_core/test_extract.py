"""A full fine-tune as a LoRA: the best one of its rank, with true numbers about what it keeps."""

import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dcm_core import extract
from dcm_core.errors import CheckpointError, DCMError
from dcm_core.experts.reader import read_expert
from dcm_core.extract import SMALL, extract_lora, truncate
from dcm_core.families import HUNYUAN_VIDEO, WAN
from dcm_core.files import unfinished
from dcm_core.files.checkpoint import PREFIXES, recognise, semantic_state_dict
from dcm_core.files.tensor_file import TensorFile

from .conftest import make_release, without_experts


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def of_spectrum(rows, columns, values):
    """A matrix with these singular values."""
    u = torch.linalg.qr(torch.randn(rows, len(values), generator=generator(1)))[0]
    v = torch.linalg.qr(torch.randn(columns, len(values), generator=generator(2)))[0]
    return u @ torch.diag(torch.tensor(values)) @ v.T


def as_native(tensors, save, name="tmp.safetensors"):
    file = TensorFile(save(tensors, name))
    return semantic_state_dict(file, recognise(file))


def tuned_and_base(family, save, rank=2):
    """(native tuned, native base) whose matrices differ by `rank`, and everything else by noise."""
    base = as_native(without_experts(family, make_release(family, torch.float32)), save)
    noise = generator(3)
    tuned = {}
    for name, tensor in base.items():
        if tensor.ndim == 2 and name.endswith(".weight"):
            rows, columns = tensor.shape
            change = (
                torch.randn(rows, rank, generator=noise)
                @ torch.randn(rank, columns, generator=noise)
                / math.sqrt(columns)
            )
        else:
            change = torch.randn(tensor.shape, generator=noise)
        tuned[name] = tensor + 0.1 * change
    return tuned, base


def merged(base, expert):
    """The base with an expert on it, written out plainly."""
    out = {name: tensor.clone() for name, tensor in base.items()}
    for module, updates in expert.low_rank.items():
        for update in updates:
            out[f"{module}.weight"][update.start : update.start + len(update.up)] += (
                update.scale * update.up.float() @ update.down.float()
            )
    for name, tensor in expert.diff.items():
        out[name] += tensor.float()
    assert not expert.replaced
    return out


def read(path, family, base):
    file = TensorFile(path)
    return read_expert(
        file.read_all(), file.metadata, "semantic", family, {name: tuple(t.shape) for name, t in base.items()}
    )


# one layer


@pytest.mark.parametrize("shape", [(30, 20), (20, 30), (SMALL + 60, SMALL + 90)])
@pytest.mark.parametrize("rank", [1, 3, 6])
def test_truncation_keeps_the_largest_singular_values(shape, rank):
    values = [9.0, 7.0, 5.0, 2.0, 1.0, 0.5]
    matrix = of_spectrum(*shape, values)
    down, up, kept = truncate(matrix, rank, generator())
    assert (down.shape, up.shape) == ((rank, shape[1]), (shape[0], rank))
    energy = sum(v**2 for v in values[:rank]) / sum(v**2 for v in values)
    assert kept.energy == pytest.approx(energy, abs=1e-4)
    assert kept.norm == pytest.approx(math.sqrt(sum(v**2 for v in values)), rel=1e-4)
    error = ((up @ down - matrix).norm() / matrix.norm()).item()
    assert error == pytest.approx(math.sqrt(1 - energy), abs=1e-3)
    assert kept.error == pytest.approx(error, abs=2e-3)


def test_slowly_falling_spectrum_of_a_large_matrix():
    matrix = torch.randn(SMALL + 100, SMALL + 100, generator=generator())
    rank = 64
    best = torch.linalg.svdvals(matrix)[rank:].norm() / matrix.norm()
    down, up, kept = truncate(matrix, rank, generator())
    error = ((up @ down - matrix).norm() / matrix.norm()).item()
    assert best <= error <= 1.01 * best
    assert kept.error == pytest.approx(error, rel=1e-3)


@given(rows=st.integers(1, 12), columns=st.integers(1, 12), rank=st.integers(1, 20), seed=st.integers(0, 99))
def test_any_small_matrix(rows, columns, rank, seed):
    matrix = torch.randn(rows, columns, generator=generator(seed))
    down, up, kept = truncate(matrix, rank, generator())
    assert kept.rank == len(down) == min(rank, rows, columns)
    error = ((up @ down - matrix).norm() / matrix.norm()).item()
    assert error == pytest.approx(kept.error, abs=1e-3)
    if rank >= min(rows, columns):
        torch.testing.assert_close(up @ down, matrix, rtol=1e-4, atol=1e-5)


def test_both_factors_are_of_one_size():
    down, up, _ = truncate(of_spectrum(40, 30, [8.0, 2.0]), 2, generator())
    torch.testing.assert_close(down.norm(dim=1), up.norm(dim=0))
    torch.testing.assert_close(down.norm(dim=1) ** 2, torch.tensor([8.0, 2.0]))


def test_the_seed_decides_and_the_global_generator_stays():
    matrix = torch.randn(SMALL + 40, SMALL + 40, generator=generator())
    state = torch.get_rng_state()
    first, again, other = (truncate(matrix, 4, generator(seed))[0] for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


# a model


def test_a_difference_of_the_rank_is_kept_whole(family, save, tmp_path):
    tuned, base = tuned_and_base(family, save, rank=2)
    out = tmp_path / "lora.safetensors"
    report = extract_lora(save(tuned, "tuned.safetensors"), save(base, "base.safetensors"), out, 2, dtype=torch.float32)
    expert = read(out, family, base)
    for name, tensor in merged(base, expert).items():
        torch.testing.assert_close(tensor, tuned[name], rtol=1e-4, atol=1e-5)
    matrices = {name.removesuffix(".weight") for name, t in base.items() if t.ndim == 2 and name.endswith(".weight")}
    assert set(report.layers) == set(expert.low_rank) == matrices
    assert report.energy == pytest.approx(1, abs=1e-5)
    assert set(report.full) == set(base) - {f"{module}.weight" for module in matrices}
    assert report.unchanged == 0
    assert (expert.family, expert.role, expert.boundary) == (family.name, "semantic", family.preset.boundary)


def test_the_report_is_true(save, tmp_path):
    tuned, base = tuned_and_base(WAN, save, rank=6)
    out = tmp_path / "lora.safetensors"
    report = extract_lora(save(tuned, "tuned.safetensors"), save(base, "base.safetensors"), out, 3, dtype=torch.float32)
    result = merged(base, read(out, WAN, base))
    lost = total = 0.0
    for module, layer in report.layers.items():
        name = f"{module}.weight"
        difference, left = tuned[name] - base[name], tuned[name] - result[name]
        assert layer.norm == pytest.approx(difference.norm().item(), rel=1e-4)
        assert layer.error == pytest.approx((left.norm() / difference.norm()).item(), abs=1e-3)
        lost, total = lost + left.norm().item() ** 2, total + difference.norm().item() ** 2
    assert report.energy == pytest.approx(1 - lost / total, abs=1e-4)
    least = min(report.layers, key=lambda module: report.layers[module].energy)
    assert least in str(report) and f"{report.energy:.2%}" in str(report)
    assert len(report.table().splitlines()) == len(report.layers)


def test_more_rank_keeps_more(save, tmp_path):
    tuned, base = tuned_and_base(WAN, save, rank=6)
    sources = save(tuned, "tuned.safetensors"), save(base, "base.safetensors")
    energies = [extract_lora(*sources, tmp_path / f"{rank}.safetensors", rank).energy for rank in (1, 2, 4, 6)]
    assert energies == sorted(energies) and energies[0] < 0.9 and energies[-1] > 0.999


def test_rank_above_the_matrix(save, tmp_path):
    tuned, base = tuned_and_base(WAN, save)
    out = tmp_path / "lora.safetensors"
    report = extract_lora(save(tuned, "tuned.safetensors"), save(base, "base.safetensors"), out, 100)
    assert report.layers["blocks.0.self_attn.q"].rank == 8
    assert read(out, WAN, base).low_rank["blocks.0.self_attn.q"][0].rank == 8


def test_unchanged_layers_are_left_out(family, save, tmp_path):
    tuned, base = tuned_and_base(family, save)
    changed = next(name for name in base if name.endswith("0.weight"))
    tuned = base | {changed: tuned[changed]}
    out = tmp_path / "lora.safetensors"
    report = extract_lora(save(tuned, "tuned.safetensors"), save(base, "base.safetensors"), out, 2)
    assert report.unchanged == len(base) - 1
    assert {
        key.removeprefix("diffusion_model.").split(".lora_")[0].removesuffix(".alpha") for key in TensorFile(out).shapes
    } == {changed.removesuffix(".weight")}


def test_any_layout_gives_the_same(family, save, tmp_path):
    release = make_release(family, torch.float32)
    plain = without_experts(family, release)
    base_plain = {key: tensor * 0.9 for key, tensor in plain.items()}
    tuned = [save(release, "release.safetensors"), save(plain, "plain.safetensors")]
    tuned.append(save(as_native(plain, save), "native.safetensors"))
    bases = [save(base_plain, "base.safetensors"), save(as_native(base_plain, save), "native_base.safetensors")]
    files = []
    for new in tuned:
        for old in bases:
            out = tmp_path / f"{new.stem}_{old.stem}.lora.safetensors"
            extract_lora(new, old, out, 3)
            files.append(TensorFile(out).read_all())
    for other in files[1:]:
        assert other.keys() == files[0].keys()
        assert all(torch.equal(other[key], files[0][key]) for key in other)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixed_native_files(save, tmp_path, prefix):
    tuned, base = tuned_and_base(WAN, save)
    out = tmp_path / "lora.safetensors"
    tuned = save({prefix + name: tensor for name, tensor in tuned.items()}, "tuned.safetensors")
    extract_lora(tuned, save(base, "base.safetensors"), out, 2)
    assert read(out, WAN, base).low_rank


# Tencent's file names, in the order they are put in place of ComfyUI's.
TENCENT = (
    (r"(img|txt)_attn\.norm\.(q|k)\w+_norm\.scale", r"\1_attn_\2_norm.weight"),
    (r"norm\.(q|k)\w+_norm\.scale", r"\1_norm.weight"),
    (r"(img|txt|self)_attn\.(qkv|proj)", r"\1_attn_\2"),
    (r"(img|txt)_mod\.lin\b", r"\1_mod.linear"),
    (r"modulation\.lin\b", "modulation.linear"),
    (r"^(time_in|guidance_in|txt_in\.t_embedder)\.in_layer", r"\1.mlp.0"),
    (r"^(time_in|guidance_in|txt_in\.t_embedder)\.out_layer", r"\1.mlp.2"),
    (r"c_embedder\.in_layer", "c_embedder.linear_1"),
    (r"c_embedder\.out_layer", "c_embedder.linear_2"),
    (r"(blocks\.\d+\.(img_|txt_)?mlp)\.0", r"\1.fc1"),
    (r"(blocks\.\d+\.(img_|txt_)?mlp)\.2", r"\1.fc2"),
)


def in_tencent_names(tensors):
    for pattern, name in TENCENT:
        tensors = {re.sub(pattern, name, key): tensor for key, tensor in tensors.items()}
    return tensors


def in_newer_names(tensors):
    """As a newer ComfyUI saves it, in a checkpoint with a VAE."""
    renamed = {f"model.model.{re.sub(r'_norm.scale$', '_norm.weight', key)}": tensor for key, tensor in tensors.items()}
    return renamed | {"vae.decoder.conv1.weight": torch.full((2, 2), torch.nan)}


@pytest.mark.parametrize("rename", [in_tencent_names, in_newer_names])
def test_hunyuan_names_of_others(save, tmp_path, rename):
    tuned, base = tuned_and_base(HUNYUAN_VIDEO, save)
    renamed = rename(tuned)
    assert len(renamed.keys() - tuned.keys()) > 6
    files = []
    for number, tensors in enumerate((tuned, renamed)):
        extract_lora(
            save(tensors, "tuned.safetensors"), save(base, "base.safetensors"), tmp_path / f"{number}.safetensors", 2
        )
        files.append(TensorFile(tmp_path / f"{number}.safetensors").read_all())
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])


def test_one_tensor_under_two_names(save, out):
    _, base = tuned_and_base(HUNYUAN_VIDEO, save)
    both = base | {"time_in.mlp.0.bias": base["time_in.in_layer.bias"].clone()}
    with pytest.raises(CheckpointError, match=r"under two names \(time_in\.in_layer\.bias, time_in\.mlp\.0\.bias\)"):
        extract_lora(save(both, "both.safetensors"), save(base, "base.safetensors"), out, 2)


def test_dtype_of_the_file(save, tmp_path):
    tuned, base = tuned_and_base(WAN, save)
    out = tmp_path / "lora.safetensors"
    extract_lora(save(tuned, "tuned.safetensors"), save(base, "base.safetensors"), out, 2, dtype=torch.float16)
    dtypes = {key.rpartition(".")[2]: dtype for key, dtype in TensorFile(out).dtypes.items()}
    assert dtypes.pop("alpha") is torch.float32
    assert set(dtypes.values()) == {torch.float16}


# refused input


def never(*_):
    raise AssertionError("work began")


@pytest.fixture
def sources(save):
    tuned, base = tuned_and_base(WAN, save)
    return save(tuned, "tuned.safetensors"), save(base, "base.safetensors")


@pytest.fixture
def out(tmp_path):
    return tmp_path / "lora.safetensors"


@pytest.mark.parametrize("rank", [0, -1])
def test_no_rank(sources, out, rank):
    with pytest.raises(CheckpointError, match=f"rank is {rank}; expected 1 or more"):
        extract_lora(*sources, out, rank, progress=never)


def test_two_families(sources, save, out):
    other = as_native(without_experts(HUNYUAN_VIDEO, make_release(HUNYUAN_VIDEO)), save)
    with pytest.raises(CheckpointError, match=r"tuned model is HunyuanVideo, but the base is Wan 2\.1"):
        extract_lora(save(other, "other.safetensors"), sources[1], out, 2, progress=never)


def test_two_sizes(sources, save, out):
    tuned, _ = tuned_and_base(WAN, save)
    tuned["blocks.0.ffn.0.weight"] = torch.zeros(9, 9)
    del tuned["blocks.1.ffn.2.bias"]
    with pytest.raises(
        CheckpointError, match=r"the name or shape of 2 tensors \(blocks\.0\.ffn\.0\.weight, blocks\.1\.ffn\.2\.bias\)"
    ):
        extract_lora(save(tuned, "other.safetensors"), sources[1], out, 2, progress=never)


def test_no_models(sources, save, out):
    lora = save({"diffusion_model.blocks.0.self_attn.q.lora_up.weight": torch.ones(2, 2)}, "l.safetensors")
    other = save({"x": torch.ones(2)}, "x.safetensors")
    for wrong in (lora, other):
        with pytest.raises(CheckpointError, match="expected a Wan or HunyuanVideo model file"):
            extract_lora(wrong, sources[1], out, 2, progress=never)


def test_the_same_model(sources, out):
    with pytest.raises(CheckpointError, match="same weights, so there is nothing to extract"):
        extract_lora(sources[0], sources[0], out, 2)
    assert not out.exists()


@pytest.mark.parametrize("which", [0, 1])
def test_weights_that_are_no_numbers(sources, save, out, which):
    files = [TensorFile(path).read_all() for path in sources]
    files[which]["blocks.1.ffn.2.weight"][0, 0] = float("nan")
    with pytest.raises(CheckpointError, match=r"has NaN or infinite values in blocks\.1\.ffn\.2\.weight"):
        extract_lora(save(files[0], "a.safetensors"), save(files[1], "b.safetensors"), out, 2)
    assert not out.exists()


def test_quantised_files_have_scales_that_count(sources, save, out):
    """The weights of a scaled fp8 file mean nothing without their scales."""
    marks = {"scaled_fp8": torch.zeros(0), "blocks.0.ffn.0.scale_weight": torch.ones(1)}
    scaled = [TensorFile(path).read_all() | marks for path in sources]
    with pytest.raises(CheckpointError, match="scale"):
        extract_lora(save(scaled[0], "a.safetensors"), save(scaled[1], "b.safetensors"), out, 2, progress=never)


def test_an_existing_file_is_kept(sources, out):
    out.write_bytes(b"old")
    with pytest.raises(CheckpointError, match="already exists"):
        extract_lora(*sources, out, 2, progress=never)
    assert out.read_bytes() == b"old"
    extract_lora(*sources, out, 2, overwrite=True)
    assert len(TensorFile(out)) > 0


@pytest.mark.parametrize("which", [0, 1])
def test_the_output_is_no_input(sources, which):
    before = sources[which].read_bytes()
    with pytest.raises(CheckpointError, match="input"):
        extract_lora(*sources, sources[which], 2, overwrite=True, progress=never)
    (link := sources[which].with_name("link.safetensors")).symlink_to(sources[which])
    with pytest.raises(CheckpointError, match=r"link\.safetensors is one of the inputs"):
        extract_lora(*sources, link, 2, overwrite=True, progress=never)
    assert sources[which].read_bytes() == before


def test_a_missing_folder_is_found_before_the_work(sources, tmp_path):
    with pytest.raises(CheckpointError, match="nowhere does not exist"):
        extract_lora(*sources, tmp_path / "nowhere" / "x.safetensors", 2, progress=never)


def test_a_disk_without_room_is_found_before_the_work(sources, out, monkeypatch):
    monkeypatch.setattr(unfinished.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 100})())
    with pytest.raises(CheckpointError, match=r"lora\.safetensors needs .* MB, but .* has 0\.0 MB free"):
        extract_lora(*sources, out, 2, progress=never)


def test_the_room_asked_for_is_enough(sources, out, monkeypatch):
    """It has to hold what is written, but the header and an alpha a layer."""
    asked, check = [], extract.check_room
    monkeypatch.setattr(extract, "check_room", lambda sizes: asked.append(sizes[out]) or check(sizes))
    extract_lora(*sources, out, 2)
    header = int.from_bytes(out.read_bytes()[:8], "little") + 8
    assert out.stat().st_size - header <= asked[0] + 4 * len(TensorFile(out)) < 3 * out.stat().st_size


def test_a_device_that_is_not_there(sources, out):
    with pytest.raises(DCMError, match="cuda:77"):
        extract_lora(*sources, out, 2, device="cuda:77", progress=never)


def test_interrupt_leaves_nothing(sources, out):
    class Interrupted(BaseException):
        pass

    def stop(done, total):
        if done == total // 2:
            raise Interrupted

    before = set(out.parent.iterdir())
    with pytest.raises(Interrupted):
        extract_lora(*sources, out, 2, progress=stop)
    assert set(out.parent.iterdir()) == before


def test_progress_ends_at_the_end(sources, out):
    seen = []
    extract_lora(*sources, out, 2, progress=lambda *done: seen.append(done))
    assert seen == sorted(seen) and seen[-1][0] == seen[-1][1] > 0
