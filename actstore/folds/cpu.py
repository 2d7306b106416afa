"""All folds of all sites in one compiled pass over the bands of a segment.

`BandFolds` holds the running state of a segment's sites, shares the columns of each band out to
threads, and turns what `actstore.folds.kernel` added up into the states of the folds.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actstore.errors import ArgumentError
from actstore.folds.base import Array, read_values
from actstore.folds.gram import RunningGram
from actstore.folds.histogram import N_BINS, HistogramState
from actstore.folds.kernel import GROUP, first_limits, fold_columns
from actstore.folds.moments import MomentsState, from_power_sums
from actstore.folds.passes import (
    SAMPLE_ROWS,
    BandRows,
    FaultsMet,
    RunningSites,
    SiteFolds,
    SiteThresholds,
    check_layout,
    check_order,
    check_sites,
)
from actstore.folds.running import (
    BITS,
    BOTTOM,
    FLOAT32_MAX,
    N_COUNTS,
    NAN,
    NO_BIN,
    OVERFLOW,
    TOP,
    Candidates,
    Found,
    Sums,
    Window,
    encode,
    nothing_found,
    ranked,
)
from actstore.folds.sample import EVERY_HASH, Sample
from actstore.folds.topk import TopKState
from actstore.folds.zones import zones_of
from actstore.shard import DTYPES

# Groups of rows whose extremes give the first limits, for each place of a list: more of them bring
# the limits nearer to the values they stand for, and cost more.
_GROUPS_OF_K = 3

# Of a column: sums of content and of other rows, limits, counts, the open window.
_SMALL_BYTES = 192
# Of a pair of columns: sums in float64, a product in float32, and the state made of them.
_GRAM_BYTES = 8 + 4 + 8

_LARGEST = {"float16": 0x7BFF, "bfloat16": 0x7F7F, "float32": 0x7F7FFFFF}


class BandFolds:
    """The running folds of all sites of one segment.

    Memory is 42 x `k` + 1,280 bytes a column at most, and its zones and sampled values: see
    `state_bytes`.  Different sites may be updated from different threads at once; one site may not.

    Parameters
    ----------
    widths : sequence of int
        Columns of each site.
    dtypes : sequence of str
        Stored dtype of each site: ``"float16"``, ``"bfloat16"`` or ``"float32"``.
    first_row_id : int
        The row_id of the segment's first row.
    k : int, default 100
        Length of the lists.
    sample : Sample, optional
        Which rows are sampled.
    gram_sites : collection of int
        The sites whose Gram is wanted, in the order of `widths`; 8 bytes x width**2 each.
    n_threads : int, optional
        Threads that share a band's columns; default the CPUs this process may use.  The result
        does not depend on it.

    Raises
    ------
    ArgumentError
        If a dtype cannot be stored, or the parameters do not fit together.

    Examples
    --------
    >>> folds = BandFolds([3], ["float16"], first_row_id=0, k=2)
    >>> band = np.arange(12, dtype=np.float16).reshape(1, 4, 3)
    >>> windows = np.array([5, 5, 6])
    >>> folds.update(0, band, content=np.arange(1, 4), others=np.arange(1), windows=windows)
    (0, 0)
    >>> found = folds.finish(0)
    >>> found.topk.top.row_ids[0], found.window_top.row_ids[0]
    (array([3, 2]), array([3, 2]))
    """

    def __init__(
        self,
        widths: Sequence[int],
        dtypes: Sequence[str],
        *,
        first_row_id: int,
        k: int = 100,
        sample: Sample | None = None,
        gram_sites: Collection[int] = (),
        n_threads: int | None = None,
    ) -> None:
        check_sites(widths, dtypes, k)
        self.first_row_id = first_row_id
        self.k = k
        self._n_threads = n_threads or _n_cpus()
        # Its threads end with this object; none start before the first band.
        self._pool = ThreadPoolExecutor(self._n_threads) if self._n_threads > 1 else None
        self._sites = RunningSites(
            partial(_Site, width, dtype, k, sample or Sample(), i in gram_sites)
            for i, (width, dtype) in enumerate(zip(widths, dtypes, strict=True))
        )

    @property
    def n_bytes(self) -> int:
        """Bytes the running state takes once every page of it was touched."""
        return sum(array.nbytes for site in self._sites for array in site.arrays())

    def update(
        self,
        site_index: int,
        band: Array,
        content: NDArray[np.integer[Any]],
        others: NDArray[np.integer[Any]],
        windows: NDArray[np.integer[Any]],
        first_offset: int = 0,
        thresholds: SiteThresholds | None = None,
    ) -> tuple[int, int]:
        """Add a band of one site, replacing its infinities by the largest finite value.

        One pass over the band.  The bands of a site must come in the order of their rows.

        Parameters
        ----------
        site_index : int
            Which site, in the order of `widths`.
        band : array, shape (n_column_chunks, chunk_rows, chunk_columns), C-contiguous
            Stored values, in the site's dtype or as its bits; columns beyond the width and rows
            not named below are not looked at.  Infinities are replaced in place.
        content : int array, ascending
            Content rows, counted from the band's first.
        others : int array, ascending
            Special and first rows, of which only the moments are kept, apart.
        windows : int array, as long as `content`
            The window_id of each content row; the rows of a window follow each other, and may go
            on in the next band.
        first_offset : int, default 0
            Offset in the segment of the band's first row.
        thresholds : SiteThresholds, optional
            Of the lists and sample of *committed* segments.

        Returns
        -------
        n_nan, n_overflow : int
            Values of this band that were NaN, and that were infinite.

        Raises
        ------
        ArgumentError
            If the band's shape, dtype or layout, or the rows, are not as described, or the site
            was finished.
        """
        site = self._sites.running(site_index)
        where = f"site_index = {site_index}"
        bits = site.bits_of(band, where)
        chunk_rows = bits.shape[1]
        content, others, window_ids = BandRows.of(content, others, windows, chunk_rows, where)
        check_order(first_offset, site.next_offset, chunk_rows, where)
        if thresholds is not None:
            site.tighten(thresholds, self.first_row_id + first_offset, where)
        site.next_offset = first_offset + chunk_rows
        cuts = site.cuts(window_ids)
        zone, unused = (np.empty((2, site.width), np.float32) for _ in range(2))
        jobs = [
            (content, site.content, site.candidates, zone, True),
            (others, site.others, site.unlisted, unused, False),
        ]
        jobs = [job for job in jobs if job[0].size]
        for rows, sums, *_ in jobs:
            if np.isnan(sums.shift[0]):
                sums.shift[:] = site.sample_mean(bits, rows)

        n_groups = _GROUPS_OF_K * self.k
        is_first = content.size >= n_groups and bool(np.isinf(site.candidates.limits).all())

        def fold(columns: tuple[int, int]) -> Found:
            found = nothing_found()
            if is_first:
                first_limits(bits, site.saturated, columns, content, n_groups, site.candidates)
            for rows, sums, candidates, extremes, is_content in jobs:
                fold_columns(
                    *(bits, site.saturated, first_offset, columns, rows),
                    *(sums, candidates, found, extremes, is_content),
                    *(site.counts, site.window_candidates, site.window, cuts),
                )
            return found

        parts = _split(site.width, self._n_threads)
        if self._pool is None or len(parts) == 1:
            faults = site.faults.add([fold(part) for part in parts])
        else:
            faults = site.faults.add(list(self._pool.map(fold, parts)))
        if content.size:
            site.zones[self.first_row_id + first_offset] = zone
            # After the pass: infinities are mended now.
            site.draw(bits, content, self.first_row_id + first_offset)
            if site.gram is not None:
                site.gram.add(site.rows_of(bits, content))
        return faults

    def finish(self, site_index: int) -> SiteFolds:
        """Return what the segment adds to the folds of one site, and let its running state go."""
        site = self._sites.finished(site_index)
        return SiteFolds(
            moments=_moments(site.content),
            moments_others=_moments(site.others),
            topk=TopKState(*ranked(site.candidates, self.first_row_id)),
            window_top=ranked(site.with_open_window(), self.first_row_id)[0],
            histogram=HistogramState(site.counted()),
            zones=zones_of(site.zones, site.width),
            sample=site.sample,
            gram=None if site.gram is None else site.gram.state(),
            nan=site.faults.of(NAN, self.first_row_id),
            overflow=site.faults.of(OVERFLOW, self.first_row_id),
        )


def state_bytes(
    width: int, dtype: str, k: int, n_sampled: int, n_bands: int, with_gram: bool = False
) -> int:
    """Return the bytes that `BandFolds` takes for a site at most, after so many bands."""
    places = 2 * _capacity(k) + _window_capacity(k)
    column = 8 * places + 4 * N_COUNTS + 8 * n_bands + n_sampled * DTYPES[dtype].itemsize
    return width * (column + _SMALL_BYTES) + (_GRAM_BYTES * width**2 if with_gram else 0)


def _capacity(k: int) -> int:
    return max(2 * k, 64)


def _window_capacity(k: int) -> int:
    # A window gives one candidate at most: little room is needed beyond the list.
    return k + k // 4 + 1


def _n_cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class _Site:
    """The running state of one site and what its bands must look like."""

    def __init__(self, width: int, dtype: str, k: int, sample: Sample, with_gram: bool) -> None:
        self.width = width
        self.dtype = dtype
        self.next_offset = 0
        self.content, self.others = _no_sums(width), _no_sums(width)
        self.candidates = _no_candidates(width, _capacity(k), (-np.inf, np.inf), k)
        # Nothing finite passes these limits: the other rows enter no list.
        self.unlisted = _no_candidates(width, GROUP, (FLOAT32_MAX, -FLOAT32_MAX), k)
        self.window_candidates = _no_candidates(width, _window_capacity(k), (-np.inf,), k)
        self.window = Window(np.full(width, -np.inf, np.float32), np.zeros(width, np.int64))
        self.window_id: int | None = None
        self.counts = np.zeros((width, N_COUNTS), np.uint32)
        self.zones: dict[int, NDArray[np.float32]] = {}
        self.fold, self.sample_threshold = sample, EVERY_HASH
        self.sample = sample.start(width)
        self.gram = RunningGram(width) if with_gram else None
        n_bits = 8 * DTYPES[dtype].itemsize
        largest = np.array([1 << n_bits - 1, 0], f"u{n_bits // 8}") | _LARGEST[dtype]
        self.saturated = largest.view(BITS[dtype])
        self.faults = FaultsMet()

    def arrays(self) -> Iterator[Array]:
        for state in (
            *(self.content, self.others, self.candidates, self.window_candidates, self.window),
            *((self.counts, self.sample.values), tuple(self.zones.values())),
            () if self.gram is None else self.gram.arrays(),
        ):
            yield from (array for array in state if isinstance(array, np.ndarray))

    def bits_of(self, band: Array, where: str) -> Array:
        """Return the band's bits, after checking that it is a band of this site."""
        integer = np.dtype(BITS[self.dtype])
        if band.dtype != DTYPES[self.dtype] and not (
            band.dtype.kind in "iu" and band.dtype.itemsize == integer.itemsize
        ):
            raise ArgumentError(
                f"band of {where} is {band.dtype}; expected {self.dtype} or its bits."
            )
        usable = band.flags.c_contiguous and band.flags.writeable
        check_layout(band.shape, usable, self.width, where)
        return band.view(integer)

    def rows_of(self, bits: Array, rows: NDArray[np.int64]) -> Array:
        """Return some rows of a band as ``(n, width)`` values in the stored dtype."""
        chunks = bits[:, rows].transpose(1, 0, 2)
        return chunks.reshape(rows.size, -1)[:, : self.width].view(DTYPES[self.dtype])

    def sample_mean(self, bits: Array, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the mean of some of the rows, evenly spread; 0 where all of them are NaN."""
        chosen = rows[np.linspace(0, rows.size - 1, min(rows.size, SAMPLE_ROWS)).astype(np.int64)]
        sample = read_values(self.rows_of(bits, chosen), np.float64)
        valid = ~np.isnan(sample)
        lowest, highest = self.saturated.view(DTYPES[self.dtype]).astype(np.float64)
        total = np.where(valid, np.clip(sample, lowest, highest), 0.0).sum(axis=0)
        return np.asarray(total / np.maximum(valid.sum(axis=0), 1))

    def tighten(self, thresholds: SiteThresholds, first_row_id: int, where: str) -> None:
        """Raise the limits to the thresholds, or to just below them where a tie may still enter."""
        floor, ceiling, window_floor = thresholds.limits(self.width, first_row_id, where)
        limits, window_limits = self.candidates.limits, self.window_candidates.limits
        np.maximum(limits[TOP], floor, out=limits[TOP])
        np.minimum(limits[BOTTOM], ceiling, out=limits[BOTTOM])
        np.maximum(window_limits[TOP], window_floor, out=window_limits[TOP])
        self.sample_threshold = thresholds.sample

    def cuts(self, windows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the places of a band's content rows where the window that was open has ended."""
        if not windows.size:
            return np.empty(0, np.int64)
        before = np.append(windows[0] if self.window_id is None else self.window_id, windows[:-1])
        self.window_id = int(windows[-1])
        return np.flatnonzero(windows != before)

    def with_open_window(self) -> Candidates:
        """Return the candidates of the list over windows, with that of the open one."""
        keys, n_keys, limits, k = self.window_candidates
        keys = np.append(keys[..., : n_keys.max()], np.zeros((1, self.width, 1), np.uint64), axis=2)
        (columns,) = np.nonzero(self.window.highs > limits[TOP])
        keys[TOP, columns, n_keys[TOP, columns]] = encode(
            self.window.highs[columns], self.window.offsets[columns]
        )
        counts = n_keys.copy()
        counts[TOP, columns] += 1
        return Candidates(keys, counts, limits, k)

    def counted(self) -> NDArray[np.int64]:
        """Return the counts of the bins, (width, 256)."""
        counts = self.counts[:, :N_BINS].astype(np.int64)
        counts[:, NO_BIN] = 0
        return counts

    def draw(self, bits: Array, rows: NDArray[np.int64], first_row_id: int) -> None:
        """Take the rows of a band that may be in the sample."""
        limit = min(self.sample_threshold, self.fold.threshold(self.sample.row_ids))
        rows = rows[self.fold.passes(first_row_id + rows, limit)]
        if rows.size:
            values = self.rows_of(bits, rows)
            self.sample = self.fold.update(self.sample, values, first_row_id + rows)


def _no_sums(width: int) -> Sums:
    return Sums(
        shift=np.full(width, np.nan),
        powers=np.zeros((5, width)),
        extremes=np.array([[-np.inf], [np.inf]], np.float32).repeat(width, axis=1),
        n=np.zeros(width, np.int64),
        n_positive=np.zeros(width, np.int64),
    )


def _no_candidates(width: int, capacity: int, limits: tuple[float, ...], k: int) -> Candidates:
    return Candidates(
        # Not filled: resident only as far as candidates come.
        keys=np.empty((len(limits), width, capacity), np.uint64),
        counts=np.zeros((len(limits), width), np.int32),
        limits=np.array(limits, np.float32)[:, None].repeat(width, axis=1),
        k=k,
    )


def _split(width: int, n_parts: int) -> list[tuple[int, int]]:
    """Return ranges of columns of about equal size, cut between cache lines."""
    n_lines = -(-width // 32)
    cuts = [32 * (n_lines * part // n_parts) for part in range(n_parts)] + [width]
    return [(first, last) for first, last in pairwise(cuts) if first < last]


def _moments(sums: Sums) -> MomentsState:
    return from_power_sums(
        n=sums.n.copy(),
        shift=np.nan_to_num(sums.shift),
        powers=sums.powers[:4],
        extremes=(sums.extremes[BOTTOM].copy(), sums.extremes[TOP].copy()),
        n_positive=sums.n_positive.copy(),
        energy_positive=sums.powers[4].copy(),
    )


def warm_up() -> None:
    """Compile, or load from the cache, what `BandFolds` runs: some seconds the first time."""
    for dtype in DTYPES:
        folds = BandFolds([1], [dtype], first_row_id=0, k=1, n_threads=1)
        band = np.zeros((1, _GROUPS_OF_K, 1), DTYPES[dtype])
        rows = np.arange(_GROUPS_OF_K)
        folds.update(0, band, rows, np.arange(0), rows)
        folds.finish(0)
