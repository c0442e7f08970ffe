"""Apply and invert a table that maps tensor names of one layout to another.

A table is a tuple of `Rule`s. A rule maps a module's tensors, and `{n}` stands for a block index. Several modules may
be rows of one target (`part`): a fused qkv, or `linear1` with its q, k, v and mlp rows.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..errors import CheckpointError, name_some

Shape = Sequence[int]

# No model has a thousand blocks. Without a limit, a crafted file would make us look for all that it names.
BLOCK_INDEX = r"\d{1,3}"


@dataclass(frozen=True)
class Rule:
    """One line of a table: module `source` is `target`, or the rows `part` of it.

    Attributes:
        params: the module's tensor names; ("",) if the rule names a full key.
        target_params: their names in the target, in the same order; empty if equal.
        part: index among the sources of a fused target, see `Piece.rows`; None if the source is all of the target.
        swap_halves: whether the two halves of the rows change places.
        optional: what the layer is for, if only some models of the family have it; "" if all do.
    """

    source: str
    target: str
    params: tuple[str, ...] = ("weight", "bias")
    target_params: tuple[str, ...] = ()
    part: int | None = None
    swap_halves: bool = False
    optional: str = ""

    def key_pairs(self) -> Iterable[tuple[str, str]]:
        """(source, target) key templates."""
        for param, target_param in zip(self.params, self.target_params or self.params, strict=True):
            yield _join(self.source, param), _join(self.target, target_param)


@dataclass(frozen=True)
class Piece:
    """A source tensor's place in its target; `part`, `swap_halves` and `optional` as in `Rule`.

    Attributes:
        last: whether this is the last part of the target.
    """

    source: str
    target: str
    part: int | None = None
    swap_halves: bool = False
    optional: str = ""
    last: bool = True

    def rows(self, width: int, height: int | None = None) -> slice:
        """The source's rows in a target.

        Args:
            width: columns of the target's weight. Each part but the last has as many rows.
            height: rows of the target, if the end of the last part is needed.
        """
        start = (self.part or 0) * width
        return slice(start, height if self.last else start + width)

    def in_native_order(self, tensor: Tensor) -> Tensor:
        """The source's rows in the order of the target's rows."""
        return torch.cat(tensor.chunk(2)[::-1]) if self.swap_halves else tensor


@dataclass(frozen=True)
class MatchReport:
    """What became of every key of a file."""

    matched: dict[str, list[Piece]]
    unmatched: tuple[str, ...]
    missing: tuple[str, ...]

    @property
    def complete(self) -> bool:
        return not self.unmatched and not self.missing


def _join(module: str, param: str) -> str:
    return f"{module}.{param}" if param else module


def _fill(template: str, index: str | None) -> str:
    return template if index is None else template.replace("{n}", index)


def _stem(template: str) -> str | None:
    """`blocks` of `blocks.{n}.ffn.0`; None without a block number."""
    head, mark, _ = template.partition(".{n}")
    return head if mark else None


class Templates:
    """Splits names into a template and a block index. The separator between parts is `.` or `_`."""

    def __init__(self, templates: Iterable[str], separator: str = "."):
        stems = {stem.replace(".", separator) for template in templates if (stem := _stem(template))}
        # the longest first, as one stem may begin with another
        either = "|".join(map(re.escape, sorted(stems, key=len, reverse=True))) or r"(?!)"
        gap = re.escape(separator)
        self._numbered = re.compile(rf"({either}){gap}({BLOCK_INDEX})(?={gap}|$)")
        self._separator = separator

    def split(self, name: str) -> tuple[str, str | None]:
        """(template, index): `blocks.7.ffn.0` -> (`blocks.{n}.ffn.0`, `7`). A name without a block is its own template."""
        match = self._numbered.match(name)
        if match is None:
            return name, None
        return f"{match[1]}{self._separator}{{n}}{name[match.end() :]}", match[2]


class KeyMap:
    """A table of rules, usable in both directions. The first rule for a name counts."""

    def __init__(self, rules: Sequence[Rule]):
        self.rules = tuple(rules)

    @cached_property
    def _by_key(self) -> dict[str, tuple[str, Rule]]:
        pairs = [(source, (target, rule)) for rule in self.rules for source, target in rule.key_pairs()]
        return dict(reversed(pairs))

    @cached_property
    def _by_module(self) -> dict[str, Rule]:
        return {rule.source: rule for rule in reversed(self.rules)}

    @cached_property
    def _by_flat_name(self) -> dict[str, Rule]:
        return {source.replace(".", "_"): rule for source, rule in self._by_module.items()}

    @cached_property
    def _sources(self) -> Templates:
        return Templates(rule.source for rule in self.rules)

    @cached_property
    def _flat_sources(self) -> Templates:
        return Templates((rule.source for rule in self.rules), "_")

    @cached_property
    def _targets(self) -> Templates:
        return Templates(rule.target for rule in self.rules)

    @cached_property
    def _parts(self) -> dict[str, int]:
        """Fused target module -> index of its last part."""
        return {rule.target: max(r.part or 0 for r in self.rules if r.target == rule.target) for rule in self.rules}

    def find(self, key: str) -> Piece | None:
        """The place of a source key; None if it is not in the table."""
        template, index = self._sources.split(key)
        found = self._by_key.get(template)
        return found and self._piece(key, found[0], index, found[1])

    def find_module(self, module: str) -> Piece | None:
        """The place of a source module (no `.weight`); None if it is not in the table."""
        template, index = self._sources.split(module)
        rule = self._by_module.get(template)
        return rule and self._piece(module, rule.target, index, rule)

    def find_flat(self, name: str) -> Piece | None:
        """The same for a module with `_` in place of every dot, as kohya writes it."""
        template, index = self._flat_sources.split(name)
        rule = self._by_flat_name.get(template)
        return rule and self._piece(_fill(rule.source, index), rule.target, index, rule)

    def sources_of(self, module: str) -> list[Piece]:
        """The source modules that make up a target module, in row order."""
        template, index = self._targets.split(module)
        pieces = [
            self._piece(_fill(rule.source, index), module, None, rule) for rule in self.rules if rule.target == template
        ]
        return sorted(pieces, key=lambda piece: piece.part or 0)

    def sources_of_tensor(self, name: str) -> list[Piece]:
        """The source tensors that make up a target tensor, in row order; empty if it is not in the table."""
        template, index = self._targets.split(name)
        pieces = [
            self._piece(_fill(source, index), name, None, rule)
            for rule in self.rules
            for source, target in rule.key_pairs()
            if target == template
        ]
        return sorted(pieces, key=lambda piece: piece.part or 0)

    def _piece(self, source: str, target: str, index: str | None, rule: Rule) -> Piece:
        last = (rule.part or 0) == self._parts[rule.target]
        return Piece(source, _fill(target, index), rule.part, rule.swap_halves, rule.optional, last)

    def match(self, keys: Iterable[str]) -> MatchReport:
        """Match every key: what it becomes, which keys are unknown, and which are missing.

        A key is missing if the file has its block, and its rule is not optional or another key of the rule is there.

        Raises:
            CheckpointError: two keys are for the same tensor.
        """
        keys = set(keys)
        matched: dict[str, list[Piece]] = {}
        unmatched = []
        for key in sorted(keys):
            piece = self.find(key)
            if piece is None:
                unmatched.append(key)
            else:
                matched.setdefault(piece.target, []).append(piece)
        for target, pieces in matched.items():
            pieces.sort(key=lambda piece: piece.part or 0)
            if len({piece.part for piece in pieces}) < len(pieces):
                raise CheckpointError(
                    f"{name_some(p.source for p in pieces)} would all become {target}; expected one of them. Load the unchanged file."
                )
        return MatchReport(matched, tuple(unmatched), tuple(sorted(self._expected(keys) - keys)))

    def _expected(self, keys: set[str]) -> set[str]:
        blocks = self._blocks(keys)
        expected = set()
        for rule in self.rules:
            stem = _stem(rule.source)
            for index in blocks[stem] if stem else [None]:
                wanted = {_fill(source, index) for source, _ in rule.key_pairs()}
                if not rule.optional or wanted & keys:
                    expected |= wanted
        return expected

    def _blocks(self, keys: set[str]) -> dict[str, list[str]]:
        """Stem -> its block indices: all up to the highest, unless most of these would be gaps."""
        found: dict[str, set[int]] = {stem: set() for rule in self.rules if (stem := _stem(rule.source))}
        for key in keys:
            template, index = self._sources.split(key)
            if index is not None:
                found[_stem(template)].add(int(index))
        return {stem: list(map(str, _with_gaps(indices))) for stem, indices in found.items()}


def _with_gaps(indices: set[int]) -> Iterable[int]:
    depth = max(indices, default=-1) + 1
    # one index far above the others is not a block of the model
    return range(depth) if depth <= 2 * len(indices) else sorted(indices)


def fused_shape(shapes: Sequence[Shape]) -> tuple[int, ...]:
    """Shape of a target whose sources are stacked along the rows."""
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def fuse(pieces: Sequence[Piece], tensors: Mapping[str, Tensor]) -> Tensor:
    """The target tensor of one match: its sources stacked along the rows, with halves swapped if the rule says so.

    Raises:
        CheckpointError: a part of a fused tensor is missing, or parts differ in width.
    """
    parts = [piece.part for piece in pieces]
    if parts != [None] and parts != list(range(len(parts))):
        raise CheckpointError(
            f"{pieces[0].target} needs all its parts, but the file only has {name_some(p.source for p in pieces)}."
        )
    values = [tensors[piece.source] for piece in pieces]
    if len({value.shape[1:] for value in values}) > 1:
        raise CheckpointError(
            f"{name_some(p.source for p in pieces)} become one tensor and need equal widths, "
            f"but their shapes are {', '.join(str(tuple(value.shape)) for value in values)}."
        )
    value = values[0] if len(values) == 1 else torch.cat(values)
    return pieces[0].in_native_order(value)


def unfuse(pieces: Sequence[Piece], tensor: Tensor, width: int) -> Iterator[tuple[str, Tensor]]:
    """Undo `fuse`: (source, tensor) of every source of a target tensor.

    Args:
        width: columns of the target's weight.
    """
    for piece in pieces:
        yield piece.source, piece.in_native_order(tensor[piece.rows(width)])
