"""One computation of a similarity: a measure and its settings put to a scan."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from threadpoolctl import threadpool_limits

from actstore.decompose import cca, cka_exact
from actstore.decompose.cka import (
    BATCH_ROWS,
    DECKS_AT_ONCE,
    MIN_BATCH_ROWS,
    MIN_BATCHES,
    MIN_DOCUMENTS,
    Deck,
    Estimate,
    channel_shares,
    estimate,
)
from actstore.decompose.engine import Engine
from actstore.decompose.moments import Frame, Tile, block_rows, frame_of, tiles
from actstore.decompose.nulls import shifted_products
from actstore.decompose.ranked import more_rows
from actstore.decompose.scan import Scan
from actstore.decompose.subject import Subject
from actstore.errors import ArgumentError, did_you_mean
from actstore.store.budget import Progress

Float64 = npt.NDArray[np.float64]

MEASURES = ("cka", "cca", "svcca", "pwcca")
"""The measures there are."""

METHODS = ("estimate", "exact")
"""How CKA is computed; the others are exact always."""

VARIANTS = ("paper", "svcca")
"""Whose PWCCA."""

_OVERHEAD_BYTES = 1 << 26


@dataclass(frozen=True)
class Settings:
    """What was asked for, checked."""

    measure: str
    """One of `MEASURES`."""
    method: str
    """One of `METHODS`."""
    variant: str
    """One of `VARIANTS`."""
    share: float | None
    """Which of the correlations mean CCA is of."""
    principal: float
    """Which directions SVCCA is of."""
    standardize: bool
    """Whether columns have one variance."""
    tolerance: float
    """Where the estimate stops."""
    max_batches: int
    """Where it stops in any case."""
    seed: int
    """Which rows it reads."""

    def __post_init__(self) -> None:
        _refuse_unknown("measure", self.measure, MEASURES)
        _refuse_unknown("method", self.method, METHODS)
        _refuse_unknown("variant", self.variant, VARIANTS)
        if self.measure != "cka" and self.method == "estimate":
            raise ArgumentError(
                f"method = 'estimate' is for CKA; {self.measure} of few rows is too high, so it is "
                "computed from all of them. Leave method out, or choose fewer with rows=."
            )
        for name, given, measure in (
            ("variant", self.variant != "paper", "pwcca"),
            ("share", self.share is not None, "cca"),
        ):
            if given and self.measure != measure:
                raise ArgumentError(
                    f"{name} = {getattr(self, name)!r} is for measure={measure!r}, and measure is "
                    f"{self.measure!r}. Leave it out."
                )
        if not self.tolerance >= 0:
            raise ArgumentError(
                f"tolerance = {self.tolerance} cannot be reached; expected 0 or more."
            )
        if self.share is not None and not 0 < self.share <= 1:
            raise ArgumentError(f"share = {self.share} is not between 0 and 1.")
        whole = isinstance(self.principal, int)
        if not (self.principal >= 1 if whole else 0 < self.principal <= 1):
            raise ArgumentError(
                f"principal = {self.principal} chooses no directions; expected how many, such as "
                "20, or the share of the variance they hold, such as 0.99."
            )


@dataclass(frozen=True)
class Found:
    """What a measure says of all pairs."""

    value: Float64
    """``(n_sites, n_sites)``; NaN where a site is constant."""
    half_width: Float64
    """Half the interval for this store."""
    text_half_width: Float64
    """Half that for text like this; NaN where it is not given."""
    null: Float64
    """The measure with one side shifted, ``(shifts, n_sites, n_sites)``."""
    max_channel_share: Float64
    """``(n_sites,)``; NaN where a site has no variance."""
    facts: dict[str, Any]
    """What the result says of how it was reached."""
    ranks: list[int] | None = None
    """Directions kept of each site."""
    extra: dict[str, Float64] | None = None
    """Further columns of the table."""


def _refuse_unknown(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ArgumentError(
            f"{name} = {value!r} is unknown; there is {', '.join(known)}."
            f"{did_you_mean(str(value), known)}"
        )


def measured(
    subject: Subject,
    settings: Settings,
    batch_rows: int | None,
    engine: Engine,
    progress: Progress | None,
) -> Found:
    """Return what a measure says of all pairs of a subject's sites."""
    n_rows = subject.rows.n_rows
    if batch_rows is None:
        batch_rows = min(BATCH_ROWS, max(MIN_BATCH_ROWS, n_rows // MIN_BATCHES))
    if batch_rows < MIN_BATCH_ROWS or settings.max_batches < 2:
        raise ArgumentError(
            f"batch_rows = {batch_rows} and max_batches = {settings.max_batches} give no estimate; "
            f"expected at least {MIN_BATCH_ROWS} rows and 2 batches."
        )
    n_sites = len(subject.infos)
    # Kernels of a batch in some copies, or of the null's; contributions by row and by document.
    of_kernels = 5 * max(DECKS_AT_ONCE * batch_rows**2, 512**2)
    of_rows = n_sites * (3 * DECKS_AT_ONCE * batch_rows + 2048)
    reserved = 8 * n_sites * (of_kernels + of_rows)
    scan = subject.scan(reserved_bytes=reserved)
    scan.rows_at_once(batch_rows)  # refuses a budget that is too small before anything is read
    frame = frame_of(scan, engine, settings.standardize)
    run = _Run(subject, settings, scan, frame, batch_rows, engine, progress)
    if settings.measure != "cka":
        return run.canonical()
    return run.exact() if settings.method == "exact" else run.estimate()


@dataclass(frozen=True)
class _Run:
    """One computation: its scan, its frame, and where it runs."""

    subject: Subject
    settings: Settings
    scan: Scan
    frame: Frame
    batch_rows: int
    engine: Engine
    progress: Progress | None

    @property
    def _spans(self) -> list[slice]:
        return list(self.scan.columns.values())

    # -- CKA -----------------------------------------------------------------------------------

    def estimate(self) -> Found:
        """Return CKA from mixed batches."""
        found = self._batches(self.settings.max_batches, self.settings.tolerance)
        return Found(
            found.value,
            found.half_width,
            found.text_half_width,
            self._null(found.hsic),
            found.max_channel_share,
            {
                "n_rows_read": found.n_rows,
                "batch_rows": self.batch_rows,
                "n_batches": found.n_batches,
                "stopped": found.stopped,
                "tolerance": self.settings.tolerance,
                "intervals": {
                    "store": "95 %: runs of rows resampled, finite-population corrected",
                    "text": _text_interval(found),
                },
            },
        )

    def _batches(self, max_batches: int, tolerance: float) -> Estimate:
        def tell(done: int, n_all: int) -> None:
            if self.progress:
                self.progress("batches", done, n_all)

        return estimate(
            self.scan,
            self.frame,
            self.engine,
            self.subject.documents_of,
            batch_rows=self.batch_rows,
            max_batches=max_batches,
            tolerance=tolerance,
            seed=self.settings.seed,
            progress=tell,
        )

    def exact(self) -> Found:
        """Return CKA from all rows; from batches what it says of other texts."""
        free = self._free_bytes()
        n_rows, width = self.scan.n_rows, self.scan.width
        if n_rows < 4:
            raise ArgumentError(
                f"rows = {self.subject.rows.rule!r} chooses {n_rows} rows of "
                f"{self.subject.store.path}; debiased CKA needs 4. "
                f"{more_rows(self.subject.rows.rule)}"
            )
        n_bytes = cka_exact.kernel_bytes(n_rows, width, len(self._spans))
        if 2 * n_rows <= width and n_bytes <= free:
            scan = self.subject.scan(reserved_bytes=n_bytes)
            exact = cka_exact.from_kernels(scan, self.frame, self.engine)
        else:
            exact = cka_exact.from_tiles(self._tiles(free), len(self._spans))
        text, said = np.full(exact.value.shape, math.nan), "not given: too few rows"
        if Deck(n_rows, self.batch_rows, self.settings.seed).n_batches >= 2:
            batches = self._batches(MIN_BATCHES, math.inf)
            text, said = batches.text_half_width, _text_interval(batches)
        shares = channel_shares(
            np.concatenate(exact.variances), [slice(s.start, s.stop) for s in self._spans]
        )
        zero = np.where(np.isnan(exact.value), math.nan, 0.0)
        return Found(
            exact.value,
            zero,
            text,
            self._null(exact.hsic),
            shares,
            {
                "n_rows_read": n_rows,
                "side": exact.side,
                "intervals": {"store": "none: all rows were read", "text": said},
            },
            extra={"biased": exact.biased},
        )

    def _null(self, hsic: Float64) -> Float64:
        def prepare(values: torch.Tensor) -> list[torch.Tensor]:
            values = self.frame.apply(values)
            values -= values.mean(0)
            return [values[:, columns] for columns in self._spans]

        shifted = self._shifted(prepare)
        own = np.where(np.diagonal(hsic) > 0, np.diagonal(hsic), math.nan)
        return shifted / np.sqrt(np.outer(own, own)) if len(shifted) else shifted

    def _shifted(self, prepare: Callable[[torch.Tensor], Sequence[torch.Tensor]]) -> Float64:
        if self.scan.n_rows < 2 * MIN_BATCH_ROWS:
            return np.empty((0, 0, 0))
        return shifted_products(self.scan, prepare, self.subject.documents_of)

    # -- all rows ------------------------------------------------------------------------------

    def _free_bytes(self, directions: bool = False) -> int:
        """Return what products may take, beside the blocks they are made from."""
        widths = self.subject.widths
        n_rows = block_rows(sum(widths))
        blocks = 2 * n_rows * (4 * sum(widths) + 2 * self.scan.ranked.row_bytes)
        held = self.subject.held_bytes + _OVERHEAD_BYTES
        if directions:  # of all sites, and decompositions of pairs
            held += 8 * sum(w * w for w in widths) + self._pairs_at_once * self._pair_bytes
        return self.subject.budget_bytes - blocks - held

    @property
    def _pair_bytes(self) -> int:
        """What decomposing a pair takes."""
        return 8 * 8 * max(self.subject.widths) ** 2

    @property
    def _pairs_at_once(self) -> int:
        """Return how many pairs are decomposed at a time, each in a thread."""
        afforded = self.subject.budget_bytes // 8 // self._pair_bytes
        return max(1, min(torch.get_num_threads(), afforded))

    def _tiles(self, free_bytes: int) -> Iterable[Tile]:
        def tell(done: int, n_all: int) -> None:
            if self.progress:
                self.progress("products", done, n_all)

        return tiles(
            self.subject.scan,
            self.subject.widths,
            [self.frame.of(columns) for columns in self._spans],
            self.engine,
            free_bytes=free_bytes,
            progress=tell,
        )

    # -- the CCA family ------------------------------------------------------------------------

    def canonical(self) -> Found:
        """Return a measure of the CCA family from the moments of all rows."""
        n_sites = len(self._spans)
        value, r2 = np.full((2, n_sites, n_sites), math.nan)
        kept: dict[int, cca.Directions] = {}
        n_at_once = self._pairs_at_once
        variances: list[Float64] = [np.empty(0)] * n_sites
        for tile in self._tiles(self._free_bytes(directions=True)):
            for site in tile.rows if tile.rows == tile.columns else ():
                covariance = tile.moment(site, site) / tile.n
                variances[site] = np.maximum(np.diagonal(covariance), 0)
                kept[site] = self._directions(site, covariance, tile.offset(site))

            def of_pair(pair: tuple[int, int], tile: Tile = tile) -> tuple[float, float, float]:
                a, b = pair
                return self._of_pair(kept[a], kept[b], tile.moment(a, b) / tile.n)

            # LAPACK gains little from a second thread, and a pair needs nothing of another.
            with (
                threadpool_limits(1 if n_at_once > 1 else None),
                ThreadPoolExecutor(n_at_once) as pool,
            ):
                pairs = tile.pairs()
                for (a, b), found in zip(pairs, pool.map(of_pair, pairs), strict=True):
                    value[a, b], value[b, a], r2[a, b] = found
                    r2[b, a] = r2[a, b]
        ranks = [kept[site].rank for site in range(n_sites)]
        weighing = np.where(np.isnan(value), math.nan, 0.0)
        n_rows = self.scan.n_rows
        facts: dict[str, Any] = {
            "n_rows_read": n_rows,
            "cut": f"variance below {cca.CUT:g} x that of storage rounding",
            "intervals": {
                "store": "none: all rows were read",
                "text": f"not given for {self.settings.measure}",
            },
        }
        if n_rows <= sum(sorted(ranks)[-2:]):
            facts["warning"] = (
                f"{n_rows:,} rows are no more than the directions of two sites together: some "
                "correlations are 1 then, of any two sites. Compare value with null_mean, or use "
                "CKA."
            )
        return Found(
            value,
            weighing,
            np.full(value.shape, math.nan),
            self._cca_null([kept[site] for site in range(n_sites)]),
            channel_shares(np.concatenate(variances), self._spans),
            facts,
            ranks,
            {"r2": r2},
        )

    def _directions(self, site: int, covariance: Float64, offset: Float64) -> cca.Directions:
        """Return what is kept of a site."""
        frame = self.frame.of(self._spans[site])
        shift = frame.shift.double().numpy()
        scale = np.ones(len(shift)) if frame.scale is None else frame.scale.double().numpy()
        # Of the values as they are stored.
        safe = np.where(scale > 0, scale, 1)
        mean = offset / safe + shift
        variance = np.diagonal(covariance) / np.square(safe)
        rounding = cca.rounding_variance(
            self.subject.infos[site].dtype, mean, np.maximum(variance, 0)
        )
        found = cca.directions(covariance, rounding * np.square(scale), mean * scale)
        if self.settings.measure == "svcca":
            found = found.leading(self.settings.principal)
        return found

    def _of_pair(
        self, a: cca.Directions, b: cca.Directions, cross: Float64
    ) -> tuple[float, float, float]:
        """Return the measure of a pair both ways, and its mean squared correlation."""
        weighted = self.settings.measure == "pwcca"
        if weighted and self.settings.variant == "svcca":
            # Google's code weighs by the site with fewer columns, the first of two alike.
            n, whitened = min(a.rank, b.rank), cca.whitened_alike(a, b, cross)
            way = (a, n, whitened) if a.rank <= b.rank else (b, n, whitened.T)
            by_a, found = cca.pwcca_svcca(*way)
            by_b = by_a
            if a.rank == b.rank and a is not b:
                by_b = cca.pwcca_svcca(b, n, whitened.T)[0]
            return by_a, by_b, cca.r2_cca(found)
        left, found, right = cca.canonical(a, b, cross, vectors=weighted)
        r2 = cca.r2_cca(found)
        if weighted:
            return cca.pwcca(a, left, found), cca.pwcca(b, right, found), r2
        mean = cca.mean_cca(found, self.settings.share)
        return mean, mean, r2

    def _cca_null(self, kept: Sequence[cca.Directions]) -> Float64:
        """Return the measure of sites of which one is shifted, ``(shifts, n_sites, n_sites)``.

        A shift's mean squared correlation is a biased HSIC of whitened rows: the unbiased one, from
        kernels, and what each row adds with itself, the ranks over the number of rows.  How the
        single correlations lie is Wachter's law for that mean square.
        """
        whiteners = [torch.from_numpy(site.whitener).float() for site in kept]

        def prepare(values: torch.Tensor) -> list[torch.Tensor]:
            values = self.frame.apply(values)
            values -= values.mean(0)
            return [
                values[:, columns] @ whitener
                for columns, whitener in zip(self._spans, whiteners, strict=True)
            ]

        shifted = self._shifted(prepare)
        if not len(shifted):
            return shifted
        null = np.full(shifted.shape, math.nan)
        for a, b in itertools.product(range(len(kept)), repeat=2):
            ranks = kept[a].rank, kept[b].rank
            if not min(ranks):
                continue
            by_itself = ranks[0] * ranks[1] / (self.scan.n_rows - 1)
            for shift, product in enumerate(shifted[:, a, b]):
                energy = (product + by_itself) / min(ranks)
                null[shift, a, b] = cca.mean_cca(
                    cca.independent(*ranks, min(max(energy, 0.0), 1.0)), self.settings.share
                )
        return null


def _text_interval(found: Estimate) -> str:
    if np.isnan(found.text_half_width).all():
        return f"not given: {found.n_documents} documents, and {MIN_DOCUMENTS} are needed"
    return f"95 %: jackknife over {found.n_documents} documents, t"
