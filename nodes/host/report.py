"""Tell the user what a node did: in the log and on the node."""

import logging
import re
import sys
from typing import Any

from comfy_api.latest import ui

from ...dcm_core.text import LOGGER, plain

logger = logging.getLogger(LOGGER)

# Front ends take a node's text for HTML (1.32 on the canvas), for HTML of few tags (1.47), for text in which they look for links
# (1.58), and in Nodes 2.0 all of them for Markdown. So nothing that is active in any of these is sent, but what looks the same:
# escaping for one of them would be read as written by another.
LOOK_ALIKES = str.maketrans({"<": "‹", "&": "＆", "*": "∗", "`": "ˋ", "~": "∼", "@": "＠"})
LOOK_ALIKE_PARTS = (
    (re.compile(r":(?=//)"), "꞉"),  # addresses become links
    (re.compile(r"(?i)(?<=\bwww)\."), "․"),
    (re.compile(r"(?<=\])(?=[(:\[])|(?<=\[)(?=\[)"), " "),  # [text](address), [text]: address, [[text|address]]
    (re.compile(r"_(?![^\W_])|(?<![^\W_])_"), "ˍ"),  # but within a word
    (re.compile(r"\\(?=[!-/:-@\[-`{-~])"), "⧵"),  # escapes a sign in Markdown
)


def report(text: str, node_id: str | None) -> Any:
    """Log `text`, show it on the node, and return the UI output that keeps it with the result."""
    logger.info(text)
    return show(text, node_id)


def show(text: str, node_id: str | None) -> Any:
    """The same without a line in the log."""
    tell(text, node_id)
    return ui.PreviewText(for_pages(text))


def server() -> Any:
    """The running server; None in a script or a test."""
    # not imported: that would be the first step of starting one
    return getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)


def report_picture(text: str, image: Any, node_id: str | None) -> dict[str, Any]:
    """The same with a picture below the text; image: (1, height, width, 3)."""
    return {**report(text, node_id).as_dict(), **ui.PreviewImage(image).as_dict()}


def tell(text: str, node_id: str | None) -> None:
    """Show `text` on the node while it works."""
    if server() is not None and node_id is not None:
        server().send_progress_text(for_pages(text), node_id)


def for_pages(text: str) -> str:
    """The text as any front end shows it: as text, whatever files and names in it say."""
    text = plain(text).translate(LOOK_ALIKES)
    for part, look_alike in LOOK_ALIKE_PARTS:
        text = part.sub(look_alike, text)
    return text
