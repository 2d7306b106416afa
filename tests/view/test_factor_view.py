from __future__ import annotations

import base64
import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import actstore
from actstore.decompose import Factors, nmf
from actstore.errors import ArgumentError, RowNotFound
from actstore.store import FIRST, SPECIAL, CoreStore
from actstore.view import View, factor_view
from actstore.view.quantised import embedded, quantised
from actstore.view.standing_out import N_NEURONS, STEP, standing_out
from tests.browser import Browser
from tests.captured import content
from tests.synthetic import synthetic_store
from tests.view.text_store import text_store, words

from .conftest import HOSTILE, PLAIN

ROOT = "document.querySelector('[data-actstore-view]').shadowRoot"
SHADES = f"[...{ROOT}.querySelectorAll('.text span')].map(s => getComputedStyle(s).backgroundColor)"


def _pieces(document: dict[str, Any]) -> list[str]:
    """Return the tokens' text as a browser cuts it, by UTF-16 units."""
    units = document["text"].encode("utf-16-le", "surrogatepass")
    end, found = 0, []
    for gap, length in zip(document["cuts"][::2], document["cuts"][1::2], strict=True):
        piece = units[2 * (end + gap) : 2 * (end + gap + length)]
        found.append(piece.decode("utf-16-le", "surrogatepass"))
        end += gap + length
    return found


def _row_ids(document: dict[str, Any]) -> list[int]:
    return [first + i for first, count in document["rows"] for i in range(count)]


def _scores(view: View, document: int) -> np.ndarray:
    """Return the embedded scores as the script decodes them, NaN where there is none."""
    entry = view.data["documents"][document]
    codes = np.frombuffer(base64.b64decode(entry["scores"]), np.uint8)
    codes = codes.reshape(len(view.data["factors"]), -1).T.astype(np.float64)
    largest = np.array([factor["max"] for factor in view.data["factors"]])
    return np.where(codes == 0, np.nan, largest * ((codes - 1) / 254) ** 2)


def test_the_text_is_the_source_text_cut_at_its_tokens(store: CoreStore, factors: Factors) -> None:
    """Whitespace is real, cuts are in UTF-16 units, and every row is its own token's."""
    view = factor_view(store, factors)
    documents = view.data["documents"]
    assert [doc["text"] for doc in documents] == [*PLAIN, *HOSTILE]
    for document in documents:
        pieces = [text for *_, text in words(document["text"])]
        assert _pieces(document) == pieces
        tokens = store.tokens_of(_row_ids(document)).to_pylist()
        cut = [document["text"][t["char_start"] : t["char_end"]] for t in tokens]
        assert cut == pieces


def test_embedded_scores_are_the_scores_to_what_the_eye_can_tell(
    store: CoreStore, factors: Factors
) -> None:
    """One byte keeps a score to half a step of its square root; rows outside have none."""
    view = factor_view(store, factors)
    largest = np.array([factor["max"] for factor in view.data["factors"]])
    for number, document in enumerate(view.data["documents"]):
        true = factors.scores(np.array(_row_ids(document)))
        seen = _scores(view, number)
        assert (np.isnan(true) == np.isnan(seen)).all()
        steps = np.abs(np.sqrt(seen / largest) - np.sqrt(true / largest)) * 254
        assert np.nanmax(steps) <= 0.51


def test_special_tokens_are_not_in_the_text_and_first_ones_have_no_score(tmp_path: Path) -> None:
    """A special token has no text; a first token has, and says that it has no score."""
    rng = np.random.default_rng(0)
    for special in (True, False):
        store = synthetic_store(
            tmp_path / str(special), {"mlp_post.0": rng.random((300, 16))}, special=special
        )
        factors = nmf(store, ["mlp_post"], 2)
        view = factor_view(store, factors, documents=[1])
        (document,) = view.data["documents"]
        flags = store.tokens_of(_row_ids(document)).column("flags").to_numpy()
        assert not (flags & SPECIAL).any()
        assert (np.isnan(_scores(view, 0)).any(axis=1) == ((flags & FIRST) > 0)).all()
        assert len(_pieces(document)) == document["n_tokens"] == len(document["text"].split())


def test_only_committed_rows_are_shown(tmp_path: Path) -> None:
    """In a store that is being captured, rows without a commit stay unshaded text."""
    values = {"mlp_post.0": np.random.default_rng(0).random((600, 16))}
    store = synthetic_store(tmp_path / "s", values, segment_rows=256, documents=[600], commit=[0])
    view = factor_view(store, nmf(store, ["mlp_post"], 2), documents=0)
    (document,) = view.data["documents"]
    assert len(_row_ids(document)) == 252  # of 256 rows four begin a window
    assert document["n_tokens"] > 252
    assert len(document["text"].split()) == document["n_tokens"]


def test_rows_captured_after_the_factors_have_no_score(tmp_path: Path) -> None:
    """A store that went on growing is shown whole; what the factors do not know is unshaded."""
    values = {"mlp_post.0": np.random.default_rng(0).random((600, 16))}
    options = {"segment_rows": 256, "documents": [600]}
    store = synthetic_store(tmp_path / "s", values, **options, commit=[0])
    factors = nmf(store, ["mlp_post"], 2)
    full = synthetic_store(tmp_path / "full", values, **options)
    for name in ("commits", "activations"):
        shutil.copytree(full.path / name, store.path / name, dirs_exist_ok=True)
    store.refresh()
    scores = _scores(factor_view(store, factors), 0)
    assert not np.isnan(scores[:252]).any()
    assert np.isnan(scores[252:]).all()
    assert len(scores) > 500


def test_bytes_of_one_character_share_its_place(tmp_path: Path) -> None:
    """Later tokens of the same character have no text of their own, and offsets stay right."""
    text = "a \U0001f600 b"
    spans = [(0, 1, "a"), (2, 3, "x"), (2, 3, "y"), (2, 3, "z"), (4, 5, "b")] * 1
    store = text_store(
        tmp_path / "s", [("e", text)] * 8, {"mlp_post.0": 16}, spans=[spans] * 8, n_factors=2
    )
    view = factor_view(store, nmf(store, ["mlp_post"], 2), documents=3)
    (document,) = view.data["documents"]
    assert _pieces(document) == ["a", "\U0001f600", "", "", "b"]


def test_words_too_long_to_be_looked_at_are_cut(tmp_path: Path) -> None:
    """Of 100,000 letters, and of as many spaces, a page has the beginning and says the length."""
    text = f"one {'x' * 100_000} two{' ' * 100_000}three"
    spans = [(m.start(), m.end(), m[0]) for m in re.finditer(r"\S+", text)]
    long = text_store(tmp_path / "s", [("a", text)], {"mlp_post.0": 8}, spans=[spans])
    found = nmf(long, ["mlp_post"], 1)
    view = factor_view(long, found)
    (document,) = view.data["documents"]
    shown, cuts, end = document["text"], document["cuts"], 0
    words = []
    for gap, length in zip(cuts[::2], cuts[1::2], strict=True):
        words.append(shown[end + gap : end + gap + length])
        end += gap + length
    assert words == ["one", f"{'x' * 120}… [100,000 characters]", "two", "three"]
    assert end == len(shown) < 400
    assert len(view.page()) < 100_000 + len(factor_view(long, found, max_tokens=1).page())


def test_a_long_document_is_cut_after_a_token(store: CoreStore, factors: Factors) -> None:
    """`max_tokens` cuts text and rows at the same token, and the whole length is still told."""
    (document,) = factor_view(store, factors, 0, max_tokens=3).data["documents"]
    assert document["text"] == "The keys to"
    assert len(_row_ids(document)) == 3
    assert document["n_tokens"] == len(words(PLAIN[0]))


def test_documents_are_spread_or_the_ones_asked_for(store: CoreStore, factors: Factors) -> None:
    """Without `documents` they are spread over all; with it they are those, in order."""

    def shown(**options: Any) -> list[int]:
        return [doc["document"] for doc in factor_view(store, factors, **options).data["documents"]]

    assert shown(max_documents=3) == [0, 4, 7]
    assert shown(max_documents=1) == [0]
    assert shown(documents=[5, 2, 5]) == [2, 5]
    assert shown(documents=6) == [6]


def test_documents_that_cannot_be_shown_are_refused(store: CoreStore, factors: Factors) -> None:
    """No document, a limit of none and a document that is not there are named."""
    with pytest.raises(ArgumentError, match=r"documents = \[\] names none"):
        factor_view(store, factors, [])
    with pytest.raises(ArgumentError, match=r"max_documents = 0 was given; expected at least 1"):
        factor_view(store, factors, max_documents=0)
    with pytest.raises(ArgumentError, match=r"max_tokens = 0 was given; expected at least 1"):
        factor_view(store, factors, max_tokens=0)
    with pytest.raises(RowNotFound, match=r"document = 99 is not in .*; it has documents 0 … 7"):
        factor_view(store, factors, 99)


def test_factors_carry_what_the_result_says(store: CoreStore, factors: Factors) -> None:
    """Shares, neurons and exemplars of a factor are those of the result's tables."""
    view = factor_view(store, factors)
    exemplars = factors.table("factor_exemplars").to_pylist()
    for entry, row in zip(view.data["factors"], factors.table("factors").to_pylist(), strict=True):
        k = entry["factor"]
        assert entry["share"] == pytest.approx(row["share"], rel=1e-3)
        assert sum(entry["sites"]) == pytest.approx(1, abs=1e-2)
        best = next(e for e in exemplars if (e["factor"], e["side"], e["rank"]) == (k, "top", 1))
        groups = dict(entry["exemplars"])
        assert list(groups) == ["Highest", "Highest, one a window", "Quantile bins", "At random"]
        assert groups["Highest"][0]["row_id"] == best["row_id"]
        for rows in groups.values():
            values = factors.scores([row["row_id"] for row in rows])[:, k]
            assert [row["value"] for row in rows] == pytest.approx(values.tolist(), rel=1e-3)
        for site, _, neurons in entry["neurons"]:
            loadings = factors.loadings_of(view.data["sites"][site]["name"])[k]
            assert neurons[0][0] == int(loadings.argmax())


def test_profiles_are_those_of_the_scores(store: CoreStore, factors: Factors) -> None:
    """Means over positions, documents and token types are of the factor's own scores there."""
    tokens = pa.concat_tables([store.tokens(segment) for segment in store.committed])
    scores = np.concatenate([factors.scores_of_segment(segment) for segment in store.committed])
    texts = dict(
        zip(*(store.vocabulary.column(c).to_pylist() for c in ("token_id", "text")), strict=True)
    )
    held = ~np.isnan(scores[:, 0])
    columns = {
        name: tokens.column(name).to_numpy()[held] for name in ("position", "document", "token_id")
    }
    names = np.array([texts[token_id] for token_id in columns["token_id"].tolist()])
    for entry in factor_view(store, factors).data["factors"]:
        mine = scores[held, entry["factor"]].astype(np.float64)
        for position, mean in entry["positions"]:
            here = mine[columns["position"] == position].mean()
            assert mean == pytest.approx(here, rel=1e-3, abs=1e-9)
        for row in entry["documents"]:
            here = mine[columns["document"] == row["document"]]
            assert (row["n"], row["mean"]) == (len(here), pytest.approx(here.mean(), rel=1e-3))
            assert row["source"] == store.document(row["document"])["source"]
        for rows in entry["types"].values():
            for text, n, mean, lift, share in rows:
                here = mine[names == text]
                assert (n, mean) == (len(here), pytest.approx(here.mean(), rel=1e-3))
                assert lift == pytest.approx(here.mean() / mine.mean(), rel=1e-2)
                assert share == pytest.approx((here**2).sum() / (mine**2).sum(), rel=1e-3)


def test_signed_scores_keep_their_sign(store: CoreStore, factors: Factors) -> None:
    """Where a score is below zero, one byte keeps sign and size, and zero is zero."""
    scores = np.array([[-2.0, 0.0], [1.0, 0.5], [np.nan, 0.25]], np.float32)
    codes = quantised(scores, [2.0, 0.5], signed=True)
    roots = (codes.astype(np.float64) - 128) / 127
    seen = np.where(codes == 0, np.nan, np.array([2.0, 0.5]) * roots * np.abs(roots))
    np.testing.assert_allclose(seen, scores, atol=0.01)
    assert seen[0, 1] == 0


def test_neurons_that_stand_out_are_those_furthest_above_their_means(
    hostile_store: actstore.Store,
) -> None:
    """The kept neurons of each token are the first three by deviation, over all sites."""
    infos = hostile_store.select("mlp_post")
    row_ids = np.arange(3, 40)
    usable = np.arange(37) % 5 > 0
    codes = standing_out(hostile_store, infos, row_ids, usable)
    assert codes is not None
    columns = []
    for info in infos:
        values = hostile_store[info.site][row_ids].astype(np.float64)
        known = content(hostile_store, str(info.site))[1].astype(np.float64)
        with np.errstate(invalid="ignore", divide="ignore"):
            columns.append(np.nan_to_num((values - known.mean(0)) / known.std(0), posinf=0))
    above = np.concatenate(columns, axis=1)
    numbers = codes[..., :3].astype(np.int64) @ [1, 256, 65536]
    deviations = codes[..., 3] * STEP
    for row in range(37):
        if usable[row]:
            best = np.sort(above[row])[::-1][:N_NEURONS]
            np.testing.assert_allclose(deviations[row], best, atol=STEP / 2 + 1e-3)
            np.testing.assert_allclose(above[row, numbers[row]], best, atol=1e-3)
        else:
            assert not deviations[row].any()


def test_factors_of_other_sites_are_not_compared(store: CoreStore, factors: Factors) -> None:
    """Loadings over different neurons have no cosine: it says which sites are needed."""
    other = nmf(store, ["mlp_post.0"], 2)
    with pytest.raises(ArgumentError, match=r"compare = '.*' is of mlp_post.0; expected factors"):
        factor_view(store, factors, other=other)


def test_a_page_of_ten_factors_and_fifty_documents_is_small(tmp_path: Path) -> None:
    """10 factors x 50 documents x 512 tokens take less than 3 MB."""
    rng = np.random.default_rng(0)
    values = {"mlp_post.0": rng.gamma(0.5, 1.0, (50 * 512, 16))}
    store = synthetic_store(
        tmp_path / "s", values, documents=[512] * 50, context=512, segment_rows=8192
    )
    view = factor_view(store, nmf(store, ["mlp_post"], 10))
    assert len(view.data["documents"]) == 50
    assert len(view.page()) < 3_000_000


# -- in a browser ------------------------------------------------------------------------------


def _center(browser: Browser, selector: str) -> tuple[float, float]:
    x, y = browser.evaluate(
        f"(r => [r.x + r.width / 2, r.y + r.height / 2])"
        f"({ROOT}.querySelector({json.dumps(selector)}).getBoundingClientRect())"
    )
    return x, y


def _text(browser: Browser, selector: str) -> str:
    """Return the text of the first element of the view that a selector finds."""
    return str(browser.evaluate(f"{ROOT}.querySelector({json.dumps(selector)}).textContent"))


def _select(browser: Browser, number: int) -> None:
    """Choose a document from the list."""
    browser.evaluate(
        f"(s => {{ s.value = '{number}'; s.dispatchEvent(new Event('change')) }})"
        f"({ROOT}.querySelector('select'))"
    )


@pytest.fixture
def page(browser: Browser, store: CoreStore, factors: Factors, tmp_path: Path) -> Browser:
    """The factor page, open at 1280 x 900."""
    browser.viewport(1280, 900)
    browser.open(factor_view(store, factors).to_html(tmp_path / "factors.html"))
    return browser


@pytest.mark.browser
@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("dark", [False, True])
def test_a_page_opens_without_requests_and_errors(
    browser: Browser, store: CoreStore, factors: Factors, tmp_path: Path, width: int, dark: bool
) -> None:
    """Nothing is asked of the network, the console is quiet, nothing is wider than the window."""
    path = factor_view(store, factors).to_html(tmp_path / "factors.html")
    browser.viewport(width, 850, dark=dark)
    browser.open(path)
    assert browser.requests == [path.as_uri()]
    assert browser.errors == []
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    paper = browser.evaluate(f"getComputedStyle({ROOT}.querySelector('.view')).backgroundColor")
    assert paper == ("rgb(20, 23, 28)" if dark else "rgb(255, 255, 255)")
    picture = tmp_path / "factors.png"
    browser.screenshot(picture)
    assert picture.stat().st_size > 20_000


@pytest.mark.browser
def test_hovering_a_factor_shades_the_text_by_it(page: Browser) -> None:
    """The shading under the mouse is that factor's, and the chosen one's comes back afterwards."""
    before = page.evaluate(SHADES)
    page.move(*_center(page, "#factor-2"))
    hovered = page.evaluate(SHADES)
    assert hovered != before
    assert "Score of factor 2" in _text(page, ".legend")
    page.move(*_center(page, "h2"))
    assert page.evaluate(SHADES) == before


@pytest.mark.browser
def test_shading_follows_the_score(page: Browser, store: CoreStore, factors: Factors) -> None:
    """The order of the shades is the order of the scores."""
    levels = page.evaluate(
        f"[...{ROOT}.querySelectorAll('.text span')]"
        ".map(s => +getComputedStyle(s).getPropertyValue('--s'))"
    )
    view = factor_view(store, factors)
    scores = _scores(view, 0)[:, 0]
    top = view.data["factors"][0]["scale"]
    np.testing.assert_allclose(levels, np.minimum(np.nan_to_num(scores) / top, 1), atol=1 / 127)


@pytest.mark.browser
def test_each_span_is_the_text_of_its_rows(
    browser: Browser, hostile_store: actstore.Store, tmp_path: Path
) -> None:
    """Whatever a byte-level tokenizer cuts, what is drawn and shaded as a row is its own text."""
    view = hostile_store.factors("words").view()
    browser.viewport(1280, 900)
    browser.open(view.to_html(tmp_path / "factors.html"))
    pictures = str.maketrans({i: chr(0x2400 + i) for i in [0, 7, 27]})
    for number, document in enumerate(view.data["documents"]):
        _select(browser, number)
        text = hostile_store.document(document["document"])["text"]
        rows = _row_ids(document)
        expected: list[tuple[str, list[int]]] = []
        done = 0
        for token in hostile_store.tokens_of(rows).to_pylist():
            start, end = token["char_start"], token["char_end"]
            if max(start, end) <= done and expected:
                expected[-1][1].append(token["row_id"])
            else:
                # Offsets of a token that is a space alone are cut to nothing behind it.
                first = max(done, start) if end > max(done, start) else done
                expected.append((text[first : max(start, end)], [token["row_id"]]))
            done = max(done, start, end)
        drawn = browser.evaluate(
            f"[...{ROOT}.querySelectorAll('.text span')].map(n => n.textContent)"
        )
        assert drawn == [piece.translate(pictures) for piece, _ in expected]
        shown = _text(browser, ".text")
        assert shown == text.translate(pictures)
        browser.evaluate(f"{ROOT}.querySelector('.text').focus()")
        for key, place in (("ArrowRight", 0), ("ArrowRight", 1), ("End", -1)):
            browser.press(key)
            ids = ", ".join(map(str, expected[place][1]))
            assert f"row_id {ids}, token" in _text(browser, "[aria-live]")
        browser.evaluate(f"{ROOT}.querySelector('.text').blur()")


@pytest.mark.browser
def test_arrow_keys_choose_factors_and_walk_the_text(page: Browser) -> None:
    """Down chooses the next factor and its detail; right goes from token to token and says it."""
    page.evaluate(f"{ROOT}.querySelector('[role=listbox]').focus()")
    page.press("ArrowDown")
    assert _text(page, "[aria-selected=true] .number") == "1"
    assert _text(page, "h3").startswith("Factor 1")
    page.press("End")
    page.press("Home")
    assert _text(page, "h3").startswith("Factor 0")
    page.evaluate(f"{ROOT}.querySelector('.text').focus()")
    page.press("ArrowRight")
    page.press("ArrowRight")
    assert _text(page, "[aria-live]").startswith("keys; row_id 2")


@pytest.mark.browser
def test_a_click_chooses_a_factor_and_an_exemplar_opens_its_document(page: Browser) -> None:
    """A click fixes the factor; a click on an exemplar shows that token in its document."""
    page.click(*_center(page, "#factor-3"))
    page.move(*_center(page, "h2"))
    assert _text(page, "h3").startswith("Factor 3")
    token = _text(page, ".exemplars b")
    page.evaluate(f"{ROOT}.querySelector('.exemplars button').click()")
    assert _text(page, ".text .here") == token


@pytest.mark.browser
def test_a_token_says_its_numbers(page: Browser) -> None:
    """The tooltip of a token gives its row_id, its place and its score."""
    page.move(*_center(page, ".text span:nth-of-type(2)"))
    tip = _text(page, ".tip")
    assert "keys" in tip
    assert "row_id: 2, token 1" in tip
    assert "factor 0:" in tip


@pytest.mark.browser
def test_documents_switch_and_a_word_is_found(page: Browser) -> None:
    """Choosing a document shows its text; a search keeps the documents that hold the word."""
    assert _text(page, ".text") == PLAIN[0]
    _select(page, 1)
    assert _text(page, ".text") == PLAIN[1]
    page.evaluate(f"{ROOT}.querySelector('input').focus()")
    page.type("COMMITTEE")
    assert _text(page, ".text") == PLAIN[2]
    assert page.evaluate(f"{ROOT}.querySelectorAll('.picker option').length") == 1
    hit = page.evaluate(f"[...{ROOT}.querySelectorAll('.hit')].map(s => s.textContent).join('')")
    assert hit == "committee"


def _select_span(browser: Browser, first: int, last: int) -> None:
    """Drag the mouse over the text from one token to another."""
    browser.evaluate(f"{ROOT}.querySelector('.text').scrollIntoView()")
    boxes = browser.evaluate(
        f"(s => [s[{first}], s[{last}]].map(n => n.getClientRects()[0]).map(r => "
        f"[r.left, r.right, r.top + r.height / 2]))([...{ROOT}.querySelectorAll('.text span')])"
    )
    browser.drag((boxes[0][0] + 1, boxes[0][2]), (boxes[1][1] - 1, boxes[1][2]))


@pytest.mark.browser
def test_a_span_says_which_factors_stand_out(
    page: Browser, store: CoreStore, factors: Factors
) -> None:
    """Dragging over words ranks the factors by their mean there, in deviations above all."""
    view = factor_view(store, factors)
    _select_span(page, 1, 4)
    chosen = page.evaluate(f"[...{ROOT}.querySelectorAll('.text .span')].map(n => n.textContent)")
    assert chosen == ["keys", "to", "the", "cabine"]
    assert _text(page, ".found h4").startswith("What stands out at 4 tokens")
    scores = factors.scores(np.array(_row_ids(view.data["documents"][0])))[1:5]
    known = [(entry["mean"], entry["std"]) for entry in view.data["factors"]]
    above = [(np.nanmean(scores[:, k]) - m) / s for k, (m, s) in enumerate(known)]
    expected = [k for k in np.argsort(above)[::-1].tolist() if above[k] > 0]
    said = page.evaluate(f"[...{ROOT}.querySelectorAll('.found button')].map(n => n.textContent)")
    assert said == [f"factor {k}" for k in expected]
    page.evaluate(f"{ROOT}.querySelector('.found button').click()")
    assert _text(page, "h3").startswith(f"Factor {expected[0]}")


@pytest.mark.browser
def test_a_span_is_selected_by_the_keyboard_too(page: Browser) -> None:
    """Shift and the arrow keys select tokens, and what stands out is said."""
    page.evaluate(f"{ROOT}.querySelector('.text').focus()")
    page.press("ArrowRight")
    page.press("ArrowRight", shift=True)
    page.press("ArrowRight", shift=True)
    chosen = page.evaluate(f"[...{ROOT}.querySelectorAll('.text .span')].map(n => n.textContent)")
    assert chosen == ["The", "keys", "to"]
    assert _text(page, "[aria-live]").startswith("What stands out at 3 tokens: ")


@pytest.mark.browser
def test_neurons_of_a_span_are_named(
    browser: Browser, hostile_store: actstore.Store, tmp_path: Path
) -> None:
    """With stored activations a span names neurons, and they are the store's own."""
    factors = hostile_store.factors("words")
    browser.viewport(1280, 900)
    browser.open(factors.to_html(tmp_path / "factors.html"))
    browser.evaluate(f"{ROOT}.querySelector('.text').focus()")
    for _ in range(4):
        browser.press("ArrowRight")
    browser.press("ArrowRight", shift=True)
    browser.press("ArrowLeft", shift=True)
    first = "[...{}.querySelectorAll('.found .grid')].at(-1).querySelector('tbody th').textContent"
    name = browser.evaluate(first.format(ROOT))
    assert "What stands out at 1 token" in _text(browser, "[aria-live]")
    (document, *_) = factors.view().data["documents"]
    # A token of the space before a word has that space; "The", " ", "keys", ...: the fourth.
    row_id = _row_ids(document)[3]
    best = {}
    for info in factors.sites:
        known = content(hostile_store, str(info.site))[1].astype(np.float64)
        value = hostile_store[info.site][[row_id]][0].astype(np.float64)
        with np.errstate(invalid="ignore", divide="ignore"):
            above = np.nan_to_num((value - known.mean(0)) / known.std(0), posinf=0)
        best[float(above.max())] = f"{info.site}:{above.argmax()}"
    assert name == best[max(best)]


@pytest.mark.browser
def test_two_factors_and_two_fits_are_compared(
    browser: Browser, store: CoreStore, factors: Factors, tmp_path: Path
) -> None:
    """The text takes the difference of two factors; each factor names its nearest elsewhere."""
    other = nmf(store, ["mlp_post"], 3, seed=5)
    view = factor_view(store, factors, other=other)
    browser.viewport(1280, 900)
    browser.open(view.to_html(tmp_path / "factors.html"))
    browser.evaluate(
        f"(s => {{ s.value = '2'; s.dispatchEvent(new Event('change')) }})"
        f"({ROOT}.querySelector('.detail select'))"
    )
    assert "Factor 0 less factor 2" in _text(browser, ".legend")
    levels = browser.evaluate(
        f"[...{ROOT}.querySelectorAll('.text span')]"
        ".map(s => +getComputedStyle(s).getPropertyValue('--s'))"
    )
    scores = np.nan_to_num(_scores(view, 0)) / [entry["scale"] for entry in view.data["factors"]]
    expected = np.clip(scores[:, 0] - scores[:, 2], -1, 1)
    np.testing.assert_allclose(levels, expected, atol=1 / 127)
    assert min(levels) < 0 < max(levels)
    cosines = factors.loadings @ other.loadings.T
    cosines /= np.linalg.norm(factors.loadings, axis=1)[:, None]
    cosines /= np.linalg.norm(other.loadings, axis=1)
    tables = browser.evaluate(
        f"[...{ROOT}.querySelectorAll('.detail .grid')].map(t => t.textContent)"
    )
    (there,) = [table for table in tables if table.startswith("factor there")]
    best = int(cosines[0].argmax())
    assert there.split("effective neurons")[1].startswith(f"{best}{cosines[0].max():.3f}")
    assert browser.errors == []


@pytest.mark.browser
def test_stability_and_other_badges_are_shown(
    browser: Browser, store: CoreStore, factors: Factors, tmp_path: Path
) -> None:
    """A factor's badges stand beside it with their numbers, those of its own result alone."""
    created = factors.summary["created"]
    for of, when, stable in (
        (factors.name, created, [True, False, True, True]),
        (factors.name, "of factors that had the name before", [False] * 4),
        ("another", created, [False] * 4),
    ):
        with store.new_result("stability", None, {}) as writer:
            table = {
                "factor": list(range(4)),
                "split_cosine": [0.97, 0.4, 0.98, 0.99],
                "seed_cosine": [0.9] * 4,
                "null_cosine": [0.2] * 4,
                "runner_up_cosine": [0.3] * 4,
                "stable": stable,
            }
            writer.write_table("factor_stability", pa.table(table))
            document = {"factors": of, "factors_created": when, "n_components": 4, "n_stable": 3}
            writer.finish(document)
    browser.viewport(1280, 900)
    browser.open(factor_view(store, factors).to_html(tmp_path / "factors.html"))
    badges = browser.evaluate(
        f"[...{ROOT}.querySelectorAll('.factor')].map(n => n.querySelector('.badge:last-of-type')"
        ".textContent)"
    )
    assert badges == ["stable", "not stable", "stable", "stable"]
    browser.evaluate(f"{ROOT}.querySelector('#factor-1').click()")
    assert "cosine 0.40 between fits to other documents, 0.30 by chance" in _text(browser, "h3")


@pytest.mark.browser
def test_hostile_text_is_shown_and_never_run(
    browser: Browser, store: CoreStore, factors: Factors, tmp_path: Path
) -> None:
    """In every document, as a page and as a fragment without the page's policy, text stays text."""
    view = factor_view(store, factors)
    bare = tmp_path / "bare.html"
    bare.write_text(f"<!DOCTYPE html><meta charset=utf-8><body>{view.html}", encoding="utf-8")
    for path in (view.to_html(tmp_path / "page.html"), bare):
        browser.open(path)
        for number, text in enumerate([*PLAIN, *HOSTILE]):
            _select(browser, number)
            for factor in range(factors.n_components):
                browser.evaluate(f"{ROOT}.querySelector('#factor-{factor}').click()")
            shown = _text(browser, ".text")
            pictures = str.maketrans({"\x00": "\u2400", "\x07": "\u2407", "\x1b": "\u241b"})
            assert shown == text.translate(pictures)
        assert browser.evaluate("window.hacked") is None
        assert browser.evaluate("document.scripts.length") == 1
        assert browser.evaluate(f"{ROOT}.querySelectorAll('script, img').length") == 0
        assert browser.errors == []
        assert browser.requests == [path.as_uri()]


@pytest.mark.browser
def test_lone_surrogates_are_shown_as_replaced(
    browser: Browser, store: CoreStore, factors: Factors, tmp_path: Path
) -> None:
    """Text that is not Unicode shows U+FFFD in its place, one for one, and breaks nothing."""
    view = factor_view(store, factors, 0)
    document = {**view.data["documents"][0], "source": "\udc80.txt"}
    document["text"] = "\ud800" + document["text"][1:]
    broken = dataclasses.replace(view, data={**view.data, "documents": [document]})
    browser.open(broken.to_html(tmp_path / "broken.html"))
    assert _text(browser, ".text") == "\ufffd" + PLAIN[0][1:]
    assert browser.errors == []


@pytest.mark.browser
def test_a_fragment_takes_the_theme_of_its_notebook(
    browser: Browser, store: CoreStore, factors: Factors, tmp_path: Path
) -> None:
    """On a dark surface in a light system the view is dark; shown twice, it is drawn twice."""
    view = factor_view(store, factors, 0)
    path = tmp_path / "notebook.html"
    path.write_text(
        "<!DOCTYPE html><meta charset=utf-8><style>span { display: none }</style>"
        f"<body style='background: #111'><div>{view.html}</div><div>{view.html}</div>",
        encoding="utf-8",
    )
    browser.viewport(1280, 900)
    browser.open(path)
    papers = browser.evaluate(
        "[...document.querySelectorAll('[data-actstore-view]')].map(h => "
        "getComputedStyle(h.shadowRoot.querySelector('.view')).backgroundColor)"
    )
    assert papers == ["rgb(20, 23, 28)"] * 2
    display = f"getComputedStyle({ROOT}.querySelector('.text span')).display"
    assert browser.evaluate(display) == "inline"


@pytest.mark.browser
@pytest.mark.parametrize(
    ("attributes", "dark"),
    [
        ("class='vscode-dark'", True),
        ("class='vscode-light'", False),
        ("class='vscode-high-contrast'", True),
        ("data-jp-theme-light='false'", True),
        ("data-jp-theme-light='true'", False),
    ],
)
def test_where_all_is_transparent_the_notebook_says_its_theme(
    browser: Browser,
    store: CoreStore,
    factors: Factors,
    tmp_path: Path,
    attributes: str,
    dark: bool,
) -> None:
    """Notebooks whose outputs have no background of their own are believed before the system."""
    path = tmp_path / "notebook.html"
    view = factor_view(store, factors, 0)
    path.write_text(
        f"<!DOCTYPE html><meta charset=utf-8><body {attributes}>{view.html}", encoding="utf-8"
    )
    browser.viewport(1280, 900, dark=not dark)
    browser.open(path)
    paper = browser.evaluate(f"getComputedStyle({ROOT}.querySelector('.view')).backgroundColor")
    assert paper == ("rgb(20, 23, 28)" if dark else "rgb(255, 255, 255)")


@pytest.mark.browser
def test_scores_below_zero_are_of_another_colour_and_another_line(
    browser: Browser, store: CoreStore, factors: Factors, tmp_path: Path
) -> None:
    """Signed scores take a diverging scale; the lowest are dotted too, not told by colour alone."""
    view = factor_view(store, factors, 0)
    rng = np.random.default_rng(0)
    n = len(_row_ids(view.data["documents"][0]))
    scores = rng.normal(size=(n, factors.n_components))
    scores[0], scores[1] = 5.0, -5.0
    codes = quantised(scores, 5.0, signed=True)
    document = {**view.data["documents"][0], "scores": embedded(codes.T)}
    entries = [{**entry, "max": 5.0, "scale": 4.0} for entry in view.data["factors"]]
    data = {**view.data, "signed": True, "factors": entries, "documents": [document]}
    browser.viewport(1280, 900)
    browser.open(dataclasses.replace(view, data=data).to_html(tmp_path / "signed.html"))
    levels = browser.evaluate(
        f"[...{ROOT}.querySelectorAll('.text span')]"
        ".map(s => +getComputedStyle(s).getPropertyValue('--s'))"
    )
    np.testing.assert_allclose(levels, np.clip(scores[:, 0] / 4, -1, 1), atol=0.02)
    lines = browser.evaluate(
        f"[...{ROOT}.querySelectorAll('.text span')].slice(0, 2)"
        ".map(s => getComputedStyle(s).textDecorationStyle)"
    )
    assert lines == ["solid", "dotted"]
    assert "dotted: \u22123 and less" in _text(browser, ".legend")
    assert browser.evaluate(f"{ROOT}.querySelectorAll('.spark .low').length") == 4
    assert browser.errors == []


@pytest.mark.browser
def test_without_scripts_a_plain_table_stays(
    browser: Browser, store: CoreStore, factors: Factors, tmp_path: Path
) -> None:
    """Where a notebook is not trusted and scripts are dropped, the table of factors is readable."""
    view = factor_view(store, factors, 0)
    path = tmp_path / "plain.html"
    path.write_text(view.html.split("<script>")[0], encoding="utf-8")
    browser.open(path)
    assert browser.evaluate("document.querySelectorAll('tbody tr').length") == 4
    assert browser.evaluate("window.hacked") is None
