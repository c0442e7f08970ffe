"""Several processes that train together, against one with the same full batch: each with all tensors, or with a part of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dcm_core.experts.expert import expert_tensor_list

from .small_runs import SMALL, uneven_data

pytestmark = pytest.mark.usefixtures("gradients")

BATCH = 4
SCRIPT = Path(__file__).with_name("train_in_parallel.py")
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node"]
ACCELERATE = ["accelerate.commands.launch", "--multi_gpu", "--num_machines", "1", "--mixed_precision", "no"]
ACCELERATE += ["--dynamo_backend", "no", "--num_processes"]
# name -> side, and how the settings differ from SMALL
TRAINED = {"semantic": ("semantic", {}), "detail": ("detail", {}), "full": ("semantic", {"rank": 0})}


def run(trained, processes, shard=True, about="", folder="", **values):
    """A run for `train_in_parallel.py`, with the same full batch for any number of processes."""
    side, differing = TRAINED[trained]
    name = f"{trained} {about}".strip()
    values = {**SMALL, "steps": 2, "warmup_steps": 0, "batch_size": BATCH // processes, **differing, **values}
    return {"name": name, "folder": folder or f"run {name}", "side": side, "shard": shard, "values": values}


def launched(folder, launcher, processes, runs):
    """Make runs in several processes. Returns name of a run -> (losses, expert, bytes kept, bytes said) of each process."""
    command = [sys.executable, "-m", *launcher, str(processes), str(SCRIPT), str(folder), json.dumps(runs)]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]

    def results(name, rank):
        losses, *sizes = json.loads((folder / f"{name}_{rank}.json").read_text())
        return losses, load_file(folder / f"{name}_{rank}.safetensors"), *sizes

    return {each["name"]: [results(each["name"], rank) for rank in range(processes)] for each in runs}


@pytest.fixture(scope="module")
def alone(train, model, config, module, tmp_path_factory):
    """Name -> losses and expert of one process."""
    data, found = uneven_data(module("dcm_core.distill.data.dataset")), {}
    for name in TRAINED:
        made = run(name, 1)
        result = train(model, data, config(made["side"], **made["values"]), tmp_path_factory.mktemp("alone"))
        found[name] = (result.history, {str(i): value for i, value in enumerate(expert_tensor_list(result.expert))})
    return found


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Two processes that keep a part of everything each, and how such a run is resumed."""
    forgetful = {"gradient_checkpointing": True}
    runs = [
        run("semantic", 2),
        run("detail", 2),
        run("semantic", 2, about="forgetful", sample_every=1, **forgetful),
        run("detail", 2, about="forgetful", **forgetful),
        run("full", 2, about="half", folder="full", steps=1, **forgetful),
        run("full", 2, about="resumed", folder="full", **forgetful),
        run("detail", 2, about="half", folder="detail", steps=1),
        run("detail", 2, about="resumed as complete", folder="detail", shard=False),
    ]
    return launched(tmp_path_factory.mktemp("two"), TORCHRUN, 2, runs)


def check_same(results, alone):
    """Losses and expert of every process are those of one process."""
    losses, expert = alone
    for others, other, *_ in results:
        for entry, theirs in zip(losses, others, strict=True):
            assert theirs == pytest.approx(entry, rel=1e-5)
        assert other.keys() == expert.keys()
        for name, value in expert.items():
            torch.testing.assert_close(other[name], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "name",
    ["semantic", "semantic forgetful", "detail", "detail forgetful", "full resumed", "detail resumed as complete"],
)
def test_two_processes_with_a_part_of_everything_train_as_one(name, two, alone):
    check_same(two[name], alone[name.split()[0]])


def test_four_processes_with_a_part_of_everything_train_as_one(alone, tmp_path):
    runs = [run(name, 4, gradient_checkpointing=True) for name in ("semantic", "detail")]
    for name, results in launched(tmp_path, TORCHRUN, 4, runs).items():
        check_same(results, alone[name])


def test_each_process_keeps_half_as_it_is_said_to(two):
    """Vectors are not divided."""
    assert all(kept == said for name in ("semantic", "full resumed") for *_, kept, said in two[name])
    *_, complete, _ = two["detail resumed as complete"][0]
    *_, part, _ = two["detail"][0]
    assert [size / all_of_it for size, all_of_it in zip(part, complete, strict=True)] == pytest.approx(
        [0.5] * 3, rel=0.01
    )


def test_each_process_with_everything_trains_as_one(alone, tmp_path, train, module, model, config):
    runs = [run(name, 2, shard=False) for name in ("semantic", "detail")]
    for name, results in launched(tmp_path, ACCELERATE, 2, runs).items():
        check_same(results, alone[name])
    made, data = runs[0], uneven_data(module("dcm_core.distill.data.dataset"))
    with pytest.raises(
        module("dcm_core.distill.config").TrainingError, match="with other settings: processes: 2 -> None"
    ):
        train(model, data, config("semantic", **made["values"]), tmp_path / made["folder"])
