"""The estimate: what a capture would take, counted before it, with nothing written."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actstore.capturing import Limits, Settings, parts, run_capture, run_estimate
from actstore.capturing.corpus import open_corpus
from actstore.capturing.estimate import _PeakMemory, _Segments
from actstore.capturing.plan import cut_corpus
from actstore.capturing.run import new_meta
from actstore.errors import CorpusError, SiteNotFound, StoreNotFound
from actstore.models import LanguageModel
from actstore.store import SegmentWriter
from tests.captured import DOCUMENTS, capture, small_segments
from tests.toys import TEXT


@pytest.mark.parametrize(
    "limits", [Limits(), Limits(max_tokens=200), Limits(max_document_tokens=30)]
)
def test_rows_and_bytes_are_those_of_the_capture(
    limits: Limits, toy_bert: LanguageModel, tmp_path: Path
) -> None:
    """Documents, rows, segments and the bytes of each site, to the byte."""
    settings = Settings(context=24, overlap=3, limits=limits)
    with small_segments():
        found = run_estimate(toy_bert, DOCUMENTS, tmp_path / "store", settings=settings)
    assert not (tmp_path / "store").exists()
    store = capture(
        toy_bert, DOCUMENTS, tmp_path / "store", context=24, overlap=3, limits=limits
    ).store
    assert (found.n_documents, found.rows) == (store.n_documents, store.n_rows())
    assert found.segments == len(store.planned)
    for info in store.meta.sites:
        shards = (store.path / info.path).glob("c/*/0")
        assert found.site_bytes[str(info.site)] == sum(p.stat().st_size for p in shards)
    assert found.total_bytes == sum(found.site_bytes.values())
    assert found.seconds > 0
    assert found.memory_bytes > 0
    assert found.free_bytes > 0
    assert found.bottleneck in ("compute", "disk", "tokenise")


@pytest.mark.parametrize("keep", ["1/2", "1/64", "none", {"mlp_post": "1/4", "resid_post": 0}])
def test_bytes_are_those_of_what_is_kept(
    keep: Any, toy_bert: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a sample to the byte; and small parts of the plan end segments as they do in a capture."""
    monkeypatch.setattr(parts, "FIRST_PART_ROWS", 100)
    with small_segments():
        found = run_estimate(
            toy_bert, DOCUMENTS, tmp_path / "store", settings=Settings(context=24, keep=keep)
        )
    store = capture(toy_bert, DOCUMENTS, tmp_path / "store", context=24, keep=keep).store
    assert len(store.parts) > 1
    assert (found.segments, found.keep) == (len(store.planned), store.meta.keep)
    for info in store.meta.sites:
        shards = (store.path / info.path).glob("c/*/0")
        assert found.site_bytes[str(info.site)] == sum(p.stat().st_size for p in shards)
    assert found.total_bytes == store.n_bytes()
    names = ("index", "tokens", "documents", "plan")
    beside = sum(f.stat().st_size for n in names for f in (store.path / n).rglob("*.*"))
    assert 0.5 < found.other_bytes / beside < 1.5


def test_positions_are_those_that_the_model_will_see(
    toy_bert: LanguageModel, tmp_path: Path
) -> None:
    """Padding is counted before the capture as it will be."""
    with small_segments():
        store, timing = run_capture(
            toy_bert, DOCUMENTS, tmp_path, settings=Settings(context=24, batch_tokens=60)
        )
    segments = _Segments(store.meta)
    for cut in cut_corpus(open_corpus(DOCUMENTS), toy_bert, store.meta, Limits()):
        segments.add_document(cut.windows)
    segments.close()
    assert timing.n_padding > 0
    assert segments.positions == timing.n_positions
    assert segments.rows == [s.rows[""] for s in store.planned.values()]
    assert sum(segments.content) == store.rows().n_rows


@pytest.mark.parametrize("slow", ["compute", "disk", "tokenise"])
def test_the_slowest_stage_is_the_bottleneck(
    slow: str, toy_bert: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a stage is made slow, it is the one that is named, and its time is in the sum."""
    owner, name = {
        "compute": (LanguageModel, "forward"),
        "disk": (SegmentWriter, "write_band"),
        "tokenise": (LanguageModel, "encode"),
    }[slow]
    function = getattr(owner, name)

    def slowed(*args: Any) -> Any:
        time.sleep(0.1)
        return function(*args)

    monkeypatch.setattr(owner, name, slowed)
    monkeypatch.setattr(os, "fsync", lambda _: None)  # of a busy disk it takes as long
    with small_segments():
        found = run_estimate(
            toy_bert, [TEXT] * 30, settings=Settings(context=24, sites="mlp_post.0")
        )
    assert found.bottleneck == slow
    assert found.seconds > 0.05 * (30 if slow == "tokenise" else found.segments)
    assert f"bottleneck: {slow}" in str(found)


def test_memory_is_what_was_measured(toy_bert: LanguageModel) -> None:
    """What grows for a moment is seen, though it is gone at the end."""
    with _PeakMemory() as memory:
        block = np.ones(2**26, np.uint8)
        time.sleep(0.2)
        del block
    assert 2**26 <= memory.grown + 2**22 < 2**27
    with small_segments():
        found = run_estimate(toy_bert, DOCUMENTS, settings=Settings(context=24))
    assert found.memory_bytes >= 2 * 16 * sum(info.row_bytes for info in _infos(toy_bert))


def _infos(model: LanguageModel) -> Any:
    return new_meta(model, open_corpus(DOCUMENTS), Settings(context=24), 2**30).sites


def test_an_iterator_can_be_estimated(toy_bert: LanguageModel) -> None:
    """A corpus that can be read once is read once."""
    with small_segments():
        found = run_estimate(toy_bert, iter(DOCUMENTS), settings=Settings(context=24))
    assert found.n_documents == len(DOCUMENTS)


def test_what_capture_refuses_the_estimate_refuses(toy_bert: LanguageModel, tmp_path: Path) -> None:
    """The same errors, before any work."""
    with pytest.raises(CorpusError, match="the corpus holds no token; give one with text in it"):
        run_estimate(toy_bert, ["", " "], settings=Settings(context=24))
    with pytest.raises(SiteNotFound, match="mlp_pots"):
        run_estimate(toy_bert, DOCUMENTS, settings=Settings(sites="mlp_pots"))
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(StoreNotFound, match="without a store"):
        run_estimate(toy_bert, DOCUMENTS, tmp_path)
