"""Factors of the public face: scores of new text and of other rows, and what is printed of them."""

import numpy as np
import pytest

import actstore
from actstore.errors import ArgumentError, StoreMismatch
from tests.toys import toy_model

TEXTS = [
    "The keys to the cabinet are here.",
    "A red fox jumps over two lazy dogs.",
    "war and peace",
]
HOSTILE = "\x1b[31m</script><b>[bold]\u202e"


@pytest.fixture(scope="module")
def toy():
    """A random GPT-2 and its tokenizer."""
    return toy_model("gpt2")


@pytest.fixture(scope="module")
def store(toy, tmp_path_factory):
    """Texts captured in windows of eight tokens."""
    module, tokenizer = toy
    path = tmp_path_factory.mktemp("new-text") / "store"
    return actstore.capture(module, store=path, text=TEXTS, tokenizer=tokenizer, context=8)


@pytest.fixture(scope="module")
def factors(store):
    """Factors of the whole model."""
    return store.nmf("mlp_post", 3)


def test_text_of_the_store_gets_the_scores_of_the_store(toy, store, factors):
    """The same documents in another order: every token has the scores it has in the store."""
    module, tokenizer = toy
    found = factors.transform([TEXTS[2], TEXTS[0]], model=module, tokenizer=tokenizer).df()
    mine = store.tokens_of(store.rows().row_ids()).to_pandas()
    scores = factors.scores(mine.row_id.to_numpy())
    of_document = {0: 2, 1: 0}

    assert len(found) == sum((mine.document == d).sum() for d in (2, 0))
    for row in found.to_dict("records"):
        same = (mine.document == of_document[row["document"]]) & (mine.position == row["position"])
        same &= mine.token_id == row["token_id"]
        places = np.flatnonzero(same)
        expected = scores[places]
        actual = [row[f"factor_{j}"] for j in range(3)]
        # Two windows of a document may hold the same token at the same position.
        assert np.abs(expected - actual).max(1).min() < 2e-3 * scores.max()


def test_another_model_is_refused(factors):
    """Scores of another model's activations would mean nothing."""
    module, tokenizer = toy_model("gpt2", seed=1)

    with pytest.raises(StoreMismatch, match="Give the model it was captured from"):
        factors.transform("new text", model=module, tokenizer=tokenizer)


def test_text_without_content_is_refused(toy, factors):
    """A single token is the first of its document: there is no row to give scores to."""
    module, tokenizer = toy

    with pytest.raises(
        ArgumentError, match=r"text = 'a' has 1 tokens?, and none of content; .* long"
    ):
        factors.transform("a", model=module, tokenizer=tokenizer)


def test_rows_of_a_condition_are_projected(store, factors):
    """An SQL condition chooses rows, as everywhere."""
    found = factors.project("source = 'text 1' AND position > 2")
    tokens = store.tokens_of(found.row_ids)

    assert set(tokens.column("document").to_pylist()) == {1}
    assert min(tokens.column("position").to_pylist()) == 3
    np.testing.assert_allclose(found.scores, factors.scores(found.row_ids), atol=1e-3)


def test_a_hostile_token_is_shown_and_not_obeyed(toy, tmp_path):
    """Escapes, markup and marks of direction are visible signs in print; as data they stay."""
    module, tokenizer = toy
    store = actstore.capture(module, text=[HOSTILE] * 4, tokenizer=tokenizer, context=32)
    factors = store.nmf("mlp_post", 2)
    printed = repr(factors)

    assert "\x1b" not in printed
    assert "\u202e" not in printed
    texts = "".join(factors.token_types(0, 100).df().token)
    assert texts


def test_factors_print_as_a_table(factors):
    """The lines say what and how good; each factor has its share, sites and token types."""
    lines = repr(factors).splitlines()

    assert lines[0] == (
        f"nmf-1: 3 factors of mlp_post.0–2 (192 neurons) over {factors.summary['n_rows']} rows "
        f"(content) of {factors.store.path}"
    )
    assert f"error {factors.summary['error']:.4f}" in lines[1]
    assert "KKT residual" in lines[1]
    assert lines[3].split() == ["factor", "share", "neurons", "where", "tokens", "note"]
    first = factors.token_types(0, 1).df().token[0].strip()
    assert first in lines[4]
    assert f"{factors.df().share[0]:.1%}" in lines[4]


def test_much_clipping_is_said_first(factors):
    """Where clipping threw away over a third of the energy, that is the first line."""
    certificates = factors.summary["certificates"]
    before = certificates["clipped_energy"]
    try:
        certificates["clipped_energy"] = 0.48
        assert repr(factors).startswith("clipping at zero discarded 48% of the energy")
    finally:
        certificates["clipped_energy"] = before
