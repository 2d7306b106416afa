"""The overview of a store."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import actstore
from actstore.view import overview
from tests.browser import Browser
from tests.captured import content
from tests.synthetic import synthetic_store

ROOT = "document.querySelector('[data-actstore-view]').shadowRoot"


def test_it_says_what_is_in_the_store(hostile_store: actstore.Store) -> None:
    """Counts, bytes and results are those of the store; strengths are NumPy's."""
    data = hostile_store.view().data
    corpus = dict(data["corpus"])
    assert corpus["documents"] == str(hostile_store.n_documents)
    assert corpus["rows"].startswith(f"{hostile_store.n_rows():,} of ")
    assert data["warnings"] == []
    assert data["done"] == 1
    assert [(r["kind"], r["name"]) for r in data["results"]] == [("nmf", "words")]
    assert data["results"][0]["code"] == 'store.factors("words").view()'
    layers = {layer[0]: layer[1:] for group in data["sites"] for layer in group["layers"]}
    assert set(layers) == {str(site) for site in hostile_store.sites}
    for site, (rms, silent) in layers.items():
        values = content(hostile_store, site)[1].astype(np.float64)
        assert rms == pytest.approx(np.sqrt((values**2).mean()), rel=1e-3)
        assert silent == (values.max(0) <= 0).sum()
    assert hostile_store._repr_html_() == hostile_store.view().html


def test_a_store_that_is_not_finished_says_so(tmp_path: Path) -> None:
    """Segments that are missing and an index that is behind are pointed out with the remedy."""
    values = {"mlp_post.0": np.random.default_rng(0).random((600, 16))}
    store = synthetic_store(tmp_path / "s", values, segment_rows=256, documents=[600], commit=[0])
    data = overview(store).data
    assert data["done"] < 1
    assert "the same capture command goes on" in data["warnings"][0]
    assert "store.finish()" in data["warnings"][1]
    assert data["sites"][0]["layers"] == [["mlp_post.0", None, None]]


def test_every_result_says_how_to_open_it(small_store: actstore.Store) -> None:
    """The line of Python beside a result opens just that one, of whatever kind."""
    small_store.pca("mlp_post.1", 1)
    small_store.ica("mlp_post.1", 1)
    small_store.factors().stability(seeds=2, nulls=1, name="again")
    lines = {r["kind"]: r for r in small_store.view().data["results"]}
    assert set(lines) == {"nmf", "pca", "ica", "similarity", "stability"}
    for result in lines.values():
        call = result["code"].rsplit(".", 1)[0]
        opened = eval(call, {"store": small_store})
        assert (opened.result.kind, opened.name) == (result["kind"], result["name"])
        assert eval(result["code"], {"store": small_store}) is not None
    assert lines["stability"]["code"] == 'store.stability_result("again").df()'
    assert lines["pca"]["what"].startswith("1 factor")
    assert not lines["pca"]["what"].startswith("1 factors")


@pytest.mark.browser
@pytest.mark.parametrize("width", [1280, 400])
def test_the_page_opens_and_hostile_text_stays_text(
    browser: Browser, hostile_store: actstore.Store, tmp_path: Path, width: int
) -> None:
    """No request, no error, nothing too wide, and no script but the page's own."""
    path = hostile_store.to_html(tmp_path / "overview.html")
    browser.viewport(width, 850, dark=width == 400)
    browser.open(path)
    assert browser.requests == [path.as_uri()]
    assert browser.errors == []
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    said = browser.evaluate(f"{ROOT}.querySelector('.view').textContent")
    assert "</script><script>window.hacked" in said
    assert "mlp_post.0" in said
    assert browser.evaluate("window.hacked") is None
    assert browser.evaluate(f"{ROOT}.querySelectorAll('script, img').length") == 0
