// The page: three views behind links, the colours, and what the server says of itself.

import { getJson } from "./api.js";
import { Chat } from "./chat.js";
import { $ } from "./dom.js";
import { Experts } from "./experts.js";
import { Memory } from "./memory.js";

const THEME = "kimi-local theme";
const THEMES = { auto: ["◐", "as the system"], light: ["☀", "light"], dark: ["☾", "dark"] };

const chat = new Chat();
const views = { chat: null, experts: new Experts(), memory: new Memory() };
let shown = null;

/** Show the view that the address names; one that nobody looks at asks the server nothing. */
function turn() {
  const name = location.hash.slice(1) in views ? location.hash.slice(1) : "chat";
  for (const link of document.querySelectorAll("nav a")) {
    if (link.dataset.view === name) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  for (const each of Object.keys(views)) $(`view-${each}`).hidden = each !== name;
  settle(document.hidden ? null : name);
  if (name === "chat") $("prompt").focus({ preventScroll: true });
}

function settle(name) {
  if (name === shown) return;
  views[shown]?.close();
  shown = name;
  views[shown]?.open();
}

function colour(theme) {
  const [sign, name] = THEMES[theme];
  document.documentElement.dataset.theme = theme;
  $("theme").textContent = sign;
  $("theme").setAttribute("aria-label", `Colours: ${name}`);
  $("theme").title = `Colours: ${name}`;
  }

function nextTheme() {
  const names = Object.keys(THEMES);
  const next = names[(names.indexOf(document.documentElement.dataset.theme) + 1) % names.length];
  localStorage.setItem(THEME, next);
  colour(next);
}

async function meet() {
  try {
    const server = await getJson("/v1/kimi/server");
    $("model").textContent = document.title = server.name;
    chat.meet(server);
    chat.notify("");
  } catch (error) {
    chat.notify(error.message);
    setTimeout(meet, 3000);
  }
}

const remembered = localStorage.getItem(THEME);
colour(remembered in THEMES ? remembered : "auto");
$("theme").addEventListener("click", nextTheme);
addEventListener("hashchange", turn);
document.addEventListener("visibilitychange", turn);
turn();
meet();
