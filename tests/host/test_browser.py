"""The pack in a real browser: the host's own front end and a newer one, drawn on the canvas and as Nodes 2.0."""

import base64
import io
import itertools
import os
import re
import time

import pytest
import torch
from PIL import Image

from dcm_core.files.conditioning import save_conditioning
from dcm_core.files.writing import write_tensors

from .browser import ARGUMENTS, CHROMIUM, FOLDER, NO_ELEMENTS, OUTGROWN, THEMES, Page
from .graphs import WORKFLOWS, read
from .server import HOST, ROOT, start_server

SMALL_WORLD = ROOT / "workflows" / "DCM small world (CPU).json"
TRAINING = ROOT / "workflows" / "DCM small world training (CPU).json"
TWO_MODELS = ROOT / "workflows" / "DCM Wan 2.2 text to video (two models).json"
WAN = ROOT / "workflows" / "DCM Wan 2.1 text to video.json"
# A folder with the built files of a newer front end; `python scripts/test.py` brings one.
NEWER = os.environ.get("COMFYUI_FRONT_END")
COMBINATIONS = [("own", False), ("own", True), ("newer", False), ("newer", True)]
RENDERERS = {False: "canvas", True: "nodes 2.0"}
NODES = sorted(path.stem for path in (ROOT / "web" / "docs").glob("*.md"))

# kind -> widget -> value that does not fit; the node that says so; its words
FAULTS = {
    "no expert": (
        {"DCMAttachExperts": {"semantic_lora": "none", "detail_lora": "none"}},
        "DCMAttachExperts",
        "semantic_lora and detail_lora are both none",
    ),
    "an expert of another family": (
        {"DCMAttachExperts": {"detail_lora": "hunyuan.safetensors"}},
        "DCMAttachExperts",
        "This expert is for HunyuanVideo",
    ),
    "embeddings of another width": (
        {"DCMLoadConditioning": {"name": "narrow.safetensors"}},
        "DCMSampler",
        "positive has text embeddings of width 768",
    ),
}


@pytest.fixture(scope="module")
def chromium():
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed; install Debian's `chromium` or Google Chrome to run the browser tests")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def serve(tmp_path_factory):
    """serve("own") -> a host with that front end, with the models of the pack and `add_unfit_files`."""
    running, contexts = {}, []

    def start(front):
        if front not in running:
            arguments = ["--front-end-root", NEWER] if front == "newer" else []
            base = tmp_path_factory.mktemp(f"{front}-front")
            add_unfit_files(base / "models")
            context = start_server(base, *arguments, folder=FOLDER)
            running[front] = context.__enter__()
            contexts.append(context)
        return running[front]

    yield start
    for context in contexts:
        context.__exit__(None, None, None)


def add_unfit_files(models):
    """A HunyuanVideo LoRA, and embeddings of another text encoder."""
    site = "diffusion_model.double_blocks.0.img_attn.proj"
    lora = {f"{site}.lora_A.weight": torch.zeros(4, 3072), f"{site}.lora_B.weight": torch.zeros(3072, 4)}
    for folder in ("loras", "dcm_conditioning"):
        (models / folder).mkdir(parents=True)
    write_tensors(models / "loras" / "hunyuan.safetensors", lora, {})
    save_conditioning(models / "dcm_conditioning" / "narrow.safetensors", [[torch.zeros(1, 8, 768), {}]])


@pytest.fixture(scope="module", params=COMBINATIONS, ids=lambda pair: f"{pair[0]} front end, {RENDERERS[pair[1]]}")
def page(request, chromium, serve):
    front, nodes2 = request.param
    if HOST is None:
        pytest.skip("COMFYUI_PATH names no ComfyUI; `python scripts/test.py` brings one")
    if front == "newer" and NEWER is None:
        pytest.skip("COMFYUI_FRONT_END names no front end; `python scripts/test.py` brings one")
    page = Page(chromium, serve(front), f"{front} {RENDERERS[nodes2]}", nodes2)
    yield page
    page.page.close()


@pytest.fixture(autouse=True)
def keep_what_was_seen(request, page):
    """A picture of every failure."""
    failed = request.session.testsfailed
    yield
    if request.session.testsfailed > failed:
        page.shoot(f"FAILED {request.node.originalname}")


def test_every_workflow_opens_from_the_template_browser(page):
    page.errors.clear()
    first, *others = WORKFLOWS
    page.open_template(first, listed=[path.stem for path in WORKFLOWS])
    for path in WORKFLOWS:
        if path in others:
            page.open_served(path)
        page.dismiss()
        unknown = page.run(
            "() => app.graph._nodes.map(n => n.type).filter(type => !LiteGraph.registered_node_types[type])"
        )
        assert unknown == [], path.stem
        types = page.run("() => app.graph._nodes.map(n => n.type)")
        assert sorted(types) == sorted(node["type"] for node in read(path)["nodes"])
        links = page.run("() => [...(app.graph.links.values?.() ?? Object.values(app.graph.links))].length")
        assert links == len(read(path)["links"])
        assert page.complaints() == [], path.stem
        page.errors.clear()


def test_missing_models_are_offered_for_download(page):
    page.open_template(WAN)
    names = [model["name"] for node in read(WAN)["nodes"] for model in node["properties"].get("models", [])]
    assert len(names) == 3
    page.wait_for(page.page.get_by_role("button", name="Download"))
    for name in names:
        page.wait_for_text(name)
    page.shoot("missing models")
    page.dismiss()


def need_aliases(page, kind):
    if not page.server.request(f"/object_info/{kind}")[kind].get("search_aliases"):
        pytest.skip("this host knows no search aliases")


# What people type -> the node that its name alone leads to.
FOUND_BY = {
    "DCM Attach": "DCM Attach Experts (4-step LoRA)",
    "wan 2.2 high low": "DCM Sampler (Wan 2.2 high/low MoE)",
    "moe sampler": "DCM Sampler (Wan 2.2 high/low MoE)",
    "two samplers": "DCM Split Sigmas (two samplers)",
    "4 step lora": "DCM Attach Experts (4-step LoRA)",
    "lightx2v": "DCM Scheduler (lightx2v, few-step)",
    "few step": "DCM Scheduler (lightx2v, few-step)",
    "load wan": "DCM Load Model (Wan, Hunyuan)",
    "video training": "DCM Video Dataset (training)",
}
# The same where the host knows aliases.
FOUND_BY_ALIAS = {
    **dict.fromkeys(("two samplers", "lightx2v", "few step"), "DCM Sampler (Wan 2.2 high/low MoE)"),
    **dict.fromkeys(
        ("wan 2.2 high low", "high noise low noise lora", "dual expert"), "DCM Attach Experts (4-step LoRA)"
    ),
}


@pytest.mark.parametrize("words", ["DCM Sampler", "few step video"])
def test_a_node_is_found_in_the_library_and_dragged_out(page, words):
    """By its name everywhere, by an alias where the host knows them."""
    if words == "few step video":
        need_aliases(page, "DCMSampler")
    page.clear()
    page.command("Workspace.ToggleSidebarTab.node-library")
    search = page.page.get_by_placeholder("Search").first
    search.fill(words)
    entry = page.text("DCM Sampler (Wan 2.2 high/low MoE)")
    entry.wait_for()
    time.sleep(1)  # the list slides
    box = entry.bounding_box()
    mouse = page.page.mouse
    mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    mouse.down()
    mouse.move(700, 400, steps=10)
    mouse.move(900, 500, steps=10)
    mouse.up()
    page.wait("() => app.graph._nodes.some(n => n.type === 'DCMSampler')")
    page.shoot("library")
    search.fill("")
    page.command("Workspace.ToggleSidebarTab.node-library")


def search(page, words, name):
    """Type into the search box on the canvas until it lists a node of this name."""
    page.clear()
    page.command("Workspace.SearchBox.Toggle")
    page.page.keyboard.type(words, delay=20)
    page.page.get_by_text(name).locator("visible=true").first.wait_for()
    page.shoot(f"search {words}")
    page.page.keyboard.press("Escape")


@pytest.mark.parametrize("words", FOUND_BY)
def test_a_node_is_found_by_what_people_type(page, words):
    search(page, words, FOUND_BY[words])


@pytest.mark.parametrize("words", FOUND_BY_ALIAS)
def test_more_nodes_are_found_where_the_host_knows_aliases(page, words):
    need_aliases(page, "DCMSampler")
    search(page, words, FOUND_BY_ALIAS[words])


def test_a_chain_is_added_at_a_model_output(page):
    """By the menu of the output; where Nodes 2.0 have a menu of their own, by the command."""
    page.clear()
    page.add(["UNETLoader"])
    place = page.run(
        """() => { const [node] = app.graph._nodes, { ds, canvas } = app.canvas; ds.scale = 1; ds.offset = [200, 300];
        app.canvas.setDirty(true, true); const [x, y] = node.getConnectionPos(false, 0), box = canvas.getBoundingClientRect();
        return [box.left + x + 200, box.top + y + 300] }"""
    )
    time.sleep(1)
    if page.name == "own nodes 2.0":
        page.run("() => app.canvas.selectNode(app.graph._nodes[0])")
        page.command("DCM.AddChain")
    else:
        page.page.mouse.click(place[0] - 4, place[1], button="right")
        page.page.get_by_text("Add DCM chain", exact=True).locator("visible=true").first.click()
    page.wait("() => app.graph._nodes.length === 3")
    links = """() => [...(app.graph.links.values?.() ?? Object.values(app.graph.links))].map(link => {
        const [from, to] = [link.origin_id, link.target_id].map(id => app.graph.getNodeById(id));
        return [from.type, from.outputs[link.origin_slot].type, to.type, to.inputs[link.target_slot].name] })"""
    assert sorted(page.run(links)) == [
        ["DCMAttachExperts", "MODEL", "DCMSampler", "model"],
        ["UNETLoader", "MODEL", "DCMAttachExperts", "model"],
    ]
    boxes = page.run(
        "() => app.graph._nodes.map(({ pos, size }) => [pos[0], pos[0] + size[0]]).sort((a, b) => a[0] - b[0])"
    )
    assert all(first[1] < second[0] for first, second in itertools.pairwise(boxes)), "beside each other"
    page.shoot("chain")


def test_other_outputs_have_no_chain(page):
    page.clear()
    page.add(["VAELoader"])
    page.run("() => app.canvas.selectNode(app.graph._nodes[0])")
    page.command("DCM.AddChain")
    items = "() => [...app.collectNodeMenuItems(app.graph._nodes[0])].map(item => item?.content)"
    assert page.run("() => app.graph._nodes.length") == 1 and "Add DCM chain" not in page.run(items)


def test_the_step_bar_shows_the_plan_before_the_run(page):
    page.open(SMALL_WORLD)
    experts = "() => [...document.querySelectorAll('.dcm-step-bar [data-expert]')].map(field => field.dataset.expert)"
    page.wait("() => document.querySelectorAll('.dcm-step-bar [data-expert]').length === 6")
    assert page.run(experts) == 3 * ["semantic"] + 3 * ["detail"]
    page.show("DCMSampler")
    box, width = page.page.locator(".dcm-step-bar").bounding_box(), page.width("DCMSampler")
    # as wide as the node, whatever panel lists its widgets
    assert 0.85 * width < box["width"] <= width and box["height"] > 20
    unused = "auto: steps and shift are not used"
    assert unused in page.page.locator(".dcm-step-bar").inner_text()
    assert_bar_is_whole(page)
    page.shoot("bar")
    page.set_widget("DCMSampler", "schedule", "generic")
    page.set_widget("DCMSampler", "steps", 10)
    page.wait("() => document.querySelectorAll('.dcm-step-bar [data-expert]').length === 10")
    assert unused not in page.page.locator(".dcm-step-bar").inner_text()
    page.set_widget("DCMAttachExperts", "detail_strength", 0)
    page.wait("() => document.querySelectorAll('.dcm-step-bar [data-expert=semantic]').length === 10")
    assert page.caption() == "10 semantic"
    page.set_widget("DCMAttachExperts", "detail_lora", "none")
    page.set_widget("DCMAttachExperts", "semantic_lora", "none")
    page.wait("() => document.querySelectorAll('.dcm-step-bar [data-expert]').length === 0")


def assert_bar_is_whole(page):
    """No word of the bar is cut, or lies on another widget or below the node."""
    place = """() => { const [bar] = document.querySelectorAll('.dcm-step-bar'), box = bar.getBoundingClientRect();
        const parts = [...bar.querySelectorAll('div')].map(part => part.getBoundingClientRect());
        return [box.bottom, Math.max(...parts.map(part => part.bottom))] }"""
    page.wait(f"() => {{ const [box, words] = ({place})(); return words <= box + 1 }}")


# What a node shows for a widget, whether it is the word in place of a number or the number.
SHOWN_ON_CANVAS = """([id, name]) => { const node = app.graph.getNodeById(id), widget = node.widgets.find(w => w.name === name);
const texts = [], { fillText } = CanvasRenderingContext2D.prototype, { canvas } = app;
CanvasRenderingContext2D.prototype.fillText = function (text, x, y) {
  texts.push(text); fillText.call(this, text, x, y) };
canvas.ds.scale = 1; canvas.ds.offset = [100 - node.pos[0], 100 - node.pos[1]]; canvas.draw(true, true);
CanvasRenderingContext2D.prototype.fillText = fillText;
return texts[texts.indexOf(name) + 1] }"""
SHOWN_IN_NODES_2 = """([id, name]) => { const node = document.querySelector(`[data-node-id="${id}"]`);
const input = node.querySelector(`input[aria-label="${name}"], [aria-label="${name}"] input`);
const word = getComputedStyle(input.parentElement, '::after').content;
if (word === 'none') return input.value;
// the number fades
return getComputedStyle(input).color === 'rgba(0, 0, 0, 0)' ? JSON.parse(word) : `${word} on ${input.value}` }"""


@pytest.mark.parametrize(
    ("kind", "name", "word"),
    [
        ("DCMSampler", "boundary", "automatic"),
        ("DCMGuider", "detail_cfg", "as cfg"),
        ("DCMExpert", "cfg", "as sampler"),
    ],
)
def test_a_zero_that_stands_for_a_choice_is_a_word(page, kind, name, word):
    page.clear()
    page.add([kind])
    # they are advanced, where the front end knows that
    page.run(
        "async () => { try { await app.extensionManager.setting.set('Comfy.Node.AlwaysShowAdvancedWidgets', true) } catch {} }"
    )
    # one front end gives a new node the values of an earlier node that had its number: DCM Guider's cfg to DCM Expert
    page.set_widget(kind, name, 0)
    page.show(kind)
    script, widget = SHOWN_IN_NODES_2 if page.nodes2 else SHOWN_ON_CANVAS, [page.node(kind), name]
    page.wait(f"([argument, word]) => ({script})(argument) === word", [widget, word])
    page.shoot(f"{word} in {kind}")
    page.set_widget(kind, name, 0.5)
    page.wait(f"argument => Number(({script})(argument)) === 0.5", widget)
    page.set_widget(kind, name, 0)
    page.wait(f"([argument, word]) => ({script})(argument) === word", [widget, word])
    value = "([id, name]) => app.graph.getNodeById(id).widgets.find(widget => widget.name === name).value"
    assert page.run(value, widget) == 0, "the graph keeps the number"


def luminance(pixel):
    """Relative luminance of an sRGB colour, as the WCAG define it."""
    parts = [part / 255 for part in pixel[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(first, second):
    bright, dark = sorted(map(luminance, (first, second)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("theme", THEMES)
def test_the_fields_of_the_bar_are_seen_in_every_theme(page, theme):
    """Before their step has run: edges of 3:1 against the node, letters of 4.5:1 on their field (WCAG 2.2, AA)."""
    page.open(SMALL_WORLD)
    page.wait("() => document.querySelectorAll('.dcm-step-bar [data-expert]').length === 6")
    page.use_theme(theme)
    try:
        page.zoom("DCMSampler", 2)
        for number, letter in ((0, "S"), (5, "D")):
            field = page.page.locator(".dcm-step-bar [data-expert]").nth(number)
            assert field.inner_text() == letter
            box = field.bounding_box()
            clip = {"x": box["x"] - 8, "y": box["y"] - 3, "width": box["width"] + 16, "height": box["height"] + 6}
            with Image.open(io.BytesIO(page.page.screenshot(clip=clip))) as picture:
                row = [picture.getpixel((x, picture.height // 2)) for x in range(picture.width)]
                inside = picture.crop((12, 8, picture.width - 12, picture.height - 8)).convert("RGB")
            outside, edge = (row[1], row[7:11]) if number == 0 else (row[-2], row[-11:-7])
            assert max(contrast(outside, pixel) for pixel in edge) >= 3
            colours = sorted(inside.getcolors(10_000), reverse=True)
            assert max(contrast(colours[0][1], colour) for _, colour in colours) >= 4.5
        page.shoot(f"bar in {theme}")
    finally:
        page.use_theme("dark")


TABLE = """rows => { const find = kind => app.graph._nodes.find(node => node.type === kind);
    const attach = find("DCMAttachExperts"), sampler = find("DCMSampler");
    const loader = attach.getInputNode(attach.findInputSlot("model"));
    const make = (kind, place) => { const node = LiteGraph.createNode(kind); app.graph.add(node);
      node.pos = [attach.pos[0] + 460 * place, attach.pos[1] - 500]; return node };
    let last = null;
    rows.forEach((row, place) => { const node = make("DCMExpert", place);
      for (const [name, value] of Object.entries(row)) node.widgets.find(widget => widget.name === name).value = value;
      if (last) last.connect(0, node, node.findInputSlot("rows"));
      last = node });
    const table = make("DCMAttachTable", rows.length);
    last.connect(0, table, table.findInputSlot("rows"));
    loader.connect(0, table, table.findInputSlot("model"));
    table.connect(0, sampler, sampler.findInputSlot("model"));
    app.graph.remove(attach) }"""


def test_the_bar_shows_the_rows_of_an_expert_table(page):
    """Before the run from the nodes' widgets, then from the run: a letter and a colour for each row."""
    page.open(SMALL_WORLD)
    page.wait("() => document.querySelectorAll('.dcm-step-bar [data-expert]').length === 6")
    semantic, detail = (f"zz_dcm_small_world_{side}.safetensors" for side in ("semantic", "detail"))
    # the host says nothing again of a node whose values it has seen
    strength = f"1, 0.{time.time_ns() % 9000 + 1000}"
    rows = [
        {"name": "layout", "start": 1, "end": 2, "lora": semantic},
        {"name": "texture", "start": 4, "end": 6, "lora": detail, "strength": strength},
        {"name": "<b>last</b>", "start": 6, "end": 6, "lora": semantic, "strength": "0.25"},
    ]
    page.run(TABLE, rows)
    page.changed()
    owners = ["layout", "layout", "base", "texture", "texture", "texture + <b>last</b>"]
    expected = [[owner, letter] for owner, letter in zip(owners, [*"LLBTT", "T+A"], strict=True)]
    shown = "() => [...document.querySelectorAll('.dcm-step-bar [data-expert]')].map(f => [f.dataset.expert, f.textContent])"
    page.wait("() => document.querySelectorAll('.dcm-step-bar [data-expert=layout]').length === 2")
    assert page.run(shown) == expected
    plan = "step 1-2 layout, 3 base, 4-5 texture, 6 texture + <b>last</b>"
    assert page.caption() == plan
    page.set_widget("DCMSampler", "seed", time.time_ns() % 2**31)
    page.queue()
    page.finish()
    page.wait_until_said("DCMAttachTable", r"texture: step 4 to 6; zz_dcm_small_world_detail, strength 1, 0\.\d")
    assert page.run(shown) == expected and page.caption() == plan
    colours = page.run("() => [...document.querySelectorAll('.dcm-step-bar [data-done]')].map(f => f.style.background)")
    assert len(set(colours)) == 4 and colours[0] == colours[1] and colours[3] == colours[4]
    assert page.run("() => document.querySelectorAll('.dcm-step-bar b').length") == 0
    page.show("DCMSampler")
    assert_bar_is_whole(page)
    page.shoot("bar of an expert table")
    page.show("DCMAttachTable")
    page.shoot("expert table")


def test_the_bar_is_told_without_a_mouse_and_without_colours(page):
    page.open(SMALL_WORLD)
    page.wait("() => document.querySelectorAll('.dcm-step-bar [data-expert]').length === 6")
    page.show("DCMSampler")
    bar = page.page.get_by_role("progressbar", name="Steps and their experts")
    plan = page.caption()
    told = [bar.get_attribute(f"aria-value{name}") for name in ("min", "max", "now", "text")]
    assert told == ["0", "6", "0", plan] and plan.startswith("3 semantic + 3 detail, boundary σ ")
    bar.focus()
    for number, expert in ((1, "semantic"), (2, "semantic"), (3, "semantic"), (4, "detail")):
        page.page.keyboard.press("ArrowRight")
        assert page.caption().startswith(f"{number} / 6  {expert}  σ ")
    page.page.keyboard.press("ArrowLeft")
    assert page.caption().startswith("3 / 6  semantic  σ ")
    page.run("() => document.activeElement.blur()")
    assert page.caption() == plan
    # a finger has no hover
    page.page.locator(".dcm-step-bar [data-expert]").nth(5).dispatch_event("click")
    assert page.caption().startswith("6 / 6  detail  σ ")
    page.wait("plan => document.querySelector('.dcm-step-bar > div').children[1].textContent === plan", plan)


def test_the_bar_asks_when_a_user_changes_something_and_only_then(page):
    page.open(SMALL_WORLD)
    page.wait("() => document.querySelectorAll('.dcm-step-bar [data-expert]').length === 6")
    asked = []
    page.page.on("request", lambda request: request.url.endswith("/dcm/plan") and asked.append(request.post_data_json))
    # what no user did is seen with the next change: nothing looks again and again
    page.run(
        "id => { app.graph.getNodeById(id).widgets.find(w => w.name === 'denoise').value = 0.9 }",
        page.node("DCMSampler"),
    )
    page.page.wait_for_timeout(2500)
    assert asked == []
    page.changed()
    page.wait("() => document.querySelectorAll('.dcm-step-bar [data-expert]').length !== 6")
    asked.clear()
    page.set_widget("DCMSampler", "denoise", 1.0)
    page.wait("() => document.querySelectorAll('.dcm-step-bar [data-expert]').length === 6")
    assert len(asked) == 1
    page.run("id => app.canvas.selectNode(app.graph.getNodeById(id))", page.node("DCMAttachExperts"))
    page.page.locator("#graph-canvas").focus()
    page.page.keyboard.press("Control+b")
    page.wait("() => document.querySelectorAll('.dcm-step-bar [data-expert=base]').length === 6")
    assert len(asked) == 2


def test_the_step_bar_warns_of_a_base_without_experts(page):
    page.open(SMALL_WORLD)
    page.run("() => { app.graph._nodes.find(node => node.type === 'DCMAttachExperts').mode = 4 }")
    page.changed()
    page.wait("() => document.querySelectorAll('.dcm-step-bar [data-expert=base]').length === 6")
    words = page.page.locator(".dcm-step-bar").inner_text()
    assert "6 steps, no active expert" in words and "boundary" not in words
    assert "Warning: no expert is active, and a plain model needs more than 6 steps." in words
    page.show("DCMSampler")
    assert_bar_is_whole(page)
    page.shoot("bar without experts")
    page.set_widget("DCMSampler", "seed", time.time_ns() % 2**31)
    page.queue()
    page.finish()
    (plan,) = page.heard("dcm.plan")
    assert {step["expert"] for step in plan["steps"]} == {"base"} and plan["boundary"] is None
    if page.name != "own nodes 2.0":
        page.wait("() => document.body.innerText.includes('6 steps, no experts attached')")
    page.shoot("sampler without experts after its run")


def test_a_graph_of_an_earlier_version_keeps_its_values(page):
    """Widgets are saved by place; the new one is the last."""
    graph = read(TWO_MODELS)
    (sampler,) = (node for node in graph["nodes"] if node["type"] == "DCMSampler")
    sampler["widgets_values"] = [5, "fixed", "generic", 4, 1.5, 0.9, 2.5, 0.8, 6.0]
    page.run("graph => app.loadGraphData(graph, true, true, 'old')", graph)
    page.wait("count => app.graph._nodes.length === count", len(graph["nodes"]))
    page.dismiss()
    values = page.run(
        "id => Object.fromEntries(app.graph.getNodeById(id).widgets.map(widget => [widget.name, widget.value]))",
        sampler["id"],
    )
    expected = {
        "seed": 5,
        "schedule": "generic",
        "steps": 4,
        "cfg": 1.5,
        "denoise": 0.9,
        "detail_cfg": 2.5,
        "boundary": 0.8,
        "shift": 6.0,
    }
    assert {name: values[name] for name in expected} == expected and values["sampler_name"] == "euler"


def test_the_step_bar_asks_for_two_models_and_for_one_twice(page):
    def asked(change):
        with page.page.expect_request("**/dcm/plan") as request:
            change()
        return {name: request.value.post_data_json[name] for name in ("model", "two_models")}

    high = "wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors"
    assert asked(lambda: page.open(TWO_MODELS)) == {"model": high, "two_models": True}
    connect = """() => { const [sampler] = app.graph._nodes.filter(node => node.type === "DCMSampler");
        const slot = sampler.inputs.findIndex(input => input.name === "detail_model");
        const [{ id }] = app.graph._nodes.filter(node => node.type === "UNETLoader" && node.widgets[0].value.includes("high"));
        app.graph.getNodeById(id).connect(0, sampler, slot) }"""
    assert asked(lambda: page.run(connect)) == {"model": high, "two_models": False}


FIELDS_OF_THE_BAR = "document.querySelectorAll('.dcm-step-bar [data-expert]').length"


@pytest.mark.parametrize(
    ("kind", "widget", "source"),
    [
        ("DCMSampler", "steps", "PrimitiveInt"),
        ("DCMAttachExperts", "detail_strength", "PrimitiveFloat"),
        ("DCMLoadModel", "model_name", "PrimitiveNode"),
    ],
)
def test_the_step_bar_does_not_foresee_what_another_node_gives(page, kind, widget, source):
    page.open(SMALL_WORLD)
    page.wait(f"() => {FIELDS_OF_THE_BAR} === 6")
    page.run(
        """([kind, widget, source]) => { const target = app.graph._nodes.find(node => node.type === kind);
        const node = LiteGraph.createNode(source); app.graph.add(node); node.connect(0, target, target.findInputSlot(widget)) }""",
        [kind, widget, source],
    )
    page.changed()
    page.wait(f"() => {FIELDS_OF_THE_BAR} === 0")


def test_the_step_bar_does_not_foresee_a_model_straight_from_its_training(page):
    page.open(TRAINING)
    page.show("DCMSampler")
    set_mode = "mode => app.graph._nodes.filter(n => n.type.startsWith('DCMTrain')).forEach(n => { n.mode = mode })"
    # bypassed nodes pass the plain base on
    page.run(set_mode, 4)
    page.changed()
    page.wait("() => document.querySelectorAll('.dcm-step-bar [data-expert=base]').length === 6")
    page.run(set_mode, 0)
    page.changed()
    page.wait(f"() => {FIELDS_OF_THE_BAR} === 0")


def test_without_what_it_needs_the_bar_is_not_there_and_the_graph_runs(page, chromium):
    page.open(SMALL_WORLD)
    bar = page.page.locator(".dcm-step-bar")
    bar.wait_for()
    page.page.route("**/dcm/plan", lambda route: route.fulfill(status=404))
    page.set_widget("DCMSampler", "boundary", 0.5)
    bar.wait_for(state="hidden")
    page.page.unroute("**/dcm/plan")
    lacking = Page(chromium, page.server, page.name, page.nodes2, before=NO_ELEMENTS)
    lacking.open(SMALL_WORLD)
    lacking.set_widget("DCMSampler", "seed", time.time_ns() % 2**31)
    lacking.queue()
    lacking.finish()
    assert lacking.heard("dcm.plan")
    assert not lacking.page.locator(".dcm-step-bar").count()
    assert [error for error in lacking.errors if "DCM" in str(error)] == []
    lacking.page.close()


def test_a_run_fills_the_bar_and_its_video_plays(page):
    page.open(SMALL_WORLD)
    # another run than that of the page before, which the host would not repeat
    page.set_widget("DCMSampler", "seed", time.time_ns() % 2**31)
    page.show("DCMSampler")
    page.wait("() => document.querySelectorAll('.dcm-step-bar [data-expert]').length === 6")
    page.listen_to_the_bar()
    page.queue()
    page.finish()
    sampler = str(page.node("DCMSampler"))
    (plan,) = page.heard("dcm.plan")
    assert plan["node"] == sampler and [step["expert"] for step in plan["steps"]] == 3 * ["semantic"] + 3 * ["detail"]
    states = [event["nodes"][sampler] for event in page.heard("progress_state") if sampler in event["nodes"]]
    values = [state["value"] for state in states if state["state"] == "running"]
    # one bar that passes the switch
    assert values == sorted(values) and set(values) >= {1, 2, 3, 4, 5, 6}
    assert {state["max"] for state in states if state["value"]} == {6}
    captions = page.run("() => captions")
    for number, step in enumerate(plan["steps"], 1):
        said = next(
            text for text in captions if text.startswith(f"{number} / 6  {step['expert']}  σ {step['sigma']:.4g}")
        )
        assert re.search(r"  \d+\.\d s a step, \d+\.\d s left$", said) or number == 1
    assert "image" in page.heard("b_preview_with_metadata") + page.heard("b_preview")
    page.wait(
        "() => [...document.querySelectorAll('.dcm-step-bar [data-done]')].filter(f => f.dataset.done === 'true').length === 6"
    )
    # once, and below it the time
    page.wait("() => document.body.innerText.split('step 1-3 semantic, 4-6 detail').length === 2")
    assert page.caption().startswith("step 1-3 semantic, 4-6 detail, boundary ")
    assert re.search(r"6 steps in \d+\.\d s, \d+\.\d\d s a step", page.page.locator(".dcm-step-bar").inner_text())
    page.shoot("sampler after its run")
    # the text is not listed among the widgets by an inner name
    assert not {"$$", "dcm_text"} & set(page.run("() => document.body.innerText").split())
    page.show("SaveVideo")
    video = page.wait("() => [...document.querySelectorAll('video')].map(v => v.currentSrc || v.src).find(Boolean)")
    assert ".mp4" in video
    page.run("() => document.querySelectorAll('video').forEach(v => { v.muted = true; v.play() })")
    page.wait("() => [...document.querySelectorAll('video')].some(v => v.currentTime > 0.2 && v.videoWidth === 256)")
    page.shoot("video")


def test_the_preview_of_a_video_plays(page):
    """Where the host shows its own, of the first frame: the frames of the latent, one after the other."""
    page.open(SMALL_WORLD)
    # more steps than are waited for: a busy page draws few of them
    for name, value in {"seed": time.time_ns() % 2**31, "schedule": "even", "steps": 100}.items():
        page.set_widget("DCMSampler", name, value)
    page.show("DCMSampler")
    page.previews_of(page.node("DCMSampler"))
    page.queue()
    page.wait("() => [...previews].filter(source => source.startsWith('data:image/jpeg')).length > 3")
    page.shoot("preview of a video")
    page.command("Comfy.Interrupt")
    page.wait("() => window.heard.find(([name]) => /^execution_(success|interrupted)$/.test(name))")
    events = page.heard("dcm.preview")
    assert [len(event["frames"]) for event in events] == [5] * len(events)
    # it stands still after the run
    page.page.wait_for_timeout(500)
    shown = page.run("() => previews.size")
    page.page.wait_for_timeout(1000)
    assert page.run("() => previews.size") == shown


def test_a_saved_video_dropped_on_the_page_brings_its_graph_back(page):
    videos = sorted((page.server.base / "output").rglob("DCM_small_world*.mp4"), key=lambda path: path.stat().st_mtime)
    assert videos, "the run before this saved one"
    page.clear()
    page.run(
        """([name, data]) => { const bytes = Uint8Array.from(atob(data), c => c.charCodeAt(0)), transfer = new DataTransfer();
        transfer.items.add(new File([bytes], name, { type: 'video/mp4' }));
        const canvas = document.querySelector('#graph-canvas');
        const how = { dataTransfer: transfer, bubbles: true, cancelable: true, clientX: 800, clientY: 500 };
        for (const kind of ['dragenter', 'dragover', 'drop']) canvas.dispatchEvent(new DragEvent(kind, how)) }""",
        [videos[-1].name, base64.b64encode(videos[-1].read_bytes()).decode()],
    )
    page.wait("() => app.graph._nodes.some(n => n.type === 'DCMSampler')")
    assert page.run("() => app.graph._nodes.length") == len(read(SMALL_WORLD)["nodes"])


def test_the_bar_fills_inside_a_subgraph_of_a_graph_opened_again(page):
    """Some front ends leave the samplers of the graph before behind."""
    page.open(SMALL_WORLD)
    page.set_widget("DCMSampler", "seed", time.time_ns() % 2**31)
    page.run(
        "() => { app.graph.convertToSubgraph(new Set(app.graph._nodes.filter(node => node.type === 'DCMSampler'))) }"
    )
    for _ in range(2):
        page.run("() => app.loadGraphData(app.graph.serialize(), true, true)")
    page.run("() => { app.canvas.setGraph([...app.graph.subgraphs.values()][0]) }")
    page.queue()
    page.finish()
    page.wait("() => document.querySelectorAll('.dcm-step-bar [data-done=true]').length === 6")
    # some front ends open the next graph inside of a subgraph that is open
    page.run("() => { app.canvas.setGraph(app.rootGraph ?? app.graph) }")


def test_training_shows_its_losses_and_samples(page):
    page.open(TRAINING)
    for kind, name in (("DCMTrainSemanticExpert", "semantic"), ("DCMTrainDetailExpert", "detail")):
        page.set_widget(kind, "name", f"{name} {page.name}")
        for widget, value in {"steps": 4, "batch_size": 2, "sample_every": 2}.items():
            page.set_widget(kind, widget, value)
    page.show("DCMTrainDetailExpert")
    page.queue()
    page.finish(seconds=180)
    for kind in ("DCMTrainSemanticExpert", "DCMTrainDetailExpert"):
        states = [event["nodes"].get(str(page.node(kind))) for event in page.heard("progress_state")]
        # newer hosts leave out events that follow each other fast
        assert {1, 4} <= {state["value"] for state in states if state and state["max"] == 4}
        page.show(kind)
        page.wait_until_said(kind, "(?m)^4 steps in all, .* s in this run: loss ")
        assert_whole(page.said(kind))
    assert len(page.heard("b_preview_with_metadata") + page.heard("b_preview")) >= 4
    page.wait("() => document.body.innerText.includes('feature_matching')")
    page.shoot("training")
    assert page.run(OUTGROWN) == []


def test_an_interrupted_training_says_where_it_is_saved_and_resumes(page):
    name, trainer = f"interrupted {page.name}", "DCMTrainSemanticExpert"
    page.open(TRAINING)
    page.run(
        "() => app.graph._nodes.filter(({ type }) => type === 'DCMTrainDetailExpert').forEach(node => { node.mode = 2 })"
    )
    for widget, value in {"name": name, "steps": 100_000, "save_every": 100_000, "sample_every": 0}.items():
        page.set_widget(trainer, widget, value)
    page.show(trainer)
    page.queue()
    page.wait_until_said(trainer, r"^Step [3-9] of 100000: loss ", seconds=120)
    page.command("Comfy.Interrupt")
    page.wait("() => window.heard.find(([name]) => name === 'execution_interrupted')", seconds=60)
    time.sleep(2)  # whatever the front end does at the end of a run
    step = int(page.wait_until_said(trainer, r"^Saved at step (\d+) of 100000\. Queue again to continue\.$")[1])
    assert_whole(page.said(trainer))
    page.wait(
        "text => document.body.innerText.includes(text)", f"Saved at step {step} of 100000. Queue again to continue."
    )
    page.shoot("interrupted training")
    assert [path.name for path in (page.server.base / "output" / "dcm_training" / name).glob("step_*")] == [
        f"step_{step:08d}.safetensors"
    ]
    page.set_widget(trainer, "steps", step + 1)
    page.queue()
    page.finish(seconds=120)
    page.wait_until_said(
        trainer, rf"(?m)^Resumed from step {step} of {step + 1}, changed: steps: 100000 -> {step + 1}\.$"
    )


def assert_whole(said):
    """A node's text is drawn on the node, in lines, and to be read to its end."""
    assert said["lines"] == said["text"] and said["wide"] <= 0 and said["outside"] <= 1 and said["shown"] > 10
    assert said["high"] <= said["shown"] + 1 or said["shown"] >= 250, (
        "higher than its box only where the box is as high as it gets"
    )


def test_the_text_of_a_node_is_read_to_its_end(page):
    page.clear()
    page.add(["DCMInspectModel"])
    page.set_widget("DCMInspectModel", "file", "loras/zz_dcm_small_world_semantic.safetensors")
    page.show("DCMInspectModel")
    page.queue()
    page.finish()
    page.wait_until_said("DCMInspectModel", "change: semantic")
    page.show("DCMInspectModel")
    said = page.said("DCMInspectModel")
    assert len(said["text"].splitlines()) > 10
    assert_whole(said)
    page.shoot("inspect")
    # longer than a node may be high: it scrolls, by the wheel once it is clicked; markup is shown as it is written
    text = "\n".join(
        f"clip_{number:03d}.mp4 was left out: <b>its caption</b> is *empty* & `a_b_c`" for number in range(100)
    )
    page.run(
        "([node, text]) => app.api.dispatchEvent(new CustomEvent('dcm.text', { detail: { node, text } }))",
        [str(page.node("DCMInspectModel")), text],
    )
    time.sleep(1)
    page.show("DCMInspectModel")
    said = page.said("DCMInspectModel")
    assert said["text"] == text and not said["markup"] and said["high"] > 1000
    assert_whole(said)
    box = page.page.locator(".dcm-text").bounding_box()
    page.page.mouse.click(box["x"] + 50, box["y"] + 50)
    page.page.mouse.wheel(0, 100_000)
    page.wait(
        "() => { const { scrollTop, scrollHeight, clientHeight } = document.querySelector('.dcm-text');"
        " return scrollTop + clientHeight >= scrollHeight - 2 }"
    )
    page.shoot("a long text")


def test_the_help_page_of_every_node_is_shown(page):
    page.clear()
    page.add(NODES)
    for kind in NODES:
        page.show(kind, settle=0)
        page.page.locator("[data-testid=info-button]").first.click()
        heading = (ROOT / "web" / "docs" / f"{kind}.md").read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
        page.page.get_by_role("heading", name=heading, exact=True).first.wait_for()
        page.wait("kind => document.querySelector(`img[src*='docs/${kind}.jpg']`)?.naturalWidth > 0", kind)
        if kind in ("DCMAttachExperts", "DCMSampler"):
            page.shoot(f"help {kind}")


def test_a_help_page_is_in_the_language_of_the_reader(page, chromium):
    """On a page of its own: one that is open draws its graph again when its language changes."""
    page.server.request("/settings/Comfy.Locale", "ja")
    try:
        reader = Page(chromium, page.server, f"{page.name} in Japanese", page.nodes2)
    finally:
        page.server.request("/settings/Comfy.Locale", "en")
    try:
        reader.clear()
        reader.add(["DCMSampler"])
        reader.show("DCMSampler")
        reader.page.locator("[data-testid=info-button]").first.click()
        first = (ROOT / "web" / "docs" / "DCMSampler" / "ja.md").read_text(encoding="utf-8").split("\n\n")[1]
        reader.text(first).wait_for()
        reader.wait("() => document.querySelector(`img[src*='docs/DCMSampler.jpg']`)?.naturalWidth > 0")
    finally:
        reader.page.close()


def test_a_new_node_shows_all_its_widgets(page):
    page.clear()
    page.add(NODES)
    assert page.cut() == [[kind, [], 0] for kind in NODES]


@pytest.mark.parametrize("fault", FAULTS)
def test_our_error_is_shown_on_the_right_node(page, fault):
    settings, teller, words = FAULTS[fault]
    page.open(SMALL_WORLD)
    for kind, values in settings.items():
        for name, value in values.items():
            page.set_widget(kind, name, value)
    page.queue()
    (kind, error) = page.wait("() => window.heard.find(([name]) => name.startsWith('execution_'))")
    assert kind == "execution_error"
    assert error["node_id"] == str(page.node(teller))
    page.wait_for_text(words)
    page.shoot(f"error {fault}")
    page.dismiss()


def test_a_bad_widget_value_is_named_before_the_run(page):
    page.open(SMALL_WORLD)
    page.set_widget("DCMSampler", "steps", 500)
    page.queue()
    page.page.get_by_text("500").first.wait_for()
    page.wait("id => app.graph.getNodeById(id).has_errors || app.lastNodeErrors?.[id]", page.node("DCMSampler"))
    page.dismiss()
