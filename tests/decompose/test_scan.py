"""The scan serves every chosen row once, well mixed, within its budget."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from actstore.decompose.scan import AS_FLOAT32, Form, Scan, chosen_rows
from actstore.errors import ArgumentError, BudgetExceeded, NonFiniteActivation
from actstore.store import CoreStore, Rows
from tests.synthetic import synthetic_store

MIB = 2**20
WIDTHS = {"mlp_post.0": 37, "mlp_post.1": 64, "resid_post.1": 23}


def values_of(n_rows: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Return random activations of the three sites."""
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=(n_rows, width)) for name, width in WIDTHS.items()}


@pytest.fixture(scope="module")
def values():
    """Activations of 5,003 rows."""
    return values_of(5003)


@pytest.fixture(scope="module")
def store(values, tmp_path_factory):
    """Three sites of three dtypes, 51 documents, six segments with holes at their ends."""
    dtypes = {"mlp_post.0": "float16", "mlp_post.1": "bfloat16", "resid_post.1": "float32"}
    path = tmp_path_factory.mktemp("scan") / "store"
    return synthetic_store(path, values, dtype=dtypes, documents=[101] * 49 + [54])


def make_scan(store, rows=None, budget=256 * MIB, sites=None, **options):
    """Return a scan of content rows of all sites, unless told otherwise."""
    rows = store.rows() if rows is None else rows
    return Scan(store, store.select(sites), rows, budget_bytes=budget, **options)


def gathered(blocks):
    """Return all values and row ids; a block's memory is reused, so each is copied."""
    parts = [(block.values.clone(), block.row_ids) for block in blocks]
    return torch.cat([p[0] for p in parts]).numpy(), np.concatenate([p[1] for p in parts])


def stored(store, row_ids):
    """Return what indexing by row_id gives, as float32, sites side by side."""
    return np.hstack([store[info.site][row_ids].astype(np.float32) for info in store.select(None)])


@pytest.mark.parametrize("rule", ["content", "all"])
@pytest.mark.parametrize("order", ["ordered", "mixed", "single", "sample"])
def test_every_order_serves_the_stored_values_of_each_row_once(store, rule, order):
    """Values come with their own row ids, no row twice, none missing."""
    rows = store.rows(rule)
    scan = make_scan(store, rows)
    blocks = {
        "ordered": lambda: scan.ordered(300),
        "mixed": lambda: scan.mixed(256),
        "single": lambda: scan.mixed(256, run_rows=1),
        "sample": lambda: scan.sample(10**6),
    }[order]()

    values, row_ids = gathered(blocks)

    np.testing.assert_array_equal(values, stored(store, row_ids))
    np.testing.assert_array_equal(np.sort(row_ids), rows.row_ids())
    assert (order in ("ordered", "sample")) == bool((np.diff(row_ids) > 0).all())


def test_content_rows_are_neither_special_nor_first(store):
    """The default rows hold no token at position 0."""
    _, row_ids = gathered(make_scan(store).mixed())

    assert store.tokens_of(row_ids).column("position").to_numpy().min() == 1


def test_an_ordered_block_stays_in_its_segment(store):
    """Scores can be written segment by segment."""
    for block in make_scan(store).ordered(300):
        assert len(set(block.row_ids // store.meta.segment_rows)) == 1


def test_scattered_rows_are_served_exactly(store):
    """A set of rows with gaps of every size gives those rows and nothing else."""
    rng = np.random.default_rng(3)
    wanted = np.sort(rng.choice(store.rows("all").row_ids(), 700, replace=False))
    rows = Rows.from_row_ids("scattered", store.meta.segment_rows, wanted)
    scan = make_scan(store, rows)

    values, row_ids = gathered(scan.ordered())

    np.testing.assert_array_equal(row_ids, wanted)
    np.testing.assert_array_equal(values, stored(store, wanted))


@pytest.mark.parametrize("budget_rows", [512, 1024, 4096])
def test_blocks_do_not_depend_on_the_budget(store, budget_rows, monkeypatch):
    """A small budget reads fewer blocks at once, and every block holds the same rows."""
    full, ids = gathered(make_scan(store).mixed(128))
    scan = make_scan(store)
    monkeypatch.setattr(scan, "rows_at_once", lambda block_rows: budget_rows // 4)

    small, small_ids = gathered(scan.mixed(128))

    np.testing.assert_array_equal(ids, small_ids)
    np.testing.assert_array_equal(full, small)


def test_order_depends_on_seed_and_epoch(store):
    """The same seed and epoch give the same order, others another."""
    orders = [
        gathered(make_scan(store, seed=seed).mixed(epoch=epoch))[1]
        for seed, epoch in ((0, 0), (0, 0), (0, 1), (1, 0))
    ]

    np.testing.assert_array_equal(orders[0], orders[1])
    assert (orders[0] != orders[2]).any()
    assert (orders[0] != orders[3]).any()


def same_document_share(documents: np.ndarray) -> float:
    """Return the share of pairs of rows that are of one document."""
    counts = np.bincount(documents)
    n = len(documents)
    return float((counts * (counts - 1)).sum() / (n * (n - 1)))


@pytest.mark.parametrize(("run_rows", "excess"), [(32, 31 / 511), (16, 15 / 511), (1, 0)])
def test_a_mixed_block_spans_the_documents(store, run_rows, excess):
    """Two rows of a block are of one document about as often as any two rows of the store."""
    documents = store.tokens_of(store.rows().row_ids()).column("document").to_numpy()
    chance = same_document_share(documents)
    shares = [
        same_document_share(store.tokens_of(block.row_ids).column("document").to_numpy())
        for block in make_scan(store).mixed(512, run_rows=run_rows)
        if len(block.row_ids) == 512
    ]
    in_order = store.tokens_of(next(make_scan(store).ordered(512)).row_ids)

    # Beyond chance there are the neighbours in a row's own run, and no more.
    assert np.mean(shares) < chance + excess + 0.003
    assert same_document_share(in_order.column("document").to_numpy()) > 0.1


def test_a_limit_serves_a_random_part(store):
    """A limit chooses single rows from the whole store, each once."""
    _, row_ids = gathered(make_scan(store).mixed(64, run_rows=1, limit=640))

    assert len(row_ids) == len(set(row_ids)) == 640
    assert len(set(row_ids // store.meta.segment_rows)) == len(store.committed)


@pytest.mark.parametrize("form", [AS_FLOAT32, Form("bfloat16", clip=True), Form("bfloat16")])
def test_a_sample_larger_than_the_budget_is_read_again(store, form):
    """A sample that cannot be kept in memory gives the same blocks by reading twice."""
    kept = make_scan(store).sample(2000, form=form)
    scan = make_scan(store)
    scan.free_bytes = 600 * 1000
    again = scan.sample(2000, form=form)

    for sample in (kept, again, again):
        values, row_ids = gathered(sample)
        assert len(row_ids) == len(sample)
        np.testing.assert_array_equal(values, gathered(kept)[0])
    assert not again.is_kept
    assert kept.is_kept


def test_a_sample_kept_in_sixteen_bits_serves_what_blocks_of_that_form_hold(store):
    """Same rows, same values, whether each block is converted or all rows were at once."""
    form = Form("bfloat16", clip=True)
    as_stored, ready = make_scan(store).sample(2000), make_scan(store).sample(2000, form=form)

    values, row_ids = gathered(as_stored)
    expected = torch.from_numpy(values).clamp(min=0).bfloat16()
    shuffled = np.append(0, np.random.default_rng(0).permutation(np.arange(1, 500)))
    with ThreadPoolExecutor(1) as readers:
        for ranks in (np.arange(len(row_ids)), np.arange(70, 90), np.append(shuffled, 500)):
            for asked in (form, AS_FLOAT32):
                (block,) = ready.scan.serve([ranks], 512, readers, asked)
                assert block.values.dtype == getattr(torch, asked.dtype)
                assert torch.equal(block.values.bfloat16(), expected[ranks])
                np.testing.assert_array_equal(block.row_ids, row_ids[ranks])
    assert ready.is_kept
    assert ready.scan.free_bytes == make_scan(store).free_bytes - 2 * values.size


def test_what_was_read_is_counted(store):
    """A pass in row order reads every stored byte once, and the first one whole chunks too."""
    fresh = CoreStore(store.path)
    scan = make_scan(fresh, fresh.rows("all"))
    gathered(scan.ordered())
    ranked = scan.ranked
    first_bytes, first_reads = ranked.bytes_read, ranked.n_reads
    gathered(scan.ordered())

    assert ranked.bytes_read - first_bytes == 5003 * store.meta.row_bytes
    bands = sum(-(-store.planned[s].rows[""] // 256) for s in store.committed)
    assert first_bytes == (5003 + 256 * bands) * store.meta.row_bytes
    assert first_reads - (ranked.n_reads - first_reads) == 3 * bands


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_number_that_is_none_stops_the_scan(tmp_path, bad):
    """NaN and infinity name site, row and neuron."""
    values = values_of(700)
    values["mlp_post.1"][333, 17] = bad
    store = synthetic_store(tmp_path / "store", values)
    row_id = store["mlp_post.0"].row_ids()[333]

    with pytest.raises(
        NonFiniteActivation,
        match=rf"mlp_post\.1 of .* is {bad} at row_id = {row_id}, neuron 17; .*rows=",
    ):
        gathered(make_scan(store).mixed())


def test_an_error_while_reading_ahead_reaches_the_caller(store, monkeypatch):
    """What the reading thread raises comes out of the iteration."""

    def broken(*_args, **_options):
        raise OSError("the disk is gone")

    monkeypatch.setattr(store, "scatter", broken)

    with pytest.raises(OSError, match="the disk is gone"):
        gathered(make_scan(store).mixed())


def test_a_budget_too_small_names_the_numbers(store):
    """The message says what is needed; with that much it works."""
    with pytest.raises(BudgetExceeded, match=r"needs at least ([\d,]+) bytes .*budget is") as info:
        next(make_scan(store, budget=17 * MIB).mixed(8192))

    needed = int(str(info.value).split("Pass budget=")[1].split(" ")[0])
    assert next(make_scan(store, budget=needed).mixed(8192)).values.shape == (
        store.rows().n_rows,
        124,
    )


def test_sites_of_two_spaces_are_refused(tmp_path):
    """Sites that share no rows cannot stand side by side."""
    values = {"encoder.mlp_post.0": np.ones((200, 8)), "decoder.mlp_post.0": np.ones((200, 8))}
    store = synthetic_store(tmp_path / "store", values)

    with pytest.raises(ArgumentError, match=r"do not share rows; expected sites of one space"):
        make_scan(store, store.rows(space="encoder"))


def test_no_rows_are_refused(store):
    """An empty choice of rows says how many there were."""
    nothing = Rows.from_row_ids("label = 'x'", store.meta.segment_rows, np.empty(0, np.int64))

    with pytest.raises(ArgumentError, match=r"rows = \"label = 'x'\" chooses none of the 5,003"):
        make_scan(store, nothing)


def test_an_unknown_rule_is_refused(store):
    """A rule is one of two words, or a set of rows."""
    with pytest.raises(ArgumentError, match=r"rows = 'contents' is no rule; expected 'content'"):
        chosen_rows(store, "contents", store.select(None))
    assert chosen_rows(store, store.rows("all"), store.select(None)).n_rows == 5003


def test_a_segment_not_committed_is_not_served(tmp_path):
    """A store that is being captured answers with what is committed."""
    store = synthetic_store(tmp_path / "store", values_of(3000), commit=[0, 2])

    _, row_ids = gathered(make_scan(store).ordered())

    assert set(row_ids // 1024) == {0, 2}


KEEPS = {"mlp_post.0": 1 / 4, "mlp_post.1": 1 / 2, "resid_post.1": 1.0}


@pytest.fixture(scope="module")
def sampled(values, tmp_path_factory):
    """The same activations, of which each site stores another part."""
    dtypes = {"mlp_post.0": "float16", "mlp_post.1": "bfloat16", "resid_post.1": "float32"}
    path = tmp_path_factory.mktemp("sampled") / "store"
    return synthetic_store(path, values, dtype=dtypes, documents=[101] * 49 + [54], keep=KEEPS)


@pytest.mark.parametrize("sites", [None, "mlp_post", "mlp_post.1, resid_post.1", "mlp_post.1"])
@pytest.mark.parametrize("order", ["ordered", "mixed", "single", "sample"])
def test_rows_are_those_stored_at_all_sites(store, sampled, sites, order):
    """Values are those of a whole store at the rows of the smallest sample, each once."""
    infos = sampled.select(sites)
    scan = make_scan(sampled, sites=sites)
    blocks = {
        "ordered": lambda: scan.ordered(300),
        "mixed": lambda: scan.mixed(300),
        "single": lambda: scan.mixed(64, run_rows=1),
        "sample": lambda: scan.sample(10**6, 300),
    }
    served, row_ids = gathered(blocks[order]())

    least = min(infos, key=lambda info: info.keep)
    assert np.sort(row_ids).tolist() == sampled[least.site].row_ids().tolist()
    whole = [store[info.site][row_ids].astype(np.float32) for info in infos]
    assert np.array_equal(served, np.hstack(whole))


def test_stored_rows_are_named_by_their_rule(sampled):
    """A set says what part was stored, once; what is stored anyway keeps its name."""
    some = sampled.select("mlp_post")
    rows = chosen_rows(sampled, "content", some)
    assert rows.rule == "content, 1/4 of the content rows stored"
    assert chosen_rows(sampled, rows, some) is rows
    assert make_scan(sampled, rows).n_rows == rows.n_rows
    assert chosen_rows(sampled, "all", some).row_ids().tolist() == rows.row_ids().tolist()
    mine = Rows.from_row_ids("mine", 1024, rows.row_ids()[::7])
    assert chosen_rows(sampled, mine, some) is mine
    assert chosen_rows(sampled, "all", sampled.select("resid_post.1")).n_rows == 5003


def test_sites_without_rows_are_refused(values, sampled, tmp_path):
    """The message names the sites that store nothing, and those that do."""
    keep = {**KEEPS, "mlp_post.1": 0.0}
    store = synthetic_store(tmp_path / "store", values, keep=keep)
    with pytest.raises(
        ArgumentError,
        match=r"sites = mlp_post\.1: no rows of them are stored .*which are: mlp_post\.0, resid",
    ):
        chosen_rows(store, "content", store.select("mlp_post"))
    with pytest.raises(ArgumentError, match=r"\(--keep 1/64\)"):
        make_scan(store)
    unkept = np.setdiff1d(sampled.rows().row_ids(), sampled["mlp_post.0"].row_ids())
    with pytest.raises(ArgumentError, match=r"1/4 of the content rows stored' chooses none of the"):
        make_scan(sampled, Rows.from_row_ids("mine", 1024, unkept))
