"""Factorisations and similarities on workers: asked for by number or address, shared, refused."""

from __future__ import annotations

from unittest import mock

import numpy as np
import psutil
import pytest
from click.testing import CliRunner

import actstore
from actstore.cli import main
from actstore.decompose import on_dask
from actstore.decompose.engine import Engine
from actstore.errors import ArgumentError, BudgetExceeded
from actstore.workers import Connection, Where
from tests.decompose.test_engine import Kill, Weighted, check, expected, make_scan
from tests.synthetic import synthetic_store


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Two sites of some factors in several segments."""
    rng = np.random.default_rng(0)
    scores = rng.gamma(1, size=(3001, 5)) * (rng.random((3001, 5)) < 0.4)
    values = {f"mlp_post.{i}": scores @ rng.random((5, w)) ** 4 for i, w in enumerate((23, 37))}
    path = tmp_path_factory.mktemp("workers") / "store"
    return actstore.open(synthetic_store(path, values, dtype="float32").path)


@pytest.fixture(scope="module")
def connection():
    """Two workers in processes of their own."""
    with Connection(Where(2, None), preload="actstore.decompose", n_threads=2) as connection:
        yield connection


def children():
    """Return the processes that descend from this one."""
    found = psutil.Process().children(recursive=True)
    # A browser that other tests opened starts and ends processes of its own accord.
    return {p.pid for p in found if p.is_running() and "chrom" not in p.name()}


def test_two_workers_give_what_one_process_does(store, capfd):
    """The loadings are the same, nothing is said, and no process is left."""
    before = children()
    here = store.nmf(None, 3)

    there = store.nmf(None, 3, workers=2)

    np.testing.assert_allclose(there.loadings, here.loadings, atol=1e-5)
    assert children() == before
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("command", ["nmf", "similarity"])
def test_a_running_scheduler_does_it_from_the_command_line(store, connection, command):
    """`--scheduler` gives the result that this process gives."""
    address = connection.client.scheduler.address
    options = {"nmf": ["--components", "3"], "similarity": ["--measure", "pwcca"]}[command]
    made = {}
    for where in ([], ["--scheduler", address]):
        name = f"asked-{len(where)}"
        arguments = [command, str(store.path), *options, *where, "--name", name]
        done = CliRunner().invoke(main, arguments, catch_exceptions=False)
        assert done.exit_code == 0, done.stderr
        if command == "nmf":
            made[name] = store.factors(name).loadings
        else:
            made[name] = store.similarity_result(name).matrix

    np.testing.assert_allclose(*made.values(), atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": 2, "scheduler": "tcp://host:8786"}, "exclude each other"),
        ({"workers": 0}, "workers = 0 was given; expected 1"),
        ({"scheduler": 8786}, "scheduler is a int; expected the address"),
        ({"workers": 2, "client": object()}, "client and workers were given"),
        ({"scheduler": "tcp://host:1", "client": object()}, "client and scheduler were given"),
    ],
)
@pytest.mark.parametrize("verb", ["nmf", "similarity"])
def test_arguments_that_contradict_each_other_are_refused(store, verb, options, message):
    """Before anything is started, and with what was expected."""
    with pytest.raises(ArgumentError, match=message):
        getattr(store, verb)(None, **options)


def test_a_scheduler_that_is_not_there_is_told(store, monkeypatch):
    """The error names the address and the remedy."""
    monkeypatch.setattr("actstore.workers._START_SECONDS", 0.5)
    with pytest.raises(ArgumentError, match=r"'tcp://127.0.0.1:9' does not answer.*--workers"):
        store.similarity(None, measure="pwcca", scheduler="tcp://127.0.0.1:9")


@pytest.mark.parametrize("verb", ["nmf", "similarity"])
def test_a_share_of_the_budget_that_is_too_small_is_refused(store, verb):
    """Before anything is started: workers and this process share it."""
    before = children()
    with pytest.raises(BudgetExceeded, match=r"one of 501 processes, .* 500 workers.*--workers"):
        getattr(store, verb)(None, workers=500, budget="64MiB")
    assert children() == before


def test_workers_share_the_budget_with_this_process():
    """Each of three processes has a third; of a scheduler's workers each has all of it."""
    with Engine.on(workers=2) as engine:
        assert engine.share_of(3000) == 1000
    with Engine.on(scheduler="tcp://host:8786") as engine:
        assert engine.share_of(3000) == 3000
    with Engine.on(workers=1) as engine:
        assert engine.is_local
        assert engine.share_of(3000) == 3000


def test_settings_that_travel_by_themselves_survive_a_worker(
    store, connection, tmp_path, monkeypatch
):
    """Large settings are held by a worker; when it dies, they are sent again."""
    monkeypatch.setattr(on_dask, "_SMALL_BYTES", 0)
    scan = make_scan(store)
    work = Kill(str(tmp_path / "flag"))

    sums = Engine(connection.client).total(scan, work, list(scan.mixed_ranges(128)))

    check(sums, expected(store))


def test_results_that_do_not_fit_together_are_added_by_workers(store, connection, monkeypatch):
    """Where sums are large a worker has one task, the sums are added there, and are the same."""
    client = mock.Mock(wraps=connection.client, nthreads=lambda: {"one": 1, "two": 1})
    scan = make_scan(store, budget=2**28, reserved_bytes=2**27 + 1)
    ranges = list(scan.mixed_ranges(128))
    submitted = []
    submit = on_dask._submit
    monkeypatch.setattr(
        on_dask, "_submit", lambda *given: submitted.append(given[1].__name__) or submit(*given)
    )

    sums = Engine(client).total(scan, Weighted(), ranges)

    assert submitted == ["work_on", "work_on", "add"]
    check(sums, expected(store))


def test_workers_that_never_come_back_are_told(store, monkeypatch):
    """A scheduler whose workers are gone ends the wait, with the remedy."""
    import distributed

    monkeypatch.setattr(on_dask, "_WAIT_SECONDS", 0.5)
    options = {"processes": False, "dashboard_address": None, "n_workers": 0}
    scan = make_scan(store)
    with (
        distributed.LocalCluster(**options) as cluster,
        distributed.Client(cluster) as client,
        pytest.raises(ArgumentError, match=r"the workers of .* are gone, for 0.5 seconds; .*start"),
    ):
        Engine(client).total(scan, Weighted(), list(scan.mixed_ranges(128)))
