"""The plan: which token gets which row, fixed before any model runs.

Documents are tokenised with offsets and cut into windows of at most `context` tokens; windows fill
segments of at most S rows in the order of the corpus, and inside a segment stand by length, longest
first, so that batches of neighbouring windows need little padding.  The row of every token follows
from that alone: whoever captures a segment, in whatever order, writes the same rows.

The plan is published in parts of about a million rows, each ending with a document.  A part is
a fact: after it exists its documents are not read again, and an interrupted plan goes on after
the last one.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from actstore import durable
from actstore.capturing.corpus import Corpus, Document
from actstore.errors import CorpusError, StoreMismatch
from actstore.models import Encoded, LanguageModel
from actstore.store import FIRST, SPECIAL, CoreStore, Part, Segment, StoreMeta
from actstore.store.budget import Progress
from actstore.store.tables import DOCUMENT_GROUP, DOCUMENTS, TOKENS, WINDOWS

PART_ROWS = 1 << 20
"""A part ends with the first document that brings it to this many rows, or with the corpus."""

_BATCH_CHARS = 1 << 20

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Limits:
    """How much of the corpus is wanted."""

    max_tokens: int | None = None
    """Rows in all, special tokens counted; None for no limit."""
    max_document_tokens: int | None = None
    """Rows of each document, special tokens counted; None for no limit."""


@dataclass(frozen=True)
class Window:
    """A span of a document that is fed to the model as one sequence."""

    document: int
    """Number of the document."""
    first_token: int
    """Index in the document of the first token it stores."""
    context_ids: npt.NDArray[np.int32]
    """Tokens before it that are fed but not stored."""
    token_ids: npt.NDArray[np.int32]
    """The ids it stores, special ones included."""
    columns: Mapping[str, npt.NDArray[Any]]
    """position, doc_position, char_start, char_end and flags of what it stores."""

    @property
    def rows(self) -> int:
        """Number of stored tokens."""
        return len(self.token_ids)

    @property
    def length(self) -> int:
        """Number of tokens fed to the model."""
        return len(self.token_ids) + len(self.context_ids)


def cut_windows(
    document: int,
    encoded: Encoded,
    model: LanguageModel,
    context: int,
    overlap: int,
    max_rows: int | None,
) -> Iterator[Window]:
    """Yield the windows of a document, in order; at most `max_rows` rows of it."""
    prefix = np.asarray(model.prefix_ids, dtype=np.int32)
    suffix = np.asarray(model.suffix_ids, dtype=np.int32)
    n_special = len(prefix) + len(suffix)
    special_ids = np.array(sorted(model.special_ids))
    body = context - n_special
    left = math.inf if max_rows is None else max_rows
    start = 0
    while start < len(encoded.ids):
        n_context = overlap if start else 0
        n_own = int(min(body - n_context, len(encoded.ids) - start, left - n_special))
        if n_own <= 0:
            return
        own = slice(start, start + n_own)
        ids = np.concatenate([prefix, encoded.ids[own], suffix])
        zeros_before, zeros_after = np.zeros_like(prefix), np.zeros_like(suffix)
        first_own = len(prefix) + n_context
        position = np.concatenate(
            [np.arange(len(prefix)), first_own + np.arange(n_own + len(suffix))]
        )
        flags = np.where(np.isin(ids, special_ids), SPECIAL, 0)
        flags[: len(prefix)] = SPECIAL
        flags[len(prefix) + n_own :] = SPECIAL
        flags[position == 0] |= FIRST
        yield Window(
            document,
            start,
            encoded.ids[start - n_context : start],
            ids,
            {
                "position": position.astype(np.int32),
                "doc_position": np.concatenate(
                    [zeros_before - 1, np.arange(start, start + n_own), zeros_after - 1]
                ).astype(np.int32),
                "char_start": np.concatenate([zeros_before, encoded.starts[own], zeros_after]),
                "char_end": np.concatenate([zeros_before, encoded.ends[own], zeros_after]),
                "flags": flags.astype(np.uint8),
            },
        )
        start += n_own
        left -= n_own + n_special


@dataclass(frozen=True)
class CutDocument:
    """A document and the windows it was cut into."""

    number: int
    """Its number in the store."""
    document: Document
    """The document."""
    n_encoded: int
    """Tokens of its whole text."""
    windows: list[Window]
    """Its windows, in order; none if it has no token."""


def cut_corpus(
    corpus: Corpus,
    model: LanguageModel,
    meta: StoreMeta,
    limits: Limits,
    first: int = 0,
    rows_done: int = 0,
) -> Iterator[CutDocument]:
    """Yield the documents from number `first` on, cut into windows, as far as they are wanted."""
    n_special = len(model.prefix_ids) + len(model.suffix_ids)
    documents = itertools.islice(corpus, first, None)
    for number, document, encoded in encode_documents(documents, first, model):
        left = None if limits.max_tokens is None else limits.max_tokens - rows_done
        if left is not None and left <= n_special:
            return  # no further window fits
        caps = [n for n in (left, limits.max_document_tokens) if n is not None]
        cap = min(caps) if caps else None
        windows = list(cut_windows(number, encoded, model, meta.context, meta.overlap, cap))
        yield CutDocument(number, document, len(encoded.ids), windows)
        rows_done += sum(window.rows for window in windows)


@dataclass
class _PartBuilder:
    """Gathers the documents, windows and segments of one part."""

    store: CoreStore
    part: int
    first_segment: int
    first_window: int
    documents: list[dict[str, Any]] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)
    n_windows: int = 0
    n_rows: int = 0
    _open: list[Window] = field(default_factory=list)
    _open_rows: int = 0
    _tokens: list[pa.Table] = field(default_factory=list)
    _windows: list[pa.Table] = field(default_factory=list)

    def add_document(self, cut: CutDocument) -> None:
        last_char = n_tokens = 0
        for window in cut.windows:
            self.add_window(window)
            n_tokens += int((window.columns["doc_position"] >= 0).sum())
            last_char = max(last_char, int(window.columns["char_end"].max()))
        # What was not tokenised is not part of the store's text.
        text = cut.document.text
        self.documents.append(
            {
                "document": cut.number,
                "source": cut.document.source.encode("utf-8", "replace").decode(),
                "n_tokens": n_tokens,
                "text": text if n_tokens == cut.n_encoded else text[:last_char],
                "metadata": _metadata(cut.document),
            }
        )

    def add_window(self, window: Window) -> None:
        if self._open_rows + window.rows > self.store.meta.segment_rows:
            self.close_segment()
        self._open.append(window)
        self._open_rows += window.rows
        self.n_rows += window.rows

    def close_segment(self) -> None:
        if not self._open:
            return
        number = self.first_segment + len(self.segments)
        windows = sorted(self._open, key=lambda w: -w.length)  # stable: ties in corpus order
        rows = np.array([w.rows for w in windows])
        first_rows = number * self.store.meta.segment_rows + np.cumsum(rows) - rows
        first_id = self.first_window + self.n_windows
        window_ids = np.arange(first_id, first_id + len(windows))
        documents = np.array([w.document for w in windows])
        self._tokens.append(
            pa.table(
                {
                    "row_id": first_rows[0] + np.arange(self._open_rows),
                    "document": np.repeat(documents, rows),
                    "window_id": np.repeat(window_ids, rows),
                    "token_id": np.concatenate([w.token_ids for w in windows]),
                    **{
                        name: np.concatenate([w.columns[name] for w in windows])
                        for name in windows[0].columns
                    },
                }
            )
            .select(TOKENS.names)
            .cast(TOKENS)
        )
        self._windows.append(
            pa.table(
                {
                    "space": [""] * len(windows),
                    "segment": [number] * len(windows),
                    "window_id": window_ids,
                    "document": documents,
                    "first_token": [w.first_token for w in windows],
                    "context_tokens": [len(w.context_ids) for w in windows],
                    "context_ids": [w.context_ids for w in windows],
                    "first_row": first_rows,
                    "rows": rows,
                },
                schema=WINDOWS,
            )
        )
        self.segments.append(Segment(number, self.part, {"": self._open_rows}))
        self.n_windows += len(windows)
        self._open, self._open_rows = [], 0

    def publish(self, complete: bool, corpus: Mapping[str, Any]) -> Part:
        self.close_segment()
        draft = Part(
            self.part,
            tuple(self.segments),
            len(self.documents),
            self.n_windows,
            complete,
            corpus,
            {},
        )
        tables = {
            "documents": pa.Table.from_pylist(self.documents, schema=DOCUMENTS),
            "windows": pa.concat_tables([WINDOWS.empty_table(), *self._windows]),
            "tokens": pa.concat_tables([TOKENS.empty_table(), *self._tokens]),
        }
        files = {}
        for kind, table in tables.items():
            name = draft.file(kind)
            path = self.store.path / name
            durable.make_folder(path.parent)
            group = DOCUMENT_GROUP if kind == "documents" else durable.ROW_GROUP_ROWS
            files[name] = durable.write_table(path, table, group)
        part = Part(
            self.part,
            draft.segments,
            draft.n_documents,
            draft.n_windows,
            complete,
            corpus,
            files,
        )
        self.store.publish_part(part)
        return part


def make_plan(
    store: CoreStore,
    model: LanguageModel,
    corpus: Corpus,
    limits: Limits,
    progress: Progress | None = None,
) -> None:
    """Publish what is missing of the plan; nothing, if the plan of this corpus is complete.

    Raises
    ------
    StoreMismatch
        If the store was planned from another corpus, or with other limits.
    CorpusError
        If a document cannot be tokenised.
    """
    described = {
        **corpus.describe(),
        "max_tokens": limits.max_tokens,
        "max_document_tokens": limits.max_document_tokens,
    }
    with store.plan_lock():
        store.refresh()
        _check_same_corpus(store, described)
        # A crash between a part and what follows from it left that undone.
        store.grow_arrays()
        if not store.has_vocabulary:
            store.write_vocabulary(_vocabulary(model))
        if store.plan_complete:
            return
        done = store.n_documents
        rows_done = sum(s.rows[""] for s in store.planned.values())
        builder = _next_part(store)
        for cut in cut_corpus(corpus, model, store.meta, limits, done, rows_done):
            # Published before the next document, not after the last: the end of the corpus and of
            # the part are then one.
            if builder.n_rows >= PART_ROWS:
                builder.publish(False, described)
                builder = _next_part(store)
            builder.add_document(cut)
            if progress:
                progress("plan", cut.number + 1, 0)
        builder.publish(True, described)


def _next_part(store: CoreStore) -> _PartBuilder:
    return _PartBuilder(
        store,
        len(store.parts),
        max(store.planned, default=-1) + 1,
        sum(part.n_windows for part in store.parts),
    )


def _check_same_corpus(store: CoreStore, described: Mapping[str, Any]) -> None:
    if not store.parts:
        return
    # What JSON does to tuples and keys must not look like a difference.
    new = json.loads(json.dumps(described))
    if found := _difference("", dict(store.parts[0].corpus), new):
        what, was, now = found
        raise StoreMismatch(
            f"{store.path} was planned from another corpus: {what} was {_short(was)}, now it is "
            f"{_short(now)}. Give the same corpus and limits to go on with it, or name a new store."
        )


def _difference(name: str, old: Any, new: Any) -> tuple[str, Any, Any] | None:
    """Return where two JSON values first differ, and how."""
    if isinstance(old, dict) and isinstance(new, dict):
        # A corpus of another kind differs in everything; its kind says it best.
        for key in sorted({*old, *new}, key=lambda key: (key != "kind", key)):
            found = _difference(f"{name}.{key}".lstrip("."), old.get(key), new.get(key))
            if found:
                return found
        return None
    if isinstance(old, list) and isinstance(new, list):
        for i, (a, b) in enumerate(zip(old, new, strict=False)):
            if found := _difference(f"{name}[{i}]", a, b):
                return found
        return (f"the number of {name}", len(old), len(new)) if len(old) != len(new) else None
    return (name, old, new) if old != new else None


def _metadata(document: Document) -> str:
    """Return the metadata of a document as JSON."""
    try:
        text = json.dumps(document.metadata, ensure_ascii=False, default=str)
    except (TypeError, ValueError, RecursionError) as error:
        raise CorpusError(
            f"the metadata of document {document.source!r} cannot be written as JSON: {error}. "
            "Give plain values under string keys."
        ) from None
    return text.encode("utf-8", "replace").decode()


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 120 else text[:117] + "…"


def _vocabulary(model: LanguageModel) -> pa.Table:
    token_ids, texts, pieces = model.vocabulary()
    return pa.table({"token_id": pa.array(token_ids, pa.int32()), "text": texts, "piece": pieces})


def encode_documents(
    documents: Iterator[Document], first: int, model: LanguageModel
) -> Iterator[tuple[int, Document, Encoded]]:
    """Yield numbered documents with their tokens, several tokenised at once."""
    waiting: list[Document] = []
    chars = 0

    def flush() -> Iterator[tuple[int, Document, Encoded]]:
        nonlocal waiting, chars, first
        for document in waiting:
            try:
                document.text.encode()
            except UnicodeEncodeError as error:
                raise CorpusError(
                    f"document {document.source!r} holds a lone surrogate "
                    f"(U+{ord(document.text[error.start]):04X} at character {error.start:,}), "
                    "which no text file can. Replace it: "
                    "text.encode('utf-8', 'replace').decode()."
                ) from None
        encoded = model.encode_batch([document.text for document in waiting])
        yield from zip(itertools.count(first), waiting, encoded, strict=False)
        first += len(waiting)
        waiting, chars = [], 0

    for document in documents:
        waiting.append(document)
        chars += len(document.text)
        if chars >= _BATCH_CHARS:
            yield from flush()
    if waiting:
        yield from flush()
