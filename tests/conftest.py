"""Set-up of all tests."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from safetensors.torch import save_file

ROOT = Path(__file__).parents[1]

# At the end: ComfyUI's own `nodes` module must win over the pack's `nodes` package.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT] + [str(ROOT), str(ROOT / "scripts")]

settings.register_profile("project", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("project")
# a worker of several has one core
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


@pytest.fixture(scope="session")
def recipe():
    """The recipe of the golden inputs."""
    spec = importlib.util.spec_from_file_location("golden_recipe", ROOT / "tests" / "golden" / "recipe.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def save(tmp_path):
    """save(tensors, name, metadata) -> path of a file that safetensors wrote."""

    def write(tensors, name="model.safetensors", metadata=None):
        path = tmp_path / name
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata)
        return path

    return write
