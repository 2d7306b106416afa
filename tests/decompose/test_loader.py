"""The loader serves every row once an epoch, mixed across documents, to any number of workers."""

import itertools
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

import actstore
from actstore.decompose import Loader
from actstore.decompose.loader import Deal
from actstore.errors import ArgumentError, BudgetExceeded, StoreMismatch
from actstore.store import Rows
from tests.synthetic import synthetic_store
from tests.toys import TEXT, toy_model

WIDTH = 8192
BUDGET = 64 * 2**20
BATCH = 64


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """One wide site, so that the smallest budget holds a fifth of it; 300 documents of 20 rows."""
    rng = np.random.default_rng(0)
    values = np.tile(rng.normal(size=(6000, 64)).astype(np.float16), (1, WIDTH // 64))
    path = tmp_path_factory.mktemp("loader") / "store"
    return synthetic_store(path, {"mlp_post.0": values}, documents=[20] * 300)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Three narrow sites of three dtypes."""
    rng = np.random.default_rng(1)
    dtypes = {"mlp_post.0": "float16", "mlp_post.1": "bfloat16", "resid_post.1": "float32"}
    values = {
        name: rng.normal(size=(1009, width))
        for name, width in zip(dtypes, (37, 64, 23), strict=True)
    }
    path = tmp_path_factory.mktemp("small") / "store"
    return synthetic_store(path, values, dtype=dtypes)


def wide(store, **options):
    """Return a loader of several buffers."""
    options = {"budget": BUDGET, **options}
    return Loader(store, "mlp_post.0", options.pop("batch_rows", BATCH), **options)


def ids_of(batches):
    """Return the row ids of each batch."""
    return [batch.row_ids.tolist() for batch in batches]


def all_ids(batches):
    """Return the row ids of all batches."""
    return list(itertools.chain(*ids_of(batches)))


def stored(store, site, row_ids):
    """Return stored values as float32."""
    return store[site][np.asarray(row_ids)].astype(np.float32)


# -- what is served ----------------------------------------------------------------------------


def test_every_row_comes_once_with_its_values(store):
    """Several buffers give all content rows; only the last batch is short."""
    loader = wide(store)
    assert 2 * loader.buffer_rows < store.rows().n_rows

    sizes, seen = [], []
    for values, row_ids in loader:
        np.testing.assert_array_equal(
            values.float().numpy(), stored(store, "mlp_post.0", row_ids.tolist())
        )
        sizes.append(len(row_ids))
        seen += row_ids.tolist()

    assert sorted(seen) == store.rows().row_ids().tolist()
    assert set(sizes[:-1]) == {BATCH}
    assert 0 < sizes[-1] < BATCH
    assert len(loader) == len(sizes)


def test_several_sites_come_as_a_dict_in_their_own_dtypes(small):
    """The same rows of every site, as they are stored, or in the dtype asked for."""
    for dtype in (None, "float32", torch.bfloat16):
        for values, row_ids in Loader(small, None, 100, rows="all", dtype=dtype):
            assert list(values) == [str(site) for site in small.sites]
            assert row_ids.dtype == torch.int64
            for info in small.select(None):
                wanted = torch.from_numpy(stored(small, info.site, row_ids.tolist()))
                found = values[str(info.site)]
                given = getattr(torch, dtype or info.dtype) if dtype != torch.bfloat16 else dtype
                assert found.dtype == given
                assert torch.equal(found, wanted.to(given))


def test_one_name_gives_a_tensor_and_a_list_a_dict(small):
    """The kind of a batch follows from how the sites were named."""
    assert next(iter(Loader(small, "mlp_post.1", 10))).values.shape == (10, 64)
    assert set(next(iter(Loader(small, ["mlp_post.1"], 10))).values) == {"mlp_post.1"}


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_batches_are_the_callers(store, dtype):
    """What was given does not change when more is read, however little of it is still held."""
    kept = []
    for number, (values, row_ids) in enumerate(itertools.islice(wide(store, dtype=dtype), 70)):
        if number % 3 == 0:
            kept.append((values[7:9], row_ids[7:9]))
        elif number % 3 == 1:
            kept.append((torch.from_numpy(values.numpy()[5:6]), row_ids[5:6]))
        else:
            values.zero_()
        del values

    for values, row_ids in kept:
        assert torch.equal(
            values.float(), torch.from_numpy(stored(store, "mlp_post.0", row_ids.tolist()))
        )


def test_memory_of_batches_is_used_again(store):
    """A batch that nobody holds any more gives its memory to one of the next buffer but one."""
    loader = wide(store, epochs=4)
    per_buffer = loader.buffer_rows // BATCH

    places = [values.data_ptr() for values, _ in loader]

    assert len(places) > 6 * per_buffer
    assert len(set(places)) <= 2 * per_buffer + 1
    converted = {values.data_ptr() for values, _ in wide(store, dtype="float32")}
    assert len(converted) <= 2


def test_chosen_rows_alone_are_served(small):
    """Scattered rows come, and no others."""
    wanted = np.random.default_rng(5).choice(small.rows("all").row_ids(), 101, replace=False)
    rows = Rows.from_row_ids("scattered", small.meta.segment_rows, wanted)

    seen = all_ids(Loader(small, None, 16, rows=rows))

    assert sorted(seen) == sorted(wanted.tolist())


def test_a_sampled_site_gives_the_rows_it_keeps(tmp_path):
    """Sites that keep different parts of the rows serve those that all of them have."""
    module, tokenizer = toy_model("gpt2")
    keep = {"mlp_post": "all", "resid_post": "1/4"}
    captured = actstore.capture(
        module,
        text=[TEXT] * 3,
        tokenizer=tokenizer,
        store=tmp_path / "store",
        keep=keep,
        context=16,
    )
    sites = ["mlp_post.1", "resid_post.1"]

    batches = list(captured.loader(sites, 8))

    seen = all_ids(batches)
    assert sorted(seen) == captured["resid_post.1"].row_ids().tolist()
    for values, row_ids in batches:
        for site in sites:
            np.testing.assert_array_equal(values[site].numpy(), captured[site][row_ids.numpy()])


def test_an_sql_condition_chooses_rows(small_store):
    """`rows=` takes what it takes elsewhere."""
    seen = all_ids(small_store.loader("mlp_post.1", 4, rows="position < 5"))

    positions = small_store.tokens_of(seen).column("position").to_pylist()
    assert set(positions) == {1, 2, 3, 4}


# -- order -------------------------------------------------------------------------------------


def same_document_share(documents):
    """Return the share of pairs of rows that are of one document."""
    counts = np.bincount(documents)
    n = len(documents)
    return float((counts * (counts - 1)).sum() / (n * (n - 1)))


def test_a_batch_spans_the_documents(store):
    """Two rows of a batch are of one document hardly more often than any two of the store."""
    documents = dict(
        zip(
            store.rows().row_ids().tolist(),
            store.tokens_of(store.rows().row_ids()).column("document").to_pylist(),
            strict=True,
        )
    )
    chance = same_document_share(np.array(list(documents.values())))
    loader = wide(store)
    n_batches, per_buffer = len(loader), loader.buffer_rows // BATCH
    batches = [[documents[row] for row in batch] for batch in ids_of(loader)]
    n_buffers = -(-n_batches // per_buffer)
    assert n_buffers >= 4

    edges = np.arange(n_buffers + 1) * n_batches // n_buffers
    for first, last in itertools.pairwise(edges):
        documents_there = set(itertools.chain(*batches[first:last]))
        in_buffer = len(documents_there)
        # They are from all over the store.
        assert min(documents_there) < 30
        assert max(documents_there) >= 270
        for batch in batches[first:last]:
            expected = chance + 1 / in_buffer
            sigma = np.sqrt(expected * (1 - expected) / (len(batch) * (len(batch) - 1) / 2))
            assert same_document_share(np.array(batch)) <= expected + 3 * sigma


def test_each_epoch_has_another_order_and_each_seed(store):
    """Epochs and seeds differ; the same seed gives the same, and iterating again too."""
    loader = wide(store, epochs=2)
    both = ids_of(loader)
    half = len(both) // 2
    first, second = (list(itertools.chain(*part)) for part in (both[:half], both[half:]))

    assert sorted(first) == sorted(second)
    # Not only the order of a buffer's rows is another, but what comes together in one.
    n_rows = loader.buffer_rows // 2
    assert len(set(first[:n_rows]) & set(second[:n_rows])) < 0.5 * n_rows
    assert both == ids_of(loader) == ids_of(wide(store, epochs=2))
    assert both[0] != ids_of(itertools.islice(wide(store, seed=1), 1))[0]


def test_no_epochs_means_no_end(small):
    """An endless loader goes on, and has no length."""
    loader = Loader(small, "mlp_post.0", 500, epochs=None)

    assert len(list(itertools.islice(loader, 9))) == 9
    with pytest.raises(TypeError, match="epochs=None has no length"):
        len(loader)


# -- workers and ranks -------------------------------------------------------------------------


@settings(max_examples=200)
@example(103, 10, 2, 1, 4, False, 5)  # the short batch is in the third of four lanes
@given(
    n_rows=st.integers(1, 700),
    batch_rows=st.integers(1, 50),
    buffer_batches=st.integers(1, 9),
    world_size=st.integers(1, 4),
    n_workers=st.integers(1, 4),
    drop_last=st.booleans(),
    start=st.integers(0, 20),
)
def test_all_rows_are_dealt_once(
    n_rows, batch_rows, buffer_batches, world_size, n_workers, drop_last, start
):
    """Over all ranks and workers each row comes once an epoch, wherever the deal is taken up."""
    seen = [[], []]
    lengths = []
    for rank in range(world_size):
        deal = Deal(n_rows, batch_rows, buffer_batches, 7, rank, world_size, n_workers, drop_last)
        lengths.append(deal.n_batches)
        if not deal.n_batches:
            continue
        dealt = {}
        for worker in range(n_workers):
            number = worker
            while number < 2 * deal.n_batches:
                hand = deal.hand(number)
                for first in range(0, len(hand.ranks), batch_rows):
                    dealt[number] = hand.ranks[first : first + batch_rows].tolist()
                    number += n_workers
        assert sorted(dealt) == list(range(2 * deal.n_batches))
        for number, ranks in dealt.items():
            seen[number // deal.n_batches] += ranks
            last = number % deal.n_batches == deal.n_batches - 1
            assert len(ranks) == batch_rows or (last and not drop_last and len(ranks) > 0)
        later = min(start, len(dealt) - 1)
        again = deal.hand(later)
        assert again.ranks[:batch_rows].tolist() == dealt[later]
    for epoch in seen:
        if drop_last:
            assert len(set(epoch)) == len(epoch) == sum(lengths) * batch_rows
            assert len(set(lengths)) == 1
        else:
            assert sorted(epoch) == list(range(n_rows))


@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_workers_share_the_rows(store, start_method):
    """Two processes give every row once, with its values, whichever way they were started."""
    loader = wide(store, budget=2 * BUDGET)
    data = DataLoader(loader, batch_size=None, num_workers=2, multiprocessing_context=start_method)

    batches = list(data)

    assert sorted(all_ids(batches)) == store.rows().row_ids().tolist()
    assert [len(batch.row_ids) for batch in batches[:-1]] == [BATCH] * (len(loader) - 1)
    for values, row_ids in batches[::17]:
        np.testing.assert_array_equal(
            values.float().numpy(), stored(store, "mlp_post.0", row_ids.tolist())
        )


def test_a_temporary_store_outlives_the_workers():
    """The loader keeps it, and a worker that ends does not take it along."""
    module, tokenizer = toy_model("gpt2")
    loader = actstore.capture(module, text=TEXT, tokenizer=tokenizer).loader("mlp_post.1", 8)

    for _ in range(2):
        assert len(list(DataLoader(loader, batch_size=None, num_workers=2))) == len(loader)


def test_a_loader_travels_by_path(small):
    """A pickled loader opens the store where it is unpickled."""
    loader = Loader(small, None, 50)

    again = pickle.loads(pickle.dumps(loader))

    assert ids_of(again) == ids_of(loader)
    assert again._store is None


def test_ranks_share_the_rows(store):
    """Three ranks give every row once, two workers each."""
    seen = []
    for rank in range(3):
        loader = wide(store, rank=rank, world_size=3, budget=2 * BUDGET)
        seen += all_ids(DataLoader(loader, batch_size=None, num_workers=2))

    assert sorted(seen) == store.rows().row_ids().tolist()


def test_ranks_are_those_of_torch_distributed(small, monkeypatch):
    """Where it is initialised, a loader serves the rank's part."""
    by_name = ids_of(Loader(small, None, 50, rank=1, world_size=3))
    distributed = torch.distributed
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 3)

    assert ids_of(Loader(small, None, 50)) == by_name


# -- going on ----------------------------------------------------------------------------------


@pytest.mark.parametrize("n_given", [0, 1, 27, 89, 90, 133])
def test_a_loader_goes_on_where_it_was(store, n_given, monkeypatch):
    """After n batches a new loader gives the others, and reads none of those before them."""
    whole = ids_of(wide(store, epochs=2))
    loader = wide(store, epochs=2)
    list(itertools.islice(loader, n_given))
    state = loader.state_dict()
    assert state["batches"] == n_given

    again = wide(store, epochs=2)
    again.load_state_dict(state)
    rows_read, scatter = [], store.scatter
    monkeypatch.setattr(store, "scatter", lambda *a: rows_read.extend(a[2]) or scatter(*a))
    one = again._serve(store, again._deal(1), n_given)
    next(one)
    one.close()
    # What is left of the buffer that is dealt, and the one that is read ahead.
    per_buffer = again.buffer_rows // BATCH
    assert len(rows_read) <= BATCH * min(2 * per_buffer, len(whole) - n_given)
    assert again.state_dict()["batches"] == n_given + 1

    again.load_state_dict(state)
    assert ids_of(again) == whole[n_given:]
    assert ids_of(again) == whole


def test_workers_go_on_where_they_were(store):
    """The count of batches taken is enough to go on with as many workers."""
    loader = wide(store, epochs=2, budget=2 * BUDGET)
    data = DataLoader(loader, batch_size=None, num_workers=2)
    whole = ids_of(data)

    for n_given in (0, 1, 90, 137):
        loader.load_state_dict(loader.state_dict(batches=n_given, workers=2))
        assert ids_of(data) == whole[n_given:]


def test_a_worker_goes_on_by_its_own_state(store, monkeypatch):
    """A state taken and loaded inside each worker, as stateful data loaders do, goes on exactly."""

    def worker(number):
        """Make the loader believe that it is in one of two workers."""
        monkeypatch.setattr(
            "actstore.decompose.loader.get_worker_info",
            lambda: SimpleNamespace(id=number, num_workers=2),
        )

    for number, n_given in ((0, 5), (1, 4)):
        worker(number)
        loader = wide(store, epochs=2, budget=2 * BUDGET)
        whole = ids_of(loader)
        list(itertools.islice(loader, n_given))
        again = wide(store, epochs=2, budget=2 * BUDGET)
        again.load_state_dict(loader.state_dict())
        assert ids_of(again) == whole[n_given:]


def test_a_state_of_another_loader_is_refused(small):
    """Another seed, batch or choice of rows would repeat some rows and miss others."""
    state = Loader(small, None, 50).state_dict()

    for other in (
        Loader(small, None, 51),
        Loader(small, None, 50, seed=1),
        Loader(small, "mlp_post.0", 50),
        Loader(small, None, 50, rows="all"),
        Loader(small, None, 50, budget="2GB"),
        Loader(small, None, 50, rank=0, world_size=2),
    ):
        with pytest.raises(StoreMismatch, match=r"in the state that was given; .*same arguments"):
            other.load_state_dict(state)


def test_another_number_of_workers_is_refused(small):
    """The order depends on it, so a state says how many there were."""
    loader = Loader(small, None, 50)
    loader.load_state_dict(loader.state_dict(batches=3, workers=2))

    with pytest.raises(
        ArgumentError, match=r"workers = 2 in the state .* and 1 iterate; .*as many"
    ):
        iter(loader)


# -- arguments ---------------------------------------------------------------------------------


def test_a_budget_too_small_names_what_suffices(store):
    """The message says what is needed; with that much it works."""
    with pytest.raises(BudgetExceeded, match=r"need at least .* budget is .*smaller batch_rows"):
        wide(store, batch_rows=1024)
    with pytest.raises(BudgetExceeded) as info:
        wide(store, batch_rows=2048)

    needed = int(str(info.value).split("Pass budget=")[1].split(" ")[0])
    assert wide(store, batch_rows=2048, budget=needed).buffer_rows == 2048


def test_workers_share_the_budget(store, monkeypatch):
    """What suffices for one worker is refused to two, with what they need together."""
    loader = wide(store, batch_rows=512)
    monkeypatch.setattr(
        "actstore.decompose.loader.get_worker_info", lambda: SimpleNamespace(id=1, num_workers=2)
    )

    with pytest.raises(BudgetExceeded, match=r"in 2 workers, and the budget is") as info:
        iter(loader)

    needed = int(str(info.value).split("Pass budget=")[1].split(" ")[0])
    assert next(iter(wide(store, batch_rows=512, budget=needed))).values.shape == (512, WIDTH)


def test_arguments_that_cannot_be_used_are_refused(small):
    """Each message names the argument and what was expected."""
    with pytest.raises(ArgumentError, match=r"dtype = 'int8' is no floating-point dtype of torch"):
        Loader(small, None, dtype="int8")
    with pytest.raises(ArgumentError, match=r"rank = 1 and world_size = None .*both or neither"):
        Loader(small, None, rank=1)
    with pytest.raises(ArgumentError, match=r"rank = 3 was given; expected 0 … 2"):
        Loader(small, None, rank=3, world_size=3)
    with pytest.raises(ArgumentError, match=r"batch_rows = 5,000 is too large: .*drop_last=False"):
        Loader(small, None, 5000, drop_last=True)
    assert len(Loader(small, None, 5000)) == 1
