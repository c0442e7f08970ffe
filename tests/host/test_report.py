"""What nodes say reaches pages, terminals and logs as text."""

import logging
import re
from types import SimpleNamespace

import pytest

from .server import ROOT


@pytest.fixture(scope="module")
def reporting(module):
    return module("nodes.host.report")


def test_the_node_the_result_and_the_log_get_text(reporting, monkeypatch, caplog):
    sent = []
    monkeypatch.setattr(
        reporting, "server", lambda: SimpleNamespace(client_id="page", send_sync=lambda *told: sent.append(told))
    )
    with caplog.at_level(logging.INFO, logger="ComfyUI-DCM"):
        result = reporting.report("a <b> \x1b[31m\u202e\ud800", "7")
    shown = r"a <b> \x1b[31m\u202e\ud800"
    assert sent == [("dcm.text", {"node": "7", "text": shown}, "page")]
    assert result.as_dict()["text"] == (shown,)
    assert caplog.messages == [shown]


def test_every_log_line_of_the_pack_passes_the_filter():
    past_it = re.compile(
        r"getLogger\((?!LOGGER|.ComfyUI-DCM.\))|exc_info|logger\.exception|logging\.(?:info|warning|error)\(|\bprint\("
    )
    files = [
        path for folder in ("dcm_core", "nodes") for path in (ROOT / folder).rglob("*.py") if path.name != "__main__.py"
    ]
    assert len(files) > 50
    assert {path.name: found for path in files if (found := past_it.findall(path.read_text("utf-8")))} == {}


def test_the_scripts_of_the_page_write_no_markup():
    markup = re.compile(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|createContextualFragment|setHTML|eval\("
    )
    scripts = list((ROOT / "web").glob("*.js"))
    assert scripts
    assert {path.name: found for path in scripts if (found := markup.findall(path.read_text("utf-8")))} == {}
