"""The whole state of a run in one safetensors file, so that a resumed run equals one that was never interrupted.

Randomness and the order of the data follow from seed and step; they need no state.
"""

import dataclasses
import json
import logging
import re
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, counted
from ..storage import TensorFile, check_room, unfinished, write_tensors
from .config import TrainingConfig, TrainingError

logger = logging.getLogger("ComfyUI-DCM")

FORMAT = "dcm-training"
STATES = "step_*.safetensors"
HISTORY = "history"
NAME = re.compile(r"step_\d{8}\.safetensors")

History = list[dict[str, float]]


@dataclass(frozen=True)
class SavedState:
    """A saved run: `steps` are done.

    Attributes:
        tensors: everything that the next step depends on, by name.
    """

    steps: int
    config: TrainingConfig
    facts: dict[str, str]
    history: History
    tensors: dict[str, Tensor]

    def check(self, config: TrainingConfig, facts: dict[str, str], path: Path) -> None:
        """Refuse to resume with other settings or data than the run was started with, and what would change nothing.

        Raises:
            TrainingError: names every difference, or fewer steps than were made, or a learning rate that no step is left for.
        """
        found = config.differences(self.config)
        names = {**self.facts, **facts}
        found += [
            f"{name}: {self.facts.get(name)} -> {facts.get(name)}" for name in names if self.facts.get(name) != facts.get(name)
        ]
        if found:
            raise TrainingError(
                f"{path} is a checkpoint of a run with other settings: {'; '.join(found)}. "
                "Set these back to resume the run, or choose another name for a new run."
            )
        if config.steps < self.steps:
            raise TrainingError(
                f"steps is {config.steps}, but the run in {path.parent} is already at step {self.steps}. Set steps to {self.steps} to get "
                "its expert as it is, set it higher to train further, or choose another name for a new run."
            )
        rates = config.new_rates(self.config)
        if config.steps == self.steps and rates:
            raise TrainingError(
                f"The run in {path.parent} is already at step {self.steps} of {self.steps}, so no step is left for {'; '.join(rates)}. "
                "Raise steps to train further at the new rate, set the rate back to get the expert as it is, or choose another name for "
                "a new run."
            )

    def in_words(self, config: TrainingConfig) -> str:
        """What a run with these settings does with the state."""
        if config.steps == self.steps:
            return f"Already at step {self.steps} of {config.steps}: nothing was trained. Raise steps to train further."
        changes = config.changes(self.config)
        return f"Resumed from step {self.steps} of {config.steps}" + (f", changed: {'; '.join(changes)}" if changes else "") + "."


def optimizer_tensors(prefix: str, names: list[str], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state by the names of its parameters."""
    state = optimizer.state_dict()["state"]
    return {
        f"{prefix}.{name}.{key}": torch.as_tensor(value)
        for index, name in enumerate(names)
        for key, value in state.get(index, {}).items()
    }


def load_optimizer(prefix: str, names: list[str], optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Give the optimizer its state back."""
    state: dict[int, dict[str, Any]] = {}
    for index, name in enumerate(names):
        start = f"{prefix}.{name}."
        found = {key[len(start):]: value for key, value in tensors.items() if key.startswith(start)}
        if found:
            state[index] = found
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def check_folder(folder: Path, size: int, count: int) -> None:
    """Make the folder, and see that there is room for as many states of `size` bytes as it will hold at once.

    What a run that was killed while it wrote has left is removed.

    Raises:
        CheckpointError: a folder that cannot be made or written to, or too little room on the disk.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left in unfinished(folder, STATES):
            left.unlink()
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written to ({error}). Choose another place for the run's states.") from error
    missing = max(0, count - len(list(saved_states(folder))))
    check_room({folder / STATES: missing * size})


def save_state(folder: Path, saved: SavedState, keep: int, lowest: int = 0) -> Path:
    """Write the state, then remove those before it but the last `keep - 1`, and the newest of the first `lowest` steps.

    Where the disk is full, all but the newest make room first.

    Raises:
        CheckpointError: too little room on the disk; the newest state stays.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = _path(folder, saved.steps)
    metadata = {
        "format": FORMAT,
        "steps": str(saved.steps),
        "config": saved.config.to_json(),
        "facts": json.dumps(saved.facts),
    }
    tensors = {name: tensor.detach() for name, tensor in saved.tensors.items()}
    tensors[HISTORY] = _as_tensor(saved.history)
    try:
        write_tensors(path, tensors, metadata)
    except CheckpointError:
        spare = _sorted_states(folder, path)[:-1]
        if not spare:
            raise
        _remove(spare)
        write_tensors(path, tensors, metadata)
    before = _sorted_states(folder, path)
    good = [found for found in before if found <= _path(folder, lowest)]
    _remove(found for found in before[:-keep] if found not in good[-1:])
    return path


def _path(folder: Path, steps: int) -> Path:
    return folder / f"step_{steps:08d}.safetensors"


def _sorted_states(folder: Path, path: Path) -> list[Path]:
    """The states up to `path`, oldest first; others are of another run, or damaged."""
    return sorted(found for found in saved_states(folder) if found <= path)


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            # held by another program, such as a backup: it goes with a later state
            logger.warning("%s cannot be removed (%s)", path, error.strerror)


def saved_states(folder: Path) -> Iterator[Path]:
    """The states in a folder."""
    return (path for path in folder.glob(STATES) if NAME.fullmatch(path.name))


def check_state(folder: Path, config: TrainingConfig, facts: dict[str, str]) -> None:
    """Refuse a folder whose newest state the run could not go on from (`SavedState.check`); reads no weights.

    Raises:
        TrainingError: the state of another run, or states that cannot be read.
    """
    found = newest_state(folder, weights=False)
    if found is not None:
        path, saved = found
        saved.check(config, facts, path)


def newest_state(folder: Path, weights: bool = True) -> tuple[Path, SavedState] | None:
    """The newest state that can be read, None without any; a damaged one is passed over for the one before.

    Args:
        weights: read the tensors too.

    Raises:
        TrainingError: there are states, but none can be read.
    """
    paths = sorted(saved_states(folder), reverse=True)
    for path in paths:
        try:
            return path, read_state(path, weights)
        except CheckpointError as error:
            logger.warning("%s cannot be read (%s); trying the state before it", path, error)
    if paths:
        raise TrainingError(
            f"No checkpoint in {folder} can be used: {counted(len(paths), 'file')} tried (newest: {paths[0].name}; the log says why). Move "
            "them elsewhere to start over under this name, or choose another name."
        )
    return None


def read_state(path: Path, weights: bool = True) -> SavedState:
    """Read a state.

    Args:
        weights: read the tensors too.

    Raises:
        CheckpointError: a damaged file, or no training state.
    """
    file = TensorFile(path)
    if file.metadata.get("format") != FORMAT:
        raise CheckpointError(f"{path} holds no training state. Choose the folder of a training run.")
    tensors = file.read_all(None if weights else file.shapes.keys() & {HISTORY})
    try:
        settings = json.loads(file.metadata["config"])
        unknown = sorted(set(settings) - {field.name for field in dataclasses.fields(TrainingConfig)})
        # version 0.1.0 had the history in the header
        history = tensors.pop(HISTORY).numpy().tobytes() if HISTORY in tensors else file.metadata[HISTORY]
        steps, facts, history = int(file.metadata["steps"]), json.loads(file.metadata["facts"]), json.loads(history)
        config = None if unknown else TrainingConfig(**settings)
    except (KeyError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path} is a damaged training state ({error}). Remove it to go on from the one before.") from error
    if config is None:
        raise CheckpointError(f"{path} is of a newer version: {', '.join(unknown)} is no setting here. Update ComfyUI-DCM.")
    return SavedState(steps, config, facts, history, tensors)


def _as_tensor(history: History) -> Tensor:
    """The history as JSON in bytes: it grows with the run, a file's header may not."""
    return torch.frombuffer(bytearray(json.dumps(history), "ascii"), dtype=torch.uint8)
