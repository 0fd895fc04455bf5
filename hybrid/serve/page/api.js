// Talking to the server, and to nobody else.

import { $ } from "./dom.js";

const KEY = "kimi-local key";

/** What the server says is wrong, in its own words. */
export class ServerError extends Error {}

/** A response that is fine. Asks the user for the key where one is needed; throws ServerError for refusals. */
export async function request(path, { body, signal } = {}) {
  for (;;) {
    const headers = {};
    const key = sessionStorage.getItem(KEY);
    if (key) headers.authorization = `Bearer ${key}`;
    if (body) headers["content-type"] = "application/json";
    const method = body ? "POST" : "GET";
    const response = await reach(path, { method, headers, body: body && JSON.stringify(body), signal });
    if (response.ok) return response;
    if (response.status !== 401) throw new ServerError(await reason(response));
    if (sessionStorage.getItem(KEY) === key) await askForKey();
  }
}

export const getJson = async (path, options) => (await request(path, options)).json();

/** The objects of a stream of server-sent events; comments, which only keep it alive, are left out. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const parts = (held + value).split("\n\n");
      held = parts.pop();
      for (const part of parts) {
        const data = part.startsWith("data: ") ? part.slice(6) : ""; // each is one line
        if (data === "[DONE]") return;
        if (data) yield JSON.parse(data);
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

async function reach(path, options) {
  try {
    return await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server does not answer. Is it still running?");
  }
}

async function reason(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `The server answers with ${response.status}.`;
  }
}

let asking = null;

/** One dialog, however many requests wait for it. */
function askForKey() {
  asking ??= new Promise((resolve) => {
    const dialog = $("key-dialog");
    $("key").value = "";
    dialog.addEventListener("close", () => {
      sessionStorage.setItem(KEY, $("key").value.trim());
      asking = null;
      resolve();
    }, { once: true });
    dialog.addEventListener("cancel", (event) => event.preventDefault(), { once: true });
    dialog.showModal();
  });
  return asking;
}
