"""Any Zarr v3 reader opens the arrays of a captured store and reads what actstore reads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tensorstore
import zarr

import actstore.bfloat16  # noqa: F401 - teaches zarr-python the data type
from actstore.errors import CorpusError
from actstore.store import CoreStore
from tests.captured import Captured


def expected(store: CoreStore, site: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the committed row ids of a site and their values, as bits."""
    ids = store[site].row_ids()
    return ids, bits(store[site][ids])


def bits(values: np.ndarray) -> np.ndarray:
    """Return values as unsigned integers of their size."""
    return values.view(f"u{values.dtype.itemsize}")


@pytest.fixture(params=["toy", "minilm", "bfloat16", "float32"])
def store(request: pytest.FixtureRequest, toy_capture: Callable[..., Captured]) -> CoreStore:
    """Return stores of all dtypes, and a real one."""
    if request.param in ("toy", "minilm"):
        return request.getfixturevalue(f"{request.param}_store").store
    return toy_capture(dtype=request.param).store


def test_zarr_python_reads_every_array(store: CoreStore) -> None:
    """Rows are at their row_id; what no token fills is NaN."""
    group = zarr.open_group(store.path, mode="r")
    assert group.attrs["actstore"]["format"] == 1
    for info in store.meta.sites:
        array = group[info.path]
        size = store.meta.segment_rows
        assert array.shape == (len(store.planned) * size, info.width)
        assert array.attrs["site"] == str(info.site)
        ids, values = expected(store, str(info.site))
        whole = np.asarray(array[:])
        assert np.array_equal(bits(whole[ids]), values)
        holes = np.setdiff1d(np.arange(len(whole)), ids)
        assert len(holes)
        assert np.isnan(whole[holes].astype(np.float32)).all()


def test_tensorstore_reads_every_array(store: CoreStore) -> None:
    """The same, by another implementation."""
    for info in store.meta.sites:
        spec = {"driver": "file", "path": str(store.path / info.path)}
        array = tensorstore.open({"driver": "zarr3", "kvstore": spec}).result()
        assert array.dtype.name == info.dtype
        ids, values = expected(store, str(info.site))
        whole = np.asarray(array[:].read().result())
        assert np.array_equal(bits(whole[ids]), values)


def test_a_store_without_rows_is_still_zarr(
    toy_capture: Callable[..., Captured], tmp_path: Path
) -> None:
    """A corpus of empty documents makes arrays of no rows."""
    with pytest.raises(CorpusError, match="the corpus holds no token; give one with text in it"):
        toy_capture(["", "  "])
    store = CoreStore(tmp_path / "store")
    assert store.n_rows() == 0
    assert store.n_documents == 2
    assert store.index() is None
    array = zarr.open_group(store.path, mode="r")[store.meta.sites[0].path]
    assert array.shape == (0, store.meta.sites[0].width)
    assert store["mlp_post.0"][:].shape == (0, store.site("mlp_post.0").width)


@pytest.mark.filterwarnings("ignore:Object at")  # Parquet beside the arrays
def test_groups_lead_down_to_every_array(store: CoreStore) -> None:
    """A reader that knows no paths finds the arrays by walking through the groups."""
    group = zarr.open_group(store.path, mode="r")
    found = {name for name, item in group.members(max_depth=None) if isinstance(item, zarr.Array)}
    assert found == {info.path for info in store.meta.sites}
