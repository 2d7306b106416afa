"""A permuted copy holds every row once, in uniformly random order, whole or not at all."""

import multiprocessing
import os
import signal
import sys

import numpy as np
import pytest
import zarr
from click.testing import CliRunner

from actstore import bfloat16, cli, durable
from actstore.decompose import shuffle
from actstore.errors import ArgumentError, BudgetExceeded, NotEnoughDisk, ResultExists, StoreBusy
from tests.synthetic import synthetic_store

DTYPES = {"mlp_post.0": "float16", "mlp_post.1": "bfloat16", "resid_post.1": "float32"}
MODULE = sys.modules["actstore.decompose.shuffle"]
assert bfloat16  # teaches zarr-python the dtype


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Three sites of three dtypes and widths, one of them padded on disk."""
    rng = np.random.default_rng(1)
    values = {
        name: rng.normal(size=(5003, width))
        for name, width in zip(DTYPES, (37, 514, 23), strict=True)
    }
    path = tmp_path_factory.mktemp("shuffle") / "store"
    return synthetic_store(path, values, dtype=DTYPES)


@pytest.fixture
def small_spills(monkeypatch):
    """Let few rows fit in a spill, a piece, a band and a shard."""
    monkeypatch.setattr(MODULE, "_SPILL_BYTES", 10**6)
    monkeypatch.setattr(MODULE, "_PIECE_BYTES", 5 * 10**5)
    monkeypatch.setattr(MODULE, "_APPEND_BYTES", 1)
    monkeypatch.setattr(MODULE, "_CHUNK_ROWS", (64, 128))
    monkeypatch.setattr(MODULE, "_SHARD_ROWS", 1024)


@pytest.mark.parametrize("rule", ["content", "all"])
@pytest.mark.usefixtures("small_spills")
def test_every_row_is_there_once_with_its_values(store, tmp_path, rule):
    """zarr-python reads, row for row, what the store has at the row ids beside."""
    group = zarr.open_group(shuffle(store, None, tmp_path / "copy", rows=rule), mode="r")
    row_ids = group["row_ids"][:]

    assert row_ids.dtype == np.int64
    np.testing.assert_array_equal(np.sort(row_ids), store.rows(rule).row_ids())
    for site, dtype in DTYPES.items():
        assert group[site].dtype == dtype
        assert group[site].shape == (len(row_ids), store.site(site).width)
        np.testing.assert_array_equal(group[site][:], store[site][row_ids])


@pytest.mark.usefixtures("small_spills")
def test_every_spill_fits_in_memory(store, tmp_path):
    """Rows are scattered evenly: no spill outgrows what the second pass reads at once."""
    sizes = []

    def look(stage, done, total):
        if (stage, done) == ("scatter", total):
            spills = tmp_path / "copy.partial" / "spills"
            sizes.extend(path.stat().st_size for path in spills.iterdir())

    shuffle(store, None, tmp_path / "copy", progress=look)

    assert len(sizes) > 5
    assert max(sizes) <= MODULE._SPILL_BYTES


def test_the_order_does_not_depend_on_the_budget(store, tmp_path, request):
    """In one spill or in many the copy is the same; another seed gives another."""
    ids = []
    for name, seed in (("one", 0), ("other", 1), ("many", 0)):
        if name == "many":
            request.getfixturevalue("small_spills")
        path = shuffle(store, None, tmp_path / name, seed=seed)
        ids.append(zarr.open_group(path, mode="r")["row_ids"][:])

    np.testing.assert_array_equal(ids[0], ids[2])
    assert (ids[0] != ids[1]).any()


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.usefixtures("small_spills")
def test_rows_go_anywhere_alike(store, tmp_path, seed):
    """Where a row comes from does not say where it goes (chi-square), nor does its neighbour."""
    path = shuffle(store, None, tmp_path / "copy", seed=seed)
    row_ids = zarr.open_group(path, mode="r")["row_ids"][:]
    n = len(row_ids)
    ranks = np.searchsorted(np.sort(row_ids), row_ids)

    table = np.histogram2d(ranks, np.arange(n), bins=10)[0]
    expected = table.sum(0) * table.sum(1)[:, None] / n
    assert ((table - expected) ** 2 / expected).sum() < 126  # 99.9 % of 81 degrees of freedom
    # Ascents of a random order: (n - 1) / 2 with variance (n + 1) / 12.
    ascents = (np.diff(ranks) > 0).sum()
    assert abs(ascents - (n - 1) / 2) < 3.3 * np.sqrt((n + 1) / 12)
    assert (np.diff(ranks) == 1).sum() < 8  # one neighbour stays beside the other on average


def test_the_copy_says_what_it_is(store, tmp_path):
    """Attributes of the group name store, sites, rows and seed; progress counts both passes."""
    stages = []
    path = shuffle(
        store,
        ["mlp_post.0"],
        str(tmp_path / "a" / "copy"),
        seed=3,
        progress=lambda *a: stages.append(a),
    )

    assert path == tmp_path / "a" / "copy"
    assert zarr.open_group(path, mode="r").attrs["actstore_shuffle"] == {
        "store_id": store.meta.store_id,
        "model": "synthetic",
        "sites": ["mlp_post.0"],
        "rows": "content",
        "n_rows": store.rows().n_rows,
        "seed": 3,
    }
    assert [path.name for path in path.parent.iterdir()] == ["copy"]
    n_rows = store.rows().n_rows
    assert ("scatter", n_rows, n_rows) in stages
    assert stages[-1] == ("gather", n_rows, n_rows)


def test_what_is_there_is_not_written_over(store, tmp_path):
    """A name that is taken is refused with the remedy, and what is there stands."""
    (tmp_path / "copy").mkdir()

    with pytest.raises(ResultExists, match=r"copy exists, and .* never written over\. Name a new"):
        shuffle(store, None, tmp_path / "copy")
    assert list((tmp_path / "copy").iterdir()) == []


@pytest.mark.parametrize("stage", ["scatter", "gather"])
def test_a_failure_leaves_nothing(store, tmp_path, stage):
    """Whatever stops it, no part of the copy stays, and the same call works afterwards."""

    def stop(now, *_):
        if now == stage:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        shuffle(store, None, tmp_path / "copy", progress=stop)

    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
    shuffle(store, None, tmp_path / "copy")


def test_a_killed_process_leaves_nothing_that_looks_whole(store, tmp_path):
    """What it wrote is under another name and no group; the next run clears it away."""
    copy = tmp_path / "copy"

    def killed_half_way():
        """End as if the power had failed, once the copy is being written."""
        shuffle(
            store,
            None,
            copy,
            progress=lambda stage, *_: stage == "gather" and os.kill(os.getpid(), signal.SIGKILL),
        )

    process = multiprocessing.get_context("fork").Process(target=killed_half_way)
    process.start()
    process.join()

    assert process.exitcode == -signal.SIGKILL
    assert not copy.exists()
    assert (tmp_path / "copy.partial").is_dir()
    with pytest.raises(FileNotFoundError):
        zarr.open_group(tmp_path / "copy.partial", mode="r")
    row_ids = zarr.open_group(shuffle(store, None, copy), mode="r")["row_ids"][:]
    np.testing.assert_array_equal(np.sort(row_ids), store.rows().row_ids())
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_two_at_once_are_refused(store, tmp_path):
    """While one process writes a copy, another that would is told so."""
    with (
        durable.lock(tmp_path / ".copy.lock", "the copy"),
        pytest.raises(StoreBusy, match=r"the permuted copy .*copy is being written by another"),
    ):
        shuffle(store, None, tmp_path / "copy")


def test_memory_and_disk_are_asked_for_first(store, tmp_path, monkeypatch):
    """Too small a budget or disk is refused with the number that suffices, before any write."""
    monkeypatch.setattr(MODULE, "_OVERHEAD_BYTES", 64 * 2**20 - 10**5)
    with pytest.raises(
        BudgetExceeded, match=r"bytes a row\) needs at least .* fewer sites"
    ) as info:
        shuffle(store, None, tmp_path / "copy", budget="64MiB")
    needed = int(str(info.value).split("Pass budget=")[1].split(" ")[0])
    monkeypatch.setattr(MODULE.shutil, "disk_usage", lambda _: type("", (), {"free": 10**6}))
    with pytest.raises(
        NotEnoughDisk, match=r"permuting 4,902 rows .*1,000,000 are free.*on another"
    ):
        shuffle(store, None, tmp_path / "copy", budget=needed)
    monkeypatch.undo()

    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ArgumentError, match="rows = 'words' is no rule"):
        shuffle(store, None, tmp_path / "copy", rows="words")


def test_the_least_budget_suffices(store, tmp_path, monkeypatch):
    """With the bytes the message names, the copy is the same as with plenty."""
    plenty = shuffle(store, None, tmp_path / "plenty")
    monkeypatch.setattr(MODULE, "_OVERHEAD_BYTES", 64 * 2**20 - 8 * 64 * 1210)

    least = shuffle(store, None, tmp_path / "least", budget="64MiB")

    ids = [zarr.open_group(path, mode="r")["row_ids"][:] for path in (plenty, least)]
    np.testing.assert_array_equal(*ids)


def test_the_command_writes_a_copy(small_store, tmp_path):
    """`actstore shuffle STORE --to PATH` prints where the copy is."""
    to = tmp_path / "copy"
    command = ["shuffle", str(small_store.path), "--sites", "mlp_post.1", "--to", str(to)]

    done = CliRunner().invoke(cli.main, [*command, "--rows", "position < 5"])

    assert done.exit_code == 0, done.output
    assert str(to) in done.output
    group = zarr.open_group(to, mode="r")
    ids = group["row_ids"][:]
    np.testing.assert_array_equal(group["mlp_post.1"][:], small_store["mlp_post.1"][ids])
    assert set(small_store.tokens_of(ids).column("position").to_pylist()) == {1, 2, 3, 4}
