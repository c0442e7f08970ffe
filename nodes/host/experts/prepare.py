"""What is done before each sampling run of a MODEL with experts."""

import logging
import uuid
from typing import Any

from torch import nn

from ....dcm_core.errors import ExpertError, name_some
from ....dcm_core.experts.expert import FILE_PREFIX
from ....dcm_core.experts.modules import is_compiled
from ....dcm_core.text import LOGGER
from .route import KEY, AttachedExperts, attached_experts, step_cache_note

logger = logging.getLogger(LOGGER)

# Where newer hosts keep a MODEL's clones on additional GPUs.
GPU_CLONES = "multigpu"


def prepare_run(executor: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
    """PREPARE_SAMPLING wrapper: hand the user's patches to the experts, and check in each run that they have an effect."""
    facts = attached_experts(model)
    if facts is not None:
        check_compiled(model, facts)
        if note := step_cache_note(model):
            logger.warning(note)
        # newer hosts keep a clone for each additional GPU, with experts of its own
        for owner in (model, *model.get_additional_models_with_key(GPU_CLONES)):
            for patcher in owner.get_additional_models_with_key(KEY):
                patcher.model.checked.clear()
                _hand_over(model, patcher, facts)
    return executor(model, *args, **kwargs)


def check_compiled(model: Any, facts: AttachedExperts) -> None:
    """Refuse a compiled block that was added as an object patch: the host cannot find its tensors by their names.

    Raises:
        ExpertError: a stacked semantic expert that the host would silently skip.
    """
    patches = model.object_patches.items()
    compiled = [name for name, patch in patches if isinstance(patch, nn.Module) and is_compiled(patch)]
    lost = [name for name in compiled if any(key.startswith(f"{name}.") for key in facts.own_patches)]
    if lost:
        raise ExpertError(
            f"A node compiled {name_some(lost)} in a way that makes ComfyUI skip LoRA patches there, so the semantic expert "
            "would have no effect. Compile with TorchCompileModel (or TorchCompileModelWanVideoV2 of KJNodes) instead."
        )


def _hand_over(model: Any, patcher: Any, facts: AttachedExperts) -> None:
    """Move the user's patches on a replaced tensor to the tensor that replaces it."""
    wanted = {}
    for name, own_name in patcher.model.replaced_weights().items():
        key = FILE_PREFIX + name
        patches = [patch for patch in model.patches.get(key, []) if not is_own(patch, facts.own_patches.get(key, ()))]
        if patches:
            wanted[own_name] = patches
    identity = [
        (name, [id(patch[1]) for patch in patches], [patch[0] for patch in patches]) for name, patches in wanted.items()
    ]
    now = [(name, [id(p[1]) for p in patches], [p[0] for p in patches]) for name, patches in patcher.patches.items()]
    if identity != now:
        patcher.patches = wanted
        patcher.patches_uuid = uuid.uuid4()
        logger.debug("handed %d LoRA patches to the %s expert", len(wanted), patcher.model.name)


def is_own(patch: tuple, own: tuple[Any, ...]) -> bool:
    """Whether a patch on a tensor is one of the semantic expert's (`AttachedExperts.own_patches` of that tensor)."""
    return any(patch[1] is value for value in own)
