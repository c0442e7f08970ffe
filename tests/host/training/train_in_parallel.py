"""One of several processes of test_training: trains an expert, writes its losses to a file."""

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
    side, folder, values = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    sys.path.insert(0, os.environ["COMFYUI_PATH"])
    model = helper("small_models").make_wan(layers=2)
    data = helper("training.small_runs").random_data(pack("dcm_core.distill.data.dataset"))
    config = pack("dcm_core.distill.config").TrainingConfig(side, **values)
    result = pack("nodes.host.training.run").train_expert(model, data, config, folder)
    # beside the states; what two processes print may run into each other
    folder.with_name(f"losses_{os.environ['RANK']}.json").write_text(json.dumps(result.history))
