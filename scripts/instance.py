"""A running ComfyUI on the CPU with the pack in it, and a client of its API. Standard library only."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from environment import ROOT, Environment, SetupError, node_tools

PACK_FOLDER = "comfyui-dcm"
START_SECONDS, RUN_SECONDS = 180, 900
LOG = "server.log"

Prompt = dict[str, dict[str, Any]]

# The server is on this machine: a proxy that the environment names must not stand between.
direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class RunError(RuntimeError):
    """A prompt that was refused or failed; the message is the server's."""


@dataclass(frozen=True)
class Instance:
    """A running server."""

    environment: Environment
    base: Path
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def get(self, path: str) -> Any:
        """The parsed answer of a GET request."""
        return self._request(path)

    def prompt_of(self, workflow: Path) -> Prompt:
        """A saved graph in the API's format, as the front end would send it."""
        command = [
            str(node_tools() / "comfy"), "--skip-prompt", "--json", "run", "--workflow", str(workflow),
            "--host", "127.0.0.1", "--port", str(self.port), "--print-prompt",
        ]
        result = subprocess.run(command, env=self.environment.variables(), capture_output=True, text=True, check=False)
        if result.returncode:
            raise RunError(f"{workflow.name} cannot be converted:\n{result.stdout[-2000:]}\n{result.stderr[-1000:]}")
        return json.loads(result.stdout)["data"]["prompt"]

    def run(self, prompt: Prompt, seconds: float = RUN_SECONDS) -> dict[str, Any]:
        """Queue a prompt and wait for its end.

        Returns:
            What its nodes show: node id -> lists of files, texts ...

        Raises:
            RunError: the server refuses the prompt, a node fails, or it takes longer than `seconds`.
        """
        queued = self._request("/prompt", {"prompt": prompt})["prompt_id"]
        deadline = time.monotonic() + seconds
        while not (entry := self.get(f"/history/{queued}").get(queued)):
            if time.monotonic() > deadline:
                raise RunError(f"the prompt did not end within {seconds} s; the log ends with:\n{self.log_tail()}")
            time.sleep(0.2)
        for kind, details in entry["status"]["messages"]:
            if kind == "execution_error":
                raise RunError(f"{details['node_type']}: {details['exception_message'].strip()}")
        return entry["outputs"]

    def saved(self, outputs: dict[str, Any]) -> list[Path]:
        """The files that a run saved."""
        shown = [item for node in outputs.values() for items in node.values() for item in items]
        files = [item for item in shown if isinstance(item, dict) and "filename" in item]
        return [self.base / file["type"] / file["subfolder"] / file["filename"] for file in files]

    def log(self) -> str:
        return (self.base / LOG).read_text(encoding="utf-8", errors="replace")

    def log_tail(self, lines: int = 15) -> str:
        return "\n".join(self.log().splitlines()[-lines:])

    def _request(self, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with direct.open(request, timeout=30) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise RunError(_refusal(error.read().decode(errors="replace"))) from error
        except OSError as error:
            raise RunError(f"{self.url} does not answer ({error}); the log ends with:\n{self.log_tail()}") from error


def _refusal(body: str) -> str:
    """The messages in the server's answer to a prompt it does not take."""
    try:
        answer = json.loads(body)
        lines = [answer["error"]["message"]]
        for node in answer["node_errors"].values():
            lines += [f"{node['class_type']}: {error['message']}: {error['details']}" for error in node["errors"]]
        return "\n".join(lines)
    except (ValueError, KeyError, TypeError):
        return body


def make_base(base: Path) -> None:
    """A base directory of ComfyUI with the pack in it; the host's own folder stays untouched."""
    for name in ("custom_nodes", "user"):
        (base / name).mkdir(parents=True, exist_ok=True)
    pack = base / "custom_nodes" / PACK_FOLDER
    if pack.is_symlink():
        pack.unlink()
    shutil.rmtree(pack, ignore_errors=True)
    try:
        pack.symlink_to(ROOT, target_is_directory=True)
    except OSError:  # Windows without the right to make links
        shutil.copytree(ROOT, pack, ignore=shutil.ignore_patterns(".git", "__pycache__"))


def make_models(environment: Environment, base: Path) -> None:
    """Small random models under the names that the workflows for released models ask for."""
    command = [environment.python, ROOT / "scripts" / "tiny_models.py", base / "models"]
    made = subprocess.run(command, env=environment.variables(), capture_output=True, text=True, check=False)
    if made.returncode:
        raise SetupError(f"the small models could not be made:\n{made.stderr[-2000:]}")


def server_command(environment: Environment, base: Path, port: int) -> list[str]:
    return [
        str(environment.python), str(environment.comfyui / "main.py"), "--cpu", "--port", str(port),
        "--base-directory", str(base), "--database-url", f"sqlite:///{base / 'user' / 'comfyui.db'}",
        "--preview-method", "latent2rgb", "--disable-auto-launch",
    ]


@contextlib.contextmanager
def start(environment: Environment, base: Path) -> Iterator[Instance]:
    """A server that runs as long as the context.

    Raises:
        SetupError: it does not start, or cannot import the pack.
    """
    instance = Instance(environment, base, free_port())
    with (base / LOG).open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            server_command(environment, base, instance.port), env=environment.variables(), stdout=log, stderr=subprocess.STDOUT
        )
    try:
        wait_until_ready(instance, process)
        yield instance
    finally:
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_until_ready(instance: Instance, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        with contextlib.suppress(RunError):
            instance.get("/system_stats")
            break
        if process.poll() is not None or time.monotonic() > deadline:
            raise SetupError(f"ComfyUI did not start; its log ends with:\n{instance.log_tail()}")
        time.sleep(0.5)
    if "(IMPORT FAILED)" in instance.log():
        raise SetupError(f"ComfyUI could not import the pack:\n{instance.log_tail(60)}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
