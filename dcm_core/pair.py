"""Two full models that share one trajectory (Wan 2.2 A14B), and how the experts trained on them know each other.

Both models have the same layers and sizes, so only their weights tell them apart. Biases are compared: quantised files store
them unchanged, or nearly so.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .errors import ExpertError
from .routing import SIDES, Side

# Values in a fingerprint, and the most that are read from a file.
COUNT, MOST = 128, 1000
# Part of a fingerprint that must be nearer to one model than to the other.
CLEAR = 0.75

Fingerprint = tuple[float, ...]


@dataclass(frozen=True)
class Pair:
    """What each of two experts knows of both.

    Attributes:
        id: the same for two experts with the same models, boundary and timesteps: they belong together.
        semantic, detail: fingerprint of the high-noise and of the low-noise model.
    """

    id: str
    semantic: Fingerprint
    detail: Fingerprint

    @property
    def bases(self) -> dict[Side, Fingerprint]:
        return {side: getattr(self, side) for side in SIDES}

    def side_of(self, base: Fingerprint) -> Side | None:
        """Which of the two models this is, in whatever precision; None if it is neither."""
        if len(base) != len(self.semantic):
            return None
        nearer = [
            abs(value - high) < abs(value - low)
            for value, high, low in zip(base, self.semantic, self.detail, strict=True)
            if high != low
        ]
        share = sum(nearer) / len(nearer)
        return "semantic" if share >= CLEAR else "detail" if share <= 1 - CLEAR else None


def two_bases(semantic: Fingerprint, detail: Fingerprint) -> dict[Side, Fingerprint]:
    """The fingerprints of two models.

    Raises:
        ExpertError: both are the same model.
    """
    if semantic == detail:
        raise ExpertError(
            "The high-noise and the low-noise model have the same weights; expected two different models. To train both experts on one "
            "model, leave the other one out."
        )
    return {"semantic": semantic, "detail": detail}


def make_pair(bases: Mapping[Side, Fingerprint], boundary: float, timesteps: Sequence[float]) -> Pair:
    """What the experts of two models know."""
    semantic, detail = (tuple(bases[side]) for side in SIDES)
    known = repr((semantic, detail, boundary, tuple(timesteps)))
    return Pair(hashlib.sha256(known.encode()).hexdigest()[:16], semantic, detail)


def fingerprint(names: Iterable[str], read: Callable[[str], Tensor]) -> Fingerprint:
    """Values of a model's biases, spread over all of them. `names` are native tensor names."""
    biases = sorted(name for name in names if name.endswith(".bias"))
    values = []
    for place in range(COUNT if biases else 0):
        tensor = read(biases[place * len(biases) // COUNT]).flatten()
        values.append(float(f"{float(tensor[place % len(tensor)]):.4g}"))
    return tuple(values)


def to_entry(pair: Pair) -> dict[str, Any]:
    """The form in which it is written to a file."""
    return {"id": pair.id, **{side: list(values) for side, values in pair.bases.items()}}


def from_entry(entry: Any) -> Pair | None:
    """The reverse of `to_entry`; None for anything else."""
    if not isinstance(entry, dict) or not isinstance(entry.get("id"), str) or not 0 < len(entry["id"]) <= 64:
        return None
    semantic, detail = (_numbers(entry.get(side)) for side in SIDES)
    if not semantic or not detail or len(semantic) != len(detail) or semantic == detail:
        return None
    return Pair(entry["id"], semantic, detail)


def _numbers(values: Any) -> Fingerprint | None:
    fits = isinstance(values, list) and len(values) <= MOST
    if not fits or not all(isinstance(value, int | float) and abs(value) < 1e9 for value in values):
        return None
    return tuple(float(value) for value in values) if all(map(math.isfinite, values)) else None
