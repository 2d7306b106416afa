"""Factors answer by site, row, segment and factor, and refuse what they do not have."""

import numpy as np
import pytest

from actstore.decompose import Factors, nmf
from actstore.errors import ArgumentError, ResultNotFound, RowNotFound
from tests.synthetic import WORDS, synthetic_store


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Three sites, two of three segments committed."""
    rng = np.random.default_rng(0)
    values = {
        f"mlp_post.{layer}": rng.gamma(1, size=(700, width))
        for layer, width in ((0, 13), (2, 17), (10, 11))
    }
    path = tmp_path_factory.mktemp("factors") / "store"
    return synthetic_store(path, values, segment_rows=256, commit=range(2))


@pytest.fixture(scope="module")
def factors(store):
    """Factors of two of the sites, named in the wrong order."""
    return nmf(store, ["mlp_post.10", "mlp_post.2"], 3)


def test_loadings_are_sliced_by_site(factors):
    """Sites stand side by side, layers as integers."""
    assert [str(info.site) for info in factors.sites] == ["mlp_post.2", "mlp_post.10"]
    assert factors.site_slice("mlp_post.10") == slice(17, 28)
    np.testing.assert_array_equal(factors.loadings_of("mlp_post.2"), factors.loadings[:, :17])


def test_scores_come_in_the_order_asked_for(store, factors):
    """Rows of several segments, in any order and repeated, get their own scores."""
    ids = store.rows().row_ids()
    wanted = ids[[300, 4, 4, 299]]

    np.testing.assert_array_equal(
        factors.scores(wanted), np.stack([factors.scores(int(i))[0] for i in wanted])
    )
    segment = int(ids[300]) // 256
    offset = int(ids[300]) % 256
    np.testing.assert_array_equal(
        factors.scores_of_segment(segment)[offset], factors.scores(ids[300])[0]
    )


def test_factors_are_a_table(factors):
    """Arrow and pandas give one row a factor."""
    assert factors.to_arrow().column("factor").to_pylist() == [0, 1, 2]
    assert factors.df()["share"].tolist() == factors.table("factors")["share"].to_pylist()


def test_top_neurons_equal_a_sort(factors):
    """The largest loadings come first, with site and neuron."""
    table = factors.top_neurons(1, 5).to_pylist()
    order = np.argsort(-factors.loadings[1])[:5]

    assert [row["loading"] for row in table] == factors.loadings[1][order].tolist()
    for row, column in zip(table, order, strict=True):
        assert factors.loadings_of(row["site"])[1, row["neuron"]] == factors.loadings[1, column]
    assert {(row["hook"], row["space"]) for row in table} == {("mlp_post", "")}


def test_top_tokens_carry_their_text(store, factors):
    """Each of the highest rows comes with the text of its token."""
    table = factors.top_tokens(0, 7).to_pylist()

    assert [row["rank"] for row in table] == list(range(1, 8))
    for row in table:
        assert row["token"] == f" {WORDS[row['token_id'] - 1]}"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda f: f.site_slice("mlp_post.0"),
            r"site = 'mlp_post.0' is not part of factors 'nmf-1",
        ),
        (lambda f: f.top_neurons(3), r"factor = 3 is not in 'nmf-1'; expected 0 … 2"),
        (
            lambda f: f.top_tokens(0, 101, "window"),
            r"k = 101 exemplars of side 'window' were asked for; expected 1 … 100",
        ),
        (lambda f: f.top_tokens(0, 2, "left"), r"side = 'left' is unknown; expected one of quanti"),
        (lambda f: f.top_documents(0, by="n"), r"by = 'n' is unknown; expected 'mean' or 'share'"),
        (lambda f: f.table("tops"), r"table = 'tops' is unknown; expected one of factor_documents"),
    ],
)
def test_arguments_are_refused(factors, call, message):
    """The message says what there is."""
    with pytest.raises(ArgumentError, match=message):
        call(factors)


@pytest.mark.parametrize("row_id", [-1, 255, 10**9])
def test_a_hole_has_no_scores(factors, row_id):
    """A row that does not exist raises, as everywhere."""
    with pytest.raises(RowNotFound, match="is a hole"):
        factors.scores(row_id)


def test_a_segment_captured_later_has_no_scores(tmp_path):
    """The message says to compute the factors again."""
    values = {"mlp_post.0": np.random.default_rng(0).random((700, 13))}
    path = tmp_path / "store"
    factors = nmf(synthetic_store(path, values, segment_rows=256, commit=[0]), None, 2)
    with factors.store.write_segment(1) as writer:
        later = np.full((1, 256, 13), 0.5, np.float16)
        writer.write_band(factors.sites[0], later)
        writer.commit({}, ())
    factors.store.refresh()

    with pytest.raises(RowNotFound, match=r"was captured after they were computed\. Compute them"):
        factors.scores(256)


def test_a_store_without_factors_says_so(tmp_path):
    """The message names the command that computes some."""
    store = synthetic_store(tmp_path / "store", {"mlp_post.0": np.ones((50, 4))})

    with pytest.raises(
        ResultNotFound, match=r"has no nmf result 'first'; it has none\. Compute one"
    ):
        Factors.open(store, "first")
