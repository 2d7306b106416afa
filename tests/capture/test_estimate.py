"""The estimate: what a capture would take, counted before it, with nothing written."""

from __future__ import annotations

from pathlib import Path

import pytest

from actstore.capturing import Limits, Settings, run_estimate
from actstore.errors import CorpusError, SiteNotFound, StoreNotFound
from actstore.models import LanguageModel
from tests.captured import DOCUMENTS, capture, small_segments


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
    assert found.bottleneck in ("compute", "disk")


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
