"""What differs between ComfyUI versions, in one place."""

import dataclasses
import inspect
from typing import Any

from comfy_api.latest import io

SCHEMA_FIELDS = frozenset(field.name for field in dataclasses.fields(io.Schema))


def newer(**keywords: Any) -> dict[str, Any]:
    """The `io.Schema` keywords that this host knows; older ones refuse the rest."""
    return {name: value for name, value in keywords.items() if name in SCHEMA_FIELDS}


def advanced(input_type: Any) -> dict[str, bool]:
    """`advanced=True` for inputs of this type, where this host knows it."""
    return {"advanced": True} if "advanced" in inspect.signature(input_type.__init__).parameters else {}
