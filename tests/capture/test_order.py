"""Shuffled order: every document once, in a random order that is the same every time."""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import actstore
from actstore.capturing import Limits, parts, shuffled
from actstore.capturing.corpus import Document, open_corpus
from actstore.capturing.shuffled import Shuffled
from actstore.errors import ArgumentError, CorpusError, StoreMismatch
from actstore.store import CoreStore
from tests.captured import DOCUMENTS, Captured, stored_bytes
from tests.toys import TEXT

LONG = [f"{number} {TEXT[number : 120 + 9 * number]}" for number in range(24)]
SITES = ["mlp_post.1", "resid_post.2"]


@pytest.fixture
def toy_capture(toy_capture: Callable[..., Captured]) -> Callable[..., Captured]:
    """Return the function that captures with the toy BERT, for two sites."""
    return functools.partial(toy_capture, sites=SITES)


def order_of(n: int, folder: Path) -> list[int]:
    """Return the numbers of n documents in shuffled order."""
    return [int(d.text) for d in Shuffled(open_corpus([str(i) for i in range(n)]), folder)]


def test_documents_come_whole_in_another_order(tmp_path: Path) -> None:
    """Source, text and metadata of each, the empty ones too; nothing twice."""
    documents = [
        {"text": text, "source": f"s{i}", "n": i, "deep": {"a": [1, None, "ü"]}}
        for i, text in enumerate(DOCUMENTS)
    ]
    given = list(open_corpus(documents))
    found = list(Shuffled(open_corpus(documents), tmp_path / "work"))
    assert found != given
    assert sorted(found, key=lambda d: d.source) == given


def test_the_order_is_random_and_always_the_same(tmp_path: Path) -> None:
    """Places do not follow numbers, neighbours part, and nothing but the numbers counts."""
    n = 3000
    order = order_of(n, tmp_path / "a")
    assert sorted(order) == list(range(n))
    assert order == order_of(n, tmp_path / "b")
    # Of a uniform permutation, both have a standard deviation of about 1 / sqrt(n) = 0.018.
    assert abs(np.corrcoef(order, np.arange(n))[0, 1]) < 0.06
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.06
    # As many as chance gives of each tenth of the corpus in each tenth of the order: chi-square
    # of 81 degrees of freedom, 99.9 % below 126.
    counts = np.histogram2d(np.arange(n), order, bins=10)[0]
    assert ((counts - n / 100) ** 2 / (n / 100)).sum() < 126


def test_memory_is_that_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that turn out too large are dealt again and again, and the order is the same."""
    expected = order_of(700, tmp_path / "a")
    monkeypatch.setattr(shuffled, "FILE_BYTES", 1000)
    monkeypatch.setattr(shuffled, "_BUFFER_BYTES", 2000)
    monkeypatch.setattr(shuffled, "_BITS", 2)
    deal, sort, folders, sizes = shuffled._deal, np.lexsort, [], []

    def dealing(rows: Any, folder: Path, bits: int) -> Any:
        folders.append(folder)
        return deal(rows, folder, bits)

    def sorting(keys: Any) -> Any:
        sizes.append(len(keys[0]))
        return sort(keys)

    monkeypatch.setattr(shuffled, "_deal", dealing)
    monkeypatch.setattr(np, "lexsort", sorting)
    assert order_of(700, tmp_path / "b") == expected
    assert max(len(folder.parts) for folder in folders) >= len((tmp_path / "b").parts) + 3
    assert max(sizes) <= 3, "three such documents reach the limit"
    left = [path.name for path in (tmp_path / "b").iterdir()]
    assert sorted(left) == ["00.arrow", "01.arrow", "02.arrow", "03.arrow", "files.json"]


def test_one_document_larger_than_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It cannot be dealt any further, and comes as it is."""
    monkeypatch.setattr(shuffled, "FILE_BYTES", 1000)
    texts = ["a" * 10_000, "b", "c"]
    found = [d.text for d in Shuffled(open_corpus(texts), tmp_path / "work")]
    assert sorted(found) == texts


def test_a_capture_takes_the_documents_in_that_order(
    toy_capture: Callable[..., Captured], tmp_path: Path
) -> None:
    """The store is that of the documents given so; what they were dealt to is gone."""
    store = toy_capture(LONG, order="shuffled").store
    order = order_of(len(LONG), tmp_path / "work")
    assert [store.document(i)["source"] for i in range(24)] == [f"document {i}" for i in order]
    given = [{"text": LONG[i], "source": f"document {i}"} for i in order]
    found, expected = stored_bytes(store), stored_bytes(toy_capture(given, "given").store)
    assert [name for name in expected if found[name] != expected[name]] == ["plan/00000.json"]
    assert store.parts[0].corpus["order"] == "shuffled"
    assert store.parts[0].corpus["seed"] == shuffled.SEED
    assert not (store.path / "work/shuffled").exists()
    assert toy_capture(LONG, order="shuffled").windows_fed == 0


class Counted:
    """A dataset that counts how many documents were taken from it."""

    _fingerprint = "f00"

    def __init__(self) -> None:
        self.taken = 0

    def __iter__(self) -> Iterator[str]:
        for text in LONG:
            self.taken += 1
            yield text


def test_a_stopped_capture_goes_on_in_the_same_order(
    toy_capture: Callable[..., Captured], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without reading the corpus again, once all of it was dealt."""
    monkeypatch.setattr(parts, "PART_ROWS", 150)
    whole = toy_capture(Counted(), "whole", order="shuffled").store
    publish = CoreStore.publish_part

    def fail(store: CoreStore, part: Any) -> None:
        if part.part == 3:
            raise RuntimeError("stopped")
        publish(store, part)

    with monkeypatch.context() as patch:
        patch.setattr(CoreStore, "publish_part", fail)
        with pytest.raises(RuntimeError, match="stopped"):
            toy_capture(Counted(), order="shuffled")
    store = CoreStore(whole.path.with_name("store"))
    assert len(store.parts) == 3
    assert store.committed == tuple(store.planned)
    assert (store.path / "work/shuffled/files.json").exists()
    corpus = Counted()
    finished = toy_capture(corpus, order="shuffled").store
    assert corpus.taken < len(LONG), "only what tells it from others"
    assert stored_bytes(finished) == stored_bytes(whole)
    assert not (store.path / "work/shuffled").exists()


@pytest.mark.parametrize("damage", ["missing", "torn", "other"])
def test_documents_not_all_dealt_are_dealt_again(damage: str, tmp_path: Path) -> None:
    """Without a whole list of this corpus' files, what lies there is not used."""
    expected = order_of(50, tmp_path / "work")
    contents = tmp_path / "work/files.json"
    if damage == "missing":
        contents.unlink()
    elif damage == "torn":
        contents.write_bytes(contents.read_bytes()[:-20])
    else:
        order_of(51, tmp_path / "work")
    (tmp_path / "work/07.arrow").write_bytes(b"")
    assert order_of(50, tmp_path / "work") == expected


def test_a_limit_takes_a_sample(toy_capture: Callable[..., Captured]) -> None:
    """With max_tokens documents come from all over the corpus, not from its beginning."""
    store = toy_capture(LONG, order="shuffled", limits=Limits(max_tokens=200)).store
    numbers = [int(store.document(i)["text"].split()[0]) for i in range(store.n_documents)]
    assert len(numbers) > 3
    assert numbers != sorted(numbers)
    assert max(numbers) > 12
    assert not (store.path / "work/shuffled").exists()


def test_an_order_is_part_of_the_plan(toy_capture: Callable[..., Captured]) -> None:
    """A store goes on in its own order only; another can be added."""
    toy_capture()
    with pytest.raises(StoreMismatch, match='order was null, now it is "shuffled"'):
        toy_capture(order="shuffled")
    store = toy_capture(order="shuffled", add=True).store
    texts = [store.document(len(DOCUMENTS) + i)["text"] for i in range(len(DOCUMENTS))]
    assert sorted(texts) == sorted(DOCUMENTS)
    assert texts != DOCUMENTS


def test_what_cannot_be_written_is_named(tmp_path: Path) -> None:
    """The same errors as in the order of the corpus."""
    with pytest.raises(CorpusError, match=r"document 'document 1' .* \(U\+D800 at character 4\)"):
        list(Shuffled(open_corpus(["fine", "the \ud800"]), tmp_path / "a"))
    with pytest.raises(CorpusError, match="metadata of document 'document 0' cannot be written"):
        list(Shuffled(open_corpus([{"text": "a", "b": {(1,): 2}}]), tmp_path / "b"))
    odd = open_corpus([{"text": "a", "source": "caf\udce9", "b": float("nan"), "c": "\udce9"}])
    (found,) = Shuffled(odd, tmp_path / "c")
    assert (found.source, found.metadata["c"]) == ("caf?", "?")
    assert json.loads(found.metadata_json())["b"] != found.metadata["b"]  # NaN


def test_an_order_that_is_none_is_refused_before_the_model_loads() -> None:
    """The order is one of two words."""
    with pytest.raises(ArgumentError, match="order = 'random' is not one of corpus, shuffled"):
        actstore.capture("no/such/model", text="x", order="random")


def test_texts_of_any_characters_survive(tmp_path: Path) -> None:
    """What a text holds does not matter to the files it goes through."""
    letters = random.Random(0)
    texts = ["".join(chr(letters.randrange(1, 0xD800)) for _ in range(50)) for _ in range(20)]
    found = Shuffled(open_corpus([Document("", t).text for t in texts]), tmp_path / "work")
    assert sorted(d.text for d in found) == sorted(texts)
