from __future__ import annotations

from pathlib import Path

import nbformat

from actstore.decompose import Factors as PlainFactors
from actstore.decompose import Similarity as PlainSimilarity
from actstore.store import CoreStore
from actstore.view import Factors, Similarity


def test_results_reopen_with_their_views(
    store: CoreStore,
    factors: PlainFactors,
    alike: PlainSimilarity,
    tmp_path: Path,
) -> None:
    """Opened by name, factors and similarity draw, save as a page and compute nothing."""
    reopened = Factors.open(store, factors.name)
    assert len(reopened.view(document=1).data["documents"]) == 1
    assert len(reopened.view(max_documents=2).data["documents"]) == 2
    assert reopened.to_html(tmp_path / "factors.html").stat().st_size > 10_000
    pairs = Similarity.open(store, alike.name)
    assert pairs.view().data["cells"][0][0]["value"] == 1
    assert pairs.to_html(tmp_path / "similarity.html").stat().st_size > 10_000


def test_the_notebook_of_a_similarity_shows_its_view(
    store: CoreStore, alike: PlainSimilarity
) -> None:
    """The notebook, run in a fresh kernel, keeps the heat map and the table."""
    target = store.path.parent / "similarity.ipynb"
    path = Similarity.open(store, alike.name).to_notebook(target)
    notebook = nbformat.read(path, as_version=4)
    pages = [o.data.get("text/html", "") for c in notebook.cells for o in c.get("outputs", [])]
    assert "data-actstore-view" in pages[1]
    assert "resid_post.1" in pages[2]
