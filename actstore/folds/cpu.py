"""All folds of all sites in one compiled pass over the bands of a segment.

A *band* is what a shard is written from: some thousands of rows of one site, cut into chunks of at
most 256 columns.  It passes through the caches once, in groups of eight rows of one chunk:

1. *Convert* the stored bits to float32, -0.0 to 0.0.
2. *Screen*: does any of the eight values of a column lie beyond the column's limits, the values
   below or above which nothing can enter the top-k?  Almost never, once many rows were seen.  Bits
   that are no number always fail.
3. Where they do, one value at a time: an infinity is replaced *in the band* by the largest finite
   value, NaN is counted, a candidate for the top-k is kept.
4. *Add up*: the four powers of the distance to a number near the column's mean, in float64.

Steps 1, 2 and 4 are short loops over columns that compile to vector instructions; only step 3
branches.  Columns are independent, so threads share out columns and the result has the same bits
for any number of them.

**Candidates.**  A candidate is one integer, ``rank of its value << 32 | 2**32 - 1 - offset``, so
that a larger key is a better place: higher value (for the bottom list lower), then lower row.  A
column holds up to 2k of them; when they are full, the best k stay and the k-th becomes the limit.
Rows come in ascending order, so a later row that ties with the limit loses, and is not looked at:
without that, every zero of a ReLU would be a candidate for the bottom list.  Thresholds of
*committed segments* say nothing of row order, so ties with those do enter.

**Stored types** are told apart by the integer their bits are seen as: uint16 holds float16, int16
bfloat16, uint32 float32.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import types
from numba.extending import intrinsic
from numpy.typing import NDArray

from actstore.errors import ArgumentError
from actstore.folds.base import Array
from actstore.folds.compiled import compiled
from actstore.folds.moments import MomentsState, from_power_sums
from actstore.folds.topk import Ranked, Thresholds, TopKState
from actstore.shard import DTYPES

GROUP = 8
"""Rows taken together; an accumulator is then read and written once in eight values."""
TILE = 256
"""Columns taken together at most: eight rows of them as float32 fill 8 KiB of the first cache."""
N_PLACES = 16
"""Places of NaN and of overflow that are remembered for each site."""
SAMPLE_ROWS = 64
"""Rows whose mean the powers are taken about: keeps it within sqrt(rows / 64) deviations."""

_TOP, _BOTTOM = 0, 1
_NAN, _OVERFLOW = 0, 1
_FLOAT32_MAX = float(np.finfo(np.float32).max)
_NOWHERE = np.uint64(2**64 - 1)
_LOW = np.uint64(2**32 - 1)
_SIGN = np.uint64(2**31)

_BITS = {"float16": np.uint16, "bfloat16": np.int16, "float32": np.uint32}
_LARGEST = {"float16": 0x7BFF, "bfloat16": 0x7F7F, "float32": 0x7F7FFFFF}


class _Sums(NamedTuple):
    """Running sums of some rows of one site; the last axis is the width."""

    shift: NDArray[np.float64]
    """What the powers are taken about; NaN until the first rows come."""
    powers: NDArray[np.float64]
    """Sums of (value - shift)**p, p = 1 … 4, and of the squares of positive values: (5, width)."""
    extremes: NDArray[np.float32]
    """Largest and smallest value, (2, width)."""
    n: NDArray[np.int64]
    """Values, NaN not counted."""
    n_positive: NDArray[np.int64]
    """Values above 0."""


class _Candidates(NamedTuple):
    """What may still enter the top and bottom lists of one site."""

    keys: NDArray[np.uint64]
    """Keys in no order, (2, width, capacity)."""
    counts: NDArray[np.int32]
    """Keys held, (2, width)."""
    limits: NDArray[np.float32]
    """Values a candidate must exceed (top) or fall below (bottom), (2, width)."""
    k: int
    """How many are kept when the keys are full."""


class _Found(NamedTuple):
    """NaN and overflow that were met."""

    counts: NDArray[np.int64]
    """How many, (2,)."""
    places: NDArray[np.uint64]
    """The first of them, as ``offset << 32 | column``, ascending, (2, N_PLACES)."""


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
    nan: Faults
    """NaN, which entered nothing."""
    overflow: Faults
    """Infinities, which were replaced by the largest finite value."""


class BandFolds:
    """The running folds of all sites of one segment.

    Memory is about 16 x `k` x 2 bytes a column, see `n_bytes`.  Different sites may be updated
    from different threads at once; one site may not.

    Parameters
    ----------
    widths : sequence of int
        Columns of each site.
    dtypes : sequence of str
        Stored dtype of each site: ``"float16"``, ``"bfloat16"`` or ``"float32"``.
    first_row_id : int
        The row_id of the segment's first row.
    k : int, default 100
        Length of the top and bottom lists.
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
    >>> folds.update(0, band, content=np.arange(1, 4), others=np.arange(1))
    >>> folds.finish(0).topk.top.row_ids[0]
    array([3, 2])
    """

    def __init__(
        self,
        widths: Sequence[int],
        dtypes: Sequence[str],
        *,
        first_row_id: int,
        k: int = 100,
        n_threads: int | None = None,
    ) -> None:
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
        self.first_row_id = first_row_id
        self.k = k
        self._n_threads = n_threads or _n_cpus()
        # Its threads end with this object; none start before the first band.
        self._pool = ThreadPoolExecutor(self._n_threads) if self._n_threads > 1 else None
        self._sites = [_Site(width, dtype, k) for width, dtype in zip(widths, dtypes, strict=True)]

    @property
    def n_bytes(self) -> int:
        """Bytes the running state takes once every page of it was touched."""
        arrays = (array for site in self._sites for array in site.arrays())
        return sum(array.nbytes for array in arrays)

    def update(
        self,
        site_index: int,
        band: Array,
        content: NDArray[np.integer[Any]],
        others: NDArray[np.integer[Any]],
        first_offset: int = 0,
        thresholds: Thresholds | None = None,
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
        first_offset : int, default 0
            Offset in the segment of the band's first row.
        thresholds : Thresholds, optional
            Of the lists of *committed* segments: `TopK.thresholds`.

        Returns
        -------
        n_nan, n_overflow : int
            Values of this band that were NaN, and that were infinite.

        Raises
        ------
        ArgumentError
            If the band's shape, dtype or layout, or the rows, are not as described.
        """
        site = self._sites[site_index]
        where = f"site_index = {site_index}"
        bits = site.bits_of(band, where)
        content, others = (
            _checked_rows(name, rows, bits.shape[1], where)
            for name, rows in (("content", content), ("others", others))
        )
        if first_offset < site.next_offset or first_offset + bits.shape[1] > 2**32:
            raise ArgumentError(
                f"first_offset = {first_offset} at {where} must be between {site.next_offset}, "
                "where the last band ended, and 2**32; give the bands in the order of their rows."
            )
        if thresholds is not None:
            site.tighten(thresholds, where)
        site.next_offset = first_offset + bits.shape[1]
        jobs = []
        for rows, sums, candidates in (
            (content, site.content, site.candidates),
            (others, site.others, site.unlisted),
        ):
            if rows.size:
                if np.isnan(sums.shift[0]):
                    sums.shift[:] = site.sample_mean(bits, rows)
                jobs.append((rows, sums, candidates))

        def fold(columns: tuple[int, int]) -> _Found:
            found = _nothing_found()
            for job in jobs:
                _fold_columns(bits, site.saturated, first_offset, columns, *job, found)
            return found

        parts = _split(site.width, self._n_threads)
        if self._pool is None or len(parts) == 1:
            return site.note([fold(part) for part in parts])
        return site.note(list(self._pool.map(fold, parts)))

    def finish(self, site_index: int) -> SiteFolds:
        """Return what the segment adds to the folds of one site; the running state stays."""
        site = self._sites[site_index]
        return SiteFolds(
            moments=_moments(site.content),
            moments_others=_moments(site.others),
            topk=_lists(site.candidates, self.first_row_id),
            nan=site.faults(_NAN, self.first_row_id),
            overflow=site.faults(_OVERFLOW, self.first_row_id),
        )


def _n_cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class _Site:
    """The running state of one site and what its bands must look like."""

    def __init__(self, width: int, dtype: str, k: int) -> None:
        self.width = width
        self.dtype = dtype
        self.next_offset = 0
        self.content, self.others = _no_sums(width), _no_sums(width)
        self.candidates = _no_candidates(width, max(2 * k, 64), (-np.inf, np.inf), k)
        # Nothing finite passes these limits: the other rows enter no list.
        self.unlisted = _no_candidates(width, GROUP, (_FLOAT32_MAX, -_FLOAT32_MAX), k)
        n_bits = 8 * DTYPES[dtype].itemsize
        largest = np.array([1 << n_bits - 1, 0], f"u{n_bits // 8}") | _LARGEST[dtype]
        self.saturated = largest.view(_BITS[dtype])
        self.found = _nothing_found()

    def arrays(self) -> Iterator[Array]:
        for state in (self.content, self.others, self.candidates):
            yield from (array for array in state if isinstance(array, np.ndarray))

    def bits_of(self, band: Array, where: str) -> Array:
        """Return the band's bits, after checking that it is a band of this site."""
        integer = np.dtype(_BITS[self.dtype])
        if band.dtype != DTYPES[self.dtype] and not (
            band.dtype.kind in "iu" and band.dtype.itemsize == integer.itemsize
        ):
            raise ArgumentError(
                f"band of {where} is {band.dtype}; expected {self.dtype} or its bits."
            )
        if (
            band.ndim != 3
            or not 1 <= band.shape[2] <= TILE
            or not 0 <= band.shape[0] * band.shape[2] - self.width < band.shape[2]
            or not band.flags.c_contiguous
            or not band.flags.writeable
        ):
            raise ArgumentError(
                f"band of {where} has shape {band.shape}; expected a writeable, C-contiguous "
                f"(n_column_chunks, chunk_rows, chunk_columns) of at most {TILE} chunk_columns "
                f"for {self.width} columns. Lay it out with actstore.shard.to_band."
            )
        return band.view(integer)

    def sample_mean(self, bits: Array, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the mean of some of the rows, evenly spread; 0 where all of them are NaN."""
        chosen = rows[np.linspace(0, rows.size - 1, min(rows.size, SAMPLE_ROWS)).astype(np.int64)]
        sample = bits[:, chosen].view(DTYPES[self.dtype]).astype(np.float64)
        sample = sample.transpose(1, 0, 2).reshape(chosen.size, -1)[:, : self.width]
        valid = ~np.isnan(sample)
        total = np.where(valid, np.clip(sample, -_FLOAT32_MAX, _FLOAT32_MAX), 0.0).sum(axis=0)
        return np.asarray(total / np.maximum(valid.sum(axis=0), 1))

    def tighten(self, thresholds: Thresholds, where: str) -> None:
        """Raise the limits to just below the thresholds: a tie with one may still enter."""
        floor, ceiling = (np.asarray(side, np.float32) for side in thresholds)
        if floor.shape != (self.width,) or ceiling.shape != (self.width,):
            raise ArgumentError(
                f"thresholds of {where} have shapes {floor.shape} and {ceiling.shape}; "
                f"expected ({self.width},): those of the same site's lists."
            )
        limits = self.candidates.limits
        below, above = np.float32(-np.inf), np.float32(np.inf)
        np.maximum(limits[_TOP], np.nextafter(floor, below), out=limits[_TOP])
        np.minimum(limits[_BOTTOM], np.nextafter(ceiling, above), out=limits[_BOTTOM])

    def note(self, parts: list[_Found]) -> tuple[int, int]:
        """Add the faults that the threads found in a band; return how many these are."""
        counts = np.sum([part.counts for part in parts], axis=0)
        if counts.any():
            places = np.concatenate([self.found.places, *(part.places for part in parts)], axis=1)
            self.found.places[:] = np.sort(places, axis=1)[:, :N_PLACES]
            self.found.counts[:] += counts
        return int(counts[_NAN]), int(counts[_OVERFLOW])

    def faults(self, kind: int, first_row_id: int) -> Faults:
        """Return the faults of one kind, their places as row_id and column."""
        places = (int(code) for code in self.found.places[kind] if code != _NOWHERE)
        return Faults(
            n=int(self.found.counts[kind]),
            places=tuple((first_row_id + (code >> 32), code & 0xFFFFFFFF) for code in places),
        )


def _no_sums(width: int) -> _Sums:
    return _Sums(
        shift=np.full(width, np.nan),
        powers=np.zeros((5, width)),
        extremes=np.array([[-np.inf], [np.inf]], np.float32).repeat(width, axis=1),
        n=np.zeros(width, np.int64),
        n_positive=np.zeros(width, np.int64),
    )


def _nothing_found() -> _Found:
    return _Found(np.zeros(2, np.int64), np.full((2, N_PLACES), _NOWHERE))


def _no_candidates(width: int, capacity: int, limits: tuple[float, float], k: int) -> _Candidates:
    return _Candidates(
        # Not filled: resident only as far as candidates come.
        keys=np.empty((2, width, capacity), np.uint64),
        counts=np.zeros((2, width), np.int32),
        limits=np.array(limits, np.float32)[:, None].repeat(width, axis=1),
        k=k,
    )


def _checked_rows(name: str, rows: Array, chunk_rows: int, where: str) -> NDArray[np.int64]:
    rows = np.ascontiguousarray(rows, np.int64)
    if rows.size and (rows[0] < 0 or rows[-1] >= chunk_rows or (np.diff(rows) <= 0).any()):
        raise ArgumentError(
            f"{name} of {where} must be ascending rows of the band, 0 to {chunk_rows - 1}, "
            "each at most once; sort them and count them from the band's first row."
        )
    return rows


def _split(width: int, n_parts: int) -> list[tuple[int, int]]:
    """Return ranges of columns of about equal size, cut between cache lines."""
    n_lines = -(-width // 32)
    cuts = [32 * (n_lines * part // n_parts) for part in range(n_parts)] + [width]
    return [(first, last) for first, last in pairwise(cuts) if first < last]


def _moments(sums: _Sums) -> MomentsState:
    return from_power_sums(
        n=sums.n.copy(),
        shift=np.nan_to_num(sums.shift),
        powers=sums.powers[:4],
        extremes=(sums.extremes[_BOTTOM].copy(), sums.extremes[_TOP].copy()),
        n_positive=sums.n_positive.copy(),
        energy_positive=sums.powers[4].copy(),
    )


def _lists(candidates: _Candidates, first_row_id: int) -> TopKState:
    """Return the candidates' best k, decoded and in order."""
    sides = []
    for side, (all_keys, n_keys) in enumerate(zip(candidates.keys, candidates.counts, strict=True)):
        width, k = n_keys.size, candidates.k
        # 0 is no key: its value would be NaN.
        keys = all_keys[:, : n_keys.max(initial=0)].copy()
        keys[np.arange(keys.shape[1]) >= n_keys[:, None]] = 0
        keys.sort(axis=1)
        keys = keys[:, ::-1][:, :k]
        counts = np.minimum(n_keys, k)
        ranks = keys >> np.uint64(32)
        if side == _BOTTOM:
            ranks ^= _LOW
        codes = np.where(ranks & _SIGN, ranks ^ _SIGN, ranks ^ _LOW).astype(np.uint32)
        ranked = Ranked(
            np.full((width, k), np.nan, np.float32), np.full((width, k), -1, np.int64), counts
        )
        taken = keys != 0
        ranked.values[:, : keys.shape[1]][taken] = codes.view(np.float32)[taken]
        offsets = (_LOW - (keys & _LOW)).astype(np.int64)
        ranked.row_ids[:, : keys.shape[1]][taken] = first_row_id + offsets[taken]
        sides.append(ranked)
    return TopKState(*sides)


def _to_float(typing_context: Any, bits: Any) -> Any:
    """Return stored bits as float32; exact, subnormals included (the one LLVM instruction)."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        (value,) = arguments
        if bits == types.uint16:
            return builder.fpext(builder.bitcast(value, ir.HalfType()), ir.FloatType())
        if bits == types.int16:
            wide = builder.zext(value, ir.IntType(32))
            value = builder.shl(wide, ir.Constant(ir.IntType(32), 16))
        return builder.bitcast(value, ir.FloatType())

    return types.float32(bits), generate


to_float = intrinsic(_to_float)


@compiled
def _fold_columns(
    bits: Array,
    saturated: Array,
    first_offset: int,
    columns: tuple[int, int],
    rows: NDArray[np.int64],
    sums: _Sums,
    candidates: _Candidates,
    found: _Found,
) -> None:
    """Fold some columns of the given rows of a band into the running state."""
    # Taken apart here, once: an array got from a tuple is counted, which inner loops would feel.
    keys, n_keys, site_limits, k = candidates
    site_shift, site_powers, site_extremes, site_n, site_n_positive = sums
    chunk_columns = bits.shape[2]
    # The running state of a tile, copied to arrays whose rows lie a constant TILE apart: the
    # compiler can then see that the loops below may be vectorised.
    values = np.empty(GROUP * TILE, np.float32)
    codes = values.view(np.uint32)
    limits = np.empty(2 * TILE, np.float32)
    extremes = np.empty(2 * TILE, np.float32)
    shift = np.empty(TILE, np.float64)
    powers = np.empty(5 * TILE, np.float64)
    n_positive = np.empty(TILE, np.int32)
    flags = np.empty(TILE, np.int8)

    first, last = columns
    while first < last:
        chunk, start = first // chunk_columns, first % chunk_columns
        width = min(chunk_columns - start, last - first)
        for column in range(width):
            for side in range(2):
                limits[side * TILE + column] = site_limits[side, first + column]
                extremes[side * TILE + column] = site_extremes[side, first + column]
            for power in range(5):
                powers[power * TILE + column] = 0.0
            shift[column] = site_shift[first + column]
            n_positive[column] = 0
        for column in range(TILE):
            flags[column] = 0

        for begin in range(0, rows.size, GROUP):
            n_rows = min(GROUP, rows.size - begin)
            _convert(bits, chunk, start, rows, begin, n_rows, values, width)
            if _screen(values, limits, flags, width):
                _examine(
                    *(bits, saturated, chunk, start, rows, begin, n_rows, first_offset),
                    *(values, codes, limits, flags, first, width),
                    *(keys, n_keys, k, site_n, found),
                )
            _add_extremes(values, extremes, n_positive, width)
            _add_powers(values, shift, powers, width)

        for column in range(width):
            for side in range(2):
                site_limits[side, first + column] = limits[side * TILE + column]
                site_extremes[side, first + column] = extremes[side * TILE + column]
            for power in range(5):
                site_powers[power, first + column] += powers[power * TILE + column]
            site_n[first + column] += rows.size
            site_n_positive[first + column] += n_positive[column]
        first += width


@compiled
def _examine(
    bits: Array,
    saturated: Array,
    chunk: int,
    start: int,
    rows: NDArray[np.int64],
    begin: int,
    n_rows: int,
    first_offset: int,
    values: NDArray[np.float32],
    codes: NDArray[np.uint32],
    limits: NDArray[np.float32],
    flags: NDArray[np.int8],
    first: int,
    width: int,
    keys: NDArray[np.uint64],
    n_keys: NDArray[np.int32],
    k: int,
    site_n: NDArray[np.int64],
    found: _Found,
) -> None:
    """Look at the flagged columns of a group value by value: faults, then candidates."""
    eight_flags = flags.view(np.uint64)
    for word in range((width + 7) // 8):
        if eight_flags[word] == 0:
            continue
        for column in range(8 * word, min(8 * word + 8, width)):
            if flags[column] == 0:
                continue
            site_column, sides = first + column, int(flags[column])
            for i in range(n_rows):
                value = values[i * TILE + column]
                if abs(value) <= _FLOAT32_MAX:
                    continue
                row = rows[begin + i]
                kind = _NAN if value != value else _OVERFLOW
                _note(found, kind, first_offset + row, site_column)
                if kind == _NAN:
                    site_n[site_column] -= 1
                else:
                    code = saturated[1 if value > 0 else 0]
                    bits[chunk, row, start + column] = code
                    values[i * TILE + column] = to_float(code)
                    sides = 3
            for side in range(2):
                if not sides >> side & 1:
                    continue
                flip = _LOW if side == _BOTTOM else np.uint64(0)
                limit = limits[side * TILE + column]
                n = int(n_keys[side, site_column])
                for i in range(n_rows):
                    value, code = values[i * TILE + column], np.uint64(codes[i * TILE + column])
                    rank = code ^ (_LOW if code & _SIGN else _SIGN) ^ flip
                    offset = np.uint64(first_offset + rows[begin + i])
                    # Written in any case and kept if it counts: no branch to guess wrong.
                    keys[side, site_column, n] = rank << np.uint64(32) | (_LOW - offset)
                    n += int(value < limit if side == _BOTTOM else value > limit)
                if n > keys.shape[2] - GROUP:
                    _keep_best(keys[side, site_column], n, k)
                    n = k
                    rank = (keys[side, site_column, k - 1] >> np.uint64(32)) ^ flip
                    kth = to_float(np.uint32(rank ^ (_SIGN if rank & _SIGN else _LOW)))
                    limit = min(limit, kth) if side == _BOTTOM else max(limit, kth)
                    limits[side * TILE + column] = limit
                n_keys[side, site_column] = n


@compiled
def _convert(
    bits: Array,
    chunk: int,
    start: int,
    rows: NDArray[np.int64],
    begin: int,
    n_rows: int,
    values: NDArray[np.float32],
    width: int,
) -> None:
    """Write a group as float32, -0.0 as 0.0, and NaN for the rows that a last group lacks."""
    for i in range(GROUP):
        if i < n_rows:
            row = rows[begin + i]
            # An unsigned index needs no test for counting from the end.
            for column in range(width):
                value = to_float(bits[chunk, row, np.uint64(start + column)])
                values[np.uint64(i * TILE + column)] = value + np.float32(0.0)
        else:
            for column in range(width):
                values[np.uint64(i * TILE + column)] = np.nan


@compiled
def _screen(
    values: NDArray[np.float32],
    limits: NDArray[np.float32],
    flags: NDArray[np.int8],
    width: int,
) -> bool:
    """Flag columns with a value beyond the top (1) or bottom (2) limit or NaN (4); say if any."""
    n_flagged = 0
    for column in range(width):
        high, low, is_nan = -np.float32(np.inf), np.float32(np.inf), False
        for i in range(GROUP):
            value = values[i * TILE + column]
            high = value if value > high else high
            low = value if value < low else low
            is_nan |= value != value
        flag = (high > limits[column]) + 2 * (low < limits[TILE + column]) + 4 * is_nan
        flags[column] = flag
        n_flagged += flag
    return n_flagged > 0


@compiled
def _add_extremes(
    values: NDArray[np.float32],
    extremes: NDArray[np.float32],
    n_positive: NDArray[np.int32],
    width: int,
) -> None:
    for column in range(width):
        high, low, n = extremes[column], extremes[TILE + column], n_positive[column]
        for i in range(GROUP):
            value = values[i * TILE + column]
            high = value if value > high else high
            low = value if value < low else low
            n += np.int32(value > np.float32(0.0))
        extremes[column], extremes[TILE + column], n_positive[column] = high, low, n


@compiled
def _add_powers(
    values: NDArray[np.float32],
    shift: NDArray[np.float64],
    powers: NDArray[np.float64],
    width: int,
) -> None:
    """Add powers 1 to 4 of the distance to the shift, and the squares of positive values."""
    for column in range(width):
        s1 = s2 = s3 = s4 = energy = 0.0
        for i in range(GROUP):
            value = np.float64(values[i * TILE + column])
            d = value - shift[column]
            d = d if d == d else 0.0
            square = d * d
            s1 += d
            s2 += square
            s3 += square * d
            s4 += square * square
            positive = value if value > 0.0 else 0.0
            energy += positive * positive
        powers[column] += s1
        powers[TILE + column] += s2
        powers[2 * TILE + column] += s3
        powers[3 * TILE + column] += s4
        powers[4 * TILE + column] += energy


@compiled
def _keep_best(keys: NDArray[np.uint64], n: int, k: int) -> None:
    """Move the k largest of n keys to the front, the k-th last among them (quickselect)."""
    low, high = 0, n - 1
    while low < high:
        pivot = keys[(low + high) // 2]
        i, j = low, high
        while i <= j:
            while keys[i] > pivot:
                i += 1
            while keys[j] < pivot:
                j -= 1
            if i <= j:
                keys[i], keys[j] = keys[j], keys[i]
                i += 1
                j -= 1
        if k - 1 <= j:
            high = j
        elif k - 1 >= i:
            low = i
        else:
            break


@compiled
def _note(found: _Found, kind: int, offset: int, column: int) -> None:
    """Count a fault and remember its place if it is among the first."""
    found.counts[kind] += 1
    places, i = found.places[kind], N_PLACES - 1
    place = np.uint64(offset) << np.uint64(32) | np.uint64(column)
    if place >= places[i]:
        return
    while i > 0 and places[i - 1] > place:
        places[i] = places[i - 1]
        i -= 1
    places[i] = place


def warm_up() -> None:
    """Compile, or load from the cache, what `BandFolds` runs: some seconds the first time."""
    for dtype in DTYPES:
        folds = BandFolds([1], [dtype], first_row_id=0, k=1, n_threads=1)
        folds.update(0, np.zeros((1, 1, 1), DTYPES[dtype]), np.arange(1), np.arange(0))
