"""Documents in random order, in bounded memory.

Every document draws a key of 64 bits; in the order of their keys the documents are uniformly
permuted.  One pass over the corpus deals them to files by the first bits of the key; the files are
then read one after the other, each sorted in memory.  A file that turned out too large for that is
dealt again, by the next bits.  Keys follow from the documents' numbers, so the order is the same
every time.

The files lie in the work folder of a store while its plan is made.  Once all are written, a list of
them is, and an interrupted plan goes on from them without reading the corpus again.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from actstore import arrow, durable
from actstore.capturing.corpus import Corpus, Document
from actstore.errors import DamagedFile

SEED = 0
"""Seed of the keys; it stands in the plan's description of the corpus."""

FILE_BYTES = 64 << 20
"""A file with more bytes of documents than this is dealt again rather than sorted in memory."""

_BUFFER_BYTES = 32 << 20
_BITS = 6  # of the key, for each time documents are dealt: 64 files
_KEY_BITS = 64

_SCHEMA = pa.schema(
    [
        ("key", pa.uint64()),
        ("number", pa.int64()),
        ("source", pa.string()),
        ("text", pa.large_string()),
        ("metadata", pa.string()),
    ]
)


@dataclass(frozen=True)
class _Dealt:
    """A file of documents whose keys begin alike."""

    name: str
    """Its name in its folder."""
    n_documents: int
    """How many documents it holds."""
    n_bytes: int
    """Their bytes in memory."""


@dataclass(frozen=True)
class Shuffled:
    """The documents of a corpus in a random order that is the same every time.

    Reading takes one pass over the corpus and as much disk as its texts; memory is that of one
    file, or of the largest document if that is more.
    """

    corpus: Corpus
    """The documents."""
    folder: Path
    """Where they are dealt to; made when they are first read, and left there."""

    def describe(self) -> dict[str, Any]:
        """Return what identifies the corpus, and its order."""
        return {**self.corpus.describe(), "order": "shuffled", "seed": SEED}

    def text_bytes(self, most: int | None = None) -> int | None:
        """Return the bytes of all texts, or more, if that is known without reading them."""
        return self.corpus.text_bytes(most)

    def __iter__(self) -> Iterator[Document]:
        for row in self._in_order(self.folder, self._files(), _KEY_BITS):
            yield Document(row["source"], row["text"], json.loads(row["metadata"]))

    def _files(self) -> list[_Dealt]:
        """Return the files of the whole corpus, dealt now if they are not all there."""
        contents = self.folder / "files.json"
        # What JSON does to tuples and keys must not look like a difference.
        described = json.loads(json.dumps(self.describe()))
        if contents.exists():
            try:
                found = durable.read_sealed(contents)
                if found["corpus"] == described:
                    return [_Dealt(**entry) for entry in found["files"]]
            except DamagedFile:
                pass  # a crash may leave anything; the corpus still has the documents
        shutil.rmtree(self.folder, ignore_errors=True)
        files = _deal(map(_row, itertools.count(), self.corpus), self.folder, _KEY_BITS)
        for file in files:
            durable.sync_file(self.folder / file.name)
        document = {"corpus": described, "files": [asdict(file) for file in files]}
        durable.replace(contents, durable.to_json(durable.sealed(document)))
        return files

    def _in_order(
        self, folder: Path, files: list[_Dealt], bits: int
    ) -> Iterator[Mapping[str, Any]]:
        """Yield the rows of files, the first `bits` bits of their keys not yet used, by key."""
        left = bits - _BITS
        for file in files:
            path = folder / file.name
            if file.n_bytes > FILE_BYTES and file.n_documents > 1 and left >= _BITS:
                deeper = folder / f"{file.name}.dealt"
                shutil.rmtree(deeper, ignore_errors=True)
                yield from self._in_order(deeper, _deal(_rows(path), deeper, left), left)
                shutil.rmtree(deeper)
            else:
                table = pa.Table.from_batches(_batches(path), _SCHEMA)
                keys, numbers = (arrow.numbers(table.column(name)) for name in ("key", "number"))
                for place in np.lexsort((numbers, keys)):
                    yield table.slice(place, 1).to_pylist()[0]


def _row(number: int, document: Document) -> dict[str, Any]:
    document.check()
    digest = hashlib.blake2b(b"%d" % number, digest_size=8, key=b"%d" % SEED).digest()
    return {
        "key": int.from_bytes(digest, "big"),
        "number": number,
        "source": document.plain_source(),
        "text": document.text,
        "metadata": document.metadata_json(),
    }


def _batches(path: Path) -> Iterator[pa.RecordBatch]:
    with pa.OSFile(str(path)) as file, pa.ipc.open_stream(file) as reader:
        yield from reader


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    for batch in _batches(path):
        for place in range(batch.num_rows):
            yield batch.slice(place, 1).to_pylist()[0]


@dataclass
class _Pile:
    """A file under way, and the rows that are not in it yet."""

    name: str
    writer: Any
    waiting: list[dict[str, Any]] = field(default_factory=list)
    n_documents: int = 0
    n_bytes: int = 0

    def write(self) -> None:
        if self.waiting:
            texts = ("source", "text", "metadata")
            table = arrow.table(
                {
                    "key": np.array([row["key"] for row in self.waiting], np.uint64),
                    "number": np.array([row["number"] for row in self.waiting], np.int64),
                    **{name: [row[name] for row in self.waiting] for name in texts},
                },
                _SCHEMA,
            )
            self.writer.write_table(table)
            self.waiting = []


def _deal(rows: Iterable[dict[str, Any]], folder: Path, bits: int) -> list[_Dealt]:
    """Write rows to files by the next bits of their keys, of which `bits` are not yet used."""
    durable.make_folder(folder)
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with ExitStack() as stack:
        piles = []
        for i in range(1 << _BITS):
            file = stack.enter_context(pa.OSFile(str(folder / f"{i:02d}.arrow"), "wb"))
            writer = stack.enter_context(pa.ipc.new_stream(file, _SCHEMA, options=options))
            piles.append(_Pile(f"{i:02d}.arrow", writer))
        held = 0
        for row in rows:
            pile = piles[row["key"] >> (bits - _BITS) & ((1 << _BITS) - 1)]
            # A character takes up to four bytes in memory; the rest is small beside it.
            n_bytes = 4 * len(row["text"]) + len(row["metadata"]) + 256
            pile.waiting.append(row)
            pile.n_documents += 1
            pile.n_bytes += n_bytes
            held += n_bytes
            if held > _BUFFER_BYTES:
                for other in piles:
                    other.write()
                held = 0
        for pile in piles:
            pile.write()
    return [_Dealt(p.name, p.n_documents, p.n_bytes) for p in piles if p.n_documents]
