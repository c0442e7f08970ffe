"""The state of a run in a file."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dcm_core.distill.config import TrainingConfig
from dcm_core.distill.state import SavedState, check_folder, read_state, save_state
from dcm_core.errors import CheckpointError
from dcm_core.storage import TensorFile, temporary_file, write_tensors

CONFIG = TrainingConfig("semantic")
TERMS = st.dictionaries(st.sampled_from(("loss", "temporal", "held_out")), st.floats(allow_infinity=False, allow_nan=False))


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(history=st.lists(TERMS, max_size=5))
def test_what_is_saved_comes_back(tmp_path, history):
    saved = SavedState(len(history), CONFIG, {"data": "abc"}, history, {"expert.x": torch.tensor([1.0, math.nan])})
    back = read_state(save_state(tmp_path, saved, keep=1))
    assert (back.steps, back.config, back.facts, back.history) == (saved.steps, CONFIG, saved.facts, history)
    assert list(back.tensors) == ["expert.x"]
    torch.testing.assert_close(back.tensors["expert.x"], saved.tensors["expert.x"], rtol=0, atol=0, equal_nan=True)


def test_a_loss_that_is_no_number_stays_none(tmp_path):
    saved = SavedState(1, CONFIG, {}, [{"step": 1, "loss": math.nan}], {})
    (entry,) = read_state(save_state(tmp_path, saved, keep=1)).history
    assert entry["step"] == 1 and math.isnan(entry["loss"])


def test_a_long_run_is_read_as_a_short_one(tmp_path):
    """Its header, which a reader limits, has the same size."""
    history = [{"step": step, "loss": 1 / (step + 3), "grad_norm": 0.1} for step in range(200_000)]
    path = save_state(tmp_path, SavedState(len(history), CONFIG, {}, history, {}), keep=1)
    assert read_state(path).history == history
    assert sum(map(len, TensorFile(path).metadata.values())) < 2000


@pytest.fixture
def metadata():
    return {"format": "dcm-training", "steps": "2", "config": CONFIG.to_json(), "facts": "{}"}


def test_states_of_version_0_1_0_are_read(tmp_path, metadata):
    history = [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}]
    path = tmp_path / "step_00000002.safetensors"
    write_tensors(path, {"x": torch.ones(2)}, metadata | {"history": json.dumps(history)})
    back = read_state(path)
    assert back.history == history and list(back.tensors) == ["x"]


@pytest.mark.parametrize("history", [None, torch.tensor([0xFF, 0x5B], dtype=torch.uint8), torch.tensor([91], dtype=torch.uint8)])
def test_a_state_without_a_readable_history_is_damaged(tmp_path, metadata, history):
    path = tmp_path / "step_00000002.safetensors"
    write_tensors(path, {"x": torch.ones(2)} | ({} if history is None else {"history": history}), metadata)
    with pytest.raises(CheckpointError, match=r"step_00000002.* is a damaged training state"):
        read_state(path)


def test_an_old_state_that_another_program_holds_does_not_end_the_run(tmp_path, monkeypatch, caplog):
    unlink = Path.unlink

    def held(path, missing_ok=False):
        if path.name.startswith("step_"):
            raise PermissionError(13, "in use", str(path))
        unlink(path, missing_ok=missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", held)
        for steps in (1, 2):
            save_state(tmp_path, SavedState(steps, CONFIG, {}, [{"step": 1}] * steps, {}), keep=1)
    assert "step_00000001.safetensors cannot be removed (in use)" in caplog.text
    save_state(tmp_path, SavedState(3, CONFIG, {}, [], {}), keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000003.safetensors"]


def test_what_a_killed_writer_has_left_is_removed(tmp_path):
    """And nothing else's."""
    with temporary_file(tmp_path / "step_00000001.safetensors") as left, temporary_file(tmp_path / "expert.safetensors") as other:
        left.write_bytes(b"half")
        check_folder(tmp_path, size=1, count=1)
        assert not left.exists() and other.exists()
        left.touch()


def steps_in(folder):
    return sorted(int(path.stem.removeprefix("step_")) for path in folder.glob("step_*"))


def saved_at(steps):
    return SavedState(steps, CONFIG, {}, [], {"x": torch.zeros(1000)})


def test_the_newest_state_before_the_lowest_loss_is_kept(tmp_path):
    """A run that diverges goes on from it."""
    for steps in (100, 200, 300, 400, 500):
        save_state(tmp_path, saved_at(steps), keep=2, lowest=min(steps, 250))
    assert steps_in(tmp_path) == [200, 400, 500]
    save_state(tmp_path, saved_at(600), keep=2, lowest=50)
    assert steps_in(tmp_path) == [500, 600]


def test_on_a_full_disk_older_states_make_room_for_a_new_one(tmp_path, monkeypatch):
    states = 2
    for steps in (1, 2):
        size = save_state(tmp_path, saved_at(steps), keep=3).stat().st_size

    def usage(folder):
        return SimpleNamespace(free=int((states + 0.5) * size) - sum(path.stat().st_size for path in tmp_path.iterdir()))

    monkeypatch.setattr("dcm_core.storage.shutil.disk_usage", usage)
    save_state(tmp_path, saved_at(3), keep=3)
    assert steps_in(tmp_path) == [2, 3]
    states = 1
    with pytest.raises(CheckpointError, match=r"step_00000004.* needs .* free"):
        save_state(tmp_path, saved_at(4), keep=3)
    assert steps_in(tmp_path) == [3]


def test_a_state_of_a_newer_version_is_told_from_a_damaged_one(tmp_path, metadata):
    config = json.dumps({**json.loads(CONFIG.to_json()), "new_setting": 1})
    path = tmp_path / "step_00000002.safetensors"
    write_tensors(path, {"x": torch.ones(2)}, metadata | {"config": config, "history": "[]"})
    with pytest.raises(CheckpointError, match=r"is of a newer version: new_setting is no setting here"):
        read_state(path)
