"""Where clips come from: a folder with its subfolders, or a list; what is found in it and what is not read."""

import hashlib
import json
import os
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from ...errors import DCMError, name_some
from .captions import MAX_CAPTION, TextError, read_text
from .lists import CAPTION_FILES, IN_FOLDER, VIDEO_FILES, Listed, is_list, read_list
from .lists import SUFFIXES as LISTS

SUFFIXES = frozenset({
    ".3g2", ".3gp", ".apng", ".asf", ".avi", ".divx", ".dv", ".f4v", ".flv", ".gif", ".m2t", ".m2ts", ".m2v", ".m4v", ".mkv", ".mov",
    ".mp4", ".mpe", ".mpeg", ".mpg", ".mts", ".mxf", ".ogm", ".ogv", ".ts", ".vob", ".webm", ".wmv", ".y4m",
})  # fmt: skip
BESIDE = ("videos", "video")  # folders beside a list that names files in them
MAX_FILES = 100_000  # in a folder
OUTSIDE = "is outside the folders that this server may read. Move it to the input folder."

Roots = Sequence[Path] | None


@dataclass(frozen=True)
class Clip:
    """A video file and its caption, empty if it has none.

    Attributes:
        fault: why it cannot be used, as words that go on after its name.
        notes: what is worth knowing of it.
    """

    path: Path
    caption: str
    fault: str | None = None
    notes: tuple[str, ...] = ()


class Found(NamedTuple):
    """What a source holds: clips, and in words what is not read."""

    clips: list[Clip]
    others: tuple[str, ...]


def check_source(source: Path, roots: Roots = None) -> None:
    """See that there is a folder with videos, or a list; reads none of them.

    Args:
        roots: resolved folders that everything has to be in; None: anywhere.

    Raises:
        DCMError: no such folder or file, or a folder without clips.
    """
    # these answer False to any name, also to one that no file can have
    if os.path.isdir(source):
        if not any(_is_video(path) or path.name in IN_FOLDER for path in _files(source, roots)):
            raise _no_clips(source)
    elif not (os.path.isfile(source) and is_list(source)):
        what = "is not a list of clips" if os.path.exists(source) else "does not exist"
        raise DCMError(f"{source} {what}; expected a folder of videos, or a list ({', '.join(LISTS)}). Check the path.")


def find_clips(source: Path, roots: Roots = None) -> Found:
    """The clips of a folder and its subfolders by name, each with its caption in a .txt of its name; or those of a list.

    Captions of a folder's clips without a .txt are taken from a list in it, if there is one.

    Args:
        roots: as for `check_source`; clips elsewhere get a fault.

    Raises:
        DCMError: as `check_source`; a list that cannot be read.
    """
    check_source(source, roots)
    found = _in_folder(source, roots) if os.path.isdir(source) else Found(_of_list(source, roots), ())
    if not found.clips:
        raise _no_clips(source)
    return found


def source_state(source: Path, roots: Roots = None) -> str:
    """Changes when the clips change: a hash of names, sizes, times of the last change, and captions. Reads no video.

    Raises:
        DCMError: as `find_clips`.
    """
    digest = hashlib.sha256()
    for clip in find_clips(source, roots).clips:
        found = clip.path.stat() if clip.fault is None and os.path.isfile(clip.path) else None
        state = (str(clip.path), clip.caption, clip.fault, found and (found.st_size, found.st_mtime_ns))
        digest.update(json.dumps(state).encode())
    return digest.hexdigest()


def is_within(path: Path, roots: Roots) -> bool:
    """Whether a file or folder lies in one of the roots, links resolved; says nothing on whether it exists."""
    if roots is None:
        return True
    # on Windows, to resolve \\server\share would be to log in to that server
    if path.drive.lower() not in {root.drive.lower() for root in roots}:
        return False
    try:
        real = Path(os.path.realpath(path))
    except (OSError, ValueError):
        return False
    return any(root == real or root in real.parents for root in roots)


def _no_clips(source: Path) -> DCMError:
    kinds = ", ".join(sorted(SUFFIXES))
    return DCMError(
        f"{source} holds no clips; expected videos ({kinds}), each with a .txt of its name that holds its caption."
    )


def _is_video(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES


def _files(folder: Path, roots: Roots) -> Iterator[Path]:
    """All files in a folder and its subfolders, also behind links, but hidden ones.

    Raises:
        DCMError: too many, or a folder that cannot be read.
    """
    pending, seen, count = deque([folder]), set(), 0
    while pending:
        current = pending.popleft()
        if (real := os.path.realpath(current)) in seen:
            continue
        seen.add(real)
        if not is_within(current, roots):
            yield current  # to be named as what is not read
            continue
        try:
            with os.scandir(current) as found:
                entries = sorted(islice(found, MAX_FILES + 1), key=lambda entry: entry.name)
        except OSError as error:
            raise DCMError(f"{current} cannot be read ({error.strerror}). Check its permissions.") from error
        for entry in entries:
            count += 1
            if count > MAX_FILES:
                raise DCMError(f"{folder} holds more than {MAX_FILES:,} files. Choose the folder of the clips alone.")
            if not entry.name.startswith("."):
                if entry.is_dir():
                    pending.append(Path(entry.path))
                elif entry.is_file():
                    yield Path(entry.path)


def _in_folder(folder: Path, roots: Roots) -> Found:
    files = sorted(_files(folder, roots))
    videos = [path for path in files if _is_video(path)]
    texts = {path.with_suffix(""): path for path in files if path.suffix.lower() == ".txt"}
    beside = {path: texts[path.with_suffix("")] for path in videos if path.with_suffix("") in texts}
    used, listed = {*videos, *beside.values()}, []
    listing = next((folder / name for name in IN_FOLDER if (folder / name) in files), None)
    if listing is not None and (not videos or len(beside) < len(videos)):
        used |= {listing, *(listing.with_name(name) for name in CAPTION_FILES if listing.name in VIDEO_FILES)}
        listed = [clip for clip in _of_list(listing, roots) if clip.path not in beside]
    named = {clip.path for clip in listed}
    clips = [*listed, *(_with_text(path, beside.get(path), roots) for path in videos if path not in named)]
    return Found(
        sorted(clips, key=lambda clip: clip.path), _others(folder, [path for path in files if path not in used])
    )


def _with_text(video: Path, text: Path | None, roots: Roots) -> Clip:
    if not is_within(video, roots):
        return Clip(video, "", OUTSIDE)
    try:
        return Clip(video, "" if text is None else read_text(text, 4 * MAX_CAPTION).strip())
    except TextError as error:
        return Clip(video, "", f"has a caption file that {error}")


def _others(folder: Path, paths: Sequence[Path]) -> tuple[str, ...]:
    """`ignored 4 .jpg files: a.jpg, b.jpg, c.jpg and 1 more`, a line for every kind."""
    kinds: dict[str, list[str]] = {}
    for path in paths:
        kinds.setdefault(path.suffix.lower(), []).append(path.relative_to(folder).as_posix())
    return tuple(
        f"ignored {len(names)} {kind or 'other'} file{'s' * (len(names) != 1)}: {name_some(names)}"
        for kind, names in sorted(kinds.items())
    )


def _of_list(source: Path, roots: Roots) -> list[Clip]:
    return [_located(source.parent, listed, roots) for listed in read_list(source)]


def _located(folder: Path, listed: Listed, roots: Roots) -> Clip:
    """The file that an entry means: its path starts at the list's folder, and may have been written on Windows."""
    names = [listed.video, listed.video.replace("\\", "/")] if os.sep == "/" else [listed.video]
    places = [folder, *(folder / name for name in BESIDE)]
    allowed = [name for name in names if is_within(folder / name, roots)]
    paths = [path for name in allowed for place in places if is_within(path := place / name, roots)]
    path = next((path for path in paths if os.path.isfile(path)), paths[0] if paths else folder / names[0])
    notes = (listed.note,) if listed.note else ()
    return Clip(path, listed.caption, listed.fault or (None if paths else OUTSIDE), notes)
