// The chat: what is typed becomes a turn, and the turns are the page.

import { Answer } from "./answer.js";
import { Conversation } from "./conversation.js";
import { $, download, tokens } from "./dom.js";
import { Images } from "./images.js";
import { AnswerTurn, userTurn } from "./turn.js";

const NEAR = 80; // pixels from the end of the page within which it follows the answer

export class Chat {
  constructor() {
    this.conversation = new Conversation();
    this.images = new Images((text) => this.notify(text));
    this.server = null;
    this.answer = null; // the one on its way
    this.editing = null; // number of the message that sending replaces, with all behind it
    this.#listen();
    this.#listenToOptions();
    this.draw();
  }

  /** What /v1/kimi/server says is known now. */
  meet(server) {
    this.server = server;
    this.images.welcome = server.images;
    $("thinking-label").hidden = !server.thinking;
    const { layers, experts, experts_per_token: active } = server.model;
    const size = experts ? `${layers} layers, ${experts} experts, ${active} for each token` : `${layers} layers`;
    $("facts").textContent = `${server.name}: ${size}; ${tokens(server.ctx)} tokens of context.`;
    this.#drawGauge();
  }

  notify(text) {
    $("notice").textContent = text;
    $("notice").hidden = !text;
  }

  // -- turns --------------------------------------------------------------------------------------------------------

  /** All turns anew. */
  draw() {
    const { messages } = this.conversation;
    $("turns").replaceChildren(...messages.map((message, i) => this.#turn(message, i)));
    $("empty").hidden = messages.length > 0;
    this.#drawGauge();
    this.#drawDock();
  }

  #turn(message, i) {
    if (message.role === "user") {
      const unanswered = i === this.conversation.messages.length - 1;
      return userTurn(message, () => this.#edit(i), unanswered ? () => this.#regenerate() : null);
    }
    const turn = new AnswerTurn(message, () => this.#regenerate());
    turn.draw();
    return turn.root;
  }

  #send() {
    const content = $("prompt").value.trim();
    if (this.answer || (!content && !this.images.urls.length)) return;
    this.notify("");
    const images = this.images.take();
    if (this.editing !== null) this.conversation.messages.length = this.editing;
    this.conversation.messages.push({ role: "user", content, ...(images.length && { images }) });
    this.editing = null;
    $("prompt").value = "";
    grow($("prompt"));
    this.#reply();
  }

  #edit(i) {
    if (this.answer) return;
    const message = this.conversation.messages[i];
    this.editing = i;
    $("prompt").value = message.content;
    this.images.put(message.images ?? []);
    this.notify("You are editing an earlier message; sending it replaces what follows. Esc leaves all as it was.");
    grow($("prompt"));
    $("prompt").focus();
  }

  #leaveEdit() {
    this.editing = null;
    $("prompt").value = "";
    this.images.put([]);
    this.notify("");
    grow($("prompt"));
  }

  #regenerate() {
    if (this.answer) return;
    if (this.conversation.messages.at(-1)?.role === "assistant") this.conversation.messages.pop();
    this.#reply();
  }

  async #reply() {
    const body = this.conversation.toRequest(this.server?.thinking);
    let due = true; // whether there is something new to show
    const answer = this.answer = new Answer(body, () => { due = true; });
    this.conversation.messages.push(answer.message);
    this.draw();
    const turn = new AnswerTurn(answer.message, () => this.#regenerate());
    $("turns").lastChild.replaceWith(turn.root);
    scrollToEnd();
    const paint = () => {
      if (this.answer !== answer) return;
      if (due || answer.thinking) follow(() => turn.draw(true, performance.now()));
      due = false;
      this.#drawDock();
      requestAnimationFrame(paint);
    };
    paint();
    await answer.run();
    this.answer = null;
    this.#settle(answer.message);
    follow(() => this.draw());
  }

  /** An answer without a word is none; what went wrong is said above the message. */
  #settle(message) {
    if (!message.content && !message.reasoning) {
      this.conversation.messages.pop();
      const stopped = message.finish === "stopped";
      this.notify(message.error ?? (stopped ? "Stopped before the first word." : "The answer was empty."));
    }
    if (!this.conversation.save()) this.notify("This conversation is too large for the browser to keep. Export it.");
  }

  // -- around them --------------------------------------------------------------------------------------------------

  #drawDock() {
    const { answer } = this;
    $("send").hidden = Boolean(answer);
    $("stop").hidden = $("status").hidden = !answer;
    $("answer-now").hidden = !answer?.thinking;
    if (!answer) return;
    if ($("status-text").textContent !== answer.status) $("status-text").textContent = answer.status;
    const { progress } = answer;
    $("prefill").hidden = !progress || answer.firstAt > 0;
    if (progress) $("prefill").value = progress.processed / progress.total;
  }

  #drawGauge() {
    const [bar, text] = $("gauge").children;
    const used = this.conversation.messages.findLast((message) => message.usage)?.usage.total_tokens ?? 0;
    $("gauge").hidden = !this.server || !used;
    if (!this.server) return;
    bar.value = used / this.server.ctx;
    text.textContent = `${tokens(used)} of ${tokens(this.server.ctx)}`;
    $("gauge").title = `${used} of ${this.server.ctx} tokens of context are in use`;
  }

  #listen() {
    const prompt = $("prompt");
    prompt.addEventListener("input", () => grow(prompt));
    prompt.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.ctrlKey || event.isComposing) return;
      event.preventDefault();
      this.#send();
    });
    $("composer").addEventListener("submit", (event) => { event.preventDefault(); this.#send(); });
    $("stop").addEventListener("click", () => this.#stop());
    $("answer-now").addEventListener("click", () => this.answer?.answerNow());
    $("new").addEventListener("click", () => this.#begin());
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && !document.querySelector("dialog[open]")) {
        if (this.answer) this.#stop();
        else if (this.editing !== null) this.#leaveEdit();
      }
      if (event.key === "Enter" && event.ctrlKey) this.answer ? this.answer.answerNow() : this.#send();
    });
  }

  #stop() {
    this.answer?.stop();
    $("prompt").focus();
  }

  #begin() {
    this.answer?.stop();
    this.conversation.clear();
    this.#leaveEdit();
    this.conversation.save();
    this.draw();
    $("prompt").focus();
  }

  #listenToOptions() {
    const { conversation } = this;
    const dialog = $("options-dialog");
    $("options").addEventListener("click", () => {
      $("system").value = conversation.options.system;
      $("thinking").checked = conversation.options.thinking;
      $("max-tokens").value = conversation.options.maxTokens ?? "";
      $("keep").checked = conversation.kept;
      dialog.showModal();
    });
    dialog.addEventListener("close", () => {
      const maxTokens = Number($("max-tokens").value) || null;
      conversation.options = { system: $("system").value, thinking: $("thinking").checked, maxTokens };
      conversation.kept = $("keep").checked;
      conversation.save();
    });
    $("export").addEventListener("click", () => download("conversation.json", conversation.toJson()));
    $("import").addEventListener("click", () => $("import-file").click());
    $("import-file").addEventListener("change", () => this.#import($("import-file")));
  }

  async #import(input) {
    const [file] = input.files;
    input.value = "";
    if (!file || this.answer) return;
    try {
      this.conversation.fromJson(await file.text());
      $("system").value = this.conversation.options.system;
      this.notify("");
      this.draw();
    } catch {
      this.notify(`${file.name} is no conversation exported here.`);
    }
    $("options-dialog").close();
  }
}

/** A text field as high as its text. */
function grow(field) {
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight}px`;
}

function scrollToEnd() {
  scrollTo({ top: document.documentElement.scrollHeight });
}

/** `change` the page, and stay at its end if that is where the reader is. */
function follow(change) {
  const page = document.documentElement;
  const atEnd = page.scrollHeight - page.clientHeight - page.scrollTop < NEAR;
  change();
  if (atEnd) scrollToEnd();
}
