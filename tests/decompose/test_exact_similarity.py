"""Exact CKA and the CCA family against plain NumPy in float64, over data that breaks others."""

import warnings
from unittest import mock

import distributed
import numpy as np
import pytest
import torch

from actstore.decompose import cca, in_process, measuring, moments, on_dask, similarity
from actstore.decompose.engine import Engine
from actstore.decompose.scan import Scan
from actstore.errors import ArgumentError, BudgetExceeded
from tests.decompose import references
from tests.synthetic import synthetic_store


def drifting(n_rows: int, widths: list[int], seed: int = 0) -> dict[str, np.ndarray]:
    """Return sites that share a hidden state less and less, with means far from zero."""
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(n_rows, 16))
    sites = {}
    for layer, width in enumerate(widths):
        noise = rng.normal(size=(n_rows, width))
        sites[f"resid_post.{layer}"] = hidden @ rng.normal(size=(16, width)) / 4 + noise + 5
        hidden = hidden + 0.5 * rng.normal(size=hidden.shape)
    return sites


def stored(store) -> list[np.ndarray]:
    """Return the content rows of all sites in float64, as they are stored."""
    ids = store.rows().row_ids()
    return [store[site][ids].astype(np.float64) for site in store.sites]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Three sites of unequal widths, 3,000 rows."""
    return synthetic_store(tmp_path_factory.mktemp("exact") / "store", drifting(3000, [37, 23, 41]))


# -- CKA -----------------------------------------------------------------------------------------


def test_exact_cka_is_the_reference(store, monkeypatch):
    """Biased and debiased, from products of columns, within 1e-6 of full kernels in float64."""
    monkeypatch.setattr(moments, "_PILOT_ROWS", 32)  # so that its mean is not that of all rows
    found = similarity(store, None, method="exact")
    biased = found.df().biased.to_numpy().reshape(3, 3)

    assert found.summary["side"] == "columns"
    np.testing.assert_allclose(found.matrix, references.debiased_cka(stored(store)), atol=1e-6)
    np.testing.assert_allclose(biased, references.biased_cka(stored(store)), atol=1e-6)
    np.testing.assert_array_equal(found.low, found.matrix)
    assert not np.isnan(found.text_low).any()


def test_fewer_rows_than_columns_go_by_rows(tmp_path):
    """Where rows are few their kernels are multiplied, and the answer is the reference's."""
    store = synthetic_store(tmp_path / "store", drifting(60, [90, 70]))

    found = similarity(store, None, method="exact")

    assert found.summary["side"] == "rows"
    np.testing.assert_allclose(found.matrix, references.debiased_cka(stored(store)), atol=1e-6)
    assert found.df().biased[1] > found.matrix[0, 1] + 0.2  # what debiasing is for


@pytest.mark.parametrize("free_sites", [1.1, 2.2])
def test_tiles_of_pairs_give_the_same(store, free_sites, monkeypatch):
    """Where the products of all sites do not fit, pairs of groups come one after the other."""
    widest = 12 * 41 * 41
    seen = []
    whole = {m: similarity(store, None, measure=m, **o) for m, o in BOTH}
    tiles = moments.tiles
    monkeypatch.setattr(
        measuring,
        "tiles",
        lambda *args, **options: (
            seen.append(tile) or tile
            for tile in tiles(*args, **{**options, "free_bytes": int(widest * free_sites)})
        ),
    )
    tiled = {m: similarity(store, None, measure=m, **o) for m, o in BOTH}

    assert len(seen) >= 2 * 3
    for measure, found in tiled.items():
        np.testing.assert_allclose(found.matrix, whole[measure].matrix, atol=1e-7)


BOTH = [("cka", {"method": "exact"}), ("pwcca", {})]


def test_products_that_cannot_fit_are_refused(store):
    """The message says by how much the budget is short."""
    frames = [moments.Frame(torch.zeros(w), torch.ones(w)) for w in (37, 23, 41)]
    with pytest.raises(BudgetExceeded, match=r"41 columns take [\d,]+ bytes.* budget= larger"):
        list(moments.tiles(None, [37, 23, 41], frames, Engine.local(), free_bytes=9000))


def at_once(n_workers, n_given):
    """Return a client whose tasks are done when they are submitted; it tells what each is given."""

    def submit(function, *arguments, **_):
        given = [[f.value for f in a] if isinstance(a, list) else a for a in arguments]
        n_given.extend(len(a) for a in arguments if isinstance(a, list))
        done = mock.Mock(status="finished", value=function(*given))
        done.add_done_callback = lambda call: call(done)
        return done

    return mock.Mock(
        nthreads=lambda: dict.fromkeys(range(n_workers), 1),
        submit=submit,
        gather=lambda futures: [future.value for future in futures],
    )


@pytest.mark.parametrize("n_workers", [1, 3])
def test_products_on_workers_fit_their_share(tmp_path, monkeypatch, n_workers):
    """A worker holds no more sums at a time than its tile was cut for, and the answer is the same.

    What is reserved is nearly the budget here, so that there is room for nothing else.
    """
    widths = [37, 23, 41]
    store = synthetic_store(tmp_path / "store", drifting(3000, widths), segment_rows=64)
    assert len(store.committed) > on_dask.MOST_RANGES
    held, reserved, n_given = [], [], []
    engine = Engine(at_once(n_workers, n_given))
    add = in_process.Tree.add

    def counted(tree, sums):
        held.append(len(tree._parts) + 1)
        add(tree, sums)

    monkeypatch.setattr(in_process.Tree, "add", counted)
    frames = [moments.Frame(torch.zeros(w), torch.ones(w)) for w in widths]
    one = 4 * (sum(widths) ** 2 + sum(w * w for w in widths))
    free = 6 * one + 4 * max(widths) * sum(widths)

    def make_scan(sites, n_bytes):
        reserved.append(n_bytes)
        budget = 2**26 + n_bytes
        infos = [store.select(None)[site] for site in sites]
        return Scan(store, infos, store.rows(), budget_bytes=budget, reserved_bytes=budget - 2**25)

    (tile,) = moments.tiles(make_scan, widths, frames, engine, free_bytes=free)
    assert 1 < max(held) <= on_dask.SUMS_OF_WORKER
    assert max(n_given, default=0) == (0 if n_workers == 1 else 2)
    (here,) = moments.tiles(make_scan, widths, frames, Engine.local(), free_bytes=free)
    assert reserved == [free, one + 4 * max(widths) * sum(widths)]
    assert len(list(moments.tiles(make_scan, widths, frames, engine, free_bytes=free - 1))) > 1
    np.testing.assert_allclose(tile.moment(0, 2), here.moment(0, 2), atol=1e-4)


def test_dask_gives_the_same(store):
    """Batches and products on workers are those of this process."""
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as own,
        distributed.Client(own) as client,
    ):
        for measure, options in (("cka", {}), *BOTH):
            there = similarity(store, None, measure=measure, engine=Engine(client), **options)
            here = similarity(store, None, measure=measure, **options)
            np.testing.assert_allclose(there.matrix, here.matrix, atol=1e-9)
            np.testing.assert_allclose(there.high, here.high, atol=1e-9)


@pytest.mark.parametrize("method", ["estimate", "exact"])
def test_standardized_columns_count_alike(tmp_path, method):
    """One dominating channel decides CKA, standardized it does not; constants stay out."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4000, 12))
    y = x @ rng.normal(size=(12, 12)) / 3
    x[:, 3], x[:, 5] = 40 * rng.normal(size=4000), 7
    store = synthetic_store(tmp_path / "store", {"mlp_post.0": x, "mlp_post.1": y})
    a, b = stored(store)
    scale = np.where(a.std(0) > 0, a.std(0), 1)

    plain = similarity(store, None, method=method)
    found = similarity(store, None, method=method, standardize=True)

    expected = references.debiased_cka([a / scale, b / b.std(0)])
    np.testing.assert_allclose(found.matrix, expected, atol=1e-6 if method == "exact" else 0.03)
    assert plain.matrix[0, 1] < 0.1 < found.matrix[0, 1]
    assert plain.df().max_channel_share_a[0] > 0.9
    assert found.df().max_channel_share_a[0] == pytest.approx(1 / 11, abs=0.01)


# -- the CCA family ------------------------------------------------------------------------------


def test_cca_measures_are_the_references(store, monkeypatch):
    """Mean CCA, R2, SVCCA and both PWCCAs of real columns, from moments alone."""
    monkeypatch.setattr(moments, "_PILOT_ROWS", 32)
    blocks = stored(store)
    found = {m: similarity(store, None, measure=m) for m in ("cca", "pwcca")}
    by_dimensions = similarity(store, None, measure="svcca", principal=9)
    google = similarity(store, None, measure="pwcca", variant="svcca")
    ecco = similarity(store, None, measure="cca", share=0.98)
    r2 = found["cca"].df().r2.to_numpy().reshape(3, 3)
    for a, b in ((0, 1), (0, 2), (1, 2), (2, 0)):
        x, y = blocks[a], blocks[b]
        rho, _ = references.variates(x, y)
        assert found["cca"].matrix[a, b] == pytest.approx(rho.mean(), abs=1e-8)
        assert r2[a, b] == pytest.approx(np.square(rho).mean(), abs=1e-8)
        assert by_dimensions.matrix[a, b] == pytest.approx(
            references.variates(x, y, 9, 9)[0].mean(), abs=1e-6
        )
        assert found["pwcca"].matrix[a, b] == pytest.approx(references.pwcca(x, y), abs=1e-6)
        smaller, larger = sorted((x, y), key=lambda block: block.shape[1])
        assert google.matrix[a, b] == pytest.approx(
            references.pwcca_svcca(smaller, larger), abs=1e-6
        )
        leading = next(i for i in range(99) if rho[:i].sum() >= 0.98 * rho.sum())
        assert ecco.matrix[a, b] == pytest.approx(rho[:leading].mean(), abs=1e-8)
    assert found["cca"].ranks == {"resid_post.0": 37, "resid_post.1": 23, "resid_post.2": 41}
    table = google.df().set_index(["site_a", "site_b"])
    assert table.weighing_site["resid_post.0", "resid_post.1"] == "resid_post.1"
    assert found["pwcca"].df().weighing_site.to_list() == found["pwcca"].df().site_a.to_list()


@pytest.mark.parametrize("n_threads", [1, 2])
def test_both_orders_of_sites_of_one_width_are_those_of_svcca(tmp_path, n_threads):
    """Each order of a pair has its own value, whether pairs come one by one or together."""
    store = synthetic_store(tmp_path / "s", drifting(2000, [19, 19, 19]), dtype="float32")
    blocks = stored(store)
    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        found = similarity(store, None, measure="pwcca", variant="svcca")
    finally:
        torch.set_num_threads(before)

    for a, b in ((0, 1), (1, 0), (0, 2), (2, 0), (1, 2), (2, 1)):
        expected = references.pwcca_svcca(blocks[a], blocks[b])
        assert found.matrix[a, b] == pytest.approx(expected, abs=1e-6)
    np.testing.assert_allclose(np.diagonal(found.matrix), 1, atol=1e-6)
    assert np.abs(found.matrix - found.matrix.T).max() > 1e-4


def test_svcca_keeps_the_share_of_variance(store):
    """`principal` as a share keeps as many directions as hold it."""
    found = similarity(store, None, measure="svcca", principal=0.8)
    x, y = stored(store)[:2]
    ranks = []
    for block in (x, y):
        energy = np.square(np.linalg.svd(block - block.mean(0))[1])
        ranks.append(int(np.searchsorted(np.cumsum(energy) / energy.sum(), 0.8)) + 1)

    assert [found.ranks["resid_post.0"], found.ranks["resid_post.1"]] == ranks
    expected = references.variates(x, y, *ranks)[0].mean()
    assert found.matrix[0, 1] == pytest.approx(expected, abs=1e-6)


def test_what_maps_leave_alone(tmp_path):
    """Scale and rotation leave all at 1, a general linear map CCA and PWCCA but not CKA."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3000, 16))
    turn = np.linalg.qr(rng.normal(size=(16, 16)))[0]
    values = {
        "mlp_post.0": x,
        "mlp_post.1": 7 * x @ turn,
        "mlp_post.2": x @ rng.normal(size=(16, 16)),
    }
    store = synthetic_store(tmp_path / "store", values, dtype="float32")
    found = {
        "cka": similarity(store, None, method="exact"),
        **{m: similarity(store, None, measure=m) for m in ("cca", "svcca", "pwcca")},
    }
    for measure, alike in found.items():
        np.testing.assert_allclose(alike.matrix[0, :2], 1, atol=1e-5, err_msg=measure)
    assert found["cka"].matrix[0, 2] < 0.9
    for measure in ("cca", "pwcca"):
        np.testing.assert_allclose(found[measure].matrix[0, 2], 1, atol=1e-5)


def layer_norm(values: np.ndarray) -> np.ndarray:
    """Return rows of mean 0 and variance 1, as LayerNorm leaves them."""
    centred = values - values.mean(1, keepdims=True)
    return centred / centred.std(1, keepdims=True)


def test_directions_that_rounding_made_are_cut(tmp_path):
    """LayerNorm's null direction, dead and duplicate columns are no directions; nothing is NaN."""
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(6000, 24))
    x = layer_norm(hidden @ rng.normal(size=(24, 24)) + rng.normal(size=(6000, 24)))
    y = layer_norm(hidden @ rng.normal(size=(24, 24)) + rng.normal(size=(6000, 24)))
    y = np.hstack([y, y[:, :2], np.full((6000, 1), 3.0)])
    store = synthetic_store(tmp_path / "store", {"resid_post.0": x, "resid_post.1": y})
    a, b = stored(store)

    found = similarity(store, None, measure="cca")
    google = similarity(store, None, measure="pwcca", variant="svcca")

    assert np.linalg.matrix_rank(a - a.mean(0)) == 24  # rounding hides it
    assert found.ranks == {"resid_post.0": 23, "resid_post.1": 23}
    expected = references.variates(a, b, 23, 23)[0].mean()
    assert found.matrix[0, 1] == pytest.approx(expected, abs=1e-6)
    assert np.isfinite(google.matrix).all()
    assert google.matrix[0, 1] == pytest.approx(references.pwcca_svcca(a, b[:, :24]), abs=5e-2)


@pytest.mark.parametrize(
    "options", [{"method": "exact"}, *({"measure": m} for m in ("cca", "pwcca"))]
)
def test_a_constant_site_is_undefined_and_named(tmp_path, options):
    """A site without variance has no value, the others keep theirs, and nothing warns."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1000, 9))
    values = {"mlp_post.0": x, "mlp_post.1": np.full((1000, 5), 0.1), "mlp_post.2": x}
    store = synthetic_store(tmp_path / "store", values)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = similarity(store, None, **options)

    assert np.isnan(found.matrix[1]).all()
    assert found.matrix[0, 2] == pytest.approx(1)
    assert list(found.summary["undefined"]) == ["mlp_post.1"]
    assert "mlp_post.1 constant over the rows" in repr(found)


def test_too_few_rows_for_cca_are_said(tmp_path):
    """With no more rows than directions correlations are 1, and the answer says why."""
    store = synthetic_store(tmp_path / "store", drifting(60, [40, 30]), documents=[10] * 6)

    found = similarity(store, None, measure="cca")

    assert found.matrix[0, 1] > 0.75
    assert "rows are no more than the directions" in repr(found)
    assert found.null_mean[0, 1] > 0.7


def test_too_few_rows_for_exact_cka_are_refused(tmp_path):
    """Debiasing needs four rows."""
    store = synthetic_store(tmp_path / "store", drifting(4, [3, 3]))
    with pytest.raises(ArgumentError, match=r"chooses 3 rows of .* needs 4.*rows='all'"):
        similarity(store, None, method="exact")


def test_exact_cka_of_few_rows_says_nothing_of_other_texts(tmp_path):
    """Rows that do not fill two batches have a value, and no interval for text like this."""
    store = synthetic_store(tmp_path / "store", drifting(14, [3, 3]))
    found = similarity(store, None, method="exact")

    assert np.isfinite(found.matrix).all()
    assert np.isnan(found.text_low).all()
    assert found.summary["intervals"]["text"] == "not given: too few rows"


def test_lost_workers_are_not_too_few_rows(store, monkeypatch):
    """An error of the batches reaches the caller of exact CKA, whatever its kind."""

    def lost(*_, **__):
        raise ArgumentError("the workers are gone")

    monkeypatch.setattr(measuring, "estimate", lost)
    with pytest.raises(ArgumentError, match="workers are gone"):
        similarity(store, None, method="exact")


# -- nulls ---------------------------------------------------------------------------------------


def by_document(n_documents: int, widths: tuple[int, int], shared: float) -> dict[str, np.ndarray]:
    """Return two sites that share nothing, of rows that share something with their document."""
    rng = np.random.default_rng(5)
    owner = np.repeat(np.arange(n_documents), 50)
    return {
        f"mlp_post.{i}": rng.normal(size=(len(owner), width))
        + shared * rng.normal(size=(n_documents, width))[owner]
        for i, width in enumerate(widths)
    }


@pytest.mark.parametrize("shared", [0.0, 1.5])
@pytest.mark.parametrize(
    "options", [{}, {"method": "exact"}, {"measure": "cca"}, {"measure": "svcca"}]
)
def test_the_null_is_what_shifted_rows_give(tmp_path, shared, options):
    """What nothing shared gives is that of all rows, one side really shifted by documents."""
    values = by_document(40, (14, 9), shared)
    store = synthetic_store(tmp_path / "store", values, documents=[50] * 40)
    x, y = stored(store)
    documents = store.tokens_of(store.rows().row_ids())["document"].to_numpy()
    measure = {
        "cca": lambda a, b: references.variates(a, b)[0].mean(),
        "svcca": lambda a, b: references.variates(a, b, 14, 9)[0].mean(),
    }.get(options.get("measure"), lambda a, b: references.debiased_cka([a, b])[0, 1])
    shifted = [
        measure(x, np.roll(y, -int(np.searchsorted(documents, d)), axis=0)) for d in range(1, 40, 3)
    ]

    found = similarity(store, None, **options)

    low, high = np.mean(shifted) * 0.75 - 0.015, np.mean(shifted) * 1.25 + 0.015
    assert low < found.null_mean[0, 1] < high
    assert found.null_p95[0, 1] >= found.null_mean[0, 1]
    assert found.null_p95[0, 1] < np.quantile(shifted, 0.95) * 1.3 + 0.02
    assert found.matrix[0, 1] < found.null_p95[0, 1] * 1.5 + 0.03


def test_without_documents_to_shift_there_is_no_null(tmp_path):
    """One document, or one that is most of the rows, gives none."""
    for name, documents in (("one", [600]), ("most", [560, 40])):
        values = by_document(12, (8, 8), 0.0)
        store = synthetic_store(tmp_path / name, values, documents=documents)
        found = similarity(store, None)
        assert np.isnan(found.null_mean).all(), name
        assert found.summary["n_shifts"] == 0


def test_correlations_of_the_independent_are_wachters():
    """The law's quantiles are the canonical correlations of Gaussian noise."""
    rng = np.random.default_rng(0)
    for n, a, b in ((400, 60, 30), (90, 60, 60)):
        found, _ = references.variates(rng.normal(size=(n, a)), rng.normal(size=(n, b)))
        law = cca.independent(a, b, float(np.square(found).mean()))
        assert law.mean() == pytest.approx(found.mean(), rel=0.02)
        np.testing.assert_allclose(law, found, atol=0.08)
    np.testing.assert_array_equal(cca.independent(5, 3, 0.0), np.zeros(3))
    np.testing.assert_array_equal(cca.independent(5, 3, 1.0), np.ones(3))


def test_pwcca_as_in_svcca_of_directions_that_nothing_spans_is_a_number():
    """Where a site has no part in a direction, weights are those of least squares, not NaN."""
    a = cca.Directions(np.eye(4)[:, 1:], np.ones(3), np.zeros(4))
    b = cca.Directions(np.eye(3), np.ones(3), np.zeros(3))
    cross = np.zeros((4, 3))
    cross[1, 0] = 0.5

    value, correlations = cca.pwcca_svcca(a, 3, cca.whitened_alike(a, b, cross))

    np.testing.assert_allclose(correlations, [0.5, 0, 0])
    assert 0 < value <= 0.5
