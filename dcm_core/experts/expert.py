"""An expert as data: what it adds to a base model or replaces in it, in the base's native names.

This module also defines our expert file: keys that ComfyUI's own LoRA loader applies exactly, plus metadata.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import counted
from ..families import Family
from ..families.keymap import Piece
from ..files.metadata import FORMAT, level_entries
from ..files.unfinished import Unfinished
from ..files.values import bytes_of, cast
from ..files.writing import write_stream
from ..pair import Pair
from ..routing import Side

FILE_PREFIX = "diffusion_model."


@dataclass(frozen=True)
class LowRank:
    """One low-rank update `scale * up @ down` of rows `start : start + up.shape[0]` of a linear's weight.

    Attributes:
        down: (rank, in).
        up: (rows, rank).
        scale: alpha / rank.
        start: first output row; above 0 inside a fused qkv or linear1.
    """

    down: Tensor
    up: Tensor
    scale: float
    start: int = 0

    @property
    def rank(self) -> int:
        return self.down.shape[0]


@dataclass(frozen=True)
class Expert:
    """An expert's tensors, and what is known about it.

    Attributes:
        low_rank: native module name -> its low-rank updates.
        replaced: native tensor name -> the tensor that replaces it.
        diff: native tensor name -> a full difference that is added to it.
        boundary: sigma where the detail expert takes over, if the file says so.
        timesteps: the schedule it was trained for, if the file says so.
        notes: what the user should know about how its file was read, one sentence each.
        pair: for an expert of one of two full models.
        source: name of its file; empty directly after training.
    """

    family: str
    role: Side
    low_rank: dict[str, tuple[LowRank, ...]] = field(default_factory=dict)
    replaced: dict[str, Tensor] = field(default_factory=dict)
    diff: dict[str, Tensor] = field(default_factory=dict)
    boundary: float | None = None
    timesteps: tuple[float, ...] | None = None
    notes: tuple[str, ...] = ()
    pair: Pair | None = None
    source: str = ""

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks that occur, smallest first."""
        return tuple(sorted({update.rank for updates in self.low_rank.values() for update in updates}))

    def __str__(self) -> str:
        ranks = self.ranks
        rank = f"LoRA rank {ranks[0]}" + (f" to {ranks[-1]}" if len(ranks) > 1 else "") if ranks else "no LoRA"
        # norms and modulations count as layers
        layers = {*self.low_rank, *(name.rpartition(".")[0] for name in (*self.replaced, *self.diff))}
        return f"{self.role} expert: {rank}, {counted(len(layers), 'layer')} matched"


def expert_tensor_list(expert: Expert) -> list[Tensor]:
    """Every tensor of the expert, in the order of the names."""
    pairs = [update for _, updates in sorted(expert.low_rank.items()) for update in updates]
    named = [tensor for tensors in (expert.replaced, expert.diff) for _, tensor in sorted(tensors.items())]
    return [tensor for update in pairs for tensor in (update.down, update.up)] + named


def size_of(expert: Expert) -> int:
    """Number of values."""
    return sum(tensor.numel() for tensor in expert_tensor_list(expert))


def expert_id(expert: Expert) -> str:
    """A hash of its tensors, and of where and how strongly they are applied."""
    pairs = [
        (name, [(update.start, update.scale) for update in updates])
        for name, updates in sorted(expert.low_rank.items())
    ]
    digest = hashlib.sha256(repr((_identity(expert), pairs, sorted(expert.replaced), sorted(expert.diff))).encode())
    for tensor in expert_tensor_list(expert):
        digest.update(bytes_of(tensor))
    return digest.hexdigest()


def _identity(expert: Expert) -> str:
    """The start of its id. Training checkpoints store ids, so a new wording would make them look like another run's."""
    rank = "-".join(str(rank) for rank in (expert.ranks[:1] + expert.ranks[1:][-1:])) or "none"
    held = {"low-rank sites": expert.low_rank, "replaced tensors": expert.replaced, "differences": expert.diff}
    return f"{expert.role} expert, rank {rank}: {', '.join(f'{len(tensors)} {kind}' for kind, tensors in held.items() if tensors)}"


def merged(expert: Expert, name: str, weight_of: Callable[[str], Tensor]) -> Tensor:
    """The native tensor `name` with this expert merged in, in float32. `weight_of` returns the base's tensor."""
    if name in expert.replaced:
        return expert.replaced[name].float()
    tensor = weight_of(name).to(torch.float32, copy=True)
    if name in expert.diff:
        tensor += expert.diff[name].to(tensor)
    module, _, param = name.rpartition(".")
    for update in expert.low_rank.get(module, ()) if param == "weight" else ():
        rows = tensor[update.start : update.start + update.up.shape[0]]
        rows += update.scale * (update.up.to(tensor) @ update.down.to(tensor))
    return tensor


def place_low_rank(piece: Piece, down: Tensor, up: Tensor, scale: float) -> LowRank:
    """A source module's low-rank factors as an update of the rows of its native module."""
    return LowRank(down, piece.in_native_order(up), scale, start=piece.rows(down.shape[1]).start)


def expert_to_state_dict(
    expert: Expert, shapes: Mapping[str, Sequence[int]]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and metadata of our expert file.

    Args:
        shapes: native tensor name -> shape of the base. A fused module's LoRA covers all its rows.
    """
    tensors = dict(expert_tensors(expert, shapes))
    return tensors, expert_metadata(expert, len(tensors))


def write_expert(
    target: str | os.PathLike | Unfinished,
    expert: Expert,
    shapes: Mapping[str, Sequence[int]],
    dtype: torch.dtype | None = None,
    replaced_dtype: torch.dtype | None = None,
) -> None:
    """Write our expert file, one tensor in memory at a time beside the expert.

    Args:
        target: see `write_stream`.
        dtype: dtype of the written tensors, alphas excepted; None keeps it.
        replaced_dtype: dtype of the replaced tensors; None uses `dtype`.

    Raises:
        CheckpointError: there is not enough room on the disk, or a value is too large for its dtype.
    """
    entries = expert_entries(expert, shapes, dtype, replaced_dtype)
    tensors = ((key, cast(key, tensor, entries[key][0])) for key, tensor in expert_tensors(expert, shapes))
    write_stream(target, entries, tensors, expert_metadata(expert, len(entries)))


def expert_entries(
    expert: Expert,
    shapes: Mapping[str, Sequence[int]],
    dtype: torch.dtype | None = None,
    replaced_dtype: torch.dtype | None = None,
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """key -> (dtype, shape) of our expert file."""

    def dtype_of(key: str, tensor: Tensor) -> torch.dtype:
        wanted = (key.endswith(".set_weight") and replaced_dtype) or dtype
        return tensor.dtype if wanted is None or key.endswith(".alpha") else wanted

    return {key: (dtype_of(key, tensor), tuple(tensor.shape)) for key, tensor in expert_tensors(expert, shapes)}


def expert_tensors(expert: Expert, shapes: Mapping[str, Sequence[int]]) -> Iterator[tuple[str, Tensor]]:
    """(key, tensor) of our expert file.

    The updates of a module become one LoRA, block-diagonal if the module is fused. Every LoRA loader that supports
    `lora_down`, `lora_up`, `alpha`, `set_weight`, `diff` and `diff_b` applies it exactly.
    """
    for module, updates in expert.low_rank.items():
        down, up, alpha = stack_updates(updates, shapes[f"{module}.weight"][0])
        yield f"{FILE_PREFIX}{module}.lora_down.weight", down
        yield f"{FILE_PREFIX}{module}.lora_up.weight", up
        yield f"{FILE_PREFIX}{module}.alpha", torch.tensor(alpha)
    for name, tensor in expert.replaced.items():
        yield f"{FILE_PREFIX}{name.removesuffix('.weight').removesuffix('.scale')}.set_weight", tensor
    for name, tensor in expert.diff.items():
        module, _, param = name.rpartition(".")
        # newer hosts call a norm's `scale` `weight`
        suffix = {"weight": "diff", "scale": "diff", "bias": "diff_b"}.get(param)
        yield (f"{FILE_PREFIX}{module}.{suffix}" if suffix else f"{FILE_PREFIX}{name}.diff"), tensor


def stack_updates(updates: Sequence[LowRank], rows: int) -> tuple[Tensor, Tensor, float]:
    """One update equal to all updates of a module: down (sum of ranks, in), up (rows, sum of ranks), alpha."""
    first = updates[0]
    rank = sum(update.rank for update in updates)
    if len(updates) == 1 and first.start == 0 and first.up.shape[0] == rows:
        return first.down, first.up, first.scale * rank
    up = first.up.new_zeros(rows, rank)
    column = 0
    for update in updates:
        value = update.up if update.scale == first.scale else update.up * (update.scale / first.scale)
        up[update.start : update.start + value.shape[0], column : column + update.rank] = value
        column += update.rank
    return torch.cat([update.down for update in updates]), up, first.scale * rank


def split_update(update: LowRank, pieces: Sequence[Piece], used_pieces: int = 0) -> tuple[LowRank, ...]:
    """Undo `stack_updates` for a fused module: one update for each piece, if every column of `up` belongs to one piece.

    Args:
        used_pieces: how many pieces, from the first, have an update in the release.
    """
    width, rows = update.down.shape[1], update.up.shape[0]
    if len(pieces) < 2 or update.start or rows < len(pieces) * width:
        return (update,)
    blocks = [piece.rows(width) for piece in pieces]
    used = torch.stack([(update.up[block].float() != 0).any(0) for block in blocks])
    if not bool(used.any(0).all()):
        # a column of zeros does not show its piece; with equal ranks, columns follow the order of the rows
        counts = (used_pieces, len(pieces))
        used = next((even for count in counts if (even := _even_columns(used, count)) is not None), used)
    if int(used.sum(0).max()) != 1:
        return (update,)
    return tuple(
        LowRank(update.down[columns], update.up[block, columns], update.scale, block.start)
        for block, columns in zip(blocks, used, strict=True)
        if bool(columns.any())
    )


def _even_columns(used: Tensor, count: int) -> Tensor | None:
    """(part, column) -> whether the column belongs to the part. None if the first `count` parts differ in columns."""
    parts, columns = used.shape
    if not 0 < count <= parts or columns % count:
        return None
    owner = torch.arange(columns, device=used.device) // (columns // count)
    even = owner == torch.arange(parts, device=used.device)[:, None]
    return even if not bool((used & ~even).any()) else None


def split_fused(update: LowRank, module: str, family: Family) -> tuple[LowRank, ...]:
    """An update of a fused module as one update for each layer it is fused from."""
    pieces = family.key_map.sources_of(module)
    released = sum(family.lora_target_pattern.fullmatch(piece.source) is not None for piece in pieces)
    return split_update(update, pieces, released)


def expert_metadata(expert: Expert, count: int) -> dict[str, str]:
    """The `dcm.*` metadata of the file. Rank and alpha are those of one update before stacking, and only written where all agree."""
    scales = {update.scale for updates in expert.low_rank.values() for update in updates}
    metadata = {
        "dcm.format": FORMAT,
        "dcm.family": expert.family,
        "dcm.expert": expert.role,
        "dcm.tensors": str(count),
    }
    if len(expert.ranks) == 1 and len(scales) == 1:
        metadata |= {"dcm.rank": str(expert.ranks[0]), "dcm.alpha": f"{expert.ranks[0] * scales.pop():g}"}
    return metadata | level_entries(expert.boundary, expert.timesteps, expert.pair)
