"""The exact top 100 of 3,072 neurons over a million rows: ``python -m benchmarks.topk [--tiny]``.

All folds run, in bands of 4,096 rows and segments of 16 bands under the lists of those before; the
rate is that after the first segment.  The lists are then compared, value and row, with those that a
partition of every whole column gives.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from actstore.folds import TopK, WindowTop
from actstore.folds.cpu import BandFolds, SiteThresholds, warm_up
from actstore.folds.topk import TopKState

_CHUNK = 256


def main(argv: Sequence[str] | None = None) -> None:
    """Print the rate, and whether the lists are right."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.topk", description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="few rows: only to run it")
    tiny = parser.parse_args(argv).tiny
    n_bands, rows, width = (20, 256, 40) if tiny else (244, 4096, 3072)
    rng = np.random.default_rng(5)
    mean, deviation = rng.normal(-1, 0.7, width), rng.gamma(4, 0.2, width)
    bands = np.empty((n_bands, -(-width // _CHUNK), rows, min(width, _CHUNK)), np.float16)
    for band in bands:
        drawn = rng.standard_normal((rows, width), np.float32)
        band[:] = (drawn * deviation + mean).reshape(rows, *band.shape[::2]).swapaxes(0, 1)
    found, rate = _fold(bands, width)
    wrong = sum(
        not np.array_equal(ours, theirs)
        for side, sign in ((found.top, 1), (found.bottom, -1))
        for chunk in range(bands.shape[1])
        for ours, theirs in zip(
            side.row_ids[chunk * _CHUNK : (chunk + 1) * _CHUNK],
            _brute(sign * bands[:, chunk].astype(np.float32), side.row_ids.shape[1]),
            strict=False,
        )
    )
    print(f"{n_bands * rows:,} rows x {width:,} columns, all folds: {rate:,.0f} rows/s once warm")
    print(f"lists that differ from the whole columns': {wrong} of {2 * width:,}")


def _fold(bands: NDArray[np.float16], width: int) -> tuple[TopKState, float]:
    rows, per_segment = bands.shape[2], 16
    content, windows = np.arange(rows), np.arange(rows) // 200
    topk, window_top = TopK().start(width), WindowTop().start(width)
    seconds, n_warm = 0.0, 0
    warm_up()
    for start in range(0, len(bands), per_segment):
        thresholds = SiteThresholds(TopK().thresholds(topk), WindowTop().thresholds(window_top))
        folds = BandFolds(
            [width], ["float16"], first_row_id=start * rows, n_threads=os.cpu_count() or 1
        )
        began = time.perf_counter()
        for i, band in enumerate(bands[start : start + per_segment]):
            folds.update(0, band, content, content[:0], windows + i * rows, i * rows, thresholds)
        if start:
            seconds += time.perf_counter() - began
            n_warm += rows * len(bands[start : start + per_segment])
        state = folds.finish(0)
        topk = TopK().merge(topk, state.topk)
        window_top = WindowTop().merge(window_top, state.window_top)
    return topk, n_warm / seconds


def _brute(values: NDArray[np.float32], k: int) -> list[NDArray[np.int64]]:
    """Return the rows of the k highest values of each column, equal ones in the order of rows."""
    columns = values.reshape(-1, values.shape[-1])
    return [np.argsort(-column, kind="stable")[:k] for column in columns.T.copy()]


if __name__ == "__main__":
    main()
