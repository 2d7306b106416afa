"""A uniform sample of rows, the same at every site.

Every row_id has a hash, and the sample is the `n_rows` rows with the lowest.  The hash permutes the
64-bit integers, so no two rows tie; the lowest of a union are the lowest of the parts' lowest,
whatever the parts, and the rows do not depend on the order in which they came.  The hash depends on
nothing but the row_id: all sites sample the same rows.

Values are held in the dtype they are stored in, bit for bit, NaN too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, final

import numpy as np
from numpy.typing import NDArray

from actstore.errors import ArgumentError
from actstore.folds.base import Array, read_values
from actstore.shard import DTYPES
from actstore.store.stored_rows import hash_rows

Int64 = NDArray[np.int64]

EVERY_HASH = np.uint64(2**64 - 1)
"""The threshold that every row passes."""


@dataclass(frozen=True)
class SampleState:
    """The sampled of some rows."""

    row_ids: Int64
    """The rows, shape (n,), ascending."""
    values: Array
    """Their values, shape (n, width), in the stored dtype."""


@final
@dataclass(frozen=True)
class Sample:
    """The values of rows drawn uniformly.

    One pass; memory `n_rows` values a column.
    """

    n_rows: int = 512
    """Rows drawn; all of them while there are fewer."""
    seed: int = 0
    """Which rows are drawn."""
    name: str = field(default="sample", init=False)

    def __post_init__(self) -> None:
        if self.n_rows < 1:
            raise ArgumentError(f"n_rows = {self.n_rows} draws nothing; give 1 or more.")

    def start(self, width: int) -> SampleState:
        """Return a sample without rows; its dtype is that of what is added first."""
        return SampleState(np.empty(0, np.int64), np.empty((0, width), np.float16))

    def update(
        self, state: SampleState, block: Array, row_ids: Int64, windows: Int64 | None = None
    ) -> SampleState:
        """Return the sample with the rows of a block taken in.

        See Also
        --------
        actstore.folds.base.Fold.update : the parameters.
        """
        return self.merge(state, SampleState(np.asarray(row_ids, np.int64), np.asarray(block)))

    def merge(self, a: SampleState, b: SampleState) -> SampleState:
        """Return the sample of the rows of `a` and `b` together.

        Raises
        ------
        ArgumentError
            If the states are of different widths or dtypes.
        """
        kinds = {(s.values.shape[1], str(s.values.dtype)) for s in (a, b) if s.row_ids.size}
        if len(kinds) > 1 or a.values.shape[1] != b.values.shape[1]:
            raise ArgumentError(
                f"samples of {a.values.shape[1]} columns of {a.values.dtype} and of "
                f"{b.values.shape[1]} columns of {b.values.dtype} cannot be merged; merge states "
                "of one site only."
            )
        row_ids = np.concatenate([a.row_ids, b.row_ids])
        lowest = np.argsort(hash_rows(row_ids, self.seed))[: self.n_rows]
        chosen = lowest[np.argsort(row_ids[lowest])]
        values = [s.values for s in (a, b) if s.row_ids.size] or [a.values]
        return SampleState(row_ids[chosen], np.concatenate(values)[chosen])

    def finish(self, state: SampleState) -> dict[str, Array]:
        """Return no columns: samples are files of their own."""
        return {}

    def threshold(self, row_ids: Int64) -> np.uint64:
        """Return the highest hash of a full sample of these rows, else `EVERY_HASH`."""
        if len(row_ids) < self.n_rows:
            return EVERY_HASH
        return np.uint64(np.sort(hash_rows(row_ids, self.seed))[self.n_rows - 1])

    def passes(self, row_ids: Int64, threshold: np.uint64) -> NDArray[np.bool_]:
        """Return which rows may enter a sample with this threshold."""
        return np.asarray(hash_rows(row_ids, self.seed) <= threshold)

    def to_arrays(self, state: SampleState) -> dict[str, Array]:
        """Return the state's arrays by name, bfloat16 as its bits, which NumPy's files can hold."""
        values = state.values
        if values.dtype == DTYPES["bfloat16"]:
            values = values.view(np.uint16)
        return {"row_ids": state.row_ids, "values": values}

    def from_arrays(self, arrays: Mapping[str, Array]) -> SampleState:
        """Return the state that `to_arrays` was given."""
        values = arrays["values"]
        if values.dtype == np.uint16:
            values = values.view(DTYPES["bfloat16"])
        return SampleState(arrays["row_ids"], values)


class QuantileRows(NamedTuple):
    """Rows of a sample from every quantile bin of every column."""

    row_ids: Int64
    """Shape (width, n_bins, n_each), the lowest bin first; -1 where a bin has fewer rows."""
    values: NDArray[np.float32]
    """Their values, NaN where there is none."""


def quantile_rows(values: Array, row_ids: Int64, n_bins: int, n_each: int) -> QuantileRows:
    """Return rows drawn from each quantile bin of every column of a sample.

    The rows of a column, in the order of value, then row_id, are cut into `n_bins` parts that are
    equal up to one row; of each the rows with the lowest hash are drawn.  Cost: two sorts of the
    sample.

    Parameters
    ----------
    values : array, shape (n, width)
        A sample's values, in the stored dtype; NaN is in no bin.
    row_ids : int64 array, shape (n,)
        Its rows.
    n_bins : int
        Quantile bins: 10 for deciles.
    n_each : int
        Rows to draw from each.

    Raises
    ------
    ArgumentError
        If `n_bins` or `n_each` is less than 1.
    """
    if n_bins < 1 or n_each < 1:
        raise ArgumentError(
            f"n_bins = {n_bins}, n_each = {n_each} draw nothing; give 1 or more of both."
        )
    x = read_values(values, np.float32).T
    width, n = x.shape
    rows = np.broadcast_to(np.asarray(row_ids, np.int64), x.shape)
    order = np.lexsort((rows, x), axis=-1)  # NaN last
    n_valid = np.count_nonzero(~np.isnan(x), axis=1)[:, None]
    places = np.arange(n)
    # Place p of m lies in the part b with  b * m // n_bins <= p < (b + 1) * m // n_bins.
    part = ((places + 1) * n_bins - 1) // np.maximum(n_valid, 1)
    part = np.where(places < n_valid, part, n_bins)
    found = QuantileRows(
        np.full((width, n_bins, n_each), -1, np.int64),
        np.full((width, n_bins, n_each), np.nan, np.float32),
    )
    hashes = hash_rows(np.asarray(row_ids, np.int64), Sample.seed)[order]
    drawn = np.lexsort((hashes, part), axis=-1)  # part by part, in the order drawn
    part = np.take_along_axis(part, drawn, axis=1)
    order = np.take_along_axis(order, drawn, axis=1)
    first = np.array([np.searchsorted(row, np.arange(n_bins + 1)) for row in part])
    nth = places - np.take_along_axis(first, part, axis=1)
    column, place = np.nonzero((part < n_bins) & (nth < n_each))
    where = (column, part[column, place], nth[column, place])
    found.row_ids[where] = rows[column, order[column, place]]
    found.values[where] = x[column, order[column, place]]
    return found
