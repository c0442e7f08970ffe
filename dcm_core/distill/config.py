"""Settings of a training run: validated, with the paper's values as defaults."""

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ..errors import DCMError
from ..families import Family
from ..routing import Side
from ..schedule import DEFAULT_POINTS, DEFAULT_SHIFT, TIMESTEPS, generic_sigmas
from ..text import given
from .method.phases import Phases


class TrainingError(DCMError):
    """A training run cannot start, continue or be resumed."""


SCHEDULERS = ("constant", "cosine")
# Larger integers do not fit into a tensor.
LARGEST = 2**63 - 1
OPTIMIZERS = ("adamw", "adamw8bit")
# names of the types for readers
WORDS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


@dataclass(frozen=True)
class Setting:
    """The description of a setting. Checks, node widgets and the table in docs/training-reference.md are made from it.

    Attributes:
        help: what it does, then what to set, then what 0 or -1 means.
        semantic_help: added to the help for a semantic expert.
        limits: the lowest and the highest number.
        automatic: a number that stands for a value derived from expert and model. It may be outside the limits.
        widget: lowest number, highest number and step of the node's widget, if they differ from the limits; None for no step.
        options: the texts to choose from.
        only: the expert that has this setting, if not both.
        resumable: whether a resumed run may change it, because it only sets how long, how fast or how often.
        former: its name in settings files, checkpoints and saved graphs of earlier versions.
    """

    help: str
    semantic_help: str = ""
    limits: tuple[float, float] | None = None
    automatic: float | None = None
    widget: tuple[float, float, float | None] | None = None
    options: tuple[str, ...] = ()
    only: Side | None = None
    resumable: bool = False
    former: str = ""

    def help_for(self, expert: Side) -> str:
        return f"{self.help} {self.semantic_help}" if expert == "semantic" and self.semantic_help else self.help

    def problem_of(self, value: Any) -> str:
        """What is wrong with a value of the right type, to be added to a message; empty if nothing is."""
        if self.options and value not in self.options:
            return f"choose one of {', '.join(self.options)}"
        if self.limits is None or value == self.automatic:
            return ""
        low, high = self.limits
        # NaN is in no range
        fits = isinstance(value, (int, float)) and low <= value <= high
        return "" if fits else f"expected a number from {low:g} to {high:g}"


def renamed(values: dict[str, Any], former: dict[str, str]) -> dict[str, Any]:
    """Rename values from the names of earlier versions.

    Args:
        former: name in earlier versions -> current name.

    Raises:
        TrainingError: both names are there.
    """
    for old, name in former.items():
        if old in values and name in values:
            raise TrainingError(f"{old} is the old name of {name}, and both are set. Remove {old}.")
    return {former.get(name, name): value for name, value in values.items()}


def check_type(name: str, value: Any, kind: type) -> None:
    """Check the type of a setting from a file. An integer may stand for any number.

    Raises:
        TrainingError: the value has another type.
    """
    fits = isinstance(value, kind) or (kind is float and isinstance(value, int))
    if not fits or (isinstance(value, bool) and kind is not bool):
        raise TrainingError(f"{name} is {given(value)}; expected {WORDS[kind]}.")
    if isinstance(value, int) and abs(value) > LARGEST:
        raise TrainingError(f"{name} is {given(value)}, which is too large; expected at most {LARGEST}.")


def setting(default: Any, help: str, semantic_help: str = "", **about: Any) -> Any:
    """A dataclass field with its `Setting`."""
    return dataclasses.field(default=default, metadata={"setting": Setting(help, semantic_help, **about)})


@dataclass(frozen=True)
class TrainingConfig:
    """Settings of one run that trains the expert of a `side`. `SETTINGS` describes each of them.

    Raises:
        TrainingError: a value is outside its limits.
    """

    side: Side
    steps: int = setting(
        1000,
        "Total optimiser steps. Raise it to train a finished run further.",
        limits=(1, 1e7),
        widget=(1, 1_000_000, None),
        resumable=True,
    )
    batch_size: int = setting(1, "Videos in memory at once.", limits=(1, 4096), widget=(1, 256, None))
    gradient_accumulation_steps: int = setting(
        1,
        "Gradient accumulation: batches per optimiser step.",
        limits=(1, 4096),
        widget=(1, 1024, None),
        former="accumulate",
    )
    rank: int = setting(
        128,
        "LoRA rank (released models: 128).",
        "0 trains every weight of the model.",
        limits=(0, 4096),
        widget=(0, 1024, None),
    )
    alpha: float = setting(
        256.0,
        "LoRA scale is alpha / rank (released models: 2). If you change rank, change alpha too.",
        limits=(1e-6, 1e6),
        widget=(0.01, 4096.0, 0.5),
    )
    every_linear: bool = setting(
        False,
        "Trains a LoRA on every linear layer of the blocks, feed-forward too; the release trains attention only. Helps "
        "on top of a fully fine-tuned semantic expert. The file is larger.",
        only="detail",
    )
    learning_rate: float = setting(
        0.0,
        "Peak learning rate of AdamW. 0 uses 1e-4 for a semantic LoRA, 1e-6 for rank 0 and 5e-6 for a detail expert.",
        limits=(1e-12, 10),
        automatic=0,
        widget=(0.0, 1.0, 1e-7),
        resumable=True,
    )
    optimizer: str = setting(
        "adamw",
        "adamw8bit stores AdamW's moments in 8 bits, a quarter of the memory. It needs the package bitsandbytes.",
        options=OPTIMIZERS,
    )
    discriminator_learning_rate: float = setting(
        5e-6,
        "Learning rate of the discriminator.",
        limits=(1e-12, 10),
        widget=(1e-9, 1.0, 1e-7),
        only="detail",
        resumable=True,
    )
    scheduler: str = setting("constant", "How the learning rate changes after warm-up.", options=SCHEDULERS)
    warmup_steps: int = setting(
        10, "Steps over which the learning rate rises to its peak.", limits=(0, 1e7), widget=(0, 100_000, None)
    )
    weight_decay: float = setting(0.0, "Weight decay of AdamW.", limits=(0, 10))
    clip_norm: float = setting(
        1.0, "Maximum gradient norm; larger gradients are scaled down to it.", limits=(1e-6, 1e6)
    )
    discriminator_weight_decay: float = setting(
        0.0, "Weight decay of the discriminator's AdamW.", limits=(0, 10), only="detail"
    )
    discriminator_clip_norm: float = setting(
        0.0,
        "Maximum gradient norm of the discriminator. 0 never scales its gradients down.",
        limits=(0, 1e6),
        only="detail",
    )
    divergence: float = setting(
        20.0,
        "Stops the run when the loss exceeds this many times its lowest value. 0 never stops it.",
        limits=(0, 1e9),
        resumable=True,
    )
    ema_decay: float = setting(
        0.95,
        "EMA decay. The averaged weights are what gets saved; 0 turns averaging off.",
        limits=(0, 0.999999),
        widget=(0.0, 0.9999, 0.01),
    )
    boundary: float = setting(
        0.0,
        "Sigma between the two experts, saved with the expert. Both experts need the same value. 0 uses the boundary of the "
        "other expert, else the default (Wan 2.1: 0.979, HunyuanVideo: 0.982, two models: 0.875 or 0.9).",
        widget=(0.0, 1.0, 0.001),
    )
    shift: float = setting(DEFAULT_SHIFT, "Shift of the noise levels.", widget=(0.01, 100.0, None))
    points: int = setting(DEFAULT_POINTS, "Noise levels of the solver, at most 1000 (released models: 50).")
    phases: int = setting(
        1,
        "Consistency phases of this expert (released models: 1). With as many phases as steps, every step is one jump.",
        widget=(1, 50, None),
    )
    entry_share: float = setting(
        0.0,
        "Share of training spent at the noise levels where a phase begins, from which the expert's steps start. The rest is "
        "spread over all noise levels. Use it with as many phases as steps.",
        limits=(0, 1),
        widget=(0.0, 1.0, 0.05),
    )
    shared: bool = setting(
        False,
        "Trains one expert for all noise levels, with as many phases on each side of the boundary.",
        only="semantic",
    )
    cfg: float = setting(
        5.0,
        "KSampler's cfg minus 1: the teacher's w in cond + w (cond - negative). 0 turns guidance off. The expert learns the "
        "guidance and then samples at cfg 1.",
        limits=(0, 100),
        widget=(0.0, 30.0, 0.1),
    )
    caption_dropout: float = setting(
        0.0,
        "Share of captions that are replaced with the empty text, drawn for every step. 0 uses every caption.",
        limits=(0, 1),
        widget=(0.0, 1.0, 0.01),
    )
    temporal_weight: float = setting(
        1.0,
        "Weight of the temporal coherence loss, which improves motion.",
        limits=(0, 1e4),
        widget=(0.0, 100.0, 0.1),
        only="semantic",
    )
    adversarial_weight: float = setting(
        0.1,
        "Weight of the GAN and feature matching losses, which improve sharpness. 0 uses the consistency loss alone.",
        limits=(0, 1e4),
        widget=(0.0, 100.0, 0.01),
        only="detail",
    )
    feature_weight: float = setting(
        -1.0,
        "Weight of feature matching beside the GAN loss. -1 uses the family's default (Wan 2.1: 10, HunyuanVideo: 1).",
        limits=(0, 1e6),
        automatic=-1,
        only="detail",
    )
    discriminator_width: int = setting(
        1024,
        "Channels of the discriminator's heads. Small models need fewer.",
        limits=(32, 8192),
        widget=(32, 4096, 32),
        only="detail",
    )
    guidance: float = setting(
        6.0,
        "Embedded guidance of HunyuanVideo, for training and sample videos.",
        limits=(0, 100),
        widget=(0.0, 100.0, 0.1),
    )
    gradient_checkpointing: bool = setting(
        True, "Needs much less memory and makes training somewhat slower.", resumable=True, former="checkpointing"
    )
    offload_activations: bool = setting(
        False,
        "Keeps the blocks' inputs in system memory until the backward pass. Needs less VRAM and some time. Only used with "
        "gradient_checkpointing.",
        resumable=True,
    )
    seed: int = setting(
        0, "Seed for initial weights, noise and clip order.", limits=(0, 2**63 - 1), widget=(0, 2**31, None)
    )
    save_every: int = setting(
        100, "Steps between checkpoints.", limits=(1, 1e7), widget=(1, 100_000, None), resumable=True
    )
    keep: int = setting(
        2, "How many of the most recent checkpoints to keep.", limits=(1, 1000), widget=(1, 1000, None), resumable=True
    )
    held_out: int = setting(
        0,
        "Number of clips kept out of training to measure the held-out loss.",
        limits=(0, 1e6),
        widget=(0, 10_000, None),
    )
    held_out_every: int = setting(
        50, "Steps between two measurements of the held-out loss.", limits=(1, 1e7), resumable=True
    )
    sample_every: int = setting(
        0, "Steps between sample videos. 0 makes none.", limits=(0, 1e7), widget=(0, 100_000, None), resumable=True
    )
    sample_steps: int = setting(
        6,
        "Number of sampling steps the expert is made for. Only used when shift is not 17, the value of the released models.",
        limits=(1, 1000),
        widget=(1, 50, None),
    )

    def __post_init__(self) -> None:
        if self.side not in ("semantic", "detail"):
            raise TrainingError(f"side is {self.side!r}; choose semantic or detail.")
        for name, about in SETTINGS.items():
            if problem := about.problem_of(value := getattr(self, name)):
                raise TrainingError(f"{name} is {given(value)}; {problem}.")
        if self.discriminator_width % 32:
            raise TrainingError(f"discriminator_width is {self.discriminator_width}; expected a multiple of 32.")
        if self.offload_activations and not self.gradient_checkpointing:
            raise TrainingError(
                "offload_activations is true, but gradient_checkpointing is false. Set gradient_checkpointing to true."
            )
        if self.side == "detail" and self.shared:
            raise TrainingError(
                "shared is true, but an expert for all noise levels is trained as a semantic expert. Train a semantic expert."
            )
        if self.side == "detail" and self.rank == 0:
            raise TrainingError("rank is 0, but a detail expert is a LoRA; expected 1 or more (released models: 128).")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TrainingConfig":
        """Settings from a file's values, by current names or those of earlier versions.

        Raises:
            TrainingError: a name is unknown, or a value has another type.
        """
        values = renamed(values, FORMER)
        kinds = {"side": str, **{name: type(getattr(cls, name)) for name in SETTINGS}}
        unknown = sorted(set(values) - set(kinds))
        if unknown:
            raise TrainingError(f"Unknown setting {', '.join(unknown)}. Valid settings: {', '.join(kinds)}.")
        for name, value in values.items():
            check_type(name, value, kinds[name])
        return cls(**values)

    def for_family(self, family: Family, boundary: float | None = None) -> "TrainingConfig":
        """The settings with every automatic value filled in. `boundary` comes from the experts that the run builds on."""
        rate = self.learning_rate or (5e-6 if self.side == "detail" else 1e-4 if self.rank else 1e-6)
        return dataclasses.replace(
            self,
            boundary=self.boundary or boundary or family.preset.boundary,
            learning_rate=rate,
            feature_weight=family.feature_weight if self.feature_weight == -1 else self.feature_weight,
        )

    @staticmethod
    def unused(side: Side, names: Iterable[str]) -> list[str]:
        """Those of the settings that the expert of this side does not have."""
        return [name for name in names if name in SETTINGS and SETTINGS[name].only not in (None, side)]

    @property
    def adversarial(self) -> bool:
        """Whether the run has a discriminator."""
        return self.side == "detail" and self.adversarial_weight > 0

    def make_phases(self, family: Family) -> Phases:
        steps = tuple(timestep / TIMESTEPS for timestep in self.timesteps(family))
        return Phases(
            self.side, self.boundary, self.shift, self.points, self.phases, self.shared, steps, self.entry_share
        )

    def timesteps(self, family: Family) -> tuple[float, ...]:
        """The timesteps saved with the expert: the release's if it was trained on those noise levels, else the generic schedule's."""
        if (self.shift, self.points) == (DEFAULT_SHIFT, DEFAULT_POINTS):
            return family.preset.timesteps
        return tuple(1000 * value for value in generic_sigmas(self.sample_steps, self.shift, self.points)[:-1].tolist())

    def differences(self, other: "TrainingConfig") -> list[str]:
        """`name: old -> new` for every changed setting that a resumed run must not change."""
        return self._compared(other, ["side", *(name for name, about in SETTINGS.items() if not about.resumable)])

    def changes(self, other: "TrainingConfig") -> list[str]:
        """The same for settings that it may change."""
        return self._compared(other, [name for name, about in SETTINGS.items() if about.resumable])

    def new_rates(self, other: "TrainingConfig") -> list[str]:
        """The same for the learning rates in use."""
        return self._compared(other, ["learning_rate", *(["discriminator_learning_rate"] if self.adversarial else [])])

    def _compared(self, other: "TrainingConfig", names: list[str]) -> list[str]:
        return [
            f"{name}: {getattr(other, name)!r} -> {getattr(self, name)!r}"
            for name in names
            if getattr(self, name) != getattr(other, name)
        ]

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))


# Every setting but `side`, by name.
SETTINGS: dict[str, Setting] = {
    field.name: field.metadata["setting"] for field in dataclasses.fields(TrainingConfig) if field.metadata
}
# Names in earlier versions -> current names.
FORMER = {"expert": "side", **{about.former: name for name, about in SETTINGS.items() if about.former}}
