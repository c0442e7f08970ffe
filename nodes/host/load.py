"""Load a model file of any layout; a released checkpoint comes with its detail expert attached."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import comfy.sd
import comfy.utils
import torch

from ...dcm_core.checkpoint import Layout, check_finite, detail_expert, recognise, semantic_state_dict
from ...dcm_core.errors import CheckpointError, check_choice
from ...dcm_core.storage import Progress, TensorFile
from .attach import attach_experts
from .folders import MODELS, path_of
from .progress import byte_progress

# What the host's own loader offers.
WEIGHT_DTYPES: dict[str, dict[str, Any]] = {
    "default": {},
    "fp8_e4m3fn": {"dtype": torch.float8_e4m3fn},
    "fp8_e4m3fn_fast": {"dtype": torch.float8_e4m3fn, "fp8_optimizations": True},
    "fp8_e5m2": {"dtype": torch.float8_e5m2},
}


def load_model(name: str, weight_dtype: str, node_id: str | None = None) -> tuple[Any, str]:
    """Load a model and say what it was.

    Returns:
        The MODEL and a line about the file.

    Raises:
        CheckpointError: a file that cannot be read, is incomplete, or is no model.
    """
    return load_file(path_of(MODELS, name, "model_name"), weight_dtype, node_id)


def load_file(path: Path, weight_dtype: str, node_id: str | None = None) -> tuple[Any, str]:
    """The same for a file anywhere."""
    check_choice("weight_dtype", weight_dtype, WEIGHT_DTYPES, CheckpointError)
    name = path.name
    file = TensorFile(path)
    contents = recognise(file)
    if contents.layout is Layout.EXPERT:
        raise CheckpointError(
            f"{name} holds an expert (a LoRA), not a model. Load the base model here and give this file to DCM Attach Experts."
        )
    if contents.layout in (Layout.NATIVE, Layout.OTHER):
        model = comfy.sd.load_diffusion_model(str(path), model_options=dict(WEIGHT_DTYPES[weight_dtype]))
        return model, f"{name}: {type(model.model).__name__}, loaded by the host as it is"
    model = load_base(path, weight_dtype, byte_progress(node_id))
    if contents.layout is Layout.DIFFUSERS:
        return model, f"{name}: {contents.family.title} in diffusers layout, no experts inside"
    # attaching makes a copy
    expert = detail_expert(file, contents, copied=comfy.utils.DISABLE_MMAP)
    return attach_experts(model, detail=expert), f"{name}: {contents.family.title} release, semantic base with {expert}"


def load_base(path: Path, weight_dtype: str, progress: Progress | None = None, **newer: bool) -> Any:
    """The base (semantic) model of a diffusers-layout file.

    Args:
        newer: what newer hosts pass when they need the model a second time (`disable_dynamic`).

    Raises:
        CheckpointError: sizes this ComfyUI has no model for.
    """
    file = TensorFile(path)
    contents = recognise(file)
    # the host's own loader takes views, too, unless told otherwise
    weights = semantic_state_dict(file, contents, progress, copied=comfy.utils.DISABLE_MMAP, checked=False)
    with ThreadPoolExecutor(max_workers=1) as beside:
        # both wait for memory and disk most of the time
        checked = beside.submit(check_finite, file, dict(weights))
        try:
            model = comfy.sd.load_diffusion_model_state_dict(weights, model_options=dict(WEIGHT_DTYPES[weight_dtype]), **newer)
        except RuntimeError as error:
            if "size mismatch" not in str(error):
                raise
            raise CheckpointError(f"{path} has tensors whose sizes do not fit together ({error}). Download it again.") from error
    checked.result()
    if model is None:
        raise CheckpointError(f"{path} is a {contents.family.title} file, but this ComfyUI cannot build a model of its sizes.")
    # newer hosts make a second, independent model with it (several GPUs, hooks under dynamic VRAM)
    model.cached_patcher_init = (load_base, (path, weight_dtype))
    return model
