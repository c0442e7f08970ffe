"""Where the pack reads and writes files in the host's folders."""

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

# Device names on Windows, whatever the suffix.
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
# Not allowed in names on Windows; a colon would write to a stream that no list shows.
NOT_ON_WINDOWS = ':"|?*'
# Small models that come with the pack. The prefix puts them last in the host's lists, which are sorted by name.
SHIPPED_PREFIX = "zz_dcm_small_world"
SHIPPED = Path(__file__).resolve().parents[2] / "small_world" / "models"

for category in (CONDITIONING, DATASETS):
    # also if extra_model_paths.yaml names folders for the category
    folder_paths.add_model_folder_path(category, str(Path(folder_paths.models_dir) / category))
    folder_paths.folder_names_and_paths[category] = (folder_paths.folder_names_and_paths[category][0], {SUFFIX})
for category in (MODELS, LORAS, VAES, CONDITIONING, DATASETS):
    if (SHIPPED / category).is_dir():
        folder_paths.add_model_folder_path(category, str(SHIPPED / category))


def files(category: str) -> list[str]:
    """Names of the category's files, the pack's own last. Our own categories use / on every system, as the shipped graphs do."""
    found = folder_paths.get_filename_list(category)
    names = [name for name in found if fault_of(name) is None]
    if len(names) < len(found):
        _tell_unusable(category, frozenset(found).difference(names))
    # names in other scripts would sort after the prefix
    names.sort(key=lambda name: name.startswith(SHIPPED_PREFIX))
    return [name.replace(os.sep, "/") for name in names] if category in (CONDITIONING, DATASETS) else names


@functools.cache
def _tell_unusable(category: str, names: frozenset[str]) -> None:
    """Cached, to warn once: lists are made again and again."""
    logger.warning(
        "Some files in models/%s are not listed because their names cannot be used: %s. Rename them.",
        category,
        name_some(names),
    )


def fault_of(name: Any) -> str | None:
    """Why `name` cannot be the name of a file in one of the host's folders, or None. Every name from a client is checked here.

    A valid name stays inside the folder by its text alone. Links are followed, as in the host's own loaders. Model folders that link
    to another disk are common, and a client cannot create links. Files are written through links to folders, but never
    through a link to a file: the new file replaces the link.
    """
    if not isinstance(name, str):
        return "is not a text"
    if not name.strip():
        return "is empty"
    if has_hidden(name):
        return "contains invisible characters"
    if any(character in MARKUP for character in name):
        return f"contains one of {' '.join(MARKUP)}"
    if name[0] in "/\\" or re.match("[A-Za-z]:", name):
        return "is a full path"
    parts = re.split(r"[/\\]", name)
    if any(part in ("", ".", "..") for part in parts):
        return "points outside the folder"
    if too_long(parts):
        return f"is longer than {LONGEST_NAME} bytes"
    if any(part[-1] in ". " or part.partition(".")[0].strip().lower() in DEVICES for part in parts):
        return "is not a valid file name on Windows"
    return None


def too_long(parts: Sequence[str]) -> bool:
    """Whether a path of these parts is too long for file systems."""
    sizes = [len(part.encode()) for part in parts]
    return max(sizes) > LONGEST_NAME or sum(sizes) + len(sizes) > LONGEST_PATH


def path_of(category: str, name: Any, widget: str = "The file") -> Path:
    """Full path of a file the user chose in `widget`.

    Raises:
        CheckpointError: a name that is not in the host's folders of the category.
    """
    fault = fault_of(name)
    path = folder_paths.get_full_path(category, name) if fault is None else None
    if path is None:
        raise CheckpointError(
            f"{widget} is {given(name)}, which {fault or 'does not exist'}; expected the name of a file in models/{category}. "
            "Choose one from the list; press R to refresh it."
        )
    return Path(path)


def state_of(category: str, name: Any) -> int:
    """When a chosen file was last written, so that a node runs again after that. 0 for "none" and for a name not known yet."""
    return 0 if name in (None, NONE) else path_of(category, name).stat().st_mtime_ns


def fingerprint(states: Callable[..., Any]) -> Callable[..., Any]:
    """Keep a node's `fingerprint_inputs` from raising: "" if a file cannot be read; the run then says why.

    The host prints an error raised here. If it cannot encode the text, the thread that runs prompts ends.
    """

    @functools.wraps(states)
    def look(*args: Any, **inputs: Any) -> Any:
        try:
            return states(*args, **inputs)
        except Exception:
            return ""

    return look


def new_file(category: str, name: str, overwrite: bool) -> Path:
    """Where to write a file called `name` (subfolders allowed); creates its folder.

    Raises:
        CheckpointError: a name that `fault_of` or Windows refuses, or an existing file without `overwrite`.
    """
    folders = [
        Path(folder) for folder in folder_paths.get_folder_paths(category) if SHIPPED not in Path(folder).parents
    ]
    # the first folder of a category may have another name (diffusion_models: unet)
    folder = next((folder for folder in folders if folder.name == category), folders[0]).resolve()
    path = _inside(folder, name, SUFFIX)
    if path.exists() and not overwrite:
        raise CheckpointError(f"{path} already exists. Choose another name, or turn `overwrite` on.")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _inside(folder: Path, name: Any, suffix: str | None = None) -> Path:
    """Where to write `name` in the folder: a file with this suffix, or a folder if it is None.

    Raises:
        CheckpointError: a name that may not be written.
    """
    whole = name.strip() if isinstance(name, str) else name
    fault = fault_of(whole)
    if fault is None and suffix and PurePath(whole).suffix != suffix:
        whole += suffix
        fault = fault_of(whole)
    if fault is None and any(character in NOT_ON_WINDOWS for character in whole):
        fault = f"contains one of {' '.join(NOT_ON_WINDOWS)}"
    if fault is not None:
        raise CheckpointError(
            f"The output name is {given(name)}, which {fault}; expected a file name inside {folder}, such as my_expert. "
            "Choose another name."
        )
    return folder / whole


def source_path(name: Any) -> Path:
    """A folder or file the user named: a full path, or one in the host's input directory.

    Raises:
        DCMError: an empty name, or one that is not valid on any file system.
        RuntimeError: `~` of a user that does not exist.
    """
    if not isinstance(name, str) or not name.strip():
        raise DCMError("`folder` is empty. Enter the path of a folder of videos, or of a .jsonl file.")
    if has_hidden(name) or too_long(Path(name).parts):
        raise DCMError(
            f"`folder` is {given(name)}, which {'contains invisible characters' if has_hidden(name) else 'is too long for a path'}. "
            "Enter the path of a folder of videos, or of a .jsonl file."
        )
    return Path(folder_paths.get_input_directory()) / Path(name.strip()).expanduser()


def data_cache() -> Path:
    """The folder of encoded training data."""
    return Path(folder_paths.get_output_directory()) / "dcm_cache"


def tuning_folder(name: str) -> Path:
    """Where the trials of a search are kept.

    Raises:
        DCMError: an empty name, or one that points outside the folder.
    """
    return _inside(Path(folder_paths.get_output_directory(), "dcm_tuning").resolve(), name)


def run_folder(name: str) -> Path:
    """Where the checkpoints and samples of a training run are kept.

    Raises:
        DCMError: an empty name, or one that points outside the folder.
    """
    return _inside(Path(folder_paths.get_output_directory(), "dcm_training").resolve(), name)
