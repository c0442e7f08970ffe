"""Apply and invert a table that says what a tensor of one layout is called in another.

A table is a tuple of `Rule`s. A rule maps a module's tensors; `{n}` stands for a block index. Several modules may be
rows of one target (`part`): a fused qkv, or `linear1` with its q, k, v and mlp rows.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .errors import CheckpointError, name_some

Shape = Sequence[int]

# No model has a thousand blocks; a file that names more would have us look for all of them.
BLOCK_INDEX = r"\d{1,3}"


@dataclass(frozen=True)
class Rule:
    """One line of a table: module `source` is `target`, or the rows `part` of it.

    Attributes:
        params: the tensor names behind the module; ("",) where the rule names a whole key.
        target_params: their names in the target, same order; empty if equal.
        part: index among the row blocks of a fused target, each as high as the target's input is wide
            (the last one takes what remains); None if the source is the whole target.
        swap_halves: the two halves of the rows change places.
        optional: not every model of the family has it.
    """

    source: str
    target: str
    params: tuple[str, ...] = ("weight", "bias")
    target_params: tuple[str, ...] = ()
    part: int | None = None
    swap_halves: bool = False
    optional: bool = False

    def key_pairs(self) -> Iterable[tuple[str, str]]:
        """(source, target) key templates."""
        for param, target_param in zip(self.params, self.target_params or self.params, strict=True):
            yield _join(self.source, param), _join(self.target, target_param)


@dataclass(frozen=True)
class Piece:
    """A source tensor's place in its target."""

    source: str
    target: str
    part: int | None = None
    swap_halves: bool = False

    def in_native_order(self, tensor: Tensor) -> Tensor:
        """The source's rows in the order of the target's."""
        return torch.cat(tensor.chunk(2)[::-1]) if self.swap_halves else tensor


@dataclass(frozen=True)
class MatchReport:
    """Every key of a file, accounted for."""

    matched: dict[str, list[Piece]]
    unmatched: tuple[str, ...]
    missing: tuple[str, ...]

    @property
    def complete(self) -> bool:
        return not self.unmatched and not self.missing


def _join(module: str, param: str) -> str:
    return f"{module}.{param}" if param else module


def _pattern(template: str) -> re.Pattern[str]:
    return re.compile(re.escape(template).replace(r"\{n\}", rf"({BLOCK_INDEX})"))


def _fill(template: str, index: str | None) -> str:
    return template if index is None else template.replace("{n}", index)


def _index(match: re.Match[str]) -> str | None:
    return match[1] if match.re.groups else None


def _templates(name: str) -> Iterable[tuple[str, str | None]]:
    """(template, block index) of all templates that a name could be of: itself, or with one of its numbers as `{n}`."""
    if "{" not in name:
        yield name, None
        parts = name.split(".")
        for place, part in enumerate(parts):
            if re.fullmatch(BLOCK_INDEX, part):
                yield ".".join((*parts[:place], "{n}", *parts[place + 1 :])), part


class KeyMap:
    """A table of rules, usable from both ends."""

    def __init__(self, rules: Sequence[Rule]):
        self.rules = tuple(rules)

    @cached_property
    def _by_key(self) -> dict[str, tuple[str, Rule]]:
        """Key template -> (target's template, rule)."""
        return {source: (target, rule) for rule in reversed(self.rules) for source, target in rule.key_pairs()}

    @cached_property
    def _by_module(self) -> dict[str, Rule]:
        return {rule.source: rule for rule in reversed(self.rules)}

    def find(self, key: str) -> Piece | None:
        """The place of a source key, None if the table does not know it."""
        for template, index in _templates(key):
            if template in self._by_key:
                target, rule = self._by_key[template]
                return Piece(key, _fill(target, index), rule.part, rule.swap_halves)
        return None

    def find_module(self, module: str) -> Piece | None:
        """The place of a source module (no `.weight`), None if the table does not know it."""
        for template, index in _templates(module):
            if rule := self._by_module.get(template):
                return Piece(module, _fill(rule.target, index), rule.part, rule.swap_halves)
        return None

    def sources_of(self, module: str) -> list[Piece]:
        """The source modules that make up a target module, in row order."""
        pieces = []
        for rule in self.rules:
            if match := _pattern(rule.target).fullmatch(module):
                pieces.append(Piece(_fill(rule.source, _index(match)), module, rule.part, rule.swap_halves))
        return sorted(pieces, key=lambda piece: piece.part or 0)

    def match(self, keys: Iterable[str]) -> MatchReport:
        """Account for every key: what it becomes, which are unknown, which are missing.

        A key is missing if its rule is not optional (or another key of the rule is there) and the file has the block.

        Raises:
            CheckpointError: two keys that would land in one place.
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
                raise CheckpointError(f"{name_some(p.source for p in pieces)} would all become {target}; expected one of them.")
        return MatchReport(matched, tuple(unmatched), tuple(sorted(self._expected(keys) - keys)))

    def _expected(self, keys: set[str]) -> set[str]:
        depths = self._depths(keys)
        expected = set()
        for rule in self.rules:
            stem = _stem(rule.source)
            for index in map(str, range(depths.get(stem, 0))) if stem else [None]:
                wanted = {_fill(source, index) for source, _ in rule.key_pairs()}
                if not rule.optional or wanted & keys:
                    expected |= wanted
        return expected

    def _depths(self, keys: set[str]) -> dict[str, int]:
        """Number of blocks of each numbered stem (`blocks.{n}` -> highest index + 1)."""
        depths: dict[str, int] = {}
        for stem in {stem for rule in self.rules if (stem := _stem(rule.source))}:
            pattern = re.compile(_pattern(stem).pattern + r"\..+")
            found = [int(match[1]) for key in keys if (match := pattern.fullmatch(key))]
            depths[stem] = max(found, default=-1) + 1
        return depths


def _stem(template: str) -> str | None:
    head, mark, _ = template.partition("{n}")
    return head + mark if mark else None


def fused_shape(shapes: Sequence[Shape]) -> tuple[int, ...]:
    """Shape of the target made of sources stacked along the rows."""
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def fuse(pieces: Sequence[Piece], tensors: Mapping[str, Tensor]) -> Tensor:
    """The target tensor of one match: its sources stacked along the rows, halves swapped where the rule says so.

    Raises:
        CheckpointError: parts of a fused tensor that are missing or whose inputs differ in width.
    """
    parts = [piece.part for piece in pieces]
    if parts != [None] and parts != list(range(len(parts))):
        raise CheckpointError(f"{pieces[0].target} needs all its parts; found only {name_some(p.source for p in pieces)}.")
    values = [tensors[piece.source] for piece in pieces]
    if len({value.shape[1:] for value in values}) > 1:
        raise CheckpointError(
            f"{name_some(p.source for p in pieces)} become one tensor and need equal widths, "
            f"but have shapes {', '.join(str(tuple(value.shape)) for value in values)}."
        )
    value = values[0] if len(values) == 1 else torch.cat(values)
    return pieces[0].in_native_order(value)
