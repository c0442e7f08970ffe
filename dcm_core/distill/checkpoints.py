"""The whole state of a run in one safetensors file, so that a resumed run equals one that was never interrupted.

Randomness and the order of the data follow from seed and step; they need no state.
"""

import dataclasses
import json
import logging
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, ExpertError, NoRoomError, counted, name_some
from ..families.keymap import Shape
from ..files.metadata import parse_json
from ..files.storage import TensorFile, write_tensors
from ..files.unfinished import check_room, remove_left
from .config import TrainingConfig, TrainingError

logger = logging.getLogger("ComfyUI-DCM")

FORMAT = "dcm-training"
STATES = "step_*.safetensors"
HISTORY, SCALE = "history", "loss_scale"
NAME = re.compile(r"step_\d{8}\.safetensors")
# AdamW's of each parameter, in its shape.
MOMENTS = ("exp_avg", "exp_avg_sq")

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
            f"{name}: {self.facts.get(name)} -> {facts.get(name)}"
            for name in names
            if self.facts.get(name) != facts.get(name)
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
        return (
            f"Resumed from step {self.steps} of {config.steps}"
            + (f", changed: {'; '.join(changes)}" if changes else "")
            + "."
        )


def optimizer_tensors(
    prefix: str, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    """AdamW's state by the names of its parameters; without a step yet, what the first step begins with."""
    found = {}
    for name, parameter in parameters.items():
        zeros = torch.zeros((), device=parameter.device).expand(parameter.shape)
        state = {"step": torch.zeros(()), **dict.fromkeys(MOMENTS, zeros), **optimizer.state.get(parameter, {})}
        found |= {f"{prefix}.{name}.{key}": value for key, value in state.items()}
    return found


def load_optimizer(prefix: str, names: list[str], optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Give the optimizer its state back."""
    state: dict[int, dict[str, Any]] = {}
    for index, name in enumerate(names):
        start = f"{prefix}.{name}."
        found = {key[len(start) :]: value for key, value in tensors.items() if key.startswith(start)}
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
        remove_left(folder, STATES)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise CheckpointError(
            f"{folder} cannot be written to ({error}). Choose another place for the run's states."
        ) from error
    missing = max(0, count - len(list(saved_states(folder))))
    check_room({folder / STATES: missing * size})


def save_state(folder: Path, saved: SavedState, keep: int, lowest: int = 0) -> Path:
    """Write the state, then remove those before it but the last `keep - 1`, and the newest of the first `lowest` steps.

    Where the disk is full, all but the newest make room first.

    Raises:
        NoRoomError: too little room on the disk; the newest state stays.
        CheckpointError: a file that cannot be written.
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
    except NoRoomError:
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


def newest_state(
    folder: Path, shapes: Mapping[str, Shape] | None = None, weights: bool = True
) -> tuple[Path, SavedState] | None:
    """The newest state that a run could go on from, None without any; one that it could not is passed over for the one before.

    Args:
        shapes: name -> shape of the run's tensors, where they are known.
        weights: read the tensors too.

    Raises:
        TrainingError: there are states, but none that is whole.
    """
    paths = sorted(saved_states(folder), reverse=True)
    for path in paths:
        try:
            return path, read_state(path, shapes, weights)
        except CheckpointError as error:
            logger.warning("%s cannot be used (%s). Trying the checkpoint before it.", path, error)
    if paths:
        raise TrainingError(
            f"No checkpoint in {folder} can be used: {counted(len(paths), 'file')} tried (newest: {paths[0].name}; the log says why). Move "
            "them elsewhere to start over under this name, or choose another name."
        )
    return None


def read_state(path: Path, shapes: Mapping[str, Shape] | None = None, weights: bool = True) -> SavedState:
    """Read a state.

    Args:
        shapes: as for `newest_state`.
        weights: read the tensors too.

    Raises:
        CheckpointError: a damaged or incomplete file, or no training state.
    """
    file = TensorFile(path)
    if file.metadata.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a training checkpoint. Choose the folder of a training run.")
    tensors = file.read_all() if weights else {key: file.read(key) for key in file.shapes.keys() & {HISTORY}}
    try:
        settings = parse_json(file.metadata["config"], "config")
        unknown = sorted(set(dict(settings)) - {field.name for field in dataclasses.fields(TrainingConfig)})
        # version 0.1.0 had the history in the header
        history = tensors.pop(HISTORY).numpy().tobytes() if HISTORY in tensors else file.metadata[HISTORY]
        steps, facts, history = (
            int(file.metadata["steps"]),
            parse_json(file.metadata["facts"], "facts"),
            json.loads(history),
        )
        config = None if unknown else TrainingConfig.from_dict(settings)
    except ExpertError as error:
        raise CheckpointError(f"{path} is a damaged training checkpoint. Its {error}") from error
    except (KeyError, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise _damaged(path, error) from error
    if config is None:
        raise CheckpointError(
            f"{path} is of a newer version: {', '.join(unknown)} is no setting here. Update ComfyUI-DCM."
        )
    problem = _no_facts(facts) or _no_history(history, steps) or _incomplete(file, config)
    if problem := problem or _compared(_shapes_of(file), shapes or _shapes_of(file)):
        raise _damaged(path, problem)
    return SavedState(steps, config, facts, history, tensors)


def _damaged(path: Path, why: Any) -> CheckpointError:
    return CheckpointError(f"{path} is a damaged training checkpoint ({why}). Remove it to resume from the one before.")


def _no_facts(facts: Any) -> str:
    """What is wrong with the facts, empty if nothing is; the same for those below."""
    texts = isinstance(facts, dict) and all(isinstance(fact, str) for fact in facts.values())
    return "" if texts else "its facts are not texts by name"


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
    """Compares the tensors with each other: every trained one needs its optimizer state and, with EMA, its average."""
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
            wanted[f"average.{name}"] = shape
    absent = [part for part in parts if not any(key.startswith(f"{part}.") for key in shapes)]
    whole = [key for key in shapes if not file.dtypes[key].is_floating_point]
    if absent or whole:
        return f"it has no {' and '.join(absent)}" if absent else f"{name_some(whole)} are not floating-point numbers"
    return _compared(shapes, {**wanted, **({SCALE: ()} if SCALE in shapes else {})})


def _compared(found: Mapping[str, Shape], wanted: Mapping[str, Shape]) -> str:
    missing, odd = wanted.keys() - found.keys(), found.keys() - wanted.keys()
    wrong = {name for name in wanted.keys() & found.keys() if tuple(found[name]) != tuple(wanted[name])}
    kinds = ((missing, "missing"), (odd, "unknown"), (wrong, "of another shape"))
    return " and ".join(f"{counted(len(names), 'tensor')} {what}: {name_some(names)}" for names, what in kinds if names)


def _as_tensor(history: History) -> Tensor:
    """The history as JSON in bytes: it grows with the run, a file's header may not."""
    return torch.frombuffer(bytearray(json.dumps(history), "ascii"), dtype=torch.uint8)
