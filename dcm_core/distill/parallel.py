"""Train one expert in several processes, started by `torchrun` or `accelerate launch`. Gradients are averaged over them."""

import atexit
import os
import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..text import one_line
from .config import TrainingError

PATIENCE = timedelta(days=1)
T = TypeVar("T")


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

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, in the order of their ranks."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    @contextmanager
    def agreed(self) -> Iterator[Callable[[], None]]:
        """Nothing after the block runs unless it succeeds in all processes. Where one fails, all end, instead of waiting for it.

        The block itself must not wait for other processes. It gets a function that ends the agreement before its own end.

        Raises:
            TrainingError: the block failed in another process.
        """
        over = False

        def agree() -> None:
            nonlocal over
            if over:
                return
            over = True
            if failed := [words for words in self.gather("") if words]:
                raise TrainingError(f"The run ends here: {'; '.join(failed)}")

        try:
            yield agree
        except Exception as error:
            if not over:
                self.gather(
                    f"process {self.rank} of {self.count} on {socket.gethostname()} failed. {one_line(error, 1000)}"
                )
            raise
        if not over:
            agree()

    def from_first(self, make: Callable[[], T]) -> T:
        """What `make` returns in the first process. An error there ends all processes, as in `agreed`."""
        made: list[Any] = [None]
        with self.agreed():
            if self.first:
                made = [make()]
        if self.count > 1:
            dist.broadcast_object_list(made, src=0)
        return made[0]

    @torch.no_grad()
    def tensors_from_first(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The first process's tensors by name, on the CPU. What the others give is not used."""
        if self.count == 1:
            return tensors
        kinds = self.from_first(lambda: {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()})
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        received = {}
        for name, (shape, dtype) in kinds.items():
            tensor = (
                tensors[name].to(device).contiguous() if self.first else torch.empty(shape, dtype=dtype, device=device)
            )
            dist.broadcast(tensor, src=0)
            received[name] = tensor.cpu()
        return received

    def check_same(self, values: dict[str, str]) -> None:
        """Refuse processes that would train different things.

        Raises:
            TrainingError: a value differs between two processes. It is raised in all of them.
        """
        first, *others = self.gather((socket.gethostname(), values))
        for rank, (host, theirs) in enumerate(others, start=1):
            if names := [name for name in {**first[1], **theirs} if first[1].get(name) != theirs.get(name)]:
                raise TrainingError(
                    f"Process {rank} on {host} differs from process 0 on {first[0]} in: {', '.join(names)}. Give all processes the same "
                    "settings, clips and model files."
                )

    def sharing(self, folder: Path) -> tuple[int, int]:
        """This process's place among those that see the same files in `folder`, and their number. Nodes may have disks of their own.

        Raises:
            TrainingError: a process cannot write to its folder.
        """
        if self.count == 1:
            return 0, 1
        mark = folder / f"process_{self.rank}_{uuid4().hex}"
        names = self.gather(mark.name)
        with self.agreed():
            mark.touch()
        seen = self.gather([(folder / name).exists() for name in names])
        mark.unlink()
        group = [rank for rank in range(self.count) if seen[self.rank][rank] and seen[rank][self.rank]]
        return group.index(self.rank), len(group)


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
        # long enough for a process to encode its clips while the others wait
        nccl = device.type == "cuda" and dist.is_nccl_available()
        dist.init_process_group("nccl" if nccl else "gloo", timeout=PATIENCE)
        # a thread of gloo that still runs when the interpreter ends would abort a process that has done its work
        if not nccl:
            atexit.register(_leave)
    return Processes(dist.get_rank(), dist.get_world_size())


def _leave() -> None:
    """Leave the group, unless someone else already did."""
    if dist.is_initialized():
        dist.destroy_process_group()
