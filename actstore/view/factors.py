"""The factor view: all factors at a glance, and a text shaded by the one that is chosen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from actstore import arrow
from actstore.counted import counted
from actstore.decompose import Factors
from actstore.errors import ArgumentError, RowNotFound
from actstore.store import CoreStore
from actstore.view.documents import ShownDocument, choose, committed_windows, read
from actstore.view.factor_detail import details, short
from actstore.view.page import PlainTable, View
from actstore.view.promoted import factor_weights, promoted_entries
from actstore.view.quantised import embedded, quantised
from actstore.view.standing_out import N_NEURONS, STEP, standing_out

if TYPE_CHECKING:
    from actstore.models import LanguageModel

_SCALE_QUANTILE = 0.995
"""Where the colour scale ends, among the scores above 0: a few maxima would leave a page pale."""


def factor_view(
    store: CoreStore,
    factors: Factors,
    documents: int | Sequence[int] | None = None,
    max_documents: int = 50,
    *,
    max_tokens: int = 2048,
    other: Factors | None = None,
    model: LanguageModel | None = None,
) -> View:
    """Return a view of a decomposition: every factor, and texts shaded by their scores.

    Reads the scores of the shown documents only, and of few documents their activations too, for
    the neurons that stand out in a span: as many as have 16 million values at all sites. The page
    takes about `n_components` x 1.4 bytes a token for scores, 10 for text and 16 for neurons.

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
    other : Factors, optional
        Another decomposition of the same sites to compare with, by the cosine of loadings.
    model : LanguageModel, optional
        The causal model of the store: each factor then shows the tokens that its output weights
        promote and suppress.

    Raises
    ------
    ArgumentError
        If no document is asked for, a limit is below 1, the store has no committed rows, or `other`
        is of other sites, or `model` was given and no site is one of ``mlp_post``.
    ModelError
        If `model` has no direct path to its logits.
    RowNotFound
        If the store has no such document.

    Notes
    -----
    Scores are embedded as one byte: the square root of the score over the factor's largest in the
    shown documents, in 254 steps, or 127 to either side where scores are signed, so a small score
    is off by less than a large one.  The colour scale is linear in the score and the same in all
    documents.

    See Also
    --------
    similarity_view : The view of similarities between sites.
    """
    if max_tokens < 1:
        raise ArgumentError(f"max_tokens = {max_tokens} was given; expected at least 1.")
    space = factors.sites[0].site.space
    # First, for it may be refused; all else is kept work.
    written = None if model is None else promoted_entries(store, model, factor_weights(factors))
    windows = committed_windows(store, space)
    chosen = choose(store, windows, documents, max_documents)
    shown = [read(store, document, windows, space, max_tokens) for document in chosen]
    row_ids = np.concatenate([document.row_ids for document in shown])
    scores = _scores(store, factors, row_ids)
    strong = standing_out(store, factors.sites, row_ids, ~np.isnan(scores[:, 0]))
    largest, signed = _largest(scores), bool((scores < 0).any())
    entries = details(store, factors, space)
    for entry, column, top in zip(entries, scores.T, largest.tolist(), strict=True):
        entry.update(max=short(top, 6), **_spread(column))
        if written is not None:
            entry["promoted"] = written[entry["factor"]]
    name = store.meta.model.get("name", str(store.path))
    title = f"{counted(factors.n_components, 'factor')} of {name}"
    n_held = len(np.unique(arrow.numbers(windows.column("document"))))
    note = f"{len(shown):,} of {n_held:,}{'' if documents is not None else ', spread evenly'}"
    return View(
        title,
        "factors",
        {
            "facts": _facts(factors),
            "sites": [
                {"name": str(info.site), "family": info.site.family, "width": info.width}
                for info in factors.sites
            ],
            "factors": entries,
            "signed": signed,
            "cosines": _cosines(factors, factors),
            "other": _other(factors, other),
            "strong": None if strong is None else {"n": N_NEURONS, "step": STEP},
            "documents": _documents(shown, quantised(scores, largest, signed=signed), strong),
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


def _facts(factors: Factors) -> list[list[str]]:
    summary = factors.summary
    neurons = sum(info.width for info in factors.sites)
    facts = [
        [factors.result.kind.upper(), factors.name],
        ["rows", f"{summary['n_rows']:,} ({summary['rows']})"],
        ["neurons", f"{neurons:,} at {counted(len(factors.sites), 'site')}"],
    ]
    single = summary.get("certificates", {}).get("one_factor_error")
    for words, error in (("relative error", summary.get("error")), ("that of one factor", single)):
        if error is not None:
            facts.append([words, f"{error:.3f}"])
    return facts


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


def _largest(scores: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Return each factor's largest score, without regard to its sign; 1 where there is none."""
    sizes = np.nan_to_num(np.abs(scores), nan=0.0).max(axis=0, initial=0.0).astype(np.float64)
    return np.where(sizes > 0, sizes, 1.0)


def _spread(column: npt.NDArray[np.float32]) -> dict[str, float]:
    """Return where a factor's colour scale ends, and mean and deviation of its scores."""
    held = column[~np.isnan(column)].astype(np.float64)
    sizes = np.abs(held[held != 0])
    return {
        "scale": short(float(np.quantile(sizes, _SCALE_QUANTILE)), 6) if len(sizes) else 1.0,
        "mean": short(float(held.mean())) if len(held) else 0.0,
        "std": short(float(held.std())) if len(held) else 0.0,
    }


def _cosines(a: Factors, b: Factors) -> list[list[float]]:
    """Return the cosine of the loadings of each factor of `a` with each of `b`."""
    rows, columns = (
        values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-30)
        for values in (a.loadings.astype(np.float64), b.loadings.astype(np.float64))
    )
    found: list[list[float]] = np.round(rows @ columns.T, 3).tolist()
    return found


def _other(factors: Factors, other: Factors | None) -> dict[str, Any] | None:
    if other is None:
        return None
    mine, theirs = ([str(info.site) for info in of.sites] for of in (factors, other))
    if mine != theirs:
        raise ArgumentError(
            f"compare = {other.name!r} is of {', '.join(theirs)}; expected factors of the sites of "
            f"{factors.name!r}: {', '.join(mine)}. Fit them to these sites under a new name."
        )
    rows = other.table("factors").select(["factor", "share", "effective_neurons"]).to_pylist()
    return {
        "name": other.name,
        "factors": [[r["factor"], short(r["share"]), short(r["effective_neurons"])] for r in rows],
        "cosines": _cosines(factors, other),
    }


def _documents(
    shown: Sequence[ShownDocument],
    codes: npt.NDArray[np.uint8],
    strong: npt.NDArray[np.uint8] | None,
) -> list[dict[str, Any]]:
    found, start = [], 0
    for document in shown:
        mine = slice(start, start + len(document.row_ids))
        start = mine.stop
        found.append(
            {
                "document": document.document,
                "source": document.source,
                "text": document.text,
                "n_tokens": document.n_tokens,
                "cuts": document.cuts,
                "rows": document.runs,
                "scores": embedded(codes[mine].T),
                "strong": None if strong is None else embedded(strong[mine]),
            }
        )
    return found
