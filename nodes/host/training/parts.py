"""The parts of a training run, read from its settings: one for each expert."""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ....dcm_core.distill.checkpoint_file import Checkpoint
from ....dcm_core.distill.checkpoints import newest_checkpoint
from ....dcm_core.distill.config import FORMER, TrainingConfig, TrainingError, renamed
from ....dcm_core.distill.recipes import CUSTOM, Recipe, recipe_of
from ....dcm_core.families.wan import PAIR_SHIFT
from ....dcm_core.files.checkpoint import recognise
from ....dcm_core.files.metadata import read_metadata
from ....dcm_core.files.tensor_file import TensorFile
from ....dcm_core.pair import Fingerprint, make_pair, two_bases
from ....dcm_core.routing import SIDES, Side
from ....dcm_core.text import LOGGER
from ..experts.expert_files import other_side
from ..experts.halves import INPUTS
from .pair import file_fingerprint, patch_shape
from .run import check_not_output

logger = logging.getLogger(LOGGER)

Bases = Mapping[Side, Fingerprint] | None

SETTINGS = {
    "model",
    "detail_model",
    "weight_dtype",
    "vae",
    "text_encoders",
    "clip_vision",
    "dataset",
    "output",
    "checkpoints",
    "semantic",
    "continue_from",
    "recipe",
    "shard",
    "training",
}
# names of earlier versions -> those of today
FORMER_SETTINGS = {"states": "checkpoints"}

BOTH = "both"


@dataclass(frozen=True)
class Part:
    """The training of one expert.

    Attributes:
        model: the file of its base.
        semantic: the file of the semantic expert under it.
        handover: with two models, the file between their samples.
        start: the file of an expert to start from.
        recipe: the one that is applied in `config`.
    """

    side: Side
    config: TrainingConfig
    model: Path
    output: Path
    checkpoints: Path
    handover: Path | None
    semantic: Path | None = None
    start: Path | None = None
    recipe: Recipe | None = None

    def finished(self, bases: Bases) -> tuple[Path, Checkpoint] | None:
        """Its last checkpoint, if its expert was trained on these two models with these settings. Neither of them is loaded."""
        if bases is None or not self.output.is_file():
            # with one model, the other part needs it too
            return None
        found = newest_checkpoint(self.checkpoints, weights=False)
        family = recognise(TensorFile(self.model)).family
        if found is None or family is None:
            return None
        _, saved = found
        config = self.config.for_family(family, saved.config.boundary)
        pair = read_metadata(TensorFile(self.output).metadata).pair
        same = not config.differences(saved.config) and config.steps == saved.steps
        return found if same and pair == make_pair(bases, config.boundary, config.timesteps(family)) else None


def parts_of(which: str, settings: dict[str, Any], folder: Path) -> list[Part]:
    """The parts of a run, in order.

    Raises:
        TrainingError: settings that are unknown or do not fit each other.
    """
    unknown = sorted(set(settings) - SETTINGS)
    if unknown:
        raise TrainingError(f"Unknown setting {', '.join(unknown)}. Valid settings: {', '.join(sorted(SETTINGS))}.")

    def path(name: str) -> Path:
        return path_in(folder, name, settings.get(name))

    if which == "semantic" and "semantic" in settings:
        raise TrainingError(
            "`semantic` names the expert under a detail expert, but this run trains a semantic expert. Remove `semantic`, use "
            "`continue_from` to train that expert further, or run `train detail`."
        )
    output = path("output")
    if os.path.isdir(output):
        raise TrainingError(f"`output` is {output}, which is a folder; expected the name of the file to write.")
    recipe = recipe_of(settings.get("recipe", CUSTOM))
    sides: tuple[Side, ...] = SIDES if which == BOTH else (which,)
    two_models, two_files = "detail_model" in settings, "detail_model" in settings or which == BOTH
    for name in ("semantic", "continue_from") if which == BOTH else ("semantic",) if two_models else ():
        if name in settings:
            raise TrainingError(
                f"`{name}` is {settings[name]!r}, but "
                + (
                    "both experts are trained"
                    if which == BOTH
                    else "with detail_model each expert has a model of its own"
                )
                + f". Remove {name}, or train one expert on one model."
            )
    checkpoints = path("checkpoints") if "checkpoints" in settings else default_checkpoints(folder, output.stem)
    files = {side: output.with_stem(f"{output.stem}_{side}") if two_files else output for side in SIDES}
    for side in sides:
        check_inputs(settings, folder, files[side])
    return [
        Part(
            side,
            config_of(side, settings.get("training", {}), two_files, two_models, recipe),
            path("detail_model") if two_models and side == "detail" else path("model"),
            files[side],
            checkpoints / side if two_files else checkpoints,
            checkpoints / "boundary.safetensors" if two_models else None,
            files["semantic"]
            if which == BOTH and side == "detail" and not two_models
            else path("semantic")
            if "semantic" in settings
            else None,
            path("continue_from") if "continue_from" in settings else None,
            recipe,
        )
        for side in sides
    ]


def check_inputs(settings: dict[str, Any], folder: Path, output: Path) -> None:
    """Refuse a file among the inputs that the run would overwrite, or that is missing.

    Raises:
        TrainingError: names the setting.
    """
    names = ("model", "detail_model", "vae", "clip_vision", "dataset", "semantic", "continue_from")
    inputs = [(name, settings.get(name)) for name in names]
    texts = settings.get("text_encoders")
    inputs += [("text_encoders", file) for file in (texts if isinstance(texts, list) else ())]
    for name, given in inputs:
        # anything else is reported where it is read
        if isinstance(given, str) and given:
            check_not_output(f"{name} is {given}", path_in(folder, name, given), output)
    for name, given in inputs:
        # the dataset may be a folder, and is reported where it is read
        if (
            name != "dataset"
            and isinstance(given, str)
            and given
            and not (path := path_in(folder, name, given)).exists()
        ):
            raise TrainingError(
                f"`{name}` is {given}, but {path} does not exist. Check the name. Relative paths start at the settings file."
            )


def config_of(side: Side, training: Any, two_files: bool, two_models: bool, recipe: Recipe | None) -> TrainingConfig:
    """The settings of one part, over those of the recipe. With two files, those of the other expert are left out.

    A table named by an expert has that expert's own settings.

    Raises:
        TrainingError: a setting that is unknown or has a wrong value.
    """
    if not isinstance(training, dict):
        raise TrainingError(f"`training` is {training!r}; expected a table of settings.")
    values = renamed(training, FORMER)
    if values.get("side", side) != side:
        raise TrainingError(
            f"`side` in `training` is {values['side']!r}, but this run trains a {side} expert. Remove it."
        )
    if two_files:
        own = values.get(side, {})
        if not isinstance(own, dict):
            raise TrainingError(f"`{side}` in `training` is {own!r}; expected a table of settings.")
        others = {*SIDES, *TrainingConfig.unused(side, values)}
        values = {name: value for name, value in values.items() if name not in others}
        values |= renamed(own, FORMER)
    if two_models:
        values = {"shift": PAIR_SHIFT} | values
    config = TrainingConfig.from_dict({**values, "side": side})
    for name in TrainingConfig.unused(side, values):
        logger.warning("`%s` has no effect: only a %s expert has this setting.", name, other_side(side))
    return config if recipe is None else recipe.applied(config, values)


def bases_in(settings: dict[str, Any], folder: Path) -> Bases:
    """The fingerprints of the two models in the settings; None for one model."""
    if "detail_model" not in settings:
        return None
    paths = [path_in(folder, INPUTS[side], settings.get(INPUTS[side])) for side in SIDES]
    bases = two_bases(*map(file_fingerprint, paths))
    first, second = map(patch_shape, paths)
    if first != second:
        raise TrainingError(
            f"`model` and `detail_model` do not belong together: their patch embeddings have shapes {first} and {second}. "
            "Name the high-noise and the low-noise half of the same model."
        )
    return bases


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
