"""`python -m dcm_core train`: training from a settings file, with the host's code but without its server."""

import gc
import io
import logging
import tempfile
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import comfy.clip_vision
import comfy.model_management
import comfy.sd

from ....dcm_core.distill.backbone import check_can_be_divided
from ....dcm_core.distill.checkpoint_file import CLIPS, DATA
from ....dcm_core.distill.config import TrainingError, check_type, renamed
from ....dcm_core.distill.data.clips import ClipSettings
from ....dcm_core.distill.data.dataset import Dataset
from ....dcm_core.distill.data.dataset_file import read_dataset
from ....dcm_core.distill.data.encode import prepare
from ....dcm_core.distill.parallel import Processes, join
from ....dcm_core.errors import counted
from ....dcm_core.experts.expert import Expert
from ....dcm_core.files.tensor_file import Progress, TensorFile
from ....dcm_core.files.unfinished import write_bytes
from ....dcm_core.routing import Side
from ....dcm_core.text import LOGGER
from ..experts.attach import diffusion_model, require_family
from ..experts.expert_files import read_expert_file
from ..experts.load import load_file
from ..folders import data_cache
from .encoders import host_encoders
from .image import IMAGE_CONDITIONINGS, NO_IMAGE, VISION, check_image
from .pair import pair_boundary
from .parts import FORMER_SETTINGS, Bases, Part, bases_in, parts_of, path_in
from .run import check_optimizer, first_expert, plots_of, save_expert, train_expert

logger = logging.getLogger(LOGGER)


def train(which: str, settings: dict[str, Any], folder: Path) -> str:
    """Run or resume training with these settings. Relative paths start at `folder`.

    Args:
        which: semantic, detail, or both, one after the other.

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
        parts = parts_of(which, settings, folder)
        shard = settings.get("shard", True)
        if not isinstance(shard, bool):
            raise TrainingError(f"`shard` is {shard!r}; expected true or false.")
        shard = shard and processes.count > 1
        for part in parts:
            # before any clip is encoded
            check_optimizer(part.config, shard)
            make_room_for(part.output)
        for part in parts if processes.first else ():
            check_place(part.checkpoints)
        bases = bases_in(settings, folder)
    # the first process has the checkpoints
    finished = processes.from_first(
        lambda: {part.side: found for part in parts if (found := part.finished(bases)) is not None}
    )
    lines = []
    model = loaded = data = vae = None
    for part in parts:
        if part.side in finished:
            lines.append(f"The {part.side} expert is already trained: {part.output}")
            continue
        with processes.agreed():
            if loaded != part.model:
                # never two models in memory
                model = None
                free_memory()
                model, loaded = load_file(part.model, settings.get("weight_dtype", "default"))[0], part.model
            if shard:
                check_can_be_divided(diffusion_model(model))
            if part.recipe is not None:
                part.recipe.check(require_family(model))
            semantic = read_expert(part.semantic, "semantic", "semantic", model)
            # in a list, to be handed over: a full fine-tune is as large as the model
            start = [read_expert(part.start, "continue_from", part.side, model)]
        if data is None:
            data, vae = load_data(settings, folder, model, processes)
            with processes.agreed():
                for path, saved in finished.values():
                    now = {DATA: data.fingerprint, CLIPS: " ".join(data.clip_ids)}
                    saved.check(saved.config, {**saved.identity, **now}, path)
        # dividing the model would change it
        if part is not parts[-1] and not shard:
            check_memory(part, parts[-1], model, data, bases, processes)
        logger.info("Training the %s expert on %s", part.side, part.model.name)
        if part.recipe is not None:
            lines.append(part.recipe.in_words(part.config))
            logger.info(lines[-1])
        lines.append(train_part(part, model, data, vae, semantic, start, bases, processes, shard))
        # a divided model is loaded again
        loaded = None if shard else loaded
    return "\n".join(lines)


def train_part(
    part: Part,
    model: Any,
    data: Dataset,
    vae: Any,
    semantic: Expert | None,
    start: list[Expert | None],
    bases: Bases,
    processes: Processes,
    shard: bool,
) -> str:
    """Train one expert and save it. Returns what was done.

    Args:
        start: the expert to start from. It is taken out of the list.
    """
    # not kept in a variable
    result = train_expert(
        model,
        data,
        part.config,
        part.checkpoints,
        semantic=semantic,
        bases=bases,
        vae=vae,
        handover=part.handover,
        shard=shard,
        start=start.pop(),
    )
    # every computer gets the expert, as the next part may read it
    place, _ = processes.sharing(part.output.parent)
    with processes.agreed():
        if place == 0:
            save_expert(part.output, result.expert, model)
        for term, plot in plots_of(result).items() if processes.first else ():
            picture = io.BytesIO()
            plot.save(picture, "PNG")
            write_bytes(part.checkpoints / f"loss_{term}.png", picture.getvalue())
    steps = f"{result.expert}, {counted(len(result.history), 'step')}."
    return "\n".join(filter(None, [steps, result.skipped, result.resumed, f"Saved to {part.output}"]))


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


def check_place(checkpoints: Path) -> None:
    """Check before any work that the folder of the checkpoints can be made. It is made later.

    Raises:
        TrainingError: it cannot.
    """
    place = checkpoints
    try:
        while not place.exists():
            place = place.parent
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise TrainingError(
            f"`checkpoints` is {checkpoints}, which cannot be written ({error.strerror}). Choose another."
        ) from error


def read_expert(path: Path | None, name: str, side: Side, model: Any) -> Expert | None:
    """The expert in a file, if there is one. `name` is its setting."""
    return None if path is None else read_expert_file(path, side, model, f"{name} is {path}")


def check_memory(first: Part, last: Part, model: Any, data: Dataset, bases: Bases, processes: Processes) -> None:
    """Refuse before the first part if the last part's training does not fit into memory. Its model is as large as this one.

    Raises:
        TrainingError: says what to change.
    """
    if processes.from_first(last.checkpoints.is_dir) or (bases is None and first.config.rank == 0):
        # it was checked before, or the first part needs more
        return
    family = require_family(model)
    # none is trained yet
    semantic = first_expert(model, family, first.config.for_family(family), None, None) if bases is None else None
    boundary = pair_boundary(model, family, last.config) if bases else None
    config = last.config.for_family(family, boundary)
    logger.info("The memory that the %s expert's training will need:", last.side)
    train_expert(model, data, config, last.checkpoints, semantic=semantic, trial=True)


def free_memory() -> None:
    """Free what a part has left: its model, on the device and in system memory."""
    comfy.model_management.unload_all_models()
    gc.collect()
    comfy.model_management.soft_empty_cache()


def load_data(settings: dict[str, Any], folder: Path, model: Any, processes: Processes) -> tuple[Dataset, Any]:
    """The dataset, and the VAE if there is one. All processes encode a part of the clips."""
    given = settings.get("dataset")
    with processes.agreed():
        if isinstance(given, str):
            vae = load_vae(path_in(folder, "vae", settings["vae"])) if "vae" in settings else None
            return read_dataset(path_in(folder, "dataset", given)), vae
        if not isinstance(given, dict) or "folder" not in given:
            raise TrainingError(
                f"`dataset` is {given!r}; expected a file from DCM Save Dataset, or settings with a `folder` of clips."
            )
        values = dict(given)
        kinds = {field.name: type(field.default) for field in fields(ClipSettings)} | {"negative": str}
        valid = ["folder", *kinds, "image_conditioning", "sample_prompts"]
        if unknown := sorted(values.keys() - set(valid)):
            raise TrainingError(
                f"Unknown setting {', '.join(unknown)} in `dataset`. Valid settings: {', '.join(valid)}."
            )
        for name in values.keys() & kinds:
            check_type(f"{name} of `dataset`", values[name], kinds[name])
        source, negative = path_in(folder, "folder", values.pop("folder")), values.pop("negative", "")
        image, prompts = values.pop("image_conditioning", NO_IMAGE), values.pop("sample_prompts", [])
        if not isinstance(prompts, list) or not all(isinstance(prompt, str) and prompt.strip() for prompt in prompts):
            raise TrainingError(f"`sample_prompts` of the dataset is {prompts!r}; expected a list of texts.")
        if image not in IMAGE_CONDITIONINGS:
            choices = ", ".join(IMAGE_CONDITIONINGS)
            raise TrainingError(f"`image_conditioning` of the dataset is {image!r}; choose one of {choices}.")
        # before the clips are encoded, which may take hours
        check_image(model, [] if image == NO_IMAGE else [image, *([VISION] if "clip_vision" in settings else [])])
        clip_settings = ClipSettings(**values)
        vae, clip = load_vae(path_in(folder, "vae", settings.get("vae"))), load_clip(settings, folder, model)
        encoders = host_encoders(vae, clip, image, load_clip_vision(settings, folder))
    data = prepare(
        source,
        clip_settings,
        encoders,
        data_cache(),
        negative,
        logged_progress("dataset") if processes.first else None,
        processes=processes,
        sample_prompts=prompts,
    )
    if processes.first:
        logger.info(data.report())
    return data, vae


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


def load_clip_vision(settings: dict[str, Any], folder: Path) -> Any:
    """The host's CLIP vision model, if there is one in the settings.

    Raises:
        TrainingError: a file that is not a CLIP vision model.
    """
    if "clip_vision" not in settings:
        return None
    path = path_in(folder, "clip_vision", settings["clip_vision"])
    loaded = comfy.clip_vision.load_clipvision_from_sd(TensorFile(path).read_all())
    if loaded is None:
        raise TrainingError(f"`clip_vision` is {path}, which is not a CLIP vision model that this ComfyUI can load.")
    return loaded


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
