"""Factorisations whose scores are products: PCA and ICA, of rows less their mean.

A row x, scaled, has the scores ``(x - mean) @ readout.T``, and ``scores @ loadings`` is what the
factors hold of ``x - mean``.  Loadings have unit length.  For PCA readout and loadings are the
same; for ICA, whose loadings are not orthogonal, they are not.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from actstore import durable
from actstore.decompose.factors import Factors
from actstore.decompose.scan import Scan
from actstore.decompose.score_folds import N_EXEMPLARS
from actstore.decompose.write_factors import Found, write_factors
from actstore.store import CoreStore, ResultWriter, Rows, SiteInfo
from actstore.store.budget import Progress

Float64 = npt.NDArray[np.float64]

LINEAR_KINDS = ("pca", "ica")
"""Kinds of results whose scores are products."""


@dataclass(frozen=True)
class Linear:
    """What gives rows their scores."""

    scales: torch.Tensor
    """What each column is multiplied by, ``(width,)``."""
    mean: torch.Tensor
    """Mean row, scaled, ``(width,)``."""
    readout: torch.Tensor
    """Shape ``(k, width)``."""

    @classmethod
    def of(cls, factors: Factors) -> Linear:
        """Return what gave the scores of a result of one of `LINEAR_KINDS`."""
        scales = factors.summary["site_scales"]
        result, k = factors.result, factors.n_components
        columns = [np.full(i.width, scales[str(i.site)], np.float32) for i in factors.sites]
        readout = factors.loadings if result.kind == "pca" else result.array("readout", k)
        arrays = (np.concatenate(columns), result.array("mean", 1)[0], readout)
        return cls(*map(torch.from_numpy, arrays))

    @classmethod
    def narrow(cls, scales: Float64, mean: Float64, readout: Float64) -> Linear:
        """Return the same of values in float64."""
        return cls(*(torch.from_numpy(x.astype(np.float32)) for x in (scales, mean, readout)))

    def scores(self, values: torch.Tensor) -> torch.Tensor:
        """Return the scores of rows, ``(n, k)``; changes their values."""
        return values.mul_(self.scales).sub_(self.mean) @ self.readout.T


def write_linear(
    writer: ResultWriter,
    store: CoreStore,
    infos: Sequence[SiteInfo],
    chosen: Rows,
    linear: Linear,
    loadings: Float64,
    columns: Mapping[str, npt.NDArray[Any]],
    *,
    budget_bytes: int,
    reserved_bytes: int,
    progress: Progress | None,
) -> dict[str, Any]:
    """Read the rows for their scores and write the factors; return what the summary says of it.

    Cost: one pass over the sites, ``2 n k width`` operations.
    """
    scan = Scan(store, infos, chosen, budget_bytes=budget_bytes, reserved_bytes=reserved_bytes)
    k = len(loadings)
    parts = [np.square(loadings[:, columns]).sum(1) for columns in scan.columns.values()]
    with tempfile.TemporaryFile(dir=_work_folder(store)) as spool:
        done = 0
        for block in scan.ordered():
            spool.write(linear.scores(block.values).contiguous().numpy().data)
            done += len(block.row_ids)
            if progress:
                progress("scores", done, scan.n_rows)
        counts = [len(chosen.offsets(segment)) for segment in chosen.segments]
        firsts = np.cumsum([0, *counts]).tolist()
        place = dict(zip(chosen.segments, zip(firsts, counts, strict=False), strict=True))

        def scores_of(segment: int) -> npt.NDArray[np.float32]:
            first, n_rows = place[segment]
            spool.seek(4 * k * first)
            found = np.frombuffer(spool.read(4 * k * n_rows), np.float32)
            return found.reshape(n_rows, k)

        narrow = loadings.astype(np.float32)
        found = Found(infos, chosen, narrow, scores_of, columns, np.stack(parts, 1), False)
        write_factors(writer, store, found, budget_bytes - reserved_bytes)
    writer.write_array("mean", linear.mean[None].numpy())
    return {
        "n_components": k,
        "sites": [str(info.site) for info in infos],
        "space": infos[0].site.space,
        "n_neurons": scan.width,
        "rows": chosen.rule,
        "n_rows": scan.n_rows,
        "n_exemplars": N_EXEMPLARS,
        "n_reads": scan.ranked.n_reads,
        "bytes_read": scan.ranked.bytes_read,
    }


def _work_folder(store: CoreStore) -> str:
    """Return the store's folder for files that pass, made if it is not there."""
    durable.make_folder(store.path / "work")
    return str(store.path / "work")


def turned(loadings: Float64) -> Float64:
    """Return the sign of each factor that makes its largest loading positive, ``(k, 1)``."""
    largest = np.take_along_axis(loadings, np.abs(loadings).argmax(1)[:, None], axis=1)
    signs: Float64 = np.where(largest < 0, -1.0, 1.0)
    return signs
