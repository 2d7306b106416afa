"""Profiles and exemplars of factors equal group-bys and sorts of their scores."""

import tracemalloc

import numpy as np
import pandas as pd
import pytest

from actstore.decompose import Factors, score_folds
from actstore.decompose import profiles as profiles_module
from actstore.decompose.score_folds import N_EXEMPLARS
from actstore.decompose.write_factors import Found, write_factors
from actstore.store import Rows
from tests.synthetic import WORDS, synthetic_store

K = 7
SIZES = [31, 3, 200, 67, 2, 41, 97, 5, 150, 11, 89, 3, 300, 1, 76]
"""Rows of the documents: shorter than a few rows, and longer than a window and a segment."""


def result_of(store, scores, name, *, rows=None, one_sided=True, budget_bytes=2**30):
    """Write scores of the content rows as factors with made-up loadings."""
    rows = rows or store.rows()
    infos = store.select(None)
    edges = np.cumsum([0] + [len(rows.offsets(s)) for s in rows.segments])
    place = dict(zip(rows.segments, edges[:-1].tolist(), strict=True))
    k = scores.shape[1]
    loadings = np.random.default_rng(0).random((k, 13)).astype(np.float32)
    found = Found(
        infos,
        rows,
        loadings / np.linalg.norm(loadings, axis=1, keepdims=True),
        lambda s: scores[place[s] : place[s] + len(rows.offsets(s))],
        {"share": np.full(k, 1 / k)},
        np.ones((k, 1)),
        one_sided,
    )
    with store.new_result("nmf", name, {}) as writer:
        write_factors(writer, store, found, budget_bytes)
        result = writer.finish(
            {
                "n_components": k,
                "n_rows": rows.n_rows,
                "sites": [str(info.site) for info in infos],
                "space": "",
                "rows": rows.rule,
                "n_exemplars": N_EXEMPLARS,
            }
        )
    return Factors(store, result)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Documents of many sizes in several segments, one of them not committed."""
    path = tmp_path_factory.mktemp("profiles") / "store"
    values = {"mlp_post.0": np.zeros((sum(SIZES), 13))}
    return synthetic_store(
        path, values, documents=SIZES, segment_rows=256, context=37, commit=[0, 1, 2, 4]
    )


@pytest.fixture(scope="module")
def scores(store):
    """Scores of the content rows: sparse, heavy-tailed, and one factor that is never on."""
    rng = np.random.default_rng(1)
    n_rows = store.rows().n_rows
    found = rng.gamma(0.5, size=(n_rows, K)) * (rng.random((n_rows, K)) < 0.4)
    found[:, K - 1] = 0
    return found.astype(np.float32)


@pytest.fixture(scope="module")
def factors(store, scores):
    """The scores as a result."""
    return result_of(store, scores, "made-up")


def long_table(store, scores):
    """Return one row for each content row and factor, in float64, with what the row is."""
    tokens = store.tokens_of(store.rows().row_ids()).to_pandas()
    parts = [tokens.assign(factor=j, score=scores[:, j].astype(np.float64)) for j in range(K)]
    return pd.concat(parts)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("factor_positions", "position"),
        ("factor_documents", "document"),
        ("factor_tokens", "token_id"),
    ],
)
def test_profiles_equal_group_bys(store, scores, factors, name, key):
    """Rows, mean and share of every group are those of a group-by in float64."""
    long = long_table(store, scores)
    grouped = long.groupby(["factor", key]).score
    expected = pd.DataFrame(
        {
            "n": grouped.size(),
            "mean": grouped.mean(),
        }
    )
    energy = long.groupby("factor").score.agg(lambda x: (x**2).sum())
    squares = grouped.agg(lambda x: (x**2).sum())
    expected["share"] = (
        squares / energy.replace(0, 1).reindex(squares.index.get_level_values(0)).to_numpy()
    )
    found = factors.table(name).to_pandas().set_index(["factor", key]).sort_index()
    if name != "factor_positions":
        expected = expected[expected.share > 0]

    assert list(found.index) == list(expected.index)
    for column in ("n", "mean", "share"):
        np.testing.assert_allclose(found[column], expected[column], rtol=1e-12, atol=1e-300)
    if name == "factor_tokens":
        means = long.groupby("factor").score.mean()
        lift = found["mean"] / means.reindex(found.index.get_level_values(0)).to_numpy()
        np.testing.assert_allclose(found["lift"], lift, rtol=1e-12)


def test_groups_of_few_rows_do_not_lead(factors):
    """Ranks go by the mean, and groups of fewer than five rows come last."""
    for name in ("factor_documents", "factor_tokens"):
        for _, mine in factors.table(name).to_pandas().groupby("factor"):
            few = mine.n < 5
            assert list(mine["rank"]) == list(range(1, len(mine) + 1))
            assert (np.diff(few.to_numpy(dtype=int)) >= 0).all()
            for part in (mine[few], mine[~few]):
                assert (np.diff(part["mean"]) <= 0).all()
    assert (factors.table("factor_documents").to_pandas().n < 5).any()


def test_only_the_leading_groups_are_kept(store, scores, monkeypatch):
    """Where there are more, those with the highest mean and those with the largest share stay."""
    monkeypatch.setattr(profiles_module, "LEADING_DOCUMENTS", 3)
    monkeypatch.setattr(profiles_module, "LEADING_TOKENS", 4)
    found = result_of(store, scores, "leading")
    long = long_table(store, scores)
    for name, key, most in (("factor_documents", "document", 3), ("factor_tokens", "token_id", 4)):
        for factor, mine in found.table(name).to_pandas().groupby("factor"):
            groups = long[long.factor == factor].groupby(key).score
            table = groups.agg(["size", "mean", lambda x: (x**2).sum()])
            table.columns = ["n", "mean", "energy"]
            by_mean = table[table.n >= 5].nlargest(most, "mean").index
            by_share = table.nlargest(most, "energy").index
            assert set(mine[key]) == set(by_mean) | set(by_share)


def test_the_tables_do_not_depend_on_the_budget(store, scores, factors, monkeypatch):
    """One factor at a time, in many bands, or all at once: the tables are the same, bit by bit."""
    monkeypatch.setattr(score_folds, "_BAND_ROWS", 64)
    one_by_one = result_of(store, scores, "small", budget_bytes=1)

    for name in factors.tables:
        found, expected = (f.table(name).to_pandas() for f in (one_by_one, factors))
        sums = ["mean", "std", "skewness", "kurtosis", "energy", "energy_positive"]
        if name == "factors":  # moments of more bands are added in another order
            np.testing.assert_allclose(found[sums], expected[sums], rtol=1e-9)
            found, expected = found.drop(columns=sums), expected.drop(columns=sums)
        pd.testing.assert_frame_equal(found, expected, check_exact=True)


@pytest.mark.parametrize("kind", ["token", "position", "document"])
def test_a_planted_response_is_found_where_it_is(store, kind):
    """A factor that is on at one token type, position or document only is said to be on there."""
    tokens = store.tokens_of(store.rows().row_ids()).to_pandas()
    column, value = {
        "token": ("token_id", 17),
        "position": ("position", 11),
        "document": ("document", 8),
    }[kind]
    scores = np.full((len(tokens), 2), 0.5, np.float32)
    on = (tokens[column] == value).to_numpy()
    scores[:, 1] = np.where(on, 2.0, 0.0)
    found = result_of(store, scores, f"planted-{kind}")

    if kind == "token":
        (row,) = found.token_types(1).to_pylist()
        assert (row["token_id"], row["token"], row["n"]) == (17, f" {WORDS[16]}", on.sum())
        assert row["mean"] == 2.0
        assert row["share"] == 1.0
        assert row["lift"] == pytest.approx(len(on) / on.sum())
    elif kind == "position":
        row = found.top_positions(1, 1).to_pylist()[0]
        assert (row["position"], row["mean"], row["share"]) == (11, 2.0, 1.0)
        assert found.df().peak_position[1] == 11
        assert found.badges() == [[], ["positional"]]
    else:
        (row,) = found.top_documents(1).to_pylist()
        assert (row["document"], row["n"], row["mean"]) == (8, on.sum(), 2.0)
        assert row["source"] == store.document(8)["source"]
    assert set(found.top_tokens(1, 100).column(column).to_pylist()) == {value}


def test_exemplars_are_those_of_neurons(store, scores, factors):
    """The best of each window, quantile bins and the random sample follow from the scores."""
    ids = store.rows().row_ids()
    tokens = store.tokens_of(ids).to_pandas()
    table = factors.table("factor_exemplars").to_pandas()
    for j in range(K):
        column = pd.DataFrame({"row_id": ids, "value": scores[:, j], "w": tokens.window_id})
        best = column.sort_values(["value", "row_id"], ascending=[False, True])
        best = best[best.value > 0].drop_duplicates("w").head(N_EXEMPLARS)
        mine = table[(table.factor == j) & (table.side == "window")]
        np.testing.assert_array_equal(mine.row_id, best.row_id)
        np.testing.assert_array_equal(mine.value, best.value)
        sample = table[(table.factor == j) & (table.side == "random")]
        assert len(sample) == len(set(sample.row_id)) == min(512, len(ids))
        value_of = dict(zip(ids.tolist(), scores[:, j].tolist(), strict=True))
        assert sample.value.tolist() == [value_of[row] for row in sample.row_id]
        bins = table[(table.factor == j) & (table.side == "quantile")]
        assert sorted(bins.bin) == sorted(list(range(1, 11)) * 2)
        means = bins.groupby("bin").value.mean()
        assert (np.diff(means) >= 0).all()
    at = tokens.set_index("row_id").loc[table.row_id]
    for column in ("document", "position", "token_id"):
        np.testing.assert_array_equal(table[column], at[column])


def test_statistics_and_histograms_are_of_the_scores(scores, factors):
    """Moments are those of NumPy in float64; every score is in a bin."""
    table = factors.df()
    x = scores.astype(np.float64)

    np.testing.assert_allclose(table["mean"], x.mean(0), rtol=1e-9)
    np.testing.assert_allclose(table["std"], x.std(0), rtol=1e-9)
    np.testing.assert_array_equal(table["max"], x.max(0))
    np.testing.assert_allclose(table.energy, (x**2).sum(0), rtol=1e-9)
    np.testing.assert_allclose(table.active_share, (x > 0).mean(0))
    assert (table.n == len(x)).all()
    for factor, mine in factors.table("factor_histograms").to_pandas().groupby("factor"):
        assert mine.n.sum() == len(x)
        for row in mine.itertuples():
            inside = (x[:, factor] >= row.low) & (x[:, factor] <= row.high)
            assert row.n <= inside.sum()


def test_scores_of_both_signs_have_a_bottom_and_no_lift(store, scores):
    """The lowest scores are listed, and a mean near nothing is divided by nothing."""
    signed = scores - scores.mean(0)
    found = result_of(store, signed, "signed", one_sided=False)
    ids = store.rows().row_ids()
    order = np.lexsort((ids, signed[:, 2]))[:5]

    assert found.top_tokens(2, 5, "bottom").column("row_id").to_pylist() == ids[order].tolist()
    assert np.isnan(found.table("factor_tokens")["lift"].to_numpy()).all()


def test_top_tokens_go_on_beyond_what_is_kept(store, scores, factors):
    """More rows than the table holds come from the scores, in the same order."""
    ids = store.rows().row_ids()
    order = [i for i in np.lexsort((ids, -scores[:, 0])) if scores[i, 0] > 0][:150]
    table = factors.top_tokens(0, 150)

    assert table.column("row_id").to_pylist() == ids[order].tolist()
    assert table.schema == factors.top_tokens(0, 10).schema
    assert table.slice(0, 100).equals(factors.top_tokens(0, 100))


def test_a_set_of_rows_is_profiled_alone(store):
    """Rows that were not chosen are in no group and no list."""
    ids = store.rows().row_ids()[50:90]
    rows = Rows.from_row_ids("some", store.meta.segment_rows, ids)
    scores = np.ones((len(ids), 2), np.float32)
    found = result_of(store, scores, "some", rows=rows)

    assert found.table("factor_positions").to_pandas().groupby("factor").n.sum().tolist() == [
        40,
        40,
    ]
    assert set(found.table("factor_exemplars")["row_id"].to_pylist()) == set(ids.tolist())


def test_memory_does_not_grow_with_the_corpus(tmp_path, scores):
    """Four times the rows and documents take the same memory, and no more than is said."""
    peaks = []
    for times in (2, 8):
        n_rows = 1000 * times
        store = synthetic_store(
            tmp_path / str(times),
            {"mlp_post.0": np.zeros((n_rows, 13))},
            documents=[10] * (n_rows // 10),
        )
        content = np.ones((store.rows().n_rows, 40), np.float32)
        result_of(store, content[:, :2], "warm")
        rows = store.rows()
        groups = profiles_module.Groups.of(store, rows, "")
        tracemalloc.start()
        profiles = profiles_module.Profiles(store, rows, "", groups, 40)
        for segment in rows.segments:
            profiles.update(segment, content[: len(rows.offsets(segment))])
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert peaks[-1] < 40 * groups.factor_bytes + 2**20
    assert peaks[1] < 1.3 * peaks[0] + 40 * 2 * 64 * profiles_module.LEADING_DOCUMENTS
