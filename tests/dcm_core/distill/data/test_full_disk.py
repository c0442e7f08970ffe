"""Every writer on a disk that fills up while it writes: our error under the final name, with the room needed and free, nothing left."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from dcm_core.convert import convert_release
from dcm_core.distill.checkpoint_file import Checkpoint
from dcm_core.distill.checkpoints import save_checkpoint
from dcm_core.distill.config import TrainingConfig
from dcm_core.distill.data.clips import ClipSettings
from dcm_core.distill.data.dataset import TensorDataset
from dcm_core.distill.data.dataset_file import write_dataset
from dcm_core.distill.data.encode import Encoders, prepare
from dcm_core.errors import NoRoomError
from dcm_core.experts.expert import Expert, LowRank, write_expert
from dcm_core.extract import extract_lora
from dcm_core.files import unfinished
from dcm_core.files.conditioning import save_conditioning
from dcm_core.files.unfinished import write_bytes

from ...files.test_tensor_file import left_in

ROOT = Path(__file__).parents[4]
SMALL = ClipSettings(frames=5, fps=16, width=64, height=48)
TEXT = [[torch.ones(1, 50, 200), {}]]


def convert(folder, release, _):
    convert_release(release, folder / "base.safetensors", folder / "expert.safetensors")


def extract(folder, release, base):
    extract_lora(release, base, folder / "lora.safetensors", rank=4)


def expert(folder, *_):
    pair = LowRank(torch.ones(4, 4000), torch.ones(4000, 4), 1.0)
    write_expert(
        folder / "expert.safetensors", Expert("wan", "detail", {"blocks.0": (pair,)}), {"blocks.0.weight": (4000, 4000)}
    )


def conditioning(folder, *_):
    save_conditioning(folder / "text.safetensors", TEXT)


def dataset(folder, *_):
    write_dataset(folder / "data.safetensors", TensorDataset([torch.ones(16, 5, 20, 20)] * 4, [TEXT], [0] * 4, TEXT))


def cached_video(folder, release, _):
    encoders = Encoders(
        lambda pixels: torch.ones(16, 2, 40, 40), lambda text: [[torch.ones(1, 1, 1), {}]], "vae", "t5", lambda: None
    )
    prepare(release.parent / "clips", SMALL, encoders, folder)


def cached_text(folder, release, _):
    encoders = Encoders(lambda pixels: torch.ones(1, 1, 1, 1), lambda text: TEXT, "vae", "t5", lambda: None)
    prepare(release.parent / "clips", SMALL, encoders, folder)


def state(folder, *_):
    save_checkpoint(folder, saved(1), keep=1)


def picture(folder, *_):
    write_bytes(folder / "loss.png", bytes(100_000))


def saved(steps):
    tensors = {f"{name}.x": torch.ones(2000) for name in ("expert", "average")}
    tensors |= {f"expert_optimizer.x.{moment}": torch.ones(2000) for moment in ("exp_avg", "exp_avg_sq")}
    tensors["expert_optimizer.x.step"] = torch.tensor(1.0)
    return Checkpoint(steps, TrainingConfig("semantic"), {}, [{"step": step + 1} for step in range(steps)], tensors)


WRITERS = {
    "convert": (convert, r"(base|expert)\.safetensors"),
    "extract": (extract, r"lora\.safetensors"),
    "expert": (expert, r"expert\.safetensors"),
    "conditioning": (conditioning, r"text\.safetensors"),
    "dataset": (dataset, r"data\.safetensors"),
    "cached video": (cached_video, r"[0-9a-f]{64}\.safetensors"),
    "cached text": (cached_text, r"[0-9a-f]{64}\.safetensors"),
    "state": (state, r"step_00000001\.safetensors"),
    "picture": (picture, r"loss\.png"),
}


def limit(room):
    """Let no file of this process grow over so many bytes, as on a disk with as much room; Python gets an error instead of a signal."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def inputs(save, release, base, clip, tmp_path):
    """A release, a base of other values, and a folder of clips beside it."""
    (tmp_path / "clips").mkdir()
    clip("clips/a.mkv", "a cat")
    return save(release), save({key: 2 * tensor for key, tensor in base.items()}, "other.safetensors")


@pytest.mark.skipif(os.name != "posix", reason="needs a limit on the size of files")
@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("share", [0, 0.1, 0.9])
def test_every_writer_says_what_it_needs_and_leaves_nothing(tmp_path, inputs, name, share):
    writer, file = WRITERS[name]
    before, folder = tmp_path / "before", tmp_path / "out"
    before.mkdir()
    folder.mkdir()
    writer(before, *inputs)
    unlimited = limit(int(share * max(path.stat().st_size for path in before.iterdir())))
    try:
        with pytest.raises(NoRoomError) as caught:
            writer(folder, *inputs)
    finally:
        unlimited()
    message = rf"{re.escape(str(folder))}/{file} cannot be written \(.+\): it needs [\d,.]+ MB, but .* has [\d,.]+ MB free\. Make room"
    assert re.match(message, str(caught.value)), caught.value
    assert not [left for left in left_in(folder) if left.startswith(".dcm") or left in str(caught.value)]
    writer(folder, *inputs)
    assert left_in(folder) == left_in(before)


SMALL_DISK = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from tests.dcm_core.distill.data.test_full_disk import fill_disk
fill_disk(Path(sys.argv[1]))
"""


def fill_disk(folder):
    """Two states fit; a third where the first makes room; a text does not, nor a fourth state where only the newest could make room."""
    with patch.object(unfinished, "_free", return_value=10**9):  # so that it is the disk that says no, in mid write
        for steps in (1, 2, 3):
            save_checkpoint(folder, saved(steps), keep=5)
            print(left_in(folder))
    for write in (conditioning, lambda folder: save_checkpoint(folder, saved(4), keep=5)):
        try:
            write(folder)
        except NoRoomError as error:
            print(error)
        another = folder / "step_00000002.safetensors"
        if another.exists():
            another.rename(folder / "another")
    print(left_in(folder))


def on_small_disk(folder, command):
    """What a command prints where `folder` is a disk of 100 kB, in a mount namespace of its own; None where that is not allowed."""
    if not shutil.which("unshare"):
        return None
    mounted = [
        "unshare",
        "-rm",
        "sh",
        "-c",
        'mount -t tmpfs -o size=100k tmpfs "$0" && echo mounted && exec "$@"',
        folder,
    ]
    result = subprocess.run([*mounted, *command], cwd=ROOT, capture_output=True, text=True)
    if not result.stdout.startswith("mounted\n"):
        return None
    assert result.returncode == 0, result.stderr
    return result.stdout.removeprefix("mounted\n")


def test_a_real_disk_that_is_full(tmp_path):
    output = on_small_disk(tmp_path, [sys.executable, "-c", SMALL_DISK, tmp_path, ROOT])
    if output is None:
        pytest.skip("no disk may be mounted here")
    one, two, three, text, fourth, left = output.splitlines()
    assert one == "['step_00000001.safetensors']"
    assert two == "['step_00000001.safetensors', 'step_00000002.safetensors']"
    assert three == "['step_00000002.safetensors', 'step_00000003.safetensors']"
    for line, name in ((text, r"text"), (fourth, "step_00000004")):
        assert re.search(rf"{name}\.safetensors .*needs 0\.0 MB, but .* has 0\.0 MB free", line), line
    assert left == "['another', 'step_00000003.safetensors']"
