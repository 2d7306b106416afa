"""The similarity view: a heat map of all pairs of sites."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from actstore.counted import counted
from actstore.decompose import Similarity
from actstore.site import Site
from actstore.store import CoreStore
from actstore.view.page import PlainTable, View

_LARGE_CHANNEL = 0.2
"""Above this share of a site's variance one channel sways the value, and the view says so."""


def similarity_view(store: CoreStore, similarity: Similarity) -> View:
    """Return a heat map of the similarity of all pairs of sites.

    Values are shaded and printed; pointing at a cell, or going there with the arrow keys, says its
    intervals, what chance gives, and what to be wary of. Memory and page grow with the square of
    the number of sites.

    Parameters
    ----------
    store : CoreStore
        The store the result is of.
    similarity : Similarity
        The result.

    See Also
    --------
    factor_view : The view of a decomposition.
    """
    pairs = {(row["site_a"], row["site_b"]): row for row in similarity.to_arrow().to_pylist()}
    rows, columns = (sorted({Site.parse(pair[side]) for pair in pairs}) for side in (0, 1))
    cells = [[_cell(pairs[str(a), str(b)]) for b in columns] for a in rows]
    summary = similarity.summary
    measure = str(summary["measure"]).upper()
    model = store.meta.model.get("name", store.path)
    other = summary.get("other")
    title = f"{measure} between {counted(len(rows), 'site')} of {model}"
    names = [str(model), str(other.get("model") or other["path"])] if other else []
    if other:
        title += f" and {len(columns)} of {names[1]}"
    return View(
        title,
        "similarity",
        {
            "measure": measure,
            "reading": _reading(
                names, weighed=any("weighing_site" in pair for pair in pairs.values())
            ),
            "rows": [_site(site) for site in rows],
            "columns": [_site(site) for site in columns],
            "cells": cells,
            "warning": f"one channel has more than {_LARGE_CHANNEL:.0%} of a site's variance, and "
            "sways the value",
            "facts": _facts(summary),
        },
        PlainTable(
            title,
            ["site", *map(str, columns)],
            [
                [str(site), *("" if c["value"] is None else f"{c['value']:.2f}" for c in row)]
                for site, row in zip(rows, cells, strict=True)
            ],
        ),
    )


def _reading(names: list[str], *, weighed: bool) -> str:
    """Return what a row and a column are, where it matters."""
    found = []
    if names:
        found.append(f"Rows are sites of {names[0]} (this store), columns those of {names[1]}.")
    if weighed:
        found.append(
            "A cell is weighed by one of its two sites; the other way round it may differ."
        )
    return " ".join(found)


def _site(site: Site) -> dict[str, Any]:
    return {"name": str(site), "family": site.family, "layer": site.layer}


def _finite(value: float | None) -> float | None:
    return round(value, 5) if value is not None and math.isfinite(value) else None


def _interval(pair: Mapping[str, Any], low: str, high: str) -> list[float] | None:
    ends = [_finite(pair.get(low)), _finite(pair.get(high))]
    return None if None in ends else ends  # type: ignore[return-value]  # no None is left


def _cell(pair: Mapping[str, Any]) -> dict[str, Any]:
    shares = {pair[f"site_{side}"]: pair[f"max_channel_share_{side}"] for side in "ab"}
    notes = [
        f"{share:.0%} of the variance of {name} is one channel's"
        for name, share in shares.items()
        if share > _LARGE_CHANNEL  # NaN is not
    ]
    ranks = [pair.get("rank_a"), pair.get("rank_b")]
    return {
        "value": _finite(pair["value"]),
        "store": _interval(pair, "low", "high"),
        "text": _interval(pair, "text_low", "text_high"),
        "null_mean": _finite(pair.get("null_mean")),
        "null_p95": _finite(pair.get("null_p95")),
        "ranks": None if None in ranks else ranks,
        "weighed": pair.get("weighing_site"),
        "note": "; ".join(notes),
    }


def _facts(summary: Mapping[str, Any]) -> list[list[str]]:
    facts = [
        ["result", str(summary["name"])],
        ["rows", f"{summary['n_rows_read']:,} of {summary['n_rows']:,} ({summary['rows']})"],
    ]
    if other := summary.get("other"):
        facts.append(["other store", str(other["path"])])
    half = summary["half_width"]
    facts.append(["widest 95 % interval, this store", f"± {half:.4f}" if half else "none: exact"])
    return [*facts, ["warning", summary["warning"]]] if "warning" in summary else facts
