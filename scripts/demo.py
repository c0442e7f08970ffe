"""Render a DCM video in a real ComfyUI: a shipped workflow through the server, with small random models on the CPU.

    python scripts/demo.py [--width 256 --height 192 --frames 17]

The last line is the video's path.
"""

from __future__ import annotations

import argparse
import re
import shlex
import time
from pathlib import Path

from environment import ROOT, Environment, SetupError, add_options, cache_folder, lock, prepare, say
from instance import Instance, RunError, make_base, server_command, start

WORKFLOW = ROOT / "workflows" / "DCM Wan 2.1 text to video (cached prompt).json"
LATENT_NODE = "EmptyHunyuanLatentVideo"
BROWSER_PORT = 8188


def render(instance: Instance, width: int, height: int, frames: int) -> Path:
    """Run the shipped workflow with a video size for the CPU; nothing else of it is changed."""
    prompt = instance.prompt_of(WORKFLOW)
    for node in prompt.values():
        if node["class_type"] == LATENT_NODE:
            node["inputs"] |= {"width": width, "height": height, "length": frames}
    started = time.monotonic()
    videos = instance.saved(instance.run(prompt))
    if not videos:
        raise RunError(f"the workflow ran but saved no video; the log ends with:\n{instance.log_tail()}")
    say(f"rendered {frames} frames of {width}x{height} in {time.monotonic() - started:.1f} s")
    for plan in re.findall(r"step \d.*, boundary [\d.]+", instance.log()):
        say(f"experts: {plan}")
    return videos[0]


def tell_how_to_look(environment: Environment, base: Path) -> None:
    say("to open the graph in a browser, start ComfyUI with")
    print(f"  {shlex.join(server_command(environment, base, BROWSER_PORT))}")
    print(f"  then open http://127.0.0.1:{BROWSER_PORT} and drag this file into the window: {WORKFLOW}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=256, help="pixels, a multiple of 16 (default: %(default)s)")
    parser.add_argument("--height", type=int, default=192, help="pixels, a multiple of 16 (default: %(default)s)")
    parser.add_argument("--frames", type=int, default=17, help="1 more than a multiple of 4 (default: %(default)s)")
    add_options(parser)
    args = parser.parse_args()
    environment = prepare()
    base = cache_folder() / "demo"
    with lock(cache_folder() / ".demo-lock"):
        say("making small models of the real architecture")
        make_base(environment, base)
        say("starting ComfyUI")
        with start(environment, base) as instance:
            try:
                video = render(instance, args.width, args.height, args.frames)
            except RunError as error:
                raise SetupError(str(error)) from error
    tell_how_to_look(environment, base)
    print(video.resolve())


if __name__ == "__main__":
    main()
