"""What a store knows of one neuron, against NumPy over all its rows."""

from __future__ import annotations

import numpy as np
import pytest

import actstore
from actstore.errors import QueryError
from actstore.query import Database, NeuronIndex, Portrait, Shown
from tests.captured import all_tokens, brute_lists, content
from tests.toys import TEXT, toy_model

SITE = "mlp_post.1"
TEXTS = [TEXT, TEXT[40:260], "It was the war. " * 9]


@pytest.fixture(scope="module")
def captured(tmp_path_factory):
    """A store of three sources with the Gram of one of its sites."""
    module, tokenizer = toy_model("gpt2")
    documents = [{"text": text, "source": f"s{i % 2}"} for i, text in enumerate(TEXTS)]
    return actstore.capture(
        module,
        documents,
        tmp_path_factory.mktemp("neuron") / "store",
        tokenizer=tokenizer,
        context=24,
        grams=["resid_post.1"],
    )


def test_kin_overlap_is_the_jaccard_of_whole_lists(captured):
    """Without a Gram kin are the neurons of all sites that share most of the highest rows."""
    kin = NeuronIndex.of(captured, SITE, 5).kin(Database(captured), k=7)

    lists = {
        (str(site), n): {row_id for row_id, _ in rows}
        for site in captured.sites
        for n, rows in enumerate(brute_lists(captured, str(site))["top"])
    }
    mine = lists.pop((SITE, 5))
    expected = {key: len(mine & rows) / len(mine | rows) for key, rows in lists.items()}
    assert kin.measure == "jaccard"
    assert "Jaccard" in kin.words
    assert len(kin.neurons) == 7
    for site, neuron, value in kin.neurons:
        assert value == pytest.approx(expected[site, neuron])
    best = sorted(expected.values(), reverse=True)[:7]
    assert [value for *_, value in kin.neurons] == pytest.approx(best)


def test_silent_neurons_are_not_kin_of_each_other(tmp_path):
    """Two neurons that are zero at every row have the same lists, and are no kin by that."""
    module, tokenizer = toy_model("gpt2")
    parameters = dict(module.named_parameters())
    for name in ("h.1.mlp.c_fc.weight", "h.1.mlp.c_fc.bias"):
        found = next(value for key, value in parameters.items() if key.endswith(name))
        found.data[..., 5:7] = 0
    text = [TEXT, TEXT, TEXT]
    store = actstore.capture(module, text, tmp_path / "store", tokenizer=tokenizer, sites=[SITE])
    rows = {n: [row["row_id"] for row in store.top(SITE, n, k=100)] for n in (5, 6)}

    assert len(rows[5]) == 100
    assert rows[5] == rows[6]
    assert NeuronIndex.of(store, SITE, 5).kin(Database(store)).neurons == []


def test_kin_are_correlations_where_there_is_a_gram(captured):
    """With a Gram kin are the neurons of the site with the largest Pearson correlations."""
    kin = NeuronIndex.of(captured, "resid_post.1", 3).kin(Database(captured), k=5)

    _, values = content(captured, "resid_post.1")
    expected = np.corrcoef(values.astype(np.float64), rowvar=False)[3]
    expected[3] = 0
    assert kin.measure == "correlation"
    assert "Gram" in kin.words
    best = np.argsort(-np.abs(expected))[:5]
    assert [(site, n) for site, n, _ in kin.neurons] == [("resid_post.1", n) for n in best]
    for _, neuron, value in kin.neurons:
        assert value == pytest.approx(expected[neuron], abs=1e-4)


def test_means_by_source_are_those_of_numpy(captured):
    """Means of groups are over the content rows of just these documents, highest first."""
    groups = NeuronIndex.of(captured, SITE, 9).means(Database(captured))

    row_ids, values = content(captured, SITE)
    tokens = {token["row_id"]: token for token in all_tokens(captured).to_pylist()}
    group = np.array([f"s{tokens[row_id]['document'] % 2}" for row_id in row_ids.tolist()])
    column = values[:, 9].astype(np.float64)
    found = groups.means
    assert (groups.n_groups, groups.words) == (2, "over all content rows")
    assert found.column("mean").to_pylist() == sorted(found.column("mean").to_pylist())[::-1]
    assert set(found.column("key").to_pylist()) == {"s0", "s1"}
    for row in found.to_pylist():
        assert row["n"] == (group == row["key"]).sum()
        assert row["mean"] == pytest.approx(column[group == row["key"]].mean())


@pytest.mark.parametrize("key", ["row_id", "nullif(row_id % 5, 0)"])
def test_of_many_groups_the_ends_are_given(captured, key):
    """Of more groups than are asked for come the highest and the lowest, in order; NULL is one."""
    index, database = NeuronIndex.of(captured, SITE, 9), Database(captured)
    every = index.means(database, key, k=10**6)
    few = index.means(database, key, k=2)

    assert few.n_groups == every.n_groups == len(every.means) > 4
    assert few.means.to_pylist() == [*every.means.to_pylist()[:2], *every.means.to_pylist()[-2:]]


def test_a_key_of_means_is_one_expression(captured):
    """Two columns, and SQL that is none, are refused before anything is read."""
    index = NeuronIndex.of(captured, SITE, 9)
    with pytest.raises(
        QueryError, match=r"by = 'source, document' of means is 2 columns; expected"
    ):
        index.means(Database(captured), "source, document")
    with pytest.raises(QueryError, match="sauce"):
        index.means(Database(captured), "sauce")


@pytest.mark.parametrize(("keep", "words"), [("none", "none: no rows"), ("1/4", "over 1/4 of the")])
def test_means_say_what_they_are_over(keep, words):
    """Where not all rows are stored the means say of which they are, or that there are none."""
    module, tokenizer = toy_model("gpt2")
    store = actstore.capture(module, text=TEXTS, tokenizer=tokenizer, keep=keep)
    index = NeuronIndex.of(store, SITE, 2)

    groups = index.means(Database(store))

    assert groups.words.startswith(words)
    stored = 0 if keep == "none" else len(store[SITE].row_ids())
    assert sum(groups.means.column("n").to_pylist()) == stored


def test_the_bottom_of_a_portrait_is_the_lowest_row_of_each_window(captured):
    """Lowest rows come lowest first, at most one of a window, with their own values."""
    index = NeuronIndex.of(captured, SITE, 4)
    portrait = Portrait(captured, "", index.column(), Shown(k=0, n_random=0, n_bottom=4))

    windows = {t["row_id"]: t["window_id"] for t in all_tokens(captured).to_pylist()}
    expected, seen = [], set()
    for row_id, value in brute_lists(captured, SITE)["bottom"][4]:
        if windows[row_id] not in seen:
            seen.add(windows[row_id])
            expected.append((row_id, value))
    found = [(e.row_id, e.value) for e in portrait.exemplars if e.group == "bottom"]
    assert found == expected[:4]
