"""The neuron view: its data against the store, and what a browser makes of it."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import actstore
from actstore.errors import ArgumentError, NeuronNotFound
from actstore.view import View
from tests.browser import Browser
from tests.captured import all_tokens, content
from tests.synthetic import synthetic_store
from tests.toys import toy_model

from .conftest import HOSTILE, PLAIN

ROOT = "document.querySelector('[data-actstore-view]').shadowRoot"
SITE = "mlp_post.1"


@pytest.fixture(scope="module")
def looked_at(hostile_store: actstore.Store) -> View:
    """The view of a neuron of a store of hostile texts."""
    return hostile_store.neuron(SITE, 7).view()


def _values(view: View, row: dict[str, Any]) -> np.ndarray:
    """Return the values of an exemplar's tokens as the script decodes them."""
    codes = np.frombuffer(base64.b64decode(row["values"]), np.uint8).astype(np.float64)
    roots = (codes - 128) / 127 if view.data["signed"] else (codes - 1) / 254
    return np.where(codes == 0, np.nan, view.data["max"] * roots * np.abs(roots))


def _row_ids(row: dict[str, Any]) -> np.ndarray:
    return row["first"] + np.concatenate([[0], np.cumsum(row["rows"])])


@pytest.mark.parametrize(("site", "neuron"), [(SITE, 7), ("resid_post.2", 3)])
def test_every_token_has_its_own_value(
    hostile_store: actstore.Store, site: str, neuron: int
) -> None:
    """Values stand at the rows they are of, to what one byte can tell, in texts of the store."""
    view = hostile_store.neuron(site, neuron).view()
    rows = [row for _, rows in view.data["groups"] for row in rows]
    assert [name for name, _ in view.data["groups"]] == [
        "Highest, one a window",
        "Lowest, one a window",
        "Quantile bins",
        "At random",
    ]
    assert view.data["complete"]
    for row in rows:
        ids = _row_ids(row)
        assert ids[row["place"]] == row["row_id"]
        true = hostile_store[site][ids][:, neuron].astype(np.float64)
        if not view.data["signed"]:
            true = np.maximum(true, 0)
        seen = _values(view, row)
        roots = [np.sign(v) * np.sqrt(np.abs(v) / view.data["max"]) for v in (true, seen)]
        assert np.abs(roots[0] - roots[1]).max() <= 0.51 / 127
        tokens = hostile_store.tokens_of(ids).to_pylist()
        text = hostile_store.document(row["document"])["text"]
        start, end = tokens[0]["char_start"], max(t["char_end"] for t in tokens)
        assert "".join(row["tokens"]) == text[start:end]
        assert {t["document"] for t in tokens} == {row["document"]}


def test_the_histogram_counts_all_content_rows(
    hostile_store: actstore.Store, looked_at: View
) -> None:
    """Bars are in order, do not overlap, and hold as many rows as there are values in them."""
    _, values = content(hostile_store, SITE)
    column = values[:, 7].astype(np.float64)
    bars = np.array(looked_at.data["histogram"])
    assert bars[:, 2].sum() == looked_at.data["n"] == len(column)
    assert (bars[1:, 0] >= bars[:-1, 1] - 1e-6).all()
    for low, high, n in bars:
        inside = ((column > low - 1e-4) & (column < high + 1e-4)).sum()
        assert n <= inside
    said = dict(looked_at.data["statistics"])
    assert float(said["highest"]) == pytest.approx(column.max(), rel=1e-2)
    assert float(said["mean"]) == pytest.approx(column.mean(), rel=1e-2)


def test_factors_are_those_the_neuron_loads_on(hostile_store: actstore.Store) -> None:
    """Loadings and places are of this neuron's column, whatever sites stand before it."""
    view = hostile_store.neuron(SITE, 7).view()
    (fit,) = view.data["factors"]
    factors = hostile_store.factors("words")
    column = factors.loadings_of(SITE)[:, 7]
    assert fit["result"] == "words"
    for k, loading, place in fit["factors"]:
        assert loading == pytest.approx(column[k], rel=1e-2)
        assert place == 1 + (factors.loadings[k] > column[k]).sum()
    assert hostile_store.neuron("resid_post.1", 0).view().data["factors"] == []


@pytest.mark.parametrize("keep", ["none", "1/4"])
def test_what_is_not_stored_is_unshaded_or_computed_again(keep: str) -> None:
    """Without a model only the row itself and stored rows have values, and the view says so."""
    module, tokenizer = toy_model("gpt2")
    store = actstore.capture(module, text=PLAIN * 2, tokenizer=tokenizer, keep=keep)
    known = store.neuron(SITE, 9).view()
    again = store.neuron(SITE, 9, replay=True, model=module, tokenizer=tokenizer).view()
    kept = set() if keep == "none" else set(store[SITE].row_ids().tolist())
    assert not known.data["complete"]
    assert "not stored" in known.data["known"]
    assert again.data["complete"]
    for (_, rows), (_, computed) in zip(known.data["groups"], again.data["groups"], strict=True):
        for row, other in zip(rows, computed, strict=True):
            seen = _values(known, row)
            for place, row_id in enumerate(_row_ids(row).tolist()):
                assert np.isnan(seen[place]) == (place != row["place"] and row_id not in kept)
            assert not np.isnan(_values(again, other)).any()


def test_a_neuron_that_is_not_there_is_refused(
    hostile_store: actstore.Store, tmp_path: Path
) -> None:
    """An unknown neuron is named at once, and a store without an index says what to run."""
    with pytest.raises(NeuronNotFound, match=r"neuron = 64 is not at mlp_post.1 .* 0 … 63"):
        hostile_store.neuron(SITE, 64)
    bare = synthetic_store(tmp_path / "store", {"mlp_post.0": np.ones((200, 5))})
    with pytest.raises(ArgumentError, match="actstore finish"):
        actstore.open(bare.path).neuron("mlp_post.0", 0)


def test_the_summary_of_a_neuron_says_what_it_is(hostile_store: actstore.Store) -> None:
    """It prints its site, number and extremes, and a notebook shows the view."""
    neuron = hostile_store.neuron(SITE, 7)
    assert repr(neuron).startswith(f"<Neuron {SITE}:7 of ")
    assert neuron._repr_html_() == neuron.view().html


# -- in a browser ------------------------------------------------------------------------------


@pytest.mark.browser
@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("dark", [False, True])
def test_the_page_opens_without_requests_and_errors(
    browser: Browser, looked_at: View, tmp_path: Path, width: int, dark: bool
) -> None:
    """The console is quiet, the network log has the file alone, nothing is wider than it should."""
    path = looked_at.to_html(tmp_path / "neuron.html")
    browser.viewport(width, 850, dark=dark)
    browser.open(path)
    assert browser.requests == [path.as_uri()]
    assert browser.errors == []
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    picture = tmp_path / "neuron.png"
    browser.screenshot(picture)
    assert picture.stat().st_size > 20_000


@pytest.mark.browser
def test_a_token_says_its_row_and_value(browser: Browser, looked_at: View, tmp_path: Path) -> None:
    """The mouse and the arrow keys tell the row and the value of just that token."""
    browser.viewport(1280, 900)
    browser.open(looked_at.to_html(tmp_path / "neuron.html"))
    row = looked_at.data["groups"][0][1][0]
    own = f"{ROOT}.querySelector('.context .own')"
    x, y = browser.evaluate(
        f"(r => [r.x + r.width / 2, r.y + r.height / 2])({own}.getClientRects()[0])"
    )
    browser.move(x, y)
    tip = browser.evaluate(f"{ROOT}.querySelector('.tip').textContent")
    assert f"row_id: {row['row_id']}" in tip
    assert f"value: {float(format(row['value'], '.3g')):g}" in tip
    browser.evaluate(f"{ROOT}.querySelector('.context').focus()")
    browser.press("ArrowRight")
    voice = browser.evaluate(f"{ROOT}.querySelector('[aria-live]').textContent")
    assert f"row_id {row['first']}" in voice


@pytest.mark.browser
def test_tabs_and_spaces_are_shown_on_demand(
    browser: Browser, looked_at: View, tmp_path: Path
) -> None:
    """Tabs show the other kinds of rows; spaces have a sign once they are asked for."""
    browser.viewport(1280, 900)
    browser.open(looked_at.to_html(tmp_path / "neuron.html"))
    rows = f"[...{ROOT}.querySelectorAll('.rows .where')].map(n => n.textContent)"
    highest = browser.evaluate(rows)
    browser.evaluate(f"{ROOT}.querySelectorAll('[role=tab]')[0].focus()")
    browser.press("ArrowRight")
    browser.press("ArrowRight")
    selected = browser.evaluate(
        f"{ROOT}.querySelector('[role=tab][aria-selected=true]').textContent"
    )
    assert selected == "Quantile bins"
    assert browser.evaluate(rows) != highest
    assert "bin 1 of 10" in browser.evaluate(rows)[0]
    texts = f"[...{ROOT}.querySelectorAll('.context')].map(n => n.textContent).join('')"
    assert "\u2423" not in browser.evaluate(texts)
    browser.evaluate(f"{ROOT}.querySelector('.toggle').click()")
    assert "\u2423" in browser.evaluate(texts)
    assert browser.evaluate(
        f"{ROOT}.querySelector('[role=tab][aria-selected=true]').textContent"
    ) == ("Quantile bins")
    assert browser.errors == []


@pytest.mark.browser
@pytest.mark.parametrize("text", ["The", "The keys to the cabinet"])
def test_a_prompt_of_few_rows_has_a_view(browser: Browser, tmp_path: Path, text: str) -> None:
    """One word, whose only row is no content row, and one prompt are shown like a corpus."""
    module, tokenizer = toy_model("gpt2")
    store = actstore.capture(module, text=text, tokenizer=tokenizer)
    for made in (
        store.neuron(SITE, 3).to_html(tmp_path / "neuron.html"),
        store.to_html(tmp_path / "overview.html"),
    ):
        browser.open(made)
        assert browser.errors == []


@pytest.mark.browser
def test_a_word_of_any_length_leaves_a_page_small(browser: Browser, tmp_path: Path) -> None:
    """Words of 100,000 letters, which are one token to BERT, are drawn by their beginnings."""
    module, tokenizer = toy_model("bert")
    texts = [f"the {letter * 100_000} war" for letter in "abcdefgh"]
    store = actstore.capture(module, text=texts, tokenizer=tokenizer)
    lengths = [t["char_end"] - t["char_start"] for t in all_tokens(store).to_pylist()]
    assert max(lengths) == 100_000
    view = store.neuron(SITE, 3).view()
    rows = [row for _, rows in view.data["groups"] for row in rows]
    assert max(len(token) for row in rows for token in row["tokens"]) < 200
    assert any("[100,001 characters]" in token for row in rows for token in row["tokens"])
    assert len(view.page()) < 300_000
    store.nmf("mlp_post", 2)
    for path in (
        view.to_html(tmp_path / "neuron.html"),
        store.factors().to_html(tmp_path / "factors.html"),
    ):
        browser.viewport(400, 850)
        browser.open(path)
        browser.screenshot(tmp_path / "page.png")
        assert browser.evaluate("document.documentElement.scrollWidth") <= 400
        assert browser.errors == []


@pytest.mark.browser
def test_hostile_text_stays_text_in_every_field(
    browser: Browser, looked_at: View, tmp_path: Path
) -> None:
    """As a page and as a fragment without the page's policy, no script of a corpus runs."""
    assert any("<script>" in json.dumps(rows) for _, rows in looked_at.data["groups"])
    bare = tmp_path / "bare.html"
    bare.write_text(f"<!DOCTYPE html><meta charset=utf-8><body>{looked_at.html}", encoding="utf-8")
    for path in (looked_at.to_html(tmp_path / "page.html"), bare):
        browser.open(path)
        for number in range(4):
            browser.evaluate(f"{ROOT}.querySelectorAll('[role=tab]')[{number}].click()")
        said = browser.evaluate(f"{ROOT}.querySelector('.view').textContent")
        assert HOSTILE[0] in said
        assert browser.evaluate("window.hacked") is None
        assert browser.evaluate(f"{ROOT}.querySelectorAll('script, img').length") == 0
        assert browser.errors == []
        assert browser.requests == [path.as_uri()]
