"""Differences between ComfyUI versions, in one place."""

import contextlib
import dataclasses
import inspect
import logging
import re
import sys
from collections.abc import Iterator
from typing import Any

import comfy.model_management
import comfy.ops
import comfy.quant_ops
import comfy.rmsnorm
import comfy.utils
import comfyui_version
from comfy.model_patcher import get_key_weight
from comfy_api.latest import io
from einops import rearrange
from torch import Tensor

from ...dcm_core.text import LOGGER

logger = logging.getLogger(LOGGER)

# The newest ComfyUI that the tests ran in.
NEWEST_TRIED = "0.33.0"

# Activations that newer hosts may fuse into the input of a linear.
ACTIVATIONS = {**getattr(comfy.ops, "INPUT_ACT_EAGER", {}), "rms_norm": comfy.rmsnorm.rms_norm}

# Quantisation formats that this host reads from `<layer>.comfy_quant`; older hosts read none.
LAYER_FORMATS = (
    frozenset(comfy.quant_ops.QUANT_ALGOS) if hasattr(comfy.utils, "detect_layer_quantization") else frozenset()
)

SCHEMA_FIELDS = frozenset(field.name for field in dataclasses.fields(io.Schema))


def host_version() -> str:
    """The version of this ComfyUI, such as `0.33.0`."""
    return comfyui_version.__version__


def tell_newer_host() -> None:
    """Log one line if this ComfyUI is newer than the newest one tested."""
    own, tried = (
        tuple(int(number) for number in re.findall(r"\d+", text)[:3]) for text in (host_version(), NEWEST_TRIED)
    )
    if own > tried:
        logger.info(
            "This is ComfyUI %s; ComfyUI-DCM was tested up to %s. A run stops with an error if an expert has no effect.",
            host_version(),
            NEWEST_TRIED,
        )


def newer(**keywords: Any) -> dict[str, Any]:
    """The `io.Schema` keywords that this host knows; unknown ones would be an error."""
    return {name: value for name, value in keywords.items() if name in SCHEMA_FIELDS}


def advanced(input_type: Any) -> dict[str, bool]:
    """`advanced=True` for inputs of this type, if this host knows it."""
    return {"advanced": True} if "advanced" in inspect.signature(input_type.__init__).parameters else {}


def key_patches(patcher: Any) -> dict[str, list]:
    """Parameter name -> [(weight as stored and unpatched, function that dequantises it), *patches].

    Like the host's `get_key_patches`, which fails on quantised layers on newer hosts, as it looks for every tensor of their files.
    """
    found = {}
    with patcher.use_ejected():
        for name, _ in patcher.model.named_parameters(remove_duplicate=False):
            weight, _, convert = get_key_weight(patcher.model, name)
            if name in patcher.backup:
                weight = patcher.backup[name].weight
            if name in patcher.hook_backup:
                weight = patcher.hook_backup[name][0]
            found[name] = [(weight, convert or (lambda stored: stored)), *patcher.patches.get(name, [])]
    return found


def is_oom(error: BaseException) -> bool:
    """Whether an error means too little device memory: newer hosts know more such errors, Macs say so only in the text."""
    known = getattr(
        comfy.model_management, "is_oom", lambda error: isinstance(error, comfy.model_management.OOM_EXCEPTION)
    )
    return known(error) or "out of memory" in str(error).lower()


def rotate(x: Tensor, rotations: Tensor) -> Tensor:
    """Rotary embedding: every two channels of x (..., 2 n) times a matrix of `rotations` (..., n, 2, 2)."""
    pairs = rearrange(x.to(rotations.dtype), "... (n two) -> ... n 1 two", two=2)
    return rearrange((rotations * pairs).sum(-1), "... n two -> ... (n two)").type_as(x)


def rotate_both(q: Tensor, k: Tensor, rotations: Tensor) -> tuple[Tensor, Tensor]:
    return rotate(q, rotations), rotate(k, rotations)


@contextlib.contextmanager
def gradients() -> Iterator[None]:
    """Within the block, the host's layers have gradients: newer hosts rotate with a kernel that has none."""
    if hasattr(comfy.model_management, "in_training"):
        before, comfy.model_management.in_training = comfy.model_management.in_training, True
        try:
            yield
        finally:
            comfy.model_management.in_training = before
        return
    # hosts that have the kernels, but no training mode yet
    kernels = getattr(sys.modules.get("comfy.quant_ops"), "ck", None)
    ours = {"apply_rope": rotate_both, "apply_rope1": rotate}
    theirs = {name: getattr(kernels, name, None) for name in ours}
    places = [
        (module, name)
        for path, module in list(sys.modules.items())
        for name in ours
        if path.startswith("comfy.ldm.") and theirs[name] is not None and getattr(module, name, None) is theirs[name]
    ]
    for module, name in places:
        setattr(module, name, ours[name])
    try:
        yield
    finally:
        for module, name in places:
            setattr(module, name, theirs[name])
