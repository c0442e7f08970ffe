"""A real server in a process of its own, as the demo starts it."""

import os
import sys
from pathlib import Path

import pytest
from environment import Environment
from instance import make_base, make_models, start


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """A running ComfyUI: see `instance.Instance` for its methods."""
    if not (host := os.environ.get("COMFYUI_PATH")):
        pytest.skip("COMFYUI_PATH names no ComfyUI; `python scripts/test.py` brings one")
    base = tmp_path_factory.mktemp("demo")
    environment = Environment(Path(sys.executable), Path(host))
    make_base(base)
    make_models(environment, base)
    with start(environment, base) as instance:
        yield instance
