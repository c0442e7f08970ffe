"""An expert's low-rank updates by the layers of diffusers' models, where q, k and v are separate layers."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..families import Family
from ..families.keymap import Piece
from .expert import LowRank, stack_updates


def source_updates(module: str, updates: Sequence[LowRank], family: Family) -> Iterator[tuple[Piece, LowRank]]:
    """(diffusers layer, its one update) for the layers that make up a native module. Unchanged layers are skipped."""
    for piece in family.key_map.sources_of(module):
        own = [part for update in updates if (part := _rows_of(update, piece)) is not None]
        if own:
            down, up, alpha = stack_updates(own, max(part.start + part.up.shape[0] for part in own))
            yield piece, LowRank(down, piece.in_native_order(up), alpha / down.shape[0])


def _rows_of(update: LowRank, piece: Piece) -> LowRank | None:
    """The update of a part's rows alone, counted from the part's first row; None if there is none."""
    end = update.start + update.up.shape[0]
    rows = piece.rows(update.down.shape[1], end)
    start, stop = max(rows.start, update.start), min(rows.stop, end)
    if start >= stop:
        return None
    up = update.up[start - update.start : stop - update.start]
    # an update of several parts may be zero in one of them
    if len(up) < len(update.up) and not bool(up.any()):
        return None
    return replace(update, up=up, start=start - rows.start)


def padded(pair: LowRank, rank: int) -> LowRank:
    """The same update at a higher rank, padded with rows and columns of zeros."""
    more = rank - pair.rank
    if more == 0:
        return pair
    down = torch.cat([pair.down, pair.down.new_zeros(more, pair.down.shape[1])])
    return replace(pair, down=down, up=torch.cat([pair.up, pair.up.new_zeros(pair.up.shape[0], more)], 1))


def at_scale(pair: LowRank, scale: float) -> LowRank:
    """The same update at another alpha / rank, with the difference folded into `up`. It is exact for powers of two."""
    if pair.scale == scale:
        return pair
    return replace(pair, up=scaled(pair.up, pair.scale / scale), scale=scale)


def scaled(tensor: Tensor, factor: float) -> Tensor:
    """The product, rounded once to the tensor's dtype."""
    return (tensor.double() * factor).to(tensor.dtype)
