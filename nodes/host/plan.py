"""Who runs which step, for the step bar of the front end: before a run as far as files and widgets tell, at its start as it is."""

import asyncio
import functools
import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import comfy.samplers
from torch import Tensor

from ...dcm_core.checkpoint import Layout, recognise, without_prefix
from ...dcm_core.errors import CheckpointError, DCMError, ScheduleError, check_choice, name_some
from ...dcm_core.families import FAMILIES
from ...dcm_core.metadata import read_facts
from ...dcm_core.routing import Plan, Setup
from ...dcm_core.schedule import AUTO
from ...dcm_core.storage import TensorFile
from ...dcm_core.text import LOGGER, given
from .attach import own_boundary
from .folders import LORAS, MODELS, SUFFIX, path_of
from .report import server
from .sampling import other_cfg
from .schedules import EULER, flow_sampling, schedule_names, sigmas_of

ROUTE, EVENT = "/dcm/plan", "dcm.plan"
logger = logging.getLogger(LOGGER)

# What a client may ask: name -> (its type, whether it may be left out). What the values mean, `foresee` judges.
FIELDS: dict[str, tuple[type, bool]] = {
    "schedule": (str, False),
    "steps": (int, False),
    "shift": (float, False),
    "denoise": (float, False),
    "boundary": (float, False),
    "two_models": (bool, False),
    "model": (str, True),
    "semantic": (str, True),
    "detail": (str, True),
    "attached_boundary": (float, True),
    "sampler_name": (str, True),
    "cfg": (float, True),
    "detail_cfg": (float, True),
    "semantic_strength": (float, True),
    "detail_strength": (float, True),
    "stacked": (bool, True),
}
KINDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
# Widgets have no larger numbers; steps by the million would fill the memory.
LARGEST = 10_000
MAX_BODY = 32 * 1024
# A file whose header is larger is not looked at for a plan: those of the largest models have less than 1 MB.
MAX_HEADER = 16 * 1024**2


def as_message(sigmas: Tensor, plan: Plan, notes: Sequence[str] = ()) -> dict[str, Any]:
    """A plan as the step bar takes it: {"boundary", "steps": [{"sigma", "expert"}, ...], "notes"}; expert is a `routing.Owner`."""
    steps = [{"sigma": sigma, "expert": plan.side(step)} for step, sigma in enumerate(sigmas[:-1].tolist())]
    return {"boundary": plan.boundary, "steps": steps, "notes": list(notes)}


def announce(sigmas: Tensor, plan: Plan, notes: Sequence[str], node_id: str | None) -> None:
    """Tell the front end the plan of the run that begins."""
    if server() is not None and node_id is not None:
        server().send_sync(EVENT, {"node": node_id, **as_message(sigmas, plan, notes)}, server().client_id)


def foresee(asked: Mapping[str, Any]) -> dict[str, Any] | None:
    """The plan of a run that is not begun; None where widgets and files do not tell it.

    Args:
        asked: the sampler's `schedule`, `steps`, `shift`, `denoise`, `boundary`, `two_models` (bool), `sampler_name`, `cfg`,
            `detail_cfg`, and of the nodes before it the files `model`, `semantic`, `detail` and `attached_boundary`,
            `semantic_strength`, `detail_strength`, `stacked` (bool). Files of other kinds tell nothing.

    Raises:
        DCMError: settings or files that give no plan.
    """
    chosen = asked["schedule"]
    check_choice("schedule", chosen, schedule_names(), ScheduleError)
    setup = _setup(asked)
    if setup is None:
        return None
    known = setup.family is not None
    if chosen == AUTO and not (known or setup.timesteps or setup.two_models):
        return None  # auto is then the model's own, and which that is no file says
    schedule = setup.schedule(chosen)
    if not known and isinstance(schedule, str) and schedule in comfy.samplers.SCHEDULER_NAMES:
        return None
    two_cfgs = other_cfg(asked.get("cfg", 1.0), asked.get("detail_cfg", 0.0)) is not None
    boundary = setup.boundary_for(asked["boundary"])
    if boundary is None and setup.changes(two_cfgs):
        return None
    shift = asked["shift"]
    sampler = asked.get("sampler_name") or EULER
    sigmas = sigmas_of(setup, chosen, asked["steps"], shift, asked["denoise"], flow_sampling(shift), sampler)
    return as_message(sigmas, setup.plan(sigmas, boundary, two_cfgs), setup.notes(chosen))


def _setup(asked: Mapping[str, Any]) -> Setup | None:
    """The models and experts that the files are; None where these do not tell it."""
    base = _look(MODELS, asked.get("model"))
    detail, semantic = (_look(LORAS, asked.get(side)) for side in ("detail", "semantic"))
    experts = [found for found in (detail, semantic) if found]
    two_models = bool(asked["two_models"])
    if "semantic" in asked and not experts:
        return None  # DCM Attach Experts refuses that
    if base and base["layout"] is Layout.RELEASE and not experts:
        preset = base["family"].preset
        detail = {**base, "boundary": preset.boundary, "timesteps": preset.timesteps}
        experts = [detail]
    family = next((found["family"] for found in (*experts, base) if found and found["family"]), None)
    if not (experts or two_models or family):
        return None
    return Setup(
        family=family,
        two_models=two_models,
        two_sides=two_models,
        takes_image=base and base["takes_image"],
        semantic=semantic and asked.get("semantic_strength", 1.0) != 0,
        detail=detail and asked.get("detail_strength", 1.0) != 0,
        stacked=asked.get("stacked", True),
        timesteps=next((found["timesteps"] for found in experts if found["timesteps"]), None),
        boundary=asked.get("attached_boundary") or own_boundary(found["boundary"] for found in experts),
    )


def _look(category: str, name: str | None) -> Mapping[str, Any] | None:
    """What the header of a file says; None without a file that has one."""
    if not name or not name.endswith(SUFFIX):
        return None
    path = path_of(category, name)
    return _header(path, path.stat().st_mtime_ns)


@functools.lru_cache(maxsize=64)
def _header(path: Path, changed: int) -> Mapping[str, Any]:
    with path.open("rb") as opened:
        if int.from_bytes(opened.read(8), "little") > MAX_HEADER:
            raise CheckpointError(f"{path} has a header too large to look at for a plan.")
    file = TensorFile(path)
    contents, facts = recognise(file), read_facts(file.metadata)
    shapes = contents.native_shapes(file) if contents.matched else {without_prefix(key): shape for key, shape in file.shapes.items()}
    taken, given = (shapes.get(f"{layer}.weight", ()) for layer in ("patch_embedding", "head.head"))
    return {
        "layout": contents.layout,
        "family": contents.family or FAMILIES.get(facts.family or ""),
        # more channels than it gives
        "takes_image": bool(taken and given) and math.prod(taken[1:]) > given[0],
        "boundary": facts.boundary,
        "timesteps": facts.timesteps,
    }


def parse(body: bytes) -> dict[str, Any]:
    """What a client asks, typed and complete; names that may be left out may also be null.

    Raises:
        DCMError: anything else.
    """
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise DCMError(f"The body is no JSON ({error}).") from error
    if not isinstance(asked, dict):
        raise DCMError(f"The body is {given(asked)}; expected an object with {', '.join(FIELDS)}.")
    if unknown := asked.keys() - FIELDS.keys():
        raise DCMError(f"Unknown names: {name_some(unknown)}; expected {', '.join(FIELDS)}.")
    return {
        name: _typed(name, asked.get(name), kind)
        for name, (kind, optional) in FIELDS.items()
        if not (optional and asked.get(name) is None)
    }


def _typed(name: str, value: Any, kind: type) -> Any:
    # true is an int in Python, and 1 is a number whatever its form
    typed = type(value) is kind or (kind is float and type(value) is int)
    small = kind in (str, bool) or (typed and abs(value) <= LARGEST)  # NaN is not
    if not (typed and small):
        raise DCMError(f"{name} is {given(value)}; expected {KINDS[kind]}{'' if kind in (str, bool) else f' up to {LARGEST}'}.")
    return value


def add_route() -> None:
    """Let the front end ask for plans."""
    # a second copy of the pack in another folder would end the host's start with a route that is there already
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
            # files may lie on a slow disk, and the server answers everyone from one thread
            return web.json_response(await asyncio.to_thread(foresee, asked))
        except Exception as error:
            # what cannot be foreseen, whatever the files hold, is shown as nothing; the run itself names the fault
            logger.debug("no plan: %s", error)
            return web.json_response(None)
