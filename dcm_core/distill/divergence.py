"""Stop a run whose losses stay NaN or infinite, or have grown far beyond their lowest value."""

import math
from itertools import takewhile
from statistics import mean

from ..errors import counted
from .checkpoint_file import History
from .config import TrainingConfig, TrainingError

# Steps in a row that may be skipped because their loss is NaN or infinite.
PATIENCE = 5
# Number of steps whose mean loss is compared.
WINDOW = 50
# Skipped steps that a message lists: the newest.
NAMED = 8


def check_losses(history: History, config: TrainingConfig) -> None:
    """Check the losses of a run after a step.

    Raises:
        Stuck: losses or gradients stay NaN or infinite.
        Diverged: the loss has grown `config.divergence`-fold.
    """
    skipped = sum(1 for _ in takewhile(is_skipped, reversed(history)))
    if skipped and skipped % PATIENCE == 0:
        raise Stuck(
            f"The loss was NaN or infinite {PATIENCE} times in a row, up to step {len(history)}. The expert is saved as it was before "
            "these steps. Lower learning_rate or check the dataset for broken clips, then start again to resume."
        )
    if config.divergence and len(history) % WINDOW == 0:
        _check_growth(history, config)


def check_any_made(history: History) -> None:
    """Check a run after its last step.

    Raises:
        TrainingError: every step was skipped, so the expert is as it was at the start.
    """
    if history and all(map(is_skipped, history)):
        raise TrainingError(
            f"Nothing was trained: in all {counted(len(history), 'step')} the loss was NaN or infinite. Lower learning_rate or check the "
            "dataset for broken clips. Then remove the checkpoints and start the run again."
        )


def is_skipped(entry: dict[str, float]) -> bool:
    """Whether the step of this entry changed nothing, as a loss or the gradient is NaN or infinite."""
    return not all(math.isfinite(value) for name, value in entry.items() if name != "held_out")


def skipped_in_words(history: History) -> str:
    """How many steps were skipped, and which; empty for none."""
    steps = [end for end, entry in enumerate(history, start=1) if is_skipped(entry)]
    if not steps:
        return ""
    listed = ", ".join(["...", *map(str, steps[-NAMED:])][len(steps) <= NAMED :])
    return f"{len(steps)} of {counted(len(history), 'step')} skipped, as the loss was NaN or infinite: {listed}."


class Stuck(TrainingError):
    """No step can be made. All processes have the same losses, so all of them raise it."""


class Diverged(TrainingError):
    """The expert has become worse, so it is not saved."""


def best_step(history: History) -> int:
    """The last step of the window with the lowest mean loss; 0 if no window is complete."""
    means = _window_means(history)
    return WINDOW * (1 + _lowest(means)) if means else 0


def _window_means(history: History) -> list[float]:
    losses = [entry["loss"] for entry in history]
    windows = [losses[end - WINDOW : end] for end in range(WINDOW, len(losses) + 1, WINDOW)]
    return [
        mean(finite) if (finite := [loss for loss in window if math.isfinite(loss)]) else math.inf for window in windows
    ]


def _lowest(means: list[float]) -> int:
    return min(range(len(means)), key=means.__getitem__)


def _check_growth(history: History, config: TrainingConfig) -> None:
    means = _window_means(history)
    lowest = _lowest(means)
    step = WINDOW * (1 + lowest)
    if means[-1] > config.divergence * means[lowest]:
        raise Diverged(
            f"Training diverges: the loss has grown {means[-1] / means[lowest]:.0f}-fold since step {step}, to {means[-1]:.3g}. It "
            f"stopped at step {len(history)} without saving. Remove the checkpoints after step {step}, lower learning_rate and queue "
            "again. Without a checkpoint the run starts over."
        )
