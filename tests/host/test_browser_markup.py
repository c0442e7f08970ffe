"""What files and names say is text in the page, on every front end and renderer: nothing in it runs, links or loads."""

import shutil

import pytest
import torch

from dcm_core.files.writing import write_tensors

from .server import ROOT
from .test_browser import SMALL_WORLD, chromium, keep_what_was_seen, page, serve  # noqa: F401 - fixtures

SHIPPED = ROOT / "small_world" / "models"
FIELDS = ("dcm.family", "dcm.expert", "dcm.alpha", "dcm.boundary", "dcm.timesteps")
LINKS = "[a](http://evil.test/a) ![b](http://evil.test/b) [[c|http://evil.test/c]] http://evil.test/d www.evil.test __LNK0__ e@evil.test"
ESCAPES = "\x1b[31m \x1b]0;title\x07 \u202e \u2066 \u200b"
# name of a file, without the slashes that no name has
NAME = "[f](www.evil.test) www.evil.test &lt;b&gt; *g* e@evil.test"

# What is shown on the page, and what of the files has become more than text.
LOOK = """() => { const found = [...document.querySelectorAll('a, img, iframe, script, b, em, strong, del, form, input')].filter(element =>
  /evil|onerror|javascript:|window.ran/.test(element.outerHTML) && !element.matches('input, textarea') || /\\/x$/.test(element.src ?? ''));
return { ran: window.ran ?? [], elements: found.map(element => element.outerHTML),
  text: document.body.innerText + ' ' + [...document.querySelectorAll('textarea')].map(area => area.value).join(' ') } }"""


def attack(field):
    """Markup that tells the page's window when it runs."""
    run = f"(window.ran??=[]).push('{field}')"
    return f'<img src=x onerror="{run}"><a href="javascript:{run}">{field}</a><script>{run}</script> {LINKS} {ESCAPES}'


@pytest.fixture
def crafted(page):  # noqa: F811
    """Write what is shown to the host's folders; its names."""
    models = page.server.base / "models"
    (models / "loras").mkdir(parents=True, exist_ok=True)
    site = "blocks.0.self_attn.q"
    tensors = {f"{site}.lora_A.weight": torch.zeros(4, 128), f"{site}.lora_B.weight": torch.zeros(128, 4)}
    more = {**tensors, f"{attack('tensor')}.lora_A.weight": torch.zeros(1), f"{attack('other')}": torch.zeros(1)}
    write_tensors(models / "loras" / "crafted.safetensors", more, {field: attack(field) for field in FIELDS})
    # layers of no known family, so that the family is what the file says
    strange = {key.replace("blocks", "parts"): tensor for key, tensor in tensors.items()}
    for field in FIELDS:  # of several bad entries only the first is quoted
        own = strange if field == "dcm.family" else tensors
        write_tensors(models / "loras" / f"{field}.safetensors", own, {field: attack(field)})
    names = {"loras": f"{NAME}.safetensors", "dcm_conditioning": f"{NAME}.safetensors"}
    write_tensors(models / "loras" / names["loras"], tensors, {"dcm.family": "wan", "dcm.expert": attack("role")})
    (models / "dcm_conditioning").mkdir(exist_ok=True)
    shutil.copy(
        next((SHIPPED / "dcm_conditioning").rglob("*.safetensors")),
        models / "dcm_conditioning" / names["dcm_conditioning"],
    )
    return names


def run(page):  # noqa: F811
    """Queue the graph and give the page time for what must not happen; how it ended."""
    page.run("() => { window.ran = undefined }")
    page.queue()
    ended = page.wait("() => window.heard.find(([name]) => name.startsWith('execution_'))")
    page.page.wait_for_timeout(1500)
    return ended


def check_text(page, *shown):  # noqa: F811
    found = page.run(LOOK)
    assert found["ran"] == [] and found["elements"] == []
    text = " ".join(found["text"].split())
    for part in shown:
        assert part in text, f"{part!r} is not in {text[-3000:]!r}"


def test_what_a_file_says_of_itself_is_text(page, crafted):  # noqa: F811
    page.clear()
    page.add(["DCMInspectModel"])
    page.show("DCMInspectModel")
    for name, quoted in (("crafted", "other"), *zip(FIELDS, FIELDS, strict=True)):
        page.set_widget("DCMInspectModel", "file", f"loras/{name}.safetensors")
        kind, detail = run(page)
        assert kind == "execution_success", detail
        check_text(page, f"(window.ran??=[]).push('{quoted}')")
    page.shoot("markup in a file")


def test_what_an_error_quotes_is_text(page, crafted):  # noqa: F811
    page.open(SMALL_WORLD)
    page.set_widget("DCMAttachExperts", "detail_lora", "crafted.safetensors")
    kind, detail = run(page)
    assert kind == "execution_error" and "push('" in detail["exception_message"]
    assert "\x1b" not in detail["exception_message"] and "\u202e" not in detail["exception_message"]
    page.wait_for_text("push('")
    page.shoot("markup in an error")
    check_text(page, "push('")
    page.dismiss()


def test_a_name_is_text(page, crafted):  # noqa: F811
    page.clear()
    page.add(["DCMLoadConditioning", "DCMSaveConditioning", "DCMInspectModel"])
    page.run(
        """([from, to]) => app.graph.getNodeById(from).connect(0, app.graph.getNodeById(to), 0)""",
        [page.node("DCMLoadConditioning"), page.node("DCMSaveConditioning")],
    )
    page.set_widget("DCMLoadConditioning", "name", crafted["dcm_conditioning"])
    page.set_widget("DCMSaveConditioning", "overwrite", True)
    page.set_widget("DCMInspectModel", "file", f"loras/{crafted['loras']}")
    page.show("DCMLoadConditioning")
    kind, detail = run(page)
    assert kind == "execution_success", detail
    page.shoot("markup in a name")
    check_text(page, NAME)
    page.show("DCMInspectModel")
    check_text(page, "push('role')")
