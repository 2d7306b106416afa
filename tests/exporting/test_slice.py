"""Rows as Parquet and safetensors, read back by other readers."""

import json

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors
import torch
from safetensors.torch import load_file

import actstore
from actstore.errors import ArgumentError, ResultExists, RowNotFound
from actstore.exporting import slice as slices
from actstore.shard import DTYPES
from tests.synthetic import synthetic_store

DTYPE_OF = {"mlp_post.0": "float16", "mlp_post.1": "bfloat16", "resid_post.0": "float32"}


@pytest.fixture
def store(tmp_path):
    """Return a store of three dtypes, with NaN, infinities and zeros of both signs."""
    rng = np.random.default_rng(3)
    values = {}
    for site, width in zip(DTYPE_OF, (7, 11, 5), strict=True):
        block = rng.normal(size=(1301, width)).astype(np.float32)
        block[rng.random(block.shape) < 0.05] = -0.0
        block[rng.random(block.shape) < 0.02] = np.inf
        values[site] = block
    values["mlp_post.0"][17] = np.nan
    synthetic_store(
        tmp_path / "store", values, dtype=DTYPE_OF, segment_rows=512, chunk_rows=64, context=48
    )
    return actstore.open(tmp_path / "store")


def bits(values):
    """Return the bits of values."""
    return np.ascontiguousarray(values).view(f"u{values.dtype.itemsize}")


@pytest.mark.parametrize("rows", ["content", "all"])
@pytest.mark.parametrize("block_rows", [64, 1 << 16])
def test_safetensors_are_the_rows_bit_for_bit(store, tmp_path, rows, block_rows, monkeypatch):
    """Each tensor has the stored dtype and bits of its site, whatever the block."""
    monkeypatch.setattr(slices, "_BLOCK_ROWS", (1, block_rows))
    path = store.export_slice(tmp_path / "x.safetensors", rows=rows)

    found = load_file(path)
    ids = found.pop("row_ids").numpy()
    np.testing.assert_array_equal(ids, store.rows(rows).row_ids())
    assert set(found) == set(DTYPE_OF)
    for site, tensor in found.items():
        assert tensor.dtype == getattr(torch, DTYPE_OF[site])
        stored = store[site][ids]
        np.testing.assert_array_equal(
            bits(tensor.view(getattr(torch, f"int{stored.itemsize * 8}")).numpy()), bits(stored)
        )
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata()["rows"] == rows


def test_parquet_joins_to_tokens(store, tmp_path):
    """DuckDB reads the file and finds each row's token and values in the store."""
    path = store.export_slice(tmp_path / "x.parquet", ["mlp_post"], rows="position > 40")

    tokens = store.sql("SELECT row_id, document, position, text FROM tokens").to_arrow()
    assert tokens.num_rows
    joined = duckdb.sql(
        f"SELECT x.*, t.text, t.document = x.document AND t.position = x.position AS same "
        f"FROM '{path}' x JOIN tokens t USING (row_id) ORDER BY row_id"
    ).fetchall()
    wanted = store.sql(
        "SELECT row_id FROM tokens WHERE position > 40 AND NOT special AND NOT first "
        "ORDER BY row_id"
    ).rows()
    assert [row[0] for row in joined] == [row[0] for row in wanted]
    assert all(row[-1] and row[3] == row[-2] for row in joined)
    ids = [row[0] for row in joined]
    for place, site in ((4, "mlp_post.0"), (5, "mlp_post.1")):
        np.testing.assert_array_equal(
            np.array([row[place] for row in joined], np.float32), store[site][ids].astype("f4")
        )


def test_parquet_keeps_the_bits_of_float16(store, tmp_path):
    """float16 stays float16, bfloat16 becomes float32 without loss, and lists have one length."""
    path = store.export_slice(tmp_path / "x.parquet", rows="all")

    table = pq.read_table(path)
    assert table.schema.field("mlp_post.0").type == pa.list_(pa.float16(), 7)
    ids = table.column("row_id").to_numpy()
    for site, dtype in DTYPE_OF.items():
        flat = table.column(site).combine_chunks().flatten().to_numpy(zero_copy_only=False)
        stored = store[site][ids]
        if dtype == "bfloat16":
            assert stored.dtype == DTYPES["bfloat16"]
            stored = stored.astype(np.float32)
        np.testing.assert_array_equal(bits(flat), bits(stored).ravel())
    facts = {key.decode(): value.decode() for key, value in table.schema.metadata.items()}
    assert json.loads(facts["actstore.dtypes"]) == DTYPE_OF


def test_rows_by_name_must_be_stored(tmp_path):
    """Row ids come ascending, once; a hole, and a row that is not kept, raise."""
    values = {"mlp_post.0": np.arange(1301 * 3, dtype=np.float32).reshape(-1, 3) / 64}
    synthetic_store(tmp_path / "store", values, keep=0.25, dtype="float32", segment_rows=512)
    store = actstore.open(tmp_path / "store")
    kept = store["mlp_post.0"].row_ids()

    path = store.export_slice(tmp_path / "x.safetensors", rows=[kept[9], kept[2], kept[9]])
    found = load_file(path)
    assert found["row_ids"].tolist() == [kept[2], kept[9]]
    np.testing.assert_array_equal(found["mlp_post.0"], store["mlp_post.0"][kept[[2, 9]]])

    rule = load_file(store.export_slice(tmp_path / "rule.safetensors", rows="all"))
    np.testing.assert_array_equal(rule["row_ids"], kept)

    unkept = next(row for row in store.rows("content").row_ids() if row not in set(kept))
    for row in (int(unkept), 10**9):
        with pytest.raises(RowNotFound, match=f"row_id = {row}"):
            store.export_slice(tmp_path / "y.parquet", rows=[int(kept[0]), row])
    assert not (tmp_path / "y.parquet").exists()


def test_a_taken_name_and_a_failure_leave_nothing_behind(store, tmp_path, monkeypatch):
    """An existing file is untouched; a failed export leaves no file, not even a part."""
    taken = tmp_path / "x.parquet"
    taken.write_text("mine")
    with pytest.raises(ResultExists, match="never written over"):
        store.export_slice(taken)
    assert taken.read_text() == "mine"
    with pytest.raises(ArgumentError, match=r"\.parquet or \.safetensors"):
        store.export_slice(tmp_path / "x.csv")

    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(slices.RowStack, "addresses", lambda *_: 1 / 0)
    for suffix in ("parquet", "safetensors"):
        with pytest.raises(ZeroDivisionError):
            store.export_slice(tmp_path / f"y.{suffix}")
    assert sorted(tmp_path.iterdir()) == before


def test_somebody_else_may_be_first(store, tmp_path, monkeypatch):
    """A file that appears while ours is written is not written over."""
    path = tmp_path / "x.safetensors"
    with pytest.raises(ResultExists):
        store.export_slice(path, progress=lambda *_: path.write_text("theirs"))
    assert path.read_text() == "theirs"
    assert not list(tmp_path.glob("*.partial"))


def test_sites_of_two_spaces_are_refused(tmp_path):
    """Each space has rows of its own: one is exported, two are not."""
    values = {f"{space}.mlp_post.0": np.ones((200, 5)) for space in ("encoder", "decoder")}
    synthetic_store(tmp_path / "store", values)
    store = actstore.open(tmp_path / "store")

    path = store.export_slice(tmp_path / "x.parquet", "decoder.mlp_post", rows="all")
    assert pq.read_table(path).num_rows == 200
    with pytest.raises(ArgumentError, match="do not share rows"):
        store.export_slice(tmp_path / "y.parquet")
