"""The folds' states on disk: in partials of segments and in generations of the index.

A partial holds the states of all sites as they are packed here.  A generation holds each once, in
the form that queries read, from which `GenerationReader` gets the state back without loss.

`RunningLists` holds the values in the lists, and the sampled rows, of the committed segments below
the one being captured; their last places are the thresholds of its pass.  Nothing uncommitted ever
enters, so a crash cannot leave a threshold behind that no list justifies.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from actstore import arrow, durable
from actstore.compiled import compiled
from actstore.errors import DamagedFile
from actstore.folds import FOLDS, Sample, TopK
from actstore.folds.histogram import HistogramState
from actstore.folds.passes import SiteFolds, SiteThresholds
from actstore.folds.sample import SampleState
from actstore.folds.topk import Ranked, Thresholds, TopKState, empty_list
from actstore.folds.window_top import WindowThresholds
from actstore.folds.zones import ZonesState
from actstore.site import Site
from actstore.store import CoreStore, Generation, SiteInfo
from actstore.store.generations import site_file, space_file
from actstore.store.segment_writer import read_partial

Int64 = npt.NDArray[np.int64]

TOPK: TopK = TopK()
"""The lists every capture keeps."""

SAMPLE: Sample = Sample()
"""The sample every capture draws."""

EXEMPLARS = pa.schema(
    [
        ("neuron", pa.int32()),
        ("side", pa.string()),
        ("rank", pa.int32()),
        ("row_id", pa.int64()),
        ("value", pa.float32()),
        ("document", pa.int64()),
        ("position", pa.int32()),
        ("token_id", pa.int32()),
    ]
)
"""A place in a list of a neuron: side ``top``, ``bottom`` or ``window``, rank from 1."""

STATES = {
    "moments": "moments",
    "others": "moments",
    "topk": "topk",
    "window_top": "window_top",
    "histogram": "histogram",
    "zones": "zones",
    "sample": "sample",
    "gram": "gram",
}
"""What a partial holds of each site, and the fold it is a state of; ``others`` are the moments of
special and first rows, ``gram`` is there where it was asked for."""


def pack_site(site: Site, folds: SiteFolds) -> dict[str, npt.NDArray[Any]]:
    """Return the states of a site as named arrays, the names telling site, state and field."""
    arrays: dict[str, npt.NDArray[Any]] = {}
    for state in STATES:
        value = getattr(folds, "moments_others" if state == "others" else state)
        if value is not None:
            arrays |= pack(site, state, value)
    return arrays


def pack(site: Site, state: str, value: Any) -> dict[str, npt.NDArray[Any]]:
    """Return a state as named arrays, the name telling site, state and field."""
    arrays = FOLDS[STATES[state]].to_arrays(value)
    return {f"{site}/{state}/{key}": array for key, array in arrays.items()}


def unpack(arrays: Mapping[str, npt.NDArray[Any]], site: Site, state: str) -> Any:
    """Return the state that `pack` packed."""
    return FOLDS[STATES[state]].from_arrays(_Fields(arrays, f"{site}/{state}/"))


class _Fields(Mapping[str, npt.NDArray[Any]]):
    """The arrays whose names begin alike, by the rest of their names; each read when asked for."""

    def __init__(self, arrays: Mapping[str, npt.NDArray[Any]], prefix: str) -> None:
        self._arrays = arrays
        self._prefix = prefix

    def __getitem__(self, name: str) -> npt.NDArray[Any]:
        return self._arrays[self._prefix + name]

    def __iter__(self) -> Iterator[str]:
        whole = (name for name in self._arrays if name.startswith(self._prefix))
        return (name.removeprefix(self._prefix) for name in whole)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def states_of(store: CoreStore, info: SiteInfo) -> list[str]:
    """Return the states a site has."""
    return [state for state in STATES if state != "gram" or str(info.site) in store.meta.grams]


def exemplars_name(site: Site) -> str:
    """Return the path of a site's exemplars inside a generation."""
    return site_file(site, "exemplars", "exemplars.parquet")


class GenerationReader:
    """Reads states back from a generation, each file checked before its first use."""

    def __init__(self, store: CoreStore, generation: Generation) -> None:
        self._store = store
        self._generation = generation

    def _path(self, name: str) -> str:
        full = f"{self._generation.folder}/{name}"
        self._store.verifier.check({full: self._generation.files[full]})
        return str(self._store.path / full)

    def _array(self, name: str) -> npt.NDArray[Any]:
        return durable.read_array(self._path(name))

    def state(self, info: SiteInfo, state: str) -> Any:
        """Return a state of a site; of lists use `lists`, which reads their table once."""
        site = info.site
        if state == "histogram":
            name = site_file(site, "histograms", "histograms.parquet")
            table = durable.read_table(self._path(name))
            found: HistogramState = FOLDS["histogram"].start(info.width)
            neurons, bins, n = (arrow.numbers(table.column(c)) for c in ("neuron", "bin", "n"))
            found.counts[neurons, bins] = n
            return found
        if state == "zones":
            bands = self._array(space_file(site.space, "zones", "bands.npy")).astype(np.int64)
            meta = self._store.meta
            first = bands[:, 0] * meta.segment_rows + bands[:, 1] * meta.chunk_rows
            zones = self._array(site_file(site, "zones", "zones.npy"))
            return ZonesState(first, np.ascontiguousarray(zones.transpose(1, 2, 0)))
        if state == "sample":
            values = self._array(site_file(site, "samples", "values.npy"))
            return SAMPLE.from_arrays({"row_ids": self.sampled(site.space), "values": values})
        if state == "gram":
            with durable.ArraysFile(self._path(site_file(site, "grams", "gram.npz"))) as arrays:
                return FOLDS["gram"].from_arrays(arrays)
        with durable.ArraysFile(self._path("moments.npz")) as arrays:
            return unpack(arrays, site, state)

    def sampled(self, space: str) -> Int64:
        """Return the rows of the sample of a space."""
        return self._array(space_file(space, "samples", "row_ids.npy"))

    def lists(self, info: SiteInfo) -> dict[str, Ranked]:
        """Return the lists of a site by their side."""
        table = durable.read_table(self._path(exemplars_name(info.site)))
        sides = arrow.names(table.column("side"))
        neurons = arrow.numbers(table.column("neuron"))
        ranks = arrow.numbers(table.column("rank")) - 1
        row_ids, values = (arrow.numbers(table.column(name)) for name in ("row_id", "value"))
        lists = {}
        for side in ("top", "bottom", "window"):
            mine = sides == side
            ranked = empty_list(info.width, TOPK.k)
            ranked.values[neurons[mine], ranks[mine]] = values[mine]
            ranked.row_ids[neurons[mine], ranks[mine]] = row_ids[mine]
            ranked.counts[:] = np.bincount(neurons[mine], minlength=info.width)
            lists[side] = ranked
        return lists


class SiteLists(NamedTuple):
    """What thresholds at a site come from."""

    best: npt.NDArray[np.float32]
    """The values in the top list, in the list over windows and, negated, in the bottom list, the
    best first and -inf where a place is free, (3, width, k)."""
    sampled: Int64
    """The rows of the sample."""

    @classmethod
    def of(cls, topk: TopKState, window_top: Ranked, sampled: Int64) -> SiteLists:
        """Return what thresholds come from of some lists and a sample."""
        best = np.stack([topk.top.values, window_top.values, -topk.bottom.values])
        best[np.isnan(best)] = -np.inf
        return cls(best, sampled)


class RunningLists:
    """The merged lists of committed segments, all of them below the one that is captured.

    Only their values are held, as all their rows come before those of the segment that is captured:
    of two that tie the earlier is the better.  Memory: 12 bytes x k a neuron over all sites.
    """

    def __init__(self, store: CoreStore) -> None:
        self._store = store
        self._states: dict[Site, SiteLists] = {}
        self.relied_on: list[int] = []
        self._start()

    def _start(self) -> None:
        generation = self._store.prefix_index()
        self._states = {}
        self.relied_on = []
        if generation is not None:
            self.relied_on = list(generation.covers)
            reader = GenerationReader(self._store, generation)
            for info in self._store.meta.sites:
                lists = reader.lists(info)
                topk = TopKState(lists["top"], lists["bottom"])
                sampled = reader.sampled(info.site.space)
                self._states[info.site] = SiteLists.of(topk, lists["window"], sampled)

    def _unknown(self, segment: int) -> list[int]:
        known = set(self.relied_on)
        return [s for s in self._store.committed if s < segment and s not in known]

    def advance(self, segment: int) -> None:
        """Take in the committed segments below one that is about to be captured."""
        if any(known > segment for known in self.relied_on):
            self._start()  # a segment further on was captured first
        while unknown := self._unknown(segment):
            generation = self._store.prefix_index()
            if generation is not None and set(unknown) & set(generation.covers):
                self._start()  # another worker's compaction has taken their partials
                continue
            try:
                with read_partial(self._store, unknown[0], "folds") as partial:
                    lists = {
                        site: SiteLists.of(
                            unpack(partial, site, "topk"),
                            unpack(partial, site, "window_top"),
                            partial[f"{site}/sample/row_ids"],
                        )
                        for site in self._store.sites
                    }
            except DamagedFile:
                newer = self._store.prefix_index()
                if newer is None or unknown[0] not in newer.covers:
                    raise
                continue  # a compaction took it just now
            self.add(unknown[0], lists)

    def add(self, segment: int, lists: Mapping[Site, SiteLists]) -> None:
        """Take in the lists of a segment that has just been committed, once."""
        if segment in self.relied_on:
            return  # another process has compacted it meanwhile: it came with the generation
        for site, new in lists.items():
            if site in self._states:
                old = self._states[site]
                _merge_best(old.best, new.best)
                new = SiteLists(old.best, _without_values(old.sampled, new.sampled))
            self._states[site] = new
        self.relied_on.append(segment)

    def thresholds(self) -> dict[Site, SiteThresholds]:
        """Return what a value must reach at each site to enter the lists, and a row the sample."""
        # The same rows are sampled at all sites of a space.
        sampled = {site.space: state.sampled for site, state in self._states.items()}
        limits = {space: SAMPLE.threshold(row_ids) for space, row_ids in sampled.items()}
        found = {}
        for site, state in self._states.items():
            floor, window_floor, ceiling = state.best[:, :, -1].copy()
            before = np.full(len(floor), -1)  # every row of the segment
            found[site] = SiteThresholds(
                Thresholds(floor, -ceiling, before, before),
                WindowThresholds(window_floor, before),
                limits[site.space],
            )
        return found


@compiled
def _merge_best(into: npt.NDArray[np.float32], others: npt.NDArray[np.float32]) -> None:
    """Replace the best values of every column by the best of them and of others."""
    n_lists, width, k = into.shape
    merged = np.empty(k, np.float32)
    for i in range(n_lists):
        for column in range(width):
            a, b = 0, 0
            for place in range(k):
                if into[i, column, a] >= others[i, column, b]:
                    merged[place] = into[i, column, a]
                    a += 1
                else:
                    merged[place] = others[i, column, b]
                    b += 1
            into[i, column] = merged


def _without_values(*parts: Int64) -> Int64:
    """Return the rows of the sample of disjoint rows."""
    none = SAMPLE.start(0)
    for row_ids in parts:
        none = SAMPLE.merge(none, SampleState(row_ids, np.empty((len(row_ids), 0), np.float16)))
    return none.row_ids
