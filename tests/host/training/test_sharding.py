"""Several processes that keep a part of base, expert and optimiser each, against one that makes all their batches."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dcm_core.experts.expert import expert_tensor_list

from .small_runs import SMALL, group_of_one, make_trainer, uneven_data

pytestmark = pytest.mark.usefixtures("gradients")

# batches of all processes in a step
TURNS = 4
SCRIPT = Path(__file__).with_name("train_sharded.py")
# name -> side, and how the settings differ from SMALL
TRAINED = {"semantic": ("semantic", {}), "detail": ("detail", {}), "full": ("semantic", {"rank": 0})}


def run(trained, processes, shard=True, about="", folder="", **values):
    """A run for `train_sharded.py`, with as many batches in a step for any number of processes."""
    side, differing = TRAINED[trained]
    name = f"{trained} {about}".strip()
    values = {**SMALL, "steps": 2, "warmup_steps": 0, **differing, **values}
    values["gradient_accumulation_steps"] = TURNS // processes
    return {"name": name, "folder": folder or f"run {name}", "side": side, "shard": shard, "values": values}


def results(folder, name, processes):
    """(losses, expert, bytes kept, bytes said) of each process."""
    for rank in range(processes):
        losses, *sizes = json.loads((folder / f"{name}_{rank}.json").read_text())
        yield losses, load_file(folder / f"{name}_{rank}.safetensors"), *sizes


@pytest.fixture(scope="module")
def model(wan):
    """The model of `train_sharded.py`."""
    return wan(layers=2, width=128)


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
def folder(tmp_path_factory):
    """The results of two and of four processes that keep a part of everything each."""
    folder, forgetful = (
        tmp_path_factory.mktemp("together"),
        {"gradient_checkpointing": True, "offload_activations": True},
    )
    two = [
        run("semantic", 2, about="forgetful", sample_every=1, **forgetful),
        run("detail", 2),
        run("detail", 2, about="half", folder="detail", steps=1, **forgetful),
        run("detail", 2, about="resumed", folder="detail", **forgetful),
        run("full", 2, about="half", folder="full", steps=1, **forgetful),
        run("full", 2, about="resumed complete", folder="full", shard=False, **forgetful),
    ]
    four = [run("semantic", 4, about="of four"), run("detail", 4, about="of four", **forgetful)]
    command = [sys.executable, str(SCRIPT), str(folder), json.dumps([[2, two], [4, four]])]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def check_same(results, alone):
    """Losses and expert of every process are those of one process."""
    losses, expert = alone
    for others, other, *_ in results:
        for entry, theirs in zip(losses, others, strict=True):
            assert theirs == pytest.approx(entry, rel=1e-5)
        assert other.keys() == expert.keys()
        for name, value in expert.items():
            torch.testing.assert_close(other[name], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["semantic forgetful", "detail", "detail resumed", "full resumed complete"])
def test_two_processes_with_a_part_of_everything_train_as_one(name, folder, alone):
    check_same(results(folder, name, 2), alone[name.split()[0]])


@pytest.mark.parametrize("name", ["semantic of four", "detail of four"])
def test_four_processes_with_a_part_of_everything_train_as_one(name, folder, alone):
    check_same(results(folder, name, 4), alone[name.split()[0]])


def test_each_process_keeps_half_as_it_is_said_to(folder):
    for *_, kept, said in [*results(folder, "full half", 2), *results(folder, "full resumed complete", 2)]:
        assert kept == said
    (*_, part, _), (*_, complete, _) = (
        next(results(folder, name, 2)) for name in ("full half", "full resumed complete")
    )
    # vectors are not divided
    shares = [size / all_of_it for size, all_of_it in zip(part, complete, strict=True)]
    assert shares == pytest.approx([0.5] * 3, rel=0.02)


def test_a_divided_run_that_is_stuck_is_saved(wan, module, config, tmp_path, monkeypatch):
    """No step was made, so its moments are zeros that share their memory; NCCL sends only contiguous tensors."""
    sharding, dataset = module("dcm_core.distill.sharding"), module("dcm_core.distill.data.dataset")
    send, contiguous = sharding.dist.all_gather_into_tensor, []

    def sending(out, part):
        contiguous.append(part.is_contiguous())
        return send(out, part)

    monkeypatch.setattr(sharding.dist, "all_gather_into_tensor", sending)
    data = uneven_data(dataset)
    for index in range(len(data)):
        data.latent(index).fill_(float("nan"))
    with group_of_one():
        values = {**SMALL, "steps": 9, "rank": 0}
        trainer = make_trainer(module, wan(layers=1), data, config("semantic", **values), tmp_path, sharded=True)
        with pytest.raises(
            module("dcm_core.distill.config").TrainingError, match="The expert is saved as it was before"
        ):
            trainer.run()
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000005.safetensors"]
    assert contiguous and all(contiguous)
