"""Render a DCM video in a real ComfyUI: a shipped workflow through the server, with the small world's models on the CPU.

    python scripts/demo.py [--prompt "a blue square moving up"] [--seed 4]

The last line is the video's path.
"""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

from environment import ROOT, Environment, SetupError, add_options, cache_folder, lock, prepare, say
from instance import Instance, RunError, make_base, server_command, start

WORKFLOW = ROOT / "workflows" / "DCM small world (CPU).json"
PROMPTS = ROOT / "small_world" / "models" / "dcm_conditioning"
BROWSER_PORT = 8188


def prompt_file(text: str) -> str:
    """The name of a cached prompt among the host's files.

    Raises:
        SetupError: no such prompt.
    """
    known = {path.stem: path.relative_to(PROMPTS).as_posix() for path in sorted(PROMPTS.rglob("*.safetensors"))}
    if text not in known:
        raise SetupError(f"--prompt is {text!r}; the small world knows {', '.join(known)}.")
    return known[text]


def render(instance: Instance, prompt: str, seed: int) -> Path:
    """Run the shipped workflow with this prompt and seed; nothing else of it is changed."""
    graph = instance.prompt_of(WORKFLOW)
    for node in graph.values():
        if node["class_type"] == "DCMLoadConditioning":
            node["inputs"]["name"] = prompt_file(prompt)
        if node["class_type"] == "DCMSampler":
            node["inputs"]["seed"] = seed
    started = time.monotonic()
    videos = instance.saved(instance.run(graph))
    if not videos:
        raise RunError(f"the workflow ran but saved no video; the log ends with:\n{instance.log_tail()}")
    say(f"rendered {prompt!r} in {time.monotonic() - started:.1f} s")
    for plan in re.findall(r"step \d.*, boundary [\d.]+", instance.log()):
        say(f"experts: {plan}")
    return videos[0]


def tell_how_to_look(environment: Environment, base: Path) -> None:
    say("to open the graph in a browser, start ComfyUI with")
    command = server_command(environment, base, BROWSER_PORT)
    print(f"  {subprocess.list2cmdline(command) if sys.platform == 'win32' else shlex.join(command)}")
    print(f"  then open http://127.0.0.1:{BROWSER_PORT} and drag this file into the window: {WORKFLOW}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", default="a yellow triangle moving right", help="what moves (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=4, help="of the starting noise (default: %(default)s)")
    add_options(parser)
    args = parser.parse_args()
    prompt_file(args.prompt)
    environment = prepare()
    base = cache_folder() / "demo"
    with lock(cache_folder() / ".demo-lock"):
        make_base(base)
        say("starting ComfyUI")
        with start(environment, base) as instance:
            try:
                video = render(instance, args.prompt, args.seed)
            except RunError as error:
                raise SetupError(str(error)) from error
    tell_how_to_look(environment, base)
    print(video.resolve())


if __name__ == "__main__":
    main()
