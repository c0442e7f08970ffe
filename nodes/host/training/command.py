"""`python -m dcm_core train`: training from a settings file, with the host's code but without its server."""

import io
import logging
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sd

from ....dcm_core.distill.config import FORMER, TrainingConfig, TrainingError, renamed
from ....dcm_core.distill.data.clips import ClipSettings
from ....dcm_core.distill.data.dataset import Dataset
from ....dcm_core.distill.data.dataset_file import read_dataset
from ....dcm_core.distill.data.encode import prepare
from ....dcm_core.distill.parallel import join
from ....dcm_core.errors import counted
from ....dcm_core.files.tensor_file import Progress, TensorFile
from ....dcm_core.files.unfinished import write_bytes
from ....dcm_core.routing import Side
from ....dcm_core.text import LOGGER
from ..experts.attach import require_family
from ..experts.expert_files import read_expert_file
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
    "shard",
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
    settings = renamed(settings, FORMER_SETTINGS)
    unknown = sorted(set(settings) - SETTINGS)
    if unknown:
        raise TrainingError(f"Unknown setting {', '.join(unknown)}. Valid settings: {', '.join(sorted(SETTINGS))}.")

    def path(name: str) -> Path:
        return path_in(folder, name, settings.get(name))

    training = settings.get("training", {})
    if not isinstance(training, dict):
        raise TrainingError(f"`training` is {training!r}; expected a table of settings.")
    shard = settings.get("shard", True)
    if not isinstance(shard, bool):
        raise TrainingError(f"`shard` is {shard!r}; expected true or false.")
    config = TrainingConfig.from_dict({**renamed(training, FORMER), "side": side})
    output = path("output")
    if output.is_dir():
        raise TrainingError(f"`output` is {output}, which is a folder; expected the name of the file to write.")
    inputs = [(name, settings.get(name)) for name in ("model", "vae", "dataset", "semantic", "continue_from")]
    inputs += [("text_encoders", file) for file in settings.get("text_encoders") or ()]
    for name, given in inputs:
        # anything else is reported where it is read
        if isinstance(given, str) and given:
            check_not_output(f"{name} is {given}", path_in(folder, name, given), output)
    checkpoints = path("checkpoints") if "checkpoints" in settings else default_checkpoints(folder, output.stem)
    model, _ = load_file(path("model"), settings.get("weight_dtype", "default"))
    semantic = (
        read_expert_file(path("semantic"), "semantic", model, f"semantic is {path('semantic')}")
        if "semantic" in settings
        else None
    )
    start = path("continue_from") if "continue_from" in settings else None
    output.parent.mkdir(parents=True, exist_ok=True)
    processes = join(comfy.model_management.get_torch_device())
    with processes.first_alone():
        # the other processes then find everything encoded
        data, vae = load_data(settings, folder, model)
    # not kept in a variable: a full fine-tune is as large as the model
    result = train_expert(
        model,
        data,
        config,
        checkpoints,
        semantic=semantic,
        vae=vae,
        shard=shard,
        start=read_expert_file(start, side, model, f"continue_from is {start}") if start is not None else None,
    )
    if processes.first:
        save_expert(output, result.expert, model)
        for term, plot in plots_of(result).items():
            picture = io.BytesIO()
            plot.save(picture, "PNG")
            write_bytes(checkpoints / f"loss_{term}.png", picture.getvalue())
    lines = [f"{result.expert}, {counted(len(result.history), 'step')}.", result.resumed, f"Saved to {output}"]
    return "\n".join(filter(None, lines))


def default_checkpoints(folder: Path, name: str) -> Path:
    """The default folder for a run's checkpoints.

    It is not next to the output: in the LoRA folder, the host would list every checkpoint as a LoRA.
    """
    former = folder / f"{name}_states"  # a run that an earlier version started
    return former if former.is_dir() else folder / f"{name}_checkpoints"


def path_in(folder: Path, name: str, given: Any) -> Path:
    """The path in the setting `name`.

    Raises:
        TrainingError: not a path.
    """
    if not isinstance(given, str) or not given:
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
