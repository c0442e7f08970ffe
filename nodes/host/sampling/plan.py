"""Which expert runs which step, for the step bar: before a run from files and widgets, at its start from the run itself."""

import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import comfy.samplers
from torch import Tensor

from ....dcm_core.errors import ScheduleError, check_choice
from ....dcm_core.families import FAMILIES
from ....dcm_core.files.checkpoint import Layout, recognise, release_metadata, without_prefix
from ....dcm_core.files.metadata import read_metadata
from ....dcm_core.files.tensor_file import TensorFile
from ....dcm_core.routing import Plan, Setup, own_boundary, own_timesteps
from ....dcm_core.table import Row, Span, Use, letters_of, parse_strengths, plan_rows
from ..experts.table import ChosenExpert, ChosenRow, with_row
from ..folders import LORAS, MODELS, NONE, SUFFIX, path_of
from ..report import server
from .run import other_cfg
from .schedules import EULER, flow_sampling, sampler_names, schedule_names, sets_shift, sigmas_of

EVENT = "dcm.plan"


def as_message(sigmas: Tensor, plan: Plan, notes: Sequence[str] = ()) -> dict[str, Any]:
    """A plan in the form of the step bar: {"boundary", "steps": [{"sigma", "expert", "letter"}, ...], "notes"}."""
    letters = letters_of(plan.by_step)
    levels = zip(plan.by_step, sigmas[:-1].tolist(), strict=True)
    steps = [{"sigma": sigma, "expert": owner, "letter": letters[owner]} for owner, sigma in levels]
    return {"boundary": plan.boundary, "steps": steps, "notes": list(notes)}


def announce(sigmas: Tensor, plan: Plan, notes: Sequence[str], node_id: str | None) -> None:
    """Send the front end the plan of the run that is starting."""
    if server() is not None and node_id is not None:
        server().send_sync(EVENT, {"node": node_id, **as_message(sigmas, plan, notes)}, server().client_id)


def foresee(asked: Mapping[str, Any]) -> dict[str, Any] | None:
    """The plan of a run before it starts; None if widgets and files are not enough to know it.

    Args:
        asked: the sampler's `schedule`, `steps`, `shift`, `denoise`, `boundary`, `two_models` (bool), `sampler_name`, `cfg` and
            `detail_cfg`. From the nodes before it: the files `model`, `semantic` and `detail`, and `attached_boundary`,
            `semantic_strength`, `detail_strength` and `stacked` (bool). Only safetensors files are read. Instead of the two expert
            files, `rows` of an expert table: `name`, `unit`, `start`, `end`, `lora`, `strength`, `cfg` and `own_model` (bool).
            `two_models` is then true if a row's model has other weights.

    Raises:
        DCMError: settings or files that give no plan.
    """
    chosen = check_choice("schedule", asked["schedule"], schedule_names(), ScheduleError)
    rows = _rows(asked)
    setup = _setup_of_rows(asked, rows) if rows else _setup(asked)
    if setup is None:
        return None
    schedule = setup.schedule(chosen)
    if schedule is None or (setup.family is None and schedule in comfy.samplers.SCHEDULER_NAMES):
        return None  # it depends on the model, which no file identifies
    shift = asked["shift"]
    sampler = check_choice("sampler_name", asked.get("sampler_name", EULER), sampler_names(), ScheduleError)
    sigmas = sigmas_of(schedule, asked["steps"], shift, asked["denoise"], lambda: flow_sampling(shift), sampler)
    if rows:
        if any(row.span.unit == "percent" for row in rows) and not sets_shift(schedule):
            return None  # it depends on the model's own shift
        plan = plan_rows(rows, sigmas, flow_sampling(shift).percent_to_sigma)
        return as_message(sigmas, plan, setup.notes(chosen))
    two_cfgs = other_cfg(asked.get("cfg", 1.0), asked.get("detail_cfg", 0.0)) is not None
    boundary = setup.boundary_for(asked["boundary"])
    if boundary is None and setup.changes(two_cfgs):
        return None
    return as_message(sigmas, setup.plan(sigmas, boundary, two_cfgs), setup.notes(chosen))


def _rows(asked: Mapping[str, Any]) -> list[Row]:
    """The rows of an expert table."""
    chosen: tuple[ChosenRow, ...] = ()
    for row in asked.get("rows", ()):
        experts = () if row["lora"] == NONE else (ChosenExpert(parse_strengths(row["strength"]), row["lora"]),)
        span = Span(row["unit"], row["start"], row["end"])
        chosen = with_row(
            chosen, ChosenRow(row["name"], span, experts, model=row["own_model"] or None, cfg=row["cfg"] or None)
        )
    return [
        Row(row.name, row.span, tuple(Use(expert.lora, expert.strengths) for expert in row.experts), row.changes_more)
        for row in chosen
    ]


def _setup_of_rows(asked: Mapping[str, Any], rows: Sequence[Row]) -> Setup:
    base = _look(MODELS, asked.get("model"))
    experts = [found for row in rows for use in row.uses if (found := _look(LORAS, use.expert))]
    return Setup(
        family=next((found["family"] for found in (*experts, base) if found and found["family"]), None),
        two_models=asked["two_models"],
        takes_image=base and base["takes_image"],
        semantic=any(any(use.strengths) for row in rows for use in row.uses),
        timesteps=own_timesteps(found["timesteps"] for found in experts),
    )


def _setup(asked: Mapping[str, Any]) -> Setup | None:
    """The models and experts in the files; None if that cannot be known."""
    base = _look(MODELS, asked.get("model"))
    detail, semantic = (_look(LORAS, asked.get(side)) for side in ("detail", "semantic"))
    experts = [found for found in (detail, semantic) if found]
    two_models = bool(asked["two_models"])
    if "semantic" in asked and not experts:
        return None  # an error in DCM Attach Experts
    if base and base["layout"] is Layout.RELEASE and not experts:
        detail = base
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
        timesteps=own_timesteps(found["timesteps"] for found in experts),
        boundary=own_boundary((found["boundary"] for found in experts), asked.get("attached_boundary")),
    )


def _look(category: str, name: str | None) -> Mapping[str, Any] | None:
    """What the header of a safetensors file says; None for other files."""
    if not name or not name.endswith(SUFFIX):
        return None
    path = path_of(category, name)
    return _header(path, path.stat().st_mtime_ns)


@functools.lru_cache(maxsize=64)
def _header(path: Path, changed: int) -> Mapping[str, Any]:
    file = TensorFile(path)
    contents = recognise(file)
    released = contents.layout is Layout.RELEASE
    facts = release_metadata(file, contents.family) if released else read_metadata(file.metadata)
    shapes = (
        contents.native_shapes(file)
        if contents.matched
        else {without_prefix(key): shape for key, shape in file.shapes.items()}
    )
    taken, given = (shapes.get(f"{layer}.weight", ()) for layer in ("patch_embedding", "head.head"))
    return {
        "layout": contents.layout,
        "family": contents.family or FAMILIES.get(facts.family or ""),
        # more input than output channels
        "takes_image": bool(taken and given) and math.prod(taken[1:]) > given[0],
        "boundary": facts.boundary,
        "timesteps": facts.timesteps,
    }
