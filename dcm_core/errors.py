"""The errors users see. Every message says what is wrong, what was expected and how to fix it."""

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
    """A file that is unreadable, incomplete, or in an unexpected layout."""


class NoRoomError(CheckpointError):
    """There is not enough room on the disk for a file."""


class ExpertError(DCMError):
    """An expert that does not fit the model it is attached to."""


def name_some(names: Iterable[str], limit: int = 3) -> str:
    """`a, b, c and 4 more`: enough names to recognise the problem, few enough to read."""
    names = sorted(names)
    shown = ", ".join(map(one_line, names[:limit]))
    return f"{shown} and {len(names) - limit} more" if len(names) > limit else shown


def check_choice(setting: str, value: Any, choices: Iterable[str], error: type[DCMError] = DCMError) -> str:
    """Return the value if it is one of the choices. Not every host checks what its clients send.

    Raises:
        DCMError: the value is not one of them; raised as the class `error`.
    """
    choices = list(choices)
    # a list, so that unhashable values can be looked up too
    if value not in choices:
        listed = ", ".join(map(given, choices) if any("," in choice for choice in choices) else choices)
        raise error(f"{setting} is {given(value)}; choose one of {listed}.")
    return value


def counted(number: int, noun: str, plural: str = "") -> str:
    """`1 step`, `2 steps`, `0 entries`: a number with its noun. `plural` is only needed where adding an s is wrong."""
    return f"{number} {noun if number == 1 else plural or f'{noun}s'}"
