// Shows a word instead of the number that means "choose it for me". The widget keeps the number, in graphs and while it is edited.

import { app } from "../../scripts/app.js";

const BOUNDARY = { boundary: "automatic" };
const SIDES = { boundary: "automatic", detail_cfg: "as cfg" };
const TRAINING = { boundary: "automatic", learning_rate: "automatic" };
// node -> widget -> the word for 0
const WORDS = {
  DCMSampler: SIDES,
  DCMGuider: SIDES,
  DCMAttachExperts: BOUNDARY,
  DCMSchedulePlot: BOUNDARY,
  DCMExpert: { cfg: "as sampler" },
  DCMTrainSemanticExpert: TRAINING,
  DCMTrainDetailExpert: TRAINING,
};
const nodes = new Set();
const style = document.createElement("style");
let waiting;

// On the canvas a widget draws its `_displayValue`.
function sayOnCanvas(widget, word) {
  const prototype = Object.getPrototypeOf(widget);
  Object.defineProperty(widget, "_displayValue", {
    configurable: true,
    get() {
      return this.value === 0 && !this.computedDisabled ? word : Reflect.get(prototype, "_displayValue", this);
    },
  });
}

// Nodes 2.0 draw elements: a style puts the word over the number while the input is not edited.
function sayInNodes2() {
  const rules = [];
  for (const node of nodes) {
    for (const [name, word] of Object.entries(WORDS[node.comfyClass])) {
      const zero = `input[aria-valuenow="0"]:not(:focus)`;
      // newer front ends label the box around the input, older ones the input
      const inputs = [`[aria-label="${name}"] ${zero}`, `${zero}[aria-label="${name}"]`];
      const boxes = [`[aria-label="${name}"] :has(> ${zero})`, `:has(> ${zero}[aria-label="${name}"])`];
      const inNode = (selectors, end = "") => selectors.map((selector) => `[data-node-id="${node.id}"] ${selector}${end}`).join();
      rules.push(`${inNode(inputs)} { color: transparent !important }`);
      rules.push(`${inNode(boxes)} { position: relative }`);
      rules.push(`${inNode(boxes, "::after")} { content: "${word}"; position: absolute; inset: 0; display: flex; align-items: center;
        padding: 0 4px; font-size: 12px; pointer-events: none }`);
      // where the buttons are in the box too
      rules.push(`${inNode([boxes[1]], "::after")} { padding: 0 40px }`);
    }
  }
  style.textContent = rules.join("\n");
}

// Later: a node gets its id when it is added to the graph.
function soon() {
  clearTimeout(waiting);
  waiting = setTimeout(sayInNodes2);
}

app.registerExtension({
  name: "DCM.Automatic",

  setup() {
    document.head.append(style);
  },

  afterConfigureGraph: soon,

  nodeCreated(node) {
    const words = WORDS[node.comfyClass];
    if (!words) return;
    for (const widget of node.widgets ?? []) if (words[widget.name]) sayOnCanvas(widget, words[widget.name]);
    nodes.add(node);
    const { onRemoved } = node;
    node.onRemoved = function (...args) {
      nodes.delete(node);
      soon();
      return onRemoved?.apply(this, args);
    };
    soon();
  },
});
