"""Projection gives rows of any store the scores that the loadings fit them best with."""

import dataclasses

import numpy as np
import pytest
import scipy.optimize

from actstore.decompose import nmf, project
from actstore.errors import ArgumentError, BudgetExceeded, RowNotFound, StoreMismatch
from actstore.store import Rows
from tests.synthetic import WORDS, synthetic_store


def values_of(n_rows, seed=0):
    """Return two sites of rows that are mixtures of a few patterns."""
    rng = np.random.default_rng(seed)
    patterns = np.random.default_rng(99).random((4, 30))
    matrix = rng.gamma(1, size=(n_rows, 4)) @ patterns
    return {"mlp_post.0": matrix[:, :17], "mlp_post.1": 7 * matrix[:, 17:]}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Two sites, all segments committed."""
    return synthetic_store(
        tmp_path_factory.mktemp("project") / "store", values_of(900), segment_rows=256
    )


@pytest.fixture(scope="module")
def factors(store):
    """Factors of some of the rows."""
    ids = store.rows().row_ids()[:400]
    rows = Rows.from_row_ids("the first", store.meta.segment_rows, ids)
    return nmf(store, None, 3, rows=rows)


def test_rows_of_the_factors_get_their_scores_again(store, factors):
    """What was factorised projects to the scores that are stored."""
    ids = store.rows().row_ids()[:400]

    np.testing.assert_allclose(project(factors, ids).scores, factors.scores(ids), atol=1e-4)


def test_other_rows_get_the_best_scores(store, factors):
    """Rows that were not chosen get what non-negative least squares gives them, in any order."""
    ids = np.random.default_rng(0).permutation(store.rows().row_ids()[400:])[:60]
    ids = np.concatenate([ids, ids[:5]])
    found = project(factors, ids)
    scales = factors.summary["site_scales"]
    matrix = np.hstack(
        [store[i.site][ids].astype(float) * scales[str(i.site)] for i in factors.sites]
    )
    expected = [scipy.optimize.nnls(factors.loadings.T, row)[0] for row in matrix]

    np.testing.assert_array_equal(found.row_ids, ids)
    np.testing.assert_allclose(found.scores, expected, atol=1e-3 * np.max(expected))


def test_rows_of_another_store_carry_their_own_tokens(tmp_path, store, factors):
    """Scores and tokens are of the store the rows are in, row by row."""
    other = synthetic_store(tmp_path / "other", values_of(300, seed=1), seed=5)
    found = project(factors, store=other)
    table = found.df()

    np.testing.assert_array_equal(found.row_ids, other.rows().row_ids())
    tokens = other.tokens_of(found.row_ids).to_pandas()
    assert (table.token_id == tokens.token_id).all()
    assert table.token.tolist() == [f" {WORDS[t - 1]}" for t in tokens.token_id]
    alone = project(factors, [int(found.row_ids[77])], store=other)
    # Codes are solved until none moves by more than 1e-4 of the row's largest.
    np.testing.assert_allclose(
        alone.scores[0], found.scores[77], rtol=0, atol=2e-4 * found.scores[77].max()
    )
    assert table.factor_2[77] == found.scores[77, 2]


def test_rows_that_are_not_there_are_refused(store, factors):
    """Holes, no rows, too many for the budget and a store of another width are errors."""
    with pytest.raises(RowNotFound, match="hole"):
        project(factors, [255])
    with pytest.raises(ArgumentError, match="names no row"):
        project(factors, [])
    with pytest.raises(ArgumentError, match="'content', 'all'"):
        project(factors, "some")
    with pytest.raises(BudgetExceeded, match="project fewer rows"):
        project(factors, np.repeat(store.rows().row_ids(), 20_000), budget="64MiB")


def test_a_store_of_other_sites_is_refused(tmp_path, factors):
    """The message names the site that does not fit."""
    other = synthetic_store(tmp_path / "other", {"mlp_post.0": np.ones((50, 17))})

    with pytest.raises(StoreMismatch, match=r"has no mlp_post\.1 of 13 neurons"):
        project(factors, store=other)


@pytest.mark.parametrize("options", [{"signed": True, "active": 0.5}, {"mode": "ecco"}])
def test_rows_project_as_the_factors_were_made(store, options):
    """Values below zero, scales and the limit of active scores are those of the factorisation."""
    factors = nmf(store, None, 4, name=next(iter(options)), **options)
    ids = store.rows().row_ids()[::31]
    found = project(factors, ids).scores

    np.testing.assert_allclose(found, factors.scores(ids), atol=1e-3 * found.max())
    if "active" in options:
        assert (found > 0).sum(1).max() <= 2


def test_a_store_of_another_model_is_refused(tmp_path, factors):
    """Activations of other weights, of the same sites and widths, have no scores in the factors."""
    values = {str(info.site): np.ones((50, info.width)) for info in factors.sites}
    other = synthetic_store(tmp_path / "other", values)
    model = {**other.meta.model, "weights": "other"}
    other.meta = dataclasses.replace(other.meta, model=model)

    with pytest.raises(StoreMismatch, match="captured with other weights"):
        project(factors, store=other)
