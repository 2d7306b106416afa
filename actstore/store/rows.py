"""Sets of rows, and reading activations by row_id.

A row_id is ``segment * S + offset``: stable, ordered, the same at every site of a space, and not
dense, since a segment may end in a hole.  It is the only coordinate users see; positions inside
shards stay inside the store, so a value cannot be given to the wrong token by counting.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import psutil

from actstore.errors import BudgetExceeded, RowNotFound
from actstore.shard import DTYPES
from actstore.store.meta import SiteInfo
from actstore.store.stored_rows import ALL, NONE, keep_text

if TYPE_CHECKING:
    from actstore.store.core import CoreStore

Ids = npt.NDArray[np.int64]


def as_row_ids(rows: Any) -> Ids:
    """Return row ids as a vector of int64; nothing is rounded, wrapped or taken for a mask.

    Raises
    ------
    RowNotFound
        If they are not integers in one dimension.
    """
    try:
        ids = np.asarray(rows)
    except ValueError:  # sequences of unequal length
        ids = np.empty((0, 0))
    if ids.ndim > 1 or not (ids.dtype.kind in "iu" or (ids.size == 0 and ids.ndim == 1)):
        raise RowNotFound(
            f"row ids of dtype {ids.dtype} and {ids.ndim} dimensions were given; expected "
            "integers in one, as they stand in the column row_id of `tokens`, `top` and every "
            "other table."
        )
    if ids.dtype.kind == "u" and ids.size and ids.max() > np.iinfo(np.int64).max:
        raise RowNotFound(f"row_id = {ids.max()} is a hole: no row has so large an id.")
    return np.atleast_1d(ids).astype(np.int64)


@dataclass(frozen=True)
class Run:
    """Consecutive offsets of one segment."""

    segment: int
    """The segment."""
    start: int
    """First offset."""
    stop: int
    """Offset past the last."""


@dataclass(frozen=True)
class Rows:
    """A set of committed rows of one space, kept as one bit a row."""

    rule: str
    """What chose them: ``"content"``, ``"all"``, or the SQL condition that did."""
    segment_rows: int
    """S of the store."""
    bits: Mapping[int, npt.NDArray[np.uint8]]
    """For each segment, its chosen offsets as packed bits."""
    n_rows: int
    """How many rows there are."""

    @classmethod
    def from_masks(
        cls, rule: str, segment_rows: int, masks: Iterator[tuple[int, npt.NDArray[np.bool_]]]
    ) -> Rows:
        """Return the rows whose offsets are True in each segment's mask."""
        bits: dict[int, npt.NDArray[np.uint8]] = {}
        n_rows = 0
        for segment, mask in masks:
            if n := int(np.count_nonzero(mask)):
                bits[segment] = np.packbits(mask)
                n_rows += n
        return cls(rule, segment_rows, bits, n_rows)

    @classmethod
    def from_row_ids(cls, rule: str, segment_rows: int, row_ids: Ids) -> Rows:
        """Return the rows with the given ids."""
        row_ids = np.unique(np.asarray(row_ids, dtype=np.int64))
        segments = row_ids // segment_rows

        def masks() -> Iterator[tuple[int, npt.NDArray[np.bool_]]]:
            for segment in np.unique(segments):
                offsets = row_ids[segments == segment] - segment * segment_rows
                mask = np.zeros(int(offsets[-1]) + 1, dtype=np.bool_)
                mask[offsets] = True
                yield int(segment), mask

        return cls.from_masks(rule, segment_rows, masks())

    @property
    def segments(self) -> list[int]:
        """The segments that hold any of the rows, in order."""
        return sorted(self.bits)

    def offsets(self, segment: int) -> Ids:
        """Return the chosen offsets of a segment, ascending."""
        if segment not in self.bits:
            return np.empty(0, dtype=np.int64)
        return np.flatnonzero(np.unpackbits(self.bits[segment])).astype(np.int64)

    def row_ids(self) -> Ids:
        """Return all row ids, ascending; 8 bytes a row."""
        parts = [self.offsets(s) + s * self.segment_rows for s in self.segments]
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)

    def runs(self, length: int) -> list[Run]:
        """Return the rows as runs: spans of at most `length` offsets that hold any of them.

        Spans are aligned to multiples of `length`, so they depend on nothing but the rows, and
        trimmed to their first and last chosen row.
        """
        runs = []
        for segment in self.segments:
            offsets = self.offsets(segment)
            cells = offsets // length
            firsts = np.flatnonzero(np.diff(cells, prepend=-1))
            lasts = np.append(firsts[1:], len(offsets)) - 1
            runs += [
                Run(segment, int(offsets[a]), int(offsets[b]) + 1)
                for a, b in zip(firsts, lasts, strict=True)
            ]
        return runs


class SiteRows:
    """The activations of one site, indexed by row_id.

    ``site[17]`` is one row, ``site[[3, 1, 17]]`` several in the order given, ``site[100:200]`` the
    rows with ids in that range, holes and rows that are not stored skipped.  Values come as NumPy
    in the stored dtype.
    """

    def __init__(self, store: CoreStore, info: SiteInfo) -> None:
        self._store = store
        self.info = info

    def __repr__(self) -> str:
        rows = f"{self._store.n_rows(self.info.site.space):,} rows"
        if self.info.keep != ALL:
            rows = f"{keep_text(self.info.keep)} of {rows}"
        return f"<{self.info.site}: {rows} x {self.info.width:,} neurons, {self.info.dtype}>"

    def row_ids(self, span: slice | None = None) -> Ids:
        """Return the ids of the stored rows, or of those in a slice of row ids."""
        span = span or slice(None)
        if span.step not in (None, 1):
            raise RowNotFound(
                f"step = {span.step} was given; slices of row ids take no step. "
                "Index with a list of row ids instead."
            )
        low = 0 if span.start is None else int(span.start)
        high = np.iinfo(np.int64).max if span.stop is None else int(span.stop)
        if low < 0 or high < 0:
            raise RowNotFound(
                f"{min(low, high)} was given; row ids count from 0 and negative ones name "
                "nothing, since ids are not dense. Use `row_ids()[-n:]` for the last rows."
            )
        size = self._store.meta.segment_rows
        pieces = []
        for segment, rows in self._store.committed_rows(self.info.site.space).items():
            first = segment * size
            start, stop = max(low, first), min(high, first + rows)
            if start >= stop:
                continue
            if self.info.keep == ALL:
                pieces.append(np.arange(start, stop, dtype=np.int64))
            else:
                ids = first + self._store.stored_offsets(self.info, segment)
                pieces.append(ids[(ids >= start) & (ids < stop)])
        return np.concatenate(pieces) if pieces else np.empty(0, dtype=np.int64)

    def __getitem__(self, rows: int | slice | Sequence[int] | Ids) -> npt.NDArray[Any]:
        if isinstance(rows, slice):
            if self.info.keep == NONE:
                raise self._store.not_stored(self.info)
            return self._gather(self.row_ids(rows))
        found: npt.NDArray[Any] = self._gather(as_row_ids(rows))
        return found[0] if np.ndim(rows) == 0 else found

    def _gather(self, ids: Ids) -> npt.NDArray[Any]:
        needed = len(ids) * self.info.row_bytes
        free = psutil.virtual_memory().available
        if needed > free // 2:
            raise BudgetExceeded(
                f"{len(ids):,} rows of {self.info.site} take {needed / 1e9:.1f} GB and "
                f"{free / 1e9:.1f} GB of memory are free. Read fewer rows at a time, or use "
                f"store.dask({str(self.info.site)!r})."
            )
        out = np.empty((len(ids), self.info.width), dtype=DTYPES[self.info.dtype])
        segments, offsets = np.divmod(ids, self._store.meta.segment_rows)
        for a, b in stretches(np.diff(segments) != 0, len(ids)):
            segment = int(segments[a])
            # The highest id of a segment is a hole if any of its ids is.
            self._store.check_row(int(ids[a:b].max()), self.info.site.space)
            positions = self._store.positions(self.info, segment, offsets[a:b])
            # Neighbours in the shard are one read.
            for c, d in stretches(np.diff(positions) != 1, b - a):
                start = int(positions[c])
                target = out[a + c : a + d]
                self._store.read(self.info, segment, start, start + d - c, out=target)
        return out


def stretches(breaks: npt.NDArray[np.bool_], n: int) -> Iterator[tuple[int, int]]:
    """Yield start and stop of the stretches that n items fall into, given where one ends.

    >>> list(stretches(np.array([False, True]), 3))
    [(0, 2), (2, 3)]
    """
    if n:
        yield from itertools.pairwise([0, *(np.flatnonzero(breaks) + 1).tolist(), n])
