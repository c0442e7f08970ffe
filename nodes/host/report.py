"""Tell the user what a node did: in the log and on the node."""

import logging
import sys
from typing import Any

from comfy_api.latest import ui

logger = logging.getLogger("ComfyUI-DCM")


def report(text: str, node_id: str | None) -> Any:
    """Log `text`, show it on the node, and return the UI output that keeps it with the result."""
    logger.info(text)
    tell(text, node_id)
    return ui.PreviewText(text)


def tell(text: str, node_id: str | None) -> None:
    """Show `text` on the node while it works."""
    # not imported: without a running server (a script, a test) there is nobody to tell
    server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    if server is not None and node_id is not None:
        server.send_progress_text(text, node_id)
