"""The documents a view shows: their text cut at token offsets, and the rows behind it.

The store counts offsets in code points and JavaScript in UTF-16 units, so a character outside the
basic plane shifts everything after it by one; offsets are converted here.  Tokens of a byte-level
tokenizer may share a character: the later ones then have no characters of their own, length 0.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from actstore import arrow
from actstore.errors import ArgumentError, RowNotFound
from actstore.store import SPECIAL, CoreStore
from actstore.view.cut import cut

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ShownDocument:
    """A document as a view carries it: its tokens up to a limit, special ones left out."""

    document: int
    """Its number."""
    source: str
    """Where it came from."""
    text: str
    """Its text; where tokens were left out at the end, up to the last token that is shown; of
    tokens too long to be looked at their beginnings."""
    n_tokens: int
    """Tokens of the whole document."""
    row_ids: Ids
    """The rows of the shown tokens, in the order of the text."""
    cuts: list[int]
    """For each shown token, the UTF-16 units between the token before and it, and its own."""

    @property
    def runs(self) -> list[list[int]]:
        """The row_ids as [first, count] of consecutive ones."""
        breaks = np.flatnonzero(np.diff(self.row_ids) != 1) + 1
        return [[int(run[0]), len(run)] for run in np.split(self.row_ids, breaks) if len(run)]


def committed_windows(store: CoreStore, space: str) -> pa.Table:
    """Return document, first_row and rows of every committed window of a space, in row order."""
    pieces = []
    for part in store.parts:
        name = part.file("windows")
        store.verifier.check({name: part.files[name]})
        committed = [s.segment for s in part.segments if s.segment in store.committed]
        pieces.append(
            pq.read_table(
                store.path / name,
                columns=["document", "first_row", "rows"],
                filters=[
                    ("space", "=", space),
                    ("segment", "in", committed),
                    ("rows", ">", 0),
                ],
            )
            if committed
            else None
        )
    found = [piece for piece in pieces if piece is not None]
    if not found:
        raise ArgumentError(f"{store.path} has no committed rows to show; capture some first.")
    return pa.concat_tables(found)


def choose(
    store: CoreStore, windows: pa.Table, documents: int | Sequence[int] | None, max_documents: int
) -> list[int]:
    """Return the documents to show: the ones asked for, or some spread evenly over all.

    Raises
    ------
    ArgumentError
        If none is asked for, or `max_documents` is below 1.
    RowNotFound
        If the store has no such document.
    """
    if documents is None:
        if max_documents < 1:
            raise ArgumentError(
                f"max_documents = {max_documents} was given; expected at least 1. Use `documents` "
                "to name the ones to show."
            )
        held = np.unique(arrow.numbers(windows.column("document")))
        places = np.linspace(0, len(held) - 1, min(max_documents, len(held))).round()
        return [int(document) for document in held[places.astype(np.int64)]]
    chosen = [int(d) for d in np.unique(np.atleast_1d(np.asarray(documents, dtype=np.int64)))]
    if not chosen:
        raise ArgumentError(
            "documents = [] names none; expected a document number or several, or None for a "
            "selection of all."
        )
    for document in (chosen[0], chosen[-1]):
        if not 0 <= document < store.n_documents:
            raise RowNotFound(
                f"document = {document} is not in {store.path}; it has documents "
                f"0 … {store.n_documents - 1}."
            )
    return chosen


def read(
    store: CoreStore, document: int, windows: pa.Table, space: str, max_tokens: int
) -> ShownDocument:
    """Return a document with the committed rows of its first `max_tokens` tokens."""
    stored = store.document(document)
    mine = windows.filter(pc.equal(windows.column("document"), document))
    spans = zip(mine.column("first_row").to_pylist(), mine.column("rows").to_pylist(), strict=True)
    ids = [np.arange(first, first + rows, dtype=np.int64) for first, rows in spans]
    tokens = store.tokens_of(np.concatenate(ids) if ids else np.empty(0, np.int64), space)
    special = (arrow.numbers(tokens.column("flags")) & SPECIAL) != 0
    tokens = tokens.filter(pa.array(~special)).sort_by("doc_position").slice(0, max_tokens)
    starts = arrow.numbers(tokens.column("char_start")).astype(np.int64)
    ends = arrow.numbers(tokens.column("char_end")).astype(np.int64)
    text = str(stored["text"])
    if tokens.num_rows == max_tokens:
        text = text[: int(ends.max())]
    text, starts, ends = _short(text, starts, ends)
    return ShownDocument(
        document,
        str(stored["source"]),
        text,
        int(stored["n_tokens"]),
        arrow.numbers(tokens.column("row_id")),
        _cuts(text, starts, ends),
    )


def _short(text: str, starts: Ids, ends: Ids) -> tuple[str, Ids, Ids]:
    """Return a text with its long tokens, and the long spaces between them, cut; and its tokens.

    Text between tokens is of rows that are not committed yet, and stays.
    """
    edges = np.unique(np.clip(np.concatenate([starts, ends, [0, len(text)]]), 0, len(text)))
    first = set(starts.tolist())
    pieces = []
    for a, b in itertools.pairwise(edges.tolist()):
        piece = text[a:b]
        pieces.append(cut(piece) if a in first or piece.isspace() else piece)
    moved = np.concatenate([[0], np.cumsum([len(piece) for piece in pieces])]).astype(np.int64)
    places = [moved[np.searchsorted(edges, np.clip(of, 0, len(text)))] for of in (starts, ends)]
    return "".join(pieces), places[0], places[1]


def _cuts(text: str, starts: Ids, ends: Ids) -> list[int]:
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    units = np.concatenate([[0], np.cumsum(1 + (points > 0xFFFF))])
    ends = np.maximum.accumulate(units[np.minimum(ends, len(points))]) if len(ends) else ends
    before = np.concatenate([[0], ends[:-1]]).astype(np.int64)
    starts = np.maximum(units[np.minimum(starts, len(points))], before)
    cuts = np.stack([starts - before, np.maximum(ends - starts, 0)], axis=1)
    flat: list[int] = cuts.reshape(-1).tolist()
    return flat
