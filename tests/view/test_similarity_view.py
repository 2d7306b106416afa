from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
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
    names = [site["name"] for site in view.data["rows"]]
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


class _Given:
    """What the view reads of a similarity: two sites of this store with three of another."""

    summary: ClassVar[dict[str, Any]] = {
        "name": "given",
        "measure": "svcca",
        "rows": "content",
        "n_rows": 500,
        "n_rows_read": 500,
        "half_width": 0.01,
        "other": {"path": "</script><script>window.hacked = 6</script>"},
    }

    @staticmethod
    def to_arrow() -> pa.Table:
        """Return a pair for each of two and three sites; the value tells which pair it is."""
        pairs = [(a, b) for a in (10, 2) for b in (1, 0, 3)]
        values = np.array([a / 20 + b / 100 for a, b in pairs])
        known = np.array([b != 3 for _, b in pairs])
        return pa.table(
            {
                "site_a": [f"mlp_post.{a}" for a, _ in pairs],
                "site_b": [f"resid_post.{b}" for _, b in pairs],
                "value": values,
                "low": values - 0.01,
                "high": values + 0.01,
                "text_low": np.where(known, values - 0.2, np.nan),
                "text_high": np.where(known, values + 0.2, np.nan),
                "null_mean": np.where(known, values / 10, np.nan),
                "null_p95": np.where(known, values / 5, np.nan),
                "rank_a": pa.array([a + 100 for a, _ in pairs], pa.int32()),
                "rank_b": pa.array([b + 200 for _, b in pairs], pa.int32()),
                "max_channel_share_a": np.full(6, 0.1),
                "max_channel_share_b": np.array([0.21 if b == 1 else 0.2 for _, b in pairs]),
            }
        )


@pytest.mark.browser
def test_a_cell_says_all_that_is_known_of_its_pair(
    browser: Browser, store: CoreStore, tmp_path: Path
) -> None:
    """Both intervals, chance, directions and warnings stand at their own pair, rows by columns."""
    view = similarity_view(store, _Given())  # type: ignore[arg-type]
    assert [site["name"] for site in view.data["rows"]] == ["mlp_post.2", "mlp_post.10"]
    assert [site["layer"] for site in view.data["columns"]] == [0, 1, 3]
    browser.viewport(1280, 800)
    browser.open(view.to_html(tmp_path / "similarity.html"))
    said = browser.evaluate(
        f"[...{ROOT}.querySelectorAll('td[role=gridcell]')].map(n => n.getAttribute('aria-label'))"
    )
    assert len(said) == 6
    assert said[1].replace("\u202f", " ") == (
        "mlp_post.2 and resid_post.1: SVCCA 0.110; 95 % interval, this store: 0.100 to 0.120; "
        "95 % interval, text like this: -0.090 to 0.310; by chance (one side shifted by "
        "documents): 0.011, below 0.022 in 95 %; directions compared: 102 and 201; "
        "⚠ 21% of the variance of resid_post.1 is one channel's"
    )
    assert said[5].replace("\u202f", " ") == (
        "mlp_post.10 and resid_post.3: SVCCA 0.530; 95 % interval, this store: 0.520 to 0.540; "
        "directions compared: 110 and 203"
    )
    warned = browser.evaluate(
        f"[...{ROOT}.querySelectorAll('td[role=gridcell]')].map(n => n.classList.contains('warn'))"
    )
    assert warned == [False, True, False] * 2
    browser.evaluate(f"{ROOT}.querySelector('td[role=gridcell]').focus()")
    for key in ("ArrowRight", "ArrowRight", "ArrowRight", "ArrowDown", "ArrowDown"):
        browser.press(key)
    label = browser.evaluate(f"{ROOT}.activeElement.getAttribute('aria-label')")
    assert label.startswith("mlp_post.10 and resid_post.3")
    assert browser.evaluate("window.hacked") is None
    assert browser.errors == []


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
