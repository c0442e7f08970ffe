"""Captions: which files are read, which texts can be trained on."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcm_core.distill.data.captions import MAX_CAPTION, TextError, fault_of, read_text


def written(tmp_path, data):
    path = tmp_path / "a.txt"
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("text", ["a cat", "ein Bär\r\nim Wald", "一只猫", "🐈", ""])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_utf8_is_read(tmp_path, text, mark):
    assert read_text(written(tmp_path, mark + text.encode()), 100) == text


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le"])
@pytest.mark.parametrize("text", ["a cat", "一只猫坐在窗台上。\n", "ein Bär"])
def test_other_unicode_is_named(tmp_path, encoding, text):
    with pytest.raises(TextError, match=r"is UTF-16, or not a text file\. Save it as UTF-8"):
        read_text(written(tmp_path, text.encode(encoding)), 100)


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf16_without_a_nul_is_told_by_its_mark(tmp_path, encoding):
    with pytest.raises(TextError, match="UTF-16"):
        read_text(written(tmp_path, "\ufeff猫坐在窗台".encode(encoding)), 100)


@pytest.mark.parametrize(
    "data", ["Bär".encode("latin-1"), "猫坐在窗台".encode("utf-16-le"), "坐在窗台上的猫".encode("gbk"), b"\xff"]
)
def test_old_encodings_are_named(tmp_path, data):
    with pytest.raises(TextError, match=r"is not UTF-8\. Save it as UTF-8"):
        read_text(written(tmp_path, data), 100)


def test_files_that_are_too_large_or_gone(tmp_path):
    assert read_text(written(tmp_path, b"x" * 100), 100) == "x" * 100
    with pytest.raises(TextError, match=r"is larger than 0\.0001 MB"):
        read_text(written(tmp_path, b"x" * 101), 100)
    with pytest.raises(TextError, match=r"cannot be read \(No such file"):
        read_text(tmp_path / "gone.txt", 100)


@given(data=st.binary(max_size=60), limit=st.integers(0, 80))
def test_any_bytes_are_text_or_a_text_error(tmp_path_factory, data, limit):
    path = tmp_path_factory.getbasetemp() / "any.txt"
    path.write_bytes(data)
    try:
        text = read_text(path, limit)
    except TextError:
        return
    assert text.encode() == data.removeprefix(b"\xef\xbb\xbf") and "\0" not in text


# What can be trained on


@pytest.mark.parametrize(
    "caption", ["a cat", "一只猫", "🐈", "a\tcat\r\nand\x0b a dog", "e\u0301", "👨\u200d👩 walk", "!", "7", ""]
)
def test_captions_that_can_be_seen_are_fine(caption):
    assert fault_of(caption) is None


@pytest.mark.parametrize(
    ("caption", "fault"),
    [
        *((blank, "invisible characters only") for blank in (
            "\u200b", "\u200b\u200d\ufeff", "\u2060\u200e\u202e", "\u00ad", "\u3164\u115f\u1160\uffa0", "\u2800", "\ufe0f\u034f", "\u180e",
            "\U000e0020\U000e007f", "\u3000 \u00a0", "\u2028",
        )),
        ("a\0 cat", "control characters"), ("a \x1b[31mcat", "control characters"), ("\x7f", "control characters"), ("a\x9bcat", "control"),
        ("a \ufffd cat", "not UTF-8"), ("a \ud83d cat", "not UTF-8"),
        ("x" * (MAX_CAPTION + 1), "has a caption of 100,001 characters; expected at most 100,000"),
    ],
)  # fmt: skip
def test_captions_that_cannot_be_trained_on_have_a_fault(caption, fault):
    assert fault in fault_of(caption)


@given(st.text(max_size=30))
def test_a_caption_without_a_fault_holds_something(caption):
    if caption and fault_of(caption) is None:
        caption.encode()
        assert caption.strip() and "\0" not in caption
