"""Compaction: the partials of committed segments become one generation of the index.

Statistics and lists are merged site by site in the order of segments, going on from the newest
prefix generation, so the index is the same bytes however often the capture was interrupted.  Memory
is that of one site's lists.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from actstore import durable
from actstore.capturing.lists import (
    EXEMPLARS,
    STATES,
    TOPK,
    exemplars_name,
    pack,
    read_lists,
    unpack,
)
from actstore.durable import FileFacts
from actstore.errors import DamagedFile
from actstore.folds import FOLDS
from actstore.folds.moments import Moments
from actstore.folds.topk import TopKState
from actstore.store import CoreStore, Generation, SiteInfo, generations
from actstore.store.budget import Progress
from actstore.store.segment_writer import PartialReader, drop_partials

_MOMENTS = Moments()
_EXEMPLAR_GROUP = 20_000


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
        base = store.prefix_index()
        covers = _closed(store, _prefix(store.committed) if only_prefix else store.committed)
        newest = store.index()
        if not covers or (newest is not None and set(covers) <= set(newest.covers)):
            return newest
        number = generations.new_number(store.path)
        folder = store.path / f"index/{number:06d}"
        durable.make_folder(folder)
        files: dict[str, FileFacts] = {}
        neurons: list[pa.Table] = []
        states: dict[str, npt.NDArray[Any]] = {}
        with ExitStack() as stack:
            done = set(base.covers) if base else set()
            partials = [
                stack.enter_context(PartialReader(store, segment, "folds"))
                for segment in covers
                if segment not in done
            ]
            for i, info in enumerate(store.meta.sites):
                merged = _merge(store, base, info, partials)
                neurons.append(_neurons(info, merged))
                for state in ("moments", "others"):
                    states |= pack(info.site, state, merged[state])
                path = folder / exemplars_name(info.site)
                durable.make_folder(path.parent)
                table = _exemplars(store, info, merged["topk"])
                files[str(path.relative_to(store.path))] = durable.write_table(
                    path, table, _EXEMPLAR_GROUP
                )
                if progress:
                    progress("index", i + 1, len(store.meta.sites))
        path = folder / "neurons.parquet"
        files[str(path.relative_to(store.path))] = durable.write_table(
            path, pa.concat_tables(neurons)
        )
        # The moments themselves: the table's columns are made from them and lose bits.
        name = f"index/{number:06d}/moments.npz"
        files[name] = durable.write_arrays(store.path / name, states)
        generation = Generation(number, tuple(covers), files)
        generations.publish(store.path, generation)
        if generation.is_prefix:
            drop_partials(store, generation.covers)
        generations.sweep(store.path)
        return generation


def _prefix(committed: Sequence[int]) -> tuple[int, ...]:
    return tuple(s for i, s in enumerate(committed) if s == i)


def _closed(store: CoreStore, segments: Sequence[int]) -> tuple[int, ...]:
    """Return the segments whose thresholds came from segments that are there too."""
    present = set(segments)
    for segment in segments:
        missing = set(store.commit_of(segment).relied_on) - present
        if missing:
            raise DamagedFile(
                f"segment {segment} of {store.path} relied on the lists of segment "
                f"{min(missing)}, which is not committed; a file under commits/ is missing. "
                "Restore it from a copy."
            )
    return tuple(segments)


def _merge(
    store: CoreStore, base: Generation | None, info: SiteInfo, partials: Sequence[PartialReader]
) -> dict[str, Any]:
    merged: dict[str, Any] = {
        "moments": _MOMENTS.start(info.width),
        "others": _MOMENTS.start(info.width),
        "topk": TOPK.start(info.width),
    }
    if base is not None:
        name = f"{base.folder}/moments.npz"
        store.verifier.check({name: base.files[name]})
        with np.load(store.path / name, allow_pickle=False) as arrays:
            for state in ("moments", "others"):
                merged[state] = unpack(arrays, info.site, state)
        merged["topk"] = read_lists(store, base, info)
    for partial in partials:
        for state in STATES:
            fold = FOLDS["topk" if state == "topk" else "moments"]
            merged[state] = fold.merge(merged[state], unpack(partial, info.site, state))
    return merged


def _neurons(info: SiteInfo, merged: dict[str, Any]) -> pa.Table:
    site = info.site
    others = _MOMENTS.finish(merged["others"])
    statistics = {
        **_MOMENTS.finish(merged["moments"]),
        **{f"other_{name}": others[name] for name in ("n", "mean", "std", "min", "max")},
    }
    return pa.table(
        {
            "site": pa.repeat(str(site), info.width),
            "space": pa.repeat(site.space, info.width),
            "hook": pa.repeat(site.hook, info.width),
            "layer": pa.repeat(pa.scalar(site.layer, pa.int32()), info.width),
            "neuron": pa.array(np.arange(info.width), pa.int32()),
            # What no value defines is null: readers believe Parquet's minima, which leave NaN out.
            **{name: pa.array(column, from_pandas=True) for name, column in statistics.items()},
        }
    )


def _exemplars(store: CoreStore, info: SiteInfo, lists: TopKState) -> pa.Table:
    pieces = []
    for side, ranked in (("top", lists.top), ("bottom", lists.bottom)):
        neurons, places = np.nonzero(ranked.taken)
        pieces.append(
            pa.table(
                {
                    "neuron": pa.array(neurons, pa.int32()),
                    "side": pa.repeat(side, len(neurons)),
                    "rank": pa.array(places + 1, pa.int32()),
                    "row_id": ranked.row_ids[neurons, places],
                    "value": ranked.values[neurons, places],
                }
            )
        )
    table = pa.concat_tables(pieces)
    row_ids = table.column("row_id").to_numpy()
    unique, places = np.unique(row_ids, return_inverse=True)
    tokens = store.tokens_of(unique, info.site.space).take(places)
    for name in ("document", "position", "token_id"):
        table = table.append_column(name, tokens.column(name))
    # Sorted so that one neuron's list is one short stretch of the file.
    order = pc.sort_indices(
        table, sort_keys=[("neuron", "ascending"), ("side", "descending"), ("rank", "ascending")]
    )
    return table.take(order).combine_chunks().cast(EXEMPLARS)
