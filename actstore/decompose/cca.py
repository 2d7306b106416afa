"""Canonical correlations and what is made of them: functions of small float64 matrices.

Each site is taken to its principal directions, those whose variance its storage could not have made
up; scaled to unit variance, they are its *whitened* columns.  Between two sites the whitened cross
covariance ``T`` has the canonical correlations as its singular values, and mean CCA, R2, SVCCA and
PWCCA are means of those with different weights, over different directions.

What is cut, and why: rounding to the stored dtype adds a variance of a twelfth of the last place
squared to every column.  LayerNorm leaves one direction without any variance; stored as float16 it
has some, a fixed 2e-9 of the largest, and a relative cut of 1e-10 takes the noise for a direction.

References
----------
Raghu, Gilmer, Yosinski & Sohl-Dickstein, SVCCA, NeurIPS 2017.  Morcos, Raghu & Bengio, Insights on
representational similarity in neural networks with canonical correlation, NeurIPS 2018, section 3:
PWCCA.  Kornblith et al., Similarity of neural network representations revisited, ICML 2019,
section 4: R2.  Wachter, The limiting empirical measure of multiple discriminant ratios, Annals of
Statistics 8 (1980): canonical correlations of what is independent.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import scipy.linalg

Float64 = npt.NDArray[np.float64]

CUT = 10.0
"""A direction is kept if its variance is so many times what rounding gives it."""

_MANTISSA = {"float16": (10, -14), "bfloat16": (7, -126), "float32": (23, -126)}
_PRODUCT_ROUNDING = 1e-9
_QUANTILES = 4096


@dataclass(frozen=True)
class Directions:
    """The principal directions of a site that are kept, the largest variance first."""

    vectors: Float64
    """Orthonormal columns, ``(width, rank)``."""
    variances: Float64
    """Variance along each, ``(rank,)``."""
    mean: Float64
    """Mean of the site's columns, ``(width,)``."""

    @property
    def rank(self) -> int:
        """How many there are."""
        return len(self.variances)

    @property
    def whitener(self) -> Float64:
        """What takes centred rows to uncorrelated columns of unit variance, ``(width, rank)``."""
        return self.vectors / np.sqrt(self.variances)

    def leading(self, principal: float) -> Directions:
        """Return so many of them (an int), or as many as hold this share of the variance."""
        if isinstance(principal, int):
            n = principal
        else:
            shares = np.cumsum(self.variances) / max(float(self.variances.sum()), 1e-300)
            n = int(np.searchsorted(shares, principal * (1 - 1e-12))) + 1
        return Directions(self.vectors[:, :n], self.variances[:n], self.mean)


def rounding_variance(dtype: str, mean: Float64, variance: Float64) -> Float64:
    """Return the variance that storing gives each column, ``(width,)``.

    A twelfth of the square of the last place of its root mean square; and what float32 products
    leave of a variance that is none.
    """
    bits, least = _MANTISSA[dtype]
    magnitude = np.sqrt(np.square(mean) + variance)
    exponent = np.floor(np.log2(np.maximum(magnitude, 2.0**least)))
    last_place = 2.0 ** (exponent - bits)
    rounding: Float64 = np.square(last_place) / 12 + _PRODUCT_ROUNDING / CUT * variance
    return rounding


def directions(covariance: Float64, rounding: Float64, mean: Float64) -> Directions:
    """Return the principal directions whose variance rounding could not have made.

    Parameters
    ----------
    covariance : ndarray (width, width)
        Covariance of the site's columns.
    rounding : ndarray (width,)
        What rounding contributes to each column's variance.
    mean : ndarray (width,)
        Mean of the columns.
    """
    variances, vectors = np.linalg.eigh(covariance)
    kept = variances > CUT * (np.square(vectors).T @ rounding)
    order = np.flatnonzero(kept)[::-1]
    return Directions(np.ascontiguousarray(vectors[:, order]), variances[order], mean)


def canonical(
    a: Directions, b: Directions, cross: Float64, *, vectors: bool = False
) -> tuple[Float64, Float64, Float64]:
    """Return the canonical correlations of two sites, descending, and the directions they lie in.

    Parameters
    ----------
    a, b : Directions
        What is kept of either site.
    cross : ndarray (width of a, width of b)
        Covariance between them.
    vectors : bool, default False
        Whether the directions are wanted; without, they are empty.

    Returns
    -------
    left : ndarray (rank of a, m)
        Directions among the whitened columns of `a`.
    correlations : ndarray (m,)
        The least rank of both many, in 0 … 1.
    right : ndarray (rank of b, m)
        Directions among those of `b`.
    """
    whitened = a.whitener.T @ cross @ b.whitener
    if not vectors:
        found = np.linalg.svd(whitened, compute_uv=False)
        return np.empty((0, 0)), np.minimum(found, 1), np.empty((0, 0))
    left, found, right = np.linalg.svd(whitened, full_matrices=False)
    return left, np.minimum(found, 1), right.T


def mean_cca(correlations: Float64, share: float | None = None) -> float:
    """Return the mean correlation; with a share, of the leading ones that hold it of their sum.

    With 0.98 this is the mean of Ecco and of google/svcca, which leave the last of those out.
    """
    if not len(correlations):
        return math.nan
    if share is None:
        return float(correlations.mean())
    held = np.concatenate([[0.0], np.cumsum(correlations)])
    n = int(np.argmax(held >= share * held[-1]))
    return float(correlations[: max(n, 1)].mean())


def r2_cca(correlations: Float64) -> float:
    """Return the mean squared correlation."""
    return float(np.square(correlations).mean()) if len(correlations) else math.nan


def pwcca(a: Directions, left: Float64, correlations: Float64) -> float:
    """Return the mean correlation weighed by how much of site `a` lies along each direction.

    The weight of canonical variate ``h`` is the sum over a's columns ``x`` of ``|<h, x>|``, which
    its covariances give: ``|V diag(sqrt(variances)) left|`` summed over the columns.
    """
    if not len(correlations):
        return math.nan
    weights = np.abs(a.vectors @ (np.sqrt(a.variances)[:, None] * left)).sum(0)
    return float(weights @ correlations / weights.sum())


def whitened_alike(a: Directions, b: Directions, cross: Float64) -> Float64:
    """Return what `pwcca_svcca` takes: the covariance between columns that are whitened in place.

    Parameters
    ----------
    a, b : Directions
        What is kept of either site.
    cross : ndarray (width of a, width of b)
        Covariance between them.

    Returns
    -------
    ndarray (width of a, width of b)
        ``W_a cross W_b``, each W the symmetric root of an inverse; transposed, that of `b` and `a`.
    """
    found: Float64 = a.whitener @ (a.vectors.T @ cross @ b.vectors) @ b.whitener.T
    return found


def pwcca_svcca(a: Directions, n: int, whitened: Float64) -> tuple[float, Float64]:
    """Return PWCCA weighed by `a` as google/svcca and Ecco compute it, which is not the paper's.

    And the canonical correlations, descending.

    There the directions are ``U'(X - mean) + mean``, with U of the symmetric whitening and the
    whitening itself left out, then orthonormal; weights are products with the uncentred columns.
    All of it follows from covariances and means.  Adding the mean makes it depend on the signs that
    LAPACK gives U, so U comes from the same matrix here, once for each order of a pair; where the
    smallest variances are rounding it depends on the order of addition, there and here, to 5e-3 on
    outputs of LayerNorm.

    Parameters
    ----------
    a : Directions
        What is kept of the site that weighs.
    n : int
        Correlations there are: the lesser rank of the two.
    whitened : ndarray (width of a, width of the other)
        From `whitened_alike`.
    """
    if not n:
        return math.nan, np.empty(0)
    turn, correlations, _ = np.linalg.svd(whitened)
    correlations = np.minimum(correlations[:n], 1)
    # D = X_c U + 1 m', so D'D = U' C U + m m', of which M is a root; and D'X = U' C + m mean'.
    means = a.mean[:n]
    root = np.sqrt(a.variances)[:, None] * a.vectors.T
    own = root @ turn[:, :n]
    triangle = np.asarray(np.linalg.qr(np.vstack([own, means[None]]), mode="r"))
    products = own.T @ root + np.outer(means, a.mean)
    diagonal = np.abs(np.diagonal(triangle))
    if diagonal.min() > n * np.finfo(np.float64).eps * diagonal.max():
        # A sixth of the time of least squares, which is for directions the site has no part in.
        solved = scipy.linalg.solve_triangular(triangle, products, trans="T")
    else:
        solved = np.linalg.lstsq(triangle.T, products, rcond=None)[0]
    weights = np.abs(solved).sum(1)
    return float(weights @ correlations / weights.sum()), correlations


def independent(rank_a: int, rank_b: int, energy: float) -> Float64:
    """Return the canonical correlations of independent sites that have a given mean square.

    With n rows independent sites have a mean square of the larger rank over n, and correlations
    that spread as Wachter's law says.  Rows of one document are alike and count for fewer; the mean
    square says for how many.

    Parameters
    ----------
    rank_a, rank_b : int
        Directions of either site.
    energy : float
        Mean squared correlation.

    Returns
    -------
    ndarray (least rank,)
        Descending.
    """
    n = min(rank_a, rank_b)
    beta = energy
    alpha = beta * n / max(rank_a, rank_b)
    if n == 0 or beta <= 0:
        return np.zeros(n)
    if beta >= 1:
        return np.ones(n)
    edges = [
        (math.sqrt(alpha * (1 - beta)) + sign * math.sqrt(beta * (1 - alpha))) ** 2
        for sign in (-1, 1)
    ]
    # x = centre + half cos(angle) takes the roots at the edges out of the density.
    angle = (np.arange(_QUANTILES) + 0.5) * (math.pi / _QUANTILES)
    centre, half = (edges[1] + edges[0]) / 2, (edges[1] - edges[0]) / 2
    x = np.clip(centre + half * np.cos(angle), 1e-300, 1 - 1e-16)
    density = np.square(half * np.sin(angle)) / (2 * alpha * x * (1 - x)) / _QUANTILES
    at_one = max(0.0, (alpha + beta - 1) / alpha)
    held = at_one + np.cumsum(density)  # from the largest down
    places = (np.arange(n) + 0.5) / n * held[-1]
    found: Float64 = np.sqrt(np.interp(places, held, x))
    found[places < at_one] = 1
    return found
