"""Load a model file of any layout. A released checkpoint comes with its detail expert attached."""

import json
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import comfy.sd
import comfy.utils
import torch

from ....dcm_core.errors import CheckpointError, check_choice
from ....dcm_core.experts.reader import read_release
from ....dcm_core.files.checkpoint import Contents, Layout, check_base, recognise, semantic_state_dict
from ....dcm_core.files.mapped import views
from ....dcm_core.files.tensor_file import Progress, TensorFile
from ....dcm_core.text import one_line
from ..compat import LAYER_FORMATS, host_version
from ..folders import MODELS, path_of
from ..progress import byte_progress
from .attach import attach_experts

# The options of the host's own loader.
WEIGHT_DTYPES: dict[str, dict[str, Any]] = {
    "default": {},
    "fp8_e4m3fn": {"dtype": torch.float8_e4m3fn},
    "fp8_e4m3fn_fast": {"dtype": torch.float8_e4m3fn, "fp8_optimizations": True},
    "fp8_e5m2": {"dtype": torch.float8_e5m2},
}

# `model-00001-of-00006.safetensors`
SHARD = re.compile(r"-\d{5}-of-(\d{5})\.safetensors$")
# Bytes read of a layer's note. Real ones are shorter; a longer one is cut and is then not JSON.
LONGEST_NOTE = 4096
OTHER_USES = (
    (
        "text encoder",
        "Load CLIP",
        re.compile(r"(^|\.)(encoder\.block|text_model|embed_tokens|token_embedding|shared)\."),
    ),
    ("CLIP vision model", "Load CLIP Vision", re.compile(r"(^|\.)(vision_model|visual)\.")),
    ("VAE", "Load VAE", re.compile(r"(^|\.)(decoder|post_quant_conv|first_stage_model)\.")),
)


def load_model(name: str, weight_dtype: str, node_id: str | None = None) -> tuple[Any, str]:
    """Load a model and describe it.

    Returns:
        The MODEL and a line about the file.

    Raises:
        CheckpointError: a file that cannot be read, is incomplete, or is not a model.
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
            f"{name} is an expert (a LoRA), not a model. Select the base model here, and select this file in DCM Attach Experts."
        )
    if contents.layout in (Layout.NATIVE, Layout.OTHER):
        model = load_native(file, weight_dtype)
        if contents.family is None:
            return model, f"{name}: {type(model.model).__name__}, loaded as in Load Diffusion Model"
        return model, f"{name}: plain {contents.family.title} model, no experts inside. Add DCM Attach Experts."
    model = _load_base(file, contents, weight_dtype, byte_progress(node_id))
    if contents.layout is Layout.DIFFUSERS:
        return (
            model,
            f"{name}: {contents.family.title} model in diffusers layout, no experts inside. Add DCM Attach Experts.",
        )
    # mapped again, so that the base's pages are not kept while the expert is copied
    expert = read_release(file, contents, _views(file))
    return attach_experts(model, detail=expert), f"{name}: {contents.family.title} release, semantic base with {expert}"


def load_native(file: TensorFile, weight_dtype: str) -> Any:
    """Load a file that the host reads itself.

    Raises:
        CheckpointError: a file that this host cannot read, or would read wrongly.
    """
    name = file.path.name
    if (shard := SHARD.search(name)) and int(shard[1]) > 1:
        raise CheckpointError(
            f"{name} is only one of the {int(shard[1])} shards of a model. Merge all shards into one file and select that file."
        )
    if unknown := sorted(layer_formats(file) - LAYER_FORMATS):
        raise CheckpointError(
            f"{name} has layers quantised as {', '.join(unknown)} (comfy_quant), which ComfyUI {host_version()} cannot read: it would "
            "load them as noise. Update ComfyUI, or select an fp16, bf16 or fp8 version of the model."
        )
    try:
        return comfy.sd.load_diffusion_model(str(file.path), model_options=dict(WEIGHT_DTYPES[weight_dtype]))
    except (RuntimeError, KeyError, IndexError) as error:
        if "detect model type" in str(error):
            raise CheckpointError(
                f"{name} is not a diffusion model that ComfyUI {host_version()} knows.{other_use(file.shapes)} Select a video model."
            ) from error
        # other errors of this type (no memory, an interrupt) are not about the file
        if isinstance(error, RuntimeError) and "loading state_dict" not in str(error):
            raise
        raise CheckpointError(
            f"{name} has missing tensors, or tensors of a wrong shape: ComfyUI {host_version()} cannot load it ({one_line(error)}). "
            "Download it again, or select another file."
        ) from error


def layer_formats(file: TensorFile) -> set[str]:
    """How the layers of a file are quantised, according to the notes that newer hosts store with them."""
    found = set()
    for key in file.shapes:
        if key.endswith(".comfy_quant"):
            try:
                note = json.loads(bytes(file.read(key).flatten()[:LONGEST_NOTE].to(torch.uint8).tolist()))
                found.add(str(note["format"])[:40] if isinstance(note, dict) else "something unknown")
            except (ValueError, KeyError, RecursionError):
                found.add("something unknown")
    return found


def other_use(keys: Iterable[str]) -> str:
    """What another kind of file may be, and which node loads it; "" if unknown."""
    for what, node, mark in OTHER_USES:
        if any(mark.search(key) for key in keys):
            return f" It looks like a {what}: load it with {node}."
    return ""


def load_base(path: Path, weight_dtype: str, **newer: bool) -> Any:
    """The base (semantic) model of a diffusers-layout file.

    Args:
        newer: arguments that newer hosts pass when they need a second copy (`disable_dynamic`).

    Raises:
        CheckpointError: NaN or infinite weights, or sizes that no model of this ComfyUI has.
    """
    file = TensorFile(path)
    return _load_base(file, recognise(file), weight_dtype, **newer)


def _load_base(
    file: TensorFile, contents: Contents, weight_dtype: str, progress: Progress | None = None, **newer: bool
) -> Any:
    path, title = file.path, contents.family.title
    tensors = _views(file)
    weights = semantic_state_dict(file, contents, progress, tensors)
    with ThreadPoolExecutor(max_workers=1) as beside:
        # the check reads what loading has brought into memory
        checked = beside.submit(check_base, file, contents, tensors) if tensors is not None else None
        # the mapping is freed with its last tensor
        del tensors
        try:
            model = comfy.sd.load_diffusion_model_state_dict(
                weights, model_options=dict(WEIGHT_DTYPES[weight_dtype]), **newer
            )
        except (RuntimeError, AssertionError, ZeroDivisionError) as error:
            # other errors of this type (no memory, an interrupt) are not about the file
            if isinstance(error, RuntimeError) and "size mismatch" not in str(error):
                raise
            raise CheckpointError(
                f"{path} cannot be loaded: no {title} model has its sizes ({one_line(error, 400)}). Download the file again."
            ) from error
    if checked is not None:
        checked.result()
    if model is None:
        raise CheckpointError(f"{path} is a {title} file, but this ComfyUI has no model of its sizes. Update ComfyUI.")
    # newer hosts build a second, independent model with it (several GPUs, hooks with dynamic VRAM)
    model.cached_patcher_init = (load_base, (path, weight_dtype))
    return model


def _views(file: TensorFile) -> Mapping[str, torch.Tensor] | None:
    """The file's tensors as memory-mapped views, which the host copies; None with --disable-mmap."""
    return None if comfy.utils.DISABLE_MMAP else views(file)
