"""The Gram matrix of a site: its mean and centred second moments.

Only for sites that ask for it: a state takes 8 bytes x width**2.  A row with NaN in any column is
left out whole, or the matrix would be of no one set of rows.

The compiled passes are of no use here, a matrix product is.  `RunningGram` multiplies in float32
what is near the mean, some thousand rows at a time, and adds up in float64: the products round to
about 1e-6 of the deviations' product.

References
----------
T. Chan, G. Golub, R. LeVeque, Updating formulae and a pairwise algorithm for computing sample
variances, Stanford STAN-CS-79-773, 1979, equation 2.1, for matrices.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import final

import numpy as np
from numpy.typing import NDArray

from actstore.errors import ArgumentError
from actstore.folds.base import Array, read_values

Float64 = NDArray[np.float64]

_BLOCK_ROWS = 1024


@dataclass(frozen=True)
class GramState:
    """Second moments of some rows."""

    n: int
    """Rows, those with NaN left out."""
    mean: Float64
    """Mean, shape (width,); 0 without rows."""
    m2: Float64
    """Sum of (row - mean) (row - mean)', shape (width, width)."""


@final
@dataclass(frozen=True)
class Gram:
    """Mean and centred second moments of all pairs of columns.

    One pass; memory 8 bytes x width**2.
    """

    name: str = field(default="gram", init=False)

    def start(self, width: int) -> GramState:
        """Return the moments of no rows."""
        return GramState(0, np.zeros(width), np.zeros((width, width)))

    def update(
        self,
        state: GramState,
        block: Array,
        row_ids: NDArray[np.int64],
        windows: NDArray[np.int64] | None = None,
    ) -> GramState:
        """Return the moments with a block added; which rows they are is of no account.

        See Also
        --------
        actstore.folds.base.Fold.update : the parameters.
        RunningGram : the same with float32 products.
        """
        x = read_values(block, np.float64)
        x = x[~np.isnan(x).any(axis=1)]
        if not len(x):
            return state
        mean = x.mean(axis=0)
        mean += (x - mean).mean(axis=0)
        d = x - mean
        return self.merge(state, GramState(len(x), mean, d.T @ d))

    def merge(self, a: GramState, b: GramState) -> GramState:
        """Return the moments of the rows of `a` and `b` together.

        Raises
        ------
        ArgumentError
            If the states are of different widths.
        """
        if a.mean.shape != b.mean.shape:
            raise ArgumentError(
                f"Grams of {a.mean.size} and of {b.mean.size} columns cannot be merged; merge "
                "states of one site only."
            )
        if a.n == 0 or b.n == 0:
            return b if a.n == 0 else a
        n = a.n + b.n
        delta = b.mean - a.mean
        m2 = np.outer(delta, delta)
        m2 *= a.n * (b.n / n)
        m2 += a.m2
        m2 += b.m2
        return GramState(n, a.mean + delta * (b.n / n), m2)

    def finish(self, state: GramState) -> dict[str, Array]:
        """Return no columns: a Gram is a file of its own."""
        return {}

    def to_arrays(self, state: GramState) -> dict[str, Array]:
        """Return the state's arrays by name."""
        return {"n": np.array(state.n, np.int64), "mean": state.mean, "m2": state.m2}

    def from_arrays(self, arrays: Mapping[str, Array]) -> GramState:
        """Return the state that `to_arrays` was given."""
        return GramState(int(arrays["n"]), arrays["mean"], arrays["m2"])


class RunningGram:
    """Sums of products about the mean of the first rows; memory as of a `GramState`.

    Products are of float32: values whose squares it cannot hold give infinities.

    Parameters
    ----------
    width : int
        Columns of the site.
    """

    def __init__(self, width: int) -> None:
        self._shift: NDArray[np.float32] | None = None
        self._n = 0
        self._sums = np.zeros(width)
        self._products = np.zeros((width, width))

    def arrays(self) -> tuple[Array, ...]:
        """Return what takes memory."""
        return self._sums, self._products

    def add(self, block: Array) -> None:
        """Add rows, ``(n, width)`` in the stored dtype, infinities saturated."""
        for first in range(0, len(block), _BLOCK_ROWS):
            x = read_values(block[first : first + _BLOCK_ROWS], np.float32)
            if (bad := np.isnan(x).any(axis=1)).any():
                x = x[~bad]
            if not len(x):
                continue
            if self._shift is None:
                self._shift = x.mean(axis=0, dtype=np.float64).astype(np.float32)
            d = x - self._shift
            self._n += len(d)
            self._sums += d.sum(axis=0, dtype=np.float64)
            self._products += d.T @ d

    def state(self) -> GramState:
        """Return the moments of the rows added."""
        if self._shift is None:
            return Gram().start(self._sums.size)
        m2 = np.outer(self._sums, self._sums)
        m2 /= -self._n
        m2 += self._products
        return GramState(self._n, self._shift + self._sums / self._n, m2)
