"""The tokens around a row, as strings that put together are the text, and which rows they are.

A context holds content rows only, as everything that is counted over rows does: at special tokens
and at the first token of a window activations are sinks, in whose scale all others would vanish.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from actstore import arrow
from actstore.store import FIRST, SPECIAL, CoreStore

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Context:
    """A row among the content rows of its window."""

    row_ids: Ids
    """The rows, ascending."""
    tokens: list[str]
    """Their text, each with what stands between it and the token before."""
    place: int
    """Which of them the row is."""
    document: int
    """Their document."""
    source: str
    """Where it came from."""


def contexts(
    store: CoreStore, row_ids: Ids, before: int, after: int, space: str = ""
) -> list[Context]:
    """Return committed rows among the content rows of their windows, in the order given.

    Reads the tokens of the segments and the documents that the rows lie in.

    Parameters
    ----------
    store : CoreStore
        The store.
    row_ids : ndarray of int64
        The rows.
    before, after : int
        Rows on either side, as far as the window reaches.
    space : str, default ""
        The space of the rows.

    Raises
    ------
    RowNotFound
        If a row is a hole or is not committed.
    """
    found: dict[int, Context] = {}
    for segment in np.unique(row_ids // store.meta.segment_rows).tolist():
        first = segment * store.meta.segment_rows
        mine = row_ids[row_ids // store.meta.segment_rows == segment]
        store.check_row(int(mine.max()), space)
        table = store.tokens(segment, space)
        columns = {name: arrow.numbers(table.column(name)) for name in table.column_names}
        content = (columns["flags"] & (SPECIAL | FIRST)) == 0
        for place in np.unique(mine - first).tolist():
            usable = (columns["window_id"] == columns["window_id"][place]) & content
            usable[place] = True
            rows = np.flatnonzero(usable)
            at = int(np.searchsorted(rows, place))
            start = max(0, at - before)
            rows = rows[start : at + after + 1]
            document = int(columns["document"][place])
            stored = store.document(document)
            tokens = _texts(
                str(stored["text"] or ""), columns["char_start"][rows], columns["char_end"][rows]
            )
            found[first + place] = Context(
                rows + first, tokens, at - start, document, str(stored["source"])
            )
    return [found[row_id] for row_id in row_ids.tolist()]


def _texts(text: str, starts: npt.NDArray[np.int32], ends: npt.NDArray[np.int32]) -> list[str]:
    """Return the text of each token and of what is between it and the one before.

    Of a character that several tokens share the first has it.
    """
    found = []
    done = int(starts[0])
    for end in ends.tolist():
        found.append(text[done : max(done, end)])
        done = max(done, end)
    return found
