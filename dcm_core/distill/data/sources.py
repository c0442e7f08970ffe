"""Find clips in a folder with its subfolders, or in a list, and say which files are ignored."""

import hashlib
import json
import os
import re
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
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
IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
BESIDE = ("videos", "video")  # folders beside a list that may contain its files
NUMBERED = re.compile(r"(.+)\.(\d{1,6})")  # the name of a further caption's file without .txt
MAX_FILES = 100_000  # in a folder
OUTSIDE = "is outside the folders that this server may read. Move it to the input folder."

Roots = Sequence[Path] | None


@dataclass(frozen=True)
class Clip:
    """A video or image file and its caption, empty if it has none.

    Attributes:
        more: further captions.
        fault: why it cannot be used, worded to follow its name.
        notes: what the user should know about it.
    """

    path: Path
    caption: str
    fault: str | None = None
    notes: tuple[str, ...] = ()
    more: tuple[str, ...] = ()

    @property
    def captions(self) -> tuple[str, ...]:
        return self.caption, *self.more

    @property
    def is_image(self) -> bool:
        return self.path.suffix.lower() in IMAGE_SUFFIXES


class Found(NamedTuple):
    """What a source contains: clips, and ignored files as lines of text."""

    clips: list[Clip]
    others: tuple[str, ...]


def check_source(source: Path, roots: Roots = None, images: bool = False) -> None:
    """Check that there is a folder with videos, or a list. None of them is read.

    Args:
        roots: resolved folders that everything has to be in; None allows any place.
        images: whether images are clips, too.

    Raises:
        DCMError: the folder or file does not exist, or the folder has no clips.
    """
    # these functions return False for any name, even for one that no file can have
    if os.path.isdir(source):
        if not any(_is_clip(path, images) or path.name in IN_FOLDER for path in _files(source, roots)):
            raise _no_clips(source)
    elif not (os.path.isfile(source) and is_list(source)):
        what = "is not a list of clips" if os.path.exists(source) else "does not exist"
        raise DCMError(f"{source} {what}; expected a folder of videos, or a list ({', '.join(LISTS)}). Check the path.")


def find_clips(source: Path, roots: Roots = None, images: bool = False) -> Found:
    """The clips of a folder and its subfolders, sorted by name, or those of a list.

    In a folder, the caption of a clip is in a .txt file of the same name, else in a list in the folder. Further captions of
    `cat.mp4` are in `cat.2.txt`, `cat.3.txt` and so on. An image with the name of a video is a picture of it, and is ignored.

    Args:
        roots: see `check_source`. Clips in other places get a fault.
        images: see `check_source`. An image in a list is a clip in any case; without `images` it is refused later.

    Raises:
        DCMError: as for `check_source`, or a list cannot be read.
    """
    check_source(source, roots, images)
    found = _in_folder(source, roots, images) if os.path.isdir(source) else Found(_of_list(source, roots), ())
    if not found.clips:
        raise _no_clips(source)
    return found


def source_state(source: Path, roots: Roots = None, images: bool = False) -> str:
    """A hash of names, sizes, modification times and captions. It changes when the clips change. No video is read.

    Raises:
        DCMError: as for `find_clips`.
    """
    digest = hashlib.sha256()
    for clip in find_clips(source, roots, images).clips:
        found = clip.path.stat() if clip.fault is None and os.path.isfile(clip.path) else None
        state = (str(clip.path), clip.captions, clip.fault, found and (found.st_size, found.st_mtime_ns))
        digest.update(json.dumps(state).encode())
    return digest.hexdigest()


def is_within(path: Path, roots: Roots) -> bool:
    """Whether a path is inside one of the roots, with links resolved. The path does not need to exist."""
    if roots is None:
        return True
    # on Windows, resolving \\server\share would log in to that server
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
        f"{source} has no clips; expected videos ({kinds}), each with its caption in a .txt file of the same name."
    )


def _is_clip(path: Path, images: bool) -> bool:
    return path.suffix.lower() in (SUFFIXES | IMAGE_SUFFIXES if images else SUFFIXES)


def _files(folder: Path, roots: Roots) -> Iterator[Path]:
    """All files in a folder and its subfolders except hidden ones. Links are followed.

    Raises:
        DCMError: there are too many, or a folder cannot be read.
    """
    pending, seen, count = deque([folder]), set(), 0
    while pending:
        current = pending.popleft()
        if (real := os.path.realpath(current)) in seen:
            continue
        seen.add(real)
        if not is_within(current, roots):
            yield current  # it is reported as ignored
            continue
        try:
            with os.scandir(current) as found:
                entries = sorted(islice(found, MAX_FILES + 1), key=lambda entry: entry.name)
        except OSError as error:
            raise DCMError(f"{current} cannot be read ({error.strerror}). Check its permissions.") from error
        for entry in entries:
            count += 1
            if count > MAX_FILES:
                raise DCMError(f"{folder} has more than {MAX_FILES:,} files. Choose a folder with only the clips.")
            if not entry.name.startswith("."):
                if entry.is_dir():
                    pending.append(Path(entry.path))
                elif entry.is_file():
                    yield Path(entry.path)


def _in_folder(folder: Path, roots: Roots, images: bool) -> Found:
    files = sorted(_files(folder, roots))
    videos = [path for path in files if _is_clip(path, images=False)]
    names = {path.with_suffix("") for path in videos}
    if images:
        pictures = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
        videos += [path for path in pictures if path.with_suffix("") not in names]
    texts = _texts(files, {path.with_suffix("") for path in videos})
    beside = {path: texts[path.with_suffix("")] for path in videos if path.with_suffix("") in texts}
    used, listed = {*videos, *chain.from_iterable(beside.values())}, []
    listing = next((folder / name for name in IN_FOLDER if (folder / name) in files), None)
    if listing is not None and (not videos or len(beside) < len(videos)):
        used |= {listing, *(listing.with_name(name) for name in CAPTION_FILES if listing.name in VIDEO_FILES)}
        listed = [clip for clip in _of_list(listing, roots) if clip.path not in beside]
    named = {clip.path for clip in listed}
    clips = [*listed, *(_with_text(path, beside.get(path, ()), roots) for path in videos if path not in named)]
    return Found(
        sorted(clips, key=lambda clip: clip.path), _others(folder, [path for path in files if path not in used])
    )


def _texts(files: Sequence[Path], clips: Collection[Path]) -> dict[Path, list[Path]]:
    """Path of a clip without its suffix -> its .txt files in order: `cat.txt`, `cat.2.txt`, `cat.3.txt`."""
    numbered: dict[Path, list[tuple[int, Path]]] = {}
    for path in files:
        if path.suffix.lower() == ".txt":
            clip, number = path.with_suffix(""), NUMBERED.fullmatch(path.stem)
            # `cat.2.mp4` is a clip of its own
            if clip not in clips and number and (clip_of := clip.with_name(number[1])) in clips:
                numbered.setdefault(clip_of, []).append((int(number[2]), path))
            else:
                numbered.setdefault(clip, []).append((0, path))
    return {clip: [path for _, path in sorted(texts)] for clip, texts in numbered.items()}


def _with_text(video: Path, texts: Sequence[Path], roots: Roots) -> Clip:
    if not is_within(video, roots):
        return Clip(video, "", OUTSIDE)
    try:
        first, *more = [read_text(text, 4 * MAX_CAPTION).strip() for text in texts] or [""]
        return Clip(video, first, more=tuple(more))
    except TextError as error:
        return Clip(video, "", f"has a caption file that {error}")


def _others(folder: Path, paths: Sequence[Path]) -> tuple[str, ...]:
    """`ignored 4 .jpg files: a.jpg, b.jpg, c.jpg and 1 more`, one line for each kind."""
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
    """The clip for an entry. Its path is relative to the list's folder, and may use backslashes."""
    names = [listed.video, listed.video.replace("\\", "/")] if os.sep == "/" else [listed.video]
    places = [folder, *(folder / name for name in BESIDE)]
    allowed = [name for name in names if is_within(folder / name, roots)]
    paths = [path for name in allowed for place in places if is_within(path := place / name, roots)]
    path = next((path for path in paths if os.path.isfile(path)), paths[0] if paths else folder / names[0])
    return Clip(path, listed.caption, listed.fault or (None if paths else OUTSIDE), more=listed.more)
