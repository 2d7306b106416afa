"""What a pass over bands takes and gives, wherever it runs.

There are two, and they leave the same folds: `actstore.folds.cpu` compiled for the processor, and
`actstore.folds.device` for bands that lie on an accelerator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from actstore.errors import ArgumentError
from actstore.folds.gram import GramState
from actstore.folds.histogram import HistogramState
from actstore.folds.kernel import TILE
from actstore.folds.moments import MomentsState
from actstore.folds.running import N_PLACES, NAN, NOWHERE, OVERFLOW, Found, nothing_found
from actstore.folds.sample import EVERY_HASH, SampleState
from actstore.folds.topk import Ranked, Thresholds, TopKState
from actstore.folds.window_top import WindowThresholds
from actstore.folds.zones import ZonesState
from actstore.shard import DTYPES

State = TypeVar("State")

SAMPLE_ROWS = 64
"""Rows whose mean the powers are taken about: keeps it within sqrt(rows / 64) deviations."""


@dataclass(frozen=True)
class SiteThresholds:
    """What a site's rows must come before to enter the lists and the sample.

    They may come from *committed* segments only.
    """

    topk: Thresholds
    """Of the top and bottom list."""
    window_top: WindowThresholds
    """Of the list over windows."""
    sample: np.uint64 = EVERY_HASH
    """Of the sample."""

    def limits(self, width: int, first_row_id: int, where: str) -> NDArray[np.float32]:
        """Return what the rows from one on must exceed or fall below, (3, width).

        They are the thresholds of the top, the bottom and the window list, or what lies just
        before them where a tie may still enter.

        Raises
        ------
        ArgumentError
            If the thresholds are of another width.
        """
        floor, ceiling, top_rows, bottom_rows = self.topk
        window_floor, window_rows = self.window_top
        shapes = {np.shape(side) for side in (*self.topk, *self.window_top)}
        if shapes != {(width,)}:
            raise ArgumentError(
                f"thresholds of {where} have shapes {', '.join(map(str, sorted(shapes)))}; "
                f"expected ({width},): those of the same site's lists."
            )
        below, above = np.float32(-np.inf), np.float32(np.inf)
        sides = (
            (floor, top_rows, below),
            (ceiling, bottom_rows, above),
            (window_floor, window_rows, below),
        )
        return np.array(
            [
                np.where(rows < first_row_id, limit, np.nextafter(limit, outside))
                for limit, rows, outside in sides
            ],
            np.float32,
        )


@dataclass(frozen=True)
class Faults:
    """Values of one site that are no number the store can hold."""

    n: int
    """How many there were."""
    places: tuple[tuple[int, int], ...]
    """(row_id, column) of the first `N_PLACES` of them, in row order."""


@dataclass(frozen=True)
class SiteFolds:
    """What one segment adds to the folds of one site."""

    moments: MomentsState
    """Moments of the content rows."""
    moments_others: MomentsState
    """Moments of the special and first rows."""
    topk: TopKState
    """Lists of the content rows."""
    window_top: Ranked
    """List of the windows."""
    histogram: HistogramState
    """Counts of the content rows."""
    zones: ZonesState
    """Extremes of the content rows of each band."""
    sample: SampleState
    """Content rows that may be in the sample."""
    gram: GramState | None
    """Second moments of the content rows, where asked for."""
    nan: Faults
    """NaN, which entered nothing."""
    overflow: Faults
    """Infinities, which were replaced by the largest finite value."""


class FaultsMet:
    """The NaN and infinities of one site, as bands bring them."""

    def __init__(self) -> None:
        self._found = nothing_found()

    def add(self, parts: Sequence[Found]) -> tuple[int, int]:
        """Take in what parts of a band brought; return how many of each kind these are."""
        counts = np.sum([part.counts for part in parts], axis=0)
        if counts.any():
            places = np.concatenate([self._found.places, *(part.places for part in parts)], axis=1)
            self._found.places[:] = np.sort(places, axis=1)[:, :N_PLACES]
            self._found.counts[:] += counts
        return int(counts[NAN]), int(counts[OVERFLOW])

    def of(self, kind: int, first_row_id: int) -> Faults:
        """Return the faults of one kind, their places as row_id and column."""
        places = (int(code) for code in self._found.places[kind] if code != NOWHERE)
        return Faults(
            n=int(self._found.counts[kind]),
            places=tuple((first_row_id + (code >> 32), code & 0xFFFFFFFF) for code in places),
        )


class BandRows(NamedTuple):
    """Which rows of a band are folded, checked."""

    content: NDArray[np.int64]
    """Content rows, counted from the band's first."""
    others: NDArray[np.int64]
    """Special and first rows."""
    windows: NDArray[np.int64]
    """The window_id of each content row."""

    @classmethod
    def of(
        cls,
        content: NDArray[np.integer[Any]],
        others: NDArray[np.integer[Any]],
        windows: NDArray[np.integer[Any]],
        chunk_rows: int,
        where: str,
    ) -> BandRows:
        """Return the rows.

        Raises
        ------
        ArgumentError
            If they are not ascending rows of a band, or not one window was given for each.
        """
        checked = cls(
            _checked_rows("content", content, chunk_rows, where),
            _checked_rows("others", others, chunk_rows, where),
            np.asarray(windows, np.int64),
        )
        if checked.windows.shape != checked.content.shape:
            raise ArgumentError(
                f"{checked.windows.size} windows at {where} for {checked.content.size} content "
                "rows; give the window_id of each content row."
            )
        return checked


class RunningSites(Generic[State]):
    """The running states of a segment's sites: begun at the first band, gone when finished.

    Parameters
    ----------
    makers : iterable of callable
        For each site in order, what makes its state.
    """

    def __init__(self, makers: Iterable[Callable[[], State]]) -> None:
        self._to_begin = dict(enumerate(makers))
        self._begun: dict[int, State] = {}

    def __iter__(self) -> Iterator[State]:
        """Yield the states that are held."""
        yield from list(self._begun.values())

    def running(self, site_index: int) -> State:
        """Return the state of a site.

        Raises
        ------
        ArgumentError
            If there is no such site, or it was finished.
        """
        if site_index not in self._begun:
            if site_index not in self._to_begin:
                raise ArgumentError(
                    f"site_index = {site_index} is no site, or was finished before; a finished "
                    "site takes no more bands."
                )
            self._begun[site_index] = self._to_begin.pop(site_index)()
        return self._begun[site_index]

    def finished(self, site_index: int) -> State:
        """Return the state of a site and let go of it; raises as `running` does."""
        self.running(site_index)
        return self._begun.pop(site_index)


def check_sites(widths: Sequence[int], dtypes: Sequence[str], k: int) -> None:
    """Raise `ArgumentError` unless these sites can be folded into lists of k places."""
    if len(widths) != len(dtypes):
        raise ArgumentError(
            f"{len(widths)} widths and {len(dtypes)} dtypes were given; give one each a site."
        )
    if min(widths, default=1) < 1:
        raise ArgumentError(f"a width of {min(widths)} is no site; give widths >= 1.")
    if unknown := sorted(set(dtypes) - set(DTYPES)):
        raise ArgumentError(
            f"dtype {unknown[0]!r} cannot be stored; choose one of {', '.join(DTYPES)}."
        )
    if k < 1:
        raise ArgumentError(f"k = {k} keeps nothing; give k >= 1.")


def check_layout(shape: tuple[int, ...], is_usable: bool, width: int, where: str) -> None:
    """Raise `ArgumentError` unless a shape is that of a band, writeable and C-contiguous."""
    if (
        not is_usable
        or len(shape) != 3
        or not 1 <= shape[2] <= TILE
        or not 0 <= shape[0] * shape[2] - width < shape[2]
    ):
        raise ArgumentError(
            f"band of {where} has shape {tuple(shape)}; expected a writeable, C-contiguous "
            f"(n_column_chunks, chunk_rows, chunk_columns) of at most {TILE} chunk_columns "
            f"for {width} columns. Lay it out with actstore.shard.to_band."
        )


def check_order(first_offset: int, next_offset: int, chunk_rows: int, where: str) -> None:
    """Raise `ArgumentError` unless a band comes behind the last one, in the same segment."""
    if first_offset < next_offset or first_offset + chunk_rows > 2**32:
        raise ArgumentError(
            f"first_offset = {first_offset} at {where} must be between {next_offset}, "
            "where the last band ended, and 2**32; give the bands in the order of their rows."
        )


def _checked_rows(
    name: str, rows: NDArray[np.integer[Any]], chunk_rows: int, where: str
) -> NDArray[np.int64]:
    found: NDArray[np.int64] = np.ascontiguousarray(rows, np.int64)
    if found.size and (found[0] < 0 or found[-1] >= chunk_rows or (np.diff(found) <= 0).any()):
        raise ArgumentError(
            f"{name} of {where} must be ascending rows of the band, 0 to {chunk_rows - 1}, "
            "each at most once; sort them and count them from the band's first row."
        )
    return found
