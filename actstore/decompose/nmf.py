"""Factorisation of sites into non-negative factors, out of core: what can be asked for.

The matrix is all chosen rows of all sites side by side, clipped at zero, each site multiplied by
its scale: ``A ≈ scores @ loadings``.  How it is found is told in `fit`.

NMF has no unique optimum, so how far one can trust a factorisation shows in its certificates: the
projected gradient (0 at a stationary point), the error the same loadings reach with signed scores
(the price of scores >= 0), the error of one factor along the mean (what size alone explains), and
the energy that clipping threw away.

References
----------
Cichocki & Phan, Fast local algorithms for large scale nonnegative matrix and tensor factorizations,
IEICE Trans. Fundamentals E92-A (2009): HALS.  Mairal, Bach, Ponce & Sapiro, Online learning for
matrix factorization and sparse coding, JMLR 11 (2010): the surrogate and its decay.  Ding, Li &
Jordan, Convex and semi-nonnegative matrix factorizations, IEEE TPAMI 32 (2010): signed loadings.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import itertools
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch

from actstore.decompose.bound import check_bound, exact_bounds
from actstore.decompose.checkpoint import Checkpoint
from actstore.decompose.clock import Clock
from actstore.decompose.device import device
from actstore.decompose.engine import Engine
from actstore.decompose.exact import Exact, scores_file
from actstore.decompose.factors import Factors
from actstore.decompose.fit import Fit, Settings
from actstore.decompose.online import product_dtype
from actstore.decompose.scan import BLOCK_ROWS, Scan, chosen_rows
from actstore.decompose.score_folds import N_EXEMPLARS
from actstore.decompose.start import OVERSAMPLING
from actstore.decompose.write_factors import (
    LOADING_BYTES,
    LOADINGS_AT_ONCE,
    Found,
    check_disk,
    write_factors,
)
from actstore.errors import ActstoreError, ArgumentError, BudgetExceeded, DamagedFile
from actstore.site import Site, summarize
from actstore.store import CoreStore, ResultWriter, Rows, SiteInfo
from actstore.store.budget import Progress, as_count, parse_budget

_MOST_FACTORS = 1024

Sites = str | Site | Iterable[str | Site] | None


def nmf(
    store: CoreStore,
    sites: Sites,
    n_components: int | Sequence[int],
    *,
    scale: str | None = "site",
    mode: str | None = None,
    signed: bool = False,
    active: float | None = None,
    rows: Rows | str = "content",
    seed: int | Sequence[int] = 0,
    passes: int = 1,
    tolerance: float | None = None,
    max_passes: int = 100,
    start: npt.ArrayLike | None = None,
    bound: str | None = None,
    name: str | None = None,
    engine: Engine | None = None,
    budget: int | str | None = None,
    progress: Progress | None = None,
) -> Factors | list[Factors]:
    """Factorise sites into non-negative factors, and keep the result in the store.

    Cost: `passes` + 1 reads of the sites, about ``4 (passes + 1) n_rows n_neurons n_components``
    operations; memory O(n_neurons x n_components), whatever the number of rows.  Several numbers of
    components and several seeds share all reads.  Deterministic for the same committed rows, seed
    and thread count.  A fit that was interrupted goes on where it was when it is called again.

    Parameters
    ----------
    store : CoreStore
        The store; its committed segments are used.
    sites : str, Site, iterable of these, or None
        Sites of one space, as names or patterns; None means all.
    n_components : int or sequence of int
        Number of factors, at most 1,024 and at most the number of neurons and of rows.  Of several
        numbers and seeds, every number is fitted with every seed.
    scale : {"site", None}, default "site"
        ``"site"`` gives every site the same energy, estimated from a sample, so that no layer
        owns the result because its activations are larger; None takes values as they are.
    mode : {"ecco", None}, default None
        ``"ecco"`` is Ecco's objective: values clipped at zero and not scaled, whatever `scale` is.
    signed : bool, default False
        Whether values below zero stay and loadings may be negative; scores never are.
    active : float, optional
        With `signed`, and required there: the share of a row's scores that may be above zero, of
        which it takes the largest.  Without a limit such factors would span what the truncated SVD
        does, and any rotation of them would do as well.
    rows : Rows or str, default "content"
        The rows to factorise: ``"content"``, ``"all"``, or a set of rows.
    seed : int or sequence of int, default 0
        Decides sample and start.  The order of rows is the same for all.
    passes : int, default 1
        Online passes.  With two or more, the best of several beginnings is taken (four up to 64
        components, one above 128), so that the factors depend less on chance.  The error is lower
        by about 0.1 %, for not quite twice the time.
    tolerance : float, optional
        Go on, after the online passes, until the KKT residual is at most this, by passes over all
        rows; the certificates say what was reached.
    max_passes : int, default 100
        How many of these passes there may be.
    start : array_like (k, n_neurons), optional
        Loadings to start from, of the sites in their order, as `Factors.loadings` has them; by
        default they are found in a sample. Either way they are improved on it before the first
        online pass; with ``passes=0`` batch passes go on from where they are.
    bound : {"exact", None}, default None
        ``"exact"`` adds what no factorisation of so many factors can fall below: the error of the
        truncated SVD, from the Gram of all neurons (at most 20,000), for one more read.
    name : str, optional
        Name of the result; by default ``nmf-1`` and so on.  Of several, ``NAME-k16-seed2``.
    engine : Engine, optional
        Where the reads are made; by default in this process, from `Engine.on` on workers.
    budget : int or str, optional
        Memory it may take, in bytes or as ``"2GB"``; by default the smaller of 4 GiB and half of
        what is free.
    progress : callable, optional
        Called with (stage, rows done, rows in all).

    Returns
    -------
    Factors or list of Factors
        The factors, largest first by their share of the energy.  A list if several numbers or
        seeds were given as a sequence: by number, then by seed.

    Raises
    ------
    ArgumentError
        If an argument cannot be used, or `rows` chooses none.
    SiteNotFound
        If the store does not have a site.
    BudgetExceeded
        If the smallest blocks and the factors do not fit the budget.
    NotEnoughDisk
        If the store's disk cannot hold the scores.
    NonFiniteActivation
        If a chosen row holds NaN or infinity.
    ResultExists
        If the name is taken.
    StoreBusy
        If another process is at the same factorisation.

    See Also
    --------
    sklearn.decomposition.MiniBatchNMF : the same model, by multiplicative updates.
    """
    ks, seeds = _counts("n_components", n_components, 1), _counts("seed", seed, 0)
    _check_options(scale, mode, signed, active, bound, passes, tolerance, max_passes)
    infos = store.select(sites)
    chosen = chosen_rows(store, rows, infos)
    n_neurons = sum(info.width for info in infos)
    limit = min(n_neurons, chosen.n_rows, _MOST_FACTORS)
    if chosen.n_rows and max(ks) > limit:
        raise ArgumentError(
            f"n_components = {max(ks)} cannot be used; expected 1 … {limit:,} for "
            f"{n_neurons:,} neurons of {summarize(info.site for info in infos)} and "
            f"{chosen.n_rows:,} rows ({chosen.rule}) of {store.path}."
        )
    begin = None if start is None else _start_loadings(start, ks, infos, signed)
    settings = Settings(
        tuple(itertools.product(ks, seeds)),
        scale == "site" and mode is None,
        active,
        passes,
        tolerance,
        max_passes,
    )
    engine = engine or Engine.local()
    budget_bytes = engine.share_of(parse_budget(budget))
    reserved = reserved_bytes(settings, n_neurons, store)
    scan = Scan(store, infos, chosen, budget_bytes=budget_bytes, reserved_bytes=reserved)
    scan.rows_at_once(BLOCK_ROWS)  # refuse before anything is read
    if bound is not None:
        check_bound(scan)
    several = not (isinstance(n_components, int) and isinstance(seed, int))
    names = _names(store, name, settings.fits) if several else [name]
    writers = [store.new_result("nmf", each, {}) for each in names]
    clock = Clock(progress)
    with ExitStack() as entered:
        for writer in writers:
            entered.enter_context(writer)
        key = _key(store, infos, chosen, settings, begin)
        checkpoint = entered.enter_context(Checkpoint(store.path, key))
        written = sum(path.stat().st_size for path in checkpoint.folder.glob("scores-*"))
        check_disk(store, infos, chosen, [k for k, _ in settings.fits], written_bytes=written)
        try:
            fit = Fit(scan, settings, engine, checkpoint, clock, begin)
            found = fit.run()
            bounds: dict[int, float] = {}
            if bound is not None:
                clock.start("bound", scan.n_rows)
                bounds = exact_bounds(engine, scan, fit.matrix, ks, clock.advance)
            clock.start("write")
            for number, (exact, writer) in enumerate(zip(found, writers, strict=True)):
                _write(writer, store, infos, chosen, exact, number, checkpoint.folder, scan)
            clock.stop()
        except BudgetExceeded:
            raise  # what was finished stands
        except ActstoreError:
            checkpoint.clear()
            raise
        shared = {
            "sites": [str(info.site) for info in infos],
            "space": infos[0].site.space,
            "n_neurons": n_neurons,
            "mode": mode,
            "scale": "site" if settings.equal_energy else None,
            "site_scales": {
                str(info.site): x for info, x in zip(infos, fit.matrix.scales, strict=True)
            },
            "signed": signed,
            "active": active,
            "rows": chosen.rule,
            "n_rows": scan.n_rows,
            "n_planned_segments": len(store.planned),
            "passes": passes,
            "tolerance": tolerance,
            "n_batch_passes": fit.n_batch_passes,
            "n_exemplars": N_EXEMPLARS,
            "n_fits": len(settings.fits),
            "reads": round((fit.rows_read + len(bounds) * scan.n_rows) / scan.n_rows, 4),
            "n_reads": scan.ranked.n_reads,
            "bytes_read": scan.ranked.bytes_read,
            "seconds": clock.seconds,
            "threads": torch.get_num_threads(),
            "online_products": product_dtype(),
            "device": device().type,
            "versions": _versions(),
        }
        results = []
        for (k, mine), n_active, exact, writer in zip(
            settings.fits, settings.n_active, found, writers, strict=True
        ):
            summary = exact.summary()
            if k in bounds:
                summary["certificates"]["svd_bound"] = bounds[k]
            own = {"n_components": k, "seed": mine, "n_active": n_active}
            results.append(Factors(store, writer.finish({**own, **shared, **summary})))
        checkpoint.clear()
    return results if several else results[0]


def _write(
    writer: ResultWriter,
    store: CoreStore,
    infos: Sequence[SiteInfo],
    chosen: Rows,
    exact: Exact,
    number: int,
    folder: Path,
    scan: Scan,
) -> None:
    """Write one of the factorisations, its factors in order of their shares."""
    order = np.argsort(-exact.shares, kind="stable")
    found = Found(
        infos,
        chosen,
        exact.loadings.numpy()[order],
        partial(_scores_of, folder, number, order, chosen),
        {"share": exact.shares[order]},
        exact.site_shares[order],
    )
    write_factors(writer, store, found, scan.budget_bytes - scan.reserved_bytes)


def _scores_of(
    folder: Path, number: int, order: npt.NDArray[np.int64], chosen: Rows, segment: int
) -> npt.NDArray[np.float32]:
    """Return the scores of a segment, ``(rows, k)``, as a task left them, factors in order."""
    path = scores_file(folder, number, segment)
    scores = np.load(path, allow_pickle=False)
    n_rows = len(chosen.offsets(segment))
    if scores.shape != (n_rows, len(order)):
        raise DamagedFile(
            f"{path} holds scores of shape {scores.shape}; expected {(n_rows, len(order))}. Run "
            "the same factorisation again."
        )
    return cast(npt.NDArray[np.float32], scores[:, order])


# -- arguments -----------------------------------------------------------------------------------


def _counts(name: str, value: int | Sequence[int], least: int) -> list[int]:
    """Return one whole number, or several different ones, as a list."""
    values = list(value) if isinstance(value, Iterable) else [value]
    counts = [as_count(name, each, least) for each in values]
    if not counts or len(set(counts)) < len(counts):
        raise ArgumentError(
            f"{name} = {value!r} cannot be used; expected a whole number, or several different "
            "ones."
        )
    return counts


def _check_options(
    scale: str | None,
    mode: str | None,
    signed: bool,
    active: float | None,
    bound: str | None,
    passes: int,
    tolerance: float | None,
    max_passes: int,
) -> None:
    """Raise if options are unknown or contradict each other."""
    if scale not in ("site", None):
        raise ArgumentError(f"scale = {scale!r} is unknown; expected 'site' or None.")
    if mode not in ("ecco", None):
        raise ArgumentError(f"mode = {mode!r} is unknown; expected 'ecco' or None.")
    if bound not in ("exact", None):
        raise ArgumentError(f"bound = {bound!r} is unknown; expected 'exact' or None.")
    if signed and mode == "ecco":
        raise ArgumentError(
            "mode = 'ecco' clips values at zero, and signed = True keeps them; give one of the two."
        )
    if signed and active is None:
        raise ArgumentError(
            "signed = True needs active=, the share of a row's scores that may be above zero, such "
            "as active=0.1: without a limit the factors are not identified."
        )
    if active is not None and not signed:
        raise ArgumentError(f"active = {active} limits the scores of signed=True only.")
    if active is not None and not 0 < active <= 1:
        raise ArgumentError(f"active = {active} is no share; expected more than 0, at most 1.")
    if tolerance is not None and not tolerance > 0:
        raise ArgumentError(f"tolerance = {tolerance} cannot be reached; expected more than 0.")
    least = 0 if tolerance is not None else 1
    if passes < least:
        raise ArgumentError(
            f"passes = {passes} is too few; expected {least} or more"
            + (", or a tolerance= to run to instead." if least else ".")
        )
    as_count("max_passes", max_passes, 1)


def _start_loadings(
    start: npt.ArrayLike, ks: Sequence[int], infos: Sequence[SiteInfo], signed: bool
) -> torch.Tensor:
    """Return loadings to start from as float32.

    Raises
    ------
    ArgumentError
        If they are of another shape, not finite, or negative where they must not be.
    """
    width = sum(info.width for info in infos)
    loadings = np.array(start, dtype=np.float32)
    if len(ks) > 1 or loadings.shape != (ks[0], width):
        raise ArgumentError(
            f"start = an array of shape {loadings.shape}; expected one of shape "
            f"({' and '.join(map(str, ks))}, {width:,}): n_components rows over the neurons of "
            f"{summarize(info.site for info in infos)}."
        )
    if not np.isfinite(loadings).all() or (not signed and loadings.min() < 0):
        raise ArgumentError(
            "start = loadings that are negative or not finite; expected finite numbers of 0 and "
            "more, or signed=True."
        )
    return torch.from_numpy(loadings)


def _names(store: CoreStore, name: str | None, fits: Sequence[tuple[int, int]]) -> list[str | None]:
    """Return the names of several results."""
    taken = [result.name for result in store.results("nmf")]
    numbers = (f"nmf-{number}" for number in itertools.count(1))
    free = (n for n in numbers if not any(t == n or t.startswith(f"{n}-") for t in taken))
    base = name or next(free)
    return [f"{base}-k{k}-seed{seed}" for k, seed in fits]


def reserved_bytes(settings: Settings, n_neurons: int, store: CoreStore) -> int:
    """Return what the factorisation needs beside the blocks, at its hungriest.

    At the start: the range, its image and the QR of both.  Later, and where several beginnings are
    tried: loadings, P, the stack of all loadings, and the sums of a thread and of those before it.
    In the exact pass: loadings and P in float64, likewise.  At the end: some of the long table of
    loadings.  And always the scores of one segment, before and after they are put in order.
    """
    n_factors = sum(k for k, _ in settings.fits)
    start = 20 * (n_factors + OVERSAMPLING * len(settings.fits)) * n_neurons
    later = 36 * (settings.n_stacked + 1) * n_neurons
    table = LOADING_BYTES * max(n_neurons, LOADINGS_AT_ONCE)
    return max(start, later, table) + 12 * n_factors * store.meta.segment_rows


def _key(
    store: CoreStore,
    infos: Sequence[SiteInfo],
    chosen: Rows,
    settings: Settings,
    start: torch.Tensor | None,
) -> dict[str, Any]:
    """Return everything that decides the outcome of a fit."""
    digest = hashlib.sha256()
    for segment in chosen.segments:
        digest.update(f"{segment}:".encode())
        digest.update(chosen.bits[segment].tobytes())
        for file, facts in sorted(store.commit_of(segment).files.items()):
            digest.update(f"{file} {facts.crc32c}".encode())
    if start is not None:
        digest.update(start.numpy().tobytes())
    return {
        **asdict(settings),
        "sites": [str(info.site) for info in infos],
        "rows": digest.hexdigest(),
        "products": product_dtype(),
        "versions": _versions(),
    }


def _versions() -> dict[str, str]:
    return {
        "actstore": importlib.metadata.version("actstore"),
        "numpy": np.__version__,
        "torch": str(torch.__version__),
    }
