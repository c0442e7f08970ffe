"""What the pack adds to the host's start, found by the benchmark in a process of its own."""

import json
import subprocess
import sys

from environment import ROOT


def test_the_pack_imports_nothing_that_the_host_has_not(environment):
    """Before a node runs: no library for video, training or drawing that the host does without."""
    command = [environment.python, ROOT / "benchmarks" / "import_time.py", "--once"]
    result = subprocess.run(command, env=environment.variables(), capture_output=True, text=True, check=True)
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["nodes"] >= 17 and found["own"] > 50
    assert found["pack"] < 0.2 * found["host"]
    assert [name for name in found["others"] if name.partition(".")[0] not in sys.stdlib_module_names] == []
