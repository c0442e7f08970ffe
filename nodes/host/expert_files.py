"""Read expert files of the host's `loras` folders."""

import json
from pathlib import Path
from typing import Any

from ...dcm_core.errors import CheckpointError
from ...dcm_core.expert_reader import check_facts, check_sizes, read_expert
from ...dcm_core.experts import Expert
from ...dcm_core.routing import Side
from ...dcm_core.storage import TensorFile
from .attach import module_shapes, require_family
from .folders import LORAS, NONE, files, path_of


def expert_names() -> list[str]:
    """What the user may choose from, "none" first."""
    return [NONE, *files(LORAS)]


def load_expert(name: str, role: Side, model: Any) -> Expert | None:
    """Read an expert for MODEL; None for "none".

    Raises:
        DCMError: a file that cannot be read, or an expert that does not fit.
    """
    return None if name == NONE else read_expert_file(path_of(LORAS, name), role, model)


def read_expert_file(path: Path, role: Side, model: Any) -> Expert:
    """The same for a file anywhere."""
    file = TensorFile(path)
    return read_expert(
        file.read_all(), file.metadata, role, require_family(model), module_shapes(model), peft_config(path)
    )


def trained_expert(expert: Expert | None, role: Side, model: Any) -> Expert | None:
    """An expert straight from its training, checked as a file is.

    Raises:
        ExpertError: another family or role, or made for a model of another size.
    """
    if expert is not None:
        check_facts({"dcm.family": expert.family, "dcm.expert": expert.role}, role, require_family(model))
        check_sizes(expert, module_shapes(model))
    return expert


def state_of_expert(name: str | None) -> tuple[int, ...]:
    """When a chosen expert, and the settings that PEFT keeps beside its file, were last written."""
    return () if name in (None, NONE) else last_written(path_of(LORAS, name))


def last_written(path: Path) -> tuple[int, ...]:
    """The same for a file anywhere."""
    return tuple(file.stat().st_mtime_ns for file in (path, settings_beside(path)) if file is not None and file.exists())


def settings_beside(path: Path) -> Path | None:
    """Where PEFT keeps the settings of a file that it saved; None for other files."""
    return path.with_name("adapter_config.json") if path.name.startswith("adapter_model") else None


def peft_config(path: Path) -> dict | None:
    """The adapter_config.json beside a file that PEFT saved."""
    config = settings_beside(path)
    if config is None or not config.exists():
        return None
    try:
        return json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{config} beside the expert cannot be read ({error}). Save or download it again.") from error
