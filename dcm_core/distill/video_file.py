"""One video file: its frames, the times they are shown at, and their size as shown."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import av
import torch
from av.video.reformatter import ColorRange, Colorspace
from torch import Tensor

from ..errors import DCMError

UNSPECIFIED = 2  # ffmpeg's number of no matrix
NO_TIMES = "has frames without times, or with times that run backwards. Encode it again, for example as .mp4."


class ClipError(DCMError):
    """A clip that cannot be trained on: `path` is the file, `reason` what is wrong with it and what helps."""

    def __init__(self, path: Path, reason: str):
        super().__init__(f"{path}: {reason}")
        self.path, self.reason = path, reason


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """The container and its first video stream; whatever is wrong with the file becomes a ClipError."""
    if not path.is_file():
        raise ClipError(path, "does not exist. Check the name.")
    try:
        # titles and the like in an old encoding are no reason to refuse a file
        with av.open(os.fspath(path), metadata_errors="ignore") as container:
            if not container.streams.video:
                raise ClipError(path, "holds no video. Leave it out, or give the file with the pictures.")
            stream = container.streams.video[0]
            if stream.codec_context is None:
                raise ClipError(path, "is in a format that cannot be decoded here. Encode it again, for example as .mp4.")
            # a decoder's thread that reports an error waits for Python, which waits for it when the file is closed
            stream.codec_context.thread_count = 1
            yield container, stream
    except (av.FFmpegError, OSError) as error:
        raise ClipError(path, f"cannot be read ({error.strerror}). Encode or download it again.") from error


def _stamp(timed: Any) -> int | None:
    """Time of a packet or frame in units of the stream; some formats know only the decoding time."""
    return timed.dts if timed.pts is None else timed.pts


def _quarter_turns(frame: Any) -> int:
    """How the frame is turned to be shown: counterclockwise, in quarters."""
    return round(frame.rotation / 90)


def probe(path: Path) -> tuple[list[float], tuple[int, int]]:
    """Look at a file; only its first frame is decoded.

    Returns:
        The times of its frames in seconds, rising, and width and height as shown: upright and with square pixels.

    Raises:
        ClipError: a file without a frame that can be decoded.
    """
    times, size = [], None
    with _opened(path) as (container, stream):
        for packet in container.demux(stream):
            if (stamp := _stamp(packet)) is not None and not packet.is_discard:
                times.append(float(stamp * stream.time_base))
            # the last packet is empty and brings out what the decoder holds back
            if size is None and (frame := next(iter(packet.decode()), None)):
                # a damaged file may give any aspect ratio
                size = max(1, round(frame.width * (stream.sample_aspect_ratio or 1))), frame.height
                size = size[::-1] if _quarter_turns(frame) % 2 else size
    if size is None or not times:
        raise ClipError(path, "holds no frame that can be decoded. Encode or download it again.")
    return sorted(times), size


def shown_frames(path: Path, gap: float) -> Iterator[tuple[Any, float]]:
    """Decode frame by frame.

    Args:
        gap: how long the last frame is shown, in seconds.

    Yields:
        Each frame and the time, in seconds from the first one, at which the next takes its place.

    Raises:
        ClipError: a damaged file, or frames whose times say nothing.
    """
    shown, start, time = None, 0, 0.0
    with _opened(path) as (container, stream):
        for frame in container.decode(stream):
            if (stamp := _stamp(frame)) is None:
                raise ClipError(path, NO_TIMES)
            if shown is None:
                start = stamp
            elif (later := float((stamp - start) * stream.time_base)) < time:
                raise ClipError(path, NO_TIMES)
            else:
                time = later
                yield shown, time
            shown = frame
        if shown is not None:
            yield shown, time + gap


def _colours(frame: Any) -> dict[str, int]:
    """What a frame says of its colours, as PyAV before 17 has to be told it, with another matrix on the side of RGB, where it
    has no meaning: it passes over what does not differ.

    A frame that says nothing is BT.601, as in ffmpeg and ComfyUI, whose files of RGB frames say nothing and are that.
    """
    matrix, extent = frame.colorspace, frame.color_range
    if frame.format.is_rgb or (matrix == UNSPECIFIED and not extent):
        return {}
    told = {"src_colorspace": matrix, "dst_colorspace": Colorspace.ITU709 if matrix == Colorspace.ITU601 else Colorspace.ITU601}
    return told | ({"src_color_range": extent, "dst_color_range": ColorRange.JPEG} if extent else {})


def upright(frame: Any, path: Path) -> Tensor:
    """The pixels of a decoded frame as they are to be seen: uint8 (height, width, 3).

    Raises:
        ClipError: colours that cannot be converted.
    """
    try:
        pixels = frame.to_ndarray(format="rgb24", **_colours(frame))
    except av.FFmpegError as error:
        raise ClipError(path, f"has colours that cannot become RGB ({error.strerror}). Encode it again, for example as .mp4.") from error
    return torch.rot90(torch.from_numpy(pixels), _quarter_turns(frame))
