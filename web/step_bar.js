// Shows on DCM Sampler which expert runs which step: one field per step, with the expert's colour and letter, filled as it runs.
// The line under the fields is the plan, then the running step and the time left, then the result. Notes and warnings follow.
// Before a run, the server works out the plan from widgets and files (nodes/host/sampling/plan.py). A run sends its own.

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { BASE, COLOURS, palette, WARNING } from "./colours.js";
import { nodeOf } from "./preview.js";

const SETTLE_MS = 50; // changes come in bursts
const POINTED_MS = 4000; // how long a tapped field stays described
const PADDING = 6;
const MARGIN = 2;
const BYPASSED = 4;
const MOST_LETTERS = 24; // fields become narrower than a letter
const INK = "var(--input-text, #ddd)"; // on a node, in any theme
const DARK = "#16171c"; // on an expert's colour
const ROW = ["name", "unit", "start", "end", "lora", "strength", "cfg"]; // the widgets of DCM Expert
const MOST_ROWS = 32;
const bars = new Map(); // node -> Bar

class Bar {
  constructor(node) {
    this.node = node;
    this.element = document.createElement("div");
    this.element.className = "dcm-step-bar";
    Object.assign(this.element.style, { display: "none", boxSizing: "border-box", padding: "1px 8px", overflow: "hidden" });
    this.fields = document.createElement("div");
    Object.assign(this.fields.style, { display: "flex", gap: "2px", height: "18px" });
    this.fields.setAttribute("role", "progressbar");
    this.fields.setAttribute("aria-label", "Steps and their experts");
    this.fields.tabIndex = 0;
    this.caption = document.createElement("div");
    Object.assign(this.caption.style, {
      font: "11px sans-serif", lineHeight: "18px", color: INK, overflowWrap: "anywhere", userSelect: "text",
    });
    this.notes = document.createElement("div");
    Object.assign(this.notes.style, {
      font: "11px/14px sans-serif", color: "var(--descrip-text, #999)", overflowWrap: "anywhere", userSelect: "text",
    });
    this.body = document.createElement("div");
    this.body.append(this.fields, this.caption, this.notes);
    this.element.append(this.body);
    this.asked = null; // the request that the shown plan answers
    this.plan = null;
    this.said = []; // the result, line by line
    this.done = 0;
    this.running = false;
    this.times = []; // when the run began, and when each step was done
    this.pointed = null; // the field that is pointed at
    this.listen();
  }

  listen() {
    const fieldOf = (event) => [...this.fields.children].indexOf(event.target.closest("[data-expert]"));
    this.fields.addEventListener("pointerover", (event) => this.point(fieldOf(event)));
    this.fields.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && this.point(null));
    this.fields.addEventListener("click", (event) => this.point(fieldOf(event), POINTED_MS));
    this.fields.addEventListener("blur", () => this.point(null));
    this.fields.addEventListener("keydown", (event) => {
      const way = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!way || !this.plan) return;
      event.preventDefault();
      event.stopPropagation(); // the front end moves nodes with these keys
      const from = this.pointed ?? (way > 0 ? -1 : this.plan.steps.length);
      this.point(Math.min(Math.max(from + way, 0), this.plan.steps.length - 1));
    });
  }

  // Describe a field in the caption, for a while or until another is pointed at.
  point(index, forget = null) {
    clearTimeout(this.forgetting);
    this.pointed = index >= 0 ? index : null;
    if (forget) this.forgetting = setTimeout(() => this.point(null), forget);
    this.paint();
  }

  show(plan) {
    this.plan = plan;
    this.done = 0;
    this.pointed = null;
    this.said = [];
    this.colours = palette((plan?.steps ?? []).map(({ expert }) => expert));
    const count = plan?.steps.length;
    this.fields.style.display = plan ? "flex" : "none";
    this.fields.replaceChildren(...(plan?.steps ?? []).map((step, index) => {
      const field = document.createElement("div");
      Object.assign(field.style, {
        flex: "1 1 0", minWidth: "0", boxSizing: "border-box", borderRadius: "3px", border: `1px solid ${INK}`,
        font: "bold 10px/16px sans-serif", textAlign: "center", overflow: "hidden", cursor: "default",
      });
      field.dataset.expert = step.expert;
      field.textContent = count <= MOST_LETTERS ? step.letter : "";
      field.title = describe(step, index, count);
      field.setAttribute("aria-hidden", "true");
      return field;
    }));
    this.paint();
  }

  // The result text of a run: the plan in words, then notes, then the time it took.
  say(text) {
    this.said = text ? text.split("\n") : [];
    this.paint();
  }

  height() {
    return this.body.offsetHeight + PADDING;
  }

  fill(done, running) {
    if (done > this.done) this.times[done] = performance.now();
    this.done = done;
    this.running = running;
    this.paint();
  }

  begin(plan) {
    this.show(plan);
    this.times = [performance.now()];
    this.fill(0, true);
  }

  paint() {
    this.element.style.display = this.plan || this.said.length ? "block" : "none";
    [...this.fields.children].forEach((field, index) => {
      const colour = this.colours.get(field.dataset.expert);
      const done = index < this.done;
      const current = this.running && index === this.done;
      field.style.background = done ? colour : `color-mix(in srgb, ${colour} ${current ? 45 : 20}%, transparent)`;
      field.style.color = done ? DARK : INK;
      field.style.boxShadow = current || index === this.pointed ? `inset 0 0 0 1px ${INK}` : "none";
      field.dataset.done = String(done);
    });
    this.caption.textContent = this.words();
    const notes = this.said.length ? this.said.slice(1) : this.plan?.notes ?? [];
    this.notes.replaceChildren(...notes.map((text) => {
      const note = document.createElement("div");
      note.textContent = text; // never markup: it may come from a file
      if (text.startsWith("Warning")) note.style.color = WARNING;
      return note;
    }));
    this.tell();
    this.makeRoom();
  }

  // The line under the fields.
  words() {
    const { steps } = this.plan ?? {};
    if (steps && this.pointed !== null) return describe(steps[this.pointed], this.pointed, steps.length);
    if (steps && this.running && this.done < steps.length) {
      return [describe(steps[this.done], this.done, steps.length), this.timeLeft()].filter(Boolean).join("  ");
    }
    return this.said[0] ?? (this.plan ? planInWords(this.plan) : "");
  }

  // The first step also loads the model, so it counts only until the second is done.
  timeLeft() {
    const first = this.done > 1 ? 1 : 0;
    const since = this.times[first];
    const until = this.times[this.done];
    if (!this.done || since === undefined || until === undefined) return "";
    const each = (until - since) / (this.done - first) / 1000;
    return `${duration(each)} a step, ${duration(each * (this.plan.steps.length - this.done))} left`;
  }

  tell() {
    const steps = this.plan?.steps.length ?? 0;
    for (const [name, value] of Object.entries({ min: 0, max: steps, now: this.done, text: this.caption.textContent })) {
      this.fields.setAttribute(`aria-value${name}`, String(value));
    }
  }

  makeRoom() {
    // the canvas does not grow the node by itself
    const needed = this.node.computeSize?.()[1];
    if (this.node.graph && this.node.size[1] < needed) this.node.setSize([this.node.size[0], needed]);
    this.node.setDirtyCanvas?.(true, true);
  }
}

function describe(step, index, count) {
  return [`${index + 1} / ${count}`, step.expert, `σ ${shorten(step.sigma)}`].filter(Boolean).join("  ");
}

function planInWords({ steps, boundary }) {
  const owners = [...new Set(steps.map((step) => step.expert))];
  if (owners.every((owner) => owner === BASE)) return `${steps.length} step${steps.length === 1 ? "" : "s"}, no active expert`;
  const isPair = owners.every((owner) => owner in COLOURS || owner === BASE);
  const words = isPair ? owners.map((owner) => `${steps.filter((step) => step.expert === owner).length} ${owner}`).join(" + ") : stretches(steps);
  return boundary === null ? words : `${words}, boundary σ ${shorten(boundary)}`;
}

// The rows of an expert table and their steps: "step 1-2 high, 3 base, 4-6 low".
function stretches(steps) {
  const found = [];
  steps.forEach(({ expert }, index) => {
    if (found.at(-1)?.expert === expert) found.at(-1).last = index + 1;
    else found.push({ expert, first: index + 1, last: index + 1 });
  });
  return `step ${found.map(({ expert, first, last }) => `${first}${last > first ? `-${last}` : ""} ${expert}`).join(", ")}`;
}

function shorten(value) {
  return String(Number(value.toPrecision(4)));
}

function duration(seconds) {
  if (seconds < 10) return `${seconds.toFixed(1)} s`;
  const whole = Math.round(seconds);
  return whole < 90 ? `${whole} s` : `${Math.floor(whole / 60)} min ${whole % 60} s`;
}

function widgetValue(node, name) {
  return node.widgets?.find((widget) => widget.name === name)?.value;
}

function before(node, input) {
  const slot = node.inputs?.findIndex((entry) => entry.name === input) ?? -1;
  return slot < 0 ? null : node.getInputNode?.(slot);
}

// The nodes that a model passes through, without bypassed ones; the loader comes last.
function chain(node, input) {
  const nodes = [];
  for (let at = before(node, input); at && nodes.length < 64; at = before(at, "model") ?? at.getInputNode?.(0)) nodes.push(at);
  return nodes.filter((at) => at.mode !== BYPASSED);
}

// What a plan depends on: the sampler's widgets, and the files of the nodes that its model passes through. Null for what only the run
// knows.
function ask(node) {
  const names = ["schedule", "steps", "shift", "denoise", "boundary", "cfg", "detail_cfg", "sampler_name"];
  if (isFed(node, "sigmas", ...names)) return null;
  const asked = Object.fromEntries(names.map((name) => [name, widgetValue(node, name)]));
  // neither is the name of a connected sampler
  if (before(node, "sampler")) delete asked.sampler_name;
  const nodes = chain(node, "model");
  const others = chain(node, "detail_model");
  if ([...nodes, ...others].some(makesExperts)) return null;
  // the same weights count as one model; only the run knows what else differs
  const same = others.length > 0 && others.at(-1) === nodes.at(-1);
  if (same && !(others.length === nodes.length && others.every((at, place) => at === nodes[place]))) return null;
  asked.two_models = others.length > 0 && !same;
  for (const at of nodes) {
    const isFirst = !("semantic" in asked) && !("rows" in asked);
    if (at.comfyClass === "DCMAttachTable" && isFirst) {
      const table = rowsOf(at, nodes.at(-1));
      if (!table) return null;
      Object.assign(asked, table);
    }
    if (at.comfyClass === "DCMAttachExperts" && isFirst) {
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

// The rows of DCM Attach Table, first row first, and whether one has a model with other weights than `loader`, the last node of the
// model's chain. Null if only the run knows them.
function rowsOf(table, loader) {
  const rows = [];
  let others = false;
  for (let at = before(table, "rows"); at && rows.length < MOST_ROWS; at = before(at, "rows")) {
    if (at.mode === BYPASSED) continue;
    if (at.comfyClass !== "DCMExpert" || isFed(at, ...ROW, "expert")) return null;
    const own = chain(at, "model");
    if (own.some(makesExperts)) return null;
    others ||= own.length > 0 && own.at(-1) !== loader;
    rows.unshift({ ...Object.fromEntries(ROW.map((name) => [name, widgetValue(at, name)])), own_model: own.length > 0 });
  }
  return { rows, two_models: others };
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
  // the widgets may have changed, or a run may have started, in the meantime
  if (bar.asked === text && !bar.running) bar.show(plan);
}

const barOf = (id) => bars.get(nodeOf(id));

// Some front ends remove the graphs inside a subgraph without notifying their nodes.
function isOpen(node) {
  const root = app.rootGraph ?? app.graph;
  return node.graph === root || (node.graph && root.subgraphs?.get(node.graph.id) === node.graph);
}

let waiting;

// Check the widgets and links of every sampler, after the current change is done.
function lookSoon() {
  clearTimeout(waiting);
  waiting = setTimeout(() => {
    for (const [node, bar] of bars) {
      if (isOpen(node)) foresee(bar).catch(() => bar.show(null));
    }
  }, SETTLE_MS);
}

app.registerExtension({
  name: "DCM.StepBar",

  setup() {
    api.addEventListener("dcm.plan", ({ detail }) => {
      const bar = barOf(detail.node);
      if (!bar) return;
      // stays after the run, until a widget changes
      bar.asked = JSON.stringify(ask(bar.node));
      bar.begin(detail);
    });
    api.addEventListener("dcm.text", ({ detail }) => barOf(detail.node)?.say(detail.text));
    // an old result must not stay visible next to an error of this run
    api.addEventListener("executing", ({ detail }) => detail && barOf(detail)?.say(""));
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
      api.addEventListener(end, () => {
        bars.forEach((bar) => bar.running && bar.fill(bar.done, false));
        lookSoon();
      });
    }
    // any change to the graph
    api.addEventListener("graphChanged", lookSoon);
  },

  afterConfigureGraph: lookSoon,
  // the file lists are read again
  refreshComboInNodes: lookSoon,

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
    const { onRemoved, onExecuted, onConnectionsChange } = node;
    node.onRemoved = function (...args) {
      bars.delete(node);
      return onRemoved?.apply(this, args);
    };
    node.onConnectionsChange = function (...args) {
      lookSoon();
      return onConnectionsChange?.apply(this, args);
    };
    // comes for results that the host has kept, too
    node.onExecuted = function (output, ...rest) {
      if (output?.text) bar.say([output.text].flat().join("\n"));
      return onExecuted?.call(this, output, ...rest);
    };
    lookSoon();
  },
});
