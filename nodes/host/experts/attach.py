"""Attach experts to a MODEL.

The experts' weights are in ModelPatchers of their own, registered as additional models, so that the host loads, offloads
and counts them. `route` runs them. The base weights are neither read nor written.
"""

import copy
import dataclasses
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import comfy.lora
import comfy.model_patcher
import comfy.ops
import comfy.utils
import torch
from comfy.patcher_extension import WrappersMP
from torch import nn

from ....dcm_core.errors import ExpertError, name_some
from ....dcm_core.experts.expert import FILE_PREFIX, Expert, expert_to_state_dict
from ....dcm_core.experts.modules import RoutedExpert, bare_parameters, inner_module, is_linear
from ....dcm_core.families import FAMILIES, Family
from ....dcm_core.families.lora_names import unwrapped
from ....dcm_core.routing import Setup, check_boundary, own_boundary, own_timesteps
from ....dcm_core.table import Use, two_rows
from ..sampling.switch import remove_sides
from ..saving import allow_saving, refuse_saving
from .halves import check_halves, name_of
from .prepare import is_own, prepare_run
from .route import KEY, AttachedExperts, attached_experts, route_call

# Attributes that newer hosts put on a loaded module: its places in memory.
HOST_STATE = {
    "_v",
    "_v_signature",
    "_v_weight",
    "_v_bias",
    "_pins",
    "_pin_state",
    "_prefetch",
    "dynamic_vbars",
    "dynamic_pins",
    "dynamic_patchers",
    "weight_lowvram_function",
    "bias_lowvram_function",
}


def diffusion_model(model: Any) -> nn.Module:
    """The transformer inside a MODEL, without a compile wrapper."""
    return inner_module(model.get_model_object("diffusion_model"))


def image_channels(model: Any) -> int:
    """Channels that the transformer takes besides those of the video: 20 for an image-to-video model of Wan, 0 for text to video."""
    module = diffusion_model(model)
    taken = getattr(module, "in_dim", getattr(module, "in_channels", 0))
    return max(0, taken - model.get_model_object("latent_format").latent_channels)


def model_family(model: Any) -> Family | None:
    """The family of a MODEL, by its tensor names; None for other models."""
    names = {unwrapped(name) for name, _ in diffusion_model(model).named_parameters()}
    return next((family for family in FAMILIES.values() if family.is_native(names)), None)


def require_family(model: Any) -> Family:
    """The family of a MODEL.

    Raises:
        ExpertError: a model of an unknown family.
    """
    family = model_family(model)
    if family is None:
        titles = " and ".join(family.title for family in FAMILIES.values())
        raise ExpertError(
            f"The model is a {type(diffusion_model(model)).__name__}, but DCM experts exist only for {titles}. Load one of these models."
        )
    return family


def module_shapes(model: Any) -> dict[str, tuple[int, ...]]:
    """Native tensor name -> shape, however the weights are stored (fp8, GGUF, packed)."""
    shapes = {}
    for name, module in diffusion_model(model).named_modules():
        name = unwrapped(name)
        for param, tensor in module.named_parameters(recurse=False):
            shapes[f"{name}.{param}" if name else param] = tuple(tensor.shape)
        if is_linear(module):
            shapes[f"{name}.weight"] = (module.out_features, module.in_features)
    return shapes


def attach_experts(
    model: Any,
    semantic: Expert | None = None,
    detail: Expert | None = None,
    *,
    semantic_strength: float = 1.0,
    detail_strength: float = 1.0,
    boundary: float | None = None,
    stacked: bool = True,
) -> Any:
    """A clone of MODEL with the experts attached. Experts that are already attached are replaced.

    Args:
        boundary: sigma where the detail side begins; None or 0 uses the experts' own, else the family's.
        stacked: the semantic expert is an ordinary LoRA on the base at all steps; otherwise each expert works only on its side.

    Raises:
        ExpertError: an expert that does not fit, or belongs on another model. MODEL itself is never changed.
    """
    family = require_family(model)
    check_halves(model, semantic, detail)
    given = {side: expert for side, expert in (("semantic", semantic), ("detail", detail)) if expert is not None}
    own = own_boundary((expert.boundary for expert in given.values()), boundary)
    clone = detach_experts(model)
    own_patches: dict[str, tuple[Any, ...]] = {}
    routed: dict[str, Expert] = {}
    high, low = [], []  # what works above and below the boundary
    if semantic is not None:
        part = semantic
        if stacked:
            patched, part = _split_routed(semantic, semantic_strength)
            own_patches = _patch_base(clone, patched, semantic_strength)
        if part is not None and semantic_strength:
            routed["semantic"] = part
            high.append(Use("semantic", (semantic_strength,)))
            low += high if stacked else []
    if detail is not None and detail_strength:
        routed["detail"] = detail
        low.append(Use("detail", (detail_strength,)))
    level = Setup(family).boundary_for(own)
    facts = AttachedExperts(
        family=family.name,
        rows=two_rows(level, high, low),
        experts={side: str(dataclasses.replace(expert, role=side)) for side, expert in given.items()},
        boundary=level,
        own_boundary=own is not None,
        timesteps=own_timesteps(expert.timesteps for expert in reversed(given.values())),
        stacked=stacked,
        own_patches=own_patches,
        halves={side: (name_of(expert), expert.pair) for side, expert in given.items() if expert.pair is not None},
    )
    return route_experts(clone, routed, facts)


def route_experts(clone: Any, routed: Mapping[str, Expert], facts: AttachedExperts) -> Any:
    """Put experts beside the weights of a MODEL's own clone, and route its calls to them. Returns the clone.

    Args:
        routed: name -> each expert of `facts.rows`.

    Raises:
        ExpertError: an expert that does not fit the model's layers.
    """
    clone.set_additional_models(KEY, [_expert_patcher(clone, expert, name) for name, expert in routed.items()])
    clone.set_attachments(KEY, facts)
    if routed:
        refuse_saving(clone)
    clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, route_call)
    clone.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, KEY, prepare_run)
    return clone


def detach_experts(model: Any) -> Any:
    """A clone of MODEL without experts, and without a table's models and cfgs.

    The patches of a stacked semantic expert are removed, the user's are kept.
    """
    clone = model.clone()
    facts = attached_experts(model)
    if facts is not None:
        for key, own in facts.own_patches.items():
            clone.patches[key] = [patch for patch in clone.patches[key] if not is_own(patch, own)]
            if not clone.patches[key]:
                del clone.patches[key]
        if facts.own_patches:
            clone.patches_uuid = uuid.uuid4()
    allow_saving(clone)
    clone.remove_additional_models(KEY)
    clone.remove_attachments(KEY)
    remove_sides(clone)
    for kind in (WrappersMP.APPLY_MODEL, WrappersMP.PREPARE_SAMPLING):
        clone.remove_wrappers_with_key(kind, KEY)
    return clone


def with_boundary(model: Any, boundary: float | None) -> Any:
    """A clone of MODEL whose two experts change at this sigma; MODEL itself if it has none or already uses it."""
    facts = attached_experts(model)
    if facts is None or facts.boundary in (None, boundary):
        return model
    clone, (high, low) = model.clone(), facts.rows
    rows = two_rows(check_boundary(boundary), high.uses, low.uses)
    clone.set_attachments(KEY, dataclasses.replace(facts, rows=rows, boundary=boundary, own_boundary=True))
    return clone


def _split_routed(expert: Expert, strength: float) -> tuple[Expert, Expert | None]:
    """The part the host can patch, and the part that must be routed.

    The host silently skips patches on bare parameters, and it applies replaced tensors only at strength 1.
    """
    routed = {*bare_parameters(expert), *(expert.replaced if strength != 1 else ())}

    def part(chosen: bool, tensors: dict) -> dict:
        return {name: tensor for name, tensor in tensors.items() if (name in routed) is chosen}

    patched = dataclasses.replace(expert, replaced=part(False, expert.replaced), diff=part(False, expert.diff))
    rest = dataclasses.replace(expert, low_rank={}, replaced=part(True, expert.replaced), diff=part(True, expert.diff))
    return patched, rest if routed else None


def _patch_base(clone: Any, expert: Expert, strength: float) -> dict[str, tuple[Any, ...]]:
    """Add the expert as an ordinary LoRA. Returns the added patches by base tensor."""
    shapes = module_shapes(clone)
    tensors, _ = expert_to_state_dict(expert, shapes)
    key_map = {FILE_PREFIX + name.removesuffix(".weight"): FILE_PREFIX + name for name in shapes}
    patches = comfy.lora.load_lora(tensors, key_map, log_missing=False)
    with own_objects(clone):
        added = set(clone.add_patches(patches, strength))
    lost = {name for name in _targets(expert) if FILE_PREFIX + name not in added}
    # the host keeps one patch per tensor of a LoRA file
    lost |= {f"{module}.weight" for module in expert.low_rank} & (set(expert.diff) | set(expert.replaced))
    if lost:
        raise ExpertError(
            f"ComfyUI could not apply {len(lost)} of the semantic expert's tensors: {name_some(lost)}. "
            "Set `experts` to independent, or use an expert made for this model."
        )
    return {key: (value,) for key, value in patches.items()}


@contextmanager
def own_objects(model: Any) -> Iterator[None]:
    """Within the block, the model is without the object patches of the clone that was loaded last.

    A compiled block among them would change the tensor names that the host sees.
    """
    patched = [
        (name, comfy.utils.set_attr(model.model, name, own)) for name, own in model.object_patches_backup.items()
    ]
    try:
        yield
    finally:
        for name, patch in reversed(patched):
            comfy.utils.set_attr(model.model, name, patch)


def _targets(expert: Expert) -> set[str]:
    return {f"{module}.weight" for module in expert.low_rank} | set(expert.replaced) | set(expert.diff)


def compute_dtype(model: Any) -> torch.dtype:
    """The dtype the base computes in, never a storage dtype such as fp8."""
    dtype = model.model.manual_cast_dtype or model.model.get_dtype()
    if dtype in (torch.float32, torch.bfloat16, torch.float16):
        return dtype
    return model.model.model_config.supported_inference_dtypes[0]


def _expert_patcher(model: Any, expert: Expert, name: str) -> Any:
    """The expert as a separate model on the base's devices."""
    base = {unwrapped(name): inner_module(module) for name, module in diffusion_model(model).named_modules()}
    module = RoutedExpert(expert, base, comfy.ops.manual_cast, compute_dtype(model), model.offload_device, name)
    return make_patcher(module, model.load_device, model.offload_device)


def make_patcher(module: RoutedExpert, load_device: torch.device, offload_device: torch.device, **newer: bool) -> Any:
    """The host's ModelPatcher around an expert.

    Args:
        newer: arguments that newer hosts pass when they need a second copy (`disable_dynamic`).
    """
    # looked up late, as the host's start-up may rebind it
    patcher_class = getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)
    if newer.get("disable_dynamic"):
        patcher_class = comfy.model_patcher.ModelPatcher
    patcher = patcher_class(module, load_device=load_device, offload_device=offload_device)
    patcher.cached_patcher_init = (copy_patcher, (module, load_device, offload_device))
    return patcher


def copy_patcher(module: RoutedExpert, *devices: torch.device, **newer: bool) -> Any:
    """An independent copy of the expert, for newer hosts with several GPUs."""
    # not copied: both copies would free the same memory
    states = [
        (part, {name: part.__dict__.pop(name) for name in HOST_STATE & part.__dict__.keys()})
        for part in module.modules()
    ]
    try:
        duplicate = copy.deepcopy(module)
    finally:
        for part, state in states:
            part.__dict__.update(state)
    return make_patcher(duplicate, *devices, **newer)
