"""The compiled pass of all folds over a band; `actstore.folds.cpu` drives it.

A *band* is what a shard is written from: some thousands of rows of one site, cut into chunks of at
most 256 columns.  It passes through the caches once, in groups of eight rows of one chunk:

1. *Convert* the stored bits to float32, -0.0 to 0.0.
2. *Screen*: the group's extremes, and with them: does any of the eight values of a column lie
   beyond the column's limits, the values below or above which nothing can enter the top-k?  Almost
   never, once many rows were seen.  Bits that are no number always fail.
3. Where they do, one value at a time: an infinity is replaced *in the band* by the largest finite
   value, NaN is counted, a candidate for the top-k is kept.
4. *Add up*: the four powers of the distance to a number near the column's mean, in float64.
5. Of content rows, *bin* the values and count the bins, and raise the *window's* highest values.

All but steps 3 and the counting are short loops over columns that compile to vector instructions;
only step 3 branches.  Columns are independent, so threads share out columns and the result has the
same bits for any number of them.

**Candidates.**  A column holds some more than k keys of a list (`actstore.folds.running`); when
they are full, the best k stay and the k-th becomes the limit.  Rows come in ascending order, so a
later row that ties with the limit loses, and is not looked at: without that, every zero of a ReLU
would be a candidate for the bottom list, and every minimum of a GELU.  A tie with the threshold of
*committed segments* loses if the threshold's row comes before the band; where segments are done out
of order it may win, and is a candidate.

In the first band of a store everything would be a candidate for long, so `first_limits` goes ahead
there: cut into groups, the rows have at least k values as high as the k-th of the groups' maxima.

**Windows.**  A column needs two numbers of the window that is open: its highest value, and where
to look for the first row that has it (the group, or in a group with several windows the row).  At
the window's end they are compared with the column's limit; what passes, about one window in N / k
after N windows, is looked up in the band and becomes a candidate, and the next window begins at
minus infinity.  A window that goes on in the next band is looked up at the end of this one.

**Counts.**  Columns of the histogram lie 272 counts apart, not 256: at a power of two the columns'
busy bins would fall into the same few sets of the first cache, and counting take five times as
long.

**Stored types** are told apart by the integer their bits are seen as: uint16 holds float16, int16
bfloat16, uint32 float32.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import types
from numba.extending import intrinsic
from numpy.typing import NDArray

from actstore.compiled import compiled
from actstore.folds.base import Array
from actstore.folds.histogram import LAST_PLACE
from actstore.folds.running import (
    BOTTOM,
    FLOAT32_MAX,
    LOW,
    N_PLACES,
    NAN,
    NO_BIN,
    NOT_HERE,
    OVERFLOW,
    SIGN,
    TOP,
    Candidates,
    Found,
    Sums,
    Window,
)

GROUP = 8
"""Rows taken together; an accumulator is then read and written once in eight values."""
TILE = 256
"""Columns taken together at most: eight rows of them as float32 fill 8 KiB of the first cache."""


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
def fold_columns(
    bits: Array,
    saturated: Array,
    first_offset: int,
    columns: tuple[int, int],
    rows: NDArray[np.int64],
    sums: Sums,
    candidates: Candidates,
    found: Found,
    zone: NDArray[np.float32],
    is_content: bool,
    counts: NDArray[np.uint32],
    window_candidates: Candidates,
    window: Window,
    cuts: NDArray[np.int64],
) -> None:
    """Fold some columns of the given rows of a band into the running state.

    The largest and smallest values of these rows are written to `zone`, (2, width).  Only content
    rows are counted in bins and come in windows: `cuts` are the places in `rows` where the window
    that was open ends and another begins.
    """
    # Taken apart here, once: an array got from a tuple is counted, which inner loops would feel.
    keys, n_keys, site_limits, k = candidates
    window_keys, n_window_keys, site_window_limits, window_k = window_candidates
    site_window_highs, window_offsets = window
    site_shift, site_powers, site_extremes, site_n, site_n_positive = sums
    chunk_columns = bits.shape[2]
    # The running state of a tile, copied to arrays whose rows lie a constant TILE apart: the
    # compiler can then see that the loops below may be vectorised.
    values = np.empty(GROUP * TILE, np.float32)
    codes = values.view(np.uint32)
    highs, lows = np.empty(TILE, np.float32), np.empty(TILE, np.float32)
    limits = np.empty(2 * TILE, np.float32)
    extremes = np.empty(2 * TILE, np.float32)
    shift = np.empty(TILE, np.float64)
    powers = np.empty(5 * TILE, np.float64)
    n_positive = np.empty(TILE, np.int32)
    flags = np.empty(TILE, np.int8)
    bins = np.empty(GROUP * TILE, np.uint8)
    window_highs, window_limits = np.empty(TILE, np.float32), np.empty(TILE, np.float32)
    since = np.empty(TILE, np.int32)

    first, last = columns
    while first < last:
        chunk, start = first // chunk_columns, first % chunk_columns
        width = min(chunk_columns - start, last - first)
        for column in range(width):
            for side in range(2):
                limits[side * TILE + column] = site_limits[side, first + column]
            extremes[column], extremes[TILE + column] = -np.inf, np.inf
            for power in range(5):
                powers[power * TILE + column] = 0.0
            shift[column] = site_shift[first + column]
            n_positive[column] = 0
            window_highs[column] = site_window_highs[first + column]
            window_limits[column] = site_window_limits[0, first + column]
            since[column] = NOT_HERE
        for column in range(TILE):
            flags[column] = 0
        cut = 0

        for begin in range(0, rows.size, GROUP):
            n_rows = min(GROUP, rows.size - begin)
            _convert(bits, chunk, start, rows, begin, n_rows, values, width)
            if _screen(values, limits, highs, lows, n_positive, flags, width):
                _examine(
                    *(bits, saturated, chunk, start, rows, begin, n_rows, first_offset),
                    *(values, codes, highs, lows, limits, flags, first, width),
                    *(keys, n_keys, k, site_n, found),
                )
            _add_extremes(highs, lows, extremes, width)
            _add_powers(values, shift, powers, width)
            if not is_content:
                continue
            _bin(values, codes, bins, width)
            _count(bins, counts, n_rows, first, width)
            at, stop = begin, begin + n_rows
            while at < stop:
                if cut < cuts.size and cuts[cut] == at:
                    _end_window(
                        *(bits, chunk, start, rows, first_offset, first, width),
                        *(window_highs, since, window_offsets, window_limits, flags),
                        *(window_keys, n_window_keys, window_k),
                    )
                    cut += 1
                to = min(stop, cuts[cut]) if cut < cuts.size else stop
                if to - at == n_rows:
                    _raise_by_group(highs, begin, window_highs, since, width)
                else:
                    for i in range(at - begin, to - begin):
                        _raise_by_row(values, i, begin + i, window_highs, since, width)
                at = to

        for column in range(width):
            for side in range(2):
                site_limits[side, first + column] = limits[side * TILE + column]
            high, low = extremes[column], extremes[TILE + column]
            zone[TOP, first + column], zone[BOTTOM, first + column] = high, low
            site_extremes[TOP, first + column] = max(site_extremes[TOP, first + column], high)
            site_extremes[BOTTOM, first + column] = min(site_extremes[BOTTOM, first + column], low)
            for power in range(5):
                site_powers[power, first + column] += powers[power * TILE + column]
            site_n[first + column] += rows.size
            site_n_positive[first + column] += n_positive[column]
        if is_content:
            for column in range(width):
                # The band will be gone when the window ends.
                if window_highs[column] > window_limits[column] and since[column] != NOT_HERE:
                    window_offsets[first + column] = first_offset + _first_row_with(
                        window_highs[column], bits, chunk, start + column, rows, since[column]
                    )
                site_window_highs[first + column] = window_highs[column]
                site_window_limits[0, first + column] = window_limits[column]
        first += width


@compiled
def first_limits(
    bits: Array,
    saturated: Array,
    columns: tuple[int, int],
    rows: NDArray[np.int64],
    n_groups: int,
    candidates: Candidates,
) -> None:
    """Set the limits of some columns that have none yet by the extremes of groups of rows.

    There must be k groups or more, and no more groups than rows.
    """
    _, _, limits, k = candidates
    chunk_columns = bits.shape[2]
    largest, smallest = to_float(saturated[1]), to_float(saturated[0])
    infinity = np.float32(np.inf)
    highs = np.empty((n_groups, TILE), np.float32)
    lows = np.empty((n_groups, TILE), np.float32)
    some = np.empty(n_groups, np.float32)
    first, last = columns
    while first < last:
        chunk, start = first // chunk_columns, first % chunk_columns
        width = min(chunk_columns - start, last - first)
        highs[:], lows[:] = -np.inf, np.inf
        for i in range(rows.size):
            group, row = i * n_groups // rows.size, rows[i]
            for column in range(width):
                value = to_float(bits[chunk, row, np.uint64(start + column)]) + np.float32(0.0)
                high, low = highs[group, np.uint64(column)], lows[group, np.uint64(column)]
                highs[group, np.uint64(column)] = value if value > high else high
                lows[group, np.uint64(column)] = value if value < low else low
        for column in range(width):
            # The limit itself does not pass, and a value that is equal to the k-th must.
            for group in range(n_groups):
                some[group] = -min(highs[group, column], largest)
            kth = -np.partition(some, k - 1)[k - 1]
            limits[TOP, first + column] = np.nextafter(kth, -infinity)
            for group in range(n_groups):
                some[group] = max(lows[group, column], smallest)
            kth = np.partition(some, k - 1)[k - 1]
            limits[BOTTOM, first + column] = np.nextafter(kth, infinity)
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
    highs: NDArray[np.float32],
    lows: NDArray[np.float32],
    limits: NDArray[np.float32],
    flags: NDArray[np.int8],
    first: int,
    width: int,
    keys: NDArray[np.uint64],
    n_keys: NDArray[np.int32],
    k: int,
    site_n: NDArray[np.int64],
    found: Found,
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
                if abs(value) <= FLOAT32_MAX:
                    continue
                row = rows[begin + i]
                kind = NAN if value != value else OVERFLOW
                _note(found, kind, first_offset + row, site_column)
                if kind == NAN:
                    site_n[site_column] -= 1
                else:
                    code = saturated[1 if value > 0 else 0]
                    bits[chunk, row, start + column] = code
                    mended = to_float(code)
                    values[i * TILE + column] = mended
                    # The infinity was one of the group's extremes, or hid in their start.
                    highs[column] = max(min(highs[column], to_float(saturated[1])), mended)
                    lows[column] = min(max(lows[column], to_float(saturated[0])), mended)
                    sides = 3
            for side in range(2):
                if not sides >> side & 1:
                    continue
                flip = LOW if side == BOTTOM else np.uint64(0)
                limit = limits[side * TILE + column]
                n = int(n_keys[side, site_column])
                for i in range(n_rows):
                    value, code = values[i * TILE + column], np.uint64(codes[i * TILE + column])
                    rank = code ^ (LOW if code & SIGN else SIGN) ^ flip
                    offset = np.uint64(first_offset + rows[begin + i])
                    # Written in any case and kept if it counts: no branch to guess wrong.
                    keys[side, site_column, n] = rank << np.uint64(32) | (LOW - offset)
                    n += int(value < limit if side == BOTTOM else value > limit)
                if n > keys.shape[2] - GROUP:
                    _keep_best(keys[side, site_column], n, k)
                    n = k
                    rank = (keys[side, site_column, k - 1] >> np.uint64(32)) ^ flip
                    kth = to_float(np.uint32(rank ^ (SIGN if rank & SIGN else LOW)))
                    limit = min(limit, kth) if side == BOTTOM else max(limit, kth)
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
    highs: NDArray[np.float32],
    lows: NDArray[np.float32],
    n_positive: NDArray[np.int32],
    flags: NDArray[np.int8],
    width: int,
) -> bool:
    """Write the extremes of a group, and count the positive values of its columns.

    Flag columns with a value beyond the top (1) or bottom (2) limit or NaN (4); say if any.
    """
    n_flagged = 0
    for column in range(width):
        high, low, is_nan = -np.float32(np.inf), np.float32(np.inf), False
        n = n_positive[column]
        for i in range(GROUP):
            value = values[i * TILE + column]
            high = value if value > high else high
            low = value if value < low else low
            is_nan |= value != value
            n += np.int32(value > np.float32(0.0))
        flag = (high > limits[column]) + 2 * (low < limits[TILE + column]) + 4 * is_nan
        highs[column], lows[column], n_positive[column] = high, low, n
        flags[column] = flag
        n_flagged += flag
    return n_flagged > 0


@compiled
def _add_extremes(
    highs: NDArray[np.float32],
    lows: NDArray[np.float32],
    extremes: NDArray[np.float32],
    width: int,
) -> None:
    for column in range(width):
        high, low = highs[column], lows[column]
        extremes[column] = high if high > extremes[column] else extremes[column]
        low_before = extremes[TILE + column]
        extremes[TILE + column] = low if low < low_before else low_before


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
def _bin(
    values: NDArray[np.float32],
    codes: NDArray[np.uint32],
    bins: NDArray[np.uint8],
    width: int,
) -> None:
    """Write the bin of each value of a group: `histogram.bins_of`, by the bits."""
    for i in range(GROUP):
        for column in range(width):
            value = abs(values[np.uint64(i * TILE + column)])
            code = codes[np.uint64(i * TILE + column)]
            # Exponent and two bits of the mantissa, counted from those of 2**-14, which are 452.
            place = np.int32((code & np.uint32(0x7FFFFFFF)) >> np.uint32(21)) - np.int32(448)
            place = min(place, np.int32(LAST_PLACE))
            tiny = np.int32(min(value, np.float32(2.0**-14)) * np.float32(2.0**16))
            place = tiny if value < np.float32(2.0**-14) else place
            bin_ = np.int32(127) - place if code >> np.uint32(31) else np.int32(128) + place
            bins[np.uint64(i * TILE + column)] = NO_BIN if value != value else bin_


@compiled
def _count(
    bins: NDArray[np.uint8],
    counts: NDArray[np.uint32],
    n_rows: int,
    first: int,
    width: int,
) -> None:
    """Count the bins of a group; neighbours in a row are of different columns, none waits."""
    for i in range(n_rows):
        for column in range(width):
            counts[np.uint64(first + column), bins[np.uint64(i * TILE + column)]] += np.uint32(1)


@compiled
def _raise_by_group(
    highs: NDArray[np.float32],
    begin: int,
    window_highs: NDArray[np.float32],
    since: NDArray[np.int32],
    width: int,
) -> None:
    """Raise the open window's highest values to those of a group that lies in it."""
    for column in range(width):
        better = highs[column] > window_highs[column]
        window_highs[column] = highs[column] if better else window_highs[column]
        since[column] = np.int32(begin) if better else since[column]


@compiled
def _raise_by_row(
    values: NDArray[np.float32],
    i: int,
    place: int,
    window_highs: NDArray[np.float32],
    since: NDArray[np.int32],
    width: int,
) -> None:
    """Raise the open window's highest values to those of one row."""
    for column in range(width):
        value = values[np.uint64(i * TILE + column)]
        better = value > window_highs[column]
        window_highs[column] = value if better else window_highs[column]
        since[column] = np.int32(place) if better else since[column]


@compiled
def _end_window(
    bits: Array,
    chunk: int,
    start: int,
    rows: NDArray[np.int64],
    first_offset: int,
    first: int,
    width: int,
    window_highs: NDArray[np.float32],
    since: NDArray[np.int32],
    window_offsets: NDArray[np.int64],
    window_limits: NDArray[np.float32],
    flags: NDArray[np.int8],
    keys: NDArray[np.uint64],
    n_keys: NDArray[np.int32],
    k: int,
) -> None:
    """Make candidates of the highest values that pass their limits, and begin a window."""
    n_flagged = 0
    for column in range(width):
        flag = int(window_highs[column] > window_limits[column])
        flags[column] = flag
        n_flagged += flag
    if n_flagged > 0:
        codes = window_highs.view(np.uint32)
        for column in range(width):
            if flags[column] == 0:
                continue
            site_column = first + column
            if since[column] == NOT_HERE:
                offset = window_offsets[site_column]
            else:
                offset = first_offset + _first_row_with(
                    window_highs[column], bits, chunk, start + column, rows, since[column]
                )
            code, n = np.uint64(codes[column]), int(n_keys[0, site_column])
            rank = code ^ (LOW if code & SIGN else SIGN)
            keys[0, site_column, n] = rank << np.uint64(32) | (LOW - np.uint64(offset))
            n += 1
            if n == keys.shape[2]:
                _keep_best(keys[0, site_column], n, k)
                n = k
                rank = keys[0, site_column, k - 1] >> np.uint64(32)
                kth = to_float(np.uint32(rank ^ (SIGN if rank & SIGN else LOW)))
                window_limits[column] = max(window_limits[column], kth)
            n_keys[0, site_column] = n
    for column in range(width):
        window_highs[column] = -np.inf


@compiled
def _first_row_with(
    value: float, bits: Array, chunk: int, column: int, rows: NDArray[np.int64], place: int
) -> int:
    """Return the first of some rows, from a place on, that has a value; one of them has it."""
    while to_float(bits[chunk, rows[place], column]) != value:
        place += 1
    return int(rows[place])


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
def _note(found: Found, kind: int, offset: int, column: int) -> None:
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
