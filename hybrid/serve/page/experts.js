// The view of experts at work: heat map, list, caches. It listens to the server only while it is looked at.

import { events, getJson, request } from "./api.js";
import { $, bytes, count, fillTable, make, percent, unpacked } from "./dom.js";
import { HeatMap } from "./heat.js";

const AGAIN_MS = 2000; // between two looks at the totals while experts are chosen
const PLACES = ["in RAM", "on the card", "on the drive"];
const COLOURS = ["ram", "card", "drive"];

export class Experts {
  constructor() {
    this.map = new HeatMap($("heat"), (cell, at) => this.#tell(cell, at));
    this.found = null;
    this.watching = null;
    this.chosen = 0; // in the stream, since the totals were read
  }

  async open() {
    const watching = this.watching = new AbortController();
    while (!watching.signal.aborted) {
      try {
        await this.#read();
        await this.#watch(watching.signal);
      } catch {
        if (!watching.signal.aborted) await new Promise((resolve) => setTimeout(resolve, AGAIN_MS));
      }
    }
  }

  close() {
    this.watching?.abort();
  }

  async #watch(signal) {
    let last = performance.now();
    const timer = setInterval(() => { if (this.chosen) this.#read().catch(() => {}); }, AGAIN_MS);
    try {
      for await (const { cells, times } of events(await request("/v1/kimi/events", { signal }))) {
        this.map.flash(cells);
        const chosen = times.reduce((sum, some) => sum + some, 0);
        this.chosen += chosen;
        if (!chosen) continue;
        const now = performance.now();
        this.#caption(chosen * 1000 / Math.max(200, now - last));
        last = now;
      }
    } finally {
      clearInterval(timer);
    }
  }

  async #read() {
    this.chosen = 0;
    const [found, { prefix, disk }] = await Promise.all([getJson("/v1/kimi/experts"), getJson("/v1/kimi/memory")]);
    const [heat, places] = [unpacked(found.heat), unpacked(found.places)];
    this.found = { ...found, heat, places };
    $("heat").hidden = !found.layers.length;
    this.map.show(found.layers.length, found.experts, heat, places, found.per_token);
    this.#caption();
    this.#legend();
    this.#list();
    $("caches").replaceChildren(...caches(found, prefix), onDisk(disk));
  }

  #caption(perSecond = 0) {
    const { layers, experts, choices } = this.found;
    if (!layers.length) {
      $("heat-caption").textContent = "This model is dense: it has no routed experts.";
      return;
    }
    const total = choices.reduce((sum, some) => sum + some, 0);
    const axes = this.map.turned ? "Layers go across, experts down" : "Experts go across, layers down";
    const pace = perSecond ? ` · ${count(perSecond)} a second` : "";
    const size = `${count(layers.length)} layers of ${count(experts)} experts`;
    $("heat-caption").textContent = `${size}. ${axes}. ${count(total)} choices since loading${pace}.`;
  }

  #legend() {
    const { places } = this.found;
    const totals = PLACES.map((_, place) => places.reduce((sum, each) => sum + (each === place), 0));
    const entry = (colour, text) => make("li", {}, make("span", { class: `swatch ${colour}` }), text);
    const there = [0, 1, 2].filter((place) => totals[place]);
    $("heat-legend").replaceChildren(
      ...there.map((place) => entry(COLOURS[place], `${count(totals[place])} ${PLACES[place]}`)),
      entry("scale", "never to most chosen of its layer"),
      entry("now", "chosen now"),
    );
  }

  #list() {
    const { top, layers, choices } = this.found;
    const rows = top.map(({ layer, expert, choices: times }) => {
      const share = times / choices[layers.indexOf(layer)];
      return [`Layer ${layer}, expert ${expert}`, count(times), percent(share, 1)];
    });
    if (!rows.length) rows.push(["Nothing yet: ask something.", "", ""]);
    fillTable($("top-experts"), rows, ["", "choices", "of its layer"]);
  }

  /** The tip beside a cell. */
  #tell(cell, at) {
    const tip = $("heat-tip");
    tip.hidden = cell === null;
    if (cell === null) return;
    const { layers, experts, heat, places, peaks, choices } = this.found;
    const row = Math.floor(cell / experts);
    const share = (heat[cell] / 255) ** 2 * peaks[row] / Math.max(1, choices[row]);
    const of = `${percent(share, 1)} of its layer's choices`;
    tip.textContent = `Layer ${layers[row]}, expert ${cell % experts}: ${of}, ${PLACES[places[cell]]}`;
    const room = $("heat").clientWidth - tip.offsetWidth;
    tip.style.left = `${Math.min(Math.max(0, at[0] - tip.offsetWidth / 2), Math.max(0, room))}px`;
    tip.style.top = `${at[1] + 26}px`;
  }
}

/** A cache: how full it is, or how often it helped, and its figures. */
function table(title, share, rows) {
  const body = make("table");
  fillTable(body, rows);
  const bar = make("progress", { max: 1, value: share, "aria-label": title });
  return make("div", { class: "cache" }, make("h4", {}, title), bar, body);
}

/** Prompts that outlive the server. */
function onDisk(disk) {
  const title = "Prompts kept on disk";
  if (!disk) {
    const off = make("p", { class: "quiet" }, "Off: ", make("code", {}, "--kv-disk SIZE"), " turns it on.");
    return make("div", { class: "cache" }, make("h4", {}, title), off);
  }
  return table(title, disk.used / Math.max(1, disk.budget), [
    ["In use", `${bytes(disk.used)} of ${bytes(disk.budget)}, of all models`],
    ["This model's", `${count(disk.blocks)} blocks, ${bytes(disk.bytes)}`],
    ["Read back since the start", `${count(disk.restored_tokens)} tokens`],
    ["Damaged and dropped", disk.dropped === null ? "not counted" : count(disk.dropped)],
    ["Directory", disk.directory],
  ]);
}

/** What is known of each cache in memory that there is. */
function caches({ tier, cache }, prefix) {
  const used = prefix.pages - prefix.free;
  const found = [table("Pages of context", used / Math.max(1, prefix.pages), [
    ["In use or kept", `${count(used)} of ${count(prefix.pages)}, ${prefix.page_tokens} tokens each`],
    ["Prompts found there", `${count(prefix.reused_tokens)} of ${count(prefix.prompt_tokens)} tokens`],
  ])];
  if (cache) {
    found.push(table("Experts on the card", cache.hit_rate, [
      ["Hits", percent(cache.hit_rate, 1)],
      ["Slots", `${count(cache.slots)} of ${bytes(cache.slot_bytes)}`],
      ["Brought in", `${count(cache.uploads)}, ${bytes(cache.upload_bytes)}`],
      ["Waited", `${cache.stall_s.toFixed(1)} s`],
    ]));
  }
  if (tier) {
    found.push(table("Experts in RAM, others on the drive", tier.hit_rate, [
      ["Hits", percent(tier.hit_rate, 1)],
      ["Slots", `${count(tier.slots)} of ${bytes(tier.slot_bytes)}`],
      ["Read from the drive", bytes(tier.nvme_bytes)],
      ["Foreseen", count(tier.foreseen)],
      ["Gave way", count(tier.evictions)],
      ["Waited", `${tier.stall_s.toFixed(1)} s`],
    ]));
  }
  return found;
}
