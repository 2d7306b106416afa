// The factor view: an overview of all factors, one document shaded by the factor that is shown, and
// what that factor is made of. Hovering shows a factor; a click or an arrow key chooses it.

const SHADES = 64; // classes of tokens: five times as fast to change as a style on each
const STRONG = 0.75; // of the scale: from here on a token is underlined too

function draw(view, data) {
  const { factors, sites, documents } = data;
  const tip = new Tip(view);
  let chosen = 0, shown = 0, current = null, query = "", cursor = -1;

  // -- what a document holds ----------------------------------------------------------------------

  function open(index) {
    const source = documents[index];
    const codes = Uint8Array.from(atob(source.scores), (c) => c.charCodeAt(0));
    const n = source.cuts.length / 2;
    const rows = [];
    for (const [first, count] of source.rows) {
      for (let i = 0; i < count; i++) rows.push(first + i);
    }
    return { ...source, index, codes, n, row_ids: rows };
  }
  // Code 0 is a row without a score; 1 to 255 are the square roots of 0 to the factor's maximum.
  function score(factor, token, doc = current) {
    const code = doc.codes[factor * doc.n + token];
    return code === 0 ? null : factors[factor].max * ((code - 1) / 254) ** 2;
  }
  const named = (doc) => doc.source || `document ${doc.document}`;

  // -- the overview -------------------------------------------------------------------------------

  function siteStrip(factor) {
    const gaps = sites.filter((site, i) => i > 0 && site.family !== sites[i - 1].family).length;
    const step = 100 / (sites.length + gaps);
    const largest = Math.max(...factor.sites, 1e-9);
    let x = -step;
    const bars = sites.map((site, i) => {
      x += i > 0 && site.family !== sites[i - 1].family ? 2 * step : step;
      const height = 24 * factor.sites[i] / largest;
      return svg("rect", { x, y: 24 - height, width: step * 0.78, height },
        svg("title", {}, `${site.name}: ${percent(factor.sites[i])}`));
    });
    return svg("svg", { class: "sites", viewBox: "0 0 100 24", preserveAspectRatio: "none", "aria-hidden": "true" },
      ...bars, svg("line", { x1: 0, x2: 100, y1: 24, y2: 24 }));
  }

  function drawSpark(node, factor) {
    const bins = Math.min(current.n, 120);
    let path = "M0 24";
    for (let bin = 0; bin < bins; bin++) {
      let top = 0;
      const stop = Math.floor((bin + 1) * current.n / bins);
      for (let i = Math.floor(bin * current.n / bins); i < stop; i++) top = Math.max(top, score(factor, i) ?? 0);
      const y = (24 - 24 * Math.min(1, top / factors[factor].scale)).toFixed(1);
      path += `V${y}H${(100 * (bin + 1) / bins).toFixed(1)}`;
    }
    node.replaceChildren(svg("path", { d: `${path}V24Z` }), svg("line", { x1: 0, x2: 100, y1: 24, y2: 24 }));
  }

  const sparks = factors.map(() =>
    svg("svg", { class: "spark", viewBox: "0 0 100 24", preserveAspectRatio: "none", "aria-hidden": "true" }));
  const options = factors.map((factor, i) => {
    const words = factor.tokens.map(marked);
    return el("li", {
      class: "factor", role: "option", id: `factor-${i}`, "aria-selected": "false",
      "aria-label": `Factor ${factor.factor}: ${percent(factor.share)} of energy, ` +
        `${number(factor.effective_neurons)} effective neurons; top tokens ${words.join(", ")}`,
    },
    el("span", { class: "number right" }, String(factor.factor)),
    el("span", { class: "right" }, percent(factor.share)),
    el("span", { class: "right" }, number(factor.effective_neurons)),
    siteStrip(factor), sparks[i],
    el("span", { class: "tokens" }, ...words.map((word) => el("bdi", {}, word))));
  });
  const list = el("ol", { class: "list", role: "listbox", tabindex: "0", "aria-label": "Factors" }, ...options);
  const heads = el("div", { class: "heads", "aria-hidden": "true" },
    el("span", { class: "right" }, "#"), el("span", { class: "right" }, "share of energy"),
    el("span", { class: "right" }, "effective neurons"), el("span", {}, "share by site"),
    el("span", {}, "score along the document"));

  const optionOf = (event) => options.indexOf(event.target.closest("[role=option]"));
  list.addEventListener("pointerover", (event) => {
    const i = optionOf(event);
    if (i >= 0) show(i);
  });
  list.addEventListener("pointerleave", () => show(chosen));
  list.addEventListener("click", (event) => {
    const i = optionOf(event);
    if (i >= 0) choose(i);
  });
  list.addEventListener("keydown", (event) => {
    const last = factors.length - 1;
    const to = { ArrowDown: chosen + 1, ArrowUp: chosen - 1, Home: 0, End: last }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    choose(Math.max(0, Math.min(last, to)));
    const option = options[chosen];
    const top = option.offsetTop - list.offsetTop;
    list.scrollTop = Math.min(top, Math.max(list.scrollTop, top + option.offsetHeight - list.clientHeight));
  });

  // -- the text -----------------------------------------------------------------------------------

  const select = el("select", {});
  const search = el("input", { type: "search", placeholder: "a word, or a source" });
  const count = el("span", {}, "");
  const legend = el("div", { class: "legend" });
  const text = el("div", { class: "text", tabindex: "0", role: "group", dir: "auto" });
  let spans = [];

  // Tokens that share a character (bytes of one emoji) are one span, shaded by the strongest.
  function drawText() {
    spans = [];
    const pieces = [];
    let end = 0;
    for (let i = 0; i < current.n; i++) {
      const start = end + current.cuts[2 * i];
      const length = current.cuts[2 * i + 1];
      if (length === 0) {
        if (spans.length) spans.at(-1).tokens.push(i);
        continue;
      }
      if (start > end) pieces.push(visible(current.text.slice(end, start)));
      end = start + length;
      const word = current.text.slice(start, end);
      const node = el("span", {}, visible(word));
      spans.push({ node, word, start, end, tokens: [i] });
      pieces.push(node);
    }
    pieces.push(visible(current.text.slice(end)));
    text.replaceChildren(...pieces);
    if (current.n < current.n_tokens) {
      text.append(el("em", { class: "soft" }, current.n
        ? ` … (the first ${number(current.n)} of ${number(current.n_tokens)} tokens)`
        : " (none of its tokens is captured yet)"));
    }
    text.scrollTop = 0;
    text.setAttribute("aria-label", `Text of ${visible(named(current))}; left and right arrow keys go from token to token`);
    cursor = -1;
    tip.hide();
  }

  function strongest(factor, span) {
    let best = null;
    for (const token of span.tokens) {
      const value = score(factor, token);
      if (value !== null && (best === null || value > best)) best = value;
    }
    return best;
  }

  function shade() {
    const top = factors[shown].scale;
    for (const span of spans) {
      const level = Math.min(1, (strongest(shown, span) ?? 0) / top);
      span.node.className = `s${Math.round(SHADES * level)}` + (level > DEEP ? " deep" : "") + (level >= STRONG ? " strong" : "");
      if (span.hit) span.node.classList.add("hit");
    }
    if (cursor >= 0) spans[cursor].node.classList.add("here");
  }

  function describe(span) {
    const ranked = factors.map((_, i) => [strongest(i, span), i]).filter(([value]) => value > 0)
      .sort((a, b) => b[0] / factors[b[1]].scale - a[0] / factors[a[1]].scale).slice(0, 3);
    const value = strongest(shown, span);
    const token = span.tokens[0];
    const lines = [
      ["row_id", span.tokens.map((i) => current.row_ids[i]).join(", ") + `, token ${number(token)} of the document`],
      [`factor ${factors[shown].factor}`, value === null ? "no score (it is not among the rows of the factors)" : number(value)],
    ];
    if (ranked.length) lines.push(["strongest here", ranked.map(([v, i]) => `factor ${factors[i].factor} (${number(v)})`).join(", ")]);
    return lines;
  }

  function point(index, voice) {
    const span = spans[index];
    const lines = describe(span);
    tip.show(span.node, el("b", {}, el("bdi", {}, marked(span.word))),
      ...lines.map(([name, value]) => el("div", {}, `${name}: ${value}`)));
    if (voice) tip.say([marked(span.word), ...lines.map(([name, value]) => `${name} ${value}`)].join("; "));
  }

  function goTo(index) {
    cursor = index;
    shade();
    const node = spans[index].node;
    const at = node.getClientRects()[0].top - text.getBoundingClientRect().top;
    if (at < 20 || at > text.clientHeight - 40) text.scrollTop += at - text.clientHeight / 2;
    point(index, true);
  }

  text.addEventListener("pointerover", (event) => {
    const index = spans.findIndex((span) => span.node === event.target);
    if (index >= 0) point(index, false);
    else tip.hide();
  });
  text.addEventListener("pointerleave", () => tip.hide());
  text.addEventListener("scroll", () => cursor < 0 && tip.hide());
  text.addEventListener("blur", () => {
    cursor = -1;
    shade();
    tip.hide();
  });
  text.addEventListener("keydown", (event) => {
    const to = { ArrowRight: cursor + 1, ArrowLeft: cursor - 1, Home: 0, End: spans.length - 1 }[event.key];
    if (to === undefined || !spans.length) return;
    event.preventDefault();
    goTo(Math.max(0, Math.min(spans.length - 1, to)));
  });

  // -- choosing a document ------------------------------------------------------------------------

  function list_documents() {
    const wanted = query.toLowerCase();
    const found = documents.map((doc, i) => [doc, i]).filter(([doc]) =>
      !wanted || named(doc).toLowerCase().includes(wanted) || doc.text.toLowerCase().includes(wanted));
    select.replaceChildren(...found.map(([doc, i]) =>
      el("option", { value: i }, `${marked(named(doc)).replaceAll("\u2423", " ")} (${number(doc.n_tokens)} tokens)`)));
    count.textContent = wanted
      ? `${found.length} of ${documents.length} match` : data.documents_note;
    return found.map(([, i]) => i);
  }

  function mark() {
    const wanted = query.toLowerCase();
    const places = [];
    const body = current.text.toLowerCase();
    // Lower case of a few letters is longer than they are; then places would be off, so none is marked.
    if (wanted && body.length === current.text.length) {
      for (let at = body.indexOf(wanted); at >= 0; at = body.indexOf(wanted, at + wanted.length)) places.push(at);
    }
    let k = 0;
    for (const span of spans) {
      while (k < places.length && places[k] + wanted.length <= span.start) k++;
      span.hit = k < places.length && places[k] < span.end;
    }
    const first = spans.find((span) => span.hit);
    if (first) text.scrollTop += first.node.getClientRects()[0].top - text.getBoundingClientRect().top - 60;
  }

  function openDocument(index) {
    current = open(index);
    select.value = String(index);
    sparks.forEach(drawSpark);
    drawText();
    mark();
    shade();
  }

  select.addEventListener("change", () => {
    openDocument(Number(select.value));
    tip.say(`${named(current)} is shown`);
  });
  search.addEventListener("input", () => {
    query = search.value.trim();
    const found = list_documents();
    const index = found.includes(current.index) || !found.length ? current.index : found[0];
    if (index === current.index) {
      select.value = String(index);
      mark();
      shade();
    } else openDocument(index);
  });

  // -- one factor ---------------------------------------------------------------------------------

  const detail = el("section", { class: "detail" });

  function show(index) {
    shown = index;
    options.forEach((option, i) => option.classList.toggle("shown", i === index));
    const { factor, scale: top } = factors[index];
    legend.replaceChildren(
      el("span", {}, el("b", {}, `Score of factor ${factor}`), ", the same scale in all documents",
        el("br"), el("u", {}, "underlined"), `: ${number(STRONG * top)} and more`),
      scale("0", number(top / 2), `\u2265\u202f${number(top)}`));
    shade();
  }

  function neuronTable(factor) {
    const most = Math.max(...factor.neurons.map(([, share]) => share), 1e-9);
    return el("table", {},
      el("thead", {}, el("tr", {}, ...["site", "share of the factor", "strongest neurons (loading)"]
        .map((head) => el("th", { scope: "col" }, head)))),
      el("tbody", {}, ...factor.neurons.map(([site, share, neurons]) => {
        const bar = el("i", { "aria-hidden": "true" });
        bar.style.width = `${3.6 * share / most}rem`;
        return el("tr", {}, el("th", { scope: "row" }, sites[site].name),
          el("td", { class: "share" }, bar, percent(share)),
          el("td", {}, ...neurons.map(([neuron, loading]) =>
            el("span", { class: "neuron" }, String(neuron), el("span", { class: "soft" }, ` (${number(loading)})`)))));
      })));
  }

  function exemplar({ row_id, value, document, source, before, token, after }) {
    const index = documents.findIndex((doc) => doc.document === document);
    const button = el("button", index < 0 ? { disabled: "" } : { title: "Show it in its document" },
      el("span", { class: "right" }, value.toPrecision(3)),
      el("bdi", { class: "snippet", dir: "auto" }, visible(before), el("b", {}, token.trim() ? visible(token) : marked(token)), visible(after)),
      el("span", { class: "where" }, el("bdi", {}, visible(source || `document ${document}`)), `, row_id ${row_id}`));
    button.addEventListener("click", () => {
      query = search.value = "";
      list_documents();
      openDocument(index);
      const place = current.row_ids.indexOf(row_id);
      const span = spans.findIndex((item) => item.tokens.includes(place));
      if (span < 0) return;
      text.focus();
      goTo(span);
    });
    return el("li", {}, button);
  }

  function choose(index) {
    chosen = index;
    options.forEach((option, i) => option.setAttribute("aria-selected", String(i === index)));
    list.setAttribute("aria-activedescendant", `factor-${index}`);
    const factor = factors[index];
    detail.setAttribute("aria-label", `Factor ${factor.factor}`);
    detail.replaceChildren(
      el("h3", {}, `Factor ${factor.factor} `, el("span", { class: "soft" },
        `${percent(factor.share)} of energy, ${number(factor.effective_neurons)} effective neurons`)),
      el("div", { class: "columns" },
        el("div", {}, el("h4", {}, factor.neurons.length < sites.length
          ? `The ${factor.neurons.length} sites with the largest shares` : "Neurons by site"), neuronTable(factor)),
        el("div", {}, el("h4", {}, "Rows with the highest scores"),
          el("ol", { class: "exemplars" }, ...factor.exemplars.map(exemplar)))));
    show(index);
  }

  view.append(
    el("style", {}, Array.from({ length: SHADES + 1 }, (_, i) => `.s${i}{--s:${i / SHADES}}`).join("")),
    el("header", {}, el("h2", {}, visible(data.title)), facts(data.facts)),
    el("div", { class: "columns" },
      el("div", {}, heads, list),
      el("div", {}, el("div", { class: "picker" },
        el("label", {}, el("span", {}, "Document: ", count), select),
        el("label", {}, "Search in sources and texts", search)), legend, text)),
    detail);
  list_documents();
  openDocument(0);
  choose(0);
}
