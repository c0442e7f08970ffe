"""The command in several processes that share no disk: what they agree on before the first step."""

import csv
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from .small_runs import random_data

ROOT = Path(__file__).parents[3]
TRAINING = {
    "batch_size": 2,
    "rank": 4,
    "alpha": 8.0,
    "gradient_checkpointing": False,
    "warmup_steps": 0,
    "boundary": 0.9,
    "shift": 5.0,
    "save_every": 1,
    "keep": 9,
}


@pytest.fixture(scope="module")
def disk(wan, module, tmp_path_factory):
    """Files that every machine has: a base, and two datasets with some clips in common."""
    folder, dataset = tmp_path_factory.mktemp("disk"), module("dcm_core.distill.data.dataset")
    weights = wan(layers=1).model.diffusion_model.state_dict()
    save_file({name: value.clone() for name, value in weights.items()}, folder / "base.safetensors")
    for name, count in (("data", 4), ("other", 3)):
        module("dcm_core.distill.data.dataset_file").write_dataset(
            folder / f"{name}.safetensors", random_data(dataset, count=count)
        )
    return folder


def settings_in(folder, disk, training, **more):
    """Settings of a run in a folder of its own."""
    files = {"model": str(disk / "base.safetensors"), "dataset": str(disk / "data.safetensors")}
    values = {**files, "output": "expert.safetensors", "checkpoints": "run", **more}
    return {**values, "training": {**TRAINING, **training}}


def start(*nodes, which="semantic"):
    """The command in a process for each (folder, settings): their return codes and what they say.

    No launcher, as it would end one process when another fails.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(len(nodes))}
    running = []
    for rank, (folder, settings) in enumerate(nodes):
        folder.mkdir(exist_ok=True)
        (folder / "run.json").write_text(json.dumps(settings))
        command = [sys.executable, "-m", "dcm_core", "train", which, "--config", str(folder / "run.json")]
        variables = {**os.environ, **address, "RANK": str(rank), "OMP_NUM_THREADS": "1"}
        running.append(
            subprocess.Popen(
                command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        )
    said = [process.communicate(timeout=300)[0] for process in running]
    return [process.returncode for process in running], said


def losses_in(folder):
    with (folder / "run" / "losses.csv").open(newline="") as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


def test_all_resume_what_the_first_has(disk, module, tmp_path):
    """The second machine has an older checkpoint of the same run, which one process began."""
    train, turns = module("nodes.host.training.command").train, {"gradient_accumulation_steps": 2}
    alone, first, second = (tmp_path / name for name in ("alone", "first", "second"))
    train("semantic", settings_in(first, disk, {**turns, "steps": 2}), first)
    (second / "run").mkdir(parents=True)
    shutil.copy(first / "run" / "step_00000001.safetensors", second / "run")
    codes, said = start(*((node, settings_in(node, disk, {"steps": 3})) for node in (first, second)))
    assert codes == [0, 0], "\n".join(said)[-3000:]
    assert "Resumed from step 2 of 3" in said[0]
    assert "Resumed with 2 processes instead of 1: each step has the same clips as before." in said[0]
    train("semantic", settings_in(alone, disk, {**turns, "steps": 3}), alone)
    assert losses_in(first) == pytest.approx(losses_in(alone), rel=1e-4) and len(losses_in(first)) == 3
    assert [path.name for path in (second / "run").iterdir()] == ["step_00000001.safetensors"]
    assert all((node / "expert.safetensors").is_file() for node in (first, second))


def test_both_experts_without_a_shared_disk(disk, tmp_path):
    """The first has begun the detail expert before, so its memory needs no check."""
    nodes = [tmp_path / "first", tmp_path / "second"]
    (nodes[0] / "run" / "detail").mkdir(parents=True)
    training = {"steps": 1, "discriminator_width": 64}
    codes, said = start(*((node, settings_in(node, disk, training, shard=False)) for node in nodes), which="both")
    assert codes == [0, 0], "\n".join(said)[-3000:]
    experts = [(node / "expert_detail.safetensors").read_bytes() for node in nodes]
    assert experts[0] == experts[1] and not (nodes[1] / "run").exists()


def test_what_the_first_has_finished_none_trains_again(disk, module, tmp_path):
    first, second = (tmp_path / name for name in ("first", "second"))
    weights = load_file(disk / "base.safetensors")
    save_file({name: value + 0.01 for name, value in weights.items()}, disk / "low.safetensors")
    training, more = {"steps": 1, "discriminator_width": 64}, {"detail_model": str(disk / "low.safetensors")}
    module("nodes.host.training.command").train("both", settings_in(first, disk, training, **more), first)
    codes, said = start(*((node, settings_in(node, disk, training, **more)) for node in (first, second)), which="both")
    assert codes == [0, 0], "\n".join(said)[-3000:]
    assert all(words.count("expert is already trained: ") == 2 for words in said)


@pytest.mark.parametrize(
    ("more", "message", "own"),
    [
        ({"dataset": "other.safetensors"}, "differs from process 0 on {host} in: data, clips. Give all processes", ""),
        (
            {"model": "none.safetensors"},
            "The run ends here: process 1 of 2 on {host} failed. ",
            "none.safetensors does not exist",
        ),
        # before the clips are read
        (
            {"weight_dtype": "fp8_e4m3fn", "dataset": "none.safetensors"},
            "The run ends here: process 1 of 2 on {host} failed. ",
            "cannot be divided among processes. Load the base in float32, float16 or bfloat16.",
        ),
    ],
)
def test_where_one_cannot_begin_none_does(more, message, own, disk, tmp_path):
    more = {name: str(disk / value) if value.endswith(".safetensors") else value for name, value in more.items()}
    nodes = [tmp_path / "first", tmp_path / "second"]
    codes, said = start(
        (nodes[0], settings_in(nodes[0], disk, {"steps": 1})),
        (nodes[1], settings_in(nodes[1], disk, {"steps": 1}, **more)),
    )
    assert codes == [2, 2], "\n".join(said)[-3000:]
    assert message.format(host=socket.gethostname()) in said[0] and "Traceback" not in said[0]
    assert (own or message.format(host=socket.gethostname())) in said[1] and "Traceback" not in said[1]
