"""How alike sites are: one call over a family of measures, and what it leaves behind.

Two questions are asked of a pair of sites.  *CKA* asks whether rows that are near each other at one
are near each other at the other: it keeps angles and distances, and is 1 for a rotation and a
scale.  The *CCA family* asks what of one can be had from the other by any linear map: mean CCA and
R2 count all directions alike, SVCCA those that hold most of the variance, PWCCA those that one site
uses.

All of it comes from what a scan reads: CKA from kernels of mixed batches (`cka`) or from one pass
of products (`cka_exact`), the CCA family from the same pass (`moments`, `cca`).  Beside every value
stands what it would be of nothing shared (`nulls`), and the share of variance that a site's largest
channel has: one channel of MiniLM's resid_post.5 moves CKA from 0.85 to 0.23.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from actstore.decompose.engine import Engine
from actstore.decompose.measuring import Found, Settings, measured
from actstore.decompose.similarity_result import Similarity
from actstore.decompose.subject import Subject
from actstore.errors import ArgumentError
from actstore.site import Site
from actstore.store import CoreStore, Rows
from actstore.store.budget import Progress, parse_budget

Ids = npt.NDArray[np.int64]

_MAX_BATCHES = 4096
_CONSTANT = "constant over the rows read: its similarities are NaN"
_FEW = "of no variance that so few rows could tell from none: its similarities are NaN"


def similarity(
    store: CoreStore,
    sites: str | Site | Iterable[str | Site] | None,
    *,
    measure: str = "cka",
    method: str | None = None,
    rows: Rows | str = "content",
    tolerance: float = 0.005,
    standardize: bool = False,
    other: CoreStore | str | Path | None = None,
    variant: str = "paper",
    share: float | None = None,
    principal: float = 0.99,
    batch_rows: int | None = None,
    max_batches: int = _MAX_BATCHES,
    seed: int = 0,
    name: str | None = None,
    budget: int | str | None = None,
    engine: Engine | None = None,
    progress: Progress | None = None,
) -> Similarity:
    """Compute how alike all pairs of sites are, and keep the result in the store.

    Cost, with D columns in all: the CKA estimate takes `batch_rows` multiplications for every value
    read, of some ten thousand rows as a rule; exact CKA and the CCA family take D for every value
    of every row, one pass, or several where 8 D² bytes exceed the budget.

    Parameters
    ----------
    store : CoreStore
        The store; its committed segments are used.
    sites : str, Site, iterable of these, or None
        Two or more sites of one space, as names or patterns; None means all.
    measure : {"cka", "cca", "svcca", "pwcca"}, default "cka"
        Debiased linear CKA; mean canonical correlation; the same over leading principal directions;
        the same weighed by what the first site uses, which differs with the order of a pair.
    method : {"estimate", "exact"}, optional
        Of CKA: from mixed batches until the intervals are narrow (default), or from all rows.
    rows : Rows or str, default "content"
        The rows to compare on: ``"content"``, ``"all"``, or a set of rows.
    tolerance : float, default 0.005
        Of the estimate: stop, after 32 batches or more, once no 95 % interval for this store is
        wider than ± this.
    standardize : bool, default False
        Divide every column by its standard deviation, so that no channel counts for more than
        another. One more pass.
    other : CoreStore, str or Path, optional
        Another store over the same documents: its sites, chosen by `sites` too, are the second of
        every pair.  Rows are aligned where tokens end at the same character of a document.
    variant : {"paper", "svcca"}, default "paper"
        PWCCA as in the paper, or as google/svcca and Ecco compute it.
    share : float, optional
        Of ``"cca"``: mean of the leading correlations that hold this share of their sum; 0.98 is
        what Ecco does. Default all.
    principal : int or float, default 0.99
        Of ``"svcca"``: so many principal directions (int), or those that hold this share of the
        variance (float).
    batch_rows : int, optional
        Rows of a batch of the estimate; by default 256, or fewer where the rows would not fill 32
        batches. Of much fewer than 100 the intervals for this store are a little too narrow.
    max_batches : int, default 4096
        Stop the estimate after so many in any case.
    seed : int, default 0
        Decides which rows the estimate reads.
    name : str, optional
        Name of the result; by default ``similarity-1`` and so on.
    budget : int or str, optional
        Memory it may take; by default the smaller of 4 GiB and half of what is free.
    engine : Engine, optional
        Where the reads are made; by default in this process, from `Engine.on` on workers.
    progress : callable, optional
        Called with (stage, done, in all): batches of the estimate, rows of a pass.

    Returns
    -------
    Similarity
        Values with intervals and nulls.  A debiased value may be slightly negative, and is left so;
        a site without variance has none, and is named.

    Raises
    ------
    ArgumentError
        If an argument cannot be used, there is one site only, the sites are of two spaces, the rows
        do not fill two batches, or `other` holds other documents.
    SiteNotFound
        If the store does not have a site.
    StoreNotFound
        If `other` is no store.
    BudgetExceeded
        If one batch, or the products of one pair of sites, do not fit the budget.
    NonFiniteActivation
        If a chosen row holds NaN or infinity.
    ResultExists
        If the name is taken.

    See Also
    --------
    sklearn.cross_decomposition.CCA : canonical correlations in memory, by iteration.

    References
    ----------
    Those of the modules `cka`, `cka_exact`, `cca` and `nulls`.
    """
    began = time.perf_counter()
    settings = Settings(
        measure,
        method or ("estimate" if measure == "cka" else "exact"),
        variant,
        share,
        principal,
        standardize,
        tolerance,
        max_batches,
        seed,
    )
    if other is not None and not isinstance(other, CoreStore):
        other = CoreStore(other)
    engine = engine or Engine.local()
    if other is not None and not engine.is_local:
        raise ArgumentError(
            "other and workers were given; two stores are read together in this process only. "
            "Leave workers=, scheduler= and client= out (--workers, --scheduler)."
        )
    subject = Subject.of(store, sites, rows, other, engine.share_of(parse_budget(budget)), seed)
    writer = store.new_result("similarity", name, {})
    with writer:
        found = measured(subject, settings, batch_rows, engine, progress)
        writer.write_table("similarity", _table(subject, settings, found))
        unlike = ~np.eye(len(subject.infos), dtype=bool)
        undefined = np.isnan(np.diagonal(found.value))
        summary = {
            "measure": measure,
            "method": settings.method,
            **({"variant": variant} if measure == "pwcca" else {}),
            **({"share": share} if measure == "cca" else {}),
            **({"principal": principal} if measure == "svcca" else {}),
            "standardize": standardize,
            "sites": [str(info.site) for info in subject.own],
            "space": subject.own[0].site.space,
            **subject.of_other(),
            "rows": subject.rows.rule,
            "n_rows": subject.rows.n_rows,
            **found.facts,
            "half_width": float(np.nanmax(found.half_width[unlike], initial=0.0)),
            "n_shifts": len(found.null),
            "undefined": {
                subject.label(int(i)): _CONSTANT if np.isnan(found.max_channel_share[i]) else _FEW
                for i in np.flatnonzero(undefined)
            },
            "seed": seed,
            "seconds": {measure: round(time.perf_counter() - began, 3)},
            "threads": torch.get_num_threads(),
            "versions": {"numpy": np.__version__, "torch": str(torch.__version__)},
        }
        result = writer.finish(summary)
    return Similarity(store, result)


def _table(subject: Subject, settings: Settings, found: Found) -> pa.Table:
    """Return all ordered pairs, so that a condition on ``site_a`` finds all partners of a site."""
    n_own = len(subject.own)
    first = np.arange(n_own)
    second = first if subject.other is None else np.arange(n_own, len(subject.infos))
    a, b = (index.ravel() for index in np.meshgrid(first, second, indexing="ij"))
    names = np.array([str(info.site) for info in subject.infos])
    null = found.null if len(found.null) else np.full((1, *found.value.shape), np.nan)
    value = found.value[a, b]
    columns: dict[str, Any] = {
        "site_a": names[a],
        "site_b": names[b],
        "value": value,
        "low": value - found.half_width[a, b],
        "high": value + found.half_width[a, b],
        "text_low": value - found.text_half_width[a, b],
        "text_high": value + found.text_half_width[a, b],
        "null_mean": null[:, a, b].mean(0),
        "null_p95": np.quantile(null[:, a, b], 0.95, axis=0),
        "rank_a": pa.nulls(len(a), pa.int32()),
        "rank_b": pa.nulls(len(a), pa.int32()),
        "max_channel_share_a": found.max_channel_share[a],
        "max_channel_share_b": found.max_channel_share[b],
    }
    if found.ranks is not None:
        ranks = np.array(found.ranks, np.int32)
        columns |= {"rank_a": ranks[a], "rank_b": ranks[b]}
    columns |= {key: matrix[a, b] for key, matrix in (found.extra or {}).items()}
    if settings.measure == "pwcca":
        columns["weighing_site"] = names[_weighing(settings, found.ranks or [], a, b)]
    return pa.table(columns)


def _weighing(settings: Settings, ranks: Sequence[int], a: Ids, b: Ids) -> Ids:
    """Return by which site of each pair PWCCA weighs."""
    if settings.variant == "paper":
        return a
    ranked = np.array(ranks)
    return np.where(ranked[a] <= ranked[b], a, b)
