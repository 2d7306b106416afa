"""Compaction: the partials of committed segments become one generation of the index.

Statistics and lists are merged site by site in the order of segments, going on from the newest
prefix generation, so the index is the same bytes however often the capture was interrupted.  Memory
is that of the lists of the few sites that are merged at the same time.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from actstore import arrow, durable
from actstore.capturing.allocator import give_back
from actstore.capturing.lists import (
    EXEMPLARS,
    SAMPLE,
    STATES,
    GenerationReader,
    exemplars_name,
    pack,
    states_of,
    unpack,
)
from actstore.durable import ArraysFile, FileFacts
from actstore.errors import DamagedFile
from actstore.folds import FOLDS
from actstore.folds.histogram import Histogram, HistogramState, bin_edges
from actstore.folds.moments import Moments
from actstore.folds.topk import Ranked, TopKState
from actstore.folds.zones import ZonesState
from actstore.store import CoreStore, Generation, SiteInfo, generations
from actstore.store.budget import Progress
from actstore.store.generations import site_file, space_file
from actstore.store.segment_writer import drop_partials, read_partial

_MOMENTS, _HISTOGRAM = Moments(), Histogram()
_GROUP_ROWS = 20_000
_OPEN_ARRAYS = 20_000  # of partials that stay open: the name of one takes about 700 bytes
_THREADS = min(4, os.cpu_count() or 1)


def compact(
    store: CoreStore, *, only_prefix: bool = False, progress: Progress | None = None
) -> Generation | None:
    """Publish a generation that covers all committed segments; return the newest one.

    One pass over the partials that no prefix generation covers yet.

    Parameters
    ----------
    only_prefix : bool
        Cover only segments 0 … n without a gap: what a capture that goes on can build upon.
    progress : callable, optional
        Told sites done.
    """
    with store.compaction_lock():
        store.refresh()
        base, newest = store.prefix_index(), store.index()
        covers = _prefix(store.committed) if only_prefix else store.committed
        if not covers or (newest is not None and set(covers) <= set(newest.covers)):
            _tidy(store, newest)  # a crash may have come between the two
            return newest
        done = set(base.covers) if base else set()
        new = [segment for segment in covers if segment not in done]
        _check_closed(store, new, covers)
        number = generations.new_number(store.path)
        folder = store.path / f"index/{number:06d}"
        durable.make_folder(folder)
        writer = _GenerationWriter(store, folder)

        def site(info: SiteInfo) -> tuple[pa.Table, dict[str, npt.NDArray[Any]]]:
            merged = _merge(store, base, info, partials)
            writer.write_site(info, merged, _exemplars(store, base, info, merged))
            give_back()  # two threads' heaps would keep what each site has left in them
            states = [pack(info.site, state, merged[state]) for state in ("moments", "others")]
            return _neurons(info, merged), states[0] | states[1]

        neurons: list[pa.Table] = []
        states: dict[str, npt.NDArray[Any]] = {}
        partials = _Partials(store, new)
        with partials, ThreadPoolExecutor(_THREADS, "actstore-index") as pool:
            for table, packed in pool.map(site, store.meta.sites):
                neurons.append(table)
                states |= packed
                if progress:
                    progress("index", len(neurons), len(store.meta.sites))
        writer.table("neurons.parquet", pa.concat_tables(neurons))
        # The moments themselves: the table's columns are made from them and lose bits.
        writer.arrays("moments.npz", states)
        generation = Generation(number, tuple(covers), dict(sorted(writer.files.items())))
        generations.publish(store.path, generation)
        _tidy(store, generation)
        return generation


def needs_compaction(store: CoreStore, every: int) -> bool:
    """Return whether so many segments are committed that no prefix generation covers."""
    base = store.prefix_index()
    return len(store.committed) - (len(base.covers) if base else 0) >= every


def _tidy(store: CoreStore, newest: Generation | None) -> None:
    """Delete what the newest generation has made needless."""
    if newest is not None and newest.is_prefix:
        drop_partials(store, newest.covers)
    generations.sweep(store.path)


def _prefix(committed: Sequence[int]) -> tuple[int, ...]:
    return tuple(s for i, s in enumerate(committed) if s == i)


def _check_closed(store: CoreStore, segments: Sequence[int], covers: Sequence[int]) -> None:
    """Raise `DamagedFile` unless the thresholds of all segments came from covered segments."""
    present = set(covers)
    for segment in segments:
        for first, last in store.commit_of(segment).relied_on:
            missing = [s for s in range(first, last + 1) if s not in present]
            if missing:
                raise DamagedFile(
                    f"segment {segment} of {store.path} relied on the lists of segment "
                    f"{missing[0]}, which is not committed; a file under commits/ is missing. "
                    "Restore it from a copy."
                )


def _merge(
    store: CoreStore, base: Generation | None, info: SiteInfo, partials: _Partials
) -> dict[str, Any]:
    """Return the states of a site over the base and partials, merged in their order."""
    states = states_of(store, info)
    merged = {state: FOLDS[STATES[state]].start(info.width) for state in states}
    if base is not None:
        reader = GenerationReader(store, base)
        lists = reader.lists(info)
        merged["topk"] = TopKState(lists["top"], lists["bottom"])
        merged["window_top"] = lists["window"]
        for state in states:
            if state not in ("topk", "window_top"):
                merged[state] = reader.state(info, state)
    for partial in partials:
        for state in states:
            fold = FOLDS[STATES[state]]
            merged[state] = fold.merge(merged[state], unpack(partial, info.site, state))
    return merged


class _Partials:
    """What segments add to the folds, in their order, for every site anew.

    To be entered.  The first of them stay open: to read the names of all arrays of a partial again
    for each site takes longer than to read what is asked for.
    """

    def __init__(self, store: CoreStore, segments: Sequence[int]) -> None:
        self._store = store
        self._segments = segments
        self._open: list[ArraysFile] = []
        self._leave = ExitStack()

    def __enter__(self) -> Self:
        n_arrays = 0
        with ExitStack() as leave:
            for segment in self._segments:
                self._open.append(leave.enter_context(self._read(segment)))
                n_arrays += len(self._open[-1])
                if n_arrays > _OPEN_ARRAYS:
                    break
            self._leave = leave.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._leave.close()

    def __iter__(self) -> Iterator[ArraysFile]:
        yield from self._open
        for segment in self._segments[len(self._open) :]:
            with self._read(segment) as partial:
                yield partial

    def _read(self, segment: int) -> ArraysFile:
        return read_partial(self._store, segment, "folds")


def _neurons(info: SiteInfo, merged: dict[str, Any]) -> pa.Table:
    site = info.site
    moments, others = _MOMENTS.finish(merged["moments"]), _MOMENTS.finish(merged["others"])
    quantiles = _HISTOGRAM.finish(merged["histogram"])
    statistics = {
        **moments,
        # A bin may reach beyond the values that are in it.
        **{n: np.clip(x, moments["min"], moments["max"]) for n, x in quantiles.items()},
        **{f"other_{name}": others[name] for name in ("n", "mean", "std", "min", "max")},
    }
    return pa.table(
        {
            "site": _same(str(site), info.width),
            "space": _same(site.space, info.width),
            "hook": _same(site.hook, info.width),
            "layer": arrow.column(np.full(info.width, site.layer, np.int32)),
            "neuron": arrow.column(np.arange(info.width, dtype=np.int32)),
            # What no value defines is null: readers believe Parquet's minima, which leave NaN out.
            **{name: arrow.column(x, is_null=np.isnan(x)) for name, x in statistics.items()},
        }
    )


def _same(text: str, n: int) -> pa.Array:
    return arrow.column([text] * n).cast(pa.string())


class _GenerationWriter:
    """Writes the files of a generation, of several sites at once, and remembers their facts."""

    def __init__(self, store: CoreStore, folder: Path) -> None:
        self._store = store
        self._folder = folder
        self.files: dict[str, FileFacts] = {}
        """The facts of what was written, by path inside the store."""

    def write_site(self, info: SiteInfo, merged: dict[str, Any], exemplars: pa.Table) -> None:
        """Write what a site has files of its own for."""
        site = info.site
        self.table(exemplars_name(site), exemplars)
        histograms = _histograms(merged["histogram"])
        self.table(site_file(site, "histograms", "histograms.parquet"), histograms)
        zones: ZonesState = merged["zones"]
        self.array(site_file(site, "zones", "zones.npy"), zones.extremes.transpose(2, 0, 1))
        sample = SAMPLE.to_arrays(merged["sample"])
        self.array(site_file(site, "samples", "values.npy"), sample["values"])
        if "gram" in merged:
            self.arrays(
                site_file(site, "grams", "gram.npz"), FOLDS["gram"].to_arrays(merged["gram"])
            )
        # The same at all sites of a space.
        meta = self._store.meta
        segments = zones.first_row_ids // meta.segment_rows
        bands = zones.first_row_ids % meta.segment_rows // meta.chunk_rows
        if info is next(i for i in meta.sites if i.site.space == site.space):
            bands_name = space_file(site.space, "zones", "bands.npy")
            self.array(bands_name, np.stack([segments, bands], axis=1).astype(np.int32))
            self.array(space_file(site.space, "samples", "row_ids.npy"), sample["row_ids"])

    @property
    def _prefix(self) -> str:
        return f"{self._folder.relative_to(self._store.path)}/"

    def _path(self, name: str) -> Path:
        path = self._folder / name
        durable.make_folder(path.parent)
        return path

    def table(self, name: str, table: pa.Table) -> None:
        """Write a Parquet table; of one with many rows a neuron's are in one group or two."""
        self.files[self._prefix + name] = durable.write_table(self._path(name), table, _GROUP_ROWS)

    def arrays(self, name: str, arrays: dict[str, npt.NDArray[Any]]) -> None:
        """Write named arrays."""
        self.files[self._prefix + name] = durable.write_arrays(self._path(name), arrays)

    def array(self, name: str, array: npt.NDArray[Any]) -> None:
        """Write one array."""
        self.files[self._prefix + name] = durable.write_array(self._path(name), array)


def _histograms(state: HistogramState) -> pa.Table:
    """Return the bins that hold something, in the order of neuron and value."""
    neurons, bins = np.nonzero(state.counts)
    low, high = bin_edges()
    return pa.table(
        {
            "neuron": arrow.column(neurons.astype(np.int32)),
            "bin": arrow.column(bins.astype(np.int32)),
            "low": arrow.column(low[bins]),
            "high": arrow.column(high[bins]),
            "n": arrow.column(state.counts[neurons, bins]),
        }
    )


_COLUMNS = ("document", "position", "token_id")


def _tokens(
    store: CoreStore, base: Generation | None, info: SiteInfo, row_ids: npt.NDArray[np.int64]
) -> pa.Table:
    """Return what tokens the rows are: from the base's exemplars where they stand there.

    Only rows of new segments are looked up, so compaction does not read the whole token index.
    """
    known = arrow.empty(EXEMPLARS).select(["row_id", *_COLUMNS])
    if base is not None:
        name = f"{base.folder}/{exemplars_name(info.site)}"
        known = durable.read_table(store.path / name, columns=["row_id", *_COLUMNS])
    known_ids, places = np.unique(arrow.numbers(known.column("row_id")), return_index=True)
    new_ids = np.setdiff1d(row_ids, known_ids, assume_unique=True)
    new = store.tokens_of(new_ids, info.site.space).select(_COLUMNS)
    both = pa.concat_tables([arrow.take(known.select(_COLUMNS), places), new])
    order = np.argsort(np.concatenate([known_ids, new_ids]))
    all_ids = np.concatenate([known_ids, new_ids])[order]
    return arrow.take(both, order[np.searchsorted(all_ids, row_ids)])


def _exemplars(
    store: CoreStore, base: Generation | None, info: SiteInfo, merged: dict[str, Any]
) -> pa.Table:
    lists: TopKState = merged["topk"]
    # In descending order of their names: one neuron's lists are one short stretch of the file.
    sides: dict[str, Ranked] = {
        "window": merged["window_top"],
        "top": lists.top,
        "bottom": lists.bottom,
    }
    taken = np.stack([ranked.taken for ranked in sides.values()], axis=1)
    neurons, numbers, places = np.nonzero(taken)
    row_ids = np.stack([ranked.row_ids for ranked in sides.values()], axis=1)[taken]
    values = np.stack([ranked.values for ranked in sides.values()], axis=1)[taken]
    # A row stands in many lists: hashing finds the different ones in half the time of sorting.
    encoded = arrow.column(row_ids).dictionary_encode()
    unique = arrow.numbers(encoded.dictionary)
    rank = np.empty(len(unique), np.int64)
    rank[np.argsort(unique)] = np.arange(len(unique))
    tokens = _tokens(store, base, info, np.sort(unique))
    tokens = arrow.take(tokens, rank[arrow.numbers(encoded.indices)])
    return arrow.table(
        {
            "neuron": neurons,
            "side": arrow.column(list(sides)).take(arrow.column(numbers)),
            "rank": places + 1,
            "row_id": row_ids,
            "value": values,
            **{name: tokens.column(name) for name in _COLUMNS},
        },
        EXEMPLARS,
    )
