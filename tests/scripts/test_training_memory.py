"""The benchmark that says what training takes at the real sizes."""

import subprocess

import pytest
from environment import ROOT

from dcm_core.distill.memory import GIB


def test_the_memory_of_a_semantic_run_of_wan(environment):
    """Base and expert by arithmetic; a step has room for the 30 blocks' inputs, and for little else."""
    command = [environment.python, ROOT / "benchmarks" / "training_memory.py", "--first", "1"]
    result = subprocess.run(command, env=environment.variables(), capture_output=True, text=True, check=True)
    _, _, frames, _, _, _, base, expert, step, _, _ = (
        cell.strip() for cell in result.stdout.splitlines()[-1].split("|")
    )
    width, ffn, rank, layers = 1536, 8960, 128, 30
    pairs = layers * rank * (8 * (width + width) + 2 * (width + ffn))
    assert float(base) == pytest.approx(1.42e9 * 2 / GIB, abs=0.1)
    # weight, average and two moments, float32
    assert float(expert) == pytest.approx(4 * 4 * pairs / GIB, abs=0.1)
    inputs = layers * 21 * 30 * 52 * width * 2 / GIB
    assert frames == "81" and inputs < float(step) - 4 * pairs / GIB < 3 * inputs
