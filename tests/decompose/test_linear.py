"""PCA and ICA out of core equal scikit-learn's in memory; clusters find neurons of one kind."""

import re
import shutil

import numpy as np
import pytest
import scipy.linalg
import sklearn.decomposition

from actstore.decompose import (
    Factors,
    cluster_neurons,
    ica,
    moments,
    nmf,
    pca,
    project,
    stability,
)
from actstore.decompose.ranked import RankedRows
from actstore.errors import ArgumentError, BudgetExceeded, NotEnoughDisk
from tests.synthetic import synthetic_store

K = 5
WIDTHS = {"mlp_post.0": 43, "mlp_post.1": 29}


def whole(store, factors):
    """Return the rows of the factors in float64, as they are stored."""
    ids = store.rows().row_ids()
    return np.hstack([store[i.site][ids].astype(np.float64) for i in factors.sites])


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Mixtures of heavy-tailed sources, far from zero, one column constant and one copied."""
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(K, sum(WIDTHS.values()))) * np.geomspace(3, 1, K)[:, None]
    matrix = rng.laplace(size=(4000, K)) @ mixing + 0.05 * rng.normal(size=(4000, 72))
    matrix += np.linspace(-40, 40, 72)
    matrix[:, 7] = 3.5
    matrix[:, 11] = matrix[:, 12]
    sites = np.split(matrix, [43], axis=1)
    path = tmp_path_factory.mktemp("linear") / "store"
    values = dict(zip(WIDTHS, sites, strict=True))
    return synthetic_store(path, values, dtype="float32", segment_rows=1024)


@pytest.fixture(scope="module")
def components(store):
    """The principal components."""
    return pca(store, None, K)


def test_pca_equals_scikit_learn(store, components):
    """Loadings, variances and scores are those of scikit-learn's full decomposition."""
    matrix = whole(store, components)
    expected = sklearn.decomposition.PCA(K, svd_solver="full").fit(matrix)
    table = components.df()
    ids = store.rows().row_ids()
    signs = np.sign((components.loadings * expected.components_).sum(1))

    np.testing.assert_allclose(table.explained_variance, expected.explained_variance_, rtol=1e-6)
    np.testing.assert_allclose(table.share, expected.explained_variance_ratio_, rtol=1e-6)
    np.testing.assert_allclose(
        components.loadings, signs[:, None] * expected.components_, atol=1e-6
    )
    np.testing.assert_allclose(
        components.scores(ids), signs * expected.transform(matrix), atol=2e-4
    )
    np.testing.assert_allclose(components.result.array("mean", 1)[0], matrix.mean(0), rtol=1e-6)
    assert components.summary["error"] == pytest.approx(
        np.sqrt(1 - expected.explained_variance_ratio_.sum()), abs=1e-6
    )


def test_the_mean_of_all_rows_is_taken_off(store, components, monkeypatch):
    """A pilot mean of a few rows, off by much, gives the same components."""
    monkeypatch.setattr(moments, "_PILOT_ROWS", 32)
    found = pca(store, None, K, name="pilot")

    np.testing.assert_allclose(found.loadings, components.loadings, atol=1e-6)
    variances = [f.df().explained_variance for f in (found, components)]
    np.testing.assert_allclose(*variances, rtol=1e-6)


def test_the_products_are_not_copied(store, monkeypatch):
    """Eigenvectors are found where the products stand: a copy would take 16 bytes a pair."""
    eigh, seen = scipy.linalg.eigh, []

    def watched(matrix, **options):
        seen.append(matrix)
        before = matrix.copy()
        found = eigh(matrix, **options)
        assert not np.array_equal(matrix, before)  # written over
        return found

    monkeypatch.setattr(scipy.linalg, "eigh", watched)
    pca(store, None, K, name="watched")
    assert [matrix.shape for matrix in seen] == [(72, 72)]


def test_the_largest_loading_is_positive(components):
    """Signs do not depend on how eigenvectors come out."""
    largest = np.abs(components.loadings).argmax(1)

    assert (components.loadings[np.arange(K), largest] > 0).all()


def test_sites_of_equal_variance(store):
    """With scale="site" each site has the same variance, and PCA is of the scaled columns."""
    found = pca(store, None, 3, scale="site")
    matrix = whole(store, found)
    scales = np.repeat([found.summary["site_scales"][n] for n in WIDTHS], list(WIDTHS.values()))
    scaled = matrix * scales
    expected = sklearn.decomposition.PCA(3, svd_solver="full").fit(scaled)
    variances = scaled.var(0)
    explained = expected.explained_variance_

    assert variances[:43].sum() == pytest.approx(variances[43:].sum(), rel=1e-6)
    np.testing.assert_allclose(found.df().explained_variance, explained, rtol=1e-6)
    ids = store.rows().row_ids()[::37]
    np.testing.assert_allclose(
        np.abs(found.scores(ids)), np.abs(expected.transform(scaled[::37])), atol=1e-4
    )


def test_factors_of_both_signs_have_bottoms_and_shares_of_sites(store, components):
    """Exemplars have a lowest end; shares of the sites add up to 1; the result reopens."""
    ids = store.rows().row_ids()
    scores = components.scores(ids)[:, 1]
    low = components.top_tokens(1, 3, "bottom").column("row_id").to_pylist()

    assert low == ids[np.argsort(scores, kind="stable")[:3]].tolist()
    shares = components.table("factor_sites").to_pandas().groupby("factor").share.sum()
    np.testing.assert_allclose(shares, 1, rtol=1e-6)
    reopened = Factors.open(store, components.name, kind="pca")
    np.testing.assert_array_equal(reopened.loadings, components.loadings)


def test_rows_project_to_the_scores_of_pca_and_ica(store, components):
    """Projection takes the mean off, clips nothing, and gives the scores that are stored."""
    ids = store.rows().row_ids()[5::61]
    for factors in (components, ica(store, None, 3, name="projected")):
        found = project(factors, ids)
        np.testing.assert_allclose(found.scores, factors.scores(ids), atol=1e-5)


def test_ica_equals_scikit_learn(store):
    """Each source correlates above 0.99 with one of scikit-learn's FastICA on the whole matrix."""
    found = ica(store, None, K)
    matrix = whole(store, found)
    model = sklearn.decomposition.FastICA(
        K, whiten="unit-variance", random_state=3, max_iter=500, tol=1e-6
    )
    expected = model.fit_transform(matrix)
    scores = found.scores(store.rows().row_ids()).astype(np.float64)
    correlations = np.abs(np.corrcoef(scores.T, expected.T)[:K, K:])

    assert found.summary["converged"]
    assert found.summary["n_seen_rows"] == len(matrix)
    assert (correlations.max(1) > 0.99).all()
    assert sorted(correlations.argmax(1)) == list(range(K))
    np.testing.assert_allclose(np.linalg.norm(found.loadings, axis=1), 1, rtol=1e-6)
    # What the factors hold of the rows is what the components do: sources only turn them.
    rest = matrix - matrix.mean(0) - scores @ found.loadings
    expected_error = np.linalg.norm(rest) / np.linalg.norm(matrix - matrix.mean(0))
    assert found.summary["error"] == pytest.approx(expected_error, abs=1e-4)
    assert found.df().share.sum() == pytest.approx(1 - expected_error**2, abs=1e-4)


def test_clusters_are_of_neurons_with_the_same_factors(tmp_path):
    """Neurons of one planted factor are together; dead ones are in no cluster."""
    rng = np.random.default_rng(0)
    group = np.array([0] * 20 + [1] * 12 + [2] * 7 + [3] * 3)
    loadings = np.array([[1.0 if g == j else 0.0 for g in group] for j in range(3)])
    matrix = rng.gamma(1.0, size=(2000, 3)) @ (loadings * rng.uniform(0.5, 2, size=42))
    store = synthetic_store(
        tmp_path / "store", {"mlp_post.0": matrix[:, :15], "mlp_post.1": matrix[:, 15:]}
    )
    table = cluster_neurons(nmf(store, None, 3), 3).to_pandas()

    assert table.groupby("site").neuron.apply(list).to_dict() == {
        "mlp_post.0": list(range(15)),
        "mlp_post.1": list(range(27)),
    }
    assert table.cluster.isna().tolist() == (group == 3).tolist()
    assert table.cluster[group < 3].tolist() == group[group < 3].tolist()
    assert table.cosine[group < 3].min() > 0.99
    with pytest.raises(ArgumentError, match=r"n_clusters = 40 cannot be used; expected 1 … 39"):
        cluster_neurons(Factors.open(store), 40)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda s: pca(s, None, 73), ArgumentError, r"n_components = 73 .*expected 1 … 72"),
        (lambda s: pca(s, None, 2, scale="x"), ArgumentError, r"scale = 'x' is unknown"),
        (lambda s: ica(s, None, 72), ArgumentError, r"dimensions that matter\. Pass n_components"),
        (lambda s: pca(s, None, 2, rows="some"), ArgumentError, "'content', 'all'"),
    ],
)
def test_arguments_are_refused(store, call, error, message):
    """What cannot be used is refused with what can, and leaves nothing."""
    before = [r.name for r in store.results()]
    with pytest.raises(error, match=message):
        call(store)
    assert [r.name for r in store.results()] == before


def test_products_that_do_not_fit_are_refused(tmp_path):
    """Twelve bytes a pair of neurons: the message names the budget it takes."""
    store = synthetic_store(tmp_path / "store", {"mlp_post.0": np.ones((200, 3000))})

    with pytest.raises(BudgetExceeded, match=r"Pass budget="):
        pca(store, None, 2, budget="64MiB")


@pytest.mark.parametrize("method", [nmf, pca, ica])
def test_a_disk_that_cannot_hold_the_scores_is_refused(store, monkeypatch, method):
    """The message names the bytes, nothing is read, and what is named is what is written."""
    before = [r.name for r in store.results()]
    usage = shutil.disk_usage(store.path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=12_345))
    with monkeypatch.context() as reading:
        reading.setattr(RankedRows, "read", None)
        with pytest.raises(
            NotEnoughDisk, match=r"12,345 are free there\. .*n_components="
        ) as raised:
            method(store, None, 2)
    assert [r.name for r in store.results()] == before
    needed = int(re.search(r"needs ([\d,]+) bytes", str(raised.value))[1].replace(",", ""))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed))
    made = method(store, None, 2, name="fits")

    scores = [made.result.path / n for n in made.result.files if n.startswith("scores/c/")]
    twice = sum(path.stat().st_size for path in scores) + 4 * 2 * store.rows().n_rows
    assert needed == twice + 32 * 2 * sum(WIDTHS.values())


def test_stability_is_of_nmf(store, components):
    """Principal components are refused before anything is read, with what to give instead."""
    with pytest.raises(ArgumentError, match=r"of the kind pca; .*store\.nmf"):
        stability(components)
