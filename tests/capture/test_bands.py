"""Bands on a device: the same store as with bands on the CPU, and no more than need be crosses.

PyTorch's CPU stands for the device, and a GPU where there is one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from actstore.capturing import bands, run_estimate, worker
from actstore.capturing.bands import Band, DeviceBands, HostBands, bands_of
from actstore.capturing.batches import Batch
from actstore.capturing.run import Settings
from actstore.errors import NonFiniteActivation
from actstore.models import LanguageModel, load
from actstore.store import CoreStore
from tests.captured import capture, small_segments, stored_bytes
from tests.toys import TEXT, toy_model

no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, no_gpu])]
TEXTS = ["Zwölf Boxkämpfer jagen Viktor 𝔘𝔫𝔦", TEXT[:230], "war", "", TEXT[100:430]]
ROUNDED = ("moments.npz", "neurons.parquet", "gram.npz")
"""Files of sums, which are equal to rounding."""


@contextmanager
def lying(kind: type[Any]) -> Iterator[None]:
    """Let captures made inside have bands of a kind, wherever the model runs."""
    with mock.patch.object(worker, "bands_of", return_value=kind):
        yield


def faulty(device: str) -> LanguageModel:
    """Return a model one of whose blocks gives infinities in float16, and another NaN."""
    module, tokenizer = toy_model("bert", ffn=302)
    with torch.no_grad():
        module.encoder.layer[1].intermediate.dense.bias[7] = 1e6
        module.encoder.layer[2].output.LayerNorm.bias[5] = torch.nan
    return load(module, tokenizer, device=device)


def assert_sums(a: np.ndarray, b: np.ndarray, scale: np.ndarray | float) -> None:
    """Equal to 1e-9 of a scale, and NaN in the same places."""
    np.testing.assert_array_equal(np.isnan(a), np.isnan(b))
    assert (np.nan_to_num(np.abs(a - b)) <= 1e-9 * np.nan_to_num(scale)).all()


def assert_same_store(a: CoreStore, b: CoreStore) -> None:
    """The same bytes, but for sums; these to rounding."""
    ours, theirs = stored_bytes(a), stored_bytes(b)
    assert ours.keys() == theirs.keys()
    differ = [name for name in ours if ours[name] != theirs[name] and not name.endswith(ROUNDED)]
    assert differ == []
    for segment in a.committed:
        counts = [store.commit_of(segment).counts for store in (a, b)]
        assert counts[0] == counts[1]
    generations = a.index(), b.index()
    assert generations[0] is not None
    assert generations[1] is not None
    for name in generations[0].files:
        if not name.endswith(".npz"):
            continue
        other = name.replace(generations[0].folder, generations[1].folder)
        with np.load(a.path / name) as mine, np.load(b.path / other) as also:
            assert mine.files == also.files
            for key in mine.files:
                root, _, field = key.rpartition("/")
                if field in ("mean", "m2", "m3", "m4", "energy_positive"):
                    scale = np.abs(mine[key]).max(initial=0)
                    if field == "m3":  # a difference of terms no larger than this
                        scale = np.sqrt(mine[f"{root}/m2"] * mine[f"{root}/m4"])
                    # A Gram is of products in float32 on the CPU.
                    assert_sums(mine[key], also[key], scale * (1e4 if not root else 1))
                else:
                    np.testing.assert_array_equal(mine[key], also[key], err_msg=key)
    tables = []
    for store, generation in zip((a, b), generations, strict=True):
        (name,) = generation.named("neurons")
        tables.append(pq.read_table(store.path / name))
    for name in tables[0].column_names:
        mine, also = (table[name].to_numpy() for table in tables)
        if name.removeprefix("other_") in (
            "mean",
            "std",
            "skewness",
            "kurtosis",
            "energy",
            "energy_positive",
        ):
            np.testing.assert_allclose(mine, also, rtol=1e-6, atol=1e-6, err_msg=name)
        else:
            np.testing.assert_array_equal(mine, also, err_msg=name)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("kind", "dtype", "options"),
    [
        ("bert", torch.float32, {"keep": "all", "overlap": 5}),
        ("bert", torch.bfloat16, {"keep": {"mlp_post": "1/4", "resid_post.1": "1/2"}}),
        ("gpt2", torch.float32, {"keep": "none", "grams": ["resid_post.1"]}),
        ("llama", torch.float16, {"keep": "all", "batch_tokens": 300, "segment_rows": 128}),
    ],
)
def test_the_store_is_the_same(
    device: str, kind: str, dtype: torch.dtype, options: dict[str, Any], tmp_path: Path
) -> None:
    """Rows, lists, histograms, zones and samples to the byte; the widths are not whole chunks."""
    module, tokenizer = toy_model(kind, ffn=302, dtype=dtype)
    model = load(module, tokenizer, device=device)
    stores = []
    for where in (HostBands, DeviceBands):
        with lying(where):
            path = tmp_path / where.__name__
            stores.append(capture(model, TEXTS, path, **{"batch_tokens": 96, **options}).store)
    assert len(stores[0].committed) > 2
    assert_same_store(*stores)


@pytest.mark.parametrize("device", DEVICES)
def test_faults_are_counted_and_mended_the_same(device: str, tmp_path: Path) -> None:
    """NaN and infinities are stored, counted and placed as the CPU does it."""
    stores = []
    for where in (HostBands, DeviceBands):
        with lying(where):
            model, path = faulty(device), tmp_path / where.__name__
            options: dict[str, Any] = {"on_nan": "count", "dtype": "float16", "batch_tokens": 96}
            stores.append(capture(model, TEXTS, path, **options).store)
    counts = stores[0].commit_of(0).counts
    assert counts["mlp_post.1"].n_overflow > 0
    assert counts["resid_post.2"].n_nan > 0
    assert_same_store(*stores)


def test_a_fault_that_stops_is_told_where_it_began(tmp_path: Path) -> None:
    """The message names site, row and neuron, as that of the CPU does."""
    texts = []
    for where in (HostBands, DeviceBands):
        path, model = tmp_path / where.__name__, faulty("cpu")
        with lying(where), pytest.raises(NonFiniteActivation) as caught:
            capture(model, TEXTS, path, dtype="float16", batch_tokens=96)
        texts.append(str(caught.value))
    assert "resid_post.2" in texts[0]
    assert "neuron = 5" in texts[0]
    assert texts[0] == texts[1]


@contextmanager
def bands_made() -> Iterator[list[str]]:
    """Collect the site that every band is made for, and where."""
    made: list[str] = []
    init = Band.__init__

    def noting(self: Band, meta: Any, info: Any, empty: Any) -> None:
        made.append(f"{info.site} {empty.__name__}")
        init(self, meta, info, empty)

    with mock.patch.object(Band, "__init__", noting):
        yield made


@pytest.mark.parametrize(
    ("keep", "crosses"),
    [
        ("none", None),
        ({"mlp_post": 0, "resid_pre": 0, "resid_post": 0, "resid_post.1": 1}, "resid_post.1"),
        ("1/2", "all"),
    ],
)
def test_only_kept_sites_cross(
    keep: Any, crosses: Any, toy_bert: LanguageModel, tmp_path: Path
) -> None:
    """Bands of the CPU hold the sites that store rows, and where none does there are none."""
    with (
        lying(DeviceBands),
        bands_made() as made,
        mock.patch.object(bands, "_copy", wraps=bands._copy) as copy,
    ):
        store = capture(toy_bert, TEXTS, tmp_path / "store", keep=keep, batch_tokens=96).store
    sites = {str(site) for site in store.sites}
    there = [name.split()[0] for name in made if name.endswith("_on_device")]
    here = {name.split()[0] for name in made if not name.endswith("_on_device")}
    # Of each site what a batch of six chunks fills, one more, and one that is copied.
    assert len(there) <= len(sites) * 8
    n_bands = sum(-(-planned.rows[""] // 16) for planned in store.planned.values())
    assert n_bands > 9
    assert copy.call_count == n_bands * {None: 0, "resid_post.1": 1, "all": len(sites)}[crosses]
    assert here == {"resid_post.1"} if crosses == "resid_post.1" else bool(here) == bool(crosses)


def test_a_batch_tells_where_its_rows_lie(toy_bert: LanguageModel) -> None:
    """`positions` are the rows that `stored` yields, with context and special tokens or without."""
    ids = torch.zeros((3, 9), dtype=torch.int64)
    values = torch.arange(27 * 2).reshape(3, 9, 2)
    for lengths, skip, n_prefix in (
        ([9, 9, 9], [0, 0, 0], 1),
        ([9, 9, 9], [0, 4, 4], 1),
        ([9, 7, 2], [0, 3, 0], 0),
        ([5, 9, 6], [2, 0, 3], 2),
    ):
        batch = Batch(ids, lengths, skip, n_prefix, sum(lengths) - sum(skip))
        rows = torch.cat(list(batch.stored(values)))
        assert len(rows) == batch.rows
        assert torch.equal(values.flatten(0, 1)[batch.positions()], rows)


def test_gpus_have_bands_of_their_own() -> None:
    """The device decides: CUDA's folds where the model runs, others on the CPU."""
    assert bands_of(torch.device("cuda", 1)) is DeviceBands
    assert bands_of(torch.device("cpu")) is bands_of(torch.device("mps")) is HostBands


def test_an_estimate_tells_what_a_gpu_needs(toy_bert: LanguageModel) -> None:
    """Memory of the GPU is told beside that of the CPU, and where there is none it is not."""
    settings = Settings(context=24)
    with small_segments():
        here = run_estimate(toy_bert, TEXTS, settings=settings)
        with lying(DeviceBands):
            there = run_estimate(toy_bert, TEXTS, settings=settings)
    assert here.device_bytes == 0 < there.device_bytes
    assert "GPU" not in str(here)
    assert "MB of the GPU beyond the model" in str(there)


def captured_with(
    n_spare: int, kind: type[Any], model: LanguageModel, path: Path
) -> tuple[CoreStore, list[bool]]:
    """Return a store captured with so many spare bands, and of each fold if the model ran then."""
    folded: list[bool] = []
    running: list[bool] = []
    forward, fold = model._run, worker.Worker._fold

    def run(*args: Any, **options: Any) -> None:
        running.append(True)
        try:
            forward(*args, **options)
        finally:
            running.pop()

    def noting(self: Any, *args: Any) -> None:
        folded.append(bool(running))
        fold(self, *args)

    with (
        lying(kind),
        mock.patch.object(worker, "spare_bands", return_value=n_spare),
        mock.patch.object(worker.Worker, "_fold", noting),
        mock.patch.object(model, "_run", run),
    ):
        return capture(model, TEXTS, path, batch_tokens=48, context=16).store, folded


@pytest.mark.parametrize("kind", [HostBands, DeviceBands])
def test_folds_wait_for_the_batch_or_for_a_band(
    kind: type[Any], toy_bert: LanguageModel, tmp_path: Path
) -> None:
    """Where bands are short they are folded while the model runs; the store is the same."""
    few, early = captured_with(1, kind, toy_bert, tmp_path / "few")
    many, late = captured_with(20, kind, toy_bert, tmp_path / "many")
    assert stored_bytes(few) == stored_bytes(many)
    assert len(early) == len(late) > 20
    assert not any(late)
    # A GPU's own bands do not depend on the budget.
    assert any(early) == (kind is HostBands)
    assert not all(early)
