"""The index of a captured store against NumPy float64 over its stored rows."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch

from actstore.capturing.lists import GenerationReader
from actstore.errors import SiteNotFound, StoreMismatch
from actstore.folds import Histogram, Sample, Zones
from actstore.folds.histogram import bin_edges, bins_of
from actstore.models import LanguageModel, load
from actstore.store import FIRST, SPECIAL, CoreStore
from actstore.store.stored_rows import hash_rows
from tests.captured import (
    DOCUMENTS,
    Captured,
    all_tokens,
    brute_lists,
    capture,
    content,
    indexed_lists,
    stored_bytes,
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


def indexed(store: CoreStore, site: str, kind: str, file: str) -> Path:
    """Return the path of a site's file in the newest index."""
    hook, layer = site.split(".")
    (name,) = store.index().named(f"{kind}/hook={hook}/layer={layer}/{file}")
    return store.path / name


def shared(store: CoreStore, name: str) -> npt.NDArray[Any]:
    """Return an array of the newest index that all sites share."""
    return np.load(store.path / store.index().folder / name)


@pytest.mark.parametrize("which", ["toy_store", "gpt2_store"])
def test_window_lists_hold_each_window_once(which: str, request: pytest.FixtureRequest) -> None:
    """Side "window" ranks windows by their highest content value, first row first."""
    store: CoreStore = request.getfixturevalue(which).store
    window_of = dict(all_tokens(store).select(["row_id", "window_id"]).to_pandas().to_numpy())
    for site in ("mlp_post.0", "resid_post.1"):
        rows, values = content(store, site)
        windows = np.array([window_of[row] for row in rows])
        table = pq.read_table(indexed(store, site, "exemplars", "exemplars.parquet"))
        table = table.filter(pc.field("side") == "window")
        assert set(table["rank"].to_numpy()) == set(range(1, min(100, len(set(windows))) + 1))
        for neuron in (0, 7):
            found = {}
            for row, value, window in zip(rows, values[:, neuron], windows, strict=True):
                found[window] = min(found.get(window, (np.inf, 0)), (-float(value), row))
            mine = table.filter(pc.field("neuron") == neuron)
            got = zip(-mine["value"].to_numpy(), mine["row_id"].to_numpy(), strict=True)
            assert list(got) == sorted(found.values())[:100]


@pytest.mark.parametrize("which", ["minilm_store", "toy_store"])
def test_histograms_count_every_value(which: str, request: pytest.FixtureRequest) -> None:
    """Each bin of a neuron that holds something is a row, in the order of value."""
    store: CoreStore = request.getfixturevalue(which).store
    low, high = bin_edges()
    for site in store.sites[::5]:
        _, values = content(store, str(site))
        table = pq.read_table(indexed(store, str(site), "histograms", "histograms.parquet"))
        neuron, place = table["neuron"].to_numpy(), table["bin"].to_numpy()
        assert (np.diff(neuron * 256 + place) > 0).all()
        bins = bins_of(values) + 256 * np.arange(values.shape[1])
        want = np.bincount(bins.ravel(), minlength=256 * values.shape[1])
        np.testing.assert_array_equal(table["n"].to_numpy(), want[want > 0])
        np.testing.assert_array_equal(neuron * 256 + place, np.flatnonzero(want))
        np.testing.assert_array_equal(table["low"].to_numpy(), low[place])
        np.testing.assert_array_equal(table["high"].to_numpy(), high[place])


@pytest.mark.parametrize("which", ["minilm_store", "gpt2_store"])
def test_quantiles_are_known_to_a_bin(which: str, request: pytest.FixtureRequest) -> None:
    """The low and high of a quantile hold it, and lie within the neuron's extremes."""
    store: CoreStore = request.getfixturevalue(which).store
    found = neurons(store)
    for site in store.sites[::5]:
        x = content(store, str(site))[1].astype(np.float64)
        table = found[str(site)]
        for percent in (1, 5, 25, 50, 75, 95, 99):
            quantile = np.quantile(x, percent / 100, axis=0, method="inverted_cdf")
            low, high = (table[f"q{percent:02d}_{end}"] for end in ("low", "high"))
            assert (low <= quantile).all()
            assert (quantile <= high).all()
            assert (low >= table["min"]).all()
            assert (high <= table["max"]).all()
            far = np.abs(quantile) > 2.0**-14
            assert (high - low <= 0.25 * np.abs(quantile) / 0.8 + 1e-9)[far].all()


def test_zones_are_the_extremes_of_bands(toy_store: Captured) -> None:
    """A neuron's smallest and largest content value in each band of the plan are one stretch."""
    store = toy_store.store
    meta = store.meta
    bands = shared(store, "zones/bands.npy")
    for site in ("mlp_post.0", "resid_post.1"):
        rows, values = content(store, site)
        found = rows // meta.chunk_rows
        zones = np.load(indexed(store, site, "zones", "zones.npy"), mmap_mode="r")
        assert zones.shape == (store.site(site).width, len(bands), 2)
        assert zones.flags.c_contiguous
        per_segment = meta.segment_rows // meta.chunk_rows
        assert (bands[:, 0] * per_segment + bands[:, 1]).tolist() == np.unique(found).tolist()
        for i, band in enumerate(np.unique(found)):
            mine = values[found == band].astype(np.float32)
            np.testing.assert_array_equal(zones[:, i, 0], mine.min(axis=0))
            np.testing.assert_array_equal(zones[:, i, 1], mine.max(axis=0))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_samples_are_the_stored_values_of_the_same_rows(
    toy_capture: Callable[..., Captured], dtype: str
) -> None:
    """The content rows with the lowest hashes are sampled, with every site's values bit by bit."""
    store = toy_capture(DOCUMENTS * 2, dtype=dtype).store
    rows, _ = content(store, "mlp_post.0")
    assert len(rows) > 600, "more than are sampled"
    lowest = np.argsort(hash_rows(rows, Sample().seed))[:512]
    row_ids = shared(store, "samples/row_ids.npy")
    assert row_ids.tolist() == np.sort(rows[lowest]).tolist()
    for site in store.sites:
        values = np.load(indexed(store, str(site), "samples", "values.npy"))
        if dtype == "bfloat16":
            values = values.view(ml_dtypes.bfloat16)
        assert values.tobytes() == store[site][row_ids].tobytes()


def test_a_gram_is_folded_where_it_is_asked_for(toy_capture: Callable[..., Captured]) -> None:
    """The named sites, and no others, have the second moments of their content rows."""
    captured = toy_capture(grams=("resid_post.1", "mlp_post.0-1"))
    store = captured.store
    assert store.meta.grams == ("mlp_post.0", "mlp_post.1", "resid_post.1")
    assert len(store.index().named("grams/")) == 3
    for site in store.meta.grams:
        _, values = content(store, site)
        x = values.astype(np.float64)
        with np.load(indexed(store, site, "grams", "gram.npz")) as gram:
            assert gram["n"] == len(x)
            np.testing.assert_allclose(gram["mean"], x.mean(axis=0), atol=1e-7)
            want = np.cov(x.T) * (len(x) - 1)
            scale = np.sqrt(np.outer(np.diag(want), np.diag(want)))
            assert (np.abs(gram["m2"] - want) <= 1e-5 * scale + 1e-12).all()
    with pytest.raises(StoreMismatch, match=r"another grams: it has mlp_post\.0, mlp_post\.1"):
        capture(captured.model, captured.documents, store.path, grams=("mlp_post.0",))
    with pytest.raises(SiteNotFound, match=r"'mlp_post\.9' is not in what is captured"):
        toy_capture(name="other", grams=("mlp_post.9",))


def test_states_come_back_from_the_index_without_loss(toy_store: Captured) -> None:
    """What the next compaction goes on from is what the last one wrote."""
    store = toy_store.store
    reader = GenerationReader(store, store.index())
    info = store.site("mlp_post.0")
    rows, values = content(store, "mlp_post.0")
    fold = Histogram()
    want = fold.update(fold.start(info.width), values, rows)
    np.testing.assert_array_equal(reader.state(info, "histogram").counts, want.counts)
    zones = Zones(store.meta.chunk_rows)
    wanted = zones.update(zones.start(info.width), values, rows)
    got = reader.state(info, "zones")
    np.testing.assert_array_equal(got.first_row_ids, wanted.first_row_ids)
    np.testing.assert_array_equal(got.extremes, wanted.extremes)
    sampled = reader.state(info, "sample")
    assert sampled.values.tobytes() == store["mlp_post.0"][sampled.row_ids].tobytes()


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

    grams = ("mlp_post.0",)
    once = toy_capture(name="once", grams=grams).store
    monkeypatch.setattr("actstore.capturing.run.COMPACT_EVERY", 2)
    often = toy_capture(name="often", grams=grams).store
    assert often.index().number > 3
    assert contents(often) == contents(once)
    kinds = {name.split("/")[1].split(".")[0] for name in contents(once)}
    assert kinds == {"exemplars", "grams", "histograms", "moments", "neurons", "samples", "zones"}


def test_partials_beyond_those_that_stay_open_are_merged_too(
    toy_capture: Callable[..., Captured], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The index has the same bytes whether all partials stay open while it is made, or one."""
    whole = toy_capture(name="all").store
    compact = importlib.import_module("actstore.capturing.compact")
    monkeypatch.setattr(compact, "_OPEN_ARRAYS", 1)
    assert len(whole.committed) > 2
    assert stored_bytes(toy_capture(name="one").store) == stored_bytes(whole)


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
