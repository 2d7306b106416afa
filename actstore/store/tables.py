"""The Parquet tables of a plan: their columns, and reading a few rows of them by row group.

`TokenTables` and `DocumentTables` answer by reading only the row groups that hold what is asked
for: looking twenty rows up in a hundred million by a join costs a hundred times as much.
"""

from __future__ import annotations

import bisect
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from actstore import arrow
from actstore.durable import Verifier
from actstore.errors import RowNotFound
from actstore.store.rows import stretches

if TYPE_CHECKING:
    from actstore.store.meta import Part

TOKENS = pa.schema(
    [
        ("row_id", pa.int64()),
        ("document", pa.int64()),
        ("window_id", pa.int64()),
        ("position", pa.int32()),
        ("doc_position", pa.int32()),
        ("token_id", pa.int32()),
        ("char_start", pa.int32()),
        ("char_end", pa.int32()),
        ("flags", pa.uint8()),
    ]
)
"""A row of the token index; ``doc_position`` is -1 for special tokens."""

WINDOWS = pa.schema(
    [
        ("space", pa.string()),
        ("segment", pa.int32()),
        ("window_id", pa.int64()),
        ("document", pa.int64()),
        ("first_token", pa.int32()),
        ("context_tokens", pa.int32()),
        ("context_ids", pa.list_(pa.int32())),
        ("first_row", pa.int64()),
        ("rows", pa.int32()),
    ]
)
"""A window: its stored rows are ``first_row … first_row + rows``; the context before them is not
stored, so its token ids stand here."""

DOCUMENTS = pa.schema(
    [
        ("document", pa.int64()),
        ("source", pa.string()),
        ("n_tokens", pa.int64()),
        ("text", pa.large_string()),
        ("metadata", pa.string()),
    ]
)
"""A document: its text as far as it was tokenised, and its metadata as a JSON object."""

VOCABULARY = pa.schema([("token_id", pa.int32()), ("text", pa.string()), ("piece", pa.string())])
"""A token type: its text with real whitespace, and the tokenizer's own spelling of it."""

DOCUMENT_GROUP = 16
"""Documents in a row group, so that reading one text does not read all of them."""

TOKEN_GROUP = 1 << 14
"""Tokens in a row group: of rows that lie far apart each costs the reading of a group."""

_CACHED_GROUPS = 16
_CACHED_COLUMN_BYTES = 1 << 27
_CACHED_SOURCES = 4096  # groups of documents


class _GroupReader:
    """Reads row groups of the parts' files of one kind, verified on first use, lately used kept."""

    def __init__(self, verifier: Verifier, root: str, kind: str) -> None:
        self._verifier = verifier
        self._root = root
        self._kind = kind
        self._files: dict[str, pq.ParquetFile] = {}
        self._groups: OrderedDict[tuple[str, int], pa.Table] = OrderedDict()
        self._lock = threading.Lock()  # scans read ahead in a thread of their own

    def file(self, part: Part, space: str = "") -> pq.ParquetFile:
        name = part.file(self._kind, space)
        with self._lock:
            if name not in self._files:
                self._verifier.check({name: part.files[name]})
                self._files[name] = pq.ParquetFile(f"{self._root}/{name}")
            return self._files[name]

    def group(self, part: Part, number: int, space: str = "") -> pa.Table:
        file = self.file(part, space)
        key = (part.file(self._kind, space), number)
        with self._lock:
            if key not in self._groups:
                self._groups[key] = file.read_row_group(number, use_threads=False)
                if len(self._groups) > _CACHED_GROUPS:
                    self._groups.popitem(last=False)
            self._groups.move_to_end(key)
            return self._groups[key]

    def forget(self) -> None:
        """Let the row groups go that were kept for what is asked next."""
        with self._lock:
            self._groups.clear()


class TokenTables(_GroupReader):
    """The token index of a store, read by row_id."""

    def __init__(self, verifier: Verifier, root: str) -> None:
        super().__init__(verifier, root, "tokens")
        self._firsts: dict[tuple[int, str], list[int]] = {}
        self._ends: dict[str, npt.NDArray[np.int64]] = {}
        self._columns: OrderedDict[tuple[str, int, str], npt.NDArray[Any]] = OrderedDict()
        self._column_bytes = 0

    def _first_rows(self, part: Part, space: str) -> list[int]:
        """Return the first row_id of every row group of a part."""
        key = (part.part, space)
        if key not in self._firsts:
            metadata = self.file(part, space).metadata
            self._firsts[key] = [
                metadata.row_group(g).column(0).statistics.min
                for g in range(metadata.num_row_groups)
            ]
        return self._firsts[key]

    def columns(
        self, part: Part, names: Sequence[str], start: int, stop: int, space: str = ""
    ) -> list[npt.NDArray[Any]]:
        """Return columns of the tokens at places ``start … stop`` of a part's file.

        Only these columns of their row groups are read; of them 128 MiB are kept, the latest.
        """
        file, key = self.file(part, space), part.file("tokens", space)
        with self._lock:
            ends = self._group_ends(file, key)
            pieces: list[list[npt.NDArray[Any]]] = [[] for _ in names]
            for number in range(np.searchsorted(ends, start, side="right"), len(ends)):
                first = int(ends[number - 1]) if number else 0
                if first >= stop:
                    break
                span = slice(max(start - first, 0), stop - first)
                found = self._columns_of_group(file, key, number, names)
                for column, values in zip(pieces, found, strict=True):
                    column.append(values[span])
        return [
            np.empty(0, TOKENS.field(name).type.to_pandas_dtype())
            if not column
            else column[0]
            if len(column) == 1
            else np.concatenate(column)
            for name, column in zip(names, pieces, strict=True)
        ]

    def values(
        self, part: Part, names: Sequence[str], places: npt.NDArray[np.int64], space: str = ""
    ) -> list[npt.NDArray[Any]]:
        """Return columns of the tokens at some places of a part's file, in their order.

        Read, and kept, as by `columns`.
        """
        file, key = self.file(part, space), part.file("tokens", space)
        found = [np.empty(len(places), TOKENS.field(n).type.to_pandas_dtype()) for n in names]
        with self._lock:
            ends = self._group_ends(file, key)
            numbers = np.searchsorted(ends, places, side="right")
            order = np.argsort(numbers, kind="stable")
            numbers = numbers[order]
            for a, b in stretches(np.diff(numbers) != 0, len(numbers)):
                number, mine = int(numbers[a]), order[a:b]
                local = places[mine] - (int(ends[number - 1]) if number else 0)
                columns = self._columns_of_group(file, key, number, names)
                for column, values in zip(found, columns, strict=True):
                    column[mine] = values[local]
        return found

    def _group_ends(self, file: pq.ParquetFile, key: str) -> npt.NDArray[np.int64]:
        """Return the place behind the last row of every row group."""
        if key not in self._ends:
            groups = range(file.metadata.num_row_groups)
            self._ends[key] = np.cumsum([file.metadata.row_group(g).num_rows for g in groups])
        return self._ends[key]

    def _columns_of_group(
        self, file: pq.ParquetFile, key: str, number: int, names: Sequence[str]
    ) -> list[npt.NDArray[Any]]:
        missing = [name for name in names if (key, number, name) not in self._columns]
        if missing:
            group = file.read_row_group(number, columns=missing, use_threads=False)
            for name in missing:
                values = arrow.numbers(group.column(name))
                self._columns[key, number, name] = values
                self._column_bytes += values.nbytes
        found = []
        for name in names:
            self._columns.move_to_end((key, number, name))
            found.append(self._columns[key, number, name])
        while self._column_bytes > _CACHED_COLUMN_BYTES and len(self._columns) > len(names):
            _, values = self._columns.popitem(last=False)
            self._column_bytes -= values.nbytes
        return found

    def span(self, part: Part, start: int, stop: int, space: str = "") -> pa.Table:
        """Return the tokens of a part with ``start <= row_id < stop``, in order."""
        firsts = self._first_rows(part, space)
        pieces = []
        for number in range(max(0, bisect.bisect_right(firsts, start) - 1), len(firsts)):
            if firsts[number] >= stop:
                break
            group = self.group(part, number, space)
            ids = arrow.numbers(group.column(0))
            low, high = np.searchsorted(ids, [start, stop])
            pieces.append(group.slice(low, high - low))
        return pa.concat_tables(pieces) if pieces else arrow.empty(TOKENS)

    def rows(self, part: Part, row_ids: npt.NDArray[np.int64], space: str = "") -> pa.Table:
        """Return the tokens of the given row_ids of a part, in their order.

        Raises
        ------
        RowNotFound
            If the part has no such row.
        """
        firsts = self._first_rows(part, space)
        order = np.argsort(row_ids, kind="stable")
        wanted = row_ids[order]
        numbers = np.searchsorted(firsts, wanted, side="right") - 1
        pieces = []
        for number in np.unique(numbers):
            mine = wanted[numbers == number]
            group = self.group(part, int(max(number, 0)), space)
            ids = arrow.numbers(group.column(0))
            places = np.minimum(np.searchsorted(ids, mine), len(ids) - 1)
            if number < 0 or (ids[places] != mine).any():
                missing = mine[ids[places] != mine]
                raise RowNotFound(
                    f"row_id = {int(missing[0] if len(missing) else mine[0])} is a hole: no token "
                    "was planned there. Row ids come from the `tokens` view or from `top`."
                )
            pieces.append(arrow.take(group, places))
        back = np.empty(len(order), dtype=np.int64)
        back[order] = np.arange(len(order))
        return arrow.take(pa.concat_tables(pieces), back) if pieces else arrow.empty(TOKENS)


class DocumentTables(_GroupReader):
    """The documents of a store, read by number."""

    def __init__(self, verifier: Verifier, root: str) -> None:
        super().__init__(verifier, root, "documents")
        self._sources: OrderedDict[tuple[int, int], list[str]] = OrderedDict()

    def row(self, parts: Sequence[Part], document: int) -> dict[str, object]:
        """Return one document as a dict of its columns.

        Raises
        ------
        RowNotFound
            If there is no such document.
        """
        part, local = self._place(parts, document)
        group = self.group(part, local // DOCUMENT_GROUP)
        row: dict[str, object] = group.slice(local % DOCUMENT_GROUP, 1).to_pylist()[0]
        return row

    def sources(self, parts: Sequence[Part], documents: npt.NDArray[np.int64]) -> list[str]:
        """Return where documents came from, in their order, without reading their texts.

        The sources of 65,536 documents are kept, those read last.
        """
        places = [self._place(parts, document) for document in documents.tolist()]
        keys = [(part.part, local // DOCUMENT_GROUP) for part, local in places]
        with self._lock:
            held = {key: self._sources[key] for key in keys if key in self._sources}
        missing: dict[int, list[int]] = {}
        for number, group in sorted(set(keys) - set(held)):
            missing.setdefault(number, []).append(group)
        for number, groups in missing.items():
            file = self.file(parts[number])
            with self._lock:
                table = file.read_row_groups(groups, columns=["source"], use_threads=False)
            texts = [str(source) for source in table.column(0).to_pylist()]
            # Of the groups read only the last of the part can be short, and it comes last.
            for i, group in enumerate(groups):
                held[number, group] = texts[i * DOCUMENT_GROUP : (i + 1) * DOCUMENT_GROUP]
        with self._lock:
            for key, of_group in held.items():
                self._sources[key] = of_group
                self._sources.move_to_end(key)
            while len(self._sources) > _CACHED_SOURCES:
                self._sources.popitem(last=False)
        return [
            held[key][local % DOCUMENT_GROUP] for key, (_, local) in zip(keys, places, strict=True)
        ]

    def _place(self, parts: Sequence[Part], document: int) -> tuple[Part, int]:
        """Return the part that holds a document, and its number in it."""
        first = 0
        for part in parts:
            if 0 <= document - first < part.n_documents:
                return part, document - first
            first += part.n_documents
        raise RowNotFound(
            f"document = {document} is not in the store; it has documents 0 … {first - 1}."
        )
