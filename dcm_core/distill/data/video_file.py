"""Read one video or image file: its frames, their display times, and the pixels that a player shows."""

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
import torch
from av.stream import Disposition
from av.video.reformatter import ColorRange, Colorspace
from PIL import Image, ImageOps
from torch import Tensor

from ...errors import DCMError
from .sources import IMAGE_SUFFIXES

UNSPECIFIED = 2  # ffmpeg's number for an unspecified matrix or unspecified primaries
NO_TIMES = "has frames without times, or with times that run backwards. Encode it again, for example as .mp4."
STILL = Disposition.attached_pic | Disposition.timed_thumbnails | Disposition.still_image
HDR = {16: "PQ", 18: "HLG"}  # transfer functions by ffmpeg's numbers
# Containers with the pictures inside, by ffmpeg's names. A playlist with a video's name would open other files.
CONTAINERS = "apng,asf,avi,dv,flv,gif,h264,hevc,ivf,m4v,matroska,mov,mpeg,mpegts,mpegvideo,mxf,obu,ogg,yuv4mpegpipe"
# ffmpeg's own decoders for these drop the transparency.
ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
IMAGE_FORMATS = ("BMP", "JPEG", "PNG", "TIFF", "WEBP")
MAX_SLANT = 0.1  # how far from a right angle a display matrix may be
MAX_PIXELS = 8192 * 4320  # 8K; a damaged file may claim any size
# Primaries by ffmpeg's numbers -> matrix to linear RGB in BT.709: BT.2020 (as in ITU-R BT.2087) and P3 with D65.
TO_BT709 = {
    9: ((1.6605, -0.5876, -0.0728), (-0.1246, 1.1329, -0.0083), (-0.0182, -0.1006, 1.1187)),
    12: ((1.2249, -0.2247, 0.0), (-0.0420, 1.0419, 0.0), (-0.0197, -0.0786, 1.0979)),
}
GAMMA = 2.4  # gamma of an SDR display (BT.1886)


class ClipError(DCMError):
    """A clip cannot be trained on. `path` is the file, `reason` says what is wrong and what to do."""

    def __init__(self, path: Path, reason: str):
        super().__init__(f"{path}: {reason}")
        self.path, self.reason = path, reason


class Picture(NamedTuple):
    """A frame decoded by PyAV, and its primaries by ffmpeg's number."""

    frame: Any
    primaries: int = UNSPECIFIED


class Look(NamedTuple):
    """The result of a first look at a file.

    Attributes:
        times: times of the frames in seconds, rising.
        size: displayed width and height, upright and with square pixels.
        changes: conversions that change the pictures from the stored ones. Rotation does not count.
        notes: what the user should know about the pictures.
    """

    times: list[float]
    size: tuple[int, int]
    changes: tuple[str, ...]
    notes: tuple[str, ...]


class _Video:
    """The stream that a player shows of an open file, and its decoder."""

    def __init__(self, path: Path, container: Any):
        self.path, self.container = path, container
        self.stream = self._shown_stream()
        if (own := self.stream.codec_context) is None:
            raise ClipError(path, "is in a format that cannot be decoded here. Encode it again, for example as .mp4.")
        if own.width * own.height > MAX_PIXELS:
            raise ClipError(path, f"is {own.width}x{own.height}; expected at most 8K (8192x4320). Encode it smaller.")
        if own.color_trc in HDR:
            # read as SDR, its values would look grey
            raise ClipError(
                path,
                f"is HDR ({HDR[own.color_trc]}); expected SDR. Convert it with tone mapping, for example in DaVinci Resolve or HandBrake.",
            )
        self.primaries = own.color_primaries
        self.decoder = self._alpha_decoder() or own
        # a decoder thread that reports an error waits for Python, while Python waits for it to close the file: a deadlock
        self.decoder.thread_count = 1

    def _shown_stream(self) -> Any:
        """The stream to show: not a cover picture, preferably one with many frames, preferably the default one."""
        streams = [stream for stream in self.container.streams.video if not Disposition(stream.disposition) & STILL]
        if not streams:
            raise ClipError(self.path, "has no video stream. Leave it out, or use the file with the pictures.")
        return min(
            streams, key=lambda stream: (stream.frames == 1, not Disposition(stream.disposition) & Disposition.default)
        )

    def _alpha_decoder(self) -> Any:
        name = ALPHA_DECODERS.get(self.stream.codec_context.name)
        if name is None or self.stream.metadata.get("alpha_mode", "0") == "0":
            return None
        try:
            return av.CodecContext.create(name, "r")
        except ValueError as error:
            raise ClipError(
                self.path, "has transparency that cannot be decoded here. Encode it without transparency."
            ) from error

    def packets(self) -> Iterator[Any]:
        """All packets. The last one is empty and flushes the decoder."""
        return self.container.demux(self.stream)

    def decode(self, packet: Any) -> list[Picture]:
        """The frames that the decoder returns for a packet."""
        return [Picture(frame, self.primaries) for frame in self.decoder.decode(packet)]


@contextmanager
def _opened(path: Path) -> Iterator[_Video]:
    """Open a file's video. Every error of the file becomes a ClipError."""
    if not os.path.isfile(path):
        raise ClipError(path, "does not exist. Check the name.")
    try:
        # a full path, because ffmpeg reads `name:` as a protocol; titles in an old encoding must not make a file unusable
        with av.open(
            os.path.abspath(path), metadata_errors="ignore", container_options={"format_whitelist": CONTAINERS}
        ) as container:
            yield _Video(path, container)
    except (av.FFmpegError, OSError) as error:
        raise ClipError(path, f"cannot be read ({error.strerror}). Encode or download it again.") from error


def _stamp(timed: Any) -> int | None:
    """Time of a packet or frame in units of the stream. Some formats only have the decoding time."""
    return timed.dts if timed.pts is None else timed.pts


def _image(path: Path) -> Picture:
    """The picture of an image file, turned as a viewer shows it."""
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ClipError(
                    path, f"is {image.width}x{image.height}; expected at most 8K (8192x4320). Save it smaller."
                )
            if image.mode[0] in "IF":
                raise ClipError(path, "has more than 8 bits per value. Save it with 8 bits.")
            transparent = "A" in image.getbands() or "transparency" in image.info
            pixels = ImageOps.exif_transpose(image).convert("RGBA" if transparent else "RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ClipError(path, f"cannot be read as an image ({error}). Save or download it again.") from error
    return Picture(av.VideoFrame.from_ndarray(np.asarray(pixels), format="rgba" if transparent else "rgb24"))


def probe(path: Path) -> Look:
    """Inspect a file. Only its first frame is decoded.

    Raises:
        ClipError: no frame can be decoded, or the pictures cannot be shown correctly.
    """
    if path.suffix.lower() in IMAGE_SUFFIXES:
        picture = _image(path)
        size = picture.frame.width, picture.frame.height
        return Look([0.0], size, _changes(picture, path), _notes(picture, path))
    times, first, size = [], None, (0, 0)
    with _opened(path) as video:
        for packet in video.packets():
            if (stamp := _stamp(packet)) is not None and not packet.is_discard:
                times.append(float(stamp * video.stream.time_base))
            if first is None and (first := next(iter(video.decode(packet)), None)):
                # a damaged file may claim any aspect ratio
                size = max(1, round(first.frame.width * (video.stream.sample_aspect_ratio or 1))), first.frame.height
                size = size[::-1] if _placement(first.frame, path).turned else size
                changes, notes = _changes(first, path), _notes(first, path)
    if first is None or not times:
        raise ClipError(path, "has no frame that can be decoded. Encode or download it again.")
    return Look(sorted(times), size, changes, notes)


def _changes(picture: Picture, path: Path) -> tuple[str, ...]:
    changes = {
        "mirrored": _placement(picture.frame, path).mirrored,
        "transparent areas black": _has_alpha(picture.frame),
        f"primaries {picture.primaries} to BT.709": picture.primaries in TO_BT709,
    }
    return tuple(change for change, made in changes.items() if made)


def _notes(picture: Picture, path: Path) -> tuple[str, ...]:
    notes = {
        "transparent areas become black": _has_alpha(picture.frame)
        and _pixels(picture.frame, path)[..., 3].min() < 255,
        "interlaced: moving edges look like combs. Deinterlace it": picture.frame.interlaced_frame,
    }
    return tuple(note for note, true in notes.items() if true)


def shown_frames(path: Path, gap: float) -> Iterator[tuple[Picture, float]]:
    """Decode frame by frame.

    Args:
        gap: how long the last frame is shown, in seconds.

    Yields:
        Each frame, and the time in seconds from the first frame at which the next one replaces it.

    Raises:
        ClipError: the file is damaged, or its frame times are unusable.
    """
    if path.suffix.lower() in IMAGE_SUFFIXES:
        yield _image(path), gap
        return
    shown, start, time = None, 0, 0.0
    with _opened(path) as video:
        for picture in (picture for packet in video.packets() for picture in video.decode(packet)):
            if (stamp := _stamp(picture.frame)) is None:
                raise ClipError(path, NO_TIMES)
            if shown is None:
                start = stamp
            elif (later := float((stamp - start) * video.stream.time_base)) < time:
                raise ClipError(path, NO_TIMES)
            else:
                time = later
                yield shown, time
            shown = picture
        if shown is not None:
            yield shown, time + gap


class _Placement(NamedTuple):
    """How to show a stored picture: swap rows and columns, then mirror left-right (`across`) and up-down (`down`)."""

    turned: bool = False
    across: bool = False
    down: bool = False

    @property
    def mirrored(self) -> bool:
        """Whether it takes more than a rotation."""
        return self.turned ^ self.across ^ self.down


def _placement(frame: Any, path: Path) -> _Placement:
    """One of eight placements from the display matrix, which maps a stored point (x, y) to (a x + c y, b x + d y).

    Raises:
        ClipError: the picture is not rotated by a multiple of 90 degrees.
    """
    side = frame.side_data.get("DISPLAYMATRIX")
    if side is None:
        return _Placement()
    a, b, _, c, d, *_ = struct.unpack("=9i", bytes(side)[:36])
    straight, turned = max(abs(a), abs(d)), max(abs(b), abs(c))
    if min(straight, turned) > MAX_SLANT * max(straight, turned):
        raise ClipError(path, "is rotated by an angle that is not a multiple of 90 degrees. Encode it upright.")
    return _Placement(True, c < 0, b < 0) if turned > straight else _Placement(False, a < 0, d < 0)


def _colours(frame: Any) -> dict[str, int]:
    """A frame's colour properties, as arguments for PyAV.

    PyAV before 17 ignores them unless source and target differ, so RGB gets another matrix, which has no effect there.
    A frame without properties is BT.601, as in ffmpeg and in ComfyUI, which writes such files.
    """
    matrix, extent = frame.colorspace, frame.color_range
    if frame.format.is_rgb or (matrix == UNSPECIFIED and not extent):
        return {}
    colours = {
        "src_colorspace": matrix,
        "dst_colorspace": Colorspace.ITU709 if matrix == Colorspace.ITU601 else Colorspace.ITU601,
    }
    return colours | ({"src_color_range": extent, "dst_color_range": ColorRange.JPEG} if extent else {})


def _has_alpha(frame: Any) -> bool:
    return frame.format.has_palette or any(component.is_alpha for component in frame.format.components)


def _pixels(frame: Any, path: Path) -> Tensor:
    """The pixels as stored: uint8 (height, width, 3), or 4 with alpha."""
    try:
        pixels = frame.to_ndarray(format="rgba" if _has_alpha(frame) else "rgb24", **_colours(frame))
    except av.FFmpegError as error:
        raise ClipError(
            path,
            f"has colours that cannot be converted to RGB ({error.strerror}). Encode it again, for example as .mp4.",
        ) from error
    return torch.from_numpy(pixels)


def upright(picture: Picture, path: Path) -> Tensor:
    """The pixels that a player shows, in BT.709 with transparent areas black: float32 (height, width, 3) from 0 to 1.

    Raises:
        ClipError: the colours cannot be converted, or the picture is not rotated by a multiple of 90 degrees.
    """
    pixels, placement = _pixels(picture.frame, path).float() / 255, _placement(picture.frame, path)
    if pixels.shape[-1] == 4:
        pixels = pixels[..., :3] * pixels[..., 3:]
    if picture.primaries in TO_BT709:
        linear = pixels.pow(GAMMA) @ torch.tensor(TO_BT709[picture.primaries]).T
        pixels = linear.clamp(0, 1).pow(1 / GAMMA)
    pixels = pixels.transpose(0, 1) if placement.turned else pixels
    return pixels.flip([axis for axis, mirrored in ((0, placement.down), (1, placement.across)) if mirrored])
