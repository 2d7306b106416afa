"""A stack: arrays one above the other, for rows to be read into."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actstore.errors import ArgumentError


class RowStack:
    """Arrays that stand one above the other; a *place* is a row of them, counted from the top.

    Parameters
    ----------
    arrays : sequence of ndarray (n, width)
        One or more, of one width and dtype, of any heights and any distance from row to row.

    Raises
    ------
    ArgumentError
        If they differ in width or dtype, are read-only, or hold a row in pieces.
    """

    def __init__(self, arrays: Sequence[NDArray[Any]]) -> None:
        self.dtype = arrays[0].dtype
        """Dtype of the values."""
        self.width = arrays[0].shape[1]
        """Columns."""
        for array in arrays:
            if (
                array.shape[1:] != (self.width,)
                or array.dtype != self.dtype
                or (array.size and array.strides[1] != array.itemsize)
                or not array.flags.writeable
            ):
                raise ArgumentError(
                    f"an array of shape {array.shape}, {array.dtype} and strides {array.strides} "
                    f"cannot be read into; expected (n, {self.width}) of {self.dtype}, writeable, "
                    "each row in one piece."
                )
        self._arrays = list(arrays)  # an address keeps no memory alive
        heights = [len(array) for array in arrays]
        self._stops = np.cumsum(heights)
        self._strides = np.array([array.strides[0] for array in arrays], np.int64)
        starts = self._stops - heights
        self._origins = np.array([a.ctypes.data for a in arrays], np.int64) - starts * self._strides

    def __len__(self) -> int:
        return int(self._stops[-1])

    def addresses(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return where in memory the rows at some places begin, as long as the stack is there.

        Raises
        ------
        ArgumentError
            If there is no such place.
        """
        if len(places) and not 0 <= places.min() <= places.max() < len(self):
            raise ArgumentError(
                f"places {places.min()} … {places.max()} were given; expected 0 … {len(self) - 1}."
            )
        which = np.searchsorted(self._stops, places, side="right")
        found: NDArray[np.int64] = self._origins[which] + places * self._strides[which]
        return found
