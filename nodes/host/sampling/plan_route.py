"""The step bar's request, POST /dcm/plan: parsed and type-checked here, answered by `plan.foresee`."""

import asyncio
import json
import logging
from typing import Any

from ....dcm_core.errors import DCMError, name_some
from ....dcm_core.text import LOGGER, given
from ..report import server
from .plan import foresee

ROUTE = "/dcm/plan"
logger = logging.getLogger(LOGGER)

# Required and optional values of a request: name -> type. `foresee` checks what they mean.
REQUIRED: dict[str, type] = {
    "schedule": str,
    "steps": int,
    "shift": float,
    "denoise": float,
    "boundary": float,
    "two_models": bool,
}
OPTIONAL: dict[str, type] = {
    "cfg": float,
    "detail_cfg": float,
    "sampler_name": str,
    "model": str,
    "semantic": str,
    "detail": str,
    "semantic_strength": float,
    "detail_strength": float,
    "stacked": bool,
    "attached_boundary": float,
    "rows": list,
}
# A row of an expert table: the widgets of DCM Expert, and whether it has a model of its own.
ROW: dict[str, type] = {
    "name": str,
    "unit": str,
    "start": float,
    "end": float,
    "lora": str,
    "strength": str,
    "cfg": float,
    "own_model": bool,
}
MOST_ROWS = 32
FIELDS = {**REQUIRED, **OPTIONAL}
KINDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false", list: "a list"}
# No widget allows larger numbers; millions of steps would fill the memory.
LARGEST = 10_000
MAX_BODY = 32 * 1024


def parse(body: bytes) -> dict[str, Any]:
    """The values of a request; optional ones may also be null.

    Raises:
        DCMError: unknown, missing or mistyped values.
    """
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise DCMError(f"The body is not JSON ({error}).") from error
    if not isinstance(asked, dict):
        raise DCMError(f"The body is {given(asked)}; expected an object with {', '.join(REQUIRED)}.")
    if unknown := asked.keys() - FIELDS.keys():
        raise DCMError(f"Unknown names: {name_some(unknown)}. Expected: {', '.join(FIELDS)}.")
    left_out = {name for name in OPTIONAL if asked.get(name) is None}
    found = {name: _typed(name, asked.get(name), kind) for name, kind in FIELDS.items() if name not in left_out}
    if "rows" in found:
        found["rows"] = [_row(row) for row in found["rows"]]
        if not 0 < len(found["rows"]) <= MOST_ROWS:
            raise DCMError(f"There are {len(found['rows'])} rows; expected 1 to {MOST_ROWS}.")
    return found


def _row(row: Any) -> dict[str, Any]:
    if not isinstance(row, dict) or row.keys() != ROW.keys():
        raise DCMError(f"A row is {given(row)}; expected an object with {', '.join(ROW)}.")
    return {name: _typed(name, row[name], kind) for name, kind in ROW.items()}


def _typed(name: str, value: Any, kind: type) -> Any:
    # true is an int in Python, and JSON may write a float as 1
    typed = type(value) is kind or (kind is float and type(value) is int)
    limited = kind in (int, float)
    # `not <=` also refuses NaN
    if not typed or (limited and not abs(value) <= LARGEST):
        raise DCMError(f"{name} is {given(value)}; expected {KINDS[kind]}{f' up to {LARGEST}' if limited else ''}.")
    return value


def add_route() -> None:
    """Register the route."""
    # a second copy of the pack would register the route twice, which stops the host's start
    if server() is None or any(getattr(route, "path", None) == ROUTE for route in server().routes):
        return
    from aiohttp import web

    @server().routes.post(ROUTE)
    async def plan(request: web.Request) -> web.Response:
        body = bytearray()
        async for chunk in request.content.iter_chunked(MAX_BODY):
            body += chunk
            if len(body) > MAX_BODY:
                return web.json_response({"error": f"The body is larger than {MAX_BODY} bytes."}, status=413)
        try:
            asked = parse(bytes(body))
        except DCMError as error:
            return web.json_response({"error": str(error)}, status=400)
        try:
            # files may be on a slow disk, and the server has one thread for all requests
            return web.json_response(await asyncio.to_thread(foresee, asked))
        except Exception as error:
            # without a plan the bar shows nothing; the run itself reports the error
            logger.debug("no plan: %s", error)
            return web.json_response(None)
