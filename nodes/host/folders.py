"""Where the pack's files live among the host's."""

import functools
import logging
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path, PurePath
from typing import Any

import folder_paths

from ...dcm_core.errors import CheckpointError, DCMError, name_some
from ...dcm_core.text import LOGGER, given, has_hidden

logger = logging.getLogger(LOGGER)

MODELS, LORAS, VAES = "diffusion_models", "loras", "vae"
CONDITIONING, DATASETS = "dcm_conditioning", "dcm_datasets"
SUFFIX = ".safetensors"
NONE = "none"

# Windows takes these for devices, whatever their suffix.
DEVICES = {
    "con",
    "prn",
    "aux",
    "nul",
    "conin$",
    "conout$",
    *(f"{port}{n}" for port in ("com", "lpt") for n in "0123456789¹²³"),
}
LONGEST_NAME, LONGEST_PATH = 255, 4000
# Older front ends read the names in a list as HTML.
MARKUP = "<>"
# What Windows has in no name; a colon would write where no list looks.
NOT_ON_WINDOWS = ':"|?*'
# Small models that come with the pack, named so that every list of the host, which sorts by name, has them last.
SHIPPED_PREFIX = "zz_dcm_small_world"
SHIPPED = Path(__file__).resolve().parents[2] / "small_world" / "models"

for category in (CONDITIONING, DATASETS):
    # also where extra_model_paths.yaml has named folders of the category
    folder_paths.add_model_folder_path(category, str(Path(folder_paths.models_dir) / category))
    folder_paths.folder_names_and_paths[category] = (folder_paths.folder_names_and_paths[category][0], {SUFFIX})
for category in (MODELS, LORAS, VAES, CONDITIONING, DATASETS):
    if (SHIPPED / category).is_dir():
        folder_paths.add_model_folder_path(category, str(SHIPPED / category))


def files(category: str) -> list[str]:
    """Names of the category's files, the pack's own last; those of our own categories with / on every system, as shipped graphs
    name them."""
    found = folder_paths.get_filename_list(category)
    names = [name for name in found if fault_of(name) is None]
    if len(names) < len(found):
        _tell_unusable(category, frozenset(found).difference(names))
    # names in other scripts come after any prefix
    names.sort(key=lambda name: name.startswith(SHIPPED_PREFIX))
    return [name.replace(os.sep, "/") for name in names] if category in (CONDITIONING, DATASETS) else names


@functools.cache
def _tell_unusable(category: str, names: frozenset[str]) -> None:
    """Once for what is found: lists are made again and again."""
    logger.warning(
        "Not offered from models/%s, as their names cannot be used: %s. Rename these files.", category, name_some(names)
    )


def fault_of(name: Any) -> str | None:
    """Why `name` cannot be a file's in one of the host's folders, None for one that can: every name from a client is asked here.

    A good name stays inside the folder by its words alone. Links are followed wherever the user of this machine has put them,
    as the host's own loaders do: folders and files of models that link to another disk are common, and a client cannot make any.
    Files are written through links to folders, never through a link to a file: the new file takes the link's place.
    """
    if not isinstance(name, str):
        return "is no text"
    if not name.strip():
        return "is empty"
    if has_hidden(name):
        return "has characters that cannot be seen"
    if any(character in MARKUP for character in name):
        return f"has one of {' '.join(MARKUP)}"
    if name[0] in "/\\" or re.match("[A-Za-z]:", name):
        return "is a full path"
    parts = re.split(r"[/\\]", name)
    if any(part in ("", ".", "..") for part in parts):
        return "leads elsewhere"
    if too_long(parts):
        return f"is longer than {LONGEST_NAME} bytes"
    if any(part[-1] in ". " or part.partition(".")[0].strip().lower() in DEVICES for part in parts):
        return "is no file name on Windows"
    return None


def too_long(parts: Sequence[str]) -> bool:
    """Whether a path of these parts is more than file systems take."""
    sizes = [len(part.encode()) for part in parts]
    return max(sizes) > LONGEST_NAME or sum(sizes) + len(sizes) > LONGEST_PATH


def path_of(category: str, name: Any, widget: str = "The file") -> Path:
    """Full path of a file the user chose in `widget`.

    Raises:
        CheckpointError: a name that the host's folders of the category do not hold.
    """
    fault = fault_of(name)
    path = folder_paths.get_full_path(category, name) if fault is None else None
    if path is None:
        raise CheckpointError(
            f"{widget} is {given(name)}, which {fault or 'does not exist'}; expected the name of a file in models/{category}. "
            "Choose one from the list, or refresh it (R)."
        )
    return Path(path)


def state_of(category: str, name: Any) -> int:
    """When a chosen file was last written: a node runs again after that. 0 for "none", and for a name not known yet."""
    return 0 if name in (None, NONE) else path_of(category, name).stat().st_mtime_ns


def fingerprint(states: Callable[..., Any]) -> Callable[..., Any]:
    """Make a node's `fingerprint_inputs` one that never raises: "" where files cannot be looked at; the run says why.

    The host prints what is raised here, and where that cannot be encoded, the thread that runs prompts ends.
    """

    @functools.wraps(states)
    def look(*args: Any, **inputs: Any) -> Any:
        try:
            return states(*args, **inputs)
        except Exception:
            return ""

    return look


def new_file(category: str, name: str, overwrite: bool) -> Path:
    """Where to write a file called `name` (subfolders allowed), its folder made.

    Raises:
        CheckpointError: a name that `fault_of` or Windows refuses, or an existing file without `overwrite`.
    """
    folders = [
        Path(folder) for folder in folder_paths.get_folder_paths(category) if SHIPPED not in Path(folder).parents
    ]
    # a category may be read from folders of other names first (diffusion_models: unet)
    folder = next((folder for folder in folders if folder.name == category), folders[0]).resolve()
    path = _inside(folder, name, SUFFIX)
    if path.exists() and not overwrite:
        raise CheckpointError(f"{path} exists already. Choose another name, or switch `overwrite` on.")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _inside(folder: Path, name: Any, suffix: str | None = None) -> Path:
    """Where to write `name` in the folder: a file of this suffix, or (None) a folder.

    Raises:
        CheckpointError: a name that may not be written.
    """
    whole = name.strip() if isinstance(name, str) else name
    fault = fault_of(whole)
    if fault is None and suffix and PurePath(whole).suffix != suffix:
        whole += suffix
        fault = fault_of(whole)
    if fault is None and any(character in NOT_ON_WINDOWS for character in whole):
        fault = f"has one of {' '.join(NOT_ON_WINDOWS)}"
    if fault is not None:
        raise CheckpointError(
            f"The output name is {given(name)}, which {fault}; expected a file name inside {folder}, such as my_expert. "
            "Choose another name."
        )
    return folder / whole


def source_path(name: Any) -> Path:
    """A folder or file the user named: a full path, or one in the host's input directory.

    Raises:
        DCMError: an empty name, or one that no file system has.
        RuntimeError: `~` of a user that does not exist.
    """
    if not isinstance(name, str) or not name.strip():
        raise DCMError("No folder is given. Enter the path of a folder of videos, or of a .jsonl file.")
    if has_hidden(name) or too_long(Path(name).parts):
        raise DCMError(
            f"folder is {given(name)}, which {'has characters that cannot be seen' if has_hidden(name) else 'is too long for a path'}. "
            "Enter the path of a folder of videos, or of a .jsonl file."
        )
    return Path(folder_paths.get_input_directory()) / Path(name.strip()).expanduser()


def data_cache() -> Path:
    """The folder of encoded training data."""
    return Path(folder_paths.get_output_directory()) / "dcm_cache"


def run_folder(name: str) -> Path:
    """Where the states and samples of a training run are kept.

    Raises:
        DCMError: a name that is none, or leads elsewhere.
    """
    return _inside(Path(folder_paths.get_output_directory(), "dcm_training").resolve(), name)
