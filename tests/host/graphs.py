"""Saved graphs beside what a host says of its nodes, and their way into the API's format."""

import json
from pathlib import Path

WORKFLOWS = sorted((Path(__file__).parents[2] / "workflows").glob("*.json"))

FRONT_END_ONLY = {"MarkdownNote", "Note"}
PLAIN_WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
CONTROL = "control_after_generate"
CONTROLS = {"fixed", "increment", "decrement", "randomize"}
BYPASSED = 4


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def inputs_of(definition):
    """(name, type, options) of the inputs in the order of the node; the type of a combo is COMBO, its options["options"] its values."""
    for group in ("required", "optional"):
        for name in definition["input_order"].get(group, []):
            kind, *rest = definition["input"][group][name]
            options = dict(rest[0]) if rest else {}
            if isinstance(kind, list):
                kind, options["options"] = "COMBO", kind
            elif kind.startswith("COMFY_DYNAMICCOMBO"):
                kind, options["options"] = "COMBO", [option["key"] for option in options["options"]]
            yield name, kind, options


def widgets_of(definition):
    """Name -> (type, options) of the widgets, in the order of `widgets_values`."""
    found = {}
    for name, kind, options in inputs_of(definition):
        if kind in PLAIN_WIDGETS and not options.get("forceInput"):
            found[name] = kind, options
            if options.get(CONTROL):
                found[f"{name} {CONTROL}"] = "COMBO", {"options": sorted(CONTROLS)}
    return found


def widget_values(node, definition):
    """Widget name -> its value in a saved graph; optional widgets at the end that a newer host added have none."""
    names, values = list(widgets_of(definition)), node["widgets_values"]
    assert len(values) <= len(names) and set(names[len(values) :]) <= set(definition["input"].get("optional", {})), (
        node["type"]
    )
    return dict(zip(names, values, strict=False))


def to_prompt(graph, info):
    """A flat saved graph in the API's format."""
    nodes = {node["id"]: node for node in graph["nodes"]}
    links = {number: (source, output) for number, source, output, *_ in graph["links"]}

    def source_of(link):
        """The node and output a wire comes from; a bypassed node hands on its first input of the type."""
        number, output = links[link]
        node = nodes[number]
        if node["mode"] == BYPASSED:
            kind = node["outputs"][output]["type"]
            return source_of(next(slot["link"] for slot in node["inputs"] if slot["type"] == kind))
        return [str(number), output]

    prompt = {}
    for node in graph["nodes"]:
        if node["type"] not in FRONT_END_ONLY and node["mode"] != BYPASSED:
            inputs = {
                name: value for name, value in widget_values(node, info[node["type"]]).items() if CONTROL not in name
            }
            inputs |= {slot["name"]: source_of(slot["link"]) for slot in node["inputs"] if slot["link"] is not None}
            prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


def id_of(prompt, kind):
    return next(number for number, node in prompt.items() if node["class_type"] == kind)
