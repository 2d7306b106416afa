"""Rows of two stores that stand for the same place of the same text.

Two models, or one before and after tuning, are compared over the tokens that end at the same
character of the same document: what a model has read by then is the same text, however it cut it.
Where several tokens end there, since a character took more than one, the last of them counts.
Documents must be the same, one by one; a text that was cut short is one as far as it goes.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from concurrent.futures import Executor
from typing import Any

import numpy as np
import numpy.typing as npt

from actstore.decompose.ranked import RankedRows
from actstore.decompose.scan import Scan
from actstore.errors import ArgumentError, NonFiniteActivation
from actstore.site import Site
from actstore.store import CoreStore, Rows, SiteInfo

Ids = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class Aligned:
    """Pairs of rows of two stores, by rising row_id of the first."""

    rows: Rows
    """The rows of the first store."""
    other_rows: Rows
    """Those of the other."""
    order: Ids
    """For each row of the first, the place of its partner among those of the other."""
    n_documents: int
    """Documents they are of."""
    share: float
    """The part of the first store's rows that have a partner."""


def align(
    store: CoreStore, rows: Rows, other: CoreStore, other_rows: Rows, spaces: tuple[str, str]
) -> Aligned:
    """Return the rows of two stores that end at the same character of the same document.

    Cost: one pass over texts and token index of both; memory 40 bytes a row.

    Raises
    ------
    ArgumentError
        If documents differ, or no token ends where one of the other store does.
    """
    _refuse_other_texts(store, other)
    ids, keys = _places(store, rows, spaces[0])
    other_ids, other_keys = _places(other, other_rows, spaces[1])
    common, at, other_at = np.intersect1d(
        _as_one(keys), _as_one(other_keys), assume_unique=True, return_indices=True
    )
    if not len(common):
        raise ArgumentError(
            f"other = {other.path} has no row where one of {store.path} ends: {len(ids):,} and "
            f"{len(other_ids):,} rows ({rows.rule}) of {store.n_documents} documents. Compare "
            "stores over the same corpus, with the same rows kept."
        )
    by_row = np.argsort(ids[at])
    at, other_at = at[by_row], other_at[by_row]
    chosen, partners = ids[at], other_ids[other_at]
    rule = f"{rows.rule}, aligned with {other.path.name}"
    return Aligned(
        Rows.from_row_ids(rule, store.meta.segment_rows, chosen),
        Rows.from_row_ids(rule, other.meta.segment_rows, partners),
        np.searchsorted(np.sort(partners), partners),
        len(np.unique(keys[at, 0])),
        len(chosen) / rows.n_rows,
    )


def _refuse_other_texts(store: CoreStore, other: CoreStore) -> None:
    for number in range(min(store.n_documents, other.n_documents)):
        mine, its = (str(s.document(number)["text"]) for s in (store, other))
        if not (mine.startswith(its) or its.startswith(mine)):
            place = next(i for i, (a, b) in enumerate(zip(mine, its, strict=False)) if a != b)
            raise ArgumentError(
                f"other = {other.path} is over other documents: document {number} differs from "
                f"that of {store.path} at character {place}. Rows are aligned by document and "
                "character; capture the same corpus, in the same order, with both models."
            )


def _places(store: CoreStore, rows: Rows, space: str) -> tuple[Ids, Ids]:
    """Return row ids, and the document and last character of each; one row a place."""
    ids, places, order = [], [], []
    for segment in rows.segments:
        offsets = rows.offsets(segment)
        document, end, position = (
            store.token_column(segment, name, space)[offsets].astype(np.int64)
            for name in ("document", "char_end", "doc_position")
        )
        ids.append(segment * rows.segment_rows + offsets)
        places.append(np.stack([document, end], 1))
        order.append(position)
    row_ids, keys, positions = np.concatenate(ids), np.concatenate(places), np.concatenate(order)
    # Special tokens end nowhere.
    ordinary = positions >= 0
    row_ids, keys, positions = row_ids[ordinary], keys[ordinary], positions[ordinary]
    by_place = np.lexsort((positions, keys[:, 1], keys[:, 0]))
    row_ids, keys = row_ids[by_place], keys[by_place]
    last = np.append((np.diff(keys, axis=0) != 0).any(1), True)[: len(keys)]
    return row_ids[last], keys[last]


def _as_one(keys: Ids) -> Ids:
    """Return document and character as one number: neither reaches 2^31."""
    return (keys[:, 0] << 31) + keys[:, 1]


class PairedScan(Scan):
    """A scan of two stores at once: the sites of the first, then those of the other, row by row."""

    def __init__(
        self,
        store: CoreStore,
        infos: Sequence[SiteInfo],
        other: CoreStore,
        other_infos: Sequence[SiteInfo],
        aligned: Aligned,
        *,
        budget_bytes: int,
        reserved_bytes: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(
            store,
            infos,
            aligned.rows,
            budget_bytes=budget_bytes,
            reserved_bytes=reserved_bytes,
            seed=seed,
        )
        self.ranked: RankedRows = _PairedRows(self.ranked, other, other_infos, aligned)
        edges = np.cumsum([self.width] + [info.width for info in other_infos]).tolist()
        for info, (start, stop) in zip(other_infos, itertools.pairwise(edges), strict=True):
            self.columns[_of_other(info.site)] = slice(start, stop)
        self.width = edges[-1]


def _of_other(site: Site) -> Site:
    """Return a name of its own for a site of the other store: both may have the same."""
    return dataclasses.replace(site, space=f"other {site.space}".strip())


class _PairedRows(RankedRows):
    """Reads rows of two stores by the rank in the first."""

    def __init__(
        self, first: RankedRows, other: CoreStore, infos: Sequence[SiteInfo], aligned: Aligned
    ) -> None:
        self.__dict__.update(first.__dict__)
        self._first = first
        self._other = RankedRows(other, infos, aligned.other_rows)
        self._order = aligned.order
        self.row_bytes = first.row_bytes + self._other.row_bytes

    def empty(self, n_rows: int) -> list[npt.NDArray[Any]]:
        return [*self._first.empty(n_rows), *self._other.empty(n_rows)]

    def read(
        self,
        ranks: Ids,
        out: Sequence[Sequence[npt.NDArray[Any]]],
        helper: Executor | None = None,
    ) -> Ids:
        n_own = len(self._infos)
        row_ids = self._first.read(ranks, out[:n_own], helper)
        self._other.read(self._order[ranks], out[n_own:], helper)
        self.n_reads = self._first.n_reads + self._other.n_reads
        self.bytes_read = self._first.bytes_read + self._other.bytes_read
        return row_ids

    def non_finite(self, site: Site, value: float, row_id: int, neuron: int) -> NonFiniteActivation:
        if not site.space.startswith("other"):
            return self._first.non_finite(site, value, row_id, neuron)
        rank = int(np.searchsorted(self._first.row_ids(np.arange(self.n_rows)), row_id))
        partner = int(self._other.row_ids(self._order[[rank]])[0])
        own = dataclasses.replace(site, space=site.space.removeprefix("other").strip())
        return self._other.non_finite(own, value, partner, neuron)
