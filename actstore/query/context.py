"""Rows with the text around them, read from the source text, not put together from tokens.

Looking twenty rows up among a hundred million by a join costs a hundred times as much as reading
the row groups that hold them, so this goes through the store's token and document tables, one
segment after the other.  Neighbours are the tokens next to a row in its document: those of its own
window first, then those of the windows before and after it, as far as they are committed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from actstore.errors import ArgumentError
from actstore.store import SPECIAL, CoreStore
from actstore.store.rows import as_row_ids


@dataclass(frozen=True)
class Snippet:
    """A row and the text around it."""

    row_id: int
    """The row."""
    document: int
    """Its document."""
    source: str
    """Where the document came from."""
    position: int
    """Position of the row in its window."""
    before: str
    """Text of the tokens before it."""
    token: str
    """Its own text as it stands in the document; the name of a token that does not stand there."""
    after: str
    """Text of the tokens after it."""

    def __str__(self) -> str:
        return f"{self.before}{self.token}{self.after}"


def snippets(
    store: CoreStore, row_ids: npt.ArrayLike, before: int = 8, after: int = 8, space: str = ""
) -> list[Snippet]:
    """Return rows with the text around them, in the order given.

    Reads the tokens of the segments and the documents that the rows lie in, each once.

    Parameters
    ----------
    store : CoreStore
        The store.
    row_ids : array_like of int
        Committed rows.
    before, after : int, default 8
        Tokens of context on either side; special tokens do not count.
    space : str, default ""
        The space of the rows.

    Raises
    ------
    RowNotFound
        If a row is a hole or is not committed.
    ArgumentError
        If `before` or `after` is negative.
    """
    if before < 0 or after < 0:
        raise ArgumentError(
            f"before = {before}, after = {after} of a snippet; expected numbers of tokens from 0."
        )
    ids = as_row_ids(row_ids)
    reader = _Reader(store, space)
    found: list[Snippet | None] = [None] * len(ids)
    for place in np.argsort(ids, kind="stable"):
        found[place] = reader.snippet(int(ids[place]), before, after)
    return [snippet for snippet in found if snippet is not None]


@dataclass
class _Span:
    """Tokens in row order, as arrays."""

    document: npt.NDArray[np.int64]
    window_id: npt.NDArray[np.int64]
    position: npt.NDArray[np.int32]
    doc_position: npt.NDArray[np.int32]
    token_id: npt.NDArray[np.int32]
    char_start: npt.NDArray[np.int32]
    char_end: npt.NDArray[np.int32]
    flags: npt.NDArray[np.uint8]

    @classmethod
    def of(cls, table: pa.Table) -> _Span:
        return cls(**{name: table.column(name).to_numpy() for name in cls.__dataclass_fields__})


@dataclass
class _Reader:
    """Makes snippets, keeping the last segment and document it read; quick for ascending rows."""

    store: CoreStore
    space: str
    _segment: tuple[int, _Span] | None = None
    _document: dict[str, Any] = field(default_factory=lambda: {"document": None})
    _windows: dict[int, list[tuple[int, int]]] = field(default_factory=dict)

    def snippet(self, row_id: int, before: int, after: int) -> Snippet:
        self.store.check_row(row_id, self.space)
        segment, place = divmod(row_id, self.store.meta.segment_rows)
        span = self._tokens(segment)
        document = int(span.document[place])
        row = self._text_of(document)
        text = str(row["text"] or "")
        start, end = int(span.char_start[place]), int(span.char_end[place])
        left = self._neighbours(segment, place, before, -1)
        right = self._neighbours(segment, place, after, 1)
        if end > start:
            token = text[start:end]
        else:  # not in the text: it stands between its neighbours
            token = self._vocabulary_text(int(span.token_id[place]))
            start = left[0][1] if left else right[0][0] if right else 0
            end = right[0][0] if right else start
        return Snippet(
            row_id,
            document,
            str(row["source"]),
            int(span.position[place]),
            text[left[-1][0] : start] if left else "",
            token,
            text[end : right[-1][1]] if right else "",
        )

    def _tokens(self, segment: int) -> _Span:
        if self._segment is None or self._segment[0] != segment:
            self._segment = segment, _Span.of(self.store.tokens(segment, self.space))
        return self._segment[1]

    def _text_of(self, document: int) -> dict[str, Any]:
        if self._document["document"] != document:
            self._document = self.store.document(document)
        return self._document

    def _vocabulary_text(self, token_id: int) -> str:
        vocabulary = self.store.vocabulary
        found = pc.index(vocabulary.column("token_id"), token_id).as_py()
        return "" if found < 0 else str(vocabulary.column("text")[found].as_py())

    def _neighbours(self, segment: int, place: int, n: int, step: int) -> list[tuple[int, int]]:
        """Return the places in the text of the `n` next tokens in a direction, nearest first."""
        span = self._tokens(segment)
        found = _walk(span, place + step, n, step, int(span.window_id[place]))
        if len(found) == n:
            return found
        at = int(span.doc_position[place])
        if at >= 0:  # the ends of the document are known without looking further
            left = at if step < 0 else int(self._document["n_tokens"]) - at - 1
            if len(found) >= left:
                return found
        for first_row, n_rows in self._windows_beyond(segment, place, step):
            other = first_row // self.store.meta.segment_rows
            if other not in self.store.committed:
                break
            part = self.store.parts[self.store.planned[other].part]
            table = self.store.tokens_tables.span(part, first_row, first_row + n_rows, self.space)
            tokens = _Span.of(table)
            start = len(table) - 1 if step < 0 else 0
            found += _walk(tokens, start, n - len(found), step, int(tokens.window_id[0]))
            if len(found) == n:
                break
        return found

    def _windows_beyond(self, segment: int, place: int, step: int) -> Iterator[tuple[int, int]]:
        """Yield first row and rows of the document's windows in a direction, nearest first."""
        document = int(self._tokens(segment).document[place])
        if document not in self._windows:
            part = self.store.parts[self.store.planned[segment].part]
            name = part.file("windows")
            self.store.verifier.check({name: part.files[name]})
            table = pq.read_table(
                self.store.path / name,
                columns=["first_token", "first_row", "rows"],
                filters=[("document", "=", document), ("space", "=", self.space)],
            ).sort_by("first_token")
            self._windows[document] = list(
                zip(table["first_row"].to_pylist(), table["rows"].to_pylist(), strict=True)
            )
        windows = self._windows[document]
        row_id = segment * self.store.meta.segment_rows + place
        own = next(i for i, (row, n) in enumerate(windows) if row <= row_id < row + n)
        yield from windows[own + 1 :] if step > 0 else windows[:own][::-1]


def _walk(span: _Span, place: int, n: int, step: int, window_id: int) -> list[tuple[int, int]]:
    """Return where the next `n` tokens of a window lie in the text, special ones left out."""
    found: list[tuple[int, int]] = []
    while (
        len(found) < n and 0 <= place < len(span.window_id) and (span.window_id[place] == window_id)
    ):
        if not span.flags[place] & SPECIAL:
            found.append((int(span.char_start[place]), int(span.char_end[place])))
        place += step
    return found
