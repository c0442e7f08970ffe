"""Sources of clips: folders and lists, what is found in them, and what is not read."""

import json
import os
import sys
from pathlib import PureWindowsPath

import pytest

from dcm_core.distill.data import sources
from dcm_core.distill.data.sources import OUTSIDE, Clip, check_source, find_clips, is_within, source_state
from dcm_core.errors import DCMError


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")


def found(source, **options):
    """Names in the source's folder with captions, in order."""
    folder = source if source.is_dir() else source.parent
    return [(clip.path.relative_to(folder).as_posix(), clip.caption) for clip in find_clips(source, **options).clips]


# Folders


def test_a_folder_gives_its_videos_by_name_with_their_captions(tmp_path):
    touch(tmp_path, "b.mp4", "a.WEBM", "._a.mp4", "c.mov")
    (tmp_path / "sub.mp4").mkdir()
    (tmp_path / "b.txt").write_text("\ufeff a dog \n", encoding="utf-8")
    (tmp_path / "c.TXT").write_text("a cow")
    assert find_clips(tmp_path).clips == [
        Clip(tmp_path / "a.WEBM", ""),
        Clip(tmp_path / "b.mp4", "a dog"),
        Clip(tmp_path / "c.mov", "a cow"),
    ]


def test_further_captions_are_numbered(tmp_path):
    touch(tmp_path, "a.mp4", "b.mp4", "b.2.mp4", "c.mp4")
    for name in ("a", "a.2", "a.10", "b", "b.2", "b.3", "c.1", "d.2"):
        (tmp_path / f"{name}.txt").write_text(f"text {name}")
    clips = find_clips(tmp_path)
    captions = {clip.path.name: clip.captions for clip in clips.clips}
    assert captions == {
        "a.mp4": ("text a", "text a.2", "text a.10"),
        "b.mp4": ("text b", "text b.3"),
        "b.2.mp4": ("text b.2",),
        "c.mp4": ("text c.1",),
    }
    assert clips.others == ("ignored 1 .txt file: d.2.txt",)
    before = source_state(tmp_path)
    (tmp_path / "a.10.txt").write_text("another")
    assert source_state(tmp_path) != before


def test_images_are_clips_where_that_is_wanted(tmp_path):
    touch(tmp_path, "a.mp4", "a.png", "b.JPG", "c.webp")
    (tmp_path / "b.txt").write_text("a dog")
    assert found(tmp_path) == [("a.mp4", "")]
    assert found(tmp_path, images=True) == [("a.mp4", ""), ("b.JPG", "a dog"), ("c.webp", "")]
    assert find_clips(tmp_path, images=True).others == ("ignored 1 .png file: a.png",), "a picture of a video"
    (tmp_path / "a.mp4").unlink()
    with pytest.raises(DCMError, match="has no clips"):
        check_source(tmp_path)
    check_source(tmp_path, images=True)


def test_every_common_kind_of_video_is_read(tmp_path):
    names = [
        f"a.{kind}"
        for kind in ("m4v", "ts", "mpg", "wmv", "flv", "mts", "m2ts", "mpeg", "ogv", "3gp", "vob", "mkv", "gif")
    ]
    touch(tmp_path, *names)
    assert sorted(name for name, _ in found(tmp_path)) == sorted(names)


def test_subfolders_are_read_also_behind_links(tmp_path):
    touch(tmp_path / "clips", "b.mp4", "cats/a.mp4", "cats/old/c.mp4", ".cache/d.mp4")
    touch(tmp_path / "disk", "e.mp4")
    (tmp_path / "clips" / "cats" / "a.txt").write_text("a cat")
    (tmp_path / "clips" / "linked").symlink_to(tmp_path / "disk", target_is_directory=True)
    (tmp_path / "clips" / "cats" / "round").symlink_to(tmp_path / "clips", target_is_directory=True)
    assert found(tmp_path / "clips") == [
        ("b.mp4", ""),
        ("cats/a.mp4", "a cat"),
        ("cats/old/c.mp4", ""),
        ("linked/e.mp4", ""),
    ]


def test_a_folder_of_subfolders_is_no_empty_one(tmp_path):
    touch(tmp_path, "cats/a.mp4")
    check_source(tmp_path)


def test_files_that_are_no_clips_are_counted_and_named(tmp_path):
    touch(tmp_path, "a.mp4", "a.txt", "b.txt", "1.jpg", "2.JPG", "3.jpg", "sub/4.jpg", "README", "metadata.csv")
    assert find_clips(tmp_path).others == (
        "ignored 1 other file: README",
        "ignored 1 .csv file: metadata.csv",
        "ignored 4 .jpg files: 1.jpg, 2.JPG, 3.jpg and 1 more",
        "ignored 1 .txt file: b.txt",
    )


def test_a_source_without_clips_is_refused(tmp_path):
    for look in (check_source, find_clips):
        with pytest.raises(DCMError, match=r"has no clips; expected videos \(.*\.mp4.*\.webm"):
            look(tmp_path)
        with pytest.raises(
            DCMError, match=r"nowhere does not exist; expected a folder of videos, or a list \(\.jsonl, \.json, \.csv\)"
        ):
            look(tmp_path / "nowhere")
        with pytest.raises(DCMError, match="does not exist"):
            look(tmp_path / ("x" * 300))
    touch(tmp_path, "a.txt", "empty.jsonl")
    with pytest.raises(DCMError, match=r"a\.txt is not a list of clips"):
        check_source(tmp_path / "a.txt")
    with pytest.raises(DCMError, match=r"empty\.jsonl has no clips"):
        find_clips(tmp_path / "empty.jsonl")


def test_a_folder_of_too_many_files_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MAX_FILES", 4)
    touch(tmp_path, *(f"{index}.jpg" for index in range(5)))
    with pytest.raises(DCMError, match=r"has more than 4 files\. Choose a folder with only the clips"):
        check_source(tmp_path)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="the superuser may read everything")
def test_a_folder_that_may_not_be_read_is_named(tmp_path):
    touch(tmp_path, "sub/a.mp4", "b.mp4")
    (tmp_path / "sub").chmod(0)
    with pytest.raises(DCMError, match=r"sub cannot be read .*Check its permissions"):
        find_clips(tmp_path)


def test_a_caption_file_that_is_no_utf8_is_a_fault_of_its_clip_alone(tmp_path):
    touch(tmp_path, "a.mp4", "b.mp4")
    (tmp_path / "a.txt").write_text("a cat", encoding="utf-16")
    (tmp_path / "b.txt").write_text("a dog")
    first, second = find_clips(tmp_path).clips
    assert (first.caption, first.fault) == (
        "",
        "has a caption file that is UTF-16, or not a text file. Save it as UTF-8.",
    )
    assert (second.caption, second.fault) == ("a dog", None)


# Lists


def test_a_list_in_a_folder_gives_the_captions_that_are_not_beside_the_clips(tmp_path):
    """As trainers lay folders out: metadata.csv or .jsonl beside videos, or beside a folder of them."""
    touch(tmp_path, "a.mp4", "videos/b.mp4", "c.mp4")
    (tmp_path / "c.txt").write_text("a cow, by hand")
    lines = [
        {"file_name": "a.mp4", "text": "a cat"},
        {"file_name": "videos/b.mp4", "text": "a dog"},
        {"file_name": "c.mp4", "text": "a cow"},
        {"file_name": "gone.mp4", "text": "a bird"},
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert found(tmp_path) == [
        ("a.mp4", "a cat"),
        ("c.mp4", "a cow, by hand"),
        ("gone.mp4", "a bird"),
        ("videos/b.mp4", "a dog"),
    ]
    assert find_clips(tmp_path).others == ()


def test_a_list_in_a_folder_whose_clips_all_have_captions_is_not_read(tmp_path):
    touch(tmp_path, "a.mp4")
    (tmp_path / "a.txt").write_text("a cat")
    (tmp_path / "metadata.json").write_text("{ no JSON")
    assert found(tmp_path) == [("a.mp4", "a cat")]


def test_videos_txt_in_a_folder(tmp_path):
    touch(tmp_path, "videos/0.mp4", "videos/1.mp4")
    (tmp_path / "videos.txt").write_text("videos/0.mp4\nvideos/1.mp4\n")
    (tmp_path / "prompt.txt").write_text("a cat\na dog\n")
    assert found(tmp_path) == [("videos/0.mp4", "a cat"), ("videos/1.mp4", "a dog")]
    assert find_clips(tmp_path).others == ()


def test_a_folder_that_holds_a_list_alone(tmp_path):
    touch(tmp_path, "elsewhere/a.mp4")
    touch(tmp_path, "lists/metadata.jsonl")
    (tmp_path / "lists" / "metadata.jsonl").write_text(
        json.dumps({"video_path": str(tmp_path / "elsewhere" / "a.mp4"), "caption": "a"})
    )
    check_source(tmp_path / "lists")
    assert [clip.path for clip in find_clips(tmp_path / "lists").clips] == [tmp_path / "elsewhere" / "a.mp4"]


def test_paths_of_a_list_start_at_its_folder_or_the_videos_beside_it(tmp_path):
    touch(tmp_path, "clips/a.mp4", "videos/0.mp4")
    lines = [
        {"path": "clips/a.mp4", "cap": ["a cat"]},
        {"path": "0.mp4", "cap": ["a dog"]},
        {"path": "gone.mp4", "cap": "x"},
    ]
    (tmp_path / "videos2caption.json").write_text(json.dumps(lines))
    assert found(tmp_path / "videos2caption.json") == [
        ("clips/a.mp4", "a cat"),
        ("videos/0.mp4", "a dog"),
        ("gone.mp4", "x"),
    ]


@pytest.mark.skipif(os.sep != "/", reason="of other systems")
def test_a_path_written_on_windows_is_found(tmp_path):
    touch(tmp_path, "clips/a.mp4", "odd\\name.mp4", "name.mp4")
    (tmp_path / "data.jsonl").write_text(
        '{"video": "clips\\\\a.mp4", "caption": "a"}\n{"video": "odd\\\\name.mp4", "caption": "b"}'
    )
    assert found(tmp_path / "data.jsonl") == [("clips/a.mp4", "a"), ("odd\\name.mp4", "b")]


@pytest.mark.parametrize("name", ["a\0b.mp4", "x" * 5000, "\x1b[31m.mp4", "\ud800.mp4", "n" * 300 + ".mp4"])
def test_hostile_names_in_a_list_are_faults(tmp_path, name):
    (tmp_path / "data.jsonl").write_text(json.dumps({"video": name, "caption": "a"}))
    for roots in (None, [tmp_path]):
        (clip,) = find_clips(tmp_path / "data.jsonl", roots=roots).clips
        assert clip.fault is not None or not os.path.isfile(clip.path)
        source_state(tmp_path / "data.jsonl", roots=roots)


# Where clips may be


@pytest.fixture
def walled(tmp_path):
    """A folder that may be read, with links that leave it; and a secret beside it."""
    inside, secret = tmp_path / "input", tmp_path / "secret"
    touch(inside, "a.mp4")
    touch(secret, "s.mp4")
    (secret / "s.txt").write_text("a secret")
    (inside / "file.mp4").symlink_to(secret / "s.mp4")
    (inside / "folder").symlink_to(secret, target_is_directory=True)
    return inside, secret


def test_links_that_leave_the_roots_are_named_and_not_followed(walled):
    inside, _ = walled
    assert "folder/s.mp4" in dict(found(inside)), "without roots it is read"
    clips, others = find_clips(inside, roots=[inside])
    assert [(clip.path.name, clip.fault) for clip in clips] == [("a.mp4", None), ("file.mp4", OUTSIDE)]
    assert others == ("ignored 1 other file: folder",)


@pytest.mark.parametrize("name", [r"\\evil.test\share\a.mp4", "//evil.test/share", "D:/a.mp4", r"\\?\C:\clips\a.mp4"])
def test_another_drive_or_server_is_not_asked(name, monkeypatch):
    monkeypatch.setattr(os.path, "realpath", lambda path: pytest.fail(f"{path} was looked at"))
    assert is_within(PureWindowsPath(name), [PureWindowsPath("C:/clips")]) is False


@pytest.mark.parametrize(
    "pattern", ["{secret}/{name}", "../secret/{name}", "folder/{name}", "../../../../../..{secret}/{name}"]
)
def test_a_list_does_not_tell_what_exists_outside_the_roots(walled, pattern):
    inside, secret = walled

    def clip_of(name):
        (inside / "data.jsonl").write_text(
            json.dumps({"video": pattern.format(secret=secret, name=name), "caption": "a"})
        )
        (clip,) = find_clips(inside / "data.jsonl", roots=[inside]).clips
        return str(clip.path).replace(name, "?"), clip.fault

    assert clip_of("s.mp4") == clip_of("t.mp4")
    assert clip_of("s.mp4")[1] == OUTSIDE


def test_nor_does_a_folder_of_videos_beside_the_list(walled):
    inside, secret = walled
    (inside / "lists").mkdir()
    (inside / "lists" / "videos").symlink_to(secret, target_is_directory=True)
    lines = [{"video": name, "caption": "a"} for name in ("s.mp4", "t.mp4")]
    path = inside / "lists" / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    assert [clip.path for clip in find_clips(path).clips] == [
        inside / "lists" / "videos" / "s.mp4",
        inside / "lists" / "t.mp4",
    ]
    assert [clip.path for clip in find_clips(path, roots=[inside]).clips] == [
        inside / "lists" / "s.mp4",
        inside / "lists" / "t.mp4",
    ]


def test_files_inside_the_roots_are_found(walled):
    inside, _ = walled
    (inside / "data.jsonl").write_text(json.dumps({"video": str(inside / "a.mp4"), "caption": "a"}))
    assert [
        clip.fault for clip in find_clips(inside / "data.jsonl", roots=[inside.parent / "other", inside]).clips
    ] == [None]


# State


def test_the_state_changes_with_every_file_and_only_then(clip, tmp_path):
    path = clip("a.mkv")
    states = [source_state(tmp_path)]
    assert source_state(tmp_path) == states[0]
    path.with_suffix(".txt").write_text("a dog")
    states.append(source_state(tmp_path))
    path.write_bytes(path.read_bytes() + b" ")
    states.append(source_state(tmp_path))
    clip("b.mkv", frames=1)
    states.append(source_state(tmp_path))
    (tmp_path / "b.txt").write_text("a cat", encoding="utf-16")
    states.append(source_state(tmp_path))
    assert len(set(states)) == 5


def test_the_state_changes_with_what_is_wrong(tmp_path):
    states = set()
    for entry in ({"video": "a.mp4"}, {"video": "a.mp4", "type": "image"}):
        (tmp_path / "data.jsonl").write_text(json.dumps(entry))
        states.add(source_state(tmp_path / "data.jsonl"))
    assert len(states) == 2


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs names that are bytes")
def test_a_name_that_is_no_text_has_a_state(tmp_path):
    touch(tmp_path, "\udcff.mp4")
    assert source_state(tmp_path)
