"""The host as a server process, as the tests start it: see `instance.Instance`."""

import contextlib
import os
import sys
from pathlib import Path

from environment import ROOT, Environment
from instance import direct, make_base, make_models, messages, start

__all__ = ["DEVICE", "FOLDER", "HOST", "ROOT", "direct", "failure", "here", "make_models", "messages", "start_server"]

HOST = os.environ.get("COMFYUI_PATH")
# what tells the host where to run: on the CPU, or on the device that it takes by itself
DEVICE = [] if os.environ.get("COMFYUI_DCM_TEST_GPU") else ["--cpu"]
FOLDER = "some-folder.name"  # no Python name
RUN_SECONDS = 120


def here():
    """The Python that runs the tests, and the ComfyUI they run in."""
    return Environment(Path(sys.executable), Path(HOST))


@contextlib.contextmanager
def start_server(base, *arguments, folder=FOLDER):
    """A server with the pack in it that runs as long as the context; `base` may hold models and inputs already."""
    make_base(base, folder)
    with start(here(), base, [*DEVICE, "--disable-api-nodes", *arguments]) as running:
        yield running


def failure(entry):
    """What the host said about a run that failed."""
    assert entry["status"]["status_str"] == "error"
    return messages(entry)["execution_error"]
