"""The documentation and the texts of the code are plain English. Links lead to files, the method map names what exists."""

import ast
import dataclasses
import io
import json
import re
import tokenize
from functools import cache
from pathlib import Path
from urllib.parse import unquote

import pytest
from PIL import Image

from dcm_core.distill.config import SETTINGS, TrainingConfig

from .host.graphs import WORKFLOWS, read

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
# What people read besides the pages.
HELP = sorted((ROOT / "web" / "docs").glob("*.md"))
# The code whose docstrings, comments and messages are checked.
CODE = sorted(path for folder in ("cli", "dcm_core", "nodes") for path in (ROOT / folder).rglob("*.py"))
# An entry of a docstring's section: `name: ` or `first, second: `.
ENTRY = re.compile(r"\w+(?:, \w+)*: ")
SECTIONS = ("Args:", "Attributes:", "Raises:", "Returns:", "Yields:")
# Strings of fewer words are names, keys and parts of sentences.
SENTENCE = 4
# Words of a sentence.
LONGEST = 25
# Words and forms that read as translated; the field has better ones (checkpoint, resume, LoRA, full, unchanged ...).
BANNED = re.compile(
    r"""
    ^Of\b                                      # a fragment for a sentence
    | \b(?:go|goes|going|gone|went)\ on\b
    | \b(?:is|are|was|were)\ told\b
    | \bholds?\b(?!\ out\b)                    # "hold out" clips is the field's word
    | \b(?:carry|carries|carried|carrying|weighs?)\b
    | (?<!there\ )\b(?:is|are)\ no\b(?!\ longer)  # "X is no Y"
    | \bas\ (?:it|they)\ (?:is|are|stands?)\b
    | \bgoes\ before\b
    | \b(?:pairs?|trainees?|facts?|fresh(?:ly)?|whole|given|uneven(?:ness)?|states)\b
    | \bbelow(?=[.,;:)]|$)                     # for "under it" or "on the detail side"; "below 1" is fine
    """,
    re.IGNORECASE | re.VERBOSE,
)
# Not in the changelog, which is a history.
HISTORY = re.compile(r"\b(?:no longer|anew|former(?:ly)?|previously|since then|up to now)\b", re.IGNORECASE)
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


def blocks(text):
    """Headings, paragraphs, list items and cells of a table, without their marks; inline code counts as one word."""
    text = re.sub(r"^ *```.*?^ *```$", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"`[^`]+`", "Code", re.sub(r"!?\[([^\]]*)\]\((?:<[^>]+>|[^()\s]*)\)", r"\1", text))
    found = [""]
    for line in map(str.strip, text.replace("**", "").splitlines()):
        if line.startswith("|"):
            found += [*line.strip("|").split("|"), ""]
        elif not line:
            found.append("")
        elif line.startswith("#"):
            found += [line.lstrip("# "), ""]
        elif re.match(r"[-*] |\d+\. ", line):
            found.append(line.partition(" ")[2])
        else:
            found[-1] += f" {line}"
    return [block.strip() for block in found if re.search(r"\w", block)]


def in_docstring(text):
    """The paragraphs of a docstring and the entries of its sections."""
    found = [""]
    for line in map(str.strip, text.splitlines()):
        if not line or line in SECTIONS:
            found.append("")
        elif ENTRY.match(line):
            found.append(ENTRY.sub("", line, count=1))
        else:
            found[-1] += f" {line}"
    return found


def comments(source):
    """Comments of a file; lines of their own that follow each other are one."""
    found, last = [], -1
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            line, text = token.start[0], token.string.lstrip("# ")
            alone = token.line.lstrip().startswith("#")
            if alone and line == last + 1:
                found[-1] += f" {text}"
            else:
                found.append(text)
            last = line if alone else -1
    return found


def texts_in(path):
    """What people read in a file of code: its docstrings, comments and messages. `X` stands for what an f-string puts in."""
    source = path.read_text(encoding="utf-8")
    nodes = list(ast.walk(ast.parse(source)))
    documented = [
        node
        for node in nodes
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node)
    ]
    seen = {node.body[0].value for node in documented}
    seen |= {part for node in nodes if isinstance(node, ast.JoinedStr) for part in node.values}
    found = [text for node in documented for text in in_docstring(ast.get_docstring(node))]
    found += comments(source)
    for node in nodes:
        if isinstance(node, ast.JoinedStr):
            found.append("".join(part.value if isinstance(part, ast.Constant) else "X" for part in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in seen:
            found.append(node.value)
    return [text for text in found if len(text.split()) >= SENTENCE]


def sentences(text):
    return [sentence for block in blocks(text) for sentence in re.split(r"(?<=[.!?])\W*\s+(?=[^a-z])", block)]


def faults(text, history=False):
    """Sentences that are too long or not plain English; `history` allows what was before."""
    found = []
    for sentence in map(str.strip, sentences(text)):
        words = [word for word in sentence.split() if re.search(r"\w", word)]
        if len(words) > LONGEST:
            found.append(f"{len(words)} words: {sentence}")
        matches = [BANNED.search(sentence.lstrip("*_")), None if history else HISTORY.search(sentence)]
        found += [f"{match[0]!r}: {sentence}" for match in matches if match]
    return found


def unreleased():
    return (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").split("## [Unreleased]")[1].partition("\n## ")[0]


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


@pytest.mark.parametrize(
    "page",
    [page for page in (*PAGES, *HELP) if page.name != "CHANGELOG.md"],
    ids=lambda page: page.relative_to(ROOT).as_posix(),
)
def test_pages_are_plain_english(page):
    assert faults(page.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_notes_in_workflows_are_plain_english(path):
    notes = [node["widgets_values"][0] for node in read(path)["nodes"] if node["type"] == "MarkdownNote"]
    assert notes and [fault for note in notes for fault in faults(note)] == []


@pytest.mark.parametrize("path", CODE, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_texts_in_code_are_plain_english(path):
    assert [fault for text in texts_in(path) for fault in faults(text)] == []


@pytest.mark.parametrize(
    "code",
    [
        '"""What a file holds in it."""',
        'def f():\n    """A function.\n\n    Args:\n        x, y: of the base that comes first.\n    """',
        'class A:\n    """A class.\n\n    Raises:\n        ValueError: x is no number at all.\n    """',
        "# a comment whose second line\n# says that it goes on",
        "x = 1  # of the base that comes first",
        "raise ValueError(f'{path} holds no training data.')",
        "raise ValueError('A file is '\n'no safetensors file.')",
    ],
)
def test_translated_texts_in_code_are_found(tmp_path, code):
    path = tmp_path / "code.py"
    path.write_text(code)
    assert [fault for text in texts_in(path) for fault in faults(text)]


def test_plain_texts_in_code_pass(tmp_path):
    path = tmp_path / "code.py"
    words = " ".join(["word"] * (LONGEST - 1))
    path.write_text(
        f'"""{words}\n\nArgs:\n    x: {words}\n    y: {words}\n"""\n# {words}\nx = 1  # {words}\n# {words}\n'
        f"raise ValueError(f'{words} {{facts.given}}', 'whole pairs')\n"
    )
    assert len(texts_in(path)) == 7
    assert [fault for text in texts_in(path) for fault in faults(text)] == []


def test_the_changelog_is_plain_english():
    assert faults(unreleased(), history=True) == []


@pytest.mark.parametrize(
    "text",
    [
        " ".join(["word"] * (LONGEST + 1)) + ".",
        "Short. " + " ".join(["`code`"] * (LONGEST + 1)),
        "| cell | " + " ".join(["word"] * (LONGEST + 1)) + " |",
        "A list:\n- " + " ".join(["[a](b)"] * (LONGEST + 1)),
        "Of the generic schedule.",
        "Short. *Of* the generic schedule.",
        "The run goes on.",
        "What is told in the log.",
        "A file holds the pairs.",
        "This is no model.",
        "Above it works, below, it does not.",
        "The file is written anew.",
    ],
)
def test_long_and_translated_sentences_are_found(text):
    assert faults(text)


def test_plain_sentences_pass():
    words = "A" + " word" * (LONGEST - 2)
    assert (
        faults(f"# {words}\n{words}. {words}: 0.5!\n\n1. {words}\n```\n{words} {words}\n```\n| {words} | {words} |")
        == []
    )
    assert faults("Set denoise below 1. There are no pages. It works on `pairs`, for example here.") == []
    assert faults("It is no longer refused.", history=True) == [] != faults("It is no longer refused.")


def test_the_readme_is_short_and_sets_up_with_two_commands():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 150
    assert re.findall(r"^python scripts/.+$", text, re.MULTILINE) == [
        "python scripts/demo.py",
        "python scripts/test.py",
    ]


def test_downloads_are_those_of_the_workflows():
    known = {
        (f"models/{model['directory']}/{model['name']}", model["url"])
        for path in WORKFLOWS
        for node in read(path)["nodes"]
        for model in node["properties"].get("models", [])
    }
    lines = {
        page: re.findall(r"^curl -L -o (\S+) (\S+)$", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE)
        for page in ("README.md", "docs/models.md")
    }
    assert lines["README.md"] and set(lines["README.md"]) < known
    assert set(lines["docs/models.md"]) == known


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


def test_the_readme_shows_an_animated_result():
    first = re.findall(r"!\[.+\]\((docs/images/.+\.webp)\)", "\n".join(prose(ROOT / "README.md").splitlines()[:8]))
    with Image.open(ROOT / first[0]) as picture:
        assert picture.n_frames > 10


def test_the_questions_page_answers_what_is_asked():
    questions = re.findall(r"^\*\*(.+\?)\*\* \w", prose(ROOT / "docs" / "questions.md"), re.MULTILINE)
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


def test_node_texts_are_plain_english():
    nodes = json.loads((ROOT / "locales" / "en" / "nodeDefs.json").read_text(encoding="utf-8"))
    slots = {
        f"{name}.{kind}.{slot}": text.get("tooltip", "")
        for name, node in nodes.items()
        for kind in ("inputs", "outputs")
        for slot, text in node.get(kind, {}).items()
    }
    texts = slots | {name: node["description"] for name, node in nodes.items()}
    assert len(texts) > 150
    assert {name: found for name, text in texts.items() if (found := faults(text))} == {}


def settings_table():
    """What a reader is told of every training setting, by the setting itself."""
    lines = ["| in `training` | default | values | |", "|---|---|---|---|"]
    for name, about in SETTINGS.items():
        values = " or ".join(f'`"{option}"`' for option in about.options)
        if about.limits is not None:
            values = "{:g} to {:g}".format(*about.limits)
        if about.automatic is not None:
            values = f"{about.automatic:g} or {values}" if values else f"{about.automatic:g} or more"
        only = f" Only for a {about.only} expert." if about.only else ""
        default = json.dumps(getattr(TrainingConfig, name))
        lines.append(f"| `{name}` | {default} | {values} | {about.help_for('semantic')}{only} |")
    return "\n".join(lines)


def test_the_table_of_training_settings_is_what_the_settings_say():
    """A row that is not: put in the one that this test expects."""
    text = (ROOT / "docs" / "training-reference.md").read_text(encoding="utf-8")
    assert text[text.index("| in `training` |") :].partition("\n\n")[0] == settings_table()


def test_every_training_setting_says_what_it_does():
    assert set(SETTINGS) == {field.name for field in dataclasses.fields(TrainingConfig)} - {"side"}
    for name, about in SETTINGS.items():
        assert about.help.endswith("."), name
        assert about.help_for("semantic").startswith(about.help_for("detail")), name
        if about.widget is not None and about.limits is not None:
            assert about.widget[0] in (about.automatic, max(about.widget[0], about.limits[0])), name
            assert about.widget[1] <= about.limits[1], name
