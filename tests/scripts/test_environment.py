"""Making the environment: what is reused, what is made anew, and what a user is told."""

import dataclasses
import errno
import hashlib
import io
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import environment
import pytest
from environment import SetupError

PARTS = [environment.OLDEST, environment.NEWER, environment.FRONT_END]

each_part = pytest.mark.parametrize("part", PARTS, ids=lambda part: f"{part.name} {part.version}")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("COMFYUI_DCM_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    return environment.cache_folder()


@pytest.fixture
def pip(monkeypatch):
    """Runs of pip, recorded instead of run."""
    runs = []
    monkeypatch.setattr(environment, "run_pip", lambda python, arguments, cache: runs.append(arguments))
    return runs


@pytest.fixture
def download(monkeypatch):
    """pip "downloads" a file with a part's folder in it: download(part) -> the part with the sha256 of that file."""
    content = io.BytesIO()

    def run(python, arguments, cache):
        runs.append(arguments)
        folder = Path(arguments[arguments.index("--dest") + 1])
        folder.mkdir()
        (folder / run.name).write_bytes(content.getvalue())

    def prepare(part):
        files = [f"{part.folder}/main.py", f"{part.folder}/extra_model_paths.yaml", "other.py"]
        if "--no-binary" in "".join(part.options):
            run.name = "package.tar.gz"
            with tarfile.open(fileobj=content, mode="w:gz") as archive:
                for name in files:
                    archive.addfile(tarfile.TarInfo(name))
        else:
            run.name = "package.whl"
            with zipfile.ZipFile(content, "w") as archive:
                for name in files:
                    archive.writestr(zipfile.ZipInfo(name), "")
        return dataclasses.replace(part, sha256=hashlib.sha256(content.getvalue()).hexdigest())

    prepare.runs = runs = []
    monkeypatch.setattr(environment, "run_pip", run)
    return prepare


@each_part
def test_a_part_is_downloaded_once(cache, download, part):
    part = download(part)
    folder = environment.get(part, cache)
    assert environment.get(part, cache) == folder
    assert [(run[-1], set(part.options) <= set(run)) for run in download.runs] == [(part.package, True)]
    assert sorted(path.name for path in folder.iterdir()) == [environment.DONE, "main.py"]
    assert list(cache.iterdir()) == [folder]


def test_a_half_unpacked_part_is_made_anew(cache, download):
    part = download(environment.OLDEST)
    half = cache / f"{part.name}-{part.version}"
    half.mkdir()
    (half / "half").touch()
    assert not (environment.get(part, cache) / "half").exists()


@pytest.mark.parametrize("part", [environment.OLDEST, environment.NEWER], ids=lambda part: part.version)
def test_another_file_is_refused_and_nothing_stays(cache, download, part):
    download(part)
    with pytest.raises(SetupError, match=rf"has sha256 \w+, expected {part.sha256}.*Check the package index"):
        environment.get(part, cache)
    assert not list(cache.iterdir())


def test_an_environment_over_another_uses_what_is_below(cache, pip):
    below = environment.virtual_environment(cache, "below", ["one==1"], gigabytes=0)
    (environment.site_packages(below) / "only_below.py").touch()
    (environment.site_packages(below) / "in_both.py").write_text("place = 'below'")
    python = environment.virtual_environment(cache, "over", ["two==2"], gigabytes=0, over=below)
    (environment.site_packages(python) / "in_both.py").write_text("place = 'over'")
    code = "import only_below, in_both; print(in_both.place)"
    assert subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout == "over\n"
    other = environment.virtual_environment(cache, "below", ["one==2"], gigabytes=0)
    assert environment.virtual_environment(cache, "over", ["two==2"], gigabytes=0, over=other) != python


def test_environment_is_reused_until_its_requirements_change(cache, pip):
    python = environment.virtual_environment(cache, "test", ["one==1"], gigabytes=0)
    assert environment.virtual_environment(cache, "test", ["one==1"], gigabytes=0) == python
    assert len(pip) == 1
    assert environment.virtual_environment(cache, "test", ["one==2"], gigabytes=0) != python


def test_broken_environment_is_made_anew(cache, pip):
    python = environment.virtual_environment(cache, "test", ["one==1"], gigabytes=0)
    (python.parent.parent / environment.DONE).unlink()
    environment.virtual_environment(cache, "test", ["one==1"], gigabytes=0)
    python.unlink()
    environment.virtual_environment(cache, "test", ["one==1"], gigabytes=0)
    assert len(pip) == 3


def test_full_disk_is_told_before_anything_is_made(cache, pip):
    with pytest.raises(SetupError, match=r"GB free, 1000000 GB are needed. Make room, or set COMFYUI_DCM_CACHE"):
        environment.virtual_environment(cache, "test", ["one==1"], gigabytes=1_000_000)
    assert not pip
    assert not list(cache.iterdir())


def test_failed_pip_gives_its_reason_and_the_fix(cache, tmp_path):
    arguments = ["install", "--no-index", "--find-links", str(tmp_path), "no-such-package"]
    with pytest.raises(SetupError, match=r"(?s)No matching distribution found for no-such-package.*Check the network"):
        environment.run_pip(Path(sys.executable), arguments, cache)
    assert not list(cache.iterdir())


@pytest.mark.parametrize(("version", "listed"), [((3, 10, 4), "3.11 to 3.14"), ((3, 15, 0), "3.11 to 3.14")])
def test_unfit_python_is_refused(monkeypatch, version, listed):
    monkeypatch.setattr(environment.sys, "version_info", version)
    with pytest.raises(SetupError, match=f"{listed} is needed"):
        environment.check_python()


def test_unwritable_cache(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("COMFYUI_DCM_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(SetupError, match="Set COMFYUI_DCM_CACHE to a folder you may write"):
        environment.cache_folder()


def test_comfyui_path_has_to_be_a_comfyui(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    with pytest.raises(SetupError, match="holds no ComfyUI"):
        environment.prepare()


def test_python_of_an_own_host_needs_its_modules(tmp_path):
    with pytest.raises(SetupError, match=r"has no no_such_module\. Install with .* -m pip install no_such_module"):
        environment.Environment(Path(sys.executable), tmp_path).require("pytest", "no_such_module")
    with pytest.raises(SetupError, match="does not run"):
        environment.Environment(tmp_path / "python", tmp_path).require("pytest")


def test_lock_waits_for_a_living_process_and_outlives_a_dead_one(cache):
    path = cache / ".lock"
    hold = "import environment, pathlib, sys, time\nwith environment.lock(pathlib.Path(sys.argv[1])):\n print(flush=True); time.sleep(60)"
    scripts = Path(environment.__file__).parent
    with subprocess.Popen([sys.executable, "-c", hold, path], cwd=scripts, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        with path.open("a") as file:
            assert not environment._acquire(file)
            process.kill()
            process.wait()
            assert environment._acquire(file)


def test_a_file_system_without_locks_is_named(cache, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    message = r"cannot be locked \(No locks available\).* Set COMFYUI_DCM_CACHE"
    with pytest.raises(SetupError, match=message), environment.lock(cache / ".lock"):
        pass
