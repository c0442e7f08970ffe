"""The checkpoints of a run."""

import dataclasses
import errno
import json
import math
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dcm_core.distill import checkpoints
from dcm_core.distill.checkpoint_file import FIRST_ORDER, Checkpoint, read_checkpoint
from dcm_core.distill.checkpoints import check_folder, locked, newest_checkpoint, save_checkpoint
from dcm_core.distill.config import FORMER, TrainingConfig, TrainingError
from dcm_core.distill.learner import state_shapes
from dcm_core.errors import CheckpointError, DCMError
from dcm_core.files.tensor_file import TensorFile
from dcm_core.files.unfinished import Unfinished
from dcm_core.files.writing import write_tensors

from ..mangled import mangled, timed

CONFIG = TrainingConfig("semantic")
DETAIL = TrainingConfig("detail", ema_decay=0)
TERMS = st.dictionaries(
    st.sampled_from(("loss", "temporal", "held_out")), st.floats(allow_infinity=False, allow_nan=False)
)


def tensors_of(config, value=1.0, size=2):
    """Everything that a run with a trained tensor called x (and a discriminator's) has."""
    found = {}
    for part in ("expert", "discriminator") if config.adversarial else ("expert",):
        found |= {f"{part}.x": torch.full((size,), value), f"{part}_optimizer.x.step": torch.tensor(3.0)}
        found |= {
            f"{part}_optimizer.x.{moment}": torch.full((size,), value / 2) for moment in ("exp_avg", "exp_avg_sq")
        }
    return found | ({"average.x": torch.full((size,), value / 4)} if config.ema_decay else {})


def saved_at(steps, config=CONFIG, **changed):
    tensors = tensors_of(config, size=1000) | changed
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    return Checkpoint(steps, config, {}, [{"step": step + 1} for step in range(steps)], kept)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(history=st.lists(TERMS, max_size=5))
def test_what_is_saved_comes_back(tmp_path, history):
    saved = Checkpoint(len(history), CONFIG, {"data": "abc"}, history, tensors_of(CONFIG, math.nan))
    back = read_checkpoint(save_checkpoint(tmp_path, saved, keep=1))
    assert (back.steps, back.config, back.identity, back.history) == (saved.steps, CONFIG, saved.identity, history)
    assert back.tensors.keys() == saved.tensors.keys()
    for name, tensor in saved.tensors.items():
        torch.testing.assert_close(back.tensors[name], tensor, rtol=0, atol=0, equal_nan=True)


def test_a_loss_that_is_no_number_stays_none(tmp_path):
    saved = Checkpoint(1, CONFIG, {}, [{"step": 1, "loss": math.nan}], tensors_of(CONFIG))
    (entry,) = read_checkpoint(save_checkpoint(tmp_path, saved, keep=1)).history
    assert entry["step"] == 1 and math.isnan(entry["loss"])


def test_a_long_run_is_read_as_a_short_one(tmp_path):
    """Its header, which a reader limits, has the same size."""
    history = [{"step": step, "loss": 1 / (step + 3), "grad_norm": 0.1} for step in range(200_000)]
    path = save_checkpoint(tmp_path, Checkpoint(len(history), CONFIG, {}, history, tensors_of(CONFIG)), keep=1)
    assert read_checkpoint(path).history == history
    assert sum(map(len, TensorFile(path).metadata.values())) < 2000


@pytest.fixture
def metadata():
    return {"format": "dcm-training", "steps": "2", "config": CONFIG.to_json(), "facts": "{}"}


def test_states_of_version_0_1_0_are_read(tmp_path, metadata):
    history = [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}]
    path = tmp_path / "step_00000002.safetensors"
    write_tensors(path, tensors_of(CONFIG), metadata | {"history": json.dumps(history)})
    back = read_checkpoint(path)
    assert back.history == history and back.tensors.keys() == tensors_of(CONFIG).keys()


def test_checkpoints_with_the_settings_of_earlier_versions_are_read(tmp_path, metadata):
    """Their settings have other names."""
    settings = {name: value for name, value in json.loads(CONFIG.to_json()).items() if name not in FORMER.values()}
    former = {"expert": "semantic", "accumulate": 4, "checkpointing": False}
    path = tmp_path / "step_00000002.safetensors"
    write_tensors(
        path,
        tensors_of(CONFIG),
        metadata | {"config": json.dumps(settings | former), "history": json.dumps([{"step": 1}, {"step": 2}])},
    )
    today = dataclasses.replace(CONFIG, gradient_accumulation_steps=4)
    found = read_checkpoint(path)
    assert found.config == dataclasses.replace(today, gradient_checkpointing=False)
    found.check(today, {}, path)
    with pytest.raises(TrainingError, match="gradient_accumulation_steps: 4 -> 1"):
        found.check(CONFIG, {}, path)


@pytest.mark.parametrize(
    "history", [None, torch.tensor([0xFF, 0x5B], dtype=torch.uint8), torch.tensor([91], dtype=torch.uint8)]
)
def test_a_state_without_a_readable_history_is_damaged(tmp_path, metadata, history):
    path = tmp_path / "step_00000002.safetensors"
    write_tensors(path, tensors_of(CONFIG) | ({} if history is None else {"history": history}), metadata)
    with pytest.raises(CheckpointError, match=r"step_00000002.* is a damaged training checkpoint"):
        read_checkpoint(path)


def test_an_old_state_that_another_program_holds_does_not_end_the_run(tmp_path, monkeypatch, caplog):
    unlink = Path.unlink

    def held(path, missing_ok=False):
        if path.name.startswith("step_"):
            raise PermissionError(13, "in use", str(path))
        unlink(path, missing_ok=missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", held)
        for steps in (1, 2):
            save_checkpoint(tmp_path, saved_at(steps), keep=1)
    assert "step_00000001.safetensors cannot be removed (in use)" in caplog.text
    save_checkpoint(tmp_path, saved_at(3), keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000003.safetensors"]


def test_what_a_killed_writer_has_left_is_removed(tmp_path, caplog):
    """And neither what is being written nor what belongs to others."""
    (tmp_path / ".dcm.step_00000001.safetensors.0123456789abcdef.part").write_bytes(b"half")
    (tmp_path / ".dcm.expert.safetensors.0123456789abcdef.part").write_bytes(b"half")
    alive = Unfinished(tmp_path / "step_00000002.safetensors")
    check_folder(tmp_path, size=1, count=1)
    left = sorted(path.name.split(".")[2] for path in tmp_path.iterdir())
    alive.close()
    assert left == ["expert", "step_00000002"]
    assert "step_00000001.safetensors" in caplog.text and "expert" not in caplog.text


def test_a_run_needs_room_for_the_states_that_are_not_there_yet(tmp_path, monkeypatch):
    check_folder(tmp_path, size=10**6, count=3)
    usage = "dcm_core.files.unfinished.shutil.disk_usage"
    monkeypatch.setattr(usage, lambda folder: SimpleNamespace(free=2_500_000))
    with pytest.raises(CheckpointError, match=r"step_\*\.safetensors needs 3\.0 MB, but .* has 2\.5 MB free"):
        check_folder(tmp_path, size=10**6, count=3)
    (tmp_path / "step_00000001.safetensors").touch()
    check_folder(tmp_path, size=10**6, count=3)


def steps_in(folder):
    return sorted(int(path.stem.removeprefix("step_")) for path in folder.glob("step_*"))


@pytest.mark.parametrize("lowest", [200, 250])
def test_the_newest_state_up_to_the_lowest_loss_is_kept(tmp_path, lowest):
    """A run that diverges goes on from it."""
    for steps in (100, 200, 300, 400, 500):
        save_checkpoint(tmp_path, saved_at(steps), keep=2, best_step=min(steps, lowest))
    assert steps_in(tmp_path) == [200, 400, 500]
    save_checkpoint(tmp_path, saved_at(600), keep=2, best_step=50)
    assert steps_in(tmp_path) == [500, 600]


def test_on_a_full_disk_older_states_make_room_for_a_new_one(tmp_path, monkeypatch):
    states = 2
    for steps in (1, 2):
        size = save_checkpoint(tmp_path, saved_at(steps), keep=3).stat().st_size

    def usage(folder):
        return SimpleNamespace(
            free=int((states + 0.5) * size) - sum(path.stat().st_size for path in tmp_path.iterdir())
        )

    monkeypatch.setattr("dcm_core.files.unfinished.shutil.disk_usage", usage)
    save_checkpoint(tmp_path, saved_at(3), keep=3)
    assert steps_in(tmp_path) == [2, 3]
    states = 1
    with pytest.raises(CheckpointError, match=r"step_00000004.* needs .* free"):
        save_checkpoint(tmp_path, saved_at(4), keep=3)
    assert steps_in(tmp_path) == [3]


def test_a_state_of_a_newer_version_is_told_from_a_damaged_one(tmp_path, metadata):
    config = json.dumps({**json.loads(CONFIG.to_json()), "new_setting": 1})
    path = tmp_path / "step_00000002.safetensors"
    write_tensors(path, tensors_of(CONFIG), metadata | {"config": config, "history": "[]"})
    with pytest.raises(
        CheckpointError, match=r"was written by a newer version\. This version does not know new_setting\."
    ):
        read_checkpoint(path)


DAMAGE = {
    "optimizer": (
        {f"expert_optimizer.x.{kind}": None for kind in ("step", "exp_avg", "exp_avg_sq")},
        "3 tensors missing",
    ),
    "moment": ({"expert_optimizer.x.exp_avg_sq": None}, "1 tensor missing: expert_optimizer.x.exp_avg_sq"),
    "shape": ({"expert_optimizer.x.exp_avg": torch.ones(1)}, "1 tensor of another shape: expert_optimizer.x.exp_avg"),
    "average": ({"average.x": None}, "missing: average.x"),
    "expert": ({"expert.x": None}, "it has no expert"),
    "unknown": ({"expertt.x": torch.ones(1)}, "1 tensor unknown: expertt.x"),
    "numbers": ({"expert.x": torch.ones(1000, dtype=torch.int32)}, "expert.x are not floating-point numbers"),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("weights", [True, False])
def test_an_incomplete_state_is_passed_over_for_the_one_before(tmp_path, caplog, damage, weights):
    changed, message = DAMAGE[damage]
    save_checkpoint(tmp_path, saved_at(1), keep=3)
    save_checkpoint(tmp_path, saved_at(2, **changed), keep=3)
    path, saved = newest_checkpoint(tmp_path, weights=weights)
    assert (path.name, saved.steps) == ("step_00000001.safetensors", 1)
    assert "step_00000002" in caplog.text and message in caplog.text
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(tmp_path / "step_00000002.safetensors", weights=weights)


def test_a_state_with_8bit_moments(tmp_path):
    """Codes are whole numbers. Without the largest value of each block they mean nothing."""
    config = TrainingConfig("semantic", optimizer="adamw8bit", ema_decay=0.0)
    state = state_shapes("adamw8bit", (5000,))
    assert state["absmax1"] == (20,)
    tensors = {"expert.x": torch.ones(5000)} | {
        f"expert_optimizer.x.{name}": torch.zeros(shape, dtype=torch.uint8 if "state" in name else torch.float32)
        for name, shape in state.items()
    }
    path = save_checkpoint(tmp_path, Checkpoint(0, config, {}, [], tensors), keep=1)
    assert read_checkpoint(path).tensors["expert_optimizer.x.state1"].dtype is torch.uint8
    del tensors["expert_optimizer.x.absmax2"]
    path = save_checkpoint(tmp_path, Checkpoint(0, config, {}, [], tensors), keep=1)
    with pytest.raises(CheckpointError, match=r"1 tensor missing: expert_optimizer\.x\.absmax2"):
        read_checkpoint(path)


def test_a_discriminator_without_its_optimizer(tmp_path):
    path = save_checkpoint(tmp_path, saved_at(1, DETAIL), keep=3)
    assert "discriminator_optimizer.x.step" in read_checkpoint(path).tensors
    for missing, message in (
        (("discriminator_optimizer.x.step",), "missing: discriminator_optimizer.x.step"),
        ([name for name in saved_at(1, DETAIL).tensors if name.startswith("disc")], "it has no discriminator"),
    ):
        path = save_checkpoint(tmp_path, saved_at(2, DETAIL, **dict.fromkeys(missing)), keep=3)
        with pytest.raises(CheckpointError, match=message):
            read_checkpoint(path)


def test_a_state_of_other_tensors_than_the_run_has_is_passed_over(tmp_path):
    """A whole layer is missing, with all that belongs to it: the file alone does not show it."""
    for steps in (1, 2):
        path = save_checkpoint(tmp_path, saved_at(steps), keep=3)
    shapes = {name: tuple(tensor.shape) for name, tensor in saved_at(2).tensors.items()}
    more = {name.replace(".x", ".y"): tensor for name, tensor in saved_at(2).tensors.items()}
    save_checkpoint(tmp_path, saved_at(3, **more), keep=3)
    assert newest_checkpoint(tmp_path)[1].steps == 3
    assert newest_checkpoint(tmp_path, shapes)[1].steps == 2
    wide = {name: (2, 2) if shape else () for name, shape in shapes.items()}
    with pytest.raises(CheckpointError, match="of another shape"):
        read_checkpoint(path, wide)
    with pytest.raises(TrainingError, match=r"No checkpoint in .* can be used: 3 files tried \(newest: step_00000003"):
        newest_checkpoint(tmp_path, wide)


def test_a_state_whose_numbers_have_changed_is_passed_over(tmp_path, caplog):
    for steps in (1, 2):
        path = save_checkpoint(tmp_path, saved_at(steps), keep=3)
    content = bytearray(path.read_bytes())
    content[TensorFile(path).offsets["expert_optimizer.x.exp_avg"] + 5] ^= 1
    path.write_bytes(content)
    assert newest_checkpoint(tmp_path)[1].steps == 1
    assert "does not match its checksum" in caplog.text


def test_without_room_for_another_reason_no_state_is_removed(tmp_path, monkeypatch):
    for steps in (1, 2):
        save_checkpoint(tmp_path, saved_at(steps), keep=3)

    def refused(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "replace", refused)
    with pytest.raises(CheckpointError, match=r"step_00000003.* cannot be written \(Permission denied\)"):
        save_checkpoint(tmp_path, saved_at(3), keep=3)
    assert steps_in(tmp_path) == [1, 2]


@pytest.mark.parametrize(
    "history",
    [[], [{"step": 1}], [{"step": 1}, {"step": "2"}], [{"step": 1}, 2], {"step": 1}, [{"step": 1}, {"step": None}]],
)
def test_a_history_that_is_none(tmp_path, metadata, history):
    path = tmp_path / "step_00000002.safetensors"
    write_tensors(path, tensors_of(CONFIG), metadata | {"history": json.dumps(history)})
    with pytest.raises(CheckpointError, match=r"damaged training checkpoint \(its history (has|does not have)"):
        read_checkpoint(path)


@given(data=st.data())
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_mangled_states_are_read_or_refused(tmp_path, metadata, data):
    path = tmp_path / "step_00000002.safetensors"
    tensors = tensors_of(CONFIG) | {
        "history": torch.frombuffer(bytearray(b'[{"step": 1}, {"step": 2}]'), dtype=torch.uint8)
    }
    mangled(path, tensors, metadata, data)
    with timed():
        try:
            saved = read_checkpoint(path)
        except DCMError as error:
            assert str(path) in str(error)
        else:
            assert len(saved.history) == saved.steps and "expert_optimizer.x.exp_avg" in saved.tensors


# What a resumed run may have changed


def resumed(before, now, config=CONFIG, other=CONFIG, steps=5):
    """What a run says that resumes with other data or settings."""
    saved = dataclasses.replace(saved_at(steps, config), identity=before)
    saved.check(other, now, Path("run") / "step.safetensors")
    return saved.in_words(other, now)


DATA = {"data": "one", "clips": "a b c", "model": "m"}
LONGER = dataclasses.replace(CONFIG, learning_rate=1e-4)


def test_clips_may_be_added_and_removed():
    assert resumed(DATA, DATA) == "Resumed from step 5 of 1000."
    words = resumed(DATA, {**DATA, "data": "two", "clips": "a c d e e"})
    assert words == (
        "Resumed from step 5 of 1000. Resumed with other data (3 clips added, 1 clip removed): weights and optimizer are kept, "
        "but the clips come in another order."
    )
    assert "(clips in another order)" in resumed(DATA, {**DATA, "data": "two", "clips": "c b a"})
    held_out = dataclasses.replace(CONFIG, held_out=1)
    assert "held-out loss cannot be compared" in resumed(
        DATA, {**DATA, "data": "two", "clips": "a"}, held_out, held_out
    )


@pytest.mark.parametrize(
    ("before", "now"),
    [
        (DATA, {**DATA, "data": "two", "clips": "d e"}),
        ({"data": "one", "model": "m"}, {**DATA, "data": "two"}),
    ],
)
def test_data_without_a_clip_in_common_are_those_of_another_run(before, now):
    """Also where a checkpoint of version 0.1.0 does not say which clips there were."""
    with pytest.raises(TrainingError, match="with other settings: data: one -> two"):
        resumed(before, now)
    with pytest.raises(TrainingError, match="with other settings: model: m -> n"):
        resumed(DATA, {**DATA, "model": "n"})


def test_another_number_of_processes():
    two, four = ({**DATA, "processes": count} for count in ("2", "4"))
    halved = dataclasses.replace(CONFIG, gradient_accumulation_steps=2)
    assert "Resumed with 2 processes instead of 1: each step has the same clips as before." in resumed(
        DATA, two, halved
    )
    assert "Resumed with 1 process instead of 4: weights" in (words := resumed(four, DATA))
    assert "a step has 1 clip instead of 4. Set gradient_accumulation_steps to keep their number" in words
    # in proportion, or not at all
    for before, now in ((DATA, DATA), (two, four)):
        with pytest.raises(TrainingError, match="with other settings: gradient_accumulation_steps: 1 -> 2"):
            resumed(before, now, CONFIG, halved)


def test_a_number_of_processes_that_is_none_is_damage(tmp_path):
    saved = dataclasses.replace(saved_at(1), identity={"processes": "two"})
    with pytest.raises(CheckpointError, match="its number of processes is not a number"):
        read_checkpoint(save_checkpoint(tmp_path, saved, keep=1))


def test_a_run_of_an_earlier_version_with_larger_batches_says_that_the_order_is_another(tmp_path, metadata):
    path = tmp_path / "step_00000002.safetensors"
    write_tensors(path, tensors_of(CONFIG), metadata | {"history": '[{"step": 1}, {"step": 2}]'})
    old = read_checkpoint(path)
    new = read_checkpoint(save_checkpoint(tmp_path, saved_at(3), keep=3))
    assert old.order == FIRST_ORDER != new.order
    batches = dataclasses.replace(CONFIG, batch_size=2)
    for saved, config, identity, told in (
        (old, CONFIG, {}, False),
        (old, batches, {}, True),
        (old, CONFIG, {"processes": "2"}, True),
        (new, batches, {}, False),
    ):
        changed = dataclasses.replace(saved, config=config, identity=identity)
        assert ("An earlier version began the run" in changed.in_words(config, identity)) == told


def test_a_rate_that_rises_after_a_cosine_schedule_is_told():
    cosine = dataclasses.replace(CONFIG, steps=100, learning_rate=1e-4, scheduler="cosine", warmup_steps=0)
    longer = dataclasses.replace(cosine, steps=200)
    words = resumed(DATA, DATA, cosine, longer, steps=100)
    # half of the cosine before and after: 1e-4 (1 + cos(0.99 pi)) / 2, then 1e-4 (1 + cos(pi / 2)) / 2
    assert (
        "The learning rate goes back up from 2.47e-08 to 5e-05, as the cosine schedule now has 200 steps instead of 100."
        in words
    )
    low = dataclasses.replace(longer, learning_rate=1e-8)
    for config, other, steps in (
        (cosine, cosine, 50),
        (cosine, low, 100),
        (LONGER, dataclasses.replace(LONGER, steps=2000), 999),
    ):
        assert "goes back up" not in resumed(DATA, DATA, config, other, steps)


# One run in a folder


def hold(folder):
    """Another process that has locked the folder, until its input ends."""
    code = (
        "import sys; from pathlib import Path; from dcm_core.distill.checkpoints import locked\n"
        "with locked(Path(sys.argv[1])): print('locked', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(folder)],
        cwd=Path(__file__).parents[3],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "locked\n"
    return process


def test_a_second_run_in_a_folder_says_who_has_it(tmp_path):
    folder = tmp_path / "run"
    holder = hold(folder)
    for _ in range(2):
        with (
            pytest.raises(
                TrainingError,
                match=rf"run is in use by another run: process {holder.pid} on {re.escape(socket.gethostname())}, since 20\d\d-",
            ),
            locked(folder),
        ):
            pass
    # as the system ends it: nothing of the lock stays
    holder.kill()
    holder.communicate()
    with locked(folder), pytest.raises(TrainingError, match=f"process {os.getpid()} on "), locked(folder):
        pass
    assert not list(folder.iterdir())


def test_a_lock_that_its_owner_removes_while_another_waits_is_made_again(tmp_path, monkeypatch):
    lock, calls = checkpoints._lock, []

    def late(file):
        lock(file)
        calls.append(file)
        if len(calls) == 1:
            (tmp_path / checkpoints.LOCK).unlink()

    monkeypatch.setattr(checkpoints, "_lock", late)
    with locked(tmp_path):
        assert len(calls) == 2 and (tmp_path / checkpoints.LOCK).exists()


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch, caplog):
    def none(file):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(checkpoints, "_lock", none)
    with locked(tmp_path):
        pass
    assert "has no file locks (No locks available). Do not start two runs in it." in caplog.text


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(CheckpointError, match=r"file cannot be written to .* Choose another place"),
        locked(tmp_path / "file"),
    ):
        pass
