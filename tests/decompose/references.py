"""What similarities are compared with: plain NumPy in float64, written from the papers."""

from __future__ import annotations

import numpy as np


def debiased_cka(blocks: list[np.ndarray]) -> np.ndarray:
    """Return CKA of all pairs from Song's unbiased HSIC, full kernels of all rows."""
    kernels = [block @ block.T for block in (np.asarray(b, np.float64) for b in blocks)]
    for kernel in kernels:
        np.fill_diagonal(kernel, 0)
    n = len(kernels[0])

    def hsic(k, l_):
        mixed = k.sum() * l_.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (k.sum(0) @ l_.sum(0))
        return (np.vdot(k, l_) + mixed) / (n * (n - 3))

    all_pairs = np.array([[hsic(k, l_) for l_ in kernels] for k in kernels])
    own = np.diagonal(all_pairs)
    return all_pairs / np.sqrt(np.outer(own, own))


def biased_cka(blocks: list[np.ndarray]) -> np.ndarray:
    """Return the plain CKA of all pairs: Kornblith et al., equation 3."""
    centred = [block - block.mean(0) for block in (np.asarray(b, np.float64) for b in blocks)]
    cross = np.array([[np.square(x.T @ y).sum() for y in centred] for x in centred])
    return cross / np.sqrt(np.outer(np.diagonal(cross), np.diagonal(cross)))


def variates(x: np.ndarray, y: np.ndarray, n_x: int | None = None, n_y: int | None = None):
    """Return canonical correlations and the variates of x, from the rows themselves.

    The left singular vectors of centred data are its whitened columns; only so many of the leading
    ones are kept.
    """
    u, v = (
        np.linalg.svd(z - z.mean(0), full_matrices=False)[0][:, :n] for z, n in ((x, n_x), (y, n_y))
    )
    left, correlations, _ = np.linalg.svd(u.T @ v, full_matrices=False)
    return correlations, u @ left


def pwcca(x: np.ndarray, y: np.ndarray, n_x: int | None = None, n_y: int | None = None) -> float:
    """Return PWCCA weighed by x: Morcos et al., section 3, equations 2 and 3."""
    correlations, h = variates(x, y, n_x, n_y)
    weights = np.abs(h.T @ (x - x.mean(0))).sum(1)
    return float(weights @ correlations / weights.sum())


def pwcca_svcca(x: np.ndarray, y: np.ndarray) -> float:
    """Return what google/svcca computes for no more columns of x than of y, of full rank.

    Directions ``U'(X - mean) + mean`` with U from the symmetric whitening, orthonormalised; weights
    are inner products with the uncentred columns.
    """
    xc, yc = x - x.mean(0), y - y.mean(0)

    def root(a):
        values, vectors = np.linalg.eigh(a.T @ a)
        return vectors / np.sqrt(values) @ vectors.T

    u, correlations, _ = np.linalg.svd(root(xc) @ xc.T @ yc @ root(yc))
    directions = u.T @ xc.T + x.mean(0)[:, None]
    q, _ = np.linalg.qr(directions.T)
    weights = np.abs(q.T @ x).sum(1)
    return float(weights @ correlations / weights.sum())
