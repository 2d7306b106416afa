"""Conditions on rows, in SQL: which content rows of a store meet one.

A condition is what stands behind WHERE, over the columns of `tokens` and over `source`, `n_tokens`
and `metadata` of `documents`.  It goes through the gate of `Database.sql` like any other query, and
is asked of a range of rows at a time, so that memory is bounded however many meet it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from actstore import arrow
from actstore.errors import ArgumentError, QueryError
from actstore.query.database import Database
from actstore.query.gate import admit
from actstore.query.schema import DOCUMENT_COLUMNS, TOKENS_AND_DOCUMENTS, VIEWS
from actstore.store import CoreStore, Rows

Ids = npt.NDArray[np.int64]

_ROWS_AT_ONCE = 1 << 23


class Condition:
    """An SQL condition on content rows.

    Parameters
    ----------
    database : Database
        The database over `store`.
    store : CoreStore
        The store.
    text : str
        The condition, such as ``"position < 12 AND source LIKE '%Lincoln%'"``.
    space : str, default ""
        The space of the rows.
    name : str, default "where"
        Name of the argument, for messages.

    Raises
    ------
    QueryError
        If it is not one SQL condition, names a column that is not there, or would do more than
        read the store.
    """

    def __init__(
        self, database: Database, store: CoreStore, text: str, space: str = "", name: str = "where"
    ) -> None:
        if not isinstance(text, str) or not text.strip():
            raise ArgumentError(f"{name} = {text!r} is not an SQL condition. {_expected()}")
        self.text = text
        self._database = database
        self._store = store
        self._space = space.replace("'", "''")
        try:
            # Alone first: a condition that closes our bracket would choose other rows than it says.
            admit(f"SELECT row_id {TOKENS_AND_DOCUMENTS} WHERE {text}\nLIMIT 0")
            self._ids("false")
        except QueryError as error:
            reason = str(error).split("\n\nLINE")[0]
            raise QueryError(
                f"{name} = {text!r} is not a condition on rows: {reason} {_expected()}"
            ) from None

    def _ids(self, within: str) -> Ids:
        query = (
            f"SELECT row_id {TOKENS_AND_DOCUMENTS} WHERE {within} "
            f"AND tokens.space = '{self._space}' "
            f"AND NOT special AND NOT first AND ({self.text}\n)"
        )
        ids: Ids = arrow.numbers(self._database.sql(query).to_arrow().column("row_id"))
        return ids

    def met_by(self, row_ids: Ids) -> npt.NDArray[np.bool_]:
        """Return which of a few rows meet it; reads the row groups they lie in."""
        if not len(row_ids):
            return np.empty(0, np.bool_)
        among = ", ".join(map(str, row_ids.tolist()))
        return np.isin(row_ids, self._ids(f"row_id IN ({among})"))

    def rows(self, segments: Sequence[int] | None = None) -> Rows:
        """Return the content rows that meet it, of all committed segments or of some.

        One pass over the columns of the token index that it names; memory one bit a row, and eight
        bytes for each of the rows that are looked at together.
        """
        size = self._store.meta.segment_rows
        segments = sorted(self._store.committed if segments is None else segments)
        at_once = max(1, _ROWS_AT_ONCE // size)

        def masks() -> Iterator[tuple[int, npt.NDArray[np.bool_]]]:
            for start in range(0, len(segments), at_once):
                some = segments[start : start + at_once]
                low, stop = some[0] * size, (some[-1] + 1) * size
                ids = np.sort(self._ids(f"row_id >= {low} AND row_id < {stop}"))
                for segment in some:
                    first, last = np.searchsorted(ids, [segment * size, (segment + 1) * size])
                    mask = np.zeros(size, np.bool_)
                    mask[ids[first:last] - segment * size] = True
                    yield segment, mask

        return Rows.from_masks(self.text, size, masks())


def _expected() -> str:
    columns = ", ".join([*(column.name for column in VIEWS["tokens"].columns), *DOCUMENT_COLUMNS])
    return (
        f"Expected what stands behind WHERE, over the columns {columns}: "
        "\"position < 12 AND source LIKE '%Lincoln%'\"."
    )
