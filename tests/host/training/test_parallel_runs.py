"""Several CPU processes, on one machine or on two without a shared disk, against one process."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from .small_runs import SMALL

SCRIPT = str(Path(__file__).with_name("train_in_parallel.py"))
TERMS = {"semantic": {"huber", "temporal"}, "detail": {"huber", "gan", "feature_matching", "discriminator"}}
LAUNCHERS = {
    "torch.distributed.run": ["--standalone", "--nproc-per-node", "2"],
    "accelerate.commands.launch": [
        "--multi_gpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
    ],
}


def losses_of(folder, rank):
    return json.loads((folder / f"losses_{rank}.json").read_text())


def assert_equal_losses(side, found, wanted):
    assert [entry["step"] for entry in found] == [entry["step"] for entry in wanted]
    for name in TERMS[side] | {"loss"}:
        assert [entry[name] for entry in found] == pytest.approx([entry[name] for entry in wanted], rel=1e-4), name


@pytest.mark.parametrize(
    ("side", "launcher"), [("detail", "torch.distributed.run"), ("semantic", "accelerate.commands.launch")]
)
def test_two_processes_train_as_one(side, launcher, train, model, data, config, tmp_path):
    """As one that accumulates two batches. The run goes on with one process, then with another number of clips a step."""
    turns = {"gradient_accumulation_steps": 2}
    alone = train(model, data, config(side, steps=4, **turns), tmp_path / "alone")
    command = [sys.executable, "-m", launcher, *LAUNCHERS[launcher], SCRIPT, side]
    result = subprocess.run(
        [*command, str(tmp_path / "together"), json.dumps(SMALL), "[4, 4]"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert losses_of(tmp_path, 0) == losses_of(tmp_path, 1)
    assert_equal_losses(side, losses_of(tmp_path, 0), alone.history[:3])
    again = train(model, data, config(side, steps=4, **turns), tmp_path / "together")
    assert "Resumed with 1 process instead of 2: each step has the same clips as before." in again.resumed
    assert_equal_losses(side, again.history, alone.history)


def start(side, folder, settings, clips):
    """Two processes without a launcher, which would end one when the other fails: their return codes and what they say."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    command = [sys.executable, SCRIPT, side, folder, json.dumps(settings), json.dumps(clips)]
    running = [
        subprocess.Popen(
            command,
            env={**os.environ, **address, "RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=300)[1] for process in running]
    return [process.returncode for process in running], said


def test_without_a_shared_disk_all_resume_what_the_first_has(train, model, data, config, tmp_path):
    """The second machine has an older checkpoint of the same run."""
    turns = {"gradient_accumulation_steps": 2}
    settings = {"steps": 2, "save_every": 1, "keep": 9}
    train(model, data, config("semantic", **turns, **settings), tmp_path / "node0")
    (tmp_path / "node1").mkdir()
    shutil.copy(tmp_path / "node0" / "step_00000001.safetensors", tmp_path / "node1")
    codes, said = start("semantic", str(tmp_path / "node{rank}"), {**SMALL, "steps": 3}, [4, 4])
    assert codes == [0, 0], "\n".join(said)[-3000:]
    assert "Resumed from step 2 of 3" in said[0] and "Resumed with 2 processes instead of 1" in said[0]
    alone = train(model, data, config("semantic", steps=3, **turns), tmp_path / "alone")
    assert losses_of(tmp_path, 0) == losses_of(tmp_path, 1)
    assert_equal_losses("semantic", losses_of(tmp_path, 0), alone.history)
    assert [path.name for path in (tmp_path / "node1").iterdir()] == ["step_00000001.safetensors"]


def test_processes_with_other_clips_are_refused_before_the_first_step(tmp_path):
    codes, said = start("semantic", str(tmp_path / "node{rank}"), SMALL, [4, 3])
    assert codes == [1, 1]
    for words in said:
        assert "differs from process 0" in words and "in: data, clips. Give all processes the same settings" in words
