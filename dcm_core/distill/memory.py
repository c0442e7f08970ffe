"""What a run will need in memory, told before its first step.

    peak = trained x (weight + gradient + 2 AdamW moments + average) + videos x tokens x bytes a token + base

The bytes a token are measured on the model itself: two short backward graphs are built, and what they keep is counted.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from .backbone import Backbone, Text
from .config import TrainingConfig, TrainingError
from .discriminator import Discriminator
from .trainee import Trainee

GIB = 2**30
FLOAT32 = 4


@dataclass(frozen=True)
class Memory:
    """Bytes by what they are for."""

    base: int
    trained: int
    activations: int

    @property
    def beside_base(self) -> int:
        """What has to be free when the base is wherever the host put it."""
        return self.trained + self.activations

    def __str__(self) -> str:
        parts = {"base": self.base, "trained tensors and optimiser": self.trained, "activations": self.activations}
        listed = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items())
        return f"peak memory about {(self.base + self.beside_base) / GIB:.2f} GiB ({listed})"

    def check(self, available: int, config: TrainingConfig) -> None:
        """Refuse what cannot fit even with the base offloaded.

        Raises:
            TrainingError: with what to change.
        """
        if self.beside_base <= available:
            return
        fixes = ["fewer frames or smaller clips in the dataset"]
        if config.batch_size > 1:
            fixes.append(f"batch_size below {config.batch_size} (raise accumulate instead)")
        if not config.checkpointing:
            fixes.append("gradient checkpointing on")
        if config.rank == 0:
            fixes.append("a rank above 0 (a LoRA instead of a full fine-tune)")
        elif config.rank > 16:
            fixes.append(f"rank below {config.rank}")
        raise TrainingError(
            f"Training needs about {self.beside_base / GIB:.2f} GiB beside the base model, {available / GIB:.2f} GiB can be had. "
            f"Try {', '.join(fixes)}."
        )


def total(tensors: Iterable[Tensor]) -> int:
    """Bytes of all tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def estimate(
    backbone: Backbone,
    trainee: Trainee,
    discriminator: Discriminator | None,
    config: TrainingConfig,
    latent_shape: tuple[int, ...],
    text: Text,
    device: torch.device,
) -> Memory:
    """The peak of a training step on videos of `latent_shape` (channels, frames, height, width)."""
    copies = 4 + (config.ema_decay > 0)
    trained = copies * sum(value.numel() for _, value in trainee.named_parameters()) * FLOAT32
    if discriminator is not None:
        trained += 4 * total(discriminator.parameters())
    tokens = latent_shape[1] * -(-latent_shape[2] // 2) * -(-latent_shape[3] // 2)
    kept = _bytes_a_token(backbone, trainee, latent_shape[0], text, device)
    blocks = sum(len(backbone.module.get_submodule(name)) for name in backbone.family.block_lists)
    if config.checkpointing:
        width = backbone.module.get_submodule(backbone.family.text_module).out_features
        # one block at a time is computed again; of the others the inputs stay
        kept = kept / blocks + blocks * width * backbone.dtype.itemsize
    graphs = 2 if discriminator is not None else 1
    activations = int(graphs * config.batch_size * tokens * kept)
    return Memory(total(backbone.module.parameters()), trained, activations)


def _bytes_a_token(backbone: Backbone, trainee: Trainee, channels: int, text: Text, device: torch.device) -> float:
    """How much a student's backward graph grows with each token."""
    plain = Backbone(backbone.module, backbone.family, backbone.dtype, backbone.options)
    one = Text(text.context[:1], {name: value[:1] for name, value in text.extras.items()}).to(device)
    short, long = (_kept(plain, trainee, torch.zeros(1, channels, frames, 8, 8, device=device), one) for frames in (1, 3))
    return (long - short) / (2 * 16)


def _kept(backbone: Backbone, trainee: Trainee, x: Tensor, text: Text) -> int:
    weights = {value.untyped_storage().data_ptr() for value in backbone.module.parameters()}
    weights |= {value.untyped_storage().data_ptr() for _, value in trainee.named_parameters()}
    found: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        # held until counted: freed memory would be counted once for two tensors
        velocity = backbone.velocity(x, torch.ones(1, device=x.device), text, trainee.working)
        kept = sum(found.values())
        del velocity
    return kept
