"""Compaction: the partials of committed segments become one generation of the index.

Statistics and lists are merged site by site in the order of segments, going on from the newest
prefix generation, so the index is the same bytes however often the capture was interrupted.  Memory
is that of one site's lists.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

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
        files: dict[str, FileFacts] = {}
        neurons: list[pa.Table] = []
        states: dict[str, npt.NDArray[Any]] = {}
        for i, info in enumerate(store.meta.sites):
            merged = _merge(store, base, info, new)
            neurons.append(_neurons(info, merged))
            for state in ("moments", "others"):
                states |= pack(info.site, state, merged[state])
            path = folder / exemplars_name(info.site)
            durable.make_folder(path.parent)
            table = _exemplars(store, base, info, merged["topk"])
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
    store: CoreStore, base: Generation | None, info: SiteInfo, segments: Sequence[int]
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
    for segment in segments:
        with PartialReader(store, segment, "folds") as partial:
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


_COLUMNS = ("document", "position", "token_id")


def _tokens(
    store: CoreStore, base: Generation | None, info: SiteInfo, row_ids: npt.NDArray[np.int64]
) -> pa.Table:
    """Return what tokens the rows are: from the base's exemplars where they stand there.

    Only rows of new segments are looked up, so compaction does not read the whole token index.
    """
    known = EXEMPLARS.empty_table().select(["row_id", *_COLUMNS])
    if base is not None:
        name = f"{base.folder}/{exemplars_name(info.site)}"
        known = pq.read_table(store.path / name, columns=["row_id", *_COLUMNS])
    known_ids, places = np.unique(known.column("row_id").to_numpy(), return_index=True)
    new_ids = np.setdiff1d(row_ids, known_ids, assume_unique=True)
    new = store.tokens_of(new_ids, info.site.space).select(_COLUMNS)
    both = pa.concat_tables([known.select(_COLUMNS).take(places), new])
    order = np.argsort(np.concatenate([known_ids, new_ids]))
    all_ids = np.concatenate([known_ids, new_ids])[order]
    return both.take(order[np.searchsorted(all_ids, row_ids)])


def _exemplars(
    store: CoreStore, base: Generation | None, info: SiteInfo, lists: TopKState
) -> pa.Table:
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
    tokens = _tokens(store, base, info, unique).take(places)
    for name in _COLUMNS:
        table = table.append_column(name, tokens.column(name))
    # Sorted so that one neuron's list is one short stretch of the file.
    order = pc.sort_indices(
        table, sort_keys=[("neuron", "ascending"), ("side", "descending"), ("rank", "ascending")]
    )
    return table.take(order).combine_chunks().cast(EXEMPLARS)
