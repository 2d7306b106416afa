"""Zones: the largest and smallest value of every column in every band of rows.

A band that cannot hold what is looked for need not be read: zones prune scans for more places than
the index holds.  Bands are counted in *planned* rows, ``chunk_rows`` of a segment each, whether or
not all of them are kept; a state holds those with a content row, ascending.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import final

import numpy as np
from numpy.typing import NDArray

from actstore.errors import ArgumentError
from actstore.folds.base import Array, read_values


@dataclass(frozen=True)
class ZonesState:
    """Extremes of some bands."""

    first_row_ids: NDArray[np.int64]
    """The row_id at which each band begins, shape (n_bands,), ascending."""
    extremes: NDArray[np.float32]
    """Smallest and largest value, shape (n_bands, 2, width); NaN where there is none."""


@final
@dataclass(frozen=True)
class Zones:
    """Extremes of each column in bands of `chunk_rows` rows.

    One pass; memory 8 bytes a column and band.
    """

    chunk_rows: int = 4096
    """Rows of a band; segments begin at multiples of it."""
    name: str = field(default="zones", init=False)

    def __post_init__(self) -> None:
        if self.chunk_rows < 1:
            raise ArgumentError(f"chunk_rows = {self.chunk_rows} is no band; give 1 or more.")

    def start(self, width: int) -> ZonesState:
        """Return no zones."""
        return ZonesState(np.empty(0, np.int64), np.empty((0, 2, width), np.float32))

    def update(
        self,
        state: ZonesState,
        block: Array,
        row_ids: NDArray[np.int64],
        windows: NDArray[np.int64] | None = None,
    ) -> ZonesState:
        """Return the zones with the rows of a block added.

        See Also
        --------
        actstore.folds.base.Fold.update : the parameters.
        actstore.folds.cpu.BandFolds : the same in one compiled pass with all other folds.
        """
        x = read_values(block, np.float32)
        first = row_ids - row_ids % self.chunk_rows
        bands = np.unique(first)
        extremes = np.empty((len(bands), 2, x.shape[1]), np.float32)
        for i, band in enumerate(bands):
            mine = x[first == band]
            extremes[i] = np.fmin.reduce(mine), np.fmax.reduce(mine)
        return self.merge(state, ZonesState(bands, extremes))

    def merge(self, a: ZonesState, b: ZonesState) -> ZonesState:
        """Return the zones of the rows of `a` and `b` together.

        Raises
        ------
        ArgumentError
            If the states are of different widths.
        """
        if a.extremes.shape[1:] != b.extremes.shape[1:]:
            raise ArgumentError(
                f"zones of {a.extremes.shape[2]} and of {b.extremes.shape[2]} columns cannot be "
                "merged; merge states of one site only."
            )
        if a.first_row_ids.size == 0 or (a.first_row_ids[-1:] < b.first_row_ids[:1]).all():
            return ZonesState(
                np.concatenate([a.first_row_ids, b.first_row_ids]),
                np.concatenate([a.extremes, b.extremes]),
            )
        bands = np.union1d(a.first_row_ids, b.first_row_ids)
        extremes = np.full((len(bands), *a.extremes.shape[1:]), np.nan, np.float32)
        for state in (a, b):
            places = np.searchsorted(bands, state.first_row_ids)
            low, high = state.extremes[:, 0], state.extremes[:, 1]
            extremes[places, 0] = np.fmin(extremes[places, 0], low)
            extremes[places, 1] = np.fmax(extremes[places, 1], high)
        return ZonesState(bands, extremes)

    def finish(self, state: ZonesState) -> dict[str, Array]:
        """Return no columns: zones are files of their own."""
        return {}

    def to_arrays(self, state: ZonesState) -> dict[str, Array]:
        """Return the state's arrays by name."""
        return {"first_row_ids": state.first_row_ids, "extremes": state.extremes}

    def from_arrays(self, arrays: Mapping[str, Array]) -> ZonesState:
        """Return the state that `to_arrays` was given."""
        return ZonesState(arrays["first_row_ids"], arrays["extremes"])


def zones_of(bands: Mapping[int, NDArray[np.float32]], width: int) -> ZonesState:
    """Return the state of bands, given the largest and the smallest values of each, (2, width).

    Where a band has no value they are infinite, and lie on the wrong side.
    """
    state = ZonesState(
        np.array(list(bands), np.int64),
        np.array([band[::-1] for band in bands.values()], np.float32).reshape(len(bands), 2, width),
    )
    state.extremes[np.isinf(state.extremes)] = np.nan
    return state
