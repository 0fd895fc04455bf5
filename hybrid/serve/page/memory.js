// The view of memory: what the plan gives each kind, who has it now, and the machine.

import { getJson } from "./api.js";
import { $, bytes, copyFrom, count, duration, fillTable, make, rate } from "./dom.js";

const AGAIN_MS = 3000;
const AREAS = { ram: "RAM", vram: "Graphics card", nvme: "Drive" };
const KINDS = {
  experts: "Routed experts",
  weights: "Weights every token reads",
  kv: "Context (KV cache)",
  program: "Program and buffers",
  others: "System and other programs",
  free: "Free",
};

export class Memory {
  constructor() {
    this.timer = null;
    this.found = null;
    $("only-ours").addEventListener("change", () => this.#draw());
    $("copy-machine").addEventListener("click", (event) => copyFrom(event.target, asText(this.server)));
  }

  open() {
    this.#read();
    this.timer = setInterval(() => this.#read(), AGAIN_MS);
  }

  close() {
    clearInterval(this.timer);
  }

  async #read() {
    try {
      [this.found, this.server] = await Promise.all([getJson("/v1/kimi/memory"), getJson("/v1/kimi/server")]);
      this.#draw();
    } catch {
      // what was shown last stays; the next look may fare better
    }
  }

  #draw() {
    if (!this.found) return;
    const shown = Object.keys(AREAS).filter((name) => this.found[name]);
    $("areas").replaceChildren(...shown.map((name) => area(AREAS[name], this.found[name], $("only-ours").checked)));
    fillTable($("figures"), figures(this.server));
    fillTable($("machine"), machine(this.server));
  }
}

/** Two bars on one scale, and the table that says what their colours mean. */
function area(title, { size, planned, real }, onlyOurs) {
  const whole = (sizes) => ({ ...sizes, free: Math.max(0, size - sum(sizes)) });
  const ours = ({ others, free, ...rest }) => rest;
  const [plan, now] = [planned, real].map((sizes) => (onlyOurs ? ours(sizes) : whole(sizes)));
  const scale = onlyOurs ? Math.max(sum(plan), sum(now), 1) : Math.max(size, sum(plan), 1);
  const kinds = Object.keys(KINDS).filter((kind) => plan[kind] || now[kind]);
  const table = make("table");
  const name = (kind) => make("span", {}, make("span", { class: `swatch ${kind}` }), KINDS[kind]);
  const rows = kinds.map((kind) => [name(kind), bytes(plan[kind] ?? 0), bytes(now[kind] ?? 0)]);
  fillTable(table, rows, ["", "planned", "now"]);
  return make("div", { class: "area" }, make("h3", {}, `${title} `, make("span", { class: "quiet" }, bytes(size))),
    bar("Planned", plan, kinds, scale), bar("Now", now, kinds, scale), table);
}

function bar(label, sizes, kinds, scale) {
  const pieces = kinds.map((kind) => {
    const piece = make("span", { class: kind, title: `${KINDS[kind]}: ${bytes(sizes[kind] ?? 0)}` });
    piece.style.width = `${100 * (sizes[kind] ?? 0) / scale}%`;
    return piece;
  });
  const stack = make("div", { class: "stack", "aria-hidden": "true" }, ...pieces);
  return make("div", { class: "bar" }, make("span", { class: "quiet" }, label), stack);
}

const sum = (sizes) => Object.values(sizes).reduce((total, size) => total + size, 0);

// -- the run and the machine --------------------------------------------------------------------------------------

function figures({ figures: run, ctx, model }) {
  return [
    ["Writes", run.decode_tok_s ? rate(run.decode_tok_s) : "nothing measured yet"],
    ["Reads prompts", run.prefill_tok_s ? rate(run.prefill_tok_s) : "nothing measured yet"],
    ["From RAM", run.ram_gbps ? `${run.ram_gbps.toFixed(1)} GB/s` : "nothing measured yet"],
    ["Loaded in", duration(run.load_s)],
    ["Context", `${count(ctx)} tokens of ${count(model.longest_context)} possible`],
    ["Model", `${model.architecture}, ${parameters(model.weights)} weights`],
    ["Layers", `${count(model.layers)}, ${count(model.moe_layers)} with experts`],
    ["Experts", `${count(model.experts)}, ${count(model.experts_per_token)} for each token`],
  ];
}

function machine({ machine: m, version }) {
  return [
    ["Processor", m.processor],
    ["Threads", `${m.threads} in use, ${m.cores} cores`],
    ["Kernels", m.kernels],
    ["RAM", bytes(m.ram)],
    ["Graphics card", m.gpus.join(", ") || "none"],
    ["Weights on", m.device],
    ["System", m.system],
    ["kimi-local", version],
    ["Python", m.python],
    ["Libraries", Object.entries(m.versions).map((pair) => pair.join(" ")).join(", ")],
  ];
}

function parameters(number) {
  const [size, unit] = number >= 1e12 ? [1e12, "trillion"] : number >= 1e9 ? [1e9, "billion"] : [1e6, "million"];
  return `${(number / size).toFixed(number / size < 10 ? 2 : 0)} ${unit}`;
}

function asText(server) {
  const rows = [["Name", server.name], ...figures(server), ...machine(server)];
  return rows.map((row) => row.join(": ")).join("\n");
}
