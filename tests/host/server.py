"""A real server process of a host with the pack in it, spoken to through its API as the front end does."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

ROOT = Path(__file__).parents[2]
HOST = os.environ.get("COMFYUI_PATH")
# what tells the host where to run: on the CPU, or on the device that it takes by itself
DEVICE = [] if os.environ.get("COMFYUI_DCM_TEST_GPU") else ["--cpu"]
FOLDER = "some-folder.name"  # no Python name
START_SECONDS, RUN_SECONDS = 120, 120

# The server is on this machine: a proxy that the environment names must not stand between.
direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Server:
    """A running host; `boot` is its log up to the moment it answered."""

    def __init__(self, base, port):
        self.base, self.port, self.boot, self.log_file = base, port, "", base / "server.log"
        self.process = None

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def request(self, path, body=None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + urllib.parse.quote(path), data, {"Content-Type": "application/json"})
        with direct.open(request, timeout=30) as answer:
            content = answer.read()
        return json.loads(content) if content else None

    def log(self):
        return self.log_file.read_text(encoding="utf-8", errors="replace")

    def queue(self, prompt):
        try:
            return self.request("/prompt", {"prompt": prompt})["prompt_id"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"the host refuses the prompt: {error.read().decode()}") from error

    def wait(self, prompt_id):
        """The history entry of a prompt, once it has one."""
        deadline = time.monotonic() + RUN_SECONDS
        while time.monotonic() < deadline:
            entry = self.request(f"/history/{prompt_id}").get(prompt_id)
            if entry:
                return entry
            time.sleep(0.05)
        raise AssertionError(f"no end after {RUN_SECONDS} s; the log ends with:\n{self.log()[-3000:]}")

    def run(self, prompt):
        return self.wait(self.queue(prompt))

    def saved(self, entry, number, kind="images"):
        """The file that a node of a good run saved."""
        assert "execution_success" in messages(entry), messages(entry).get("execution_error", {}).get("exception_message")
        (file,) = entry["outputs"][number][kind]
        return self.base / file["type"] / file["subfolder"] / file["filename"]


def messages(entry):
    """Kind -> details of what the host said about a run."""
    return dict(entry["status"]["messages"])


def failure(entry):
    """What the host said about a run that failed."""
    assert entry["status"]["status_str"] == "error"
    return messages(entry)["execution_error"]


@contextlib.contextmanager
def start_server(base, host=HOST, python=sys.executable, extra_args=(), folder=FOLDER):
    """A server with the pack in it that runs as long as the context; `base` may hold models and inputs already."""
    for name in ("custom_nodes", "user"):
        (base / name).mkdir(parents=True, exist_ok=True)
    (base / "custom_nodes" / folder).symlink_to(ROOT, target_is_directory=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        server = Server(base, probe.getsockname()[1])
    command = [
        str(python), str(Path(host) / "main.py"), *DEVICE, "--port", str(server.port), "--base-directory", str(base),
        "--database-url", f"sqlite:///{base / 'user' / 'comfyui.db'}", "--disable-auto-launch", "--disable-api-nodes", *extra_args,
    ]
    environment = {**os.environ, "COMFYUI_PATH": str(host), "PYTHONUNBUFFERED": "1"}
    with server.log_file.open("w") as log:
        process = server.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=base)
    try:
        wait_until_ready(server, process)
        server.boot = server.log()
        yield server
    finally:
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_until_ready(server, process):
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            server.request("/system_stats")
            return
        except OSError:
            time.sleep(0.2)
    raise AssertionError(f"the host did not start; its log ends with:\n{server.log()[-3000:]}")


def make_tiny_models(models, host=HOST, python=sys.executable):
    """Small random models of the real architectures, in a process of their own."""
    command = [str(python), str(ROOT / "scripts" / "tiny_models.py"), str(models)]
    subprocess.run(command, env={**os.environ, "COMFYUI_PATH": str(host)}, check=True)
