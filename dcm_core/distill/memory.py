"""Estimate the memory of a run before its first step.

    peak = base + trained x (weight + EMA + 2 AdamW moments + gradient) + temporary tensors of a step

The last part is measured: a step runs on a video of zeros, and the tensors that are alive at the same time are counted.
Steps above `PROBE` tokens are extrapolated from smaller ones, as memory grows with tokens and, for the texts, with videos.
"""

import math
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .config import TrainingConfig, TrainingError

GIB = 2**30
# Sizes of the steps that are measured: (videos, frames, height, width) of latents, and the tokens of the largest.
FEW, MANY, TWO_VIDEOS = (1, 4, 32, 32), (1, 8, 32, 32), (2, 4, 32, 32)
PROBE = 2048
# Allowance for memory of the kernels themselves.
MARGIN = 1.05


@dataclass(frozen=True)
class Memory:
    """Memory in bytes by purpose.

    Attributes:
        base: the base model's weights.
        present: experts and discriminator, allocated before the first step.
        moments: the optimiser's moments, allocated in the first step.
        step: peak of temporary tensors in a step, including gradients.
    """

    base: int
    present: int
    moments: int
    step: int

    @property
    def coming(self) -> int:
        """Memory that has to be free when the run starts, not counting the base."""
        return self.moments + self.step

    @property
    def parts(self) -> dict[str, float]:
        """GiB by name."""
        sizes = {"base": self.base, "experts and optimiser": self.present + self.moments, "one step": self.step}
        return {name: size / GIB for name, size in sizes.items()}

    def __str__(self) -> str:
        listed = ", ".join(f"{name} {size:.2f}" for name, size in self.parts.items())
        return f"Peak memory about {sum(self.parts.values()):.2f} GiB ({listed})"

    def check(self, available: int, config: TrainingConfig) -> None:
        """Refuse a run that does not fit even with the base offloaded.

        Raises:
            TrainingError: there is not enough memory. The message says what to change.
        """
        if self.coming <= available:
            return
        fixes = ["use fewer frames or a smaller size in the dataset"]
        if config.batch_size > 1:
            fixes.append(f"lower batch_size from {config.batch_size} (and raise gradient accumulation instead)")
        if not config.gradient_checkpointing:
            fixes.append("turn gradient checkpointing on")
        elif not config.offload_activations:
            fixes.append("turn offload_activations on")
        if config.rank == 0:
            fixes.append("set rank above 0 (a LoRA instead of a full fine-tune)")
        elif config.rank > 16:
            fixes.append(f"lower rank from {config.rank}, and alpha in proportion")
        if config.optimizer == "adamw":
            fixes.append("set optimizer to adamw8bit")
        if config.adversarial:
            fixes.append("set adversarial_weight to 0")
        raise TrainingError(
            f"Training needs about {(self.present + self.coming) / GIB:.2f} GiB besides the base model, but only "
            f"{(self.present + available) / GIB:.2f} GiB are available. To need less: {'; '.join(fixes)}."
        )


class Alive(TorchDispatchMode):
    """Counts the bytes of live tensors on a device that were created inside the block. `most` is their peak."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._kind = device.type
        self.now = self.most = 0
        self._seen: dict[int, weakref.ref] = {}

    def __torch_dispatch__(
        self, function: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        # inputs that were not seen before existed before the block
        self._see((args, kwargs), counted=False)
        out = function(*args, **(kwargs or {}))
        self._see(out, counted=True)
        self.most = max(self.most, self.now)
        return out

    def _see(self, values: Any, counted: bool) -> None:
        for value in tree_leaves(values):
            # a quantised tensor of the host wraps other tensors
            if type(value) in (Tensor, nn.Parameter):
                storage = value.untyped_storage()
                if storage._cdata not in self._seen:
                    self._add(storage, storage.nbytes() if counted and storage.device.type == self._kind else 0)

    def _add(self, storage: torch.UntypedStorage, size: int) -> None:
        key = storage._cdata

        def gone(_: weakref.ref) -> None:
            del self._seen[key]
            self.now -= size

        self._seen[key] = weakref.ref(storage, gone)
        self.now += size


def total(tensors: Iterable[Tensor]) -> int:
    """Bytes of all tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def tokens_of(shape: tuple[int, ...]) -> int:
    """Number of tokens for latents of shape (videos, frames, height, width)."""
    videos, frames, height, width = shape
    return videos * frames * -(-height // 2) * -(-width // 2)


def step_size(step: Callable[[tuple[int, ...]], None], shape: tuple[int, ...], device: torch.device) -> int:
    """Peak of temporary memory of a step on latents of `shape` (videos, frames, height, width).

    Args:
        step: runs a step on latents of a shape. Its gradients are already allocated.
        device: where it runs. Tensors elsewhere, such as offloaded activations, are not counted.
    """
    tokens, videos = tokens_of(shape), shape[0]
    if tokens <= PROBE:
        return int(MARGIN * _measured(step, shape, device))
    little, much = (_measured(step, size, device) for size in (FEW, MANY))
    # the same number of tokens in two videos shows the cost of one more text
    text = max(0, _measured(step, TWO_VIDEOS, device) - much) if videos > 1 else 0
    a_token = max(0, much - little) / (tokens_of(MANY) - tokens_of(FEW))
    return math.ceil(MARGIN * (much + (tokens - tokens_of(MANY)) * a_token + (videos - 1) * text))


def _measured(step: Callable[[tuple[int, ...]], None], shape: tuple[int, ...], device: torch.device) -> int:
    with Alive(device) as alive:
        step(shape)
    return alive.most
