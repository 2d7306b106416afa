// The overview: what a store holds, in tables; sites by layer as bars of their root mean square.

function draw(view, data) {
  const tip = new Tip(view);
  const section = (title, ...nodes) => el("div", {}, el("h4", {}, title), ...nodes);
  const isolated = (text) => el("bdi", {}, visible(text));
  const list = (pairs) => grid(["", ""], pairs.map(([name, value]) => [name, isolated(value)]), { class: "grid plain" });

  // One bar a layer, as high as its root mean square is beside the largest of the group.
  function layers(sites) {
    const most = Math.max(...sites.map(([, rms]) => rms ?? 0), 1e-30);
    const step = Math.min(12, 100 / sites.length);
    const words = ([site, rms, silent]) => `${site}: ` + (rms === null ? "not indexed"
      : `root mean square ${number(rms)}${silent ? `, ${counted(silent, "neuron")} never above zero` : ""}`);
    const bars = sites.map((site, i) => {
      const height = Math.max(0.5, 24 * (site[1] ?? 0) / most);
      const bar = svg("rect", { x: i * step, y: 24 - height, width: step * 0.78, height });
      bar.addEventListener("pointerenter", () => tip.show(bar, words(site)));
      bar.addEventListener("pointerleave", () => tip.hide());
      return bar;
    });
    return svg("svg", { class: "layers", viewBox: "0 0 100 24", preserveAspectRatio: "none", role: "img",
      "aria-label": sites.map(words).join("; ") }, ...bars, svg("line", { x1: 0, x2: 100, y1: 24, y2: 24 }));
  }

  const done = el("i", {});
  done.style.width = `${100 * data.done}%`;
  const silent = (sites) => sites.reduce((sum, [, , n]) => sum + (n ?? 0), 0);
  view.append(
    ...data.warnings.map((text) => el("p", { class: "warning" }, text)),
    ...(data.done < 1 ? [el("span", { class: "fill", role: "img", "aria-label": `${percent(data.done)} of the planned rows are captured` }, done)] : []),
    el("div", { class: "parts" },
      section("Model", list(data.model)),
      section("Corpus", list(data.corpus)),
      el("div", { class: "wide" }, el("h4", {}, "Sites"),
        el("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": "Sites" },
          grid(["sites", "neurons each", "dtype", "kept", "on disk", "root mean square by layer", "never above zero", "captured at"],
            data.sites.map((group) => [el("span", { class: "name" }, group.sites), number(group.width), group.dtype, group.kept, group.size,
              layers(group.layers), group.layers.some(([, rms]) => rms !== null) ? number(silent(group.layers)) : "not indexed",
              el("code", {}, visible(group.module))])))),
      el("div", { class: "wide" }, el("h4", {}, "Results"),
        ...(data.results.length
          ? [el("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": "Results" },
            grid(["name", "kind", "what", "sites", "made (UTC)", "to open it"], data.results.map((result) =>
              [isolated(result.name), result.kind, result.what, result.sites, result.created, el("code", {}, result.code)])))]
          : [el("p", { class: "note" }, "None yet: store.nmf(), store.similarity().")])),
      el("div", { class: "wide" }, el("h4", {}, "Some documents"),
        grid(["document", "tokens", "it begins"], data.documents.map((doc) => [
          isolated(doc.source || `document ${doc.document}`), number(doc.n_tokens),
          el("bdi", { class: "snippet", dir: "auto" }, visible(doc.text), doc.cut ? "…" : "")])))));
}
