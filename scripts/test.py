"""Pass the tests: lint, the registry's rules, and the test suite in a real ComfyUI; what runs in the host also in a newer one.

python scripts/test.py [--newer] [pytest arguments]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

from environment import NEWER, ROOT, Environment, add_options, front_end, manager_tools, node_tools, prepare

# What the registry's scan reports as warnings today and will refuse later.
FORBIDDEN = ("S102", "S307", "E702")

HOST_TESTS = ["tests/host"]
# each starts servers and a browser of its own
MOST_WORKERS = 8


def run(title: str, command: list[str], environment: Environment, **variables: str) -> int:
    """Run one check in the checkout; returns its status."""
    print(f"== {title}", flush=True)
    return subprocess.run(command, cwd=ROOT, env=environment.variables() | variables, check=False).returncode


def validate(environment: Environment) -> int:
    """The registry's own check, its security warnings taken as errors."""
    print("== comfy node validate", flush=True)
    command = [str(node_tools() / "comfy"), "--skip-prompt", "node", "validate"]
    result = subprocess.run(command, cwd=ROOT, env=environment.variables(), capture_output=True, text=True, check=False)
    said = result.stdout + result.stderr
    print(said.strip(), flush=True)
    return result.returncode or int(any(code in said for code in FORBIDDEN))


def prepare_oldest() -> Environment:
    """The oldest ComfyUI with all that its tests need."""
    environment = prepare()
    environment.require("pytest", "xdist", "hypothesis", "ruff")
    manager_tools()  # a test asks for it; made here, its progress is seen
    return environment


def lint(environment: Environment) -> int:
    """The checks that run no code of the pack."""
    ruff = [str(environment.python), "-m", "ruff"]
    return (
        run("ruff check", [*ruff, "check", "."], environment)
        or run("ruff format", [*ruff, "format", "--check", "."], environment)
        or validate(environment)
    )


def run_tests(environment: Environment, arguments: list[str], **variables: str) -> int:
    """The tests that the arguments name; a folder's or all on every core."""
    command = [str(environment.python), "-m", "pytest", *arguments]
    if not arguments or arguments == HOST_TESTS:
        # tests of one file share what they load; a worker has one core, so more threads would only wait for each other
        command += ["-n", str(min(os.cpu_count() or 1, MOST_WORKERS)), "--dist", "loadfile"]
        variables["OMP_NUM_THREADS"] = "1"
    return run(f"pytest in {environment.comfyui.name}", command, environment, **variables)


def run_in_oldest(environment: Environment, arguments: list[str]) -> int:
    """The test suite, in the oldest ComfyUI; the browser sees a newer front end, too."""
    return run_tests(environment, arguments, COMFYUI_FRONT_END=os.environ.get("COMFYUI_FRONT_END") or str(front_end()))


def run_all(arguments: list[str]) -> int:
    """Every check, in the oldest ComfyUI."""
    environment = prepare_oldest()
    return lint(environment) or run_in_oldest(environment, arguments)


def run_in_newer(arguments: list[str]) -> int:
    """The tests of the pack in its host, in a newer ComfyUI."""
    return run_tests(prepare(NEWER), arguments or HOST_TESTS)


def run_in_both() -> int:
    """Every check in the oldest ComfyUI, then the tests of the pack in its host in the newer one."""
    environment, newer = prepare_oldest(), prepare(NEWER)
    return lint(environment) or run_in_oldest(environment, []) or run_tests(newer, HOST_TESTS)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--newer", action="store_true", help=f"only in ComfyUI {NEWER.version}; tests/host, or what the arguments name"
    )
    add_options(parser)
    options, arguments = parser.parse_known_args()
    if options.newer:
        return run_in_newer(arguments)
    # named tests are run once, and a ComfyUI of the user's own is the only one
    return run_all(arguments) if arguments or "COMFYUI_PATH" in os.environ else run_in_both()


if __name__ == "__main__":
    sys.exit(main())
