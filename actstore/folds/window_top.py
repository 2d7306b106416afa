"""The exact top-k over windows: each window gives only its highest value.

One sentence repeated, or one list of names, can fill the whole top-k of a neuron.  Here a window
stands for itself once, by its highest content value and the first row that has it; the k best of
these are in the order of the top list.

A window is never cut between states: the rows of a window come in one `update` of the definition
(the compiled pass carries the window that is open from band to band), and windows do not span
segments.  So states are merged like the lists of top-k, and need not name their windows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, final

import numpy as np

from actstore.errors import ArgumentError
from actstore.folds.base import Array, read_values
from actstore.folds.topk import (
    Float32,
    Int64,
    Ranked,
    best,
    empty_list,
    list_from_arrays,
    list_to_arrays,
    merge_lists,
)


class WindowThresholds(NamedTuple):
    """The last place of a full list, which a window must come before; shape (width,)."""

    floor: Float32
    """Its value; -inf where the list is not full."""
    row_ids: Int64
    """Its row; -1 where the list is not full."""


@final
@dataclass(frozen=True)
class WindowTop:
    """The k windows with the highest values of each column.

    One pass; memory 12 bytes x k a column.
    """

    k: int = 100
    """Length of the list."""
    name: str = field(default="window_top", init=False)

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ArgumentError(f"k = {self.k} keeps nothing; give k >= 1.")

    def start(self, width: int) -> Ranked:
        """Return an empty list."""
        return empty_list(width, self.k)

    def update(
        self, state: Ranked, block: Array, row_ids: Int64, windows: Int64 | None = None
    ) -> Ranked:
        """Return the list with whole windows added; without `windows`, every row is one.

        See Also
        --------
        actstore.folds.base.Fold.update : the parameters.
        actstore.folds.cpu.BandFolds : the same, window by window across bands.
        """
        values = read_values(block, np.float32)
        row_ids = np.asarray(row_ids, np.int64)
        windows = row_ids if windows is None else windows
        for window in np.unique(windows):
            rows = np.flatnonzero(windows == window)
            rows = rows[np.argsort(row_ids[rows])]
            mine = np.where(np.isnan(values[rows]), -np.inf, values[rows])
            first = mine.argmax(axis=0)[None]
            highest = np.take_along_axis(values[rows], first, axis=0)
            state = best(state, highest.T, row_ids[rows][first].T, "top")
        return state

    def merge(self, a: Ranked, b: Ranked) -> Ranked:
        """Return the list of the windows of `a` and `b` together.

        Raises
        ------
        ArgumentError
            If the states are of different widths or another k.
        """
        return merge_lists(a, b, "top", self.k)

    def finish(self, state: Ranked) -> dict[str, Array]:
        """Return no columns: exemplars are a table of their own."""
        return {}

    def thresholds(self, state: Ranked) -> WindowThresholds:
        """Return the place that a window must come before to enter the list."""
        last = self.k - 1
        return WindowThresholds(
            np.where(state.counts > last, state.values[:, last], np.float32(-np.inf)),
            state.row_ids[:, last].copy(),
        )

    def to_arrays(self, state: Ranked) -> dict[str, Array]:
        """Return the places taken, column after column; a segment's take 6 bytes each."""
        return list_to_arrays(state, "window")

    def from_arrays(self, arrays: Mapping[str, Array]) -> Ranked:
        """Return the state that `to_arrays` was given.

        Raises
        ------
        ArgumentError
            If the list is longer than k.
        """
        return list_from_arrays(arrays, "window", self.k)
