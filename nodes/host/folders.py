"""Where the pack's files live among the host's."""

from pathlib import Path

import folder_paths

from ...dcm_core.errors import CheckpointError

MODELS, LORAS, CONDITIONING = "diffusion_models", "loras", "dcm_conditioning"
SUFFIX = ".safetensors"

if CONDITIONING not in folder_paths.folder_names_and_paths:
    folder_paths.add_model_folder_path(CONDITIONING, str(Path(folder_paths.models_dir) / CONDITIONING))
    folder_paths.folder_names_and_paths[CONDITIONING] = (folder_paths.folder_names_and_paths[CONDITIONING][0], {SUFFIX})


def files(category: str) -> list[str]:
    """Names of the category's files."""
    return folder_paths.get_filename_list(category)


def path_of(category: str, name: str) -> Path:
    """Full path of a file the user chose."""
    return Path(folder_paths.get_full_path_or_raise(category, name))


def new_file(category: str, name: str, overwrite: bool) -> Path:
    """Where to write a file called `name` (subfolders allowed), its folder made.

    Raises:
        CheckpointError: an empty or outside name, or an existing file without `overwrite`.
    """
    folder = Path(folder_paths.get_folder_paths(category)[0]).resolve()
    path = (folder / name.strip()).resolve()
    if not name.strip() or folder not in path.parents:
        raise CheckpointError(f"The output name is {name!r}; expected a file name inside {folder}. Choose another name.")
    path = path if path.suffix == SUFFIX else path.with_name(path.name + SUFFIX)
    if path.exists() and not overwrite:
        raise CheckpointError(f"{path} exists already. Choose another name, or switch `overwrite` on.")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
