"""Means of all neurons of a site in groups of rows: one pass over its stored rows.

What tells the groups apart is SQL on the columns of tokens and documents.  DuckDB says which group
a row is in, a stretch of segments at a time, so memory holds one sum for each neuron and group, and
the values are read once, in float64: a block of rows times the sparse matrix that has a one where a
row is in a group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from actstore import arrow
from actstore.errors import ArgumentError, BudgetExceeded, QueryError
from actstore.query.schema import TOKENS_AND_DOCUMENTS
from actstore.store import CoreStore, SiteInfo
from actstore.store.stored_rows import ALL, NONE, keep_text

Ask = Callable[[str], pa.Table]
"""Answers SQL over the store."""

_STRETCH_ROWS = 1 << 20  # rows whose groups are asked for at once
_CELL_BYTES = 64  # a sum, a count and a row of the table
_BLOCK_BYTES = 1 << 26  # of values, as float64


class Means:
    """The mean of every neuron in each group, as a table to be computed.

    Parameters
    ----------
    store : CoreStore
        The store.
    ask : callable
        Answers SQL over the store.
    site : str
        The site.
    key : str
        SQL on the columns of tokens, and on source, n_tokens and metadata of documents.
    rows : {"content", "stored"}
        All content rows, or those that are stored.
    budget : int
        Bytes the sums may take.

    Raises
    ------
    SiteNotFound, ArgumentError
        If there is no such site, or its rows are not stored, or `rows` is neither.
    QueryError
        If `key` is not one expression on these columns, or its values cannot be told apart.
    BudgetExceeded
        If there are too many groups.
    """

    def __init__(
        self, store: CoreStore, ask: Ask, site: str, key: str, rows: str, budget: int
    ) -> None:
        self._store, self._ask, self._key = store, ask, key
        self.info = store.site(site)
        _check_stored(store, self.info, rows)
        self._where = f"WHERE space = '{self.info.site.space}' AND NOT special AND NOT first"
        check_key(ask, "key", key)
        keys = ask(f"SELECT DISTINCT ({key}\n) AS key {TOKENS_AND_DOCUMENTS} {self._where}")
        self.keys: pa.Array = keys.column("key").combine_chunks()
        """The values of the key, one a group."""
        n_bytes = len(self.keys) * self.info.width * _CELL_BYTES
        if n_bytes > budget:
            raise BudgetExceeded(
                f"means of {self.info.width:,} neurons in {len(self.keys):,} groups of key = "
                f"{key!r} take {n_bytes:,} bytes; there are {budget:,}. Give a key with fewer "
                "values, or a larger budget=."
            )
        _codes(self.keys, self.keys, key)  # refuses what it cannot tell apart
        self.schema = pa.schema(
            [
                ("key", self.keys.type),
                ("neuron", pa.int32()),
                ("n", pa.int64()),
                ("mean", pa.float64()),
            ]
        )
        """The columns of the table."""

    def table(self) -> pa.Table:
        """Return the means: one pass over the stored content rows of the site."""
        shape = (len(self.keys), self.info.width)
        sums, n_nan = np.zeros(shape), np.zeros(shape, np.int64)
        n_rows = np.zeros(shape[0], np.int64)
        for segment, offsets, codes in self._groups():
            n_rows += np.bincount(codes, minlength=shape[0])
            self._add(segment, offsets, codes, sums, n_nan)
        n = n_rows[:, None] - n_nan
        with np.errstate(invalid="ignore", divide="ignore"):
            means = np.where(n > 0, sums / n, np.nan)
        columns = [
            self.keys.take(np.repeat(np.arange(shape[0]), shape[1])),
            pa.array(np.tile(np.arange(shape[1], dtype=np.int32), shape[0])),
            pa.array(n.ravel()),
            pa.array(means.ravel(), from_pandas=True),
        ]
        return pa.table(columns, schema=self.schema)

    def _groups(self) -> Iterator[tuple[int, npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
        """Yield each segment with the offsets of its stored content rows and their groups."""
        size = self._store.meta.segment_rows
        n_segments = max(1, _STRETCH_ROWS // size)
        segments = np.array(self._store.committed, np.int64)
        for start in range(0, len(segments), n_segments):
            stretch = segments[start : start + n_segments]
            found = self._ask(
                f"SELECT row_id, ({self._key}\n) AS key {TOKENS_AND_DOCUMENTS} {self._where} "
                f"AND row_id >= {stretch[0] * size} AND row_id < {(stretch[-1] + 1) * size}"
            )
            row_ids = arrow.numbers(found.column("row_id"))
            codes = _codes(found.column("key"), self.keys, self._key)
            order = np.argsort(row_ids, kind="stable")
            row_ids, codes = row_ids[order], codes[order]
            ends = np.searchsorted(row_ids, (stretch + 1) * size)
            begin = 0
            for segment, end in zip(stretch.tolist(), ends.tolist(), strict=True):
                offsets, mine = row_ids[begin:end] - segment * size, codes[begin:end]
                begin = end
                if self.info.keep != ALL:
                    stored = np.isin(offsets, self._store.stored_offsets(self.info, segment))
                    offsets, mine = offsets[stored], mine[stored]
                if len(offsets):
                    yield segment, offsets, mine

    def _add(
        self,
        segment: int,
        offsets: npt.NDArray[np.int64],
        codes: npt.NDArray[np.int64],
        sums: npt.NDArray[np.float64],
        n_nan: npt.NDArray[np.int64],
    ) -> None:
        """Add the values of some rows of a segment to the sums of their groups."""
        # Here, since it takes a tenth of a second that other questions do not need.
        from scipy.sparse import csr_matrix

        places = self._store.positions(self.info, segment, offsets)
        step = max(1, _BLOCK_BYTES // (8 * self.info.width))
        step = -(-step // self._store.meta.chunk_rows) * self._store.meta.chunk_rows
        for start in range(0, int(places[-1]) + 1, step):
            low, high = np.searchsorted(places, [start, start + step])
            if low == high:
                continue
            first, stop = int(places[low]), int(places[high - 1]) + 1
            block = self._store.read(self.info, segment, first, stop).astype(np.float64)
            groups, which = np.unique(codes[low:high], return_inverse=True)
            cells = (which, places[low:high] - first)
            belongs = csr_matrix((np.ones(high - low), cells), shape=(len(groups), len(block)))
            part = belongs @ block
            if np.isnan(part).any():  # rare, and costs as much again
                nan = np.isnan(block)
                n_nan[groups] += (belongs @ nan).astype(np.int64)
                block[nan] = 0.0
                part = belongs @ block
            sums[groups] += part


def check_key(ask: Ask, argument: str, key: str) -> None:
    """Raise `QueryError` unless SQL is one expression on the columns of tokens and documents.

    Alone, before it stands in brackets: one that closed them would mean other than it says.
    """
    shape = ask(f"SELECT {key}\n{TOKENS_AND_DOCUMENTS} LIMIT 0")
    if shape.num_columns != 1:
        raise QueryError(
            f"{argument} = {key!r} of means is {shape.num_columns} columns; expected one "
            "expression on the columns of tokens and documents, such as 'source'."
        )


def _check_stored(store: CoreStore, info: SiteInfo, rows: str) -> None:
    if rows not in ("content", "stored"):
        raise ArgumentError(f"rows = {rows!r} of means; expected 'content' or 'stored'.")
    if info.keep == NONE:
        raise ArgumentError(
            f"no rows of {info.site} are stored in {store.path} (keep = 'none'), so there are no "
            "means by groups; `neurons` has the means over all rows, and `exemplars` the strongest "
            "rows with their documents."
        )
    if info.keep != ALL and rows == "content":
        raise ArgumentError(
            f"not every row of {info.site} is stored in {store.path} (keep = "
            f"{keep_text(info.keep)!r}), so means over all of them cannot be computed. Ask for "
            f"means('{info.site}', …, rows := 'stored'): over the rows that are stored, a uniform "
            "sample of each segment."
        )


def _codes(values: pa.ChunkedArray | pa.Array, keys: pa.Array, key: str) -> npt.NDArray[np.int64]:
    """Return the place of each value among the keys; NULL and NaN are values like others."""
    try:
        found = pc.index_in(values, value_set=keys)
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid, pa.ArrowTypeError):
        raise QueryError(
            f"key = {key!r} of means has values of the type {keys.type}, which cannot be told "
            "apart; expected text, numbers, booleans or times: CAST it, or take a field of it."
        ) from None
    return np.asarray(found, np.int64)
