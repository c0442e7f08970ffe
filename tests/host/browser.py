"""Chromium on a running host's page, as a user drives it."""

import json
import re
import shutil
import time

from .graphs import read
from .server import ROOT

CHROMIUM = next(
    (
        path
        for name in ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
        if (path := shutil.which(name))
    ),
    None,
)
ARGUMENTS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
SCREENSHOTS = ROOT / "build" / "screenshots"
SETTINGS = {
    "Comfy.TutorialCompleted": True,
    "Comfy.Workflow.ShowMissingModelsWarning": True,
    "Comfy.Minimap.Visible": False,
}
# generous, as the machine may be busy
SECONDS = 90
# The front end's themes -> the colour of their texts.
THEMES = {"dark": "#ddd", "light": "#222"}
# Front ends of 2025 find no help page in a folder with a dot in its name.
FOLDER = "ComfyUI-DCM"

# Ahead of a front end's own scripts: its DCM nodes can hold no element.
NO_ELEMENTS = """let front; Object.defineProperty(window, 'LiteGraph', { configurable: true, get: () => front, set(value) { front = value;
const node = value.LGraphNode.prototype; let add = node.addDOMWidget;
Object.defineProperty(node, 'addDOMWidget', {
  get() { return this.comfyClass?.startsWith('DCM') ? undefined : add }, set(given) { add = given } }) } })"""

# Node by node: the values that are not drawn whole, and how much of the widgets is below the node's end.
CUT_ON_CANVAS = """() => app.graph._nodes.map(node => {
const canvas = app.canvas, drawn = new Set(), { fillText } = CanvasRenderingContext2D.prototype;
CanvasRenderingContext2D.prototype.fillText = function (text, ...rest) { drawn.add(text); fillText.call(this, text, ...rest) };
canvas.ds.scale = 1;
canvas.ds.offset = [100 - node.pos[0], 100 - node.pos[1]];
canvas.draw(true, true);
CanvasRenderingContext2D.prototype.fillText = fillText;
const values = (node.widgets ?? []).filter(widget => ['combo', 'text'].includes(widget.type)).map(widget => widget.value);
return [node.type, values.filter(value => value && !drawn.has(value)), Math.max(0, node.computeSize()[1] - node.size[1])] })"""
CUT_IN_NODES_2 = """() => app.graph._nodes.map(node => {
const element = document.querySelector(`[data-node-id="${node.id}"]`), end = element.getBoundingClientRect().bottom;
const cut = [...element.querySelectorAll('span, input')].filter(part => part.scrollWidth > part.clientWidth + 1
  && getComputedStyle(part).overflowX !== 'visible').map(part => part.textContent || part.value);
const below = [...element.querySelectorAll('input, textarea, button')].filter(part => part.getBoundingClientRect().bottom > end);
return [node.type, cut, below.length] })"""

# Of a node's own text: the words, how high they are, how high the box that shows them, and how far the box is outside of its node.
SAID = """id => { const node = app.graph.getNodeById(id), { element } = node.widgets.find(widget => widget.name === "dcm_text");
const { ds, canvas } = app.canvas, page = canvas.getBoundingClientRect();
const frame = document.querySelector(`[data-node-id="${id}"]`)?.getBoundingClientRect() ?? {
  left: page.left + (node.pos[0] + ds.offset[0]) * ds.scale, right: page.left + (node.pos[0] + node.size[0] + ds.offset[0]) * ds.scale,
  top: page.top + (node.pos[1] + ds.offset[1]) * ds.scale, bottom: page.top + (node.pos[1] + node.size[1] + ds.offset[1]) * ds.scale };
const box = element.getBoundingClientRect();
const { scrollWidth, clientWidth, scrollHeight, clientHeight, textContent, innerText, childElementCount } = element;
return { text: textContent, lines: innerText, wide: scrollWidth - clientWidth, high: scrollHeight, shown: clientHeight,
  markup: childElementCount,
  outside: Math.max(frame.left - box.left, box.right - frame.right, frame.top - box.top, box.bottom - frame.bottom) } }"""


# Types of nodes that reach beyond the group they lie in.
OUTGROWN = """() => app.graph._nodes.filter(({ pos: [x, y], size: [width, height] }) => app.graph._groups.some(({ _bounding }) => {
const [left, top, wide, high] = _bounding, within = x >= left && x < left + wide && y >= top && y < top + high;
return within && (x + width > left + wide || y + height > top + high) })).map(({ type }) => type)"""


class Page:
    """A page of the front end, open on an empty graph.

    Attributes:
        name: front end and renderer, for screenshots.
        nodes2: drawn as Nodes 2.0, not on the canvas.
        errors: what the console called errors.
    """

    def __init__(self, chromium, server, name, nodes2, before=None):
        """`before`: a script to run in the page ahead of the front end's own."""
        self.server, self.name, self.nodes2, self.errors = server, name, nodes2, []
        for key, value in {**SETTINGS, "Comfy.VueNodes.Enabled": nodes2}.items():
            server.request(f"/settings/{key}", value)
        self.page = chromium.new_page(viewport={"width": 1600, "height": 1000})
        self.page.set_default_timeout(SECONDS * 1000)
        if before:
            self.page.add_init_script(before)
        # nothing outside this machine is asked
        self.page.route("**/*", lambda route: route.continue_() if "127.0.0.1" in route.request.url else route.abort())
        self.page.on(
            "console",
            lambda message: message.type == "error" and self.errors.append((message.text, message.location["url"])),
        )
        self.page.on("pageerror", lambda error: self.errors.append((str(error), "")))
        self.page.on("dialog", lambda dialog: dialog.accept())
        self.page.goto(server.url)
        self.wait(
            "() => window.app?.graph && window.app.extensionManager?.workflow && document.querySelector('#graph-canvas')"
        )
        self.wait("() => app.registerExtension && LiteGraph.registered_node_types.DCMSampler")

    def run(self, script, argument=None):
        return self.page.evaluate(script, argument)

    def wait(self, script, argument=None, seconds=SECONDS):
        """Until a script gives something true; returns it."""
        return self.page.wait_for_function(script, arg=argument, timeout=seconds * 1000, polling=100).json_value()

    def command(self, name):
        self.run("name => app.extensionManager.command.execute(name)", name)

    def shoot(self, title):
        """Keep what is seen as build/screenshots/<title> <name>.png."""
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=SCREENSHOTS / f"{title} {self.name}.png")

    def text(self, words):
        return self.page.get_by_text(words, exact=True).first

    def complaints(self):
        """Errors of the console that have to do with us: the front end's own requests to elsewhere are not."""
        elsewhere = (
            "Failed to load resource",
            "Failed to fetch queue",
            "[Jobs API]",
            "Connecting to ",
            "Fetch API cannot load",
            "Error fetching file size",
        )
        return [(text, url) for text, url in self.errors if not text.startswith(elsewhere) or FOLDER in url]

    def clear(self):
        """An empty graph, every dialog closed."""
        self.dismiss()
        self.command("Comfy.ClearWorkflow")
        self.wait("() => app.graph._nodes.length === 0")

    def wait_for_text(self, words):
        self.wait_for(self.page.get_by_text(words))

    def wait_for(self, wanted):
        """Until something is to be seen; a newer front end keeps it behind a button, and may close it again while it opens a graph."""
        wanted = wanted.locator("visible=true")
        details = self.page.get_by_text("View details", exact=True).locator("visible=true")
        for _ in range(2 * SECONDS):
            if wanted.count():
                return
            if details.count():
                details.first.click()
            time.sleep(0.5)
        raise AssertionError(f"not to be seen: {wanted}")

    def open(self, path):
        """Open a workflow file from the page's memory, as a drop on the canvas does."""
        self.run("([graph, name]) => app.loadGraphData(graph, true, true, name)", [read(path), path.stem])
        self.wait("count => app.graph._nodes.length === count", len(read(path)["nodes"]))
        self.dismiss()

    def open_served(self, path):
        """Open a workflow as the server gives it to the template browser."""
        graph = self.server.request(f"/api/workflow_templates/{FOLDER}/{path.stem}.json")
        self.run("([graph, name]) => app.loadGraphData(graph, true, true, name)", [graph, path.stem])
        self.wait("count => app.graph._nodes.length === count", len(read(path)["nodes"]))

    def open_template(self, path, listed=()):
        """Open a workflow from the template browser, which also lists those named."""
        from playwright.sync_api import TimeoutError

        dialog = self.page.locator("[role=dialog]")
        for _ in range(3):
            self.dismiss()
            self.command("Comfy.BrowseTemplates")
            try:
                dialog.get_by_text(FOLDER, exact=True).first.click(timeout=SECONDS * 1000 / 3)
                for title in listed:
                    dialog.get_by_text(title, exact=True).first.wait_for(timeout=SECONDS * 1000 / 3)
                dialog.get_by_text(path.stem, exact=True).first.click(timeout=SECONDS * 1000 / 3)
                break
            except TimeoutError as error:
                # the list is drawn anew when the host's own templates have come
                late = error
        else:
            raise late
        self.wait("count => app.graph._nodes.length === count", len(read(path)["nodes"]))

    def dismiss(self):
        """Close whatever dialog is open, and messages of what was done before."""
        self.run("() => app.extensionManager.toast.removeAll?.()")
        for _ in range(3):
            if not self.page.locator("[role=dialog]:visible").count():
                return
            self.page.keyboard.press("Escape")
            time.sleep(0.3)

    def add(self, kinds):
        """New nodes with the widgets and sizes they get when a user adds them."""
        self.run(
            """kinds => kinds.forEach((kind, place) => { const node = LiteGraph.createNode(kind);
            node.pos = [place % 6 * 600, Math.floor(place / 6) * 1000]; app.graph.add(node) })""",
            kinds,
        )

    def node(self, kind):
        """The id of the graph's only node of a kind."""
        (found,) = self.run("kind => app.graph._nodes.filter(n => n.type === kind).map(n => n.id)", kind)
        return found

    def width(self, kind):
        """Of the graph's only node of a kind, in pixels of the screen."""
        return self.run("id => app.graph.getNodeById(id).size[0] * app.canvas.ds.scale", self.node(kind))

    def set_widget(self, kind, name, value):
        self.run(
            """([id, name, value]) => { const widget = app.graph.getNodeById(id).widgets.find(w => w.name === name);
            widget.value = value; widget.callback?.(value) }""",
            [self.node(kind), name, value],
        )
        self.changed()

    def changed(self):
        """What a front end does at the end of a click or a key: look at what the user changed in the graph."""
        self.run(
            """() => { const tracker = app.extensionManager.workflow.activeWorkflow.changeTracker;
            (tracker.captureCanvasState ?? tracker.checkState).call(tracker) }"""
        )

    def show(self, kind, settle=1):
        """Select a node alone and bring it to the middle of the screen, with room for its tools above; wait `settle` seconds."""
        self.run(
            """id => { const node = app.graph.getNodeById(id), canvas = app.canvas;
            canvas.deselectAll?.();
            const scale = canvas.ds.scale = Math.min(0.9, 650 / node.size[1]);
            canvas.ds.offset = [700 / scale - node.pos[0] - node.size[0] / 2, 240 / scale - node.pos[1]];
            canvas.selectNode(node); canvas.setDirty(true, true) }""",
            self.node(kind),
        )
        time.sleep(settle)

    def cut(self):
        """[type, values that are not to be read whole, how much is below its end] of each node."""
        if not self.nodes2:
            return self.run(CUT_ON_CANVAS)
        self.wait('() => app.graph._nodes.every(({ id }) => document.querySelector(`[data-node-id="${id}"] button`))')
        return self.run(CUT_IN_NODES_2)

    def said(self, kind):
        """What the graph's only node of a kind says, and how it is shown (SAID)."""
        return self.run(SAID, self.node(kind))

    def wait_until_said(self, kind, pattern, seconds=SECONDS):
        """Until the text of a node has a pattern; its match."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if found := re.search(pattern, self.said(kind)["text"]):
                return found
            time.sleep(0.1)
        raise AssertionError(f"{kind} says {self.said(kind)['text']!r}, not {pattern!r}")

    def listen_to_the_bar(self):
        """Keep the step bar's words, one after the other, in the page's `captions`."""
        self.run(
            """() => { const [, caption] = document.querySelector('.dcm-step-bar').firstElementChild.children; window.captions = [];
            new MutationObserver(() => captions.push(caption.textContent)).observe(caption, { childList: true }) }"""
        )

    def caption(self):
        """The one line of the step bar."""
        return self.page.locator(".dcm-step-bar > div > div").nth(1).text_content()

    def use_theme(self, name):
        self.run("name => app.extensionManager.setting.set('Comfy.ColorPalette', name)", name)
        self.wait(
            "color => getComputedStyle(document.body).getPropertyValue('--input-text').trim() === color", THEMES[name]
        )

    def zoom(self, kind, scale):
        """Draw the graph so large, with the bar of the graph's only node of a kind on the screen."""
        self.run(
            """([id, scale]) => { const node = app.graph.getNodeById(id), { canvas } = app;
            const widget = node.widgets.find(({ name }) => name === 'dcm_plan');
            canvas.ds.scale = scale; canvas.ds.offset = [300 / scale - node.pos[0], 500 / scale - node.pos[1] - widget.y];
            canvas.setDirty(true, true) }""",
            [self.node(kind), scale],
        )
        time.sleep(1)

    def previews_of(self, node):
        """Keep what a node shows as its preview, drawn by the canvas or an element of Nodes 2.0, in the page's `previews`."""
        self.run(
            """id => { window.previews = new Set(); setInterval(() => { const drawn = app.graph.getNodeById(id)?.imgs ?? [];
            for (const { src } of [...drawn, ...document.querySelectorAll(`[data-node-id="${id}"] img`)])
              if (/^(blob|data):/.test(src)) previews.add(src) }, 20) }""",
            node,
        )

    def queue(self):
        """Press Run; the page forgets the messages of earlier runs."""
        self.run(
            """() => { window.heard = [];
            if (window.listening) return; window.listening = true;
            const names = ['progress_state', 'execution_success', 'execution_error', 'execution_interrupted', 'b_preview_with_metadata',
              'b_preview', 'dcm.plan', 'dcm.preview'];
            for (const name of names) app.api.addEventListener(name, ({ detail }) =>
              window.heard.push([name, detail instanceof Blob || detail?.blob ? 'image' : structuredClone(detail)])) }"""
        )
        self.command("Comfy.QueuePrompt")

    def heard(self, name):
        """Details of the events of a name since `queue`."""
        return self.run("name => window.heard.filter(([n]) => n === name).map(([_, detail]) => detail)", name)

    def finish(self, seconds=SECONDS):
        """Until the run has ended well."""
        ended = self.wait("() => window.heard.find(([name]) => name.startsWith('execution_'))", seconds=seconds)
        assert ended[0] == "execution_success", json.dumps(ended[1])[:2000]
