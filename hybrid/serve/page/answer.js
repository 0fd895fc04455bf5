// An answer on its way: what the stream brings becomes the message.

import { events, getJson, request, ServerError } from "./api.js";
import { duration, count } from "./dom.js";

/** One request for the next turn. `message` fills up while `run` goes on; `onChange` is called whenever it does. */
export class Answer {
  constructor(body, onChange) {
    this.message = { role: "assistant", content: "", reasoning: "" };
    this.progress = null; // of the prompt: {total, cache, processed, time_ms}
    this.pieces = 0;
    this.began = performance.now();
    this.firstAt = 0;
    this.id = null;
    this.body = body;
    this.onChange = onChange;
    this.control = new AbortController();
  }

  /** To the end of the answer, whatever ends it. */
  async run() {
    try {
      const response = await request("/v1/chat/completions", { body: this.body, signal: this.control.signal });
      for await (const event of events(response)) this.#take(event);
    } catch (error) {
      if (error.name === "AbortError") this.message.finish = "stopped";
      else this.message.error = error instanceof ServerError ? error.message : "The connection was lost.";
    }
    this.#endThought();
    this.onChange();
  }

  stop() {
    this.control.abort();
  }

  /** Whether it reasons at this moment. */
  get thinking() {
    return Boolean(this.message.reasoning) && !this.message.content;
  }

  async answerNow() {
    if (!this.id) return;
    await getJson("/v1/kimi/answer-now", { body: { id: this.id } }).catch(() => {}); // it may just have ended
  }

  /** A line on what is going on. */
  get status() {
    if (!this.firstAt) return this.progress ? reading(this.progress) : "Waiting for a place…";
    return `${this.thinking ? "Thinking" : "Writing"} · ${speed(this.pieces, performance.now() - this.firstAt)}`;
  }

  #take(event) {
    if (event.error) throw new ServerError(event.error.message);
    this.id ??= event.id;
    if (event.usage) this.message.usage = event.usage;
    if (event.prompt_progress) this.progress = event.prompt_progress;
    if (event.timings) this.message.timings = { ...event.timings, first_ms: this.firstAt && this.firstAt - this.began };
    for (const choice of event.choices) this.#add(choice);
    this.onChange();
  }

  #add({ delta, finish_reason: finish }) {
    const { reasoning_content: reasoning, content } = delta;
    if (reasoning || content) {
      this.firstAt ||= performance.now();
      this.pieces++;
    }
    if (reasoning) {
      this.message.thoughtFrom ??= performance.now();
      this.message.reasoning += reasoning;
    }
    if (content) {
      this.#endThought();
      this.message.content += content;
    }
    if (finish) this.message.finish = finish;
  }

  #endThought() {
    if (this.message.thoughtFrom && !this.message.thoughtFor) {
      this.message.thoughtFor = (performance.now() - this.message.thoughtFrom) / 1000;
    }
  }
}

function reading({ total, cache, processed, time_ms: ms }) {
  const done = processed - cache;
  const left = done > 0 ? (total - processed) * ms / done / 1000 : 0;
  const parts = [`Reading ${count(processed)} of ${count(total)} tokens`];
  if (cache) parts.push(`${count(cache)} of them known`);
  if (left >= 1) parts.push(`${duration(left)} left`);
  return parts.join(" · ");
}

const speed = (pieces, ms) => (pieces > 4 && ms > 500 ? `${((pieces - 1) * 1000 / ms).toFixed(1)} tok/s` : "…");
