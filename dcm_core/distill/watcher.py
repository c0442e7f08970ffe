"""Who looks on while a run works."""

from typing import Protocol

from ..experts.expert import Expert
from .checkpoint_file import History


class Watcher(Protocol):
    """Who is told of a run; what it raises (an interrupt) ends the run after its checkpoint is saved."""

    def resumed(self, words: str) -> None:
        """The run continues from a checkpoint, in words."""

    def step(self, history: History, steps: int) -> None:
        """A step of `steps` is made; the losses of all so far."""

    def sample(self, done: int, expert: Expert) -> None:
        """Time for a sample video of the expert as it is."""

    def stopped(self, saved: int, steps: int, error: BaseException) -> None:
        """The run ends before its last step; its newest checkpoint is of step `saved`, 0 for none."""


class Quiet:
    """A watcher that does nothing."""

    def resumed(self, words: str) -> None:
        """Nobody reads."""

    def step(self, history: History, steps: int) -> None:
        """Nobody asks."""

    def sample(self, done: int, expert: Expert) -> None:
        """Nobody looks."""

    def stopped(self, saved: int, steps: int, error: BaseException) -> None:
        """Nobody waits."""
