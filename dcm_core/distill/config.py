"""What a training run is told: validated settings with the paper's values as defaults."""

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any

from ..errors import DCMError
from ..families import Family
from ..routing import Side
from ..schedule import DEFAULT_POINTS, DEFAULT_SHIFT, TIMESTEPS, generic_sigmas
from .method.phases import Phases


class TrainingError(DCMError):
    """A training run that cannot start, continue or be resumed."""


SCHEDULERS = ("constant", "cosine")
# the types of settings, as a reader calls them
WORDS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}

# name -> (lowest, highest) of the numbers
LIMITS: dict[str, tuple[float, float]] = {
    "steps": (1, 1e7),
    "batch_size": (1, 4096),
    "accumulate": (1, 4096),
    "seed": (0, 2**63 - 1),
    "rank": (0, 4096),
    "alpha": (1e-6, 1e6),
    "learning_rate": (1e-12, 10),
    "discriminator_learning_rate": (1e-12, 10),
    "warmup_steps": (0, 1e7),
    "clip_norm": (1e-6, 1e6),
    "ema_decay": (0, 0.999999),
    "entry_share": (0, 1),
    "cfg": (0, 100),
    "temporal_weight": (0, 1e4),
    "adversarial_weight": (0, 1e4),
    "feature_weight": (0, 1e6),
    "discriminator_width": (32, 8192),
    "guidance": (0, 100),
    "save_every": (1, 1e7),
    "keep": (1, 1000),
    "held_out": (0, 1e6),
    "held_out_every": (1, 1e7),
    "sample_every": (0, 1e7),
    "sample_steps": (1, 1000),
    "weight_decay": (0, 10),
    "divergence": (0, 1e9),
}
# What a resumed run may change: how long, how fast, how often.
FREE = {
    "steps",
    "save_every",
    "keep",
    "held_out_every",
    "sample_every",
    "checkpointing",
    "divergence",
    "learning_rate",
    "discriminator_learning_rate",
}


@dataclass(frozen=True)
class TrainingConfig:
    """Settings of one run.

    Attributes:
        expert: which expert is trained.
        boundary: sigma between the experts, stored with the result; 0 takes the given expert's, else the family's.
        shift, points: of the solver's noise levels.
        phases: consistency phases of this expert (of each side, where it is shared).
        entry_share: share of the drawn noise levels that are the noisiest of a phase, where a step of sampling enters it; the rest
            are drawn from all alike.
        shared: train one expert for all noise levels (the paper's ablation).
        batch_size: videos a step and process; `accumulate` batches make one update.
        rank, alpha: of the low-rank pairs; rank 0 is a full fine-tune (semantic expert only).
        every_linear: give the detail expert pairs on every linear of the blocks, as a semantic LoRA has them, not only on the
            release's attention projections.
        learning_rate: the peak; 0 takes the paper's (full fine-tune 1e-6, detail 5e-6) or 1e-4 for a semantic LoRA.
        ema_decay: of the averaged expert, which is the target network of the semantic stage and the result; 0 for none.
        cfg: w of the teacher's v_cond + w (v_cond - v_uncond).
        adversarial_weight: of the GAN and feature matching losses; 0 trains the detail expert by consistency alone.
        feature_weight: of feature matching; -1 takes the family's.
        discriminator_width: channels of its heads, a multiple of 32.
        guidance: embedded guidance (HunyuanVideo).
        divergence: how many times its lowest the loss may become before the run is ended; 0 for any.
        held_out: clips kept for the held-out loss.
        sample_every: steps between sample videos, 0 for none; sample_steps: steps of a sample.

    Raises:
        TrainingError: a value outside its limits.
    """

    expert: Side
    steps: int = 1000
    batch_size: int = 1
    accumulate: int = 1
    rank: int = 128
    alpha: float = 256.0
    every_linear: bool = False
    learning_rate: float = 0.0
    discriminator_learning_rate: float = 5e-6
    scheduler: str = "constant"
    warmup_steps: int = 10
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    divergence: float = 20.0
    ema_decay: float = 0.95
    boundary: float = 0.0
    shift: float = DEFAULT_SHIFT
    points: int = DEFAULT_POINTS
    phases: int = 1
    entry_share: float = 0.0
    shared: bool = False
    cfg: float = 5.0
    temporal_weight: float = 1.0
    adversarial_weight: float = 0.1
    feature_weight: float = -1.0
    discriminator_width: int = 1024
    guidance: float = 6.0
    checkpointing: bool = True
    seed: int = 0
    save_every: int = 100
    keep: int = 2
    held_out: int = 0
    held_out_every: int = 50
    sample_every: int = 0
    sample_steps: int = 6

    def __post_init__(self) -> None:
        if self.expert not in ("semantic", "detail"):
            raise TrainingError(f"expert is {self.expert!r}; choose semantic or detail.")
        if self.scheduler not in SCHEDULERS:
            raise TrainingError(f"scheduler is {self.scheduler!r}; choose one of {', '.join(SCHEDULERS)}.")
        for name, (low, high) in LIMITS.items():
            value = getattr(self, name)
            auto = (name, value) in (("learning_rate", 0), ("feature_weight", -1))
            if not auto and not (isinstance(value, (int, float)) and math.isfinite(value) and low <= value <= high):
                raise TrainingError(f"{name} is {value!r}; expected a number from {low:g} to {high:g}.")
        if self.discriminator_width % 32:
            raise TrainingError(f"discriminator_width is {self.discriminator_width}; expected a multiple of 32.")
        if self.expert == "detail" and self.shared:
            raise TrainingError(
                "shared is true, but an expert for all noise levels is trained as a semantic expert. Train that."
            )
        if self.expert == "detail" and self.rank == 0:
            raise TrainingError("rank is 0, but a detail expert is a LoRA: expected 1 or more (released models: 128).")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TrainingConfig":
        """Settings from a file's values.

        Raises:
            TrainingError: a name that is none, or a value of another type.
        """
        kinds = {field.name: type(field.default) for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - set(kinds))
        if unknown:
            raise TrainingError(f"Unknown setting {', '.join(unknown)}. Valid settings: {', '.join(kinds)}.")
        for name, value in values.items():
            kind = str if name == "expert" else kinds[name]
            fits = isinstance(value, kind) or (kind is float and isinstance(value, int) and not isinstance(value, bool))
            if not fits or (kind is int and isinstance(value, bool)):
                raise TrainingError(f"{name} is {value!r}; expected {WORDS[kind]}.")
        return cls(**values)

    def for_family(self, family: Family, boundary: float | None = None) -> "TrainingConfig":
        """With every automatic value filled in; `boundary` is that of the experts it starts from or belongs with."""
        rate = self.learning_rate or (5e-6 if self.expert == "detail" else 1e-4 if self.rank else 1e-6)
        return dataclasses.replace(
            self,
            boundary=self.boundary or boundary or family.preset.boundary,
            learning_rate=rate,
            feature_weight=family.feature_weight if self.feature_weight == -1 else self.feature_weight,
        )

    @property
    def adversarial(self) -> bool:
        """Whether there is a discriminator."""
        return self.expert == "detail" and self.adversarial_weight > 0

    def make_phases(self, family: Family) -> Phases:
        steps = tuple(timestep / TIMESTEPS for timestep in self.timesteps(family))
        return Phases(
            self.expert, self.boundary, self.shift, self.points, self.phases, self.shared, steps, self.entry_share
        )

    def timesteps(self, family: Family) -> tuple[float, ...]:
        """What the expert is stored with: the release's schedule where it was trained on its noise levels, else the generic one."""
        if (self.shift, self.points) == (DEFAULT_SHIFT, DEFAULT_POINTS):
            return family.preset.timesteps
        return tuple(1000 * value for value in generic_sigmas(self.sample_steps, self.shift, self.points)[:-1].tolist())

    def differences(self, other: "TrainingConfig") -> list[str]:
        """`name: other's -> mine` of every setting that a resumed run may not change."""
        return self._compared(other, [field.name for field in dataclasses.fields(self) if field.name not in FREE])

    def changes(self, other: "TrainingConfig") -> list[str]:
        """The same of those that it may change."""
        return self._compared(other, [field.name for field in dataclasses.fields(self) if field.name in FREE])

    def new_rates(self, other: "TrainingConfig") -> list[str]:
        """The same of the learning rates that are used."""
        return self._compared(other, ["learning_rate", *(["discriminator_learning_rate"] if self.adversarial else [])])

    def _compared(self, other: "TrainingConfig", names: list[str]) -> list[str]:
        return [
            f"{name}: {getattr(other, name)!r} -> {getattr(self, name)!r}"
            for name in names
            if getattr(self, name) != getattr(other, name)
        ]

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))
