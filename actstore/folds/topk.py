"""The exact top-k and bottom-k of every column.

A list is the k best (value, row) pairs under a total order: *top* by value descending, then row_id
ascending; *bottom* by value ascending, then row_id ascending.  Because no two pairs are equal
under it, the best k of a union are the best k of the parts' best k, whatever the parts: merging is
exact, associative and commutative, and any split into segments or workers gives the same lists.

-0.0 equals 0.0 and is held as 0.0.  NaN never enters.

Once a list is full, its last place is a threshold: what comes after it in the order can never
enter.  `thresholds` hands these places to the next segments' passes.  A value that *ties* with a
threshold still enters if its row comes before the threshold's, so thresholds name rows too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, final

import numpy as np
from numpy.typing import NDArray

from actstore.compiled import compiled
from actstore.errors import ArgumentError
from actstore.folds.base import Array, read_values

Float32 = NDArray[np.float32]
Int64 = NDArray[np.int64]
Int32 = NDArray[np.int32]

SIDES = ("top", "bottom")
"""The two lists of a state."""


class Thresholds(NamedTuple):
    """The last places of full lists, which a row must come before; arrays of shape (width,)."""

    top_floor: Float32
    """Last value of a full top list; -inf where the list is not full."""
    bottom_ceiling: Float32
    """Last value of a full bottom list; +inf where the list is not full."""
    top_row_ids: Int64
    """The row of `top_floor`; -1 where the list is not full."""
    bottom_row_ids: Int64
    """The row of `bottom_ceiling`; -1 where the list is not full."""


@dataclass(frozen=True)
class Ranked:
    """One list of k places for every column, best first; places past `counts` are NaN and -1."""

    values: Float32
    """Values, shape (width, k)."""
    row_ids: Int64
    """Their rows, shape (width, k)."""
    counts: Int32
    """Number of places taken, shape (width,)."""

    @property
    def taken(self) -> NDArray[np.bool_]:
        """Which places are taken; shape (width, k)."""
        places = np.arange(self.values.shape[1], dtype=np.int32)
        return np.asarray(places < self.counts[:, None])


@dataclass(frozen=True)
class TopKState:
    """The lists of some rows."""

    top: Ranked
    """Highest values: value descending, then row_id ascending."""
    bottom: Ranked
    """Lowest values: value ascending, then row_id ascending."""


@final
@dataclass(frozen=True)
class TopK:
    """The rows with the k highest and the k lowest values of each column.

    One pass; memory 24 bytes x k a column.
    """

    k: int = 100
    """Length of each list."""
    name: str = field(default="topk", init=False)

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ArgumentError(f"k = {self.k} keeps nothing; give k >= 1.")

    def start(self, width: int) -> TopKState:
        """Return empty lists."""
        return TopKState(*(empty_list(width, self.k) for _ in SIDES))

    def update(
        self, state: TopKState, block: Array, row_ids: Int64, windows: Int64 | None = None
    ) -> TopKState:
        """Return the lists with the rows of a block added.

        See Also
        --------
        actstore.folds.base.Fold.update : the parameters.
        actstore.folds.cpu.BandFolds : the same in one compiled pass with all other folds.
        """
        values = read_values(block, np.float32).T
        rows = np.broadcast_to(np.asarray(row_ids, np.int64), values.shape)
        return TopKState(
            best(state.top, values, rows, "top"), best(state.bottom, values, rows, "bottom")
        )

    def merge(self, a: TopKState, b: TopKState) -> TopKState:
        """Return the lists of the rows of `a` and `b` together; time O(width x k), compiled.

        Raises
        ------
        ArgumentError
            If the states are of different widths or another k.
        """
        return TopKState(
            merge_lists(a.top, b.top, "top", self.k),
            merge_lists(a.bottom, b.bottom, "bottom", self.k),
        )

    def finish(self, state: TopKState) -> dict[str, Array]:
        """Return no columns: exemplars are a table of their own."""
        return {}

    def thresholds(self, state: TopKState) -> Thresholds:
        """Return the places that a row must come before to enter the lists."""
        last = self.k - 1
        top, bottom = state.top, state.bottom
        return Thresholds(
            np.where(top.counts > last, top.values[:, last], np.float32(-np.inf)),
            np.where(bottom.counts > last, bottom.values[:, last], np.float32(np.inf)),
            top.row_ids[:, last].copy(),
            bottom.row_ids[:, last].copy(),
        )

    def to_arrays(self, state: TopKState) -> dict[str, Array]:
        """Return the places taken, column after column; a segment's take 6 bytes each."""
        return list_to_arrays(state.top, "top") | list_to_arrays(state.bottom, "bottom")

    def from_arrays(self, arrays: Mapping[str, Array]) -> TopKState:
        """Return the state that `to_arrays` was given.

        Raises
        ------
        ArgumentError
            If a list is longer than k.
        """
        return TopKState(*(list_from_arrays(arrays, side, self.k) for side in SIDES))


def empty_list(width: int, k: int) -> Ranked:
    """Return a list without a place taken."""
    return Ranked(
        values=np.full((width, k), np.nan, np.float32),
        row_ids=np.full((width, k), -1, np.int64),
        counts=np.zeros(width, np.int32),
    )


def best(old: Ranked, values: Float32, rows: Int64, side: str) -> Ranked:
    """Return a list with (value, row) pairs added, both of shape (width, n); NaN is no value."""
    k = old.values.shape[1]
    values = np.concatenate([old.values, values], axis=1)
    rows = np.concatenate([old.row_ids, rows], axis=1)
    # NaN, which also marks places not taken, sorts last under either sign.
    order = np.lexsort((rows, -values if side == "top" else values), axis=-1)[:, :k]
    values = np.take_along_axis(values, order, axis=1)
    valid = ~np.isnan(values)
    rows = np.where(valid, np.take_along_axis(rows, order, axis=1), -1)
    return Ranked(values, rows, valid.sum(axis=1).astype(np.int32))


def merge_lists(a: Ranked, b: Ranked, side: str, k: int) -> Ranked:
    """Return the best k places of two lists; compiled.

    Raises
    ------
    ArgumentError
        If the lists are of different widths or another k.
    """
    shapes = {ranked.values.shape for ranked in (a, b)}
    if shapes != {(a.counts.size, k)}:
        raise ArgumentError(
            f"lists of (columns, k) = {' and '.join(map(str, sorted(shapes)))} cannot be merged "
            f"with k={k}; merge states of one site and this k only."
        )
    merged = empty_list(a.counts.size, k)
    _merge_lists(
        *(a.values, a.row_ids, a.counts),
        *(b.values, b.row_ids, b.counts),
        *(merged.values, merged.row_ids, merged.counts),
        side == "top",
    )
    return merged


def list_to_arrays(ranked: Ranked, name: str) -> dict[str, Array]:
    """Return the places taken, column after column, as arrays whose names begin with `name`."""
    rows = ranked.row_ids[ranked.taken]
    first = rows.min() if rows.size else 0
    distance = rows - first
    # Rows of one segment lie close together: 16 bits hold their distances.
    narrow = np.min_scalar_type(int(distance.max(initial=0)))
    return {
        f"{name}_counts": ranked.counts,
        f"{name}_values": ranked.values[ranked.taken],
        f"{name}_first_row_id": np.array([first], np.int64),
        f"{name}_row_distances": distance.astype(narrow),
    }


def list_from_arrays(arrays: Mapping[str, Array], name: str, k: int) -> Ranked:
    """Return the list that `list_to_arrays` was given.

    Raises
    ------
    ArgumentError
        If it is longer than k.
    """
    counts = np.asarray(arrays[f"{name}_counts"], np.int32)
    if counts.max(initial=0) > k:
        raise ArgumentError(
            f"a {name} list of {counts.max()} places does not fit k={k}; read it with "
            f"k={counts.max()} or more."
        )
    ranked = empty_list(counts.size, k)
    ranked.counts[:] = counts
    taken = ranked.taken
    ranked.values[taken] = arrays[f"{name}_values"]
    distances = arrays[f"{name}_row_distances"].astype(np.int64)
    ranked.row_ids[taken] = distances + arrays[f"{name}_first_row_id"]
    return ranked


@compiled
def _merge_lists(
    values_a: Float32,
    rows_a: Int64,
    counts_a: Int32,
    values_b: Float32,
    rows_b: Int64,
    counts_b: Int32,
    values: Float32,
    rows: Int64,
    counts: Int32,
    descending: bool,
) -> None:
    """Merge two sorted lists of every column into a third."""
    width, k = values.shape
    for column in range(width):
        n_a, n_b = counts_a[column], counts_b[column]
        n = min(n_a + n_b, k)
        a = b = 0
        for place in range(n):
            if a == n_a or b == n_b:
                from_a = b == n_b
            else:
                x, y = values_a[column, a], values_b[column, b]
                if x == y:
                    from_a = rows_a[column, a] < rows_b[column, b]
                else:
                    from_a = (x > y) == descending
            if from_a:
                values[column, place] = values_a[column, a]
                rows[column, place] = rows_a[column, a]
                a += 1
            else:
                values[column, place] = values_b[column, b]
                rows[column, place] = rows_b[column, b]
                b += 1
        counts[column] = n
