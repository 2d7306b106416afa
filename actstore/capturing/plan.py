"""The plan: which token gets which row, fixed before any model runs.

Documents are tokenised with offsets and cut into windows of at most `context` tokens; windows fill
segments of at most S rows in the order of the corpus, and inside a segment stand by length, longest
first, so that batches of neighbouring windows need little padding.  The row of every token follows
from that alone: whoever captures a segment, in whatever order, writes the same rows.

The plan is published in parts, each ending with a document: small ones first, so that the model can
begin, then of about a million rows.  A part is a fact: after it exists its documents are not read
again, and an interrupted plan goes on after the last one.

The last part of a corpus says that it is complete.  Parts behind it belong to documents that were
added to the store later: they begin a new segment, and nothing before them changes.
"""

from __future__ import annotations

import itertools
import json
import math
import shutil
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from actstore import arrow, durable
from actstore.capturing.corpus import Corpus, Document
from actstore.capturing.parts import part_ends, part_rows
from actstore.capturing.shuffled import Shuffled
from actstore.durable import FileFacts
from actstore.errors import StoreMismatch
from actstore.models import Encoded, LanguageModel
from actstore.store import FIRST, SPECIAL, CoreStore, Part, Segment, StoreMeta
from actstore.store.budget import Progress
from actstore.store.tables import (
    DOCUMENT_GROUP,
    DOCUMENTS,
    TOKEN_GROUP,
    TOKENS,
    VOCABULARY,
    WINDOWS,
)

ORDERS = ("corpus", "shuffled")
"""Orders that documents can be planned in: as they come, or uniformly permuted."""

_BATCH_CHARS = 1 << 20
_TABLES = {
    "documents": (DOCUMENTS, DOCUMENT_GROUP),
    "windows": (WINDOWS, durable.ROW_GROUP_ROWS),
    "tokens": (TOKENS, TOKEN_GROUP),
}

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
    n_done: int = 0,
    rows_done: int = 0,
    beside: bool = False,
) -> Iterator[CutDocument]:
    """Yield the documents of a corpus, cut into windows, as far as they are wanted.

    Parameters
    ----------
    first : int
        Number in the store of the first document that is yielded.
    n_done, rows_done : int
        Documents of the corpus that are passed over, and the rows they took of the limits.
    beside : bool
        Tokenise on one core, as another thread runs the model on the others.
    """
    n_special = len(model.prefix_ids) + len(model.suffix_ids)
    documents = itertools.islice(corpus, n_done, None)
    for number, document, encoded in encode_documents(documents, first, model, beside):
        left = None if limits.max_tokens is None else limits.max_tokens - rows_done
        if left is not None and left <= n_special:
            return  # no further window fits
        caps = [n for n in (left, limits.max_document_tokens) if n is not None]
        cap = min(caps) if caps else None
        windows = list(cut_windows(number, encoded, model, meta.context, meta.overlap, cap))
        yield CutDocument(number, document, len(encoded.ids), windows)
        rows_done += sum(window.rows for window in windows)


class _TableFile:
    """A Parquet file of a part, written as whole row groups come together."""

    def __init__(self, path: Path, schema: pa.Schema, group_rows: int) -> None:
        durable.make_folder(path.parent)
        self._writer = durable.TableWriter(path, schema, group_rows)
        self._group_rows = group_rows
        self._waiting = [arrow.empty(schema)]
        self._n_waiting = self._n_written = 0

    def add(self, table: pa.Table) -> None:
        self._waiting.append(table)
        self._n_waiting += table.num_rows
        if whole := self._n_waiting // self._group_rows * self._group_rows:
            self._write(whole)

    def finish(self) -> FileFacts:
        if self._n_waiting or not self._n_written:
            self._write(self._n_waiting)
        return self._writer.finish()

    def abandon(self) -> None:
        self._writer.abandon()

    def _write(self, n_rows: int) -> None:
        table = pa.concat_tables(self._waiting)
        self._writer.write(table.slice(0, n_rows))
        self._waiting = [table.slice(n_rows)]
        self._n_waiting -= n_rows
        self._n_written += n_rows


@dataclass
class _PartBuilder:
    """Gathers the documents, windows and segments of one part.

    Texts and tokens go to their files as they come: memory is that of a segment, a row group and
    the windows' places.
    """

    store: CoreStore
    part: int
    first_segment: int
    first_window: int
    wanted_rows: int
    n_documents: int = 0
    segments: list[Segment] = field(default_factory=list)
    n_windows: int = 0
    n_rows: int = 0
    _open: list[Window] = field(default_factory=list)
    _open_rows: int = 0
    _files: dict[str, _TableFile] = field(default_factory=dict)
    _windows: list[pa.Table] = field(default_factory=list)

    def ends_before(self, cut: CutDocument) -> bool:
        """Return whether the part ends before a document."""
        n_segments = len(self.segments) + 1
        return part_ends(
            *(self.store.meta.segment_rows, self.wanted_rows, self.n_rows, self.n_documents),
            *(n_segments, self._open_rows),
            (window.rows for window in cut.windows),
        )

    def add_document(self, cut: CutDocument) -> None:
        last_char = n_tokens = 0
        for window in cut.windows:
            self.add_window(window)
            n_tokens += int((window.columns["doc_position"] >= 0).sum())
            last_char = max(last_char, int(window.columns["char_end"].max()))
        # What was not tokenised is not part of the store's text.
        text = cut.document.text
        row = {
            "document": np.array([cut.number]),
            "source": [cut.document.plain_source()],
            "n_tokens": np.array([n_tokens]),
            "text": [text if n_tokens == cut.n_encoded else text[:last_char]],
            "metadata": [cut.document.metadata_json()],
        }
        self._file("documents").add(arrow.table(row, DOCUMENTS))
        self.n_documents += 1

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
        self._file("tokens").add(
            arrow.table(
                {
                    "row_id": first_rows[0] + np.arange(self._open_rows),
                    "document": np.repeat(documents, rows),
                    "window_id": np.repeat(window_ids, rows),
                    "token_id": np.concatenate([w.token_ids for w in windows]),
                    **{
                        name: np.concatenate([w.columns[name] for w in windows])
                        for name in windows[0].columns
                    },
                },
                TOKENS,
            )
        )
        self._windows.append(
            arrow.table(
                {
                    "space": [""] * len(windows),
                    "segment": np.full(len(windows), number),
                    "window_id": window_ids,
                    "document": documents,
                    "first_token": np.array([w.first_token for w in windows]),
                    "context_tokens": np.array([len(w.context_ids) for w in windows]),
                    "context_ids": arrow.lists([w.context_ids for w in windows]),
                    "first_row": first_rows,
                    "rows": rows,
                },
                WINDOWS,
            )
        )
        self.segments.append(Segment(number, self.part, {"": self._open_rows}))
        self.n_windows += len(windows)
        self._open, self._open_rows = [], 0

    def publish(self, complete: bool, corpus: Mapping[str, Any]) -> None:
        self.close_segment()
        self._file("windows").add(pa.concat_tables([arrow.empty(WINDOWS), *self._windows]))
        # All of them are there, if only without a row.
        files = {self._name(kind): self._file(kind).finish() for kind in _TABLES}
        self.store.publish_part(self._part(complete, corpus, files))

    def abandon(self) -> None:
        """Leave nothing behind, if the part was not published."""
        for file in self._files.values():
            file.abandon()

    def _part(
        self, complete: bool, corpus: Mapping[str, Any], files: Mapping[str, FileFacts]
    ) -> Part:
        segments = tuple(self.segments)
        return Part(self.part, segments, self.n_documents, self.n_windows, complete, corpus, files)

    def _name(self, kind: str) -> str:
        return self._part(False, {}, {}).file(kind)

    def _file(self, kind: str) -> _TableFile:
        if kind not in self._files:
            path = self.store.path / self._name(kind)
            self._files[kind] = _TableFile(path, *_TABLES[kind])
        return self._files[kind]


def make_plan(
    store: CoreStore,
    model: LanguageModel,
    corpus: Corpus,
    limits: Limits,
    progress: Progress | None = None,
) -> None:
    """Publish what is missing of the plan; see `plan_parts`."""
    for _ in plan_parts(store, model, corpus, limits, progress):
        pass


def plan_parts(
    store: CoreStore,
    model: LanguageModel,
    corpus: Corpus,
    limits: Limits,
    progress: Progress | None = None,
    *,
    order: str = "corpus",
    add: bool = False,
    beside: bool = False,
) -> Generator[int, None, None]:
    """Publish what is missing of the plan part by part; nothing if this corpus is all planned.

    Holds the right to plan from the first step until it is through or closed; memory is that of
    one part.

    Parameters
    ----------
    progress : callable, optional
        Told the documents planned.
    order : {"corpus", "shuffled"}
        The order that documents are planned in; see `Shuffled`.
    add : bool
        Whether a corpus that the store does not have is added to those that are planned to their
        end.
    beside : bool
        Tokenise on one core, as another thread runs the model on the others.

    Returns
    -------
    iterator of int
        The number of parts there are: when planning can begin, arrays and vocabulary being there,
        and after each part.

    Raises
    ------
    StoreMismatch
        At once, if the store was planned from another corpus, or with other limits.
    CorpusError
        From the iterator, if a document cannot be read or tokenised.
    """
    if order == "shuffled":
        corpus = Shuffled(corpus, store.path / "work" / "shuffled")
    described = {
        **corpus.describe(),
        "max_tokens": limits.max_tokens,
        "max_document_tokens": limits.max_document_tokens,
    }
    # What JSON does to tuples and keys must not look like a difference.
    described = json.loads(json.dumps(described))
    _unfinished(store, described, add)
    return _publish_parts(store, model, corpus, limits, progress, described, add, beside)


def _publish_parts(
    store: CoreStore,
    model: LanguageModel,
    corpus: Corpus,
    limits: Limits,
    progress: Progress | None,
    described: Mapping[str, Any],
    add: bool,
    beside: bool,
) -> Generator[int, None, None]:
    with store.plan_lock():
        store.refresh()
        done = _unfinished(store, described, add)
        # A crash between a part and what follows from it left that undone.
        store.grow_arrays()
        if not store.has_vocabulary:
            store.write_vocabulary(_vocabulary(model))
        yield len(store.parts)
        if done is not None:
            n_done = sum(part.n_documents for part in done)
            rows_done = sum(s.rows[""] for part in done for s in part.segments)
            n_parts = len(done)
            builder = _next_part(store, n_parts)
            cuts = cut_corpus(
                corpus, model, store.meta, limits, store.n_documents, n_done, rows_done, beside
            )
            try:
                for cut in cuts:
                    # Published before the next document, not after the last: the end of the corpus
                    # and of the part are then one.
                    if builder.ends_before(cut):
                        builder.publish(False, described)
                        yield len(store.parts)
                        n_parts += 1
                        builder = _next_part(store, n_parts)
                    builder.add_document(cut)
                    if progress:
                        progress("plan", cut.number + 1, 0)
                builder.publish(True, described)
            finally:
                builder.abandon()
            if progress:
                progress("plan", store.n_documents, store.n_documents)
            yield len(store.parts)
        if isinstance(corpus, Shuffled):
            shutil.rmtree(corpus.folder, ignore_errors=True)


def _next_part(store: CoreStore, n_before: int) -> _PartBuilder:
    """Return the builder of the next part, given how many parts of the same corpus there are."""
    return _PartBuilder(
        store,
        len(store.parts),
        max(store.planned, default=-1) + 1,
        sum(part.n_windows for part in store.parts),
        part_rows(n_before),
    )


def additions(parts: Sequence[Part]) -> list[list[Part]]:
    """Return the parts of each corpus of a store: the one it was made from, and those added."""
    found: list[list[Part]] = []
    for part in parts:
        if not found or found[-1][-1].complete:
            found.append([])
        found[-1].append(part)
    return found


def _unfinished(store: CoreStore, described: Mapping[str, Any], add: bool) -> list[Part] | None:
    """Return the parts there are of a corpus that is not all planned; None if it is.

    Raises
    ------
    StoreMismatch
        If the corpus is not the store's and cannot be added to it.
    """
    there = additions(store.parts)
    for parts in there:
        if parts[0].corpus == described:
            return None if parts[-1].complete else parts
    if not there:
        return []
    complete = there[-1][-1].complete
    if add and complete:
        return []
    found = _difference("", dict(there[-1][0].corpus), described)
    assert found is not None
    what, was, now = found
    remedy = (
        "Give the same corpus and limits to go on with it, add=True (--add) to add these documents "
        "to it, or name a new store."
        if complete
        else "It is not planned to its end: give the same corpus and limits to go on with it, and "
        "add others then with add=True (--add); or name a new store."
    )
    raise StoreMismatch(
        f"{store.path} was planned from another corpus: {what} was {_short(was)}, now it is "
        f"{_short(now)}. {remedy}"
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


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 120 else text[:117] + "…"


def _vocabulary(model: LanguageModel) -> pa.Table:
    token_ids, texts, pieces = model.vocabulary()
    columns = {"token_id": np.asarray(token_ids), "text": texts, "piece": pieces}
    return arrow.table(columns, VOCABULARY)


def encode_documents(
    documents: Iterator[Document], first: int, model: LanguageModel, beside: bool = False
) -> Iterator[tuple[int, Document, Encoded]]:
    """Yield documents with their tokens, numbered from `first`.

    Several are tokenised at once on all cores; with `beside` one after the other, on one.
    """
    waiting: list[Document] = []
    chars = 0

    def flush() -> Iterator[tuple[int, Document, Encoded]]:
        nonlocal waiting, chars, first
        for document in waiting:
            document.check()
        texts = [document.text for document in waiting]
        encoded = map(model.encode, texts) if beside else model.encode_batch(texts)
        yield from zip(itertools.count(first), waiting, encoded, strict=False)
        first += len(waiting)
        waiting, chars = [], 0

    for document in documents:
        waiting.append(document)
        chars += len(document.text)
        if beside or chars >= _BATCH_CHARS:
            yield from flush()
    if waiting:
        yield from flush()
