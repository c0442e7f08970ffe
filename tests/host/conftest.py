"""The pack inside a real ComfyUI, in this process."""

import importlib
import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
HOST = os.environ.get("COMFYUI_PATH")


def pytest_ignore_collect(collection_path):
    return HOST is None and collection_path.name.startswith("test_")


def pytest_terminal_summary(terminalreporter):
    if HOST is None:
        terminalreporter.write_line("host tests not collected: COMFYUI_PATH names no ComfyUI (python scripts/test.py brings one)")


if HOST:
    sys.path.insert(0, HOST)


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """A models folder of its own, with the golden releases in it."""
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def pack(models):
    """The pack, loaded as ComfyUI loads a custom node folder."""
    argv, sys.argv = sys.argv, ["main.py", "--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.cli_args
    import folder_paths

    sys.argv = argv
    for kind in ("diffusion_models", "loras", "dcm_conditioning"):
        (models / kind).mkdir()
        folder_paths.folder_names_and_paths[kind] = ([str(models / kind)], {".safetensors", ".ckpt"})
    folder_paths.models_dir = str(models)
    spec = importlib.util.spec_from_file_location("dcm_pack", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    module = importlib.util.module_from_spec(spec)
    sys.modules["dcm_pack"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def module(pack):
    """Import a module of the pack: module("nodes.host.attach")."""
    return lambda name: importlib.import_module(f"{pack.__name__}.{name}")


@pytest.fixture(scope="session")
def node(module):
    """Run a node as the host does: node("DCMScheduler", model=...) -> its NodeOutput."""
    nodes = {cls.__name__: cls for cls in module("nodes").NODES}

    def run(name, **inputs):
        cls = nodes[name]
        cls.GET_SCHEMA()
        prepared = cls.PREPARE_CLASS_CLONE({"hidden_inputs": {}})
        with torch.inference_mode():
            return prepared.execute(**inputs)

    run.classes = nodes
    return run


@pytest.fixture(scope="session")
def releases(pack, models, recipe):
    """Files of the golden releases among the host's diffusion models: model name -> file name."""
    from safetensors.torch import save_file

    names = {}
    for model in ("wan_tiny", "hy_tiny"):
        names[model] = f"{model}.safetensors"
        save_file(recipe.release(model), models / "diffusion_models" / names[model])
    return names
