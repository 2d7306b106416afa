"""The factor view: all factors at a glance, and a text shaded by the one that is chosen."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from actstore.decompose import Factors
from actstore.errors import ArgumentError, RowNotFound
from actstore.query import snippets
from actstore.store import CoreStore
from actstore.view.documents import ShownDocument, choose, committed_windows, read
from actstore.view.page import PlainTable, View

_TOP_TOKENS = 8
_EXEMPLARS = 12
_SITES = 12
_NEURONS = 4
_SCALE_QUANTILE = 0.995
"""Where the colour scale ends, among the scores above 0: a few maxima would leave a page pale."""


def factor_view(
    store: CoreStore,
    factors: Factors,
    documents: int | Sequence[int] | None = None,
    max_documents: int = 50,
    *,
    max_tokens: int = 2048,
) -> View:
    """Return a view of a decomposition: every factor, and texts shaded by their scores.

    Reads the scores of the shown documents only. The page takes about `n_components` x 1.4 bytes a
    token for scores and 10 for text.

    Parameters
    ----------
    store : CoreStore
        The store the factors are of.
    factors : Factors
        The decomposition.
    documents : int or sequence of int, optional
        Documents to show; by default up to `max_documents`, spread evenly over the store.
    max_documents : int, default 50
        How many documents at most, where `documents` does not name them.
    max_tokens : int, default 2048
        How many tokens of a document at most, from its start; the view says where it stopped.

    Raises
    ------
    ArgumentError
        If no document is asked for, a limit is below 1, or the store has no committed rows.
    RowNotFound
        If the store has no such document.

    Notes
    -----
    Scores are embedded as one byte: the square root of the score over the factor's maximum in the
    shown documents, in 254 steps, so a small score is off by less than a large one.  The colour
    scale is linear in the score and the same in all documents.

    See Also
    --------
    similarity_view : The view of similarities between sites.
    """
    if max_tokens < 1:
        raise ArgumentError(f"max_tokens = {max_tokens} was given; expected at least 1.")
    space = factors.sites[0].site.space
    windows = committed_windows(store, space)
    chosen = choose(store, windows, documents, max_documents)
    shown = [read(store, document, windows, space, max_tokens) for document in chosen]
    scores = _scores(store, factors, np.concatenate([document.row_ids for document in shown]))
    largest, scale = _scales(scores)
    entries = _factors(store, factors, space)
    for entry, top, end in zip(entries, largest, scale, strict=True):
        entry["max"], entry["scale"] = _short(top, 6), _short(end, 6)
    name = store.meta.model.get("name", str(store.path))
    title = f"{factors.n_components} factors of {name}"
    n_held = len(np.unique(windows.column("document").to_numpy()))
    note = f"{len(shown):,} of {n_held:,}{'' if documents is not None else ', spread evenly'}"
    return View(
        title,
        "factors",
        {
            "facts": _facts(factors),
            "sites": [
                {"name": str(info.site), "family": info.site.family} for info in factors.sites
            ],
            "factors": entries,
            "documents": _documents(shown, scores, largest),
            "documents_note": f"all {n_held:,}" if len(shown) == n_held else note,
        },
        PlainTable(
            f"{title}. The whole view needs a page or a notebook that runs scripts.",
            ["factor", "share of energy", "effective neurons", "top tokens"],
            [
                [
                    str(entry["factor"]),
                    f"{entry['share']:.1%}",
                    f"{entry['effective_neurons']:,.0f}",
                    " · ".join(token.strip() for token in entry["tokens"]),
                ]
                for entry in entries
            ],
        ),
    )


def _short(value: float, digits: int = 4) -> float:
    """Return a value to a few significant digits: what JSON carries is what the page shows."""
    return float(f"{value:.{digits}g}")


def _facts(factors: Factors) -> list[list[str]]:
    summary = factors.summary
    neurons = sum(info.width for info in factors.sites)
    return [
        ["result", factors.name],
        ["rows", f"{summary['n_rows']:,} ({summary['rows']})"],
        ["neurons", f"{neurons:,} at {len(factors.sites)} sites"],
        ["relative error", f"{summary['error']:.3f}"],
        ["that of one factor", f"{summary['certificates']['one_factor_error']:.3f}"],
    ]


def _scores(
    store: CoreStore, factors: Factors, row_ids: npt.NDArray[np.int64]
) -> npt.NDArray[np.float32]:
    """Return the scores of rows; NaN too where a segment was captured after the factors."""
    scores = np.full((len(row_ids), factors.n_components), np.nan, dtype=np.float32)
    segments = row_ids // store.meta.segment_rows
    for segment in np.unique(segments).tolist():
        mine = segments == segment
        try:
            scores[mine] = factors.scores(row_ids[mine])
        except RowNotFound:
            continue
    return scores


def _scales(scores: npt.NDArray[np.float32]) -> tuple[list[float], list[float]]:
    """Return each factor's largest score and the score at which its colour scale ends."""
    largest, ends = [], []
    for column in scores.T:
        positive = column[column > 0]  # NaN is not
        top = float(positive.max()) if len(positive) else 1.0
        largest.append(top)
        ends.append(float(np.quantile(positive, _SCALE_QUANTILE)) if len(positive) else 1.0)
    return largest, ends


def _documents(
    shown: Sequence[ShownDocument], scores: npt.NDArray[np.float32], largest: Sequence[float]
) -> list[dict[str, Any]]:
    # Code 0 says "no score"; 1 … 255 are the square roots of 0 … the largest.
    relative = np.sqrt(np.clip(scores / np.asarray(largest, dtype=np.float32), 0, 1))
    codes = np.where(np.isnan(scores), 0, 1 + np.round(254 * np.nan_to_num(relative)))
    ends = np.cumsum([len(document.row_ids) for document in shown])
    return [
        {
            "document": document.document,
            "source": document.source,
            "text": document.text,
            "n_tokens": document.n_tokens,
            "cuts": document.cuts,
            "rows": document.runs,
            "scores": b64encode(block.T.astype(np.uint8).tobytes()).decode("ascii"),
        }
        for document, block in zip(shown, np.split(codes, ends[:-1]), strict=True)
    ]


def _factors(store: CoreStore, factors: Factors, space: str) -> list[dict[str, Any]]:
    table = factors.table("factors").to_pylist()
    shares = _site_shares(factors)
    loadings = [factors.loadings_of(info.site) for info in factors.sites]
    exemplars = _exemplars(store, factors, space)
    entries = []
    for row in table:
        k = int(row["factor"])
        entries.append(
            {
                "factor": k,
                "share": _short(row["share"]),
                "effective_neurons": _short(row["effective_neurons"]),
                "sites": [_short(share) for share in shares[k]],
                "neurons": _neurons([block[k] for block in loadings], shares[k]),
                **exemplars[k],
            }
        )
    return entries


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
        top = np.argsort(-loadings[site], kind="stable")[:_NEURONS]
        neurons = [[int(n), _short(float(loadings[site][n]), 2)] for n in top]
        found.append([site, _short(shares[site]), [pair for pair in neurons if pair[1] > 0]])
    return found


def _exemplars(store: CoreStore, factors: Factors, space: str) -> list[dict[str, Any]]:
    """Return each factor's top tokens, all different, and its top rows with their text."""
    table = factors.table("factor_exemplars")
    table = table.filter(pc.equal(table.column("side"), "top"))
    text_of = _token_texts(store, table.column("token_id"))
    words: list[dict[str, str]] = [{} for _ in range(factors.n_components)]
    for row in table.sort_by("rank").to_pylist():
        word = text_of[row["token_id"]]
        words[row["factor"]].setdefault(word.strip().lower() or word, word.strip() or word)
    best = table.filter(pc.less_equal(table.column("rank"), _EXEMPLARS)).sort_by("rank")
    texts = snippets(store, best.column("row_id").to_numpy(), space=space)
    exemplars: list[list[Any]] = [[] for _ in range(factors.n_components)]
    for row, text in zip(best.to_pylist(), texts, strict=True):
        exemplars[row["factor"]].append(
            {
                "row_id": row["row_id"],
                "value": _short(row["value"]),
                "document": text.document,
                "source": text.source,
                "before": text.before,
                "token": text.token,
                "after": text.after,
            }
        )
    return [
        {"tokens": list(found.values())[:_TOP_TOKENS], "exemplars": rows}
        for found, rows in zip(words, exemplars, strict=True)
    ]


def _token_texts(store: CoreStore, token_ids: pa.ChunkedArray) -> dict[int, str]:
    vocabulary = store.vocabulary
    wanted = vocabulary.filter(pc.is_in(vocabulary.column("token_id"), token_ids.unique()))
    ids, texts = wanted.column("token_id").to_pylist(), wanted.column("text").to_pylist()
    found = dict(zip(ids, texts, strict=True))
    return {i: found.get(i, f"token {i}") for i in token_ids.unique().to_pylist()}
