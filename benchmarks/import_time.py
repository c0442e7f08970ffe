"""What the pack adds to the host's start: seconds and modules, with no node run.

    COMFYUI_PATH=<ComfyUI> python benchmarks/import_time.py [--repeats 5]

Each repeat is a process of its own that imports the host's nodes, then the pack and the schema of each of its nodes, as the host
does when it starts. `--once` prints one such process's findings as JSON; the test of the imports reads them.
"""

import argparse
import asyncio
import importlib.util
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[1]
PACK = "dcm_pack"


def import_host() -> None:
    """What the host has loaded before it turns to custom nodes."""
    sys.path.insert(0, os.environ["COMFYUI_PATH"])
    sys.argv = ["main.py", "--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfyui_version  # noqa: F401

    import nodes  # noqa: F401


def import_pack() -> int:
    """Load the pack as the host does; returns the number of its nodes."""
    spec = importlib.util.spec_from_file_location(PACK, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    sys.modules[PACK] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    async def schemas() -> list[Any]:
        extension = await module.comfy_entrypoint()
        return [node.GET_SCHEMA() for node in await extension.get_node_list()]

    return len(asyncio.run(schemas()))


def once() -> dict[str, Any]:
    """The findings of this process."""
    started = time.perf_counter()
    import_host()
    ready, before = time.perf_counter(), set(sys.modules)
    nodes = import_pack()
    done, added = time.perf_counter(), set(sys.modules) - before
    own = {name for name in added if name.partition(".")[0] == PACK}
    return {
        "host": ready - started,
        "pack": done - ready,
        "nodes": nodes,
        "own": len(own),
        "others": sorted(added - own),
    }


def main() -> None:
    """Measure and print; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--once", action="store_true", help="measure in this process and print JSON")
    options = parser.parse_args()
    if not os.environ.get("COMFYUI_PATH"):
        sys.exit("COMFYUI_PATH names no ComfyUI. Set it to a ComfyUI folder.")
    if options.once:
        print(json.dumps(once()))
        return
    command = [sys.executable, __file__, "--once"]
    found = [
        json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
        for _ in range(options.repeats)
    ]
    for name in ("host", "pack"):
        seconds = [one[name] for one in found]
        print(f"{name}: {median(seconds):.3f} s [{min(seconds):.3f}, {max(seconds):.3f}]")
    last = found[-1]
    print(f"{last['nodes']} nodes, {last['own']} modules of the pack, {len(last['others'])} of others {last['others']}")
    print(
        f"{platform.machine()}; Python {platform.python_version()}; median [least, most] of {options.repeats} processes"
    )


if __name__ == "__main__":
    main()
