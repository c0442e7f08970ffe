"""Start the host for a command that needs it: ComfyUI's model classes, without its server."""

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch

from dcm_core.errors import DCMError

ROOT = Path(__file__).resolve().parents[1]
PACK = "dcm_pack"


def find_comfyui(folder: Path | None = None) -> Path:
    """ComfyUI's folder: `folder`, else COMFYUI_PATH, else the one whose custom_nodes contains this pack.

    Raises:
        DCMError: `folder`, or where it is None none of the others, contains ComfyUI.
    """
    others = [os.environ.get("COMFYUI_PATH"), ROOT.parents[1] if len(ROOT.parents) > 1 else None]
    candidates = [folder] if folder else others
    named = [Path(candidate).expanduser() for candidate in candidates if candidate]
    found = next((path for path in named if (path / "comfy" / "sd.py").is_file()), None)
    if found is None:
        raise DCMError(
            f"ComfyUI was not found in {', '.join(str(path) for path in named)} (no comfy/sd.py). "
            "Name its folder with --comfyui, or set COMFYUI_PATH."
        )
    return found.resolve()


def load_pack(comfyui: Path) -> Callable[[str], ModuleType]:
    """Import ComfyUI and this pack in it. Returns a function that imports the pack's modules by name.

    Raises:
        DCMError: this Python cannot import ComfyUI.
    """
    # the pack's own folder comes last, or its `nodes` would hide the host's module
    paths = [path for path in sys.path if Path(path or ".").resolve() != ROOT]
    sys.path[:] = [str(comfyui), *paths, str(ROOT)]
    if "LOCAL_RANK" in os.environ and torch.cuda.is_available():
        # one of several processes: the host uses the current GPU
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    arguments = sys.argv
    sys.argv = ["main.py"] if _accelerated() else ["main.py", "--cpu"]
    try:
        importlib.import_module("comfy.options").enable_args_parsing()
        importlib.import_module("comfy.cli_args")
        importlib.import_module("comfy.sd")
    except ImportError as error:
        raise DCMError(
            f"{comfyui} cannot be imported as ComfyUI ({error}). Run this with ComfyUI's own Python."
        ) from error
    finally:
        sys.argv = arguments
    spec = importlib.util.spec_from_file_location(PACK, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    sys.modules[PACK] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[PACK])
    return lambda name: importlib.import_module(f"{PACK}.{name}")


def _accelerated() -> bool:
    """Whether the host finds an accelerator. Without one it fails to start unless `--cpu` is set."""
    if hasattr(torch, "accelerator"):
        return torch.accelerator.is_available()
    return torch.cuda.is_available() or torch.backends.mps.is_available()
