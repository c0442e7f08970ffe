// The plan of a DCMSampler as a bar on the node: one field a step, coloured by the active expert, filling while it runs.
// Below it stands what the schedule does not use, and warnings.
// Before a run the server foresees it from the widgets and files (nodes/host/sampling/plan.py); a run announces its own.

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { COLOURS, NEUTRAL, WARNING } from "./colours.js";

const LOOK_EVERY_MS = 1000;
const PADDING = 6;
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
    this.notes = document.createElement("div");
    Object.assign(this.notes.style, { font: "11px/14px sans-serif", color: "var(--descrip-text, #999)", overflowWrap: "anywhere" });
    this.body = document.createElement("div");
    this.body.append(this.fields, this.caption, this.notes);
    this.element.append(this.body);
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
    this.notes.replaceChildren(...(plan?.notes ?? []).map((text) => {
      const note = document.createElement("div");
      note.textContent = text;
      if (text.startsWith("Warning")) note.style.color = WARNING;
      return note;
    }));
    this.paint();
    // makes room for the notes
    this.node.setDirtyCanvas?.(true, true);
  }

  height() {
    return this.body.offsetHeight + PADDING;
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
    const count = (owner) => steps.filter((step) => step.expert === owner).length;
    const owners = [...new Set(steps.map((step) => step.expert))];
    const sides = owners.map((owner) => `${count(owner)} ${owner}`).join(" + ");
    const words = owners.some((owner) => owner in COLOURS) ? sides : `${steps.length} step${steps.length === 1 ? "" : "s"}, no active expert`;
    this.caption.textContent = boundary === null ? words : `${words}, boundary σ ${shorten(boundary)}`;
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

// The nodes, without bypassed ones, that a model comes through, the one that loads it last.
function chain(node, input) {
  const nodes = [];
  for (let at = before(node, input); at && nodes.length < 64; at = before(at, "model") ?? at.getInputNode?.(0)) nodes.push(at);
  return nodes.filter((at) => at.mode !== BYPASSED);
}

// What a plan depends on: the sampler's widgets, and the files of the nodes its model comes through. Null for what only the run knows.
function ask(node) {
  const names = ["schedule", "steps", "shift", "denoise", "boundary", "cfg", "detail_cfg", "sampler_name"];
  if (isFed(node, "sigmas", ...names)) return null;
  const asked = Object.fromEntries(names.map((name) => [name, widgetValue(node, name)]));
  // nor is it known what a connected sampler is called
  if (before(node, "sampler")) delete asked.sampler_name;
  const nodes = chain(node, "model");
  const others = chain(node, "detail_model");
  if ([...nodes, ...others].some(makesExperts)) return null;
  // the same weights are one model; what else differs between the two, only the run tells
  const same = others.length > 0 && others.at(-1) === nodes.at(-1);
  if (same && !(others.length === nodes.length && others.every((at, place) => at === nodes[place]))) return null;
  asked.two_models = others.length > 0 && !same;
  for (const at of nodes) {
    if (at.comfyClass === "DCMAttachExperts" && !("semantic" in asked)) {
      asked.semantic = widgetValue(at, "semantic_lora");
      asked.detail = widgetValue(at, "detail_lora");
      asked.semantic_strength = widgetValue(at, "semantic_strength");
      asked.detail_strength = widgetValue(at, "detail_strength");
      asked.stacked = !String(widgetValue(at, "experts")).startsWith("independent");
      asked.attached_boundary = widgetValue(at, "boundary");
    }
    asked.model = widgetValue(at, "model_name") ?? widgetValue(at, "unet_name") ?? asked.model;
  }
  return asked;
}

// Whether another node gives the value of one of these inputs or widgets.
function isFed(node, ...names) {
  return names.some((name) => before(node, name));
}

// Whether a node's experts are known only when it runs: it trains them, or gets them or their names from other nodes.
function makesExperts(node) {
  const inputs = node.inputs?.map(({ name }) => name).filter((name) => name !== "model") ?? [];
  if (node.comfyClass === "DCMAttachExperts") return isFed(node, ...inputs);
  return /^DCMTrain/.test(node.comfyClass) || isFed(node, "model_name", "unet_name");
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
      serialize: false, hideOnZoom: false, hideInPanel: true, margin: MARGIN,
      getMinHeight: () => bar.height(), getMaxHeight: () => bar.height(),
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
