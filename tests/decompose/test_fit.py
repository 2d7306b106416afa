"""Fits: together as alone, on Dask as here, after a kill as without; and what planted data show."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
import scipy.optimize
import sklearn.decomposition

from actstore.decompose import Factors, checkpoint, fit, nmf, scan, start
from actstore.decompose.engine import Engine
from actstore.errors import ArgumentError, NonFiniteActivation, StoreBusy
from actstore.workers import Connection, Where
from tests.synthetic import synthetic_store


def planted(n_rows=4000, k=6, width=90, *, share=0.3, signed=False, noise=0.01, seed=0):
    """Return rows that combine k planted loadings, and these."""
    rng = np.random.default_rng(seed)
    loadings = rng.random((k, width)) * (rng.random((k, width)) < 0.3)
    if signed:
        loadings *= rng.choice([-1, 1], loadings.shape)
    scores = rng.gamma(1.0, size=(n_rows, k)) * (rng.random((n_rows, k)) < share)
    return scores @ loadings + noise * rng.normal(size=(n_rows, width)), loadings


def matched(found, wanted):
    """Return the cosine of each wanted factor with the found one it is matched to."""
    found = found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-30)
    wanted = wanted / np.linalg.norm(wanted, axis=1, keepdims=True)
    cosines = wanted @ found.T
    return cosines[scipy.optimize.linear_sum_assignment(-cosines)]


def rows_of(store, factors, ids=None):
    """Return the matrix that was factorised, in float64."""
    ids = store.rows().row_ids() if ids is None else ids
    scales = factors.summary["site_scales"]
    blocks = [store[i.site][ids].astype(float) * scales[str(i.site)] for i in factors.sites]
    matrix = np.hstack(blocks)
    return matrix if factors.summary["signed"] else np.maximum(matrix, 0)


def error_of(store, factors):
    """Return the relative error of scores and loadings as they are stored, from the residual."""
    matrix = rows_of(store, factors)
    scores = factors.scores(store.rows().row_ids()).astype(float)
    return np.linalg.norm(matrix - scores @ factors.loadings) / np.linalg.norm(matrix)


@pytest.fixture(autouse=True)
def _small_steps(monkeypatch):
    """Let small stores have a sample that is not all of them, and many super-steps."""
    monkeypatch.setattr(fit, "_WHOLE_ROWS", 600)
    monkeypatch.setattr(fit, "SAMPLE_ROWS", 1024)
    monkeypatch.setattr(fit, "_STEP_ROWS", 512)


def sites_of(values, n_sites=2):
    """Return columns as sites."""
    parts = np.array_split(values, n_sites, axis=1)
    return {f"mlp_post.{i}": part for i, part in enumerate(parts)}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Planted factors in a store of several segments, and their loadings."""
    values, loadings = planted(noise=0.05)
    path = tmp_path_factory.mktemp("fit") / "store"
    return synthetic_store(path, sites_of(values), dtype="float32"), loadings


@pytest.mark.parametrize("share", [0.9, 0.15])
def test_planted_factors_dense_and_sparse(tmp_path, share):
    """Factors whose scores are nearly always or seldom above zero are found."""
    values, loadings = planted(6000, share=share)
    store = synthetic_store(tmp_path / "store", sites_of(values), dtype="float32")
    found = nmf(store, None, 6, scale=None, passes=2, tolerance=2e-3, max_passes=40)

    assert matched(found.loadings, loadings).min() > 0.99
    assert found.summary["error"] == pytest.approx(error_of(store, found), abs=2e-5)


def test_planted_signed_factors_with_few_active(tmp_path):
    """Loadings of both signs are found where a row has few factors; scores are never negative."""
    values, loadings = planted(6000, k=8, share=0.12, signed=True)
    store = synthetic_store(tmp_path / "store", sites_of(values), dtype="float32")
    found = nmf(store, None, 8, signed=True, active=3 / 8, scale=None, passes=2)
    scores = found.scores(store.rows().row_ids())

    assert matched(found.loadings, loadings).min() > 0.99
    assert scores.min() >= 0
    assert (scores > 0).sum(1).max() <= 3
    assert found.loadings.min() < -0.1
    assert found.summary["error"] == pytest.approx(error_of(store, found), abs=2e-5)
    assert found.summary["certificates"]["clipped_energy"] == pytest.approx(0, abs=1e-9)


def test_dead_and_duplicate_neurons_and_empty_rows(tmp_path):
    """Neurons that are always zero, twins of others, and rows of zeros do no harm."""
    values, loadings = planted(5000)
    values = np.maximum(values, 0)
    values[:, [3, 50]] = 0
    values[:, 60] = values[:, 61]
    values[::7] = 0
    wanted = loadings.copy()
    wanted[:, [3, 50]] = 0
    wanted[:, 60] = wanted[:, 61]
    store = synthetic_store(tmp_path / "store", sites_of(values), dtype="float32")
    found = nmf(store, None, 6, scale=None, passes=2, tolerance=2e-3, max_passes=40)
    scores = found.scores(store.rows().row_ids())
    empty = rows_of(store, found).max(1) == 0

    assert matched(found.loadings, wanted).min() > 0.99
    assert np.abs(found.loadings[:, [3, 50]]).max() < 1e-3
    np.testing.assert_allclose(found.loadings[:, 60], found.loadings[:, 61], atol=1e-5)
    assert empty.any()
    assert scores[empty].max() == 0


def test_ecco_from_the_start_of_scikit_learn_ends_where_it_does(tmp_path):
    """From its start and run to KKT 1e-4 the objective is its NMF's, and so are the factors."""
    values, _ = planted(1500, noise=0.2)
    store = synthetic_store(tmp_path / "store", {"mlp_post.0": values}, dtype="float32")
    ids = store.rows().row_ids()
    matrix = np.maximum(store["mlp_post.0"][ids].astype(float), 0)
    _, start = sklearn.decomposition._nmf._initialize_nmf(matrix, 6, "nndsvda")
    model = sklearn.decomposition.NMF(6, init="nndsvda", tol=1e-9, max_iter=2000).fit(matrix)
    found = nmf(store, None, 6, mode="ecco", start=start, passes=0, tolerance=1e-4, max_passes=500)

    assert found.summary["certificates"]["kkt_residual"] <= 1.1e-4
    assert found.summary["scale"] is None
    objective = found.summary["error"] * np.linalg.norm(matrix)
    assert objective == pytest.approx(model.reconstruction_err_, rel=1e-4)
    assert matched(found.loadings, model.components_).min() > 0.99


def test_certificates_are_true(made):
    """Perturbed loadings have a larger gradient; no factorisation is below the exact bound."""
    store, _ = made
    found = nmf(store, None, 4, tolerance=1e-3, bound="exact")
    rng = np.random.default_rng(0)
    moved = found.loadings * (1 + 0.05 * rng.random(found.loadings.shape).astype(np.float32))
    other = nmf(store, None, 4, start=moved, passes=0, tolerance=1e9, max_passes=1, bound="exact")
    values = np.linalg.svd(rows_of(store, found), compute_uv=False)
    bound = np.sqrt((values[4:] ** 2).sum() / (values**2).sum())
    certificates = found.summary["certificates"]

    assert certificates["kkt_residual"] <= 1.1e-3
    assert other.summary["certificates"]["kkt_residual"] > 3 * certificates["kkt_residual"]
    assert certificates["svd_bound"] == pytest.approx(bound, abs=1e-5)
    assert bound <= found.summary["error"] <= other.summary["error"]
    assert found.summary["n_batch_passes"] > 1


def test_fits_together_are_the_fits_alone(made):
    """Several numbers of factors and seeds in the same reads give what each gives by itself."""
    store, _ = made
    together = nmf(store, None, [3, 5], seed=[0, 2], passes=2, name="grid")
    names = [f"grid-k{k}-seed{s}" for k in (3, 5) for s in (0, 2)]
    alone = [nmf(store, None, k, seed=s, passes=2) for k in (3, 5) for s in (0, 2)]

    assert [f.name for f in together] == names
    assert [f.name for f in together] == [Factors.open(store, name).name for name in names]
    for one, other in zip(together, alone, strict=True):
        np.testing.assert_allclose(one.loadings, other.loadings, atol=1e-5)
        assert one.summary["error"] == pytest.approx(other.summary["error"], abs=1e-6)
        assert one.summary["seed"] == other.summary["seed"]
    reads = sum(f.summary["bytes_read"] for f in alone)
    assert together[0].summary["bytes_read"] < 0.5 * reads
    assert (together[0].loadings != together[1].loadings).any()


def test_the_best_of_several_beginnings_goes_on(made, monkeypatch):
    """With two passes four are tried, and the one with the lowest objective is improved further."""
    store, _ = made
    improved = []
    improve = start.Start.improve

    def remembered(self, dictionaries, *rest):
        improve(self, dictionaries, *rest)
        improved.append((list(dictionaries), [d.objective() for d in dictionaries]))

    monkeypatch.setattr(start.Start, "improve", remembered)
    nmf(store, None, 6, passes=1)
    assert [len(dictionaries) for dictionaries, _ in improved] == [1]
    taken = []
    for seed in range(6):
        improved.clear()
        nmf(store, None, 6, passes=2, seed=seed)
        (tried, objectives), ((further,), _) = improved
        taken.append(tried.index(further))
        assert len(set(objectives)) == 4
        assert objectives[taken[-1]] == min(objectives)
    assert set(taken) > {0}
    assert [start.n_tried(k, signed=False) for k in (64, 128, 129)] == [4, 2, 1]
    assert [start.n_tried(k, signed=True) for k in (6, 64, 256)] == [10, 4, 1]


@pytest.mark.parametrize("signed", [False, True])
def test_a_fit_is_the_same_whatever_the_budget(made, monkeypatch, signed):
    """A sample that lies in memory and one that is read again are the same rows, rounded alike."""
    store, _ = made
    options = {"signed": True, "active": 0.5} if signed else {}
    roomy = nmf(store, None, 6, **options)
    sample = scan.Scan.sample

    def with_memory_for_one_block(self, *arguments, **rest):
        self.free_bytes = scan.BLOCK_ROWS * (4 * self.width + 2 * self.ranked.row_bytes)
        return sample(self, *arguments, **rest)

    monkeypatch.setattr(scan.Scan, "sample", with_memory_for_one_block)
    tight = nmf(store, None, 6, **options)

    assert tight.summary["n_reads"] > 2 * roomy.summary["n_reads"]
    assert tight.summary["site_scales"] == roomy.summary["site_scales"]
    np.testing.assert_array_equal(tight.loadings, roomy.loadings)


def test_seeds_of_one_sample_share_it_and_begin_on_parts_of_their_own(made, monkeypatch):
    """Where samples are all rows they are read once; each fit comes out as it would alone."""
    store, _ = made
    monkeypatch.setattr(fit, "_WHOLE_ROWS", 100_000)
    parts, rounds = [], fit.Start._rounds

    def watched(self, dictionaries, ranges, n, n_sweeps):
        parts.append((len(dictionaries), [int(block[0]) for blocks in ranges for block in blocks]))
        rounds(self, dictionaries, ranges, n, n_sweeps)

    monkeypatch.setattr(fit.Start, "_rounds", watched)
    together = nmf(store, None, 5, seed=[0, 1, 2])
    *own, last = parts
    alone = [nmf(store, None, 5, seed=s) for s in (0, 1, 2)]

    assert [n for n, _ in own] == [1, 1, 1]
    assert len({tuple(part) for _, part in own}) == 3
    assert last[0] == 3
    assert all(set(part) < set(last[1]) for _, part in own)
    for one, other in zip(together, alone, strict=True):
        np.testing.assert_allclose(one.loadings, other.loadings, atol=1e-5)
        assert one.summary["reads"] == other.summary["reads"] == 2


def test_two_passes_are_three_reads(made):
    """What the sample takes of a read the first pass gives back."""
    store, _ = made
    assert nmf(store, None, 3).summary["reads"] == pytest.approx(2, abs=0.01)
    assert nmf(store, None, 3, passes=2).summary["reads"] == pytest.approx(3, abs=0.01)


def test_given_loadings_are_improved_before_the_first_pass(made):
    """One online pass from any loadings ends as low as from those that a sample gives."""
    store, _ = made
    start = np.random.default_rng(0).random((4, 90))
    given, found = nmf(store, None, 4, start=start), nmf(store, None, 4)

    assert given.summary["error"] < 1.002 * found.summary["error"]
    assert given.summary["reads"] == pytest.approx(2, abs=0.01)


def test_dead_components_are_revived(made):
    """A start with loadings of zero ends with every factor in use."""
    store, _ = made
    start = np.random.default_rng(0).random((4, 90))
    start[2] = 0
    found = nmf(store, None, 4, start=start, passes=2)

    assert (found.table("factors").column("share").to_numpy() > 0.01).all()


def test_blocks_and_segments_do_not_matter_much(tmp_path, monkeypatch):
    """Other segments and blocks deal rows otherwise, and lead to the same factors."""
    values, _ = planted(4000, noise=0.05)
    found = []
    for n, (segment_rows, block) in enumerate(((4096, 512), (512, 256))):
        path = tmp_path / str(n)
        store = synthetic_store(
            path, sites_of(values), dtype="float32", segment_rows=segment_rows, chunk_rows=128
        )
        monkeypatch.setattr(fit, "BLOCK_ROWS", block)
        found.append(nmf(store, None, 6, passes=3))

    assert matched(found[0].loadings, found[1].loadings).min() > 0.99
    assert found[0].summary["error"] == pytest.approx(found[1].summary["error"], rel=0.005)


# -- Dask ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def client():
    """Two workers of one thread each, in processes of their own."""
    with Connection(Where(2, None), preload="actstore.decompose", n_threads=2) as connection:
        yield connection.client


def test_dask_gives_the_loadings_of_one_process(made, client):
    """The super-steps follow from the data, so workers change nothing."""
    store, _ = made
    here = nmf(store, None, [3, 5], seed=1)
    there = nmf(store, None, [3, 5], seed=1, engine=Engine(client))

    for one, other in zip(here, there, strict=True):
        np.testing.assert_allclose(one.loadings, other.loadings, atol=1e-5)
        np.testing.assert_allclose(
            one.scores(store.rows().row_ids()), other.scores(store.rows().row_ids()), atol=1e-4
        )
        assert one.summary["certificates"]["kkt_residual"] == pytest.approx(
            other.summary["certificates"]["kkt_residual"], rel=0.01
        )
        assert other.summary["reads"] == one.summary["reads"]


def test_a_worker_killed_in_mid_fit_changes_nothing(made, client):
    """Its tasks go to the other worker, and the loadings are those of one process."""
    store, _ = made
    here = nmf(store, None, 4, passes=2)
    victims = []

    def kill(stage, done, _):
        if stage == "online passes" and done > 2000 and not victims:
            victims.append(next(iter(client.run(os.getpid).values())))
            os.kill(victims[0], signal.SIGKILL)

    there = nmf(store, None, 4, passes=2, engine=Engine(client), progress=kill)

    assert victims
    np.testing.assert_allclose(there.loadings, here.loadings, atol=1e-5)


# -- interrupted ---------------------------------------------------------------------------------

KILLED = """
import sys
from actstore.decompose import checkpoint, fit, nmf
from actstore.store import CoreStore
import torch
torch.set_num_threads(1)  # with more, more ranges are under way when it is killed
fit._WHOLE_ROWS, fit.SAMPLE_ROWS, fit._STEP_ROWS = 600, 1024, 512
checkpoint._SAVE_SECONDS = 0
def told(stage, done, of):
    print(stage, done, flush=True)
nmf(CoreStore(sys.argv[1]), None, 4, passes=3, progress=told)
"""


@pytest.mark.parametrize("stage", ["online passes 3", "exact pass 1"])
def test_a_killed_fit_goes_on_where_it_was(made, stage, tmp_path):
    """After SIGKILL the same call reads only what is left, ends alike, and leaves no litter."""
    values, _ = planted(4000, noise=0.05)
    store = synthetic_store(tmp_path / "store", sites_of(values), segment_rows=512, chunk_rows=64)
    whole = nmf(store, None, 4, passes=3, name="whole")
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(KILLED), str(store.path)],
        stdout=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if line.startswith(stage):
            process.send_signal(signal.SIGKILL)
            break
    process.communicate()
    left = list((store.path / "work").glob("fit-*/state.npz"))
    told = []

    again = nmf(store, None, 4, passes=3, progress=lambda *what: told.append(what))

    assert process.returncode == -signal.SIGKILL
    assert len(left) == 1
    first = next(done for name, done, _ in told if name == stage.rsplit(" ", 1)[0])
    assert first > 400
    assert ("online passes" in {name for name, *_ in told}) == stage.startswith("online")
    np.testing.assert_allclose(again.loadings, whole.loadings, atol=1e-6)
    assert again.summary["error"] == pytest.approx(whole.summary["error"], abs=1e-7)
    assert again.summary["reads"] == whole.summary["reads"]
    # What was being read ahead of the last step that was saved is read again: never a whole pass.
    assert again.summary["bytes_read"] <= whole.summary["bytes_read"] * 1.15
    assert not list((store.path / "work").glob("fit-*"))


def test_a_state_of_another_fit_is_not_gone_on_from(made):
    """Another number of factors starts anew, and removes what nobody came back for."""
    store, _ = made
    stale = checkpoint.Checkpoint(store.path, {"n": 1})
    with stale:
        pass
    assert stale.folder.exists()
    found = nmf(store, None, 2)

    assert found.summary["reads"] == pytest.approx(2, abs=0.01)
    assert not list((store.path / "work").glob("fit-*"))


def test_a_running_fit_is_left_alone(made):
    """One fit twice at a time is refused; another one does not touch it."""
    store, _ = made
    settings = {"n": 2}
    with checkpoint.Checkpoint(store.path, settings) as mine:
        nmf(store, None, 2)
        assert mine.folder.exists()
        with (
            pytest.raises(StoreBusy, match=r"with the same arguments is being written"),
            checkpoint.Checkpoint(store.path, settings),
        ):
            pass
    mine.clear()


def test_a_torn_state_is_not_gone_on_from(tmp_path):
    """A state that was cut off counts as none."""
    with checkpoint.Checkpoint(tmp_path, {}) as mine:
        time.sleep(0)
        assert mine.load() is None
        (mine.folder / "state.npz").write_bytes(b"PK\x03\x04torn")
        assert mine.load() is None


def test_a_failure_leaves_no_state(tmp_path):
    """NaN can never be factorised, so nothing is kept to go on from."""
    values, _ = planted(2000)
    values[1433, 60] = np.nan
    store = synthetic_store(tmp_path / "store", sites_of(values))

    with pytest.raises(NonFiniteActivation, match=r"mlp_post\.1 of .* is nan at row_id = .* 15;"):
        nmf(store, None, 2)
    assert not list((store.path / "work").glob("fit-*"))


# -- arguments -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"signed": True}, r"signed = True needs active=, the share of a row's scores"),
        ({"active": 0.1}, r"active = 0\.1 limits the scores of signed=True only"),
        ({"signed": True, "active": 1.5}, r"active = 1\.5 is no share; expected more than 0"),
        ({"signed": True, "active": 0.1, "mode": "ecco"}, r"mode = 'ecco' clips values at zero"),
        ({"mode": "ekko"}, r"mode = 'ekko' is unknown; expected 'ecco' or None"),
        ({"bound": "rough"}, r"bound = 'rough' is unknown; expected 'exact' or None"),
        ({"tolerance": 0}, r"tolerance = 0 cannot be reached"),
        ({"passes": 0}, r"passes = 0 is too few; expected 1 or more, or a tolerance="),
        ({"n_components": [2, 2]}, r"n_components = \[2, 2\] cannot be used; expected a whole"),
        ({"n_components": []}, r"n_components = \[\] cannot be used"),
        ({"seed": -1}, r"seed = -1 was given; expected 0"),
        ({"start": np.ones((2, 89))}, r"start = an array of shape \(2, 89\); expected .*\(2, 90\)"),
        ({"start": -np.ones((2, 90))}, r"start = loadings that are negative or not finite"),
        ({"n_components": 91}, r"n_components = 91 cannot be used; expected 1 … 90 for 90 neurons"),
    ],
)
def test_arguments_are_refused(made, options, message):
    """What cannot be used is refused before any work, with what can."""
    with pytest.raises(ArgumentError, match=message):
        nmf(made[0], None, **{"n_components": 2, **options})


def test_more_factors_than_rows_are_refused(tmp_path):
    """There are no more factors than rows."""
    store = synthetic_store(tmp_path / "store", {"mlp_post.0": np.ones((20, 40))})

    with pytest.raises(ArgumentError, match=r"n_components = 30 cannot be used; expected 1 … 19"):
        nmf(store, None, 30)


def test_a_bound_of_too_many_neurons_is_refused(tmp_path):
    """A Gram of all neurons has its limit; the message says what to leave out."""
    store = synthetic_store(tmp_path / "store", {"mlp_post.0": np.ones((90, 20_001), np.float16)})

    with pytest.raises(ArgumentError, match=r"Gram of all 20,001 neurons; expected at most 20,000"):
        nmf(store, None, 2, bound="exact", budget="1GB")
