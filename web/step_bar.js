// The plan of a DCMSampler as a bar on the node: one field a step, coloured by its expert, filling while it runs.
// Before a run the server foresees it from the widgets and files (nodes/host/plan.py); a run announces its own.

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { COLOURS, NEUTRAL } from "./colours.js";

const LOOK_EVERY_MS = 1000;
const HEIGHT = 40;
const MARGIN = 2;
const BYPASSED = 4;
const bars = new Map(); // node -> Bar

class Bar {
  constructor(node) {
    this.node = node;
    this.element = document.createElement("div");
    this.element.className = "dcm-step-bar";
    Object.assign(this.element.style, { display: "none", boxSizing: "border-box", padding: "1px 8px", overflow: "hidden" });
    this.fields = document.createElement("div");
    Object.assign(this.fields.style, { display: "flex", gap: "2px", height: "14px" });
    this.caption = document.createElement("div");
    Object.assign(this.caption.style, {
      font: "11px sans-serif", lineHeight: "18px", color: "var(--input-text, #ddd)", whiteSpace: "nowrap",
      overflow: "hidden", textOverflow: "ellipsis",
    });
    this.element.append(this.fields, this.caption);
    this.asked = null; // what the shown plan was foreseen from
    this.plan = null;
    this.done = 0;
    this.running = false;
  }

  show(plan) {
    this.plan = plan;
    this.done = 0;
    this.element.style.display = plan ? "block" : "none";
    this.fields.replaceChildren(...(plan?.steps ?? []).map((step, index) => {
      const field = document.createElement("div");
      Object.assign(field.style, { flex: "1", borderRadius: "2px", background: COLOURS[step.expert] ?? NEUTRAL });
      field.dataset.expert = step.expert ?? "";
      field.title = describe(step, index, plan.steps.length);
      return field;
    }));
    this.paint();
  }

  fill(done, running) {
    this.done = done;
    this.running = running;
    this.paint();
  }

  paint() {
    if (!this.plan) return;
    const { steps, boundary } = this.plan;
    [...this.fields.children].forEach((field, index) => {
      const current = this.running && index === this.done;
      field.style.opacity = index < this.done ? "1" : current ? "0.7" : "0.35";
      field.style.outline = current ? "1px solid var(--input-text, #fff)" : "none";
      field.dataset.done = String(index < this.done);
    });
    if (this.running && this.done < steps.length) {
      this.caption.textContent = describe(steps[this.done], this.done, steps.length);
      return;
    }
    const count = (expert) => steps.filter((step) => step.expert === expert).length;
    const sides = Object.keys(COLOURS).filter(count).map((expert) => `${count(expert)} ${expert}`);
    this.caption.textContent = sides.length ? `${sides.join(" + ")}, boundary σ ${shorten(boundary)}` : `${steps.length} steps`;
  }
}

function describe(step, index, count) {
  return [`${index + 1} / ${count}`, step.expert, `σ ${shorten(step.sigma)}`].filter(Boolean).join("  ");
}

function shorten(value) {
  return String(Number(value.toPrecision(4)));
}

function widgetValue(node, name) {
  return node.widgets?.find((widget) => widget.name === name)?.value;
}

function before(node, input) {
  const slot = node.inputs?.findIndex((entry) => entry.name === input) ?? -1;
  return slot < 0 ? null : node.getInputNode?.(slot);
}

// The nodes that a model comes through, the one that loads it last.
function chain(node, input) {
  const nodes = [];
  for (let at = before(node, input); at && nodes.length < 64; at = before(at, "model") ?? at.getInputNode?.(0)) nodes.push(at);
  return nodes;
}

// What a plan depends on: the sampler's widgets, and the files of the nodes its model comes through.
function ask(node) {
  // a connected schedule is known only when it runs
  if (before(node, "sigmas")) return null;
  const asked = Object.fromEntries(["schedule", "steps", "shift", "denoise", "boundary"].map((name) => [name, widgetValue(node, name)]));
  const nodes = chain(node, "model");
  const others = chain(node, "detail_model");
  // the same model twice, each with its LoRAs, is one
  asked.two_models = others.length > 0 && others.at(-1) !== nodes.at(-1);
  for (const at of nodes) {
    if (at.comfyClass === "DCMAttachExperts" && at.mode !== BYPASSED && !("semantic" in asked)) {
      // an expert straight from its training is known only when it runs
      if (before(at, "semantic_expert") || before(at, "detail_expert")) return null;
      asked.semantic = widgetValue(at, "semantic_lora");
      asked.detail = widgetValue(at, "detail_lora");
      asked.attached_boundary = widgetValue(at, "boundary");
    }
    asked.model = widgetValue(at, "model_name") ?? widgetValue(at, "unet_name") ?? asked.model;
  }
  return asked;
}

async function foresee(bar) {
  const asked = ask(bar.node);
  const text = JSON.stringify(asked);
  if (bar.running || text === bar.asked) return;
  bar.asked = text;
  let plan = null;
  if (asked) {
    const answer = await api.fetchApi("/dcm/plan", {
      method: "POST", headers: { "Content-Type": "application/json" }, body: text,
    });
    plan = answer.ok ? await answer.json() : null;
  }
  // the widgets may have changed, or a run begun, meanwhile
  if (bar.asked === text && !bar.running) bar.show(plan);
}

function barOf(id) {
  // inside a subgraph the last part of an execution id is the node's own
  const own = String(id).split(":").pop();
  for (const [node, bar] of bars) if (String(node.id) === own && isOpen(node)) return bar;
}

// Some front ends drop the graphs inside a subgraph without a word to their nodes.
function isOpen(node) {
  const root = app.rootGraph ?? app.graph;
  return node.graph === root || (node.graph && root.subgraphs?.get(node.graph.id) === node.graph);
}

function lookAtAll() {
  if (document.hidden) return;
  for (const [node, bar] of bars) {
    if (isOpen(node)) foresee(bar).catch(() => bar.show(null));
  }
}

app.registerExtension({
  name: "DCM.StepBar",

  setup() {
    api.addEventListener("dcm.plan", ({ detail }) => {
      const bar = barOf(detail.node);
      if (!bar) return;
      // stays after the run, until a widget changes
      bar.asked = JSON.stringify(ask(bar.node));
      bar.show(detail);
      bar.fill(0, true);
    });
    api.addEventListener("progress_state", ({ detail }) => {
      for (const [id, state] of Object.entries(detail.nodes ?? {})) {
        const bar = barOf(id);
        if (!bar?.plan || !bar.running) continue;
        const running = state.state === "running";
        // the host counts a finished node as one of one
        if (state.max === bar.plan.steps.length) bar.fill(state.value, running);
        else if (state.state === "finished") bar.fill(bar.plan.steps.length, false);
      }
    });
    for (const end of ["execution_error", "execution_interrupted", "execution_success"]) {
      api.addEventListener(end, () => bars.forEach((bar) => bar.running && bar.fill(bar.done, false)));
    }
    setInterval(lookAtAll, LOOK_EVERY_MS);
  },

  nodeCreated(node) {
    if (node.comfyClass !== "DCMSampler" || !node.addDOMWidget) return;
    const bar = new Bar(node);
    const widget = node.addDOMWidget("dcm_plan", "dcm_plan", bar.element, {
      serialize: false, hideOnZoom: false, hideInPanel: true, margin: MARGIN, getMinHeight: () => HEIGHT, getMaxHeight: () => HEIGHT,
    });
    widget.serialize = false;
    widget.label = "experts"; // where a front end lists the widgets
    bars.set(node, bar);
    const removed = node.onRemoved;
    node.onRemoved = function (...args) {
      bars.delete(node);
      return removed?.apply(this, args);
    };
  },
});
