"""Seconds and a shape become what a model takes, as near to what is asked as it can be."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcm_core.errors import DCMError
from dcm_core.video_size import FORMATS, HUNYUAN_VIDEO, SHAPES, WAN, WAN_5B, video_size


@pytest.mark.parametrize(
    ("model", "seconds", "shape", "megapixels", "size"),
    [
        (WAN, 5, "16:9", 0.4, (832, 480, 81, 16)),
        (WAN, 5, "9:16", 0.4, (480, 832, 81, 16)),
        (WAN, 3, "16:9", 0.92, (1280, 720, 49, 16)),
        (HUNYUAN_VIDEO, 5, "16:9", 0.92, (1280, 720, 121, 24)),
        (WAN_5B, 5, "16:9", 0.9, (1280, 704, 121, 24)),
        (WAN, 5, "1:1", 0.4, (640, 640, 81, 16)),
        (WAN, 0.1, "1:1", 0.01, (96, 96, 1, 16)),
    ],
)
def test_usual_videos(model, seconds, shape, megapixels, size):
    found = video_size(model, seconds, shape, megapixels)
    assert (found.width, found.height, found.length, found.fps) == size
    assert str(video_size(WAN, 5, "16:9", 0.4)) == "832 x 480, 81 frames, 5.06 s at 16 a second"


@given(st.sampled_from(sorted(FORMATS)), st.floats(0.1, 120), st.sampled_from(sorted(SHAPES)), st.floats(0.05, 8))
def test_every_video_is_legal_and_near_what_is_asked(model, seconds, shape, megapixels):
    size, video = video_size(model, seconds, shape, megapixels), FORMATS[model]
    assert size.width % video.multiple == size.height % video.multiple == 0 and size.width and size.height
    assert size.length % 4 == 1 and abs((size.length - 1) / size.fps - seconds) <= 2 / size.fps
    # each side is at most half a multiple off, or a trained size is taken
    step = video.multiple / math.sqrt(1e6 * megapixels)
    assert abs(math.log(size.width * size.height / (1e6 * megapixels))) <= 0.15 + 1.6 * step
    assert abs(math.log(size.width / size.height / SHAPES[shape])) <= 0.05 + 1.6 * step


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model": "SD"}, "model_type is 'SD'; choose one of"),
        ({"shape": "2:1"}, "shape is '2:1'; choose one of"),
        ({"seconds": 0}, "seconds is 0; expected a number above 0"),
        ({"megapixels": math.nan}, "megapixels is nan; expected a number above 0"),
    ],
)
def test_what_gives_no_video_is_refused(change, says):
    with pytest.raises(DCMError, match=says):
        video_size(**{"model": WAN, "seconds": 5, "shape": "16:9", "megapixels": 0.4, **change})
