// Elements without markup: what comes from outside is text and can be nothing else.

export const $ = (id) => document.getElementById(id);

/** An element with attributes, listeners (onclick: f) and children, elements or text. */
export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child != null));
  return element;
}

/** Fill a table: rows of cells, the first of each its heading; `head` is the line above. */
export function fillTable(table, rows, head = []) {
  const title = (scope) => (cell) => make("th", { scope }, cell);
  const value = (cell) => make("td", {}, cell);
  const line = ([first, ...others]) => make("tr", {}, title("row")(first), ...others.map(value));
  const parts = head.length ? [make("thead", {}, make("tr", {}, ...head.map(title("col"))))] : [];
  table.replaceChildren(...parts, make("tbody", {}, ...rows.map(line)));
}

/** Copy text, and say so on the button for a moment. */
export async function copyFrom(button, text) {
  const before = button.textContent;
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  } catch {
    button.textContent = "Not allowed";
  }
  setTimeout(() => { button.textContent = before; }, 1200);
}

/** Let the user save `text` as a file. */
export function download(name, text) {
  const url = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  make("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}

// -- numbers ------------------------------------------------------------------------------------------------------

export const count = (number) => Math.round(number).toLocaleString("en-US");
export const percent = (share, digits = 0) => `${(100 * share).toFixed(digits)} %`;

/** 1234567 -> "1.2 MB", decimal, as drives and the command line have it. */
export function bytes(number) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  const step = Math.min(units.length - 1, Math.floor(Math.log10(Math.max(1, number)) / 3));
  const value = number / 1000 ** step;
  return `${value.toFixed(value < 10 && step ? 1 : 0)} ${units[step]}`;
}

/** 32768 -> "32k". */
export function tokens(number) {
  return number < 1024 ? count(number) : `${+(number / 1024).toFixed(number < 10240 ? 1 : 0)}k`;
}

/** Seconds for people. */
export function duration(seconds) {
  if (seconds < 10) return `${seconds.toFixed(1)} s`;
  if (seconds < 90) return `${Math.round(seconds)} s`;
  const minutes = Math.round(seconds / 60);
  return minutes < 90 ? `${minutes} min` : `${(seconds / 3600).toFixed(1)} h`;
}

export const rate = (perSecond) => `${perSecond < 10 ? perSecond.toFixed(1) : count(perSecond)} tok/s`;

/** Base64 -> bytes. */
export const unpacked = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
