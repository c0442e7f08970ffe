"""Several processes: who does what when, and what all get where one fails."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from dcm_core.distill import parallel
from dcm_core.distill.parallel import Processes


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What two processes have got: scene of `agree_in_parallel` -> [of the first, of the second]."""
    folder = tmp_path_factory.mktemp("found")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    command = [sys.executable, str(Path(__file__).with_name("agree_in_parallel.py")), str(folder)]
    running = [
        subprocess.Popen(command, env={**os.environ, **address, "RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=120)[1] for process in running]
    assert [process.returncode for process in running] == [0, 0], "\n".join(errors)[-3000:]
    first, second = (json.loads((folder / f"found_{rank}.json").read_text()) for rank in range(2))
    return {scene: [first[scene], second[scene]] for scene in first}


def of_another(rank, words):
    host = socket.gethostname()
    return f"TrainingError: The run ends here: process {rank} of 2 on {host} failed. {words}"


def test_where_one_fails_all_end_and_say_why(found):
    own = "ValueError: no such file\nin this folder"
    assert found["fails_in_second"] == [of_another(1, "no such file\\nin this folder"), own]
    # after the agreement, and where nothing fails
    assert found["fails_after_the_agreement"] == ["began", "ValueError: alone"]
    assert found["succeeds"] == ["began", "began"]


def test_what_the_first_has_is_sent_to_all(found):
    assert found["makes_in_first"] == [["of", 0, True]] * 2
    assert found["fails_to_make"] == ["ValueError: rank 0", of_another(0, "rank 0")]


def test_a_checkpoint_that_is_damaged_on_one_disk_is_sent(found):
    assert found["has_a_damaged_checkpoint"] == [[1.5]] * 2


def test_processes_that_would_train_different_things_are_refused(found):
    host = socket.gethostname()
    assert found["same_values"] == ["began", "began"]
    message = (
        f"TrainingError: Process 1 on {host} differs from process 0 on {host} in: settings. Give all processes the same settings, "
        "clips and model files."
    )
    assert found["other_values"] == [message, message]


def test_one_process_waits_for_nobody():
    alone = Processes()
    with alone.agreed() as agree:
        alone.wait()
        agree()
    assert alone.from_first(lambda: 5) == 5 and alone.gather("a") == ["a"]
    alone.check_same({"data": "a"})
    with pytest.raises(ValueError, match="of its own"), alone.agreed():
        raise ValueError("of its own")


def test_a_tensor_without_a_gradient_gets_the_others_mean(monkeypatch):
    parameters = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))]
    parameters[0].grad = torch.full((2,), 4.0)
    # the other process has 2 everywhere
    monkeypatch.setattr(parallel.dist, "all_reduce", lambda flat: flat.add_(2))
    Processes(0, 2).average_gradients(parameters)
    assert parameters[0].grad.tolist() == [3, 3] and parameters[1].grad.tolist() == [1, 1, 1]
