"""Experts trained on two models (Wan 2.2 A14B): which belongs on which MODEL, and which belong together."""

import logging
from typing import Any

from ....dcm_core.errors import ExpertError
from ....dcm_core.experts.expert import FILE_PREFIX, Expert
from ....dcm_core.pair import Fingerprint, Pair, fingerprint
from ....dcm_core.routing import Side
from ....dcm_core.text import LOGGER
from ..compat import key_patches
from .route import attached_experts

logger = logging.getLogger(LOGGER)

MODELS: dict[Side, str] = {"semantic": "high-noise", "detail": "low-noise"}
INPUTS: dict[Side, str] = {"semantic": "model", "detail": "detail_model"}


def model_fingerprint(model: Any) -> Fingerprint:
    """The fingerprint of a MODEL's own weights, without LoRAs."""
    stored = {name.removeprefix(FILE_PREFIX): found[0] for name, found in key_patches(model).items()}

    def read(name: str) -> Any:
        weight, convert = stored[name]
        return convert(weight.detach())

    return fingerprint(stored, read)


def name_of(expert: Expert) -> str:
    return repr(expert.source) if expert.source else f"the trained {expert.role} expert"


def check_halves(model: Any, semantic: Expert | None, detail: Expert | None) -> None:
    """Refuse experts for two models on one MODEL, and an expert on the wrong one of the two.

    Raises:
        ExpertError: names the files, and says where each belongs.
    """
    given = [(side, expert) for side, expert in (("semantic", semantic), ("detail", detail)) if expert is not None]
    halves = [(side, expert, expert.pair) for side, expert in given if expert.pair is not None]
    if halves and len(given) > 1:
        side, expert, _ = halves[0]
        (other,) = (found for _, found in given if found is not expert)
        raise ExpertError(
            f"{name_of(expert)} was trained on the {MODELS[side]} model of two models (Wan 2.2 A14B), and works on that model alone. "
            f"On the same model, {name_of(other)} cannot be attached. Put each expert on its own model with a DCM Attach Experts "
            "node. Then connect both to DCM Sampler: high noise to model, low noise to detail_model."
        )
    for side, expert, _ in halves:
        check_half(expert, side, model)


def check_half(expert: Expert, side: Side, model: Any) -> None:
    """Refuse an expert for one of two models on the other one. An expert for one model fits any.

    Raises:
        ExpertError: names the file, and says where it belongs.
    """
    if expert.pair is None:
        return
    found = expert.pair.side_of(model_fingerprint(model))
    if found is None:
        logger.warning(
            "%s was trained on a %s model of two models, and this model is neither of them. Results may be poor.",
            name_of(expert),
            MODELS[side],
        )
    elif found != side:
        raise ExpertError(
            f"{name_of(expert)} is a {side} expert that was trained on the {MODELS[side]} model of two models, but this is the "
            f"{MODELS[found]} model. Attach it to the {MODELS[side]} model, and the {found} expert of the same training here."
        )


def check_together(model: Any, detail_model: Any) -> None:
    """Refuse two MODELs whose experts do not belong together, or that are in each other's place.

    Raises:
        ExpertError: names the files, and what to connect.
    """
    if detail_model is None:
        return
    halves = halves_of(model, detail_model)
    if len(halves) == 2:
        (first, semantic), (second, detail) = halves["semantic"], halves["detail"]
        if semantic.id != detail.id:
            raise ExpertError(
                f"The experts on model ({first}) and detail_model ({second}) do not belong together: the id of the first is "
                f"{semantic.id}, that of the second {detail.id}. They were trained for other models, or another boundary, shift or "
                "sample_steps. Choose two files of one training."
            )
    for source, pair in halves.values():
        for side, patcher in (("semantic", model), ("detail", detail_model)):
            found = pair.side_of(model_fingerprint(patcher))
            if found not in (None, side):
                raise ExpertError(
                    f"{INPUTS[side]} is the {MODELS[found]} model of the two that {source} was trained for. Connect the high-noise "
                    "model to model and the low-noise model to detail_model, each with its own expert."
                )


def missing_half(model: Any, detail_model: Any) -> str:
    """A warning if only one of two models that belong together has its expert; else ""."""
    halves = halves_of(model, detail_model)
    if len(halves) != 1:
        return ""
    ((side, (source, _)),) = halves.items()
    other: Side = "detail" if side == "semantic" else "semantic"
    return (
        f"Warning: {source} was trained together with a {other} expert for the {MODELS[other]} model, which is not on "
        f"{INPUTS[other]}. Attach that expert to the {MODELS[other]} model and connect it there."
    )


def halves_of(model: Any, detail_model: Any) -> dict[Side, tuple[str, Pair]]:
    """side -> file of the expert for one of two models, if one is attached, and what it knows of both."""
    found: dict[Side, tuple[str, Pair]] = {}
    for patcher in (model, detail_model):
        facts = None if patcher is None else attached_experts(patcher)
        found |= {} if facts is None else facts.halves
    return found
