"""The strongest rows of a neuron, exactly, for any number of them and any subset.

The index keeps the highest and lowest hundred values of every neuron over the segments it covers,
and the highest of a hundred windows.  Each list is the beginning of a total order (value, then row,
ascending; NaN never enters, and -0.0 equals 0.0), so of a subset it gives the first places too:
those of its rows that belong to it.  Where these are enough the list is read, and segments that it
does not cover are scanned; where they are not, the stored column is scanned, bands that cannot
matter left out (`actstore.query.pruned`).  Every way gives the same rows.  Where a site does not
store every row a scan would be wrong, so what the index cannot answer is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import index as as_integer
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from rich.cells import cell_len

from actstore import arrow
from actstore.errors import ActstoreError, ArgumentError
from actstore.query.answer import Answer, fit, visible
from actstore.query.condition import Condition
from actstore.query.context import Snippet, snippets, values_at
from actstore.query.database import Database
from actstore.query.pruned import Best, Question, bands_of, bound_of, scan
from actstore.site import Site
from actstore.store import CoreStore, Generation, SiteInfo
from actstore.store.index_tables import IndexList
from actstore.store.stored_rows import ALL, keep_text

Ids = npt.NDArray[np.int64]
Values = npt.NDArray[np.float32]
Replay = Callable[[Ids], Values]
"""Computes a neuron again at some rows."""

GROUPS = {"window": "window_id", "document": "document"}
"""What rows can be distinct by, and the column of the token index that tells them apart."""

_BEFORE, _TOKEN, _AFTER = 28, 20, 28  # cells of a printed context
_ROWS = pa.schema(
    [
        ("rank", pa.int32()),
        ("row_id", pa.int64()),
        ("value", pa.float32()),
        ("document", pa.int64()),
        ("position", pa.int32()),
        ("token", pa.string()),
        ("before", pa.string()),
        ("after", pa.string()),
        ("source", pa.string()),
    ]
)
_PRINTED = ("rank", "value", "context", "document", "position", "source", "row_id")


class Top(Answer):
    """The strongest rows of a neuron, and how they were reached.

    It prints the text around each row in one column, the row's own token in ``⟦⟧``.

    Parameters
    ----------
    table : pyarrow.Table
        Columns rank, row_id, value, document, position, token, before, after, source; with
        activations also tokens, values and place.
    reached : str
        How: ``"index"``, ``"index + 2 segments scanned"``, ``"pruned scan: 214 of 1,024 chunks
        read"`` or ``"column scan: …"``.
    """

    def __init__(self, table: pa.Table, reached: str) -> None:
        super().__init__(table)
        self.reached = reached

    def __repr__(self) -> str:
        lines = [repr(self._printed()), f"({self.reached})"]
        if "values" in self.columns:
            lines.insert(1, "… the neuron over each context: .df(), or --format json")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return self._printed()._repr_html_()

    def _printed(self) -> Answer:
        table = self.to_arrow()
        texts = zip(
            *(table[name].to_pylist() for name in ("before", "token", "after")), strict=True
        )
        contexts = arrow.column([_in_context(*text) for text in texts])
        return _Printed(table.append_column("context", contexts).select(_PRINTED))


class _Printed(Answer):
    """A table whose contexts are as long as they are to be."""

    uncut = frozenset({"context"})


def _in_context(before: str, token: str, after: str) -> str:
    """Return a token marked in its context, cut so that tokens stand below each other.

    >>> _in_context("to ", "war", " with").strip()
    'to ⟦war⟧ with'
    """
    # Cut before it is made visible too: a token may be as long as a book.
    left = fit(visible(before[-_BEFORE - 1 :]), _BEFORE, "before")
    middle = fit(visible(token[: _TOKEN + 1]), _TOKEN, "token")
    right = fit(visible(after[: _AFTER + 1]), _AFTER, "after")
    return f"{' ' * (_BEFORE - cell_len(left))}{left}⟦{middle}⟧{right}"


def top(
    store: CoreStore,
    site: str | Site,
    neuron: int,
    k: int = 20,
    *,
    largest: bool = True,
    where: str | None = None,
    distinct: str | None = None,
    before: int = 8,
    after: int = 8,
    activations: bool = False,
    replay: Replay | None = None,
    database: Database | None = None,
) -> Top:
    """Return the rows where a neuron is strongest, with the text around them.

    Exact over all committed content rows (neither special nor first), whether they are stored or
    not.  From the index it costs milliseconds; a scan reads the chunks of one column that can
    matter, and of the token index the columns it needs.

    Parameters
    ----------
    store : CoreStore
        The store.
    site : str or Site
        The site, such as ``"mlp_post.5"``.
    neuron : int
        Index of the neuron, from 0.
    k : int, default 20
        Rows to return; all of them if there are fewer.
    largest : bool, default True
        The highest values; False for the lowest.
    where : str, optional
        SQL condition that the rows meet, over the columns of tokens and over source, n_tokens and
        metadata of documents, such as ``"source LIKE '%Lincoln%'"``.
    distinct : {"window", "document"}, optional
        Give at most one row of each, its best.
    before, after : int, default 8
        Tokens of context on either side.  With none on both sides no text is read at all, and
        `token` is the tokenizer's text of it.
    activations : bool, default False
        Add the columns tokens and values, the neuron over the tokens of each snippet (NULL where a
        row is not stored), and place, which of them is the row.
    replay : callable, optional
        Computes the values that are not stored; implies `activations`.
    database : Database, optional
        Evaluates `where`; by default one of its own.

    Returns
    -------
    Top
        The rows in order, with `Top.reached`.

    Raises
    ------
    SiteNotFound
        If the store does not have the site.
    NeuronNotFound
        If the site does not have the neuron.
    QueryError
        If `where` is not a condition.
    ArgumentError
        If `k` is not a positive integer, `distinct` is none of the two, or `before` or `after` is
        negative; or if not all rows are stored, and the index holds fewer than `k` or does not
        cover all segments.
    """
    info = store.site(site)
    neuron, k = store.check_neuron(info, neuron), _as_count(k)
    if distinct is not None and distinct not in GROUPS:
        raise ArgumentError(f"distinct = {distinct!r}; expected 'window', 'document' or None.")
    question = Question(info, neuron, k, bool(largest), GROUPS[distinct] if distinct else None)
    condition = None
    if where is not None:
        database = Database(store) if database is None else database
        condition = Condition(database, store, where, info.site.space)
    while True:
        generation = store.index()
        try:
            search = _Search(store, question, generation, condition)
            ids, values, reached = search.answer()
            break
        except (ActstoreError, OSError):
            # A capture that goes on may replace the generation of the index under our hands.
            newest = store.index()
            if (newest and newest.number) == (generation and generation.number):
                raise
    columns: dict[str, arrow.Values] = {
        "rank": np.arange(1, len(ids) + 1),
        "row_id": ids,
        "value": values,
    }
    with_values = activations or replay is not None
    if before == after == 0 and not with_values:
        columns |= _without_text(store, info, ids, search.listed)
        return Top(arrow.table(columns, _ROWS), reached)
    around = snippets(store, ids, before, after, info.site.space)
    columns |= {
        "document": np.array([s.document for s in around], np.int64),
        "position": np.array([s.position for s in around], np.int32),
        "token": [s.token for s in around],
        "before": [s.before for s in around],
        "after": [s.after for s in around],
        "source": [s.source for s in around],
    }
    table = arrow.table(columns, _ROWS)
    if with_values:
        for name, column in _over_snippets(store, info, neuron, values, around, replay).items():
            table = table.append_column(name, column)
    return Top(table, reached)


def _without_text(
    store: CoreStore, info: SiteInfo, ids: Ids, listed: IndexList | None
) -> dict[str, arrow.Values]:
    """Return what is known of rows without their text: the index lists it, or tokens hold it."""
    names = ("document", "position", "token_id")
    facts = [np.empty(len(ids), np.int64) for _ in names]
    unknown = np.ones(len(ids), np.bool_)
    if listed is not None and len(listed.row_ids):
        order = np.argsort(listed.row_ids)
        places = np.minimum(np.searchsorted(listed.row_ids[order], ids), len(order) - 1)
        places = order[places]
        unknown = listed.row_ids[places] != ids
        lists: list[npt.NDArray[Any]] = [listed.documents, listed.positions, listed.token_ids]
        for fact, known in zip(facts, lists, strict=True):
            fact[:] = known[places]
    for fact, column in zip(
        facts, store.token_values(ids[unknown], names, info.site.space), strict=True
    ):
        fact[unknown] = column
    documents, positions, tokens = facts
    numbers, which = np.unique(documents, return_inverse=True)
    sources = store.sources(numbers)
    empty = [""] * len(ids)
    return {
        "document": documents,
        "position": positions,
        "token": store.texts_of(tokens),
        "before": empty,
        "after": empty,
        "source": [sources[i] for i in which],
    }


def _over_snippets(
    store: CoreStore,
    info: SiteInfo,
    neuron: int,
    values: Values,
    around: Sequence[Snippet],
    replay: Replay | None,
) -> dict[str, pa.Array]:
    """Return the tokens of snippets, the neuron at each, and which of them is the row itself."""
    rows = np.array([row for s in around for row in s.token_rows], np.int64)
    wanted, back = np.unique(rows, return_inverse=True)
    found, known = values_at(store, info, neuron, wanted)
    # The rows themselves are known from the answer, in the order of the total order.
    own = np.searchsorted(wanted, np.array([s.row_id for s in around], np.int64))
    found[own], known[own] = values, True
    if replay is not None and not known.all():
        found[~known] = replay(wanted[~known])
        known[:] = True
    ends = np.cumsum([0, *(len(s.tokens) for s in around)])
    offsets = arrow.column(ends.astype(np.int32))
    flat = arrow.column(found[back].astype(np.float32), is_null=~known[back])
    tokens = arrow.column([token for s in around for token in s.tokens]).cast(pa.string())
    places = np.array([s.token_rows.index(s.row_id) for s in around], np.int32)
    return {
        "tokens": pa.ListArray.from_arrays(offsets, tokens),
        "values": pa.ListArray.from_arrays(offsets, flat),
        "place": arrow.column(places),
    }


def _as_count(k: int) -> int:
    try:
        count = as_integer(k)
    except TypeError:
        raise ArgumentError(f"k = {k!r}; expected an integer.") from None
    if count < 1:
        raise ArgumentError(f"k = {k}; expected the number of rows to return, at least 1.")
    return count


@dataclass(frozen=True)
class _First:
    """The first places of an answer over the covered segments."""

    ids: Ids
    values: Values
    groups: Ids
    n_listed: int
    """Rows of the list they come from."""
    complete: bool
    """Whether there are no further ones."""


class _Search:
    """One search for the best rows, on one state of the store."""

    def __init__(
        self,
        store: CoreStore,
        question: Question,
        generation: Generation | None,
        condition: Condition | None,
    ) -> None:
        self._store = store
        self._question = question
        self._generation = generation
        self._condition = condition
        self._committed: Sequence[int] = store.committed
        self._covers = generation.covers if generation else ()
        self.listed: IndexList | None = None
        """The list of the index that was looked at; it tells of more than the answer's values."""

    def answer(self) -> tuple[Ids, Values, str]:
        """Return the rows, their values, and how they were reached."""
        k, info = self._question.k, self._question.info
        first = self._first_places()
        answered = first is not None and (first.complete or len(first.ids) >= k)
        missing = sorted(set(self._committed) - set(self._covers))
        if info.keep != ALL:
            self._check_answered(first, answered, missing)
        best = Best(self._question)
        if first is not None and answered:
            best.add(first.ids, best.keys(first.values), first.groups)
            reached = "index"
            if missing:
                reached += f" + {_count(len(missing), 'segment')} scanned"
                rows = self._condition.rows(missing) if self._condition else None
                bands = bands_of(self._store, self._question, missing, None, (), rows)
                scan(self._store, self._question, bands, rows, best)
        else:
            best, reached = self._scan()
        ids, values = best.rows()
        if len(ids) < k:
            reached += f"; k = {k:,}, and there are {self._what(len(ids))}"
        n_planned = len(self._store.planned)
        if len(self._committed) < n_planned:
            so_far = "" if self._store.plan_complete else " planned so far"
            reached += f"; {len(self._committed):,} of {n_planned:,} segments{so_far} are committed"
        return ids, values, reached

    def _scan(self) -> tuple[Best, str]:
        """Return the best rows by scanning the column, as little of it as will do."""
        store, question, generation = self._store, self._question, self._generation
        rows = self._condition.rows(self._committed) if self._condition else None
        zones = None
        if generation is not None:
            zones = store.index_tables.zones(generation, question.info, question.neuron)
        bands = bands_of(store, question, self._committed, zones, self._covers, rows)
        best = Best(question, bound_of(question, bands, rows))
        n_read = scan(store, question, bands, rows, best)
        height = store.meta.chunk_rows
        counts = store.committed_rows(question.info.site.space)
        n_rows = sum(counts[s] for s in self._committed)
        n_chunks = sum(-(-counts[s] // height) for s in self._committed)
        if n_read < n_chunks:
            reached = f"pruned scan: {n_read:,} of {n_chunks:,} chunks read"
        else:
            segments = _count(len(self._committed), "segment")
            reached = f"column scan: {segments}, {_count(n_rows, 'row')}"
        if rows is not None:
            reached += f"; {_count(rows.n_rows, 'content row')} meet the condition"
        return best, reached

    def _first_places(self) -> _First | None:
        """Return the first places as far as lists of the index tell; None if they do not help."""
        question, generation = self._question, self._generation
        if generation is None:
            return None
        info, neuron, tables = question.info, question.neuron, self._store.index_tables
        all_kept = info.keep == ALL and question.group is None
        if all_kept and not tables.lists_hold(generation, info, neuron, question.k):
            return None  # the column is read anyway
        side = "top" if question.largest else "bottom"
        found = None
        # The best row of a window that meets a condition need not be the best of the window.
        if question.group is not None and question.largest and self._condition is None:
            found = tables.ranked(generation, info, neuron, "window")
        if found is None or not len(found.row_ids):
            found = tables.ranked(generation, info, neuron, side)
            if found is None:
                return None
        self.listed = found
        n_listed = len(found.row_ids)
        ids, values, documents = found.row_ids, found.values, found.documents
        if self._condition is not None:
            met = self._condition.met_by(ids)
            ids, values, documents = ids[met], values[met], documents[met]
        groups = np.empty(0, np.int64)
        if question.group is not None:
            groups = documents if question.group == "document" else self._windows_of(ids)
            _, firsts = np.unique(groups, return_index=True)
            firsts = np.sort(firsts)
            ids, values, groups = ids[firsts], values[firsts], groups[firsts]
        complete = len(ids) < question.k and (
            n_listed < found.longest or n_listed == tables.n_values(generation, info, neuron)
        )
        return _First(ids, values, groups, n_listed, complete)

    def _windows_of(self, ids: Ids) -> Ids:
        space = self._question.info.site.space
        return self._store.token_values(ids, ["window_id"], space)[0]

    def _what(self, n: int) -> str:
        """Return in words what there are n of."""
        met = " that meet the condition" if self._condition else ""
        if self._question.group is None:
            return f"{n:,} content rows with a value{met}"
        kind = next(name for name, column in GROUPS.items() if column == self._question.group)
        return f"{n:,} {kind}s with such a row{met}"

    def _check_answered(self, first: _First | None, answered: bool, missing: list[int]) -> None:
        """Raise `ArgumentError` unless the index answers alone: a scan would miss rows."""
        store, info, k = self._store, self._question.info, self._question.k
        why = (
            f"not every row of {info.site} is stored in {store.path} (keep = "
            f"{keep_text(info.keep)!r})"
        )
        if missing:
            raise ArgumentError(
                f"the index does not cover {_count(len(missing), 'segment')} yet, and they cannot "
                f"be scanned: {why}. Run `actstore finish {store.path}`, or store.finish(), first."
            )
        if self._generation is None or answered:
            return
        n = 0 if first is None else len(first.ids)
        of_what, without = "", ""
        if self._condition is not None or self._question.group is not None:
            given = [f"where = {self._condition.text!r}"] if self._condition else []
            given += ["distinct"] if self._question.group is not None else []
            of_what = f" with {' and '.join(given)}"
            n_listed = 0 if first is None else first.n_listed
            without = f", without them for k <= {n_listed}"
        ask = f"Ask for k <= {n}" if n else "Nothing can be said of the first place"
        raise ArgumentError(
            f"k = {k:,} is more than the index holds{of_what}, and the column cannot be scanned: "
            f"{why}. {ask}{without}, or capture into a new store with keep='all' (--keep all)."
        )


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}{'' if n == 1 else 's'}"
