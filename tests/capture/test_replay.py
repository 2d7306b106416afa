"""Replay: rows computed again from the stored tokens."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
import torch

import actstore
from actstore.capturing.replay import Replayer, stored_form
from actstore.errors import BudgetExceeded, ModelError, RowNotFound, SiteNotFound, StoreMismatch
from actstore.models import LanguageModel, load
from actstore.store import CoreStore
from tests.captured import DOCUMENTS, Captured, capture
from tests.toys import TEXT, toy_model


def assert_near(stored: npt.NDArray[Any], replayed: npt.NDArray[Any]) -> None:
    """Fail unless values differ by rounding alone: a unit, and a little of the size of the site."""
    assert stored.dtype == replayed.dtype
    assert stored.shape == replayed.shape
    a, b = stored.astype(np.float64), replayed.astype(np.float64)
    unit = 2.0**-10 * np.maximum(np.abs(a), 2.0**-14)
    assert (np.abs(a - b) <= unit + 1e-5 * np.sqrt(np.mean(a**2))).all()


@pytest.fixture
def store(toy_store: Captured) -> actstore.api.Store:
    """Return the toy store as users see it."""
    return actstore.open(toy_store.store.path)


def test_replayed_rows_are_the_stored_ones(
    store: actstore.api.Store, toy_bert: LanguageModel
) -> None:
    """Rows in any order, some twice, at all sites: what is stored, but for rounding."""
    rng = np.random.default_rng(3)
    row_ids = rng.choice(store["mlp_post.0"].row_ids(), 37)

    found = store.replay(row_ids, model=toy_bert)

    assert list(found) == store.sites
    np.testing.assert_array_equal(found.row_ids, row_ids)
    for site in store.sites:
        assert_near(store[site][row_ids], found[site])
    assert found["blocks.1.mlp.hook_post"] is found["mlp_post.1"]
    assert repr(found) == "<Replayed: 37 rows x resid_pre.0, mlp_post.0–2, resid_post.0–2>"


@pytest.mark.parametrize("overlap", [0, 7])
def test_context_and_special_tokens_are_fed_again(
    overlap: int, toy_capture: Callable[..., Captured]
) -> None:
    """Rows of windows that begin with context of the one before are those that were stored."""
    made = toy_capture(overlap=overlap, segment_rows=128)
    windows = [w for s in made.store.planned for w in made.store.windows(s).to_pylist()]
    assert any(w["context_tokens"] for w in windows) == (overlap > 0)
    store = actstore.open(made.store.path)
    row_ids = store["resid_post.2"].row_ids()

    found = store.replay(row_ids, "resid_post.2", model=made.model)

    assert_near(store["resid_post.2"][row_ids], found["resid_post.2"])


def test_the_real_minilm_is_replayed(minilm_store: Captured, minilm_path: Path) -> None:
    """A real model, opened from its directory: its rows again."""
    store = actstore.open(minilm_store.store.path)
    row_ids = store["mlp_post.5"].row_ids()[5:300:13]

    found = store.replay(row_ids, ["mlp_post", "resid_post.5"], model=minilm_path, device="cpu")

    for site in found:
        assert_near(store[site][row_ids], found[site])


def test_only_the_windows_of_the_rows_are_run_and_only_once(
    store: actstore.api.Store, toy_bert: LanguageModel
) -> None:
    """Two rows of one window cost one forward; the same window again costs none."""
    window = store.windows(2).to_pylist()[0]
    first = window["first_row"]
    before = toy_bert.n_forwards

    store.replay([first, first + 3], "mlp_post", model=toy_bert)
    assert toy_bert.n_forwards == before + 1
    again = store.replay(first + 1, "mlp_post.1")
    assert toy_bert.n_forwards == before + 1
    assert_near(store["mlp_post.1"][[first + 1]], again["mlp_post.1"])

    store.replay(first, "resid_post.0")
    assert toy_bert.n_forwards == before + 2, "another site has to be computed"


def test_what_is_kept_is_bounded(store: actstore.api.Store, toy_bert: LanguageModel) -> None:
    """Windows are forgotten when a quarter of the budget is full, those not asked for longest."""
    windows = [w for segment in store.planned for w in store.windows(segment).to_pylist()]
    firsts = [w["first_row"] for w in windows if w["rows"] == 24]
    one_window = 24 * store.site("mlp_post.0").row_bytes
    replayer = Replayer(store, toy_bert)

    def cost(row_id: int) -> int:
        before = toy_bert.n_forwards
        replayer.replay(row_id, "mlp_post.0", 4 * 2 * one_window)  # two windows may stay
        return toy_bert.n_forwards - before

    assert [cost(firsts[i]) for i in (0, 1, 0, 1)] == [1, 1, 0, 0]
    assert [cost(firsts[i]) for i in (0, 2, 0, 1)] == [0, 1, 0, 1]


def test_rows_that_are_not_captured_yet_can_be_replayed(
    toy_capture: Callable[..., Captured], tmp_path: Path
) -> None:
    """A row needs to be planned, not committed: its tokens are all a forward takes."""
    made = toy_capture()
    last = made.store.committed[-1]
    row_ids = last * made.store.meta.segment_rows + np.arange(5)
    stored = made.store["mlp_post.2"][row_ids]
    folder = shutil.copytree(made.store.path, tmp_path / "copy")
    (folder / f"commits/{last:08d}.json").unlink()
    store = actstore.open(folder)
    with pytest.raises(RowNotFound, match="planned but not captured yet"):
        store["mlp_post.2"][row_ids]

    assert_near(stored, store.replay(row_ids, "mlp_post.2", model=made.model)["mlp_post.2"])


@pytest.mark.parametrize("keep", ["none", "1/4"])
def test_rows_that_are_not_kept_can_be_replayed(
    keep: str, toy_capture: Callable[..., Captured], toy_store: Captured
) -> None:
    """With any keep every row comes back; the plan, and so the rows, are those of keep = all."""
    made = toy_capture(keep=keep)
    store = actstore.open(made.store.path)
    full = toy_store.store
    row_ids = full["mlp_post.1"].row_ids()[7:190]

    found = store.replay(row_ids, ["mlp_post.1", "resid_post.2"], model=made.model)

    for site in found:
        assert_near(full[site][row_ids], found[site])


def test_overflow_is_saturated_as_capture_does(tmp_path: Path) -> None:
    """Values outside float16 come back as its largest number, at the same rows and neurons."""
    module, tokenizer = toy_model("gpt2", n_layers=2)
    with torch.no_grad():
        module.h[1].mlp.c_fc.weight *= 1e5
    made = capture(load(module, tokenizer), [TEXT], tmp_path / "store", dtype="float16")
    row_ids = made.store["mlp_post.1"].row_ids()
    stored = made.store["mlp_post.1"][row_ids]
    assert (stored == 65504).any()

    found = actstore.open(made.store.path).replay(row_ids, "mlp_post.1", model=made.model)

    np.testing.assert_array_equal(found["mlp_post.1"] == 65504, stored == 65504)
    assert np.isfinite(found["mlp_post.1"]).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_the_stored_form_rounds_saturates_and_keeps_nan(dtype: str) -> None:
    """Rounding is to nearest even, infinities become the largest number, NaN stays."""
    values = torch.tensor([[1.00048828125, -70_000.0, torch.inf, torch.nan, -0.0, 1e-7]])

    found = stored_form(values, dtype)

    numpy_dtype = {"bfloat16": ml_dtypes.bfloat16}.get(dtype, dtype)
    with np.errstate(over="ignore"):
        expected = values.numpy().astype(numpy_dtype)
    largest = torch.finfo(getattr(torch, dtype)).max
    expected[0, 2] = largest
    if dtype == "float16":
        expected[0, 1] = -largest
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found.astype(np.float64), expected.astype(np.float64))
    assert np.signbit(found[0, 4])


def test_16_bit_models_come_back_in_their_type(tmp_path: Path) -> None:
    """A bfloat16 model gives bfloat16, near what is stored."""
    module, tokenizer = toy_model("llama", dtype=torch.bfloat16)
    made = capture(load(module, tokenizer), DOCUMENTS, tmp_path / "store")
    row_ids = made.store["mlp_post.2"].row_ids()

    found = actstore.open(made.store.path).replay(
        row_ids, "mlp_post.2", model=module, tokenizer=tokenizer
    )["mlp_post.2"]

    stored = made.store["mlp_post.2"][row_ids]
    assert found.dtype == stored.dtype == ml_dtypes.bfloat16
    off = found.astype(np.float64) - stored.astype(np.float64)
    assert np.sqrt(np.mean(off**2)) < 0.05 * np.sqrt(np.mean(stored.astype(np.float64) ** 2))


def test_another_model_or_tokenizer_is_refused(store: actstore.api.Store) -> None:
    """Other weights, and another tokenizer over the same weights, are told apart, with a remedy."""
    with pytest.raises(StoreMismatch, match=r"with weights .* has .* as model= \(--model\)"):
        store.replay(0, model=load(*toy_model("bert", seed=1)))
    module, tokenizer = toy_model("bert")
    tokenizer.backend_tokenizer.normalizer = None
    with pytest.raises(StoreMismatch, match=r"with tokenizer .* as model="):
        store.replay(0, model=module, tokenizer=tokenizer)


def test_a_model_that_its_name_does_not_lead_to_is_asked_for(store: actstore.api.Store) -> None:
    """The name of a toy leads nowhere; the message says which argument takes its directory."""
    with pytest.raises(ModelError, match=r"'toy-bert', is not found .* model= \(--model\)"):
        store.replay(0)


def test_the_model_is_found_by_its_recorded_name(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relative directory is found again from where it was captured, and loaded once."""
    monkeypatch.chdir(model_folder.parent)
    made = actstore.capture(model_folder.name, text=TEXT, store=tmp_path / "store")
    store = actstore.open(made.path)

    first = store.replay([1, 2], "mlp_post.1")
    monkeypatch.chdir(tmp_path)  # from here it would not be found
    second = store.replay([100], "mlp_post.1")

    assert_near(store["mlp_post.1"][[1, 2]], first["mlp_post.1"])
    assert_near(store["mlp_post.1"][[100]], second["mlp_post.1"])


def test_bad_rows_sites_and_budgets_are_refused(
    store: actstore.api.Store, toy_bert: LanguageModel
) -> None:
    """Holes, rows past the plan, unknown sites, and more than the budget, before any forward."""
    size = store.meta.segment_rows
    hole = next(s for s, planned in store.planned.items() if planned.rows[""] < size)
    before = toy_bert.n_forwards
    for row_id in (hole * size + size - 1, 10**9, -1):
        with pytest.raises(RowNotFound, match=f"row_id = {row_id} is a hole"):
            store.replay([0, row_id], model=toy_bert)
    with pytest.raises(RowNotFound, match="integers"):
        store.replay([0.5], model=toy_bert)
    with pytest.raises(SiteNotFound, match="it has"):
        store.replay(0, "mlp_post.7", model=toy_bert)
    with pytest.raises(BudgetExceeded, match=r"fewer rows or sites at a time, .* budget="):
        store.replay(np.zeros(10**6, dtype=int), model=toy_bert, budget="64MiB")
    with pytest.raises(SiteNotFound, match=r"not replayed; mlp_post.0 was"):
        store.replay(0, "mlp_post.0", model=toy_bert)["mlp_post.1"]
    assert toy_bert.n_forwards == before + 1


def test_no_rows_are_no_work(store: CoreStore, toy_bert: LanguageModel) -> None:
    """An empty list of rows gives empty arrays and runs nothing."""
    before = toy_bert.n_forwards
    found = actstore.open(store.path).replay([], "mlp_post.0", model=toy_bert)
    assert found["mlp_post.0"].shape == (0, 64)
    assert toy_bert.n_forwards == before
