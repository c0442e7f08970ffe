"""Tell the user what a node did: in the log and on the node."""

import logging
import sys
from typing import Any

from comfy_api.latest import ui

from ...dcm_core.text import LOGGER, plain

logger = logging.getLogger(LOGGER)


def report(text: str, node_id: str | None) -> Any:
    """Log `text`, show it on the node, and return the UI output that keeps it with the result."""
    logger.info(text)
    return show(text, node_id)


def show(text: str, node_id: str | None) -> Any:
    """The same, without logging it."""
    tell(text, node_id)
    return ui.PreviewText(plain(text))


def server() -> Any:
    """The running server; None in a script or a test."""
    # not imported, as importing it starts to build a server
    return getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)


def report_picture(text: str, image: Any, node_id: str | None) -> dict[str, Any]:
    """The same, with a picture under the text; image: (1, height, width, 3)."""
    return {**report(text, node_id).as_dict(), **ui.PreviewImage(image).as_dict()}


def tell(text: str, node_id: str | None) -> None:
    """Show `text` on the node while it runs. web/result_text.js shows it as plain text; the host's own way would read it as markup."""
    if server() is not None and node_id is not None:
        server().send_sync("dcm.text", {"node": node_id, "text": plain(text)}, server().client_id)
