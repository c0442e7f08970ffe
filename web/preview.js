// Plays DCM Sampler's preview while it samples: the host shows only the first frame of a latent, the server sends more.
// They appear where the front end shows the host's own preview of the node.

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

const FRAMES_A_SECOND = 8;
const playing = new Map(); // execution id of a node -> { frames, at, timer }

// An execution id includes the subgraphs: "5:3" is node 3 in the graph of node 5.
export function nodeOf(id) {
  let node, graph = app.rootGraph ?? app.graph;
  for (const part of String(id).split(":")) {
    node = graph?.getNodeById(part);
    graph = node?.subgraph;
  }
  return node;
}

function show(node, frame) {
  if (!frame.complete) return;
  // on the canvas
  if (node.imgs?.length === 1) {
    node.imgs = [frame];
    node.setDirtyCanvas(true);
  }
  // in Nodes 2.0, which draws only the open graph
  if (node.graph !== app.canvas.graph) return;
  for (const image of document.querySelectorAll(`[data-node-id="${node.id}"] img`)) {
    if (image.dataset.dcmPreview || image.src.startsWith("blob:")) {
      image.dataset.dcmPreview = "true";
      image.src = frame.src;
    }
  }
}

function play(id, frames) {
  const shown = playing.get(id) ?? { at: 0 };
  playing.set(id, shown);
  shown.frames = frames.map((data) => Object.assign(new Image(), { src: `data:image/jpeg;base64,${data}` }));
  shown.timer ??= setInterval(() => {
    const node = nodeOf(id);
    if (document.hidden || !node) return;
    shown.at = (shown.at + 1) % shown.frames.length;
    show(node, shown.frames[shown.at]);
  }, 1000 / FRAMES_A_SECOND);
}

function stop(id) {
  clearInterval(playing.get(id)?.timer);
  playing.delete(id);
}

app.registerExtension({
  name: "DCM.Preview",

  setup() {
    api.addEventListener("dcm.preview", ({ detail }) => play(detail.node, detail.frames));
    // keeps playing while the video is decoded
    for (const end of ["execution_error", "execution_interrupted", "execution_success"]) {
      api.addEventListener(end, () => [...playing.keys()].forEach(stop));
    }
  },
});
