"""The rows with the highest values of each of a few columns, exactly, in one pass in row order."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


class Exemplars:
    """The k highest positive values of each column; equal values in order of their rows.

    Parameters
    ----------
    n_columns : int
        Number of columns.
    k : int, default 100
        How many are kept of each.
    """

    def __init__(self, n_columns: int, k: int = 100) -> None:
        self._k = k
        self.values = [np.empty(0, np.float32) for _ in range(n_columns)]
        """The values of each column, highest first."""
        self.row_ids = [np.empty(0, np.int64) for _ in range(n_columns)]
        """Their rows."""

    def update(self, values: npt.NDArray[np.float32], row_ids: npt.NDArray[np.int64]) -> None:
        """Take rows in, ``(n, n_columns)``; their ids are above all seen before."""
        for j, column in enumerate(values.T):
            kept, rows = self.values[j], self.row_ids[j]
            # A later row with a value equal to the last one kept comes after it.
            floor = kept[-1] if len(kept) == self._k else np.float32(0)
            found = np.flatnonzero(column > floor)
            merged = np.concatenate([kept, column[found]])
            order = np.argsort(-merged, kind="stable")[: self._k]
            self.values[j] = merged[order]
            self.row_ids[j] = np.concatenate([rows, row_ids[found]])[order]
