"""Small videos whose frames can be told apart."""

from fractions import Fraction

import av
import numpy as np
import pytest

CODECS = {".mkv": ("ffv1", "bgr0"), ".mp4": ("libx264", "yuv420p"), ".gif": ("gif", "rgb8"), ".avi": ("ffv1", "bgr0")}


@pytest.fixture(scope="session")
def video():
    """Write a video: video(path, frames=..., fps=..., size=(width, height), ...) -> path. By default frame i is 4 * i everywhere;
    .mkv and .avi are lossless.

    paint: frame number -> its pixels (height, width, 3), or their value. times: of the frames in milliseconds, in place of fps.
    """

    def write(path, frames=20, fps=16, size=(64, 48), paint=lambda index: 4 * index, times=None, codec=None):
        codec, pixel_format = codec or CODECS[path.suffix]
        with av.open(str(path), "w") as container:
            stream = container.add_stream(codec, rate=fps)
            stream.width, stream.height, stream.pix_fmt = *size, pixel_format
            stream.codec_context.thread_count = 1
            if times:
                stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
            for index in range(len(times) if times else frames):
                pixels = np.broadcast_to(np.asarray(paint(index), dtype=np.uint8), (size[1], size[0], 3))
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
                frame.pts, frame.time_base = (times[index], Fraction(1, 1000)) if times else (index, Fraction(1, fps))
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        return path

    return write


@pytest.fixture
def clip(video, tmp_path):
    """Write a video with its caption: clip("a.mkv", "a cat", **as for `video`) -> path."""

    def write(name, caption="a cat", **options):
        path = video(tmp_path / name, **options)
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
        return path

    return write
