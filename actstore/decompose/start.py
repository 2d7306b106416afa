"""Where a factorisation starts: loadings from a sample, improved on it before the first pass.

For NMF they are the NNDSVDa loadings of a randomised SVD.  For signed loadings with sparse scores a
singular vector says little, since it mixes what never occurs together: rows of the sample far from
each other do, chosen as k-means++ does.  Either way the first codes would be bad, and their rows
read for little; so the loadings are first improved on the sample, which lies in memory.

Where a factorisation ends depends on where it starts, by some tenths of a percent of the error, and
random loadings end no higher than others on average.  Several are tried on the sample, and the best
goes on, where the loadings are signed or more than one online pass is asked for.

References
----------
Halko, Martinsson & Tropp, Finding structure with randomness, SIAM Review 53 (2011), algorithm 4.4.
Boutsidis & Gallopoulos, SVD based initialization, Pattern Recognition 41 (2008): NNDSVD.
Arthur & Vassilvitskii, k-means++, SODA (2007).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np
import torch

from actstore.decompose.engine import Engine, Sums
from actstore.decompose.matrix import Matrix
from actstore.decompose.online import Dictionary, SurrogateWork, take
from actstore.decompose.scan import Block, Form, Range, Sample

OVERSAMPLING = 8
_POWER_ITERATIONS = 2
_IMPROVE_SWEEPS = 2
_TINY = 1e-6
_SEEDING_ROWS = 2048
_SEEDING_SWEEPS = 20
_SEEDINGS = 10
_BEGINNINGS = 4
_MOST_TRIED = 256  # components of all that is tried at a time: they are in the budget
_PART = 4  # blocks of the sample of which the first rounds take one
_PART_ROUNDS = 10
_REVIVING_ROWS = 512
_MOMENTUM = 0.7


class Start:
    """Finds where fits of one sample start.

    Parameters
    ----------
    matrix : Matrix
        The matrix.
    sample : Sample
        Some of its rows.
    form : Form
        How blocks are wanted.
    threads : Executor
        Shares out what is done to loadings.
    at_once : int
        Threads that go through the sample.
    """

    def __init__(
        self, matrix: Matrix, sample: Sample, form: Form, threads: Executor, at_once: int
    ) -> None:
        self._matrix = matrix
        self._sample = sample
        self._form = form
        self._threads = threads
        self._at_once = at_once
        self.rows_read = 0
        """Rows that were read again, where the sample does not lie in memory."""

    def dictionaries(
        self, n_components: Sequence[int], n_active: Sequence[int | None], seed: int
    ) -> list[Dictionary]:
        """Return dictionaries of one seed, found in its part of the sample.

        Cost: ``_POWER_ITERATIONS + 2`` times through the part; memory O(width x k).

        Parameters
        ----------
        n_components : sequence of int
            Numbers of factors.
        n_active : sequence of int or None
            For each, the scores of a row that may be above zero; None where all may be, and
            loadings are not negative.
        seed : int
            Decides the part, and the random range.
        """
        part = self._part(seed)
        if n_active[0] is not None:
            return [
                self._seeded(k, n, part, seed)
                for k, n in zip(n_components, n_active, strict=True)
                if n
            ]
        return [Dictionary(loadings) for loadings in self._nndsvda(n_components, part, seed)]

    def best_of_several(
        self, dictionary: Dictionary, seed: int, n_rounds: int, n_sweeps: int
    ) -> Dictionary:
        """Return what of a dictionary and random ones is best on the sample, improved on it.

        Parameters
        ----------
        dictionary : Dictionary
            Where a fit would start, not signed; improved in place.
        seed : int
            Decides the others, and the part.
        n_rounds : int
            Times through the sample.
        n_sweeps : int
            Sweeps of the codes.
        """
        k, width = dictionary.loadings.shape
        random = torch.Generator().manual_seed(seed)
        level = dictionary.loadings.mean()
        tried = [dictionary]
        while len(tried) < n_tried(k, signed=False):
            tried.append(Dictionary(torch.rand(k, width, generator=random) * level))
        self.improve_on_part(tried, seed, n_sweeps)
        self.improve(tried, n_rounds, n_sweeps)
        return min(tried, key=Dictionary.objective)

    def _part(self, seed: int) -> list[Range]:
        n_blocks = len(self._sample.ranges)
        order = np.random.default_rng([3, seed]).permutation(n_blocks)
        return [self._sample.ranges[i] for i in np.sort(order[: -(-n_blocks // _PART)])]

    def improve_on_part(self, dictionaries: Sequence[Dictionary], seed: int, n_sweeps: int) -> None:
        """Improve dictionaries on a part of the sample: its rounds are cheap, the first gain most.

        Parameters
        ----------
        dictionaries : sequence of Dictionary
            Improved in place.
        seed : int
            Decides the part.
        n_sweeps : int
            Sweeps of the codes.
        """
        self._rounds(dictionaries, self._part(seed), _PART_ROUNDS, n_sweeps)

    def improve(self, dictionaries: Sequence[Dictionary], n_rounds: int, n_sweeps: int) -> None:
        """Improve dictionaries on the sample; their surrogate is then that of its rows.

        On all of it, so that what is found is not what one part happens to hold.

        Parameters
        ----------
        dictionaries : sequence of Dictionary
            Improved in place.
        n_rounds : int
            Times through the sample.
        n_sweeps : int
            Sweeps of the codes.
        """
        self._rounds(dictionaries, self._sample.ranges, n_rounds, n_sweeps)

    def rows(self, n_rows: int) -> torch.Tensor:
        """Return about so many rows of the matrix, from all over the sample."""
        step = max(1, len(self._sample) // n_rows)
        parts = [self._matrix.rows(block.values[::step].clone()) for block in self._sample]
        return torch.cat(parts)

    def _total(self, work: SurrogateWork | _Images, ranges: Sequence[Range]) -> Sums:
        if not self._sample.is_kept:
            self.rows_read += sum(len(block) for blocks in ranges for block in blocks)
        return Engine.local().total(
            self._sample.scan, work, ranges, form=self._form, at_once=self._at_once
        )

    # -- NNDSVDa -------------------------------------------------------------------------------

    def _nndsvda(
        self, n_components: Sequence[int], part: list[Range], seed: int
    ) -> list[torch.Tensor]:
        """Return the loadings, ``(k, width)`` for each k, float32."""
        width = self._matrix.spans[-1][1]
        # Each number of factors has a range of its own, so that it starts as it would alone.
        bases = []
        for k in n_components:
            random = torch.Generator().manual_seed(seed)
            rank = min(k + OVERSAMPLING, width)
            bases.append(torch.linalg.qr(torch.randn(width, rank, generator=random)).Q.T)
        for _ in range(_POWER_ITERATIONS):
            images = self._images(bases, part)["images"]
            bases = [torch.linalg.qr(image.T).Q.T for image in _split(images, bases)]
        images = self._images(bases, part)["images"]
        rights, lengths = [], []
        for basis, image in zip(bases, _split(images, bases), strict=True):
            # Of A B Bᵀ: the eigenvectors of Bᵀ AᵀA B, in the range B.
            square = (image @ basis.T).double()
            values, vectors = torch.linalg.eigh((square + square.T) / 2)
            rights.append(vectors.flip(1).T.float() @ basis)
            lengths.append(values.flip(0).clamp(min=0).sqrt().float())
        # How much of each left vector is above zero, and how much below.
        sums = self._images(rights, part)
        n_rows = sum(len(block) for blocks in part for block in blocks)
        mean = float(sums["total"]) / (n_rows * width)
        positive, negative = (
            _split(sums[name].float().sqrt(), bases) for name in ("above", "below")
        )
        found = []
        for number, k in enumerate(n_components):
            loadings = torch.zeros(k, width)
            for j in range(min(k, len(bases[number]))):
                length = lengths[number][j]
                if length > 0:
                    sides = (positive[number][j] / length, negative[number][j] / length)
                    loadings[j] = _one_sided(sides, rights[number][j], length)
            # The "a": zeros could never grow in multiplicative updates, and HALS gains by the mean.
            loadings[loadings < _TINY] = mean
            found.append(loadings)
        return found

    def _images(self, bases: Sequence[torch.Tensor], part: list[Range]) -> Sums:
        """Return ``(A B)ᵀ A`` for the stack of bases, and the energy of ``A B`` by sign."""
        stack = torch.cat(list(bases)) * self._matrix.column_scales
        work = _Images(stack.to(getattr(torch, self._form.dtype)))
        sums = self._total(work, part)
        return {
            **sums,
            "images": sums["images"][:-1] * self._matrix.column_scales,
            "total": (sums["images"][-1] * self._matrix.column_scales).sum(),
        }

    # -- signed --------------------------------------------------------------------------------

    def _seeded(self, k: int, n_active: int, part: list[Range], seed: int) -> Dictionary:
        """Return the best of several beginnings, all tried in the same scans of the sample.

        With one score a row they settle as clusters do; what mixes two of them comes apart then,
        when rows may have more.
        """
        rng = np.random.default_rng(seed)
        rows = self.rows(_SEEDING_ROWS)
        tried = [Dictionary(_far_rows(rows, k, rng), 1) for _ in range(n_tried(k, signed=True))]
        for active in sorted({1, n_active}):
            for dictionary in tried:
                dictionary.n_active = active
            self._rounds(tried, part, _PART_ROUNDS, _SEEDING_SWEEPS)
        return min(tried, key=Dictionary.objective)

    def _rounds(
        self, dictionaries: Sequence[Dictionary], ranges: list[Range], n: int, n_sweeps: int
    ) -> None:
        """Improve dictionaries on some ranges of the sample, so many times over."""
        paces = [_Pace(dictionary) for dictionary in dictionaries]
        for _ in range(n):
            work = SurrogateWork.of(dictionaries, self._matrix, self._form, n_sweeps)
            take(dictionaries, self._matrix, self._total(work, ranges), 0.0)
            for dictionary, pace in zip(dictionaries, paces, strict=True):
                pace.improve(self._threads)
                if dictionary.dead:
                    dictionary.revive(self.rows(_REVIVING_ROWS))
        for pace in paces:
            pace.rest()


def n_tried(k: int, *, signed: bool) -> int:
    """Return how many beginnings of a dictionary of k components are tried at a time."""
    return max(1, min(_SEEDINGS if signed else _BEGINNINGS, _MOST_TRIED // k))


def _far_rows(rows: torch.Tensor, k: int, rng: np.random.Generator) -> torch.Tensor:
    """Return k of some rows, of length one, each likely where those before explain little."""
    rest = rows.double().square().sum(1)
    units = rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-30)
    chosen = []
    for _ in range(k):
        weights = rest.numpy() if rest.sum() > 0 else np.ones(len(rows))
        chosen.append(int(rng.choice(len(rows), p=weights / weights.sum())))
        along = (rows @ units[chosen[-1]]).clamp(min=0).double().square()
        rest = torch.minimum(rest, (rows.double().square().sum(1) - along).clamp(min=0))
    return torch.stack([units[row] for row in chosen])


class _Pace:
    """Improves a dictionary a little further than its surrogate says, as long as that helps.

    Alternating descent goes the same way many times over; extrapolated, it takes a third of the
    rounds.  Where the objective rose, one round goes without.

    References
    ----------
    Ang & Gillis, Accelerating nonnegative matrix factorization algorithms using extrapolation,
    Neural Computation 31 (2019).
    """

    def __init__(self, dictionary: Dictionary) -> None:
        self._dictionary = dictionary
        self._before = dictionary.loadings.clone()
        self._after = self._before
        self._objective = float("inf")

    def improve(self, threads: Executor) -> None:
        """Improve the loadings given their surrogate, and extrapolate."""
        mine = self._dictionary
        objective = mine.objective()
        mine.improve(threads, _IMPROVE_SWEEPS)
        self._before, self._after = self._after, mine.loadings.clone()
        if not mine.is_signed and objective < self._objective:
            further = self._after + _MOMENTUM * (self._after - self._before)
            mine.loadings = further.clamp(min=0).contiguous()
        self._objective = objective

    def rest(self) -> None:
        """Go back to where the last improvement led."""
        if not self._dictionary.dead:
            self._dictionary.loadings = self._after.contiguous()


def _split(rows: torch.Tensor, like: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """Return rows in lots of as many as others have."""
    return torch.split(rows, [len(each) for each in like])


def _one_sided(
    left: tuple[torch.Tensor, torch.Tensor], right: torch.Tensor, length: torch.Tensor
) -> torch.Tensor:
    """Return the non-negative loadings nearest to a singular pair: those of its larger half."""
    halves = [(left[0], right.clamp(min=0)), (left[1], -right.clamp(max=0))]
    left_norm, side = max(halves, key=lambda half: float(half[0] * half[1].norm()))
    right_norm = side.norm()
    if not right_norm > 0:
        return torch.zeros_like(side)
    scaled: torch.Tensor = side / right_norm * (length * left_norm * right_norm).sqrt()
    return scaled


@dataclass(frozen=True)
class _Images:
    """What a range adds to ``(A B)ᵀ A``."""

    stack: torch.Tensor
    """Bᵀ, times the scales of the columns."""

    def __call__(self, blocks: Iterable[Block]) -> Sums:
        rank, width = self.stack.shape
        images = torch.zeros(rank + 1, width)
        above, below = (torch.zeros(rank, dtype=torch.float64) for _ in range(2))
        for block in blocks:
            products = block.values @ self.stack.T
            left = torch.cat([products, torch.ones(len(products), 1, dtype=products.dtype)], 1)
            images += left.T @ block.values
            squares = products.double().square()
            above += torch.where(products > 0, squares, 0).sum(0)
            below += torch.where(products < 0, squares, 0).sum(0)
        return {"images": images, "above": above, "below": below}
