"""Installed, updated and uninstalled by ComfyUI Manager's own command line, and unpacked from the registry's archive, in a fresh host."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from environment import ROOT, manager_tools

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # comes with pytest

URL = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]["Repository"]
NAME = "ComfyUI-DCM"
OF_THE_USER = {"custom_nodes", "models", "input", "output", "temp", "user"}
NOWHERE = "http://127.0.0.1:9"  # no proxy listens there


@pytest.fixture
def host(environment, tmp_path):
    """A fresh ComfyUI on the code of the one under test, whose own folder stays as it is."""
    folder = tmp_path / "comfyui"
    folder.mkdir()
    for path in environment.comfyui.iterdir():
        if path.is_file():
            shutil.copyfile(path, folder / path.name)  # its paths start at where main.py is
        elif path.name not in OF_THE_USER and not path.name.startswith("."):
            (folder / path.name).symlink_to(path, target_is_directory=True)
    for name in OF_THE_USER:
        (folder / name).mkdir()
    return folder


@pytest.fixture
def manager(host, repository, tmp_path):
    """Run Manager on the host: manager("install", URL); the pack's URL is the repository, and nothing else is reached."""
    variables = repository.variables(**{f"url.{repository.folder.as_uri()}.insteadOf": URL})
    # what the requirements ask for themselves comes with the host
    (tmp_path / "uv.toml").write_text("[pip]\nno-deps = true\n")
    variables |= {"COMFYUI_PATH": str(host), "UV_OFFLINE": "1", "UV_CONFIG_FILE": str(tmp_path / "uv.toml")}
    variables |= dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), NOWHERE)

    def run(*arguments):
        command = [manager_tools() / "cm-cli", *arguments, "--mode", "local"]
        result = subprocess.run(command, env=variables, capture_output=True, text=True, check=True)
        return result.stdout + result.stderr

    return run


def imported(environment, host):
    """Start the host and end it at once: name of a custom node -> what the host says of its import, "" where all is well."""
    command = [environment.python, host / "main.py", "--cpu", "--quick-test-for-ci"]
    variables = {**environment.variables(), "COMFYUI_PATH": str(host)}
    result = subprocess.run(
        command, cwd=host, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    assert result.returncode == 0, result.stdout
    found = re.findall(r"^ *[\d.]+ seconds(?: \((.+)\))?: (.+)$", result.stdout, re.MULTILINE)
    return {Path(path).name: failure for failure, path in found}, result.stdout


def test_manager_installs_updates_and_uninstalls(environment, manager, host, repository, archive):
    pack, broken, packed = (host / "custom_nodes" / name for name in (NAME, "broken", "dcm-video"))
    said = manager("install", URL)
    assert [path.name for path in (host / "custom_nodes").iterdir()] == [NAME], said
    assert (pack / "__init__.py").is_file()

    shutil.unpack_archive(archive, packed)
    # which shows what a failure looks like
    broken.mkdir()
    (broken / "__init__.py").write_text("import no_such_module")
    packs, log = imported(environment, host)
    assert packs == {NAME: "", packed.name: "", broken.name: "IMPORT FAILED"}, log
    shutil.rmtree(packed)

    (repository.folder / "nodes" / "news.py").write_text("")
    commit = repository.commit()
    assert not (pack / "nodes" / "news.py").exists()
    said = manager("update", NAME)
    assert (pack / "nodes" / "news.py").is_file(), said
    assert commit in repository.git("ls-remote", str(pack), "HEAD")

    said = manager("uninstall", NAME)
    assert [path.name for path in (host / "custom_nodes").iterdir()] == [broken.name], said
