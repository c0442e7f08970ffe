// "Add DCM chain" on a MODEL output: DCM Attach Experts and DCM Sampler to the right of the node, connected.

import { app } from "../../scripts/app.js";

const GAP = 60;

function outputOf(node) {
  return node.outputs?.findIndex(({ type }) => type === "MODEL") ?? -1;
}

// The graph is changed as by a user: one undo takes it back.
function addChain(node, slot = outputOf(node)) {
  const { graph } = node;
  const [experts, sampler] = ["DCMAttachExperts", "DCMSampler"].map((kind) => LiteGraph.createNode(kind));
  if (!graph || !experts || !sampler) return;
  app.canvas.emitBeforeChange?.();
  let left = node.pos[0] + node.size[0] + GAP;
  for (const made of [experts, sampler]) {
    made.pos = [left, node.pos[1]];
    graph.add(made);
    left += made.size[0] + GAP;
  }
  node.connect(slot, experts, experts.findInputSlot("model"));
  experts.connect(0, sampler, sampler.findInputSlot("model"));
  app.canvas.selectNodes?.([experts, sampler]);
  app.canvas.emitAfterChange?.();
  app.canvas.setDirty(true, true);
}

const entry = (node, slot) => ({ content: "Add DCM chain", callback: () => addChain(node, slot) });

app.registerExtension({
  name: "DCM.Chain",

  // for the keyboard, and for front ends whose Nodes 2.0 have a menu of their own
  commands: [{
    id: "DCM.AddChain",
    label: "Add DCM chain to the selected model",
    function: () => {
      const node = Object.values(app.canvas.selected_nodes ?? {}).find((selected) => outputOf(selected) >= 0);
      if (node) addChain(node);
    },
  }],

  // the menu of a node, which Nodes 2.0 show for its outputs, too
  getNodeMenuItems(node) {
    return outputOf(node) < 0 ? [] : [entry(node)];
  },

  // the menu of an output, on the canvas
  nodeCreated(node) {
    const others = node.getExtraSlotMenuOptions;
    node.getExtraSlotMenuOptions = function (found, ...rest) {
      const items = others?.call(this, found, ...rest) ?? [];
      return found?.output?.type === "MODEL" ? [...items, entry(this, found.slot)] : items;
    };
  },
});
