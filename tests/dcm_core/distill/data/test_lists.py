"""Lists of clips: what trainers write is read, what is broken is named by its place, and no file hurts the process."""

import json
import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcm_core.distill.data import lists
from dcm_core.distill.data.lists import IN_FOLDER, Listed, is_list, read_list
from dcm_core.errors import DCMError


def written(folder, name, text):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def entries(folder, name, text):
    return [(entry.video, entry.caption) for entry in read_list(written(folder, name, text))]


CAT_AND_DOG = [("a.mp4", "a cat"), ("b/b.mp4", "a dog")]


# As trainers write them


@pytest.mark.parametrize(
    ("video", "caption"),
    [
        ("video", "caption"), ("video_path", "caption"), ("file_name", "text"), ("file_path", "text"), ("media_path", "caption"),
        ("path", "cap"), ("video", "prompt"), ("Video", "Caption"), (" filename ", "prompt"), ("path", "captions"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("many", [False, True])
def test_every_pair_of_keys_is_read_from_every_kind_of_file(tmp_path, video, caption, many):
    rows = [
        {video: name, "width": 832, "type": "video", caption: [text] if many else text} for name, text in CAT_AND_DOG
    ]
    assert entries(tmp_path, "a.jsonl", "\n".join(map(json.dumps, rows))) == CAT_AND_DOG
    assert entries(tmp_path, "a.json", json.dumps(rows, indent=2)) == CAT_AND_DOG
    assert entries(tmp_path, "b.jsonl", json.dumps(rows)) == CAT_AND_DOG, "an array under the name of lines"
    assert entries(tmp_path, "b.json", json.dumps({"version": 1, "data": rows})) == CAT_AND_DOG
    if not many:
        for mark in ",;\t":
            table = [mark.join(str(value) for value in row) for row in (rows[0], *(row.values() for row in rows))]
            assert entries(tmp_path, "a.csv", "\ufeff" + "\r\n".join(table) + "\r\n\r\n") == CAT_AND_DOG


def test_one_object_of_names_and_captions(tmp_path):
    """captions.json of diffusion-pipe has lists of captions; others have texts, or objects with one."""
    for wrap in (lambda text: text, lambda text: [text], lambda text: {"caption": text}):
        data = {name: wrap(text) for name, text in CAT_AND_DOG}
        assert entries(tmp_path, "captions.json", json.dumps(data)) == CAT_AND_DOG
    assert entries(tmp_path, "one.json", json.dumps({"video": "a.mp4", "caption": "a cat"})) == CAT_AND_DOG[:1]


@pytest.mark.parametrize("name", ["captions.txt", "caption.txt", "prompts.txt", "prompt.txt"])
def test_two_files_of_lines(tmp_path, name):
    written(tmp_path, name, "a cat\na dog, and\x0b more\n")
    assert entries(tmp_path, "videos.txt", "a.mp4\r\nb/b.mp4\n\n") == [
        ("a.mp4", "a cat"),
        ("b/b.mp4", "a dog, and\x0b more"),
    ]


def test_two_files_that_do_not_fit(tmp_path):
    with pytest.raises(
        DCMError, match=r"videos\.txt lists videos, but the captions are missing\. Write them to captions\.txt"
    ):
        read_list(written(tmp_path, "videos.txt", "a.mp4\nb.mp4"))
    written(tmp_path, "prompts.txt", "a cat")
    with pytest.raises(
        DCMError, match=r"videos\.txt has 2 lines, but prompts\.txt has 1; expected one caption for each video"
    ):
        read_list(tmp_path / "videos.txt")


def test_quotes_and_line_ends_in_a_csv_are_of_the_text(tmp_path):
    table = 'video,caption\na.mp4,"a cat, ""Tom""\nsleeps"\n'
    assert entries(tmp_path, "a.csv", table) == [("a.mp4", 'a cat, "Tom"\nsleeps')]


def test_line_separators_in_a_caption_do_not_end_its_line(tmp_path):
    assert entries(tmp_path, "a.jsonl", '{"video": "a.mp4", "caption": " a\u2028cat "}\n\n') == [
        ("a.mp4", "a\u2028cat")
    ]


def test_the_first_key_that_holds_something_counts(tmp_path):
    row = {"path": "p.mp4", "video": "", "video_path": "v.mp4", "caption": None, "text": " ", "prompt": "a cat"}
    assert entries(tmp_path, "a.jsonl", json.dumps(row)) == [("v.mp4", "a cat")]


def test_an_entry_may_have_several_captions(tmp_path):
    row = {"path": "a.mp4", "cap": ["", None, "a cat", "a small cat"]}
    assert read_list(written(tmp_path, "a.json", json.dumps([row]))) == [
        Listed("a.mp4", "a cat", None, ("a small cat",))
    ]


def test_which_files_are_lists(tmp_path):
    assert all(is_list(tmp_path / name) for name in (*IN_FOLDER, "x.JSONL", "x.csv", "Videos.txt"))
    assert not any(is_list(tmp_path / name) for name in ("a.txt", "a.parquet", "dataset.toml", "a.mp4", "prompts.txt"))


# What is left out


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        (
            {"video": "a.mp4"},
            "has no caption in the list: it has video; expected one of caption, text, prompt, cap, captions.",
        ),
        (
            {"path": "a.mp4", "caption": " ", "tags": "x"},
            "has no caption in the list: it has caption, path, tags; expected",
        ),
        ({"path": "a.mp4", "caption": 3}, "has no caption in the list"),
        ({"path": "a.mp4", "caption": {"en": "x"}}, "has no caption in the list"),
        ({"path": "a.mp4", "caption": [[["x"]]]}, "has no caption in the list"),
        ({"video": "a\0.mp4", "caption": "x"}, "is not the name of a file. Check the list."),
        ({"video": "a" * 1001, "caption": "x"}, "is not the name of a file"),
        ({"video": "\x1b]0;x\x07", "caption": "x"}, "is not the name of a file"),
    ],
)
def test_an_entry_that_cannot_be_used_says_why(tmp_path, row, fault):
    (entry,) = read_list(written(tmp_path, "a.jsonl", json.dumps(row)))
    assert entry.fault.startswith(fault)


# What is refused


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"video": ', r"a\.jsonl, line 2 is not valid JSON.*Write one object per line"),
        ("nonsense", "line 2 is not valid JSON"),
        ('["a.mp4"', "line 2 is not valid JSON"),
        ('"a.mp4"', 'line 2 is not an object; expected {"video": "clip.mp4", "caption": "text"}'),
        ("3", "line 2 is not an object"),
        (
            "{}",
            "line 2 does not name a video: it is empty; "
            "expected one of video, video_path, file_name, file_path, media_path, path, filename",
        ),
        ('{"latent_path": "a.pt", "caption": "a", "prompt_embed_path": "b", "length": 2}',
         "line 2 does not name a video: it has caption, latent_path, length and 1 more; expected one of video"),
        ('{"video": 3}', "line 2 does not name a video: it has video"),
        ('{"video": ["a.mp4"]}', "line 2 does not name a video"),
        ("[" * 300 + "]" * 300, "line 2 is not valid JSON, or nested more than 20 deep"),
        ('{"video": "a", "x": ' + "[" * 100_000 + "]" * 100_000 + "}", "line 2 is not valid JSON, or nested more than 20 deep"),
    ],
)  # fmt: skip
def test_a_broken_line_is_named_by_its_number(tmp_path, line, message):
    text = '{"video": "a.mp4", "caption": "a"}\n' + line
    with pytest.raises(DCMError, match=message):
        read_list(written(tmp_path, "a.jsonl", text))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", '{"video": "a.mp4"}\n{"video": "b.mp4"}', r"a\.json is not valid JSON \(Extra data.*rename it to \.jsonl"),
        ("a.json", "3", "is neither a JSON array nor an object"),
        ("a.json", '"a.mp4"', "is neither a JSON array nor an object"),
        ("a.json", '[{"video": "a.mp4", "caption": "a"}, 3]', "entry 2 is not an object"),
        ("a.json", '[{"photo": "a.png", "caption": "a"}]', "entry 1 does not name a video: it has caption, photo; expected"),
        ("a.json", "[" * 1000 + "]" * 1000, "is not valid JSON, or nested more than 20 deep"),
        ("a.csv", "photo,caption\na.png,a\n", "line 2 does not name a video: it has caption, photo; expected"),
        ("a.csv", "a.mp4,a cat\nb.mp4,a dog\n", "line 2 does not name a video: it has a cat, a.mp4; expected"),
        ("a.csv", 'video,caption\n"' + "x" * 200_000, r"a\.csv, line \d is not CSV \(field larger than field limit"),
        ("a.json", "[" + ",".join(["{}"] * 300_000) + "]", "has more than 500,000 brackets and commas. Check that it is a list of clips"),
        ("a.csv", ",".join(map(str, range(1001))) + "\n" + "x," * 1001, "line 2 has 1,001 keys; expected at most 1,000"),
    ],
)  # fmt: skip
def test_a_broken_file_is_named_with_what_it_holds(tmp_path, name, text, message):
    with pytest.raises(DCMError, match=message):
        read_list(written(tmp_path, name, text))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "videos.txt"])
def test_a_list_in_utf16_is_told_to_be_saved_anew(tmp_path, encoding, name):
    (tmp_path / name).write_bytes('{"video": "a.mp4", "caption": "a"}'.encode(encoding))
    written(tmp_path, "captions.txt", "a cat")
    with pytest.raises(DCMError, match=rf"{name} is UTF-16, or not a text file\. Save it as UTF-8"):
        read_list(tmp_path / name)


def test_keys_of_a_file_are_cut_in_errors(tmp_path):
    row = {"x" * 10_000: 1, "y": 2}
    with pytest.raises(DCMError) as error:
        read_list(written(tmp_path, "a.jsonl", json.dumps(row)))
    assert len(str(error.value)) < 500 + len(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", "[" * 4_000_000), ("a.json", "[]" * 2_000_000), ("a.json", '"' * 4_000_000), ("a.json", '"' + '\\"' * 2_000_000),
        ("a.json", "[" + ",".join(["{}"] * 1_000_000) + "]"), ("a.json", "[" + "9" * 1_000_000 + "]"),
        ("a.json", '{"data": ' * 100_000), ("a.jsonl", "\n" * 4_000_000), ("a.csv", "\n" * 4_000_000), ("a.csv", "a\r" * 400_000),
        ("a.csv", '"' * 4_000_000), ("a.jsonl", '{"video": "a"}\n' * 60_000), ("a.csv", "x" * 17_000_000), ("videos.txt", "\n" * 1_000_000),
    ],
    ids=range(14),
)  # fmt: skip
def test_a_hostile_list_is_refused_in_time(tmp_path, name, text):
    path = written(tmp_path, name, text)
    written(tmp_path, "captions.txt", "a")
    start = time.process_time()
    with pytest.raises(DCMError, match=re.escape(str(path))):
        read_list(path)
    assert time.process_time() - start < 2


def test_limits_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(lists, "MAX_ENTRIES", 2)
    with pytest.raises(DCMError, match=r"a\.jsonl has more than 2 entries\. Split the list"):
        read_list(written(tmp_path, "a.jsonl", '{"video": "a"}\n' * 3 + "what comes after is not read"))


def test_numbers_of_any_size_do_no_harm(tmp_path):
    line = '{"video": "a.mp4", "caption": "a cat", "size": ' + "9" * 100_000 + ', "fps": 1e999, "n": [NaN, -Infinity]}'
    assert entries(tmp_path, "a.jsonl", line) == CAT_AND_DOG[:1]


# Mangled lists

keys = st.sampled_from(["video", "path", "cap", "type", "data", "x"])
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=4),
    max_leaves=8,
)
names = st.sampled_from(["a.jsonl", "a.json", "a.csv", "videos.txt"])


def reads_or_names(folder, name, data):
    (folder / "captions.txt").write_text("a")
    (folder / name).write_bytes(data)
    try:
        found = read_list(folder / name)
    except DCMError:
        return
    for entry in found:
        assert isinstance(entry.video, str) and entry.video and isinstance(entry.caption, str)
        assert entry.fault or entry.caption


@given(name=names, data=st.binary(max_size=200))
def test_any_bytes_are_a_list_or_our_error(tmp_path_factory, name, data):
    reads_or_names(tmp_path_factory.getbasetemp(), name, data)


@given(name=names, data=st.lists(values, max_size=3), whole=st.booleans())
def test_any_json_is_a_list_or_our_error(tmp_path_factory, name, data, whole):
    text = json.dumps(data) if whole else "\n".join(map(json.dumps, data))
    reads_or_names(tmp_path_factory.getbasetemp(), name, text.encode(errors="replace"))


good = json.dumps([{"video": "a.mp4", "caption": ["a", "b"]}, {"path": "b", "cap": '\\"x'}]).encode()


@given(name=names, place=st.integers(0, len(good)), length=st.integers(0, 6), new=st.binary(max_size=6))
def test_a_list_with_a_changed_part_is_a_list_or_our_error(tmp_path_factory, name, place, length, new):
    reads_or_names(tmp_path_factory.getbasetemp(), name, good[:place] + new + good[place + length :])
