"""What the Comfy Registry is given: metadata it can read, code it allows, an archive with what users need and no more."""

import json
import re
import subprocess
import zipfile

import pytest
from environment import ROOT, node_tools
from PIL import Image

# What users need. The models are of the small world's workflows; the pack adds their folder to the host's.
FOLDERS = ("cli/", "dcm_core/", "nodes/", "web/", "workflows/", "locales/", "small_world/models/")
FILES = {
    "__init__.py",
    "pyproject.toml",
    "requirements.txt",
    "README.md",
    "LICENSE",
    "CHANGELOG.md",
    "small_world/README.md",
}
MAX_BYTES = 16e6

# comfy-cli's own reading of pyproject.toml, which it sends to the registry.
READ = """
import dataclasses, json
from comfy_cli.registry.config_parser import extract_node_configuration
print(json.dumps(dataclasses.asdict(extract_node_configuration())))
"""


@pytest.fixture(scope="module")
def metadata():
    result = subprocess.run([node_tools() / "python", "-c", READ], cwd=ROOT, capture_output=True, text=True, check=True)
    said, _, last = result.stdout.strip().rpartition("\n")
    assert not said, "comfy-cli warns"
    return json.loads(last)


def test_the_registry_reads_every_field(metadata):
    project, comfy = metadata["project"], metadata["tool_comfy"]
    assert (
        project["name"] == "dcm-video"
        and comfy["publisher_id"] == "comfyui-dcm"
        and comfy["display_name"] == "ComfyUI-DCM"
    )
    assert 40 < len(project["description"]) < 300
    assert project["license"]["file"] == "LICENSE"
    assert project["urls"]["repository"] and project["urls"]["documentation"] and project["urls"]["issues"]
    assert project["supported_os"] == ["OS Independent"]
    assert "GPU :: NVIDIA CUDA" in project["supported_accelerators"]
    assert project["supported_comfyui_version"] == ">=0.3.75"
    assert not comfy["web"], "the host takes WEB_DIRECTORY"


@pytest.mark.parametrize(("field", "shape"), [("icon", (1, 1)), ("banner_url", (21, 9))])
def test_pictures_are_files_of_the_repository(metadata, field, shape):
    repository = metadata["project"]["urls"]["repository"].removeprefix("https://github.com/")
    found = re.fullmatch(
        rf"https://raw\.githubusercontent\.com/{repository}/main/(.+\.png)", metadata["tool_comfy"][field]
    )
    assert found
    with Image.open(ROOT / found[1]) as image:
        width, height = image.size
    assert width * shape[1] == height * shape[0]
    assert field != "icon" or width <= 400
    assert (ROOT / found[1]).stat().st_size < 100e3


def test_the_newest_entry_of_the_changelog_is_the_version(metadata):
    headings = re.findall(
        r"^## \[(.+?)\](?: - (\S+))?$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    released = [(version, date) for version, date in headings if version != "Unreleased"]
    assert released[0][0] == metadata["project"]["version"]
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d", date) for _, date in released)


def test_the_license_is_the_gpl():
    lines = [line.strip() for line in (ROOT / "LICENSE").read_text(encoding="utf-8").splitlines()[:2]]
    assert lines == ["GNU GENERAL PUBLIC LICENSE", "Version 3, 29 June 2007"]


def test_the_archive_holds_what_users_need_and_nothing_else(archive, repository):
    with zipfile.ZipFile(archive) as packed:
        names = packed.namelist()
    expected = {name for name in repository.files() if name in FILES or name.startswith(FOLDERS)}
    assert expected >= FILES
    assert set(names) == expected
    assert archive.stat().st_size < MAX_BYTES, f"{len(names)} files, {archive.stat().st_size / 1e6:.1f} MB"


def test_the_checks_pass_the_pack_and_fail_on_code_the_registry_forbids(monkeypatch, script, environment, repository):
    monkeypatch.setattr(script, "ROOT", repository.folder)
    assert script.validate(environment) == 0
    for line in ("exec('1')", "eval('1')", "a = 1; b = 2"):
        (repository.folder / "bad.py").write_text(f"{line}\n")
        assert script.validate(environment) != 0, line
