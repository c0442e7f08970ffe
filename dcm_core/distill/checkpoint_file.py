"""A training checkpoint in one safetensors file. A resumed run equals one that was never interrupted.

Randomness and the order of the data follow from seed and step, so they are not stored.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, ExpertError, counted, name_some
from ..families.keymap import Shape
from ..files.mapped import views
from ..files.metadata import parse_json
from ..files.tensor_file import TensorFile
from ..files.writing import write_tensors
from .config import FORMER, TrainingConfig, TrainingError, renamed
from .learner import MOMENTS

FORMAT = "dcm-training"
# prefixes of names in the file
HISTORY, LOSS_SCALE_NAME, EMA = "history", "loss_scale", "average"

History = list[dict[str, float]]


@dataclass(frozen=True)
class Checkpoint:
    """A run after `steps` steps.

    Attributes:
        identity: what a resumed run must share besides its settings, by name (the dataset's fingerprint, the model).
        tensors: everything that the next step depends on, by name.
    """

    steps: int
    config: TrainingConfig
    identity: dict[str, str]
    history: History
    tensors: dict[str, Tensor]

    def check(self, config: TrainingConfig, identity: dict[str, str], path: Path) -> None:
        """Refuse to resume with other settings or data than the run was started with, or if it would change nothing.

        Raises:
            TrainingError: settings or data differ, `steps` is less than the steps done, or a new learning rate has no steps left.
        """
        found = config.differences(self.config)
        names = {**self.identity, **identity}
        found += [
            f"{name}: {self.identity.get(name)} -> {identity.get(name)}"
            for name in names
            if self.identity.get(name) != identity.get(name)
        ]
        if found:
            raise TrainingError(
                f"{path} is a checkpoint of a run with other settings: {'; '.join(found)}. "
                "Set these back to resume the run, or choose another name for a new run."
            )
        if config.steps < self.steps:
            raise TrainingError(
                f"steps is {config.steps}, but the run in {path.parent} is already at step {self.steps}. Set steps to {self.steps} to get "
                "its expert unchanged, set it higher to train further, or choose another name for a new run."
            )
        rates = config.new_rates(self.config)
        if config.steps == self.steps and rates:
            raise TrainingError(
                f"The run in {path.parent} is already at step {self.steps} of {self.steps}, so no step is left for {'; '.join(rates)}. "
                "Raise steps to train further at the new rate, or set the rate back to get the expert unchanged. For a new run, choose "
                "another name."
            )

    def in_words(self, config: TrainingConfig) -> str:
        """What a run with these settings does with the checkpoint, as text."""
        if config.steps == self.steps:
            return f"Already at step {self.steps} of {config.steps}: nothing was trained. Raise steps to train further."
        changes = config.changes(self.config)
        return (
            f"Resumed from step {self.steps} of {config.steps}"
            + (f", changed: {'; '.join(changes)}" if changes else "")
            + "."
        )


def write_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint.

    Raises:
        NoRoomError: there is not enough room on the disk.
        CheckpointError: the file cannot be written.
    """
    metadata = {
        "format": FORMAT,
        "steps": str(checkpoint.steps),
        "config": checkpoint.config.to_json(),
        "facts": json.dumps(checkpoint.identity),
    }
    tensors = {name: tensor.detach() for name, tensor in checkpoint.tensors.items()}
    write_tensors(path, {**tensors, HISTORY: _as_tensor(checkpoint.history)}, metadata)


def read_checkpoint(path: Path, shapes: Mapping[str, Shape] | None = None, weights: bool = True) -> Checkpoint:
    """Read a checkpoint.

    Args:
        shapes: name -> shape of the run's tensors, if known.
        weights: whether to read the tensors too. They are views of the file, to be copied.

    Raises:
        CheckpointError: the file is damaged, incomplete, or not a training checkpoint.
    """
    file = TensorFile(path)
    if file.metadata.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a training checkpoint. Choose the folder of a training run.")
    if weights:
        file.verify()
    # several processes on one machine read it at once, so it is mapped
    tensors = views(file) if weights else {key: file.read(key) for key in file.shapes.keys() & {HISTORY}}
    try:
        settings = renamed(dict(parse_json(file.metadata["config"], "metadata entry 'config'")), FORMER)
        unknown = sorted(set(settings) - {field.name for field in dataclasses.fields(TrainingConfig)})
        # version 0.1.0 stored the history in the header
        history = tensors.pop(HISTORY).numpy().tobytes() if HISTORY in tensors else file.metadata[HISTORY]
        steps, identity, history = (
            int(file.metadata["steps"]),
            parse_json(file.metadata["facts"], "metadata entry 'facts'"),
            json.loads(history),
        )
        config = None if unknown else TrainingConfig.from_dict(settings)
    except ExpertError as error:
        raise CheckpointError(f"{path} is a damaged training checkpoint. Its {error}") from error
    except (KeyError, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise _damaged(path, error) from error
    if config is None:
        raise CheckpointError(
            f"{path} was written by a newer version. This version does not know {', '.join(unknown)}. Update ComfyUI-DCM."
        )
    problem = _no_identity(identity) or _no_history(history, steps) or _incomplete(file, config)
    if problem := problem or _compared(_shapes_of(file), shapes or _shapes_of(file)):
        raise _damaged(path, problem)
    return Checkpoint(steps, config, identity, history, tensors)


def _damaged(path: Path, why: Any) -> CheckpointError:
    return CheckpointError(f"{path} is a damaged training checkpoint ({why}). Remove it to resume from the one before.")


def _no_identity(identity: Any) -> str:
    """What is wrong with it; empty if nothing is. The functions after this one return the same."""
    texts = isinstance(identity, dict) and all(isinstance(value, str) for value in identity.values())
    return "" if texts else "its identity is not a table of texts by name"


def _no_history(history: Any, steps: int) -> str:
    if not isinstance(history, list) or len(history) != steps:
        return f"its history does not have an entry for each step up to {steps}"
    for entry in history:
        if not (isinstance(entry, dict) and all(type(value) in (int, float) for value in entry.values())):
            return "its history has entries that are not numbers"
    return ""


def _shapes_of(file: TensorFile) -> dict[str, Shape]:
    return {key: shape for key, shape in file.shapes.items() if key != HISTORY}


def _incomplete(file: TensorFile, config: TrainingConfig) -> str:
    """Compare the tensors with each other: every trained one needs its optimizer state and, with EMA, its average."""
    shapes = _shapes_of(file)
    parts = ("expert", "discriminator") if config.adversarial else ("expert",)
    wanted: dict[str, Shape] = {}
    for key, shape in shapes.items():
        part, _, name = key.partition(".")
        if part in parts:
            wanted |= {
                key: shape,
                f"{part}_optimizer.{name}.step": (),
                **{f"{part}_optimizer.{name}.{m}": shape for m in MOMENTS},
            }
        if part == "expert" and config.ema_decay:
            wanted[f"{EMA}.{name}"] = shape
    absent = [part for part in parts if not any(key.startswith(f"{part}.") for key in shapes)]
    whole = [key for key in shapes if not file.dtypes[key].is_floating_point]
    if absent or whole:
        return f"it has no {' and '.join(absent)}" if absent else f"{name_some(whole)} are not floating-point numbers"
    return _compared(shapes, {**wanted, **({LOSS_SCALE_NAME: ()} if LOSS_SCALE_NAME in shapes else {})})


def _compared(found: Mapping[str, Shape], wanted: Mapping[str, Shape]) -> str:
    missing, odd = wanted.keys() - found.keys(), found.keys() - wanted.keys()
    wrong = {name for name in wanted.keys() & found.keys() if tuple(found[name]) != tuple(wanted[name])}
    kinds = ((missing, "missing"), (odd, "unknown"), (wrong, "of another shape"))
    return " and ".join(f"{counted(len(names), 'tensor')} {what}: {name_some(names)}" for names, what in kinds if names)


def _as_tensor(history: History) -> Tensor:
    """The history as JSON in bytes. It grows with the run, so the header is not the place for it."""
    return torch.frombuffer(bytearray(json.dumps(history), "ascii"), dtype=torch.uint8)
