"""Read lists of clips in trainers' formats: .jsonl, .json, .csv, and `videos.txt` beside `captions.txt`."""

import csv
import io
import json
import re
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from ...errors import DCMError, name_some
from .captions import TextError, read_text

SUFFIXES = (".jsonl", ".json", ".csv")
VIDEO_KEYS = ("video", "video_path", "file_name", "file_path", "media_path", "path", "filename", "image", "image_path")
CAPTION_KEYS = ("caption", "text", "prompt", "cap", "captions")
# One path per line. The captions are in the same order in one of the other files beside it.
VIDEO_FILES, CAPTION_FILES = ("videos.txt", "video.txt"), ("captions.txt", "caption.txt", "prompts.txt", "prompt.txt")
# Lists that may be in a folder of clips. The first that exists counts.
IN_FOLDER = ("metadata.jsonl", "metadata.json", "metadata.csv", "captions.json", "videos2caption.json", *VIDEO_FILES)

MAX_BYTES = 16_000_000
MAX_LINES, MAX_ENTRIES, MAX_KEYS = 500_000, 50_000, 1000
MAX_DEPTH, MAX_MARKS = 20, 500_000  # limits for JSON: levels of nesting; brackets and commas
MAX_NAME = 1000  # characters of a path
CONTROL = re.compile("[\x00-\x1f\x7f]")


class Listed(NamedTuple):
    """An entry of a list.

    Attributes:
        video: the path as written in the list.
        caption: empty if there is none.
        fault: why it cannot be used, worded to follow the clip's name.
        more: further captions.
    """

    video: str
    caption: str
    fault: str | None = None
    more: tuple[str, ...] = ()


def is_list(path: Path) -> bool:
    """Whether a file's name is that of a list of clips."""
    return path.suffix.lower() in SUFFIXES or path.name.lower() in VIDEO_FILES


def read_list(path: Path) -> list[Listed]:
    """All entries of a list.

    Raises:
        DCMError: the list cannot be read, or an entry does not name a video.
    """
    try:
        if path.name.lower() in VIDEO_FILES:
            entries = _of_two_files(path)
        elif path.suffix.lower() == ".csv":
            entries = _of_csv(path, _text_of(path))
        else:
            text = _text_of(path)
            whole = path.suffix.lower() == ".json" or text.lstrip().startswith("[")
            entries = _of_json(path, text) if whole else _of_lines(path, text)
        listed = [_listed(f"{path}, {place}", entry) for place, entry in islice(entries, MAX_ENTRIES + 1)]
    except TextError as error:
        raise DCMError(f"{path} {error}") from error
    if len(listed) > MAX_ENTRIES:
        raise DCMError(f"{path} has more than {MAX_ENTRIES:,} entries. Split the list.")
    return listed


def _text_of(path: Path) -> str:
    text = read_text(path, MAX_BYTES)
    if text.count("\n") > MAX_LINES:
        raise TextError(f"has more than {MAX_LINES:,} lines. Split the list.")
    return text


def _of_two_files(path: Path) -> Iterator[tuple[str, Any]]:
    other = next((path.with_name(name) for name in CAPTION_FILES if path.with_name(name).is_file()), None)
    if other is None:
        raise DCMError(
            f"{path} lists videos, but the captions are missing. Write them to captions.txt beside it, one per line."
        )
    # splitlines would also split at other white space, which may be part of a caption
    videos, captions = (_text_of(file).rstrip().split("\n") for file in (path, other))
    if len(videos) != len(captions):
        raise DCMError(
            f"{path} has {len(videos)} lines, but {other.name} has {len(captions)}; expected one caption for each video."
        )
    for number, (video, caption) in enumerate(zip(videos, captions, strict=True), start=1):
        yield f"line {number}", {"video": video, "caption": caption}


def _of_csv(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    header = text.lstrip("\n\r").partition("\n")[0]
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=header.count))
    try:
        keys = next((row for row in rows if any(row)), [])
        for row in rows:
            if any(row):
                yield f"line {rows.line_num}", dict(zip(keys, row, strict=False))
    except csv.Error as error:
        raise DCMError(
            f"{path}, line {rows.line_num} is not CSV ({error}). Put texts with commas in quotes."
        ) from error


def _of_lines(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield f"line {number}", _parsed(f"{path}, line {number}", line, "Write one object per line.")


def _of_json(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    """An array of entries, alone or inside an object, or an object that maps paths to captions."""
    data = _parsed(str(path), text, "If it has one object per line, rename it to .jsonl.")
    arrays = [value for value in data.values() if isinstance(value, list)] if isinstance(data, dict) else []
    if isinstance(data, dict) and _text(data, VIDEO_KEYS):
        data = [data]
    elif len(arrays) == 1 and all(isinstance(entry, dict) for entry in arrays[0]):
        (data,) = arrays
    elif isinstance(data, dict):
        data = (
            {"video": name} | (value if isinstance(value, dict) else {"caption": value}) for name, value in data.items()
        )
    elif not isinstance(data, list):
        raise DCMError(f"{path} is neither a JSON array nor an object; expected entries with a video and a caption.")
    for number, entry in enumerate(data, start=1):
        yield f"entry {number}", entry


def _parsed(where: str, text: str, advice: str) -> Any:
    """Parse a JSON text. Numbers become None, because they are not needed.

    Raises:
        DCMError: it is not JSON, or so large or deeply nested that parsing it may crash the process.
    """
    outside = "".join(text.replace("\\\\", "").replace('\\"', "").split('"')[::2])
    if sum(map(outside.count, "[]{},")) > MAX_MARKS:
        raise DCMError(f"{where} has more than {MAX_MARKS:,} brackets and commas. Check that it is a list of clips.")
    brackets = re.sub(r"[^][{}]+", "", outside)
    for _ in range(MAX_DEPTH):
        brackets = brackets.replace("[]", "").replace("{}", "")
    if brackets:
        raise DCMError(f"{where} is not valid JSON, or nested more than {MAX_DEPTH} deep. {advice}")
    try:
        return json.loads(text, parse_int=_none, parse_float=_none, parse_constant=_none)
    except ValueError as error:
        raise DCMError(f"{where} is not valid JSON ({error}). {advice}") from error


def _none(number: str) -> None:
    return None


def _text(entry: Mapping[Any, Any], keys: tuple[str, ...]) -> str | None:
    """The first of these values that is a text and not empty."""
    return next((value.strip() for key in keys if isinstance(value := entry.get(key), str) and value.strip()), None)


def _listed(where: str, entry: Any) -> Listed:
    if not isinstance(entry, dict):
        raise DCMError(f'{where} is not an object; expected {{"video": "clip.mp4", "caption": "text"}}.')
    if len(entry) > MAX_KEYS:
        raise DCMError(
            f"{where} has {len(entry):,} keys; expected at most {MAX_KEYS:,}. Check that it is a list of clips."
        )
    # headers may be in upper or lower case
    known = {str(key).strip().casefold(): value for key, value in entry.items()}
    found = f"it has {name_some(key[:40] for key in known)}" if known else "it is empty"
    video = _text(known, VIDEO_KEYS)
    if video is None:
        raise DCMError(f"{where} does not name a video: {found}; expected one of {', '.join(VIDEO_KEYS)}.")
    texts = _captions(known)
    fault = None if texts else f"has no caption in the list: {found}; expected one of {', '.join(CAPTION_KEYS)}."
    if len(video) > MAX_NAME or CONTROL.search(video):
        fault = "is not the name of a file. Check the list."
    first, *more = texts or [""]
    return Listed(video, first, fault, tuple(more))


def _captions(entry: Mapping[str, Any]) -> list[str]:
    lists = [value for key in CAPTION_KEYS if isinstance(value := entry.get(key), list)]
    text = _text(entry, CAPTION_KEYS)
    return (
        [text]
        if text
        else [item.strip() for item in (lists[0] if lists else ()) if isinstance(item, str) and item.strip()]
    )
