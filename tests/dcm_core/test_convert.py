"""Conversion: native names, an expert file, all or nothing, in little memory."""

import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from dcm_core import convert
from dcm_core.convert import DTYPES, convert_release
from dcm_core.errors import CheckpointError
from dcm_core.experts.reader import read_expert, read_release
from dcm_core.families import HUNYUAN_VIDEO
from dcm_core.files import unfinished, writing
from dcm_core.files.checkpoint import Layout, recognise, semantic_state_dict
from dcm_core.files.tensor_file import TensorFile

from .conftest import make_release, release_shapes

ROOT = Path(__file__).parents[2]


@pytest.fixture
def targets(tmp_path):
    for name in ("models", "loras"):
        (tmp_path / name).mkdir()
    return tmp_path / "models" / "base.safetensors", tmp_path / "loras" / "expert.safetensors"


def written(targets):
    return sorted(path.name for target in targets for path in target.parent.iterdir())


def metadata(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def test_release(family, save, release, targets):
    source = save(release)
    report = convert_release(source, *targets)
    file = TensorFile(source)
    contents = recognise(file)
    base, expected = load_file(targets[0]), semantic_state_dict(file, contents)
    assert base.keys() == expected.keys()
    assert all(torch.equal(base[name], expected[name]) for name in expected)
    assert recognise(TensorFile(targets[0])).layout is Layout.NATIVE
    assert recognise(TensorFile(targets[1])).layout is Layout.EXPERT
    assert metadata(targets[0])["dcm.family"] == family.name
    assert (report.base, report.expert, report.base_tensors) == (*targets, len(expected))
    for word in (family.title, str(targets[0]), str(targets[1]), "detail expert: LoRA rank 8"):
        assert word in str(report)


def test_expert_file(family, save, release, targets):
    source = save(release)
    convert_release(source, *targets)
    file = TensorFile(source)
    expert = TensorFile(targets[1])
    facts = expert.metadata
    assert facts["dcm.format"] == "1"
    assert (facts["dcm.family"], facts["dcm.expert"]) == (family.name, "detail")
    assert (float(facts["dcm.rank"]), float(facts["dcm.alpha"])) == (8, 16)
    assert float(facts["dcm.boundary"]) == family.preset.boundary
    shapes = TensorFile(targets[0]).shapes
    again = read_expert(expert.read_all(), facts, "detail", family, shapes)
    original = read_release(file, recognise(file))
    assert again.timesteps == original.timesteps
    assert again.replaced.keys() == original.replaced.keys()
    assert all(torch.equal(again.replaced[name], tensor) for name, tensor in original.replaced.items())
    assert again.low_rank.keys() == original.low_rank.keys()
    for module, updates in original.low_rank.items():
        for ours, theirs in zip(again.low_rank[module], updates, strict=True):
            assert (ours.scale, ours.start) == (theirs.scale, theirs.start)
            assert torch.equal(ours.up, theirs.up) and torch.equal(ours.down, theirs.down)


def test_plain_diffusers_file(family, save, base, targets):
    report = convert_release(save(base), *targets)
    assert report.expert is None and "no expert" in str(report)
    assert written(targets) == ["base.safetensors"]
    assert recognise(TensorFile(targets[0])).family is family


@pytest.mark.parametrize("name", DTYPES)
def test_dtypes(family, save, targets, name):
    release = make_release(family, torch.float32)
    convert_release(save(release), *targets, dtype=DTYPES[name])
    base, expert = TensorFile(targets[0]), TensorFile(targets[1])
    wanted = DTYPES[name] or torch.float32
    if wanted is torch.float8_e4m3fn:
        small = {key for key, dtype in base.dtypes.items() if dtype is wanted}
        assert small and all(
            "blocks." in key and len(base.shapes[key]) == 2 and key.endswith(".weight") for key in small
        )
        assert {dtype for key, dtype in base.dtypes.items() if key not in small} == {torch.float32}
        wanted = torch.float32
    else:
        assert set(base.dtypes.values()) == {wanted}
    assert {dtype for key, dtype in expert.dtypes.items() if not key.endswith(".alpha")} == {wanted}
    again = read_expert(expert.read_all(), expert.metadata, "detail", family, base.shapes)
    assert {update.scale for updates in again.low_rank.values() for update in updates} == {2.0}


@pytest.mark.parametrize("name", ["float16", "float8_e4m3fn"])
def test_weights_too_large_for_the_dtype_are_named(family, save, targets, name):
    release = make_release(family, torch.float32)
    key = next(k for k in release if k.endswith("to_out.0.base_layer.weight"))
    release[key][0, 0] = 1e6
    with pytest.raises(CheckpointError, match=r"blocks\.0\..*weight"):
        convert_release(save(release), *targets, dtype=DTYPES[name])
    assert written(targets) == []


def test_progress_ends_at_the_end(family, save, release, targets):
    seen = []
    convert_release(save(release), *targets, progress=lambda *done: seen.append(done))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] == seen[-1][1] > 0


class Interrupted(BaseException):
    """As the host's own interrupt: no Exception."""


@pytest.mark.parametrize("error", [Interrupted, KeyboardInterrupt, OSError])
@pytest.mark.parametrize("calls", [1, 30])
def test_interrupt_leaves_what_was_there(family, save, release, targets, error, calls):
    for target in targets:
        target.write_bytes(b"old")
    count = iter(range(calls))

    def stop(*_):
        if next(count, None) is None:
            raise error

    with pytest.raises(error):
        convert_release(save(release), *targets, progress=stop, overwrite=True)
    assert written(targets) == ["base.safetensors", "expert.safetensors"]
    assert all(target.read_bytes() == b"old" for target in targets)


def test_a_failure_while_writing_the_expert_leaves_no_base(family, save, release, targets, monkeypatch):
    def fail(*_args, **_kwargs):
        raise Interrupted

    monkeypatch.setattr("dcm_core.convert.write_expert", fail)
    with pytest.raises(Interrupted):
        convert_release(save(release), *targets)
    assert written(targets) == []


def test_existing_files_are_kept(family, save, release, targets):
    source = save(release)
    for existing in targets:
        existing.write_bytes(b"old")
        with pytest.raises(CheckpointError, match=rf"{existing.name} already exists"):
            convert_release(source, *targets)
        assert written(targets) == [existing.name]
        assert existing.read_bytes() == b"old"
        existing.unlink()
    for existing in targets:
        existing.write_bytes(b"old")
    convert_release(source, *targets, overwrite=True)
    assert all(target.stat().st_size > 3 for target in targets)


def test_the_input_is_no_output(save, release, tmp_path):
    source = save(release)
    before = source.read_bytes()
    other = tmp_path / "other.safetensors"
    link = tmp_path / "link.safetensors"
    link.symlink_to(source)
    for base, expert in ((source, other), (other, source), (other, other), (link, other)):
        with pytest.raises(CheckpointError, match="must be different files, and different from the input"):
            convert_release(source, base, expert, overwrite=True)
    assert source.read_bytes() == before
    assert not other.exists()


def never(*_):
    raise AssertionError("work began")


def test_missing_folders_are_found_before_the_work(save, release, targets):
    source = save(release)
    nowhere = targets[0].parent / "nowhere" / "x.safetensors"
    for base, expert in ((nowhere, targets[1]), (targets[0], nowhere)):
        with pytest.raises(CheckpointError, match="nowhere does not exist"):
            convert_release(source, base, expert, progress=never)
        assert written(targets) == []


def test_disk_room_for_both_is_checked_before_the_work(save, release, targets, monkeypatch):
    source = save(release)
    convert_release(source, *targets)
    sizes = [target.stat().st_size for target in targets]
    for target in targets:
        target.unlink()
    usage, room = shutil.disk_usage(targets[0].parent), sum(sizes) * 9 // 10

    def disk(_):
        used = sum(path.stat().st_size for target in targets for path in target.parent.iterdir())
        return usage._replace(free=room - used)

    monkeypatch.setattr(unfinished.shutil, "disk_usage", disk)
    with pytest.raises(
        CheckpointError, match=r"base\.safetensors and .*expert\.safetensors need .* MB, but .* MB free"
    ):
        convert_release(source, *targets, progress=never)
    assert written(targets) == []


def test_files_that_need_no_conversion(family, save, release, targets, tmp_path):
    convert_release(save(release), *targets)
    outputs = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    for source, word in ((targets[0], "native layout"), (targets[1], "expert or LoRA")):
        with pytest.raises(CheckpointError, match=word):
            convert_release(source, *outputs)
    other = save({"something.weight": torch.ones(2)}, "other.safetensors")
    with pytest.raises(CheckpointError, match="something else"):
        convert_release(other, *outputs)


def test_half_a_release_writes_nothing(family, save, release, targets):
    release.pop(next(key for key in release if ".lora_B." in key))
    with pytest.raises(CheckpointError, match=r"1 tensor is missing"):
        convert_release(save(release), *targets, progress=never)
    assert written(targets) == []


@pytest.mark.parametrize("part", [".lora_A.", ".base_layer.weight"])
def test_weights_that_are_no_numbers(family, save, release, targets, part):
    key = [key for key in release if part in key][-1]
    release[key][0, 0] = float("nan")
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        convert_release(save(release), *targets)
    assert written(targets) == []


def test_truncated_release(family, save, release, targets):
    source = save(release)
    with source.open("rb+") as file:
        file.truncate(source.stat().st_size - 2)
    with pytest.raises(CheckpointError, match="not a complete safetensors file"):
        convert_release(source, *targets)


def test_the_expert_is_written_and_freed_before_the_base(save, release, targets, monkeypatch):
    """Both in memory are more than 2 GB for HunyuanVideo in float32."""
    experts, alive = [], []
    original = convert.read_release

    def watched(*arguments):
        expert = original(*arguments)
        experts.append(weakref.ref(expert))
        return expert

    monkeypatch.setattr(convert, "read_release", watched)
    convert_release(save(release), *targets, progress=lambda *_: alive.append(experts[0]() is not None))
    assert alive and not any(alive)


MEASURE = """
import sys
import torch
from dcm_core.convert import convert_release
from dcm_core.files.tensor_file import TensorFile
def peak():
    # not getrusage: its maximum is inherited from the process that started this one
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
torch.set_num_threads(1)
torch.isfinite(torch.ones(10)).all()
before = peak()
convert_release(*sys.argv[1:])
print(peak() - before)
"""


def big_shapes():
    """A release of 24 double blocks of 10 MB each."""
    shapes = {}
    for key, shape in release_shapes(HUNYUAN_VIDEO).items():
        rank = {".lora_A.": 0, ".lora_B.": 1}.get(next((part for part in (".lora_A.", ".lora_B.") if part in key), ""))
        shapes[key] = tuple(size * 48 if size >= 8 and axis != rank else size for axis, size in enumerate(shape))
    for key in [key for key in shapes if key.startswith("transformer_blocks.0.")]:
        shapes |= {key.replace(".0.", f".{index}.", 1): shapes[key] for index in range(24)}
    return shapes


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")
def test_memory_does_not_grow_with_the_file(tmp_path):
    source = tmp_path / "release.safetensors"
    entries = {key: (torch.bfloat16, shape) for key, shape in big_shapes().items()}
    writing.write_stream(
        source, entries, ((key, torch.ones(shape, dtype=dtype)) for key, (dtype, shape) in entries.items()), {}
    )
    targets = tmp_path / "base.safetensors", tmp_path / "expert.safetensors"
    command = [sys.executable, "-c", MEASURE, *map(str, (source, *targets))]
    grown = int(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout) / 1024
    assert source.stat().st_size > 200 * 2**20
    assert grown < 80, f"{grown:.0f} MiB more for a file of {source.stat().st_size / 2**20:.0f} MiB"
