// What was said, what the user chose, and where both are kept.

const PLACE = "kimi-local conversation";
const FORMAT = "kimi-local conversation 1";

/** Messages are {role, content, images} of users and {role, content, reasoning, ...} of the model. */
export class Conversation {
  constructor() {
    this.clear();
    this.options = { system: "", thinking: true, maxTokens: null };
    this.kept = localStorage.getItem(PLACE) !== null; // whether closing the tab loses nothing
    this.#read(localStorage.getItem(PLACE) ?? sessionStorage.getItem(PLACE));
  }

  clear() {
    this.messages = [];
  }

  /** Write it down; false where the browser has no room for it. */
  save() {
    const [store, other] = this.kept ? [localStorage, sessionStorage] : [sessionStorage, localStorage];
    other.removeItem(PLACE);
    try {
      store.setItem(PLACE, this.toJson());
      return true;
    } catch {
      store.removeItem(PLACE);
      return false;
    }
  }

  toJson() {
    return JSON.stringify({ format: FORMAT, options: this.options, messages: this.messages }, null, 1);
  }

  /** Take over an exported conversation. Throws Error for a file that is none. */
  fromJson(text) {
    const found = JSON.parse(text);
    if (found?.format !== FORMAT || !Array.isArray(found.messages) || !found.messages.every(isMessage)) {
      throw new Error("no conversation");
    }
    this.messages = found.messages;
    const { system = "", thinking = true, maxTokens = null } = found.options ?? {};
    this.options = { system: String(system), thinking: Boolean(thinking), maxTokens: Number(maxTokens) || null };
  }

  /** The body of a request for the next turn. */
  toRequest(thinks) {
    const { system, thinking, maxTokens } = this.options;
    const first = system.trim() ? [{ role: "system", content: system.trim() }] : [];
    return {
      messages: [...first, ...this.messages.map(toMessage)],
      stream: true,
      stream_options: { include_usage: true },
      return_progress: true,
      ...(thinks && { chat_template_kwargs: { thinking } }),
      ...(maxTokens && { max_tokens: maxTokens }),
    };
  }

  #read(text) {
    try {
      if (text) this.fromJson(text);
    } catch {
      // of another version, or edited by hand: begin anew
    }
  }
}

function isMessage(message) {
  const { role, content, reasoning = "", images = [] } = message ?? {};
  const texts = [content, reasoning].every((text) => typeof text === "string");
  return texts && ["user", "assistant"].includes(role) && images.every((url) => /^data:image\//.test(url));
}

function toMessage({ role, content, images, reasoning }) {
  if (images?.length) {
    const parts = images.map((url) => ({ type: "image_url", image_url: { url } }));
    return { role, content: [...parts, { type: "text", text: content }] };
  }
  return { role, content, ...(reasoning && { reasoning_content: reasoning }) };
}
