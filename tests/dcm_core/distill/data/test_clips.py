"""Clips: what is refused and why, and which pixels come out."""

import dataclasses
import math
import struct
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dcm_core.distill.data.clips import ClipSettings, bucket_of, check_clips, inspect_clip, read_clip, windows
from dcm_core.distill.data.sources import IMAGE_SUFFIXES, Clip, find_clips
from dcm_core.distill.data.video_file import ClipError, Picture, shown_frames, upright
from dcm_core.errors import DCMError

SMALL = ClipSettings(frames=9, fps=16, width=64, height=48)


def values(path, settings=SMALL):
    """The number of the source frame at each place of the clip."""
    pixels = read_clip(inspect_clip(Clip(path, "x"), settings), settings)
    assert pixels.std(dim=(1, 2, 3)).max() < 0.01, "frames of one colour"
    return [round(value) for value in (pixels.mean(dim=(1, 2, 3)) * 255 / 4).tolist()]


# Settings


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"frames": 80}, "frames is 80; expected 1 more than a multiple of 4. Choose 81"),
        ({"frames": 0}, "frames is 0; .* Choose 1"),
        ({"fps": 0.0}, "fps is 0"),
        ({"fps": math.nan}, "fps is nan"),
        ({"width": 833}, "width is 833; expected a multiple of 16. Choose 832"),
        ({"height": 8}, "height is 8; expected a multiple of 16. Choose 16"),
        ({"window": "end"}, "window is 'end'; choose one of start, middle, random, all"),
    ],
)
def test_settings_outside_their_bounds_are_refused(wrong, message):
    with pytest.raises(DCMError, match=message):
        ClipSettings(**wrong)


# Windows and images


def windows_of(path, **settings):
    settings = dataclasses.replace(SMALL, **settings)
    return settings, windows(inspect_clip(Clip(path, "x"), settings), settings)


@pytest.mark.parametrize(
    ("window", "begins"), [("start", [0]), ("middle", [5]), ("all", [0, 9])], ids=lambda value: str(value)
)
def test_windows_of_a_long_clip(window, begins, video, tmp_path):
    """Of 20 frames, 9 at a time."""
    settings, found = windows_of(video(tmp_path / "a.mkv"), window=window)
    assert [checked.begin for checked in found] == begins
    for checked in found:
        shown = (read_clip(checked, settings).mean(dim=(1, 2, 3)) * 255 / 4).round()
        assert shown.tolist() == list(range(checked.begin, checked.begin + 9))


def test_a_random_window_follows_from_content_and_seed(video, tmp_path):
    paths = [video(tmp_path / f"{name}.mkv", paint=lambda i, add=add: 4 * i + add) for add, name in enumerate("ab")]

    def begins(path):
        return [windows_of(path, window="random", window_seed=seed)[1][0].begin for seed in range(20)]

    assert begins(paths[0]) == begins(paths[0]) != begins(paths[1])
    assert min(begins(paths[0])) < 3 and max(begins(paths[0])) > 8 and max(begins(paths[0])) <= 11


@pytest.mark.parametrize("suffix", sorted(IMAGE_SUFFIXES))
def test_every_kind_of_image_is_read(suffix, tmp_path):
    path = tmp_path / f"a %d{suffix}"
    colour = (200, 100, 50)
    Image.new("RGB", (64, 48), colour).save(path, **({} if suffix in (".bmp", ".png") else {"quality": 100}))
    with pytest.raises(ClipError, match=r"is an image, not a video\. Turn images on, or leave it out"):
        inspect_clip(Clip(path, "x"), SMALL)
    settings, (checked,) = windows_of(path, images=True, window="random")
    pixels = read_clip(checked, settings)
    assert pixels.shape == (1, 48, 64, 3)
    assert (pixels.mean(dim=(0, 1, 2)) * 255 - torch.tensor(colour)).abs().max() < 3


def test_images_that_cannot_be_read_are_refused(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no image")
    Image.new("I;16", (64, 48)).save(tmp_path / "deep.png")
    Image.new("L", (8192, 4321)).save(tmp_path / "large.png")
    for name, reason in (
        ("a", "cannot be read as an image"),
        ("deep", "has more than 8 bits"),
        ("large", "is 8192x4321"),
    ):
        with pytest.raises(ClipError, match=reason):
            windows_of(tmp_path / f"{name}.png", images=True)


def test_transparent_areas_of_an_image_are_black(tmp_path):
    Image.new("RGBA", (64, 48), (255, 255, 255, 102)).save(tmp_path / "a.png")
    settings, (checked,) = windows_of(tmp_path / "a.png", images=True)
    assert checked.notes == ("transparent areas become black",)
    torch.testing.assert_close(read_clip(checked, settings), torch.full((1, 48, 64, 3), 0.4), atol=1e-3, rtol=0)


def test_a_photo_is_upright(tmp_path):
    """Cameras store how they were held."""
    path, exif = tmp_path / "a.jpg", Image.Exif()
    exif[0x0112] = 6
    photo = Image.new("RGB", (48, 64))
    photo.paste((255, 255, 255), (0, 0, 48, 32))
    photo.save(path, exif=exif, quality=100)
    settings, (checked,) = windows_of(path, images=True)
    assert (checked.width, checked.height) == (64, 48)
    # its upper half is on the right when it is turned
    assert read_clip(checked, settings)[0, 24, [8, 56], 0].round().tolist() == [0, 1]


# Checking


def test_clips_that_cannot_be_used_are_refused_with_the_reason(clip, video, tmp_path):
    whole = clip("whole.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.mp4").write_bytes(b"no video at all")
    (tmp_path / "empty.mp4").write_bytes(b"")
    video(tmp_path / "tiny.mkv", size=(40, 30))
    video(tmp_path / "short.mkv", frames=8)
    reasons = {
        "cut.mp4": "cannot be read",
        "text.mp4": "cannot be read",
        "empty.mp4": "cannot be read",
        "gone.mp4": "does not exist",
        "tiny.mkv": "is 40x30, too small for 64x48",
        "short.mkv": r"lasts 0\.501 s, which is 8 frames at 16 fps; expected 9",
    }
    for name, reason in reasons.items():
        with pytest.raises(ClipError, match=reason):
            inspect_clip(Clip(tmp_path / name, "a cat"), SMALL)
    with pytest.raises(ClipError, match=r"has no caption. Write one to whole.txt"):
        inspect_clip(Clip(tmp_path / "whole.mp4", ""), SMALL)
    (tmp_path / "whole.txt").write_bytes("caf\u00e9".encode("latin-1"))
    with pytest.raises(ClipError, match="not UTF-8"):
        inspect_clip(find_clips(tmp_path).clips[-1], SMALL)


def test_a_file_of_sound_only_is_refused(tmp_path):
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), dtype=np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(ClipError, match="has no video stream"):
        inspect_clip(Clip(tmp_path / "a.mkv", "x"), SMALL)


def test_all_files_are_checked_and_the_good_ones_kept(clip, tmp_path):
    clip("a.mkv")
    clip("b.mkv", frames=3)
    clip("c.mkv", caption="")
    clip("d.mp4")
    calls = []
    good, problems = check_clips(find_clips(tmp_path).clips, SMALL, lambda *done: calls.append(done))
    assert [checked.clip.path.name for checked in good] == ["a.mkv", "d.mp4"]
    assert [str(problem)[:12] for problem in problems] == ["b.mkv: lasts", "c.mkv: has n"]
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_a_clip_that_nothing_here_decodes_is_left_out(clip, tmp_path):
    clip("a.mp4")
    path = clip("b.mp4")
    data = path.read_bytes()
    assert b"avc1" in data
    path.write_bytes(data.replace(b"avc1", b"zzz1"))
    good, problems = check_clips(find_clips(tmp_path).clips, SMALL)
    assert [checked.clip.path.name for checked in good] == ["a.mp4"]
    assert [str(problem) for problem in problems] == [
        "b.mp4: is in a format that cannot be decoded here. Encode it again, for example as .mp4."
    ]


def test_pixels_of_no_width_are_too_small_a_clip(tmp_path):
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=16)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(1, 2)
        for _ in range(9):
            container.mux(stream.encode(av.VideoFrame(64, 48, "yuv420p")))
        container.mux(stream.encode())
    plain, damaged = (b"pasp" + struct.pack(">2I", 1, height) for height in (2, 1000))
    path.write_bytes(path.read_bytes().replace(plain, damaged))
    with pytest.raises(ClipError, match=r"1x48"):
        inspect_clip(Clip(path, "x"), SMALL)


def test_no_good_clip_is_an_error_with_three_reasons(clip, tmp_path):
    for name in "abcde":
        clip(f"{name}.mkv", frames=2)
    with pytest.raises(
        DCMError, match=r"(?s)No clip can be used: 5 clips left out.*a\.mkv: lasts.*c\.mkv.*and 2 more"
    ) as error:
        check_clips(find_clips(tmp_path).clips, SMALL)
    assert "d.mkv" not in str(error.value)


def test_what_is_unusual_is_noted(video, tmp_path):
    def notes(name, **options):
        return inspect_clip(Clip(video(tmp_path / name, **options), "x"), SMALL).notes

    assert notes("plain.mkv", frames=30, fps=30) == ()
    assert notes("variable.mkv", times=[0, 40, 100, 140, 300, 500, 540, 600]) == (
        "variable frame rate, frames picked by their time",
    )
    assert notes("slow.mkv", fps=8) == ("8 fps, so frames repeat at 16 fps",)
    assert notes("little.mkv", size=(60, 45)) == ("60x45 enlarged to 64x48",)
    whole = dataclasses.replace(SMALL, buckets=False)
    narrow = inspect_clip(Clip(video(tmp_path / "narrow.mkv", size=(60, 96)), "x"), whole)
    assert narrow.notes == ("60x96 enlarged to 64x48",), "one side is enough"


# Buckets

sizes = st.integers(1, 60).map(lambda n: 16 * n)


@given(width=st.integers(16, 4000), height=st.integers(16, 4000), own_width=sizes, own_height=sizes)
def test_bucket_has_the_area_and_the_nearest_aspect(width, height, own_width, own_height):
    settings = ClipSettings(width=own_width, height=own_height)
    w, h = bucket_of(width, height, settings)
    assert w % 16 == h % 16 == 0
    area = own_width * own_height
    if area >= 256 * 256:
        assert 0.9 < w * h / area < 1.1, "rounding of the shorter side, 8 or more steps"
    wanted = math.log(width / height)
    assert abs(math.log(w / h) - wanted) <= abs(math.log(own_width / own_height) - wanted), (
        "the settings' own size is one of them"
    )


def test_common_sizes_have_the_buckets_one_expects():
    settings = ClipSettings(width=832, height=480)
    assert bucket_of(1920, 1080, settings) == (832, 480)
    assert bucket_of(1080, 1920, settings) == (480, 832)
    assert bucket_of(1000, 1000, settings) == (624, 640) or bucket_of(1000, 1000, settings) == (640, 624)
    assert bucket_of(9000, 1000, settings) == (1248, 320)
    assert bucket_of(1080, 1920, ClipSettings(width=832, height=480, buckets=False)) == (832, 480)


# Reading


@pytest.mark.parametrize("suffix", [".mkv", ".mp4", ".avi"])
def test_a_clip_of_the_wanted_rate_is_read_frame_by_frame(video, tmp_path, suffix):
    assert values(video(tmp_path / f"a{suffix}", paint=lambda i: 8 * i)) == [0, 2, 4, 6, 8, 10, 12, 14, 16]


@pytest.mark.parametrize(
    ("fps", "expected"),
    [(8, [0, 0, 1, 1, 2, 2, 3, 3, 4]), (24, [0, 1, 3, 4, 6, 7, 9, 10, 12]), (32, [0, 2, 4, 6, 8, 10, 12, 14, 16])],
)
def test_other_rates_are_resampled_by_time(video, tmp_path, fps, expected):
    assert values(video(tmp_path / "a.mkv", fps=fps, frames=24)) == expected


def test_variable_rate_shows_each_frame_for_its_time(video, tmp_path):
    path = video(tmp_path / "a.mkv", times=[0, 62, 125, 312, 375, 438, 500])
    assert values(path) == [0, 1, 2, 2, 2, 3, 4, 5, 6]


def test_time_begins_with_the_first_frame(video, tmp_path):
    assert values(video(tmp_path / "a.mkv", times=[1000 + 63 * i for i in range(9)])) == list(range(9))


def test_a_gif_is_read(video, tmp_path):
    settings = ClipSettings(frames=5, fps=10, width=64, height=48)
    pixels = read_clip(
        inspect_clip(Clip(video(tmp_path / "a.gif", fps=10, paint=lambda i: 51 * i, frames=5), "x"), settings), settings
    )
    assert pixels.mean(dim=(1, 2, 3)).tolist() == pytest.approx([0, 0.2, 0.4, 0.6, 0.8], abs=0.08)


def test_the_length_needed_is_the_length_read(video, tmp_path):
    """One frame less is refused, for times that the file rounds as well."""
    for frames in range(7, 11):
        path = video(tmp_path / f"{frames}.mkv", frames=frames)
        if frames < 9:
            with pytest.raises(ClipError, match="lasts"):
                inspect_clip(Clip(path, "x"), SMALL)
        else:
            assert values(path) == list(range(9))


def halves(left, right, width=64, height=48):
    image = np.zeros((height, width, 3), dtype=np.uint8)
    image[:, : width // 2], image[:, width // 2 :] = left, right
    return image


def test_pixels_keep_their_place_and_colour(video, tmp_path):
    path = video(tmp_path / "a.mkv", paint=lambda i: halves((255, 0, 0), (0, 0, 255)))
    pixels = read_clip(inspect_clip(Clip(path, "x"), SMALL), SMALL)
    assert pixels.shape == (9, 48, 64, 3) and pixels.dtype is torch.float32
    assert pixels[4, 10, 10].tolist() == [1, 0, 0]
    assert pixels[4, 10, 50].tolist() == [0, 0, 1]


def test_scaling_covers_the_size_and_crops_the_centre(video, tmp_path):
    """Of a picture of 192x64 after scaling, in three parts, 64x64 pixels show the middle part."""
    image = np.zeros((128, 384, 3), dtype=np.uint8)
    image[:, 128:256] = 255
    settings = ClipSettings(frames=1, width=64, height=64, buckets=False)
    pixels = read_clip(
        inspect_clip(Clip(video(tmp_path / "a.mkv", size=(384, 128), paint=lambda i: image), "x"), settings), settings
    )
    assert pixels[0, :, 2:-2].min() == 1
    assert pixels.min() >= 0 and pixels.max() <= 1


def test_shrinking_averages_instead_of_skipping(video, tmp_path):
    """Noise gets weaker as pixels are averaged; samples of it would be as strong as before, 0.5."""
    noise = np.random.default_rng(0).integers(0, 2, (96, 128, 1)) * 255
    settings = ClipSettings(frames=1, width=32, height=16, buckets=False)
    path = video(tmp_path / "a.mkv", size=(128, 96), paint=lambda i: noise)
    pixels = read_clip(inspect_clip(Clip(path, "x"), settings), settings)
    assert pixels.std() < 0.2 and pixels.mean().item() == pytest.approx(0.5, abs=0.03)


def test_portrait_clips_stay_portrait(video, tmp_path):
    checked = inspect_clip(Clip(video(tmp_path / "a.mkv", size=(96, 128)), "x"), SMALL)
    assert checked.bucket == (48, 64)
    assert read_clip(checked, SMALL).shape == (9, 64, 48, 3)


BT601, BT709, BT2020, NONE = (0.299, 0.114, 5), (0.2126, 0.0722, 1), (0.2627, 0.0593, 9), (0.299, 0.114, 2)
LIMITED, FULL = 1, 2


@pytest.mark.parametrize("matrix", [BT601, BT709, BT2020, NONE])
@pytest.mark.parametrize("extent", [0, LIMITED, FULL])
def test_colours_are_what_the_file_says_they_are(tmp_path, matrix, extent):
    """The equation of the standards, the other way round; what says nothing is BT.601 of limited range, as for ffmpeg."""
    colour = red, green, blue = 0.8, 0.2, 0.1
    kr, kb, number = matrix
    y = kr * red + (1 - kr - kb) * green + kb * blue
    parts = y, (blue - y) / (2 - 2 * kb), (red - y) / (2 - 2 * kr)
    scale, start = ((255, 255, 255), (0, 128, 128)) if extent == FULL else ((219, 224, 224), (16, 128, 128))
    planes = [np.full((48, 64), round(start[i] + scale[i] * parts[i]), np.uint8) for i in range(3)]
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("libx264", 16)
        stream.width, stream.height, stream.pix_fmt, stream.options = 64, 48, "yuv444p", {"qp": "0"}
        stream.codec_context.colorspace, stream.codec_context.color_range = number, extent
        for _ in range(9):
            frame = av.VideoFrame.from_ndarray(np.stack(planes), format="yuv444p")
            frame.colorspace, frame.color_range = number, extent
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    pixels = read_clip(inspect_clip(Clip(tmp_path / "a.mp4", "x"), SMALL), SMALL)
    assert pixels.mean(dim=(0, 1, 2)).tolist() == pytest.approx(colour, abs=0.012)


def test_colours_that_cannot_be_converted(tmp_path):
    frame = av.VideoFrame(8, 8, "yuv420p")
    frame.colorspace = 3  # reserved
    with pytest.raises(ClipError, match=r"clip.mp4: has colours that cannot be converted to RGB"):
        upright(Picture(frame), tmp_path / "clip.mp4")


def test_a_clip_that_the_camera_turned_is_read_upright(video, tmp_path):
    """The matrix phones write: the picture is shown a quarter turn clockwise, so its left side comes to the top."""
    path = video(tmp_path / "a.mp4", size=(128, 96), paint=lambda i: halves(255, 0, 128, 96))
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 44
    assert struct.unpack(">9i", data[matrix : matrix + 36]) == (65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30)
    data[matrix : matrix + 36] = struct.pack(">9i", 0, 65536, 0, -65536, 0, 0, 96 << 16, 0, 1 << 30)
    path.write_bytes(data)
    checked = inspect_clip(Clip(path, "x"), SMALL)
    assert (checked.width, checked.height, checked.bucket) == (96, 128, (48, 64))
    pixels = read_clip(checked, SMALL)[0]
    assert pixels[:28].min() > 0.9 and pixels[36:].max() < 0.1


def test_a_file_damaged_after_its_first_frame_is_refused_when_read(video, tmp_path):
    path = video(tmp_path / "a.mkv", paint=lambda i: np.random.default_rng(i).integers(0, 255, (48, 64, 3)), frames=12)
    data = path.read_bytes()
    checked = inspect_clip(Clip(path, "x"), SMALL)
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ClipError, match=r"ends after \d of 9 frames|cannot be read"):
        read_clip(checked, SMALL)


def test_frames_whose_times_run_backwards_are_refused(video, tmp_path):
    """H.264 with reordered frames in an .avi: the format cannot say when they are shown."""
    path = video(tmp_path / "a.avi", codec=("libx264", "yuv420p"))
    with pytest.raises(ClipError, match=r"run backwards\. Encode it again"):
        read_clip(inspect_clip(Clip(path, "x"), SMALL), SMALL)


def test_decoding_ends_with_the_last_frame_needed(video, tmp_path, monkeypatch):
    path, shown = video(tmp_path / "a.mkv", frames=60), []

    def counted(*args):
        for frame in shown_frames(*args):
            shown.append(frame)
            yield frame

    monkeypatch.setattr("dcm_core.distill.data.clips.shown_frames", counted)
    assert values(path) == list(range(9))
    assert len(shown) == 9
