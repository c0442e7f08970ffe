"""Divide trained tensors among all processes, so that each keeps and updates its part only.

A divided tensor is a `Shard`: a flat part of it, on which optimiser and EMA work as on any tensor. `whole` puts it together where
it is used, and its gradient comes back as the mean over all processes, divided in the same way. In the layers of a block with
gradient checkpointing, a complete tensor lives as long as the block's computation.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..families.keymap import Shape
from .parallel import Processes


class Shard(nn.Parameter):
    """This process's part of a tensor: flat, and padded with zeros so that all processes have parts of the same size."""

    complete: torch.Size
    processes: Processes

    @classmethod
    def of(cls, tensor: Tensor, processes: Processes, device: torch.device) -> "Shard":
        """This process's part of a complete tensor."""
        shard = cls(torch.empty(-(-tensor.numel() // processes.count), dtype=tensor.dtype, device=device), False)
        shard.complete, shard.processes = tensor.shape, processes
        shard.fill(tensor)
        return shard.requires_grad_(tensor.requires_grad)

    def like(self, part: Tensor) -> "Shard":
        """The same part of another tensor of this shape."""
        shard = type(self)(part, part.requires_grad)
        shard.complete, shard.processes = self.complete, self.processes
        return shard

    def part_of(self, tensor: Tensor) -> Tensor:
        """The same part of another complete tensor of this shape."""
        return type(self).of(tensor, self.processes, self.device).data

    @torch.no_grad()
    def fill(self, tensor: Tensor) -> None:
        """Copy this process's part of a complete tensor."""
        part = tensor.reshape(-1)[self.processes.rank * self.numel() :][: self.numel()]
        self[: part.numel()] = part
        self[part.numel() :] = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> "Shard":
        memo[id(self)] = copied = self.like(self.detach().clone()).requires_grad_(self.requires_grad)
        return copied


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, shape: torch.Size, count: int, dtype: torch.dtype) -> Tensor:
        ctx.size, ctx.count, ctx.dtype = part.numel(), count, part.dtype
        return _gathered(part.to(dtype), count)[: shape.numel()].view(shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        flat = gradient.new_zeros(ctx.size * ctx.count, dtype=ctx.dtype)
        flat[: gradient.numel()] = gradient.reshape(-1)
        return _scattered_mean(flat, ctx.count), None, None, None


def _gathered(part: Tensor, count: int) -> Tensor:
    out = part.new_empty(part.numel() * count)
    # zeros that stand for moments before the first step are expanded, which NCCL refuses
    dist.all_gather_into_tensor(out, part.contiguous())
    return out


def _scattered_mean(flat: Tensor, count: int) -> Tensor:
    out = flat.new_empty(flat.numel() // count)
    dist.reduce_scatter_tensor(out, flat)
    return out.div_(count)


def whole(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The complete tensor, in `dtype`. All processes call it for the same tensors in the same order."""
    dtype = dtype or tensor.dtype
    if isinstance(tensor, Shard):
        return _Whole.apply(tensor, tensor.complete, tensor.processes.count, dtype)
    return tensor.to(dtype)


def complete_size(tensors: Iterable[Tensor]) -> int:
    """Bytes of the complete tensors."""
    return sum(math.prod(complete_shape(tensor)) * tensor.element_size() for tensor in tensors)


def complete_shape(tensor: Tensor) -> Shape:
    """The shape of the complete tensor."""
    return tuple(tensor.complete if isinstance(tensor, Shard) else tensor.shape)


@torch.no_grad()
def fill(tensor: Tensor, values: Tensor) -> None:
    """Copy values into a tensor, or its part of them into a shard."""
    tensor.fill(values) if isinstance(tensor, Shard) else tensor.copy_(values)


def divide(root: nn.Module, processes: Processes, device: torch.device) -> None:
    """Divide the matrices of all layers among the processes. The rest is copied to the device: it is not worth the communication."""
    for owner in root.modules():
        for name, value in owner._parameters.items():
            if name == "weight" and value.ndim > 1:
                owner._parameters[name] = Shard.of(value, processes, device)
            elif value is not None:
                copied = value.detach().to(device, copy=True)
                owner._parameters[name] = nn.Parameter(copied, value.requires_grad)


@torch.no_grad()
def collected(tensors: Mapping[str, Tensor], processes: Processes) -> dict[str, Tensor]:
    """The complete tensors on the CPU of the first process; nothing on the others. All processes call it."""
    found = {}
    for name, tensor in tensors.items():
        complete = whole(tensor)
        if processes.first:
            found[name] = complete.cpu()
    return found


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], most: float) -> float:
    """Scale the gradients down so that their norm, over all processes, is at most `most`.

    Returns:
        Their norm before that.
    """
    parameters = list(parameters)
    shards = [parameter for parameter in parameters if isinstance(parameter, Shard)]
    if not shards:
        return float(nn.utils.clip_grad_norm_(parameters, most))

    def square(some: list[nn.Parameter]) -> Tensor:
        norm = nn.utils.get_total_norm([parameter.grad for parameter in some if parameter.grad is not None])
        return norm.to(shards[0].device) ** 2

    dist.all_reduce(divided := square(shards))
    norm = (divided + square([parameter for parameter in parameters if not isinstance(parameter, Shard)])).sqrt()
    nn.utils.clip_grads_with_norm_(parameters, most, norm)
    return float(norm)
