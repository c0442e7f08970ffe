"""The official recipes against what the official scripts set, and what of them a run takes."""

import dataclasses

import pytest

from dcm_core.distill.config import SETTINGS, TrainingConfig, TrainingError
from dcm_core.distill.recipes import CUSTOM, RECIPES, changed_settings, recipe_of
from dcm_core.families import HUNYUAN_VIDEO, WAN

# scripts/distill/*.sh of the official code, with the defaults of the programs that they start
BOTH = {"weight_decay": 0.001, "clip_norm": 1.0, "ema_decay": 0.0, "shift": 17.0, "points": 50, "scheduler": "constant"}
OFFICIAL = {
    ("official Wan", "semantic"): {**BOTH, "steps": 1000, "cfg": 5.0, "caption_dropout": 0.1},
    ("official Wan", "detail"): {**BOTH, "steps": 1000, "cfg": 5.0, "caption_dropout": 0.1},
    ("official HunyuanVideo", "semantic"): {
        **BOTH,
        "steps": 1500,
        "cfg": 0.0,
        "caption_dropout": 0.0,
        "guidance": 6.0,
    },
    ("official HunyuanVideo", "detail"): {
        **BOTH,
        "steps": 1000,
        "cfg": 0.0,
        "caption_dropout": 0.0,
        "guidance": 6.0,
    },
}
DISCRIMINATOR = {
    "discriminator_clip_norm": 1.0,
    "discriminator_weight_decay": 0.001,
    "discriminator_learning_rate": 1e-5,
    "adversarial_weight": 0.1,
}


@pytest.mark.parametrize(("name", "side"), OFFICIAL)
def test_a_recipe_is_the_official_run(name, side):
    recipe, family = RECIPES[name], WAN if "Wan" in name else HUNYUAN_VIDEO
    recipe.check(family)
    plain = TrainingConfig(side, rank=0) if side == "semantic" else TrainingConfig(side)
    config = recipe.applied(plain, own={"rank"}).for_family(family)
    expected = OFFICIAL[name, side] | (DISCRIMINATOR if side == "detail" else {})
    assert {setting: getattr(config, setting) for setting in expected} == expected
    assert config.learning_rate == (1e-6 if side == "semantic" else 5e-6)
    assert config.feature_weight == (10 if family is WAN else 1)
    assert (config.rank, config.phases, config.warmup_steps) == (0 if side == "semantic" else 128, 1, 0)


def test_own_values_override_the_recipe_and_are_named():
    recipe = recipe_of("official Wan")
    config = recipe.applied(TrainingConfig("semantic", steps=1000, cfg=3.0), own={"steps", "cfg"})
    assert (config.steps, config.cfg, config.weight_decay) == (1000, 3.0, 0.001)
    assert recipe.in_words(config) == (
        "Recipe official Wan: warmup_steps 0, weight_decay 0.001, ema_decay 0.0, caption_dropout 0.1. "
        "Your own: cfg 3.0 instead of 5.0, rank 128 instead of 0, a full fine-tune."
    )
    full = recipe.applied(TrainingConfig("semantic", rank=0), own=())
    assert "Your own" not in recipe.in_words(full)
    # on a node: what is not at its default
    assert changed_settings(TrainingConfig("semantic", steps=7, cfg=5.0, seed=3)) == {"steps", "seed"}


def test_a_recipe_sets_what_it_names_and_no_more():
    recipe, config = recipe_of("official HunyuanVideo"), TrainingConfig("detail", seed=3, rank=16, alpha=32.0)
    applied = recipe.applied(config, own={"rank", "alpha"})
    values = recipe.settings("detail")
    assert values.keys() <= SETTINGS.keys()
    assert not any(SETTINGS[name].only == "semantic" for name in values)
    back = {name: getattr(config, name) for name in values}
    assert dataclasses.replace(applied, **back) == config


def test_a_recipe_that_does_not_fit_is_named():
    assert recipe_of(CUSTOM) is None
    for wrong in ("official", ["official Wan"], None):
        with pytest.raises(TrainingError, match="choose one of custom, official Wan, official HunyuanVideo"):
            recipe_of(wrong)
    with pytest.raises(
        TrainingError,
        match=r"recipe is official HunyuanVideo, but the model is Wan 2\.1, not HunyuanVideo\. Choose official Wan or custom",
    ):
        recipe_of("official HunyuanVideo").check(WAN)
