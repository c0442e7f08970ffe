"""Look at a file, a MODEL, or both, without loading or moving anything."""

from pathlib import Path
from typing import Any

from PIL import Image

from ...dcm_core.errors import DCMError
from ...dcm_core.inspect import inspect_file
from .expert_files import NONE
from .folders import LORAS, MODELS, files, path_of
from .route import attached_experts


def file_names() -> list[str]:
    """What the user may choose from, "none" first; the folder's name is part of each."""
    return [NONE, *(f"{category}/{name}" for category in (MODELS, LORAS) for name in files(category))]


def path_of_choice(choice: str) -> Path:
    """Full path of one of `file_names`."""
    category, _, name = choice.partition("/")
    return path_of(category, name)


def inspect(choice: str, model: Any, node_id: str | None = None) -> tuple[str, Image.Image]:
    """What the file and the MODEL are, in words, and how much their experts change each block.

    Raises:
        DCMError: neither is given, or a file that cannot be read.
    """
    if choice == NONE and model is None:
        raise DCMError("There is nothing to look at: file is none and no model is connected. Choose a file, or connect a model.")
    parts = [str(inspect_file(path_of_choice(choice)))] if choice != NONE else []
    if model is not None:
        parts.append(str(attached_experts(model) or "no experts attached"))
    return "\n\n".join(parts), Image.new("RGB", (960, 432))
