"""Rows: sets of them, and reading activations by row_id alone."""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actstore.errors import BudgetExceeded, NeuronNotFound, RowNotFound, SiteNotFound
from actstore.store import FIRST, SPECIAL, CoreStore, Rows, generations
from tests.captured import Captured, all_tokens
from tests.synthetic import synthetic_store

SEGMENT = 64


@pytest.fixture(scope="module")
def numbered(tmp_path_factory: pytest.TempPathFactory) -> CoreStore:
    """Return a store whose row with row_id r holds r and r + 1/2; segment 2 is not committed."""
    path = tmp_path_factory.mktemp("numbered") / "store"
    shape = {"mlp_post.0": np.zeros((217, 2), np.float32)}
    # Where rows lie follows from the plan: made once with zeros, then with the row ids.
    options = {"dtype": "float32", "context": 17, "segment_rows": SEGMENT, "chunk_rows": 16}
    draft = synthetic_store(path.with_name("draft"), shape, **options)
    ids = draft["mlp_post.0"].row_ids()
    values = np.stack([ids, ids + 0.5], axis=1).astype(np.float32)
    return synthetic_store(path, {"mlp_post.0": values}, commit=[0, 1, 3], **options)


def test_rows_are_found_by_row_id_alone(numbered: CoreStore) -> None:
    """One, a list in any order with repeats, and a slice give the rows with those ids."""
    site = numbered["mlp_post.0"]
    ids = site.row_ids()
    assert ids.tolist() == sorted(set(ids.tolist()))
    assert set(ids // SEGMENT) == {0, 1, 3}
    assert len(ids) < ids[-1] + 1, "there are holes"
    for row in ids[::13]:
        assert site[int(row)].tolist() == [row, row + 0.5]
        assert site[row].shape == (2,)
    wanted = [int(ids[-1]), int(ids[3]), int(ids[3]), int(ids[2]), int(ids[70])]
    assert site[wanted][:, 0].tolist() == wanted
    assert site[np.array(wanted, np.uint32)][:, 0].tolist() == wanted
    assert site[tuple(wanted)][:, 0].tolist() == wanted
    assert site[[]].shape == (0, 2)
    assert site[:].dtype == np.float32
    assert site[:][:, 0].tolist() == ids.tolist()


@given(start=st.integers(0, 300) | st.none(), stop=st.integers(0, 300) | st.none())
def test_slices_are_ranges_of_row_ids(
    numbered: CoreStore, start: int | None, stop: int | None
) -> None:
    """A slice is the rows whose ids lie in it: holes and segments not captured are skipped."""
    site = numbered["mlp_post.0"]
    ids = site.row_ids()
    low, high = start or 0, 10**9 if stop is None else stop
    wanted = ids[(ids >= low) & (ids < high)]
    assert site[start:stop][:, 0].tolist() == wanted.tolist()
    assert site.row_ids(slice(start, stop)).tolist() == wanted.tolist()


def test_rows_that_are_not_there_raise(numbered: CoreStore) -> None:
    """Holes, negative ids and rows not captured are refused, with what to do instead."""
    site = numbered["mlp_post.0"]
    hole = numbered.planned[0].rows[""]
    assert hole < SEGMENT
    for wanted in (hole, [0, hole], [hole - 1, hole], SEGMENT - 1, 10**12):
        with pytest.raises(RowNotFound, match=r"is a hole of .* take them from `tokens`, `top`"):
            site[wanted]
    for wanted in (-1, [3, -1], [-1, 0]):
        with pytest.raises(RowNotFound, match=r"row_id = -1 is a hole"):
            site[wanted]
    with pytest.raises(RowNotFound, match=r"-5 was given.*Use `row_ids\(\)\[-n:\]`"):
        site[-5:]
    with pytest.raises(RowNotFound, match=r"step = 2 was given.*Index with a list of row ids"):
        site[0:9:2]
    with pytest.raises(RowNotFound, match=r"is planned but not captured yet .* capture again"):
        site[2 * SEGMENT]
    with pytest.raises(RowNotFound, match=r"segment 2 .* is not captured yet"):
        numbered.read(numbered.site("mlp_post.0"), 2, 0, 1)
    for wanted in (1.0, [0.5], "0", [[0, 1]], True, [True, False]):
        with pytest.raises(RowNotFound, match="expected integers in one, as they stand in the col"):
            site[wanted]
    with pytest.raises(NeuronNotFound, match=r"column = 2 is not in"):
        numbered.read_column(numbered.site("mlp_post.0"), 0, 2)


def test_columns_are_those_of_the_rows(numbered: CoreStore) -> None:
    """A neuron over a segment is that column of its rows."""
    info = numbered.site("mlp_post.0")
    for segment in numbered.committed:
        rows = numbered.planned[segment].rows[""]
        column = numbered.read_column(info, segment, 1)
        assert column.tolist() == [segment * SEGMENT + i + 0.5 for i in range(rows)]


def test_more_rows_than_memory_are_refused(numbered: CoreStore) -> None:
    """A read that would not fit into memory names its size and the way around it."""
    free = psutil.virtual_memory()._replace(available=100)
    with (
        mock.patch.object(psutil, "virtual_memory", return_value=free),
        pytest.raises(BudgetExceeded, match=r"rows of mlp_post.0 take .* store.dask\('mlp_post.0'"),
    ):
        numbered["mlp_post.0"][:]


def test_sites_are_found_by_name_and_alias(toy_store: Captured) -> None:
    """A name, an alias or a pattern; what stands for several or none is refused."""
    store = toy_store.store
    assert store["blocks.1.mlp.hook_post"].info == store["mlp_post.1"].info
    assert store["embed"].info.site == store["resid_pre.0"].info.site
    assert [str(i.site) for i in store.select("mlp_post.1-2, resid_post.0")] == [
        "mlp_post.1",
        "mlp_post.2",
        "resid_post.0",
    ]
    with pytest.raises(SiteNotFound, match=r"it has resid_pre.0, mlp_post.0–2, .*Did you mean 'ml"):
        store["mlp_pots.1"]
    with pytest.raises(SiteNotFound, match=r"'mlp_post' stands for 3 sites .* such as 'mlp_post.0"):
        store["mlp_post"]
    assert repr(store["mlp_post.1"]).startswith("<mlp_post.1: ")


def test_content_rows_are_neither_special_nor_first(toy_store: Captured) -> None:
    """The rule "content" leaves sinks out; "all" does not."""
    store = toy_store.store
    tokens = all_tokens(store)
    flags = tokens["flags"].to_numpy()
    keep = (flags & (SPECIAL | FIRST)) == 0
    assert store.rows().row_ids().tolist() == tokens["row_id"].to_numpy()[keep].tolist()
    assert store.rows("all").row_ids().tolist() == store["mlp_post.0"].row_ids().tolist()
    assert store.rows().rule == "content"


def test_uncommitted_rows_are_in_no_set(numbered: CoreStore) -> None:
    """Rows are counted from commits, not from shapes or plans."""
    assert set(numbered.rows("all").row_ids() // SEGMENT) == {0, 1, 3}
    assert numbered.n_rows() == sum(numbered.planned[s].rows[""] for s in (0, 1, 3))


def test_a_new_commit_is_seen_after_a_refresh(toy_capture: Callable[..., Captured]) -> None:
    """An open store does not change under its reader; refresh shows what others published."""
    store = toy_capture().store
    name = store.path / "commits/00000002.json"
    data = name.read_bytes()
    name.unlink()
    reader = CoreStore(store.path)
    name.write_bytes(data)
    first = 2 * store.meta.segment_rows
    with pytest.raises(RowNotFound, match=r"store.refresh\(\) if it is running"):
        reader["mlp_post.0"][first]
    reader.refresh()
    assert np.array_equal(reader["mlp_post.0"][first], store["mlp_post.0"][first])


@given(st.lists(st.integers(0, 500), max_size=60), st.sampled_from([32, 64]), st.integers(1, 40))
def test_sets_of_rows_keep_exactly_their_rows(ids: list[int], size: int, length: int) -> None:
    """Row ids go in and come out; runs cover them in aligned spans that begin and end with one."""
    wanted = sorted(set(ids))
    rows = Rows.from_row_ids("mine", size, np.array(ids, dtype=np.int64))
    assert rows.row_ids().tolist() == wanted
    assert (rows.n_rows, rows.rule) == (len(wanted), "mine")
    assert rows.segments == sorted({i // size for i in wanted})
    assert rows.offsets(10**6).tolist() == []
    masks = {s: np.isin(np.arange(size), rows.offsets(s)) for s in rows.segments}
    again = Rows.from_masks("mine", size, iter([*masks.items(), (10**6, np.zeros(3, bool))]))
    assert again.row_ids().tolist() == wanted
    assert again.segments == rows.segments
    runs = rows.runs(length)
    covered = [[run.segment * size + i for i in range(run.start, run.stop)] for run in runs]
    assert [i for run in covered for i in run if i in set(wanted)] == wanted
    for run, span in zip(runs, covered, strict=True):
        assert run.start // length == (run.stop - 1) // length
        assert {span[0], span[-1]} <= set(wanted)
    cells = [(run.segment, run.start // length) for run in runs]
    assert cells == sorted(set(cells))


def test_many_open_shards_do_not_run_out_of_files(
    toy_store: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shards are closed when too many are open, and read again without being checked again."""
    values = {site: toy_store.store[site][:] for site in toy_store.store.sites}
    monkeypatch.setattr("actstore.store.open_shards._OPEN_SHARDS", 2)
    store = CoreStore(toy_store.store.path)
    before = psutil.Process().num_fds()
    for _ in range(2):
        for site in store.sites:
            assert np.array_equal(store[site][:], values[site])
        # A second reading that checked a chunk again would fail here.
        monkeypatch.delattr("actstore.shard.reader.ShardReader._verify_chunk", raising=False)
    assert psutil.Process().num_fds() <= before + 2


def test_tables_answer_for_rows_in_any_order(toy_store: Captured) -> None:
    """Tokens and documents of rows come in the order asked for; holes are refused."""
    store = toy_store.store
    table = all_tokens(store)
    rng = np.random.default_rng(1)
    ids = rng.choice(table["row_id"].to_numpy(), 37)
    found = store.tokens_of(ids)
    assert found["row_id"].to_pylist() == ids.tolist()
    places = np.searchsorted(table["row_id"].to_numpy(), ids)
    assert found.equals(table.take(places))
    assert store.tokens_of([]).num_rows == 0
    for wanted in (-1, store.planned[0].rows[""], 10**9):
        with pytest.raises(RowNotFound, match=f"row_id = {wanted} is a hole"):
            store.tokens_of([0, wanted])
    for number in (-1, store.n_documents):
        with pytest.raises(RowNotFound, match=f"document = {number} is not in the store; it has"):
            store.document(number)


def test_a_store_moves_with_its_folder(toy_capture: Callable[..., Captured]) -> None:
    """Nothing inside a store knows where it lies."""
    store = toy_capture().store
    values = store["mlp_post.0"][:]
    moved = CoreStore(store.path.rename(store.path.with_name("moved")))
    assert np.array_equal(moved["mlp_post.0"][:], values)
    assert moved.tokens(0).equals(store.tokens(0))
    assert moved.index() == generations.latest(moved.path)


@pytest.mark.parametrize("boundary", [2**16, 2**31, 2**32, 2**33])
def test_row_ids_do_not_wrap(boundary: int) -> None:
    """Rows beyond what 16, 31 or 32 bits hold keep their ids."""
    wanted = [boundary - 2, boundary - 1, boundary, boundary + 70_000]
    rows = Rows.from_row_ids("all", 65_536, np.array(wanted))
    assert rows.row_ids().tolist() == wanted
    assert [run.segment * 65_536 + run.start for run in rows.runs(1)] == wanted
