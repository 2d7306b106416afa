// The similarity view: a table of all pairs of sites, shaded by value; every cell can be reached by
// the arrow keys and says its value, interval and warnings.

function draw(view, data) {
  const { rows, columns, cells, measure } = data;
  const tip = new Tip(view);
  const starts = (k) => (k > 0 && columns[k].family !== columns[k - 1].family ? " starts" : "");
  function groupsOf(sites) {
    const groups = [];
    for (const site of sites) {
      if (groups.at(-1)?.family === site.family) groups.at(-1).size++;
      else groups.push({ family: site.family, size: 1 });
    }
    return groups;
  }

  const interval = ([low, high]) => `${low.toFixed(3)} to ${high.toFixed(3)}`;
  function describe(i, j) {
    const { value, store, text, null_mean, null_p95, ranks, weighed, note } = cells[i][j];
    const lines = [value === null ? `${measure}: no value` : `${measure} ${value.toFixed(3)}`];
    if (store) lines.push(store[0] < store[1] ? `95\u202f% interval, this store: ${interval(store)}` : "exact for the rows of this store");
    if (text) lines.push(`95\u202f% interval, text like this: ${interval(text)}`);
    if (null_mean !== null) {
      lines.push(`by chance (one side shifted by documents): ${null_mean.toFixed(3)}` +
        (null_p95 === null ? "" : `, below ${null_p95.toFixed(3)} in 95\u202f%`));
    }
    if (ranks) lines.push(`directions compared: ${ranks[0]} and ${ranks[1]}`);
    if (weighed) lines.push(`weighed by the directions of ${weighed}`);
    return note ? [...lines, `\u26a0 ${note}`] : lines;
  }

  const nodes = rows.map((row, i) => columns.map((column, j) => {
    const { value, note } = cells[i][j];
    const level = Math.max(0, Math.min(1, value ?? 0));
    const node = el("td", {
      role: "gridcell", tabindex: i + j === 0 ? "0" : "-1",
      class: (value === null ? "none" : shadeOf(level).split(" ")[0]) + (note ? " warn" : "") + starts(j),
      "aria-label": `${row.name} and ${column.name}: ${describe(i, j).join("; ")}`,
    });
    return node;
  }));
  const bodies = [];
  let first = 0;
  for (const group of groupsOf(rows)) {
    bodies.push(el("tbody", {}, ...nodes.slice(first, first + group.size).map((row, k) =>
      el("tr", { role: "row" },
        ...(k ? [] : [el("th", { scope: "rowgroup", rowspan: group.size, class: "group" }, group.size > 1 ? group.family : "")]),
        el("th", { scope: "row" }, group.size > 1 ? String(rows[first + k].layer) : rows[first].name), ...row))));
    first += group.size;
  }
  let j = 0;
  const groupHeads = groupsOf(columns).map((group) => {
    const head = el("th", { scope: "colgroup", colspan: group.size, class: "group" + starts(j) },
      group.size > 2 ? group.family : el("span", { class: "thin" }, group.family));
    j += group.size;
    return head;
  });
  const columnHeads = columns.map((site, k) => el("th", { scope: "col", class: starts(k), "aria-label": site.name }));
  const table = el("table", { role: "grid", "aria-label": `${data.title}; arrow keys go from cell to cell` },
    el("thead", {}, el("tr", {}, el("td", { class: "corner", colspan: "2" }), ...groupHeads),
      el("tr", {}, el("td", { class: "corner", colspan: "2" }, "layer"), ...columnHeads)),
    ...bodies);
  const heat = el("div", { class: "heat" }, table);

  function place(node) {
    const i = nodes.findIndex((row) => row.includes(node));
    return i < 0 ? null : [i, nodes[i].indexOf(node)];
  }
  function point(i, k, voice) {
    tip.show(nodes[i][k], el("b", {}, `${rows[i].name} and ${columns[k].name}`),
      ...describe(i, k).map((line) => el("div", {}, line)));
    if (voice) tip.say(nodes[i][k].getAttribute("aria-label"));
  }
  table.addEventListener("pointerover", (event) => {
    const at = place(event.target.closest("td"));
    if (at) point(...at, false);
    else tip.hide();
  });
  table.addEventListener("pointerleave", () => tip.hide());
  table.addEventListener("focusin", (event) => {
    const at = place(event.target);
    if (at) point(...at, false);
  });
  table.addEventListener("focusout", () => tip.hide());
  table.addEventListener("keydown", (event) => {
    const at = place(event.target);
    const by = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] }[event.key];
    if (!at || !by) return;
    event.preventDefault();
    const to = at.map((x, axis) => Math.max(0, Math.min((axis ? columns : rows).length - 1, x + by[axis])));
    nodes[at[0]][at[1]].tabIndex = -1;
    nodes[to[0]][to[1]].tabIndex = 0;
    nodes[to[0]][to[1]].focus();
  });

  // Cells as large as the width and one screen allow; values stand in them where they can be read.
  function fit() {
    const size = Math.max(9, Math.min(64, Math.floor(640 / rows.length), Math.floor((view.clientWidth - 76) / columns.length) - 1));
    table.style.setProperty("--cell", `${size}px`);
    nodes.forEach((row, i) => row.forEach((node, k) => {
      const { value } = cells[i][k];
      const digits = value === null || size < 20 ? "" : value.toFixed(2);
      node.textContent = size < 32 ? digits.replace("0.", ".").replace(".00", "").replace("1.00", "1") : digits;
    }));
    columnHeads.forEach((head, k) => {
      head.textContent = size >= 14 || columns[k].layer % 5 === 0 ? String(columns[k].layer) : "";
    });
    table.style.fontSize = size < 26 ? "9px" : "11px";
  }

  const warned = cells.some((row) => row.some((cell) => cell.note));
  const missing = cells.some((row) => row.some((cell) => cell.value === null));
  view.append(
    el("div", { class: "plate" }, heat,
      el("div", { class: "key" },
        el("div", {}, el("b", {}, `${measure} between two sites`), el("br"), scale(["0", "0.5", "1"])),
        ...(warned ? [el("p", {}, el("span", { class: "sample warn" }), data.warning)] : []),
        ...(missing ? [el("p", {}, el("span", { class: "sample none" }), "no value: a site is constant there")] : []),
        ...(data.reading ? [el("p", {}, visible(data.reading))] : []),
        el("p", {}, "Sites stand in the order of hook point and layer. Point at a cell, tap it, or go there with ",
          "the arrow keys, for its value, intervals and warnings."))));
  new ResizeObserver(fit).observe(view);
  fit();
}
