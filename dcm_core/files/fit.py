"""Check from the header that the tensors of a diffusers-layout file fit each other, before reading or writing anything."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch

from ..families import Family
from ..families.keymap import BLOCK_INDEX, Piece, Shape
from ..families.lora_names import split_key

BLOCK = re.compile(rf"(.*\.)?\w*blocks\.(?P<index>{BLOCK_INDEX})\..+")
# The two layers of an MLP: the second takes the output of the first.
PERCEPTRONS = ((".linear_1.weight", ".linear_2.weight"), (".net.0.proj.weight", ".net.2.weight"))

Shapes = Mapping[str, Shape]
DTypes = Mapping[str, torch.dtype]
# (tensor, what is wrong with it)
Misfits = Iterable[tuple[str, str]]


def misfits(
    shapes: Shapes, dtypes: DTypes, family: Family, matched: Mapping[str, Sequence[Piece]], detail: Iterable[str]
) -> dict[str, str]:
    """Tensor -> what is wrong with it.

    Args:
        shapes, dtypes: by the tensors' names in the model, without `.base_layer` and prefixes. All tensors are there.
        matched: native name -> the base's tensors that make it up.
        detail: names of the detail expert's tensors.
    """
    copies = {name: source for name in detail if (source := family.detail_source(name))}
    pairs: dict[str, dict[str, str]] = {}
    for name in detail:
        if name not in copies:
            key = split_key(name)
            pairs.setdefault(key.module, {})[key.kind] = name
    found: dict[str, str] = {}
    for wrong in (
        _kinds(dtypes),
        ((name, f"has shape {tuple(shape)}, which is empty") for name, shape in shapes.items() if 0 in shape),
        _pairs(shapes, dtypes, pairs, family),
        _copies(shapes, dtypes, copies, matched),
        _fused(shapes, dtypes, matched),
        _biases(shapes),
        _perceptrons(shapes),
        _blocks(shapes),
    ):
        for name, reason in wrong:
            found.setdefault(name, reason)
    return found


def _kinds(dtypes: DTypes) -> Misfits:
    return ((name, f"is {dtype}, not floating-point") for name, dtype in dtypes.items() if not dtype.is_floating_point)


def _blocks(shapes: Shapes) -> Misfits:
    """All blocks of a kind must have the same shapes."""
    groups: dict[str, list[str]] = {}
    for name in shapes:
        if block := BLOCK.fullmatch(name):
            groups.setdefault(name[: block.start("index")] + name[block.end("index") :], []).append(name)
    for names in groups.values():
        (usual, _), *others = Counter(tuple(shapes[name]) for name in names).most_common()
        if others:
            yield from (
                (name, f"has shape {shapes[name]}, but {usual} in other blocks")
                for name in names
                if tuple(shapes[name]) != usual
            )


def _biases(shapes: Shapes) -> Misfits:
    """A bias must have one value for each row of its weight."""
    for name, shape in shapes.items():
        weight = shapes.get(f"{name.removesuffix('bias')}weight") if name.endswith(".bias") else None
        if weight is not None and tuple(shape) != tuple(weight[:1]):
            yield name, f"has shape {shape}, but its weight has {weight}"


def _perceptrons(shapes: Shapes) -> Misfits:
    for ending, following in PERCEPTRONS:
        for name, shape in shapes.items():
            after = f"{name.removesuffix(ending)}{following}" if name.endswith(ending) else ""
            if after in shapes and tuple(shapes[after][1:]) != tuple(shape[:1]):
                yield after, f"has shape {shapes[after]}, but {name} before it has {shape}"


def _fused(shapes: Shapes, dtypes: DTypes, matched: Mapping[str, Sequence[Piece]]) -> Misfits:
    """Tensors that are fused into one may differ in their number of rows only."""
    for target, pieces in matched.items():
        names = [piece.source for piece in pieces]
        first = names[0]
        for name in names:
            if not shapes[name] or tuple(shapes[name][1:]) != tuple(shapes[first][1:]) or dtypes[name] != dtypes[first]:
                yield (
                    name,
                    f"is {_said(name, shapes, dtypes)}, but becomes part of {target} with {first}, {_said(first, shapes, dtypes)}",
                )


def _copies(
    shapes: Shapes, dtypes: DTypes, copies: Mapping[str, str], matched: Mapping[str, Sequence[Piece]]
) -> Misfits:
    """The detail expert's own layers must have the shapes of the base's layers."""
    for name, source in copies.items():
        if tuple(shapes[name]) != tuple(shapes[source]):
            yield name, f"has shape {shapes[name]}, but {source} has {shapes[source]}"
    own = {source: name for name, source in copies.items()}
    together = {
        target: [own[piece.source] for piece in pieces if piece.source in own] for target, pieces in matched.items()
    }
    yield from _one_dtype(together, dtypes)


def _pairs(shapes: Shapes, dtypes: DTypes, pairs: Mapping[str, Mapping[str, str]], family: Family) -> Misfits:
    """A LoRA must be (rank, columns) and (rows, rank) of its layer. The parts of a fused layer must have one dtype."""
    together: dict[str, list[str]] = {}
    for module, pair in pairs.items():
        base, down, up = shapes[f"{module}.weight"], shapes[pair["down"]], shapes[pair["up"]]
        if len(base) != 2 or len(down) != 2 or down[1] != base[1]:
            yield pair["down"], f"has shape {down}, but its layer has {base}"
        if len(base) != 2 or len(up) != 2 or up[0] != base[0]:
            yield pair["up"], f"has shape {up}, but its layer has {base}"
        elif len(down) == 2 and up[1] != down[0]:
            yield pair["up"], f"has rank {up[1]}, but {pair['down']} has rank {down[0]}"
        together.setdefault(family.key_map.find_module(module).target, []).extend(pair.values())
    yield from _one_dtype(together, dtypes)


def _one_dtype(together: Mapping[str, Sequence[str]], dtypes: DTypes) -> Iterator[tuple[str, str]]:
    for names in together.values():
        for name in names[1:]:
            if dtypes[name] != dtypes[names[0]]:
                yield name, f"is {dtypes[name]}, but {names[0]} is {dtypes[names[0]]}"


def _said(name: str, shapes: Shapes, dtypes: DTypes) -> str:
    return f"{dtypes[name]} {tuple(shapes[name])}"
