"""Chromium on a running host's page, as a user drives it."""

import json
import shutil
import time

from .graphs import read
from .server import ROOT

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable") if (path := shutil.which(name))), None
)
ARGUMENTS = [
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]
SCREENSHOTS = ROOT / "build" / "screenshots"
SETTINGS = {"Comfy.TutorialCompleted": True, "Comfy.Workflow.ShowMissingModelsWarning": True, "Comfy.Minimap.Visible": False}
SECONDS = 30
# Front ends of 2025 find no help page in a folder with a dot in its name.
FOLDER = "ComfyUI-DCM"


class Page:
    """A page of the front end, open on an empty graph.

    Attributes:
        name: front end and renderer, for screenshots.
        errors: what the console called errors since `watch`.
    """

    def __init__(self, chromium, server, name, nodes2):
        self.server, self.name, self.errors = server, name, []
        for key, value in {**SETTINGS, "Comfy.VueNodes.Enabled": nodes2}.items():
            server.request(f"/settings/{key}", value)
        self.page = chromium.new_page(viewport={"width": 1600, "height": 1000})
        self.page.set_default_timeout(SECONDS * 1000)
        # nothing outside this machine is asked
        self.page.route("**/*", lambda route: route.continue_() if "127.0.0.1" in route.request.url else route.abort())
        self.page.on("console", lambda message: message.type == "error" and self.errors.append((message.text, message.location["url"])))
        self.page.on("pageerror", lambda error: self.errors.append((str(error), "")))
        self.page.on("dialog", lambda dialog: dialog.accept())
        self.page.goto(server.url)
        self.wait("() => window.app?.graph && window.app.extensionManager?.workflow && document.querySelector('#graph-canvas')")
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
        elsewhere = ("Failed to load resource", "[Jobs API]", "Connecting to ", "Fetch API cannot load", "Error fetching file size")
        return [(text, url) for text, url in self.errors if not text.startswith(elsewhere) or FOLDER in url]

    def clear(self):
        """An empty graph, every dialog closed."""
        self.dismiss()
        self.command("Comfy.ClearWorkflow")
        self.wait("() => app.graph._nodes.length === 0")

    def wait_for_text(self, words):
        """Until the words are to be seen; a newer front end keeps them behind a button."""
        details = self.page.get_by_text("View details", exact=True).locator("visible=true")
        words = self.page.get_by_text(words).locator("visible=true")
        words.or_(details).first.wait_for()
        if not words.count():
            details.first.click()
        words.first.wait_for()

    def open(self, path):
        """Open a workflow file from the page's memory, as a drop on the canvas does."""
        self.run("([graph, name]) => app.loadGraphData(graph, true, true, name)", [read(path), path.stem])
        self.wait("count => app.graph._nodes.length === count", len(read(path)["nodes"]))
        self.dismiss()

    def open_template(self, path):
        """Open a workflow from the template browser."""
        from playwright.sync_api import TimeoutError

        dialog = self.page.locator("[role=dialog]")
        for _ in range(3):
            self.dismiss()
            self.command("Comfy.BrowseTemplates")
            try:
                dialog.get_by_text(FOLDER, exact=True).first.click(timeout=10_000)
                dialog.get_by_text(path.stem, exact=True).first.click(timeout=10_000)
                break
            except TimeoutError as error:
                # the list is drawn anew when the host's own templates have come
                late = error
        else:
            raise late
        self.wait("count => app.graph._nodes.length === count", len(read(path)["nodes"]))

    def dismiss(self):
        """Close whatever dialog is open."""
        for _ in range(3):
            if not self.page.locator("[role=dialog]:visible").count():
                return
            self.page.keyboard.press("Escape")
            time.sleep(0.3)

    def node(self, kind):
        """The id of the graph's only node of a kind."""
        (found,) = self.run("kind => app.graph._nodes.filter(n => n.type === kind).map(n => n.id)", kind)
        return found

    def set_widget(self, kind, name, value):
        self.run(
            """([id, name, value]) => { const widget = app.graph.getNodeById(id).widgets.find(w => w.name === name);
            widget.value = value; widget.callback?.(value) }""",
            [self.node(kind), name, value],
        )

    def show(self, kind):
        """Bring a node to the middle of the screen, with room for its tools above."""
        self.run(
            """id => { const node = app.graph.getNodeById(id), canvas = app.canvas;
            const scale = canvas.ds.scale = Math.min(0.9, 650 / node.size[1]);
            canvas.ds.offset = [700 / scale - node.pos[0] - node.size[0] / 2, 240 / scale - node.pos[1]];
            canvas.selectNode(node); canvas.setDirty(true, true) }""",
            self.node(kind),
        )
        time.sleep(1)

    def queue(self):
        """Press Run; the page forgets the messages of earlier runs."""
        self.run(
            """() => { window.heard = [];
            if (window.listening) return; window.listening = true;
            const names = ['progress_state', 'execution_success', 'execution_error', 'b_preview_with_metadata', 'b_preview', 'dcm.plan'];
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
