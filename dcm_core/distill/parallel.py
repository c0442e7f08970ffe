"""Train one expert in several processes, started by `torchrun` or `accelerate launch`. Gradients are averaged over them."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

PATIENCE = timedelta(days=1)


@dataclass(frozen=True)
class Processes:
    """This process and the number of all processes.

    Attributes:
        sharded: whether base and trained tensors are divided among them. Then all of them run the model equally often.
    """

    rank: int = 0
    count: int = 1
    sharded: bool = False

    @property
    def first(self) -> bool:
        return self.rank == 0

    def share(self, items: list[int]) -> list[tuple[int, int]]:
        """(position, item) of this process's part of a global batch. Its length must be a multiple of `count`."""
        each = len(items) // self.count
        return list(enumerate(items))[self.rank * each : (self.rank + 1) * each]

    @property
    def parts(self) -> int:
        """The number of parts that tensors are divided into."""
        return self.count if self.sharded else 1

    @torch.no_grad()
    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace the gradients with their mean over all processes."""
        if self.count == 1:
            return
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            # one at a time; all at once would need a second copy of them
            dist.all_reduce(parameter.grad)
            parameter.grad /= self.count

    def mean(self, values: dict[str, float]) -> dict[str, float]:
        """The mean of all processes' values."""
        if self.count == 1:
            return values
        sums = _summed(list(values.values()))
        return {name: value / self.count for name, value in zip(values, sums, strict=True)}

    def any(self, value: bool) -> bool:
        """Whether it is true in one of the processes."""
        return value if self.count == 1 else bool(_summed([float(value)])[0])

    def evenly(self, batches: Iterable[tuple[Any, float]]) -> Iterator[tuple[Any, float]]:
        """Each batch with its share of the loss. Where all processes run the model equally often, a process whose batches are fewer
        repeats its last one with a share of 0."""
        if not self.sharded:
            yield from batches
            return
        for batch, share in batches:
            self.any(True)
            yield batch, share
        while self.any(False):
            yield batch, 0.0

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.count > 1:
            dist.barrier()

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """The first process runs the block, then the others."""
        if not self.first:
            self.wait()
        yield
        if self.first:
            self.wait()


ALONE = Processes()


def _summed(values: list[float]) -> list[float]:
    """The sums over all processes."""
    tensor = torch.tensor(values, dtype=torch.float64)
    if dist.get_backend() == "nccl":
        tensor = tensor.cuda()
    dist.all_reduce(tensor)
    return tensor.tolist()


def join(device: torch.device) -> Processes:
    """Join the processes of a launcher, which sets RANK and WORLD_SIZE. Without one, this process is alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Processes()
    if not dist.is_initialized():
        # long enough for one process to encode all clips while the others wait
        nccl = device.type == "cuda" and dist.is_nccl_available()
        dist.init_process_group("nccl" if nccl else "gloo", timeout=PATIENCE)
    return Processes(dist.get_rank(), dist.get_world_size())
