"""Training settings."""

import dataclasses

import pytest

from dcm_core.distill.config import FORMER, TrainingConfig, TrainingError
from dcm_core.families import HUNYUAN_VIDEO, WAN


def test_the_paper_s_values_are_the_defaults():
    semantic, detail = (TrainingConfig(side).for_family(WAN) for side in ("semantic", "detail"))
    assert (semantic.boundary, semantic.shift, semantic.points, semantic.cfg, semantic.ema_decay) == (
        0.979,
        17,
        50,
        5,
        0.95,
    )
    assert (detail.learning_rate, detail.rank, detail.alpha, detail.adversarial_weight, detail.feature_weight) == (
        5e-6,
        128,
        256,
        0.1,
        10,
    )
    assert TrainingConfig("semantic", rank=0).for_family(WAN).learning_rate == 1e-6
    assert TrainingConfig("detail").for_family(HUNYUAN_VIDEO).feature_weight == 1
    assert semantic.timesteps(WAN) == WAN.preset.timesteps
    other = TrainingConfig("semantic", shift=5.0, sample_steps=4).timesteps(WAN)
    # i / 50 with i = 50, 38, 25, 13, shifted by 5 s / (1 + 4 s)
    assert other == pytest.approx([1000, 5000 * 38 / 202, 5000 * 25 / 150, 5000 * 13 / 102], rel=1e-6)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"side": "both"}, "side is 'both'; choose semantic or detail"),
        ({"side": "detail", "rank": 0}, "rank is 0, but a detail expert is a LoRA"),
        (
            {"side": "detail", "shared": True},
            "shared is true, but an expert for all noise levels is trained as a semantic expert",
        ),
        ({"side": "semantic", "learning_rate": float("nan")}, "learning_rate is nan; expected a number from"),
        ({"side": "semantic", "steps": 0}, "steps is 0"),
        ({"side": "semantic", "scheduler": "linear"}, "choose one of constant, cosine"),
        ({"side": "detail", "discriminator_width": 100}, "multiple of 32"),
        (
            {"side": "semantic", "offload_activations": True, "gradient_checkpointing": False},
            "offload_activations is true, but gradient_checkpointing is false",
        ),
        ({"side": "semantic", "step": 5}, "Unknown setting step. Valid settings: side, steps"),
        ({"side": "semantic", "steps": "many"}, "steps is 'many'; expected a whole number"),
        ({"side": "semantic", "steps": True}, "steps is True; expected a whole number"),
        ({"side": "semantic", "steps": 1.0}, r"steps is 1\.0; expected a whole number"),
        ({"side": "semantic", "cfg": True}, "cfg is True; expected a number"),
        ({"side": "semantic", "cfg": [5.0]}, r"cfg is \[5\.0\]; expected a number"),
        ({"side": "semantic", "shared": 1}, "shared is 1; expected true or false"),
        ({"side": "semantic", "scheduler": None}, "scheduler is None; expected a text"),
        ({"side": "semantic", "shift": 10**400}, r"shift is 1000.*000, which is too large; expected at most 9223"),
        ({"side": "semantic", "steps": 10**9}, r"steps is 1000000000; expected a number from 1 to 1e\+07"),
    ],
)
def test_wrong_settings_are_named(values, message):
    with pytest.raises(TrainingError, match=message):
        TrainingConfig.from_dict(values)


def test_settings_by_the_names_of_earlier_versions():
    former = {"expert": "detail", "accumulate": 4, "checkpointing": False}
    today = {"side": "detail", "gradient_accumulation_steps": 4, "gradient_checkpointing": False}
    assert TrainingConfig.from_dict(former) == TrainingConfig.from_dict(today) == TrainingConfig(**today)
    assert dict(zip(former, today, strict=True)) == FORMER
    for old, name in zip(former, today, strict=True):
        with pytest.raises(TrainingError, match=f"{old} is the old name of {name}, and both are set. Remove {old}"):
            TrainingConfig.from_dict({**today, old: former[old]})
    with pytest.raises(TrainingError, match="gradient_accumulation_steps is 'a'; expected a whole number"):
        TrainingConfig.from_dict({"side": "semantic", "accumulate": "a"})


def test_a_resumed_run_may_be_longer_but_not_another():
    config = TrainingConfig("semantic", steps=10)
    longer = TrainingConfig("semantic", steps=99, save_every=7, learning_rate=1e-5)
    assert longer.differences(config) == []
    assert longer.changes(config) == ["steps: 10 -> 99", "learning_rate: 0.0 -> 1e-05", "save_every: 100 -> 7"]
    other = TrainingConfig("semantic", steps=10, rank=4, seed=3)
    assert other.differences(config) == ["rank: 128 -> 4", "seed: 0 -> 3"] and other.changes(config) == []


def test_only_learning_rates_that_are_used_count():
    given = {"discriminator_learning_rate": 1e-4}
    assert TrainingConfig("detail", **given).new_rates(TrainingConfig("detail")) == [
        "discriminator_learning_rate: 5e-06 -> 0.0001"
    ]
    for unused in (TrainingConfig("semantic"), TrainingConfig("detail", adversarial_weight=0.0)):
        assert dataclasses.replace(unused, **given).new_rates(unused) == []


def test_settings_that_only_the_other_expert_has():
    names = ["adversarial_weight", "temporal_weight", "steps", "unknown", "shared", "every_linear"]
    assert TrainingConfig.unused("semantic", names) == ["adversarial_weight", "every_linear"]
    assert TrainingConfig.unused("detail", names) == ["temporal_weight", "shared"]
