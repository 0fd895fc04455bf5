// A safe part of markdown: text becomes elements, never markup, and formulas stay as they are written.

import { copyFrom, make } from "./dom.js";

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^`]*)$/;
const HEADING = /^(#{1,6})\s+(.*)$/;
const RULE = /^ {0,3}([-*_])(?:\s*\1){2,}\s*$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])(?:\s+|$)(.*)$/;
const DIVIDER = /^\s*\|?\s*:?-+:?\s*(?:\|\s*:?-+:?\s*)*\|?\s*$/;
const LINK = /^(?:https?:\/\/|mailto:)/i;

/** Markdown that grows: `show` the whole text so far; blocks that stay the same are left alone. */
export class Markdown {
  constructor(root) {
    this.root = root;
    this.shown = [];
  }

  show(text) {
    const sources = split(text);
    let same = 0;
    while (same < this.shown.length && this.shown[same] === sources[same]) same++;
    while (this.root.childNodes.length > same) this.root.lastChild.remove();
    this.root.append(...sources.slice(same).map(block));
    this.shown = sources;
  }
}

/** The text of each block. */
export function split(text) {
  const lines = text.split("\n");
  const found = [];
  for (let at = 0; at < lines.length; ) {
    if (!lines[at].trim()) { at++; continue; }
    const end = endOf(lines, at);
    found.push(lines.slice(at, end).join("\n"));
    at = end;
  }
  return found;
}

/** Where the block that begins at line `at` is over. */
function endOf(lines, at) {
  const fence = lines[at].match(FENCE);
  if (fence) {
    const close = new RegExp(`^ {0,3}${fence[1][0]}{${fence[1].length},}\\s*$`);
    const end = lines.findIndex((line, i) => i > at && close.test(line));
    return end < 0 ? lines.length : end + 1;
  }
  if (HEADING.test(lines[at]) || RULE.test(lines[at])) return at + 1;
  let end = at + 1;
  if (ITEM.test(lines[at])) {
    while (end < lines.length && continuesList(lines, end)) end++;
    while (!lines[end - 1].trim()) end--;
    return end;
  }
  const quoted = QUOTE.test(lines[at]);
  const goesOn = (line) => line?.trim() && QUOTE.test(line) === quoted && (quoted || !begins(line));
  while (goesOn(lines[end])) end++;
  return end;
}

/** Whether a line ends the paragraph before it. */
const begins = (line) => [FENCE, HEADING, RULE, ITEM].some((form) => form.test(line));
const isItem = (line) => ITEM.test(line) && !RULE.test(line);

/** Lines of a list: items, what is indented, and blank lines before either. */
function continuesList(lines, at) {
  const next = lines.slice(at).find((line) => line.trim());
  if (next === undefined) return false;
  const lazily = lines[at].trim() && lines[at - 1].trim() && !begins(next);
  return isItem(next) || /^\s{2,}/.test(next) || lazily;
}

// -- blocks -------------------------------------------------------------------------------------------------------

function block(source) {
  const lines = source.split("\n");
  const [first] = lines;
  if (FENCE.test(first)) return code(lines);
  if (RULE.test(first)) return make("hr");
  const heading = first.match(HEADING);
  if (heading) return inline(heading[2].replace(/\s+#+\s*$/, ""), make(`h${Math.min(6, heading[1].length + 2)}`));
  if (QUOTE.test(first)) return nested(source.replace(/^ {0,3}> ?/gm, ""), make("blockquote"));
  if (ITEM.test(first)) return list(lines);
  if (lines.length > 1 && first.includes("|") && DIVIDER.test(lines[1])) return table(lines);
  return inline(source, make("p"));
}

function nested(text, parent) {
  parent.append(...split(text).map(block));
  return parent;
}

function code(lines) {
  const [, marks, language] = lines[0].match(FENCE);
  const closed = lines.length > 1 && lines.at(-1).trim().startsWith(marks);
  const text = lines.slice(1, closed ? -1 : undefined).join("\n");
  const copy = make("button", { type: "button", class: "small", onclick: () => copyFrom(copy, text) }, "Copy");
  const name = language.trim().split(/\s/)[0];
  const bar = make("div", { class: "bar" }, make("span", {}, name || "text"), copy);
  return make("div", { class: "code" }, bar, make("pre", { tabindex: "0" }, make("code", {}, text)));
}

function list(lines) {
  const [, indent, mark] = lines[0].match(ITEM);
  const ordered = /\d/.test(mark);
  const items = [];
  for (const line of lines) {
    const item = line.match(ITEM);
    if (item && item[1].length <= indent.length + 1) items.push([item[3]]);
    else items.at(-1).push(line.slice(Math.min(line.search(/\S|$/), indent.length + mark.length + 1)));
  }
  const root = make(ordered ? "ol" : "ul", ordered ? { start: parseInt(mark, 10) } : {});
  root.append(...items.map((item) => {
    const entry = nested(item.join("\n"), make("li"));
    const [only] = entry.children;
    if (only?.tagName === "P") only.replaceWith(...only.childNodes); // a tight list
    return entry;
  }));
  return root;
}

function table(lines) {
  const sides = cellsOf(lines[1]).map((mark) => (/^:.*:$/.test(mark) ? "middle" : mark.endsWith(":") ? "right" : null));
  const cell = (tag) => (text, i) => inline(text, make(tag, { class: sides[i] }));
  const row = (line, tag) => make("tr", {}, ...cellsOf(line).map(cell(tag)));
  const body = make("tbody", {}, ...lines.slice(2).map((line) => row(line, "td")));
  return make("div", { class: "wide", tabindex: "0" }, make("table", {}, make("thead", {}, row(lines[0], "th")), body));
}

function cellsOf(line) {
  const inner = line.trim().replace(/^\||\|$/g, "");
  return inner.split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
}

// -- inside a line ------------------------------------------------------------------------------------------------

const within = (tag) => (found) => inline(found[1], make(tag));
const formula = (found) => make("code", { class: "math" }, found[0]);

const SPANS = [
  [/(`+)([^]*?[^`])\1(?!`)/y, (found) => make("code", {}, found[2].replace(/^ (.+) $/, "$1"))],
  [/\\\([^]+?\\\)|\\\[[^]+?\\\]|\$\$[^]+?\$\$|\$(?![\s$])[^$\n]*?[^\s$\\]\$(?!\d)/y, formula],
  [/\\([\\`*_{}[\]()#+\-.!|>~$<])/y, (found) => document.createTextNode(found[1])],
  [/ {2,}\n|\\?\n/y, () => make("br")],
  [/\*\*(?=\S)([^]*?\S)\*\*(?!\*)/y, within("strong")],
  [/(?<!\w)__(?=\S)([^]*?\S)__(?!\w)/y, within("strong")],
  [/\*(?![\s*])([^]*?[^\s*])\*(?!\*)/y, within("em")],
  [/(?<!\w)_(?![\s_])([^]*?[^\s_])_(?!\w)/y, within("em")],
  [/~~(?=\S)([^]*?\S)~~/y, within("s")],
  [/!?\[([^\]]*)\]\(\s*<?([^\s)>]*)>?(?:\s+"[^"]*")?\s*\)/y, (found) => link(found[2], found[1], found[0])],
  [/<(https?:\/\/[^\s>]+|mailto:[^\s>]+)>/yi, (found) => link(found[1], found[1], found[0])],
  [/(?<!\w)https?:\/\/[^\s<>"'`]*[^\s<>"'`.,:;!?)\]*_]/yi, (found) => link(found[0], found[0], found[0])],
];
const SPECIAL = /[\\`*_~[!$<\n h]/i;

/** Append `text` to `parent`, its spans as elements; returns `parent`. */
function inline(text, parent) {
  let plain = "";
  for (let at = 0; at < text.length; ) {
    const [found, build] = SPECIAL.test(text[at]) ? spanAt(text, at) : [];
    if (!found) { plain += text[at++]; continue; }
    if (plain) parent.append(plain);
    plain = "";
    parent.append(build(found));
    at += found[0].length;
  }
  if (plain) parent.append(plain);
  return parent;
}

function spanAt(text, at) {
  for (const [pattern, build] of SPANS) {
    pattern.lastIndex = at;
    const found = pattern.exec(text);
    if (found) return [found, build];
  }
  return [];
}

/** A link that leads where it says; text for any other scheme. Pictures are links too: nothing is fetched. */
function link(address, label, source) {
  if (!LINK.test(address)) return document.createTextNode(source);
  const anchor = make("a", { href: address, target: "_blank", rel: "noopener noreferrer" });
  return label === address ? (anchor.append(label), anchor) : inline(label || address, anchor);
}
