"""The host's MODEL as the base of a training run: its weights, its memory, and the data it can be trained on."""

import atexit
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import comfy.lora
import comfy.model_management
import comfy.ops
import torch
from comfy.ldm.modules.attention import attention_pytorch
from torch import Tensor

from ....dcm_core.distill.backbone import Backbone
from ....dcm_core.distill.config import TrainingConfig, TrainingError
from ....dcm_core.distill.data.dataset import Dataset
from ....dcm_core.distill.learner import moments_size
from ....dcm_core.distill.memory import Memory
from ....dcm_core.distill.parallel import ALONE, Processes
from ....dcm_core.distill.signals import held_back
from ....dcm_core.distill.student import WeightOf
from ....dcm_core.distill.trainer import Trainer
from ....dcm_core.errors import counted
from ....dcm_core.experts.expert import FILE_PREFIX
from ....dcm_core.families import Family
from ....dcm_core.text import LOGGER
from ..compat import is_oom, key_patches
from ..experts.attach import compute_dtype, detach_experts, diffusion_model, module_shapes, require_family
from ..report import tell
from ..sampling.run import check_text
from .encoders import unload
from .image import check_image, check_image_values

logger = logging.getLogger(LOGGER)

# How long to wait for a step and its checkpoint when the process ends.
EXIT_SECONDS = 120.0


def gradient_attention(_: Any, *args: Any, **kwargs: Any) -> Tensor:
    """The host's attention with gradients, whichever it uses for sampling."""
    return attention_pytorch(*args, **kwargs)


def make_backbone(model: Any, family: Family, config: TrainingConfig) -> Backbone:
    """The transformer of a loaded MODEL."""
    return Backbone(
        diffusion_model(model).requires_grad_(False),
        family,
        compute_dtype(model),
        lambda: {"optimized_attention_override": gradient_attention},
        config.gradient_checkpointing,
        config.offload_activations,
    )


@contextmanager
def differentiable(base: Any) -> Iterator[None]:
    """Within the block, the base's layers have gradients, however and wherever they are stored.

    The host's fp8 matrix products have none. It also copies offloaded weights to the device in buffers that it reuses while a
    backward pass still needs them.
    """
    quantised = [module for module in diffusion_model(base).modules() if hasattr(module, "_full_precision_mm")]
    changes = [(module, "_full_precision_mm", True) for module in quantised]
    changes += [(comfy.ops, "fp8_linear", _nothing), (comfy.model_management, "get_offload_stream", _nothing)]
    before = [getattr(owner, name) for owner, name, _ in changes]
    try:
        for owner, name, value in changes:
            setattr(owner, name, value)
        yield
    finally:
        for (owner, name, _), value in zip(changes, before, strict=True):
            setattr(owner, name, value)


def _nothing(*_: Any) -> None:
    """Makes the host take its default path."""


@contextmanager
def interrupted_at_exit() -> Iterator[None]:
    """On Ctrl+C, interrupts the run and waits until it has saved; the host's server does not wait for its worker."""
    over = threading.Event()

    def leave() -> None:
        # a second Ctrl+C would end the process while it writes
        with held_back():
            comfy.model_management.interrupt_current_processing(True)
            logger.info("Saving the training run before ComfyUI exits. This takes at most %.0f s.", EXIT_SECONDS)
            over.wait(EXIT_SECONDS)

    atexit.register(leave)
    try:
        yield
    finally:
        over.set()
        atexit.unregister(leave)


def training_base(model: Any) -> Any:
    """A clone of MODEL with only its weight patches (LoRAs), which the teacher has too.

    Raises:
        TrainingError: weights that the host may unload, and cannot load in another way.
    """
    base = detach_experts(model)
    if hasattr(base, "get_non_dynamic_delegate"):
        # newer hosts free the memory of weights when they need it; the delegate loads the file again without that
        try:
            base = base.get_non_dynamic_delegate()
        except RuntimeError as error:
            raise TrainingError(
                f"This ComfyUI may unload the model's weights during training and cannot keep them loaded ({error}). "
                "Load the model with DCM Load Model or Load Diffusion Model, or start ComfyUI with --disable-dynamic-vram."
            ) from error
    # compiled blocks and the like would hide the layers that are trained
    base.object_patches = {}
    return base


def clear_device(base: Any) -> None:
    """Unload every other model from the base's device, as far as the host can: a run needs it for hours."""
    loaded = [entry.model for entry in comfy.model_management.current_loaded_models if entry.device == base.load_device]
    unload([patcher for patcher in loaded if patcher is not None and not base.is_clone(patcher)])


def hold(base: Any, needed: int) -> None:
    """Load the base with its own patches and keep `needed` bytes free, offloading parts of the base if necessary."""
    comfy.model_management.load_models_gpu([base], memory_required=needed)
    missing = needed - comfy.model_management.get_free_memory(base.load_device)
    if missing > 0 and offloadable(base):
        base.partially_unload(base.offload_device, missing)


def offloadable(base: Any) -> int:
    """Bytes of the base that could be offloaded."""
    return base.loaded_size() if base.load_device != base.offload_device else 0


def check_fits(
    base: Any, config: TrainingConfig, trained: int, beside: int, device: torch.device, processes: Processes = ALONE
) -> int:
    """Refuse a run whose own tensors cannot fit, before they are on the device. What a step needs is not known yet.

    Args:
        trained: bytes of the trained tensors, in float32. EMA, two moments and a gradient of each are added.
        beside: bytes of what else stays on the device: the discriminator and the expert under the trained one.
        processes: those that divide all of it among them, if they do.

    Returns:
        Bytes on the device before the first step.

    Raises:
        TrainingError: says what to change.
    """
    trained, beside = trained // processes.parts, beside // processes.parts
    present = (1 + (config.ema_decay > 0)) * trained + beside
    available = comfy.model_management.get_free_memory(device) + offloadable(base)
    moments = moments_size(config.optimizer, [trained // 4])
    Memory(base=0, present=0, moments=moments, step=present + trained).check(available, config)
    return present


def make_room(trainer: Trainer, base: Any, config: TrainingConfig, node_id: str | None = None) -> Memory:
    """Say how much memory the run needs, refuse what cannot fit, and offload as much of the base as necessary.

    Raises:
        TrainingError: too little memory even with the base offloaded, or a base without gradients.
    """
    while True:
        memory = _measure(trainer, base)
        free, loaded = comfy.model_management.get_free_memory(trainer.device), offloadable(base)
        # another program may use the GPU of one process alone
        with trainer.processes.agreed() if trainer.processes.sharded else nullcontext():
            memory.check(free + loaded, config)
        if trainer.processes.sharded:
            # its parts are on the device, and the host knows nothing of them
            break
        hold(base, memory.coming)
        # offloaded weights are copied back for each step, which may make it larger
        if offloadable(base) >= loaded:
            break
    logger.info("%s", memory)
    tell(str(memory), node_id)
    return memory


def _measure(trainer: Trainer, base: Any) -> Memory:
    """The memory that the run needs, with the base offloaded if a step does not fit otherwise."""
    memory = _try(trainer)
    if memory is None and offloadable(base):
        base.partially_unload(base.offload_device, offloadable(base))
        memory = _try(trainer)
    if memory is None:
        raise TrainingError(
            "Not enough memory for even a small training step. Turn gradient_checkpointing on, lower rank, or load the base in fp8."
        )
    return memory


def _try(trainer: Trainer) -> Memory | None:
    """The memory that the run needs; None if there is too little memory to find out."""
    try:
        return trainer.memory()
    except RuntimeError as error:
        if is_oom(error):
            return None
        raise TrainingError(
            f"The model cannot be trained the way it is loaded ({error}). Load the model with weight_dtype default or fp8_e4m3fn. "
            "fp8_e4m3fn_fast cannot be trained."
        ) from error


def own_weights(base: Any) -> WeightOf:
    """Native tensor name -> its value in float32 on the CPU, dequantised and with the MODEL's own patches."""
    patches, shapes = key_patches(base), module_shapes(base)

    def weight_of(name: str) -> Tensor:
        (stored, convert), *patched = patches[FILE_PREFIX + name]
        plain = convert(stored.detach()).to(device="cpu", dtype=torch.float32, copy=True)
        if tuple(plain.shape) != shapes[name]:
            raise TrainingError(
                f"{name} is stored in a format that training cannot read ({type(stored.data).__name__}). "
                "Load the base in float32, float16, bfloat16 or fp8."
            )
        return comfy.lora.calculate_weight(patched, plain, FILE_PREFIX + name)

    return weight_of


def check_data(model: Any, data: Dataset, vae: Any = None) -> None:
    """Refuse data for another model, and a VAE that cannot decode the samples.

    Raises:
        DCMError: latents, text embeddings or image conditionings that do not fit the model, or a VAE with other latents.
    """
    channels = model.model.latent_format.latent_channels
    decoded = getattr(vae, "latent_channels", channels)
    if decoded != channels:
        raise TrainingError(
            f"The VAE's latents have {counted(decoded, 'channel')}, but the model takes {channels}. Connect the model's own VAE."
        )
    for bucket in data.buckets:
        shape = data.shape(bucket[0])
        if shape[0] != channels:
            raise TrainingError(
                f"The dataset's latents have {counted(shape[0], 'channel')}, but the model takes {channels}. "
                "Encode the clips with the model's own VAE."
            )
    check_image(model, image := data.image(0))
    if image:
        check_image_values(model, image, data.shape(0))
    family = require_family(model)
    for text in (data.conditioning(0), data.unconditional()):
        check_text(model, text, "dataset")
        if not family.text_extras and isinstance(text[0][1].get("pooled_output"), Tensor):
            raise TrainingError(
                f"The dataset was encoded for another model: its captions have pooled embeddings, which {family.title} does not use. "
                f"Encode the clips with the VAE and the text encoder of {family.title}."
            )
