"""ComfyUI's nodes that save a MODEL write its base alone: one with experts says so instead."""

from typing import Any

from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP

from ...dcm_core.errors import ExpertError
from .experts.route import KEY

CALLBACKS = (CallbacksMP.ON_LOAD, CallbacksMP.ON_CLONE)
# What newer hosts' save nodes ask a MODEL for.
SAVED = "state_dict_for_saving"


def refuse_saving(model: Any) -> None:
    """Have this MODEL and its clones refuse to be saved, on hosts of either kind."""
    model.add_callback_with_key(CallbacksMP.ON_LOAD, KEY, on_load)
    model.add_callback_with_key(CallbacksMP.ON_CLONE, KEY, on_clone)
    on_clone(model, model)


def allow_saving(model: Any) -> None:
    """Undo `refuse_saving`."""
    for kind in CALLBACKS:
        model.remove_callbacks_with_key(kind, KEY)
    model.__dict__.pop(SAVED, None)


def on_clone(model: Any, clone: Any) -> None:
    """ON_CLONE callback: a method that was put on one MODEL does not go to its clones by itself."""
    if hasattr(type(clone), SAVED):
        setattr(clone, SAVED, refuse)


def on_load(model: Any, device: Any, memory: Any, force_patch_weights: bool, *args: Any) -> None:
    """ON_LOAD callback: older hosts write all patches into the weights to save or compare them, and never to sample.

    Other packs' patchers may do so at every load, as ComfyUI-GGUF's.
    """
    if force_patch_weights and type(model).load.__module__ == ModelPatcher.__module__:
        refuse()


def refuse(*args: Any, **kwargs: Any) -> None:
    """Stands for the method of newer hosts.

    Raises:
        ExpertError: always.
    """
    raise ExpertError(
        "This model carries DCM experts, which ComfyUI's save nodes leave out: the file would hold the base model alone. Save the model "
        "from before DCM Attach Experts, keep the expert files, and attach them again after loading. To split a DCM release into "
        "a base file and an expert file, use DCM Convert Checkpoint."
    )
