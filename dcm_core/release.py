"""Write a base and its expert files as one release file, tensor by tensor: the reverse of `convert`."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import torch
from torch import Tensor

from .errors import CheckpointError, ExpertError, counted, name_some
from .experts.expert import Expert, merged
from .experts.sources import at_scale, padded, source_updates
from .experts.view import ExpertView
from .families import Family
from .families.keymap import Piece, unfuse
from .families.lora_names import RELEASE_ADAPTER
from .files.metadata import level_entries
from .files.native import NativeView
from .files.tensor_file import Progress
from .files.unfinished import check_targets
from .files.values import cast
from .files.writing import Entries, write_stream

# The official scripts create a LoRA of this rank before they read the file.
OFFICIAL_RANK = 128


@dataclass(frozen=True)
class Release:
    """What was written. `notes` tell the user what to know about it, one sentence each."""

    family: str
    path: Path
    tensors: int
    rank: int
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        line = f"{self.family} DCM release: {self.path} ({counted(self.tensors, 'tensor')}, LoRA rank {self.rank})"
        return "\n".join([line, *self.notes])


@dataclass(frozen=True)
class _Parts:
    """The inputs of a release."""

    base: NativeView
    detail: ExpertView
    semantic: ExpertView | None

    @property
    def family(self) -> Family:
        return self.base.family

    def semantic_tensor(self, name: str) -> Tensor:
        """A native tensor of the base with the semantic expert merged in."""
        tensor = self.base.read(name)
        return tensor if self.semantic is None else _with_expert(self.semantic, name, tensor)

    def detail_tensor(self, name: str) -> Tensor:
        """The same with the detail expert merged in as well."""
        return _with_expert(self.detail, name, self.semantic_tensor(name))

    def sources(self, name: str) -> list[Piece]:
        return self.family.key_map.sources_of_tensor(name)

    def width(self, name: str) -> int:
        """Columns of the weight that a tensor belongs to."""
        shape = self.base.shape(weight) if (weight := _weight(name)) in self.base.pieces else ()
        return shape[1] if len(shape) > 1 else 0

    def own_layers(self) -> Iterator[str]:
        """The native tensors that the detail expert replaces with its own copy."""
        for name in self.base.pieces:
            if any(self.detail_module(piece) for piece in self.sources(name)):
                yield name

    def detail_module(self, piece: Piece) -> str | None:
        return next((m for m in self.family.detail_modules if piece.source.startswith(f"{m}.")), None)

    def has_pair(self, module: str) -> bool:
        """Whether the release has a LoRA on a diffusers layer."""
        return self.family.lora_target_pattern.fullmatch(module) is not None


def write_release(
    base: str | os.PathLike,
    detail: str | os.PathLike,
    out: str | os.PathLike,
    semantic: str | os.PathLike | None = None,
    *,
    rank: int = 0,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
    overwrite: bool = False,
) -> Release:
    """Write a base and its experts as one checkpoint in the layout of the official release.

    Unchanged tensors are not rounded: the two files of `convert_release` give the original release, bit for bit. One layer is
    in memory at a time.

    Args:
        base: a model file in any layout. For a release, its semantic base is used.
        detail: the detail expert's file, or a release that contains it.
        semantic: a semantic expert to merge into the base.
        rank: rank of the LoRA. Padding with zeros does not change its effect. 0 uses the expert's own rank.
        dtype: dtype of all tensors; None keeps it.
        progress: called with (bytes written, bytes in all); may raise to interrupt.

    Raises:
        CheckpointError: a file cannot be read, or the target cannot be written.
        ExpertError: an expert does not fit, or the detail expert changes tensors that the official layout has no place for.
    """
    out, inputs = Path(out), [Path(path) for path in (base, detail, semantic) if path is not None]
    check_targets(inputs, [out], overwrite)
    if dtype is not None and dtype.itemsize == 1:
        raise CheckpointError("dtype is fp8, which the official code cannot run. Choose bfloat16.")
    model = NativeView(base)
    shapes = {name: model.shape(name) for name in model.pieces}
    parts = _Parts(
        model,
        ExpertView(detail, model.family, shapes, "detail"),
        None if semantic is None else ExpertView(semantic, model.family, shapes, "semantic"),
    )
    _check_base(parts, dtype)
    _check_pairs(parts)
    _check_boundaries(parts)
    ranks, lora_dtype = _check_detail(parts)
    rank = _rank(rank, ranks)
    entries = {
        **{key: (dtype or stored, shape) for key, (stored, shape) in _base_entries(parts)},
        **_lora_entries(parts, rank, dtype or lora_dtype),
        **{key: (dtype or stored, shape) for key, (stored, shape) in _copy_entries(parts)},
    }
    write_stream(out, entries, _tensors(parts, entries, rank), _metadata(parts), progress)
    return Release(model.family.title, out, len(entries), rank, tuple(_notes(parts, rank)))


def _with_expert(view: ExpertView, name: str, tensor: Tensor) -> Tensor:
    """The tensor with the expert merged in. A tensor that the expert does not change is returned unchanged."""
    expert = view.layer(name.rpartition(".")[0])
    return merged(expert, name, lambda _: tensor) if _changes(expert, name) else tensor


def _changes(expert: Expert, name: str) -> bool:
    module, _, param = name.rpartition(".")
    return name in expert.replaced or name in expert.diff or (param == "weight" and module in expert.low_rank)


def _weight(name: str) -> str:
    return f"{name.rpartition('.')[0]}.weight"


def _check_base(parts: _Parts, dtype: torch.dtype | None) -> None:
    path, names = parts.base.file.path, parts.base.pieces
    if odd := [name for name in names if not parts.sources(name)]:
        raise CheckpointError(
            f"{path} has {counted(len(odd), 'tensor')} that the official layout has no place for: {name_some(odd)}. "
            f"Choose a plain {parts.family.title} model."
        )
    small = [name for name in names if parts.base.dtype(name).itemsize == 1]
    if small and dtype is None:
        raise CheckpointError(
            f"{path} is stored in fp8 ({name_some(small)}), which the official code cannot run. Set dtype to bfloat16, or choose the "
            "bf16, fp16 or fp32 version of the model."
        )


def _check_pairs(parts: _Parts) -> None:
    for view in (parts.detail, parts.semantic):
        if view is not None and view.metadata.pair is not None:
            raise ExpertError(
                f"{view.file.path} was trained on one of two models (Wan 2.2 A14B), but a release has one base. Export each expert as a "
                "PEFT adapter or a diffusers LoRA."
            )


def _check_boundaries(parts: _Parts) -> None:
    own, other = parts.detail.metadata.boundary, parts.semantic and parts.semantic.metadata.boundary
    if own and other and own != other:
        raise ExpertError(
            f"The detail expert was trained for boundary {own:g}, the semantic expert for {other:g}. Choose two that were trained together."
        )


def _check_detail(parts: _Parts) -> tuple[list[int], torch.dtype | None]:
    """The ranks and the dtype of the detail expert's LoRA.

    Raises:
        ExpertError: the expert changes a tensor other than by a LoRA on the release's layers or in its own copies.
    """
    own, ranks, dtypes, odd = set(parts.own_layers()), [], [], []
    for module in parts.detail.modules:
        expert = parts.detail.layer(module)
        odd += [name for name in (*expert.replaced, *expert.diff) if name not in own]
        if f"{module}.weight" in own:
            continue  # merged into the copy
        for piece, pair in source_updates(module, expert.low_rank.get(module, ()), parts.family):
            if parts.has_pair(piece.source):
                ranks.append(pair.rank)
                dtypes += [pair.down.dtype, pair.up.dtype]
            else:
                odd.append(f"{module}.weight" if piece.part is None else f"{piece.source}.weight")
    if odd:
        raise ExpertError(
            f"{parts.detail.file.path} changes {counted(len(odd), 'tensor')} that the official layout has no place for: {name_some(odd)}. "
            "In that layout the detail expert is a LoRA on attention plus its own embedders and output head. Export it as a PEFT "
            "adapter, or train an expert without every_linear."
        )
    return ranks, reduce(torch.promote_types, dtypes) if dtypes else None


def _rank(asked: int, found: Iterable[int]) -> int:
    largest = max(found, default=1)
    if asked and asked < largest:
        raise ExpertError(
            f"rank is {asked}, but the detail expert's LoRA has rank {largest}. Set rank to at least {largest}, or to 0."
        )
    return asked or largest


def _base_entries(parts: _Parts) -> Iterator[tuple[str, tuple[torch.dtype, tuple[int, ...]]]]:
    for name in parts.base.pieces:
        for piece, shape in _source_shapes(parts, name):
            yield _base_key(parts, piece.source), (parts.base.dtype(name), shape)


def _source_shapes(parts: _Parts, name: str) -> Iterator[tuple[Piece, tuple[int, ...]]]:
    pieces, shape = parts.sources(name), parts.base.shape(name)
    for piece in pieces:
        rows = piece.rows(parts.width(name), shape[0])
        yield piece, (rows.stop - rows.start, *shape[1:])


def _base_key(parts: _Parts, source: str) -> str:
    module, _, param = source.rpartition(".")
    return f"{module}.base_layer.{param}" if parts.has_pair(module) else source


def _pair_keys(module: str) -> tuple[str, str]:
    return f"{module}.lora_A.{RELEASE_ADAPTER}.weight", f"{module}.lora_B.{RELEASE_ADAPTER}.weight"


def _lora_entries(parts: _Parts, rank: int, dtype: torch.dtype | None) -> Entries:
    entries = {}
    for name in parts.base.pieces:
        for piece, shape in _source_shapes(parts, name):
            if name == _weight(name) and parts.has_pair(module := piece.source.removesuffix(".weight")):
                down, up = _pair_keys(module)
                entries[down] = (dtype or parts.base.dtype(name), (rank, shape[1]))
                entries[up] = (dtype or parts.base.dtype(name), (shape[0], rank))
    return entries


def _copy_entries(parts: _Parts) -> Iterator[tuple[str, tuple[torch.dtype, tuple[int, ...]]]]:
    for name in parts.own_layers():
        replaced = parts.detail.layer(name.rpartition(".")[0]).replaced.get(name)
        for piece, shape in _source_shapes(parts, name):
            yield _copy_key(parts, piece), (parts.base.dtype(name) if replaced is None else replaced.dtype, shape)


def _copy_key(parts: _Parts, piece: Piece) -> str:
    module = parts.detail_module(piece)
    return f"{module}_lora{piece.source.removeprefix(module)}"


def _tensors(parts: _Parts, entries: Entries, rank: int) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the file, in the order of `entries`."""
    for name in parts.base.pieces:
        for source, tensor in unfuse(parts.sources(name), parts.semantic_tensor(name), parts.width(name)):
            key = _base_key(parts, source)
            yield key, cast(key, tensor, entries[key][0])
    for name in parts.base.pieces:
        if name == _weight(name):
            yield from _pairs(parts, name.removesuffix(".weight"), entries, rank)
    for name in parts.own_layers():
        tensor, keys = (
            parts.detail_tensor(name),
            {piece.source: _copy_key(parts, piece) for piece in parts.sources(name)},
        )
        for source, part in unfuse(parts.sources(name), tensor, parts.width(name)):
            yield keys[source], cast(keys[source], part, entries[keys[source]][0])


def _pairs(parts: _Parts, module: str, entries: Entries, rank: int) -> Iterator[tuple[str, Tensor]]:
    """The LoRA of each layer that makes up a native one; zeros if the expert has none."""
    layers = [piece.source for piece in parts.family.key_map.sources_of(module) if parts.has_pair(piece.source)]
    if not layers:
        return
    updates = parts.detail.layer(module).low_rank.get(module, ())
    found = {piece.source: pair for piece, pair in source_updates(module, updates, parts.family)}
    for layer in layers:
        keys = _pair_keys(layer)
        if (pair := found.get(layer)) is None:
            tensors = [torch.zeros(entries[key][1], dtype=entries[key][0]) for key in keys]
        else:
            pair = padded(at_scale(pair, parts.family.lora_scale), rank)
            tensors = [pair.down, pair.up]
        for key, tensor in zip(keys, tensors, strict=True):
            yield key, cast(key, tensor, entries[key][0])


def _metadata(parts: _Parts) -> dict[str, str]:
    """The format that other tools expect, and the boundary and timesteps that our loaders read."""
    boundary, timesteps = parts.detail.metadata.boundary, parts.detail.metadata.timesteps
    # timesteps without their boundary say nothing about a release
    levels = level_entries(boundary, None if boundary is None else timesteps)
    return {"format": "pt", "dcm.family": parts.family.name, **levels}


def _notes(parts: _Parts, rank: int) -> Iterator[str]:
    yield from parts.detail.notes
    if parts.semantic is not None:
        yield from parts.semantic.notes
    if rank != OFFICIAL_RANK:
        alpha = f"{rank * parts.family.lora_scale:g}"
        yield f"The official scripts expect LoRA rank {OFFICIAL_RANK}: set r={rank}, lora_alpha={alpha} there" + (
            f", or write the file with rank {OFFICIAL_RANK}." if rank < OFFICIAL_RANK else "."
        )
    boundary = parts.detail.metadata.boundary
    if boundary not in (None, parts.family.preset.boundary):
        yield (
            f"These experts switch at sigma {boundary:g}, the official code at {parts.family.preset.boundary:g}. Change it there. "
            "ComfyUI-DCM reads the boundary from the file."
        )
