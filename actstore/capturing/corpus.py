"""Corpora: documents out of files, datasets and iterables, one at a time, in a fixed order.

A corpus can say what it is (`describe`) without being read whole, so that a resumed capture can
recognise it: files by name, size and the checksum of their two ends; other sources by what they
tell.
"""

from __future__ import annotations

import glob
import io
import itertools
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import google_crc32c
import pyarrow as pa
import pyarrow.parquet as pq

from actstore.errors import CorpusError

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
"""Files a corpus may consist of; a directory is searched for these."""

_END_BYTES = 1 << 16


@dataclass(frozen=True)
class Document:
    """A source text before it is tokenised."""

    source: str
    """Where it came from, for people: a file name, a line of a file, a number."""
    text: str
    """The text."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """Whatever else its source said of it."""

    def check(self) -> None:
        """Raise `CorpusError` if the text is no Unicode: it breaks tokenizers and files alike."""
        try:
            self.text.encode()
        except UnicodeEncodeError as error:
            raise CorpusError(
                f"document {self.source!r} holds a lone surrogate "
                f"(U+{ord(self.text[error.start]):04X} at character {error.start:,}), which no "
                "text file can. Replace it: text.encode('utf-8', 'replace').decode()."
            ) from None

    def plain_source(self) -> str:
        """Return the source as it can be written to a file."""
        return self.source.encode("utf-8", "replace").decode()

    def metadata_json(self) -> str:
        """Return the metadata as a JSON object.

        Raises
        ------
        CorpusError
            If JSON cannot hold it.
        """
        try:
            text = json.dumps(self.metadata, ensure_ascii=False, default=str)
        except (TypeError, ValueError, RecursionError) as error:
            raise CorpusError(
                f"the metadata of document {self.source!r} cannot be written as JSON: {error}. "
                "Give plain values under string keys."
            ) from None
        return text.encode("utf-8", "replace").decode()


class Corpus(Protocol):
    """Documents in a fixed order, and what tells this corpus from another."""

    def describe(self) -> dict[str, Any]:
        """Return what identifies the corpus, as JSON."""

    def text_bytes(self, most: int | None = None) -> int | None:
        """Return the bytes of all texts, or more, if that is known without reading them.

        With `most`, of no document more than that, as far as its own size is known.
        """

    def __iter__(self) -> Iterator[Document]: ...


def open_corpus(
    corpus: Any = None,
    *,
    text: str | Iterable[str] | None = None,
    encoding: str = "utf-8",
    errors: str = "strict",
) -> Corpus:
    """Return the corpus that an argument stands for.

    Parameters
    ----------
    corpus : str, Path, list of paths, dataset or iterable
        A file (.txt is one document; .jsonl, .jsonl.gz, .jsonl.zst and .parquet hold one in each
        row, in the field ``text``), a directory or glob of such files, a Hugging Face dataset, or
        an iterable of str or of ``{"text": …, metadata}``.
    text : str or iterable of str, optional
        The documents themselves, instead of `corpus`.
    encoding, errors : str
        How text files are decoded, as in `open`.

    Raises
    ------
    CorpusError
        If it names no file, or is none of these.
    """
    if (corpus is None) == (text is None):
        raise CorpusError("give either a corpus or text=, one of the two.")
    if text is not None:
        texts = [text] if isinstance(text, str) else text
        if not isinstance(texts, Iterable) or isinstance(texts, (bytes, Mapping)):
            raise CorpusError(f"text of type {type(text).__name__}; expected a str or several.")
        texts = list(texts)
        if wrong := [type(t).__name__ for t in texts if not isinstance(t, str)]:
            raise CorpusError(f"text holds a {wrong[0]}; expected str only. Dicts go to corpus=.")
        return Texts([Document(f"text {i}", t) for i, t in enumerate(texts)])
    if isinstance(corpus, (str, Path)):
        return Files(_find_files(str(corpus)), encoding, errors)
    if isinstance(corpus, (list, tuple)) and corpus and all(map(_is_file, corpus)):
        found = [path for item in corpus for path in _find_files(str(item))]
        return Files(found, encoding, errors)
    if isinstance(corpus, (list, tuple)):
        return Texts([_as_document(item, i) for i, item in enumerate(corpus)])
    if hasattr(corpus, "__iter__") and not isinstance(corpus, (bytes, Mapping)):
        return Records(corpus)
    raise CorpusError(
        f"corpus of type {type(corpus).__name__} cannot be read; expected a path, a glob, a "
        "dataset, or an iterable of str or {'text': …}."
    )


def _is_file(item: Any) -> bool:
    """Return whether an item of a list is a path; a string may be the name of a file."""
    # Unlike Path.is_file, this is False too for a text that is too long for a name.
    return isinstance(item, Path) or (isinstance(item, str) and os.path.isfile(item))


def _search(folder: Path) -> Iterator[Path]:
    """Yield the corpus files below a folder; hidden folders and stores are passed over."""
    for place, folders, names in os.walk(folder):
        if "zarr.json" in names:
            folders.clear()  # a store holds Parquet files too
            continue
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(place, name) for name in names if name.lower().endswith(SUFFIXES))


def _find_files(pattern: str) -> list[Path]:
    if not pattern:
        raise CorpusError("corpus = '' names no file; expected a path or a glob, or text=….")
    path = Path(pattern).expanduser()
    if os.path.isfile(path):
        found = [path]
    elif os.path.isdir(path):
        found = sorted(p for p in _search(path) if p.is_file())
        if not found:
            raise CorpusError(f"{pattern} holds no corpus file; expected {', '.join(SUFFIXES)}.")
    else:
        found = sorted(Path(name) for name in glob.glob(str(path), recursive=True))
        found = [p for p in found if p.is_file()]
        if not found:
            start = pattern if len(pattern) <= 60 else pattern[:59] + "…"
            raise CorpusError(
                f"corpus = {start!r} matches no file (looked from {os.getcwd()}). "
                "Did you mean text=…? A corpus is a path or a glob; text= takes the text itself."
            )
    for name in found:
        if not name.name.lower().endswith(SUFFIXES):
            raise CorpusError(f"{name} is of no known kind; expected {', '.join(SUFFIXES)}.")
    return found


def _as_document(item: Any, number: int, source: str = "") -> Document:
    if isinstance(item, str):
        return Document(source or f"document {number}", item)
    if isinstance(item, Mapping) and isinstance(item.get("text"), str):
        metadata = {key: value for key, value in item.items() if key != "text"}
        given = metadata.pop("source", None)
        return Document(str(given or source or f"document {number}"), item["text"], metadata)
    raise CorpusError(
        f"document {number}{f' of {source}' if source else ''} is {type(item).__name__} without a "
        "string under 'text'; expected a str or {'text': …, metadata}."
    )


@dataclass(frozen=True)
class Texts:
    """Documents held in memory."""

    documents: list[Document]
    """The documents."""

    def describe(self) -> dict[str, Any]:
        """Return the number of documents and the checksum of all they hold."""
        checksum = google_crc32c.Checksum()
        for document in self.documents:
            for part in (document.source, document.text, repr(dict(document.metadata))):
                checksum.update(part.encode("utf-8", "surrogatepass") + b"\0")
        return {
            "kind": "texts",
            "n_documents": len(self.documents),
            "crc32c": int.from_bytes(checksum.digest(), "big"),
        }

    def text_bytes(self, most: int | None = None) -> int:
        """Return the bytes of the texts, of each no more than `most`."""
        sizes = (len(d.text.encode("utf-8", "surrogatepass")) for d in self.documents)
        return sum(size if most is None else min(size, most) for size in sizes)

    def __iter__(self) -> Iterator[Document]:
        return iter(self.documents)


@dataclass(frozen=True)
class Records:
    """Documents of a dataset or any other iterable, read as they come."""

    items: Iterable[Any]
    """The iterable.  An iterator, which ends with its first use, is used once in a capture."""
    _head: list[Any] = field(default_factory=list, repr=False)
    """What an iterator gave up to its first text: given out again to the next who asks."""

    def describe(self) -> dict[str, Any]:
        """Return the dataset's own fingerprint where it has one, and that of the first text."""
        return {
            "kind": "records",
            "type": type(self.items).__name__,
            "fingerprint": str(getattr(self.items, "_fingerprint", "")),
            "n_documents": len(self.items) if isinstance(self.items, Sized) else None,
            "first": next((Texts([d]).describe()["crc32c"] for d in self if d.text.strip()), None),
        }

    def text_bytes(self, most: int | None = None) -> None:
        """Return None: nobody knows before the end."""

    def __iter__(self) -> Iterator[Document]:
        once = iter(self.items) is self.items
        has_text = False
        for number, item in enumerate(itertools.chain(tuple(self._head), self.items)):
            if once and not has_text and number >= len(self._head):
                self._head.append(item)
            document = _as_document(item, number)
            has_text = has_text or bool(document.text.strip())
            yield document


@dataclass(frozen=True)
class Files:
    """Documents in files."""

    paths: list[Path]
    """The files, in order."""
    encoding: str = "utf-8"
    """Encoding of text files."""
    errors: str = "strict"
    """What to do with bytes that do not decode, as in `open`."""

    def describe(self) -> dict[str, Any]:
        """Return name, size and checksum of both ends of every file.

        What to do with bytes that do not decode is not part of it: errors="replace" goes on with a
        corpus that "strict" broke off, and what was read until then is the same.
        """
        return {
            "kind": "files",
            "encoding": self.encoding,
            "files": [_describe_file(path) for path in self.paths],
        }

    def text_bytes(self, most: int | None = None) -> int | None:
        """Return the size of the files, of texts no more than `most`; None if any is compressed."""
        total = 0
        for path in self.paths:
            name, size = path.name.lower(), path.stat().st_size
            if not name.endswith((".txt", ".jsonl")):
                return None
            total += size if most is None or name.endswith(".jsonl") else min(size, most)
        return total

    def __iter__(self) -> Iterator[Document]:
        for path in self.paths:
            name = path.name.lower()
            if name.endswith(".txt"):
                yield Document(self._source(path), self._decode(path, path.read_bytes()), {})
            elif name.endswith(".parquet"):
                yield from self._parquet(path)
            else:
                yield from self._json_lines(path)

    def _source(self, path: Path) -> str:
        """Return the path below the folder that all files share."""
        name = os.path.relpath(path, os.path.commonpath([p.parent for p in self.paths]))
        return os.fsencode(name).decode("utf-8", "backslashreplace")

    def _decode(self, path: Path, data: bytes, before: int = 0) -> str:
        try:
            return data.decode(self.encoding, self.errors)
        except LookupError as error:
            raise CorpusError(
                f"{path} cannot be decoded: {error}. Give encoding= (--encoding) and errors= "
                "(--errors) values that Python's `open` knows, such as 'latin-1' and 'replace'."
            ) from None
        except UnicodeDecodeError as error:
            raise CorpusError(
                f"{path} is not {self.encoding}: byte {data[error.start]:#04x} at offset "
                f"{before + error.start:,} does not decode. Name the right one with encoding= "
                "(--encoding), or replace such bytes with errors='replace' (--errors replace)."
            ) from None

    def _json_lines(self, path: Path) -> Iterator[Document]:
        offset = 0
        with _open_compressed(path) as lines:
            for number, line in enumerate(_readable(path, lines)):
                if line.strip():
                    try:
                        item = json.loads(self._decode(path, line, offset))
                    except (ValueError, RecursionError) as error:
                        raise CorpusError(
                            f"line {number + 1} of {path} is not JSON: {error}."
                        ) from None
                    yield _as_document(item, number, f"{self._source(path)}:{number + 1}")
                offset += len(line)

    def _parquet(self, path: Path) -> Iterator[Document]:
        try:
            file = pq.ParquetFile(path)
        except pa.ArrowException as error:
            raise _not_readable(path, error) from None
        if "text" not in file.schema_arrow.names:
            raise CorpusError(
                f"{path} has no column 'text'; it has {', '.join(file.schema_arrow.names)}."
            )
        number = 0
        # Asked for all row groups at once, Arrow holds on to what it has read of them.
        batches = (
            batch
            for group in range(file.num_row_groups)
            for batch in file.iter_batches(256, row_groups=[group], use_threads=False)
        )
        for batch in _readable(path, batches):
            for item in batch.to_pylist():
                yield _as_document(item, number, f"{self._source(path)}:{number}")
                number += 1


def _open_compressed(path: Path) -> Any:
    try:
        return io.BufferedReader(pa.input_stream(str(path), compression="detect"))
    except (OSError, pa.ArrowException) as error:
        raise _not_readable(path, error) from None


def _readable(path: Path, items: Iterable[Any]) -> Iterator[Any]:
    """Yield what a file gives, and say which file it was if it breaks off."""
    try:
        yield from items
    except (OSError, EOFError, zlib.error, pa.ArrowException) as error:
        raise _not_readable(path, error) from None


def _not_readable(path: Path, error: Exception) -> CorpusError:
    return CorpusError(
        f"{path} cannot be read: {error}. Expected a whole {path.suffix} file; restore it, or "
        "leave it out of the corpus."
    )


def _describe_file(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    with path.open("rb") as file:
        ends = file.read(_END_BYTES)
        if size > 2 * _END_BYTES:
            file.seek(-_END_BYTES, os.SEEK_END)
        ends += file.read(_END_BYTES)
    name = os.fsencode(path.name).decode("utf-8", "backslashreplace")
    return {"name": name, "bytes": size, "ends_crc32c": google_crc32c.value(ends)}
