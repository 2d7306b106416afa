"""A neuron or factor at a glance: statistics, histogram, and rows of every kind in their context.

A list of the highest rows alone misleads: of a factor they hold a small part of the mass.  So a
portrait has rows from the top and, if asked for, the bottom, one of a window; some of every
quantile bin of a uniform sample; and some of that sample as they come.  Each stands among the
content rows of its window with the values there: from the store where they are kept, else computed
again where the caller can do so, else unknown, which is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from actstore import arrow
from actstore.folds import Sample
from actstore.folds.sample import SampleState, quantile_rows
from actstore.query.content_context import contexts
from actstore.store import CoreStore
from actstore.store.stored_rows import hash_rows

Ids = npt.NDArray[np.int64]
Values = npt.NDArray[np.float32]

_ROWS_AT_ONCE = 512
STATISTICS = ("n", "mean", "std", "skewness", "kurtosis", "min", "max", "share_positive")
"""Names of the statistics beside the quantiles."""


@dataclass(frozen=True)
class Shown:
    """How many rows of a neuron or factor a portrait has, and how much around them."""

    k: int = 20
    """Rows with the highest values, one of a window."""
    n_bins: int = 10
    """Quantile bins of the uniform sample."""
    n_each: int = 2
    """Rows from each of them."""
    n_random: int = 20
    """Rows drawn uniformly."""
    before: int = 32
    """Rows before each of them."""
    after: int = 32
    """Rows after each of them."""
    n_bottom: int = 0
    """Rows with the lowest values, one of a window."""


@dataclass(frozen=True)
class Column:
    """What is known of a neuron or factor over all its rows."""

    statistics: Mapping[str, Any]
    """`STATISTICS`, and the quantiles as ``q01`` … ``q99``: [low, high]."""
    histogram: list[dict[str, float | int | None]]
    """The bins that hold something, ascending: low, high, n."""
    top: tuple[Ids, Values]
    """The rows with the highest values, best first, one of a window."""
    bottom: tuple[Ids, Values]
    """The rows with the lowest values, lowest first; several of a window may be among them."""
    sample: tuple[Ids, Values]
    """Rows drawn uniformly, ascending, and their values."""
    values_at: Callable[[Ids], Values]
    """Returns values at any rows, NaN where they are not known."""
    what_is_known: str
    """Where values around a row come from, in words."""


@dataclass(frozen=True)
class Exemplar:
    """A row of a portrait."""

    group: str
    """``"top"``, ``"bottom"``, ``"quantile"`` or ``"random"``."""
    number: int
    """Its place in the group, or of what quantile bin it is; from 1."""
    row_id: int
    """The row."""
    value: float
    """The value there."""
    bin: tuple[float, float, float] | None
    """Lowest and highest value of its quantile bin, and the bin's share of the rows."""


class Portrait:
    """A neuron or factor: what is known of it, and its exemplars in context.

    Reads the tokens of the segments that the exemplars lie in, and the values around them.

    Parameters
    ----------
    store : CoreStore
        The store.
    space : str
        The space of its rows.
    column : Column
        What is known of it over all rows.
    shown : Shown
        How many rows, and how much around them.
    """

    def __init__(self, store: CoreStore, space: str, column: Column, shown: Shown) -> None:
        self.column = column
        self.quantile_edges: list[float] = []
        """The highest value of each quantile bin, ascending."""
        self.exemplars = self._choose(store, space, shown)
        ids = np.array([e.row_id for e in self.exemplars], np.int64)
        self.contexts = contexts(store, ids, shown.before, shown.after, space)
        """Each exemplar among the content rows around it."""
        rows = np.unique(np.concatenate([ids, *(c.row_ids for c in self.contexts)]))
        pieces = [
            column.values_at(rows[start : start + _ROWS_AT_ONCE])
            for start in range(0, len(rows), _ROWS_AT_ONCE)
        ]
        known = np.concatenate([np.empty(0, np.float32), *pieces])
        self.values = [known[np.searchsorted(rows, c.row_ids)] for c in self.contexts]
        """The values at the rows of each context, NaN where they are not known."""
        for exemplar, context, values in zip(
            self.exemplars, self.contexts, self.values, strict=True
        ):
            values[context.place] = exemplar.value  # what is computed again may round otherwise
        self.complete = not any(np.isnan(values).any() for values in self.values)
        """Whether the value at every token of every context is known."""

    def _choose(self, store: CoreStore, space: str, shown: Shown) -> list[Exemplar]:
        ids, values = self.column.top
        found = _listed("top", ids[: shown.k], values[: shown.k])
        if shown.n_bottom:
            ids, values = self.column.bottom
            first = first_of_windows(store, ids, space)[: shown.n_bottom]
            found += _listed("bottom", ids[first], values[first])
        ids, values = self.column.sample
        drawn = quantile_rows(values[:, None], ids, shown.n_bins, shown.n_each)
        ascending = np.sort(values)
        for b in range(shown.n_bins):
            part = ascending[b * len(ids) // shown.n_bins : (b + 1) * len(ids) // shown.n_bins]
            if not len(part):
                continue
            edges = (float(part[0]), float(part[-1]), len(part) / len(ids))
            self.quantile_edges.append(edges[1])
            for row_id, value in zip(
                drawn.row_ids[0, b].tolist(), drawn.values[0, b].tolist(), strict=True
            ):
                if row_id >= 0:
                    found.append(Exemplar("quantile", b + 1, row_id, value, edges))
        lowest = np.argsort(hash_rows(ids, Sample.seed))[: shown.n_random]
        return found + _listed("random", ids[lowest], values[lowest])


def _listed(group: str, row_ids: Ids, values: Values) -> list[Exemplar]:
    rows = zip(row_ids.tolist(), values.tolist(), strict=True)
    return [Exemplar(group, i + 1, row_id, value, None) for i, (row_id, value) in enumerate(rows)]


def first_of_windows(store: CoreStore, row_ids: Ids, space: str) -> Ids:
    """Return the places of the rows that are the first of their window in a list."""
    windows = arrow.numbers(store.tokens_of(row_ids, space).column("window_id"))
    return np.sort(np.unique(windows, return_index=True)[1])


def statistics_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return statistics by name, quantiles as [low, high] within the extremes."""
    found: dict[str, Any] = {name: number(row[name]) for name in STATISTICS}
    for name in row:
        if name.endswith("_low"):
            quantile = name.removesuffix("_low")
            ends = np.array([row[name], row[f"{quantile}_high"]], np.float64)
            if found["min"] is not None:  # a bin may reach beyond the values that are in it
                ends = np.clip(ends, found["min"], found["max"])
            found[quantile] = numbers(ends)
    return found


def bins_of(
    low: npt.NDArray[Any], high: npt.NDArray[Any], n: npt.NDArray[Any]
) -> list[dict[str, float | int | None]]:
    """Return bins of a histogram; an edge that is infinite is None."""
    ends = zip(numbers(low), numbers(high), n.tolist(), strict=True)
    return [{"low": a, "high": b, "n": count} for a, b, count in ends]


def valid_sample(sample: SampleState) -> tuple[Ids, Values]:
    """Return the rows and values of a sample of one column, NaN left out."""
    values = sample.values[:, 0].astype(np.float32)
    return sample.row_ids[~np.isnan(values)], values[~np.isnan(values)]


def number(value: float | int | None) -> float | int | None:
    """Return a number as JSON knows it: None where it is not finite."""
    return value if value is not None and math.isfinite(value) else None


def numbers(values: npt.NDArray[Any] | Sequence[float]) -> list[Any]:
    """Return numbers as JSON knows them."""
    return [number(value) for value in np.asarray(values).tolist()]
