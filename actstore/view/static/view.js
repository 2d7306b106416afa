// Shared by all views. Elements are made of attributes and text nodes, never parsed from markup,
// so text of a corpus cannot become anything else.

const DEEP = 0.64; // of a colour scale: from here on text on it is of the other lightness

const SVG = "http://www.w3.org/2000/svg";

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}
const el = (tag, attributes = {}, ...children) =>
  fill(document.createElement(tag), attributes, children);
const svg = (tag, attributes = {}, ...children) =>
  fill(document.createElementNS(SVG, tag), attributes, children);

// Control characters as their pictures and lone surrogates as U+FFFD: one character for one.
const visible = (text) =>
  text
    .replace(/[\x00-\x08\x0b\x0c\x0e-\x1f]/g, (c) => String.fromCharCode(0x2400 + c.charCodeAt(0)))
    .replace(/\x7f/g, "\u2421")
    .replace(/\p{Cs}/gu, "\ufffd");
// A token on its own: its spaces and breaks too.
const marked = (text) =>
  visible(text).replace(/ /g, "\u2423").replace(/\n/g, "\u21b5").replace(/\t/g, "\u21e5")
    .replace(/\r/g, "\u240d").replace(/[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]/g, "\ufffd");

function number(value) {
  if (value === null || value === undefined) return "none";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1000) return Math.round(value).toLocaleString("en");
  return size < 0.001 ? value.toExponential(1) : String(Number(value.toPrecision(3)));
}
const percent = (share) => `${(100 * share).toFixed(1)}\u202f%`;

// A scale from 0 to a top, with its ticks.
const scale = (...ticks) =>
  el("span", { class: "scale", "aria-hidden": "true" }, el("span", { class: "bar" }),
    ...ticks.map((tick) => el("span", {}, tick)));

function facts(pairs) {
  return el("p", { class: "facts" },
    ...pairs.map(([name, value]) => el("span", {}, `${name} `, el("b", {}, el("bdi", {}, visible(value))))));
}

// A tooltip and what a screen reader is told, both of one view.
class Tip {
  constructor(view) {
    this.view = view;
    this.box = el("div", { class: "tip", "aria-hidden": "true", hidden: "" });
    this.voice = el("div", { class: "sr", "aria-live": "polite" });
    view.append(this.box, this.voice);
    view.addEventListener("keydown", (event) => event.key === "Escape" && this.hide());
  }
  show(anchor, ...children) {
    this.box.replaceChildren(...children);
    this.box.hidden = false;
    const outer = this.view.getBoundingClientRect();
    const at = anchor.getClientRects()[0] ?? anchor.getBoundingClientRect();
    const box = this.box.getBoundingClientRect();
    const left = Math.max(0, Math.min(at.left - outer.left, outer.width - box.width));
    const above = at.top - box.height - 6;
    this.box.style.left = `${left}px`;
    this.box.style.top = `${(above >= 0 ? above : at.bottom + 6) - outer.top}px`;
  }
  hide() {
    this.box.hidden = true;
  }
  say(text) {
    this.voice.textContent = text;
  }
}

// Follow the surface the view stands on: a notebook's theme need not be the system's.
function adoptScheme(host) {
  for (let node = host.parentElement; node; node = node.parentElement) {
    const parts = getComputedStyle(node).backgroundColor.match(/[\d.]+/g);
    if (!parts || (parts.length > 3 && Number(parts[3]) < 0.5)) continue;
    const [r, g, b] = parts.map(Number);
    host.style.colorScheme = 0.299 * r + 0.587 * g + 0.114 * b < 128 ? "dark" : "light";
    return;
  }
  host.style.colorScheme = "";
}

function mount(id, style, data) {
  for (const host of document.querySelectorAll(`[data-actstore-view="${id}"]`)) {
    if (host.shadowRoot) continue;
    const root = host.attachShadow({ mode: "open" });
    const view = el("section", { class: "view", "aria-label": visible(data.title) });
    root.append(el("style", {}, style), view);
    const adopt = () => adoptScheme(host);
    adopt();
    host.addEventListener("pointerenter", adopt);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", adopt);
    draw(view, data);
  }
}
