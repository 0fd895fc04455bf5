// One message on the page.

import { copyFrom, count, duration, make, rate } from "./dom.js";
import { Markdown } from "./markdown.js";

/** What a user said. Its buttons call `onEdit`, and `onRetry` if there is no answer. */
export function userTurn(message, onEdit, onRetry) {
  const pictures = (message.images ?? []).map((url) => make("img", { src: url, alt: "Image in the message" }));
  const edit = make("button", { type: "button", class: "small", onclick: onEdit }, "Edit");
  const retry = onRetry && make("button", { type: "button", class: "small", onclick: onRetry }, "Try again");
  return make("article", { class: "turn user", "aria-label": "You" },
    make("div", { class: "bubble" }, ...pictures, message.content), make("div", { class: "actions" }, edit, retry));
}

/** An answer, whole or growing: change the message, then `draw`. */
export class AnswerTurn {
  constructor(message, onRetry) {
    this.message = message;
    this.text = make("div", { class: "answer", "aria-live": "polite" });
    this.markdown = new Markdown(this.text);
    this.summary = make("summary");
    this.reasoning = make("div", { class: "reasoning" });
    this.thought = make("details", { class: "thought", hidden: true }, this.summary, this.reasoning);
    this.note = make("p", { class: "quiet note", hidden: true });
    this.figures = make("span", { class: "figures" });
    const onCopy = () => copyFrom(copy, this.message.content);
    const copy = make("button", { type: "button", class: "small", onclick: onCopy }, "Copy");
    const retry = make("button", { type: "button", class: "small retry", onclick: onRetry }, "Regenerate");
    this.actions = make("div", { class: "actions" }, copy, retry, this.figures);
    const parts = [this.thought, this.text, this.note, this.actions];
    this.root = make("article", { class: "turn model", "aria-label": "Answer" }, ...parts);
  }

  /** Show the message as it is now; `now` (ms) tells how long it thinks, while it does. */
  draw(growing = false, now = 0) {
    const { content, reasoning, error, finish } = this.message;
    this.root.classList.toggle("growing", growing);
    this.text.setAttribute("aria-busy", growing);
    this.actions.hidden = growing;
    this.markdown.show(content);
    this.#drawThought(reasoning ?? "", growing && !content, now);
    this.note.textContent = error ?? endings[finish] ?? "";
    this.note.hidden = growing || !this.note.textContent;
    this.note.classList.toggle("error", Boolean(error));
    this.figures.textContent = figuresLine(this.message);
  }

  #drawThought(reasoning, going, now) {
    this.thought.hidden = !reasoning;
    this.thought.classList.toggle("going", going);
    const { thoughtFrom, thoughtFor } = this.message;
    const done = thoughtFor ? `Thought for ${duration(thoughtFor)}` : "Thoughts";
    this.summary.textContent = going ? `Thinking… ${duration(Math.max(0, now - thoughtFrom) / 1000)}` : done;
    if (this.reasoning.textContent !== reasoning) this.reasoning.textContent = reasoning;
  }
}

const endings = { stopped: "Stopped.", length: "Cut off: this is as long as it may be." };

function figuresLine({ timings, usage }) {
  if (!timings) return "";
  const cached = timings.cache_n ? ` (${count(timings.cache_n)} cached)` : "";
  const thoughts = usage?.completion_tokens_details?.reasoning_tokens;
  return [
    `${count(timings.predicted_n)} tok${thoughts ? `, ${count(thoughts)} of thoughts` : ""}`,
    timings.predicted_per_second ? rate(timings.predicted_per_second) : null,
    `prompt ${count(timings.prompt_n + timings.cache_n)} tok${cached}`,
    timings.first_ms ? `first token ${duration(timings.first_ms / 1000)}` : null,
  ].filter(Boolean).join(" · ");
}
