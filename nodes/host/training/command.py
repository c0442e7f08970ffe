"""`python -m dcm_core train`: training from a settings file, with the host's code but without its server."""

import io
import logging
import os
import tempfile
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sd

from ....dcm_core.distill.config import FORMER, TrainingConfig, TrainingError, check_type, renamed
from ....dcm_core.distill.data.clips import ClipSettings
from ....dcm_core.distill.data.dataset import Dataset
from ....dcm_core.distill.data.dataset_file import read_dataset
from ....dcm_core.distill.data.encode import prepare
from ....dcm_core.distill.parallel import join
from ....dcm_core.errors import counted
from ....dcm_core.experts.expert import Expert
from ....dcm_core.files.tensor_file import Progress, TensorFile
from ....dcm_core.files.unfinished import write_bytes
from ....dcm_core.routing import Side
from ....dcm_core.text import LOGGER
from ..experts.attach import require_family
from ..experts.expert_files import other_side, read_expert_file
from ..experts.load import load_file
from ..folders import data_cache
from .encoders import host_encoders
from .run import check_not_output, plots_of, save_expert, train_expert

logger = logging.getLogger(LOGGER)

SETTINGS = {
    "model",
    "weight_dtype",
    "vae",
    "text_encoders",
    "dataset",
    "output",
    "checkpoints",
    "semantic",
    "continue_from",
    "training",
}
# names of earlier versions -> those of today
FORMER_SETTINGS = {"states": "checkpoints"}


def train(side: Side, settings: dict[str, Any], folder: Path) -> str:
    """Run or resume training with these settings. Relative paths start at `folder`.

    Returns:
        What was trained, where it was resumed, and where it is saved.

    Raises:
        DCMError: settings, files or data that do not fit, before any training.
    """
    # without its server the host does not set up logging
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    processes = join(comfy.model_management.get_torch_device())
    with processes.agreed():
        settings = renamed(settings, FORMER_SETTINGS)
        config, output, checkpoints = read_settings(side, settings, folder)
        if processes.first:
            make_room_for(output)
        model, _ = load_file(path_in(folder, "model", settings.get("model")), settings.get("weight_dtype", "default"))
        semantic = read_expert(settings, folder, "semantic", "semantic", model)
        # in a list, to be handed over: a full fine-tune is as large as the model
        start = [read_expert(settings, folder, "continue_from", side, model)]
    with processes.first_alone():
        # the other processes then find everything encoded
        data, vae = load_data(settings, folder, model)
    # not kept in a variable either
    result = train_expert(model, data, config, checkpoints, semantic=semantic, vae=vae, start=start.pop())
    if processes.first:
        save_expert(output, result.expert, model)
        for term, plot in plots_of(result).items():
            picture = io.BytesIO()
            plot.save(picture, "PNG")
            write_bytes(checkpoints / f"loss_{term}.png", picture.getvalue())
    steps = f"{result.expert}, {counted(len(result.history), 'step')}."
    return "\n".join(filter(None, [steps, result.skipped, result.resumed, f"Saved to {output}"]))


def read_settings(side: Side, settings: dict[str, Any], folder: Path) -> tuple[TrainingConfig, Path, Path]:
    """The settings of the run, the file of its expert and the folder of its checkpoints.

    Raises:
        TrainingError: settings that are unknown, of a wrong type, or only for the other expert.
    """
    unknown = sorted(set(settings) - SETTINGS)
    if unknown:
        raise TrainingError(f"Unknown setting {', '.join(unknown)}. Valid settings: {', '.join(sorted(SETTINGS))}.")
    if side == "semantic" and "semantic" in settings:
        raise TrainingError(
            "`semantic` names the expert under a detail expert, but this run trains a semantic expert. Remove `semantic`, use "
            "`continue_from` to train that expert further, or run `train detail`."
        )
    training = settings.get("training", {})
    if not isinstance(training, dict):
        raise TrainingError(f"`training` is {training!r}; expected a table of settings.")
    training = renamed(training, FORMER)
    if training.get("side", side) != side:
        raise TrainingError(
            f"`side` in `training` is {training['side']!r}, but this run trains a {side} expert. Remove it."
        )
    config = TrainingConfig.from_dict({**training, "side": side})
    for name in TrainingConfig.unused(side, training):
        logger.warning("`%s` has no effect: only a %s expert has this setting.", name, other_side(side))
    output = path_in(folder, "output", settings.get("output"))
    if os.path.isdir(output):
        raise TrainingError(f"`output` is {output}, which is a folder; expected the name of the file to write.")
    inputs = [(name, settings.get(name)) for name in ("model", "vae", "dataset", "semantic", "continue_from")]
    texts = settings.get("text_encoders")
    inputs += [("text_encoders", file) for file in (texts if isinstance(texts, list) else ())]
    for name, given in inputs:
        # anything else is reported where it is read
        if isinstance(given, str) and given:
            check_not_output(f"{name} is {given}", path_in(folder, name, given), output)
    if "checkpoints" in settings:
        return config, output, path_in(folder, "checkpoints", settings["checkpoints"])
    return config, output, default_checkpoints(folder, output.stem)


def make_room_for(output: Path) -> None:
    """Create the folder of the output, and check before any work that the output can be written.

    Raises:
        TrainingError: it cannot.
    """
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output.parent), suppress(FileNotFoundError):
            output.lstat()
    except OSError as error:
        raise TrainingError(
            f"`output` is {output}, which cannot be written ({error.strerror}). Choose another."
        ) from error


def read_expert(settings: dict[str, Any], folder: Path, name: str, side: Side, model: Any) -> Expert | None:
    """The expert in the file that the setting `name` names, if it is set."""
    if name not in settings:
        return None
    path = path_in(folder, name, settings[name])
    return read_expert_file(path, side, model, f"{name} is {path}")


def default_checkpoints(folder: Path, name: str) -> Path:
    """The default folder for a run's checkpoints.

    It is not next to the output: in the LoRA folder, the host would list every checkpoint as a LoRA.
    """
    former = folder / f"{name}_states"  # a run that an earlier version started
    return former if os.path.isdir(former) else folder / f"{name}_checkpoints"


def path_in(folder: Path, name: str, given: Any) -> Path:
    """The path in the setting `name`.

    Raises:
        TrainingError: not a path.
    """
    if not isinstance(given, str) or not given or "\0" in given:
        raise TrainingError(f"`{name}` is {given!r}; expected a path.")
    return folder / Path(given).expanduser()


def load_data(settings: dict[str, Any], folder: Path, model: Any) -> tuple[Dataset, Any]:
    """The dataset, and the VAE if there is one."""
    given = settings.get("dataset")
    if isinstance(given, str):
        vae = load_vae(path_in(folder, "vae", settings["vae"])) if "vae" in settings else None
        return read_dataset(path_in(folder, "dataset", given)), vae
    if not isinstance(given, dict) or "folder" not in given:
        raise TrainingError(
            f"`dataset` is {given!r}; expected a file from DCM Save Dataset, or settings with a `folder` of clips."
        )
    values = dict(given)
    kinds = {field.name: type(field.default) for field in fields(ClipSettings)} | {"negative": str}
    for name in values.keys() & kinds:
        check_type(f"{name} of `dataset`", values[name], kinds[name])
    source, negative = path_in(folder, "folder", values.pop("folder")), values.pop("negative", "")
    try:
        clip_settings = ClipSettings(**values)
    except TypeError as error:
        raise TrainingError(
            f"Unknown or missing setting in `dataset` ({error}). Valid settings: folder, negative, frames, fps, width, height, buckets."
        ) from error
    vae, clip = load_vae(path_in(folder, "vae", settings.get("vae"))), load_clip(settings, folder, model)
    return prepare(
        source, clip_settings, host_encoders(vae, clip), data_cache(), negative, logged_progress("dataset")
    ), vae


def logged_progress(label: str) -> Progress:
    """Log a line for every 10%."""
    told = 0

    def update(done: int, total: int) -> None:
        nonlocal told
        if (part := 10 * done // total) > told:
            told = part
            logger.info("%s %d%%", label, 10 * part)

    return update


def load_vae(path: Path) -> Any:
    """Load a VAE from a safetensors file.

    Raises:
        TrainingError: a file that is not a VAE.
    """
    vae = comfy.sd.VAE(sd=TensorFile(path).read_all())
    if vae.first_stage_model is None:
        raise TrainingError(f"`vae` is {path}, which is not a VAE that this ComfyUI can load. Choose the model's VAE.")
    return vae


def load_clip(settings: dict[str, Any], folder: Path, model: Any) -> Any:
    """The host's text encoder of the model's family."""
    names = settings.get("text_encoders")
    if not names or not isinstance(names, list):
        raise TrainingError(f"`text_encoders` is {names!r}; expected a list of the model's text encoder files.")
    paths = [path_in(folder, "text_encoders", name) for name in names]
    for path in paths:
        TensorFile(path)  # only safetensors are read
    kind = require_family(model).clip_type.upper()
    return comfy.sd.load_clip(ckpt_paths=[str(path) for path in paths], clip_type=comfy.sd.CLIPType[kind])
