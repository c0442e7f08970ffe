"""The documentation speaks of what is there: links lead to files, the method map names functions and tests that exist."""

import ast
import dataclasses
import json
import re
from functools import cache
from pathlib import Path
from urllib.parse import unquote

import pytest

from dcm_core.distill.config import TrainingConfig

ROOT = Path(__file__).parents[1]
METHOD_MAP = ROOT / "docs" / "method-map.md"
PAGES = [
    *(
        ROOT / name
        for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "small_world/README.md", "benchmarks/README.md")
    ),
    *sorted((ROOT / "docs").glob("*.md")),
]
# [text](target), ![text](target), [text](<target>) and <img src="target">
LINK = re.compile(r"\]\(<([^>]+)>\)|\]\(([^\s()<>]+)\)|(?:src|href)=\"([^\"]+)\"")
PLACE = re.compile(r"`([\w/.-]+\.py): ([\w.]+)`")
ROW = re.compile(r"^\| (.+) \| (.+) \| (.+) \|$", re.MULTILINE)

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


def prose(page):
    """A page without its code blocks, whose brackets are no links."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def links(page):
    return ["".join(found) for found in LINK.findall(prose(page))]


def anchors(page):
    """What the headings of a page are called in links to it."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@cache
def names_in(path):
    """Functions, classes and methods of a file: `name`, `Class.name`."""
    found = set()
    for node in ast.parse((ROOT / path).read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.add(node.name)
            found |= {
                f"{node.name}.{part.name}" for part in getattr(node, "body", []) if isinstance(part, ast.FunctionDef)
            }
    return found


@each_page
def test_links_lead_somewhere(page):
    for target in links(page):
        if re.match(r"[a-z]+:", target):
            assert target.startswith("https://"), target
            continue
        path, _, anchor = unquote(target).partition("#")
        file = page.parent / path if path else page
        assert file.resolve().is_relative_to(ROOT.resolve()) and file.exists(), target
        assert not anchor or anchor in anchors(file), target


@each_page
def test_paths_in_code_marks_exist(page):
    """`tests/host/test_x.py`, `dcm_core/families/` and the like, wherever the page is."""
    rooms = "dcm_core|nodes|scripts|tests|benchmarks|small_world|web|workflows|docs"
    for path in re.findall(rf"`((?:{rooms})/[\w./-]*)(?:: [\w.]+)?`", prose(page)):
        assert (ROOT / path).exists(), path


ASKED = (
    "boundary",
    "3 + 3",
    "KSampler",
    "Other samplers",
    "LoRA for each expert",
    "GGUF",
    "memory",
    "Other packs",
    "Seeds",
)


def test_the_readme_shows_a_picture_and_answers_what_is_asked():
    text = prose(ROOT / "README.md")
    assert re.search(r"!\[.+\]\(.+\)", "\n".join(text.splitlines()[:8]))
    questions = re.findall(r"^\*\*(.+\?)\*\* \w", text, re.MULTILINE)
    assert [topic for topic in ASKED if not any(topic in question for question in questions)] == []


def test_the_readme_names_every_node():
    table = (ROOT / "README.md").read_text(encoding="utf-8").split("## The nodes")[1].split("\n## ")[0]
    named = {
        name
        for cell in re.findall(r"^\| (\*\*.+?) \|", table, re.MULTILINE)
        for name in re.findall(r"\*\*DCM (.+?)\*\*", cell)
    }
    named |= {
        f"{verb} {what}"
        for pair in named
        for verbs, what in re.findall(r"^(Save / Load) (.+)", pair)
        for verb in verbs.split(" / ")
    }
    nodes = json.loads((ROOT / "locales" / "en" / "nodeDefs.json").read_text(encoding="utf-8"))
    # the words in brackets are for the search
    assert {node["display_name"].removeprefix("DCM ").split(" (")[0] for node in nodes.values()} <= named


def test_the_method_map_leads_from_every_equation_to_code_and_test():
    rows = [row for row in ROW.findall(prose(METHOD_MAP)) if row[1:] != ("function", "test")]
    assert len(rows) > 25
    for equation, *cells in rows:
        for cell, room in zip(cells, (("dcm_core/", "nodes/"), ("tests/",)), strict=True):
            places = PLACE.findall(cell)
            assert places and len(places) == cell.count(".py"), f"{equation}: {cell}"
            for path, name in places:
                assert path.startswith(room), path
                assert name in names_in(path), f"{equation}: {path} has no {name}"
        assert all(name.startswith("test_") for _, name in PLACE.findall(cells[1]))


def test_every_equation_of_training_is_in_the_map():
    named = {name for _, name in PLACE.findall(METHOD_MAP.read_text(encoding="utf-8"))}
    assert {name for name in names_in("dcm_core/distill/method/losses.py") if "." not in name} <= named


@pytest.mark.parametrize(
    ("text", "test"),
    [
        ("[a](no-such.md)", test_links_lead_somewhere),
        ("![a](<no such.png>)", test_links_lead_somewhere),
        ("[a](#no-such)", test_links_lead_somewhere),
        ("`tests/no_such.py`", test_paths_in_code_marks_exist),
    ],
)
def test_a_page_that_names_what_is_not_there_fails(tmp_path, monkeypatch, text, test):
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text("# Page\n[a](#page) [b](page.md) [c](https://example.org/no-such.md)\n")
    test(page)
    page.write_text(text)
    with pytest.raises(AssertionError):
        test(page)


def test_every_training_setting_is_documented_with_its_default():
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    table = text[text.index("| in `training` |") :].partition("\n\n")[0]
    found = {}
    for names, defaults, _ in ROW.findall(table.partition("\n")[2]):
        found |= dict(zip(re.findall(r"`(\w+)`", names), map(json.loads, defaults.split(", ")), strict=True))
    assert found == {
        field.name: field.default for field in dataclasses.fields(TrainingConfig) if field.name != "expert"
    }
