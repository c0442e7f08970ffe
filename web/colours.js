// The experts' colours, the same everywhere (dcm_core/inspection/plot.py). The training nodes use them too.

import { app } from "../../scripts/app.js";

export const COLOURS = { semantic: "#f2a33c", detail: "#4cb3ff" };
const NEUTRAL = "#8a8d99";
export const BASE = "base"; // the owner of a step without an expert
// The rows of an expert table, in the order in which they run.
const OTHERS = ["#5fd38d", "#ff7a90", "#c9a6ff", "#f5e05c", "#7fe3e0", "#ff9e64", "#b5d56a", "#e58fd9"];
export const WARNING = "#ff9a6b";

const NODES = {
  DCMTrainSemanticExpert: { color: "#6b4514", bgcolor: "#4a3211" },
  DCMTrainDetailExpert: { color: "#1d4f73", bgcolor: "#173a54" },
};
// Wide enough for a new node's values and high enough for its pictures; 0 is the height that the widgets need.
const SIZES = {
  DCMSampler: [360, 560],
  DCMAttachExperts: [420, 300],
  DCMExpert: [460, 260],
  DCMAttachTable: [400, 160],
  DCMConvertCheckpoint: [420, 0],
  DCMExtractLoRA: [420, 0],
  DCMExportExpert: [420, 0],
  DCMInspectModel: [420, 0],
  DCMLoadConditioning: [520, 0],
  DCMLoadDataset: [420, 0],
  DCMLoadModel: [420, 0],
  DCMTrainSemanticExpert: [420, 640],
  DCMTrainDetailExpert: [420, 700],
  DCMVideoDataset: [400, 360],
  DCMScheduler: [320, 230],
  DCMSchedulePlot: [420, 420],
  DCMVideoSize: [340, 240],
  DCMCompare: [420, 0],
  DCMTune: [480, 0],
};

// What runs each step -> a Map of their colours: see Theme.palette in dcm_core/inspection/plot.py.
export function palette(owners) {
  const colours = new Map([...Object.entries(COLOURS), [BASE, NEUTRAL]]);
  const rows = new Set(owners.filter((owner) => !colours.has(owner)));
  [...rows].forEach((row, place) => colours.set(row, OTHERS[place % OTHERS.length]));
  return colours;
}

app.registerExtension({
  name: "DCM.Colours",

  // a node from a saved graph gets its own colour and size afterwards
  nodeCreated(node) {
    Object.assign(node, NODES[node.comfyClass] ?? {});
    const size = SIZES[node.comfyClass];
    if (size) node.setSize?.([Math.max(size[0], node.size[0]), Math.max(size[1], node.size[1])]);
  },
});
