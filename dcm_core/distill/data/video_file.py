"""One video file: its frames, the times they are shown at, and the pixels that a player shows."""

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import av
import torch
from av.stream import Disposition
from av.video.reformatter import ColorRange, Colorspace
from torch import Tensor

from ...errors import DCMError

UNSPECIFIED = 2  # ffmpeg's number of no matrix, and of no primaries
NO_TIMES = "has frames without times, or with times that run backwards. Encode it again, for example as .mp4."
STILL = Disposition.attached_pic | Disposition.timed_thumbnails | Disposition.still_image
HDR = {16: "PQ", 18: "HLG"}  # transfer functions by ffmpeg's numbers
# Containers that hold their pictures themselves, by ffmpeg's names: a playlist under the name of a video would lead to other files.
CONTAINERS = "apng,asf,avi,dv,flv,gif,h264,hevc,ivf,m4v,matroska,mov,mpeg,mpegts,mpegvideo,mxf,obu,ogg,yuv4mpegpipe"
# ffmpeg's own decoders of these drop the transparency.
ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
MAX_SLANT = 0.1  # how far from a right angle a display matrix may be
MAX_PIXELS = 8192 * 4320  # 8K; a damaged file may give any size
# Linear RGB of wide primaries, by ffmpeg's numbers, -> of BT.709: BT.2020 (as in ITU-R BT.2087) and P3 with D65.
TO_BT709 = {
    9: ((1.6605, -0.5876, -0.0728), (-0.1246, 1.1329, -0.0083), (-0.0182, -0.1006, 1.1187)),
    12: ((1.2249, -0.2247, 0.0), (-0.0420, 1.0419, 0.0), (-0.0197, -0.0786, 1.0979)),
}
GAMMA = 2.4  # of a display of SDR video (BT.1886)


class ClipError(DCMError):
    """A clip that cannot be trained on: `path` is the file, `reason` what is wrong with it and what helps."""

    def __init__(self, path: Path, reason: str):
        super().__init__(f"{path}: {reason}")
        self.path, self.reason = path, reason


class Picture(NamedTuple):
    """A decoded frame of PyAV and its primaries, by ffmpeg's number."""

    frame: Any
    primaries: int = UNSPECIFIED


class Look(NamedTuple):
    """What a first look at a file shows.

    Attributes:
        times: of the frames in seconds, rising.
        size: width and height as shown, upright and with square pixels.
        changes: what makes the pictures others than those stored; a turn is none.
        notes: what is worth knowing of the pictures.
    """

    times: list[float]
    size: tuple[int, int]
    changes: tuple[str, ...]
    notes: tuple[str, ...]


class _Video:
    """The stream of an open file that a player shows, and its decoder."""

    def __init__(self, path: Path, container: Any):
        self.path, self.container = path, container
        self.stream = self._shown_stream()
        if (own := self.stream.codec_context) is None:
            raise ClipError(path, "is in a format that cannot be decoded here. Encode it again, for example as .mp4.")
        if own.width * own.height > MAX_PIXELS:
            raise ClipError(path, f"is {own.width}x{own.height}; at most 8K (8192x4320) is read. Encode it smaller.")
        if own.color_trc in HDR:
            # its values would look grey where SDR is expected
            raise ClipError(
                path,
                f"is HDR ({HDR[own.color_trc]}); expected SDR. Convert it with tone mapping, for example in DaVinci Resolve or HandBrake.",
            )
        self.primaries = own.color_primaries
        self.decoder = self._alpha_decoder() or own
        # a decoder's thread that reports an error waits for Python, which waits for it when the file is closed
        self.decoder.thread_count = 1

    def _shown_stream(self) -> Any:
        """No cover picture; rather a stream of many frames, rather the default one."""
        streams = [stream for stream in self.container.streams.video if not Disposition(stream.disposition) & STILL]
        if not streams:
            raise ClipError(self.path, "holds no video. Leave it out, or give the file with the pictures.")
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
        """All packets; the last one is empty and brings out what the decoder holds back."""
        return self.container.demux(self.stream)

    def decode(self, packet: Any) -> list[Picture]:
        """The frames that a packet brings out."""
        return [Picture(frame, self.primaries) for frame in self.decoder.decode(packet)]


@contextmanager
def _opened(path: Path) -> Iterator[_Video]:
    """The file's video; whatever is wrong with the file becomes a ClipError."""
    if not os.path.isfile(path):
        raise ClipError(path, "does not exist. Check the name.")
    try:
        # a full path, as ffmpeg takes `name:` for a protocol; titles and the like in an old encoding are no reason to refuse a file
        with av.open(
            os.path.abspath(path), metadata_errors="ignore", container_options={"format_whitelist": CONTAINERS}
        ) as container:
            yield _Video(path, container)
    except (av.FFmpegError, OSError) as error:
        raise ClipError(path, f"cannot be read ({error.strerror}). Encode or download it again.") from error


def _stamp(timed: Any) -> int | None:
    """Time of a packet or frame in units of the stream; some formats know only the decoding time."""
    return timed.dts if timed.pts is None else timed.pts


def probe(path: Path) -> Look:
    """Look at a file; only its first frame is decoded.

    Raises:
        ClipError: a file without a frame that can be decoded, or with pictures that cannot be shown as they are meant.
    """
    times, first, size = [], None, (0, 0)
    with _opened(path) as video:
        for packet in video.packets():
            if (stamp := _stamp(packet)) is not None and not packet.is_discard:
                times.append(float(stamp * video.stream.time_base))
            if first is None and (first := next(iter(video.decode(packet)), None)):
                # a damaged file may give any aspect ratio
                size = max(1, round(first.frame.width * (video.stream.sample_aspect_ratio or 1))), first.frame.height
                size = size[::-1] if _placement(first.frame, path).turned else size
                changes, notes = _changes(first, path), _notes(first, path)
    if first is None or not times:
        raise ClipError(path, "holds no frame that can be decoded. Encode or download it again.")
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
        Each frame and the time, in seconds from the first one, at which the next takes its place.

    Raises:
        ClipError: a damaged file, or frames whose times say nothing.
    """
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
    """How a stored picture is shown: rows and columns swapped, then mirrored left-right (`across`) and up-down (`down`)."""

    turned: bool = False
    across: bool = False
    down: bool = False

    @property
    def mirrored(self) -> bool:
        """Whether no turn alone shows it so."""
        return self.turned ^ self.across ^ self.down


def _placement(frame: Any, path: Path) -> _Placement:
    """The eight ways of the display matrix, which takes a stored point (x, y) to (a x + c y, b x + d y).

    Raises:
        ClipError: a picture that is shown at another than a right angle.
    """
    side = frame.side_data.get("DISPLAYMATRIX")
    if side is None:
        return _Placement()
    a, b, _, c, d, *_ = struct.unpack("=9i", bytes(side)[:36])
    straight, turned = max(abs(a), abs(d)), max(abs(b), abs(c))
    if min(straight, turned) > MAX_SLANT * max(straight, turned):
        raise ClipError(path, "is shown turned by another than a right angle. Encode it upright.")
    return _Placement(True, c < 0, b < 0) if turned > straight else _Placement(False, a < 0, d < 0)


def _colours(frame: Any) -> dict[str, int]:
    """What a frame says of its colours, as PyAV before 17 has to be told it, with another matrix on the side of RGB, where it
    has no meaning: it passes over what does not differ.

    A frame that says nothing is BT.601, as in ffmpeg and ComfyUI, whose files of RGB frames say nothing and are that.
    """
    matrix, extent = frame.colorspace, frame.color_range
    if frame.format.is_rgb or (matrix == UNSPECIFIED and not extent):
        return {}
    told = {
        "src_colorspace": matrix,
        "dst_colorspace": Colorspace.ITU709 if matrix == Colorspace.ITU601 else Colorspace.ITU601,
    }
    return told | ({"src_color_range": extent, "dst_color_range": ColorRange.JPEG} if extent else {})


def _has_alpha(frame: Any) -> bool:
    return frame.format.has_palette or any(component.is_alpha for component in frame.format.components)


def _pixels(frame: Any, path: Path) -> Tensor:
    """The pixels as stored: uint8 (height, width, 3), or 4 with alpha."""
    try:
        pixels = frame.to_ndarray(format="rgba" if _has_alpha(frame) else "rgb24", **_colours(frame))
    except av.FFmpegError as error:
        raise ClipError(
            path, f"has colours that cannot become RGB ({error.strerror}). Encode it again, for example as .mp4."
        ) from error
    return torch.from_numpy(pixels)


def upright(picture: Picture, path: Path) -> Tensor:
    """The pixels as a player shows them, transparent areas black, in BT.709: float32 (height, width, 3) from 0 to 1.

    Raises:
        ClipError: colours that cannot be converted, or a picture at another than a right angle.
    """
    pixels, placement = _pixels(picture.frame, path).float() / 255, _placement(picture.frame, path)
    if pixels.shape[-1] == 4:
        pixels = pixels[..., :3] * pixels[..., 3:]
    if picture.primaries in TO_BT709:
        linear = pixels.pow(GAMMA) @ torch.tensor(TO_BT709[picture.primaries]).T
        pixels = linear.clamp(0, 1).pow(1 / GAMMA)
    pixels = pixels.transpose(0, 1) if placement.turned else pixels
    return pixels.flip([axis for axis, mirrored in ((0, placement.down), (1, placement.across)) if mirrored])
