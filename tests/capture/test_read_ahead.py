"""Planning beside the capture: one part ahead, the same plan, and errors that lose no work."""

from __future__ import annotations

import functools
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from actstore.capturing import Limits, Settings, parts, run_capture
from actstore.capturing.corpus import open_corpus
from actstore.capturing.plan import make_plan
from actstore.capturing.run import open_or_create
from actstore.errors import CorpusError
from actstore.models import LanguageModel, load
from actstore.store import CoreStore
from tests.captured import DOCUMENTS, Captured, capture, small_segments, stored_bytes
from tests.toys import TEXT, toy_model

LONG = [f"{number} {TEXT[number : 120 + 9 * number]}" for number in range(24)]
"""Documents for several parts of a few segments each."""

OPTIONS: dict[str, Any] = {
    "sites": ["mlp_post.1", "resid_post.2"],
    "batch_tokens": 96,
    "dtype": "float16",  # no probe runs the model
}


@pytest.fixture(autouse=True, scope="module")
def _small_parts() -> Iterator[None]:
    with mock.patch.multiple(parts, PART_ROWS=300, FIRST_PART_ROWS=100):
        yield


@pytest.fixture(scope="module")
def whole(toy_bert: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> CoreStore:
    """Return a store captured without a hitch."""
    store = capture(toy_bert, LONG, tmp_path_factory.mktemp("whole") / "store", **OPTIONS).store
    assert len(store.parts) > 4
    return store


@pytest.fixture
def toy_capture(toy_capture: Callable[..., Captured]) -> Callable[..., Captured]:
    """Return the function that captures with the toy BERT, for two sites."""
    return functools.partial(toy_capture, **OPTIONS)


@contextmanager
def at_every_batch(model: LanguageModel, do: Callable[[], Any]) -> Iterator[None]:
    """Do something whenever windows go through the model."""
    forward = model.forward

    def doing(*args: Any) -> None:
        do()
        forward(*args)

    with mock.patch.object(model, "forward", doing):
        yield


def threads() -> list[str]:
    """Return the names of our threads that are running."""
    return [t.name for t in threading.enumerate() if t.name.startswith("actstore")]


def test_the_first_parts_are_small(whole: CoreStore) -> None:
    """Each part may be twice as large as the one before, up to a limit."""
    sizes = [sum(s.rows[""] for s in part.segments) for part in whole.parts]
    for size, wanted in zip(
        sizes[:-1], [100, 200, *itertools.repeat(300, len(sizes))], strict=False
    ):
        assert wanted / 2 < size < wanted + 100
    assert max(sizes[:-1]) > 200


def test_the_model_runs_while_the_corpus_is_read(
    toy_bert: LanguageModel, whole: CoreStore, tmp_path: Path
) -> None:
    """The end of the corpus comes only after the model has begun, and the store is the same."""
    begun = threading.Event()

    class Waiting:
        def __iter__(self) -> Iterator[str]:
            yield from LONG[:20]
            assert begun.wait(60), "the model waits for the whole plan"
            yield from LONG[20:]

    with at_every_batch(toy_bert, begun.set):
        store = capture(toy_bert, Waiting(), tmp_path / "store", **OPTIONS).store
    found, expected = stored_bytes(store), stored_bytes(whole)
    for name in expected:  # parts name the corpus they are of
        assert found[name] == expected[name] or name.endswith(".json"), name


def test_the_plan_is_one_part_ahead(toy_bert: LanguageModel, tmp_path: Path) -> None:
    """However slow the model, no more than the part after the one it is at is planned."""
    ahead = []

    def look() -> None:
        time.sleep(0.02)
        store = CoreStore(tmp_path / "store")
        at = next(s.part for n, s in store.planned.items() if n not in store.committed)
        ahead.append(len(store.parts) - 1 - at)

    with at_every_batch(toy_bert, look):
        store = capture(toy_bert, LONG, tmp_path / "store", **OPTIONS).store
    assert len(store.parts) > 4
    # The part before it may have a segment on its way to the disk.
    assert 1 in ahead
    assert max(ahead) <= 2
    assert threads() == []


def test_the_plan_does_not_depend_on_time(
    toy_bert: LanguageModel, whole: CoreStore, tmp_path: Path
) -> None:
    """Made beside a capture or alone, it is the same bytes."""
    settings = Settings(context=24, **OPTIONS)
    corpus = open_corpus(LONG)
    with small_segments():
        store = open_or_create(tmp_path / "store", toy_bert, corpus, settings, 1 << 30)
        make_plan(store, toy_bert, corpus, Limits())
    expected = stored_bytes(whole)
    for name, data in stored_bytes(store).items():
        if not name.startswith("activations/"):
            assert data == expected[name], name


class Streaming:
    """A streaming dataset whose connection breaks off, once."""

    _fingerprint = "f00"

    def __init__(self, breaks_at: int) -> None:
        self.breaks_at = breaks_at

    def __iter__(self) -> Iterator[dict[str, str]]:
        for number, text in enumerate(LONG):
            if number == self.breaks_at:
                self.breaks_at = -1
                raise ConnectionError("the stream broke off")
            yield {"text": text, "source": f"document {number}"}


def test_a_stream_that_breaks_off_is_gone_on_with(
    toy_capture: Callable[..., Captured], toy_bert: LanguageModel
) -> None:
    """What was planned until then is captured before the error, and the rest when run again."""
    expected = stored_bytes(toy_capture(Streaming(-1), "whole").store)
    corpus = Streaming(len(LONG) - 2)
    with pytest.raises(ConnectionError, match="the stream broke off"):
        toy_capture(corpus)
    store = CoreStore(toy_capture(corpus, "whole").store.path.with_name("store"))
    assert len(store.parts) > 2
    assert not store.plan_complete
    assert store.committed == tuple(store.planned)
    assert threads() == []
    finished = toy_capture(corpus)
    assert finished.windows_fed < toy_capture(LONG, "again").windows_fed / 2
    assert stored_bytes(finished.store) == expected


def test_the_remedy_for_bad_bytes_goes_on(
    toy_capture: Callable[..., Captured], tmp_path: Path
) -> None:
    """A line that does not decode, found with segments captured, is replaced in the same store."""
    path = tmp_path / "speech.jsonl"
    path.write_bytes(b"".join(b'{"text": "%s"}\n' % t.encode() for t in [*LONG, "caf\udce9"[:3]]))
    path.write_bytes(path.read_bytes().replace(b'"caf"', b'"caf\xe9"'))
    with pytest.raises(CorpusError, match=r"errors='replace'"):
        toy_capture(path)
    # A file left open would write its end into that of the next attempt.
    assert not list((tmp_path / "store").rglob("*.partial"))
    before = stored_bytes(CoreStore(tmp_path / "store"))
    store = toy_capture(path, errors="replace").store
    assert store.document(len(LONG))["text"] == "caf\ufffd"
    found = stored_bytes(store)
    rows = [name for name in before if name.startswith(("tokens/", "plan/"))]
    assert len(rows) > 6
    assert all(found[name] == before[name] for name in rows)


def test_progress_knows_the_end_when_the_plan_is_through(
    toy_capture: Callable[..., Captured],
) -> None:
    """Totals are 0 until then; nobody is told two things at once."""
    told: list[tuple[str, int, int]] = []
    inside = threading.Lock()

    def progress(*what: Any) -> None:
        assert inside.acquire(blocking=False), "two at once"
        time.sleep(0.001)
        told.append(what)
        inside.release()

    store = toy_capture(LONG, progress=progress).store
    totals = [total for stage, _, total in told if stage == "capture"]
    assert totals[-1] == store.n_rows()
    assert set(totals) <= {0, store.n_rows()}
    assert totals == sorted(totals)
    dones = [done for stage, done, _ in told if stage == "capture"]
    assert dones == sorted(dones)
    assert dones[-1] == store.n_rows()
    planned = [what[1:] for what in told if what[0] == "plan"]
    assert planned == [*((n + 1, 0) for n in range(len(LONG))), (len(LONG), len(LONG))]


def test_when_the_capture_stops_planning_stops(
    toy_capture: Callable[..., Captured], whole: CoreStore
) -> None:
    """Ctrl-C leaves no thread and no lock behind; the same capture goes on."""

    def interrupt(stage: str, done: int, total: int) -> None:
        if stage == "capture" and done > 150:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        toy_capture(LONG, progress=interrupt)
    assert threads() == []
    assert stored_bytes(toy_capture(LONG).store) == stored_bytes(whole)


def test_several_captures_share_plan_and_work(whole: CoreStore, tmp_path: Path) -> None:
    """One plans while all capture; what they leave is the same bytes."""
    settings = Settings(context=24, **OPTIONS)

    def go(model: LanguageModel) -> CoreStore:
        return run_capture(model, LONG, tmp_path / "store", settings=settings)[0]

    models = [load(*toy_model("bert")) for _ in range(3)]
    with small_segments(), ThreadPoolExecutor(3) as pool:
        open_or_create(tmp_path / "store", models[0], open_corpus(LONG), settings, 1 << 30)
        stores = list(pool.map(go, models))
    for store in stores:
        assert store.committed == whole.committed
    assert stored_bytes(stores[0]) == stored_bytes(whole)
    assert threads() == []


def test_documents_without_tokens_end_a_part_too(toy_capture: Callable[..., Captured]) -> None:
    """A long run of empty documents is not gathered in memory."""
    store = toy_capture([*DOCUMENTS, *[""] * 700, "war"]).store
    assert store.n_documents == len(DOCUMENTS) + 701
    assert max(part.n_documents for part in store.parts) <= 300
