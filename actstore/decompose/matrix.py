"""The matrix that is factorised: all sites of a scan side by side, each times its scale, clipped.

Blocks are not scaled where they are only multiplied with loadings: the scales go to the loadings,
once, and to what comes back.  So a block may stay as it was stored, and in sixteen bits.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from actstore.decompose.engine import Engine, Sums
from actstore.decompose.scan import Block, Sample, Scan


@dataclass(frozen=True)
class Matrix:
    """How blocks of a scan become rows of the matrix; small, and the same in every process."""

    spans: tuple[tuple[int, int], ...]
    """First and last column of each site."""
    scales: tuple[float, ...]
    """What each site is multiplied by."""
    signed: bool = False
    """Whether negative values stay; else they become zero."""

    @classmethod
    def of(
        cls, scan: Scan, sample: Sample, *, equal_energy: bool, signed: bool, at_once: int
    ) -> tuple[Matrix, torch.Tensor]:
        """Return the matrix of a scan, and the sum of its rows in a sample, float64.

        Parameters
        ----------
        scan : Scan
            What serves its rows.
        sample : Sample
            Some of them, for the scales.
        equal_energy : bool
            Whether every site gets the same Frobenius norm; else values stay as they are.
        signed : bool
            Whether negative values stay.
        at_once : int
            Threads.
        """
        matrix = cls.scaled(scan, (1.0,) * len(scan.columns), signed)
        sums = Engine.local().total(sample.scan, _Energies(matrix), sample.ranges, at_once=at_once)
        energies = (sums["energies"] / len(sample)).tolist() if equal_energy else []
        if energies:
            scales = [1 / math.sqrt(e) if e > 0 else 1.0 for e in energies]
            matrix = cls.scaled(scan, scales, signed)
        return matrix, sums["rows"] * matrix.column_scales

    @classmethod
    def scaled(cls, scan: Scan, scales: Sequence[float], signed: bool = False) -> Matrix:
        """Return the matrix of a scan whose sites have given scales."""
        spans = tuple((columns.start, columns.stop) for columns in scan.columns.values())
        return cls(spans, tuple(scales), signed)

    @functools.cached_property
    def column_scales(self) -> torch.Tensor:
        """What each column is multiplied by, ``(width,)``, float32."""
        parts = [torch.full((b - a,), s) for (a, b), s in zip(self.spans, self.scales, strict=True)]
        return torch.cat(parts)

    def rows(self, values: torch.Tensor) -> torch.Tensor:
        """Return float32 values of a block as rows of the matrix, in place."""
        if not self.signed:
            values.clamp_(min=0)
        for (first, stop), scale in zip(self.spans, self.scales, strict=True):
            if scale != 1:
                values[:, first:stop] *= scale
        return values

    def energies(self, values: torch.Tensor) -> torch.Tensor:
        """Return the sum of squares at each site, float64."""
        return torch.stack([energy(values[:, first:stop]) for first, stop in self.spans])


@dataclass(frozen=True)
class _Energies:
    """The energy of each site, and the sum of rows."""

    matrix: Matrix

    def __call__(self, blocks: Iterable[Block]) -> Sums:
        total = torch.zeros(len(self.matrix.spans), dtype=torch.float64)
        rows = torch.zeros(self.matrix.spans[-1][1], dtype=torch.float64)
        for block in blocks:
            values = self.matrix.rows(block.values)
            total += self.matrix.energies(values)
            rows += values.sum(0)
        return {"energies": total, "rows": rows}


def energy(values: torch.Tensor) -> torch.Tensor:
    """Return the sum of squares; float32 along a row, float64 over rows."""
    found: torch.Tensor = torch.linalg.vector_norm(values, dim=1).double().square().sum()
    return found
