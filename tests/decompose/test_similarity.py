"""The CKA estimate is that of all rows, its intervals hold it, and bad input is refused."""

import warnings

import numpy as np
import pytest

from actstore.decompose import Similarity, similarity
from actstore.decompose.cka import Deck, estimate
from actstore.decompose.engine import Engine
from actstore.decompose.moments import frame_of
from actstore.decompose.scan import Scan
from actstore.errors import (
    ArgumentError,
    BudgetExceeded,
    NonFiniteActivation,
    ResultExists,
    ResultNotFound,
    SiteNotFound,
)
from tests.decompose.references import debiased_cka
from tests.synthetic import synthetic_store


def layers(n_rows: int, documents: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Return four sites that drift apart; rows of a document share a third of their variance."""
    rng = np.random.default_rng(seed)
    owner = np.repeat(np.arange(documents), n_rows // documents)
    hidden = rng.normal(size=(n_rows, 24)) + 0.7 * rng.normal(size=(documents, 24))[owner]
    sites = {}
    for layer in range(4):
        mixed = hidden @ rng.normal(size=(24, 40)) / 5
        sites[f"resid_post.{layer}"] = np.tanh(mixed) + 3
        hidden = hidden + 0.6 * rng.normal(size=hidden.shape)
    return sites


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Four sites of 40 documents of 100 rows, in document order."""
    path = tmp_path_factory.mktemp("similarity") / "store"
    return synthetic_store(path, layers(4000, 40))


@pytest.fixture(scope="module")
def exact(store):
    """The CKA of all content rows."""
    ids = store.rows().row_ids()
    return debiased_cka([store[site][ids].astype(np.float64) - 3 for site in store.sites])


@pytest.fixture(scope="module")
def found(store):
    """Their similarity from all rows."""
    return similarity(store, "resid_post", batch_rows=64, tolerance=0, name="all")


def test_the_estimate_is_that_of_all_rows(found, exact):
    """Documents in order do not bias it: it is near the full-Gram value, as its interval says."""
    half_width = (found.high - found.low) / 2
    assert (np.abs(found.matrix - exact) <= 2 * half_width + 1e-9).all()
    assert half_width.max() < 0.006
    assert exact.min() < 0.8  # the sites do differ


@pytest.mark.parametrize(("batch_rows", "run_rows"), [(64, 1), (16, 4)])
def test_intervals_hold_the_value_of_the_store(store, exact, batch_rows, run_rows):
    """Over 60 seeds errors are as wide as the interval says, also where rows are read in runs."""
    scan = Scan(store, store.select(None), store.rows(), budget_bytes=2**28)
    frame = frame_of(scan, Engine.local(), False)
    documents = np.arange(4000) // 100
    ids = store["resid_post.0"].row_ids()
    pairs = np.triu_indices(4, 1)
    errors, half_widths = [], []
    for seed in range(60):
        part = estimate(
            scan,
            frame,
            Engine.local(),
            lambda rows: documents[np.searchsorted(ids, rows)],
            batch_rows=batch_rows,
            max_batches=32,
            tolerance=1,
            seed=seed,
        )
        assert part.n_batches == 32
        errors.append((part.value - exact)[pairs])
        half_widths.append(part.half_width[pairs])

    assert Deck(scan.n_rows, batch_rows, 0).run_rows == run_rows
    assert 0.75 < np.mean(half_widths) / 1.96 / np.sqrt(np.mean(np.square(errors))) < 1.3
    assert np.mean(np.abs(errors) <= half_widths) > 0.87


def test_a_batch_holds_one_row_of_a_run(store):
    """Neighbours that are read together go to different batches, and every row is dealt once."""
    deck = Deck(4003, 16, seed=0)
    ranges = list(deck.ranges(10**6))
    batches = [batch for blocks in ranges for batch in blocks]

    assert all(len(set((batch // deck.run_rows).tolist())) == len(batch) for batch in batches)
    np.testing.assert_array_equal(np.sort(np.concatenate(batches)), np.arange(4003))
    assert all(len(blocks) == deck.run_rows == 4 for blocks in ranges)


def test_text_like_this_is_told_by_documents(tmp_path):
    """The interval for other text holds the population's value, though few documents differ."""
    rng = np.random.default_rng(0)

    def text(seed: int, documents: int) -> dict[str, np.ndarray]:
        own = np.random.default_rng([seed, 1])
        owner = np.repeat(np.arange(documents), 40)
        loud = own.gamma(0.5, size=(documents, 1))[owner]
        x = own.normal(size=(documents * 40, 12)) * loud
        return {"mlp_post.0": x @ mix, "mlp_post.1": (x + own.normal(size=x.shape)) @ mix}

    mix = rng.normal(size=(12, 12))
    population = text(99, 3000)
    truth = debiased_large(population)
    held, wider = [], []
    for seed in range(12):
        small = synthetic_store(tmp_path / str(seed), text(seed, 60), documents=[40] * 60)
        found = similarity(small, None, batch_rows=32, tolerance=0)
        held.append(found.text_low[0, 1] <= truth <= found.text_high[0, 1])
        wider.append(
            found.text_high[0, 1] - found.text_low[0, 1] > found.high[0, 1] - found.low[0, 1]
        )
    few = synthetic_store(tmp_path / "few", text(0, 12), documents=[40] * 12)
    none = similarity(few, None, tolerance=0)

    assert np.mean(held) >= 0.75
    assert np.mean(wider) >= 0.75
    assert np.isnan(none.text_low).all()
    assert none.summary["intervals"]["text"] == "not given: 12 documents, and 20 are needed"


def debiased_large(values: dict[str, np.ndarray]) -> float:
    """Return CKA of two sites of so many rows that its bias is of no account."""
    x, y = (block - block.mean(0) for block in values.values())
    square = lambda a, b: np.square(a.T @ b).sum()  # noqa: E731
    return float(square(x, y) / np.sqrt(square(x, x) * square(y, y)))


def test_a_site_is_like_itself_rotated_and_scaled(tmp_path):
    """Identity, an orthogonal map, a scale and a shift leave CKA at 1."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2000, 16))
    turn = np.linalg.qr(rng.normal(size=(16, 16)))[0]
    values = {"mlp_post.0": x, "mlp_post.1": x @ turn, "mlp_post.2": 7 * x, "mlp_post.3": x + 50}
    store = synthetic_store(tmp_path / "store", values, dtype="float32")

    found = similarity(store, None, batch_rows=60)

    np.testing.assert_allclose(found.matrix, 1, atol=2e-5)
    np.testing.assert_array_equal(np.diagonal(found.matrix), 1)
    assert found.summary["stopped"] == "tolerance"


def test_independent_sites_are_near_zero_and_may_be_below(tmp_path):
    """Many neurons and few rows do not make unlike sites alike; negative values stay."""
    rng = np.random.default_rng(0)
    values = {f"mlp_post.{i}": rng.normal(size=(2000, 200)) for i in range(5)}
    store = synthetic_store(tmp_path / "store", values)

    found = similarity(store, None, batch_rows=60, tolerance=0)
    pairs = found.matrix[~np.eye(5, dtype=bool)]

    assert np.abs(pairs).max() < 0.01
    assert pairs.min() < 0
    assert (found.low < 0).any()


def test_a_constant_site_is_nan_with_a_reason(tmp_path):
    """A site without variance has no similarity, the others keep theirs, and nothing warns."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1000, 9))
    values = {"mlp_post.0": x, "mlp_post.1": np.full((1000, 5), 0.1), "mlp_post.2": x}
    store = synthetic_store(tmp_path / "store", values)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = similarity(store, None)

    np.testing.assert_array_equal(np.isnan(found.matrix)[1], True)
    assert found.matrix[0, 2] == pytest.approx(1)
    assert found.summary["undefined"] == {
        "mlp_post.1": "constant over the rows read: its similarities are NaN"
    }
    assert np.isnan(found.df().max_channel_share_a[3])


def test_a_massive_channel_is_reported(tmp_path):
    """The share of variance of a site's largest channel stands at every pair."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3000, 8))
    y = x * np.array([30, 1, 1, 1, 1, 1, 1, 1])
    store = synthetic_store(tmp_path / "store", {"mlp_post.0": x, "mlp_post.1": y})

    table = similarity(store, None).df()
    row = table[(table.site_a == "mlp_post.0") & (table.site_b == "mlp_post.1")].iloc[0]

    assert row.max_channel_share_a == pytest.approx(1 / 8, abs=0.02)
    assert row.max_channel_share_b == pytest.approx(900 / 907, abs=0.001)


def test_the_table_has_all_ordered_pairs(found):
    """Every pair stands there both ways, the diagonal too, in the order of the matrix."""
    table = found.df()
    names = [str(info.site) for info in found.sites]

    assert list(zip(table.site_a, table.site_b, strict=True)) == [
        (a, b) for a in names for b in names
    ]
    np.testing.assert_array_equal(table.value.to_numpy().reshape(4, 4), found.matrix)
    np.testing.assert_array_equal(found.matrix, found.matrix.T)
    assert (table.low <= table.value).all()
    assert (table.value <= table.high).all()
    assert list(table.columns) == [
        "site_a",
        "site_b",
        "value",
        "low",
        "high",
        "text_low",
        "text_high",
        "null_mean",
        "null_p95",
        "rank_a",
        "rank_b",
        "max_channel_share_a",
        "max_channel_share_b",
    ]


def test_it_stops_for_a_reason(store, found):
    """Tolerance, the number of batches, or the end of the rows: it says which."""
    loose = similarity(store, "resid_post", batch_rows=64, tolerance=1)
    short = similarity(store, "resid_post", batch_rows=64, tolerance=0, max_batches=5)
    assert "all intervals were within ± 1" in repr(loose)
    assert "stopped at max_batches" in repr(short)
    assert "stopped when all rows were read" in repr(found)

    assert (loose.summary["stopped"], loose.summary["n_batches"]) == ("tolerance", 32)
    assert (short.summary["stopped"], short.summary["n_batches"]) == ("max_batches", 5)
    n_rows = store.rows().n_rows
    assert (found.summary["stopped"], found.summary["n_batches"]) == ("rows", n_rows // 64)
    assert found.summary["n_rows_read"] == n_rows
    assert loose.summary["half_width"] > found.summary["half_width"]


def test_a_batch_is_smaller_where_rows_are_few(tmp_path):
    """A store of a few hundred rows has an answer too, and a wide interval."""
    store = synthetic_store(tmp_path / "store", layers(200, 5))

    found = similarity(store, None)

    assert found.summary["batch_rows"] == 8
    assert found.summary["n_batches"] == store.rows().n_rows // 8
    assert found.summary["half_width"] > 0.01


def test_the_same_call_gives_the_same_bytes(store, found):
    """The result depends on the seed, not on the budget."""
    again = similarity(store, "resid_post", batch_rows=64, tolerance=0, budget="64MiB")
    other = similarity(store, "resid_post", batch_rows=64, tolerance=0, seed=1)

    assert again.result.files == found.result.files
    assert (other.matrix != found.matrix).any()


def test_progress_counts_batches(store):
    """The caller hears of every batch and of how many there are at most."""
    seen = []
    similarity(store, None, batch_rows=64, tolerance=1, progress=lambda *said: seen.append(said))

    assert seen == [("batches", 32, store.rows().n_rows // 64)]


def test_it_reopens_without_computing(store, found):
    """Opened by name, a similarity is the same; its repr says what it is."""
    opened = Similarity.open(store, "all")

    np.testing.assert_array_equal(opened.matrix, found.matrix)
    assert opened.to_arrow().equals(found.to_arrow())
    assert repr(opened).startswith("<Similarity 'all': CKA, estimate of resid_post.0–3 over 3,")
    with pytest.raises(ResultNotFound, match=r"has no similarity result 'none'; it has "):
        Similarity.open(store, "none")


@pytest.mark.parametrize(
    ("sites", "options", "message"),
    [
        ("resid_post.1", {}, r"sites = 'resid_post.1' is one site; expected two or more .*0–3"),
        (
            None,
            {"measure": "ckaa"},
            r"measure = 'ckaa' is unknown; there is cka, cca, svcca, pwcca. Did you mean",
        ),
        (None, {"batch_rows": 7}, r"batch_rows = 7 and .*; expected at least 8 rows and 2 batches"),
        (None, {"max_batches": 1}, r"max_batches = 1 give no estimate"),
        (None, {"tolerance": -1}, r"tolerance = -1 cannot be reached; expected 0 or more"),
        (
            None,
            {"batch_rows": 2000},
            r"batch_rows = 2000 is too many for 3,920 rows \(content\) .*",
        ),
        (None, {"rows": "each"}, r"rows = 'each' is no rule"),
        (None, {"method": "exat"}, r"method = 'exat' is unknown; .* Did you mean 'exact'"),
        (
            None,
            {"measure": "cca", "method": "estimate"},
            r"is for CKA; cca of few rows is too high",
        ),
        (None, {"variant": "svcca"}, r"variant = 'svcca' is for measure='pwcca'"),
        (None, {"measure": "pwcca", "variant": "svca"}, r"variant = 'svca' is unknown; .* 'svcca'"),
        (None, {"share": 0.98}, r"share = 0.98 is for measure='cca'"),
        (None, {"measure": "cca", "share": 1.5}, r"share = 1.5 is not between 0 and 1"),
        (None, {"measure": "svcca", "principal": 0}, r"principal = 0 chooses no directions; .*20"),
    ],
)
def test_arguments_are_refused(store, sites, options, message):
    """What cannot be used is refused, with what can."""
    with pytest.raises(ArgumentError, match=message):
        similarity(store, sites, **options)


def test_too_few_rows_are_refused(tmp_path):
    """Fewer rows than two batches of the least size give no estimate."""
    store = synthetic_store(tmp_path / "store", layers(16, 1))

    with pytest.raises(ArgumentError, match=r"rows='all', or capture more"):
        similarity(store, None)


def test_sites_of_two_spaces_are_refused(tmp_path):
    """Rows of an encoder are not rows of its decoder."""
    values = {"encoder.mlp_post.0": np.ones((200, 8)), "decoder.mlp_post.0": np.ones((200, 8))}
    store = synthetic_store(tmp_path / "store", values)

    with pytest.raises(ArgumentError, match=r"do not share rows; expected sites of one space"):
        similarity(store, None)


def test_other_errors(store, found, tmp_path):
    """An unknown site, a taken name, a number that is none, and a budget too small."""
    with pytest.raises(SiteNotFound, match=r"resid_pots"):
        similarity(store, "resid_pots")
    with pytest.raises(ResultExists, match=r"similarity result 'all' exists"):
        similarity(store, None, name="all")
    values = layers(900, 9)
    values["resid_post.2"][433, 5] = np.inf
    broken = synthetic_store(tmp_path / "store", values)
    with pytest.raises(NonFiniteActivation, match=r"resid_post\.2 of .* is inf at row_id"):
        similarity(broken, None)
    assert broken.results() == []
    with pytest.raises(BudgetExceeded, match=r"Pass budget="):
        similarity(store, None, batch_rows=1900, budget="64MiB")
