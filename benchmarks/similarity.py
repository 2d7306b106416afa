"""Similarity of layers against its peers' arithmetic: ``python -m benchmarks.similarity``.

Peers are written from their formulas, with their best settings here, on the same rows and threads:
torch_cka computes the second Gram of every pair anew and takes ``trace(K L)`` of a full product;
google/svcca, which Ecco ships, computes a covariance, two pseudo-inverses and a decomposition for
every pair.  Runs alternate, and of several the median counts.

Rows of the table, each alone with ``--only``: ``batch``, ``estimate``, ``seeds``, ``coverage``,
``precision``, ``order``, ``cca``, ``gram``, ``memory``.  ``seeds`` and ``coverage`` are not run
unless named: they take hundreds of runs.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
import torch
from rich.console import Console
from rich.table import Table

from actstore.decompose import similarity
from actstore.decompose.cka import Contributions, estimate
from actstore.decompose.engine import Engine
from actstore.decompose.moments import Frame, frame_of
from actstore.decompose.scan import Block, Scan
from actstore.store import CoreStore, Rows
from benchmarks._minilm import minilm_store
from tests.decompose.references import debiased_cka
from tests.synthetic import synthetic_store

_ALWAYS = ("batch", "estimate", "precision", "order", "cca", "gram", "memory")
_LONG = ("seeds", "coverage")


class Report:
    """Lines of the table."""

    def __init__(self, title: str) -> None:
        self.table = Table(title=title)
        for column in ("what", "ours", "against", "figure", "must"):
            self.table.add_column(column, overflow="fold")

    def add(self, what: str, ours: str, against: str, figure: str, must: str) -> None:
        """Add a line."""
        self.table.add_row(what, ours, against, figure, must)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="synthetic data, for the tests")
    parser.add_argument("--only", action="append", choices=[*_ALWAYS, *_LONG])
    parser.add_argument("--rounds", type=int, default=3, help="runs of each, alternating")
    parser.add_argument("--trials", type=int, default=1000, help="of coverage")
    options = parser.parse_args(argv)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    report = Report(f"similarity, {torch.get_num_threads()} threads, median of {options.rounds}")
    with tempfile.TemporaryDirectory(prefix="actstore-bench-") as folder:
        _run(options, report, Path(folder))
    Console(width=130).print(report.table)


def _run(options: argparse.Namespace, report: Report, folder: Path) -> None:
    tiny, rounds = options.tiny, 1 if options.tiny else options.rounds
    wanted = options.only or (_ALWAYS + _LONG if tiny else _ALWAYS)
    store = None
    if set(wanted) & {"estimate", "seeds", "precision", "order", "gram", "memory"}:
        # Kept between runs: making it takes longer than the benchmark.
        kept = Path(tempfile.gettempdir()) / "actstore-benchmark-similarity" / "store"
        store = (
            _tiny_store(folder / "store")
            if tiny
            else minilm_store(kept, 65_536, ["mlp_post", "resid_post"])
        )
    runs: dict[str, Callable[[], None]] = {
        "batch": lambda: _batch(report, *((3, 24, 32) if tiny else (24, 3072, 256)), rounds),
        "estimate": lambda: _estimate(report, store, rounds),
        "seeds": lambda: _seeds(report, store, 3 if tiny else 50),
        "coverage": lambda: _coverage(report, 3 if tiny else options.trials),
        "precision": lambda: _precision(report, store, 500 if tiny else 6000),
        "order": lambda: _order(report, store, folder),
        "cca": lambda: _cca(report, folder, *((3, 12, 600) if tiny else (12, 768, 16_384)), rounds),
        "gram": lambda: _gram(report, store, rounds),
        "memory": lambda: _memory(report, store),
    }
    for name in runs:
        if name in wanted:
            runs[name]()


def _timed(*calls: Callable[[], Any], rounds: int) -> list[float]:
    """Return median seconds of calls that alternate."""
    seconds: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, spent in zip(calls, seconds, strict=True):
            start = time.perf_counter()
            call()
            spent.append(time.perf_counter() - start)
    return [statistics.median(spent) for spent in seconds]


def _similarity(store: CoreStore, sites: Any = None, **options: Any) -> Any:
    """Return a similarity whose result is gone again, with its matrices read."""
    found = similarity(store, sites, **options)
    matrices = {n: getattr(found, n) for n in ("matrix", "low", "high", "text_low", "text_high")}
    summary = found.summary
    shutil.rmtree(found.result.path)
    return matrices, summary


# -- rows of the table ---------------------------------------------------------------------------


def _batch(report: Report, n_sites: int, width: int, n: int, rounds: int) -> None:
    """A batch of the estimate against torch_cka's arithmetic."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(n, n_sites * width, generator=generator)
    sites = tuple(slice(width * i, width * (i + 1)) for i in range(n_sites))
    ids = np.arange(n)
    frame = Frame(torch.zeros(values.shape[1]), torch.ones(values.shape[1]))
    work = Contributions(sites, frame, ids, ids % 20, 20)

    def hsic(k: torch.Tensor, l_: torch.Tensor) -> float:
        ones = torch.ones(n, 1)
        found = torch.trace(k @ l_)
        found += (ones.T @ k @ ones @ ones.T @ l_ @ ones / ((n - 1) * (n - 2))).item()
        found -= (ones.T @ k @ l_ @ ones * 2 / (n - 2)).item()
        return float(found / (n * (n - 3)))

    def torch_cka() -> None:
        for a in sites:
            x = values[:, a]
            k = (x @ x.T).fill_diagonal_(0)
            hsic(k, k)
            for b in sites:
                y = values[:, b]
                l_ = (y @ y.T).fill_diagonal_(0)
                hsic(k, l_), hsic(l_, l_)

    copy = torch.empty_like(values)
    ours, theirs = _timed(lambda: work([Block(copy.copy_(values), ids)]), torch_cka, rounds=rounds)
    report.add(
        f"one batch, {n_sites} sites x {width}, n = {n}",
        f"{ours * 1e3:.0f} ms",
        f"torch_cka {theirs * 1e3:.0f} ms",
        f"{theirs / ours:.1f}x",
        ">= 20x",
    )


def _estimate(report: Report, store: CoreStore, rounds: int) -> None:
    """The estimate to ±0.005 against exact all pairs."""
    found: dict[str, Any] = {}

    def ours() -> None:
        found["estimate"] = _similarity(store)

    def exact() -> None:
        found["exact"] = _similarity(store, method="exact")

    fast, slow = _timed(ours, exact, rounds=rounds)
    error = np.abs(found["estimate"][0]["matrix"] - found["exact"][0]["matrix"]).max()
    summary = found["estimate"][1]
    report.add(
        f"estimate to ± 0.005, {len(store.sites)} sites, {summary['n_rows']:,} rows",
        f"{fast:.2f} s, {summary['n_batches']} batches, {summary['stopped']}, "
        f"± {summary['half_width']:.4f}, error {error:.4f}",
        f"exact {slow:.1f} s",
        f"{slow / fast:.1f}x",
        ">= 15x",
    )


def _seeds(report: Report, store: CoreStore, n_seeds: int) -> None:
    """How often intervals hold the exact value."""
    exact = _similarity(store, method="exact")[0]["matrix"]
    pairs = np.triu_indices(len(exact), 1)
    held, batches = [], []
    for seed in range(n_seeds):
        found, summary = _similarity(store, seed=seed)
        held.append(np.mean(((found["low"] <= exact) & (exact <= found["high"]))[pairs]))
        batches.append(summary["n_batches"])
    report.add(
        f"{n_seeds} seeds: pairs whose interval holds the exact value",
        f"{np.mean(held):.1%} (least {min(held):.0%}), {np.median(batches):.0f} batches",
        "",
        f"{np.mean(held):.1%}",
        "93-97 %",
    )


def _coverage(report: Report, n_trials: int) -> None:
    """Both intervals over stores of rows that are alike within documents."""
    rng = np.random.default_rng(0)
    maps = rng.normal(size=(3, 16, 24)) / 4

    def text(seed: int, n_documents: int) -> tuple[list[npt.NDArray[np.float64]], Any]:
        own = np.random.default_rng([seed, 7])
        owner = np.repeat(np.arange(n_documents), 40)
        hidden = own.normal(size=(len(owner), 16)) + own.normal(size=(n_documents, 16))[owner]
        hidden *= own.gamma(4, 0.25, size=(n_documents, 1))[owner]
        sites = [hidden @ maps[0]]
        for step in maps[1:]:
            hidden = hidden + 0.7 * own.normal(size=hidden.shape)
            sites.append(hidden @ step)
        return sites, owner

    truth = _plain_cka(text(10**6, 20_000)[0])
    pairs = np.triu_indices(3, 1)
    held_store, held_text = [], []
    for trial in range(n_trials):
        sites, owner = text(trial, 100)
        with tempfile.TemporaryDirectory(prefix="actstore-bench-") as folder:
            values = {f"mlp_post.{i}": site for i, site in enumerate(sites)}
            store = synthetic_store(
                Path(folder) / "s", values, dtype="float32", documents=[40] * 100, special=False
            )
            ids = store.rows("all").row_ids()
            scan = Scan(store, store.select(None), store.rows("all"), budget_bytes=2**28)
            found = estimate(
                scan,
                frame_of(scan, Engine.local(), False),
                Engine.local(),
                lambda rows, ids=ids, owner=owner: owner[np.searchsorted(ids, rows)],
                batch_rows=128,
                max_batches=10,
                tolerance=0,
                seed=trial,
            )
        exact = debiased_cka(sites)
        held_store.append((np.abs(found.value - exact) <= found.half_width)[pairs])
        held_text.append((np.abs(found.value - truth) <= found.text_half_width)[pairs])
    report.add(
        f"coverage, {n_trials} stores of 100 documents x 40 alike rows, 1,280 of 4,000 read",
        f"this store {np.mean(held_store):.1%}, text like this {np.mean(held_text):.1%}",
        "",
        f"{np.mean(held_store):.1%}, {np.mean(held_text):.1%}",
        "93-97 %, >= 92 %",
    )


def _plain_cka(sites: Sequence[npt.NDArray[np.float64]]) -> npt.NDArray[np.float64]:
    """Return CKA of so many rows that its bias is of no account."""
    centred = [site - site.mean(0) for site in sites]
    cross = np.array([[np.square(x.T @ y).sum() for y in centred] for x in centred])
    own = np.diagonal(cross)
    return cross / np.sqrt(np.outer(own, own))


def _precision(report: Report, store: CoreStore, n_rows: int) -> None:
    """Exact debiased CKA against float64."""
    ids = np.random.default_rng(0).permutation(store.rows().row_ids())[:n_rows]
    rows = Rows.from_row_ids("a sample", store.meta.segment_rows, ids)
    chosen = store.select(None)[:: max(1, len(store.sites) // 4)]
    names = [info.site for info in chosen]
    found = _similarity(store, names, rows=rows, method="exact")[0]["matrix"]
    ids = rows.row_ids()
    expected = debiased_cka([store[name][ids].astype(np.float64) for name in names])
    report.add(
        f"exact debiased CKA, {len(names)} sites, {rows.n_rows:,} rows",
        "",
        "float64, full kernels",
        f"{np.abs(found - expected).max():.1e}",
        "<= 1e-6",
    )


def _order(report: Report, store: CoreStore, folder: Path) -> None:
    """The same rows in document order and shuffled."""
    chosen = store.select(None)[:: max(1, len(store.sites) // 4)]
    names = [str(info.site) for info in chosen]
    ids = store.rows().row_ids()
    mixed = np.random.default_rng(0).permutation(ids)
    values = {name: store[name][ids][np.argsort(mixed)] for name in names}
    other = synthetic_store(
        folder / "mixed",
        values,
        documents=[len(ids)],
        special=False,
        context=256,
        segment_rows=16_384,
        dtype={name: info.dtype for name, info in zip(names, chosen, strict=True)},
    )
    first, _ = _similarity(store, names)
    second, _ = _similarity(other, names, rows="all")
    apart = np.abs(first["matrix"] - second["matrix"])
    width = (first["high"] - first["low"] + second["high"] - second["low"]) / 2
    within = np.mean((apart <= width)[np.triu_indices(len(names), 1)])
    report.add(
        f"document order and shuffled, {len(names)} sites",
        f"{apart.max():.4f} apart at most, {within:.0%} of pairs within both intervals",
        "",
        f"{within:.0%}",
        "within the interval",
    )


def _cca(report: Report, folder: Path, n_sites: int, width: int, n_rows: int, rounds: int) -> None:
    """The CCA family against google/svcca's formulas, pair by pair."""
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(n_rows, width))
    values = {}
    for layer in range(n_sites):
        values[f"resid_post.{layer}"] = (hidden + 2).astype(np.float32)
        hidden = 0.9 * hidden + 0.4 * rng.normal(size=hidden.shape)
    store = synthetic_store(
        folder / "cca",
        values,
        dtype="float32",
        special=False,
        context=256,
        documents=[100] * (n_rows // 100) + ([n_rows % 100] if n_rows % 100 else []),
        segment_rows=4096,
        chunk_rows=1024,
    )
    rows = store.rows("all")
    blocks = [store[site][rows.row_ids()].astype(np.float64).T for site in store.sites]
    theirs: dict[str, float] = {}

    def google(x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]) -> tuple[float, float]:
        n = len(x)
        cov = np.cov(x, y)
        xx, yy, xy = cov[:n, :n], cov[n:, n:], cov[:n, n:]
        xm, ym = np.abs(xx).max(), np.abs(yy).max()
        roots = []
        for block, most in ((xx, xm), (yy, ym)):
            values, vectors = np.linalg.eigh(np.linalg.pinv(block / most + 1e-10 * np.eye(n)))
            roots.append(vectors * np.sqrt(values) @ vectors.T)
        u, s, _ = np.linalg.svd(roots[0] @ (xy / np.sqrt(xm * ym)) @ roots[1])
        mean = x.mean(1, keepdims=True)
        q, _ = np.linalg.qr((u.T @ (x - mean) + mean).T)
        weights = np.abs(q.T @ x.T).sum(1)
        return float(s.mean()), float(weights @ s / weights.sum())

    found: dict[str, Any] = {}
    pairs = [(a, b) for a in range(n_sites) for b in range(a + 1, n_sites)]
    measured = pairs[:: max(1, len(pairs) // 6)]

    def reference() -> None:
        for a, b in measured:
            theirs[f"{a},{b}"] = google(blocks[a], blocks[b])  # type: ignore[assignment]

    def ours() -> None:
        found["pwcca"] = _similarity(store, rows="all", measure="pwcca", variant="svcca")

    def mean() -> None:
        found["cca"] = _similarity(store, rows="all", measure="cca")

    seconds, both, plain = _timed(reference, ours, mean, rounds=rounds)
    whole = seconds / len(measured) * len(pairs)
    moments = _gram_seconds(store, rows)
    apart = [
        [abs(found[m][0]["matrix"][a, b] - theirs[f"{a},{b}"][i]) for a, b in measured]
        for i, m in enumerate(("cca", "pwcca"))
    ]
    what = f"{n_sites} sites of {width}, {n_rows:,} rows, {len(pairs)} pairs"
    report.add(
        f"mean CCA, {what}, null and all",
        f"{plain:.1f} s ({moments:.1f} of moments)",
        f"google/svcca {whole:.1f} s (of {len(measured)} pairs)",
        f"{whole / plain:.1f}x with, {whole / max(plain - moments, 1e-9):.1f}x without moments",
        ">= 3x, >= 12x",
    )
    report.add(
        "PWCCA, variant svcca, the same; both orders of each pair",
        f"{both:.1f} s",
        f"{2 * whole:.1f} s; one order {whole:.1f} s",
        f"{2 * whole / both:.1f}x with, {2 * whole / max(both - moments, 1e-9):.1f}x without "
        "moments; against one order half",
        ">= 3x, >= 12x",
    )
    report.add(
        "mean CCA and PWCCA apart from google/svcca",
        "",
        "",
        f"{max(apart[0]):.1e}, {max(apart[1]):.1e}",
        "1e-8",
    )


def _gram_seconds(store: CoreStore, rows: Any) -> float:
    """Return what the pass of products alone takes."""
    from actstore.decompose.moments import tiles

    infos = store.select(None)
    scan = Scan(store, infos, rows, budget_bytes=2**32)
    frame = frame_of(scan, Engine.local(), False)
    frames = [frame.of(columns) for columns in scan.columns.values()]
    start = time.perf_counter()
    for _ in tiles(
        lambda sites, reserved: Scan(
            store, [infos[i] for i in sites], rows, budget_bytes=2**33, reserved_bytes=reserved
        ),
        [info.width for info in infos],
        frames,
        Engine.local(),
        free_bytes=2**32,
    ):
        pass
    return time.perf_counter() - start


def _gram(report: Report, store: CoreStore, rounds: int) -> None:
    """The pass of products against the best rate of a product here."""
    widths = [info.width for info in store.select(None)]
    rows = store.rows()
    side = min(4096, max(widths) * 2)
    a = torch.randn(side, side)
    b = a.numpy()
    ours, gemm, syrk = _timed(
        lambda: _gram_seconds(store, rows), lambda: a @ a, lambda: b.T @ b, rounds=rounds
    )
    # All of them counted as full products: SYRK makes half of it, and so do pairs of sites.
    best = 2 * side**3 / min(gemm, syrk)
    rate = 2 * rows.n_rows * sum(widths) ** 2 / ours
    report.add(
        f"exact pass, {rows.n_rows:,} rows x {sum(widths):,} columns",
        f"{ours:.1f} s, {rate / 1e9:.0f} GFLOP/s",
        f"GEMM {2 * side**3 / gemm / 1e9:.0f}, SYRK {2 * side**3 / syrk / 1e9:.0f} GFLOP/s",
        f"{rate / best:.2f}",
        ">= 0.6",
    )


def _memory(report: Report, store: CoreStore) -> None:
    """Peak resident memory of exact CKA, in tiles."""
    budget = 512 * 2**20
    # What products load once is no part of it.
    few = Rows.from_row_ids("few", store.meta.segment_rows, store.rows().row_ids()[:2000])
    _similarity(store, [info.site for info in store.select(None)[:2]], method="exact", rows=few)
    before = psutil.Process().memory_info().rss
    Path("/proc/self/clear_refs").write_text("5")
    _similarity(store, method="exact", budget=budget)
    status = Path("/proc/self/status").read_text()
    peak = int(re.search(r"VmHWM:\s+(\d+)", status)[1]) * 1024 - before
    report.add(
        "peak memory of exact CKA",
        f"{peak / 2**20:.0f} MiB",
        f"budget {budget / 2**20:.0f} MiB",
        f"{peak / budget:.2f}",
        "<= 1",
    )


# -- data ----------------------------------------------------------------------------------------


def _tiny_store(path: Path) -> CoreStore:
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(3000, 12))
    sites = {}
    for layer in range(3):
        sites[f"resid_post.{layer}"] = hidden @ rng.normal(size=(12, 24))
        hidden = hidden + 0.5 * rng.normal(size=hidden.shape)
    return synthetic_store(path, sites, documents=[60] * 50)


if __name__ == "__main__":
    main()
