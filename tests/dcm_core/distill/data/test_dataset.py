"""Encoding: each clip and text once, again only what changed. Data sets: what comes back. Batches: every clip in every epoch."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dcm_core.distill.data import clips
from dcm_core.distill.data.clips import ClipSettings, check_clips
from dcm_core.distill.data.dataset import TensorDataset
from dcm_core.distill.data.encode import Encoders, prepare
from dcm_core.distill.data.sources import find_clips
from dcm_core.errors import CheckpointError, DCMError
from dcm_core.files.tensor_file import TensorFile
from dcm_core.files.writing import write_tensors

SMALL = ClipSettings(frames=5, fps=16, width=64, height=48)


def shrink(pixels):
    """A latent that still tells the clips apart: every 4th frame, every 8th pixel."""
    return pixels.permute(3, 0, 1, 2)[:, ::4, ::8, ::8].contiguous()


def embed(text):
    return [[torch.full((1, 3, 4), float(len(text))), {"pooled_output": torch.ones(1, 2)}]]


class Recorder:
    """Encoders that write down what they are given."""

    def __init__(self):
        self.videos, self.texts, self.freed = [], [], 0

    def encoders(self, **changes):
        return dataclasses.replace(Encoders(self.video, self.text, "vae", "t5", self.free), **changes)

    def video(self, pixels):
        self.videos.append(tuple(pixels.shape[2:0:-1]))
        return shrink(pixels)

    def text(self, text):
        self.texts.append(text)
        return embed(text)

    def free(self):
        self.freed += 1


@pytest.fixture
def run(tmp_path):
    """run(settings=..., negative=..., **changed encoders) -> the data set, what was encoded for it: videos, texts, times freed."""

    def prepared(settings=SMALL, negative="", progress=None, **changes):
        record = Recorder()
        data = prepare(tmp_path, settings, record.encoders(**changes), tmp_path / ".cache", negative, progress)
        return data, (len(record.videos), record.texts, record.freed)

    return prepared


@pytest.fixture
def three(clip):
    """Three clips of two sizes; two share a caption."""
    clip("a.mkv", "a cat")
    clip("b.mkv", "a big dog", paint=lambda i: 100 + i, size=(48, 64))
    clip("c.mkv", "a cat", paint=lambda i: 200 - i)


def test_everything_is_encoded_once(three, run):
    data, done = run(negative="bad")
    assert done == (3, ["a cat", "a big dog", "bad", ""], 1)
    assert str(data) == "3 clips, 2 sizes"
    again, done = run(negative="bad")
    assert done == (0, [], 0), "no encoder is called"
    assert again == data


def test_what_comes_back_is_what_was_encoded(three, run):
    data, _ = run(negative="bad")
    assert [data.shape(i) for i in range(3)] == [(3, 2, 6, 8), (3, 2, 8, 6), (3, 2, 6, 8)]
    assert all(data.latent(i).shape == data.shape(i) for i in range(3))
    assert [round(data.latent(i)[0, 1, 0, 0].item() * 255) for i in range(3)] == [16, 104, 196]
    texts = [data.conditioning(0), data.conditioning(1), data.conditioning(2), data.unconditional()]
    assert [text[0][0].unique().tolist() for text in texts] == [[5.0], [9.0], [5.0], [3.0]]
    assert texts[0][0][1]["pooled_output"].tolist() == [[1, 1]]
    assert data.buckets == [[0, 2], [1]]
    assert data.buckets_of([2, 1]) == [[2], [1]]


def test_a_changed_clip_is_encoded_again_alone(three, run, clip):
    before, _ = run()
    clip("c.mkv", "a cat", paint=lambda i: 50)
    after, done = run()
    assert done == (1, [], 1)
    assert round(after.latent(2).mean().item() * 255) == 50
    assert after.fingerprint != before.fingerprint


def test_a_changed_caption_is_encoded_again_alone(three, run, tmp_path):
    before, _ = run()
    (tmp_path / "b.txt").write_text("a fox")
    after, done = run()
    assert done == (0, ["a fox"], 1)
    assert after.conditioning(1)[0][0].unique().tolist() == [5.0]
    assert after.fingerprint != before.fingerprint


@pytest.mark.parametrize(
    "change", [{"width": 48}, {"frames": 9}, {"fps": 8.0}, {"buckets": False}], ids=lambda change: next(iter(change))
)
def test_other_settings_encode_the_clips_they_change_again(three, run, change):
    run()
    _, done = run(dataclasses.replace(SMALL, **change))
    # without buckets only the portrait clip changes its size
    assert done == (1 if "buckets" in change else 3, [], 1)
    assert run()[1] == (0, [], 0), "what was there stays"


def test_another_encoder_encodes_its_part_again(three, run):
    run()
    assert run(video_id="other")[1] == (3, [], 1)
    assert run(text_id="other")[1] == (0, ["a cat", "a big dog", ""], 1)
    assert run()[1] == (0, [], 0)


def test_further_captions_empty_text_and_sample_prompts_are_encoded_with_the_rest(clip, run, tmp_path):
    clip("a.mkv", "a cat")
    (tmp_path / "a.2.txt").write_text("a small cat")
    record = Recorder()
    data = prepare(tmp_path, SMALL, record.encoders(), tmp_path / ".cache", "bad", sample_prompts=["a fox", "a cat"])
    assert record.texts == ["a cat", "a small cat", "bad", "", "a fox"]
    assert data.captions(0) == 2 and torch.equal(data.conditioning(0, 1)[0][0], embed("a small cat")[0][0])
    assert data.empty()[0][0].unique().tolist() == [0.0]
    assert [prompt[0][0].unique().item() for prompt in data.sample_prompts()] == [5.0, 5.0]
    plain, done = run(negative="bad")
    assert done == (0, [], 0) and plain.fingerprint == data.fingerprint, "samples do not change a run"
    (tmp_path / "a.2.txt").unlink()
    assert run(negative="bad")[0].fingerprint != data.fingerprint


def test_each_window_is_encoded_once(clip, run):
    clip("a.mkv", frames=20)
    clip("b.mkv", frames=7, paint=lambda i: 100 + i)
    starts, done = run()
    assert done[0] == 2
    data, done = run(dataclasses.replace(SMALL, window="all"))
    assert done[0] == 3, "the windows at the start are there"
    first_frames = [round(data.latent(index)[0, 0].mean().item() * 255) for index in range(len(data))]
    assert first_frames == [0, 20, 40, 60, 100]
    assert data.entries[0].latent == starts.entries[0].latent
    assert run(dataclasses.replace(SMALL, window="all"))[1] == (0, [], 0)


def test_images_are_videos_of_one_frame(clip, run, video, tmp_path):
    clip("a.mkv")
    save_image(tmp_path / "b.png", 100)
    (tmp_path / "b.txt").write_text("a dog")
    without, _ = run()
    assert len(without) == 1 and "ignored 1 .png file: b.png" in without.report()
    data, done = run(dataclasses.replace(SMALL, images=True))
    assert done == (1, ["a dog"], 1) and [data.shape(index) for index in range(2)] == [(3, 2, 6, 8), (3, 1, 6, 8)]
    assert round(data.latent(1).mean().item() * 255) == 100
    assert data.buckets == [[1], [0]] and data.example == 0
    (tmp_path / "b.png").rename(tmp_path / "0.png")
    (tmp_path / "b.txt").rename(tmp_path / "0.txt")
    assert run(dataclasses.replace(SMALL, images=True))[0].example == 1, "an image is no example of a video"
    with pytest.raises(DCMError, match="images is on, but the clips are for image to video"):
        run(dataclasses.replace(SMALL, images=True), **IMAGES)


def save_image(path, value, size=(64, 48)):
    Image.new("RGB", size, (value, value, value)).save(path)


def first_frame(pixels):
    return {"concat_latent_image": shrink(pixels[:1])[None], "concat_mask": torch.zeros(1, 1, 2, 6, 8)}


IMAGES = {"encode_image": first_frame, "image_id": "first"}


def test_image_conditionings_are_encoded_once_beside_the_latents(three, run):
    plain, _ = run()
    assert plain.image(0) == {}
    data, done = run(**IMAGES)
    assert done == (0, [], 1), "latents and texts are those of text to video"
    assert [round(data.image(index)["concat_latent_image"].mean().item() * 255) for index in range(3)] == [0, 100, 200]
    assert data.fingerprint != plain.fingerprint and run()[0].fingerprint == plain.fingerprint
    again, done = run(encode_image=lambda pixels: pytest.fail("called"), image_id="first")
    assert done == (0, [], 0) and again == data
    other, _ = run(**IMAGES | {"image_id": "last"})
    assert other.fingerprint != data.fingerprint


def test_a_damaged_image_conditioning_is_made_again(three, run):
    data, _ = run(**IMAGES)
    image = data.image(1)
    data.entries[1].image.write_bytes(b"")
    with pytest.raises(DCMError, match="of the encoded data cannot be read"):
        data.image(1)
    after, done = run(**IMAGES)
    assert done == (0, [], 1)
    assert torch.equal(after.image(1)["concat_latent_image"], image["concat_latent_image"])


def test_an_image_conditioning_without_numbers_leaves_its_clip_out(three, run):
    def broken(pixels):
        image = first_frame(pixels)
        return image | {"concat_mask": image["concat_mask"] / (0 if pixels.mean() > 0.6 else 1)}

    data, _ = run(encode_image=broken, image_id="broken")
    assert len(data) == 2 and "left out c.mkv: has an image conditioning with NaN" in data.report()


def test_images_in_memory_fit_the_latents():
    latents, text = [torch.ones(2, 1, 2, 2)] * 2, embed("a")
    for images in ([{"a": torch.ones(1)}], [{"a": torch.ones(1)}, {"b": torch.ones(1)}]):
        with pytest.raises(
            DCMError, match=r"2 latents with . image conditionings?; expected one for each latent, all with"
        ):
            TensorDataset(latents, [text], [0, 0], text, images)
    made = [TensorDataset(latents, [text], [0, 0], text, [{"a": torch.full((1,), value)}] * 2) for value in (1.0, 2.0)]
    assert made[0].fingerprint != made[1].fingerprint != TensorDataset(latents, [text], [0, 0], text).fingerprint


def test_another_negative_prompt_is_encoded_alone(three, run):
    run()
    assert run(negative="worse")[1] == (0, ["worse"], 1)


@pytest.mark.parametrize("damage", ["cut", "gone", "empty", "of another kind", "flipped"])
def test_damaged_files_of_the_cache_are_made_again(three, run, damage):
    data, _ = run()
    for path in (data.entries[0].latent, data.entries[1].conditionings[0]):
        if damage == "gone":
            path.unlink()
        elif damage == "of another kind":
            path.unlink()
            write_tensors(path, {"latent": torch.ones(3, 2, 6, 8)}, {})
        elif damage == "flipped":
            path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1]))
        else:
            path.write_bytes(path.read_bytes()[:-7] if damage == "cut" else b"")
    after, done = run()
    assert done == (1, ["a big dog"], 1)
    assert torch.equal(after.latent(0), data.latent(0)) and after.fingerprint == data.fingerprint


def test_equal_files_are_encoded_once(clip, run):
    one, two = clip("a.mkv", "one"), clip("b.mkv", "two")
    two.write_bytes(one.read_bytes())
    data, done = run()
    assert done == (1, ["one", "two", ""], 1)
    assert len(data) == 2 and torch.equal(data.latent(0), data.latent(1))


def test_clips_that_cannot_be_used_are_left_out_and_named(three, run, clip):
    clip("b.mkv", frames=2)
    clip("d.mkv", caption="")
    clip("e.mkv", times=[0, 10, 100, 300, 310, 320])
    data, done = run()
    assert done[0] == 3 and [entry.clip.name for entry in data.entries] == ["a.mkv", "c.mkv", "e.mkv"]
    assert str(data) == "3 clips, 1 size, 2 files left out"
    lines = data.report().split("\n")
    assert lines[1] == "64x48: 3"
    assert [line[:21] for line in lines[2:]] == [
        "left out b.mkv: lasts",
        "left out d.mkv: has n",
        "note e.mkv: variable ",
    ]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs names that are bytes")
def test_a_name_that_is_no_text(three, run, clip, tmp_path):
    """It is no reason to leave a clip out; what is said of it can be shown."""
    for name, caption in (("\udcff", "a mouse"), ("\udcfe", "")):
        clip("d.mkv", caption).rename(tmp_path / f"{name}.mkv")
        (tmp_path / "d.txt").rename(tmp_path / f"{name}.txt")
    data, _ = run()
    assert len(data) == 4 and all(data.latent(index).isfinite().all() for index in range(4))
    assert r"left out \udcfe.mkv: has no caption" in data.report()
    data.report().encode()
    assert run()[1] == (0, [], 0), "the cache holds it"


def test_a_caption_of_half_a_surrogate_is_left_out(clip, tmp_path, run):
    clip("a.mkv", "a cat")
    (tmp_path / "list.jsonl").write_text(
        '{"video": "a.mkv", "caption": "a cat"}\n{"video": "a.mkv", "caption": "a \\ud83d cat"}'
    )
    record = Recorder()
    data = prepare(tmp_path / "list.jsonl", SMALL, record.encoders(), tmp_path / ".cache")
    assert len(data) == 1 and "a.mkv: has a caption that is not UTF-8" in str(data.problems[0])


def test_the_report_names_what_is_no_clip_and_what_the_list_says(three, run, tmp_path):
    (tmp_path / "cover.jpg").write_bytes(b"")
    (tmp_path / "a.txt").unlink()
    (tmp_path / "captions.json").write_text(json.dumps({"a.mkv": ["a cat", "a small cat"]}))
    data, _ = run()
    lines = data.report().split("\n")
    assert lines[0] == "3 clips, 2 sizes" and [entry.captions for entry in data.entries] == [
        ("a cat", "a small cat"),
        ("a big dog",),
        ("a cat",),
    ]
    assert lines[-1] == "ignored 1 .jpg file: cover.jpg"


def test_pictures_that_were_read_in_another_way_are_encoded_again(three, run, monkeypatch):
    """A cache of a version that showed some kind of picture otherwise; other clips stay as they are."""
    probe = clips.probe
    mirrored = {"b.mkv": ("mirrored",)}
    run()
    monkeypatch.setattr(clips, "probe", lambda path: probe(path)._replace(changes=mirrored.get(path.name, ())))
    monkeypatch.setattr(clips, "INFO_VERSION", "of another version")
    assert run()[1] == (1, [], 1)


def test_a_clip_that_fails_while_it_is_encoded_is_left_out(three, run):
    def some_nan(pixels):
        return shrink(pixels) * (float("nan") if pixels.mean() > 0.7 else 1)

    data, _ = run(encode_video=some_nan)
    assert [entry.clip.name for entry in data.entries] == ["a.mkv", "b.mkv"]
    assert "c.mkv: has a latent with NaN" in data.report()
    with pytest.raises(DCMError, match=r"No clip can be used: 3 clips left out(?s:.*)a\.mkv: has a latent with NaN"):
        run(encode_video=lambda pixels: shrink(pixels) * float("nan"), video_id="broken")


def test_a_clip_that_is_damaged_after_its_first_frame_is_left_out(three, run, clip, tmp_path):
    """The check decodes one frame; the others are first looked at when they are encoded."""
    noise = np.random.default_rng(0).integers(0, 255, (20, 48, 64, 3))
    path = clip("d.mp4", "noise", paint=lambda i: noise[i])
    data = bytearray(path.read_bytes())
    data[len(data) // 4 : len(data) // 2] = bytes(len(data) // 2 - len(data) // 4)
    path.write_bytes(data)
    whole, broken = check_clips(find_clips(tmp_path).clips, SMALL)
    assert len(whole) == 4 and not broken, "its times are as they were"
    data, done = run()
    assert [entry.clip.name for entry in data.entries] == ["a.mkv", "b.mkv", "c.mkv"] and done[0] == 3
    assert "left out d.mp4: cannot be read" in data.report()


@pytest.fixture
def opened(monkeypatch):
    """Names of the clips, each time that one is opened and hashed for its check."""
    names, probe, content_hash = [], clips.probe, clips.content_hash
    monkeypatch.setattr(clips, "probe", lambda path: names.append(path.name) or probe(path))
    monkeypatch.setattr(clips, "content_hash", lambda path: names.append(path.name) or content_hash(path))
    return names


def test_a_file_is_hashed_once_right_after_its_check(three, run, opened):
    first, _ = run()
    assert opened == ["a.mkv", "a.mkv", "b.mkv", "b.mkv", "c.mkv", "c.mkv"]
    opened.clear()
    again, _ = run(dataclasses.replace(SMALL, width=48))
    assert opened == [], "whatever it is read as"
    assert [entry.clip for entry in again.entries] == [entry.clip for entry in first.entries]
    assert run()[0] == first


def test_a_file_of_another_time_is_hashed_again(three, run, opened, tmp_path):
    """Of the same size as before, with another picture or with the same."""
    first, _ = run()
    opened.clear()
    path = tmp_path / "a.mkv"
    content, time = path.read_bytes(), path.stat().st_mtime_ns
    frame = content.index(b"\x1f\x43\xb6\x75") + 200  # within a picture of the first cluster
    path.write_bytes(content[:frame] + bytes([content[frame] ^ 1]) + content[frame + 1 :])
    os.utime(path, ns=(time, time + 1))
    changed, (videos, _, _) = run()
    assert opened == ["a.mkv", "a.mkv"] and videos == 1
    assert changed.entries[0].latent != first.entries[0].latent and changed.entries[1:] == first.entries[1:]
    path.write_bytes(content)
    os.utime(path, ns=(time, time + 2))
    opened.clear()
    assert run() == (first, (0, [], 0)) and opened == ["a.mkv", "a.mkv"]


def test_a_file_of_another_size_or_name_is_hashed_again(three, run, opened, tmp_path):
    run()
    opened.clear()
    path = tmp_path / "a.mkv"
    time = path.stat().st_mtime_ns
    path.write_bytes(path.read_bytes() + b"\0")
    os.utime(path, ns=(time, time))
    run()
    assert opened == ["a.mkv", "a.mkv"]
    (tmp_path / "b.mkv").rename(tmp_path / "d.mkv")
    (tmp_path / "b.txt").rename(tmp_path / "d.txt")
    opened.clear()
    assert run()[1] == (0, [], 0) and opened == ["d.mkv", "d.mkv"]


@pytest.mark.parametrize("damage", [b"", b"{}", b"[]", b"\xff", b'{"content": 1'])
def test_what_the_cache_knows_of_a_file_is_found_out_again_where_it_is_damaged(three, run, opened, damage, tmp_path):
    first, _ = run()
    opened.clear()
    for path in (tmp_path / ".cache").glob("*.json"):
        path.write_bytes(damage)
    assert run()[0] == first and len(opened) == 6
    opened.clear()
    assert run()[0] == first and opened == []


def test_a_cache_that_cannot_be_written_to_knows_nothing_of_files(three, run, opened, monkeypatch, tmp_path):
    first, _ = run()
    for path in (tmp_path / ".cache").glob("*.json"):
        path.unlink()
    opened.clear()
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=0))
    for _ in range(2):
        assert run()[0] == first
    assert len(opened) == 12


def test_the_vae_of_another_kind_of_model_is_refused(three, run):
    with pytest.raises(DCMError, match=r"latent of shape \(1, 3, 2, 6, 8\); expected channels, frames"):
        run(encode_video=lambda pixels: shrink(pixels)[None])


def test_a_text_without_finite_values_is_named_and_not_kept(three, run):
    with pytest.raises(DCMError, match=r"NaN or infinite values for 'a [a-z]+'\. Run it in bfloat16"):
        run(encode_text=lambda text: [[torch.full((1, 3, 4), torch.nan), {}]])
    _, (videos, texts, _) = run()
    assert videos == 0 and len(texts) == 3


def test_an_interrupt_loses_only_the_clip_in_work(three, run):
    class Interrupt(Exception):
        pass

    videos = []

    def two_then_stop(pixels):
        if len(videos) == 2:
            raise Interrupt
        videos.append(1)
        return shrink(pixels)

    with pytest.raises(Interrupt):
        run(encode_video=two_then_stop)
    assert run()[1][0] == 1


def test_progress_rises_to_its_end_and_can_interrupt(three, run):
    calls = []
    run(progress=lambda *done: calls.append(done))
    done = [value for value, _ in calls]
    assert done == sorted(done) and {total for _, total in calls} == {done[-1]}
    assert len(calls) >= 3 + 3 + 3, "each check, each clip, each text"
    calls.clear()
    run(progress=lambda *done: calls.append(done))
    assert calls[-1] == (1000, 1000), "with everything cached as well"

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(progress=stop)


def test_a_full_disk_is_an_error_that_leaves_no_file(three, run, monkeypatch, tmp_path):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=0))
    with pytest.raises(CheckpointError, match="Make room"):
        run()
    assert list((tmp_path / ".cache").iterdir()) == []


def test_lost_cache_files_are_named_when_they_are_read(three, run):
    data, _ = run()
    data.entries[0].latent.unlink()
    data.negative.write_bytes(b"")
    with pytest.raises(DCMError, match=r"does not exist.*run DCM Video Dataset again"):
        data.latent(0)
    with pytest.raises(DCMError, match="run DCM Video Dataset again"):
        data.unconditional()


def test_a_jsonl_gives_one_file_several_captions(clip, tmp_path):
    clip("a.mkv")
    lines = [{"video": "a.mkv", "caption": text} for text in ("one", "two")]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    record = Recorder()
    data = prepare(tmp_path / "data.jsonl", SMALL, record.encoders(), tmp_path / ".cache")
    assert [entry.captions for entry in data.entries] == [("one",), ("two",)] and len(record.videos) == 1


def test_latents_are_written_as_the_encoder_made_them(three, run):
    """Also a view of an inference tensor, as the host's VAE makes."""
    with torch.inference_mode():
        data, _ = run(encode_video=lambda pixels: shrink(pixels).bfloat16().transpose(2, 3))
    file = TensorFile(data.entries[0].latent)
    assert file.dtypes == {"latent": torch.bfloat16} and file.shapes == {"latent": (3, 2, 8, 6)}
    assert not data.latent(0).is_inference()


# Data in memory


def in_memory(count=5, which=None):
    latents = [torch.full((2, 1, 4, 4 + 2 * (i % 2)), float(i)) for i in range(count)]
    return TensorDataset(latents, [embed("a"), embed("bb")], which or [i % 2 for i in range(count)], embed(""))


def test_data_in_memory_has_the_same_interface():
    data = in_memory()
    assert len(data) == 5 and data.buckets == [[0, 2, 4], [1, 3]]
    assert data.latent(3).unique().tolist() == [3.0] and data.shape(3) == (2, 1, 4, 6)
    assert data.conditioning(3)[0][0].unique().tolist() == [2.0]
    assert data.unconditional()[0][0].unique().tolist() == [0.0]


def test_fingerprints_tell_data_apart():
    same, other_text, fewer = in_memory(), in_memory(which=[0, 0, 0, 0, 0]), in_memory(4)
    assert same.fingerprint == in_memory().fingerprint
    assert len({data.fingerprint for data in (same, other_text, fewer)}) == 3


def test_fingerprints_tell_shapes_apart():
    wide, high = (TensorDataset([torch.ones(1, 1, *size)], [embed("a")], [0], embed("")) for size in ((2, 4), (4, 2)))
    assert wide.fingerprint != high.fingerprint


@pytest.mark.parametrize("which", [[0], [0, 2], [0, -1]])
def test_texts_that_do_not_fit_the_latents_are_refused(which):
    with pytest.raises(DCMError, match="expected"):
        TensorDataset([torch.ones(1)] * 2, [embed("a"), embed("b")], which, embed(""))


@given(count=st.integers(1, 30), held_out=st.integers(0, 29), seed=st.integers(0, 5))
def test_split_parts_all_clips_and_repeats_itself(count, held_out, seed):
    data = in_memory(count)
    if held_out >= count:
        with pytest.raises(DCMError, match="cannot be held out"):
            data.split(held_out, seed)
        return
    train, held = data.split(held_out, seed)
    assert len(held) == held_out and sorted(train + held) == list(range(count))
    assert train == sorted(train) and held == sorted(held)
    assert (train, held) == data.split(held_out, seed)


def test_split_depends_on_the_seed():
    assert len({tuple(in_memory(30).split(5, seed)[1]) for seed in range(5)}) == 5


# Batches


def test_processes_divide_the_work(clip, tmp_path):
    """Two processes, on one disk and on two; a failure of one ends both."""
    for index in range(5):
        clip(f"{index}.mkv", f"clip {'x' * index}", paint=lambda i, index=index: 40 * index + i)
    clip("short.mkv", "too short", frames=2)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launcher = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [
        sys.executable,
        str(Path(__file__).with_name("encode_in_parallel.py")),
        str(tmp_path),
        str(tmp_path / "out"),
    ]
    launcher["PYTHONPATH"] = str(Path(__file__).parents[4])
    processes = [subprocess.Popen(command, env={**launcher, "RANK": str(rank)}) for rank in range(2)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    first, second = (json.loads((tmp_path / f"out_{rank}.json").read_text()) for rank in range(2))
    # six texts: five captions and the negative prompt
    assert [first["shared"][:2], second["shared"][:2]] == [[3, 3], [2, 3]]
    assert first["again"][:2] == second["again"][:2] == [0, 0]
    assert first["own disks"][:2] == second["own disks"][:2] == [5, 6]
    results = {run[2] for runs in (first, second) for run in (runs["shared"], runs["again"], runs["own disks"])}
    assert len(results) == 1 and first["shared"][3] == second["shared"][3]
    assert "short.mkv" in first["shared"][3]
    assert second["one fails"][2] == "the disk is full"
    assert "process 1 of 2 on" in first["one fails"][2] and "failed. the disk is full" in first["one fails"][2]
    assert first["marks left"] == second["marks left"] == []
