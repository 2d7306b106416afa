"""An engine adds up ranges of rows, here or on Dask, and the answer is the same."""

from __future__ import annotations

import dataclasses

import distributed
import numpy as np
import pytest
import torch

from actstore.decompose.engine import Engine
from actstore.decompose.scan import Scan
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
    options = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": None}
    with distributed.LocalCluster(**options) as cluster, distributed.Client(cluster) as client:
        yield client


def make_scan(store, budget=256 * MIB, rows=None, **options):
    """Return a scan of content rows of all sites, unless told otherwise."""
    rows = store.rows() if rows is None else rows
    return Scan(store, store.select(None), rows, budget_bytes=budget, **options)


@dataclasses.dataclass(frozen=True)
class Weighted:
    """Sums of rows, each times a number that only its own row_id gives, and their products."""

    power: int = 1

    def __call__(self, blocks):
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
