"""Make the pictures of the front end anew: thumbnails of the workflows, the nodes of the help pages.

    COMFYUI_PATH=... COMFYUI_FRONT_END=... python scripts/pictures.py [name ...]

For developers, after a graph or a node has changed. Run with the Python of scripts/environment.py; Chromium has to be
installed. With names (of workflows or nodes) only these are made.
"""

from __future__ import annotations

import io
import os
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

from PIL import Image  # noqa: E402
from playwright.sync_api import sync_playwright  # noqa: E402

from tests.host.browser import ARGUMENTS, CHROMIUM, FOLDER, Page  # noqa: E402
from tests.host.graphs import WORKFLOWS, read  # noqa: E402
from tests.host.server import start_server  # noqa: E402

WORKFLOW_SIZE, NODE_SIZE = (1280, 720), (960, 540)
# Only the graph: no tools over it, every text drawn however small.
SETTINGS = {
    "Comfy.Graph.CanvasInfo": False,
    "Comfy.Graph.CanvasMenu": False,
    "LiteGraph.Canvas.MinFontSizeForLOD": 0,
    "LiteGraph.Canvas.LowQualityRenderingZoomThreshold": 0.1,
}
STYLE = "button, .p-toast, [class*=actionbar] { visibility: hidden !important }"
SMALL_WORLD = next(path for path in WORKFLOWS if path.stem == "DCM small world (CPU)")

ENCODER = {"clip_name": "umt5_xxl_fp8_e4m3fn_scaled.safetensors", "type": "wan"}
RELEASE = {"model_name": "dcm_wan2.1_t2v_1.3B.safetensors"}
BASE = {"model_name": "zz_dcm_small_world_base.safetensors"}
CLIPS = {"file_name": "zz_dcm_small_world.safetensors"}
VAE = {"vae_name": "zz_dcm_small_world_vae.safetensors"}

LIGHT = "wan2.2_t2v_lightx2v_4steps_lora_v1.1_{}_noise.safetensors"
PAIR = "wan2.2_t2v_{}_noise_14B_fp8_scaled.safetensors"
HIGH, LOW = (
    {"name": side, "unit": "sigma", "start": start, "end": end, "lora": LIGHT.format(side)}
    for side, start, end in (("high", 1, 0.875), ("low", 0.875, 0))
)

# Graphs for nodes that no shipped workflow shows, or only among many others: [(type, column, row, widgets)], [(from, output, to, input)].
GRAPHS = {
    "DCMExpert": (
        [
            ("DCMExpert", 0, 0, HIGH),
            ("DCMExpert", 1.1, 0, LOW),
            ("UNETLoader", 0.42, 1.4, {"unet_name": PAIR.format("low")}),
        ],
        [(0, 0, 1, "rows"), (2, 0, 1, "model")],
    ),
    "DCMAttachTable": (
        [
            ("UNETLoader", 0, -0.6, {"unet_name": PAIR.format("high")}),
            ("DCMExpert", 0, 0, HIGH),
            ("DCMExpert", 1.1, 0, LOW),
            ("UNETLoader", 0.42, 1.4, {"unet_name": PAIR.format("low")}),
            ("DCMAttachTable", 2.2, -0.6, {}),
        ],
        [(1, 0, 2, "rows"), (3, 0, 2, "model"), (0, 0, 4, "model"), (2, 0, 4, "rows")],
    ),
    "DCMSchedulePlot": (
        [
            ("DCMLoadModel", 0, 0, RELEASE),
            ("DCMScheduler", 1, 0, {}),
            ("DCMSchedulePlot", 2, 0, {}),
            ("PreviewImage", 3, 0, {}),
        ],
        [(0, 0, 1, "model"), (0, 0, 2, "model"), (1, 0, 2, "sigmas"), (2, 0, 3, "images")],
    ),
    "DCMCompare": (
        [
            ("DCMLoadModel", 0, 0, RELEASE),
            ("CLIPLoader", 0, 1, ENCODER),
            ("VAELoader", 0, 2, {"vae_name": "wan_2.1_vae.safetensors"}),
            ("CLIPTextEncode", 1, 0, {}),
            ("EmptyHunyuanLatentVideo", 1, 1, {}),
            ("DCMCompare", 2, 0, {}),
            ("PreviewImage", 3, 0, {}),
        ],
        [
            (0, 0, 5, "model"),
            (1, 0, 3, "clip"),
            (3, 0, 5, "positive"),
            (4, 0, 5, "latent_image"),
            (2, 0, 5, "vae"),
            (5, 0, 6, "images"),
        ],
    ),
    "DCMTune": (
        [
            ("DCMLoadModel", 0, 0, BASE),
            ("DCMLoadConditioning", 0, 1, {}),
            ("EmptyHunyuanLatentVideo", 0, 2, {"width": 64, "height": 64, "length": 17, "batch_size": 4}),
            (
                "DCMTune",
                1.1,
                0,
                {
                    "semantic_lora": "zz_dcm_small_world_semantic.safetensors",
                    "detail_lora": "zz_dcm_small_world_detail.safetensors",
                },
            ),
            ("DCMAttachExperts", 2, 0, {}),
            ("PreviewImage", 2, 1.5, {}),
        ],
        [
            (0, 0, 3, "model"),
            (1, 0, 3, "positive"),
            (2, 0, 3, "latent_image"),
            (3, 0, 4, "semantic_strength"),
            (3, 1, 4, "detail_strength"),
            (3, 2, 4, "boundary"),
            (0, 0, 4, "model"),
            (3, 4, 5, "images"),
        ],
    ),
    "DCMVideoSize": (
        [
            ("DCMLoadModel", 0, 0, RELEASE),
            ("DCMVideoSize", 1, 0, {}),
            ("EmptyHunyuanLatentVideo", 2, 0, {}),
            ("CreateVideo", 2, 1, {}),
        ],
        [(0, 0, 1, "model"), (1, 0, 2, "width"), (1, 1, 2, "height"), (1, 2, 2, "length"), (1, 3, 3, "fps")],
    ),
    "DCMSplitSigmas": (
        [
            ("DCMLoadModel", 0, 0, RELEASE),
            ("DCMScheduler", 1, 0, {}),
            ("DCMSplitSigmas", 2, 0, {}),
            ("SamplerCustomAdvanced", 3, 0, {}),
            ("SamplerCustomAdvanced", 3, 1, {}),
        ],
        [(0, 0, 1, "model"), (0, 0, 2, "model"), (1, 0, 2, "sigmas"), (2, 0, 3, "sigmas"), (2, 1, 4, "sigmas")],
    ),
    "DCMSaveConditioning": (
        [("CLIPLoader", 0, 0, ENCODER), ("CLIPTextEncode", 1, 0, {}), ("DCMSaveConditioning", 2, 0, {})],
        [(0, 0, 1, "clip"), (1, 0, 2, "conditioning")],
    ),
    "DCMVideoDataset": (
        [
            ("VAELoader", 0, 0, {"vae_name": "wan_2.1_vae.safetensors"}),
            ("CLIPLoader", 0, 1, ENCODER),
            ("DCMVideoDataset", 1, 0, {}),
            ("DCMTrainSemanticExpert", 2, 0, {}),
        ],
        [(0, 0, 2, "vae"), (1, 0, 2, "clip"), (2, 0, 3, "dataset")],
    ),
    "DCMLoadDataset": (
        [("DCMLoadDataset", 0, 0, CLIPS), ("DCMTrainSemanticExpert", 1, 0, {})],
        [(0, 0, 1, "dataset")],
    ),
    "DCMTrainSemanticExpert": (
        [
            ("DCMLoadModel", 0, 0, BASE),
            ("DCMLoadDataset", 0, 1, CLIPS),
            ("VAELoader", 0, 2, VAE),
            ("DCMTrainSemanticExpert", 1, 0, {}),
            ("PreviewImage", 2, 0, {}),
        ],
        [(0, 0, 3, "model"), (1, 0, 3, "dataset"), (2, 0, 3, "vae"), (3, 3, 4, "images")],
    ),
    "DCMTrainDetailExpert": (
        [
            ("DCMLoadModel", 0, 0, BASE),
            ("DCMLoadDataset", 0, 1, CLIPS),
            ("VAELoader", 0, 2, VAE),
            ("DCMTrainDetailExpert", 1, 0, {"semantic_lora": "zz_dcm_small_world_semantic.safetensors"}),
            ("PreviewImage", 2, 0, {}),
        ],
        [(0, 0, 3, "model"), (1, 0, 3, "dataset"), (2, 0, 3, "vae"), (3, 3, 4, "images")],
    ),
    "DCMSaveDataset": ([("DCMVideoDataset", 0, 0, {}), ("DCMSaveDataset", 1, 0, {})], [(0, 0, 1, "dataset")]),
    "DCMExportExpert": (
        [
            (
                "DCMExportExpert",
                0,
                0,
                {
                    "expert": "dcm_detail_expert.safetensors",
                    "name": "my_dcm_release",
                    "base_model": "wan2.1_t2v_1.3B_fp16.safetensors",
                    "semantic_lora": "dcm_semantic_expert.safetensors",
                },
            )
        ],
        [],
    ),
    "DCMInspectModel": (
        [("DCMLoadModel", 0, 0, RELEASE), ("DCMInspectModel", 1, 0, {}), ("PreviewImage", 2, 0, {})],
        [(0, 0, 1, "model"), (1, 1, 2, "images")],
    ),
}

BUILD = """([nodes, links]) => {
  app.graph.clear();
  const made = nodes.map(([type, column, row, values]) => {
    const node = LiteGraph.createNode(type);
    app.graph.add(node);
    node.pos = [column * 480, row * 260];
    for (const widget of node.widgets ?? []) if (widget.name in values) widget.value = values[widget.name];
    return node;
  });
  for (const [from, output, to, input] of links) made[from].connect(output, made[to], made[to].findInputSlot(input));
}"""

# The part of the graph around some nodes, in the middle and as large as it can be.
BOX = """const nodes = ids ? ids.map(id => app.graph.getNodeById(id)) : app.graph._nodes;
  const left = Math.min(...nodes.map(n => n.pos[0])) - 40, top = Math.min(...nodes.map(n => n.pos[1])) - 90;
  const right = Math.max(...nodes.map(n => n.pos[0] + n.size[0])) + 40, bottom = Math.max(...nodes.map(n => n.pos[1] + n.size[1])) + 40;
"""
EXTENT = f"ids => {{ {BOX} return [right - left, bottom - top]; }}"
FRAME = (
    "([ids, width, height]) => { const canvas = app.canvas; "
    + BOX
    + """
  const scale = Math.min(width / (right - left), height / (bottom - top), 1.2);
  canvas.deselectAll?.();
  canvas.ds.scale = scale;
  canvas.ds.offset = [(width / scale - right - left) / 2, (height / scale - bottom - top) / 2];
  canvas.setDirty(true, true);
}"""
)

NEIGHBOURS = """kind => {
  const node = app.graph._nodes.find(other => other.type === kind), found = new Set([node.id]);
  for (let slot = 0; slot < (node.inputs?.length ?? 0); slot++) { const other = node.getInputNode(slot); if (other) found.add(other.id); }
  for (let slot = 0; slot < (node.outputs?.length ?? 0); slot++) for (const other of node.getOutputNodes(slot) ?? []) found.add(other.id);
  const near = other => Math.abs(other.pos[0] - node.pos[0]) < 700 && Math.abs(other.pos[1] - node.pos[1]) < 700;
  return [...found].filter(other => near(app.graph.getNodeById(other)));
}"""


def stand_in_for_files(base: Path) -> None:
    """Empty files under the names that the graphs load: what is missing is drawn in red."""
    made_by_the_user = {
        "DCMLoadConditioning": "models/dcm_conditioning",
        "DCMAttachExperts": "models/loras",
        "LoadImage": "input",
    }
    for path in WORKFLOWS:
        for node in read(path)["nodes"]:
            files = {f"models/{model['directory']}/{model['name']}" for model in node["properties"].get("models", [])}
            if folder := made_by_the_user.get(node["type"]):
                files |= {
                    f"{folder}/{name}"
                    for name in node["widgets_values"]
                    if str(name).endswith((".safetensors", ".png"))
                }
            # what comes with the pack is there
            files = {file for file in files if "zz_dcm_small_world" not in file}
            for file in files:
                (base / file).parent.mkdir(parents=True, exist_ok=True)
                (base / file).touch()


def take(page: Page, path: Path, size: tuple[int, int], ids: list[int] | None = None) -> None:
    """Photograph some nodes of the graph (all of them for None), no higher than they are."""
    width, height = size
    wide, high = page.run(EXTENT, ids)
    height = max(height // 2, min(height, round(width * high / wide)))
    page.page.set_viewport_size({"width": width, "height": height})
    time.sleep(1)
    page.run(FRAME, [ids, width, height])
    time.sleep(2)
    picture = Image.open(io.BytesIO(page.page.screenshot())).convert("RGB")
    picture.save(path, quality=82, optimize=True)
    print(path.relative_to(ROOT), f"{path.stat().st_size / 1e3:.0f} kB", flush=True)


def render(page: Page) -> None:
    """Run the open graph, its video shown."""
    # the host would not run it a second time
    page.server.request("/free", {"free_memory": True})
    page.queue()
    page.finish(seconds=600)
    page.run(FRAME, [None, 1280, 720])
    page.wait("() => [...document.querySelectorAll('video')].some(video => video.videoWidth > 0)", seconds=120)
    time.sleep(3)


def main() -> None:
    wanted = set(sys.argv[1:])
    with tempfile.TemporaryDirectory() as base, sync_playwright() as running:
        arguments = ("--front-end-root", os.environ["COMFYUI_FRONT_END"])
        stand_in_for_files(Path(base))
        with start_server(Path(base), *arguments, folder=FOLDER) as server:
            for key, value in SETTINGS.items():
                server.request(f"/settings/{key}", value)
            page = Page(
                running.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS), server, "pictures", nodes2=False
            )
            page.command("Workspace.ToggleFocusMode")
            page.page.add_style_tag(content=STYLE)
            # what a run leaves on the node is part of these pictures
            shown = {"DCMSampler": SMALL_WORLD}
            for path in WORKFLOWS:
                shown = {node["type"]: path for node in read(path)["nodes"]} | shown
                if not wanted or path.stem in wanted:
                    page.open(path)
                    if path == SMALL_WORLD:
                        render(page)
                    nodes = page.run("() => app.graph._nodes.filter(n => n.type !== 'MarkdownNote').map(n => n.id)")
                    take(page, path.with_suffix(".jpg"), WORKFLOW_SIZE, nodes)
            for help_page in sorted((ROOT / "web" / "docs").glob("*.md")):
                kind = help_page.stem
                if wanted and kind not in wanted:
                    continue
                if kind in GRAPHS:
                    page.run(BUILD, list(GRAPHS[kind]))
                    take(page, help_page.with_suffix(".jpg"), NODE_SIZE)
                else:
                    page.open(shown[kind])
                    if shown[kind] == SMALL_WORLD:
                        render(page)
                    take(page, help_page.with_suffix(".jpg"), NODE_SIZE, page.run(NEIGHBOURS, kind))


if __name__ == "__main__":
    main()
