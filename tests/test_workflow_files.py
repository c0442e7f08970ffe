"""The shipped workflows as files: links, groups, downloads, and how they are laid out. No host needed."""

import itertools
import math
import re

import pytest
from PIL import Image

from .host.graphs import FRONT_END_ONLY, WORKFLOWS, read
from .test_house import ROOT, SHIPPED, project, short

# Its files are made by the user.
NO_DOWNLOAD = {"DCMLoadConditioning"}
# These write files that other workflows load.
MAKERS = {"DCMConvertCheckpoint", "DCMExtractLoRA"}
TITLE_HEIGHT, SLOT_HEIGHT, MARGIN = 30, 20, 20
# How far inside their node the outputs and the inputs lie.
INSETS = {"canvas": (9, 10), "nodes 2.0": (0, 0)}
SUFFIX = ".safetensors"

each_renderer = pytest.mark.parametrize("renderer", INSETS)
each_workflow = pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)


def nodes_of(graph):
    return {node["id"]: node for node in graph["nodes"]}


def box(node):
    """x0, y0, x1, y1 with the title bar, which lies above `pos`."""
    (x, y), (width, height) = node["pos"], node["size"]
    return x, y - TITLE_HEIGHT, x + width, y + height


def overlap(a, b):
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def files_of(node):
    """File names among the widgets of a node."""
    return {value for value in node.get("widgets_values", []) if isinstance(value, str) and value.endswith(SUFFIX)}


def made_files():
    """Names of the files that workflows write for each other."""
    makers = [node for path in WORKFLOWS for node in read(path)["nodes"] if node["type"] in MAKERS]
    return {f"{value}{SUFFIX}" for node in makers for value in node["widgets_values"] if isinstance(value, str)}


def wire(source, output, target, slot, renderer):
    """Points of a link as the front end draws it: a cubic curve that leaves to the right and arrives from the left."""
    inset_out, inset_in = INSETS[renderer]
    x0, y0 = source["pos"][0] + source["size"][0] - inset_out, source["pos"][1] + SLOT_HEIGHT * (output + 0.7)
    x1, y1 = target["pos"][0] + inset_in, target["pos"][1] + SLOT_HEIGHT * (slot + 0.7)
    bend = math.dist((x0, y0), (x1, y1)) / 4
    for t in (step / 80 for step in range(81)):
        a, b, c, d = (1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3
        yield a * x0 + b * (x0 + bend) + c * (x1 - bend) + d * x1, (a + b) * y0 + (c + d) * y1


def wires(graph, renderer):
    """Each link with the points of its wire."""
    nodes = nodes_of(graph)
    for link in graph["links"]:
        _, source, output, target, slot, _ = link
        yield link, list(wire(nodes[source], output, nodes[target], slot, renderer))


def boxes_meet(*lines):
    """Whether the bounding boxes of two lines, each a sequence of points, have a point in common."""
    spans = [[(min(values), max(values)) for values in zip(*line, strict=True)] for line in lines]
    return all(a[0] <= b[1] and b[0] <= a[1] for a, b in zip(*spans, strict=True))


def turn(a, b, c):
    """Above 0 if a -> b -> c turns one way, below 0 the other way, 0 on one straight line."""
    return (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])


def cross(one, other):
    """Whether two lines meet; a touch counts."""
    if not boxes_meet(one, other):
        return False
    for (a, b), (c, d) in itertools.product(itertools.pairwise(one), itertools.pairwise(other)):
        if boxes_meet((a, b), (c, d)) and turn(a, b, c) * turn(a, b, d) <= 0 and turn(c, d, a) * turn(c, d, b) <= 0:
            return True
    return False


def crossings(graph, renderer):
    """Pairs of links whose wires cross. Wires from one output carry the same: they leave together, and part where they like."""
    pairs = itertools.combinations(wires(graph, renderer), 2)
    return [(a, b) for (a, points), (b, others) in pairs if a[1:3] != b[1:3] and cross(points, others)]


def test_workflows_lie_where_the_template_browser_looks():
    assert len(WORKFLOWS) >= 10
    assert [path.name for path in WORKFLOWS if not path.stem.startswith("DCM ")] == []
    assert [short(path) for path in (ROOT / "workflows").rglob("*.json") if path not in WORKFLOWS] == []
    # a second folder of this kind would hide the first
    assert not [name for name in ("example_workflows", "example", "examples", "workflow") if (ROOT / name).exists()]


@each_workflow
def test_workflow_has_a_thumbnail(path):
    with Image.open(path.with_suffix(".jpg")) as picture:
        assert picture.format == "JPEG" and picture.width >= 640
    assert path.with_suffix(".jpg").stat().st_size < 200_000


@each_workflow
def test_workflow_is_flat_schema_0_4(path):
    graph = read(path)
    assert graph["version"] == 0.4
    assert not graph.get("definitions", {}).get("subgraphs")
    ids = [node["id"] for node in graph["nodes"]]
    assert len(ids) == len(set(ids)) and max(ids) <= graph["last_node_id"]
    assert max((link[0] for link in graph["links"]), default=0) <= graph["last_link_id"]


@each_workflow
def test_every_link_has_two_ends_of_its_type(path):
    graph = read(path)
    nodes = nodes_of(graph)
    links = {link[0]: link for link in graph["links"]}
    assert len(links) == len(graph["links"])
    for number, source, output, target, slot, kind in graph["links"]:
        out, into = nodes[source]["outputs"][output], nodes[target]["inputs"][slot]
        assert number in out["links"] and into["link"] == number
        assert out["type"] == kind and into["type"] in (kind, "*")
    for node in graph["nodes"]:
        ends = [slot["link"] for slot in node["inputs"]] + [
            link for slot in node["outputs"] for link in slot["links"] or []
        ]
        assert {link for link in ends if link is not None} <= set(links), f"node {node['id']} has a link to nowhere"


@each_workflow
def test_groups_are_numbered_steps_that_hold_the_nodes(path):
    graph = read(path)
    groups = sorted(graph["groups"], key=lambda group: group["id"])
    assert groups
    for number, group in enumerate(groups, start=1):
        assert re.match(rf"Step {number} - \S", group["title"])
    boxes = [(x, y, x + width, y + height) for x, y, width, height in (group["bounding"] for group in groups)]
    assert not [pair for pair in itertools.combinations(boxes, 2) if overlap(*pair)]
    for node in graph["nodes"]:
        x0, y0, x1, y1 = box(node)
        around = [
            b
            for b in boxes
            if b[0] + MARGIN <= x0 and b[1] + MARGIN <= y0 and x1 <= b[2] - MARGIN and y1 <= b[3] - MARGIN
        ]
        assert len(around) == (0 if node["type"] in FRONT_END_ONLY else 1), node["type"]


@each_workflow
def test_models_can_be_downloaded_and_are_listed_in_the_note(path):
    graph = read(path)
    notes = [node for node in graph["nodes"] if node["type"] == "MarkdownNote" and node.get("title") == "Model links"]
    assert len(notes) == 1
    text = notes[0]["widgets_values"][0]
    # these come with the pack
    shipped = {
        path.relative_to(SHIPPED / path.relative_to(SHIPPED).parts[0]).as_posix()
        for path in SHIPPED.rglob(f"*{SUFFIX}")
    }
    made = made_files()
    for node in graph["nodes"]:
        models = node["properties"].get("models", [])
        for model in models:
            assert model["name"] in files_of(node)
            assert model["url"].startswith("https://huggingface.co/") and "/resolve/" in model["url"]
            assert model["url"] in text
            assert f"{model['directory']}/{model['name']}" in text, "the folder tree lacks it"
        if node["type"] not in NO_DOWNLOAD:
            assert files_of(node) - shipped - made == {model["name"] for model in models}, node["type"]
        for name in files_of(node) & made:
            assert f"loras/{name}" in text, "the folder tree lacks it"


@each_workflow
def test_a_plotted_boundary_is_the_model_s(path):
    for node in read(path)["nodes"]:
        if node["type"] == "DCMSchedulePlot":
            assert node["widgets_values"][0] == 0
            assert [slot["link"] for slot in node["inputs"] if slot["name"] == "model"] != [None]


@each_workflow
def test_every_node_names_its_pack(path):
    for node in read(path)["nodes"]:
        if node["type"] not in FRONT_END_ONLY:
            expected = project()["name"] if node["type"].startswith("DCM") else "comfy-core"
            assert node["properties"]["cnr_id"] == expected, node["type"]
            assert node["properties"]["Node name for S&R"] == node["type"]


@each_workflow
def test_no_two_nodes_overlap(path):
    pairs = itertools.combinations(read(path)["nodes"], 2)
    assert [(a["type"], b["type"]) for a, b in pairs if overlap(box(a), box(b))] == []


@each_workflow
def test_wires_run_from_left_to_right(path):
    graph = read(path)
    nodes = nodes_of(graph)
    ends = [(nodes[source], nodes[target]) for _, source, _, target, _, _ in graph["links"]]
    assert [(a["type"], b["type"]) for a, b in ends if b["pos"][0] <= a["pos"][0]] == []


@each_renderer
@each_workflow
def test_no_wire_runs_under_a_node(path, renderer):
    graph = read(path)
    nodes = nodes_of(graph)
    for (_, source, _, target, _, _), points in wires(graph, renderer):
        for node in graph["nodes"]:
            if node["id"] not in (source, target):
                x0, y0, x1, y1 = box(node)
                under = [point for point in points if x0 < point[0] < x1 and y0 < point[1] < y1]
                assert under == [], f"{nodes[source]['type']} -> {nodes[target]['type']} under {node['type']}"


@each_renderer
@each_workflow
def test_no_two_wires_cross(path, renderer):
    graph = read(path)
    # a wire into a widget ends lower down, where `wire` does not know
    assert not [node["type"] for node in graph["nodes"] for slot in node["inputs"] if "widget" in slot]
    kinds = {number: node["type"] for number, node in nodes_of(graph).items()}
    names = {link[0]: f"{kinds[link[1]]} -> {kinds[link[3]]} {link[4]}" for link in graph["links"]}
    assert [(names[a[0]], names[b[0]]) for a, b in crossings(graph, renderer)] == []


@pytest.mark.parametrize(
    "links, count",
    [
        ([(1, 0, 3, 0), (2, 0, 3, 1)], 0),
        ([(1, 0, 3, 1), (2, 0, 3, 0)], 1),  # they meet in the very middle
        ([(1, 0, 3, 0), (1, 0, 4, 0)], 0),
        ([(1, 0, 3, 0), (1, 0, 4, 0), (2, 0, 3, 1)], 1),
        ([(1, 0, 3, 0), (2, 0, 4, 0)], 0),
        ([(1, 0, 4, 0), (2, 0, 3, 0)], 1),
        ([(1, 0, 4, 0), (1, 1, 3, 0)], 1),
    ],
)
def test_crossing_wires_are_found(links, count):
    """Two nodes on the left, two on the right."""
    places = {1: (0, 0), 2: (0, 200), 3: (400, 0), 4: (400, 200)}
    nodes = [{"id": number, "pos": place, "size": (100, 100)} for number, place in places.items()]
    graph = {"nodes": nodes, "links": [(number, *ends, "") for number, ends in enumerate(links)]}
    assert [len(crossings(graph, renderer)) for renderer in INSETS] == [count] * 2
