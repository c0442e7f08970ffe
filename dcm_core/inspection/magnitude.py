"""How much an expert changes each block of its model: Frobenius norms, one layer at a time.

The product up·down is never computed: ‖up·down‖² is the sum of the elementwise product of the two Gram matrices.
"""

import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import counted, name_some
from ..experts.expert import LowRank
from ..experts.match import Target, expert_part
from ..experts.updates import Update, file_updates
from ..families import Family
from ..families.keymap import fuse
from ..files.checkpoint import Contents, Layout, recognise
from ..files.metadata import read_metadata
from ..files.tensor_file import Progress, TensorFile

# (native tensor name, first row, number of rows) -> these rows of the base; None if they are not available as plain numbers.
Base = Callable[[str, int, int], Tensor | None]
# (group, index): ("in", 0), ("blocks", 3), ("out", 0)
Column = tuple[str, int]

BEFORE, AFTER = "in", "out"
# Values of a matrix that are converted to float32 at once.
ROWS = 1024


@dataclass(frozen=True)
class Change:
    """An update in numbers.

    Attributes:
        norm: norm of the change; None for a replaced tensor without its base.
        base: norm of the changed weights; None if they are not available.
    """

    name: str
    norm: float | None
    base: float | None


@dataclass(frozen=True)
class Profile:
    """How much each expert changes each block.

    Attributes:
        groups: group -> number of its columns, in the model's order.
        experts: expert -> column -> size of the change.
        relative: whether sizes are relative to the norm of the changed weights, instead of plain norms.
        unmeasured: replaced tensor without its base -> its column.
        broken: tensors with NaN or infinite values.
    """

    groups: Mapping[str, int]
    experts: Mapping[str, Mapping[Column, float]]
    relative: bool
    unmeasured: Mapping[str, Column]
    broken: tuple[str, ...]

    def summary(self) -> dict[str, str | None]:
        """A summary in words, by subject."""
        waiting, broken = counted(len(self.unmeasured), "replaced tensor"), counted(len(self.broken), "tensor")
        return {
            "change": "; ".join(self._line(name, sizes) for name, sizes in self.experts.items() if sizes) or None,
            "not shown": f"{waiting}, without a plain base to compare with: {name_some(self.unmeasured)}"
            if self.unmeasured
            else None,
            "broken": f"NaN or infinite values in {broken}: {name_some(self.broken)}" if self.broken else None,
        }

    def _line(self, name: str, sizes: Mapping[Column, float]) -> str:
        most = max(sizes, key=sizes.__getitem__)
        mean = sum(sizes.values()) / len(sizes)
        unit = "" if self.relative else "norm "
        return f"{name} {unit}{self._number(mean)} on average, most in {in_words(most)} ({self._number(sizes[most])})"

    def _number(self, size: float) -> str:
        return f"{100 * size:.3g}%" if self.relative else f"{size:.3g}"


def in_words(column: Column) -> str:
    """The name of a column: `double block 3`, `the embedders` or `the output head`."""
    group, index = column
    return {BEFORE: "the embedders", AFTER: "the output head"}.get(
        group, f"{group.removesuffix('s').replace('_', ' ')} {index}"
    )


def norm(tensor: Tensor) -> float:
    """Frobenius norm, on the tensor's own device."""
    tensor = tensor.detach()
    return float(torch.linalg.vector_norm(tensor if is_plain(tensor.dtype) else tensor.float(), dtype=torch.float32))


def difference_norm(new: Tensor, old: Tensor) -> float:
    """Norm of the difference of two tensors, some rows at a time. They may be on different devices."""
    rows = zip(*(torch.atleast_1d(tensor.detach()).split(ROWS) for tensor in (new, old)), strict=True)
    return math.hypot(*(norm(a.cpu().float() - b.cpu().float()) for a, b in rows))


def added_norm(low_rank: LowRank | None, diff: Tensor | None = None) -> float:
    """Frobenius norm of `scale * up @ down + diff`.

    It is computed in float64, as float32 leaves noise if terms nearly cancel. The CPU does it: some devices lack float64.
    """
    square = norm(diff) ** 2 if diff is not None else 0.0
    if low_rank is not None:
        down, up = (tensor.detach().cpu().double().flatten(1) for tensor in (low_rank.down, low_rank.up))
        square += low_rank.scale**2 * float(((up.T @ up) * (down @ down.T)).sum())
        if diff is not None:
            square += 2 * low_rank.scale * float(((up.float().T @ diff.detach().cpu().float().flatten(1)) * down).sum())
    return math.sqrt(max(0.0, square)) if math.isfinite(square) else square


def measure(update: Update, base: Base, strength: float = 1.0) -> Change:
    """An update's norm, and the norm of the weights it changes."""
    own = base(update.name, update.start, update.rows)
    if update.replaced is None:
        size = added_norm(update.total, update.diff)
    else:
        size = None if own is None else difference_norm(update.replaced, own)
    return Change(update.name, None if size is None else abs(strength) * size, None if own is None else norm(own))


def is_plain(dtype: torch.dtype) -> bool:
    """True for plain numbers. fp8 weights may need separate scales."""
    return dtype.is_floating_point and dtype.itemsize > 1


def no_base(name: str, start: int, rows: int) -> None:
    """A `Base` without any weights."""


def release_base(file: TensorFile, contents: Contents) -> Base:
    """The base in the same file, read on demand."""

    def rows_of(name: str, start: int, rows: int) -> Tensor | None:
        pieces, row = [], 0
        for piece in contents.matched.get(name, ()):
            if start <= row < start + rows:
                pieces.append(replace(piece, part=None))
            row += file.shapes[piece.source][0]
        if not pieces or not all(is_plain(file.dtypes[piece.source]) for piece in pieces):
            return None
        return torch.cat([fuse([piece], {piece.source: file.read(piece.source)}) for piece in pieces])

    return rows_of


def file_profile(
    path: str | os.PathLike,
    target: Target | None = None,
    base: Base | None = None,
    progress: Progress | None = None,
) -> Profile | None:
    """How much the expert in a file changes each block; None if it has no expert of a known family.

    Args:
        target, base: the model to compare with, and its weights. They are not used if the expert does not fit; a release
            has its own base.

    Raises:
        CheckpointError: the file cannot be read, or is incomplete or mixed up.
        ExpertError: metadata or settings cannot be read.
    """
    file = TensorFile(path)
    contents = recognise(file)
    family, expert = expert_part(file, contents)
    if family is None or not expert:
        return None
    role = read_metadata(file.metadata).side or "expert"
    keys = {name: file.shapes[key] for name, key in expert.items()}
    shapes = target.shapes if target is not None and target.takes(keys, family) else None
    if contents.layout is Layout.RELEASE:
        role, shapes, base = "detail", contents.native_shapes(file), release_base(file, contents)
    elif base is None or shapes is None:
        base = no_base
    changes = [measure(update, base) for update in file_updates(file, contents, shapes, progress)]
    return make_profile({role: changes}, family, shapes or ())


def column_of(name: str, family: Family) -> Column:
    """The column in which a native tensor is shown."""
    for group in family.block_lists:
        if match := re.match(rf"{group}\.(\d+)\.", name):
            return group, int(match[1])
    return (AFTER if name.startswith(f"{family.head}.") else BEFORE), 0


def make_profile(changes: Mapping[str, Sequence[Change]], family: Family, names: Iterable[str] = ()) -> Profile:
    """Combine changes by block: the root of the sum of squares.

    Sizes are relative only if all base weights are available, so that bars stay comparable.

    Args:
        changes: expert -> its changes.
        names: all native tensor names of the model, for its number of blocks.
    """
    every = [change for found in changes.values() for change in found]
    broken = {c.name for c in every if not math.isfinite((c.norm or 0) + (c.base or 0))}
    unmeasured = {c.name: column_of(c.name, family) for c in every if c.norm is None}
    depth = {BEFORE: 1, **dict.fromkeys(family.block_lists, 0), AFTER: 1}
    for name in (*names, *(change.name for change in every)):
        group, index = column_of(name, family)
        depth[group] = max(depth[group], index + 1)
    sums: dict[str, dict[Column, list[float]]] = {expert: {} for expert in changes}
    relative = bool(every) and all(change.base is not None for change in every)
    for expert, found in changes.items():
        for change in found:
            if change.name not in broken and change.norm is not None:
                total = sums[expert].setdefault(column_of(change.name, family), [0.0, 0.0])
                total[0] += change.norm**2
                total[1] += (change.base or 0) ** 2
    # a base of zeros cannot be divided by
    relative = relative and all(base for columns in sums.values() for _, base in columns.values())
    experts = {
        expert: {column: math.sqrt(own / base if relative else own) for column, (own, base) in columns.items()}
        for expert, columns in sums.items()
    }
    return Profile(depth, experts, relative, unmeasured, tuple(sorted(broken)))
