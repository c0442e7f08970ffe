"""Who looks on while a run works."""

from typing import Protocol

from ..experts import Expert
from .state import History


class Watcher(Protocol):
    """Who is told of a run; what it raises (an interrupt) ends the run after its state is saved."""

    def step(self, history: History, steps: int) -> None:
        """An update of `steps` is made; the losses of all so far."""

    def sample(self, done: int, expert: Expert) -> None:
        """Time for a sample video of the expert as it is."""


class Quiet:
    """A watcher that does nothing."""

    def step(self, history: History, steps: int) -> None:
        """Nobody asks."""

    def sample(self, done: int, expert: Expert) -> None:
        """Nobody looks."""
