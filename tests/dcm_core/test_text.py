"""Text from elsewhere, and the places that every text of it passes: errors, lists of names, the log, facts about files."""

import logging
import unicodedata

import pytest
from hypothesis import given, strategies

from dcm_core import text
from dcm_core.errors import CheckpointError, DCMError, check_choice, name_some
from dcm_core.inspection.inspect import in_lines

# a colour and a title for the terminal, C1's own escape, direction and zero-width marks, a line separator, half a surrogate pair
HOSTILE = "\x1b[31m\x1b]0;title\x07\x9b1m\u202egnp\u2066\u200b\ufeff\u2028\x00\ud800\u00ad"


def is_safe(shown, kept=""):
    return not [c for c in shown if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") and c not in kept]


def test_hidden_characters_become_their_codes():
    shown = text.one_line(HOSTILE)
    assert shown.startswith(r"\x1b[31m\x1b]0;title\x07\x9b1m\u202egnp\u2066\u200b\ufeff\u2028\x00\ud800\xad")
    assert is_safe(shown) and shown.encode()
    assert text.one_line("a\nb\tc\r") == r"a\nb\tc\r"
    assert text.plain("a\nb\tc\r") == "a\nb\tc\\r"


@pytest.mark.parametrize(
    "name", ["模型 v2.safetensors", "é\u00a0ß", "日本語\u3000名前", "한국어", "σ ≥ 0.9 → ½", "👩 🎬", "\\x1b", ""]
)
def test_what_can_be_read_stays(name):
    assert text.one_line(name) == text.plain(name) == name


@given(strategies.text(strategies.characters(exclude_categories=()), max_size=300))
def test_any_text_can_be_printed_whole(anything):
    line, lines = text.one_line(anything), text.plain(anything)
    assert is_safe(line) and is_safe(lines, kept="\n\t")
    assert (line.encode() and lines.encode()) or not anything
    assert text.one_line(line, len(line)) == line and text.plain(lines) == lines


def test_long_texts_are_cut():
    assert text.one_line("x" * 10_000) == "x" * (text.NAME_LENGTH - 1) + "…"
    assert text.plain("x" * 10**6 + "\ny") == "x" * (text.LINE_LENGTH - 1) + "…"
    assert text.plain("ab\n" * 10**6) == ("ab\n" * 10**4)[: text.TEXT_LENGTH - 1] + "…"
    assert len(text.one_line("\0" * 10**6)) == text.NAME_LENGTH
    assert len(str(DCMError("x" * 10**6))) == text.LINE_LENGTH


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("abc", "'abc'"),
        (HOSTILE[:5], r"'\x1b[31m'"),
        (None, "None"),
        (True, "True"),
        (3, "3"),
        (0.5, "0.5"),
        ({"a": [HOSTILE[-2]]}, r"{'a': ['\ud800']}"),
        ([[]] * 99, "[[], [], [], [], [], [], ...]"),
        (float("nan"), "nan"),
        ("x" * 500, "'" + "x" * 159 + "…'"),
    ],
    ids=range(10),
)
def test_a_given_value_in_words(value, words):
    assert text.given(value) == words


def test_values_of_any_size_are_short():
    deep = []
    for _ in range(10_000):
        deep = [deep]
    for value in (10**5000, [10**5000], deep, {"a": deep}, list(range(10**6)), dict.fromkeys(range(10**6))):
        assert len(text.given(value)) < 200


def test_errors_name_anything_safely():
    error = CheckpointError(f"{HOSTILE} is no file")
    assert is_safe(str(error)) and str(error).encode()
    assert str(error).endswith("is no file")
    shown = name_some([f"a{HOSTILE}", "b\nc", "d" * 1000, "e"])
    assert is_safe(shown) and r"b\nc" in shown and len(shown) < 600 and shown.endswith(" and 1 more")


def test_a_fact_keeps_to_its_line():
    shown = in_lines({"alpha": f"1\n   family: Wan{HOSTILE}", "rank": "x" * 10_000, "none": None})
    assert is_safe(shown, kept="\n")
    alpha, rank = shown.split("\n")
    assert r"1\n   family: Wan" in alpha and len(rank) < 2100


def test_the_log_shows_text_only(caplog):
    logger = logging.getLogger(text.LOGGER)
    with caplog.at_level(logging.INFO, logger=text.LOGGER):
        logger.warning("%s cannot be read (%s)", HOSTILE, OSError(HOSTILE))
        logger.info("100% done")
    first, second = (record.getMessage() for record in caplog.records)
    assert is_safe(first) and first.startswith(r"\x1b[31m") and "cannot be read" in first
    assert second == "100% done"


@pytest.mark.parametrize("value", ["other", None, 1, True, ["a"], {"a": 1}, HOSTILE, float("nan")])
def test_a_choice_is_one_of_its_list(value):
    with pytest.raises(CheckpointError, match=r"dtype is .*; choose one of a, b\.") as caught:
        check_choice("dtype", value, ("a", "b"), CheckpointError)
    assert is_safe(str(caught.value))
    check_choice("dtype", "a", ("a", "b"))
