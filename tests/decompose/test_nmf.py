"""NMF finds planted factors, and its scores, errors and tables are exactly what they say."""

import subprocess
import sys
import textwrap

import numpy as np
import pytest
import scipy.optimize
import torch
import zarr

from actstore.decompose import Factors, nmf
from actstore.errors import (
    ArgumentError,
    BudgetExceeded,
    NonFiniteActivation,
    ResultExists,
    SiteNotFound,
)
from actstore.store import Rows
from tests.synthetic import synthetic_store

K = 5
WIDTHS = {"mlp_post.0": 61, "mlp_post.1": 47}


def planted(n_rows: int, noise: float = 0.02, seed: int = 0):
    """Return sites that are non-negative combinations of sparse factors, and the factors."""
    rng = np.random.default_rng(seed)
    width = sum(WIDTHS.values())
    loadings = rng.random((K, width)) * (rng.random((K, width)) < 0.25)
    scores = rng.gamma(1.0, size=(n_rows, K)) * (rng.random((n_rows, K)) < 0.4)
    matrix = scores @ loadings + noise * rng.normal(size=(n_rows, width))
    sites = np.split(matrix, np.cumsum(list(WIDTHS.values()))[:-1], axis=1)
    return dict(zip(WIDTHS, sites, strict=True)), loadings


@pytest.fixture(scope="module")
def truth():
    """Planted factors in 6,000 rows whose special rows are far larger than all others."""
    values, loadings = planted(6000)
    special = np.concatenate([np.arange(100) % 64 == 0] * 60)
    for block in values.values():
        block[special] = 500
    return values, loadings


@pytest.fixture(scope="module")
def store(truth, tmp_path_factory):
    """The planted factors as a store of several segments, one of them not committed."""
    path = tmp_path_factory.mktemp("nmf") / "store"
    return synthetic_store(path, truth[0], commit=range(5))


@pytest.fixture(scope="module")
def factors(store):
    """The planted factors, found again."""
    return nmf(store, "mlp_post", K, name="planted")


def clipped(store, factors, row_ids):
    """Return rows of the matrix that was factorised, in float64."""
    scales = factors.summary["site_scales"]
    blocks = [
        store[info.site][row_ids].astype(np.float64) * scales[str(info.site)]
        for info in factors.sites
    ]
    return np.maximum(np.hstack(blocks), 0)


def matched(found: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return the cosine of each wanted factor with the found one it is matched to."""
    found = found / np.linalg.norm(found, axis=1, keepdims=True)
    wanted = wanted / np.linalg.norm(wanted, axis=1, keepdims=True)
    cosines = wanted @ found.T
    return cosines[scipy.optimize.linear_sum_assignment(-cosines)]


def test_planted_factors_are_recovered(factors, truth):
    """Every planted factor is found with a cosine above 0.99."""
    scales = np.repeat(
        [factors.summary["site_scales"][name] for name in WIDTHS], list(WIDTHS.values())
    )

    assert matched(factors.loadings, truth[1] * scales).min() > 0.99


def test_error_is_that_of_the_scores_as_written(store, factors):
    """The error equals |A - S L| / |A| computed directly in float64, whole and by site."""
    ids = store.rows().row_ids()
    matrix = clipped(store, factors, ids)
    rest = matrix - factors.scores(ids).astype(np.float64) @ factors.loadings

    assert factors.summary["error"] == pytest.approx(
        np.linalg.norm(rest) / np.linalg.norm(matrix), abs=2e-5
    )
    for name in WIDTHS:
        columns = factors.site_slice(name)
        expected = np.linalg.norm(rest[:, columns]) / np.linalg.norm(matrix[:, columns])
        assert factors.summary["site_errors"][name] == pytest.approx(expected, abs=2e-5)


def test_scores_are_the_best_for_the_loadings(store, factors):
    """No other non-negative scores fit a row better, and loadings have unit length."""
    ids = store.rows().row_ids()[::200]
    matrix = clipped(store, factors, ids)
    expected = [scipy.optimize.nnls(factors.loadings.T, row)[0] for row in matrix]

    np.testing.assert_allclose(factors.scores(ids), expected, atol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(factors.loadings, axis=1), 1, rtol=1e-6)
    assert factors.loadings.min() >= 0


def test_certificates_equal_their_definitions(store, factors):
    """Each certificate is what NumPy computes from the whole matrix in float64."""
    ids = store.rows().row_ids()
    matrix = clipped(store, factors, ids)
    scores = factors.scores(ids).astype(np.float64)
    loadings = factors.loadings.astype(np.float64)
    norm = np.linalg.norm(matrix)
    found = factors.summary["certificates"]
    signed = matrix @ np.linalg.pinv(loadings) @ loadings
    mean = matrix.mean(0) / np.linalg.norm(matrix.mean(0))
    one = np.outer(matrix @ mean, mean)
    images = scores.T @ matrix
    gradient = scores.T @ scores @ loadings - images
    projected = np.where(loadings > 0, gradient, np.minimum(gradient, 0))
    raw = np.hstack(
        [
            store[info.site][ids].astype(np.float64)
            * factors.summary["site_scales"][str(info.site)]
            for info in factors.sites
        ]
    )

    assert found["signed_scores_error"] == pytest.approx(
        np.linalg.norm(matrix - signed) / norm, abs=2e-5
    )
    assert found["one_factor_error"] == pytest.approx(np.linalg.norm(matrix - one) / norm, abs=1e-5)
    assert found["kkt_residual"] == pytest.approx(
        np.linalg.norm(projected) / np.linalg.norm(images), rel=0.01, abs=1e-5
    )
    assert found["clipped_energy"] == pytest.approx(1 - norm**2 / (raw**2).sum(), abs=1e-6)
    assert found["unconverged_rows"] == 0
    assert found["signed_scores_error"] <= factors.summary["error"] < found["one_factor_error"]


def test_special_first_and_uncommitted_rows_have_no_part(store, factors, truth):
    """Rows that were not chosen have NaN scores, and did not make the factors."""
    everything = store.rows("all").row_ids()
    scores = factors.scores(everything)
    content = np.isin(everything, store.rows().row_ids())

    np.testing.assert_array_equal(np.isnan(scores).any(1), ~content)
    assert scores[content].max() < 50
    assert factors.summary["n_rows"] == content.sum()
    assert factors.summary["n_planned_segments"] == 6
    assert factors.summary["committed"] == 5


def test_scores_are_an_ordinary_zarr_array(store, factors):
    """zarr-python reads scores by row_id, and NaN in holes."""
    array = zarr.open_array(factors.result.path / "scores", mode="r")
    ids = store.rows().row_ids()

    np.testing.assert_array_equal(array[:][ids], factors.scores(ids))
    assert np.isnan(array[:][np.setdiff1d(np.arange(array.shape[0]), ids)]).all()


def test_shares_add_up_and_are_sorted(factors):
    """Shares of energy are those of all explained energy, the largest first."""
    table = factors.table("factors").to_pandas()

    assert (np.diff(table.share) <= 0).all()
    assert table.share.sum() == pytest.approx(1 - factors.summary["error"] ** 2, abs=1e-4)
    sites = factors.table("factor_sites").to_pandas()
    np.testing.assert_allclose(sites.groupby("factor").share.sum(), 1, atol=1e-6)
    assert list(sites.columns) == ["factor", "site", "space", "hook", "layer", "share"]


def test_the_table_of_factors_equals_its_definitions(store, factors):
    """Shares, effective neurons and positions are what NumPy computes from scores and rows."""
    ids = store.rows().row_ids()
    scores = factors.scores(ids).astype(np.float64)
    energies = (clipped(store, factors, ids) @ factors.loadings.T) * scores
    positions = store.tokens_of(ids).column("position").to_numpy()
    table = factors.table("factors").to_pandas()

    for j, row in enumerate(table.itertuples()):
        by_position = np.bincount(positions, scores[:, j] ** 2, minlength=64)
        by_position /= by_position.sum()
        assert row.share == pytest.approx(
            energies[:, j].sum() / (clipped(store, factors, ids) ** 2).sum(), rel=1e-4
        )
        assert row.active_share == pytest.approx((scores[:, j] > 0).mean())
        assert row.effective_neurons == pytest.approx(
            1 / (factors.loadings[j].astype(float) ** 4).sum(), rel=1e-5
        )
        assert row.peak_position_share == pytest.approx(by_position.max(), rel=1e-4)
        assert row.peak_position == by_position.argmax()
        assert row.early_share == pytest.approx(by_position[:4].sum(), rel=1e-3)


def test_exemplars_equal_brute_force(store, factors):
    """The top rows of each factor are those of a full sort, with their tokens."""
    ids = store.rows().row_ids()
    scores = factors.scores(ids)
    table = factors.table("factor_exemplars").to_pandas()
    table = table[table.side == "top"]

    for j in range(K):
        order = [i for i in np.lexsort((ids, -scores[:, j])) if scores[i, j] > 0][:100]
        mine = table[table.factor == j]
        np.testing.assert_array_equal(mine.row_id, ids[order])
        np.testing.assert_array_equal(mine.value, scores[order, j])
        np.testing.assert_array_equal(mine["rank"], np.arange(1, len(order) + 1))
    tokens = store.tokens_of(table.row_id.to_numpy()).to_pandas()
    for column in ("document", "position", "token_id"):
        np.testing.assert_array_equal(table[column], tokens[column])


def test_the_same_call_gives_the_same_bytes(store, factors):
    """Results are deterministic for a seed, and another seed starts elsewhere."""
    again = nmf(store, ["mlp_post.0", "mlp_post.1"], K, name="again")
    other = nmf(store, "mlp_post", K, name="other", seed=1)

    assert again.result.files == factors.result.files
    assert (other.loadings != factors.loadings).any()


def test_the_error_does_not_depend_on_segments_and_budget(tmp_path):
    """Other segments, chunks and blocks change the order of rows, and the error by little."""
    values, loadings = planted(3000)
    errors = []
    for number, (segment_rows, chunk_rows, budget) in enumerate(
        ((4096, 1024, "1GB"), (512, 64, "64MiB"))
    ):
        store = synthetic_store(
            tmp_path / str(number), values, segment_rows=segment_rows, chunk_rows=chunk_rows
        )
        found = nmf(store, None, K, budget=budget)
        errors.append(found.summary["error"])
        assert matched(found.loadings, loadings * 1.0).min() > 0.97

    assert errors[0] == pytest.approx(errors[1], rel=0.02)


def test_more_passes_are_no_worse(tmp_path):
    """A second pass does not lose what the first found."""
    values, _ = planted(3000, noise=0.3)
    store = synthetic_store(tmp_path / "store", values)
    one, two = (nmf(store, None, K, passes=passes).summary["error"] for passes in (1, 2))

    assert two < one + 0.003


def test_scale_none_takes_values_as_they_are(tmp_path):
    """Without scales the larger site owns the factors; with them both have the same energy."""
    values, _ = planted(1500)
    values["mlp_post.0"] *= 30
    store = synthetic_store(tmp_path / "store", values)
    plain = nmf(store, None, 2, scale=None)
    scaled = nmf(store, None, 2, scale="site")

    assert plain.summary["site_scales"] == {"mlp_post.0": 1.0, "mlp_post.1": 1.0}
    assert np.linalg.norm(plain.loadings_of("mlp_post.1")) < 0.2
    matrix = clipped(store, scaled, store.rows().row_ids())
    norms = [np.linalg.norm(matrix[:, scaled.site_slice(name)]) for name in WIDTHS]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_other_dtypes(tmp_path, dtype):
    """bfloat16 and float32 stores factorise as float16 ones do."""
    values, loadings = planted(3000)
    store = synthetic_store(tmp_path / "store", values, dtype=dtype)

    assert matched(nmf(store, None, K, scale=None).loadings, loadings).min() > 0.98


def test_rows_as_a_set(store):
    """A set of rows is factorised alone; scores of all others are NaN."""
    ids = store.rows().row_ids()[100:900]
    chosen = Rows.from_row_ids("document < 9", store.meta.segment_rows, ids)
    found = nmf(store, "mlp_post.1", 2, rows=chosen)

    assert found.summary["rows"] == "document < 9"
    assert found.summary["n_rows"] == 800
    everything = store.rows("all").row_ids()
    np.testing.assert_array_equal(
        ~np.isnan(found.scores(everything)).any(1), np.isin(everything, ids)
    )


def test_all_rows_can_be_factorised(store):
    """rows="all" takes special and first rows in, and the result says so."""
    found = nmf(store, "mlp_post.1", 2, rows="all")

    assert found.summary["rows"] == "all"
    assert found.table("factors").to_pandas().peak_position[0] == 0


def test_a_dead_site_and_more_factors_than_structure(tmp_path):
    """A site without positive values, and factors nothing is left for, do no harm."""
    rng = np.random.default_rng(0)
    values = {
        "mlp_post.0": np.outer(rng.random(900), rng.random(16)),
        "mlp_post.1": -np.ones((900, 7)),
    }
    store = synthetic_store(tmp_path / "store", values)
    found = nmf(store, None, 6)

    assert found.summary["error"] < 0.02
    assert found.summary["site_errors"]["mlp_post.1"] is None
    assert np.isfinite(found.loadings).all()
    assert np.isfinite(found.scores(store.rows().row_ids())).all()
    assert found.summary["certificates"]["site_clipped_energy"]["mlp_post.1"] == 1


def test_a_store_without_a_positive_value(tmp_path):
    """Nothing to factorise gives factors of nothing instead of a crash."""
    store = synthetic_store(tmp_path / "store", {"mlp_post.0": -np.ones((300, 7))})
    found = nmf(store, None, 2)

    assert np.nan_to_num(found.scores(store.rows().row_ids()), nan=1).max() == 0
    assert set(found.table("factor_exemplars")["side"].to_pylist()) == {"quantile", "random"}
    assert found.table("factor_tokens").num_rows == found.table("factor_documents").num_rows == 0


def test_progress_reaches_the_end_of_every_stage(tmp_path):
    """Each stage reports rows up to all of them."""
    store = synthetic_store(tmp_path / "store", planted(900)[0])
    seen: dict[str, tuple[int, int]] = {}

    found = nmf(
        store,
        None,
        2,
        passes=2,  # the first is that of the sample, which holds all rows
        tolerance=0.01,
        progress=lambda stage, n, of: seen.update({stage: (n, of)}),
    )

    n_rows = store.rows().n_rows
    assert seen == {
        "online passes": (n_rows, n_rows),
        "batch passes": (n_rows, n_rows),
        "exact pass": (n_rows, n_rows),
    }
    stages = {"start", "online passes", "batch passes", "exact pass", "write"}
    assert set(found.summary["seconds"]) == stages


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_components": 109}, r"n_components = 109 cannot be used; expected 1 … 108 for 108 neu"),
        ({"n_components": 0}, r"n_components = 0 was given; expected 1"),
        ({"scale": "layer"}, r"scale = 'layer' is unknown; expected 'site' or None"),
        ({"passes": 0}, r"passes = 0 is too few; expected 1 or more"),
        ({"rows": "everything"}, r"rows = 'everything' is no rule; expected 'content', 'all'"),
        ({"name": "../x"}, r"name = '../x' cannot name a result"),
    ],
)
def test_arguments_are_refused(store, options, message):
    """What cannot be used is refused before any work, with what can."""
    with pytest.raises(ArgumentError, match=message):
        nmf(store, "mlp_post", **{"n_components": 2, **options})


def test_a_site_not_in_the_store_is_refused(store):
    """An unknown site names the nearest."""
    with pytest.raises(SiteNotFound, match=r"mlp_pots.*Did you mean 'mlp_post"):
        nmf(store, "mlp_pots.1", 2)


def test_a_taken_name_is_refused_before_the_work(store, factors):
    """A result is never overwritten."""
    with pytest.raises(ResultExists, match=r"nmf result 'planted' exists"):
        nmf(store, "mlp_post", K, name="planted", progress=lambda *_: pytest.fail("worked"))


def test_a_failure_leaves_nothing_behind(tmp_path):
    """NaN stops the factorisation, and the store has no result and no rest of one."""
    values, _ = planted(900)
    values["mlp_post.1"][433, 3] = np.nan
    store = synthetic_store(tmp_path / "store", values)

    with pytest.raises(
        NonFiniteActivation, match=r"mlp_post\.1 of .* is nan at row_id = .*neuron 3"
    ):
        nmf(store, None, 2)

    assert store.results() == []
    assert [p for p in (store.path / "results").rglob("*") if p.is_file()] == []


def test_a_budget_too_small_is_refused(tmp_path):
    """The message names what is needed before anything is read."""
    wide = {"mlp_post.0": np.ones((300, 40_000), np.float16)}
    store = synthetic_store(tmp_path / "store", wide)

    with pytest.raises(BudgetExceeded, match=r"mlp_post\.0 \(40,000 neurons\) needs at least"):
        nmf(store, None, 4, budget="64MiB")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_stays_within_the_budget(tmp_path):
    """A store of 130 MB is factorised within 64 MiB: the peak of the process grows by less."""
    script = """
    import re, sys
    import numpy as np
    from actstore.decompose import nmf
    from tests.synthetic import synthetic_store

    def peak():
        return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024

    def rows(n):
        return np.random.default_rng(0).standard_normal((n, 1024), np.float32).astype(np.float16)

    budget = 64 * 2**20
    small = synthetic_store(sys.argv[1] + "/small", {"mlp_post.0": rows(2000)})
    nmf(small, None, 8, budget=budget)  # loads and warms what stays
    values = rows(13_000)
    sites = {f"mlp_post.{layer}": values for layer in range(5)}
    store = synthetic_store(sys.argv[1] + "/large", sites, segment_rows=4096, chunk_rows=1024)
    del values, sites
    open("/proc/self/clear_refs", "w").write("5")
    before = peak()
    factors = nmf(store, None, 8, budget=budget)
    print(peak() - before, factors.summary["bytes_read"])
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
    )
    grown, bytes_read = map(int, done.stdout.split())

    assert bytes_read > 6 * 64 * 2**20
    assert grown < 64 * 2**20


def test_factors_reopen_without_computing(store, factors):
    """Opened by name or as the newest, factors are the same; their repr says what they are."""
    opened = Factors.open(store, "planted")

    np.testing.assert_array_equal(opened.loadings, factors.loadings)
    assert opened.summary == factors.summary
    assert repr(opened).startswith(
        "<Factors 'planted': 5 factors of mlp_post.0–1 (108 neurons) over "
    )
    assert torch.get_num_threads() == opened.summary["threads"]
