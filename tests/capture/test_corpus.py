"""Corpora: which documents a source has, in which order, and what recognises it."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from actstore.capturing.corpus import Corpus, Document, open_corpus
from actstore.errors import CorpusError
from actstore.models import LanguageModel
from tests.captured import DOCUMENTS, capture


def texts(corpus: Corpus) -> list[str]:
    """Return the texts of a corpus."""
    return [document.text for document in corpus]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with a corpus file of every kind, and one of another."""
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.txt").write_text("one\r\ntwo\n", newline="")
    (tmp_path / "b.jsonl").write_text('{"text": "three", "year": 1946}\n\n{"text": ""}\n')
    with gzip.open(tmp_path / "c.jsonl.gz", "wt") as file:
        file.write(json.dumps({"text": "vier – 四", "source": "here"}))
    with pa.output_stream(tmp_path / "d.jsonl.zst", compression="zstd") as file:
        file.write(b'{"text": "four and a half"}\n')
    table = pa.table({"text": ["five", "six"], "label": [1, 2]})
    pq.write_table(table, tmp_path / "deep/d.parquet")
    (tmp_path / "e.md").write_text("not this")
    (tmp_path / "f.txt").mkdir()
    return tmp_path


def test_every_kind_of_file_gives_its_documents(folder: Path) -> None:
    """A directory is searched, in the order of names; text comes as it stands in the file."""
    found = list(open_corpus(folder))
    assert found == [
        Document("a.txt", "one\r\ntwo\n"),
        Document("b.jsonl:1", "three", {"year": 1946}),
        Document("b.jsonl:3", ""),
        Document("here", "vier – 四"),
        Document("d.jsonl.zst:1", "four and a half"),
        Document("deep/d.parquet:0", "five", {"label": 1}),
        Document("deep/d.parquet:1", "six", {"label": 2}),
    ]


def test_paths_and_globs_choose_files(folder: Path) -> None:
    """A file, a glob, a recursive glob, a list of paths in its own order."""
    assert texts(open_corpus(folder / "a.txt")) == ["one\r\ntwo\n"]
    assert texts(open_corpus(f"{folder}/*.jsonl*")) == ["three", "", "vier – 四", "four and a half"]
    assert texts(open_corpus(f"{folder}/**/*.parquet")) == ["five", "six"]
    both = [folder / "deep/d.parquet", folder / "a.txt"]
    assert texts(open_corpus(both)) == ["five", "six", "one\r\ntwo\n"]
    assert texts(open_corpus([str(path) for path in both])) == texts(open_corpus(both))
    assert texts(open_corpus(["one", "x" * 5000])) == ["one", "x" * 5000]


def zstd(data: bytes) -> bytes:
    """Return data as a frame of Zstandard."""
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as file:
        file.write(data)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize(("name", "compress"), [("gz", gzip.compress), ("zst", zstd)])
def test_compressed_files_may_be_joined(
    name: str, compress: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    """What several writers appended to one file is read to its end."""
    path = tmp_path / f"a.jsonl.{name}"
    path.write_bytes(b"".join(compress(b'{"text": "%d"}\n' % i) for i in range(3)))
    assert texts(open_corpus(path)) == ["0", "1", "2"]


def test_a_parquet_file_is_not_held_in_memory(tmp_path: Path) -> None:
    """While its documents are read, Arrow holds a row group, not the file."""
    table = pa.table({"text": [random.Random(i).randbytes(50_000).hex() for i in range(200)]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=10, use_dictionary=False)
    assert table.nbytes > 20 * 10**6
    del table
    before = pa.total_allocated_bytes()
    held = [pa.total_allocated_bytes() - before for _ in open_corpus(tmp_path / "a.parquet")]
    assert len(held) == 200
    assert max(held) < 8 * 10**6


class Dataset:
    """What a Hugging Face dataset looks like from here: a streaming one has no length."""

    _fingerprint = "f00"

    def __iter__(self) -> Any:
        return iter([{"text": "a", "label": 1}, {"text": "b", "label": 0}])


def test_iterables_give_their_documents() -> None:
    """Strings, dicts with a text, datasets, generators, text= alone."""
    assert list(open_corpus(["a", {"text": "b", "n": 1}])) == [
        Document("document 0", "a"),
        Document("document 1", "b", {"n": 1}),
    ]
    assert texts(open_corpus(Dataset())) == ["a", "b"]
    assert texts(open_corpus(Dataset())) == texts(open_corpus(iter(Dataset())))
    assert texts(open_corpus(text="a b")) == ["a b"]
    assert texts(open_corpus(text=("a", "b"))) == ["a", "b"]
    assert open_corpus(Dataset()).describe()["fingerprint"] == "f00"


@pytest.mark.parametrize(
    ("corpus", "message"),
    [
        (7, "corpus of type int cannot be read; expected a path, a glob, a dataset, or an iter"),
        (b"a.txt", "corpus of type bytes"),
        ({"text": "a"}, "corpus of type dict"),
        ([1], r"document 0 is int without a string under 'text'; expected a str or"),
        ([{"body": "a"}], "document 0 is dict without a string under 'text'"),
        (["a", {"text": None}], "document 1 is dict without"),
    ],
)
def test_what_is_no_corpus_is_refused(corpus: Any, message: str) -> None:
    """The type, or the number of the document, and what was expected."""
    with pytest.raises(CorpusError, match=message):
        list(open_corpus(corpus))


CUT_SHORT = gzip.compress(b'{"text": "a"}\n' * 99, mtime=0)[:-9]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', r"line 2 of .*a.jsonl is not JSON: "),
        ("a.jsonl", b'{"text": "a"}\n["b"]', r"document 1 of a.jsonl:2 is list without a string"),
        ("a.jsonl.gz", b"not gzip", r"a.jsonl.gz cannot be read: .*leave it out of the corpus"),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"text": "a"}\n' * 99, mtime=0)[:-9],
            "a.jsonl.gz cannot be read",
        ),
        ("a.jsonl.zst", b"not zstd", r"a.jsonl.zst cannot be read: .*leave it out of the corpus"),
        ("a.jsonl.zst", zstd(b'{"text": "a"}\n' * 99)[:-9], "a.jsonl.zst cannot be read"),
        ("a.parquet", b"PAR1 not parquet", r"a.parquet cannot be read: .*Expected a whole .parq"),
        ("a.md", b"text", r"a.md is of no known kind; expected .txt, .jsonl, .jsonl.gz"),
    ],
)
def test_broken_files_are_named(name: str, data: bytes, message: str, tmp_path: Path) -> None:
    """A file that cannot be read is an error of the tree with its name and place."""
    (tmp_path / name).write_bytes(data)
    with pytest.raises(CorpusError, match=message):
        list(open_corpus(tmp_path / name))


def test_other_broken_sources_are_named(tmp_path: Path) -> None:
    """A table without text says what it has; an empty folder what it should have."""
    pq.write_table(pa.table({"body": ["a"], "n": [1]}), tmp_path / "a.parquet")
    with pytest.raises(CorpusError, match=r"a.parquet has no column 'text'; it has body, n\."):
        list(open_corpus(tmp_path / "a.parquet"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(CorpusError, match=r"empty holds no corpus file; expected .txt, .jsonl"):
        open_corpus(tmp_path / "empty")


def test_a_generator_loses_no_document(toy_bert: LanguageModel, tmp_path: Path) -> None:
    """An iterator is read once: the probe of dtypes and the description take nothing from it."""
    found = capture(toy_bert, (d for d in DOCUMENTS), tmp_path / "store").store
    whole = capture(toy_bert, DOCUMENTS, tmp_path / "whole").store
    assert found.n_documents == len(DOCUMENTS)
    assert found.n_rows() == whole.n_rows()
    for number, text in enumerate(DOCUMENTS):
        assert found.document(number)["text"] == text
    again = capture(toy_bert, (d for d in DOCUMENTS), tmp_path / "store")
    assert again.windows_fed == 0
    with pytest.raises(Exception, match=r"another corpus: first was \d+, now it is \d+"):
        capture(toy_bert, (d for d in ["the war"]), tmp_path / "store")


def test_blank_documents_before_the_first_text_are_not_lost() -> None:
    """An iterator gives out again what was taken from it, blank texts too, and no more."""
    corpus = open_corpus(iter(["", " ", "the war", "the people"]))
    for _ in range(3):
        assert next(d.text for d in corpus if d.text.strip()) == "the war"
    assert texts(corpus) == ["", " ", "the war", "the people"]


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (lambda f: (f / "a.txt").write_text("one\r\ntwo!", newline=""), "files"),
        (lambda f: (f / "a.txt").rename(f / "z.txt"), "files"),
        (lambda f: (f / "a.txt").unlink(), "files"),
    ],
)
def test_files_are_recognised_by_what_they_hold(
    change: Callable[[Path], Any], key: str, folder: Path
) -> None:
    """Name, size and both ends; where they lie and when they were written does not matter."""
    before = open_corpus(folder).describe()
    moved = folder.rename(f"{folder}-moved")
    assert open_corpus(moved).describe() == before
    change(moved)
    after = open_corpus(moved).describe()
    assert [name for name in before if before[name] != after[name]] == [key]
    assert open_corpus(moved, encoding="latin-1").describe()["encoding"] == "latin-1"
    # What to do with bad bytes may change: what was read before them does not.
    assert open_corpus(moved, errors="replace").describe() == after


def test_texts_are_recognised_by_their_checksum() -> None:
    """Other texts, the same cut in another place, or with other metadata, are another corpus."""
    descriptions = [
        json.dumps(open_corpus(given).describe())
        for given in (
            *(["ab", "c"], ["a", "bc"], ["ab", "d"], ["ab"], ["ab", "c", ""]),
            *([{"text": "ab", "year": 1946}, "c"], [{"text": "ab", "source": "here"}, "c"]),
        )
    ]
    assert len(set(descriptions)) == 7
    assert open_corpus(["ab", "c"]).describe() == open_corpus(["ab", "c"]).describe()
