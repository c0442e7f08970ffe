"""What the official training scripts set, by name. `docs/training-reference.md` lists what differs from them on purpose."""

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from ..families import FAMILIES, HUNYUAN_VIDEO, WAN, Family
from ..routing import Side
from .config import SETTINGS, TrainingConfig, TrainingError

CUSTOM = "custom"

BOTH = {
    "shift": 17.0,
    "points": 50,
    "phases": 1,
    "scheduler": "constant",
    "warmup_steps": 0,
    "weight_decay": 0.001,
    "clip_norm": 1.0,
    "ema_decay": 0.0,
}
SEMANTIC = {"temporal_weight": 1.0}
DETAIL = {
    "rank": 128,
    "alpha": 256.0,
    "steps": 1000,
    "adversarial_weight": 0.1,
    "discriminator_width": 1024,
    "discriminator_learning_rate": 1e-5,
    "discriminator_weight_decay": 0.001,
    "discriminator_clip_norm": 1.0,
}


@dataclass(frozen=True)
class Recipe:
    """Settings of a run for one family. The rank of a semantic expert is not among them: the official one is a full fine-tune.

    Attributes:
        family: name of the family it was made for.
        both: values by setting that other families do not share.
        semantic_steps: steps of its semantic expert.
    """

    name: str
    family: str
    both: Mapping[str, Any]
    semantic_steps: int

    def settings(self, side: Side) -> dict[str, Any]:
        """Name -> value for the expert of a side."""
        of_side = {**SEMANTIC, "steps": self.semantic_steps} if side == "semantic" else DETAIL
        return {**BOTH, **self.both, **of_side}

    def check(self, family: Family) -> None:
        """Refuse a model of another family.

        Raises:
            TrainingError: names the recipe for the model.
        """
        if family.name != self.family:
            fitting = [recipe.name for recipe in RECIPES.values() if recipe.family == family.name]
            raise TrainingError(
                f"recipe is {self.name}, but the model is {family.title}, not {FAMILIES[self.family].title}. "
                f"Choose {' or '.join([*fitting, CUSTOM])}."
            )

    def applied(self, config: TrainingConfig, own: Collection[str]) -> TrainingConfig:
        """The config with the recipe's values, except for the settings in `own`."""
        values = self.settings(config.side)
        return dataclasses.replace(config, **{name: values[name] for name in values if name not in own})

    def in_words(self, config: TrainingConfig) -> str:
        """What the recipe set in a config that it was applied to, and what differs from it."""
        values = self.settings(config.side)
        kept = {name: value for name, value in values.items() if getattr(config, name) == value}
        own = [f"{name} {getattr(config, name)} instead of {values[name]}" for name in values if name not in kept]
        sets = [f"{name} {value}" for name, value in kept.items() if value != getattr(TrainingConfig, name)]
        if config.side == "semantic" and config.rank:
            own.append(f"rank {config.rank} instead of 0, a full fine-tune")
        return f"Recipe {self.name}: {', '.join(sets)}." + (f" Your own: {', '.join(own)}." if own else "")


def recipe_of(name: str) -> Recipe | None:
    """A recipe by its name; None for `CUSTOM`.

    Raises:
        TrainingError: there is no such recipe.
    """
    if name == CUSTOM:
        return None
    if not isinstance(name, str) or name not in RECIPES:
        raise TrainingError(f"recipe is {name!r}; choose one of {', '.join([CUSTOM, *RECIPES])}.")
    return RECIPES[name]


def changed_settings(config: TrainingConfig) -> set[str]:
    """The settings that are not at their default."""
    return {name for name in SETTINGS if getattr(config, name) != getattr(TrainingConfig, name)}


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("official Wan", WAN.name, {"cfg": 5.0, "caption_dropout": 0.1}, semantic_steps=1000),
        # the teacher has embedded guidance instead of CFG
        Recipe(
            "official HunyuanVideo",
            HUNYUAN_VIDEO.name,
            {"cfg": 0.0, "guidance": 6.0, "caption_dropout": 0.0},
            semantic_steps=1500,
        ),
    )
}
