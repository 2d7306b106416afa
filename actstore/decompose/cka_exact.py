"""CKA of all pairs of sites over all rows, biased and debiased, from one pass.

On the side of the columns the products between sites are added up; on the side of the rows, where
there are fewer of those, the kernels themselves are multiplied.  Either way three numbers of a pair
are enough: with centred rows x at one site and y at the other,

    cross = |X'Y|² = sum (x_i x_j)(y_i y_j),   joint = sum |x_i|² |y_i|²,   total = sum |x_i|².

Biased HSIC is ``cross`` but for a factor.  Song's unbiased one leaves the diagonal of the kernels
out, and since centred kernels sum to zero along every row it is

    n (n - 3) HSIC = cross - joint - 2 joint / (n - 2) + total_x total_y / ((n - 1)(n - 2)).

References
----------
Song, Smola, Gretton, Bedo & Borgwardt, JMLR 13 (2012), equation 5.  Kornblith et al., ICML 2019,
section 3.  Murphy, Zylberberg & Fyshe, Correcting biased centered kernel alignment measures in
biological and artificial neural networks, 2024: why the biased one says little where rows are few.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from actstore.decompose.cka import cka
from actstore.decompose.engine import Engine, Sums
from actstore.decompose.moments import Frame, Tile
from actstore.decompose.scan import Block, Scan

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class ExactCka:
    """CKA of all pairs of sites over all rows."""

    value: Float64
    """Debiased, ``(n_sites, n_sites)``; NaN where a site has no variance."""
    biased: Float64
    """The plain one, as most tools have it."""
    hsic: Float64
    """Debiased HSIC of all pairs."""
    variances: list[Float64]
    """The variance of each site's columns."""
    side: str
    """``"columns"`` or ``"rows"``: which products were added up."""


def from_tiles(tiles: Iterable[Tile], n_sites: int) -> ExactCka:
    """Return CKA from moments of all pairs of sites."""
    cross, joint = np.zeros((2, n_sites, n_sites))
    variances: list[Float64] = [np.empty(0)] * n_sites
    n = 0
    for tile in tiles:
        n = tile.n
        for a, b in tile.pairs():
            moment = tile.moment(a, b)
            cross[a, b] = cross[b, a] = np.vdot(moment, moment)
            joint[a, b] = joint[b, a] = tile.norm_product(a, b)
            if a == b:
                variances[a] = np.maximum(np.diagonal(moment) / n, 0)
    return _finished(cross, joint, variances, n, "columns")


@dataclass(frozen=True)
class _Kernels:
    """Cross and joint of all pairs from the kernels of all rows, which come as one block."""

    sites: tuple[slice, ...]
    frame: Frame

    def __call__(self, blocks: Iterable[Block]) -> Sums:
        (block,) = blocks
        values = self.frame.apply(block.values)
        values -= values.mean(0)
        n = len(values)
        kernels = torch.empty(len(self.sites), n, n, dtype=torch.float64)
        for kernel, columns in zip(kernels, self.sites, strict=True):
            site = values[:, columns]
            kernel.copy_(site @ site.T)
        flat = kernels.reshape(len(kernels), -1)
        norms = kernels.diagonal(dim1=1, dim2=2)
        return {
            "cross": flat @ flat.T,
            "joint": norms @ norms.T,
            "squares": torch.linalg.vector_norm(values, dim=0).double().square(),
        }


def kernel_bytes(n_rows: int, width: int, n_sites: int) -> int:
    """Return the memory of `from_kernels` beside its rows as they are read."""
    return 8 * n_rows * (n_rows * (n_sites + 1) + width)


def from_kernels(
    scan: Scan, frame: Frame, engine: Engine, progress: Callable[[int], None] | None = None
) -> ExactCka:
    """Return the same from kernels: ``rows**2 x width`` multiplications."""
    sites = tuple(scan.columns.values())
    sums = engine.total(scan, _Kernels(sites, frame), [[np.arange(scan.n_rows)]], progress=progress)
    variances = [(sums["squares"][columns] / scan.n_rows).numpy() for columns in sites]
    return _finished(sums["cross"].numpy(), sums["joint"].numpy(), variances, scan.n_rows, "rows")


def _finished(
    cross: Float64, joint: Float64, variances: Sequence[Float64], n: int, side: str
) -> ExactCka:
    totals = n * np.array([float(variance.sum()) for variance in variances])
    hsic = cross - joint - 2 * joint / (n - 2) + np.outer(totals, totals) / ((n - 1) * (n - 2))
    # A site without variance leaves rounding only, which is no similarity.
    silent = totals <= 0
    hsic[silent] = hsic[:, silent] = cross[silent] = cross[:, silent] = 0
    hsic /= n * (n - 3)
    return ExactCka(cka(hsic), cka(cross), hsic, list(variances), side)
