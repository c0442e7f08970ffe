"""The losses of a run in files, as spreadsheets and TensorBoard read them."""

import csv
import math
import sys
from types import SimpleNamespace

import pytest

from dcm_core.distill import run_log
from dcm_core.distill.config import TrainingConfig
from dcm_core.distill.run_log import RunLog

CONFIG = TrainingConfig("semantic", steps=8, learning_rate=1e-3, warmup_steps=3)


def entry(step, loss=0.5, **more):
    return {"step": step, "loss": loss, "grad_norm": 1.0, **more}


def rows_of(folder):
    with (folder / "losses.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def clock(monkeypatch):
    """Two seconds a step."""
    times = iter(range(0, 1000, 2))
    monkeypatch.setattr(run_log.time, "monotonic", lambda: next(times))


@pytest.mark.usefixtures("clock")
def test_every_step_is_a_row(tmp_path):
    log, history = RunLog(tmp_path, CONFIG), []
    for step in range(1, 5):
        history.append(entry(step, math.nan if step == 3 else 1 / step))
        log.step(history)
    found = rows_of(tmp_path)
    assert list(found[0])[:6] == ["step", "learning_rate", "steps_per_second", "skipped", "loss", "grad_norm"]
    assert [row["step"] for row in found] == ["1", "2", "3", "4"]
    assert [float(row["learning_rate"]) for row in found] == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3])
    assert [row["steps_per_second"] for row in found] == ["", "0.5", "0.5", "0.5"]
    assert [row["skipped"] for row in found] == ["0", "0", "1", "0"] and math.isnan(float(found[2]["loss"]))
    assert (log.speed, log.rate, log.seconds_left(3)) == (0.5, 1e-3, 6.0)


def test_before_the_second_step_no_speed_is_known(tmp_path):
    log = RunLog(tmp_path, CONFIG)
    log.step([entry(1)])
    assert log.speed == log.seconds_left(5) == 0


@pytest.mark.usefixtures("clock")
def test_a_resumed_run_goes_on_with_the_table_and_writes_no_step_twice(tmp_path):
    """The run was killed at step 4, two steps after its checkpoint. The held-out loss of step 2 was measured late."""
    first, history = RunLog(tmp_path, CONFIG), []
    for step in range(1, 5):
        history.append(entry(step, loss=step))
        first.step(history)
    again = RunLog(tmp_path, TrainingConfig("semantic", steps=8, learning_rate=1e-2, warmup_steps=0))
    history = [entry(1, loss=1), entry(2, loss=2, held_out=9.0)]
    for step in (3, 4, 5):
        history.append(entry(step, loss=10 * step))
        again.step(history)
    found = rows_of(tmp_path)
    assert [row["step"] for row in found] == ["1", "2", "3", "4", "5"]
    assert [float(row["loss"]) for row in found] == [1, 2, 30, 40, 50]
    assert [row["held_out"] for row in found] == ["", "9.0", "", "", ""]
    assert [float(row["learning_rate"]) for row in found] == pytest.approx([0.25e-3, 0.5e-3, 1e-2, 1e-2, 1e-2])


def test_a_loss_that_comes_later_gets_a_column(tmp_path):
    log, history = RunLog(tmp_path, CONFIG), []
    for step in (1, 2, 3):
        history.append(entry(step, **({"held_out": 0.25} if step == 2 else {})))
        log.step(history)
    assert [row["held_out"] for row in rows_of(tmp_path)] == ["", "0.25", ""]


@pytest.mark.parametrize("content", [b"", b"step,loss\n1", b"step,loss\none,2\n1,2,3\n", b"\xff\x00", b"a,b\n1,2\n"])
def test_a_table_that_cannot_be_read_is_written_again(tmp_path, content):
    (tmp_path / "losses.csv").write_bytes(content)
    RunLog(tmp_path, CONFIG).step([entry(1, loss=3), entry(2)])
    assert [(row["step"], float(row["loss"])) for row in rows_of(tmp_path)] == [("1", 3), ("2", 0.5)]


def test_a_table_that_cannot_be_written_does_not_end_the_run(tmp_path, caplog):
    """Another program may have it open."""
    log, history = RunLog(tmp_path / "later", CONFIG), [entry(1)]
    log.step(history)
    assert "losses.csv cannot be written" in caplog.text
    (tmp_path / "later").mkdir(exist_ok=True)
    log.step([*history, entry(2)])
    assert [row["step"] for row in rows_of(tmp_path / "later")] == ["1", "2"]


def test_tensorboard_has_every_loss_once(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for steps in ((1, 2, 3), (2, 3, 4)):
        log = RunLog(tmp_path, CONFIG)
        for step in steps:
            log.step([entry(past, loss=steps[0]) for past in range(1, step + 1)])
        log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert {"loss", "grad_norm", "learning_rate"} <= set(events.Tags()["scalars"])
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 1), (2, 2), (3, 2), (4, 2)]


def test_a_tensorboard_that_does_not_work_does_not_end_the_run(tmp_path, monkeypatch, caplog):
    def broken(*_, **__):
        raise TypeError("descriptors cannot be created")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=broken))
    log = RunLog(tmp_path, CONFIG)
    for step in (1, 2):
        log.step([entry(past) for past in range(1, step + 1)])
    log.close()
    assert len(rows_of(tmp_path)) == 2
    assert caplog.messages == [
        "TensorBoard's events cannot be written (descriptors cannot be created). The losses are in losses.csv alone."
    ]


def test_without_tensorboard_there_is_the_table_alone(tmp_path, monkeypatch):
    # the import fails as where the package is missing
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    log = RunLog(tmp_path, CONFIG)
    log.step([entry(1)])
    log.close()
    assert [path.name for path in tmp_path.iterdir()] == ["losses.csv"]
