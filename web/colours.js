// The experts' colours, the same everywhere (dcm_core/inspection/plot.py). The training nodes use them too.

import { app } from "../../scripts/app.js";

export const COLOURS = { semantic: "#f2a33c", detail: "#4cb3ff" };
export const NEUTRAL = "#8a8d99";
// The rows of an expert table, in the order in which they run.
export const OTHERS = ["#5fd38d", "#ff7a90", "#c9a6ff", "#f5e05c", "#7fe3e0", "#ff9e64", "#b5d56a", "#e58fd9"];
export const WARNING = "#ff9a6b";

const NODES = {
  DCMTrainSemanticExpert: { color: "#6b4514", bgcolor: "#4a3211" },
  DCMTrainDetailExpert: { color: "#1d4f73", bgcolor: "#173a54" },
};
// Wide enough for a new node's values and high enough for its pictures; 0 is the height that the widgets need.
const SIZES = {
  DCMSampler: [360, 560],
  DCMAttachExperts: [420, 300],
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
};

app.registerExtension({
  name: "DCM.Colours",

  // a node from a saved graph gets its own colour and size afterwards
  nodeCreated(node) {
    Object.assign(node, NODES[node.comfyClass] ?? {});
    const size = SIZES[node.comfyClass];
    if (size) node.setSize?.([Math.max(size[0], node.size[0]), Math.max(size[1], node.size[1])]);
  },
});
