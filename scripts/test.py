"""Pass the tests: lint, the registry's rules, and the test suite in a real ComfyUI.

    python scripts/test.py [pytest arguments]
"""

import argparse
import subprocess
import sys

from environment import ROOT, Environment, add_options, node_tools, prepare

# What the registry's scan calls a security risk or bad style.
FORBIDDEN = ("S102", "S307", "E702")


def step(title: str, command: list[str], environment: Environment) -> None:
    """Run one check; end with its status if it fails."""
    print(f"== {title}", flush=True)
    status = subprocess.run(command, cwd=ROOT, env=environment.variables(), check=False).returncode
    if status:
        sys.exit(status)


def validate(environment: Environment) -> None:
    """The registry's own check, its warnings taken as errors."""
    print("== comfy node validate", flush=True)
    comfy = node_tools() / "comfy"
    result = subprocess.run(
        [str(comfy), "--skip-prompt", "node", "validate"],
        cwd=ROOT, env=environment.variables(), capture_output=True, text=True, check=False,
    )
    print(result.stdout.strip(), flush=True)
    if result.returncode or any(code in result.stdout for code in FORBIDDEN):
        print(result.stderr, file=sys.stderr)
        sys.exit("error: the registry would not take the pack as it is")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    _, arguments = parser.parse_known_args()
    environment = prepare()
    python = str(environment.python)
    step("ruff", [python, "-m", "ruff", "check", "."], environment)
    validate(environment)
    print("== pytest", flush=True)
    command = [python, "-m", "pytest", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment.variables(), check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
