"""Seconds and a shape as the width, height and number of frames that a video model takes."""

import math
from dataclasses import dataclass

from .errors import DCMError, check_choice, counted

# width / height
SHAPES = {"16:9": 16 / 9, "4:3": 4 / 3, "1:1": 1.0, "3:4": 3 / 4, "9:16": 9 / 16, "21:9": 21 / 9}
# Sizes that the models are trained on; the first is called 16:9, but is a little narrower.
TRAINED = ((832, 480), (1280, 720))
# How far a trained size may be from what is asked: of the shape, and of the number of pixels.
SHAPE_OFF, PIXELS_OFF = 0.05, 0.15
# Frames of a video that are one frame of its latent, but for the first.
FRAMES = 4


@dataclass(frozen=True)
class VideoFormat:
    """What a model's videos are.

    Attributes:
        fps: frames per second.
        multiple: in pixels; width and height are multiples of it. It is a patch of the latent.
    """

    fps: int
    multiple: int = 16


WAN, WAN_5B, HUNYUAN_VIDEO = "Wan 2.1, Wan 2.2 14B", "Wan 2.2 5B", "HunyuanVideo"
FORMATS = {WAN: VideoFormat(16), WAN_5B: VideoFormat(24, 32), HUNYUAN_VIDEO: VideoFormat(24)}


@dataclass(frozen=True)
class VideoSize:
    """A size in pixels, a number of frames, and how many of them are a second."""

    width: int
    height: int
    length: int
    fps: int

    def __str__(self) -> str:
        return f"{self.width} x {self.height}, {counted(self.length, 'frame')}, {self.length / self.fps:.2f} s at {self.fps} a second"


def video_size(model: str, seconds: float, shape: str, megapixels: float) -> VideoSize:
    """The legal size nearest to what is asked, a trained one where that is near.

    Raises:
        DCMError: a model or shape that is none, a length or size that is not above 0.
    """
    video = FORMATS[check_choice("model_type", model, FORMATS)]
    ratio = SHAPES[check_choice("shape", shape, SHAPES)]
    for name, value in (("seconds", seconds), ("megapixels", megapixels)):
        if not (math.isfinite(value) and value > 0):
            raise DCMError(f"{name} is {value:g}; expected a number above 0.")
    pixels = 1e6 * megapixels
    length = FRAMES * round(seconds * video.fps / FRAMES) + 1
    width, height = (
        video.multiple * max(1, round(math.sqrt(area) / video.multiple)) for area in (pixels * ratio, pixels / ratio)
    )
    for long, short in TRAINED:
        trained = (long, short) if ratio >= 1 else (short, long)
        off = abs(math.log(trained[0] / trained[1] / ratio)), abs(math.log(long * short / pixels))
        if off[0] <= SHAPE_OFF and off[1] <= PIXELS_OFF and not any(side % video.multiple for side in trained):
            width, height = trained
    return VideoSize(width, height, length, video.fps)
