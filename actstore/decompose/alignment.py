"""Rows of two stores that stand for the same place of the same text.

Two models, or one before and after tuning, are compared over the tokens that end at the same
character of the same document: what a model has read by then is the same text, however it cut it.
Where several tokens end there, since a character took more than one, the last of them counts.
Documents must be the same, one by one; a text that was cut short is one as far as it goes.

Partners are looked for a stretch of text at a time, as many documents as the budget takes.  What is
known of all rows is one number each: the rank of the partner.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from typing import Any

import numpy as np
import numpy.typing as npt

from actstore.decompose.ranked import RankedRows
from actstore.decompose.scan import Scan
from actstore.errors import ArgumentError, BudgetExceeded, NonFiniteActivation
from actstore.site import Site
from actstore.store import CoreStore, Rows, SiteInfo

Ids = npt.NDArray[np.int64]

_CHARACTER_BITS = 31  # neither documents nor characters reach 2^31
_PLACE_BYTES = 160  # of a row of either store while its partner is looked for, copies counted
_LEAST_PLACES = 2**16


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
    store: CoreStore,
    rows: Rows,
    other: CoreStore,
    other_rows: Rows,
    spaces: tuple[str, str],
    budget_bytes: int,
) -> Aligned:
    """Return the rows of two stores that end at the same character of the same document.

    Cost: one pass over texts and token index of both, or several over the index where documents are
    spread over many segments; memory within the budget, of which 8 bytes a row stay.

    Raises
    ------
    ArgumentError
        If documents differ, or no token ends where one of the other store does.
    BudgetExceeded
        If what is known of every row does not fit the budget.
    """
    needed = 16 * rows.n_rows + 9 * other_rows.n_rows + _PLACE_BYTES * _LEAST_PLACES
    if needed > budget_bytes:
        raise BudgetExceeded(
            f"aligning {rows.n_rows:,} rows of {store.path} with {other_rows.n_rows:,} of "
            f"{other.path} takes {needed:,} bytes, and the budget is {budget_bytes:,}. Pass "
            f"budget={needed} or more (--budget), or fewer rows= (--rows)."
        )
    _refuse_other_texts(store, other)
    indexes = _Index(store, rows, spaces[0]), _Index(other, other_rows, spaces[1])
    most = _LEAST_PLACES + (budget_bytes - needed) // _PLACE_BYTES
    partner = np.full(rows.n_rows, -1)  # by rank of the first store, the rank in the other
    is_partner = np.zeros(other_rows.n_rows, np.bool_)
    has_rows = np.zeros(store.n_documents, np.bool_)
    for span in itertools.pairwise(_spans(store, indexes, most)):
        (ranks, places), (other_ranks, other_places) = (index.places(*span) for index in indexes)
        common, at, other_at = np.intersect1d(
            places, other_places, assume_unique=True, return_indices=True
        )
        partner[ranks[at]] = other_ranks[other_at]
        is_partner[other_ranks[other_at]] = True
        has_rows[common >> _CHARACTER_BITS] = True
    chosen = _chosen(rows, partner >= 0, f"{rows.rule}, aligned with {other.path.name}")
    if not chosen.n_rows:
        raise ArgumentError(
            f"other = {other.path} has no row where one of {store.path} ends: {rows.n_rows:,} and "
            f"{other_rows.n_rows:,} rows ({rows.rule}) of {store.n_documents} documents. Compare "
            "stores over the same corpus, with the same rows kept."
        )
    partner = partner[partner >= 0]
    rank = np.cumsum(is_partner) - 1
    for first in range(0, len(partner), _LEAST_PLACES):  # in place
        some = slice(first, first + _LEAST_PLACES)
        partner[some] = rank[partner[some]]
    return Aligned(
        chosen,
        _chosen(other_rows, is_partner, chosen.rule),
        partner,
        int(has_rows.sum()),
        chosen.n_rows / rows.n_rows,
    )


def _chosen(rows: Rows, mask: npt.NDArray[np.bool_], rule: str) -> Rows:
    """Return some of the rows, given by rank."""

    def masks() -> Iterator[tuple[int, npt.NDArray[np.bool_]]]:
        first = 0
        for segment in rows.segments:
            offsets = rows.offsets(segment)
            of_segment = np.zeros(rows.segment_rows, np.bool_)
            of_segment[offsets[mask[first : first + len(offsets)]]] = True
            first += len(offsets)
            yield segment, of_segment

    return Rows.from_masks(rule, rows.segment_rows, masks())


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


class _Index:
    """The places of some rows of a store, a part of them at a time.

    A place is document and last character in one number.
    """

    def __init__(self, store: CoreStore, rows: Rows, space: str) -> None:
        self._store, self._rows, self._space = store, rows, space
        self.counts: Ids = np.zeros(store.n_documents, np.int64)
        """Rows of each document."""
        self._first_ranks: Ids = np.zeros(len(rows.segments) + 1, np.int64)
        self._documents: list[tuple[int, int]] = []  # the first and last of each segment
        for number, segment in enumerate(rows.segments):
            offsets = rows.offsets(segment)
            document = store.token_column(segment, "document", space)[offsets]
            self.counts += np.bincount(document, minlength=len(self.counts))
            self._documents.append((int(document.min()), int(document.max())))
            self._first_ranks[number + 1] = self._first_ranks[number] + len(offsets)

    def places(self, first: int, stop: int) -> tuple[Ids, Ids]:
        """Return ranks and places of the rows from one place to before another, one row a place."""
        ranks, places, order = ([np.empty(0, np.int64)] for _ in range(3))
        for number, segment in enumerate(self._rows.segments):
            low, high = self._documents[number]
            if low > stop >> _CHARACTER_BITS or high < first >> _CHARACTER_BITS:
                continue
            offsets = self._rows.offsets(segment)
            document, end, position = (
                self._store.token_column(segment, name, self._space)[offsets].astype(np.int64)
                for name in ("document", "char_end", "doc_position")
            )
            place = (document << _CHARACTER_BITS) + end
            # Special tokens end nowhere.
            (here,) = np.nonzero((position >= 0) & (first <= place) & (place < stop))
            ranks.append(self._first_ranks[number] + here)
            places.append(place[here])
            order.append(position[here])
        rank, place = np.concatenate(ranks), np.concatenate(places)
        by_place = np.lexsort((np.concatenate(order), place))
        rank, place = rank[by_place], place[by_place]
        last = np.append(np.diff(place) != 0, True)[: len(place)]
        return rank[last], place[last]


def _spans(store: CoreStore, indexes: Sequence[_Index], most: int) -> list[int]:
    """Return places, ascending, between which there are about so many rows at most.

    A document with more rows is cut into stretches of as many characters each.
    """
    counts = np.zeros(max(len(index.counts) for index in indexes), np.int64)
    for index in indexes:
        counts[: len(index.counts)] += index.counts
    edges, held = [0], 0
    for document in np.flatnonzero(counts).tolist():
        n_rows = int(counts[document])
        held += n_rows
        if held > most:
            n_parts = -(-n_rows // most)
            n_characters = len(str(store.document(document)["text"])) if n_parts > 1 else 0
            starts = (n_characters * part // n_parts for part in range(n_parts))
            edges += [(document << _CHARACTER_BITS) + start for start in starts]
            held = -(-n_rows // n_parts)
    return [*edges, len(counts) << _CHARACTER_BITS]


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
