// The neuron view: how the values of one neuron are spread over all rows, the texts they occur in,
// and what goes with the neuron.

function draw(view, data) {
  const tip = new Tip(view);
  const { signed } = data;
  let marks = false;

  // -- the histogram ------------------------------------------------------------------------------

  // Bars stand where the values are and as high as rows are dense there, on a log scale: the bins are
  // finer near zero, where most rows are, so that counts alone would show the bins and not the rows.
  function histogram() {
    const bars = data.histogram;
    if (!bars.length) return el("p", { class: "note" }, "No values: all are NaN, or there are no content rows.");
    const low = bars[0][0], high = bars.at(-1)[1];
    const span = high - low || 1;
    const width = (bar) => Math.max(bar[1] - bar[0], span / 400);
    const density = bars.map((bar) => Math.log10(bar[2] / width(bar)));
    const top = Math.max(...density), bottom = Math.min(...density) - 0.5;
    const x = (value) => 100 * (value - low) / span;
    const nodes = bars.map((bar, i) => {
      const height = 60 * (density[i] - bottom) / (top - bottom || 1);
      const node = svg("rect", { x: x(bar[0]), y: 60 - height, width: Math.max(0.25, 100 * width(bar) / span), height, tabindex: i === 0 ? 0 : -1,
        role: "img", "aria-label": words(bar), class: bar[1] <= 0 ? "low" : "" });
      return node;
    });
    function words([a, b, n]) {
      return `${number(a)} to ${number(b)}: ${counted(n, "row")}, ${percent(n / data.n)}`;
    }
    const chart = svg("svg", { class: "chart bars", viewBox: "0 0 100 60", preserveAspectRatio: "none", role: "group",
      "aria-label": "Histogram; arrow keys go from bar to bar" }, ...nodes,
    ...(low < 0 && high > 0 ? [svg("line", { x1: x(0), x2: x(0), y1: 0, y2: 60 })] : []));
    const show = (i) => tip.show(nodes[i], words(bars[i]));
    chart.addEventListener("pointerover", (event) => {
      const i = nodes.indexOf(event.target);
      if (i >= 0) show(i);
      else tip.hide();
    });
    chart.addEventListener("pointerleave", () => tip.hide());
    chart.addEventListener("focusout", () => tip.hide());
    chart.addEventListener("keydown", (event) => {
      const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      const at = nodes.indexOf(event.target);
      if (!by || at < 0) return;
      event.preventDefault();
      const to = Math.max(0, Math.min(nodes.length - 1, at + by));
      nodes[at].setAttribute("tabindex", "-1");
      nodes[to].setAttribute("tabindex", "0");
      nodes[to].focus();
      show(to);
    });
    return el("figure", { class: "histogram" },
      el("div", { class: "axis" }, el("span", {}, "more"), el("span", { class: "turned" }, "rows (log scale)"), el("span", {}, "fewer")),
      chart,
      el("figcaption", {}, el("span", {}, number(low)), el("span", {}, `activation, over ${counted(data.n, "row")}${low < 0 && high > 0 ? "; dashed: zero" : ""}`), el("span", {}, number(high))));
  }

  // -- exemplars ----------------------------------------------------------------------------------

  function exemplar({ row_id, value, bin, edges, source, document, place, first, rows, tokens, values }) {
    const codes = bytes(values);
    const row_ids = rows.reduce((ids, step) => [...ids, ids.at(-1) + step], [first]);
    const items = [];
    const pieces = [];
    let held = null;
    tokens.forEach((token, i) => {
      // A token without characters of its own is a further byte of the one before.
      if (token === "" && held && i !== place) {
        held.tokens.push(i);
        return;
      }
      const body = token.trimStart();
      const gap = body ? token.slice(0, token.length - body.length) : "";
      if (gap) pieces.push(spaced(gap, marks));
      const known = valueOf(codes[i], data.max, signed);
      const node = el("span", { class: known === null ? "" : shadeOf(known / data.scale) }, spaced(body || token, marks));
      if (i === place) node.classList.add("own");
      held = { node, word: body || token, tokens: [i] };
      items.push(held);
      pieces.push(node);
    });
    const text = el("div", { class: "context", dir: "auto", tabindex: "0", role: "group",
      "aria-label": `value ${number(value)}: ${visible(tokens.join(""))}; arrow keys go from token to token` }, ...pieces);
    const walk = new Walk(text, tip, (item) => item.tokens.flatMap((i) => {
      const known = i === place ? value : valueOf(codes[i], data.max, signed);
      return [["row_id", String(row_ids[i])], ["value", known === null ? "not stored" : number(known)]];
    }));
    walk.set(items);
    return el("li", {}, el("span", { class: "right" }, number(value)), text,
      el("span", { class: "where" }, el("bdi", {}, visible(source || `document ${document}`)), `, row_id ${row_id}`,
        bin === null ? "" : `, bin ${bin} of 10 (${number(edges[0])} to ${number(edges[1])})`));
  }

  const exemplars = tabs("Rows", data.groups.map(([name, rows]) =>
    [name, () => [el("ol", { class: "exemplars rows" }, ...rows.map(exemplar))]]));
  const marksButton = toggle("Show spaces and token bounds", (on) => {
    marks = on;
    view.classList.toggle("marks", on);
    exemplars.redraw();
  });
  const top = number(data.scale);

  // -- what goes with it --------------------------------------------------------------------------

  const section = (title, ...nodes) => el("div", {}, el("h4", {}, title), ...nodes);
  const note = (text) => el("p", { class: "note" }, text);

  const fits = data.factors.map(({ result, kind, n_components, factors }) => {
    const most = Math.max(...factors.map(([, loading]) => Math.abs(loading)), 1e-9);
    const name = el("bdi", {}, visible(result));
    return el("div", { class: "fit" }, el("p", { class: "note" }, `${kind.toUpperCase()} `, name, `, ${counted(n_components, "factor")}`), factors.length
      ? grid(["factor", "loading", "place among its neurons"], factors.map(([factor, loading, rank]) =>
        [String(factor), meter(loading, most, number(loading)), number(rank)]))
      : note("It loads on none."));
  });

  function kin() {
    const { measure, words, neurons } = data.kin;
    const correlated = measure === "correlation";
    return section(correlated ? "Neurons that go with it" : "Neurons with overlapping exemplars",
      neurons.length
        ? grid(["neuron", correlated ? "correlation" : "Jaccard overlap"], neurons.map(([site, neuron, value]) =>
          [`${site}:${neuron}`, meter(value, 1, value.toFixed(3), correlated)]))
        : note(correlated ? "None: its values, or those of all others, do not vary." : "No other neuron shares any of its highest rows."), note(`${words}.`));
  }

  function means() {
    const { by, words, n_groups, rows } = data.means;
    const most = Math.max(...rows.map(([, , mean]) => Math.abs(mean)), 1e-9);
    const both = rows.some(([, , mean]) => mean < 0) && rows.some(([, , mean]) => mean > 0);
    const some = n_groups > rows.length ? ` The ${rows.length / 2} highest and lowest of ${number(n_groups)}.` : "";
    return section(el("span", {}, "Mean activation by ", el("bdi", {}, visible(by))),
      ...(rows.length
        ? [grid([el("bdi", {}, visible(by)), "rows", "mean"], rows.map(([key, n, mean]) =>
          [el("bdi", {}, marked(key).replaceAll("\u2423", " ")), number(n), meter(mean, most, number(mean), both)]))] : []),
      note(`Means ${words}.${some}`));
  }

  view.append(
    el("div", { class: "columns three" },
      el("div", {},
        section("All values", histogram()),
        el("dl", { class: "statistics" }, ...data.statistics.map(([name, value]) =>
          el("div", {}, el("dt", {}, name), el("dd", {}, value))))),
      el("div", {},
        el("div", { class: "legend" },
          el("span", {}, el("b", {}, "Activation"), ", the same scale in all texts", el("br"), underlinedFrom(data.scale, signed)),
          scale(signed ? [`\u2264\u202f\u2212${top}`, "0", `\u2265\u202f${top}`] : ["\u2264\u202f0", number(data.scale / 2), `\u2265\u202f${top}`], signed)),
        el("div", { class: "beside" }, note(`Values around a row: ${data.known}.` +
          (data.complete ? "" : " A token that is not shaded has no known value; the framed one is the row itself.")), marksButton),
        exemplars.node),
      el("div", {},
        section("Factors it loads on", ...(fits.length ? fits : [note("No decomposition of this site is in the store.")])),
        ...(data.promoted ? [promotedPart(data.promoted, "an activation")] : []),
        kin(), means())));
}
