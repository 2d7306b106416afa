"""The files of an index generation, read one neuron at a time.

A site's exemplars are a table of three lists a neuron, in row groups of some thousands of rows in
the order of neurons: the statistics of the groups say which one or two hold a neuron, and only
those are read.  Of a site's zones one neuron is one row of an array, and only that row is read.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from actstore import arrow, durable
from actstore.durable import FileFacts, Verifier
from actstore.store.generations import Generation, site_file, space_file
from actstore.store.meta import SiteInfo

_OPEN_TABLES = 32
_LOADED_BANDS = 4  # of the newest generations and spaces; 8 bytes a band


@dataclass(frozen=True)
class IndexList:
    """One list of a neuron over the content rows that a generation covers, best first."""

    row_ids: npt.NDArray[np.int64]
    """The rows."""
    values: npt.NDArray[np.float32]
    """Their values."""
    documents: npt.NDArray[np.int64]
    """The documents of the rows."""
    positions: npt.NDArray[np.int32]
    """Their positions in their windows."""
    token_ids: npt.NDArray[np.int32]
    """Their tokens."""
    longest: int
    """Places of the longest list of the site: a shorter list is all there is."""


@dataclass(frozen=True)
class NeuronZones:
    """The extremes of a neuron in every band of the covered segments that has a content row."""

    segments: npt.NDArray[np.int64]
    """The segment of each band."""
    bands: npt.NDArray[np.int64]
    """Its number in the segment; a band is `chunk_rows` planned rows."""
    lowest: npt.NDArray[np.float32]
    """Its smallest value."""
    highest: npt.NDArray[np.float32]
    """Its largest value."""


@dataclass(frozen=True)
class _Table:
    """An open Parquet file, and which neurons each of its row groups holds."""

    file: pq.ParquetFile
    lows: list[int]
    highs: list[int]
    longest: int


class IndexTables:
    """Reads lists, counts and zones of single neurons; files are verified on their first use.

    Any number of threads may read.  Kept are a few open files and their footers.

    Parameters
    ----------
    verifier : Verifier
        Checks files against the facts of their generation.
    root : Path
        Folder of the store.
    """

    def __init__(self, verifier: Verifier, root: Path) -> None:
        self._verifier = verifier
        self._root = root
        self._tables: OrderedDict[tuple[str, FileFacts], _Table] = OrderedDict()
        self._bands: OrderedDict[tuple[str, FileFacts], npt.NDArray[np.int64]] = OrderedDict()
        self._lock = threading.Lock()

    def ranked(
        self, generation: Generation, info: SiteInfo, neuron: int, side: str
    ) -> IndexList | None:
        """Return the list ``"top"``, ``"bottom"`` or ``"window"`` of a neuron, if there is one."""
        name = f"{generation.folder}/{site_file(info.site, 'exemplars', 'exemplars.parquet')}"
        if name not in generation.files:
            return None
        facts = ["row_id", "value", "document", "position", "token_id"]
        with self._lock:
            table = self._table(name, generation.files)
            found = _rows_of(table, neuron, ["neuron", "side", "rank", *facts])
        mine = np.flatnonzero(arrow.names(found["side"]) == side)
        mine = mine[np.argsort(arrow.numbers(found["rank"])[mine])]
        row_ids, values, documents, positions, token_ids = (
            arrow.numbers(found[name])[mine] for name in facts
        )
        return IndexList(row_ids, values, documents, positions, token_ids, table.longest)

    def lists_hold(self, generation: Generation, info: SiteInfo, neuron: int, n: int) -> bool:
        """Return whether a list of a neuron can tell of n rows: no more fit, or no more exist."""
        name = f"{generation.folder}/{site_file(info.site, 'exemplars', 'exemplars.parquet')}"
        if name not in generation.files:
            return False
        with self._lock:
            longest = self._table(name, generation.files).longest
        return n <= longest or self.n_values(generation, info, neuron) <= longest

    def n_values(self, generation: Generation, info: SiteInfo, neuron: int) -> int:
        """Return how many content rows of the covered segments have a value of a neuron."""
        name = f"{generation.folder}/neurons.parquet"
        with self._lock:
            found = _rows_of(self._table(name, generation.files), neuron, ["site", "neuron", "n"])
        mine = arrow.names(found["site"]) == str(info.site)
        return int(arrow.numbers(found["n"])[mine][0])

    def zones(self, generation: Generation, info: SiteInfo, neuron: int) -> NeuronZones | None:
        """Return the zones of a neuron, if the generation has them."""
        folder = generation.folder
        name = f"{folder}/{site_file(info.site, 'zones', 'zones.npy')}"
        bands_name = f"{folder}/{space_file(info.site.space, 'zones', 'bands.npy')}"
        if name not in generation.files:
            return None
        self._verifier.check({name: generation.files[name]})
        # A copy: the mapping goes with the array it was made for.
        extremes = np.array(durable.read_array(self._root / name, mapped=True)[neuron], np.float32)
        with self._lock:
            key = (bands_name, generation.files[bands_name])
            if key not in self._bands:
                self._verifier.check({bands_name: key[1]})
                bands = durable.read_array(self._root / bands_name)
                self._bands[key] = bands.astype(np.int64)
                if len(self._bands) > _LOADED_BANDS:
                    self._bands.popitem(last=False)
            self._bands.move_to_end(key)
            bands = self._bands[key]
        return NeuronZones(bands[:, 0], bands[:, 1], extremes[:, 0], extremes[:, 1])

    def _table(self, name: str, files: Mapping[str, FileFacts]) -> _Table:
        key = (name, files[name])
        if key not in self._tables:
            self._verifier.check({name: key[1]})
            self._tables[key] = _open(self._root / name)
            if len(self._tables) > _OPEN_TABLES:
                self._tables.popitem(last=False)
        self._tables.move_to_end(key)
        return self._tables[key]


def _open(path: Path) -> _Table:
    file = pq.ParquetFile(path)
    names = file.schema_arrow.names
    # A table without rows has one row group, without statistics.
    n_groups = file.metadata.num_row_groups if file.metadata.num_rows else 0
    groups = [file.metadata.row_group(g) for g in range(n_groups)]

    def statistics(name: str) -> list[Any]:
        return [group.column(names.index(name)).statistics for group in groups]

    neurons = statistics("neuron")
    longest = max((s.max for s in statistics("rank")), default=0) if "rank" in names else 0
    return _Table(file, [s.min for s in neurons], [s.max for s in neurons], longest)


def _rows_of(table: _Table, neuron: int, columns: list[str]) -> pa.Table:
    """Return the rows of a neuron, from the row groups that may hold it."""
    groups = [
        g
        for g, (low, high) in enumerate(zip(table.lows, table.highs, strict=True))
        if low <= neuron <= high
    ]
    found = table.file.read_row_groups(groups, columns=columns, use_threads=False)
    return arrow.take(found, np.flatnonzero(arrow.numbers(found["neuron"]) == neuron))
