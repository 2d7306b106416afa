"""Non-negative matrix factorisation of sites: a start from a sample, online passes, an exact pass.

The matrix is all chosen rows of all sites side by side, clipped at zero, each site multiplied by
its scale: ``A ≈ scores @ loadings``.

1. *Start* (`start`).  A randomised SVD of a sample gives the NNDSVDa loadings.
2. *Online passes* over mixed rows.  For each block the codes H follow from the loadings L; of all
   blocks so far only ``P = Σ HᵀA`` and ``Q = Σ HᵀH`` are kept, older ones decaying since their
   codes came from worse loadings; then one HALS sweep improves L given P and Q.
3. *Exact pass* (`exact`) in row order.  The loadings stay; codes are solved to convergence and
   become the scores; error and certificates follow without a residual being formed.

NMF has no unique optimum, so how far one can trust a factorisation shows in its certificates: the
projected gradient (0 at a stationary point), the error the same loadings reach with signed scores
(the price of scores >= 0), the error of one factor along the mean (what size alone explains), and
the energy that clipping threw away.

References
----------
Cichocki & Phan, Fast local algorithms for large scale nonnegative matrix and tensor factorizations,
IEICE Trans. Fundamentals E92-A (2009): HALS.  Mairal, Bach, Ponce & Sapiro, Online learning for
matrix factorization and sparse coding, JMLR 11 (2010): the surrogate and its decay.
"""

from __future__ import annotations

import functools
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt
import torch

from actstore import durable
from actstore.decompose.codes import descend, solve_codes
from actstore.decompose.exact import ExactPass
from actstore.decompose.factors import Factors
from actstore.decompose.matrix import Matrix
from actstore.decompose.scan import BLOCK_ROWS, Block, Scan, chosen_rows
from actstore.decompose.score_folds import N_EXEMPLARS
from actstore.decompose.start import OVERSAMPLING, nndsvda
from actstore.decompose.write_factors import (
    LOADING_BYTES,
    LOADINGS_AT_ONCE,
    Found,
    write_factors,
)
from actstore.errors import ArgumentError
from actstore.site import Site, summarize
from actstore.store import CoreStore, Rows
from actstore.store.budget import Progress, parse_budget

_SAMPLE_ROWS = 8192
_ONLINE_SWEEPS = 6


def nmf(
    store: CoreStore,
    sites: str | Site | Iterable[str | Site] | None,
    n_components: int,
    *,
    scale: str | None = "site",
    rows: Rows | str = "content",
    seed: int = 0,
    passes: int = 1,
    name: str | None = None,
    budget: int | str | None = None,
    progress: Progress | None = None,
) -> Factors:
    """Factorise sites into non-negative factors, and keep the result in the store.

    Cost: `passes` + 1 passes over the sites and a sample, about ``4 (passes + 1) n_rows n_neurons
    n_components`` operations; memory O(n_neurons x n_components), whatever the number of rows.
    Deterministic for the same committed rows, seed and thread count.

    Parameters
    ----------
    store : CoreStore
        The store; its committed segments are used.
    sites : str, Site, iterable of these, or None
        Sites of one space, as names or patterns; None means all.
    n_components : int
        Number of factors, at most the number of neurons and of rows.
    scale : {"site", None}, default "site"
        ``"site"`` gives every site the same energy, estimated from a sample, so that no layer
        owns the result because its activations are larger; None takes values as they are.
    rows : Rows or str, default "content"
        The rows to factorise: ``"content"``, ``"all"``, or a set of rows.
    seed : int, default 0
        Decides sample, start and order of rows.
    passes : int, default 1
        Online passes.  A second lowers the error by about 0.1 % and doubles their time.
    name : str, optional
        Name of the result; by default ``nmf-1`` and so on.
    budget : int or str, optional
        Memory it may take, in bytes or as ``"2GB"``; by default the smaller of 4 GiB and half of
        what is free.
    progress : callable, optional
        Called with (stage, rows done, rows in all).

    Returns
    -------
    Factors
        The factors, largest first by their share of the energy.

    Raises
    ------
    ArgumentError
        If an argument cannot be used, or `rows` chooses none.
    SiteNotFound
        If the store does not have a site.
    BudgetExceeded
        If the smallest blocks and the factors do not fit the budget.
    NonFiniteActivation
        If a chosen row holds NaN or infinity.
    ResultExists
        If the name is taken.

    See Also
    --------
    sklearn.decomposition.MiniBatchNMF : the same model, by multiplicative updates.
    """
    if scale not in ("site", None):
        raise ArgumentError(f"scale = {scale!r} is unknown; expected 'site' or None.")
    if passes < 1:
        raise ArgumentError(f"passes = {passes} is too few; expected 1 or more.")
    infos = store.select(sites)
    space = infos[0].site.space
    chosen = chosen_rows(store, rows, infos)
    n_neurons = sum(info.width for info in infos)
    limit = min(n_neurons, chosen.n_rows)
    if chosen.n_rows and not 1 <= n_components <= limit:
        raise ArgumentError(
            f"n_components = {n_components} cannot be used; expected 1 … {limit:,} for "
            f"{n_neurons:,} neurons of {summarize(info.site for info in infos)} and "
            f"{chosen.n_rows:,} rows ({chosen.rule}) of {store.path}."
        )
    budget_bytes = parse_budget(budget)
    reserved_bytes = _reserved_bytes(n_components, n_neurons, store)
    scan = Scan(
        store,
        infos,
        chosen,
        budget_bytes=budget_bytes,
        reserved_bytes=reserved_bytes,
        seed=seed,
    )
    scan.rows_at_once(BLOCK_ROWS)  # refuse before anything is read
    writer = store.new_result("nmf", name, {})
    clock = _Clock(progress)

    sample = scan.sample(_SAMPLE_ROWS)
    clock.start("start")
    matrix = (
        Matrix.with_equal_energy(scan, sample)
        if scale == "site"
        else Matrix(scan, [1.0] * len(infos))
    )
    loadings = nndsvda(matrix, sample, n_components, seed)
    n_sampled = len(sample)
    del sample  # the passes read into its memory
    loadings, mean = _online_passes(matrix, loadings, passes, clock)
    durable.make_folder(store.path / "work")
    with writer, tempfile.TemporaryFile(dir=store.path / "work") as spool:
        exact = ExactPass(matrix, loadings, mean)
        blocks = clock.over("exact pass", scan.ordered(), scan.n_rows)
        exact.run(blocks, spool)
        clock.start("write")
        order = np.argsort(-exact.shares, kind="stable")
        found = Found(
            infos,
            chosen,
            loadings.numpy()[order],
            functools.partial(_spooled, spool, chosen, order),
            {"share": exact.shares[order]},
            exact.site_shares[order],
        )
        write_factors(writer, store, found, budget_bytes - reserved_bytes)
        clock.stop()
        summary = {
            "n_components": n_components,
            "sites": [str(info.site) for info in infos],
            "space": space,
            "n_neurons": n_neurons,
            "scale": scale,
            "site_scales": {str(i.site): s for i, s in zip(infos, matrix.scales, strict=True)},
            "rows": chosen.rule,
            "n_rows": scan.n_rows,
            "n_planned_segments": len(store.planned),
            "n_sampled_rows": n_sampled,
            "seed": seed,
            "passes": passes,
            **exact.summary(),
            "n_exemplars": N_EXEMPLARS,
            "n_reads": scan.ranked.n_reads,
            "bytes_read": scan.ranked.bytes_read,
            "seconds": clock.seconds,
            "threads": torch.get_num_threads(),
            "online_products": str(product_dtype()).removeprefix("torch."),
            "versions": {"numpy": np.__version__, "torch": str(torch.__version__)},
        }
        result = writer.finish(summary)
    return Factors(store, result)


def find_loadings(matrix: Matrix, n_components: int, seed: int, passes: int) -> torch.Tensor:
    """Return loadings of unit length, ``(k, width)``, without scores: the start, online passes."""
    start = nndsvda(matrix, matrix.scan.sample(_SAMPLE_ROWS), n_components, seed)
    return _online_passes(matrix, start, passes, _Clock(None))[0]


def _reserved_bytes(n_components: int, n_neurons: int, store: CoreStore) -> int:
    """Return what the factorisation needs beside the blocks, at its hungriest.

    At the start: the range, its image and the QR of both.  Later: loadings, directions, and P in
    float32 while it is added and in float64.  At the end: some of the long table of loadings.  And
    always the scores of one segment, before and after they are put in order.
    """
    start = 20 * (n_components + OVERSAMPLING) * n_neurons
    later = 28 * (n_components + 1) * n_neurons
    table = LOADING_BYTES * max(n_neurons, LOADINGS_AT_ONCE)
    return max(start, later, table) + 12 * n_components * store.meta.segment_rows


class _Clock:
    """Times the stages and reports their progress."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress
        self._stage = ""
        self._began = 0.0
        self.seconds: dict[str, float] = {}

    def start(self, stage: str) -> None:
        """Begin a stage; the one before ends."""
        self.stop()
        self._stage, self._began = stage, time.perf_counter()

    def stop(self) -> None:
        """End the stage."""
        if self._stage:
            self.seconds[self._stage] = round(time.perf_counter() - self._began, 3)
        self._stage = ""

    def over(self, stage: str, blocks: Iterable[Block], n_rows: int) -> Iterator[Block]:
        """Serve the blocks of a stage."""
        self.start(stage)
        done = 0
        for block in blocks:
            yield block
            done += len(block.row_ids)
            if self._progress:
                self._progress(stage, done, n_rows)


def _online_passes(
    matrix: Matrix, loadings: torch.Tensor, passes: int, clock: _Clock
) -> tuple[torch.Tensor, torch.Tensor]:
    """Improve the loadings; return them with unit length, and the mean row of the matrix."""
    k, width = loadings.shape
    scan = matrix.scan
    images = torch.zeros(k, width)  # P
    gram = torch.zeros(k, k)  # Q
    total = torch.zeros(width, dtype=torch.float64)
    n_blocks = 0
    for epoch in range(passes):
        blocks = clock.over(f"online pass {epoch + 1}", scan.mixed(epoch=epoch), scan.n_rows)
        for block in blocks:
            rows = matrix.clip(block.values)
            n_blocks += 1
            factors = rows.to(product_dtype())
            products = (loadings.to(factors.dtype) @ factors.T).float()
            codes, _ = solve_codes(products, loadings @ loadings.T, n_sweeps=_ONLINE_SWEEPS)
            # The codes of the first blocks came from loadings that were not worth much.
            decay = max(0.0, 1 - 4 / n_blocks**0.75)
            # A last row of ones, and the mean costs no pass over the block of its own.
            added = torch.cat([codes, torch.ones(1, len(rows))]).to(factors.dtype) @ factors
            images.mul_(decay).add_(added[:-1])
            gram.mul_(decay).addmm_(codes, codes.T)
            if epoch == 0:
                total += added[-1]
            _improve(loadings, images, gram)
            _revive(loadings, images, gram, rows, codes)
    lengths = loadings.norm(dim=1, keepdim=True)
    return loadings / lengths.clamp(min=1e-30), (total / scan.n_rows).float()


@functools.cache
def product_dtype() -> torch.dtype:
    """Return the dtype of the online passes' products: bfloat16 where the processor computes in it.

    They lead to the loadings only, and rounding them to eight bits leaves the error as it is while
    the products take a sixth of the time.  Scores, error and certificates come from float32.
    """
    cpuinfo = Path("/proc/cpuinfo")
    flags = set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()
    return torch.bfloat16 if flags & {"avx512_bf16", "amx_bf16", "bf16"} else torch.float32


def _improve(loadings: torch.Tensor, images: torch.Tensor, gram: torch.Tensor) -> None:
    """Improve each component in turn, given ``P`` and ``Q``: one HALS sweep."""
    weights = gram.diagonal()[:, None]
    used = weights > 0
    targets = torch.where(used, images / weights, loadings)
    descend(targets, torch.where(used, gram / weights, 0), loadings, n_sweeps=1)


def _revive(
    loadings: torch.Tensor,
    images: torch.Tensor,
    gram: torch.Tensor,
    rows: torch.Tensor,
    codes: torch.Tensor,
) -> None:
    """Give components that no row uses what the worst explained row of the block is missing."""
    dead = torch.nonzero((gram.diagonal() <= 0) | (loadings.amax(1) <= 0)).ravel().tolist()
    if not dead:
        return
    residual = rows - codes.T @ loadings
    worst = torch.argsort(residual.norm(dim=1), descending=True, stable=True)
    for j, row in zip(dead, worst.tolist(), strict=False):
        loadings[j] = residual[row].clamp(min=0)
        images[j] = 0
        gram[j] = 0
        gram[:, j] = 0


def _spooled(
    spool: IO[bytes], chosen: Rows, order: npt.NDArray[np.int64], segment: int
) -> npt.NDArray[np.float32]:
    """Return the scores of a segment, as they were written in row order, factors in order."""
    k = len(order)
    before = sum(len(chosen.offsets(s)) for s in chosen.segments if s < segment)
    n_rows = len(chosen.offsets(segment))
    spool.seek(4 * k * before)
    scores: npt.NDArray[np.float32] = np.frombuffer(spool.read(4 * k * n_rows), np.float32)
    return scores.reshape(-1, k)[:, order]
