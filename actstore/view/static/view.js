// Shared by all views. Elements are made of attributes and text nodes, never parsed from markup,
// so text of a corpus cannot become anything else.

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
const counted = (n, noun) => `${number(n)} ${noun}${n === 1 ? "" : "s"}`;
const percent = (share) => `${(100 * share).toFixed(1)}\u202f%`;

// Text with its spaces, breaks and the bounds of its tokens shown, or as it stands. The sign of a
// space is followed by a place where a line may break.
const spaced = (text, marks) =>
  !marks ? visible(text) : marked(text).replaceAll("\u2423", "\u2423\u200b").replaceAll("\u21b5", "\u21b5\n");

// Base64 to bytes, and the bytes to values: 0 is a row without a value; else the square root of the
// value over the largest one, in 254 steps from 0, or in 127 to either side where values are signed.
const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
function valueOf(code, largest, signed) {
  if (code === 0) return null;
  const root = signed ? (code - 128) / 127 : (code - 1) / 254;
  return largest * root * Math.abs(root);
}

// -- colour ---------------------------------------------------------------------------------------

// Two ramps of one lightness each way, told apart by any kind of colour vision: blue up, orange
// down; [on light, on dark]. Strong values are underlined too, so that nothing is said by colour
// alone.
const UP = [["#ffffff", "#14171c"], ["#dceaf7", "#1a3048"], ["#a3cbe8", "#205080"], ["#4f97cb", "#3a7fbd"],
  ["#1c63a6", "#79b4e6"], ["#062f6e", "#c9e4fb"]];
const DOWN = [["#ffffff", "#14171c"], ["#fdead1", "#3a2a16"], ["#f9c584", "#6a4517"], ["#dd8b2b", "#a86b1e"],
  ["#a7590c", "#dc9b45"], ["#6b3206", "#fbd7a3"]];
const SHADES = 64; // classes of shades: five times as fast to change as a style on each
const STRONG = 0.75; // of a scale: from here on a token is underlined too

const channels = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
function mixed(ramp, mode, level) {
  const at = level * (ramp.length - 1);
  const i = Math.min(Math.floor(at), ramp.length - 2);
  const [a, b] = [channels(ramp[i][mode]), channels(ramp[i + 1][mode])];
  return a.map((x, k) => Math.round(x + (b[k] - x) * (at - i)));
}
// Of black and white the one that is easier to read on a colour: its contrast is 4.5 at least.
function inkOn(rgb) {
  const [r, g, b] = rgb.map((x) => (x / 255 <= 0.04045 ? x / 255 / 12.92 : ((x / 255 + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.179 ? "#000" : "#fff";
}
const SHADE_STYLE = [["s", UP, 1], ["n", DOWN, -1]].map(([name, ramp, sign]) =>
  Array.from({ length: SHADES + 1 }, (_, i) => {
    const [light, dark] = [0, 1].map((mode) => mixed(ramp, mode, i / SHADES));
    return `.${name}${i}{--s:${sign * i / SHADES};background:light-dark(rgb(${light}),rgb(${dark}));` +
      `color:light-dark(${inkOn(light)},${inkOn(dark)})}`;
  }).join("")).join("");

// The class of a level from -1 to 1.
function shadeOf(level) {
  const size = Math.min(1, Math.abs(level));
  return `${level < 0 ? "n" : "s"}${Math.round(SHADES * size)}` +
    (size < STRONG ? "" : level < 0 ? " strong low" : " strong");
}

// A colour scale with its ticks, spread evenly; from the lowest of a diverging one or from zero.
function scale(ticks, diverging = false) {
  const bar = el("span", { class: "bar" });
  const stops = diverging ? [...DOWN.slice(1).reverse(), ...UP] : UP;
  bar.style.background = `linear-gradient(to right,${stops.map(([a, b]) => `light-dark(${a},${b})`)})`;
  return el("span", { class: "scale", "aria-hidden": "true" }, bar,
    el("span", { class: "ticks" }, ...ticks.map((tick) => el("span", {}, tick))));
}
const underlinedFrom = (top, signed) =>
  el("span", {}, el("u", {}, "underlined"), `: ${number(STRONG * top)} and more`,
    ...(signed ? ["; ", el("u", { class: "low" }, "dotted"), `: \u2212${number(STRONG * top)} and less`] : []));

// -- parts of views -------------------------------------------------------------------------------

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

// A button that says whether it is on.
function toggle(label, change) {
  const button = el("button", { class: "toggle", type: "button", "aria-pressed": "false" }, label);
  button.addEventListener("click", () => {
    const on = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", String(on));
    change(on);
  });
  return button;
}

// Tabs over one panel; entries are [label, draw]. Arrow keys go from tab to tab.
function tabs(label, entries) {
  if (!entries.length) return { node: el("p", { class: "note" }, "None: there are no content rows."), redraw() {} };
  const panel = el("div", { role: "tabpanel", class: "panel" });
  const buttons = entries.map(([name], i) =>
    el("button", { role: "tab", type: "button", "aria-selected": "false", tabindex: "-1" }, name));
  let opened = 0;
  function open(i) {
    opened = i;
    buttons.forEach((button, k) => {
      button.setAttribute("aria-selected", String(k === i));
      button.tabIndex = k === i ? 0 : -1;
    });
    panel.setAttribute("aria-label", buttons[i].textContent);
    panel.replaceChildren(...entries[i][1]());
  }
  buttons.forEach((button, i) => {
    button.addEventListener("click", () => open(i));
    button.addEventListener("keydown", (event) => {
      const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!by) return;
      event.preventDefault();
      const to = (i + by + buttons.length) % buttons.length;
      open(to);
      buttons[to].focus();
    });
  });
  const node = el("div", {}, el("div", { role: "tablist", class: "tabs", "aria-label": label }, ...buttons), panel);
  open(0);
  return { node, redraw: () => open(opened) };
}

// A table of heads and rows; the first cell of a row is its head.
const grid = (heads, rows, attributes = {}) =>
  el("table", { class: "grid", ...attributes },
    el("thead", {}, el("tr", {}, ...heads.map((head) => el("th", { scope: "col" }, head)))),
    el("tbody", {}, ...rows.map(([first, ...rest]) =>
      el("tr", {}, el("th", { scope: "row" }, first), ...rest.map((cell) => el("td", {}, cell))))));

// A bar of a table cell: part of the largest, to the left of zero where it is negative.
function meter(value, largest, label, signed = false) {
  const bar = el("i", { "aria-hidden": "true", class: value < 0 ? "low" : "" });
  const width = Math.abs(value) / (largest || 1);
  bar.style.width = `${(signed ? 50 : 100) * width}%`;
  if (signed) bar.style.marginLeft = `${value < 0 ? 50 * (1 - width) : 50}%`;
  return el("span", { class: "meter" }, el("span", { class: "track", "aria-hidden": "true" }, bar), label);
}

// The tokens that output weights promote and suppress: of all sites, and of each where there are some.
// What they do to the logits is one path of many, and the note says so.
function promotedPart(data, unit) {
  const heading = el("h4", {}, "Next tokens its output weights promote and suppress");
  if (data.refused) return el("div", { class: "promoted" }, heading, el("p", { class: "note" }, visible(data.refused)));
  const chip = ([token, deviations, effect]) => el("bdi", { class: "word", title: title(deviations, effect) }, marked(token));
  const title = (deviations, effect) => `${number(deviations)} standard deviations from the mean token; effect ${number(effect)}`;
  const [up, down] = data.all;
  const most = Math.max(...[...up, ...down].map(([, deviations]) => Math.abs(deviations)), 1e-9);
  const bar = ([, deviations]) => meter(deviations, most, number(deviations));
  const all = () => (up.length
    ? [grid(["promoted", "\u03c3", "suppressed", "\u03c3"], up.map((entry, i) => [chip(entry), bar(entry), chip(down[i]), bar(down[i])]))]
    : [el("p", { class: "note" }, "None: it writes nothing.")]);
  const bySite = () => [grid(["site", "promoted", "suppressed"], data.sites.map(([site, ...sides]) =>
    [el("span", { class: "name" }, site), ...sides.map((side) => el("span", { class: "words" }, ...side.map(chip)))]))];
  const entries = [["All sites", all], ...(data.sites.length ? [["By site", bySite]] : [])];
  return el("div", { class: "promoted" }, heading, ...(data.sites.length ? [tabs("Sites", entries).node] : all()),
    el("p", { class: "note" }, `The direct path of ${unit} above zero: output weights, the final norm\u2019s linear part, unembedding ` +
      "(direct logit attribution, the logit lens of a direction), from the mean over all tokens, in standard deviations (\u03c3) of theirs. " +
      "Below zero the two change places. Not in it: the norm\u2019s division, and what later attention and FFNNs make of it, which can be more and opposite."));
}

// The tokens of a text: pointing at one, or going there with the arrow keys, tells of it. With Shift
// the arrow keys select a span. An item has a node and the word on it; describe returns [name, value]s.
class Walk {
  constructor(node, tip, describe, select = () => {}) {
    Object.assign(this, { node, tip, describe, select, items: [], at: -1, anchor: -1 });
    node.addEventListener("pointerover", (event) => {
      const index = this.places.get(event.target);
      if (index === undefined) tip.hide();
      else this.point(index, false);
    });
    node.addEventListener("pointerleave", () => tip.hide());
    node.addEventListener("scroll", () => this.at < 0 && tip.hide());
    node.addEventListener("blur", () => {
      this.leave();
      tip.hide();
    });
    node.addEventListener("keydown", (event) => {
      const last = this.items.length - 1;
      const to = { ArrowRight: this.at + 1, ArrowLeft: this.at - 1, Home: 0, End: last }[event.key];
      if (to === undefined || last < 0) return;
      event.preventDefault();
      const from = this.anchor < 0 ? Math.max(0, this.at) : this.anchor;
      this.goTo(Math.max(0, Math.min(last, to)));
      this.anchor = event.shiftKey ? from : -1;
      if (event.shiftKey) this.select(Math.min(from, this.at), Math.max(from, this.at));
    });
  }
  set(items) {
    this.items = items;
    this.places = new Map(items.map((item, i) => [item.node, i]));
    this.at = this.anchor = -1;
    this.tip.hide();
  }
  leave() {
    if (this.at >= 0) this.items[this.at].node.classList.remove("here");
    this.at = this.anchor = -1;
  }
  point(index, voice) {
    const { node } = this.items[index];
    const word = this.items[index].word || "(no text of its own)";
    const lines = this.describe(this.items[index]);
    this.tip.show(node, el("b", {}, el("bdi", {}, marked(word))),
      ...lines.map(([name, value]) => el("div", {}, `${name}: ${value}`)));
    if (voice) this.tip.say([marked(word), ...lines.map(([name, value]) => `${name} ${value}`)].join("; "));
  }
  goTo(index) {
    this.leave();
    this.at = index;
    const { node } = this.items[index];
    node.classList.add("here");
    const at = node.getClientRects()[0].top - this.node.getBoundingClientRect().top;
    if (at < 20 || at > this.node.clientHeight - 40) this.node.scrollTop += at - this.node.clientHeight / 2;
    this.point(index, true);
  }
}

// Follow the surface the view stands on: a notebook's theme need not be the system's. Where all is
// transparent, as in VS Code, the notebook says of itself what it is.
function themeOf(host) {
  for (let node = host.parentElement; node; node = node.parentElement) {
    const parts = getComputedStyle(node).backgroundColor.match(/[\d.]+/g);
    if (!parts || (parts.length > 3 && Number(parts[3]) < 0.5)) continue;
    const [r, g, b] = parts.map(Number);
    return 0.299 * r + 0.587 * g + 0.114 * b < 128 ? "dark" : "light";
  }
  const { body, documentElement } = document;
  if (body.matches(".vscode-dark, .vscode-high-contrast:not(.vscode-high-contrast-light), [data-jp-theme-light=false]")) return "dark";
  if (body.matches(".vscode-light, .vscode-high-contrast-light, [data-jp-theme-light=true]")) return "light";
  return { dark: "dark", light: "light" }[documentElement.getAttribute("theme")] ?? "";
}

function mount(id, style, data) {
  for (const host of document.querySelectorAll(`[data-actstore-view="${id}"]`)) {
    if (host.shadowRoot) continue;
    const root = host.attachShadow({ mode: "open" });
    const view = el("section", { class: "view", "aria-label": visible(data.title) });
    root.append(el("style", {}, style + SHADE_STYLE), view);
    const adopt = () => {
      host.style.colorScheme = themeOf(host);
    };
    adopt();
    host.addEventListener("pointerenter", adopt);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", adopt);
    new MutationObserver(adopt).observe(document.body, { attributes: true });
    view.append(el("header", {}, el("h2", {}, visible(data.title)), facts(data.facts)));
    draw(view, data);
  }
}
