"""What a run will need in memory, told before its first step.

    peak = base + trained x (weight + EMA + 2 AdamW moments + gradient) + what else a step makes

The last is measured: a step is made on a video of zeros, and the tensors that are alive at once are counted. A step that
is larger than `PROBE` tokens follows from smaller ones, as it grows with the tokens and, for the texts, with the videos.
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
# The largest steps that are made only to be measured: (videos, frames, height, width) of latents, and the tokens of the largest.
FEW, MANY, TWO_VIDEOS = (1, 4, 32, 32), (1, 8, 32, 32), (2, 4, 32, 32)
PROBE = 2048
# Kernels hold some memory of their own.
MARGIN = 1.05


@dataclass(frozen=True)
class Memory:
    """Bytes by what they are for.

    Attributes:
        base: the base model's weights.
        present: experts and discriminator, which are there before the first step.
        moments: of the optimiser, there after the first step.
        step: the most that a step makes at once, gradients and all.
    """

    base: int
    present: int
    moments: int
    step: int

    @property
    def coming(self) -> int:
        """What has to be free when the run starts, wherever the host has put the base."""
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
        """Refuse what cannot fit even with the base offloaded.

        Raises:
            TrainingError: with what to change.
        """
        if self.coming <= available:
            return
        fixes = ["use fewer frames or a smaller size in the dataset"]
        if config.batch_size > 1:
            fixes.append(f"lower batch_size from {config.batch_size} (and raise gradient accumulation instead)")
        if not config.gradient_checkpointing:
            fixes.append("turn gradient checkpointing on")
        if config.rank == 0:
            fixes.append("set rank above 0 (a LoRA instead of a full fine-tune)")
        elif config.rank > 16:
            fixes.append(f"lower rank from {config.rank}, and alpha in proportion")
        raise TrainingError(
            f"Training needs about {(self.present + self.coming) / GIB:.2f} GiB beside the base model, but only "
            f"{(self.present + available) / GIB:.2f} GiB are available. To need less: {'; '.join(fixes)}."
        )


class Alive(TorchDispatchMode):
    """Counts the bytes of the tensors made inside the block that are still there; `most` is their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._seen: dict[int, weakref.ref] = {}

    def __torch_dispatch__(
        self, function: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        # what comes in unseen was there before
        self._see((args, kwargs), counted=False)
        out = function(*args, **(kwargs or {}))
        self._see(out, counted=True)
        self.most = max(self.most, self.now)
        return out

    def _see(self, values: Any, counted: bool) -> None:
        for value in tree_leaves(values):
            # a quantised tensor of the host is a shell around others
            if type(value) in (Tensor, nn.Parameter):
                storage = value.untyped_storage()
                if storage._cdata not in self._seen:
                    self._add(storage, storage.nbytes() if counted else 0)

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
    """Tokens of videos whose latents have the shape (videos, frames, height, width)."""
    videos, frames, height, width = shape
    return videos * frames * -(-height // 2) * -(-width // 2)


def step_size(step: Callable[[tuple[int, ...]], None], shape: tuple[int, ...]) -> int:
    """The most that a step on latents of `shape` (videos, frames, height, width) makes at once.

    Args:
        step: makes a step on latents of a shape; the gradients it adds to are there already.
    """
    tokens, videos = tokens_of(shape), shape[0]
    if tokens <= PROBE:
        return int(MARGIN * _measured(step, shape))
    little, much = _measured(step, FEW), _measured(step, MANY)
    # as many tokens in two videos: what one more text takes
    text = max(0, _measured(step, TWO_VIDEOS) - much) if videos > 1 else 0
    a_token = max(0, much - little) / (tokens_of(MANY) - tokens_of(FEW))
    return math.ceil(MARGIN * (much + (tokens - tokens_of(MANY)) * a_token + (videos - 1) * text))


def _measured(step: Callable[[tuple[int, ...]], None], shape: tuple[int, ...]) -> int:
    with Alive() as alive:
        step(shape)
    return alive.most
