"""The plan: every token of every document gets one row, whatever the lengths and limits."""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import actstore
from actstore.capturing import Limits, Settings, parts, plan, run_capture
from actstore.capturing.corpus import Corpus, Texts, open_corpus
from actstore.capturing.run import new_meta
from actstore.errors import CorpusError, StoreMismatch
from actstore.models import LanguageModel
from actstore.store import FIRST, SPECIAL, CoreStore
from tests.captured import DOCUMENTS, Captured, all_tokens
from tests.toys import TEXT, toy_model

WORDS = TEXT.split()


class Stop(Exception):
    """Ends a plan between two parts, as a crash would."""


@pytest.fixture(scope="module")
def models() -> dict[str, LanguageModel]:
    """Return models with no, one and two special tokens around a window."""
    from actstore.models import load

    return {name: load(*toy_model(name, n_layers=1)) for name in ("bert", "gpt2", "llama")}


def make(
    folder: Path, model: LanguageModel, corpus: Corpus, rows: int = 64, **settings: Any
) -> CoreStore:
    """Return a planned store of small segments, with one site."""
    given = Settings(sites="resid_post.0", dtype="float16", **settings)
    meta = replace(new_meta(model, corpus, given, 1 << 30), segment_rows=rows, chunk_rows=16)
    store = CoreStore.create(folder, meta)
    plan.make_plan(store, model, corpus, given.limits)
    return store


def words(lengths: list[int]) -> list[str]:
    """Return documents of so many words."""
    return [
        " ".join(itertools.islice(itertools.cycle(WORDS[i:]), n)) for i, n in enumerate(lengths)
    ]


CASES = {
    "name": st.sampled_from(["bert", "gpt2", "llama"]),
    "lengths": st.lists(st.integers(0, 40), max_size=9),
    "context": st.integers(4, 32),
    "overlap": st.integers(0, 12),
    "rows": st.sampled_from([32, 64]),
    "part_rows": st.sampled_from([1, 30, 10**6]),
}


@given(**CASES)
def test_every_token_is_planned_once(
    models: dict[str, LanguageModel],
    name: str,
    lengths: list[int],
    context: int,
    overlap: int,
    rows: int,
    part_rows: int,
) -> None:
    """Tokens, windows, segments and row ids hold what they say, for any documents."""
    model = models[name]
    n_special = len(model.prefix_ids) + len(model.suffix_ids)
    overlap = min(overlap, context - n_special - 1)
    documents = words(lengths)
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(parts, "PART_ROWS", part_rows),
    ):
        store = make(
            Path(folder), model, Texts(list(open_corpus(documents))), rows,
            context=context, overlap=overlap,
        )  # fmt: skip
        tokens = all_tokens(store).to_pylist()
        windows = [w for s in store.planned for w in store.windows(s).to_pylist()]

        # Documents: all of them, the empty ones too, each token once and in order.
        assert store.n_documents == len(documents)
        for number, text in enumerate(documents):
            stored = store.document(number)
            encoded = model.encode(text)
            assert (stored["text"], stored["n_tokens"]) == (text, len(encoded.ids))
            mine = [t for t in tokens if t["document"] == number and t["doc_position"] >= 0]
            mine.sort(key=lambda t: t["doc_position"])
            assert [t["doc_position"] for t in mine] == list(range(len(encoded.ids)))
            assert [t["token_id"] for t in mine] == encoded.ids.tolist()
            assert [t["char_start"] for t in mine] == encoded.starts.tolist()
            assert [t["char_end"] for t in mine] == encoded.ends.tolist()

        # Segments: at most S rows, rows counted from segment * S without a gap.
        ids = np.array([t["row_id"] for t in tokens], dtype=np.int64)
        assert list(store.planned) == list(range(len(store.planned)))
        for number, segment in store.planned.items():
            assert 0 < segment.rows[""] <= rows
            mine = ids[ids // rows == number]
            assert mine.tolist() == list(range(number * rows, number * rows + segment.rows[""]))
            # Inside it, windows stand longest first.
            spans = [w["context_tokens"] + w["rows"] for w in windows if w["segment"] == number]
            assert spans == sorted(spans, reverse=True)
        assert np.array_equal(ids, np.sort(ids))

        # Windows: at most `context` tokens, special ones around, left context fed but not stored.
        assert [w["window_id"] for w in windows] == list(range(len(windows)))
        by_window = {i: list(g) for i, g in itertools.groupby(tokens, lambda t: t["window_id"])}
        for window in windows:
            own = by_window[window["window_id"]]
            assert [t["row_id"] for t in own] == list(
                range(window["first_row"], window["first_row"] + window["rows"])
            )
            back = window["context_tokens"]
            assert back == (overlap if window["first_token"] else 0) == len(window["context_ids"])
            assert len(own) + back <= context
            encoded = model.encode(documents[window["document"]])
            start = window["first_token"]
            assert window["context_ids"] == encoded.ids[start - back : start].tolist()
            kinds = [t["doc_position"] < 0 for t in own]
            n_prefix, n_suffix = len(model.prefix_ids), len(model.suffix_ids)
            body = len(own) - n_special
            assert kinds == [True] * n_prefix + [False] * body + [True] * n_suffix
            assert [bool(t["flags"] & SPECIAL) for t in own] == kinds
            positions = [*range(n_prefix), *range(n_prefix + back, len(own) + back)]
            assert [t["position"] for t in own] == positions
            assert [bool(t["flags"] & FIRST) for t in own] == [p == 0 for p in positions]
            # Full, unless it ends its document.
            if start + body < len(encoded.ids):
                assert len(own) + back == context

        # Parts: each ends with a document; all but the last have their size in rows or documents,
        # or half of it.
        assert [p.complete for p in store.parts] == [False] * (len(store.parts) - 1) + [True]
        for part in store.parts[:-1]:
            size = max(sum(s.rows[""] for s in part.segments), part.n_documents)
            assert 2 * size > part_rows


@pytest.mark.parametrize(
    ("n_rows", "n_documents", "n_segments", "open_rows", "lengths", "ends"),
    [
        (199, 3, 2, 99, [1], False),
        (199, 3, 2, 99, [2], True),  # 101 rows do not fit into the second and last segment
        (150, 3, 2, 50, [30, 20], False),
        (150, 3, 2, 50, [30, 21], True),
        (100, 3, 1, 100, [60, 60], False),  # it has but half of its rows
        (101, 3, 2, 1, [60, 60], True),
        (200, 3, 2, 100, [], True),
        (0, 200, 1, 0, [], True),
        (0, 0, 1, 0, [100, 100, 100, 100], False),  # a long document must go somewhere
    ],
)
def test_a_part_ends_where_its_segments_are_full(
    n_rows: int, n_documents: int, n_segments: int, open_rows: int, lengths: list[int], ends: bool
) -> None:
    """Of 200 wanted rows in segments of 100: a document does not begin a third of a few rows."""
    facts = (n_rows, n_documents, n_segments, open_rows)
    assert parts.part_ends(100, 200, *facts, lengths) is ends


@given(stop=st.integers(0, 6), **CASES)
def test_an_interrupted_plan_goes_on_where_it_was(
    models: dict[str, LanguageModel],
    stop: int,
    name: str,
    lengths: list[int],
    context: int,
    overlap: int,
    rows: int,
    part_rows: int,
) -> None:
    """Stopped after any part and made again, the plan is the one that was not stopped."""
    model = models[name]
    settings = {"context": context, "overlap": min(overlap, context - 3)}
    corpus = open_corpus(words(lengths))
    publish = CoreStore.publish_part

    def stopping(store: CoreStore, part: Any) -> None:
        if part.part == stop:
            raise Stop
        publish(store, part)

    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(parts, "PART_ROWS", min(part_rows, 30)),
    ):
        whole = make(Path(folder, "whole"), model, corpus, rows, **settings)
        with mock.patch.object(CoreStore, "publish_part", stopping):
            try:
                make(Path(folder, "store"), model, corpus, rows, **settings)
            except Stop:
                assert len(CoreStore(f"{folder}/store").parts) == stop
        store = CoreStore(f"{folder}/store")
        plan.make_plan(store, model, corpus, Limits())
        assert plan_bytes(store) == plan_bytes(whole)


def plan_bytes(store: CoreStore) -> dict[str, bytes]:
    """Return the files of a plan."""
    names = [p for p in store.path.rglob("*") if p.is_file() and "work" not in p.parts]
    root = store.path / "zarr.json"  # holds the time
    return {str(p.relative_to(store.path)): p.read_bytes() for p in names if p != root}


@given(
    name=CASES["name"],
    lengths=CASES["lengths"],
    max_tokens=st.integers(3, 150) | st.none(),
    max_document_tokens=st.integers(3, 30) | st.none(),
)
def test_limits_are_kept(
    models: dict[str, LanguageModel],
    name: str,
    lengths: list[int],
    max_tokens: int | None,
    max_document_tokens: int | None,
) -> None:
    """Neither the corpus nor a document gives more rows, nor fewer than fit."""
    model = models[name]
    n_special = len(model.prefix_ids) + len(model.suffix_ids)
    documents = words(lengths)
    limits = Limits(max_tokens, max_document_tokens)
    with tempfile.TemporaryDirectory() as folder:
        store = make(Path(folder), model, open_corpus(documents), 32, context=12, limits=limits)
        tokens = all_tokens(store).to_pylist()
        total = 0
        for number in range(store.n_documents):
            text = documents[number]
            mine = [t for t in tokens if t["document"] == number]
            n_full = len(model.encode(text).ids)
            wanted = n_full + n_special * -(-n_full // (12 - n_special))
            caps = [c for c in (max_document_tokens, max_tokens and max_tokens - total) if c]
            cap = min(caps, default=10**9)
            assert len(mine) <= cap
            if len(mine) < wanted:
                assert cap - len(mine) <= n_special, "what is left holds no further window"
            stored = store.document(number)
            body = [t for t in mine if t["doc_position"] >= 0]
            assert [t["doc_position"] for t in sorted(body, key=lambda t: t["row_id"])] or not body
            assert stored["n_tokens"] == len(body)
            assert text.startswith(stored["text"])
            assert all(t["char_end"] <= len(stored["text"]) for t in body)
            total += len(mine)
        if store.n_documents < len(documents):
            assert max_tokens is not None
            assert max_tokens - total <= n_special, "the rest of the corpus is not read"


def test_the_corpus_behind_the_limit_is_not_read(models: dict[str, LanguageModel]) -> None:
    """When no further window fits, planning ends, though special tokens leave a row free."""
    read = []

    def texts() -> Any:
        for number in range(5):
            read.append(number)
            yield "war " * 200_000
        pytest.fail("the whole corpus was read")

    with tempfile.TemporaryDirectory() as folder:
        store = make(
            Path(folder), models["bert"], open_corpus(texts()), context=12,
            limits=Limits(max_tokens=25),
        )  # fmt: skip
    assert len(read) < 4
    assert store.n_documents == 1
    assert [p.complete for p in store.parts] == [True]


def test_the_vocabulary_is_every_token_type(toy_store: Captured) -> None:
    """The table of token types is the model's, in the order of ids."""
    store, model = toy_store.store, toy_store.model
    ids, texts, pieces = model.vocabulary()
    table = store.vocabulary
    assert table.column_names == ["token_id", "text", "piece"]
    assert table.to_pydict() == {"token_id": ids, "text": texts, "piece": pieces}


def test_metadata_of_documents_is_kept(models: dict[str, LanguageModel], tmp_path: Path) -> None:
    """Whatever stands beside a text is kept as JSON; its source by name."""
    corpus = open_corpus([{"text": "the war", "source": "a", "year": 1947}, "the people"])
    store = make(tmp_path, models["bert"], corpus, context=12)
    assert store.document(0)["source"] == "a"
    assert json.loads(store.document(0)["metadata"]) == {"year": 1947}
    assert (store.document(1)["source"], store.document(1)["metadata"]) == ("document 1", "{}")


def test_metadata_of_documents_can_be_asked_for(
    toy_capture: Callable[..., Captured],
) -> None:
    """In SQL, as JSON: of every kind, and NULL where a document has none."""
    documents = [
        {"text": "the war", "year": 1947, "by": {"name": "Truman"}, "tags": ["a", "b"]},
        {"text": "the people", "year": 1801, "by": {"name": "Jefferson"}},
        "the union",
    ]
    store = actstore.open(toy_capture(documents).store.path)
    query = (
        "SELECT document, CAST(json_extract(metadata, '$.year') AS INT) AS year, "
        "json_extract_string(metadata, '$.by.name') AS name, "
        "json_array_length(metadata, '$.tags') AS n FROM documents ORDER BY document"
    )
    assert [tuple(row.values()) for row in store.sql(query)] == [
        (0, 1947, "Truman", 2),
        (1, 1801, "Jefferson", None),
        (2, None, None, None),
    ]


def test_the_share_of_padding_is_that_of_the_batches(
    toy_bert: LanguageModel, tmp_path: Path
) -> None:
    """Windows stand by length, so that neighbours need little padding; how much is counted."""
    settings = Settings(context=24, batch_tokens=96)
    store, timing = run_capture(toy_bert, DOCUMENTS, tmp_path / "store", settings=settings)
    lengths = [w["context_tokens"] + w["rows"] for w in store.windows(0).to_pylist()]
    fed = 0
    left = lengths
    while left:
        batch, left = left[: 96 // left[0]], left[96 // left[0] :]
        fed += batch[0] * len(batch)
    assert sum(lengths) < fed
    assert timing.padding == pytest.approx(1 - sum(lengths) / fed)


def test_another_corpus_is_refused_with_the_difference(
    toy_capture: Callable[..., Captured], tmp_path: Path
) -> None:
    """A store goes on with its own corpus and limits only; the message names what differs."""
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(f"the war was over {name}")
    toy_capture(tmp_path / "*.txt")
    assert toy_capture(str(tmp_path / "*.txt")).windows_fed == 0
    (tmp_path / "b.txt").write_text("the war was not over")
    with pytest.raises(StoreMismatch, match=r"another corpus: files\[1\]\.bytes was 22, now it is"):
        toy_capture(tmp_path / "*.txt")
    (tmp_path / "b.txt").unlink()
    with pytest.raises(StoreMismatch, match=r"the number of files was 2, now it is 1\. Give the s"):
        toy_capture(tmp_path / "*.txt")
    with pytest.raises(StoreMismatch, match=r'kind was "files", now it is "texts"'):
        toy_capture(["the war"])
    (tmp_path / "b.txt").write_text("the war was over b.txt")
    with pytest.raises(StoreMismatch, match=r"max_tokens was null, now it is 10\..*same corpus a"):
        toy_capture(tmp_path / "*.txt", limits=Limits(max_tokens=10))


def test_a_lone_surrogate_is_refused_before_it_breaks_the_tokenizer(
    toy_capture: Callable[..., Captured],
) -> None:
    """Text that is no Unicode is named, with its place and what to do."""
    with pytest.raises(CorpusError, match=r"document 'document 1' .* \(U\+D800 at character 4\).*"):
        toy_capture(["fine", "the \ud800"])
