"""Check video clips with captions, and read them as pixels at one frame rate and size."""

import hashlib
import json
import math
import os
import random
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ...errors import CheckpointError, DCMError, counted
from ...files.tensor_file import Progress
from ...files.unfinished import write_bytes
from .captions import fault_of
from .sources import Clip
from .video_file import NO_TIMES, ClipError, Picture, probe, shown_frames, upright

SIZE_STEP = 16  # the VAE's 8 times the transformer's patch size 2
MAX_ASPECT = 4.0
MAX_ENLARGEMENT = 1.5
STEADY = 0.2  # smaller differences between frame gaps, in medians, are rounding
CHUNK = 1 << 20  # bytes read at once
INFO_VERSION = "1"  # version of the cached video information; a change inspects all files again
WINDOWS = ("start", "middle", "random", "all")
MAX_NAME = 100  # characters of a name to show
# A frame counts as shown this much of a gap early, because files round times, some to milliseconds.
EARLY = 0.25


class Problem(NamedTuple):
    """A clip that was left out, and why."""

    path: Path
    reason: str

    def __str__(self) -> str:
        text = f"{self.path.name[:MAX_NAME]}: {self.reason}"
        # a name may have characters that cannot be shown or logged, or that control a terminal
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


@dataclass(frozen=True)
class ClipSettings:
    """The format that every clip is read in.

    Attributes:
        frames: length, 1 more than a multiple of 4.
        fps: frames per second.
        width, height: size in pixels, multiples of 16.
        buckets: whether to keep each clip near its own aspect ratio, in a size of about the same area.
        window: the part of a longer clip that is used. `all` cuts it into as many clips as it has room for.
        window_seed: seed of `random`, which also depends on the clip's content.
        images: whether images are used too, each as a video of one frame.

    Raises:
        DCMError: a value is out of range.
    """

    frames: int = 81
    fps: float = 16.0
    width: int = 832
    height: int = 480
    buckets: bool = True
    window: str = "start"
    window_seed: int = 0
    images: bool = False

    def __post_init__(self) -> None:
        if self.frames < 1 or self.frames % 4 != 1:
            near = max(0, round((self.frames - 1) / 4)) * 4 + 1
            raise DCMError(f"frames is {self.frames}; expected 1 more than a multiple of 4. Choose {near}.")
        if not 0 < self.fps <= 1000:
            raise DCMError(
                f"fps is {self.fps}; expected more than 0 and at most 1000. Use 16 for Wan 2.1, 24 for HunyuanVideo."
            )
        if self.window not in WINDOWS:
            raise DCMError(f"window is {self.window!r}; choose one of {', '.join(WINDOWS)}.")
        for name, size in (("width", self.width), ("height", self.height)):
            if size < SIZE_STEP or size % SIZE_STEP:
                near = max(1, round(size / SIZE_STEP)) * SIZE_STEP
                raise DCMError(f"{name} is {size}; expected a multiple of {SIZE_STEP}. Choose {near}.")


@dataclass(frozen=True)
class CheckedClip:
    """A clip that can be trained on.

    Attributes:
        width, height: displayed size in pixels, after rotation and with square pixels.
        gap: time from frame to frame in seconds.
        bucket: width and height to read it at.
        content: hash of the file.
        changes: conversions that change its pictures from the stored ones.
        notes: what the user should know, though it is not an error.
        length: frames at the settings' frame rate.
        begin, frames: the first of them to read, and how many.
    """

    clip: Clip
    width: int
    height: int
    gap: float
    bucket: tuple[int, int]
    content: str
    changes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    length: int = 1
    begin: int = 0
    frames: int = 1


@dataclass(frozen=True)
class VideoInfo:
    """What is known about a video file, independent of the settings.

    Attributes:
        content: hash of the file.
        width, height: displayed size in pixels, after rotation and with square pixels.
        duration: seconds from the first frame to the last.
        gap: median of the seconds from frame to frame; 0 if there is one frame.
        jitter: the longest gap minus the shortest, in seconds.
        changes, notes: see `video_file.Look`.
    """

    content: str
    width: int
    height: int
    duration: float
    gap: float
    jitter: float
    changes: tuple[str, ...]
    notes: tuple[str, ...]


def bucket_of(width: int, height: int, settings: ClipSettings) -> tuple[int, int]:
    """The width and height that a clip of this size is read at.

    Without buckets, this is the size in the settings. With buckets, it is the nearest aspect ratio (at most 4 to 1) among
    sizes of about the same area.
    """
    if not settings.buckets:
        return settings.width, settings.height
    own = settings.width // SIZE_STEP, settings.height // SIZE_STEP
    area = own[0] * own[1]
    narrowest, widest = math.ceil(math.sqrt(area / MAX_ASPECT)), math.floor(math.sqrt(area * MAX_ASPECT))
    sizes = [own, *((columns, max(1, round(area / columns))) for columns in range(narrowest, widest + 1))]

    def distance(size: tuple[int, int]) -> tuple[float, float]:
        columns, rows = size
        return abs(math.log(columns / rows * height / width)), abs(columns * rows - area)

    columns, rows = min(sizes, key=distance)
    return columns * SIZE_STEP, rows * SIZE_STEP


def video_info(path: Path, cache: Path | None = None) -> VideoInfo:
    """The information about a file, from the cache if it is there. Otherwise all of the file is read.

    Args:
        cache: folder with information by path, size and modification time.

    Raises:
        ClipError: the file cannot be used.
    """
    known = _known_info(path, cache) if cache is not None else None
    if known is not None:
        with suppress(OSError, ValueError, KeyError, TypeError):
            values = json.loads(known.read_bytes())
            return VideoInfo(**values | {name: tuple(values[name]) for name in ("changes", "notes")})
    info = _inspect_video(path)
    if known is not None:
        with suppress(CheckpointError):  # a damaged entry: the file is inspected again
            write_bytes(known, json.dumps(asdict(info)).encode())
    return info


def _known_info(path: Path, cache: Path) -> Path | None:
    """The cache file for the current version of a video; None if the video cannot be found."""
    try:
        found = path.stat()
    except (OSError, ValueError):
        return None
    state = (INFO_VERSION, os.path.abspath(path), found.st_size, found.st_mtime_ns)
    return cache / f"{hashlib.sha256(json.dumps(state).encode()).hexdigest()}.json"


def _inspect_video(path: Path) -> VideoInfo:
    look = probe(path)
    gaps = [later - earlier for earlier, later in pairwise(look.times)]
    gap = median(gaps) if gaps else 0.0
    if gaps and gap <= 0:
        raise ClipError(path, NO_TIMES)
    # hashed now, while the file is still in the system's cache
    content = content_hash(path)
    jitter = max(gaps) - min(gaps) if gaps else 0.0
    return VideoInfo(content, *look.size, look.times[-1] - look.times[0], gap, jitter, look.changes, look.notes)


def inspect_clip(clip: Clip, settings: ClipSettings, cache: Path | None = None) -> CheckedClip:
    """Check one clip: its captions, its first frame, its length and its size. It is to be read from its start.

    Args:
        cache: see `video_info`.

    Raises:
        ClipError: the clip cannot be used.
    """
    _check_captions(clip)
    if clip.is_image and not settings.images:
        raise ClipError(clip.path, "is an image, not a video. Turn images on, or leave it out.")
    info = video_info(clip.path, cache)
    width, height, gap = info.width, info.height, info.gap or 1 / settings.fps
    frames = math.ceil((info.duration + gap - EARLY * gap) * settings.fps)
    wanted = 1 if clip.is_image else settings.frames
    if frames < wanted:
        raise ClipError(
            clip.path,
            f"lasts {info.duration + gap:.3g} s, which is {counted(frames, 'frame')} at {settings.fps:g} fps; expected {settings.frames}. "
            "Choose fewer frames, or leave the clip out.",
        )
    bucket = bucket_of(width, height, settings)
    enlargement = max(bucket[0] / width, bucket[1] / height)
    if enlargement > MAX_ENLARGEMENT:
        raise ClipError(
            clip.path,
            f"is {width}x{height}, too small for {bucket[0]}x{bucket[1]}. Choose a smaller size, or leave the clip out.",
        )
    possible = {
        "variable frame rate, frames picked by their time": info.jitter > STEADY * gap,
        f"{1 / gap:.3g} fps, so frames repeat at {settings.fps:g} fps": gap * settings.fps > 1 + STEADY,
        f"{width}x{height} enlarged to {bucket[0]}x{bucket[1]}": enlargement > 1,
    }
    notes = (*clip.notes, *info.notes, *(note for note, true in possible.items() if true))
    return CheckedClip(clip, width, height, gap, bucket, info.content, info.changes, notes, frames, frames=wanted)


def windows(checked: CheckedClip, settings: ClipSettings) -> list[CheckedClip]:
    """The parts of a clip that are trained on."""
    spare = checked.length - checked.frames
    begins: dict[str, Callable[[], Iterable[int]]] = {
        "start": lambda: [0],
        "middle": lambda: [spare // 2],
        # a string as seed gives the same numbers on every machine
        "random": lambda: [random.Random(f"window {settings.window_seed} {checked.content}").randint(0, spare)],
        "all": lambda: range(0, spare + 1, checked.frames),
    }
    return [replace(checked, begin=begin) for begin in begins[settings.window]()]


def content_hash(path: Path) -> str:
    """The hash of a file.

    Raises:
        ClipError: the file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
        return digest.hexdigest()
    except OSError as error:
        raise ClipError(path, f"cannot be read ({error.strerror}). Check its permissions.") from error


def _check_captions(clip: Clip) -> None:
    if fault := clip.fault or next(filter(None, map(fault_of, clip.captions)), None):
        raise ClipError(clip.path, fault)
    if not all(clip.captions):
        raise ClipError(clip.path, f"has no caption. Write one to {clip.path.stem}.txt beside it, or use a list.")


def check_clips(
    clips: Sequence[Clip], settings: ClipSettings, progress: Progress | None = None, cache: Path | None = None
) -> tuple[list[CheckedClip], list[Problem]]:
    """Inspect every clip. Returns the windows of the usable ones in order, and the problems of the others.

    Args:
        cache: see `video_info`.

    Raises:
        DCMError: no clip is usable.
    """
    good, problems = [], []
    for done, clip in enumerate(clips, start=1):
        try:
            good += windows(inspect_clip(clip, settings, cache), settings)
        except ClipError as error:
            problems.append(Problem(error.path, error.reason))
        if progress is not None:
            progress(done, len(clips))
    if not good:
        raise no_clip_left(problems)
    return good, problems


def no_clip_left(problems: Sequence[Problem]) -> DCMError:
    """The error if no clip is usable. It shows the first three reasons."""
    more = [f"and {len(problems) - 3} more"] if len(problems) > 3 else []
    return DCMError(
        "\n".join([f"No clip can be used: {counted(len(problems), 'clip')} left out.", *map(str, problems[:3]), *more])
    )


def read_clip(checked: CheckedClip, settings: ClipSettings) -> Tensor:
    """The pixels of the clip's window, scaled to cover its bucket and cropped at the centre.

    Returns:
        float32 (frames, height, width, 3) from 0 to 1. Frame i is the one that is displayed at (begin + i) / fps.

    Raises:
        ClipError: the file is damaged after its first frame. Later frames are first decoded here.
    """
    width, height = checked.bucket
    pixels, filled = torch.empty(checked.frames, height, width, 3), 0
    for picture, until in shown_frames(checked.clip.path, checked.gap):
        image = None
        while filled < checked.frames and (checked.begin + filled) / settings.fps + EARLY * checked.gap < until:
            image = _fitted(picture, checked) if image is None else image
            pixels[filled] = image
            filled += 1
        if filled == checked.frames:
            return pixels
    raise ClipError(
        checked.clip.path, f"ends after {filled} of {counted(checked.frames, 'frame')}. Encode or download it again."
    )


def _fitted(picture: Picture, checked: CheckedClip) -> Tensor:
    """One frame at its bucket's size: (height, width, 3) from 0 to 1."""
    width, height = checked.bucket
    scale = max(width / checked.width, height / checked.height)
    covering = max(height, round(scale * checked.height)), max(width, round(scale * checked.width))
    image = rearrange(upright(picture, checked.clip.path), "h w c -> 1 c h w")
    image = F.interpolate(image, covering, mode="bicubic", antialias=True)[0].clamp(0, 1)
    top, left = (covering[0] - height) // 2, (covering[1] - width) // 2
    return rearrange(image[:, top : top + height, left : left + width], "c h w -> h w c")
