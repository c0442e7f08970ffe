"""The workflows on GitHub: what runs when, and that nothing is published untested."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from environment import ROOT, Environment

yaml = pytest.importorskip("yaml", reason="PyYAML comes with ComfyUI")

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def read(path):
    # YAML 1.1 takes the key `on` for a truth value
    return {
        "on" if key is True else key: value for key, value in yaml.safe_load(path.read_text(encoding="utf-8")).items()
    }


def named(name):
    return read(ROOT / ".github" / "workflows" / name)


def steps_of(job):
    return [step.get("run") or step["uses"] for step in job.get("steps", [])]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflow_is_well_formed(path):
    workflow = read(path)
    assert set(workflow) >= {"name", "on", "jobs"}
    for job in workflow["jobs"].values():
        assert ("uses" in job) != ("runs-on" in job and bool(steps_of(job)))
        needs = job.get("needs", [])
        assert set([needs] if isinstance(needs, str) else needs) <= set(workflow["jobs"])
        for step in job.get("steps", []):
            assert ("run" in step) != ("uses" in step)
            assert "uses" not in step or re.fullmatch(r"[\w-]+/[\w-]+@v\d+", step["uses"]), (
                "an action of no fixed version"
            )


def test_every_change_is_tested_by_the_script_that_a_user_runs():
    workflow = named("tests.yml")
    assert {"push", "pull_request", "workflow_call"} <= set(workflow["on"])
    assert "bash .ci/run" in steps_of(workflow["jobs"]["tests"])
    assert "python3 scripts/test.py" in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "own_comfyui", "runs"),
    [
        ([], False, [("both",)]),
        ([], True, [("all", [])]),
        (["-k", "word"], False, [("all", ["-k", "word"])]),
        (["--newer", "-k", "word"], False, [("newer", ["-k", "word"])]),
    ],
)
def test_the_script_passes_everything_in_two_hosts(monkeypatch, script, arguments, own_comfyui, runs):
    done = []
    monkeypatch.setattr(script, "run_in_both", lambda: done.append(("both",)))
    monkeypatch.setattr(script, "run_all", lambda given: done.append(("all", given)))
    monkeypatch.setattr(script, "run_in_newer", lambda given: done.append(("newer", given)))
    monkeypatch.setattr(script.sys, "argv", ["test.py", *arguments])
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    if own_comfyui:
        monkeypatch.setenv("COMFYUI_PATH", "comfyui")
    script.main()
    assert done == runs


@pytest.fixture
def hosts(monkeypatch, script, tmp_path):
    """The script with two hosts whose Python is this one."""
    oldest, newer = (
        Environment(Path(sys.executable), tmp_path / "oldest"),
        Environment(Path(sys.executable), tmp_path / "newer"),
    )
    monkeypatch.setattr(script, "prepare_oldest", lambda: oldest)
    monkeypatch.setattr(script, "prepare", lambda host: newer)
    monkeypatch.setattr(script, "front_end", lambda: tmp_path)
    monkeypatch.setattr(script, "lint", lambda environment: 0)


@pytest.mark.usefixtures("hosts")
@pytest.mark.parametrize(
    ("oldest", "newer", "status", "ran"),
    [(0, 0, 0, ["oldest", "newer"]), (1, 0, 1, ["oldest"]), (0, 3, 3, ["oldest", "newer"])],
)
def test_a_failure_in_either_host_is_one(monkeypatch, script, oldest, newer, status, ran):
    done = []

    def run(title, command, environment, **variables):
        done.append(environment.comfyui.name)
        assert command[command.index("--dist") + 1] == "loadfile" and int(command[command.index("-n") + 1]) >= 1
        assert ("tests/host" in command) == (environment.comfyui.name == "newer")
        assert ("COMFYUI_FRONT_END" in variables) == (environment.comfyui.name == "oldest")
        return {"oldest": oldest, "newer": newer}[environment.comfyui.name]

    monkeypatch.setattr(script, "run", run)
    assert script.run_in_both() == status and done == ran


@pytest.mark.usefixtures("hosts")
def test_named_tests_run_in_one_process(monkeypatch, script):
    commands = []
    monkeypatch.setattr(script, "run", lambda title, command, environment, **variables: commands.append(command) or 0)
    assert script.run_all(["-k", "word"]) == 0 and "-n" not in commands[0]


@pytest.mark.usefixtures("hosts")
def test_nothing_runs_after_a_failed_lint(monkeypatch, script):
    monkeypatch.setattr(script, "lint", lambda environment: 1)
    monkeypatch.setattr(script, "run", lambda *_, **__: pytest.fail("ran"))
    assert script.run_in_both() == 1


def test_a_version_tag_is_published_after_the_tests():
    workflow = named("publish.yml")
    assert set(workflow["on"]) == {"push"} and set(workflow["on"]["push"]) == {"tags"}
    jobs = workflow["jobs"]
    assert jobs["publish"]["needs"] == "tests"
    assert (ROOT / jobs["tests"]["uses"]).is_file()
    assert any(step.startswith("Comfy-Org/publish-node-action@") for step in steps_of(jobs["publish"]))


@pytest.mark.skipif(os.name == "nt", reason="the step runs on Linux")
@pytest.mark.parametrize(("tag", "fits"), [("v{version}", True), ("v9{version}", False), ("v{version}.1", False)])
def test_a_tag_that_is_not_the_version_stops_the_publishing(tag, fits):
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)[1]
    [check] = [step for step in steps_of(named("publish.yml")["jobs"]["publish"]) if "pyproject.toml" in step]
    environment = {**os.environ, "GITHUB_REF_NAME": tag.format(version=version)}
    result = subprocess.run(["bash", "-c", check], cwd=ROOT, env=environment, capture_output=True, check=False)
    assert (result.returncode == 0) == fits
