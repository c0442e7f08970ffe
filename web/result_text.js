// What a DCM node says of its result stays on it: newer front ends show a text only until the run ends, so it is said again then.

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

const said = new Map(); // node -> text

function sayAgain() {
  for (const [node, text] of said) {
    // the event's id is looked up in the graph that is seen
    if (node.graph === app.canvas?.graph) {
      api.dispatchEvent(new CustomEvent("progress_text", { detail: { nodeId: String(node.id), text } }));
      // a panel that lists widgets would show its inner name
      const shown = node.widgets?.find((widget) => widget.type === "progressText");
      if (shown?.options) shown.options.hideInPanel = true;
    }
  }
  said.clear();
}

app.registerExtension({
  name: "DCM.ResultText",

  setup() {
    for (const end of ["execution_error", "execution_interrupted", "execution_success"]) {
      // after whatever the front end itself does at the end
      api.addEventListener(end, () => setTimeout(sayAgain));
    }
  },

  nodeCreated(node) {
    if (!node.comfyClass?.startsWith("DCM")) return;
    const executed = node.onExecuted;
    node.onExecuted = function (output, ...rest) {
      if (output?.text) said.set(this, [output.text].flat().join("\n"));
      return executed?.call(this, output, ...rest);
    };
  },
});
