"""Exact PCA of sites: one pass for the moments of all pairs of neurons, one for the scores.

The covariance of all columns is added up in float64, from float32 products about a pilot mean
(`moments`); its first eigenvectors are the loadings.  Nothing is approximated, and nothing but the
scores grows with the number of rows.

References
----------
Jolliffe & Cadima, Principal component analysis: a review and recent developments, Philosophical
Transactions of the Royal Society A 374 (2016).
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import scipy.linalg

from actstore.decompose.engine import Engine
from actstore.decompose.factors import Factors
from actstore.decompose.linear import Linear, turned, write_linear
from actstore.decompose.moments import Products, block_rows, frame_of
from actstore.decompose.scan import Scan, chosen_rows
from actstore.decompose.write_factors import check_disk
from actstore.errors import ArgumentError
from actstore.site import Site, summarize
from actstore.store import CoreStore, Rows, SiteInfo
from actstore.store.budget import Progress, parse_budget

Float64 = npt.NDArray[np.float64]

WIDEST = 20_000
"""Columns at most: their products take 12 bytes each, and their eigenvectors hours beyond."""


@dataclass(frozen=True)
class Components:
    """The first principal components of some rows."""

    scales: dict[str, float]
    """What each site is multiplied by."""
    column_scales: Float64
    """The same for each column, shape (width,)."""
    mean: Float64
    """Mean row, scaled, shape (width,)."""
    loadings: Float64
    """Shape (k, width), of unit length; the largest of each is positive."""
    variances: Float64
    """Their variances, over n - 1, shape (k,)."""
    total_variance: float
    """The variance of all columns together."""
    n_rows: int
    """Rows."""
    bytes_read: int
    """Bytes of activations read."""


def pca(
    store: CoreStore,
    sites: str | Site | Iterable[str | Site] | None,
    n_components: int,
    *,
    scale: str | None = None,
    rows: Rows | str = "content",
    name: str | None = None,
    budget: int | str | None = None,
    progress: Progress | None = None,
) -> Factors:
    """Find the principal components of sites, exactly, and keep them in the store.

    Cost: two passes over the sites, ``n_rows x n_neurons**2`` operations and the eigenvectors of a
    matrix of n_neurons; memory 12 bytes x n_neurons**2.

    Parameters
    ----------
    store : CoreStore
        The store; its committed segments are used.
    sites : str, Site, iterable of these, or None
        Sites of one space, as names or patterns, of 20,000 neurons together at most; None means
        all.
    n_components : int
        Number of components, at most the number of neurons and of rows.
    scale : {None, "site"}, default None
        ``"site"`` gives every site the same variance.
    rows : Rows or str, default "content"
        ``"content"``, ``"all"``, or a set of rows.
    name : str, optional
        Name of the result; by default ``pca-1`` and so on.
    budget : int or str, optional
        Memory it may take.
    progress : callable, optional
        Called with (stage, rows done, rows in all).

    Returns
    -------
    Factors
        Of the kind ``pca``: loadings, scores of both signs, ``explained_variance`` and its share in
        the table ``factors``, the arrays ``loadings``, ``scores`` and ``mean``.

    Raises
    ------
    ArgumentError
        If an argument cannot be used, or the sites are too wide.
    BudgetExceeded
        If the products do not fit the budget.
    NotEnoughDisk
        If the store's disk cannot hold the scores.

    See Also
    --------
    sklearn.decomposition.PCA : the same in memory.
    sklearn.decomposition.IncrementalPCA : out of core, and not exact.
    """
    infos, chosen = checked(store, sites, n_components, scale, rows)
    budget_bytes = parse_budget(budget)
    with store.new_result("pca", name, {}) as writer:
        began = time.perf_counter()
        found = principal_components(
            store, infos, chosen, n_components, scale, budget_bytes=budget_bytes, progress=progress
        )
        fitted = time.perf_counter()
        linear = Linear.narrow(found.column_scales, found.mean, found.loadings)
        columns = {
            "share": found.variances / (found.total_variance or 1.0),
            "explained_variance": found.variances,
        }
        summary = write_linear(
            writer,
            store,
            infos,
            chosen,
            linear,
            found.loadings,
            columns,
            budget_bytes=budget_bytes,
            reserved_bytes=writing_bytes(found.loadings),
            progress=progress,
        )
        summary["bytes_read"] += found.bytes_read
        result = writer.finish(
            {
                **summary,
                "scale": scale,
                "site_scales": found.scales,
                "total_variance": found.total_variance,
                "error": math.sqrt(max(0.0, 1 - float(columns["share"].sum()))),
                "seconds": {
                    "components": round(fitted - began, 3),
                    "scores": round(time.perf_counter() - fitted, 3),
                },
            }
        )
    return Factors(store, result)


def checked(
    store: CoreStore,
    sites: str | Site | Iterable[str | Site] | None,
    n_components: int,
    scale: str | None,
    rows: Rows | str,
) -> tuple[list[SiteInfo], Rows]:
    """Return sites and rows, or raise what `pca` raises of its arguments."""
    if scale not in ("site", None):
        raise ArgumentError(f"scale = {scale!r} is unknown; expected 'site' or None.")
    infos = store.select(sites)
    width = sum(info.width for info in infos)
    if width > WIDEST:
        raise ArgumentError(
            f"{summarize(info.site for info in infos)} have {width:,} neurons; exact principal "
            f"components are of {WIDEST:,} at most. Give fewer sites, or store.nmf."
        )
    chosen = chosen_rows(store, rows, infos)
    limit = min(width, chosen.n_rows)
    if chosen.n_rows and not 1 <= n_components <= limit:
        raise ArgumentError(
            f"n_components = {n_components} cannot be used; expected 1 … {limit:,} for {width:,} "
            f"neurons and {chosen.n_rows:,} rows ({chosen.rule}) of {store.path}."
        )
    check_disk(store, infos, chosen, [n_components])
    return infos, chosen


def writing_bytes(loadings: Float64) -> int:
    """Return what the loadings take while factors are written: in both dtypes, and as a table."""
    return 24 * int(loadings.size) + 2**25


def principal_components(
    store: CoreStore,
    infos: Sequence[SiteInfo],
    chosen: Rows,
    n_components: int,
    scale: str | None,
    *,
    budget_bytes: int,
    progress: Progress | None,
) -> Components:
    """Return the principal components of some rows; one pass over them.

    Raises
    ------
    BudgetExceeded
        If the products of all columns do not fit the budget.
    """
    width = sum(info.width for info in infos)
    reserved = 12 * width**2 + 40 * n_components * width
    scan = Scan(store, infos, chosen, budget_bytes=budget_bytes, reserved_bytes=reserved)
    engine = Engine.local()
    frame = frame_of(scan, engine, standardize=False)
    whole = slice(0, width)

    def tell(n_rows: int) -> None:
        if progress:
            progress("moments", n_rows, scan.n_rows)

    # One range: each would have sums of its own.
    ranges = [list(itertools.chain.from_iterable(scan.ordered_ranges(block_rows(width))))]
    work = Products(((whole, whole),), (whole,), frame)
    sums = engine.total(scan, work, ranges, progress=tell)
    n = scan.n_rows
    offset = (sums["sum"] / n).numpy()
    moments = sums["product.0"].numpy()
    for row, at in zip(moments, offset, strict=True):  # a product of all would take as much again
        row -= n * at * offset
    mean = frame.shift.double().numpy() + offset
    scales, column_scales = _scales(scan, moments, scale)
    moments *= column_scales
    moments *= column_scales[:, None]
    total = float(np.trace(moments)) / max(1, n - 1)
    # Turned, which changes nothing of it: LAPACK copies what does not stand column by column.
    values, vectors = scipy.linalg.eigh(
        moments.T,
        subset_by_index=(width - n_components, width - 1),
        overwrite_a=True,
        check_finite=False,
    )
    loadings = np.ascontiguousarray(vectors.T[::-1])
    loadings *= turned(loadings)
    variances = np.maximum(values[::-1], 0) / max(1, n - 1)
    return Components(
        scales,
        column_scales,
        mean * column_scales,
        loadings,
        variances,
        total,
        n,
        scan.ranked.bytes_read,
    )


def _scales(scan: Scan, moments: Float64, scale: str | None) -> tuple[dict[str, float], Float64]:
    """Return the scale of each site and of each column."""
    energies = {
        str(site): float(np.diagonal(moments)[columns].sum())
        for site, columns in scan.columns.items()
    }
    n = scan.n_rows
    scales = {
        site: math.sqrt(n / e) if scale == "site" and e > 0 else 1.0 for site, e in energies.items()
    }
    parts = [np.full(c.stop - c.start, scales[str(s)]) for s, c in scan.columns.items()]
    return scales, np.concatenate(parts)
