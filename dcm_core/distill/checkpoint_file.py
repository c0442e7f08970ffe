"""A training checkpoint in one safetensors file. A resumed run equals one that was never interrupted.

Randomness and the order of the data follow from seed and step, so they are not stored.
"""

import dataclasses
import json
from collections import Counter
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
from ..files.tensor_file import MAX_HEADER, TensorFile
from ..files.writing import write_tensors
from .config import FORMER, TrainingConfig, TrainingError, renamed
from .learner import MOMENTS_8BIT, learning_rate_at, state_shapes

FORMAT = "dcm-training"
# Version of the order of clips (`BatchOrder`) in a checkpoint. Those without one have the first.
ORDER, FIRST_ORDER = "2", "1"
# What a resumed run may have changed, by its name in `Checkpoint.identity`.
DATA, CLIPS, PROCESSES = "data", "clips", "processes"
ACCUMULATION = "gradient_accumulation_steps"
# prefixes of names in the file
HISTORY, LOSS_SCALE_NAME, EMA = "history", "loss_scale", "average"

History = list[dict[str, float]]


@dataclass(frozen=True)
class Checkpoint:
    """A run after `steps` steps.

    Attributes:
        identity: what else the run depends on, by name: the dataset's fingerprint, the ids of its clips, the model, the number of
            processes.
        tensors: everything that the next step depends on, by name.
        order: version of the order of clips.
    """

    steps: int
    config: TrainingConfig
    identity: dict[str, str]
    history: History
    tensors: dict[str, Tensor]
    order: str = ORDER

    def check(self, config: TrainingConfig, identity: dict[str, str], path: Path) -> None:
        """Refuse to resume with other settings or data than the run was started with, or if it would change nothing.

        Clips may have been added or removed, and the number of processes may be another: see `in_words`.

        Raises:
            TrainingError: settings differ, or all clips, `steps` is less than the steps done, or a new learning rate has no steps left.
        """
        found = config.differences(self.config)
        if self._turns(identity, config) == self._turns():
            # the same batches, made by more processes or by fewer
            found = [words for words in found if not words.startswith(f"{ACCUMULATION}: ")]
        names = [name for name in {**self.identity, **identity} if name not in (CLIPS, PROCESSES)]
        found += [
            f"{name}: {self.identity.get(name)} -> {identity.get(name)}"
            for name in names
            if self.identity.get(name) != identity.get(name) and not (name == DATA and self._kept(identity))
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

    def in_words(self, config: TrainingConfig, identity: dict[str, str]) -> str:
        """What a run with these settings and this data does with the checkpoint, as text."""
        if config.steps == self.steps:
            return f"Already at step {self.steps} of {config.steps}: nothing was trained. Raise steps to train further."
        changes = config.changes(self.config)
        resumed = f"Resumed from step {self.steps} of {config.steps}"
        resumed += f", changed: {'; '.join(changes)}." if changes else "."
        other = [self._data_in_words(config, identity), self._processes_in_words(config, identity)]
        return " ".join(filter(None, [resumed, *other, self._order_in_words(), self._rate_in_words(config)]))

    def _kept(self, identity: dict[str, str]) -> set[str]:
        """The ids of the clips that this data also has."""
        return set(self.identity.get(CLIPS, "").split()) & set(identity.get(CLIPS, "").split())

    def _turns(self, identity: dict[str, str] | None = None, config: TrainingConfig | None = None) -> int:
        """Batches of all processes in a step."""
        processes = int((self.identity if identity is None else identity).get(PROCESSES, "1"))
        return processes * (config or self.config).gradient_accumulation_steps

    def _data_in_words(self, config: TrainingConfig, identity: dict[str, str]) -> str:
        if self.identity.get(DATA) == identity.get(DATA):
            return ""
        before, now = (Counter(values[CLIPS].split()) for values in (self.identity, identity))
        counts = {"added": (now - before).total(), "removed": (before - now).total()}
        changed = ", ".join(f"{counted(count, 'clip')} {what}" for what, count in counts.items() if count)
        held_out = " Other clips are held out, so the held-out loss cannot be compared with before." * bool(
            config.held_out
        )
        return (
            f"Resumed with other data ({changed or 'clips in another order'}): weights and optimizer are kept, but the clips "
            f"come in another order.{held_out}"
        )

    def _processes_in_words(self, config: TrainingConfig, identity: dict[str, str]) -> str:
        before, now = self.identity.get(PROCESSES, "1"), identity.get(PROCESSES, "1")
        if before == now:
            return ""
        turns, turns_now = self._turns(), self._turns(identity, config)
        what = (
            "each step has the same clips as before"
            if turns == turns_now
            else f"weights and optimizer are kept, but a step has {counted(turns_now * config.batch_size, 'clip')} instead of "
            f"{turns * config.batch_size}. Set gradient_accumulation_steps to keep their number"
        )
        return f"Resumed with {counted(int(now), 'process', 'processes')} instead of {before}: {what}."

    def _order_in_words(self) -> str:
        alone = self.config.batch_size == 1 and self.identity.get(PROCESSES, "1") == "1"
        return (
            ""
            if self.order == ORDER or alone
            else "An earlier version began the run: the clips may come in another order."
        )

    def _rate_in_words(self, config: TrainingConfig) -> str:
        """A warning if more steps make the rate of a cosine schedule rise."""
        before, planned, now = (
            learning_rate_at(step, settings)
            for step, settings in ((self.steps - 1, self.config), (self.steps, self.config), (self.steps, config))
        )
        falling = planned < before
        if config.scheduler != "cosine" or config.steps == self.config.steps or not falling or now <= before:
            return ""
        return (
            f"The learning rate goes back up from {before:.3g} to {now:.3g}, as the cosine schedule now has "
            f"{counted(config.steps, 'step')} instead of {self.config.steps}. Set a lower learning_rate to avoid this."
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
        "order": checkpoint.order,
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
            parse_json(file.metadata["facts"], "metadata entry 'facts'", MAX_HEADER),
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
    return Checkpoint(steps, config, identity, history, tensors, file.metadata.get("order", FIRST_ORDER))


def _damaged(path: Path, why: Any) -> CheckpointError:
    return CheckpointError(f"{path} is a damaged training checkpoint ({why}). Remove it to resume from the one before.")


def _no_identity(identity: Any) -> str:
    """What is wrong with it; empty if nothing is. The functions after this one return the same."""
    texts = isinstance(identity, dict) and all(isinstance(value, str) for value in identity.values())
    if not texts:
        return "its identity is not a table of texts by name"
    return "" if identity.get(PROCESSES, "1").isdecimal() else "its number of processes is not a number"


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
            state = state_shapes(config.optimizer, shape)
            wanted |= {key: shape, **{f"{part}_optimizer.{name}.{entry}": size for entry, size in state.items()}}
        if part == "expert" and config.ema_decay:
            wanted[f"{EMA}.{name}"] = shape
    absent = [part for part in parts if not any(key.startswith(f"{part}.") for key in shapes)]
    codes = tuple(f".{moment}" for moment in MOMENTS_8BIT) if config.optimizer == "adamw8bit" else ()
    whole = [key for key in shapes if not file.dtypes[key].is_floating_point and not key.endswith(codes)]
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
