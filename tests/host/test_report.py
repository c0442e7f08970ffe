"""What nodes say reaches pages, terminals and logs as text."""

import logging
import re
from types import SimpleNamespace

import pytest
from hypothesis import given, strategies

from .server import ROOT

ACTIVE = [
    "<img src=x onerror=alert(1)>", "<a href='javascript:alert(1)'>x</a>", "&lt;b&gt; &#60;", "[text](http://example.org)",
    "![picture](http://example.org/x.png)", "[[label|http://example.org]]", "[a]: http://example.org", "https://example.org",
    "www.example.org", "WWW.example.org", "ftp://example.org", "someone@example.org", "__LNK0__", "**bold** _thin_ ~~gone~~ `code`",
    r"C:\models\_x\*", "<http://example.org>", "<!-- hidden -->", "\x1b[31m red", "\u202etxt",
]


@pytest.fixture(scope="module")
def reporting(module):
    return module("nodes.host.report")


def is_active(text):
    """Whether a front end finds markup, an entity, a link, emphasis or an escape in it."""
    patterns = (
        "<", r"&", r"://", r"(?i)www\.", r"\]\(", r"\]\[", r"\]:", r"\[\[", "@", r"[*`~]", r"__", r"(?<!\w)_|_(?!\w)",
        r"\\[!-/:-@\[-`{-~]", r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]",
    )
    return [pattern for pattern in patterns if re.search(pattern, text)]


@pytest.mark.parametrize("text", ACTIVE)
def test_nothing_active_is_sent_to_a_page(reporting, text):
    assert is_active(text)
    assert is_active(reporting.for_pages(f"file: {text}")) == []


def test_texts_of_our_own_stay(reporting):
    text = "step 1-3 semantic, 4-6 detail, boundary 0.979\n   timesteps: [1000, 982.5]\nfile: dcm_small_world_base.safetensors (σ ≥ 0.9)"
    assert reporting.for_pages(text) == text
    assert reporting.for_pages("<b>wan_2.1</b> A & B: blocks.*") == "‹b>wan_2.1‹/b> A ＆ B: blocks.∗"


@given(text=strategies.text(strategies.characters(exclude_categories=()), max_size=60) | strategies.text("<&[]():/w.@_*`~\\ |!x\n"))
def test_no_text_is_active_on_a_page(reporting, text):
    shown = reporting.for_pages(text)
    assert is_active(shown) == []
    assert shown.encode() or not text


def test_the_node_the_result_and_the_log_get_text(reporting, monkeypatch, caplog):
    sent = []
    monkeypatch.setattr(reporting, "server", lambda: SimpleNamespace(send_progress_text=lambda text, node: sent.append((node, text))))
    with caplog.at_level(logging.INFO, logger="ComfyUI-DCM"):
        result = reporting.report("a <b> \x1b[31m\u202e\ud800", "7")
    shown = r"a ‹b> \x1b[31m\u202e\ud800"
    assert sent == [("7", shown)]
    assert result.as_dict()["text"] == (shown,)
    assert caplog.messages == [r"a <b> \x1b[31m\u202e\ud800"]


def test_every_log_line_of_the_pack_passes_the_filter():
    past_it = re.compile(r"getLogger\((?!LOGGER|.ComfyUI-DCM.\))|exc_info|logger\.exception|logging\.(?:info|warning|error)\(|\bprint\(")
    files = [path for folder in ("dcm_core", "nodes") for path in (ROOT / folder).rglob("*.py") if path.name != "__main__.py"]
    assert len(files) > 50
    assert {path.name: found for path in files if (found := past_it.findall(path.read_text("utf-8")))} == {}


def test_the_scripts_of_the_page_write_no_markup():
    markup = re.compile(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|createContextualFragment|setHTML|eval\(")
    scripts = list((ROOT / "web").glob("*.js"))
    assert scripts
    assert {path.name: found for path in scripts if (found := markup.findall(path.read_text("utf-8")))} == {}
