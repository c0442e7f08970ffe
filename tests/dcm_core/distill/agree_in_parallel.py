"""One of several processes of test_parallel: what each of them gets where one fails, or has other values."""

import json
import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[3]))

from dcm_core.distill.checkpoints import in_all_processes
from dcm_core.distill.config import TrainingError
from dcm_core.distill.parallel import Processes, join
from dcm_core.files.writing import write_tensors


def fails_in_second(processes: Processes) -> str:
    with processes.agreed():
        if not processes.first:
            raise ValueError("no such file\nin this folder")
    return "began"


def fails_after_the_agreement(processes: Processes) -> str:
    with processes.agreed() as agree:
        agree()
        if not processes.first:
            raise ValueError("alone")
    return "began"


def succeeds(processes: Processes) -> str:
    with processes.agreed():
        pass
    return "began"


def makes_in_first(processes: Processes) -> list:
    made = processes.from_first(lambda: ["of", processes.rank])
    tensors = {"x": torch.tensor([1.5, 2]), "step": torch.tensor(7), "none": torch.zeros(0, 3).half()}
    sent = processes.tensors_from_first(tensors if processes.first else {"x": torch.zeros(9)})
    same = all(torch.equal(sent[name], tensor) and sent[name].dtype == tensor.dtype for name, tensor in tensors.items())
    return [*made, same and sent.keys() == tensors.keys()]


def fails_to_make(processes: Processes) -> None:
    def make() -> None:
        raise ValueError(f"rank {processes.rank}")

    processes.from_first(make)


def has_a_damaged_checkpoint(processes: Processes) -> list[float]:
    path = Path(sys.argv[1], f"disk_{processes.rank}.safetensors")
    loaded = {"x": torch.tensor([1.5])} if processes.first else {}
    path.write_bytes(bytes(99))
    if processes.first:
        write_tensors(path, loaded, {})
    return in_all_processes(path, loaded, processes)["x"].tolist()


def same_values(processes: Processes) -> str:
    processes.check_same({"data": "a", "settings": "b"})
    return "began"


def other_values(processes: Processes) -> str:
    processes.check_same({"data": "a", "settings": f"b{processes.rank}"})
    return "began"


SCENES = (
    fails_in_second,
    fails_after_the_agreement,
    succeeds,
    makes_in_first,
    fails_to_make,
    has_a_damaged_checkpoint,
    same_values,
    other_values,
)

if __name__ == "__main__":
    processes, found = join(torch.device("cpu")), {}
    for scene in SCENES:
        try:
            found[scene.__name__] = scene(processes)
        except (TrainingError, ValueError) as error:
            found[scene.__name__] = f"{type(error).__name__}: {error}"
    Path(sys.argv[1], f"found_{processes.rank}.json").write_text(json.dumps(found))
