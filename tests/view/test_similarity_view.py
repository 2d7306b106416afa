from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from actstore.decompose import Similarity, similarity
from actstore.store import CoreStore
from actstore.view import similarity_view
from tests.browser import Browser
from tests.synthetic import synthetic_store

ROOT = "document.querySelector('[data-actstore-view]').shadowRoot"


def test_sites_are_ordered_by_hook_point_and_integer_layer(
    store: CoreStore, alike: Similarity
) -> None:
    """Layer 10 comes after layer 1, and hook points stand together."""
    view = similarity_view(store, alike)
    names = [site["name"] for site in view.data["sites"]]
    assert names == ["mlp_post.0", "mlp_post.1", "mlp_post.10", "resid_post.1"]


def test_cells_hold_the_values_of_the_result(store: CoreStore, alike: Similarity) -> None:
    """Every pair's value and interval is the result's, in both directions."""
    cells = similarity_view(store, alike).data["cells"]
    for i, a in enumerate(alike.sites):
        for j, b in enumerate(alike.sites):
            cell = cells[i][j]
            assert cell["value"] == pytest.approx(alike.matrix[i, j], abs=1e-5), (a, b)
            ends = (alike.low[i, j], alike.high[i, j])
            assert cell["store"] == pytest.approx(ends, abs=1e-5)


def test_a_pair_without_a_value_and_a_site_of_one_channel_say_so(tmp_path: Path) -> None:
    """A constant site has no value, and a site that is one channel's is pointed out."""
    rng = np.random.default_rng(0)
    loud = rng.random((300, 8))
    loud[:, 3] *= 100
    store = synthetic_store(
        tmp_path / "s",
        {
            "mlp_post.0": rng.random((300, 8)),
            "mlp_post.1": np.ones((300, 8)),
            "resid_post.0": loud,
        },
    )
    view = similarity_view(store, similarity(store, None, batch_rows=8))
    cells = view.data["cells"]
    assert cells[0][1]["value"] is None
    assert cells[0][2]["note"] == "100% of the variance of resid_post.0 is one channel's"
    assert cells[0][0]["note"] == ""
    assert ["mlp_post.1", "", "", ""] in view.table.rows


@pytest.mark.browser
@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("dark", [False, True])
def test_a_cell_says_its_value_to_the_mouse_and_to_the_keyboard(
    browser: Browser, store: CoreStore, alike: Similarity, tmp_path: Path, width: int, dark: bool
) -> None:
    """Pointing at a cell, or going there by arrow keys, shows its value and interval."""
    view = similarity_view(store, alike)
    browser.viewport(width, 800, dark=dark)
    path = view.to_html(tmp_path / "similarity.html")
    browser.open(path)
    cell = f"{ROOT}.querySelectorAll('td[role=gridcell]')"
    x, y = browser.evaluate(
        f"(r => [r.x + r.width / 2, r.y + r.height / 2])({cell}[1].getBoundingClientRect())"
    )
    browser.move(x, y)
    tip = browser.evaluate(f"{ROOT}.querySelector('.tip').textContent")
    value = view.data["cells"][0][1]["value"]
    assert "mlp_post.0 and mlp_post.1" in tip
    assert f"CKA {value:.3f}" in tip
    assert "interval" in tip
    browser.evaluate(f"{cell}[0].focus()")
    browser.press("ArrowDown")
    browser.press("ArrowRight")
    label = browser.evaluate(f"{ROOT}.activeElement.getAttribute('aria-label')")
    assert label.startswith("mlp_post.1 and mlp_post.1: CKA 1.000")
    assert browser.evaluate(f"{ROOT}.querySelectorAll('thead th, tbody th').length") > 4
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate("window.hacked") is None
    assert browser.errors == []
    assert browser.requests == [path.as_uri()]
