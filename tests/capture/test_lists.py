"""The running lists of committed segments, against NumPy."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from actstore.capturing.lists import SAMPLE, TOPK, RunningLists, SiteLists
from actstore.folds.sample import EVERY_HASH, hash_rows
from actstore.folds.topk import TopKState, empty_list
from actstore.site import Site
from actstore.store import CoreStore

SITE, WIDTH = Site.parse("mlp_post.0"), 7


def lists_of(values: np.ndarray, windows: np.ndarray, row_ids: np.ndarray) -> SiteLists:
    """Return the lists of a segment's values ``(width, n)`` and of the highest of its windows."""
    sides = []
    for its, sign in ((values, -1), (values, 1), (windows, -1)):
        found = empty_list(WIDTH, TOPK.k)
        n = min(its.shape[1], TOPK.k)
        found.values[:, :n] = sign * np.sort(sign * its, axis=1)[:, :n]
        found.counts[:] = n
        sides.append(found)
    hashes = hash_rows(row_ids, SAMPLE.seed)
    sampled = row_ids[np.argsort(hashes)[: SAMPLE.n_rows]]
    return SiteLists.of(TopKState(sides[0], sides[1]), sides[2], np.sort(sampled))


def kth_lowest(values: np.ndarray) -> np.ndarray:
    """Return the k-th lowest value of each row, infinity where there are fewer."""
    padded = np.pad(values, ((0, 0), (0, TOPK.k)), constant_values=np.inf)
    return np.sort(padded, axis=1)[:, TOPK.k - 1]


@pytest.mark.parametrize("sizes", [(30, 30, 30, 80), (500, 3, 1), (1, 120, 2_000)])
def test_thresholds_are_the_last_places_of_all_segments(sizes: tuple[int, ...]) -> None:
    """After each segment they are those of a sort of every value so far; many values tie."""
    rng = np.random.default_rng(len(sizes))
    store = SimpleNamespace(prefix_index=lambda: None)
    running = RunningLists(cast(CoreStore, store))
    values = np.empty((WIDTH, 0), np.float32)
    windows, row_ids = values, np.empty(0, np.int64)
    for segment, n in enumerate(sizes):
        new: Any = rng.integers(-40, 40, (WIDTH, n)).astype(np.float32)
        rows = 65_536 * segment + np.arange(n)
        running.add(segment, {SITE: lists_of(new, new[:, ::2], rows)})
        running.add(segment, {SITE: lists_of(new, new[:, ::2], rows)})  # known: nothing is added
        values = np.concatenate([values, new], axis=1)
        windows = np.concatenate([windows, new[:, ::2]], axis=1)
        row_ids = np.concatenate([row_ids, rows])

        got = running.thresholds()[SITE]

        assert (got.topk.top_floor == -kth_lowest(-values)).all()
        assert (got.topk.bottom_ceiling == kth_lowest(values)).all()
        assert (got.window_top.floor == -kth_lowest(-windows)).all()
        hashes = np.sort(hash_rows(row_ids, SAMPLE.seed))
        is_full = len(hashes) >= SAMPLE.n_rows
        assert got.sample == (hashes[SAMPLE.n_rows - 1] if is_full else EVERY_HASH)
    assert running.relied_on == list(range(len(sizes)))
