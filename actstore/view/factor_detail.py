"""What one factor is made of, as the factor view shows it: neurons, exemplars, profiles, badges.

Tables that an older result lacks are left out of the view.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc

from actstore import arrow
from actstore.decompose import Factors
from actstore.query import snippets
from actstore.store import CoreStore
from actstore.view.cut import cut, cut_after, cut_before

_TOP_TOKENS = 8
_EXEMPLARS = 12
_SITES = 12
_NEURONS = 4
_TYPES = 15
_DOCUMENTS = 10
_POSITIONS = 128
_METADATA_CHARACTERS = 200

_GROUPS = {
    "top": "Highest",
    "window": "Highest, one a window",
    "bottom": "Lowest",
    "quantile": "Quantile bins",
    "random": "At random",
}
"""Sides of exemplars in the order of the view, and what they are called."""


def short(value: float, digits: int = 4) -> float:
    """Return a value to a few significant digits: what JSON carries is what the page shows."""
    return float(f"{value:.{digits}g}")


def details(store: CoreStore, factors: Factors, space: str) -> list[dict[str, Any]]:
    """Return what the view shows of each factor, in the order of the table ``factors``."""
    shares = _site_shares(factors)
    loadings = [factors.loadings_of(info.site) for info in factors.sites]
    exemplars = _exemplars(store, factors, space)
    positions, documents = _positions(factors), _documents(store, factors)
    types, stability = _types(store, factors), _stability(store, factors)
    badges = factors.badges()
    entries = []
    for row in factors.table("factors").to_pylist():
        k = int(row["factor"])
        entries.append(
            {
                "factor": k,
                "share": short(row["share"]),
                "effective_neurons": short(row["effective_neurons"]),
                "badges": _badges(badges[k], row, stability.get(k)),
                "sites": [short(share) for share in shares[k]],
                "neurons": _neurons([block[k] for block in loadings], shares[k]),
                "positions": positions.get(k),
                "documents": documents.get(k),
                "types": types.get(k),
                **exemplars[k],
            }
        )
    return entries


_MEANINGS = {
    "dead": "no row has a score",
    "few neurons": "{effective_neurons:.1f} effective neurons make it up",
    "positional": "{peak_position_share:.0%} of its energy lies at position {peak_position} of a "
    "window, {early_share:.0%} at the first four",
}


def _badges(
    names: Sequence[str], row: Mapping[str, Any], again: Mapping[str, Any] | None
) -> list[list[str]]:
    """Return short words about a factor, each with the numbers behind it."""
    found = [[name, _MEANINGS[name].format_map(row)] for name in names]
    if again is not None:
        cosine = again.get("split_cosine")
        what = "other documents"
        if cosine is None or math.isnan(cosine):
            cosine, what = again["seed_cosine"], "other seeds"
        chance = max(again["null_cosine"], again["runner_up_cosine"])
        found.append(
            [
                "stable" if again["stable"] else "not stable",
                f"cosine {cosine:.2f} between fits to {what}, {chance:.2f} by chance",
            ]
        )
    return found


def _tables(factors: Factors, name: str) -> dict[int, list[dict[str, Any]]]:
    """Return the rows of a table of the result by factor; none if it has no such table."""
    found: dict[int, list[dict[str, Any]]] = {}
    if f"{name}.parquet" in factors.result.files:
        for row in factors.table(name).to_pylist():
            found.setdefault(int(row["factor"]), []).append(row)
    return found


def _positions(factors: Factors) -> dict[int, list[list[float]]]:
    """Return [first position, mean] of stretches of positions, by factor."""
    found = {}
    for k, rows in _tables(factors, "factor_positions").items():
        place = np.array([row["position"] for row in rows], np.int64)
        n = np.array([row["n"] for row in rows], np.float64)
        mean = np.array([row["mean"] for row in rows], np.float64)
        width = max(1, -(-(int(place.max()) + 1) // _POSITIONS))
        stretch = place // width
        total = np.bincount(stretch, n)
        with np.errstate(invalid="ignore", divide="ignore"):
            means = np.bincount(stretch, np.where(n > 0, n * mean, 0)) / total
        held = np.flatnonzero(total > 0)
        found[k] = [[int(i) * width, short(means[i])] for i in held]
    return found


def _documents(store: CoreStore, factors: Factors) -> dict[int, list[dict[str, Any]]]:
    """Return the documents with the highest mean scores, by factor."""
    found = {}
    stored: dict[int, dict[str, Any]] = {}
    for k, rows in _tables(factors, "factor_documents").items():
        best = sorted(rows, key=lambda row: row["rank"])[:_DOCUMENTS]
        for row in best:
            number = int(row["document"])
            if number not in stored:
                stored[number] = store.document(number)
        found[k] = [
            {
                "document": int(row["document"]),
                "source": str(stored[row["document"]]["source"]),
                "metadata": _plain_metadata(stored[row["document"]].get("metadata")),
                "n": int(row["n"]),
                "mean": short(row["mean"]),
                "share": short(row["share"]),
            }
            for row in best
        ]
    return found


def _plain_metadata(text: str | None) -> str:
    """Return metadata as ``key: value`` pairs, cut where they are long."""
    try:
        pairs = json.loads(text or "{}")
    except ValueError:
        pairs = {}
    if not isinstance(pairs, dict):
        return ""
    return " · ".join(f"{key}: {value}" for key, value in pairs.items())[:_METADATA_CHARACTERS]


def _types(store: CoreStore, factors: Factors) -> dict[int, dict[str, list[list[Any]]]]:
    """Return the token types [text, n, mean, lift, share] that lead by mean and by share."""
    chosen = {
        k: {
            "mean": sorted(rows, key=lambda row: row["rank"])[:_TYPES],
            "share": sorted(rows, key=lambda row: (-row["share"], row["rank"]))[:_TYPES],
        }
        for k, rows in _tables(factors, "factor_tokens").items()
    }
    ids = [row["token_id"] for lists in chosen.values() for rows in lists.values() for row in rows]
    texts = token_texts(store, ids)

    def entry(row: dict[str, Any]) -> list[Any]:
        lift = row["lift"]
        lift = None if lift is None or math.isnan(lift) else short(lift, 3)
        mean, share = short(row["mean"]), short(row["share"])
        return [texts[row["token_id"]], int(row["n"]), mean, lift, share]

    return {
        k: {by: [entry(row) for row in rows] for by, rows in lists.items()}
        for k, lists in chosen.items()
    }


def _stability(store: CoreStore, factors: Factors) -> dict[int, dict[str, Any]]:
    """Return how stable each factor was found to be last, where a result says so."""
    if factors.result.kind != "nmf":
        return {}  # stability is of these; another kind may have a result of the same name
    # A name may be of other factors by now: deleted, and computed anew.
    own = (factors.name, factors.summary["created"])
    for result in reversed(store.results("stability")):
        if (result.document["factors"], result.document["factors_created"]) == own:
            return {int(row["factor"]): row for row in result.table("factor_stability").to_pylist()}
    return {}


def _site_shares(factors: Factors) -> npt.NDArray[np.float64]:
    place = {str(info.site): i for i, info in enumerate(factors.sites)}
    shares = np.zeros((factors.n_components, len(place)))
    for row in factors.table("factor_sites").to_pylist():
        shares[row["factor"], place[row["site"]]] = row["share"]
    return shares


def _neurons(
    loadings: Sequence[npt.NDArray[np.float32]], shares: npt.NDArray[np.float64]
) -> list[list[Any]]:
    """Return [site, share, [[neuron, loading], …]] of the sites that matter, in site order."""
    found = []
    for site in sorted(np.argsort(-shares, kind="stable")[:_SITES].tolist()):
        top = np.argsort(-np.abs(loadings[site]), kind="stable")[:_NEURONS]
        neurons = [[int(n), short(float(loadings[site][n]), 2)] for n in top]
        found.append([site, short(shares[site]), [pair for pair in neurons if pair[1] != 0]])
    return found


def _exemplars(store: CoreStore, factors: Factors, space: str) -> list[dict[str, Any]]:
    """Return each factor's top tokens, all different, and exemplars of every kind in context."""
    table = factors.table("factor_exemplars").sort_by("rank")
    top = table.filter(pc.equal(table.column("side"), "top"))
    text_of = token_texts(store, top.column("token_id").to_pylist())
    words: list[dict[str, str]] = [{} for _ in range(factors.n_components)]
    for row in top.to_pylist():
        word = text_of[row["token_id"]]
        words[row["factor"]].setdefault(word.strip().lower() or word, word.strip() or word)
    few = pc.less_equal(table.column("rank"), _EXEMPLARS)
    shown = table.filter(pc.or_(few, pc.equal(table.column("side"), "quantile")))
    texts = snippets(store, arrow.numbers(shown.column("row_id")), space=space)
    groups: list[dict[str, list[Any]]] = [{} for _ in range(factors.n_components)]
    for row, text in zip(shown.to_pylist(), texts, strict=True):
        groups[row["factor"]].setdefault(row["side"], []).append(
            {
                "row_id": row["row_id"],
                "value": short(row["value"]),
                "bin": row.get("bin"),
                "document": text.document,
                "source": text.source,
                "before": cut_before(text.before),
                "token": cut(text.token),
                "after": cut_after(text.after),
            }
        )
    return [
        {
            "tokens": list(found.values())[:_TOP_TOKENS],
            "exemplars": [[name, of[side]] for side, name in _GROUPS.items() if side in of],
        }
        for found, of in zip(words, groups, strict=True)
    ]


def token_texts(store: CoreStore, token_ids: Collection[int]) -> dict[int, str]:
    """Return the texts of token types; of one that the vocabulary lacks its number."""
    unique = sorted(set(token_ids))
    texts = store.texts_of(np.array(unique, np.int64)).to_pylist()
    return {
        i: f"token {i}" if text is None else cut(text)
        for i, text in zip(unique, texts, strict=True)
    }
