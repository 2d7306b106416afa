"""The CKA estimate: debiased minibatches whose kernels serve all pairs, with two intervals.

A batch is a random sample of single rows.  Its kernels, centred without bias, give Song's unbiased
HSIC of every pair of sites, so means over batches are right for any batch size, and CKA follows.
Neighbouring rows are alike: with runs of 16 of them inside a batch the intervals held the truth in
26 % of cases.  Yet a disk is read in runs.  So runs are dealt by row: a *deck* is as many runs as a
batch has rows, and its batches take the first row of every run, the second, and so on.  No batch
holds two rows of a run.

What the answer is worth comes from what each row contributes.  Row ``i`` adds the mean over the
others of ``k(i, j) l(i, j)``, and to first order CKA moves with

    2 (h_ab(i) / sqrt(A B) - CKA / 2 (h_aa(i) / A + h_bb(i) / B)),   A = HSIC_aa, B = HSIC_bb.

*This store*: runs are the sample, so influences are summed by run and squared.  Of that variance
the part that comes from rows vanishes as the store is read, the other, which comes from pairs, does
not, since pairs across batches stay unseen; the products' own squares tell the two apart.

*Text like this*: documents are the sample.  A store of nine speeches has nine of them, however many
rows: CKA is computed again without each document, and the spread is what it is.

References
----------
Kornblith, Norouzi, Lee & Hinton, Similarity of neural network representations revisited, ICML 2019.
Song, Smola, Gretton, Bedo & Borgwardt, Feature selection via dependence maximization, JMLR 13
(2012), equation 5.  Nguyen, Raghu & Kornblith, Do wide and deep networks learn the same things?,
ICLR 2021, equations 2 and 3.  Serfling, Approximation theorems of mathematical statistics (1980),
5.2 and 5.3: variance and projection of U-statistics.  Miller, The jackknife, Biometrika 61 (1974).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy.special import stdtrit

from actstore.decompose.engine import Engine, Sums
from actstore.decompose.moments import Frame
from actstore.decompose.nulls import centred_kernels
from actstore.decompose.ranked import more_rows
from actstore.decompose.scan import Block, Range, Scan
from actstore.errors import ArgumentError

Ids = npt.NDArray[np.int64]
Float64 = npt.NDArray[np.float64]

BATCH_ROWS = 256
"""Rows of a batch where there are enough."""

MIN_BATCH_ROWS = 8
"""Rows of the smallest batch."""

MIN_BATCHES = 32
"""Batches before an estimate may stop."""

DECKS_AT_ONCE = 2
"""Decks worked on at a time in this process: what no second thread helps with, of one deck, goes on
beside the products of the other."""

MIN_DOCUMENTS = 20
"""Documents below which nothing is said of other texts."""

_RUN_ROWS = 4  # of a disk's block most are read anyway
_MAX_GROUPS = 512
_LEVEL = 0.95
_SEED = 1


@dataclass(frozen=True)
class Estimate:
    """CKA of all pairs of sites from a part of the rows."""

    value: Float64
    """``(n_sites, n_sites)``; NaN where a site has no variance."""
    half_width: Float64
    """Half the 95 % interval for this store."""
    text_half_width: Float64
    """The same for text like this; NaN where there are too few documents."""
    hsic: Float64
    """Debiased HSIC of all pairs."""
    max_channel_share: Float64
    """The largest part of each site's variance that one channel has, of the frame's sample."""
    n_rows: int
    """Rows read."""
    n_batches: int
    """Batches made of them."""
    n_documents: int
    """Documents the rows are of."""
    stopped: str
    """What ended it: ``"tolerance"``, ``"max_batches"`` or ``"rows"``."""


@dataclass(frozen=True)
class Deck:
    """How rows are dealt to batches; nothing but the number of rows and the seed decides."""

    n_rows: int
    """Rows there are."""
    batch_rows: int
    """Rows of a batch."""
    seed: int
    """Decides the order."""

    @property
    def run_rows(self) -> int:
        """Neighbours that are read together: fewer where 32 batches would not be filled."""
        return max(1, min(_RUN_ROWS, self.n_rows // (self.batch_rows * MIN_BATCHES)))

    @property
    def n_runs(self) -> int:
        """Runs there are; the last may have fewer rows."""
        return -(-self.n_rows // self.run_rows)

    @property
    def n_decks(self) -> int:
        """Decks there are; a deck is `run_rows` batches."""
        return self.n_runs // self.batch_rows

    @property
    def n_batches(self) -> int:
        """Batches there are; an estimate takes two."""
        return self.n_decks * self.run_rows

    def ranges(self, limit: int) -> Iterator[Range]:
        """Yield up to so many decks, each as its batches: every row once if all are dealt."""
        rng = np.random.default_rng([self.seed, _SEED])
        n_decks = min(limit, self.n_decks)
        if n_decks == self.n_decks:
            runs = rng.permutation(self.n_runs)
        else:
            runs = rng.choice(self.n_runs, n_decks * self.batch_rows, replace=False)
        for deck in np.array_split(runs, n_decks):
            # The one run that may be short goes last, so that places are those of runs.
            deck = deck[np.argsort(deck == self.n_runs - 1, kind="stable")]
            dealt = (deck * self.run_rows + row for row in range(self.run_rows))
            yield [ranks[ranks < self.n_rows] for ranks in dealt]


@dataclass(frozen=True)
class Contributions:
    """What decks of batches add up to: HSIC, and what runs and documents contribute to it."""

    sites: tuple[slice, ...]
    """The columns of each site."""
    frame: Frame
    """Shift and scale of the columns."""
    row_ids: Ids
    """Row ids that may come, ascending."""
    groups: Ids
    """The group of documents of each of them."""
    n_groups: int
    """Groups there are."""

    def __call__(self, blocks: Iterable[Block]) -> Sums:
        """Return sums over one deck, given its batches."""
        n_sites = len(self.sites)
        square = (n_sites, n_sites)
        by_group = torch.zeros(self.n_groups, *square, dtype=torch.float64)
        rows_of_group = torch.zeros(self.n_groups, dtype=torch.float64)
        pairs22, pairs31 = (torch.zeros(square, dtype=torch.float64) for _ in range(2))
        by_run: torch.Tensor | None = None
        n_rows = n_batches = 0
        for block in blocks:
            values = self.frame.apply(block.values)
            values -= values.mean(0)
            n = len(values)
            kernels = centred_kernels([values[:, columns] for columns in self.sites])
            kernels /= (n - 3) ** 0.5
            by_row = torch.einsum("aij,bij->iab", kernels, kernels).double()
            # One batch has the rows of all runs but perhaps of the last.
            if by_run is None:
                by_run = by_row.clone()
            else:
                by_run[:n] += by_row
            groups = self.groups[np.searchsorted(self.row_ids, block.row_ids)]
            index = torch.from_numpy(groups)
            by_group.index_add_(0, index, by_row)
            rows_of_group += torch.bincount(index, minlength=self.n_groups)
            flat = kernels.reshape(n_sites, -1)
            squares = flat.square()
            pairs22 += squares @ squares.T
            pairs31 += (squares * flat) @ flat.T
            n_rows += n
            n_batches += 1
        assert by_run is not None
        own = by_run.diagonal(dim1=1, dim2=2)
        return {
            "n": torch.tensor([n_rows, n_batches, len(by_run)], dtype=torch.float64),
            "sum": by_run.sum(0),
            "ab_ab": by_run.square().sum(0),
            "ab_aa": torch.einsum("iab,ia->ab", by_run, own),
            "aa_bb": own.T @ own,
            "pairs22": pairs22,
            "pairs31": pairs31,
            "by_group": by_group,
            "rows_of_group": rows_of_group,
        }


def cka(hsic: Float64) -> Float64:
    """Return CKA from HSIC, ``(…, n_sites, n_sites)``; NaN where a site has no variance."""
    own = np.diagonal(hsic, axis1=-2, axis2=-1)
    own = np.where(own > 0, own, np.nan)
    # The root of the product, since that is exact on the diagonal.
    found: Float64 = hsic / np.sqrt(own[..., :, None] * own[..., None, :])
    return found


def estimate(
    scan: Scan,
    frame: Frame,
    engine: Engine,
    documents_of: Callable[[Ids], Ids],
    *,
    batch_rows: int,
    max_batches: int,
    tolerance: float,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> Estimate:
    """Return CKA of all pairs of sites from as many batches as it takes.

    Parameters
    ----------
    scan : Scan
        The sites and rows.
    frame : Frame
        What is taken off its columns.
    engine : Engine
        Where it runs.
    documents_of : callable
        Returns the document of each row_id.
    batch_rows : int
        Rows of a batch.
    max_batches : int
        Stop after so many in any case.
    tolerance : float
        Stop, after 32 batches or more, once no interval for this store is wider than ± this.
    seed : int
        Decides which rows are read.
    progress : callable, optional
        Called with batches done and batches at most.

    Raises
    ------
    ArgumentError
        If the rows do not fill two batches.
    """
    deck = Deck(scan.n_rows, batch_rows, seed)
    per_deck = deck.run_rows
    n_decks = min(deck.n_decks, -(-max_batches // per_deck))
    if deck.n_batches < 2:
        smaller = f"Pass a smaller batch_rows (down to {MIN_BATCH_ROWS}). "
        raise ArgumentError(
            f"batch_rows = {batch_rows} is too many for {scan.n_rows:,} rows ({scan.ranked.rule}) "
            f"of {scan.store.path}; expected two batches or more. "
            f"{smaller if batch_rows > MIN_BATCH_ROWS else ''}{more_rows(scan.ranked.rule)}"
        )
    sites = tuple(scan.columns.values())
    totals: Sums = {}
    n_done = 0
    stopped = "rows" if n_decks == deck.n_decks else "max_batches"
    steps = list(_steps(n_decks, -(-MIN_BATCHES // per_deck)))
    groups = _Groups(scan, documents_of)
    shares = channel_shares(frame.variance.numpy(), sites)
    ranges = deck.ranges(n_decks)
    dealt = [[next(ranges) for _ in range(n)] for n in steps]
    with engine.steps(scan, dealt, at_once=DECKS_AT_ONCE) as running:
        for step in dealt:
            row_ids, group = groups.of(step)
            sums = running.total(Contributions(sites, frame, row_ids, group, groups.n_groups))
            totals = {name: totals[name] + sums[name] for name in sums} if totals else sums
            n_done += len(step)
            if progress:
                progress(n_done * per_deck, n_decks * per_deck)
            found = _estimate(totals, scan.n_rows, shares, groups.n_documents, stopped)
            enough = n_done * per_deck >= MIN_BATCHES
            if enough and np.nanmax(found.half_width, initial=0.0) <= tolerance:
                return Estimate(**{**vars(found), "stopped": "tolerance"})
    return found


def _steps(n_decks: int, first: int) -> Iterator[int]:
    """Yield after how many decks to look: the first time after 32 batches."""
    done, step = 0, first
    while done < n_decks:
        yield min(step, n_decks - done)
        done += step
        step = max(1, first // 4, done // 8)


class _Groups:
    """Groups of documents: each document its own, or some together where there are many."""

    def __init__(self, scan: Scan, documents_of: Callable[[Ids], Ids]) -> None:
        self._scan = scan
        self._documents_of = documents_of
        self._seen: set[int] = set()
        self.n_groups = min(_MAX_GROUPS, scan.store.n_documents)
        """How many groups there can be."""

    @property
    def n_documents(self) -> int:
        """Documents seen so far."""
        return len(self._seen)

    def of(self, ranges: Sequence[Range]) -> tuple[Ids, Ids]:
        """Return the row ids of some ranges, ascending, and the group of each."""
        ranks = np.concatenate([block for blocks in ranges for block in blocks])
        row_ids = np.sort(self._scan.ranked.row_ids(ranks))
        documents = self._documents_of(row_ids)
        self._seen.update(np.unique(documents).tolist())
        return row_ids, documents % self.n_groups


def _estimate(
    totals: Sums, n_all: int, max_channel_share: Float64, n_documents: int, stopped: str
) -> Estimate:
    sums = {name: value.numpy() for name, value in totals.items()}
    n_rows, n_batches, n_runs = sums["n"]
    # Float32 products of a pair differ in their last places with its order.
    hsic = (sums["sum"] + sums["sum"].T) / (2 * n_rows)
    value = cka(hsic)
    variance = _store_variance(sums, hsic, value, n_rows / n_all)
    quantile = float(stdtrit(n_runs - 1, (1 + _LEVEL) / 2))
    return Estimate(
        value,
        np.where(np.isnan(value), np.nan, quantile * np.sqrt(variance)),
        _text_half_width(sums, hsic, n_rows, n_documents),
        hsic,
        max_channel_share,
        int(n_rows),
        int(n_batches),
        n_documents,
        stopped,
    )


def _store_variance(
    sums: dict[str, Float64], hsic: Float64, value: Float64, read: float
) -> Float64:
    """Return the variance of CKA over which rows of this store were read."""
    n_rows, n_batches, n_runs = sums["n"]
    own = np.where(np.diagonal(hsic) > 0, np.diagonal(hsic), np.nan)
    # CKA moves by p ab - q aa - s bb, to first order.
    p = 1 / np.sqrt(np.outer(own, own))
    q = value / (2 * own[:, None])
    s = value / (2 * own[None, :])

    def squared(ab_ab: Float64, aa_aa: Float64, ab_aa: Float64, aa_bb: Float64) -> Float64:
        """Return the sum of squares of it, given those of its parts."""
        found: Float64 = (
            p**2 * ab_ab
            + q**2 * aa_aa[:, None]
            + s**2 * aa_aa[None, :]
            - 2 * p * (q * ab_aa + s * ab_aa.T)
            + 2 * q * s * aa_bb
        )
        return np.maximum(found, 0)

    ab_ab = sums["ab_ab"]
    of_runs = squared(ab_ab, np.diagonal(ab_ab), sums["ab_aa"], sums["aa_bb"])
    from_runs = 4 * of_runs / n_rows**2 * n_runs / (n_runs - 1)
    pairs22 = sums["pairs22"]
    of_pairs = squared(pairs22, np.diagonal(pairs22), sums["pairs31"], pairs22)
    # A sum of n terms g(i, j) of no mean has the variance n g²; squaring sums by row counts each
    # pair twice.
    from_pairs = 2 * of_pairs / n_rows**2
    from_rows = np.maximum(from_runs - 2 * from_pairs, 0) / (1 - 2 * n_batches / n_rows)
    seen = read * read / n_batches  # of all pairs
    variance: Float64 = (1 - read) * from_rows + (1 - seen) * from_pairs
    return variance


def _text_half_width(
    sums: dict[str, Float64], hsic: Float64, n_rows: float, n_documents: int
) -> Float64:
    """Return half the interval over which documents there are, by leaving out each of them."""
    rows = sums["rows_of_group"]
    seen = rows > 0
    n_groups = int(seen.sum())
    if n_documents < MIN_DOCUMENTS or n_groups < 2 or rows.max() == n_rows:
        return np.full(hsic.shape, math.nan)
    rows = rows[seen][:, None, None]
    without = cka(hsic - 2 * (sums["by_group"][seen] - rows * hsic) / (n_rows - rows))
    spread = np.square(without - without.mean(0)).sum(0) * (n_groups - 1) / n_groups
    quantile = float(stdtrit(n_groups - 1, (1 + _LEVEL) / 2))
    half_width: Float64 = quantile * np.sqrt(spread)
    return half_width


def channel_shares(variances: Float64, sites: Sequence[slice]) -> Float64:
    """Return the largest part of each site's variance that one channel has; NaN without any."""
    totals = [float(variances[site].sum()) for site in sites]
    return np.array(
        [
            float(variances[site].max()) / total if total > 0 else math.nan
            for site, total in zip(sites, totals, strict=True)
        ]
    )
