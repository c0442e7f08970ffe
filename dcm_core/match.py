"""Which tensors of an expert file have a place in a model: by names and shapes, nothing is read."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from .checkpoint import Contents, Layout
from .errors import name_some
from .families import FAMILIES, Family
from .keymap import Piece, Shape
from .lora_names import Kind, ModuleNames, Shapes, count_known, name_of
from .storage import TensorFile

# What is wrong with a tensor that has no place.
NO_LAYER, OTHER_SIZE, OTHER_KIND, HALF, TWICE = "no such layer", "another size", "no plain LoRA", "half of a pair", "given twice"
# An index above is no block's.
MOST_BLOCKS = 1000


@dataclass(frozen=True)
class Site:
    """The tensors (kind -> key) a file holds for one module, and where that is in the model.

    Attributes:
        again: more keys for the same tensors.
    """

    piece: Piece
    keys: dict[Kind, str] = field(default_factory=dict)
    again: list[tuple[Kind, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Match:
    """An expert's tensors, each in its site or under the reason why it has none."""

    sites: tuple[Site, ...]
    misfits: Mapping[str, tuple[str, ...]]

    @property
    def fitting(self) -> int:
        return sum(len(site.keys) for site in self.sites)

    def __str__(self) -> str:
        total = self.fitting + sum(map(len, self.misfits.values()))
        return "; ".join([f"{self.fitting} of {total}", *(f"{why}: {name_some(keys)}" for why, keys in self.misfits.items())])


@dataclass(frozen=True)
class Target:
    """A model that an expert is to go on.

    Attributes:
        title: what it is called.
        family: None for any other model.
        shapes: native tensor name -> shape.
    """

    title: str
    family: Family | None
    shapes: Shapes

    def say(self, keys: Mapping[str, Shape], family: Family | None) -> str:
        """How many keys of an expert for `family` have a place in the model."""
        if self.family is None:
            return f"none: the model is {self.title}, experts exist for {' and '.join(f.title for f in FAMILIES.values())}"
        if family not in (None, self.family):
            return f"none: the expert is for {family.title}, the model is {self.family.title}"
        return str(match_expert(keys, self.family, self.shapes))

    def takes(self, keys: Mapping[str, Shape], family: Family) -> bool:
        """True if every key that its family knows has a place in the model."""
        known = match_expert(keys, family, any_model(family, keys))
        return self.family is family and match_expert(keys, family, self.shapes).fitting == known.fitting


def expert_part(file: TensorFile, contents: Contents) -> tuple[Family | None, dict[str, str]]:
    """A file's family and its expert's tensors: name without the file's prefix -> key."""
    if contents.layout is Layout.RELEASE:
        return contents.family, {bare: key for key, bare in contents.detail.items()}
    if contents.layout is Layout.EXPERT:
        return guess_family(file.shapes, file.metadata), {key: key for key in file.shapes}
    return contents.family, {}


def guess_family(keys: Mapping[str, Shape], metadata: Mapping[str, str]) -> Family | None:
    """The family an expert file is for: as it says, else the one that knows most of its keys."""
    if metadata.get("dcm.family") in FAMILIES:
        return FAMILIES[metadata["dcm.family"]]
    known = {name: count_known(family, keys) for name, family in FAMILIES.items()}
    best = max(known, key=known.__getitem__)
    return FAMILIES[best] if known[best] > len(keys) // 2 else None


def any_model(family: Family, keys: Mapping[str, Shape]) -> Shapes:
    """Tensor names of a model of the family as deep as the keys ask for; sizes () are not compared."""
    numbers = (int(number) for key in keys for number in re.findall(r"(?<![0-9])[0-9]{1,4}(?![0-9])", key))
    depth = 1 + max((number for number in numbers if number < MOST_BLOCKS), default=0)
    names = {target for rule in family.DIFFUSERS_TO_NATIVE for _, target in rule.key_pairs()}
    return {name.replace("{n}", str(index)): () for name in names for index in range(depth if "{n}" in name else 1)}


def match_expert(keys: Mapping[str, Shape], family: Family, shapes: Shapes) -> Match:
    """Find the place of every tensor.

    Args:
        keys: the expert's keys and their shapes.
        shapes: native tensor name -> shape of the model; () where it is not known.
    """
    sites, misfits = find_sites(keys, family, shapes)
    for site in sites:
        found = [(TWICE, key) for _, key in site.again]
        found += [(why, site.keys.pop(kind)) for kind, why in wrong_kinds(site, keys, shapes).items()]
        for why, key in found:
            misfits.setdefault(why, []).append(key)
    return Match(tuple(site for site in sites if site.keys), {why: tuple(keys) for why, keys in misfits.items()})


def find_sites(keys: Iterable[str], family: Family, shapes: Shapes) -> tuple[list[Site], dict[str, list[str]]]:
    """The keys by the module of the model that they are for, and by the reason why they are for none."""
    names = ModuleNames(family, shapes)
    sites: dict[tuple[str, int | None], Site] = {}
    strangers: dict[str, list[str]] = {}
    for key in keys:
        name = name_of(key, family)
        piece = names.find(name.module) if name else None
        if name is not None and name.kind == "unsupported":
            strangers.setdefault(OTHER_KIND, []).append(key)
        elif piece is None or tensor_name(piece, name.kind, shapes) not in shapes:
            strangers.setdefault(NO_LAYER, []).append(key)
        elif name.kind in (site := sites.setdefault((piece.target, piece.part), Site(piece))).keys:
            site.again.append((name.kind, key))
        else:
            site.keys[name.kind] = key
    return list(sites.values()), strangers


def tensor_name(piece: Piece, kind: Kind, shapes: Shapes) -> str:
    """Native name of the tensor that a kind of tensor is for."""
    target = piece.target
    return f"{target}.bias" if kind in ("diff_b", "set_bias") else target if target in shapes else f"{target}.weight"


def wrong_kinds(site: Site, keys: Mapping[str, Shape], shapes: Shapes) -> dict[Kind, str]:
    """What does not go with the model, or with its other half, and why."""
    wrong = {kind: why for kind, key in site.keys.items() if (why := _misfit(kind, tuple(keys[key]), site.piece, shapes))}
    pair = [keys[site.keys[kind]] for kind in ("down", "up") if kind in site.keys.keys() - wrong.keys()]
    if len(pair) < 2 or not 0 < pair[0][0] == pair[1][1] == math.prod(pair[1][1:]):
        why = OTHER_SIZE if OTHER_SIZE in wrong.values() else HALF
        wrong |= {kind: why for kind in ("down", "up", "alpha") if kind in site.keys}
    return wrong


def _misfit(kind: Kind, shape: tuple[int, ...], piece: Piece, shapes: Shapes) -> str | None:
    if piece.part is not None and kind in ("set_weight", "set_bias"):
        return OTHER_KIND  # some rows of a tensor cannot be replaced
    return None if _fits(kind, shape, piece, shapes) else OTHER_SIZE


def _fits(kind: Kind, shape: tuple[int, ...], piece: Piece, shapes: Shapes) -> bool:
    if kind == "alpha":
        return math.prod(shape) == 1
    whole = tuple(shapes[tensor_name(piece, kind, shapes)])
    if len(shape) < (2 if kind in ("down", "up") else 1):
        return False
    if not whole:
        return True
    if kind == "down":
        return len(shape) == len(whole) and shape[1:] == whole[1:]
    if piece.part is None:
        return shape == whole if kind != "up" else len(shape) == len(whole) and shape[0] == whole[0]
    room = whole[0] - piece.part * tuple(shapes[f"{piece.target}.weight"])[1]
    return len(shape) == len(whole) and 0 < shape[0] <= room and (kind == "up" or shape[1:] == whole[1:])
