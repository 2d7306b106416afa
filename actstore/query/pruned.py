"""Scans of one column that read only the bands that can hold what is looked for.

The index keeps the extremes of every neuron in every *band* of rows (`actstore.folds.zones`), and a
band of a neuron is one chunk.  Bands are read in the order of their extremes; when the k-th best
row found so far comes before anything the next band can hold, no further band has to be read.  Each
extreme stands for one row at least, so the k-th best of them bounds the answer before the first
read.  Bands that no zone speaks of, in segments the index does not cover yet, are always read.

Places are compared by ``(key, row)``, smaller first, where the key is the value or, for the highest
values, its negative: the order is total, so the answer does not depend on what was read when.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from actstore.shard import DTYPES
from actstore.store import FIRST, SPECIAL, CoreStore, Rows, SiteInfo
from actstore.store.index_tables import NeuronZones
from actstore.store.rows import stretches

Ids = npt.NDArray[np.int64]
Keys = npt.NDArray[np.float32]

_NO_ROW = np.iinfo(np.int64).max
_FIRST_BANDS, _MOST_BANDS = 8, 128
_SHORT = 4096


@dataclass(frozen=True)
class Question:
    """Which rows of which neuron are looked for."""

    info: SiteInfo
    """The site."""
    neuron: int
    """Its neuron."""
    k: int
    """How many rows."""
    largest: bool
    """The highest values, or the lowest."""
    group: str | None = None
    """Column of the token index of whose every value only the best row counts."""


class Best:
    """The best k rows seen so far, or the best row of each of k groups.

    Parameters
    ----------
    question : Question
        What is looked for.
    bound : float
        A key that k rows are known to reach.
    """

    def __init__(self, question: Question, bound: float = np.inf) -> None:
        self._question = question
        self._ids = np.empty(0, np.int64)
        self._keys = np.empty(0, np.float32)
        self._groups = np.empty(0, np.int64)
        self._waiting: list[tuple[Ids, Keys, Ids]] = []
        self._n_waiting = 0
        self.limit: tuple[float, int] = (bound, _NO_ROW)
        """Key and row of the last place; what comes after it is out."""

    def keys(self, values: npt.NDArray[Any]) -> Keys:
        """Return the keys of stored values; -0.0 equals 0.0."""
        keys = values.astype(np.float32)
        keys += 0.0
        return np.negative(keys, out=keys) if self._question.largest else keys

    def add(self, ids: Ids, keys: Keys, groups: Ids) -> None:
        """Take rows in; `groups` is empty where rows stand for themselves."""
        if len(ids):
            self._waiting.append((ids, keys, groups))
            self._n_waiting += len(ids)

    def settle(self, last: bool = False) -> None:
        """Put what was taken in in order; of a long list not for every few rows, but at last."""
        k = self._question.k
        if not self._n_waiting or (not last and k > _SHORT and self._n_waiting < k // 4):
            return
        parts = [(self._ids, self._keys, self._groups), *self._waiting]
        self._waiting, self._n_waiting = [], 0
        ids, keys, groups = (np.concatenate(column) for column in zip(*parts, strict=True))
        k = self._question.k
        if self._question.group is None and len(keys) > k:
            near = np.flatnonzero(keys <= np.partition(keys, k - 1)[k - 1])
            ids, keys = ids[near], keys[near]
        order = np.lexsort((ids, keys))
        if self._question.group is not None:
            _, firsts = np.unique(groups[order], return_index=True)
            order = order[np.sort(firsts)]
            groups = groups[order[:k]]
        order = order[:k]
        self._ids, self._keys, self._groups = ids[order], keys[order], groups
        if len(order) == k:
            self.limit = (float(self._keys[-1]), int(self._ids[-1]))

    def rows(self) -> tuple[Ids, npt.NDArray[np.float32]]:
        """Return the rows and values in order."""
        self.settle(last=True)
        # Adding zero, since the negative of a zero key is -0.0.
        values = (-self._keys if self._question.largest else self._keys) + np.float32(0)
        return self._ids, values


@dataclass(frozen=True)
class Bands:
    """The bands that a scan may have to read, in the order in which it would."""

    segments: Ids
    """The segment of each."""
    bands: Ids
    """Its number in the segment."""
    keys: Keys
    """The best key it can hold; -inf where that is not known."""
    first_rows: Ids
    """The row_id at which it begins."""

    def __len__(self) -> int:
        return len(self.segments)

    def needed(self, start: int, limit: tuple[float, int]) -> int:
        """Return how many of the bands from `start` on can hold a row before the limit."""
        key, row = limit
        # Sorted by (key, first row): those that can are the first ones.
        keys, rows = self.keys[start:], self.first_rows[start:]
        return int(np.count_nonzero((keys < key) | ((keys == key) & (rows <= row))))


def bands_of(
    store: CoreStore,
    question: Question,
    segments: Sequence[int],
    zones: NeuronZones | None,
    covers: Sequence[int],
    rows: Rows | None,
) -> Bands:
    """Return the bands of segments that may hold what is looked for, the most promising first.

    Parameters
    ----------
    segments : sequence of int
        The segments to scan.
    zones : NeuronZones, optional
        What is known of the bands of the segments in `covers`.
    rows : Rows, optional
        The rows that count; bands with none of them are left out.
    """
    height, size = store.meta.chunk_rows, store.meta.segment_rows
    known = set(covers) if zones is not None else set()
    unknown = [s for s in segments if s not in known]
    counts = [-(-store.planned[s].rows.get(question.info.site.space, 0) // height) for s in unknown]
    found_segments = np.repeat(np.array(unknown, np.int64), counts)
    found_bands = np.concatenate([np.arange(n) for n in counts] or [np.empty(0, np.int64)])
    keys = np.full(len(found_bands), -np.inf, np.float32)
    if zones is not None:
        extremes = -zones.highest if question.largest else zones.lowest
        mine = np.isin(zones.segments, list(segments)) & ~np.isnan(extremes)
        found_segments = np.concatenate([found_segments, zones.segments[mine]])
        found_bands = np.concatenate([found_bands, zones.bands[mine]])
        keys = np.concatenate([keys, extremes[mine]])
    first_rows = found_segments * size + found_bands * height
    if rows is not None:
        wanted = [np.unique(rows.offsets(s) // height) * height + s * size for s in rows.segments]
        held = np.isin(first_rows, np.concatenate(wanted or [np.empty(0, np.int64)]))
        found_segments, found_bands = found_segments[held], found_bands[held]
        keys, first_rows = keys[held], first_rows[held]
    order = np.lexsort((first_rows, keys))
    return Bands(found_segments[order], found_bands[order], keys[order], first_rows[order])


def bound_of(question: Question, bands: Bands, rows: Rows | None) -> float:
    """Return a key that k rows are known to reach: each extreme is the value of a content row."""
    if rows is not None or question.group is not None:
        return np.inf  # that row may not be one that counts, or not count for itself
    extremes = bands.keys[np.isfinite(bands.keys)]
    return float(extremes[question.k - 1]) if len(extremes) >= question.k else np.inf


def scan(store: CoreStore, question: Question, bands: Bands, rows: Rows | None, best: Best) -> int:
    """Put what bands hold into `best`, until no band left can; return how many were read.

    Memory: one column of `_MOST_BANDS` bands, and the rows found.
    """
    done = 0
    while n_needed := bands.needed(done, best.limit):
        # As the limit moves fewer are needed, so not all of them are read at once.
        n = max(_FIRST_BANDS, min(done, n_needed // 4))
        n_unknown = int(np.count_nonzero(np.isneginf(bands.keys[done:])))
        n = min(max(n, n_unknown), n_needed, _MOST_BANDS)
        first_rows = np.sort(bands.first_rows[done : done + n])
        _read(store, question, first_rows, rows, best)
        done += n
    return done


def _read(
    store: CoreStore, question: Question, first_rows: Ids, rows: Rows | None, best: Best
) -> None:
    """Put what the bands hold that begin at some rows, ascending, into `best`."""
    info, space = question.info, question.info.site.space
    height, size = store.meta.chunk_rows, store.meta.segment_rows
    segments, starts = np.divmod(first_rows, size)
    values = np.empty((len(first_rows), height), DTYPES[info.dtype])
    numbers = (starts // height).tolist()
    for a, b in stretches(np.diff(segments) != 0, len(segments)):
        store.read_column_of_bands(
            info, int(segments[a]), question.neuron, numbers[a:b], values[a:b]
        )
    keys = best.keys(values).reshape(-1)
    key, row = best.limit
    places = np.flatnonzero(keys <= key)  # NaN is not
    keys, ids = keys[places], first_rows[places // height] + places % height
    # A tie with the last place is out if its row comes later.
    near = (keys < key) | (ids < row)
    keys, ids = keys[near], ids[near]
    counted = np.flatnonzero(_counts(store, rows, ids, space))
    ids, keys = ids[counted], keys[counted]
    groups = np.empty(0, np.int64)
    if question.group is not None:
        groups = store.token_values(ids, [question.group], space)[0]
    best.add(ids, keys, groups)
    best.settle()


def _counts(store: CoreStore, rows: Rows | None, ids: Ids, space: str) -> npt.NDArray[np.bool_]:
    """Return which rows, ascending, count: those of `rows`, by default the content rows."""
    counted = np.zeros(len(ids), np.bool_)
    segments, offsets = np.divmod(ids, store.meta.segment_rows)
    for a, b in stretches(np.diff(segments) != 0, len(segments)):
        segment = int(segments[a])
        if rows is None:  # a band may go on behind the last row
            counted[a:b] = offsets[a:b] < store.planned[segment].rows.get(space, 0)
        else:
            mask = np.zeros(store.meta.segment_rows, np.bool_)
            mask[rows.offsets(segment)] = True
            counted[a:b] = mask[offsets[a:b]]
    if rows is None:
        there = np.flatnonzero(counted)
        (flags,) = store.token_values(ids[there], ["flags"], space)
        counted[there] = (flags & (SPECIAL | FIRST)) == 0
    return counted
