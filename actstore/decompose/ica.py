"""FastICA of sites: independent directions among their principal components.

The rows are whitened by exact PCA; scikit-learn's FastICA finds the rotation of them, on all rows
or on as many as memory holds, drawn at random.  Scores of all rows follow by one product.

References
----------
Hyvärinen & Oja, Independent component analysis: algorithms and applications, Neural Networks 13
(2000).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from actstore.decompose.factors import Factors
from actstore.decompose.linear import Linear, turned, write_linear
from actstore.decompose.pca import Components, checked, principal_components, writing_bytes
from actstore.decompose.scan import Scan
from actstore.errors import ArgumentError
from actstore.site import Site
from actstore.store import CoreStore, Rows
from actstore.store.budget import Progress, parse_budget

Float64 = npt.NDArray[np.float64]

_COPIES = 6  # of the whitened rows, in FastICA


def ica(
    store: CoreStore,
    sites: str | Site | Iterable[str | Site] | None,
    n_components: int,
    *,
    scale: str | None = None,
    rows: Rows | str = "content",
    seed: int = 0,
    max_iterations: int = 200,
    tolerance: float = 1e-4,
    name: str | None = None,
    budget: int | str | None = None,
    progress: Progress | None = None,
) -> Factors:
    """Find independent components of sites, and keep them in the store.

    Cost: as `pca`, a read of the rows FastICA sees, and its iterations over those,
    ``2 n n_components**2`` operations each.

    Parameters
    ----------
    store, sites, n_components, scale, rows, name, budget, progress
        As for `pca`.
    seed : int, default 0
        Decides where FastICA starts, and which rows it sees where not all fit the budget.
    max_iterations : int, default 200
        Iterations at most.
    tolerance : float, default 1e-4
        How little a direction must still turn.

    Returns
    -------
    Factors
        Of the kind ``ica``: largest share of the variance first.  ``summary["converged"]`` says
        whether the tolerance was reached.

    Raises
    ------
    ArgumentError
        If an argument cannot be used, or the rows have fewer dimensions than `n_components`.
    BudgetExceeded
        If the products do not fit the budget.
    NotEnoughDisk
        If the store's disk cannot hold the scores.

    See Also
    --------
    sklearn.decomposition.FastICA : the same in memory.
    """
    from sklearn.decomposition import FastICA  # a second, which others need not wait

    infos, chosen = checked(store, sites, n_components, scale, rows)
    budget_bytes = parse_budget(budget)
    with store.new_result("ica", name, {}) as writer:
        began = time.perf_counter()
        found = principal_components(
            store, infos, chosen, n_components, scale, budget_bytes=budget_bytes, progress=progress
        )
        kept = found.variances > 1e-10 * found.variances[0]
        if not kept.all():
            raise ArgumentError(
                f"n_components = {n_components} cannot be used: the rows have {int(kept.sum())} "
                f"dimensions that matter. Pass n_components={max(1, int(kept.sum()))} or less."
            )
        k, width = found.loadings.shape
        most = max(k, (budget_bytes // 2 - 40 * k * width) // (8 * _COPIES * k))
        scan = Scan(
            store,
            infos,
            chosen,
            budget_bytes=budget_bytes,
            reserved_bytes=budget_bytes // 2,
            seed=seed,
        )
        whitened = _whitened(scan, found, min(most, scan.n_rows))
        model = FastICA(
            whiten=False, max_iter=max_iterations, tol=tolerance, random_state=seed, fun="logcosh"
        )
        model.fit(whitened)
        loadings, readout = _unmixed(found, model.components_)
        shares = np.square(np.linalg.norm(loadings, axis=1)) / found.total_variance
        order = np.argsort(-shares, kind="stable")
        lengths = np.linalg.norm(loadings, axis=1, keepdims=True)
        signs = turned(loadings)
        # Loadings of unit length: a score is then in the units of the rows.
        loadings, readout = (signs * loadings / lengths)[order], (signs * readout * lengths)[order]
        fitted = time.perf_counter()
        linear = Linear.narrow(found.column_scales, found.mean, readout)
        columns: dict[str, npt.NDArray[Any]] = {
            "share": shares[order],
            "explained_variance": shares[order] * found.total_variance,
        }
        summary = write_linear(
            writer,
            store,
            infos,
            chosen,
            linear,
            loadings,
            columns,
            budget_bytes=budget_bytes,
            reserved_bytes=2 * writing_bytes(loadings),
            progress=progress,
        )
        writer.write_array("readout", linear.readout.numpy())
        summary["bytes_read"] += found.bytes_read + scan.ranked.bytes_read
        result = writer.finish(
            {
                **summary,
                "scale": scale,
                "site_scales": found.scales,
                "total_variance": found.total_variance,
                "error": math.sqrt(max(0.0, 1 - float(shares.sum()))),
                "seed": seed,
                "n_seen_rows": len(whitened),
                "n_iterations": int(model.n_iter_),
                "converged": bool(model.n_iter_ < max_iterations),
                "seconds": {
                    "components": round(fitted - began, 3),
                    "scores": round(time.perf_counter() - fitted, 3),
                },
            }
        )
    return Factors(store, result)


def _whitened(scan: Scan, found: Components, n_rows: int) -> Float64:
    """Return rows as coordinates of variance 1 along the components, ``(n, k)``."""
    readout = found.loadings / np.sqrt(found.variances)[:, None]
    linear = Linear.narrow(found.column_scales, found.mean, readout)
    blocks = scan.ordered() if n_rows == scan.n_rows else scan.mixed(limit=n_rows)
    return np.concatenate([linear.scores(block.values).double().numpy() for block in blocks])


def _unmixed(found: Components, rotation: Float64) -> tuple[Float64, Float64]:
    """Return loadings and readout, ``(k, width)``, of sources of variance 1."""
    deviations = np.sqrt(found.variances)[:, None]
    readout = rotation @ (found.loadings / deviations)
    loadings = np.linalg.inv(rotation).T @ (found.loadings * deviations)
    return loadings, readout
