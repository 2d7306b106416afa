"""Where NMF starts: NNDSVDa loadings from the randomised SVD of a sample.

References
----------
Halko, Martinsson & Tropp, Finding structure with randomness, SIAM Review 53 (2011), algorithm 4.4.
Boutsidis & Gallopoulos, SVD based initialization, Pattern Recognition 41 (2008): NNDSVD.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from actstore.decompose.matrix import Matrix
from actstore.decompose.scan import Block

OVERSAMPLING = 8
_POWER_ITERATIONS = 2
_TINY = 1e-6


def nndsvda(matrix: Matrix, sample: Iterable[Block], n_components: int, seed: int) -> torch.Tensor:
    """Return the loadings to start from, ``(k, width)``, float32.

    Cost: ``_POWER_ITERATIONS`` + 1 times through the sample; memory O(width x k).

    Parameters
    ----------
    matrix : Matrix
        The matrix.
    sample : iterable of Block
        Some of its rows; gone through several times.
    n_components : int
        Number of loadings, at most the width.
    seed : int
        Seed of the random range.
    """
    width = matrix.scan.width
    rank = min(n_components + OVERSAMPLING, width)
    random = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(width, rank, generator=random)).Q
    for _ in range(_POWER_ITERATIONS):
        image = torch.zeros(rank, width)
        for block in sample:
            rows = matrix.clip(block.values)
            image.addmm_((rows @ basis).T, rows)
        basis = torch.linalg.qr(image.T).Q
    total = 0.0
    n_rows = 0
    products = []
    for block in sample:
        rows = matrix.clip(block.values)
        products.append(rows @ basis)
        total += float(rows.sum())
        n_rows += len(rows)
    left, lengths, right = torch.linalg.svd(torch.cat(products), full_matrices=False)
    right = right @ basis.T
    loadings = torch.zeros(n_components, width)
    for j in range(min(n_components, len(lengths))):
        loadings[j] = _one_sided(left[:, j], right[j], lengths[j])
    # The "a": zeros could never grow in multiplicative updates, and HALS too gains by the mean.
    mean = total / (n_rows * width)
    loadings[loadings < _TINY] = mean
    return loadings


def _one_sided(left: torch.Tensor, right: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
    """Return the non-negative loadings nearest to a singular pair: those of its larger half."""
    halves = [
        (left.clamp(min=0).norm(), right.clamp(min=0)),
        (left.clamp(max=0).norm(), -right.clamp(max=0)),
    ]
    left_norm, side = max(halves, key=lambda half: float(half[0] * half[1].norm()))
    right_norm = side.norm()
    if not right_norm > 0:
        return torch.zeros_like(side)
    scaled: torch.Tensor = side / right_norm * (length * left_norm * right_norm).sqrt()
    return scaled
