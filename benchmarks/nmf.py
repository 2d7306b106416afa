"""Out-of-core NMF against scikit-learn on real activations: ``python -m benchmarks.nmf``.

The matrix is MiniLM's mlp_post.0-5 over the latest State of the Union speeches, 65,536 rows of
9,216 neurons, clipped at zero and scaled to equal energy by site.  Ours reads the store, from the
page cache as far as the system leaves it there; its seconds hold the start, the passes, and the
scores of every row written back, and "fit" is what leads to the loadings.  scikit-learn gets the
matrix in memory, ready, and its rows mixed for `partial_fit`; its seconds hold the fit alone, and
scores would come on top.
Errors are computed again for everybody's loadings, with converged codes and the residual itself.

``--only`` chooses tables: ``methods``; ``reads``, the error after two reads and after three against
the best known; ``descent``, time to 1.003 x best against NMF(cd) from the same start; ``together``,
many fits in the same reads; ``dask``; ``kept``, the store against the same scan of an array in
memory; ``products``, their rate against the best of square ones; ``memory``, a matrix 20 times the
budget, and half as many rows; ``stability``.  On request alone: ``best``, ours to a KKT residual of
1e-4 and NMF(cd) to a tolerance of 1e-6, from one start and from two random ones (an hour); and
``peers``, with ``--peers DIR`` (`benchmarks.peers.install`).
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
import torch
from rich.console import Console
from rich.table import Table
from sklearn.decomposition import NMF, MiniBatchNMF

from actstore.decompose import nmf, stability
from actstore.decompose.checkpoint import Checkpoint
from actstore.decompose.clock import Clock
from actstore.decompose.codes import solve_codes
from actstore.decompose.engine import Engine
from actstore.decompose.fit import Fit, Settings
from actstore.decompose.scan import BLOCK_ROWS, Scan
from actstore.store import CoreStore
from benchmarks._made_stores import MadeStore, jittered
from benchmarks._minilm import minilm_store
from benchmarks._nmf_matrix import Loadings, blocks, error, matrix, scales, tiny_store
from benchmarks.peers.install import python_of

_PARTIAL_ROWS = 512  # the best error of 512 … 16,384
_CD_ITERATIONS = 30
_BEST = {(65_276, 9_216, 32): 0.712917}
"""The lowest error known of rows, neurons and factors: NMF(cd) to 1e-6 from NNDSVDa of a sample."""
_START_ROWS = 16_384
_CD_STEP = 5
_MOST_ITERATIONS = 400
_WITHIN = 1.003
_SQUARE = 1536


@dataclass(frozen=True)
class _Run:
    """One fit: its loadings and what it cost."""

    loadings: Loadings
    fit_seconds: float
    seconds: float
    cpu_seconds: float
    peak_bytes: int


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="synthetic data, for the tests")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each method, alternating")
    parser.add_argument("--components", type=int, default=32)
    parser.add_argument("--only", choices=_TABLES, action="append", help="may be given repeatedly")
    parser.add_argument("--peers", type=Path, help="where benchmarks.peers.install put them")
    options = parser.parse_args(argv)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    with tempfile.TemporaryDirectory(prefix="actstore-bench-") as folder:
        if options.tiny:
            store = tiny_store(Path(folder) / "store")
            case = _Case(store, 6, 1, [3], [0, 1], Path(folder), None, (8192,))
        else:
            # Kept between runs: making it takes longer than the benchmark.
            path = Path(tempfile.gettempdir()) / "actstore-benchmark-nmf" / "store"
            case = _Case(
                minilm_store(path, 65_536, ["mlp_post"]),
                options.components,
                options.rounds,
                [8, 16, 32, 64],
                [0, 1, 2, 3, 4],
                Path(folder),
                options.peers,
                (1 << 18, 1 << 19),
            )
        for name in options.only or [name for name in _TABLES if name not in _ON_REQUEST]:
            _TABLES[name](case)


@dataclass(frozen=True)
class _Case:
    """What the tables are of."""

    store: CoreStore
    k: int
    """Number of factors."""
    rounds: int
    """Runs of each method."""
    ks: list[int]
    seeds: list[int]
    """Fits together."""
    folder: Path
    """For what is made on the way."""
    peers: Path | None
    """Where peers are installed."""
    large: tuple[int, ...]
    """Rows of the stores that memory is measured on, the largest last."""

    @functools.cached_property
    def n_rows(self) -> int:
        return self.store.rows().n_rows

    @functools.cached_property
    def width(self) -> int:
        return sum(info.width for info in self.store.select(None))

    @functools.cached_property
    def scales(self) -> list[float]:
        return scales(self.store)

    @functools.cached_property
    def best(self) -> float:
        """The lowest error known; of a matrix that is not in the ledger, that of a long fit."""
        known = _BEST.get((self.n_rows, self.width, self.k))
        return known or self.error(self.fit(tolerance=1e-4)[0])

    def fit(self, k: int | None = None, **options: Any) -> tuple[Loadings, float]:
        """Return our loadings, and seconds, all counted."""
        began = time.perf_counter()
        factors = nmf(self.store, None, k or self.k, **options)
        seconds = time.perf_counter() - began
        loadings = factors.loadings
        shutil.rmtree(factors.result.path)
        return loadings, seconds

    def error(self, loadings: Loadings) -> float:
        return error(self.store, self.scales, loadings)


def _together(case: _Case) -> None:
    """Print what many fits cost in the same reads, against one after the other."""
    store, ks, seeds = case.store, case.ks, case.seeds
    began = time.perf_counter()
    fits = nmf(store, None, ks, seed=seeds)
    together = time.perf_counter() - began
    began = time.perf_counter()
    fits += [nmf(store, None, k, seed=seed) for k in ks for seed in seeds]
    apart = time.perf_counter() - began
    for factors in fits:
        shutil.rmtree(factors.result.path)
    print(
        f"{len(ks) * len(seeds)} fits (k = {', '.join(map(str, ks))}; {len(seeds)} seeds): "
        f"together {together:.1f} s, apart {apart:.1f} s, {together / apart:.2f}x"
    )


def _on_dask(case: _Case) -> None:
    """Print what two one-thread workers take, against two threads of one process."""
    store, k, rounds = case.store, case.k, case.rounds
    seconds: dict[str, list[float]] = {"here": [], "dask": []}
    with Engine.on(workers=2) as on_dask:
        engines = {"here": Engine.local(), "dask": on_dask}
        nmf_once = functools.partial(nmf, store, None, k)
        for engine in engines.values():  # workers load what they need once
            shutil.rmtree(nmf_once(engine=engine).result.path)
        loadings = {}
        for _ in range(rounds):
            for name, engine in engines.items():
                began = time.perf_counter()
                factors = nmf_once(engine=engine)
                seconds[name].append(time.perf_counter() - began)
                loadings[name] = factors.loadings
                shutil.rmtree(factors.result.path)
    here, dask = (statistics.median(seconds[name]) for name in ("here", "dask"))
    apart = np.abs(loadings["here"] - loadings["dask"]).max()
    print(
        f"Dask, 2 workers of one thread: {dask:.1f} s; 2 threads of one process: {here:.1f} s; "
        f"{dask / here:.2f}x; loadings differ by {apart:.1e} at most"
    )


def _compare(case: _Case) -> None:
    store, k, rounds, scales = case.store, case.k, case.rounds, case.scales
    methods: dict[str, Callable[[], _Run]] = {
        "ours, 1 pass + exact": lambda: _ours(store, k, passes=1),
        "ours, 2 passes + exact": lambda: _ours(store, k, passes=2),
        f"MiniBatchNMF.partial_fit, 1 epoch of {_PARTIAL_ROWS} rows": lambda: _partial_fit(
            store, scales, k
        ),
        f"NMF(cd), {_CD_ITERATIONS} iterations": lambda: _coordinate_descent(store, scales, k),
    }
    runs: dict[str, list[_Run]] = {name: [] for name in methods}
    for _ in range(rounds):
        for name, run in methods.items():
            runs[name].append(run())
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("torch", "scikit-learn", "numpy")
    )
    table = Table(
        title=f"NMF of {case.n_rows:,} x {case.width:,}, k = {k}, "
        f"{torch.get_num_threads()} threads, median of {rounds}",
        caption=versions,
    )
    for column in ("method", "fit s", "all s", "CPU s", "error", "peak MB", "time", "memory"):
        table.add_column(column, justify="left" if column == "method" else "right")
    baseline = f"MiniBatchNMF.partial_fit, 1 epoch of {_PARTIAL_ROWS} rows"
    seconds = {name: statistics.median(run.seconds for run in runs[name]) for name in runs}
    peaks = {name: max(run.peak_bytes for run in runs[name]) for name in runs}
    for name, found in runs.items():
        table.add_row(
            name,
            f"{statistics.median(run.fit_seconds for run in found):.1f}",
            f"{seconds[name]:.1f}",
            f"{statistics.median(run.cpu_seconds for run in found):.1f}",
            f"{case.error(found[0].loadings):.4f}",
            f"{peaks[name] / 1e6:,.0f}",
            f"{seconds[name] / seconds[baseline]:.2f}x",
            f"{peaks[name] / peaks[baseline]:.2f}x",
        )
    Console(width=110).print(table)


def _reads(case: _Case) -> None:
    """Print the error after two reads and after three, against the best."""
    for passes in (1, 2):
        loadings, seconds = case.fit(passes=passes)
        found = case.error(loadings)
        print(
            f"{passes + 1} reads: {seconds:.1f} s, error {found:.6f}, "
            f"{found / case.best:.5f} x best ({case.best:.6f})"
        )


def _sampled_start(case: _Case, values: npt.NDArray[np.float32]) -> Loadings:
    """Return NNDSVDa loadings of a sample, as scikit-learn finds them."""
    some = np.linspace(0, len(values) - 1, min(len(values), _START_ROWS)).astype(int)
    model = NMF(case.k, init="nndsvda", max_iter=1, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one iteration is what is wanted
        return model.fit(values[some]).components_


def _descend(
    case: _Case, values: npt.NDArray[np.float32], start: Loadings, target: float
) -> tuple[float, float, int]:
    """Run NMF(cd) to an error; return seconds, the error, and iterations."""
    began = time.perf_counter()
    weights = torch.from_numpy(start)
    codes = torch.cat(
        [
            solve_codes(weights @ part.T, weights @ weights.T, n_sweeps=20)[0].T
            for part in torch.from_numpy(values).split(2048)
        ]
    ).numpy()
    seconds = time.perf_counter() - began
    iterations, found = 0, 1.0
    while found > target and iterations < _MOST_ITERATIONS:
        iterations += _CD_STEP
        began = time.perf_counter()
        model = NMF(case.k, init="custom", max_iter=_CD_STEP, tol=0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it was stopped is the point
            codes = model.fit_transform(values, W=codes, H=start)
        start = model.components_
        seconds += time.perf_counter() - began
        found = case.error(model.components_.astype(np.float32))  # its own is of float32 sums
    return seconds, found, iterations


def _against_descent(case: _Case) -> None:
    """Print the time to within 1.003 of the best, ours and NMF(cd)'s, from the same loadings."""
    values = matrix(case.store, case.scales)
    start = _sampled_start(case, values)
    target = _WITHIN * case.best
    ours: list[float] = []
    for _ in range(case.rounds):
        for passes in (1, 2, 3):
            loadings, spent = case.fit(start=start, passes=passes)
            found = case.error(loadings)
            if found <= target:
                break
        ours.append(spent)
    theirs, their_error, iterations = _descend(case, values, start, target)
    seconds = statistics.median(ours)
    print(
        f"to {_WITHIN} x best from the same start: ours {seconds:.1f} s ({passes} passes and the "
        f"exact one, error {found:.5f}), NMF(cd) {theirs:.1f} s ({iterations} iterations, error "
        f"{their_error:.5f}); {seconds / theirs:.3f}x"
    )


def _best(case: _Case) -> None:
    """Print the lowest errors that long fits find."""
    values = matrix(case.store, case.scales)
    starts = {"NNDSVDa of a sample": _sampled_start(case, values)}
    for seed in (1, 2):
        random = np.random.default_rng(seed).random((case.k, case.width), np.float32)
        starts[f"random {seed}"] = random * np.float32(values.mean())
    for name, start in starts.items():
        loadings, seconds = case.fit(start=start, tolerance=1e-4, max_passes=1000)
        print(f"ours to KKT 1e-4, {name}: error {case.error(loadings):.6f}, {seconds:.0f} s")
        began = time.perf_counter()
        codes = np.full((len(values), case.k), values.mean(), np.float32)
        model = NMF(case.k, init="custom", max_iter=1000, tol=1e-6)
        model.fit_transform(values, W=codes, H=start.copy())
        seconds = time.perf_counter() - began
        found = case.error(model.components_.astype(np.float32))
        print(f"NMF(cd) to 1e-6, {name}: error {found:.6f}, {seconds:.0f} s")


def _kept(case: _Case) -> None:
    """Print what a fit takes from the store, and from the same rows in memory."""
    settings = Settings(((case.k, 0),), True, None, 1, None, 1)
    infos, rows = case.store.select(None), case.store.rows()
    budget = 4 * 2**30 + 2 * case.n_rows * sum(info.row_bytes for info in infos)
    seconds: dict[str, list[float]] = {"store": [], "memory": []}
    for _ in range(case.rounds):
        for name, spent in seconds.items():
            scan = Scan(case.store, infos, rows, budget_bytes=budget)
            if name == "memory":
                scan = scan.kept(np.arange(scan.n_rows))
            with Checkpoint(case.store.path, {"benchmark": name}) as checkpoint:
                began = time.perf_counter()
                Fit(scan, settings, Engine.local(), checkpoint, Clock(None), None).run()
                spent.append(time.perf_counter() - began)
                checkpoint.clear()
    store, memory = (statistics.median(seconds[name]) for name in ("store", "memory"))
    print(f"fit from the store {store:.2f} s, from memory {memory:.2f} s, {store / memory:.2f}x")


def _products(case: _Case) -> None:
    """Print the rate of a fit's products, threads as the fit has them, against square ones."""
    k, n_threads = min(64, case.width), torch.get_num_threads()
    for dtype in (torch.bfloat16, torch.float32):
        square = torch.rand(_SQUARE, _SQUARE).to(dtype)
        best = 2 * _SQUARE**3 / _fastest(lambda square=square: square @ square)
        stack = torch.rand(k + 1, case.width).to(dtype)
        blocks = [torch.rand(BLOCK_ROWS, case.width).to(dtype) for _ in range(4 * n_threads)]
        left = torch.rand(k + 1, BLOCK_ROWS).to(dtype)

        def both(rows, stack=stack, left=left):
            return rows @ stack.T, left @ rows

        one = {"initializer": torch.set_num_threads, "initargs": (1,)}
        with ThreadPoolExecutor(n_threads, **one) as pool:
            spent = _fastest(lambda pool=pool, blocks=blocks, both=both: [*pool.map(both, blocks)])
        rate = len(blocks) * 4 * BLOCK_ROWS * (k + 1) * case.width / spent
        print(
            f"{dtype}: products of a fit of {k} factors {rate / 1e9:.0f} GFLOP/s, square ones "
            f"{best / 1e9:.0f} GFLOP/s, {rate / best:.2f}"
        )


def _fastest(call: Callable[[], Any], n: int = 7) -> float:
    """Return the least of some times, in seconds."""
    spent = []
    for _ in range(n):
        began = time.perf_counter()
        call()
        spent.append(time.perf_counter() - began)
    return min(spent)


_FIT_ALONE = """
import json, sys, time
import numpy as np
import actstore.decompose
from actstore.store import CoreStore, Rows
from benchmarks.peers.harness import memory

store, k, budget = CoreStore(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
some = Rows.from_row_ids("some", store.meta.segment_rows, np.arange(1, 500))
actstore.decompose.nmf(store, None, 2, rows=some, budget=budget, name="warm")
before = memory("VmRSS")
open("/proc/self/clear_refs", "w").write("5")
began = time.perf_counter()
actstore.decompose.nmf(store, None, k, budget=budget, name="measured")
print(json.dumps([time.perf_counter() - began, memory("VmHWM") - before]))
"""


def _memory(case: _Case) -> None:
    """Print the peak memory of fits to a matrix 20 times the budget, and to half of its rows."""
    segment_rows = min(1 << 14, case.large[0] // 4)
    values = np.random.default_rng(0).normal(size=(4096, case.width)) - 1
    base = np.maximum(values, 0).astype(np.float16)
    del values
    for n_rows in case.large:
        path = case.folder / f"large-{n_rows}"
        sites = {"mlp_post.0": case.width}
        made = MadeStore(path, n_rows // segment_rows, sites, 1.0, segment_rows)
        made.commit_rows(jittered(base, segment_rows, 0))
        stored = 2 * n_rows * case.width
        # 20 times the budget of the larger one; the same for both.
        budget = max(96 * 2**20, 2 * case.large[-1] * case.width // 20)
        done = subprocess.run(
            [sys.executable, "-c", _FIT_ALONE, str(path), str(case.k), str(budget)],
            cwd=Path(__file__).parents[1],
            check=True,
            capture_output=True,
            text=True,
        )
        seconds, peak = json.loads(done.stdout.splitlines()[-1])
        print(
            f"{n_rows:,} rows, {stored / 1e9:.2f} GB, budget {budget / 1e6:.0f} MB: peak "
            f"{peak / 1e6:.0f} MB, {peak / budget:.2f} of it, {seconds:.1f} s"
        )
        shutil.rmtree(path)


def _stability(case: _Case) -> None:
    """Print what stability takes against one fit, the null's fits apart, and what it finds."""
    for _ in range(case.rounds):
        began = time.perf_counter()
        factors = nmf(case.store, None, case.k)
        one = time.perf_counter() - began
        began = time.perf_counter()
        found = stability(factors, seeds=len(case.seeds))
        nulls = found.summary["seconds"]["nulls"]
        fits = time.perf_counter() - began - nulls
        print(
            f"stability: one fit {one:.1f} s; {len(case.seeds)} seeds x 2 halves {fits:.1f} s, "
            f"{fits / one:.2f}x; 2 nulls {nulls:.1f} s; {found!r}"
        )
        shutil.rmtree(found.result.path)
        shutil.rmtree(factors.result.path)


def _peers(case: _Case) -> None:
    """Print what the peers take to come within 1.003 of the best, in memory, and what ours does."""
    if case.peers is None:
        raise SystemExit("--only peers needs --peers DIR; see benchmarks.peers.install")
    target = _WITHIN * case.best
    loadings, seconds = case.fit()
    print(f"ours: {seconds:.1f} s, error {case.error(loadings):.5f}")
    np.save(case.folder / "matrix.npy", matrix(case.store, case.scales))
    for peer in ("nmf-torch", "overcomplete"):
        for iterations in (10, 20, 40, 80):
            out = case.folder / "loadings.npy"
            done = subprocess.run(
                [
                    *(str(python_of(case.peers, peer)), "-m", "benchmarks.peers.nmf", peer),
                    *(str(case.folder / "matrix.npy"), str(out), str(case.k), str(iterations)),
                    str(torch.get_num_threads()),
                ],
                cwd=Path(__file__).parents[1],
                check=True,
                capture_output=True,
                text=True,
            )
            spent = float(done.stdout.splitlines()[-1])
            found = case.error(np.load(out))
            print(f"{peer}, {iterations} iterations: {spent:.1f} s, error {found:.5f}")
            if found <= target:
                break


_TABLES: dict[str, Callable[[_Case], None]] = {
    "methods": _compare,
    "reads": _reads,
    "descent": _against_descent,
    "together": _together,
    "dask": _on_dask,
    "kept": _kept,
    "products": _products,
    "memory": _memory,
    "stability": _stability,
    "best": _best,
    "peers": _peers,
}
_ON_REQUEST = ("best", "peers")


# -- methods -----------------------------------------------------------------------------------


def _ours(store: CoreStore, k: int, passes: int) -> _Run:
    for _ in blocks(store):
        pass  # into the page cache, as the others have the matrix in memory
    memory = _Memory()
    start, cpu = time.perf_counter(), time.process_time()
    factors = nmf(store, None, k, passes=passes)
    stages = factors.summary["seconds"]
    run = _Run(
        factors.loadings,
        sum(spent for stage, spent in stages.items() if stage not in ("exact pass", "write")),
        time.perf_counter() - start,
        time.process_time() - cpu,
        memory.peak_bytes(),
    )
    shutil.rmtree(factors.result.path)
    return run


def _partial_fit(store: CoreStore, scales: Sequence[float], k: int) -> _Run:
    memory = _Memory()
    values = matrix(store, scales, mixed=True)
    start, cpu = time.perf_counter(), time.process_time()
    model = MiniBatchNMF(k, batch_size=_PARTIAL_ROWS, random_state=0)
    for first in range(0, len(values), _PARTIAL_ROWS):
        model.partial_fit(values[first : first + _PARTIAL_ROWS])
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
    return _Run(model.components_, seconds, seconds, cpu_seconds, memory.peak_bytes())


def _coordinate_descent(store: CoreStore, scales: Sequence[float], k: int) -> _Run:
    memory = _Memory()
    values = matrix(store, scales)
    start, cpu = time.perf_counter(), time.process_time()
    model = NMF(k, init="nndsvda", max_iter=_CD_ITERATIONS, tol=0, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it was stopped is the point
        model.fit(values)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
    return _Run(model.components_, seconds, seconds, cpu_seconds, memory.peak_bytes())


class _Memory:
    """Peak resident memory since it was made, above what was resident then."""

    def __init__(self) -> None:
        self._before = psutil.Process().memory_info().rss
        Path("/proc/self/clear_refs").write_text("5")

    def peak_bytes(self) -> int:
        """Return the bytes."""
        status = Path("/proc/self/status").read_text()
        peak = int(re.search(r"VmHWM:\s+(\d+)", status)[1]) * 1024
        return peak - self._before


if __name__ == "__main__":
    main()
