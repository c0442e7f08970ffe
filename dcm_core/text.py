"""Text from elsewhere (files, names, clients, other programs), made safe to show in terminals, logs and pages."""

import logging
import reprlib
import unicodedata

LOGGER = "ComfyUI-DCM"
NAME_LENGTH, LINE_LENGTH, TEXT_LENGTH = 160, 2000, 20_000
# Control characters, invisible and direction marks, halves of surrogate pairs, line and paragraph separators.
HIDDEN = frozenset(("Cc", "Cf", "Cs", "Zl", "Zp"))


def has_hidden(text: str) -> bool:
    """Whether a character of the text acts on a terminal, cannot be seen, changes the order of others, or cannot be encoded."""
    return not text.isprintable() and any(unicodedata.category(character) in HIDDEN for character in text)


def one_line(text: object, limit: int = NAME_LENGTH) -> str:
    """A name or value from elsewhere in one line: hidden characters become their codes (`\\x1b`), what is too long is cut."""
    # first what may be any long, then what the codes made longer
    return cut(_visible(str(text)[: limit + 1]), limit)


def plain(text: object, limit: int = TEXT_LENGTH) -> str:
    """The same for a text of several lines, which keeps its line ends and tabs."""
    lines = str(text)[: limit + 1].split("\n")
    return cut("\n".join(cut(_visible(line, kept="\t"), LINE_LENGTH) for line in lines), limit)


def given(value: object) -> str:
    """A value as an error quotes it: short, in one line."""
    if isinstance(value, str):
        return f"'{one_line(value)}'"
    try:
        return one_line(reprlib.repr(value))
    except ValueError:
        # Python before 3.12 does not write integers of thousands of digits
        return f"a very long {type(value).__name__}"


def cut(text: str, limit: int) -> str:
    """The first `limit` characters, the last of them an ellipsis where more is left out."""
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
    """A filter for the log: no record writes anything but visible text."""
    record.msg, record.args = plain(record.getMessage()), None
    return True


logging.getLogger(LOGGER).addFilter(log_as_text)
