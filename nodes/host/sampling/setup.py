"""The setup of a run: one MODEL or two, their experts, and which runs which step."""

import dataclasses
import uuid
from typing import Any

from torch import Tensor

from ....dcm_core.errors import DCMError, counted
from ....dcm_core.families import FAMILIES
from ....dcm_core.routing import BASE, Plan, Setup
from ....dcm_core.table import plan_rows
from ....dcm_core.video_size import HUNYUAN_VIDEO, WAN, WAN_5B
from ..experts.attach import attached_experts, image_channels, is_own, model_family
from .switch import KEY as SIDES_KEY
from .switch import Sides

# What a MODEL has in addition to its weights.
EXTRAS = (
    "patches_uuid",
    "object_patches",
    "model_options",
    "attachments",
    "wrappers",
    "callbacks",
    "injections",
    "hook_patches",
)


def setup_of(model: Any, detail_model: Any = None) -> Setup:
    """The setup of a run of a prepared MODEL, or of a MODEL and the detail_model it will be prepared with."""
    sides, facts = model.get_attachment(SIDES_KEY), attached_experts(model)
    if is_table(model):
        active = any(any(strengths) for row in facts.rows for _, strengths in row.uses)
        return Setup(
            family=model_family(model),
            seen=True,
            two_models=any(are_two(model, other) for other in sides.models) if sides else False,
            takes_image=image_channels(model) > 0,
            semantic=active,
            timesteps=facts.timesteps,
        )
    if detail_model is None and sides is not None:
        detail_model = next(iter(sides.models), None)
    if facts is None and detail_model is not None:
        facts = attached_experts(detail_model)
    family = model_family(model)
    setup = Setup(
        family=family,
        seen=True,
        two_models=are_two(model, detail_model),
        two_sides=detail_model is not None and not are_alike(model, detail_model),
        takes_image=image_channels(model) > 0,
    )
    if facts is None:
        return setup
    patched = any(
        patch[0] for key, own in facts.own_patches.items() for patch in model.patches.get(key, ()) if is_own(patch, own)
    )
    return dataclasses.replace(
        setup,
        semantic=None if "semantic" not in facts.experts else patched or "semantic" in facts.strengths,
        detail=None if "detail" not in facts.experts else "detail" in facts.strengths,
        stacked=facts.stacked,
        timesteps=facts.timesteps,
        boundary=facts.boundary if facts.own_boundary else None,
    )


def video_format(model: Any) -> str:
    """Which of `video_size.FORMATS` the videos of a MODEL have.

    Raises:
        DCMError: no MODEL, or one that is not known.
    """
    family = None if model is None else model_family(model)
    if family is None:
        given = "no model is connected" if model is None else "the connected model is none of these"
        raise DCMError(
            f"model_type is automatic, but {given}. Choose model_type, or connect a Wan or HunyuanVideo model."
        )
    if family is FAMILIES["hunyuan_video"]:
        return HUNYUAN_VIDEO
    return WAN if model.get_model_object("latent_format").latent_channels == 16 else WAN_5B


def are_two(model: Any, detail_model: Any) -> bool:
    """Whether a second MODEL has weights of its own, and is not just the first one with other LoRAs."""
    if detail_model is None:
        return False
    # clones for torch.compile on newer hosts copy the base's weights, and know which base
    first, second = (getattr(each, "clone_base_uuid", each.model) for each in (model, detail_model))
    return first != second


def are_alike(model: Any, detail_model: Any) -> bool:
    """Whether two MODELs are the same in every respect: one model connected twice."""
    return not are_two(model, detail_model) and all(
        is_same(getattr(model, name), getattr(detail_model, name)) for name in EXTRAS
    )


def is_same(first: Any, second: Any) -> bool:
    """Deep equality of containers. Anything in them but plain values must be the same object."""
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(is_same(value, second[key]) for key, value in first.items())
    if isinstance(first, list | tuple) and isinstance(second, list | tuple):
        return len(first) == len(second) and all(map(is_same, first, second))
    return first is second or (isinstance(first, str | float | int | uuid.UUID) and first == second)


def is_table(model: Any) -> bool:
    """Whether a MODEL has an expert table, and not just two experts with one boundary."""
    facts = attached_experts(model)
    return facts is not None and facts.boundary is None


def plan_run(model: Any, sigmas: Tensor, boundary: float | None) -> Plan:
    """Which expert or row runs which step of a prepared MODEL."""
    if is_table(model):
        to_sigma = model.get_model_object("model_sampling").percent_to_sigma
        return plan_rows(attached_experts(model).rows, sigmas.cpu(), to_sigma)
    sides = model.get_attachment(SIDES_KEY)
    return setup_of(model).plan(sigmas, boundary, two_cfgs=sides is not None and bool(_cfgs(sides)))


def _cfgs(sides: Sides) -> list[tuple[str, float]]:
    """(name, cfg) of the parts with a cfg of their own."""
    return [(part.name, part.cfg) for part in sides.parts if part.cfg is not None]


def describe_run(model: Any, plan: Plan) -> str:
    """The plan in words: `step 1-3 semantic, 4-6 detail, boundary 0.979`."""
    sides, facts = model.get_attachment(SIDES_KEY), attached_experts(model)
    if len(plan.stretches) == 1 and plan.by_step[0] == BASE:
        return f"{counted(plan.steps, 'step')}, {'no experts attached' if facts is None else 'experts at strength 0'}"
    cfgs = _cfgs(sides) if sides is not None and (plan.boundary is not None or is_table(model)) else []
    words = ", ".join([str(plan), *(f"{name} cfg {cfg:g}" for name, cfg in cfgs)])
    kind = "row" if is_table(model) else "side"
    return words + "".join(f" (the {name} {kind} has no step)" for name in plan.idle)
