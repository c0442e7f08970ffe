"""`python -m dcm_core evaluate`: a comparison from a settings file, with the host's code but without its server."""

import dataclasses
import io
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ....dcm_core.distill.config import check_type
from ....dcm_core.errors import DCMError, check_choice
from ....dcm_core.evaluation.figure import plot_report
from ....dcm_core.evaluation.report import Report
from ....dcm_core.files.conditioning import load_conditioning
from ....dcm_core.files.unfinished import check_targets, write_bytes
from ....dcm_core.schedule import AUTO
from ....dcm_core.text import LOGGER, given
from ....dcm_core.video_size import FORMATS, FRAMES
from ..experts.attach import attach_experts
from ..experts.expert_files import read_expert_file
from ..experts.load import WEIGHT_DTYPES, load_file
from ..sampling.schedules import schedule_names
from ..sampling.setup import video_format
from ..training.command import free_memory, load_clip, load_vae
from ..training.encoders import caption_encoder
from ..training.parts import path_in
from .compare import DEFAULT_STEPS, Task, compare, reference_of, with_schedule

logger = logging.getLogger(LOGGER)

REPORT, PICTURE = "report.json", "report.png"
# Settings that name files.
FILES = ("model", "reference_model", "semantic", "detail", "vae")


@dataclass(frozen=True)
class Evaluation:
    """The settings of a comparison.

    Attributes:
        prompts: texts, encoded by `text_encoders`.
        conditionings: more prompts, in files of DCM Save Conditioning.
        negative: a text, or such a file.

    Raises:
        DCMError: a setting that is missing, unknown, or has a wrong value.
    """

    model: str
    width: int
    height: int
    frames: int
    semantic: str = ""
    detail: str = ""
    semantic_strength: float = 1.0
    detail_strength: float = 1.0
    boundary: float = 0.0
    stacked: bool = True
    reference_model: str = ""
    weight_dtype: str = "default"
    vae: str = ""
    text_encoders: tuple[str, ...] = ()
    prompts: tuple[str, ...] = ()
    conditionings: tuple[str, ...] = ()
    negative: str = ""
    schedule: str = AUTO
    steps: int = 6
    cfg: float = 1.0
    seed: int = 0
    seeds: int = 4
    reference_steps: int = DEFAULT_STEPS
    reference_cfg: float = 1.0
    shift: float = 5.0

    @classmethod
    def read(cls, settings: dict[str, Any], folder: Path) -> "Evaluation":
        """The settings of a file. Every file that they name has to exist; relative paths start at `folder`."""
        fields = {field.name: field for field in dataclasses.fields(cls)}
        if unknown := sorted(settings.keys() - fields):
            raise DCMError(f"Unknown setting {', '.join(map(given, unknown))}. Valid settings: {', '.join(fields)}.")
        needed = {name for name, field in fields.items() if field.default is dataclasses.MISSING}
        if missing := sorted(needed - settings.keys()):
            raise DCMError(f"The setting {missing[0]} is missing. Expected at least {', '.join(sorted(needed))}.")
        values = {}
        for name, value in settings.items():
            kind = {"str": str, "int": int, "float": float, "bool": bool}.get(
                getattr(fields[name].type, "__name__", "")
            )
            if kind is None:
                if not isinstance(value, list) or not all(isinstance(entry, str) and entry.strip() for entry in value):
                    raise DCMError(f"{name} is {given(value)}; expected a list of texts.")
                value = tuple(value)
            else:
                check_type(name, value, kind)
            values[name] = value
        found = cls(**values)
        found.check(folder)
        return found

    def check(self, folder: Path) -> None:
        """Refuse what would fail after the models are loaded.

        Raises:
            DCMError: names the setting.
        """
        check_choice("weight_dtype", self.weight_dtype, WEIGHT_DTYPES)
        check_choice("schedule", self.schedule, schedule_names())
        if not self.prompts and not self.conditionings:
            raise DCMError("There is no prompt. Set prompts to a list of texts, or conditionings to a list of files.")
        if (self.prompts or (self.negative and not self.negative.endswith(".safetensors"))) and not self.text_encoders:
            raise DCMError("text_encoders is missing. List the model's text encoder files, or use conditionings.")
        for name in ("cfg", "reference_cfg"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise DCMError(f"{name} is {value}; expected 0 or more. Use 1 for experts.")
            if value != 1 and not self.negative:
                raise DCMError(f"{name} is {value:g}, which needs a negative prompt. Set negative, or set {name} to 1.")
        for name, least in (("width", 16), ("height", 16), ("frames", 1), ("seeds", 1), ("reference_steps", 2)):
            if getattr(self, name) < least:
                raise DCMError(f"{name} is {getattr(self, name)}; expected {least} or more.")
        if (self.frames - 1) % FRAMES:
            raise DCMError(f"frames is {self.frames}; expected 1 more than a multiple of {FRAMES}.")
        named = [(name, getattr(self, name)) for name in FILES if getattr(self, name)]
        named += [(name, file) for name in ("text_encoders", "conditionings") for file in getattr(self, name)]
        for name, file in named:
            if not (path := path_in(folder, name, file)).is_file():
                raise DCMError(
                    f"{name} is {given(file)}, but {path} is not a file. Check the name. Relative paths start at the settings file."
                )


def evaluate(settings: dict[str, Any], folder: Path, output: Path, overwrite: bool = False) -> str:
    """Compare as the settings say, and write the report into the folder `output`.

    Returns:
        The report in words, and where it is.

    Raises:
        DCMError: settings or files that do not fit, before any model call.
    """
    # without its server the host does not set up logging
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    evaluation = Evaluation.read(settings, folder)
    targets = [output / REPORT, output / PICTURE]
    check_targets([], targets, overwrite)
    output.mkdir(parents=True, exist_ok=True)
    with torch.inference_mode():
        report, notes = run_evaluation(evaluation, folder)
    write_report(report, targets)
    return "\n".join([str(report), *notes, f"Saved to {targets[0]} and {targets[1].name}"])


def run_evaluation(evaluation: Evaluation, folder: Path) -> tuple[Report, Sequence[str]]:
    """The report, and notes about the schedule."""
    model = load_model(evaluation, folder)
    other = None
    if evaluation.reference_model:
        path = path_in(folder, "reference_model", evaluation.reference_model)
        other = load_file(path, evaluation.weight_dtype)[0]
    positives, negative = load_prompts(evaluation, folder, model)
    vae = load_vae(path_in(folder, "vae", evaluation.vae)) if evaluation.vae else None
    task = Task(positives, negative, empty_latent(evaluation, model), evaluation.seed, evaluation.seeds, vae)
    candidate, notes = with_schedule(model, evaluation.schedule, evaluation.steps, evaluation.shift, evaluation.cfg)
    reference = reference_of(model, other, evaluation.reference_cfg, evaluation.reference_steps, evaluation.shift)
    return compare(candidate, reference, task, notes), notes


def load_model(evaluation: Evaluation, folder: Path) -> Any:
    """The model with its experts."""
    model, line = load_file(path_in(folder, "model", evaluation.model), evaluation.weight_dtype)
    logger.info(line)
    experts = {
        side: read_expert_file(path_in(folder, side, getattr(evaluation, side)), side, model, f"{side} is {file}")
        for side in ("semantic", "detail")
        if (file := getattr(evaluation, side))
    }
    if not experts:
        return model
    return attach_experts(
        model,
        **experts,
        semantic_strength=evaluation.semantic_strength,
        detail_strength=evaluation.detail_strength,
        boundary=evaluation.boundary,
        stacked=evaluation.stacked,
    )


def load_prompts(evaluation: Evaluation, folder: Path, model: Any) -> tuple[list[list], list | None]:
    """The prompts, texts first, and the negative. The text encoder is unloaded afterwards."""
    encode = None
    if evaluation.text_encoders:
        encode = caption_encoder(load_clip({"text_encoders": list(evaluation.text_encoders)}, folder, model))
    positives = [encode(prompt) for prompt in evaluation.prompts] if encode else []
    positives += [load_conditioning(path_in(folder, "conditionings", file)) for file in evaluation.conditionings]
    negative = None
    if evaluation.negative.endswith(".safetensors"):
        negative = load_conditioning(path_in(folder, "negative", evaluation.negative))
    elif evaluation.negative and encode:
        negative = encode(evaluation.negative)
    encode = None
    free_memory()
    return positives, negative


def empty_latent(evaluation: Evaluation, model: Any) -> dict[str, torch.Tensor]:
    """An empty video latent of this size."""
    multiple = FORMATS[video_format(model)].multiple
    if evaluation.width % multiple or evaluation.height % multiple:
        raise DCMError(
            f"The size is {evaluation.width} x {evaluation.height}; expected multiples of {multiple} pixels for this model."
        )
    # a patch of the latent has two places a side
    sides = [2 * side // multiple for side in (evaluation.height, evaluation.width)]
    channels = model.get_model_object("latent_format").latent_channels
    return {"samples": torch.zeros(1, channels, (evaluation.frames - 1) // FRAMES + 1, *sides)}


def write_report(report: Report, targets: Sequence[Path]) -> None:
    """Write the JSON and the picture. Each appears under its name only when it is complete."""
    plot_report(report).save(picture := io.BytesIO(), "PNG")
    write_bytes(targets[1], picture.getvalue())
    write_bytes(targets[0], report.to_json().encode())
