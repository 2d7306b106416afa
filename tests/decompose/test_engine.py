"""An engine adds up ranges of rows, here or on Dask, and the answer is the same."""

from __future__ import annotations

import dataclasses
import os
import signal

import numpy as np
import pytest
import torch

from actstore.decompose.engine import Engine
from actstore.decompose.narrow import from_float16
from actstore.decompose.scan import Form, Scan
from actstore.errors import BudgetExceeded, NonFiniteActivation, StoreNotFound
from actstore.workers import Connection, Where
from tests.synthetic import synthetic_store

MIB = 2**20
WIDTHS = {"mlp_post.0": 37, "mlp_post.1": 64}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Two sites of two dtypes in six segments."""
    rng = np.random.default_rng(0)
    values = {name: rng.normal(size=(5003, width)) for name, width in WIDTHS.items()}
    dtypes = {"mlp_post.0": "float16", "mlp_post.1": "bfloat16"}
    return synthetic_store(tmp_path_factory.mktemp("engine") / "store", values, dtype=dtypes)


@pytest.fixture(scope="module")
def client():
    """Two workers of one thread each, in processes of their own."""
    with Connection(Where(2, None), preload="actstore.decompose", n_threads=2) as connection:
        yield connection.client


def make_scan(store, budget=256 * MIB, rows=None, **options):
    """Return a scan of content rows of all sites, unless told otherwise."""
    rows = store.rows() if rows is None else rows
    return Scan(store, store.select(None), rows, budget_bytes=budget, **options)


@dataclasses.dataclass(frozen=True)
class Weighted:
    """Sums of rows, each times a number that only its own row_id gives, and their products."""

    power: int = 1

    def __call__(self, blocks):
        """Return the sums of a range."""
        sums = None
        for block in blocks:
            weights = torch.from_numpy(np.sin(block.row_ids)).float()[:, None]
            rows = block.values**self.power * weights
            new = {"rows": rows.double().sum(0), "gram": rows.T @ rows}
            new["n"] = torch.tensor(len(block.row_ids))
            sums = {name: sums[name] + value for name, value in new.items()} if sums else new
        return sums


def expected(store, rows=None, power=1):
    """Return the same from the stored values, in float64."""
    ids = (store.rows() if rows is None else rows).row_ids()
    values = np.hstack([store[i.site][ids].astype(np.float64) for i in store.select(None)])
    weighted = values**power * np.sin(ids)[:, None]
    return {"rows": weighted.sum(0), "gram": weighted.T @ weighted, "n": len(ids)}


def check(sums, wanted):
    """Compare sums with what is expected of them."""
    assert set(sums) == set(wanted)
    assert int(sums["n"]) == wanted["n"]
    np.testing.assert_allclose(sums["rows"], wanted["rows"], atol=2e-3)
    np.testing.assert_allclose(sums["gram"], wanted["gram"], atol=2e-2)


RANGES = {
    "ordered": lambda scan: list(scan.ordered_ranges(300)),
    "mixed": lambda scan: list(scan.mixed_ranges(128)),
    "long": lambda scan: list(scan.mixed_ranges(64, range_blocks=7)),
    "one": lambda scan: [next(scan.mixed_ranges(64))],
}


@pytest.mark.parametrize("order", ["ordered", "mixed", "long"])
@pytest.mark.parametrize("at_once", [1, 3])
def test_every_row_is_added_once_with_its_own_id(store, order, at_once):
    """The total over all ranges is that of the stored values, whichever way they are dealt."""
    scan = make_scan(store)
    done = []

    sums = Engine.local().total(
        scan, Weighted(), RANGES[order](scan), at_once=at_once, progress=done.append
    )

    check(sums, expected(store))
    assert sum(done) == scan.n_rows


@pytest.mark.parametrize("order", sorted(RANGES))
def test_dask_gives_the_bits_of_one_process(store, client, order):
    """The same ranges give the same sums to the last bit, and progress to the last row."""
    scan, other = make_scan(store), make_scan(store)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as many as a worker has
    here = Engine.local().total(scan, Weighted(), RANGES[order](scan))
    torch.set_num_threads(threads)
    done = []

    there = Engine(client).total(other, Weighted(), RANGES[order](other), progress=done.append)

    assert {name: value.dtype for name, value in there.items()} == {
        name: value.dtype for name, value in here.items()
    }
    for name, value in here.items():
        assert torch.equal(there[name], value), name
    assert sum(done) == int(here["n"])
    assert other.ranked.bytes_read >= other.n_rows * store.meta.row_bytes or order == "one"


@dataclasses.dataclass(frozen=True)
class Kill:
    """Ends the process of the worker that calls it first."""

    flag: str

    def __call__(self, blocks):
        """Die, or return the sums of a range."""
        if not os.path.exists(self.flag):
            open(self.flag, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        return Weighted()(blocks)


def test_a_killed_worker_costs_its_tasks_only(store, client, tmp_path):
    """Another worker does them again, and the total is that of all rows."""
    scan = make_scan(store)

    sums = Engine(client).total(scan, Kill(str(tmp_path / "flag")), list(scan.mixed_ranges(128)))

    check(sums, expected(store))


def test_an_error_in_a_worker_is_its_own(tmp_path, client):
    """NaN found by a worker is reported as it would be here, and not tried again."""
    values = {"mlp_post.0": np.ones((700, 5))}
    values["mlp_post.0"][333, 3] = np.nan
    bad = synthetic_store(tmp_path / "store", values)
    scan = make_scan(bad)

    with pytest.raises(NonFiniteActivation, match=r"mlp_post\.0 of .* is nan at row_id .*neuron 3"):
        Engine(client).total(scan, Weighted(), list(scan.ordered_ranges()))


def test_a_worker_that_does_not_see_the_store_says_so(store, client, tmp_path):
    """The message says what all machines must see."""
    scan = make_scan(store)
    scan.store = type("Elsewhere", (), {"path": tmp_path / "none", "meta": store.meta})()

    with pytest.raises(StoreNotFound, match=r"the worker on .* does not find the store at .*none"):
        Engine(client).total(scan, Weighted(), list(scan.ordered_ranges()))


@dataclasses.dataclass(frozen=True)
class Clipped:
    """What a block looks like in a form."""

    def __call__(self, blocks):
        """Return sums of what is there, and whether anything is below zero."""
        total, low, bits = torch.zeros(101, dtype=torch.float64), 0, 0
        for block in blocks:
            total += block.values.double().sum(0)
            low = min(low, float(block.values.min()))
            bits = block.values.element_size()
        return {"total": total, "low": torch.tensor(low), "bytes": torch.tensor(bits)}


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_blocks_come_in_the_form_asked_for(store, dtype, clip):
    """Clipped or not, in either dtype, values are the stored ones to its rounding."""
    scan = make_scan(store)
    ids = store.rows().row_ids()
    values = np.hstack([store[i.site][ids].astype(np.float32) for i in store.select(None)])
    wanted = torch.from_numpy(np.maximum(values, 0) if clip else values)
    if dtype == "bfloat16":
        wanted = wanted.bfloat16()

    sums = Engine.local().total(
        scan, Clipped(), [list(map(np.array, [range(scan.n_rows)]))], form=Form(dtype, clip)
    )

    assert (float(sums["low"]) == 0) == clip
    np.testing.assert_allclose(sums["total"], wanted.double().sum(0), atol=1e-4)


def test_every_float16_becomes_its_bfloat16():
    """All 65,536 bit patterns are rounded as torch rounds them; what is not finite is noticed."""
    bits = np.arange(2**16, dtype=np.uint16)[None]
    values = torch.from_numpy(bits.view(np.int16)).view(torch.float16)
    finite = torch.isfinite(values).numpy()[0]
    for clip in (False, True):
        out = np.zeros((1, 2**16), np.uint16)
        assert not from_float16(bits, out, 0, clip)
        assert from_float16(np.ascontiguousarray(bits[:, finite]), out[:, finite].copy(), 0, clip)
        wanted = values.clamp(min=0) if clip else values
        found = torch.from_numpy(out.view(np.int16)).view(torch.bfloat16)
        assert torch.equal(found[:, finite], wanted.bfloat16()[:, finite])


def test_a_range_too_large_for_the_budget_is_refused(store):
    """The message says what is needed."""
    scan = make_scan(store, budget=17 * MIB)

    with pytest.raises(BudgetExceeded, match=r"needs at least [\d,]+ bytes .*Pass budget="):
        Engine.local().total(scan, Weighted(), list(scan.mixed_ranges(8192)))
