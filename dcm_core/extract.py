"""Extract a low-rank expert from a full fine-tune and its base: the truncated SVD of the difference, layer by layer."""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from .errors import CheckpointError, counted, name_some
from .experts.expert import Expert, LowRank, write_expert
from .families.keymap import Shape
from .files.checkpoint import Layout
from .files.native import NativeView
from .files.tensor_file import Progress
from .files.unfinished import check_room
from .text import one_line

OVERSAMPLING = 16
POWER_ITERATIONS = 4
# With fewer rows or columns than this, a full SVD is as fast, and it is exact.
SMALL = 512


@dataclass(frozen=True)
class LayerReport:
    """How well a layer's difference is kept: rank, the kept share of its energy (squared norm), and its norm."""

    rank: int
    energy: float
    norm: float

    @property
    def error(self) -> float:
        """Relative error of the difference, in the Frobenius norm."""
        return max(0.0, 1 - self.energy) ** 0.5


@dataclass(frozen=True)
class Extraction:
    """The result of an extraction."""

    path: Path
    layers: dict[str, LayerReport] = field(default_factory=dict)
    full: tuple[str, ...] = ()
    unchanged: int = 0

    @property
    def energy(self) -> float:
        """The kept share of the energy of all low-rank layers."""
        total = sum(layer.norm**2 for layer in self.layers.values())
        return sum(layer.energy * layer.norm**2 for layer in self.layers.values()) / total if total else 1.0

    def __str__(self) -> str:
        worst = sorted(self.layers.items(), key=lambda item: item[1].energy)[:3]
        lines = [
            f"{self.path}: {counted(len(self.layers), 'layer')} at rank {max((r.rank for r in self.layers.values()), default=0)}, "
            f"{self.energy:.2%} of the difference's energy kept",
            f"{counted(len(self.full), 'tensor')} kept in full (norms, biases, ...), {self.unchanged} unchanged",
        ]
        lines += [f"  least kept: {name} {layer.energy:.2%} (error {layer.error:.3f})" for name, layer in worst]
        return "\n".join(lines)

    def table(self) -> str:
        """One line for each layer: name, rank, energy kept, relative error."""
        return "\n".join(
            f"{one_line(n)}\t{r.rank}\t{r.energy:.4%}\t{r.error:.4f}" for n, r in sorted(self.layers.items())
        )


def extract_lora(
    tuned: str | os.PathLike,
    base: str | os.PathLike,
    out: str | os.PathLike,
    rank: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    seed: int = 0,
    progress: Progress | None = None,
    overwrite: bool = False,
) -> Extraction:
    """Write the semantic expert `tuned - base` as a LoRA of `rank` (lower if a layer is smaller).

    Matrices become low-rank updates. Every other changed tensor is kept in full. One layer is in memory at a time,
    plus the result.

    Args:
        tuned, base: model files of one family in any layout. For a release, its semantic base is used.
        dtype: dtype of the written LoRA.
        device: device that runs the decompositions.
        seed: seed of the randomised decomposition.

    Raises:
        CheckpointError: the files are of different models, or do not differ.
    """
    if rank < 1:
        raise CheckpointError(f"rank is {rank}; expected 1 or more (released experts: 128).")
    out = Path(out)
    if out.resolve() in (Path(tuned).resolve(), Path(base).resolve()):
        raise CheckpointError(f"{out} is one of the inputs. Choose another name for the LoRA.")
    _check_device(device)
    if out.exists() and not overwrite:
        raise CheckpointError(f"{out} already exists. Choose another name, or allow overwriting.")
    new, old = NativeView(tuned), NativeView(base)
    _check_same(new, old)
    check_room({out: dtype.itemsize * sum(_most_values(name, new.shape(name), rank) for name in new.pieces)})
    layers: dict[str, LayerReport] = {}
    low_rank: dict[str, tuple[LowRank, ...]] = {}
    diff: dict[str, Tensor] = {}
    generator = torch.Generator(device).manual_seed(seed)
    for name, difference in _differences(new, old, progress):
        module, _, param = name.rpartition(".")
        if difference.ndim == 2 and param == "weight":
            down, up, layers[module] = truncate(difference.to(device), rank, generator)
            low_rank[module] = (LowRank(down.to(dtype).cpu(), up.to(dtype).cpu(), scale=1.0),)
        else:
            diff[name] = difference.to(dtype)
    if not low_rank and not diff:
        raise CheckpointError(
            f"{tuned} and {base} have the same weights, so there is nothing to extract. Check which files you chose."
        )
    expert = Expert(new.family.name, "semantic", low_rank, diff=diff, boundary=new.family.preset.boundary)
    write_expert(out, expert, {name: new.shape(name) for name in new.pieces})
    return Extraction(out, layers, tuple(sorted(diff)), len(new.pieces) - len(low_rank) - len(diff))


def _most_values(name: str, shape: Shape, rank: int) -> int:
    """The largest number of values that a tensor's difference may need."""
    if len(shape) == 2 and name.endswith(".weight"):
        return min(rank, *shape) * sum(shape)
    return math.prod(shape)


def _check_device(device: torch.device | str) -> None:
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(
            f"The device {device} cannot be used ({reason}). Choose cpu, or a device of this machine."
        ) from error


def _check_same(new: NativeView, old: NativeView) -> None:
    if new.family is not old.family:
        raise CheckpointError(
            f"The tuned model is {new.family.title}, but the base is {old.family.title}. Choose two files of one model."
        )
    odd = set(new.pieces) ^ set(old.pieces)
    odd |= {name for name in set(new.pieces) & set(old.pieces) if new.shape(name) != old.shape(name)}
    if odd:
        raise CheckpointError(
            f"{new.file.path} and {old.file.path} differ in the name or shape of {counted(len(odd), 'tensor')} ({name_some(odd)}). "
            "Choose a fine-tune and the base it was made from."
        )
    if Layout.EXPERT in (new.contents.layout, old.contents.layout):
        raise CheckpointError("One of the files is already a LoRA. Choose two full models.")


def _differences(new: NativeView, old: NativeView, progress: Progress | None) -> Iterator[tuple[str, Tensor]]:
    """(name, tuned - base) of every changed tensor, in float32."""
    for done, name in enumerate(new.pieces):
        difference = new.read(name).float() - old.read(name).float()
        if bool(difference.any()):
            yield name, difference
        if progress is not None:
            progress(done + 1, len(new.pieces))


def truncate(matrix: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor, LayerReport]:
    """The best approximation `up @ down` of a matrix (out, in): down (rank, in), up (out, rank), and a report.

    It is exact for small matrices, else randomised with power iterations (Halko et al., arXiv 0909.4061). Both factors
    include the square root of the singular values.
    """
    rank = min(rank, *matrix.shape)
    if min(matrix.shape) <= max(SMALL, rank + OVERSAMPLING):
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        v = vh.T
    else:
        with torch.random.fork_rng(devices=[matrix.device] if matrix.is_cuda else []):
            torch.manual_seed(int(torch.randint(2**31, (1,), generator=generator, device=generator.device)))
            u, s, v = torch.svd_lowrank(matrix, q=rank + OVERSAMPLING, niter=POWER_ITERATIONS)
    root = s[:rank].sqrt()
    norm = float(matrix.norm())
    # float64 on the CPU, since some devices do not support it
    energy = min(1.0, float((s[:rank].cpu().double() ** 2).sum()) / norm**2) if norm else 1.0
    return (v[:, :rank] * root).T.contiguous(), (u[:, :rank] * root).contiguous(), LayerReport(rank, energy, norm)
