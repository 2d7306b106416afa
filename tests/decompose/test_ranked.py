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


def count_reads(store, monkeypatch):
    """Return a list that gets the number of rows of each read."""
    reads, read = [], store.read

    def counted(info, segment, start, stop, out=None):
        reads.append(stop - start)
        return read(info, segment, start, stop, out=out)

    monkeypatch.setattr(store, "read", counted)
    return reads


@pytest.mark.parametrize("rule", ["content", "all"])
@pytest.mark.parametrize("step", [1, 2, 7, 60])
@pytest.mark.parametrize("helped", [False, True])
def test_each_rank_gives_its_own_row(store, rule, step, helped):
    """Whatever lies between them, rows come with their own values and row ids."""
    rows = store.rows(rule)
    ranked = ranked_rows(store, rows)
    ranks = np.arange(3, ranked.n_rows, step)
    buffers = ranked.buffers(len(ranks))

    with ThreadPoolExecutor(1) as helper:
        places, row_ids = ranked.read(ranks, buffers, helper if helped else None)

    np.testing.assert_array_equal(row_ids, rows.row_ids()[ranks])
    for info, buffer, where in zip(store.select(None), buffers, places, strict=True):
        assert buffer.dtype == store.layout(info).numpy_dtype
        np.testing.assert_array_equal(buffer[where], store[info.site][row_ids])
        np.testing.assert_array_equal(
            as_tensor(buffer[where[::-1]]).float().numpy(),
            store[info.site][row_ids[::-1]].astype(np.float32),
        )


def test_the_first_rows_of_windows_are_read_over(store, monkeypatch):
    """Content rows are read as if nothing lay between them: a read a site and segment."""
    ranked = ranked_rows(store)
    reads = count_reads(store, monkeypatch)

    ranked.read(np.arange(ranked.n_rows), ranked.buffers(ranked.n_rows))

    assert len(reads) == 3 * len(store.committed)


def test_what_was_not_asked_for_is_little(store, monkeypatch):
    """Rows far from each other are read one by one, not with all between them."""
    ranked = ranked_rows(store, store.rows("all"))
    reads = count_reads(store, monkeypatch)
    ranks = np.arange(0, ranked.n_rows, 5)

    ranked.read(ranks, ranked.buffers(len(ranks)))

    assert sum(reads) <= 3 * ranked.buffer_rows(len(ranks))


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
        arguments = np.arange(ranked.n_rows), ranked.buffers(ranked.n_rows)
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
