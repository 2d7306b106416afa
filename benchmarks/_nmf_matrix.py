"""The matrix that NMF is compared on, for those who take it whole, and the error of loadings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from actstore.decompose.codes import solve_codes
from actstore.store import CoreStore
from tests.synthetic import synthetic_store

Loadings = npt.NDArray[np.float32]


def blocks(store: CoreStore) -> Iterator[list[npt.NDArray[Any]]]:
    """Yield content rows in blocks, a list of sites each, in the stored dtype."""
    rows = store.rows()
    for segment in rows.segments:
        offsets = rows.offsets(segment)
        for part in np.split(offsets, range(2048, len(offsets), 2048)):
            first, stop = int(part[0]), int(part[-1]) + 1
            yield [
                store.read(info, segment, first, stop)[part - first] for info in store.select(None)
            ]


def scales(store: CoreStore) -> list[float]:
    """Return what gives all sites the same energy."""
    energies = [
        [float(np.square(np.maximum(site, 0), dtype=np.float32).sum(dtype=np.float64))]
        for sites in blocks(store)
        for site in sites
    ]
    by_site = np.reshape(energies, (-1, len(store.sites))).sum(0)
    return list(np.sqrt(store.rows().n_rows / by_site))


def scaled(sites: Sequence[npt.NDArray[Any]], scales: Sequence[float]) -> npt.NDArray[np.float32]:
    clipped = [
        np.maximum(site.astype(np.float32), 0) * np.float32(scale)
        for site, scale in zip(sites, scales, strict=True)
    ]
    return np.hstack(clipped)


def matrix(
    store: CoreStore, scales: Sequence[float], mixed: bool = False
) -> npt.NDArray[np.float32]:
    n_rows = store.rows().n_rows
    matrix = np.empty((n_rows, sum(info.width for info in store.select(None))), np.float32)
    order = np.random.default_rng(0).permutation(n_rows) if mixed else np.arange(n_rows)
    done = 0
    for sites in blocks(store):
        block = scaled(sites, scales)
        matrix[order[done : done + len(block)]] = block
        done += len(block)
    return matrix


def error(store: CoreStore, scales: Sequence[float], loadings: Loadings) -> float:
    """Return ``|A - S L| / |A|`` for the best codes, from the residual itself."""
    weights = torch.from_numpy(np.ascontiguousarray(loadings, np.float32))
    weights = weights / weights.norm(dim=1, keepdim=True).clamp(min=1e-30)
    rest = total = 0.0
    for sites in blocks(store):
        for part in torch.from_numpy(scaled(sites, scales)).split(2048):
            codes, _ = solve_codes(
                weights @ part.T, weights @ weights.T, n_sweeps=1000, tolerance=1e-6
            )
            # In float64: a norm of so many float32 numbers loses the third digit.
            rest += float((part - codes.T @ weights).double().square().sum())
            total += float(part.double().square().sum())
    return float(np.sqrt(rest / total))


def tiny_store(path: Path) -> CoreStore:
    rng = np.random.default_rng(0)
    scores = rng.gamma(1, size=(3000, 12)) * (rng.random((3000, 12)) < 0.3)
    sites = {
        f"mlp_post.{layer}": scores @ rng.random((12, 64)) ** 4 + 0.1 * rng.normal(size=(3000, 64))
        for layer in range(2)
    }
    return synthetic_store(path, sites)
