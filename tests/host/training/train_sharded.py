"""Make lists of runs, each list in several processes that train together, and write what came of each run to files.

    train_sharded.py <folder> <JSON of [[number of processes, [run, ...]], ...]>

A run is {"name", "folder", "side", "shard", "values"}: where its results and its checkpoints go, and what it trains. The processes
are copies of this one, which is quicker than a launcher: they share what was imported.
"""

import json
import os
import socket
import sys
import traceback
from pathlib import Path

from safetensors.torch import save_file
from train_in_parallel import helper, pack


def stored(tensors):
    """Bytes of memory that tensors, or this process's parts of them, take."""
    return sum(getattr(tensor, "_local_tensor", tensor).untyped_storage().nbytes() for tensor in tensors)


def kept_by(trainer):
    """What this process keeps of the base, of experts and EMA, and of the optimiser's moments, in bytes."""
    moments = [value for state in trainer.learner.optimizer.state.values() for value in state.values() if value.ndim]
    experts = [*trainer.student.parameters(), *trainer.ema.parameters()]
    return [stored(trainer.backbone.module.parameters()), stored(experts), stored(moments)]


def main(folder, runs):
    config = pack("dcm_core.distill.config").TrainingConfig
    make_room, told = training.make_room, []

    def listening(trainer, *args):
        told.append((trainer, make_room(trainer, *args)))
        return told[-1][1]

    training.make_room = listening
    data = helper("training.small_runs").uneven_data(pack("dcm_core.distill.data.dataset"))
    for run in runs:
        model = helper("small_models").make_wan(layers=2, width=128)
        settings = config(run["side"], **run["values"])
        result = training.train_expert(model, data, settings, folder / run["folder"], shard=run["shard"])
        trainer, memory = told.pop()
        said = [memory.base, memory.present, memory.moments]
        # a file for each process: what they print may run into each other
        name = f"{run['name']}_{os.environ['RANK']}"
        (folder / f"{name}.json").write_text(json.dumps([result.history, kept_by(trainer), said]))
        tensors = pack("dcm_core.experts.expert").expert_tensor_list(result.expert)
        save_file({str(index): tensor for index, tensor in enumerate(tensors)}, folder / f"{name}.safetensors")


def together(folder, count, runs):
    """Make runs in `count` processes. Fails if one of them does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    children = [os.fork() or work(folder, runs, rank) for rank in range(count)]
    if any(os.waitpid(child, 0)[1] for child in children):
        sys.exit(1)


def work(folder, runs, rank):
    """What a new process does, and nothing else."""
    os.environ["RANK"] = str(rank)
    try:
        main(folder, runs)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


if __name__ == "__main__":
    sys.path.insert(0, os.environ["COMFYUI_PATH"])
    training = pack("nodes.host.training.run")
    for count, runs in json.loads(sys.argv[2]):
        together(Path(sys.argv[1]), count, runs)
