"""The errors users meet. Every message says what was given, what was expected and how to fix it."""

from collections.abc import Iterable
from typing import Any

from .text import given, one_line, plain


class DCMError(ValueError):
    """Base of all errors raised on purpose by this package. Its message is safe to print, whatever it quotes."""

    def __init__(self, message: object = ""):
        super().__init__(plain(message))


class ScheduleError(DCMError):
    """A sigma list, step count or boundary that cannot be sampled."""


class CheckpointError(DCMError):
    """A file that is not what it has to be: unreadable, incomplete, or of another layout."""


class NoRoomError(CheckpointError):
    """A file that the disk has no room for."""


class ExpertError(DCMError):
    """An expert that does not fit the model it is attached to."""


def name_some(names: Iterable[str], limit: int = 3) -> str:
    """`a, b, c and 4 more`: enough names to recognise the problem, few enough to read."""
    names = sorted(names)
    shown = ", ".join(map(one_line, names[:limit]))
    return f"{shown} and {len(names) - limit} more" if len(names) > limit else shown


def check_choice(setting: str, value: Any, choices: Iterable[str], error: type[DCMError] = DCMError) -> str:
    """The value if it is one of the choices: not every host checks what its clients send.

    Raises:
        DCMError: of the given class.
    """
    choices = list(choices)
    # a list, as what cannot be hashed may be looked up in it
    if value not in choices:
        listed = ", ".join(map(given, choices) if any("," in choice for choice in choices) else choices)
        raise error(f"{setting} is {given(value)}; choose one of {listed}.")
    return value


def counted(number: int, noun: str, plural: str = "") -> str:
    """`1 step`, `2 steps`, `0 entries`: a number with the form of its noun; `plural` where that is not the noun with an s."""
    return f"{number} {noun if number == 1 else plural or f'{noun}s'}"
