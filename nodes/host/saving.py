"""ComfyUI's save nodes would write only the base of a MODEL with experts, so they get an error instead."""

from typing import Any

from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP

from ...dcm_core.errors import ExpertError
from .experts.route import KEY

CALLBACKS = (CallbacksMP.ON_LOAD, CallbacksMP.ON_CLONE)
# The method that the save nodes of newer hosts call on a MODEL.
SAVED = "state_dict_for_saving"


def refuse_saving(model: Any) -> None:
    """Make saving this MODEL or its clones an error, on older and newer hosts."""
    model.add_callback_with_key(CallbacksMP.ON_LOAD, KEY, on_load)
    model.add_callback_with_key(CallbacksMP.ON_CLONE, KEY, on_clone)
    on_clone(model, model)


def allow_saving(model: Any) -> None:
    """Undo `refuse_saving`."""
    for kind in CALLBACKS:
        model.remove_callbacks_with_key(kind, KEY)
    model.__dict__.pop(SAVED, None)


def on_clone(model: Any, clone: Any) -> None:
    """ON_CLONE callback: clones do not inherit a method set on one MODEL."""
    if hasattr(type(clone), SAVED):
        setattr(clone, SAVED, refuse)


def on_load(model: Any, device: Any, memory: Any, force_patch_weights: bool, *args: Any) -> None:
    """ON_LOAD callback: older hosts force patches into the weights only to save or compare them, never to sample.

    The patchers of other packs may do it at every load, as ComfyUI-GGUF's does.
    """
    if force_patch_weights and type(model).load.__module__ == ModelPatcher.__module__:
        refuse()


def refuse(*args: Any, **kwargs: Any) -> None:
    """Replaces the method of newer hosts.

    Raises:
        ExpertError: always.
    """
    raise ExpertError(
        "This model has DCM experts attached, which ComfyUI's save nodes cannot save: the file would contain only the base model. "
        "Save the model from before DCM Attach Experts, keep the expert files, and attach them again after loading. To split a DCM "
        "release into a base file and an expert file, use DCM Convert Checkpoint."
    )
