"""Rows are read by rank as they are stored, in few reads."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from actstore.decompose.ranked import RankedRows, as_tensor
from actstore.errors import ArgumentError, NonFiniteActivation
from actstore.store import Rows, SiteCounts
from tests.synthetic import synthetic_store

DTYPES = {"mlp_post.0": "float16", "mlp_post.1": "bfloat16", "resid_post.1": "float32"}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Three sites of three dtypes and widths; windows of 37 rows, holes at the ends of segments."""
    rng = np.random.default_rng(0)
    values = {
        name: rng.normal(size=(5003, width))
        for name, width in zip(DTYPES, (37, 514, 23), strict=True)
    }
    path = tmp_path_factory.mktemp("ranked") / "store"
    return synthetic_store(
        path, values, dtype=DTYPES, documents=[101] * 49 + [54], context=37, chunk_rows=256
    )


def ranked_rows(store, rows=None):
    """Return the content rows of all sites, unless told otherwise."""
    return RankedRows(store, store.select(None), store.rows() if rows is None else rows)


def in_pieces(arrays, *, cuts):
    """Return the same memory as arrays one above the other."""
    return [np.split(array, cuts) for array in arrays]


@pytest.mark.parametrize("rule", ["content", "all"])
@pytest.mark.parametrize("step", [1, 2, 7, 60])
@pytest.mark.parametrize("order", ["ascending", "dealt"])
@pytest.mark.parametrize("helped", [False, True])
def test_each_rank_gives_its_own_row(store, rule, step, order, helped):
    """Whatever lies between them and in whatever order, rows come with their values and row ids."""
    rows = store.rows(rule)
    ranked = ranked_rows(store, rows)
    ranks = np.arange(3, ranked.n_rows, step)
    if order == "dealt":
        ranks = np.random.default_rng(step).permutation(ranks)
    memory = ranked.empty(len(ranks) + 5)

    with ThreadPoolExecutor(1) as helper:
        row_ids = ranked.read(
            ranks, in_pieces(memory, cuts=[11, 11, 37]), helper if helped else None
        )

    np.testing.assert_array_equal(row_ids, rows.row_ids()[ranks])
    for info, values in zip(store.select(None), memory, strict=True):
        assert values.dtype == store.layout(info).numpy_dtype
        np.testing.assert_array_equal(values[: len(ranks)], store[info.site][row_ids])
        np.testing.assert_array_equal(
            as_tensor(values[: len(ranks)][::-1].copy()).float().numpy(),
            store[info.site][row_ids[::-1]].astype(np.float32),
        )


def test_sites_that_keep_other_parts_agree(tmp_path):
    """Each site's row is that of the rank, wherever its own sample has it."""
    rng = np.random.default_rng(2)
    values = {f"mlp_post.{i}": rng.normal(size=(3001, 7 + i)) for i in range(3)}
    keep = {"mlp_post.0": 1 / 4, "mlp_post.1": 1 / 2, "mlp_post.2": 1.0}
    store = synthetic_store(tmp_path / "store", values, keep=keep)
    ranked = ranked_rows(store)
    ranks = rng.permutation(ranked.n_rows)
    memory = ranked.empty(len(ranks))

    row_ids = ranked.read(ranks, [[array] for array in memory])

    assert sorted(row_ids) == store["mlp_post.0"].row_ids().tolist()
    for name, found in zip(values, memory, strict=True):
        np.testing.assert_array_equal(found, store[name][row_ids])


def test_near_neighbours_are_read_at_once(store):
    """Content rows are read as if nothing lay between them, far ones without what does."""
    ranked = ranked_rows(store)
    memory = [[array] for array in ranked.empty(ranked.n_rows)]
    ranked.read(np.arange(ranked.n_rows), memory)  # and verified
    n_chunks = sum(store.layout(info).n_column_chunks for info in store.select(None))
    n_bands = sum(-(-store.planned[s].rows[""] // 256) for s in store.committed)

    before = ranked.n_reads
    ranked.read(np.arange(ranked.n_rows), memory)
    assert ranked.n_reads - before <= 2 * n_chunks * n_bands
    before = ranked.bytes_read
    ranks = np.arange(0, ranked.n_rows, 500)
    ranked.read(ranks, memory)
    layouts = [store.layout(info) for info in store.select(None)]
    padded = sum(layout.padded_width * layout.itemsize for layout in layouts)
    assert ranked.bytes_read - before == len(ranks) * padded


def test_a_stored_nan_is_refused(tmp_path, monkeypatch):
    """Where a commit counts NaN, a row that holds one names itself; others are served."""
    values = {"mlp_post.0": np.ones((300, 11)), "mlp_post.1": np.ones((300, 13))}
    values["mlp_post.1"][170, 5] = np.nan
    store = synthetic_store(tmp_path / "store", values)
    row_id = int(store["mlp_post.1"].row_ids()[170])
    counted = dataclasses.replace(
        store.commit_of(0), counts={"mlp_post.1": SiteCounts(1, 0, ((row_id, 5),))}
    )
    monkeypatch.setitem(store._commits, 0, counted)
    ids = store.rows().row_ids()
    without = Rows.from_row_ids("others", store.meta.segment_rows, ids[ids != row_id])

    for rows in (store.rows(), without):
        ranked = ranked_rows(store, rows)
        memory = ranked.empty(ranked.n_rows)
        arguments = np.arange(ranked.n_rows), in_pieces(memory, cuts=[100])
        if rows is without:
            ranked.read(*arguments)
        else:
            with pytest.raises(
                NonFiniteActivation,
                match=rf"mlp_post\.1 of .* is nan at row_id = {row_id}, neuron 5; .* with rows=",
            ):
                ranked.read(*arguments)


def test_sites_of_two_spaces_are_refused(tmp_path):
    """Sites that share no rows have no ranks in common."""
    values = {"encoder.mlp_post.0": np.ones((200, 8)), "decoder.mlp_post.0": np.ones((200, 8))}
    store = synthetic_store(tmp_path / "store", values)

    with pytest.raises(ArgumentError, match="do not share rows"):
        ranked_rows(store, store.rows(space="encoder"))
    with pytest.raises(ArgumentError, match="sites = none do not share rows"):
        RankedRows(store, [], store.rows(space="encoder"))
