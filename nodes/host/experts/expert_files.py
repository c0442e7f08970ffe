"""Read expert files from the host's `loras` folders."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

from ....dcm_core.errors import DCMError, ExpertError
from ....dcm_core.experts.expert import Expert
from ....dcm_core.experts.reader import WrongSideError, check_metadata, check_sizes, read_expert
from ....dcm_core.files.metadata import ExpertMetadata, read_metadata, settings_beside
from ....dcm_core.files.tensor_file import TensorFile
from ....dcm_core.routing import Side
from ....dcm_core.text import LOGGER
from ..folders import LORAS, NONE, files, path_of
from .adapters import plain_tensors
from .attach import module_shapes, require_family

logger = logging.getLogger(LOGGER)

ANOTHER = "Choose another file."


def expert_names() -> list[str]:
    """The options, "none" first."""
    return [NONE, *files(LORAS)]


def load_expert(name: str, role: Side, model: Any, widget: str | None = None, strength: float = 1.0) -> Expert | None:
    """Read an expert for MODEL; None for "none".

    Args:
        widget: the widget where the user chose it, if not the side's LoRA.
        strength: the strength at which it will be used.

    Raises:
        DCMError: a file that cannot be read, or an expert that does not fit; names the widget and the file.
    """
    if name == NONE:
        return None
    fix = f"Select it under {other_side(role)}_lora instead." if widget is None else ANOTHER
    given = f"{widget or f'{role}_lora'} is {name!r}"
    return read_expert_file(path_of(LORAS, name), role, model, given, fix, strength)


def read_expert_file(
    path: Path, role: Side, model: Any, given: str | None = None, fix: str = ANOTHER, strength: float = 1.0
) -> Expert:
    """The same for a file anywhere.

    Args:
        given: what the user chose and where. Errors begin with it.
        fix: what to do with an expert of the other side.
    """
    given = given or f"The {role} expert is {path.name!r}"
    try:
        return read_file(path, role, model, given, strength)
    except WrongSideError as error:
        raise ExpertError(f"{given}, which is a {error.side} expert. {fix}") from error


def read_file(path: Path, role: Side, model: Any, given: str, strength: float = 1.0) -> Expert:
    """The same, for callers that know what to do with an expert of the other side.

    Raises:
        WrongSideError: an expert of the other side.
    """
    family = require_family(model)
    try:
        file = TensorFile(path)
        check_metadata(read_metadata(file.metadata), role, family)
        tensors, done = plain_tensors(file.read_all(), model, strength)
        expert = read_expert(tensors, file.metadata, role, family, module_shapes(model), path)
    except WrongSideError:
        raise
    except DCMError as error:
        raise type(error)(f"{given}. {error}") from error
    expert = dataclasses.replace(expert, notes=(*done, *expert.notes))
    for note in expert.notes:
        logger.warning("%s: %s", path.name, note)
    return expert


def other_side(role: Side) -> Side:
    return "detail" if role == "semantic" else "semantic"


def trained_expert(expert: Expert | None, role: Side, model: Any) -> Expert | None:
    """An expert directly from its training, checked like a file.

    Raises:
        ExpertError: another family or role, or made for a model of another size.
    """
    if expert is not None:
        try:
            check_metadata(ExpertMetadata(family=expert.family, side=expert.role), role, require_family(model))
            check_sizes(expert, module_shapes(model))
        except WrongSideError as error:
            raise ExpertError(f"{role}_expert is a {error.side} expert. Connect a {role} expert there.") from error
        except ExpertError as error:
            raise ExpertError(f"{role}_expert does not fit. {error}") from error
    return expert


def state_of_expert(name: str | None) -> tuple[int, ...]:
    """When a chosen expert, and its trainer's settings in the same folder, were last written."""
    return () if name in (None, NONE) else last_written(path_of(LORAS, name))


def last_written(path: Path) -> tuple[int, ...]:
    """The same for a file anywhere."""
    return tuple(file.stat().st_mtime_ns for file in (path, *settings_beside(path)) if file.exists())
