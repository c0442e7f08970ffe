"""A real server in a process of its own, as the demo starts it; a repository as users get it."""

import importlib.util
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from environment import ROOT, Environment, node_tools
from instance import make_base, make_models, start


@pytest.fixture(scope="session")
def environment():
    """The Python that runs the tests, and the ComfyUI they run in."""
    if not (host := os.environ.get("COMFYUI_PATH")):
        pytest.skip("COMFYUI_PATH names no ComfyUI; `python scripts/test.py` brings one")
    return Environment(Path(sys.executable), Path(host))


@pytest.fixture(scope="session")
def server(environment, tmp_path_factory):
    """A running ComfyUI: see `instance.Instance` for its methods."""
    base = tmp_path_factory.mktemp("demo")
    make_base(base)
    make_models(environment, base)
    with start(environment, base) as instance:
        yield instance


@pytest.fixture
def script():
    """scripts/test.py, whose name is that of a module of Python."""
    spec = importlib.util.spec_from_file_location("test_script", ROOT / "scripts" / "test.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclass(frozen=True)
class Repository:
    """A git repository, whatever the user's own settings of git are."""

    folder: Path

    def variables(self, **settings: str) -> dict[str, str]:
        """The process environment for git with these settings alone: variables(**{"section.name": "value"})."""
        settings = {"safe.directory": "*", "user.name": "test", "user.email": "test@example.org", **settings}
        variables = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
        for number, (key, value) in enumerate(settings.items()):
            variables |= {f"GIT_CONFIG_KEY_{number}": key, f"GIT_CONFIG_VALUE_{number}": value}
        return variables | {
            "GIT_CONFIG_COUNT": str(len(settings)),
            "GIT_CONFIG_GLOBAL": os.devnull,
            "GIT_CONFIG_NOSYSTEM": "1",
        }

    def git(self, *arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=self.folder, env=self.variables(), capture_output=True, text=True, check=True
        ).stdout

    def files(self) -> set[str]:
        """What git tracks, or would if all were added."""
        return set(self.git("ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")) - {""}

    def commit(self) -> str:
        """Commit all there is; returns the commit's name."""
        self.git("add", "--all")
        self.git("commit", "--quiet", "--message", "test")
        return self.git("rev-parse", "HEAD").strip()


@pytest.fixture
def repository(tmp_path):
    """The checkout's files, without what git ignores, as a repository of one commit."""
    try:
        files = Repository(ROOT).files()
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this is no git checkout: what belongs to the pack is not known")
    copy = Repository(tmp_path / "repository")
    for name in files:
        if (ROOT / name).is_file():
            (copy.folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, copy.folder / name)
    copy.git("init", "--quiet")
    copy.commit()
    return copy


@pytest.fixture
def archive(repository, tmp_path):
    """What the registry would be sent."""
    command = [node_tools() / "comfy", "--skip-prompt", "node", "pack"]
    variables = {**repository.variables(), "DO_NOT_TRACK": "1"}
    subprocess.run(command, cwd=repository.folder, env=variables, capture_output=True, check=True)
    return (repository.folder / "node.zip").rename(tmp_path / "node.zip")
