"""Neurons and factors as JSON, against the rows of the store and the text of its documents."""

import json
from operator import itemgetter

import numpy as np
import pytest

import actstore
from actstore.errors import ArgumentError, NeuronNotFound, ResultExists
from actstore.exporting import Shown, factor_feature, neuron_feature
from actstore.folds.sample import quantile_rows
from actstore.store import FIRST, SPECIAL
from tests.captured import all_tokens, brute_lists, content
from tests.synthetic import synthetic_store
from tests.toys import toy_model

HOSTILE = (
    'A "quoted" </script><b>war</b>\x00 \x1b[31m red \u202eright\u202c\u2028line \U0001f389 \\ '
)


def groups(document):
    """Return the activations of an exported feature by group."""
    found = {"top": [], "quantile": [], "random": []}
    for activation in document["activations"]:
        found[activation["actstore"]["group"]].append(activation)
    return found


@pytest.mark.parametrize(("site", "neuron"), [("mlp_post.1", 7), ("resid_post.2", 3)])
def test_values_are_those_of_the_store(toy_store, site, neuron):
    """Every value is the stored one of its row, and the maximum is where it says."""
    store = toy_store.store
    document = neuron_feature(store, site, neuron).neuronpedia()

    assert document["actstore"]["complete"]
    assert (document["layer"], document["index"]) == (site, str(neuron))
    for activation in document["activations"]:
        values = activation["values"]
        stored = store[site][activation["actstore"]["row_ids"]][:, neuron].astype(np.float64)
        np.testing.assert_array_equal(values, stored)
        assert activation["maxValue"] == max(values) == values[activation["maxValueTokenIndex"]]
        assert activation["minValue"] == min(values)
        own = activation["qualifyingTokenIndex"]
        assert activation["actstore"]["row_id"] == activation["actstore"]["row_ids"][own]
        assert activation["actstore"]["value"] == values[own]
        assert len(activation["tokens"]) == len(values)


def test_contexts_are_content_rows_of_one_window_and_spell_the_text(toy_store):
    """Tokens put together are a stretch of the document, and none is special or first."""
    store = toy_store.store
    tokens = {token["row_id"]: token for token in all_tokens(store).to_pylist()}
    document = neuron_feature(store, "mlp_post.0", 5, Shown(before=4, after=2)).neuronpedia()

    for activation in document["activations"]:
        rows = [tokens[row_id] for row_id in activation["actstore"]["row_ids"]]
        own = rows[activation["qualifyingTokenIndex"]]
        assert not any(row["flags"] & (SPECIAL | FIRST) for row in rows)
        assert {row["window_id"] for row in rows} == {own["window_id"]}
        near = [
            row["row_id"]
            for row in tokens.values()
            if row["window_id"] == own["window_id"] and not row["flags"] & (SPECIAL | FIRST)
        ]
        at = near.index(own["row_id"])
        assert [row["row_id"] for row in rows] == near[max(0, at - 4) : at + 3]
        text = store.document(own["document"])["text"]
        assert "".join(activation["tokens"]) == text[rows[0]["char_start"] : rows[-1]["char_end"]]
        assert activation["dataIndex"] == str(own["document"])


def test_statistics_and_groups_are_of_all_content_rows(toy_store):
    """Top rows are the best of their windows, bins cut the sample, statistics are NumPy's."""
    store = toy_store.store
    site, neuron = "mlp_post.2", 11
    document = neuron_feature(store, site, neuron, Shown(k=9, n_bins=4, n_each=3)).neuronpedia()
    row_ids, values = content(store, site)
    column = values[:, neuron].astype(np.float64)
    found = groups(document)

    windows = dict(all_tokens(store).select(["row_id", "window_id"]).to_pandas().to_numpy())
    best, seen = [], set()
    for row_id, value in brute_lists(store, site, k=len(row_ids))["top"][neuron]:
        if windows[row_id] not in seen:
            seen.add(windows[row_id])
            best.append((row_id, value))
    own = itemgetter("row_id", "value")
    assert [own(a["actstore"]) for a in found["top"]] == best[:9]
    assert [a["actstore"]["rank"] for a in found["top"]] == list(range(1, 10))

    statistics = document["actstore"]["statistics"]
    assert statistics["n"] == len(column)
    assert statistics["max"] == document["maxActApprox"] == column.max()
    assert document["frac_nonzero"] == pytest.approx((column > 0).mean())
    assert statistics["mean"] == pytest.approx(column.mean())
    low, high = statistics["q95"]
    assert low <= np.quantile(column, 0.95, method="inverted_cdf") <= high
    assert sum(b["n"] for b in document["actstore"]["histogram"]) == len(column)
    for entry in document["actstore"]["histogram"]:
        inside = (column >= entry["low"]) & (column <= entry["high"])
        assert entry["n"] <= inside.sum()

    # Fewer than 512 content rows: the sample is all of them.
    assert len(row_ids) < 512
    drawn = quantile_rows(values[:, [neuron]], row_ids, 4, 3)
    assert [a["actstore"]["row_id"] for a in found["quantile"]] == drawn.row_ids[0].ravel().tolist()
    for activation in found["quantile"]:
        assert activation["binMin"] <= activation["actstore"]["value"] <= activation["binMax"]
    assert sum({a["actstore"]["bin"]: a["binContains"] for a in found["quantile"]}.values()) == 1
    assert {a["actstore"]["row_id"] for a in found["random"]} <= set(row_ids.tolist())
    assert len(found["random"]) == 20


def test_hostile_text_comes_back_as_it_was(tmp_path):
    """Escapes, markup, controls and marks are data: the file is ASCII, its strings the text."""
    module, tokenizer = toy_model("gpt2")
    store = actstore.capture(module, text=[HOSTILE * 2], tokenizer=tokenizer, context=512)

    path = store.export_neuron("mlp_post.0", 3, tmp_path / "x.json", before=99, after=99)

    data = path.read_bytes()
    assert data.isascii()
    assert all(byte >= 32 or byte == 10 for byte in data)
    document = json.loads(data)
    assert document["activations"]
    text = store.document(0)["text"]
    for activation in document["activations"]:
        spelt = "".join(activation["tokens"])
        assert len(spelt) > 30
        assert spelt in text


@pytest.mark.parametrize("keep", ["none", "1/4"])
def test_what_is_not_stored_is_null_or_computed_again(tmp_path, keep):
    """Without replay only stored values and the exemplar's own are known; with it all are."""
    module, tokenizer = toy_model("gpt2")
    texts = ["The keys to the cabinet are on the table. " * 4, "It was the war. " * 5]
    options = {"text": texts, "tokenizer": tokenizer, "context": 24}
    whole = actstore.capture(module, **options)
    store = actstore.capture(module, keep=keep, **options)

    known = json.loads(store.export_neuron("mlp_post.1", 9, tmp_path / "a.json").read_bytes())
    again = json.loads(
        store.export_neuron(
            "mlp_post.1", 9, tmp_path / "b.json", replay=True, model=module, tokenizer=tokenizer
        ).read_bytes()
    )

    assert not known["actstore"]["complete"]
    assert "null" in known["actstore"]["values"]
    assert again["actstore"]["complete"]
    kept = set(store["mlp_post.1"].row_ids().tolist())
    for a, b in zip(known["activations"], again["activations"], strict=True):
        assert a["actstore"] == b["actstore"]
        stored = whole["mlp_post.1"][a["actstore"]["row_ids"]][:, 9].astype(np.float64)
        np.testing.assert_allclose(b["values"], stored, atol=2e-3)
        for row_id, value, exact in zip(
            a["actstore"]["row_ids"], a["values"], stored.tolist(), strict=True
        ):
            if row_id in kept or row_id == a["actstore"]["row_id"]:
                assert value == exact
            else:
                assert value is None
        assert b["values"][b["qualifyingTokenIndex"]] == b["actstore"]["value"]


def test_neuron_records_have_the_fields_of_automated_interpretability(toy_store, tmp_path):
    """A record's fields are those of its dataclasses, no more, and all activations numbers."""
    feature = neuron_feature(toy_store.store, "mlp_post.1", 7)
    record = json.loads(feature.write(tmp_path / "7.json", "neuron-record").read_bytes())

    assert set(record) == {
        "dataclass_name",
        "neuron_id",
        "random_sample",
        "random_sample_by_quantile",
        "quantile_boundaries",
        "mean",
        "variance",
        "skewness",
        "kurtosis",
        "most_positive_activation_records",
    }
    assert record["neuron_id"]["layer_index"] == 1
    assert record["neuron_id"]["neuron_index"] == 7
    assert len(record["random_sample_by_quantile"]) == len(record["quantile_boundaries"]) + 1 == 10
    activations = groups(feature.neuronpedia())
    for group, records in (
        ("top", record["most_positive_activation_records"]),
        ("random", record["random_sample"]),
        ("quantile", [r for of in record["random_sample_by_quantile"] for r in of]),
    ):
        assert [(r["tokens"], r["activations"]) for r in records] == [
            (a["tokens"], a["values"]) for a in activations[group]
        ]


def test_factors_are_their_scores(small_store, tmp_path):
    """A factor's values are its scores, its top rows the best of their windows."""
    factors = small_store.factors("first")
    document = json.loads(
        small_store.export_factor(1, tmp_path / "f.json", name="first").read_bytes()
    )

    assert document["layer"] == "nmf-first"
    scores = np.concatenate([factors.scores_of_segment(s) for s in small_store.committed])[:, 1]
    scores = scores[~np.isnan(scores)].astype(np.float64)
    statistics = document["actstore"]["statistics"]
    assert statistics["n"] == len(scores)
    assert statistics["max"] == scores.max()
    assert statistics["mean"] == pytest.approx(scores.mean())
    for activation in document["activations"]:
        expected = factors.scores(activation["actstore"]["row_ids"])[:, 1].astype(np.float64)
        np.testing.assert_array_equal(activation["values"], expected)
    top = groups(document)["top"]
    (token,) = factors.top_tokens(1, 1)
    assert top[0]["actstore"]["row_id"] == token["row_id"]
    ids = [a["actstore"]["row_id"] for a in top]
    windows = small_store.tokens_of(ids).column("window_id").to_pylist()
    assert len(set(windows)) == len(windows) > 1
    loading = document["actstore"]["top_neurons"][0]
    assert loading["loading"] == factors.loadings[1].max()


@pytest.mark.parametrize("kind", ["pca", "ica"])
def test_components_are_exported_like_factors(small_store, tmp_path, kind):
    """Of signed scores too values are the scores, and statistics and top rows are theirs."""
    made = getattr(small_store, kind)("mlp_post.1", 2)
    small_store.nmf("mlp_post", 2, name="newer")
    document = json.loads(small_store.export_factor(1, tmp_path / "f.json", kind=kind).read_bytes())

    assert document["layer"] == f"{kind}-{made.name}"
    scores = np.concatenate([made.scores_of_segment(s) for s in small_store.committed])[:, 1]
    scores = scores[~np.isnan(scores)].astype(np.float64)
    statistics = document["actstore"]["statistics"]
    assert statistics["min"] == scores.min() < 0
    assert statistics["max"] == scores.max()
    assert document["frac_nonzero"] == pytest.approx((scores > 0).mean())
    for activation in document["activations"]:
        expected = made.scores(activation["actstore"]["row_ids"])[:, 1].astype(np.float64)
        np.testing.assert_array_equal(activation["values"], expected)
    assert groups(document)["top"][0]["actstore"]["value"] == scores.max()
    record = small_store.export_factor(1, tmp_path / "r.json", kind=kind, form="neuron-record")
    assert len(json.loads(record.read_bytes())["most_positive_activation_records"]) > 1


def test_refusals_say_what_to_do(small_store, tmp_path):
    """A taken name, a wrong one, an unknown neuron, factor or form: nothing is written."""
    path = tmp_path / "x.json"
    path.write_text("mine")
    with pytest.raises(ResultExists, match="never written over"):
        small_store.export_neuron("mlp_post.0", 1, path)
    assert path.read_text() == "mine"
    with pytest.raises(ArgumentError, match=r"ends in \.json"):
        small_store.export_neuron("mlp_post.0", 1, tmp_path / "x.txt")
    with pytest.raises(ArgumentError, match=r"needs the folder .*/none, which does not exist"):
        small_store.export_neuron("mlp_post.0", 1, tmp_path / "none" / "x.json")
    with pytest.raises(NeuronNotFound, match="0 … 63"):
        small_store.export_neuron("mlp_post.0", 64, tmp_path / "y.json")
    with pytest.raises(ArgumentError, match="'neuronpedia', 'neuron-record'"):
        small_store.export_neuron("mlp_post.0", 1, tmp_path / "y.json", form="delphi")
    with pytest.raises(ArgumentError, match="expected 0 … 1"):
        small_store.export_factor(2, tmp_path / "y.json")
    with pytest.raises(ArgumentError, match="n_bins = 0"):
        small_store.export_neuron("mlp_post.0", 1, tmp_path / "y.json", n_bins=0)
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_records_of_unknown_values_are_refused(tmp_path):
    """A neuron-record has no null, so unknown values are refused with the remedy."""
    module, tokenizer = toy_model("gpt2")
    store = actstore.capture(module, text="The keys to it", tokenizer=tokenizer, keep="none")

    with pytest.raises(ArgumentError, match="replay=True"):
        store.export_neuron("mlp_post.0", 1, tmp_path / "x.json", form="neuron-record")
    assert not any(tmp_path.iterdir())


def test_a_store_without_an_index_is_refused(tmp_path):
    """Statistics come from the index; without one the remedy is named."""
    store = synthetic_store(tmp_path / "store", {"mlp_post.0": np.ones((200, 5))})

    with pytest.raises(ArgumentError, match="actstore finish"):
        neuron_feature(store, "mlp_post.0", 0)


def test_a_factor_of_some_rows_says_which(small_store):
    """Scores exist for the chosen rows only: the others are null."""
    factors = small_store.nmf("mlp_post", 2, rows="position < 9", name="few")
    document = factor_feature(factors, 0).neuronpedia()

    assert document["actstore"]["rows_of_the_result"] == "position < 9"
    assert not document["actstore"]["complete"]
    values = [v for a in document["activations"] for v in a["values"]]
    assert None in values
    assert document["actstore"]["statistics"]["n"] == factors.summary["n_rows"]
