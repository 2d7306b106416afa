"""How alike sites are: one call over a family of measures, and what it leaves behind.

Two questions are asked of a pair of sites.  *CKA* asks whether rows that are near each other at one
are near each other at the other: it keeps angles and distances, and is 1 for a rotation and a
scale.  The *CCA family* asks what of one can be had from the other by any linear map: mean CCA and
R2 count all directions alike, SVCCA those that hold most of the variance, PWCCA those that one site
uses.

All of it comes from what a scan reads: CKA from kernels of mixed batches (`cka`) or from one pass
of products (`cka_exact`), the CCA family from the same pass (`moments`, `cca`).  Beside every value
stands what it would be of nothing shared (`nulls`), and the share of variance that a site's largest
channel has: one channel of MiniLM's resid_post.5 moves CKA from 0.85 to 0.23.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from actstore.decompose import cca, cka_exact
from actstore.decompose.cka import (
    BATCH_ROWS,
    MIN_BATCH_ROWS,
    MIN_BATCHES,
    MIN_DOCUMENTS,
    Estimate,
    channel_shares,
    estimate,
)
from actstore.decompose.engine import Engine
from actstore.decompose.moments import Frame, Tile, block_rows, frame_of, tiles
from actstore.decompose.nulls import shifted_products
from actstore.decompose.scan import Scan
from actstore.decompose.similarity_result import Similarity
from actstore.decompose.subject import Subject
from actstore.errors import ArgumentError, did_you_mean
from actstore.site import Site
from actstore.store import CoreStore, Rows
from actstore.store.budget import Progress, parse_budget

Ids = npt.NDArray[np.int64]
Float64 = npt.NDArray[np.float64]

MEASURES = ("cka", "cca", "svcca", "pwcca")
"""The measures there are."""

METHODS = ("estimate", "exact")
"""How CKA is computed; the others are exact always."""

VARIANTS = ("paper", "svcca")
"""Whose PWCCA."""

_MAX_BATCHES = 4096
_OVERHEAD_BYTES = 1 << 26


@dataclass(frozen=True)
class _Settings:
    """What was asked for, checked."""

    measure: str
    method: str
    variant: str
    share: float | None
    principal: float
    standardize: bool
    tolerance: float
    max_batches: int
    seed: int

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
class _Found:
    """What a measure says of all pairs."""

    value: Float64
    half_width: Float64
    text_half_width: Float64
    null: Float64
    """``(shifts, n_sites, n_sites)``."""
    max_channel_share: Float64
    facts: dict[str, Any]
    ranks: list[int] | None = None
    extra: dict[str, Float64] | None = None


def similarity(
    store: CoreStore,
    sites: str | Site | Iterable[str | Site] | None,
    *,
    measure: str = "cka",
    method: str | None = None,
    rows: Rows | str = "content",
    tolerance: float = 0.005,
    standardize: bool = False,
    other: CoreStore | str | Path | None = None,
    variant: str = "paper",
    share: float | None = None,
    principal: float = 0.99,
    batch_rows: int | None = None,
    max_batches: int = _MAX_BATCHES,
    seed: int = 0,
    name: str | None = None,
    budget: int | str | None = None,
    client: Any = None,
    progress: Progress | None = None,
) -> Similarity:
    """Compute how alike all pairs of sites are, and keep the result in the store.

    Cost, with D columns in all: the CKA estimate takes `batch_rows` multiplications for every value
    read, of some ten thousand rows as a rule; exact CKA and the CCA family take D for every value
    of every row, one pass, or several where 8 D² bytes exceed the budget.

    Parameters
    ----------
    store : CoreStore
        The store; its committed segments are used.
    sites : str, Site, iterable of these, or None
        Two or more sites of one space, as names or patterns; None means all.
    measure : {"cka", "cca", "svcca", "pwcca"}, default "cka"
        Debiased linear CKA; mean canonical correlation; the same over leading principal directions;
        the same weighed by what the first site uses, which differs with the order of a pair.
    method : {"estimate", "exact"}, optional
        Of CKA: from mixed batches until the intervals are narrow (default), or from all rows.
    rows : Rows or str, default "content"
        The rows to compare on: ``"content"``, ``"all"``, or a set of rows.
    tolerance : float, default 0.005
        Of the estimate: stop, after 32 batches or more, once no 95 % interval for this store is
        wider than ± this.
    standardize : bool, default False
        Divide every column by its standard deviation, so that no channel counts for more than
        another. One more pass.
    other : CoreStore, str or Path, optional
        Another store over the same documents: its sites, chosen by `sites` too, are the second of
        every pair.  Rows are aligned where tokens end at the same character of a document.
    variant : {"paper", "svcca"}, default "paper"
        PWCCA as in the paper, or as google/svcca and Ecco compute it.
    share : float, optional
        Of ``"cca"``: mean of the leading correlations that hold this share of their sum; 0.98 is
        what Ecco does. Default all.
    principal : int or float, default 0.99
        Of ``"svcca"``: so many principal directions (int), or those that hold this share of the
        variance (float).
    batch_rows : int, optional
        Rows of a batch of the estimate; by default 256, or fewer where the rows would not fill 32
        batches.
    max_batches : int, default 4096
        Stop the estimate after so many in any case.
    seed : int, default 0
        Decides which rows the estimate reads.
    name : str, optional
        Name of the result; by default ``similarity-1`` and so on.
    budget : int or str, optional
        Memory it may take; by default the smaller of 4 GiB and half of what is free.
    client : distributed.Client, optional
        Dask workers to read and compute; they must see the store under its path.
    progress : callable, optional
        Called with (stage, done, in all): batches of the estimate, rows of a pass.

    Returns
    -------
    Similarity
        Values with intervals and nulls.  A debiased value may be slightly negative, and is left so;
        a site without variance has none, and is named.

    Raises
    ------
    ArgumentError
        If an argument cannot be used, there is one site only, the sites are of two spaces, the rows
        do not fill two batches, or `other` holds other documents.
    SiteNotFound
        If the store does not have a site.
    StoreNotFound
        If `other` is no store.
    BudgetExceeded
        If one batch, or the products of one pair of sites, do not fit the budget.
    NonFiniteActivation
        If a chosen row holds NaN or infinity.
    ResultExists
        If the name is taken.

    See Also
    --------
    sklearn.cross_decomposition.CCA : canonical correlations in memory, by iteration.

    References
    ----------
    Those of the modules `cka`, `cka_exact`, `cca` and `nulls`.
    """
    began = time.perf_counter()
    settings = _Settings(
        measure,
        method or ("estimate" if measure == "cka" else "exact"),
        variant,
        share,
        principal,
        standardize,
        tolerance,
        max_batches,
        seed,
    )
    if other is not None and not isinstance(other, CoreStore):
        other = CoreStore(other)
    if other is not None and client is not None:
        raise ArgumentError(
            "other and client were given; two stores are read together in this process only. "
            "Leave client= out."
        )
    subject = Subject.of(store, sites, rows, other, parse_budget(budget), seed)
    writer = store.new_result("similarity", name, {})
    engine = Engine(client) if client is not None else Engine.local()
    with writer:
        found = _measure(subject, settings, batch_rows, engine, progress)
        writer.write_table("similarity", _table(subject, settings, found))
        unlike = ~np.eye(len(subject.infos), dtype=bool)
        undefined = np.isnan(np.diagonal(found.value))
        summary = {
            "measure": measure,
            "method": settings.method,
            **({"variant": variant} if measure == "pwcca" else {}),
            **({"share": share} if measure == "cca" else {}),
            **({"principal": principal} if measure == "svcca" else {}),
            "standardize": standardize,
            "sites": [str(info.site) for info in subject.own],
            "space": subject.own[0].site.space,
            **subject.of_other(),
            "rows": subject.rows.rule,
            "n_rows": subject.rows.n_rows,
            **found.facts,
            "half_width": float(np.nanmax(found.half_width[unlike], initial=0.0)),
            "n_shifts": len(found.null),
            "undefined": {
                subject.label(int(i)): "constant over the rows read: its similarities are NaN"
                for i in np.flatnonzero(undefined)
            },
            "seed": seed,
            "seconds": {measure: round(time.perf_counter() - began, 3)},
            "threads": torch.get_num_threads(),
            "versions": {"numpy": np.__version__, "torch": str(torch.__version__)},
        }
        result = writer.finish(summary)
    return Similarity(store, result)


def _refuse_unknown(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ArgumentError(
            f"{name} = {value!r} is unknown; there is {', '.join(known)}."
            f"{did_you_mean(str(value), known)}"
        )


def _measure(
    subject: Subject,
    settings: _Settings,
    batch_rows: int | None,
    engine: Engine,
    progress: Progress | None,
) -> _Found:
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
    reserved = 8 * n_sites * (5 * max(batch_rows, 512) ** 2 + n_sites * (3 * batch_rows + 2048))
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
    settings: _Settings
    scan: Scan
    frame: Frame
    batch_rows: int
    engine: Engine
    progress: Progress | None

    @property
    def _spans(self) -> list[slice]:
        return list(self.scan.columns.values())

    # -- CKA -----------------------------------------------------------------------------------

    def estimate(self) -> _Found:
        """Return CKA from mixed batches."""
        found = self._batches(self.settings.max_batches, self.settings.tolerance)
        return _Found(
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

    def exact(self) -> _Found:
        """Return CKA from all rows; from batches what it says of other texts."""
        free = self._free_bytes()
        n_rows, width = self.scan.n_rows, self.scan.width
        if n_rows < 4:
            raise ArgumentError(
                f"rows = {self.subject.rows.rule!r} chooses {n_rows} rows of "
                f"{self.subject.store.path}; debiased CKA needs 4. Pass rows='all', or capture "
                "more segments."
            )
        n_bytes = cka_exact.kernel_bytes(n_rows, width, len(self._spans))
        if 2 * n_rows <= width and n_bytes <= free:
            scan = self.subject.scan(reserved_bytes=n_bytes)
            exact = cka_exact.from_kernels(scan, self.frame, self.engine)
        else:
            exact = cka_exact.from_tiles(self._tiles(free), len(self._spans))
        try:
            batches = self._batches(MIN_BATCHES, math.inf)
            text, said = batches.text_half_width, _text_interval(batches)
        except ArgumentError:  # too few rows for two batches
            text, said = np.full(exact.value.shape, math.nan), "not given: too few rows"
        shares = channel_shares(
            np.concatenate(exact.variances), [slice(s.start, s.stop) for s in self._spans]
        )
        zero = np.where(np.isnan(exact.value), math.nan, 0.0)
        return _Found(
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

    def _free_bytes(self) -> int:
        """Return what products may take, beside the blocks they are made from."""
        widths = self.subject.widths
        n_rows = block_rows(sum(widths))
        blocks = 2 * n_rows * (4 * sum(widths) + 2 * self.scan.ranked.row_bytes)
        # The directions of all sites, and a decomposition of the widest.
        small = 8 * (sum(w * w for w in widths) + 8 * max(widths) ** 2)
        return self.subject.budget_bytes - blocks - small - _OVERHEAD_BYTES

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

    def canonical(self) -> _Found:
        """Return a measure of the CCA family from the moments of all rows."""
        n_sites = len(self._spans)
        value, r2 = np.full((2, n_sites, n_sites), math.nan)
        kept: dict[int, cca.Directions] = {}
        variances: list[Float64] = [np.empty(0)] * n_sites
        for tile in self._tiles(self._free_bytes()):
            for site in tile.rows if tile.rows == tile.columns else ():
                covariance = tile.moment(site, site) / tile.n
                variances[site] = np.maximum(np.diagonal(covariance), 0)
                kept[site] = self._directions(site, covariance, tile.offset(site))
            for a, b in tile.pairs():
                cross = tile.moment(a, b) / tile.n
                both = self._of_pair(kept[a], kept[b], cross)
                value[a, b], value[b, a], r2[a, b] = both
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
        return _Found(
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
        left, found, right = cca.canonical(a, b, cross, vectors=weighted)
        r2 = cca.r2_cca(found)
        if not weighted:
            mean = cca.mean_cca(found, self.settings.share)
            return mean, mean, r2
        if self.settings.variant == "paper":
            return cca.pwcca(a, left, found), cca.pwcca(b, right, found), r2
        # Google's code weighs by the site with fewer columns, the first of two alike.
        by_a = cca.pwcca_svcca(a, b, cross) if a.rank <= b.rank else None
        by_b = cca.pwcca_svcca(b, a, cross.T) if by_a is None or a.rank == b.rank else by_a
        return by_b if by_a is None else by_a, by_b, r2

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


def _table(subject: Subject, settings: _Settings, found: _Found) -> pa.Table:
    """Return all ordered pairs, so that a condition on ``site_a`` finds all partners of a site."""
    n_own = len(subject.own)
    first = np.arange(n_own)
    second = first if subject.other is None else np.arange(n_own, len(subject.infos))
    a, b = (index.ravel() for index in np.meshgrid(first, second, indexing="ij"))
    names = np.array([str(info.site) for info in subject.infos])
    null = found.null if len(found.null) else np.full((1, *found.value.shape), math.nan)
    value = found.value[a, b]
    columns: dict[str, Any] = {
        "site_a": names[a],
        "site_b": names[b],
        "value": value,
        "low": value - found.half_width[a, b],
        "high": value + found.half_width[a, b],
        "text_low": value - found.text_half_width[a, b],
        "text_high": value + found.text_half_width[a, b],
        "null_mean": null[:, a, b].mean(0),
        "null_p95": np.quantile(null[:, a, b], 0.95, axis=0),
        "rank_a": pa.nulls(len(a), pa.int32()),
        "rank_b": pa.nulls(len(a), pa.int32()),
        "max_channel_share_a": found.max_channel_share[a],
        "max_channel_share_b": found.max_channel_share[b],
    }
    if found.ranks is not None:
        ranks = np.array(found.ranks, np.int32)
        columns |= {"rank_a": ranks[a], "rank_b": ranks[b]}
    columns |= {key: matrix[a, b] for key, matrix in (found.extra or {}).items()}
    if settings.measure == "pwcca":
        columns["weighing_site"] = names[_weighing(settings, found.ranks or [], a, b)]
    return pa.table(columns)


def _weighing(settings: _Settings, ranks: Sequence[int], a: Ids, b: Ids) -> Ids:
    """Return by which site of each pair PWCCA weighs."""
    if settings.variant == "paper":
        return a
    ranked = np.array(ranks)
    return np.where(ranked[a] <= ranked[b], a, b)
