"""Video files as people have them: pictures come out as a player shows them, what cannot be shown is named."""

import contextlib
import struct
import time
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from dcm_core.distill.data import video_file
from dcm_core.distill.data.clips import ClipSettings, inspect_clip, read_clip
from dcm_core.distill.data.sources import SUFFIXES, Clip
from dcm_core.distill.data.video_file import ClipError, probe

WIDTH, HEIGHT, FRAMES = 64, 48, 9
SMALL = ClipSettings(frames=FRAMES, fps=16, width=WIDTH, height=HEIGHT)


def encode(
    path, codec, pixel_format, pixels, layout="rgb24", frames=FRAMES, setup=lambda stream: None, mark=lambda frame: None
):
    """Write one picture (height, width, channels) again and again."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=16)
        stream.width, stream.height, stream.pix_fmt = pixels.shape[1], pixels.shape[0], pixel_format
        stream.codec_context.thread_count = 1
        setup(stream)
        for index in range(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format=layout)
            frame.pts, frame.time_base = index, Fraction(1, 16)
            mark(frame)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def read(path):
    checked = inspect_clip(Clip(path, "x"), SMALL)
    return checked, read_clip(checked, SMALL)


def even(*colour):
    return np.full((HEIGHT, WIDTH, len(colour)), colour, dtype=np.uint8)


def atom(name, *content):
    content = b"".join(content)
    return struct.pack(">I", 8 + len(content)) + name + content


# Orientation


def corners():
    """Four corners of their own brightness: 0 and 1 above, 2 and 3 below, in steps of 80."""
    image = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    for corner in range(4):
        row, column = divmod(corner, 2)
        image[row * HEIGHT // 2 : (row + 1) * HEIGHT // 2, column * WIDTH // 2 : (column + 1) * WIDTH // 2] = (
            80 * corner
        )
    return image


def with_matrix(path, matrix):
    """The file with this display matrix: a, b, c, d of x' = a x + c y, y' = b x + d y."""
    data, one = bytearray(path.read_bytes()), 65536
    place = data.index(b"tkhd") + 44
    a, b, c, d = (round(value * one) for value in matrix)
    data[place : place + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("matrix", "shown"),
    [
        ((1, 0, 0, 1), [[0, 1], [2, 3]]),
        ((-1, 0, 0, 1), [[1, 0], [3, 2]]),  # mirrored left-right
        ((1, 0, 0, -1), [[2, 3], [0, 1]]),  # up-down
        ((-1, 0, 0, -1), [[3, 2], [1, 0]]),  # half a turn
        ((0, 1, -1, 0), [[2, 0], [3, 1]]),  # a quarter clockwise, as phones write it
        ((0, -1, 1, 0), [[1, 3], [0, 2]]),  # a quarter the other way
        ((0, 1, 1, 0), [[0, 2], [1, 3]]),  # mirrored at the falling diagonal
        ((0, -1, -1, 0), [[3, 1], [2, 0]]),  # and at the rising one
        ((2, 0, 0, 2), [[0, 1], [2, 3]]),  # sizes are of the container
        ((0.02, 1, -1, 0.02), [[2, 0], [3, 1]]),  # rounding
        ((0, 0, 0, 0), [[0, 1], [2, 3]]),  # says nothing
    ],
)
def test_pictures_are_shown_by_the_whole_display_matrix(tmp_path, matrix, shown):
    path = with_matrix(encode(tmp_path / "a.mp4", "libx264", "yuv420p", corners()), matrix)
    checked, pixels = read(path)
    turned = abs(matrix[1]) > abs(matrix[0])
    assert (checked.width, checked.height) == ((HEIGHT, WIDTH) if turned else (WIDTH, HEIGHT))
    height, width = pixels.shape[1:3]
    quarters = [
        [pixels[3, row, column].mean().item() * 255 / 80 for column in (width // 4, 3 * width // 4)]
        for row in (height // 4, 3 * height // 4)
    ]
    assert [[round(value) for value in row] for row in quarters] == shown


def test_a_slanted_picture_is_named(tmp_path):
    path = with_matrix(encode(tmp_path / "a.mp4", "libx264", "yuv420p", corners()), (0.866, 0.5, -0.5, 0.866))
    with pytest.raises(
        ClipError, match=r"is rotated by an angle that is not a multiple of 90 degrees\. Encode it upright"
    ):
        inspect_clip(Clip(path, "x"), SMALL)


def test_what_is_shown_otherwise_has_another_name_in_the_cache(tmp_path):
    """So that pictures that were encoded before it was known how they are shown are encoded again; and no others."""
    path = encode(tmp_path / "a.mp4", "libx264", "yuv420p", corners())

    def changes(*matrix):
        return inspect_clip(Clip(with_matrix(path, matrix), "x"), SMALL).changes

    assert changes(1, 0, 0, 1) == changes(0, 1, -1, 0) == changes(-1, 0, 0, -1) == changes(0, -1, 1, 0) == ()
    assert changes(-1, 0, 0, 1) == changes(1, 0, 0, -1) == changes(0, 1, 1, 0) == changes(0, -1, -1, 0) == ("mirrored",)


# Colours


def coded(
    tmp_path, name, transfer, primaries, colour=(0.8, 0.2, 0.1), matrix=9, codec="libx264", pixel_format="yuv444p"
):
    """A picture of one colour, with these numbers of ffmpeg in its stream; BT.2020's matrix, full range."""
    kr, kb = (0.2627, 0.0593) if matrix == 9 else (0.2126, 0.0722)
    red, green, blue = colour
    y = kr * red + (1 - kr - kb) * green + kb * blue
    parts = y, 0.5 + (blue - y) / (2 - 2 * kb), 0.5 + (red - y) / (2 - 2 * kr)
    planes = np.stack([np.full((HEIGHT, WIDTH), round(255 * part), np.uint8) for part in parts])

    def setup(stream):
        context = stream.codec_context
        context.colorspace, context.color_range, context.color_trc, context.color_primaries = (
            matrix,
            2,
            transfer,
            primaries,
        )
        lossless = {
            "libx264": {"qp": "0"},
            "libx265": {"x265-params": "lossless=1:log-level=none"},
            "libvpx-vp9": {"lossless": "1"},
        }
        stream.options = lossless.get(codec, {})

    def mark(frame):
        frame.colorspace, frame.color_range = matrix, 2
        for name, value in (("color_trc", transfer), ("color_primaries", primaries)):
            if hasattr(frame, name):
                setattr(frame, name, value)

    path = tmp_path / name
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=16)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, pixel_format
        setup(stream)
        for index in range(FRAMES):
            frame = av.VideoFrame.from_ndarray(planes, format=pixel_format)
            frame.pts, frame.time_base = index, Fraction(1, 16)
            mark(frame)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize(("transfer", "name"), [(16, "PQ"), (18, "HLG")])
@pytest.mark.parametrize(
    ("file", "codec"),
    [("a.mp4", "libx264"), ("a.mkv", "libx264"), ("a.mov", "libx265"), ("a.webm", "libvpx-vp9"), ("a.mkv", "ffv1")],
)
def test_hdr_is_left_out_and_named(tmp_path, transfer, name, file, codec):
    path = coded(tmp_path, file, transfer, 9, codec=codec)
    with pytest.raises(ClipError, match=rf"is HDR \({name}\); expected SDR\. Convert it with tone mapping"):
        inspect_clip(Clip(path, "x"), SMALL)


@pytest.mark.parametrize("transfer", [1, 6, 14, 15, 2])
def test_the_wide_colours_of_sdr_become_those_of_bt709(tmp_path, transfer):
    """Against the primaries' chromaticities, worked out here; not against the matrix that the code holds."""
    colour = torch.tensor([0.5, 0.45, 0.4], dtype=torch.float64)
    checked, pixels = read(coded(tmp_path, "a.mp4", transfer, 9, colour.tolist()))
    to_xyz = {
        kind: xyz_of(*points)
        for kind, points in {
            "2020": ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046)),
            "709": ((0.64, 0.33), (0.30, 0.60), (0.15, 0.06)),
        }.items()
    }
    expected = torch.linalg.solve(to_xyz["709"], to_xyz["2020"] @ colour.pow(2.4)).clamp(0, 1).pow(1 / 2.4)
    assert (expected - colour).abs().max() > 0.03, "it makes a difference"
    assert pixels.mean(dim=(0, 1, 2)).tolist() == pytest.approx(expected.tolist(), abs=0.012)
    assert checked.changes == ("primaries 9 to BT.709",)


def test_p3_colours_become_those_of_bt709(tmp_path):
    colour = torch.tensor([0.5, 0.45, 0.4], dtype=torch.float64)
    _, pixels = read(coded(tmp_path, "a.mp4", 1, 12, colour.tolist(), matrix=1))
    p3, own = xyz_of((0.680, 0.320), (0.265, 0.690), (0.150, 0.060)), xyz_of((0.64, 0.33), (0.30, 0.60), (0.15, 0.06))
    expected = torch.linalg.solve(own, p3 @ colour.pow(2.4)).clamp(0, 1).pow(1 / 2.4)
    assert pixels.mean(dim=(0, 1, 2)).tolist() == pytest.approx(expected.tolist(), abs=0.008)


def xyz_of(*points):
    """The matrix from linear RGB with these chromaticities and D65 to XYZ."""
    columns = torch.tensor([[x / y, 1, (1 - x - y) / y] for x, y in points], dtype=torch.float64).T
    white = torch.tensor([0.3127 / 0.3290, 1, (1 - 0.3127 - 0.3290) / 0.3290], dtype=torch.float64)
    return columns * torch.linalg.solve(columns, white)


def test_grey_stays_grey_whatever_the_primaries(tmp_path):
    for primaries in (1, 9):
        _, pixels = read(coded(tmp_path, "a.mp4", 1, primaries, (0.5, 0.5, 0.5)))
        assert pixels.mean(dim=(0, 1, 2)).tolist() == pytest.approx([0.5] * 3, abs=0.004)


# Transparency


ALPHA = [
    ("a.mov", "prores_ks", "yuva444p10le"), ("a.mov", "qtrle", "argb"), ("a.mov", "png", "rgba"), ("a.webm", "libvpx-vp9", "yuva420p"),
    ("a.mkv", "ffv1", "yuva420p"), ("a.apng", "apng", "rgba"),
]  # fmt: skip


@pytest.mark.parametrize(("file", "codec", "pixel_format"), ALPHA)
def test_transparent_areas_are_black(tmp_path, file, codec, pixel_format):
    image = even(200, 100, 60, 255)
    image[:, WIDTH // 2 :, 3] = 0
    image[HEIGHT // 2 :, : WIDTH // 2, 3] = 128
    checked, pixels = read(encode(tmp_path / file, codec, pixel_format, image, "rgba"))
    opaque, half, hidden = pixels[4, 6:18, 6:26], pixels[4, 30:42, 6:26], pixels[4, 6:42, 38:58]
    assert opaque.mean(dim=(0, 1)).tolist() == pytest.approx([200 / 255, 100 / 255, 60 / 255], abs=0.03)
    assert half.mean(dim=(0, 1)).tolist() == pytest.approx([100 / 255, 50 / 255, 30 / 255], abs=0.03)
    assert hidden.max() < 0.02
    assert "transparent areas become black" in checked.notes


@pytest.mark.parametrize(("file", "codec", "pixel_format"), ALPHA)
def test_an_opaque_alpha_channel_is_no_news(tmp_path, file, codec, pixel_format):
    checked, pixels = read(encode(tmp_path / file, codec, pixel_format, even(200, 100, 60, 255), "rgba"))
    assert pixels.mean(dim=(0, 1, 2)).tolist() == pytest.approx([200 / 255, 100 / 255, 60 / 255], abs=0.03)
    assert checked.notes == ()


def test_transparent_colours_of_a_palette_are_black(tmp_path):
    palette = np.zeros((256, 4), np.uint8)
    palette[0], palette[1] = (255, 200, 100, 60), (0, 200, 100, 60)  # alpha first
    places = np.zeros((HEIGHT, WIDTH), np.uint8)
    places[:, WIDTH // 2 :] = 1
    with av.open(str(tmp_path / "a.mov"), "w") as container:
        stream = container.add_stream("png", rate=16)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "pal8"
        for index in range(FRAMES):
            frame = av.VideoFrame.from_ndarray((places, palette), format="pal8")
            frame.pts, frame.time_base = index, Fraction(1, 16)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    _, pixels = read(tmp_path / "a.mov")
    assert pixels[4, :, :28].mean(dim=(0, 1)).tolist() == pytest.approx([200 / 255, 100 / 255, 60 / 255], abs=0.02)
    assert pixels[4, :, 36:].max() < 0.02


def test_transparent_areas_of_a_gif_are_black(tmp_path):
    images = []
    for index in range(FRAMES):
        image = Image.new("P", (WIDTH, HEIGHT), 0)
        image.putpalette([0, 200, 0, 200, 0, 0])
        image.paste(1, (0, 0, 20 + index, HEIGHT))
        images.append(image)
    images[0].save(tmp_path / "a.gif", save_all=True, append_images=images[1:], duration=60, transparency=0, disposal=2)
    _, pixels = read(tmp_path / "a.gif")
    assert pixels[0, :, :16].mean(dim=(0, 1)).tolist() == pytest.approx([200 / 255, 0, 0], abs=0.02)
    assert pixels[:, :, 40:].max() < 0.02


def test_without_the_decoder_transparency_is_named(tmp_path, monkeypatch):
    path = encode(tmp_path / "a.webm", "libvpx-vp9", "yuva420p", even(200, 100, 60, 0), "rgba")
    monkeypatch.setattr("dcm_core.distill.data.video_file.ALPHA_DECODERS", {"vp9": "no-such-decoder"})
    with pytest.raises(
        ClipError, match=r"has transparency that cannot be decoded here\. Encode it without transparency"
    ):
        inspect_clip(Clip(path, "x"), SMALL)


# Which stream


def cover():
    """A red picture as a file."""
    context = av.CodecContext.create("png", "w")
    context.width, context.height, context.pix_fmt, context.time_base = 16, 16, "rgb24", Fraction(1, 16)
    frame = av.VideoFrame.from_ndarray(np.full((16, 16, 3), (255, 0, 0), np.uint8), format="rgb24")
    return b"".join(bytes(packet) for packet in [*context.encode(frame), *context.encode(None)])


def with_cover(path):
    """An .mp4 with a picture before its tracks."""
    data = path.read_bytes()
    moov = data.index(b"moov") - 4
    assert data.index(b"mdat") < moov, "so that nothing else moves"
    length, first = struct.unpack(">I", data[moov : moov + 4])[0], struct.unpack(">I", data[moov + 8 : moov + 12])[0]
    picture = atom(b"ilst", atom(b"covr", atom(b"data", struct.pack(">II", 14, 0), cover())))
    added = atom(b"udta", atom(b"meta", bytes(4), atom(b"hdlr", bytes(8), b"mdirappl", bytes(9)), picture))
    place = moov + 8 + first
    path.write_bytes(
        data[:moov] + struct.pack(">I", length + len(added)) + data[moov + 4 : place] + added + data[place:]
    )
    return path


def test_a_cover_picture_as_the_first_stream_is_passed_over(tmp_path):
    path = with_cover(encode(tmp_path / "a.mp4", "libx264", "yuv420p", even(0, 0, 255)))
    with av.open(str(path)) as container:
        assert [stream.codec_context.name for stream in container.streams.video] == ["png", "h264"]
    _, pixels = read(path)
    assert pixels.mean(dim=(0, 1, 2)).tolist() == pytest.approx([0, 0, 1], abs=0.03)


def test_a_track_of_one_picture_is_passed_over(tmp_path):
    path = tmp_path / "a.mov"
    with av.open(str(path), "w") as container:
        still, video = container.add_stream("png", rate=16), container.add_stream("libx264", rate=16)
        still.width, still.height, still.pix_fmt = 16, 16, "rgb24"
        video.width, video.height, video.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for stream, count, colour in ((still, 1, (255, 0, 0)), (video, FRAMES, (0, 0, 255))):
            for index in range(count):
                image = np.full((stream.height, stream.width, 3), colour, np.uint8)
                frame = av.VideoFrame.from_ndarray(image, format="rgb24")
                frame.pts, frame.time_base = index, Fraction(1, 16)
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
    _, pixels = read(path)
    assert pixels.mean(dim=(0, 1, 2)).tolist() == pytest.approx([0, 0, 1], abs=0.03)


def test_a_bare_stream_says_no_times(tmp_path):
    stream, file = encode(tmp_path / "a.h264", "libx264", "yuv420p", even(9, 9, 9)), tmp_path / "a.mp4"
    stream.rename(file)
    with pytest.raises(ClipError, match=r"has no frame that can be decoded\. Encode or download it again"):
        probe(file)


def test_a_file_of_sound_with_a_cover_holds_no_video(tmp_path):
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 8000, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with av.open(str(with_cover(path))) as container:
        assert len(container.streams.video) == 1
    with pytest.raises(ClipError, match="has no video stream"):
        inspect_clip(Clip(path, "x"), ClipSettings(frames=1, width=16, height=16))


# Kinds of files


@pytest.mark.parametrize(
    ("name", "codec", "pixel_format"),
    [
        ("a.m4v", "libx264", "yuv420p"), ("a.mov", "libx264", "yuv420p"), ("a.ts", "libx264", "yuv420p"), ("a.mts", "libx264", "yuv420p"),
        ("a.m2ts", "mpeg2video", "yuv420p"), ("a.mpg", "mpeg2video", "yuv420p"), ("a.mpeg", "mpeg1video", "yuv420p"),
        ("a.vob", "mpeg2video", "yuv420p"), ("a.wmv", "wmv2", "yuv420p"), ("a.asf", "wmv2", "yuv420p"), ("a.flv", "flv", "yuv420p"),
        ("a.f4v", "libx264", "yuv420p"), ("a.3gp", "libx264", "yuv420p"), ("a.3g2", "libx264", "yuv420p"), ("a.avi", "mpeg4", "yuv420p"),
        ("a.webm", "libvpx-vp9", "yuv420p"), ("a.m2v", "mpeg2video", "yuv420p"), ("a.mxf", "mpeg2video", "yuv420p"),
        ("a.apng", "apng", "rgb24"), ("a.gif", "gif", "rgb8"),
        ("a.mkv", "ffv1", "yuv420p"),
    ],
)  # fmt: skip
def test_every_kind_of_file_is_read_frame_by_frame(tmp_path, name, codec, pixel_format):
    """Frame i is as bright as 25 * i; MPEG-1 and -2 know 25 frames per second and none near 16."""
    path, fps = tmp_path / name, 25 if codec.startswith("mpeg") else 16
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, pixel_format
        stream.bit_rate = 4_000_000
        for index in range(10):
            frame = av.VideoFrame.from_ndarray(even(*[25 * index] * 3), format="rgb24")
            frame.pts, frame.time_base = index, Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert path.suffix in SUFFIXES
    settings = ClipSettings(frames=9, fps=fps, width=WIDTH, height=HEIGHT)
    checked = inspect_clip(Clip(path, "x"), settings)
    pixels = read_clip(checked, settings)
    assert [round(value) for value in (pixels.mean(dim=(1, 2, 3)) * 255 / 25).tolist()] == list(range(9))


def test_interlaced_pictures_are_noted(tmp_path):
    def setup(stream):
        stream.options = {"x264-params": "interlaced=1"}

    path = encode(tmp_path / "a.mts", "libx264", "yuv420p", even(100, 100, 100), setup=setup)
    assert inspect_clip(Clip(path, "x"), SMALL).notes == ("interlaced: moving edges look like combs. Deinterlace it",)


def test_a_picture_beyond_8k_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    path = encode(tmp_path / "a.mp4", "libx264", "yuv420p", even(0, 0, 0))
    assert probe(path).size == (WIDTH, HEIGHT)
    monkeypatch.setattr(video_file, "MAX_PIXELS", WIDTH * HEIGHT - 1)
    with pytest.raises(ClipError, match=r"is 64x48; expected at most 8K \(8192x4320\)\. Encode it smaller"):
        probe(path)


# Mangled files


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Small files of many kinds, with noise in them."""
    folder = tmp_path_factory.mktemp("files")
    noise = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 4), dtype=np.uint8)
    kinds = [
        *ALPHA, ("b.mp4", "libx264", "yuv420p"), ("b.mov", "libx265", "yuv420p10le"), ("b.mkv", "ffv1", "bgr0"), ("b.gif", "gif", "rgb8"),
        ("b.ts", "libx264", "yuv420p"), ("b.avi", "mpeg4", "yuv420p"), ("b.wmv", "wmv2", "yuv420p"), ("b.flv", "flv", "yuv420p"),
    ]  # fmt: skip
    paths = [
        encode(folder / f"{index}{name}", codec, pixels, noise, "rgba")
        for index, (name, codec, pixels) in enumerate(kinds)
    ]
    return [with_matrix(path, (0, 1, -1, 0)) if path.suffix in (".mp4", ".mov") else path for path in paths]


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_mangled_file_gives_pixels_or_our_error_in_time(files, tmp_path, data):
    original = data.draw(st.sampled_from(files), label="file")
    mangled = bytearray(original.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(mangled)) | st.integers(0, min(400, len(mangled))))
        length, new = data.draw(st.sampled_from([0, 1, 4, 100])), data.draw(st.binary(max_size=8))
        mangled[place : place + length] = new
    path = tmp_path / f"a{original.suffix}"
    path.write_bytes(mangled)
    start = time.process_time()
    try:
        _, pixels = read(path)
        assert pixels.isfinite().all() and pixels.min() >= 0 and pixels.max() <= 1
    except ClipError:
        pass
    assert time.process_time() - start < 2


@given(content=st.binary(max_size=300), suffix=st.sampled_from(sorted(SUFFIXES)))
def test_any_bytes_are_pixels_or_our_error(tmp_path_factory, content, suffix):
    path = tmp_path_factory.getbasetemp() / f"any{suffix}"
    path.write_bytes(content)
    with contextlib.suppress(ClipError):
        read(path)


@pytest.mark.parametrize(
    "text",
    ["ffconcat version 1.0\nfile {other}\n", "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{other}\n#EXT-X-ENDLIST\n"],
)
def test_a_file_does_not_lead_to_others(tmp_path, text):
    """A playlist under the name of a video would read files that no list names."""
    other = encode(tmp_path / "other.mp4", "libx264", "yuv420p", even(0, 0, 0))
    for target in (other, other.name):
        path = tmp_path / "a.mp4"
        path.write_text(text.format(other=target))
        with pytest.raises(ClipError, match=r"a\.mp4"):
            read(path)
