"""Rows with the text around them, read from the source text, not put together from tokens.

Looking twenty rows up among a hundred million by a join costs a hundred times as much as reading
the row groups that hold them, so this goes through the store's token and document tables, one
segment after the other.  Neighbours are the tokens next to a row in its document: those of its own
window first, then those of the windows before and after it, as far as they are committed.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from actstore import arrow, durable
from actstore.errors import ArgumentError
from actstore.store import SPECIAL, CoreStore, SiteInfo
from actstore.store.rows import as_row_ids
from actstore.store.stored_rows import ALL, NONE

_SPECIAL_TOKENS = 4  # that may stand around a row before its neighbours are looked for further


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
    tokens: tuple[str, ...]
    """The tokens of all three one by one, each with the text between the one before and itself;
    one that shares its characters with the token before has none of its own."""
    token_rows: tuple[int, ...]
    """The rows of these tokens."""

    def __str__(self) -> str:
        return f"{self.before}{self.token}{self.after}"


def snippets(
    store: CoreStore, row_ids: npt.ArrayLike, before: int = 8, after: int = 8, space: str = ""
) -> list[Snippet]:
    """Return rows with the text around them, in the order given.

    Reads the row groups of tokens and documents that the rows lie in, each once.

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


def values_at(
    store: CoreStore, info: SiteInfo, neuron: int, row_ids: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
    """Return a neuron at some committed rows, and at which of them it is stored.

    Reads the chunks of one column that the rows lie in.
    """
    values = np.full(len(row_ids), np.nan, np.float32)
    stored = np.zeros(len(row_ids), np.bool_)
    if info.keep == NONE:
        return values, stored
    height = store.layout(info).chunk_rows
    segments, offsets = np.divmod(row_ids, store.meta.segment_rows)
    for segment in np.unique(segments).tolist():
        mine = np.flatnonzero(segments == segment)
        places = offsets[mine]
        if info.keep != ALL:
            kept = store.stored_offsets(info, segment)
            mine = mine[np.isin(places, kept)]
            places = store.positions(info, segment, offsets[mine])
        if len(mine):
            bands, which = np.unique(places // height, return_inverse=True)
            found = store.read_column_of_bands(info, segment, neuron, bands.tolist())
            values[mine] = found[which, places % height].astype(np.float32)
            stored[mine] = True
    return values, stored


class _Place(NamedTuple):
    """A token: where it lies in the text, and its row."""

    start: int
    end: int
    row_id: int


@dataclass
class _Span:
    """Neighbouring tokens of one segment in row order, as arrays."""

    row_id: npt.NDArray[np.int64]
    document: npt.NDArray[np.int64]
    window_id: npt.NDArray[np.int64]
    position: npt.NDArray[np.int32]
    doc_position: npt.NDArray[np.int32]
    char_start: npt.NDArray[np.int32]
    char_end: npt.NDArray[np.int32]
    flags: npt.NDArray[np.uint8]

    @classmethod
    def read(cls, store: CoreStore, segment: int, start: int, stop: int, space: str) -> _Span:
        """Read the tokens at offsets ``start … stop`` of a segment."""
        first = segment * store.meta.segment_rows
        return cls(
            np.arange(first + start, first + stop),
            *store.token_columns(segment, list(cls.__dataclass_fields__)[1:], space, start, stop),
        )


@dataclass
class _Reader:
    """Makes snippets, keeping the last document it read; quick for ascending rows."""

    store: CoreStore
    space: str
    _document: dict[str, Any] = field(default_factory=lambda: {"document": None})
    _windows: dict[int, list[tuple[int, int]]] = field(default_factory=dict)

    def snippet(self, row_id: int, before: int, after: int) -> Snippet:
        self.store.check_row(row_id, self.space)
        span = self._tokens(row_id, before, after)
        place = row_id - int(span.row_id[0])  # a segment has no hole but at its end
        document = int(span.document[place])
        row = self._text_of(document)
        text = str(row["text"] or "")
        start, end = int(span.char_start[place]), int(span.char_end[place])
        left = self._neighbours(span, place, before, -1)
        right = self._neighbours(span, place, after, 1)
        if end > start:
            token = text[start:end]
        else:  # not in the text: it stands between its neighbours
            token = self._type_text(row_id)
            start = left[0].end if left else right[0].start if right else 0
            end = right[0].start if right else start
        first = left[-1].start if left else start
        cuts = _cuts(first, start, left[::-1])
        later = _cuts(end, right[-1].end if right else end, right)
        tokens = [text[a:b] for a, b in itertools.pairwise(cuts)]
        tokens.append(text[cuts[-1] : start] + token)
        tokens += [text[a:b] for a, b in itertools.pairwise(later)]
        return Snippet(
            row_id,
            document,
            str(row["source"]),
            int(span.position[place]),
            text[first:start],
            token,
            text[end : right[-1].end] if right else "",
            tuple(tokens),
            (*(p.row_id for p in left[::-1]), row_id, *(p.row_id for p in right)),
        )

    def _tokens(self, row_id: int, before: int, after: int) -> _Span:
        """Return the tokens of a row and around it in its segment, as far as neighbours lie."""
        segment, offset = divmod(row_id, self.store.meta.segment_rows)
        n_rows = self.store.planned[segment].rows[self.space]
        beyond = _SPECIAL_TOKENS
        while True:
            low, high = offset - before - beyond, offset + 1 + after + beyond
            span = self._span(segment, max(0, low), min(n_rows, high))
            n_special = int(np.count_nonzero(span.flags & SPECIAL))
            if n_special <= beyond or len(span.row_id) == n_rows:
                return span
            beyond = 2 * n_special

    def _span(self, segment: int, start: int, stop: int) -> _Span:
        return _Span.read(self.store, segment, start, stop, self.space)

    def _text_of(self, document: int) -> dict[str, Any]:
        if self._document["document"] != document:
            self._document = self.store.document(document)
        return self._document

    def _type_text(self, row_id: int) -> str:
        """Return the text of a row's token type."""
        segment, offset = divmod(row_id, self.store.meta.segment_rows)
        (ids,) = self.store.token_columns(segment, ["token_id"], self.space, offset, offset + 1)
        return self.store.texts_of(ids)[0].as_py() or ""

    def _neighbours(self, span: _Span, place: int, n: int, step: int) -> list[_Place]:
        """Return the `n` next tokens in a direction, nearest first."""
        found = _walk(span, place + step, n, step, int(span.window_id[place]))
        if len(found) == n:
            return found
        at = int(span.doc_position[place])
        if at >= 0:  # the ends of the document are known without looking further
            left = at if step < 0 else int(self._document["n_tokens"]) - at - 1
            if len(found) >= left:
                return found
        row_id, document = int(span.row_id[place]), int(span.document[place])
        for first_row, n_rows in self._windows_beyond(row_id, document, step):
            other, offset = divmod(first_row, self.store.meta.segment_rows)
            if other not in self.store.committed:
                break
            tokens = self._span(other, offset, offset + n_rows)
            start = n_rows - 1 if step < 0 else 0
            found += _walk(tokens, start, n - len(found), step, int(tokens.window_id[0]))
            if len(found) == n:
                break
        return found

    def _windows_beyond(self, row_id: int, document: int, step: int) -> Iterator[tuple[int, int]]:
        """Yield first row and rows of the document's windows in a direction, nearest first."""
        if document not in self._windows:
            segment = row_id // self.store.meta.segment_rows
            part = self.store.parts[self.store.planned[segment].part]
            name = part.file("windows")
            self.store.verifier.check({name: part.files[name]})
            facts = ["first_token", "first_row", "rows"]
            table = durable.read_table(
                self.store.path / name,
                ["document", "space", *facts],
                where=("document", document),
            )
            first_tokens, first_rows, rows = (arrow.numbers(table[fact]) for fact in facts)
            mine = np.flatnonzero(arrow.names(table["space"]) == self.space)
            mine = mine[np.argsort(first_tokens[mine])]
            self._windows[document] = list(
                zip(first_rows[mine].tolist(), rows[mine].tolist(), strict=True)
            )
        windows = self._windows[document]
        own = next(i for i, (row, n) in enumerate(windows) if row <= row_id < row + n)
        yield from windows[own + 1 :] if step > 0 else windows[:own][::-1]


def _walk(span: _Span, place: int, n: int, step: int, window_id: int) -> list[_Place]:
    """Return the next `n` tokens of a window, special ones left out."""
    found: list[_Place] = []
    while (
        len(found) < n and 0 <= place < len(span.window_id) and (span.window_id[place] == window_id)
    ):
        if not span.flags[place] & SPECIAL:
            columns = (span.char_start, span.char_end, span.row_id)
            found.append(_Place(*(int(column[place]) for column in columns)))
        place += step
    return found


def _cuts(start: int, end: int, places: Sequence[_Place]) -> list[int]:
    """Return where a stretch of a text is cut: at its start, and where each of its tokens ends."""
    cuts = [start]
    for place in places:
        # Pieces of one character share it: the first of them has it.
        cuts.append(min(max(place.end, cuts[-1]), end))
    return cuts
