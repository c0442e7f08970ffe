"""Widgets as saved graphs know them: a graph keeps values alone, so another default or limit changes what it does."""

import json
from pathlib import Path

TABLE = Path(__file__).with_name("widgets.json")
FACTS = ("default", "min", "max", "step", "round", "control_after_generate")


def widgets(node_class):
    """Input -> what a saved value depends on; lists of files differ from machine to machine, and sockets have no value."""
    found = {item.id: item.as_dict() for item in node_class.define_schema().inputs}
    kept = {name: {fact: options[fact] for fact in FACTS if fact in options} for name, options in found.items()}
    return {name: facts for name, facts in kept.items() if facts}


def test_defaults_and_limits_are_those_of_saved_graphs(node):
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    assert {name: widgets(cls) for name, cls in node.classes.items() if widgets(cls)} == table


def test_steps_are_those_of_the_released_models(node, module):
    """Where a widget asks for a number of steps, what it offers is right for the experts there are."""
    released = {len(family.preset.timesteps) for family in module("dcm_core.families").FAMILIES.values()}
    for name in ("DCMScheduler", "DCMSampler"):
        assert widgets(node.classes[name])["steps"]["default"] == max(released)
