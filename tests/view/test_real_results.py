"""Similarities and signed factors as they are computed, drawn: both intervals, order, signs."""

from __future__ import annotations

import base64
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import actstore
from actstore.view import Similarity, View
from tests.browser import Browser
from tests.toys import TEXT, toy_model

ROOT = "document.querySelector('[data-actstore-view]').shadowRoot"
CELLS = f"[...{ROOT}.querySelectorAll('td[role=gridcell]')]"
N_DOCUMENTS = 24


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> tuple[actstore.Store, actstore.Store]:
    """Two stores of the same 24 documents, of models of other depth and seed."""
    words = TEXT.split()
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.permutation(words)[:60]) for _ in range(N_DOCUMENTS)]
    made = []
    for name, options in (("a", {}), ("b", {"n_layers": 2, "seed": 3})):
        module, tokenizer = toy_model("gpt2", **options)
        path = tmp_path_factory.mktemp("real") / name
        made.append(actstore.capture(module, texts, path, tokenizer=tokenizer, context=128))
    return made[0], made[1]


@pytest.fixture(scope="module")
def results(stores: tuple[actstore.Store, actstore.Store]) -> dict[str, Similarity]:
    """CKA with both intervals, PWCCA, and CKA and PWCCA with another store."""
    store, other = stores
    sites = ["mlp_post.1", "mlp_post.2", "resid_post.0", "resid_post.2"]
    return {
        "cka": store.similarity(sites),
        "pwcca": store.similarity(sites, measure="pwcca"),
        "cka of two": store.similarity("resid_post", method="exact", other=other),
        "pwcca of two": store.similarity("resid_post", measure="pwcca", other=other),
    }


@pytest.mark.browser
@pytest.mark.parametrize("name", ["cka", "pwcca", "cka of two", "pwcca of two"])
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (400, True)])
def test_every_cell_says_what_its_own_pair_is(
    browser: Browser,
    results: dict[str, Similarity],
    tmp_path: Path,
    name: str,
    width: int,
    dark: bool,
) -> None:
    """Rows are the first site of a pair, so that a measure that has a direction keeps it."""
    similarity = results[name]
    pairs = {(row["site_a"], row["site_b"]): row for row in similarity.to_arrow().to_pylist()}
    view = similarity.view()
    rows, columns = ([site["name"] for site in view.data[of]] for of in ("rows", "columns"))
    assert {(a, b) for a in rows for b in columns} == set(pairs)
    browser.viewport(width, 800, dark=dark)
    browser.open(view.to_html(tmp_path / "similarity.html"))
    said = browser.evaluate(f"{CELLS}.map(n => n.getAttribute('aria-label'))")
    labels = dict(zip([(a, b) for a in rows for b in columns], said, strict=True))
    for pair, label in labels.items():
        row, words = pairs[pair], label.replace("\u202f", " ")
        assert words.startswith(f"{pair[0]} and {pair[1]}: {name[:5].split()[0].upper()} ")
        assert f" {row['value']:.3f}" in words
        for kind, low, high in (
            ("this store", row["low"], row["high"]),
            ("text like this", row["text_low"], row["text_high"]),
        ):
            known = math.isfinite(low) and math.isfinite(high)
            exact = kind == "this store" and round(low, 5) == round(high, 5)
            if known and not exact:
                assert f"{kind}: {low:.3f} to {high:.3f}" in words
            else:
                assert f"interval, {kind}" not in words
                assert exact == ("exact for the rows of this store" in words) or not known
        chance = row["null_mean"]
        known = chance is not None and math.isfinite(chance)
        assert known == ("by chance" in words)
        if known:
            assert f"by chance (one side shifted by documents): {chance:.3f}" in words
        if "pwcca" in name:
            assert row["weighing_site"] == pair[0]
            assert f"weighed by the directions of {pair[0]}" in words
        warned = [row[f"max_channel_share_{side}"] > 0.2 for side in "ab"]
        assert any(warned) == ("⚠" in words)
    marks = browser.evaluate(f"{CELLS}.map(n => n.classList.contains('warn'))")
    assert marks == ["⚠" in label for label in said]
    middle = "(r => [r.x + r.width / 2, r.y + r.height / 2])"
    browser.move(*browser.evaluate(f"{middle}({CELLS}[1].getBoundingClientRect())"))
    tip = browser.evaluate(f"{ROOT}.querySelector('.tip').textContent")
    assert f"{pairs[rows[0], columns[1]]['value']:.3f}" in tip
    box = f"{ROOT}.querySelector('.tip').getBoundingClientRect()"
    left, right = browser.evaluate(f"(r => [r.left, r.right])({box})")
    assert 0 <= left < right <= width
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.errors == []


def test_the_results_have_what_is_to_be_drawn(results: dict[str, Similarity]) -> None:
    """Both intervals and the null are there, PWCCA has a direction, two stores are not square."""
    cka = results["cka"].to_arrow().to_pandas()
    assert np.isfinite(cka[["low", "high", "text_low", "text_high"]].to_numpy()).all()
    pwcca = results["pwcca"].to_arrow().to_pandas().pivot(index="site_a", columns="site_b")
    assert np.abs(pwcca["value"] - pwcca["value"].T).to_numpy().max() > 1e-3
    assert any(
        np.isfinite(results[n].to_arrow().to_pandas()["null_mean"].astype(float)).any()
        for n in results
    )
    assert (results["cka"].to_arrow().to_pandas()["max_channel_share_a"] > 0.0).all()
    view = results["pwcca of two"].view()
    assert [len(view.data[of]) for of in ("rows", "columns")] == [3, 2]
    assert view.title == "PWCCA between 3 sites of toy-gpt2 and 2 of toy-gpt2"
    assert view.data["reading"].startswith("Rows are sites of toy-gpt2 (this store), columns")
    assert ["widest 95 % interval, this store", "none: exact"] in view.data["facts"]
    assert results["cka"].view().data["reading"] == ""


def _decoded(view: View, document: int) -> np.ndarray:
    entry: dict[str, Any] = view.data["documents"][document]
    codes = np.frombuffer(base64.b64decode(entry["scores"]), np.uint8)
    codes = codes.reshape(len(view.data["factors"]), -1).T.astype(np.float64)
    largest = np.array([factor["max"] for factor in view.data["factors"]])
    roots = (codes - 128) / 127 if view.data["signed"] else (codes - 1) / 254
    return np.where(codes == 0, np.nan, largest * roots * np.abs(roots))


@pytest.mark.browser
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (400, True)])
def test_signed_factors_are_drawn_with_the_signs_they_have(
    browser: Browser,
    stores: tuple[actstore.Store, actstore.Store],
    tmp_path: Path,
    width: int,
    dark: bool,
) -> None:
    """Loadings below zero show as such; scores, which are sparse and above zero, have one side."""
    store, _ = stores
    named = [result.name for result in store.results("nmf")]
    if "signed" not in named:
        store.nmf("resid_post", 3, signed=True, active=0.3, name="signed")
    factors = store.factors("signed")
    assert factors.loadings.min() < 0
    view = factors.view(document=[0, 5])
    for number, entry in enumerate(view.data["documents"]):
        ids = np.array([first + i for first, count in entry["rows"] for i in range(count)])
        true, seen = factors.scores(ids), _decoded(view, number)
        assert (np.isnan(true) == np.isnan(seen)).all()
        largest = np.array([factor["max"] for factor in view.data["factors"]])
        assert np.nanmax(np.abs(np.sqrt(true / largest) - np.sqrt(seen / largest))) <= 0.51 / 254
    assert view.data["signed"] == bool(np.nanmin(factors.scores_of_segment(0)) < 0)
    browser.viewport(width, 900, dark=dark)
    browser.open(view.to_html(tmp_path / "factors.html"))
    low = min(
        loading
        for entry in view.data["factors"]
        for *_, neurons in entry["neurons"]
        for _, loading in neurons
    )
    assert low < 0
    shown = ""
    for k in range(3):
        browser.evaluate(f"{ROOT}.querySelector('#factor-{k}').click()")
        shown += browser.evaluate(f"{ROOT}.querySelector('.detail').textContent")
    assert f"({low:g})" in shown
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.errors == []
