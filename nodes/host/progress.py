"""Progress of long work, which the user can interrupt as in the host's own nodes."""

from typing import Any

import comfy.model_management
import comfy.utils

from ...dcm_core.files.tensor_file import Progress

STEPS = 1000


def byte_progress(node_id: str | None) -> Progress:
    """A bar for work counted in bytes (or anything): call it with (done, total); it raises when the user interrupts."""
    bar: Any = comfy.utils.ProgressBar(STEPS, node_id=node_id)

    def update(done: int, total: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar.update_absolute(round(STEPS * done / max(1, total)), STEPS)

    return update
