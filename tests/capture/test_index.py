"""The index of a captured store against NumPy float64 over its stored rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from actstore.models import LanguageModel, load
from actstore.store import FIRST, SPECIAL, CoreStore
from tests.captured import (
    DOCUMENTS,
    Captured,
    all_tokens,
    brute_lists,
    capture,
    content,
    indexed_lists,
)
from tests.toys import TEXT, toy_model


@pytest.fixture(scope="module")
def gpt2_store(toy_gpt2: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Captured:
    """Return a store without special tokens, whose windows begin with a first token."""
    return capture(toy_gpt2, DOCUMENTS, tmp_path_factory.mktemp("gpt2") / "store")


def neurons(store: CoreStore) -> dict[str, dict[str, np.ndarray]]:
    """Return the table of neurons by site and column."""
    generation = store.index()
    assert generation is not None
    (name,) = generation.named("neurons")
    table = pq.read_table(store.path / name)
    columns = {column: table[column].to_numpy() for column in table.column_names}
    return {
        str(site): {c: values[columns["site"] == str(site)] for c, values in columns.items()}
        for site in store.sites
    }


@pytest.mark.parametrize("which", ["minilm_store", "toy_store", "gpt2_store"])
def test_lists_equal_a_sort_of_all_rows(which: str, request: pytest.FixtureRequest) -> None:
    """Exemplars are the k highest and lowest content rows, ties by row_id, with their tokens."""
    store: CoreStore = request.getfixturevalue(which).store
    sites = store.sites[::4] if which == "minilm_store" else store.sites
    for site in sites:
        assert indexed_lists(store, str(site)) == brute_lists(store, str(site))
    tokens = {token["row_id"]: token for token in all_tokens(store).to_pylist()}
    (name,) = store.index().named("exemplars/hook=resid_post/layer=1/")
    for row in pq.ParquetFile(store.path / name).read().to_pylist():
        token = tokens[row["row_id"]]
        assert not token["flags"] & (SPECIAL | FIRST)
        for column in ("document", "position", "token_id"):
            assert row[column] == token[column]


@pytest.mark.parametrize("which", ["minilm_store", "toy_store", "gpt2_store"])
def test_statistics_equal_numpy_over_content_rows(
    which: str, request: pytest.FixtureRequest
) -> None:
    """Special and first rows stay out of the moments; their own stand beside."""
    store: CoreStore = request.getfixturevalue(which).store
    found = neurons(store)
    for site in store.sites:
        row_ids, stored = content(store, str(site))
        x = stored.astype(np.float64)
        table = found[str(site)]
        mean, std = x.mean(axis=0), x.std(axis=0)
        with np.errstate(invalid="ignore"):  # LayerNorm makes channels that do not vary
            z = (x - mean) / std
        expected = {
            "neuron": np.arange(x.shape[1]),
            "layer": np.full(x.shape[1], site.layer),
            "n": np.full(x.shape[1], len(x)),
            "mean": mean,
            "std": std,
            "skewness": (z**3).mean(axis=0),
            "kurtosis": (z**4).mean(axis=0) - 3,
            "min": x.min(axis=0),
            "max": x.max(axis=0),
            "share_positive": (x > 0).mean(axis=0),
            "energy": (x**2).sum(axis=0),
            "energy_positive": (np.maximum(x, 0) ** 2).sum(axis=0),
        }
        others = np.setdiff1d(store[site].row_ids(), row_ids)
        y = store[site][others].astype(np.float64)
        expected |= {"other_n": np.full(y.shape[1], len(y)), "other_mean": y.mean(axis=0)}
        expected |= {"other_max": y.max(axis=0), "other_min": y.min(axis=0)}
        expected["other_std"] = y.std(axis=0)
        for column, values in expected.items():
            np.testing.assert_allclose(
                table[column].astype(np.float64), values, rtol=1e-9, atol=1e-12, err_msg=column
            )


def test_compaction_in_between_changes_nothing(
    toy_capture: Callable[..., Captured], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However often the index is compacted on the way, its bytes at the end are the same."""

    def contents(store: CoreStore) -> dict[str, bytes]:
        generation = store.index()
        return {
            name.removeprefix(generation.folder): (store.path / name).read_bytes()
            for name in generation.files
        }

    once = toy_capture(name="once").store
    monkeypatch.setattr("actstore.capturing.run._COMPACT_EVERY", 2)
    often = toy_capture(name="often").store
    assert often.index().number > 3
    assert contents(often) == contents(once)


def test_nan_is_counted_and_stays_out_of_every_fold(tmp_path: Path) -> None:
    """With on_nan="count" NaN is stored, counted with its places, and never in the index."""
    module, tokenizer = toy_model("bert")
    union = tokenizer.convert_tokens_to_ids("union")
    with torch.no_grad():
        module.embeddings.word_embeddings.weight[union] = float("nan")
    documents = ["the war was over and the people went back", "the union is strong", TEXT]
    found = capture(load(module, tokenizer), documents, tmp_path / "store", on_nan="count")
    store = found.store
    tokens = all_tokens(store).to_pylist()
    rows = [token["row_id"] for token in tokens if token["token_id"] == union]
    assert len(rows) == 2
    site = "resid_pre.0"  # above it, attention carries NaN to the whole window
    width = store.site(site).width
    counts = [store.commit_of(s).counts[site] for s in store.committed if store.commit_of(s).counts]
    assert sum(count.n_nan for count in counts) == len(rows) * width
    assert [count.n_overflow for count in counts] == [0] * len(counts)
    assert counts[0].places[:3] == ((rows[0], 0), (rows[0], 1), (rows[0], 2))
    assert np.isnan(store[site][rows]).all()
    others = np.setdiff1d(store[site].row_ids(), rows)
    assert np.isfinite(store[site][others]).all()
    assert indexed_lists(store, site) == brute_lists(store, site)
    assert np.isfinite(neurons(store)[site]["mean"]).all()
    assert (neurons(store)[site]["n"] == len(content(store, site)[0]) - len(rows)).all()
    untouched = [t["row_id"] for t in tokens if t["document"] == 0]
    assert np.isfinite(store["resid_post.2"][untouched]).all()
    assert np.isnan(store["resid_post.2"][rows]).all()
