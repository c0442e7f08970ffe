"""Match the tensors of an expert file to a model by names and shapes. No values are read."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from ..errors import name_some
from ..families import FAMILIES, Family
from ..families.keymap import Piece, Shape
from ..families.lora_names import COMPUTED, LOW_RANK, Kind, ModuleNames, Shapes, count_known, is_text_encoder, name_of
from ..files.checkpoint import Contents, Layout
from ..files.metadata import said_family
from ..files.tensor_file import TensorFile

# Why a tensor does not fit.
NO_LAYER, OTHER_SIZE, HALF, TWICE, ROWS = (
    "no such layer",
    "another size",
    "half of a LoRA layer",
    "duplicate",
    "only some rows",
)
# Why a tensor can be left out: the rest of the file works without it.
TEXT_ENCODER, LACKING = "text encoder LoRA", "{}, which this model does not have"
# What is said of methods that only the host can compute.
ON_ATTACHING = {method: f"{method}, computed by DCM Attach Experts" for _, method in COMPUTED}


@dataclass(frozen=True)
class Site:
    """The tensors (kind -> key) of a file for one module, and the module's place in the model.

    Attributes:
        again: further keys for the same tensors.
    """

    piece: Piece
    keys: dict[Kind, str] = field(default_factory=dict)
    again: list[tuple[Kind, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Match:
    """An expert's tensors, each in its site or under the reason why it does not fit.

    Attributes:
        left_out: reason -> keys that can be left out.
        misfits: reason -> keys that belong to another model or are broken.
    """

    sites: tuple[Site, ...]
    left_out: Mapping[str, tuple[str, ...]]
    misfits: Mapping[str, tuple[str, ...]]

    @property
    def fitting(self) -> int:
        return sum(len(site.keys) for site in self.sites)

    def __str__(self) -> str:
        reasons = [*self.left_out.items(), *self.misfits.items()]
        total = self.fitting + sum(len(keys) for _, keys in reasons)
        return "; ".join(
            [
                f"{self.fitting} of {total}",
                *(f"{ON_ATTACHING.get(why, why)}: {name_some(keys)}" for why, keys in reasons),
            ]
        )


@dataclass(frozen=True)
class Target:
    """A model that an expert is compared with.

    Attributes:
        title: its display name.
        family: its family; None for any other model.
        shapes: native tensor name -> shape.
    """

    title: str
    family: Family | None
    shapes: Shapes

    def say(self, keys: Mapping[str, Shape], family: Family | None) -> str:
        """How many keys of an expert for `family` fit the model, as text."""
        if self.family is None:
            return f"none: the model is {self.title}, but experts exist for {' and '.join(f.title for f in FAMILIES.values())}"
        if family not in (None, self.family):
            return f"none: the expert is for {family.title}, but the model is {self.family.title}"
        return str(match_expert(keys, self.family, self.shapes))

    def takes(self, keys: Mapping[str, Shape], family: Family) -> bool:
        """True if every key that its family knows fits the model."""
        if self.family is not family:
            return False
        known, found = match_expert(keys, family, AnyModel(family)), match_expert(keys, family, self.shapes)
        return {key for site in known.sites for key in site.keys.values()} <= {
            key for keys in (*found.left_out.values(), *(site.keys.values() for site in found.sites)) for key in keys
        }


def expert_part(file: TensorFile, contents: Contents) -> tuple[Family | None, dict[str, str]]:
    """A file's family, and the tensors of its expert: name without the file's prefix -> key."""
    if contents.layout is Layout.RELEASE:
        return contents.family, {bare: key for key, bare in contents.detail.items()}
    if contents.layout is Layout.EXPERT:
        return guess_family(file.shapes, file.metadata), {key: key for key in file.shapes}
    return contents.family, {}


def guess_family(keys: Mapping[str, Shape], metadata: Mapping[str, str]) -> Family | None:
    """The family an expert file is for: what its metadata says, else the family that knows most of its keys."""
    said = FAMILIES.get(said_family(metadata) or "")
    if said is not None:
        return said
    transformer = [key for key in keys if not is_text_encoder(key)]
    known = {name: count_known(family, transformer) for name, family in FAMILIES.items()}
    best = max(known, key=known.__getitem__)
    return FAMILIES[best] if known[best] > len(transformer) // 2 else None


class AnyModel(Mapping[str, Shape]):
    """Tensor names of a family's model of any depth, listed for one block. All shapes are (), which are not compared."""

    def __init__(self, family: Family):
        self.family = family

    def __getitem__(self, name: str) -> Shape:
        if self.family.native_map.find(name) is None:
            raise KeyError(name)
        return ()

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys(key for rule in self.family.native_map.rules for key, _ in rule.key_pairs()))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def match_expert(keys: Mapping[str, Shape], family: Family, shapes: Shapes) -> Match:
    """Match every tensor to its place in a model.

    Args:
        keys: the expert's keys and their shapes.
        shapes: native tensor name -> shape in the model; () if unknown.
    """
    sites, left_out, misfits = find_sites(keys, family, shapes)
    for site in sites:
        found = [(TWICE, key) for _, key in site.again]
        found += [(why, site.keys.pop(kind)) for kind, why in wrong_kinds(site, keys, shapes).items()]
        for why, key in found:
            misfits.setdefault(why, []).append(key)
    return Match(
        tuple(site for site in sites if site.keys),
        *({why: tuple(ks) for why, ks in d.items()} for d in (left_out, misfits)),
    )


Reasons = dict[str, list[str]]


def find_sites(keys: Iterable[str], family: Family, shapes: Shapes) -> tuple[list[Site], Reasons, Reasons]:
    """The keys by module of the model; by the reason why they can be left out; by the reason why they do not fit."""
    names = ModuleNames(family, shapes)
    sites: dict[tuple[str, int | None], Site] = {}
    left_out: Reasons = {}
    misfits: Reasons = {}
    for key in keys:
        name = name_of(key, family)
        piece = names.find(name.module) if name else None
        if piece is None and is_text_encoder(key):
            left_out.setdefault(TEXT_ENCODER, []).append(key)
        elif name is not None and piece is None and (part := names.lacks(name.module)):
            left_out.setdefault(LACKING.format(part), []).append(key)
        elif piece is None or tensor_name(piece, name.kind, shapes) not in shapes:
            misfits.setdefault(NO_LAYER, []).append(key)
        elif name.kind in ("computed", "unroutable"):
            misfits.setdefault(name.method, []).append(key)
        elif name.kind in (site := sites.setdefault((piece.target, piece.part), Site(piece))).keys:
            site.again.append((name.kind, key))
        else:
            site.keys[name.kind] = key
    return list(sites.values()), left_out, misfits


def tensor_name(piece: Piece, kind: Kind, shapes: Shapes) -> str:
    """Native name of the tensor that a key of this kind changes."""
    target = piece.target
    if kind in ("diff_b", "set_bias", "up_bias"):
        return f"{target}.bias"
    if kind == "diff_m":
        return f"{target}.modulation"
    return target if target in shapes else f"{target}.weight"


def wrong_kinds(site: Site, keys: Mapping[str, Shape], shapes: Shapes) -> dict[Kind, str]:
    """The kinds that do not fit the model or the rest of their low-rank update, and why."""
    given = {kind: tuple(keys[key]) for kind, key in site.keys.items()}
    low_rank = [kind for kind in LOW_RANK if kind in given]
    whole = {kind: shape for kind, shape in given.items() if kind not in ("down", "mid", "up")}
    wrong = {kind: why for kind, shape in whole.items() if (why := _misfit(kind, shape, site.piece, shapes))}
    if low_rank and (why := _low_rank_misfit(given, site.piece, shapes)):
        wrong |= dict.fromkeys(low_rank, why)
    return wrong


def _misfit(kind: Kind, shape: tuple[int, ...], piece: Piece, shapes: Shapes) -> str | None:
    if piece.part is not None and kind in ("set_weight", "set_bias"):
        return ROWS
    return None if _fits(kind, shape, piece, shapes) else OTHER_SIZE


def _fits(kind: Kind, shape: tuple[int, ...], piece: Piece, shapes: Shapes) -> bool:
    if kind == "alpha":
        return math.prod(shape) == 1
    whole = tuple(shapes[tensor_name(piece, kind, shapes)])
    if kind == "reshape":
        return len(shape) == 1 and shape[0] == (len(whole) or shape[0])
    if not shape:
        return False
    if piece.part is None or not whole:
        return not whole or shape == whole
    return 0 < shape[0] <= _room(piece, whole, shapes) and shape[1:] == whole[1:]


def _room(piece: Piece, whole: tuple[int, ...], shapes: Shapes) -> int:
    """Number of rows of a fused tensor, counted from the part's first row."""
    return whole[0] - piece.rows(shapes[f"{piece.target}.weight"][1]).start


def _low_rank_misfit(given: Mapping[Kind, tuple[int, ...]], piece: Piece, shapes: Shapes) -> str | None:
    """Why (rank, in...), (rank, rank, kernel...) and (out, rank, 1...) do not fit the module. Hosts flatten them to matrices."""
    down, up = given.get("down", ()), given.get("up", ())
    if len(down) < 2 or len(up) < 2:
        return HALF
    mid = given.get("mid", (down[0], down[0]))
    if len(mid) < 2 or not 0 < down[0] == mid[1] or mid[0] != math.prod(up[1:]):
        return HALF
    whole = tuple(shapes[tensor_name(piece, "up", shapes)])
    rows, columns = up[0], math.prod(down[1:]) * math.prod(mid[2:])
    if not whole:
        return None
    if piece.part is not None:
        fits = 0 < rows <= _room(piece, whole, shapes) and columns == whole[1]
    elif len(whole) == 2:
        fits = (rows, columns) == whole
    else:
        fits = rows * columns == math.prod(whole)
    return None if fits else OTHER_SIZE
