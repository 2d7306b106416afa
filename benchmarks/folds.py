"""All folds in one compiled pass, against NumPy op by op: ``python -m benchmarks.folds [--tiny]``.

Rows are those of a six-layer model: 6 x 1,536 GELU-like and 7 x 384 normal columns, float16, in
bands of 4,096 rows, made outside the clock.  *Cold* is the first segment of a store, whose lists
are empty; *steady* is a new segment under the lists of 100,000 committed rows.  NumPy computes the
same sums, extremes, counts and candidates, chunk by chunk so that its temporaries stay in cache.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable

import numba
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from actstore.folds.cpu import BandFolds, warm_up
from actstore.folds.topk import Thresholds, TopK, TopKState

Band = NDArray[np.float16]


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.folds", description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="few rows, one round: only to run it")
    tiny = parser.parse_args(argv).tiny
    rows, n_bands, n_rounds = (64, 3, 1) if tiny else (4096, 25, 5)
    widths = [64, 32] if tiny else [1536] * 6 + [384] * 7
    data, n_threads = _Rows(widths, rows), os.cpu_count() or 1

    table = Table(title=f"folds of {sum(widths):,} columns, float16, bands of {rows:,} rows")
    for column in ("what", "us a row", "ns a value", "times NumPy's speed"):
        table.add_column(column, justify="left" if column == "what" else "right")

    started = time.perf_counter()
    warm_up()
    compiled_seconds = time.perf_counter() - started

    fold = TopK()
    committed = [fold.start(width) for width in widths]
    cold: list[float] = []
    segment = max(1, n_bands * 16 // 25)
    finished: list[float] = []
    for first in range(0, n_bands, segment):
        folds = _start(widths, n_threads, first * rows)
        mine = range(first, min(first + segment, n_bands))
        bands_seconds = [
            _seconds(lambda: _update(folds, bands, (i - first) * rows, committed))
            for i, bands in ((i, data.bands()) for i in mine)
        ]
        cold = cold or bands_seconds
        states: list[TopKState] = []
        finished.append(
            _seconds(lambda: states.extend(folds.finish(i).topk for i in range(len(widths))))
        )
        merging = _seconds(
            lambda: committed.__setitem__(
                slice(None), [fold.merge(a, b) for a, b in zip(committed, states, strict=True)]
            )
        )

    numbers: dict[str, list[float]] = {}
    thresholds = [fold.thresholds(state) for state in committed]
    for i in range(n_rounds):
        bands = data.bands()
        contestants: dict[str, Callable[[], object]] = {
            "NumPy, op by op": lambda: [
                _numpy(band, limits) for band, limits in zip(bands, thresholds, strict=True)
            ]
        }
        for n in sorted({1, n_threads}):
            folds = _start(widths, n, 0)
            contestants[f"steady, {n} threads"] = lambda folds=folds: _update(
                folds, bands, 0, committed
            )
        for name in sorted(contestants, reverse=bool(i % 2)):
            numbers.setdefault(name, []).append(_seconds(contestants[name]))
    medians = {name: statistics.median(times) for name, times in numbers.items()}
    medians[f"cold, {n_threads} threads: first band"] = cold[0]
    medians[f"cold, {n_threads} threads: first {segment} bands"] = statistics.mean(cold)
    for name, seconds in medians.items():
        per_row = seconds / rows
        table.add_row(
            name,
            f"{per_row * 1e6:.2f}",
            f"{per_row / sum(widths) * 1e9:.3f}",
            f"{medians['NumPy, op by op'] / seconds:.1f}",
        )
    console = Console()
    console.print(table)
    console.print(
        f"per segment: lists finished in {max(finished) * 1e3:.0f} ms, merged in "
        f"{merging * 1e3:.0f} ms; running state {folds.n_bytes / 1e6:.0f} MB; "
        f"compiled or loaded in {compiled_seconds:.1f} s\n"
        f"steady: medians of {n_rounds} alternating rounds after {n_bands * rows:,} rows; "
        f"Python {platform.python_version()}, NumPy {np.__version__}, numba {numba.__version__}, "
        f"{n_threads} cores",
        highlight=False,
    )


class _Rows:
    """Bands of fresh random rows with a mean and deviation of its own for each column."""

    def __init__(self, widths: list[int], rows: int) -> None:
        self._rng = np.random.default_rng(11)
        self._rows = rows
        self._sites = [
            (width, self._rng.normal(-1, 0.7, width), self._rng.gamma(4, 0.2, width))
            for width in widths
        ]

    def bands(self) -> list[Band]:
        """Return a band of each site."""
        return [self._band(*site) for site in self._sites]

    def _band(self, width: int, mean: NDArray, deviation: NDArray) -> Band:
        x = self._rng.standard_normal((self._rows, width), dtype=np.float32)
        x = x * deviation.astype(np.float32) + mean.astype(np.float32)
        if width != 384:
            x = x / (1 + np.exp(-1.702 * x))
        columns = next(c for c in range(min(256, width), 0, -1) if width % c == 0)
        chunks = x.astype(np.float16).reshape(self._rows, -1, columns).transpose(1, 0, 2)
        return np.ascontiguousarray(chunks)


def _start(widths: list[int], n_threads: int, first_row_id: int) -> BandFolds:
    dtypes = ["float16"] * len(widths)
    return BandFolds(widths, dtypes, first_row_id=first_row_id, n_threads=n_threads)


def _update(folds: BandFolds, bands: list[Band], offset: int, committed: list[TopKState]) -> None:
    rows = bands[0].shape[1]
    others = np.arange(0, rows, 128)
    content = np.setdiff1d(np.arange(rows), others)
    for i, (band, state) in enumerate(zip(bands, committed, strict=True)):
        folds.update(i, band, content, others, offset, TopK().thresholds(state))


def _numpy(band: Band, thresholds: Thresholds) -> list[NDArray]:
    """Compute of every chunk what the pass does: shifted powers, extremes, counts, candidates."""
    results: list[NDArray] = []
    columns = band.shape[2]
    for i, chunk in enumerate(band):
        x = chunk.astype(np.float32)
        floor, ceiling = (side[i * columns : (i + 1) * columns] for side in thresholds)
        if not np.isfinite(x).all():
            raise FloatingPointError("the benchmark's values are finite")
        d = x.astype(np.float64) - x[0]
        square = d * d
        positive = np.maximum(x, 0).astype(np.float64)
        results += [d.sum(axis=0), square.sum(axis=0)]
        results += [np.einsum("ij,ij->j", square, d), np.einsum("ij,ij->j", square, square)]
        results += [np.einsum("ij,ij->j", positive, positive), np.count_nonzero(x > 0, axis=0)]
        results += [x.min(axis=0), x.max(axis=0)]
        results += [*np.nonzero((x >= floor) | (x <= ceiling))]
    return results


def _seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
