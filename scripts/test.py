"""Pass the tests: lint, the registry's rules, and the test suite in a real ComfyUI.

    python scripts/test.py [pytest arguments]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

from environment import ROOT, Environment, add_options, front_end, manager_tools, node_tools, prepare

# What the registry's scan reports as warnings today and will refuse later.
FORBIDDEN = ("S102", "S307", "E702")


def run(title: str, command: list[str], environment: Environment) -> int:
    """Run one check in the checkout; returns its status."""
    print(f"== {title}", flush=True)
    return subprocess.run(command, cwd=ROOT, env=environment.variables(), check=False).returncode


def validate(environment: Environment) -> int:
    """The registry's own check, its security warnings taken as errors."""
    print("== comfy node validate", flush=True)
    command = [str(node_tools() / "comfy"), "--skip-prompt", "node", "validate"]
    result = subprocess.run(command, cwd=ROOT, env=environment.variables(), capture_output=True, text=True, check=False)
    said = result.stdout + result.stderr
    print(said.strip(), flush=True)
    return result.returncode or int(any(code in said for code in FORBIDDEN))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    _, arguments = parser.parse_known_args()
    environment = prepare()
    environment.require("pytest", "hypothesis", "ruff")
    manager_tools()  # a test asks for it; made here, its progress is seen
    os.environ.setdefault("COMFYUI_FRONT_END", str(front_end()))
    python = str(environment.python)
    return (
        run("ruff", [python, "-m", "ruff", "check", "."], environment)
        or validate(environment)
        or run("pytest", [python, "-m", "pytest", *arguments], environment)
    )


if __name__ == "__main__":
    sys.exit(main())
