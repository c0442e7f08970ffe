"""Where the pack's files live among the host's."""

import os
from pathlib import Path

import folder_paths

from ...dcm_core.errors import CheckpointError, DCMError

MODELS, LORAS, VAES = "diffusion_models", "loras", "vae"
CONDITIONING, DATASETS = "dcm_conditioning", "dcm_datasets"
SUFFIX = ".safetensors"
NONE = "none"
# Small models that come with the pack.
SHIPPED = Path(__file__).resolve().parents[2] / "small_world" / "models"

for category in (CONDITIONING, DATASETS):
    # also where extra_model_paths.yaml has named folders of the category
    folder_paths.add_model_folder_path(category, str(Path(folder_paths.models_dir) / category))
    folder_paths.folder_names_and_paths[category] = (folder_paths.folder_names_and_paths[category][0], {SUFFIX})
for category in (MODELS, LORAS, VAES, CONDITIONING, DATASETS):
    if (SHIPPED / category).is_dir():
        folder_paths.add_model_folder_path(category, str(SHIPPED / category))


def files(category: str) -> list[str]:
    """Names of the category's files; those of our own categories with / on every system, as shipped graphs name them."""
    names = folder_paths.get_filename_list(category)
    return [name.replace(os.sep, "/") for name in names] if category in (CONDITIONING, DATASETS) else names


def path_of(category: str, name: str) -> Path:
    """Full path of a file the user chose."""
    return Path(folder_paths.get_full_path_or_raise(category, name))


def state_of(category: str, name: str | None) -> int:
    """When a chosen file was last written: a node runs again after that. 0 for "none", and for a name not known yet."""
    return 0 if name in (None, NONE) else path_of(category, name).stat().st_mtime_ns


def new_file(category: str, name: str, overwrite: bool) -> Path:
    """Where to write a file called `name` (subfolders allowed), its folder made.

    Raises:
        CheckpointError: an empty or outside name, or an existing file without `overwrite`.
    """
    folders = [Path(folder) for folder in folder_paths.get_folder_paths(category) if SHIPPED not in Path(folder).parents]
    # a category may be read from folders of other names first (diffusion_models: unet)
    folder = next((folder for folder in folders if folder.name == category), folders[0]).resolve()
    path = _inside(folder, name)
    if path is None:
        raise CheckpointError(f"The output name is {name!r}; expected a file name inside {folder}. Choose another name.")
    path = path if path.suffix == SUFFIX else path.with_name(path.name + SUFFIX)
    if path.exists() and not overwrite:
        raise CheckpointError(f"{path} exists already. Choose another name, or switch `overwrite` on.")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _inside(folder: Path, name: str) -> Path | None:
    """The path of `name` in the (resolved) folder, links in it as they are; None for no name, or one that leads elsewhere."""
    path = Path(os.path.normpath(folder / name.strip()))
    return path if name.strip() and folder in path.parents else None


def source_path(name: str) -> Path:
    """A folder or file the user named: a full path, or one in the host's input directory.

    Raises:
        DCMError: an empty name.
    """
    if not name.strip():
        raise DCMError("No folder is given. Enter the path of a folder of videos, or of a .jsonl file.")
    return Path(folder_paths.get_input_directory()) / Path(name.strip()).expanduser()


def data_cache() -> Path:
    """The folder of encoded training data."""
    return Path(folder_paths.get_output_directory()) / "dcm_cache"


def run_folder(name: str) -> Path:
    """Where the states and samples of a training run are kept.

    Raises:
        DCMError: a name that is none, or leads elsewhere.
    """
    folder = Path(folder_paths.get_output_directory(), "dcm_training").resolve()
    path = _inside(folder, name)
    if path is None:
        raise DCMError(f"The name of the run is {name!r}; expected a plain name, such as my_expert. Choose another name.")
    return path
