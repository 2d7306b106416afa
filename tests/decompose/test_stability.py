"""Planted factors come back from other seeds and documents; factors of noise do not."""

import itertools

import numpy as np
import pytest

from actstore.decompose import Stability, nmf, stability
from actstore.decompose.ranked import KeptRows, RankedRows
from actstore.decompose.stability import compare, match, split_documents
from actstore.errors import ArgumentError, BudgetExceeded, ResultExists
from tests.synthetic import synthetic_store

K = 4
WIDTHS = {"mlp_post.0": 61, "mlp_post.1": 47}


def values_of(n_rows, noise):
    """Return two sites with factors that are on at a third of the rows each."""
    rng = np.random.default_rng(0)
    width = sum(WIDTHS.values())
    loadings = rng.random((K, width)) * (rng.random((K, width)) < 0.3)
    scores = rng.gamma(2.0, size=(n_rows, K)) * (rng.random((n_rows, K)) < 0.35)
    matrix = scores @ loadings + noise * np.abs(rng.normal(size=(n_rows, width)))
    sites = np.split(matrix, np.cumsum(list(WIDTHS.values()))[:-1], axis=1)
    return dict(zip(WIDTHS, sites, strict=True))


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Four planted factors in 40 documents."""
    path = tmp_path_factory.mktemp("stability") / "store"
    return synthetic_store(path, values_of(4000, 0.02), segment_rows=1024)


@pytest.fixture(scope="module")
def found(store):
    """The stability of the planted factors."""
    return stability(nmf(store, None, K, name="planted"), seeds=3, splits=2, name="first")


def test_planted_factors_are_stable(found):
    """Every planted factor comes back near cosine 1, far above the null and its runner-up."""
    table = found.df()

    for name in ("cosine", "seed_cosine", "split_cosine"):
        assert table[name].min() > 0.97, name
    for name in ("seed_correlation", "split_correlation"):
        assert table[name].min() > 0.97, name
    assert table.null_cosine.max() < 0.85
    assert table.runner_up_cosine.max() < 0.8
    assert table.stable.all()
    assert found.summary["n_stable"] == K
    assert found.summary["medians"]["split_cosine"] == pytest.approx(table.split_cosine.median())
    assert "4 of 4 factors of 'planted' are stable" in repr(found)


def test_factors_of_noise_are_not_stable(tmp_path):
    """Independent neurons have no factors that other documents would have too."""
    rng = np.random.default_rng(0)
    values = {"mlp_post.0": rng.gamma(1.0, size=(3000, 90))}
    store = synthetic_store(tmp_path / "store", values)
    table = stability(nmf(store, None, 8), seeds=2, splits=2).df()

    assert not table.stable.any()
    assert table.split_cosine.median() < 0.9


def test_the_result_reopens_and_is_a_view(store, found):
    """What was computed is read again, and joins with its factors in SQL."""
    from actstore.query import Database

    reopened = Stability(store, store.result("stability", "first"))
    assert reopened.to_arrow().equals(found.to_arrow())
    assert reopened.summary["seconds"].keys() == {"fits", "nulls", "held-out scores"}
    rows = Database(store).sql(
        "SELECT s.factor, s.stable FROM factor_stability s JOIN factors f "
        "ON f.result = s.of_result AND f.factor = s.factor ORDER BY s.factor"
    )
    assert rows.rows() == [(j, True) for j in range(K)]
    with pytest.raises(ResultExists):
        stability(nmf(store, None, 2, name="again"), seeds=2, name="first")


@pytest.mark.parametrize("n_parts", [1, 2, 3])
def test_parts_are_whole_documents_of_about_as_many_rows(store, n_parts):
    """No document is in two parts or held out too; all rows are somewhere; sizes are alike."""
    parts, held = split_documents(store, store.rows(), "", n_parts, 5)
    documents = [
        set(store.tokens_of(part.row_ids()).column("document").to_pylist())
        for part in (*parts, held)
    ]

    for a, b in itertools.combinations(documents, 2):
        assert not a & b
    ids = np.concatenate([part.row_ids() for part in (*parts, held)])
    np.testing.assert_array_equal(np.sort(ids), store.rows().row_ids())
    sizes = [part.n_rows for part in parts]
    assert max(sizes) - min(sizes) < 0.06 * sum(sizes)
    assert 0.05 < held.n_rows / len(ids) < 0.2
    again = split_documents(store, store.rows(), "", n_parts, 5)[0]
    assert [p.n_rows for p in again] == sizes
    other, _ = split_documents(store, store.rows(), "", n_parts, 6)
    assert not np.array_equal(other[0].row_ids(), parts[0].row_ids())


def test_matches_are_the_assignment_with_the_largest_sum():
    """No other assignment has a larger sum of cosines; the runner-up is the best of the rest."""
    rng = np.random.default_rng(0)
    a, b = rng.random((5, 11)).astype(np.float32), rng.random((5, 11)).astype(np.float32)
    a[3] = 0
    matches, cosines, runners_up = match(a, 7 * b)
    norms = np.linalg.norm(a, axis=1)[:, None] * np.linalg.norm(b, axis=1)
    table = a.astype(float) @ b.T.astype(float) / np.where(norms > 0, norms, 1)
    best = max(
        sum(table[i, j] for i, j in enumerate(order)) for order in itertools.permutations(range(5))
    )

    assert cosines.sum() == pytest.approx(best, abs=1e-6)
    np.testing.assert_allclose(cosines, table[np.arange(5), matches], atol=1e-6)
    for i in range(5):
        assert runners_up[i] == pytest.approx(np.delete(table[i], matches[i]).max(), abs=1e-6)


def test_counterparts_are_compared_not_places():
    """Fits whose factors stand in another order compare as if they stood in this one."""
    rng = np.random.default_rng(1)
    real = rng.random((3, 19)).astype(np.float32)
    scores = rng.random((50, 3)).astype(np.float32)
    order, other = [2, 0, 1], [1, 2, 0]
    noise = [rng.random((3, 19)).astype(np.float32)]
    found = compare(real, [[real[order], real]], noise, [scores[:, order], scores])

    np.testing.assert_allclose(found["seed_cosine"], 1)
    np.testing.assert_allclose(found["seed_correlation"], 1)
    assert np.isnan(found["split_cosine"]).all()
    # A fit whose scores belong to other factors than its loadings say does not correlate.
    wrong = compare(real, [[real[order], real]], noise, [scores[:, other], scores])
    assert wrong["seed_correlation"].max() < 0.5


def test_turned_columns_keep_their_values_and_lose_each_other(store):
    """Each neuron keeps its values exactly; neurons that were high together are no more."""
    infos = store.select(None)
    ranked = RankedRows(store, infos, store.rows())
    rng = np.random.default_rng(0)
    ranks = rng.permutation(ranked.n_rows)
    kept = KeptRows(ranked, ranks)

    def whole():
        arrays = kept.empty(len(ranks))
        kept.read(np.arange(len(ranks)), [[array] for array in arrays])
        return np.hstack(arrays).astype(np.float64)

    before = whole()
    kept.turn_columns(rng)
    after = whole()

    np.testing.assert_array_equal(np.sort(after, axis=0), np.sort(before, axis=0))
    upper = np.triu_indices(before.shape[1], 1)
    correlations = [np.abs(np.corrcoef(x.T)[upper]) for x in (before, after)]
    assert np.quantile(correlations[0], 0.9) > 0.4
    # Of independent columns 99.9 % are below 3.3 / sqrt(n).
    assert np.quantile(correlations[1], 0.99) < 3.3 / np.sqrt(len(ranks))


def test_one_part_compares_seeds_alone(store):
    """With splits=1 there are no other documents, and columns that need them hold nothing."""
    table = stability(nmf(store, None, 2, name="one"), seeds=2, splits=1, nulls=1)

    assert table.df().split_cosine.isna().all()
    assert table.summary["medians"]["split_cosine"] is None
    assert table.df().seed_cosine.notna().all()


def test_signed_factors_are_compared_as_they_were_made(store):
    """Factors with loadings of both signs and few active scores are fitted again as such."""
    factors = nmf(store, None, K, signed=True, active=0.5, name="signed")
    table = stability(factors, seeds=2, splits=2, nulls=1).df()

    assert table.cosine.between(-1, 1).all()
    assert table.cosine.median() > table.null_cosine.median()


def test_what_cannot_be_compared_is_refused(tmp_path):
    """Too few documents, seeds or memory: the remedy names an argument."""
    values = {"mlp_post.0": np.random.default_rng(0).random((90, 7))}
    store = synthetic_store(tmp_path / "store", values, documents=[50, 40])
    factors = nmf(store, None, 2)

    with pytest.raises(ArgumentError, match=r"at least 3 documents.*are of 2 of.*splits=1"):
        stability(factors)
    with pytest.raises(ArgumentError, match="seeds = 1 was given"):
        stability(factors, seeds=1)
    with pytest.raises(BudgetExceeded, match="fewer seeds or splits"):
        stability(factors, seeds=10**6, budget="64MiB")
    assert [r.kind for r in store.results()] == ["nmf"]
