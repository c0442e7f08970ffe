// Shows a DCM node's progress and result on the node, line by line as plain text, until it runs again.
// DCM Sampler shows them in its bar (step_bar.js).
// The front ends' own node text is two lines high in one, Markdown in another, missing in a third, and lost after an interrupt.

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { nodeOf } from "./preview.js";

const HIGHEST = 300; // higher texts scroll
const MARGIN = 4;
const STYLE = {
  boxSizing: "border-box", padding: "4px 8px", borderRadius: "6px", background: "rgba(0, 0, 0, 0.2)",
  font: "11px/15px ui-monospace, Consolas, monospace", color: "var(--input-text, #ddd)", textAlign: "left",
  whiteSpace: "pre-wrap", overflowWrap: "anywhere", userSelect: "text",
};
const boxes = new WeakMap(); // node -> Box

class Box {
  constructor(node) {
    this.node = node;
    this.element = document.createElement("div");
    this.element.className = "dcm-text";
    Object.assign(this.element.style, STYLE, { maxHeight: `${HIGHEST}px`, overflowY: "auto" });
    // the wheel scrolls the text, not the canvas; newer front ends need the focus for that, which a click gives
    this.element.dataset.captureWheel = "true";
    this.element.tabIndex = 0;
    this.element.addEventListener("wheel", (event) => this.scrolls() && event.stopPropagation());
    const height = () => this.height();
    this.widget = node.addDOMWidget("dcm_text", "dcm_text", this.element, {
      serialize: false, hideOnZoom: false, hideInPanel: true, margin: MARGIN, getMinHeight: height, getMaxHeight: height,
    });
    this.widget.serialize = false;
    this.widget.label = "result"; // where a front end lists the widgets
    this.show("");
  }

  // Made with the node, as the first Nodes 2.0 does not draw widgets added later. Without text it takes no space.
  show(text) {
    this.element.textContent = text; // never markup: it may come from a file
    this.element.style.display = text ? "block" : "none";
    this.widget.hidden = !text;
    this.measured = null;
  }

  say(text) {
    this.show(text);
    // the canvas does not grow the node by itself
    const [width, needed] = [this.node.size[0], this.node.computeSize()[1]];
    if (this.node.size[1] < needed) this.node.setSize([width, needed]);
    this.node.setDirtyCanvas?.(true, true);
  }

  scrolls() {
    return this.element.scrollHeight > this.element.clientHeight;
  }

  // The height of the box at the node's width, measured outside the visible page, as the node may not be drawn now.
  height() {
    const width = this.node.size[0] - 2 * MARGIN;
    if (this.measured?.width !== width) {
      const copy = this.element.cloneNode(true);
      Object.assign(copy.style, { position: "fixed", left: "-10000px", top: "0", width: `${width}px`, height: "auto", display: "block" });
      document.body.append(copy);
      this.measured = { width, height: copy.offsetHeight + 2 * MARGIN };
      copy.remove();
    }
    return this.measured.height;
  }
}

app.registerExtension({
  name: "DCM.ResultText",

  setup() {
    api.addEventListener("dcm.text", ({ detail }) => boxes.get(nodeOf(detail.node))?.say(detail.text));
    // an old result must not stay visible next to an error of this run
    api.addEventListener("executing", ({ detail }) => detail && boxes.get(nodeOf(detail))?.show(""));
  },

  nodeCreated(node) {
    if (!node.comfyClass?.startsWith("DCM") || node.comfyClass === "DCMSampler" || !node.addDOMWidget) return;
    boxes.set(node, new Box(node));
    const executed = node.onExecuted;
    // also called for cached results
    node.onExecuted = function (output, ...rest) {
      if (output?.text) boxes.get(this)?.say([output.text].flat().join("\n"));
      return executed?.call(this, output, ...rest);
    };
  },
});
