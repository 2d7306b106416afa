"""The similarity view: a heat map of all pairs of sites."""

from __future__ import annotations

import math
from typing import Any

from actstore.decompose import Similarity
from actstore.site import Site
from actstore.store import CoreStore
from actstore.view.page import PlainTable, View

_LARGE_CHANNEL = 0.5
"""From this share of a site's variance on, one channel decides the value, and the view says so."""


def similarity_view(store: CoreStore, similarity: Similarity) -> View:
    """Return a heat map of the similarity of all pairs of sites.

    Values are shaded and printed; pointing at a cell, or going there with the arrow keys, says its
    interval and what to be wary of. Memory and page grow with the square of the number of sites.

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
    sites = sorted({Site.parse(name) for pair in pairs for name in pair})
    names = [str(site) for site in sites]
    cells = [[_cell(pairs, a, b) for b in names] for a in names]
    summary = similarity.summary
    measure = str(summary.get("measure", "similarity")).upper()
    title = f"{measure} between {len(sites)} sites of {store.meta.model.get('name', store.path)}"
    return View(
        title,
        "similarity",
        {
            "measure": measure,
            "sites": [
                {"name": str(site), "family": site.family, "layer": site.layer} for site in sites
            ],
            "cells": cells,
            "facts": _facts(summary),
        },
        PlainTable(
            title,
            ["site", *names],
            [
                [name, *("" if c["value"] is None else f"{c['value']:.2f}" for c in row)]
                for name, row in zip(names, cells, strict=True)
            ],
        ),
    )


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else round(float(value), 5)


def _cell(pairs: dict[tuple[str, str], dict[str, Any]], a: str, b: str) -> dict[str, Any]:
    pair, swapped = pairs.get((a, b)), False
    if pair is None:
        pair, swapped = pairs.get((b, a), {}), True
    shares = [pair.get("max_channel_share_a"), pair.get("max_channel_share_b")]
    if swapped:
        shares.reverse()
    notes = [
        f"{share:.0%} of the variance of {name} is one channel's"
        for name, share in dict(zip((a, b), shares, strict=True)).items()
        if share is not None and share >= _LARGE_CHANNEL
    ]
    return {
        "value": _finite(pair.get("value")),
        "low": _finite(pair.get("low")),
        "high": _finite(pair.get("high")),
        "note": "; ".join(notes),
    }


def _facts(summary: dict[str, Any]) -> list[list[str]]:
    facts = []
    if "n_rows" in summary:
        facts.append(["rows", f"{summary['n_rows']:,} ({summary.get('rows', 'content')})"])
    if "n_batches" in summary:
        facts.append(["batches", f"{summary['n_batches']:,}"])
    return [*facts, ["result", str(summary.get("name", ""))]] if summary.get("name") else facts
