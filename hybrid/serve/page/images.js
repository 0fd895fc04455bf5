// Images beside the message that is being written.

import { $, make } from "./dom.js";

const REFUSED = "The model on this server takes no images yet. Describe what is in it, or paste its text.";

/** What is pasted, dropped or chosen; kept as data URLs until `take`. */
export class Images {
  constructor(notify) {
    this.urls = [];
    this.welcome = false; // whether the server takes any
    this.notify = notify;
    const file = $("image-file");
    $("attach").addEventListener("click", () => (this.welcome ? file.click() : notify(REFUSED)));
    file.addEventListener("change", () => { this.add([...file.files]); file.value = ""; });
    $("prompt").addEventListener("paste", (event) => this.#offer(event, event.clipboardData));
    const view = $("view-chat");
    view.addEventListener("dragover", (event) => event.preventDefault());
    view.addEventListener("drop", (event) => this.#offer(event, event.dataTransfer));
  }

  async add(files) {
    if (!this.welcome) return this.notify(REFUSED);
    this.urls.push(...await Promise.all(files.map(toDataUrl)));
    this.#draw();
  }

  /** The images there are; none are left. */
  take() {
    const { urls } = this;
    this.urls = [];
    this.#draw();
    return urls;
  }

  put(urls) {
    this.urls = [...urls];
    this.#draw();
  }

  #offer(event, transfer) {
    const files = [...(transfer?.files ?? [])].filter((file) => file.type.startsWith("image/"));
    if (!files.length) return;
    event.preventDefault();
    this.add(files);
  }

  #draw() {
    $("images").hidden = !this.urls.length;
    $("images").replaceChildren(...this.urls.map((url, i) => {
      const what = { type: "button", title: "Remove", "aria-label": `Remove image ${i + 1}` };
      return make("button", { ...what, onclick: () => this.#remove(i) }, make("img", { src: url, alt: "" }));
    }));
  }

  #remove(i) {
    this.urls.splice(i, 1);
    this.#draw();
    $("prompt").focus();
  }
}

const toDataUrl = (file) => new Promise((resolve, reject) => {
  const reader = new FileReader();
  reader.addEventListener("load", () => resolve(reader.result));
  reader.addEventListener("error", () => reject(reader.error));
  reader.readAsDataURL(file);
});
