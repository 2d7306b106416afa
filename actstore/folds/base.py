"""What a fold is.

A fold summarises one site in one pass over its rows.  Its state after some rows is a value: states
of disjoint sets of rows merge, in any grouping and any order, into the state of their union.  That
is all a capture needs to spread over segments, workers and restarts and still give one answer.

The `update` of a fold, written in NumPy float64, is its definition.  Compiled passes
(`actstore.folds.cpu`) are proved equal to it: exactly for counts, extremes and order statistics,
to 1e-9 for sums.  NaN is no value: it never enters a state.  Infinities were saturated before a
fold sees them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
"""An array whose dtype the docstring names."""

State = TypeVar("State")


def read_values(block: Array, dtype: type[np.floating[Any]]) -> Array:
    """Return a copy in a wider dtype, -0.0 as 0.0; NaN of any bits passes without a warning."""
    with np.errstate(invalid="ignore"):
        return np.asarray(np.asarray(block, dtype) + dtype(0.0))


class Fold(Protocol[State]):
    """A mergeable one-pass summary of one site.

    Implementations are small, final and frozen; all that changes lives in the state, and no
    method changes a state it is given.
    """

    @property
    def name(self) -> str:
        """Name of the fold, as in `FOLDS` and in ``partials/<name>/``."""
        ...

    def start(self, width: int) -> State:
        """Return the state before any row, for a site of `width` columns."""
        ...

    def update(
        self,
        state: State,
        block: Array,
        row_ids: NDArray[np.int64],
        windows: NDArray[np.int64] | None = None,
    ) -> State:
        """Return the state with some rows added; the definition of the fold.

        Parameters
        ----------
        state : State
            A state for the block's width.
        block : array, shape (n, width)
            Stored values, in the dtype of the store: float16, bfloat16 or float32.
        row_ids : int64 array, shape (n,)
            The row_id of each row of the block; no row may be given twice.
        windows : int64 array, shape (n,), optional
            The window_id of each row, for folds over windows; a window's rows come in one block.
        """
        ...

    def merge(self, a: State, b: State) -> State:
        """Return the state of the rows of `a` and `b` together; their rows must be disjoint."""
        ...

    def finish(self, state: State) -> dict[str, Array]:
        """Return columns of the ``neurons`` table, each of shape (width,); may be empty."""
        ...

    def to_arrays(self, state: State) -> dict[str, Array]:
        """Return the state as plain arrays, compact and lossless, for `numpy.savez`."""
        ...

    def from_arrays(self, arrays: Mapping[str, Array]) -> State:
        """Return the state that `to_arrays` was given."""
        ...
