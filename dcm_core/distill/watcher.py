"""The interface of a run's observer."""

from typing import Protocol

from torch import Tensor

from ..experts.expert import Expert
from .checkpoint_file import History


class Watcher(Protocol):
    """Observes a run. An exception that it raises (an interrupt) ends the run after a checkpoint is saved."""

    def resumed(self, words: str) -> None:
        """The run was resumed from a checkpoint, described in `words`."""

    def skipped(self, words: str) -> None:
        """A step was skipped. `words` say why, and which clips were in it."""

    def step(self, history: History, steps: int) -> None:
        """One of `steps` steps is done. `history` has the losses of all steps so far."""

    def sample(self, done: int, expert: Expert) -> None:
        """It is time for a sample video of the current expert."""

    def sampled(self, done: int, latents: list[Tensor]) -> None:
        """Sample videos of the current expert were made: (1, channels, frames, height, width), as the transformer takes them."""

    def stopped(self, saved: int, steps: int, error: BaseException) -> None:
        """The run ends before its last step. Its newest checkpoint is of step `saved`; 0 means none."""


class Quiet:
    """A watcher that does nothing."""

    def resumed(self, words: str) -> None:
        """Do nothing."""

    def skipped(self, words: str) -> None:
        """Do nothing."""

    def step(self, history: History, steps: int) -> None:
        """Do nothing."""

    def sample(self, done: int, expert: Expert) -> None:
        """Do nothing."""

    def sampled(self, done: int, latents: list[Tensor]) -> None:
        """Do nothing."""

    def stopped(self, saved: int, steps: int, error: BaseException) -> None:
        """Do nothing."""
