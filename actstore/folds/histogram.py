"""A histogram of every column, with the same 256 bins everywhere.

The bins are those that sign, exponent and the two leading bits of the mantissa of a float16 tell
apart (for a float16 the high byte of its bits): four to each power of two, so an edge is at most a
quarter above the edge before it.  They are numbered by value: a value whose magnitude has place m
is in bin ``128 + m``, or ``127 - m`` if it is negative, and a running sum over bins is a
distribution.  Wider dtypes use the same edges: below 2**-14 magnitudes fall into bins of 2**-16,
from 57,344 on into the last bin of their sign, which has no outer edge.  -0.0 is 0.0; NaN is not
counted.  Bins 0-3 and 252-255 hold nothing.

Counts are integers, so states merge exactly.  A quantile is known as the [low, high] of the bin
that holds it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from actstore.errors import ArgumentError
from actstore.folds.base import Array, read_values

Float32 = NDArray[np.float32]

N_BINS = 256
LAST_PLACE = 123
"""Place of the magnitudes from 57,344 on."""
MAGNITUDES: Float32 = (
    (np.arange(LAST_PLACE + 1, dtype=np.uint16) << 8).view(np.float16).astype(np.float32)
)
"""The smallest magnitude of each place."""
QUANTILES = {f"q{percent:02d}": percent / 100 for percent in (1, 5, 25, 50, 75, 95, 99)}
"""The quantiles that stand in the ``neurons`` table, by name."""


@dataclass(frozen=True)
class HistogramState:
    """Counts of some rows."""

    counts: NDArray[np.int64]
    """Values in each bin, shape (width, 256)."""


def bins_of(values: Array) -> NDArray[np.int64]:
    """Return the bin of each value; of a NaN it means nothing."""
    x = read_values(values, np.float32)
    place = np.searchsorted(MAGNITUDES, np.abs(x), side="right") - 1
    return np.where(x < 0, N_BINS // 2 - 1 - place, N_BINS // 2 + place)


def bin_edges() -> tuple[Float32, Float32]:
    """Return the least and the greatest value of each bin, both of shape (256,).

    The edge of greater magnitude is the next bin's; of the last bins it is infinite.  Edges of
    bins that hold nothing are NaN.
    """
    low = np.full(N_BINS, np.nan, np.float32)
    outer = np.append(MAGNITUDES[1:], np.float32(np.inf))
    middle = N_BINS // 2
    low[middle : middle + LAST_PLACE + 1] = MAGNITUDES
    low[middle - LAST_PLACE - 1 : middle] = -outer[::-1]
    high = -low[::-1]
    high[middle - 1] = 0.0  # not -0.0
    return low, high


def quantile_bounds(counts: NDArray[np.integer[Any]], q: float) -> tuple[Float32, Float32]:
    """Return the edges of the bin that holds the q-quantile of each column.

    The quantile is a value that occurs: the first at or below which a share `q` of the values lie.

    Parameters
    ----------
    counts : int array, shape (width, 256)
        Counts of a `HistogramState`.
    q : float
        From 0 to 1.

    Returns
    -------
    low, high : float32 arrays, shape (width,)
        Edges as in `bin_edges`: clip them to the column's extremes.  NaN where nothing was counted.

    Raises
    ------
    ArgumentError
        If `q` is not from 0 to 1.

    See Also
    --------
    numpy.quantile : the same quantile with ``method="inverted_cdf"``.
    """
    if not 0 <= q <= 1:
        raise ArgumentError(f"q = {q} is no quantile; give a share from 0 to 1.")
    below = np.cumsum(counts, axis=1, dtype=np.int64)
    n = below[:, -1]
    rank = np.maximum(np.ceil(q * n), 1)
    found = np.minimum((below < rank[:, None]).sum(axis=1), N_BINS - 1)
    low, high = (np.where(n > 0, edges[found], np.float32(np.nan)) for edges in bin_edges())
    return low, high


@final
@dataclass(frozen=True)
class Histogram:
    """Counts of the values of each column in 256 bins.

    One pass; memory 2 KiB a column, saved 3 to 5 bytes a bin that holds something.
    """

    name: str = field(default="histogram", init=False)

    def start(self, width: int) -> HistogramState:
        """Return empty bins."""
        return HistogramState(np.zeros((width, N_BINS), np.int64))

    def update(
        self,
        state: HistogramState,
        block: Array,
        row_ids: NDArray[np.int64],
        windows: NDArray[np.int64] | None = None,
    ) -> HistogramState:
        """Return the counts with a block added; which rows they are is of no account.

        See Also
        --------
        actstore.folds.base.Fold.update : the parameters.
        actstore.folds.cpu.BandFolds : the same in one compiled pass with all other folds.
        """
        x = read_values(block, np.float32)
        rows, columns = np.nonzero(~np.isnan(x))
        counts = state.counts.copy()
        np.add.at(counts, (columns, bins_of(x[rows, columns])), 1)
        return HistogramState(counts)

    def merge(self, a: HistogramState, b: HistogramState) -> HistogramState:
        """Return the counts of the rows of `a` and `b` together.

        Raises
        ------
        ArgumentError
            If the states are of different widths.
        """
        if a.counts.shape != b.counts.shape:
            raise ArgumentError(
                f"histograms of {len(a.counts)} and of {len(b.counts)} columns cannot be merged; "
                "merge states of one site only."
            )
        return HistogramState(a.counts + b.counts)

    def finish(self, state: HistogramState) -> dict[str, Array]:
        """Return the columns of the ``neurons`` table: ``q01_low``, ``q01_high`` … ``q99_high``."""
        columns = {}
        for name, q in QUANTILES.items():
            columns[f"{name}_low"], columns[f"{name}_high"] = quantile_bounds(state.counts, q)
        return columns

    def to_arrays(self, state: HistogramState) -> dict[str, Array]:
        """Return the bins that hold something, column after column."""
        columns, bins = np.nonzero(state.counts)
        counts = state.counts[columns, bins]
        return {
            "n_bins": np.bincount(columns, minlength=len(state.counts)).astype(np.uint16),
            "bins": bins.astype(np.uint8),
            "counts": counts.astype(np.min_scalar_type(int(counts.max(initial=0)))),
        }

    def from_arrays(self, arrays: Mapping[str, Array]) -> HistogramState:
        """Return the state that `to_arrays` was given."""
        n_bins = arrays["n_bins"]
        state = self.start(len(n_bins))
        columns = np.repeat(np.arange(len(n_bins)), n_bins)
        state.counts[columns, arrays["bins"]] = arrays["counts"]
        return state
