// The factor view: an overview of all factors, one document shaded by the factor that is shown, and
// what that factor is made of. Hovering shows a factor; a click or an arrow key chooses it. A span of
// text that is selected tells which factors stand out there.

function draw(view, data) {
  const { factors, sites, documents, signed, other } = data;
  const tip = new Tip(view);
  let chosen = 0, shown = 0, against = -1, current = null, query = "", marks = false;

  // -- what a document holds ----------------------------------------------------------------------

  function open(index) {
    const source = documents[index];
    const codes = bytes(source.scores);
    const n = source.cuts.length / 2;
    const rows = [];
    for (const [first, count] of source.rows) {
      for (let i = 0; i < count; i++) rows.push(first + i);
    }
    return { ...source, index, codes, n, row_ids: rows };
  }
  const score = (factor, token, doc = current) =>
    valueOf(doc.codes[factor * doc.n + token], factors[factor].max, signed);
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
    const zero = signed ? 12 : 24;
    const at = (value) => (zero - zero * Math.max(-1, Math.min(1, value / factors[factor].scale))).toFixed(1);
    let path = `M0 ${zero}`, below = `M0 ${zero}`;
    for (let bin = 0; bin < bins; bin++) {
      let top = 0, bottom = 0;
      const stop = Math.floor((bin + 1) * current.n / bins);
      for (let i = Math.floor(bin * current.n / bins); i < stop; i++) {
        const value = score(factor, i) ?? 0;
        top = Math.max(top, value);
        bottom = Math.min(bottom, value);
      }
      const end = `H${(100 * (bin + 1) / bins).toFixed(1)}`;
      path += `V${at(top)}${end}`;
      below += `V${at(bottom)}${end}`;
    }
    node.replaceChildren(svg("path", { d: `${path}V${zero}Z` }), ...(signed ? [svg("path", { class: "low", d: `${below}V${zero}Z` })] : []),
      svg("line", { x1: 0, x2: 100, y1: zero, y2: zero }));
  }

  const badges = (factor) => factor.badges.map(([name, words]) => el("span", { class: "badge", title: words }, name));

  const sparks = factors.map(() =>
    svg("svg", { class: "spark", viewBox: "0 0 100 24", preserveAspectRatio: "none", "aria-hidden": "true" }));
  const options = factors.map((factor, i) => {
    const words = factor.tokens.map(marked);
    return el("li", {
      class: "factor", role: "option", id: `factor-${i}`, "aria-selected": "false",
      "aria-label": `Factor ${factor.factor}: ${percent(factor.share)} of energy, ` +
        `${number(factor.effective_neurons)} effective neurons; top tokens ${words.join(", ")}` +
        factor.badges.map(([name, words]) => `; ${name}: ${words}`).join(""),
    },
    el("span", { class: "number right" }, String(factor.factor)),
    el("span", { class: "right" }, percent(factor.share)),
    el("span", { class: "right" }, number(factor.effective_neurons)),
    siteStrip(factor), sparks[i],
    el("span", { class: "tokens" }, ...badges(factor), ...words.map((word) => el("bdi", {}, word))));
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
  const found = el("div", { class: "found" });
  const walk = new Walk(text, tip, describe, selectSpan);
  let spans = [];

  // Tokens that share a character (bytes of one emoji) are one span, shaded by the strongest. A token
  // that is nothing but the space before the next word has that space.
  function drawText() {
    spans = [];
    const pieces = [];
    let end = 0;
    for (let i = 0; i < current.n; i++) {
      const [gap, length] = current.cuts.slice(2 * i, 2 * i + 2);
      if (gap + length === 0) {
        if (spans.length) spans.at(-1).tokens.push(i);
        continue;
      }
      const start = length ? end + gap : end;
      if (start > end) pieces.push(spaced(current.text.slice(end, start), marks));
      end += gap + length;
      const word = current.text.slice(start, end);
      const node = el("span", {}, spaced(word, marks));
      spans.push({ node, word, start, end, tokens: [i] });
      pieces.push(node);
    }
    pieces.push(spaced(current.text.slice(end), marks));
    text.replaceChildren(...pieces);
    if (current.n < current.n_tokens) {
      text.append(el("em", { class: "soft" }, current.n
        ? ` … (the first ${number(current.n)} of ${counted(current.n_tokens, "token")})`
        : " (none of its tokens is captured yet)"));
    }
    text.setAttribute("aria-label", `Text of ${visible(named(current))}; left and right arrow keys go from token to token, with Shift they select`);
    walk.set(spans);
    tellOfSpan(-1, -1);
  }

  // The score that is furthest from zero.
  function strongest(factor, span) {
    let best = null;
    for (const token of span.tokens) {
      const value = score(factor, token);
      if (value !== null && (best === null || Math.abs(value) > Math.abs(best))) best = value;
    }
    return best;
  }
  const levelOf = (factor, span) => (strongest(factor, span) ?? 0) / factors[factor].scale;

  function shade() {
    const two = against >= 0 && against !== shown;
    for (const span of spans) {
      const level = two ? levelOf(shown, span) - levelOf(against, span) : levelOf(shown, span);
      span.node.className = shadeOf(level) + (span.hit ? " hit" : "") + (span.chosen ? " span" : "");
    }
    if (walk.at >= 0) spans[walk.at].node.classList.add("here");
  }

  function describe(span) {
    const ranked = factors.map((_, i) => [strongest(i, span), i]).filter(([value]) => value)
      .sort((a, b) => Math.abs(b[0]) / factors[b[1]].scale - Math.abs(a[0]) / factors[a[1]].scale).slice(0, 3);
    const lines = [["row_id", span.tokens.map((i) => current.row_ids[i]).join(", ") + `, token ${number(span.tokens[0])} of the document`]];
    for (const factor of against < 0 || against === shown ? [shown] : [shown, against]) {
      const value = strongest(factor, span);
      lines.push([`factor ${factors[factor].factor}`, value === null ? "no score (it is not among the rows of the factors)" : number(value)]);
    }
    if (ranked.length) lines.push(["strongest here", ranked.map(([v, i]) => `factor ${factors[i].factor} (${number(v)})`).join(", ")]);
    return lines;
  }

  // -- a span of it -------------------------------------------------------------------------------

  function selectSpan(first, last) {
    spans.forEach((span, i) => {
      span.chosen = i >= first && i <= last;
    });
    shade();
    tellOfSpan(first, last);
  }

  function tellOfSpan(first, last) {
    if (first < 0) {
      found.replaceChildren(el("p", { class: "note" },
        "Select a span of the text, with the mouse or with Shift and the arrow keys, to see what stands out there."));
      return;
    }
    const chosenSpans = spans.slice(first, last + 1);
    const tokens = chosenSpans.flatMap((span) => span.tokens);
    const ranked = factors.map((factor, i) => {
      const held = tokens.map((token) => score(i, token)).filter((value) => value !== null);
      const mean = held.reduce((sum, value) => sum + value, 0) / (held.length || 1);
      return { i, factor, mean, n: held.length, above: factor.std > 0 ? (mean - factor.mean) / factor.std : 0 };
    }).filter(({ n, above }) => n && above > 0).sort((a, b) => b.above - a.above).slice(0, 5);
    const words = marked(current.text.slice(chosenSpans[0].start, chosenSpans.at(-1).end));
    const title = `What stands out at ${counted(tokens.length, "token")}`;
    const choices = ranked.map(({ i, factor, mean, above }) => {
      const button = el("button", { type: "button" }, `factor ${factor.factor}`);
      button.addEventListener("click", () => choose(i));
      return [button, number(mean), number(factor.mean), meter(above, ranked[0].above, `${number(above)} σ`),
        el("span", { class: "optional" }, ...strongNeurons(factor))];
    });
    found.replaceChildren(
      el("h4", {}, title, " ", el("bdi", { class: "quote" }, words.length > 60 ? `${words.slice(0, 59)}…` : words)),
      ranked.length
        ? grid(["factor", "mean score here", "in all shown documents", "above it, in standard deviations", el("span", { class: "optional" }, "its strongest neurons")], choices)
        : el("p", { class: "note" }, "No factor is above its mean over the shown documents here."),
      ...neuronsAt(tokens));
    tip.say(`${title}: ${ranked.map(({ factor, above }) => `factor ${factor.factor}, ${number(above)} standard deviations`).join("; ") || "no factor"}`);
  }

  // The neurons that are among the strongest at most of some tokens, by the sum of their deviations.
  function neuronsAt(tokens) {
    if (!data.strong) {
      return [el("p", { class: "note" }, "For the neurons that stand out too, look at fewer documents of a store that keeps all rows: factors.view(document=…).")];
    }
    const { n, step } = data.strong;
    current.strongest ??= bytes(current.strong);
    const sums = new Map();
    for (const token of tokens) {
      for (let at = 4 * n * token; at < 4 * n * (token + 1); at += 4) {
        const [a, b, c, steps] = current.strongest.subarray(at, at + 4);
        if (!steps) continue;
        const neuron = a + 256 * b + 65536 * c;
        const [sum, most, count] = sums.get(neuron) ?? [0, 0, 0];
        sums.set(neuron, [sum + steps * step, Math.max(most, steps * step), count + 1]);
      }
    }
    const ranked = [...sums].sort((x, y) => y[1][0] - x[1][0]).slice(0, 5);
    if (!ranked.length) return [];
    const most = Math.max(...ranked.map(([, [, top]]) => top));
    return [grid(["neuron", "among the three strongest at", "most above its mean, in standard deviations"], ranked.map(([neuron, [, top, count]]) =>
      [neuronName(neuron), `${count} of ${counted(tokens.length, "token")}`, meter(top, most, `${number(top)} σ`)]))];
  }
  function neuronName(neuron) {
    let rest = neuron;
    for (const site of sites) {
      if (rest < site.width) return `${site.name}:${rest}`;
      rest -= site.width;
    }
    return "";
  }

  // The neurons of a factor with the largest loadings, whatever their site.
  const strongNeurons = (factor) => factor.neurons
    .flatMap(([site, , neurons]) => neurons.map(([neuron, loading]) => [loading, `${sites[site].name}:${neuron}`]))
    .sort((a, b) => Math.abs(b[0]) - Math.abs(a[0])).slice(0, 3).map(([, name]) => el("span", { class: "neuron" }, name));

  // What the mouse, or a finger, selected: in a shadow tree browsers tell of it in different ways.
  function selectedRange() {
    const root = view.getRootNode();
    const selection = root.getSelection ? root.getSelection() : document.getSelection();
    if (!selection || selection.rangeCount === 0) return null;
    const range = document.createRange();
    const found = !root.getSelection && selection.getComposedRanges
      ? selection.getComposedRanges({ shadowRoots: [root] })[0] : selection.getRangeAt(0);
    range.setStart(found.startContainer, found.startOffset);
    range.setEnd(found.endContainer, found.endOffset);
    return range.collapsed || !text.contains(range.commonAncestorContainer) ? null : range;
  }
  text.addEventListener("pointerup", () => setTimeout(() => {
    const range = selectedRange();
    if (!range) {
      if (spans.some((span) => span.chosen)) selectSpan(-1, -1);
      return;
    }
    const inside = spans.map(({ node }, i) => [node, i]).filter(([node]) => {
      if (!range.intersectsNode(node)) return false;
      const startsBehind = node.contains(range.startContainer) && range.startOffset === range.startContainer.length;
      const endsBefore = node.contains(range.endContainer) && range.endOffset === 0;
      return !startsBehind && !endsBefore;
    });
    if (inside.length) selectSpan(inside[0][1], inside.at(-1)[1]);
  }));

  // -- choosing a document ------------------------------------------------------------------------

  function list_documents() {
    const wanted = query.toLowerCase();
    const listed = documents.map((doc, i) => [doc, i]).filter(([doc]) =>
      !wanted || named(doc).toLowerCase().includes(wanted) || doc.text.toLowerCase().includes(wanted));
    select.replaceChildren(...listed.map(([doc, i]) =>
      el("option", { value: i }, `${marked(named(doc)).replaceAll("\u2423", " ")} (${counted(doc.n_tokens, "token")})`)));
    count.textContent = wanted
      ? `${listed.length} of ${documents.length} match` : data.documents_note;
    return listed.map(([, i]) => i);
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
    text.scrollTop = 0;
    mark();
    shade();
  }

  select.addEventListener("change", () => {
    openDocument(Number(select.value));
    tip.say(`${named(current)} is shown`);
  });
  search.addEventListener("input", () => {
    query = search.value.trim();
    const listed = list_documents();
    const index = listed.includes(current.index) || !listed.length ? current.index : listed[0];
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
    drawLegend();
    shade();
  }

  function drawLegend() {
    const { factor, scale: top } = factors[shown];
    if (against >= 0 && against !== shown) {
      const second = factors[against].factor;
      legend.replaceChildren(
        el("span", {}, el("b", {}, `Factor ${factor} less factor ${second}`), ", each as part of its own scale",
          el("br"), el("u", {}, "underlined"), `: much more of ${factor}; `, el("u", { class: "low" }, "dotted"), `: of ${second}`),
        scale([`factor ${second}`, "alike", `factor ${factor}`], true));
      return;
    }
    legend.replaceChildren(
      el("span", {}, el("b", {}, `Score of factor ${factor}`), ", the same scale in all documents",
        el("br"), underlinedFrom(top, signed)),
      scale(signed ? [`\u2264\u202f\u2212${number(top)}`, "0", `\u2265\u202f${number(top)}`] : ["0", number(top / 2), `\u2265\u202f${number(top)}`], signed));
  }

  function neuronTable(factor) {
    const most = Math.max(...factor.neurons.map(([, share]) => share), 1e-9);
    return grid(["site", "share of the factor", "strongest neurons (loading)"], factor.neurons.map(([site, share, neurons]) => [
      el("span", { class: "name" }, sites[site].name), meter(share, most, percent(share)),
      el("span", {}, ...neurons.map(([neuron, loading]) =>
        el("span", { class: "neuron" }, String(neuron), el("span", { class: "soft" }, ` (${number(loading)})`)))),
    ]));
  }

  function goToRow(document, row_id) {
    const index = documents.findIndex((doc) => doc.document === document);
    query = search.value = "";
    list_documents();
    openDocument(index);
    const place = row_id === null ? -1 : current.row_ids.indexOf(row_id);
    const span = spans.findIndex((item) => item.tokens.includes(place));
    text.focus();
    if (span >= 0) walk.goTo(span);
  }
  const isShown = (document) => documents.some((doc) => doc.document === document);

  function exemplar({ row_id, value, bin, document, source, before, token, after }) {
    const button = el("button", isShown(document) ? { type: "button", title: "Show it in its document" } : { type: "button", disabled: "" },
      el("span", { class: "right" }, value.toPrecision(3)),
      el("bdi", { class: "snippet", dir: "auto" }, visible(before), el("b", {}, token.trim() ? visible(token) : marked(token)), visible(after)),
      el("span", { class: "where" }, el("bdi", {}, visible(source || `document ${document}`)), `, row_id ${row_id}`,
        bin === null ? "" : `, bin ${bin} of 10`));
    button.addEventListener("click", () => goToRow(document, row_id));
    return el("li", {}, button);
  }

  const word = (text) => el("bdi", { class: "word" }, marked(text));

  function typeTable(rows, by) {
    const top = Math.max(...rows.map(([, , mean, , share]) => (by === "mean" ? Math.abs(mean) : share)), 1e-9);
    const lifted = rows.some(([, , , lift]) => lift !== null); // signed scores have none
    return grid(["token type", "rows", "mean score", ...(lifted ? ["times the factor\u2019s mean"] : []), "share of its energy"],
      rows.map(([text, n, mean, lift, share]) => [
        word(text), number(n), by === "mean" ? meter(mean, top, number(mean)) : number(mean),
        ...(lifted ? [number(lift)] : []), by === "share" ? meter(share, top, percent(share)) : percent(share)]));
  }

  function documentTable(rows) {
    const top = Math.max(...rows.map(({ mean }) => Math.abs(mean)), 1e-9);
    return grid(["document", "rows", "mean score", "share of its energy"], rows.map(({ document, source, metadata, n, mean, share }) => {
      const name = el("button", isShown(document) ? { type: "button", title: "Show it", class: "link" } : { type: "button", class: "link", disabled: "" },
        el("bdi", {}, visible(source || `document ${document}`)));
      name.addEventListener("click", () => goToRow(document, null));
      return [el("span", {}, name, el("span", { class: "where" }, el("bdi", {}, visible(metadata)))),
        number(n), meter(mean, top, number(mean)), percent(share)];
    }));
  }

  // Means over the position in a window, as steps; what it says stands below in numbers.
  function positionChart(points) {
    const last = points.at(-1)[0] + (points.length > 1 ? points[1][0] - points[0][0] : 1);
    const high = Math.max(...points.map(([, mean]) => mean), 0), low = Math.min(...points.map(([, mean]) => mean), 0);
    const y = (mean) => (60 * (high - mean) / ((high - low) || 1)).toFixed(1);
    const path = points.map(([first, mean], i) =>
      `${i ? "V" : `M${(100 * first / last).toFixed(2)} `}${y(mean)}H${(100 * (points[i + 1]?.[0] ?? last) / last).toFixed(2)}`).join("");
    const peak = points.reduce((best, point) => (point[1] > best[1] ? point : best));
    return el("figure", {},
      el("div", { class: "axis" }, el("span", {}, number(high)), el("span", {}, number(low))),
      svg("svg", { class: "chart", viewBox: "0 0 100 60", preserveAspectRatio: "none", role: "img",
        "aria-label": `Mean score by position in the window: highest ${number(peak[1])} at position ${peak[0]}` },
      svg("line", { x1: 0, x2: 100, y1: y(0), y2: y(0) }), svg("path", { class: "step", d: path })),
      el("figcaption", {}, el("span", {}, String(points[0][0])), el("span", {}, `position in the window (tokens); highest mean score ${number(peak[1])} at ${peak[0]}`), el("span", {}, String(last - 1))));
  }

  // -- comparing ----------------------------------------------------------------------------------

  function correlation(a, b) {
    let n = 0, sa = 0, sb = 0, aa = 0, bb = 0, ab = 0;
    for (const doc of documents) {
      const length = doc.cuts.length / 2;
      doc.codes ??= bytes(doc.scores);
      for (let i = 0; i < length; i++) {
        const x = valueOf(doc.codes[a * length + i], 1, signed), y = valueOf(doc.codes[b * length + i], 1, signed);
        if (x === null || y === null) continue;
        n++; sa += x; sb += y; aa += x * x; bb += y * y; ab += x * y;
      }
    }
    const spread = Math.sqrt((aa - sa * sa / n) * (bb - sb * sb / n));
    return spread > 0 ? (ab - sa * sb / n) / spread : null;
  }

  function compareSection(index) {
    const choice = el("select", { "aria-label": "Compare with" }, el("option", { value: "-1" }, "no other factor"),
      ...factors.map((factor, i) => (i === index ? null : el("option", { value: i },
        `factor ${factor.factor}: cosine of loadings ${data.cosines[index][i].toFixed(2)}`))).filter(Boolean));
    choice.value = String(against);
    const facts = el("div", {});
    function tell() {
      if (against < 0) {
        facts.replaceChildren(el("p", { class: "note" }, "The text is then shaded by which of the two is stronger."));
        return;
      }
      const [a, b] = [factors[index], factors[against]];
      const r = correlation(index, against);
      const list = (factor) => el("span", { class: "words" }, ...factor.tokens.map(word));
      facts.replaceChildren(
        grid(["", `factor ${a.factor}`, `factor ${b.factor}`], [
          ["share of energy", percent(a.share), percent(b.share)],
          ["effective neurons", number(a.effective_neurons), number(b.effective_neurons)],
          ["top tokens", list(a), list(b)],
          ["strongest neurons", el("span", {}, ...strongNeurons(a)), el("span", {}, ...strongNeurons(b))],
        ]),
        el("p", { class: "note" }, `Cosine of their loadings ${data.cosines[index][against].toFixed(3)}; correlation of their scores over the shown documents ` +
          `${r === null ? "not defined" : r.toFixed(3)}.`));
    }
    choice.addEventListener("change", () => {
      against = Number(choice.value);
      tell();
      drawLegend();
      shade();
    });
    tell();
    const nearest = other ? [el("h4", {}, el("bdi", {}, `Nearest in the fit ${visible(other.name)}`)), nearestTable(index)] : [];
    return el("div", {}, el("h4", {}, "Compare with"), choice, facts, ...nearest);
  }

  function nearestTable(index) {
    const ranked = other.cosines[index].map((cosine, i) => [cosine, ...other.factors[i]]).sort((a, b) => b[0] - a[0]).slice(0, 3);
    return grid(["factor there", "cosine of loadings", "share of energy", "effective neurons"],
      ranked.map(([cosine, factor, share, neurons]) => [String(factor), meter(cosine, 1, cosine.toFixed(3)), percent(share), number(neurons)]));
  }

  function choose(index) {
    chosen = index;
    if (against === index) against = -1;
    options.forEach((option, i) => option.setAttribute("aria-selected", String(i === index)));
    list.setAttribute("aria-activedescendant", `factor-${index}`);
    const factor = factors[index];
    const section = (title, ...nodes) => el("div", {}, el("h4", {}, title), ...nodes);
    detail.setAttribute("aria-label", `Factor ${factor.factor}`);
    detail.replaceChildren(
      el("h3", {}, `Factor ${factor.factor} `, el("span", { class: "soft" },
        `${percent(factor.share)} of energy, ${number(factor.effective_neurons)} effective neurons`),
      ...factor.badges.map(([name, words]) => el("span", { class: "soft" }, el("span", { class: "badge" }, name), ` ${words}`))),
      el("div", { class: "columns" },
        el("div", {},
          section(factor.neurons.length < sites.length ? `The ${counted(factor.neurons.length, "site")} with the largest shares` : "Neurons by site", neuronTable(factor)),
          ...(factor.positions ? [section("Score over the position in a window", positionChart(factor.positions))] : []),
          ...(factor.documents ? [section("Documents with the highest mean scores, those of few rows last", documentTable(factor.documents))] : []),
          compareSection(index)),
        el("div", {},
          section("Rows in their context", tabs("Rows", factor.exemplars.map(([name, rows]) =>
            [name, () => [el("ol", { class: "exemplars" }, ...rows.map(exemplar))]])).node),
          ...(factor.promoted ? [promotedPart(factor.promoted, "a score")] : []),
          ...(factor.types ? [section("Token types", tabs("Token types", [
            ["By mean score", () => [typeTable(factor.types.mean, "mean")]],
            ["By share", () => [typeTable(factor.types.share, "share")]]]).node)] : []))));
    show(index);
  }

  const marksButton = toggle("Show spaces and token bounds", (on) => {
    marks = on;
    view.classList.toggle("marks", on);
    drawText();
    mark();
    shade();
  });
  view.append(
    el("div", { class: "columns" },
      el("div", {}, heads, list),
      el("div", {}, el("div", { class: "picker" },
        el("label", {}, el("span", {}, "Document: ", count), select),
        el("label", {}, "Search in sources and texts", search), marksButton), legend, text, found)),
    detail);
  list_documents();
  openDocument(0);
  choose(0);
}
