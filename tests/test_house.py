"""The rules of the house: imports, node classes, requirements, what ships. No host needed."""

import ast
import json
import re
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from PIL import Image

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # comes with pytest

ROOT = Path(__file__).parents[1]
CORE = sorted((ROOT / "dcm_core").rglob("*.py"))
CLI = sorted((ROOT / "cli").rglob("*.py"))
NODES = sorted((ROOT / "nodes").rglob("*.py"))
NODE_FILES = sorted((ROOT / "nodes").glob("*.py"))
CODE = [ROOT / "__init__.py", *CORE, *CLI, *NODES, *sorted((ROOT / "scripts").rglob("*.py"))]
SHIPPED = ROOT / "small_world" / "models"

HOST_MODULES = {
    "comfy",
    "comfy_api",
    "comfy_extras",
    "comfy_execution",
    "folder_paths",
    "latent_preview",
    "nodes",
    "server",
    "execution",
}
# IDs that saved graphs hold; they never change.
NODE_IDS = {
    "DCMLoadModel",
    "DCMAttachExperts",
    "DCMExpert",
    "DCMAttachTable",
    "DCMSampler",
    "DCMScheduler",
    "DCMGuider",
    "DCMSplitSigmas",
    "DCMConvertCheckpoint",
    "DCMExtractLoRA",
    "DCMExportExpert",
    "DCMSchedulePlot",
    "DCMSaveConditioning",
    "DCMLoadConditioning",
    "DCMVideoDataset",
    "DCMSaveDataset",
    "DCMLoadDataset",
    "DCMTrainSemanticExpert",
    "DCMTrainDetailExpert",
    "DCMInspectModel",
    "DCMVideoSize",
    "DCMCompare",
    "DCMTune",
}
MAX_LINES = 400
PACK = "pack"  # the name of the checkout as a package: anything


def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def short(path):
    return path.relative_to(ROOT).as_posix()


def imports(path):
    """Absolute dotted names of everything a file imports: `from a import b` gives a and a.b, at any depth."""
    package = [PACK, *path.relative_to(ROOT).parts[:-1]]
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (module, *(f"{module}.{alias.name}" for alias in node.names))
        elif isinstance(node, ast.Call) and called(node) == "import_module" and isinstance(node.args[0], ast.Constant):
            yield node.args[0].value


def called(call):
    """The last name of what is called: `a.b(...)` -> b."""
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def host_imports(path, allowed=()):
    return {name for name in imports(path) if name.split(".")[0] in HOST_MODULES - set(allowed)}


def offenders(paths, found):
    """File -> what `found` says of it, where it says anything."""
    return {short(path): sorted(names) for path in paths if (names := set(found(path)))}


def test_the_core_imports_nothing_of_the_host():
    assert len(CORE) > 10
    assert offenders(CORE, host_imports) == {}


def test_only_nodes_host_imports_more_of_the_host_than_its_node_interface():
    outside = [path for path in NODES if "host" not in path.relative_to(ROOT).parts]
    assert outside
    assert offenders(outside, lambda path: host_imports(path, allowed={"comfy_api"})) == {}
    assert any("comfy" in {name.split(".")[0] for name in host_imports(path)} for path in NODES)


def test_the_core_does_not_import_the_nodes():
    assert offenders(CORE, lambda path: {name for name in imports(path) if name.startswith(f"{PACK}.nodes")}) == {}


def test_nothing_in_the_core_imports_distill_but_distill():
    outside = [path for path in CORE if "distill" not in path.relative_to(ROOT).parts]
    assert offenders(outside, lambda path: {name for name in imports(path) if "dcm_core.distill" in name}) == {}


def test_the_pack_imports_itself_by_relative_names_only():
    """It is loaded under any folder name."""
    shipped = [ROOT / "__init__.py", *CORE, *NODES]
    assert offenders(shipped, lambda path: {name for name in imports(path) if name.split(".")[0] == "dcm_core"}) == {}


NOUNS = {
    "steps",
    "clips",
    "sizes",
    "tensors",
    "layers",
    "files",
    "keys",
    "sites",
    "frames",
    "channels",
    "videos",
    "prompts",
    "tokens",
    "patches",
    "differences",
    "checkpoints",
    "states",
    "values",
    "blocks",
    "shards",
    "captions",
    "models",
    "experts",
    "times",
    "losses",
    "texts",
}

# what stands before such a noun and is no number, or one above 1
OTHERS = {"name", "path", "method", "kind", "listed", "file.path", "int(shard[1])"}


def uncounted(path):
    """Nouns in the plural after a number that may be 1: `errors.counted` gives them their form."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.JoinedStr):
            for number, text in pairwise(node.values):
                if not isinstance(number, ast.FormattedValue) or not isinstance(text, ast.Constant):
                    continue
                if number.format_spec and ast.unparse(number.format_spec) == "f','":
                    continue  # thousands
                value = ast.unparse(number.value)
                words = re.match(r"(?: [a-z-]+){0,2}", text.value)[0].split()
                if NOUNS & set(words) and not (value.isupper() or value in OTHERS or "name_some" in value):
                    yield f"{value} {' '.join(words)}"


def test_numbers_and_their_nouns_agree():
    assert offenders([*CORE, *NODES], uncounted) == {}


def test_the_search_for_nouns_without_their_number_finds_them(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (path := tmp_path / "x.py").write_text(
        "f'{len(x)} steps, {n} low-rank layers and {LIMIT} clips, {counted(n, \"key\")} of {n}'"
    )
    assert list(uncounted(path)) == ["len(x) steps", "n low-rank layers"]


def forbidden(path):
    """Code that runs what a file says."""
    for name in imports(path):
        if (
            name.split(".")[0] in {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve"}
            or name == "torch.load"
        ):
            yield name
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Name) and node.id in {"eval", "exec", "NODE_CLASS_MAPPINGS"}:
            yield node.id
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.load":
            yield "torch.load"


def test_no_code_from_files_and_no_old_node_registry():
    """NODE_CLASS_MAPPINGS, even empty, would make the host pass over comfy_entrypoint."""
    assert offenders(CODE, forbidden) == {}


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from torch import load",
        "x = torch.load('a')",
        "eval('1')",
        "exec('1')",
        "NODE_CLASS_MAPPINGS = {}",
    ],
)
def test_the_search_for_forbidden_code_finds_it(tmp_path, monkeypatch, line):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "bad.py").write_text(line)
    (tmp_path / "good.py").write_text("model.eval()\njson.load(file)\n")
    assert list(forbidden(tmp_path / "bad.py"))
    assert not list(forbidden(tmp_path / "good.py"))


def test_no_file_is_long():
    long = {
        short(path): count
        for path in [*CORE, *NODES]
        if (count := len(path.read_text(encoding="utf-8").splitlines())) > MAX_LINES
    }
    assert long == {}


def node_classes(path):
    """Classes that are nodes, by what they are or by what they are listed as."""
    module = tree(path)
    listed = {
        element.id
        for node in module.body
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["NODES"]
        for element in getattr(node.value, "elts", [])
    }
    for node in ast.walk(module):
        if isinstance(node, ast.ClassDef):
            methods = {item.name for item in node.body if isinstance(item, ast.FunctionDef)}
            if (
                node.name in listed
                or "define_schema" in methods
                or any("ComfyNode" in ast.unparse(base) for base in node.bases)
            ):
                yield node


def test_scanners_find_every_node():
    """The registry and the Manager read the source: io.ComfyNode as the only base, a literal node_id in a call of Schema."""
    found = [node for path in NODE_FILES for node in node_classes(path)]
    for node in found:
        assert [ast.unparse(base) for base in node.bases] == ["io.ComfyNode"], node.name
        calls = [call for call in ast.walk(node) if isinstance(call, ast.Call) and called(call) == "Schema"]
        ids = [keyword.value for call in calls for keyword in call.keywords if keyword.arg == "node_id"]
        assert [getattr(value, "value", None) for value in ids] == [node.name]
        assert node.name.startswith("DCM")
    names = [node.name for node in found]
    assert len(names) == len(set(names))
    assert set(names) == NODE_IDS


def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_requirements_are_those_of_the_project():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert lines == project()["dependencies"]
    for line in lines:
        match = re.fullmatch(r"([A-Za-z0-9._-]+)(\[[a-z,]+\])?((==|>=|<=|~=|!=|<|>)[0-9a-z.*]+(,(?=[=<>!~]))?)*", line)
        assert match, f"not one plain requirement: {line!r}"
        assert not match[1].lower().startswith("torch")


def test_the_shipped_models_are_small_and_have_a_card():
    files = list(SHIPPED.rglob("*.safetensors"))
    sizes = {
        kind: sum(path.stat().st_size for path in files if path.relative_to(SHIPPED).parts[0] == kind)
        for kind in ("diffusion_models", "vae", "loras", "dcm_conditioning", "dcm_datasets")
    }
    assert all(sizes.values())
    assert sum(sizes.values()) - sizes["dcm_datasets"] < 15e6
    assert (ROOT / "small_world" / "README.md").is_file()


def test_project_metadata_follow_the_registry():
    data = project()
    assert "comfyui" not in data["name"].lower()
    assert re.fullmatch(r"\d+\.\d+\.\d+", data["version"])
    assert (ROOT / data["license"]["file"]).is_file()
    assert data["urls"]["Repository"].startswith("https://")


def test_every_node_has_a_help_page_with_a_picture_of_it():
    pages = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "web" / "docs").glob("*.md")}
    assert set(pages) == {node.name for path in NODE_FILES for node in node_classes(path)}
    for name, text in pages.items():
        assert f"]({name}.jpg)" in text
        with Image.open(ROOT / "web" / "docs" / f"{name}.jpg") as picture:
            assert picture.format == "JPEG"


def first_cells(page):
    """The first cell of every row of a page's tables."""
    return re.findall(r"^\| ([^|]*) \|", page, re.MULTILINE)


@pytest.mark.parametrize("language", sorted(path.name for path in (ROOT / "locales").iterdir() if path.name != "en"))
def test_help_pages_are_translated(language):
    """The front end reads `docs/<node>/<language>.md` first. Inputs are called there as the nodes call them in this language."""
    docs = ROOT / "web" / "docs"
    nodes, in_english = (
        json.loads((ROOT / "locales" / each / "nodeDefs.json").read_text(encoding="utf-8")) for each in (language, "en")
    )
    assert {path.parent.name for path in docs.glob(f"*/{language}.md")} == {path.stem for path in docs.glob("*.md")}
    for page in docs.glob(f"*/{language}.md"):
        name, inputs = page.parent.name, nodes[page.parent.name].get("inputs", {})
        text, english = page.read_text(encoding="utf-8"), (docs / f"{name}.md").read_text(encoding="utf-8")
        assert text.startswith(f"# {nodes[name]['display_name'].split(' (')[0]}\n"), page
        assert f"]({name}.jpg)" in text, page
        assert re.findall(r"^#+", text, re.MULTILINE) == re.findall(r"^#+", english, re.MULTILINE), page
        assert len(first_cells(text)) == len(first_cells(english)), page
        for cell, translated in zip(first_cells(english), first_cells(text), strict=True):
            named = set(re.findall(r"\w+", cell))
            assert not named <= inputs.keys() or all(inputs[word]["name"] in translated for word in named), (page, cell)
        outputs = {slot["name"] for slot in in_english[name].get("outputs", {}).values()}
        code = set(re.findall(r"`([^`]+)`", english)) - inputs.keys() - outputs
        assert {word for word in code if f"`{word}`" not in text} == set(), page
        # Markdown takes ** for a mark only where no letter stands beside punctuation in it
        for before, bold, after in re.findall(r"(.?)\*\*(.+?)\*\*(.?)", text):
            assert bold[0].isalnum() or not before.isalnum(), (page, bold)
            assert bold[-1].isalnum() or not after.isalnum(), (page, bold)


def test_there_are_no_other_files_among_the_help_pages():
    languages = {path.name for path in (ROOT / "locales").iterdir()} - {"en"}
    assert {path.name for path in (ROOT / "web" / "docs").glob("*/*")} == {f"{language}.md" for language in languages}
