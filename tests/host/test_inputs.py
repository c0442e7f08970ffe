"""Inputs as saved graphs know them: a graph keeps values alone, so another default or limit changes what it does."""

import json
from pathlib import Path

TABLE = Path(__file__).with_name("inputs.json")
FACTS = ("default", "min", "max", "step", "round", "control_after_generate")


def inputs(node_class):
    """Input -> what a saved graph depends on; lists of files are left out, they differ from machine to machine."""
    found = {}
    for item in node_class.define_schema().inputs:
        options = item.as_dict()
        facts = {fact: options[fact] for fact in FACTS if fact in options}
        found[item.id] = facts | ({"optional": True} if item.optional else {})
    return found


def test_defaults_and_limits_are_those_of_saved_graphs(node):
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    assert {name: inputs(cls) for name, cls in node.classes.items()} == table


def test_steps_are_those_of_the_released_models(node, module):
    """Where a widget asks for a number of steps, what it offers is right for the experts there are."""
    released = {len(family.preset.timesteps) for family in module("dcm_core.families").FAMILIES.values()}
    for name in ("DCMScheduler", "DCMSampler"):
        assert inputs(node.classes[name])["steps"]["default"] == max(released)
