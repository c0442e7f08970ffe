"""Read captions and other text files as UTF-8, and check that captions can be trained on."""

import re
import unicodedata
from pathlib import Path

from ...errors import DCMError

MAX_CAPTION = 100_000  # characters
UTF16 = (b"\xff\xfe", b"\xfe\xff")
NOT_TEXT = re.compile("[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f]")  # control characters other than white space
NOT_UTF8 = re.compile("[\ufffd\ud800-\udfff]")
BLANK = frozenset("\u115f\u1160\u2800\u3164\uffa0")  # letters and symbols that are invisible


class TextError(DCMError):
    """A text file cannot be used. The message is put after the file's name."""


def read_text(path: Path, limit: int) -> str:
    """The text of a UTF-8 file.

    Args:
        limit: largest size in bytes.

    Raises:
        TextError: the file has another encoding, is too large, or cannot be read.
    """
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise TextError(f"cannot be read ({error.strerror}). Check its permissions.") from error
    if len(data) > limit:
        raise TextError(f"is larger than {limit / 1e6:g} MB. Check that it is the right file.")
    if data.startswith(UTF16) or b"\0" in data:
        raise TextError("is UTF-16, or not a text file. Save it as UTF-8.")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise TextError("is not UTF-8. Save it as UTF-8.") from error


def fault_of(caption: str) -> str | None:
    """Why a caption cannot be trained on, worded to follow the clip's name; None if it can.

    An empty caption counts as missing and is checked elsewhere.
    """
    if len(caption) > MAX_CAPTION:
        return f"has a caption of {len(caption):,} characters; expected at most {MAX_CAPTION:,}. Shorten it."
    if NOT_UTF8.search(caption):
        return "has a caption that is not UTF-8. Save the text as UTF-8."
    if NOT_TEXT.search(caption):
        return "has a caption with control characters. Write it again as plain text, saved as UTF-8."
    if caption and not any(map(_is_visible, caption)):
        return "has a caption of invisible characters only. Write a caption."
    return None


def _is_visible(character: str) -> bool:
    return unicodedata.category(character)[0] in "LNPS" and character not in BLANK
