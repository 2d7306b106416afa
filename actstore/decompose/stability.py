"""Which factors are found again: by other seeds, and in other documents.

The factorisation is done again from other seeds (another start and another order of rows) on
disjoint sets of documents.  Every fit is matched to the real factors: the assignment, one to one,
with the largest sum of cosines between loadings.  So each real factor has a counterpart in each
fit, and two fits are compared by the counterparts of the same factor: the cosine of their loadings,
and the correlation of their scores on documents that neither has seen.

What chance gives is told by two numbers of each factor.  The *null* is its cosine with its match in
factors of permuted data: every neuron keeps its values, and takes them at rows of its own, so that
no two neurons are high together any more.  (Two fits of permuted data are no null: they agree
better than two fits of real data, since each finds the single neurons with the most energy.)  The
*runner-up* is its highest cosine with a factor that it was not matched to.

How data are permuted: as many rows as memory holds, a random choice of runs, lie there in random
order, and every neuron's column is turned by an amount of its own.  Two neurons with different
amounts meet at pairs of different rows, all pairs alike; amounts are equal only where there are
more neurons than rows.  A column that is turned holds the values that it held.

References
----------
Kuhn, The Hungarian method for the assignment problem, Naval Research Logistics Quarterly 2 (1955).
Kotliar et al., Identifying gene expression programs of cell-type identity and cellular activity
with single-cell RNA-Seq, eLife 8 (2019): stability of NMF over replicates.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import scipy.optimize
import torch

from actstore.decompose.clock import Clock
from actstore.decompose.engine import Engine
from actstore.decompose.factors import Factors
from actstore.decompose.fit import Fit, Settings
from actstore.decompose.linear import LINEAR_KINDS
from actstore.decompose.nmf import reserved_bytes
from actstore.decompose.project import matrix_of, solver
from actstore.decompose.ranked import KeptRows
from actstore.decompose.scan import Scan
from actstore.errors import ArgumentError, BudgetExceeded
from actstore.store import CoreStore, Result, Rows
from actstore.store.budget import Progress, as_count, parse_budget

if TYPE_CHECKING:
    import pandas as pd

Ids = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]

STABLE = 0.9
"""A factor is called stable if fits to other documents agree on it at this cosine, and above the
null and its runner-up."""

_HELD_SHARE = 0.1
_HELD_ROWS = 8192
_SWEEPS = 100
_TOLERANCE = 1e-3


class Stability:
    """How stable the factors of a result are; opening it computes nothing.

    Parameters
    ----------
    store : CoreStore
        The store that holds it.
    result : Result
        A result of the kind ``stability``.
    """

    def __init__(self, store: CoreStore, result: Result) -> None:
        self.store = store
        self.result = result
        _ = result.document  # read now: its folder may be replaced by another of the name

    @property
    def name(self) -> str:
        """Name of the result."""
        return self.result.name

    @cached_property
    def summary(self) -> dict[str, Any]:
        """How it was computed, and medians over the factors."""
        return {key: value for key, value in self.result.document.items() if key != "files"}

    def to_arrow(self) -> pa.Table:
        """Return one row a factor.

        Columns: factor; cosine, with its match in each fit, on average; seed_cosine, of its
        matches in two fits of the same documents; split_cosine, of its matches in fits of disjoint
        documents; seed_correlation and split_correlation of their scores on documents neither has
        seen; null_cosine, runner_up_cosine; stable.
        """
        return self.result.table("factor_stability")

    def df(self) -> pd.DataFrame:
        """Return the same as a pandas DataFrame."""
        return self.to_arrow().to_pandas()

    def __repr__(self) -> str:
        s, m = self.summary, self.summary["medians"]
        parts = [f"{s['n_stable']} of {s['n_components']} factors of {s['factors']!r} are stable"]
        parts += [
            f"{words} {m[name]:.2f}"
            for name, words in (
                ("seed_cosine", "other seeds"),
                ("split_cosine", "other documents"),
                ("null_cosine", "permuted data"),
            )
            if m[name] is not None
        ]
        return f"<Stability {self.name!r}: {', '.join(parts)} (median cosines)>"


def stability(
    factors: Factors,
    *,
    seeds: int = 5,
    splits: int = 2,
    nulls: int = 2,
    seed: int = 0,
    name: str | None = None,
    budget: int | str | None = None,
    progress: Progress | None = None,
) -> Stability:
    """Fit again from other seeds and on other documents; say which factors come back.

    Cost: ``seeds x splits`` fits to a part each of the documents, without an exact pass; those of
    one part share all reads.  Then `nulls` fits to rows in memory, and some thousand held-out
    rows.  Memory within the budget, whatever the number of rows.

    Parameters
    ----------
    factors : Factors
        The factors.
    seeds : int, default 5
        Fits of each part of the documents; at least 2.
    splits : int, default 2
        Disjoint parts of the documents, of about as many rows each.  With 1 all documents are one
        part, and only seeds are compared.
    nulls : int, default 2
        Fits of permuted data.
    seed : int, default 0
        Decides which documents are in which part, and which are held out.
    name : str, optional
        Name of the result; by default ``stability-1`` and so on.
    budget : int or str, optional
        Memory it may take.
    progress : callable, optional
        Called with (stage, fits done, fits of it).

    Returns
    -------
    Stability
        A row for each factor, and a summary.

    Raises
    ------
    ArgumentError
        If an argument cannot be used, the factors are not of NMF, or there are too few documents to
        split.
    BudgetExceeded
        If the loadings of all fits do not fit the budget.
    ResultExists
        If the name is taken.
    """
    if factors.result.kind in LINEAR_KINDS:
        raise ArgumentError(
            f"{factors.name!r} is a result of the kind {factors.result.kind}; stability fits "
            "non-negative factors again. Give a result of store.nmf (actstore nmf)."
        )
    seeds, splits = as_count("seeds", seeds, 2), as_count("splits", splits, 1)
    nulls, seed = as_count("nulls", nulls, 1), as_count("seed", seed, 0)
    store, space = factors.store, factors.sites[0].site.space
    k, width = factors.loadings.shape
    n_fits = seeds * splits + nulls
    budget_bytes = parse_budget(budget)
    # The loadings of all fits, and the float64 copies of two of them while they are compared.
    reserved = 4 * k * width * (n_fits + 8)
    if reserved > budget_bytes // 2:
        raise BudgetExceeded(
            f"{n_fits} fits of {k} factors and {width:,} neurons take {reserved:,} bytes, and half "
            f"of the budget is {budget_bytes // 2:,}. Pass budget={2 * reserved} or more, or fewer "
            "seeds or splits."
        )
    parts, held = split_documents(store, factors.rows, space, splits, seed)
    with store.new_result("stability", name, {}) as writer:
        clock = Clock(progress)
        refit = _Refit(factors, budget_bytes, reserved)
        numbers = range(seed + 1, seed + 1 + seeds)
        clock.start("fits", splits)
        fits = [clock.counted(refit.fit(part, numbers)) for part in parts]
        clock.start("nulls", nulls)
        permuted = [clock.counted(refit.fit_permuted(parts[0], seed + s)) for s in range(nulls)]
        clock.start("held-out scores", 1)
        stacked = [loadings for of_part in fits for loadings in of_part]
        scores = clock.counted(refit.scores(held, stacked))
        clock.stop()
        columns = compare(factors.loadings, fits, permuted, scores)
        of_result = pa.array([factors.name] * k, pa.string())
        table = {"of_result": of_result, "factor": np.arange(k, dtype=np.int32), **columns}
        writer.write_table("factor_stability", pa.table(table))
        medians = {n: _median(c) for n, c in columns.items() if n != "stable"}
        result = writer.finish(
            {
                "factors": factors.name,
                "factors_created": factors.summary["created"],
                "n_components": k,
                "sites": [str(info.site) for info in factors.sites],
                "n_rows": factors.rows.n_rows,
                "n_rows_of_parts": [part.n_rows for part in parts],
                "n_held_out_rows": len(scores[0]),
                "seeds": seeds,
                "splits": splits,
                "nulls": nulls,
                "seed": seed,
                "n_stable": int(columns["stable"].sum()),
                "medians": medians,
                "seconds": clock.seconds,
            }
        )
    return Stability(store, result)


def split_documents(
    store: CoreStore, rows: Rows, space: str, n_parts: int, seed: int
) -> tuple[list[Rows], Rows]:
    """Return disjoint parts of some rows, of whole documents each, and rows held out of all.

    Documents are taken in a random order: the first to be held out until these are a tenth of the
    rows, each other to the part that has the fewest.  Memory 8 bytes a document, a bit a row.

    Raises
    ------
    ArgumentError
        If there are fewer documents than parts and one.
    """
    counts = np.zeros(store.n_documents, np.int64)
    for segment in rows.segments:
        document = store.token_column(segment, "document", space)[rows.offsets(segment)]
        counts += np.bincount(document, minlength=len(counts))
    (documents,) = np.nonzero(counts)
    if len(documents) < n_parts + 1:
        raise ArgumentError(
            f"splits = {n_parts} needs rows of at least {n_parts + 1} documents, one held out, and "
            f"the factors are of {len(documents)} of {store.path}. "
            + ("Pass splits=1 to compare seeds alone, or c" if n_parts > 1 else "C")
            + "apture more documents."
        )
    order = np.random.default_rng([seed, 0]).permutation(documents)
    part_of = np.full(len(counts), -1)
    sizes = np.zeros(n_parts, np.int64)
    n_held = 0
    for place, document in enumerate(order.tolist()):
        # One document is held out at least, and every part has one at least.
        if n_held < _HELD_SHARE * rows.n_rows and len(order) - place > n_parts:
            n_held += int(counts[document])
        else:
            part_of[document] = sizes.argmin()
            sizes[part_of[document]] += counts[document]

    def of(part: int) -> Rows:
        def masks() -> Iterator[tuple[int, npt.NDArray[np.bool_]]]:
            for segment in rows.segments:
                offsets = rows.offsets(segment)
                document = store.token_column(segment, "document", space)[offsets]
                mask = np.zeros(store.meta.segment_rows, np.bool_)
                mask[offsets[part_of[document] == part]] = True
                yield segment, mask

        return Rows.from_masks(f"{rows.rule}, part {part}", rows.segment_rows, masks())

    return [of(part) for part in range(n_parts)], of(-1)


def match(wanted: Float32, found: Float32) -> tuple[Ids, Float64, Float64]:
    """Match factors one to one so that the sum of the cosines of their loadings is largest.

    Parameters
    ----------
    wanted, found : ndarray, shape (k, n_neurons)
        Loadings, of any length.

    Returns
    -------
    matches : ndarray of int64, shape (k,)
        Which of the found each of the wanted is matched to.
    cosines : ndarray of float64, shape (k,)
        Their cosines; 0 where a loading is zero.
    runners_up : ndarray of float64, shape (k,)
        The highest cosine with one that it was not matched to; 0 where there is one only.
    """
    cosines = _unit(wanted) @ _unit(found).T
    rows, matches = scipy.optimize.linear_sum_assignment(-cosines)
    others = cosines.copy()
    others[rows, matches] = 0
    return matches.astype(np.int64), cosines[rows, matches], others.max(1)


def compare(
    real: Float32,
    fits: Sequence[Sequence[Float32]],
    permuted: Sequence[Float32],
    scores: Sequence[Float32],
) -> dict[str, npt.NDArray[Any]]:
    """Compare fits factor by factor.

    Parameters
    ----------
    real : ndarray, shape (k, n_neurons)
        The factors.
    fits : sequence of sequences of ndarray, shape (k, n_neurons)
        For each part of the documents, the loadings of each seed.
    permuted : sequence of ndarray, shape (k, n_neurons)
        Loadings of fits of permuted data.
    scores : sequence of ndarray, shape (rows, k)
        For each fit, part after part, the scores of the same held-out rows.

    Returns
    -------
    dict of ndarray, shape (k,)
        The columns of the table ``factor_stability``; NaN where there is nothing to compare.
    """
    places = [(part, s) for part, of_part in enumerate(fits) for s in range(len(of_part))]
    matched = [match(real, fits[part][s]) for part, s in places]
    loadings = [
        _unit(fits[part][s][matches])
        for (part, s), (matches, _, _) in zip(places, matched, strict=True)
    ]
    aligned = [
        _standard(of_fit[:, matches])
        for of_fit, (matches, _, _) in zip(scores, matched, strict=True)
    ]
    found: dict[str, list[Float64]] = {"seed": [], "split": []}
    correlations: dict[str, list[Float64]] = {"seed": [], "split": []}
    for a, b in itertools.combinations(range(len(places)), 2):
        kind = "seed" if places[a][0] == places[b][0] else "split"
        found[kind].append((loadings[a] * loadings[b]).sum(1))
        correlations[kind].append((aligned[a] * aligned[b]).sum(0))
    nothing = np.full(len(real), np.nan)

    def mean(of: list[Float64]) -> Float64:
        return np.mean(of, axis=0) if of else nothing

    columns: dict[str, npt.NDArray[Any]] = {
        "cosine": np.mean([cosines for _, cosines, _ in matched], axis=0),
        "seed_cosine": mean(found["seed"]),
        "split_cosine": mean(found["split"]),
        "seed_correlation": mean(correlations["seed"]),
        "split_correlation": mean(correlations["split"]),
        "null_cosine": np.mean([match(real, of)[1] for of in permuted], axis=0),
        "runner_up_cosine": np.mean([others for _, _, others in matched], axis=0),
    }
    again = columns["split_cosine"] if found["split"] else columns["seed_cosine"]
    chance = np.maximum(columns["null_cosine"], columns["runner_up_cosine"])
    columns["stable"] = (again >= STABLE) & (again > chance)
    return columns


def _unit(loadings: Float32) -> Float64:
    wide = loadings.astype(np.float64)
    lengths = np.linalg.norm(wide, axis=1, keepdims=True)
    unit: Float64 = wide / np.where(lengths > 0, lengths, 1)
    return unit


def _standard(scores: Float32) -> Float64:
    """Return columns of mean 0 and length 1; a constant one is 0."""
    centred = scores.astype(np.float64) - scores.mean(0, dtype=np.float64)
    lengths = np.linalg.norm(centred, axis=0)
    standard: Float64 = centred / np.where(lengths > 0, lengths, 1)
    return standard


def _median(values: Float64) -> float | None:
    return float(np.median(values)) if np.isfinite(values).all() else None


@dataclass(frozen=True)
class _Refit:
    """Fits the matrix of some factors again."""

    factors: Factors
    budget_bytes: int
    reserved_bytes: int

    def _scan(self, rows: Rows, n_fits: int) -> Scan:
        factors = self.factors
        settings = self._settings(range(n_fits))
        more = reserved_bytes(settings, factors.n_neurons, factors.store)
        return Scan(
            factors.store,
            factors.sites,
            rows,
            budget_bytes=self.budget_bytes,
            reserved_bytes=self.reserved_bytes + more,
        )

    def _settings(self, seeds: Iterable[int], most: int | None = None) -> Settings:
        summary = self.factors.summary
        k = int(summary["n_components"])
        return Settings(
            tuple((k if most is None else min(k, most), seed) for seed in seeds),
            equal_energy=summary["scale"] == "site",
            active=summary.get("active"),
            passes=max(1, int(summary["passes"])),
            tolerance=None,
            max_passes=1,
        )

    def _find(self, scan: Scan, seeds: Iterable[int]) -> list[Float32]:
        """Return the loadings of several seeds, all of which share the reads."""
        fit = Fit(scan, self._settings(seeds, scan.n_rows), Engine.local(), None, Clock(None), None)
        ours = matrix_of(self.factors, scan)
        found = []
        for loadings in fit.loadings():
            # Scales are of a sample of the rows of each fit.
            loadings = loadings * (ours.column_scales / fit.matrix.column_scales)
            padded = np.zeros(self.factors.loadings.shape, np.float32)
            padded[: len(loadings)] = loadings / loadings.norm(dim=1, keepdim=True).clamp(min=1e-30)
            found.append(padded)
        return found

    def fit(self, rows: Rows, seeds: Sequence[int]) -> list[Float32]:
        """Return the loadings of fits to some rows."""
        return self._find(self._scan(rows, len(seeds)), seeds)

    def fit_permuted(self, rows: Rows, seed: int) -> Float32:
        """Return the loadings of a fit to rows in which every neuron was permuted by itself."""
        scan = self._scan(rows, 1)
        rng = np.random.default_rng([seed, 1])
        spare = (self.budget_bytes - self.reserved_bytes) // 2
        n_rows = max(1, min(scan.n_rows, spare // scan.ranked.row_bytes))
        blocks = itertools.chain.from_iterable(scan.mixed_ranges(epoch=seed, limit=n_rows))
        chosen = np.concatenate(list(blocks))[:n_rows]
        kept = scan.kept(rng.permutation(chosen))
        assert isinstance(kept.ranked, KeptRows)
        kept.ranked.turn_columns(rng)
        return self._find(kept, [seed])[0]

    def scores(self, rows: Rows, fits: Sequence[Float32]) -> list[Float32]:
        """Return the scores of some of the rows by each of some fits, ``(rows, k)``."""
        scan = self._scan(rows, 1)
        k = len(self.factors.loadings)
        most = (self.budget_bytes - self.reserved_bytes) // (4 * 16 * k * len(fits))
        limit = max(1, min(_HELD_ROWS, most))
        matrix = matrix_of(self.factors, scan)
        n_active = self.factors.summary.get("n_active")
        solvers = [solver(torch.from_numpy(x), n_active, _SWEEPS, _TOLERANCE) for x in fits]
        found: list[list[Float32]] = [[] for _ in fits]
        for block in scan.mixed(limit=limit):
            values = matrix.rows(block.values)
            for scores, solved in zip(found, solvers, strict=True):
                scores.append(solved(values).numpy().copy())
        return [np.concatenate(scores) for scores in found]
