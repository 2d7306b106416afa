"""The matrix that NMF factorises: all sites of a scan, clipped at zero, each times its scale."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from actstore.decompose.scan import Block, Scan


@dataclass(frozen=True)
class Matrix:
    """How blocks of a scan become rows of the matrix."""

    scan: Scan
    """What serves the rows."""
    scales: Sequence[float]
    """What each site is multiplied by."""

    @classmethod
    def with_equal_energy(cls, scan: Scan, sample: Iterable[Block]) -> Matrix:
        """Return the matrix in which every site has the same Frobenius norm over a sample."""
        energies = [0.0] * len(scan.columns)
        n_rows = 0
        for block in sample:
            n_rows += len(block.row_ids)
            for i, columns in enumerate(scan.columns.values()):
                energies[i] += energy(block.values[:, columns].clamp(min=0))
        return cls(scan, [math.sqrt(n_rows / e) if e > 0 else 1.0 for e in energies])

    def clip(self, values: torch.Tensor) -> torch.Tensor:
        """Return a block's values as rows of the matrix, in place."""
        values.clamp_(min=0)
        for columns, scale in zip(self.scan.columns.values(), self.scales, strict=True):
            if scale != 1:
                values[:, columns] *= scale
        return values


def energy(values: torch.Tensor) -> float:
    """Return the sum of squares; float32 along a row, float64 over rows."""
    return float(torch.linalg.vector_norm(values, dim=1).double().square().sum())
