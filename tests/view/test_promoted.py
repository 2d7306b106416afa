"""Promoted tokens of factors and neurons: against plain NumPy, in the views and in a browser."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import actstore
from actstore.cli import main
from actstore.errors import ArgumentError, ModelError, StoreMismatch
from actstore.models.direct_path import DirectPath
from tests.browser import Browser
from tests.toys import TEXT, toy_causal_model, toy_model

from .conftest import HOSTILE, PLAIN

# By its path: the name in the package is that of the function.
promoted_tokens = importlib.import_module("actstore.query.promoted")
ROOT = "document.querySelector('[data-actstore-view]').shadowRoot"
SITES = ["mlp_post.0", "mlp_post.1", "mlp_post.2"]


@pytest.fixture(scope="module", params=[("gpt2", True), ("llama", False)], ids=["gpt2", "llama"])
def made(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[actstore.Store, Any, Any]:
    """A store of a random causal model with factors; the model and its tokenizer."""
    model, tokenizer = toy_causal_model(*request.param)
    path = tmp_path_factory.mktemp("causal") / "store"
    texts = [TEXT, *PLAIN, *HOSTILE]
    store = actstore.capture(model, texts, path, tokenizer=tokenizer, context=64)
    store.nmf("mlp_post", 3, name="words")
    store.pca("mlp_post", 2, name="axes", scale="site")
    return store, model, tokenizer


def _logits(model: Any, layer: int) -> np.ndarray:
    """Return what an activation of 1 of each neuron of a layer does, (neurons, tokens), float64."""
    state = {name: value.double().numpy() for name, value in model.state_dict().items()}
    if "transformer.ln_f.weight" in state:
        written = state[f"transformer.h.{layer}.mlp.c_proj.weight"]
        written = written - written.mean(axis=1, keepdims=True)
        norm = state["transformer.ln_f.weight"]
    else:
        written = state[f"model.layers.{layer}.mlp.down_proj.weight"].T
        norm = state["model.norm.weight"]
    effects = written * norm @ state["lm_head.weight"].T
    return effects - effects.mean(axis=1, keepdims=True)


def _check(rows: list[dict[str, Any]], expected: np.ndarray, texts: dict[int, str]) -> None:
    """Check ten promoted and ten suppressed tokens against the effects on all of them."""
    for side, order in (("promoted", np.argsort(-expected)), ("suppressed", np.argsort(expected))):
        mine = [row for row in rows if row["side"] == side]
        assert [row["rank"] for row in mine] == list(range(1, 11))
        assert [row["token_id"] for row in mine] == order[:10].tolist()
        for row in mine:
            effect = expected[row["token_id"]]
            assert row["effect"] == pytest.approx(effect, rel=1e-3)
            assert row["deviations"] == pytest.approx(effect / expected.std(), rel=1e-3)
            assert row["token"] == texts[row["token_id"]]


@pytest.mark.parametrize(("name", "kind"), [("words", "nmf"), ("axes", "pca")])
def test_a_factor_promotes_what_its_neurons_write_together(
    made: tuple[actstore.Store, Any, Any], name: str, kind: str
) -> None:
    """Loadings over the scale of their site, times output weights, norm and head; each and all."""
    store, model, tokenizer = made
    factors = store.factors(name, kind)
    rows = list(factors.promoted(model=model, tokenizer=tokenizer))
    vocabulary = store.vocabulary.to_pylist()
    texts = {row["token_id"]: row["text"] for row in vocabulary}
    scales = factors.summary["site_scales"]
    assert len(set(scales.values())) == 3
    for k in range(factors.n_components):
        total = np.zeros(len(vocabulary))
        for layer, site in enumerate(SITES):
            weights = factors.loadings_of(site)[k].astype(np.float64) / scales[site]
            effects = weights @ _logits(model, layer)
            total += effects
            _check([r for r in rows if (r["factor"], r["site"]) == (k, site)], effects, texts)
        _check([r for r in rows if r["factor"] == k and r["site"] is None], total, texts)


def test_effects_are_held_for_as_many_sets_as_fit(
    made: tuple[actstore.Store, Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One set at once, two, or all of them: the same tokens in the same order, with the effects."""
    store, model, tokenizer = made
    factors = store.factors("words")
    whole = list(factors.promoted(model=model, tokenizer=tokenizer))
    assert len(whole) == 3 * (3 + 1) * 2 * 10
    path = store._replayer(model, tokenizer, "auto").model.direct_path
    n_tokens = len(path.unembedding)
    asked: list[int] = []
    effects = DirectPath.effects

    def counting(self: DirectPath, directions: np.ndarray) -> np.ndarray:
        asked.append(len(directions))
        return effects(self, directions)

    monkeypatch.setattr(DirectPath, "effects", counting)
    for n_bytes, sizes in ((1, [1] * 12), (4 * n_tokens * 5, [5, 5, 2])):
        asked.clear()
        monkeypatch.setattr(promoted_tokens, "_EFFECT_BYTES", n_bytes)
        few = list(factors.promoted(model=model, tokenizer=tokenizer))
        assert asked == sizes
        for row, expected in zip(few, whole, strict=True):
            for name in ("effect", "deviations"):
                assert row.pop(name) == pytest.approx(expected[name], rel=1e-4)
            assert row.items() <= expected.items()


@pytest.mark.parametrize("neuron", [0, 31, 47])
def test_a_neuron_promotes_what_its_own_output_weights_do(
    made: tuple[actstore.Store, Any, Any], neuron: int
) -> None:
    """The row of the output weights is this neuron's at this layer, and no neighbour's."""
    store, model, tokenizer = made
    texts = {row["token_id"]: row["text"] for row in store.vocabulary.to_pylist()}
    for layer, site in enumerate(SITES):
        found = store.neuron(site, neuron, model=model, tokenizer=tokenizer)
        rows = list(found.promoted())
        assert {(row["neuron"], row["site"]) for row in rows} == {(neuron, site)}
        _check(rows, _logits(model, layer)[neuron], texts)
        up, down = found.view().data["promoted"]["all"]
        assert [token for token, *_ in [*up, *down]] == [row["token"] for row in rows]


def test_views_say_it_only_where_a_model_is_given(made: tuple[actstore.Store, Any, Any]) -> None:
    """Without a model a page has no such part; with it every factor has its own tokens."""
    store, model, tokenizer = made
    factors = store.factors("words")
    assert all("promoted" not in entry for entry in factors.view().data["factors"])
    assert store.neuron("mlp_post.1", 7).view().data["promoted"] is None
    with pytest.raises(ArgumentError, match=r"store.neuron\('mlp_post.1', 7, model=…\)"):
        store.neuron("mlp_post.1", 7).promoted()
    table = list(factors.promoted(model=model, tokenizer=tokenizer))
    view = factors.view(model=model, tokenizer=tokenizer)
    for entry in view.data["factors"]:
        mine = [row for row in table if row["factor"] == entry["factor"]]
        up, down = entry["promoted"]["all"]
        assert [token for token, *_ in [*up, *down]] == [
            row["token"] for row in mine if row["site"] is None
        ]
        assert [of[0] for of in entry["promoted"]["sites"]] == SITES
        for site, *sides in entry["promoted"]["sites"]:
            for side, tokens in zip(("promoted", "suppressed"), sides, strict=True):
                assert [token for token, *_ in tokens] == [
                    row["token"] for row in mine if (row["site"], row["side"]) == (site, side)
                ][:5]


def test_what_has_no_output_weights_says_so(
    made: tuple[actstore.Store, Any, Any], hostile_store: actstore.Store, tmp_path: Path
) -> None:
    """Another model, hidden states and a model that sees both sides are told, not guessed at."""
    store, model, tokenizer = made
    with pytest.raises(StoreMismatch, match="was captured from"):
        hostile_store.factors().view(model=model, tokenizer=tokenizer)
    hidden = store.pca("resid_post", 2)
    with pytest.raises(ArgumentError, match=r"resid_post.* expected sites of mlp_post"):
        hidden.promoted(model=model, tokenizer=tokenizer)
    assert (
        store.neuron("resid_post.1", 3, model=model, tokenizer=tokenizer).view().data["promoted"]
        is None
    )
    bert, words = toy_model("bert")
    both = actstore.capture(bert, PLAIN, tmp_path / "bert", tokenizer=words)
    both.nmf("mlp_post", 2, name="words")
    with pytest.raises(ModelError, match="not causal"):
        both.factors().view(model=bert, tokenizer=words)
    neuron = both.neuron("mlp_post.1", 3, replay=True, model=bert, tokenizer=words)
    assert "not causal" in neuron.view().data["promoted"]["refused"]


@pytest.mark.browser
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (400, True)])
def test_a_page_draws_them(
    browser: Browser,
    made: tuple[actstore.Store, Any, Any],
    tmp_path: Path,
    width: int,
    dark: bool,
) -> None:
    """Tokens of all sites and of each, with numbers; the chosen factor's own."""
    store, model, tokenizer = made
    given = {"model": model, "tokenizer": tokenizer}
    browser.viewport(width, 900, dark=dark)
    factors = store.factors("words").view(**given)
    path = factors.to_html(tmp_path / "factors.html")
    browser.open(path)
    part = f"{ROOT}.querySelector('.promoted')"
    words = f"[...{part}.querySelectorAll('.grid .word')].map(n => n.textContent)"
    for k in (0, 2):
        browser.evaluate(f"{ROOT}.querySelector('#factor-{k}').click()")
        up, down = factors.data["factors"][k]["promoted"]["all"]
        shown = browser.evaluate(words)
        assert len(shown) == 20
        plain = [t for t, *_ in up if t.isascii() and t.isalpha()]
        assert plain
        assert set(plain) <= set(shown[::2])
        assert {t for t, *_ in down if t.isascii() and t.isalpha()} <= set(shown[1::2])
    browser.evaluate(f"{part}.querySelectorAll('[role=tab]')[1].click()")
    assert browser.evaluate(f"{part}.querySelectorAll('tbody tr').length") == 3
    assert "standard deviations" in browser.evaluate(f"{part}.querySelector('.word').title")
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate("window.hacked") is None
    assert browser.errors == []
    neuron = store.neuron("mlp_post.2", 7, **given).view()
    browser.open(neuron.to_html(tmp_path / "neuron.html"))
    assert len(browser.evaluate(words)) == 20
    assert "direct path" in browser.evaluate(f"{part}.textContent")
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.errors == []


def test_the_command_line_takes_the_model_and_the_kind(tmp_path: Path) -> None:
    """``export factors --kind pca --model`` writes them, into a page and into a notebook."""
    model, tokenizer = toy_causal_model("llama", tied=False)
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    store = tmp_path / "store"
    actstore.capture(tmp_path / "model", PLAIN, store, context=64).pca("mlp_post", 2, name="axes")
    options = ["--name", "axes", "--kind", "pca", "--model", str(tmp_path / "model")]
    for to, said in (("x.html", "promoted"), ("x.ipynb", "model=")):
        args = ["export", str(store), "factors", *options, "--to", str(tmp_path / to)]
        result = CliRunner().invoke(main, args)
        assert result.exit_code == 0, result.output
        assert said in (tmp_path / to).read_text()
    assert '\\"promoted\\":' in (tmp_path / "x.ipynb").read_text()
