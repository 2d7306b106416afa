"""What no factorisation of so many factors can fall below: the error of the truncated SVD.

By Eckart and Young the best approximation of rank k leaves ``|A|² - Σ λ_j`` over the k largest
eigenvalues of ``AᵀA``.  They come from the whole Gram; those of a sketch could only be too small,
and the bound would be none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.linalg
import torch

from actstore.decompose.device import here, there
from actstore.decompose.engine import Engine, Sums
from actstore.decompose.matrix import Matrix
from actstore.decompose.scan import BLOCK_ROWS, Block, Scan
from actstore.errors import ArgumentError, BudgetExceeded

_MOST_NEURONS = 20_000
_RANGES = 4  # each has a Gram of its own until it is added


@dataclass(frozen=True)
class _Gram:
    """The Gram of a range, float32; what is added to is never more than the sum of its parts."""

    matrix: Matrix

    def __call__(self, blocks: Iterable[Block]) -> Sums:
        gram: np.ndarray | None = None
        energy = torch.zeros((), dtype=torch.float64)
        for block in blocks:
            rows = self.matrix.rows(there(block.values))
            energy += here(self.matrix.energies(rows).sum())
            if rows.is_cuda:
                product = here(rows.T @ rows).numpy()
            else:
                values = rows.numpy()
                product = values.T @ values  # half the work of a general product
            gram = product if gram is None else np.add(gram, product, out=gram)
        assert gram is not None
        return {"gram": torch.from_numpy(gram), "energy": energy}


def check_bound(scan: Scan) -> None:
    """Refuse a bound that cannot be found.

    Raises
    ------
    ArgumentError
        If there are more neurons than a Gram is formed of.
    BudgetExceeded
        If the Gram does not fit the budget.
    """
    if scan.width > _MOST_NEURONS:
        raise ArgumentError(
            f"bound = 'exact' needs the Gram of all {scan.width:,} neurons; expected at most "
            f"{_MOST_NEURONS:,}. Leave bound= out, or factorise fewer sites."
        )
    needed = 24 * scan.width**2 + scan.budget_bytes - scan.free_bytes
    if needed > scan.budget_bytes:
        raise BudgetExceeded(
            f"bound = 'exact' needs at least {needed:,} bytes for the Gram of {scan.width:,} "
            f"neurons, and the budget is {scan.budget_bytes:,}. Pass budget={needed} or more, or "
            "leave bound= out."
        )


def exact_bounds(
    engine: Engine,
    scan: Scan,
    matrix: Matrix,
    n_components: Sequence[int],
    progress: Callable[[int], None],
) -> dict[int, float]:
    """Return the least relative error of any factorisation with so many factors.

    Cost: one read, ``n_rows x width²`` operations, and the eigenvalues, ``width³``; memory
    ``24 width²`` bytes.

    Parameters
    ----------
    engine : Engine
        Where the read is made.
    scan : Scan
        The rows.
    matrix : Matrix
        The matrix.
    n_components : sequence of int
        Numbers of factors.
    progress : callable
        Told the rows of every range that is done.

    References
    ----------
    Eckart & Young, The approximation of one matrix by another of lower rank, Psychometrika 1
    (1936).
    """
    n_blocks = -(-scan.n_rows // BLOCK_ROWS)
    ranges = list(scan.mixed_ranges(range_blocks=-(-n_blocks // _RANGES)))
    sums = engine.total(scan, _Gram(matrix), ranges, progress=progress)
    total = float(sums["energy"])
    most = min(max(n_components), scan.width)
    values = scipy.linalg.eigvalsh(
        sums["gram"].numpy().astype(np.float64).T,  # column by column: LAPACK copies others
        subset_by_index=[scan.width - most, scan.width - 1],
        overwrite_a=True,
        check_finite=False,
    )[::-1]
    explained = np.cumsum(values.clip(min=0)) / (total or 1.0)
    return {k: math.sqrt(max(0.0, 1 - float(explained[k - 1]))) for k in n_components}
