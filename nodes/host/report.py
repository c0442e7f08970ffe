"""Tell the user what a node did: in the log and on the node."""

import logging
from typing import Any

from comfy_api.latest import ui

logger = logging.getLogger("ComfyUI-DCM")


def report(text: str, node_id: str | None) -> Any:
    """Log `text`, show it on the node, and return the UI output that keeps it with the result."""
    logger.info(text)
    from server import PromptServer  # only there once the host's server module is importable

    server = getattr(PromptServer, "instance", None)
    if server is not None and node_id is not None:
        server.send_progress_text(text, node_id)
    return ui.PreviewText(text)
