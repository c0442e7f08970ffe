"""Render a DCM video in a real ComfyUI: a shipped workflow through the server, with small random models on the CPU.

    python scripts/demo.py [--width 256 --height 192 --frames 17]

The last line is the video's path.
"""

import argparse
import contextlib
import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from environment import ROOT, Environment, SetupError, add_options, cache_folder, node_tools, prepare, say

WORKFLOW = ROOT / "workflows" / "DCM Wan 2.1 text to video (cached prompt).json"
LATENT_NODE = "EmptyHunyuanLatentVideo"
START_SECONDS, RUN_SECONDS = 180, 900


def make_base(environment: Environment) -> Path:
    """A base directory of ComfyUI with the pack and the small models in it; the host's own folder stays untouched."""
    base = cache_folder() / "demo"
    nodes = base / "custom_nodes"
    nodes.mkdir(parents=True, exist_ok=True)
    pack = nodes / "comfyui-dcm"
    if pack.is_symlink():
        pack.unlink()
    shutil.rmtree(pack, ignore_errors=True)
    try:
        pack.symlink_to(ROOT, target_is_directory=True)
    except OSError:  # Windows without the right to make links
        shutil.copytree(ROOT, pack, ignore=shutil.ignore_patterns(".git", "__pycache__"))
    say("making small models of the real architecture")
    command = [environment.python, ROOT / "scripts" / "tiny_models.py", base / "models"]
    subprocess.run([str(part) for part in command], env=environment.variables(), check=True, stdout=subprocess.DEVNULL)
    return base


def server_command(environment: Environment, base: Path, port: int) -> list[str]:
    return [
        str(environment.python), str(environment.comfyui / "main.py"), "--cpu", "--port", str(port),
        "--base-directory", str(base), "--preview-method", "latent2rgb", "--disable-auto-launch",
    ]


@contextlib.contextmanager
def server(environment: Environment, base: Path) -> Iterator[int]:
    """A running ComfyUI; gives its port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = base / "server.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            server_command(environment, base, port), env=environment.variables(), stdout=out, stderr=subprocess.STDOUT
        )
    try:
        deadline = time.monotonic() + START_SECONDS
        while not answers(port):
            if process.poll() is not None or time.monotonic() > deadline:
                raise SetupError(f"ComfyUI did not start; its log ends with:\n{tail(log)}")
            time.sleep(0.5)
        yield port
    finally:
        process.terminate()
        process.wait(timeout=30)


def answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/system_stats", timeout=5):
            return True
    except (urllib.error.URLError, OSError):
        return False


def tail(log: Path, lines: int = 15) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def sized_workflow(base: Path, width: int, height: int, frames: int) -> Path:
    """The shipped workflow with a video size for the CPU; nothing else is changed."""
    graph = json.loads(WORKFLOW.read_text(encoding="utf-8"))
    for node in graph["nodes"]:
        if node["type"] == LATENT_NODE:
            node["widgets_values"] = [width, height, frames, 1]
    path = base / WORKFLOW.name
    path.write_text(json.dumps(graph), encoding="utf-8")
    return path


def run_workflow(environment: Environment, workflow: Path, port: int, log: Path) -> None:
    """Queue the graph as the front end would, and wait for its end."""
    command = [
        str(node_tools() / "comfy"), "--skip-prompt", "--json", "run", "--workflow", str(workflow),
        "--host", "127.0.0.1", "--port", str(port), "--wait", "--timeout", str(RUN_SECONDS),
    ]
    result = subprocess.run(command, env=environment.variables(), capture_output=True, text=True, check=False)
    if result.returncode:
        raise SetupError(f"the workflow failed:\n{result.stdout[-2000:]}\n{result.stderr[-1000:]}\nThe server's log ends with:\n{tail(log)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=256, help="pixels, a multiple of 16 (default: %(default)s)")
    parser.add_argument("--height", type=int, default=192, help="pixels, a multiple of 16 (default: %(default)s)")
    parser.add_argument("--frames", type=int, default=17, help="1 more than a multiple of 4 (default: %(default)s)")
    add_options(parser)
    args = parser.parse_args()
    environment = prepare()
    base = make_base(environment)
    videos = base / "output" / "video"
    before = set(videos.glob("*.mp4"))
    say("starting ComfyUI")
    with server(environment, base) as port:
        started = time.monotonic()
        run_workflow(environment, sized_workflow(base, args.width, args.height, args.frames), port, base / "server.log")
        say(f"rendered in {time.monotonic() - started:.1f} s")
    plan = [line for line in (base / "server.log").read_text(errors="replace").splitlines() if line.startswith("step ")]
    new = sorted(set(videos.glob("*.mp4")) - before)
    if not new:
        raise SetupError(f"the workflow ran but saved no video in {videos}. Its log ends with:\n{tail(base / 'server.log')}")
    say(f"plan: {plan[-1] if plan else 'not logged'}")
    say("to open the graph in a browser, start ComfyUI with")
    print("  " + " ".join(f'"{part}"' if " " in part else part for part in server_command(environment, base, 8188)))
    print(f"  then open http://127.0.0.1:8188 and drag this file into the window: {WORKFLOW}")
    print(new[-1].resolve())


if __name__ == "__main__":
    sys.exit(main())
