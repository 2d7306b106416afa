"""The folds' states on disk: in partials of segments and in generations of the index.

`RunningLists` holds the top-k lists of the committed segments below the one being captured; their
last values are the thresholds of its pass.  Nothing uncommitted ever enters, so a crash cannot
leave a threshold behind that no list justifies.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from actstore.errors import DamagedFile
from actstore.folds import FOLDS, TopK
from actstore.folds.topk import Ranked, Thresholds, TopKState
from actstore.site import Site
from actstore.store import CoreStore, Generation, SiteInfo
from actstore.store.segment_writer import PartialReader

TOPK: TopK = TopK()
"""The lists every capture keeps."""

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
"""A place in the list of a neuron: side ``top`` or ``bottom``, rank from 1."""

STATES = ("moments", "others", "topk")
"""What a partial holds of each site: moments of content rows, of the others, and the lists."""


def pack(site: Site, state: str, value: Any) -> dict[str, npt.NDArray[Any]]:
    """Return a state as named arrays, the name telling site, state and field."""
    fold = FOLDS["topk" if state == "topk" else "moments"]
    return {f"{site}/{state}/{key}": array for key, array in fold.to_arrays(value).items()}


def unpack(arrays: Mapping[str, npt.NDArray[Any]], site: Site, state: str) -> Any:
    """Return the state that `pack` packed."""
    prefix = f"{site}/{state}/"
    fold = FOLDS["topk" if state == "topk" else "moments"]
    names = [name for name in arrays if name.startswith(prefix)]
    return fold.from_arrays({name.removeprefix(prefix): arrays[name] for name in names})


def exemplars_name(site: Site) -> str:
    """Return the path of a site's exemplars inside a generation."""
    space = f"space={site.space}/" if site.space else ""
    return f"exemplars/{space}hook={site.hook}/layer={site.layer}/exemplars.parquet"


def read_lists(store: CoreStore, generation: Generation, info: SiteInfo) -> TopKState:
    """Return the lists of a site as a generation holds them."""
    name = f"{generation.folder}/{exemplars_name(info.site)}"
    store.verifier.check({name: generation.files[name]})
    table = pq.read_table(store.path / name)
    sides = table.column("side").to_numpy(zero_copy_only=False)
    neurons = table.column("neuron").to_numpy()
    ranks = table.column("rank").to_numpy() - 1
    row_ids, values = table.column("row_id").to_numpy(), table.column("value").to_numpy()
    lists = []
    for side in ("top", "bottom"):
        mine = sides == side
        empty = np.full((info.width, TOPK.k), np.nan, dtype=np.float32)
        ids = np.full((info.width, TOPK.k), -1, dtype=np.int64)
        empty[neurons[mine], ranks[mine]] = values[mine]
        ids[neurons[mine], ranks[mine]] = row_ids[mine]
        counts = np.bincount(neurons[mine], minlength=info.width).astype(np.int32)
        lists.append(Ranked(empty, ids, counts))
    return TopKState(*lists)


class RunningLists:
    """The merged lists of committed segments, in ascending order of segments.

    Memory: 24 bytes x k a neuron over all sites.
    """

    def __init__(self, store: CoreStore) -> None:
        self._store = store
        self._states: dict[Site, TopKState] = {}
        self.relied_on: list[int] = []
        self._start()

    def _start(self) -> None:
        generation = self._store.prefix_index()
        for info in self._store.meta.sites:
            self._states[info.site] = (
                read_lists(self._store, generation, info)
                if generation is not None
                else TOPK.start(info.width)
            )
        self.relied_on = list(generation.covers) if generation is not None else []

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
                with PartialReader(self._store, unknown[0], "folds") as partial:
                    lists = {site: unpack(partial, site, "topk") for site in self._states}
            except DamagedFile:
                newer = self._store.prefix_index()
                if newer is None or unknown[0] not in newer.covers:
                    raise
                continue  # a compaction took it just now
            self.add(unknown[0], lists)

    def add(self, segment: int, lists: Mapping[Site, TopKState]) -> None:
        """Take in the lists of a segment that has just been committed, once."""
        if segment in self.relied_on:
            return  # another process has compacted it meanwhile: it came with the generation
        for site, state in lists.items():
            self._states[site] = TOPK.merge(self._states[site], state)
        self.relied_on.append(segment)

    def thresholds(self) -> dict[Site, Thresholds]:
        """Return what a value must reach at each site to enter the lists."""
        return {site: TOPK.thresholds(state) for site, state in self._states.items()}
