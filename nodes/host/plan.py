"""Which step runs with which expert, for the step bar of the front end: before a run as far as files and widgets tell, at its
start as it is."""

import functools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ...dcm_core.checkpoint import Layout, recognise, without_prefix
from ...dcm_core.families import FAMILIES
from ...dcm_core.routing import plan_steps
from ...dcm_core.storage import TensorFile
from .attach import own_boundary
from .folders import LORAS, MODELS, SUFFIX, path_of
from .report import server
from .sampling import AUTO, has_sides, sigmas_by_name, usual_boundary

EVENT = "dcm.plan"


def as_message(sigmas: Tensor, boundary: float | None) -> dict[str, Any]:
    """A plan as the step bar takes it: {"boundary", "steps": [{"sigma", "expert"}, ...]}; None where nothing switches."""
    plan = plan_steps(sigmas, boundary) if boundary else None
    steps = [{"sigma": sigma, "expert": plan and plan.side(step)} for step, sigma in enumerate(sigmas[:-1].tolist())]
    return {"boundary": boundary, "steps": steps}


def announce(model: Any, sigmas: Tensor, boundary: float | None, node_id: str | None) -> None:
    """Tell the front end the plan of the run that begins with a prepared MODEL."""
    if server() is not None and node_id is not None:
        message = as_message(sigmas, boundary if has_sides(model) else None)
        server().send_sync(EVENT, {"node": node_id, **message}, server().client_id)


def foresee(asked: Mapping[str, Any]) -> dict[str, Any] | None:
    """The plan of a run that is not begun; None where widgets and files do not tell it.

    Args:
        asked: the sampler's `schedule`, `steps`, `shift`, `denoise`, `boundary`, `two_models` (bool), and of the nodes before
            it the files `model`, `semantic`, `detail` and `attached_boundary`. Files of other kinds tell nothing.

    Raises:
        DCMError: settings or files that give no plan.
    """
    base = _look(MODELS, asked.get("model"))
    experts = [found for side in ("detail", "semantic") if (found := _look(LORAS, asked.get(side)))]
    two_models = bool(asked["two_models"])
    if base and base["layout"] is Layout.RELEASE and not experts:
        preset = base["family"].preset
        experts = [{**base, "boundary": preset.boundary, "timesteps": preset.timesteps}]
    if not (experts or two_models):
        return None
    family = next((found["family"] for found in (*experts, base) if found and found["family"]), None)
    timesteps = next((found["timesteps"] for found in experts if found["timesteps"]), None)
    if family is None and base is None and asked["schedule"] == AUTO and not (timesteps or two_models):
        return None  # auto is then the model's own, and which that is no file says
    usual = usual_boundary(family, two_models, base and base["takes_image"])
    boundary = asked["boundary"] or asked.get("attached_boundary") or own_boundary(found["boundary"] for found in experts) or usual
    sigmas = sigmas_by_name(asked["schedule"], asked["steps"], asked["shift"], asked["denoise"], timesteps, family, two_models)
    return as_message(sigmas, boundary) if boundary else None


def _look(category: str, name: str | None) -> Mapping[str, Any] | None:
    """What the header of a file says; None without a file that has one."""
    if not name or not name.endswith(SUFFIX):
        return None
    path = path_of(category, name)
    return _header(path, path.stat().st_mtime_ns)


@functools.lru_cache(maxsize=64)
def _header(path: Path, changed: int) -> Mapping[str, Any]:
    file = TensorFile(path)
    contents = recognise(file)
    shapes = contents.native_shapes(file) if contents.matched else {without_prefix(key): shape for key, shape in file.shapes.items()}
    taken, given = (shapes.get(f"{layer}.weight", ()) for layer in ("patch_embedding", "head.head"))
    return {
        "layout": contents.layout,
        "family": contents.family or FAMILIES.get(file.metadata.get("dcm.family", "")),
        # more channels than it gives
        "takes_image": bool(taken and given) and math.prod(taken[1:]) > given[0],
        "boundary": float(file.metadata.get("dcm.boundary", 0)),
        "timesteps": json.loads(file.metadata.get("dcm.timesteps", "null")),
    }
