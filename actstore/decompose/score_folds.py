"""Exemplars of factors, and statistics of their scores, by the folds that neurons have.

A factor is a column of scores as a neuron is a column of activations, so the same folds serve both:
what is known of a neuron over its rows is known of a factor over the rows that have scores.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from actstore import arrow
from actstore.folds import Histogram, Moments, Sample, TopK, WindowTop
from actstore.folds.cpu import BandFolds, state_bytes
from actstore.folds.histogram import bin_edges
from actstore.folds.passes import SiteThresholds
from actstore.folds.sample import quantile_rows
from actstore.shard import ShardLayout, to_band
from actstore.store import CoreStore, Rows
from actstore.store.stored_rows import hash_rows

Ids = npt.NDArray[np.int64]

N_EXEMPLARS = 100
"""Places of each list of a factor."""

N_BINS, N_EACH = 10, 2
"""Quantile bins of the sampled rows, and rows drawn from each."""

_BAND_ROWS = 2048
_MOMENTS, _TOP, _WINDOWS = Moments(), TopK(N_EXEMPLARS), WindowTop(N_EXEMPLARS)
_HISTOGRAM, _SAMPLE = Histogram(), Sample()


def factor_bytes() -> int:
    """Return the bytes that `ScoreFolds` takes for each factor, with a segment and the table."""
    state = state_bytes(1, "float32", N_EXEMPLARS, _SAMPLE.n_rows, 0)
    n_exemplars = 3 * N_EXEMPLARS + N_BINS * N_EACH + _SAMPLE.n_rows
    return 3 * state + 3 * 4 * _BAND_ROWS + 160 * n_exemplars


class ScoreFolds:
    """The folds of the scores of some factors.

    Memory `factor_bytes` a factor.

    Parameters
    ----------
    store : CoreStore
        The store.
    rows : Rows
        The rows that have scores.
    space : str
        Their space.
    n_factors : int
        How many factors.
    """

    def __init__(self, store: CoreStore, rows: Rows, space: str, n_factors: int) -> None:
        self._store, self._rows, self._space = store, rows, space
        self._layout = ShardLayout.for_width(n_factors, _BAND_ROWS, "float32", _BAND_ROWS)
        self._moments = _MOMENTS.start(n_factors)
        self._lists = _TOP.start(n_factors)
        self._windows = _WINDOWS.start(n_factors)
        self._histogram = _HISTOGRAM.start(n_factors)
        self._sample = _SAMPLE.start(n_factors)

    def update(self, segment: int, scores: npt.NDArray[np.float32]) -> None:
        """Take in the scores of the chosen rows of a segment, ``(rows, n_factors)``, in row order.

        Segments come in ascending order, each once.
        """
        offsets = self._rows.offsets(segment)
        windows = self._store.token_column(segment, "window_id", self._space)[offsets]
        first_row = segment * self._store.meta.segment_rows
        folds = BandFolds([scores.shape[1]], ["float32"], first_row_id=first_row, k=N_EXEMPLARS)
        thresholds = SiteThresholds(
            _TOP.thresholds(self._lists),
            _WINDOWS.thresholds(self._windows),
            _SAMPLE.threshold(self._sample.row_ids),
        )
        block = np.empty((_BAND_ROWS, scores.shape[1]), np.float32)
        edges = np.arange(offsets[0] // _BAND_ROWS, offsets[-1] // _BAND_ROWS + 2) * _BAND_ROWS
        cuts = np.searchsorted(offsets, edges)
        for first, start, stop in zip(edges.tolist(), cuts[:-1], cuts[1:], strict=False):
            if start == stop:
                continue
            places = offsets[start:stop] - first
            block[places] = scores[start:stop]
            # Rows not named are not looked at.
            band = to_band(block, self._layout)
            none = np.empty(0, np.int64)
            folds.update(0, band, places, none, windows[start:stop], first, thresholds)
        found = folds.finish(0)
        self._moments = _MOMENTS.merge(self._moments, found.moments)
        self._lists = _TOP.merge(self._lists, found.topk)
        self._windows = _WINDOWS.merge(self._windows, found.window_top)
        self._histogram = _HISTOGRAM.merge(self._histogram, found.histogram)
        self._sample = _SAMPLE.merge(self._sample, found.sample)

    def statistics(self) -> dict[str, npt.NDArray[Any]]:
        """Return columns of the table ``factors``, as the table ``neurons`` has them."""
        moments = _MOMENTS.finish(self._moments)
        quantiles = _HISTOGRAM.finish(self._histogram)
        # A bin may reach beyond the values that are in it.
        ends = {n: np.clip(x, moments["min"], moments["max"]) for n, x in quantiles.items()}
        return {**moments, **ends}

    def histograms(self, first_factor: int) -> pa.Table:
        """Return the table ``factor_histograms``: the bins that hold a score."""
        factor, number = np.nonzero(self._histogram.counts)
        low, high = bin_edges()
        return pa.table(
            {
                "factor": (factor + first_factor).astype(np.int32),
                "bin": number.astype(np.int32),
                "low": low[number],
                "high": high[number],
                "n": self._histogram.counts[factor, number],
            }
        )

    def exemplars(self, first_factor: int, one_sided: bool) -> pa.Table:
        """Return the table ``factor_exemplars``, factor after factor.

        Parameters
        ----------
        first_factor : int
            Number of the first of the factors.
        one_sided : bool
            Whether no score is below zero: then a row with a score of zero is no exemplar, and
            the lowest scores are none.

        Returns
        -------
        Table
            Sides ``top``, ``window`` and, where scores have both signs, ``bottom``; ``quantile``,
            rows of each quantile bin of the sample; and ``random``, the sample itself.
        """
        sides: list[str] = []
        columns: list[tuple[npt.NDArray[Any], ...]] = []  # factor, side, rank, row_id, value, bin

        def add(side: str, factor: Ids, place: Ids, at: Any, bins: Ids | int = 0) -> None:
            row_ids, values = at
            number = np.full(len(factor), len(sides))
            sides.append(side)
            bins = np.broadcast_to(bins, factor.shape)
            columns.append((factor, number, place + 1, row_ids, values, bins))

        lists = {"top": self._lists.top, "window": self._windows}
        if not one_sided:
            lists["bottom"] = self._lists.bottom
        for side, ranked in lists.items():
            taken = ranked.taken & (ranked.values > 0) if one_sided else ranked.taken
            factor, place = np.nonzero(taken)
            add(side, factor, place, (ranked.row_ids[taken], ranked.values[taken]))
        values, row_ids = self._sample.values.astype(np.float32), self._sample.row_ids
        drawn = quantile_rows(values, row_ids, N_BINS, N_EACH)
        factor, part, nth = found = np.nonzero(drawn.row_ids >= 0)
        at = drawn.row_ids[found], drawn.values[found]
        add("quantile", factor, part * N_EACH + nth, at, part + 1)
        order = np.argsort(hash_rows(row_ids, _SAMPLE.seed))
        factor, place = np.indices((values.shape[1], len(order))).reshape(2, -1)
        add("random", factor, place, (row_ids[order][place], values[order].T.ravel()))

        joined = [np.concatenate(column) for column in zip(*columns, strict=True)]
        order = np.lexsort((joined[2], joined[1], joined[0]))
        factor, number, rank, row_ids, values, bins = (column[order] for column in joined)
        rows, which = np.unique(row_ids, return_inverse=True)
        tokens = arrow.take(self._store.tokens_of(rows, self._space), which)
        names = pa.DictionaryArray.from_arrays(number.astype(np.int32), pa.array(sides))
        return pa.table(
            {
                "factor": (factor + first_factor).astype(np.int32),
                "side": names.cast(pa.string()),
                "rank": rank.astype(np.int32),
                "row_id": row_ids,
                "value": values,
                "document": tokens.column("document"),
                "position": tokens.column("position"),
                "token_id": tokens.column("token_id"),
                "bin": pa.array(bins.astype(np.int32), mask=bins == 0),
            }
        )
