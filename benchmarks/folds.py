"""All folds in one compiled pass, against NumPy op by op: ``python -m benchmarks.folds [--tiny]``.

Rows are those of a six-layer model: 6 x 1,536 GELU-like and 7 x 384 normal columns, float16, in
bands of 4,096 rows and windows of 200, made outside the clock.  *Cold* is the first segment of a
store, whose lists are empty; *steady* is a new segment under the lists and the sample of 100,000
committed rows.  NumPy computes the same sums, extremes, counts, window maxima and candidates, chunk
by chunk so that its temporaries stay in cache.  *Parts* are steady, on one thread: moments and
extremes alone are what special and first rows cost; the Gram is of one site of 1,536 columns.  CPU
is the time of all cores together, and ratios are of CPU: on a shared machine the clock says more of
the neighbours than of us.  *On a device* are the folds of bands that lie on a GPU, where there is
one: its clock is what counts, its CPU time that of launching.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from actstore.folds import Sample, TopK, WindowTop
from actstore.folds.cpu import BandFolds, warm_up
from actstore.folds.device import DeviceFolds
from actstore.folds.histogram import N_BINS
from actstore.folds.passes import SiteThresholds
from actstore.folds.topk import Ranked, TopKState

Band = NDArray[np.float16]

WINDOW_ROWS = 200
SHORT_WINDOW_ROWS = 12


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.folds", description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="few rows, one round: only to run it")
    tiny = parser.parse_args(argv).tiny
    rows, segment_bands, n_rounds = (64, 2, 1) if tiny else (4096, 16, 5)
    widths = [64, 32] if tiny else [1536] * 6 + [384] * 7
    n_threads = os.cpu_count() or 1
    device = _device(tiny)
    data = _Rows(widths, rows)
    results: dict[str, list[_Time]] = {"NumPy, op by op": []}

    compiling = _timed(warm_up)
    committed = [_Committed.nothing(width) for width in widths]
    cold, finishing, committed, merging = _segment(data, 0, segment_bands, n_threads, committed)
    seen = segment_bands
    while seen * rows < (0 if tiny else 100_000):
        _, finishing, committed, merging = _segment(data, seen, 4, n_threads, committed)
        seen += 4

    for i in range(n_rounds):
        bands = data.bands()
        thresholds = [state.thresholds() for state in committed]

        def steady(
            n: int = 1,
            *,
            window_rows: int = WINDOW_ROWS,
            only_others: bool = False,
            bands: list[Band] = bands,
            thresholds: list[SiteThresholds] = thresholds,
        ) -> Callable[[], object]:
            folds = _start(widths, n, seen * rows)
            return partial(_update, folds, bands, 0, thresholds, window_rows, only_others)

        contestants: dict[str, Callable[[], object]] = {
            "NumPy, op by op": partial(_numpy, bands, thresholds),
            **{f"steady, {_threads(n)}": steady(n) for n in sorted({1, n_threads})},
            "part: moments and extremes alone": steady(only_others=True),
            f"part: all, windows of {SHORT_WINDOW_ROWS} rows": steady(
                window_rows=SHORT_WINDOW_ROWS
            ),
            "part: Gram of one site, beside all": partial(_gram, bands[0], data.widths[0]),
        }
        if device is not None:
            there = _start_on(device, widths, seen * rows)
            moved = [torch.from_numpy(band).to(device) for band in bands]
            contestants[f"steady, on a device: {device.type}"] = partial(
                _update_on, device, there, moved, thresholds
            )
        for name in sorted(contestants, reverse=bool(i % 2)):
            results.setdefault(name, []).append(_timed(contestants[name]))
    results[f"cold, {_threads(n_threads)}: first band"] = cold[:1]
    results[f"cold, {_threads(n_threads)}: mean of {segment_bands}"] = [
        _Time(*(statistics.mean(times) for times in zip(*cold, strict=True)))
    ]
    folds = _start(widths, n_threads, 0)
    _update(folds, bands, 0, thresholds)

    table = Table(title=f"folds of {sum(widths):,} columns, float16, bands of {rows:,} rows")
    for column in ("what", "us/row", "CPU us/row", "CPU ns/value", "x NumPy"):
        table.add_column(column, justify="left" if column == "what" else "right")
    medians = {
        name: _Time(*(statistics.median(parts) for parts in zip(*times, strict=True)))
        for name, times in results.items()
    }
    for name, (seconds, cpu) in medians.items():
        columns = widths[0] if "Gram" in name else sum(widths)
        table.add_row(
            name,
            f"{seconds / rows * 1e6:.2f}",
            f"{cpu / rows * 1e6:.2f}",
            f"{cpu / rows / columns * 1e9:.3f}",
            ""
            if "part" in name or "device" in name
            else f"{medians['NumPy, op by op'].cpu / cpu:.1f}",
        )
    console = Console()
    console.print(table)
    console.print(
        f"per segment: lists finished in {finishing.wall * 1e3:.0f} ms, merged in "
        f"{merging.wall * 1e3:.0f} ms; running state {folds.n_bytes / 1e6:.0f} MB; "
        f"compiled, or loaded from the cache, in {compiling.wall:.1f} s\n"
        f"steady: medians of {n_rounds} alternating rounds after {seen * rows:,} rows; "
        f"Python {platform.python_version()}, NumPy {np.__version__}, numba {numba.__version__}, "
        f"{n_threads} cores",
        highlight=False,
    )


class _Time(NamedTuple):
    """Seconds of the clock, and of all cores together."""

    wall: float
    cpu: float


def _timed(run: Callable[[], object]) -> _Time:
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return _Time(time.perf_counter() - wall, time.process_time() - cpu)


def _threads(n: int) -> str:
    return f"{n} thread{'s' if n > 1 else ''}"


@dataclass
class _Committed:
    """The lists and the sampled rows of committed segments at one site."""

    topk: TopKState
    window_top: Ranked
    sampled: NDArray[np.int64]

    @classmethod
    def nothing(cls, width: int) -> _Committed:
        return cls(TopK().start(width), WindowTop().start(width), np.empty(0, np.int64))

    def thresholds(self) -> SiteThresholds:
        return SiteThresholds(
            TopK().thresholds(self.topk),
            WindowTop().thresholds(self.window_top),
            Sample().threshold(self.sampled),
        )


def _segment(
    data: _Rows, first: int, n_bands: int, n_threads: int, committed: list[_Committed]
) -> tuple[list[_Time], _Time, list[_Committed], _Time]:
    """Fold and commit a segment; return the times of bands, finish and merge, and the lists."""
    widths = data.widths
    folds = _start(widths, n_threads, first * data.rows)
    thresholds = [state.thresholds() for state in committed]
    times = []
    for i in range(n_bands):
        bands = data.bands()
        times.append(_timed(partial(_update, folds, bands, i * data.rows, thresholds)))
    states: list[_Committed] = []
    merged: list[_Committed] = []

    def finish() -> None:
        for i in range(len(widths)):
            found = folds.finish(i)
            states.append(_Committed(found.topk, found.window_top, found.sample.row_ids))

    def merge() -> None:
        for old, new in zip(committed, states, strict=True):
            topk = TopK().merge(old.topk, new.topk)
            window_top = WindowTop().merge(old.window_top, new.window_top)
            merged.append(_Committed(topk, window_top, np.union1d(old.sampled, new.sampled)))

    finishing, merging = _timed(finish), _timed(merge)
    return times, finishing, merged, merging


class _Rows:
    """Bands of fresh random rows with a mean and deviation of its own for each column."""

    def __init__(self, widths: list[int], rows: int) -> None:
        self._rng = np.random.default_rng(11)
        self.rows, self.widths = rows, widths
        self._sites = [
            (width, self._rng.normal(-1, 0.7, width), self._rng.gamma(4, 0.2, width))
            for width in widths
        ]

    def bands(self) -> list[Band]:
        """Return a band of each site."""
        return [self._band(*site) for site in self._sites]

    def _band(self, width: int, mean: NDArray, deviation: NDArray) -> Band:
        x = self._rng.standard_normal((self.rows, width), dtype=np.float32)
        x = x * deviation.astype(np.float32) + mean.astype(np.float32)
        if width != 384:
            x = x / (1 + np.exp(-1.702 * x))
        columns = next(c for c in range(min(256, width), 0, -1) if width % c == 0)
        chunks = x.astype(np.float16).reshape(self.rows, -1, columns).transpose(1, 0, 2)
        return np.ascontiguousarray(chunks)


def _start(widths: list[int], n_threads: int, first_row_id: int) -> BandFolds:
    dtypes = ["float16"] * len(widths)
    return BandFolds(widths, dtypes, first_row_id=first_row_id, n_threads=n_threads)


def _device(tiny: bool) -> torch.device | None:
    """Return the GPU, or what stands for it where the benchmark need only run."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("cpu") if tiny else None


def _start_on(device: torch.device, widths: list[int], first_row_id: int) -> DeviceFolds:
    dtypes = ["float16"] * len(widths)
    return DeviceFolds(widths, dtypes, first_row_id=first_row_id, device=device)


def _update_on(
    device: torch.device,
    folds: DeviceFolds,
    bands: list[torch.Tensor],
    thresholds: list[SiteThresholds],
) -> None:
    _update(folds, bands, 0, thresholds)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _update(
    folds: BandFolds | DeviceFolds,
    bands: list[Any],
    offset: int,
    thresholds: list[SiteThresholds],
    window_rows: int = WINDOW_ROWS,
    only_others: bool = False,
) -> None:
    rows = bands[0].shape[1]
    others = np.arange(0, rows, 1 if only_others else 128)
    content = np.setdiff1d(np.arange(rows), others)
    windows = (content + offset) // window_rows
    for i, (band, places) in enumerate(zip(bands, thresholds, strict=True)):
        folds.update(i, band, content, others, windows, offset, places)


def _gram(band: Band, width: int) -> None:
    folds = BandFolds([width], ["float16"], first_row_id=0, gram_sites=[0])
    rows = np.arange(band.shape[1])
    folds.update(0, band, rows, rows[:0], rows // WINDOW_ROWS)


def _numpy(bands: list[Band], thresholds: list[SiteThresholds]) -> None:
    for band, (topk, window_top) in zip(
        bands, ((t.topk, t.window_top) for t in thresholds), strict=True
    ):
        columns = band.shape[2]
        for i, chunk in enumerate(band):
            mine = slice(i * columns, (i + 1) * columns)
            limits = topk.top_floor[mine], topk.bottom_ceiling[mine], window_top.floor[mine]
            _numpy_chunk(chunk, *limits)


def _numpy_chunk(
    chunk: Band, floor: NDArray, ceiling: NDArray, window_floor: NDArray
) -> list[NDArray]:
    """Compute of a chunk what the pass does: powers, extremes, counts, windows, candidates."""
    x = chunk.astype(np.float32)
    if not np.isfinite(x).all():
        raise FloatingPointError("the benchmark's values are finite")
    d = x.astype(np.float64) - x[0]
    square = d * d
    positive = np.maximum(x, 0).astype(np.float64)
    n_rows, n_columns = chunk.shape
    bins = (chunk.view(np.uint16) >> 8) + N_BINS * np.arange(n_columns, dtype=np.int32)
    windows = np.maximum.reduceat(x, np.arange(0, n_rows, WINDOW_ROWS), axis=0)
    return [
        d.sum(axis=0),
        square.sum(axis=0),
        np.einsum("ij,ij->j", square, d),
        np.einsum("ij,ij->j", square, square),
        np.einsum("ij,ij->j", positive, positive),
        np.count_nonzero(x > 0, axis=0),
        x.min(axis=0),
        x.max(axis=0),
        np.bincount(bins.ravel(), minlength=N_BINS * n_columns),
        *np.nonzero((x > floor) | (x < ceiling)),
        *np.nonzero(windows > window_floor),
    ]


if __name__ == "__main__":
    main()
