"""A running ComfyUI on the CPU with the pack in it, and a client of its API. Standard library only."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from environment import ROOT, Environment, SetupError, node_tools

PACK_FOLDER = "comfyui-dcm"
START_SECONDS, RUN_SECONDS = 180, 900
LOG = "server.log"

Prompt = dict[str, dict[str, Any]]
# of the host's history
Entry = dict[str, Any]

# The server is on this machine: a proxy that the environment names must not stand between.
direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class RunError(RuntimeError):
    """A prompt that was refused or failed; the message is the server's."""


@dataclass
class Instance:
    """A running server; `boot` is its log up to the moment it answered."""

    environment: Environment
    base: Path
    port: int
    process: subprocess.Popen[bytes]
    boot: str = ""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def request(self, path: str, body: Any = None) -> Any:
        """The parsed answer of a GET, or of a POST if there is a body; None if it is empty.

        Raises:
            OSError: no answer; HTTPError, which is one, for a refusal.
        """
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self.url + urllib.parse.quote(path), data, {"Content-Type": "application/json"}
        )
        with direct.open(request, timeout=30) as answer:
            content = answer.read()
        return json.loads(content) if content else None

    def prompt_of(self, workflow: Path) -> Prompt:
        """A saved graph in the API's format, as the front end would send it."""
        command = [
            str(node_tools() / "comfy"),
            "--skip-prompt",
            "--json",
            "run",
            "--workflow",
            str(workflow),
            "--host",
            "127.0.0.1",
            "--port",
            str(self.port),
            "--print-prompt",
        ]
        result = subprocess.run(command, env=self.environment.variables(), capture_output=True, text=True, check=False)
        if result.returncode:
            raise RunError(f"{workflow.name} cannot be converted:\n{result.stdout[-2000:]}\n{result.stderr[-1000:]}")
        return json.loads(result.stdout)["data"]["prompt"]

    def queue(self, prompt: Prompt) -> str:
        """Queue a prompt; returns its id.

        Raises:
            RunError: the server refuses it.
        """
        try:
            return self.request("/prompt", {"prompt": prompt})["prompt_id"]
        except urllib.error.HTTPError as error:
            raise RunError(_refusal(error.read().decode(errors="replace"))) from error

    def wait(self, prompt_id: str, seconds: float = RUN_SECONDS) -> Entry:
        """The history entry of a prompt, once it has ended, well or not.

        Raises:
            RunError: it takes longer than `seconds`, or the server ends.
        """
        deadline = time.monotonic() + seconds
        try:
            while not (entry := self.request(f"/history/{prompt_id}").get(prompt_id)):
                if time.monotonic() > deadline:
                    raise RunError(f"the prompt did not end within {seconds} s; the log ends with:\n{self.log_tail()}")
                time.sleep(0.05)
        except OSError as error:
            raise RunError(f"{self.url} does not answer ({error}); the log ends with:\n{self.log_tail()}") from error
        return entry

    def run(self, prompt: Prompt, seconds: float = RUN_SECONDS) -> Entry:
        """Queue a prompt and wait for its end."""
        return self.wait(self.queue(prompt), seconds)

    def saved(self, entry: Entry, number: str | None = None) -> list[Path]:
        """The files that a good run saved, or one node of it."""
        outputs = outputs_of(entry)
        nodes = outputs.values() if number is None else [outputs[number]]
        shown = [item for node in nodes for items in node.values() for item in items]
        files = [item for item in shown if isinstance(item, dict) and "filename" in item]
        return [self.base / file["type"] / file["subfolder"] / file["filename"] for file in files]

    def log(self) -> str:
        return (self.base / LOG).read_text(encoding="utf-8", errors="replace")

    def log_tail(self, lines: int = 15) -> str:
        return "\n".join(self.log().splitlines()[-lines:])


def messages(entry: Entry) -> dict[str, Any]:
    """Kind -> details of what the host said about a run."""
    return dict(entry["status"]["messages"])


def outputs_of(entry: Entry) -> dict[str, Any]:
    """What the nodes of a run show: node id -> lists of files, texts ...

    Raises:
        RunError: a node failed, or the run was interrupted.
    """
    said = messages(entry)
    if failed := said.get("execution_error"):
        raise RunError(f"{failed['node_type']}: {failed['exception_message'].strip()}")
    if "execution_success" not in said:
        raise RunError(f"the run did not end well: {', '.join(said)}")
    return entry["outputs"]


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


def make_base(base: Path, folder: str = PACK_FOLDER) -> None:
    """A base directory of ComfyUI with the pack in it; the host's own folder stays untouched."""
    for name in ("custom_nodes", "user"):
        (base / name).mkdir(parents=True, exist_ok=True)
    pack = base / "custom_nodes" / folder
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


def server_command(environment: Environment, base: Path, port: int, arguments: Sequence[str] = ("--cpu",)) -> list[str]:
    return [
        str(environment.python),
        str(environment.comfyui / "main.py"),
        "--port",
        str(port),
        "--base-directory",
        str(base),
        "--database-url",
        f"sqlite:///{base / 'user' / 'comfyui.db'}",
        "--preview-method",
        "latent2rgb",
        "--disable-auto-launch",
        *arguments,
    ]


@contextlib.contextmanager
def start(environment: Environment, base: Path, arguments: Sequence[str] = ("--cpu",)) -> Iterator[Instance]:
    """A server that runs as long as the context.

    Args:
        arguments: what else the host is told.

    Raises:
        SetupError: it does not start, or cannot import the pack.
    """
    port = free_port()
    command = server_command(environment, base, port, arguments)
    with (base / LOG).open("w", encoding="utf-8") as log:
        process = subprocess.Popen(command, env=environment.variables(), stdout=log, stderr=subprocess.STDOUT, cwd=base)
    try:
        instance = Instance(environment, base, port, process)
        wait_until_ready(instance)
        instance.boot = instance.log()
        yield instance
    finally:
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_until_ready(instance: Instance) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        with contextlib.suppress(OSError):
            instance.request("/system_stats")
            break
        if instance.process.poll() is not None or time.monotonic() > deadline:
            raise SetupError(f"ComfyUI did not start; its log ends with:\n{instance.log_tail()}")
        time.sleep(0.2)
    if "(IMPORT FAILED)" in instance.log():
        raise SetupError(f"ComfyUI could not import the pack:\n{instance.log_tail(60)}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
