"""Make text from files, clients and other programs safe to show in terminals, logs and pages."""

import logging
import reprlib
import unicodedata

LOGGER = "ComfyUI-DCM"
NAME_LENGTH, LINE_LENGTH, TEXT_LENGTH = 160, 2000, 20_000
# Control characters, invisible and direction marks, surrogate halves, line and paragraph separators.
HIDDEN = frozenset(("Cc", "Cf", "Cs", "Zl", "Zp"))


def has_hidden(text: str) -> bool:
    """Whether the text has a character that controls a terminal, is invisible, reorders others, or cannot be encoded."""
    return not text.isprintable() and any(unicodedata.category(character) in HIDDEN for character in text)


def one_line(text: object, limit: int = NAME_LENGTH) -> str:
    """A name or value on one line. Hidden characters become their codes (`\\x1b`), and long text is cut."""
    # cut twice: the input may have any length, and the codes make it longer
    return cut(_visible(str(text)[: limit + 1]), limit)


def plain(text: object, limit: int = TEXT_LENGTH) -> str:
    """The same for text of several lines. Line ends and tabs are kept."""
    lines = str(text)[: limit + 1].split("\n")
    return cut("\n".join(cut(_visible(line, kept="\t"), LINE_LENGTH) for line in lines), limit)


def given(value: object) -> str:
    """A value as an error message quotes it: short and on one line."""
    if isinstance(value, str):
        return f"'{one_line(value)}'"
    try:
        return one_line(reprlib.repr(value))
    except ValueError:
        # Python refuses to print integers of thousands of digits
        return f"a very long {type(value).__name__}"


def cut(text: str, limit: int) -> str:
    """The first `limit` characters. The last is an ellipsis if the text was cut."""
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _visible(text: str, kept: str = "") -> str:
    if not has_hidden(text):
        return text
    return "".join(
        character.encode("unicode_escape").decode()
        if unicodedata.category(character) in HIDDEN and character not in kept
        else character
        for character in text
    )


def log_as_text(record: logging.LogRecord) -> bool:
    """A log filter: every record writes visible text only."""
    record.msg, record.args = plain(record.getMessage()), None
    return True


logging.getLogger(LOGGER).addFilter(log_as_text)
