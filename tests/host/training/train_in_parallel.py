"""One of several processes of test_parallel_runs: trains an expert, writes its losses to a file.

Arguments: the side, the folder of the run (`{rank}` in it becomes the process's number), the settings and the number of clips of each
process.
"""

import importlib
import json
import os
import sys
import types
from pathlib import Path

ROOT = Path(__file__).parents[3]
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT] + [str(ROOT)]

from cli.launch import find_comfyui, load_pack  # noqa: E402

pack = load_pack(find_comfyui())


def helper(name):
    """A module of tests/host, which as a package lets its modules import each other."""
    package = sys.modules.setdefault("host_tests", types.ModuleType("host_tests"))
    package.__path__ = [str(Path(__file__).parents[1])]
    return importlib.import_module(f"host_tests.{name}")


if __name__ == "__main__":
    side, rank, values, clips = sys.argv[1], int(os.environ["RANK"]), json.loads(sys.argv[3]), json.loads(sys.argv[4])
    folder = Path(sys.argv[2].format(rank=rank))
    sys.path.insert(0, os.environ["COMFYUI_PATH"])
    model = helper("small_models").make_wan(layers=2)
    data = helper("training.small_runs").random_data(pack("dcm_core.distill.data.dataset"), count=clips[rank])
    config = pack("dcm_core.distill.config").TrainingConfig(side, **values)
    result = pack("nodes.host.training.run").train_expert(model, data, config, folder)
    # beside the states; what two processes print may run into each other
    folder.with_name(f"losses_{rank}.json").write_text(json.dumps(result.history))
