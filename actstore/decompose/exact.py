"""The exact pass: scores of every row for fixed loadings, and how good the factorisation is.

With ``C = A Lᵀ`` and converged codes S, everything follows from sums that are added in float64 and
small beside the data: ``|A|²``, ``<C, S>``, ``SᵀS``, ``CᵀC`` and ``P = SᵀA``.

- ``|A - S L|² = |A|² - 2 <C, S> + <SᵀS, LLᵀ>``; by site with the site's columns of P and L.
- ``shares[j] = Σ C_ij S_ij / |A|²``: at converged codes they add up to ``1 - error²``.
- With the same loadings and signed scores the energy explained is ``<CᵀC, (LLᵀ)⁺>``.
- The gradient by L is ``SᵀS L - P``; where a loading is zero only its negative part counts.

Sums of a block are float32, so ``error²`` is good to about 1e-6 of the whole: an error below 1e-3
is not told from zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import torch

from actstore.decompose.codes import solve_codes
from actstore.decompose.matrix import Matrix, energy
from actstore.decompose.scan import Block

_SWEEPS = 400
_TOLERANCE = 1e-4


class ExactPass:
    """Sums of the exact pass, and what follows from them.

    Parameters
    ----------
    matrix : Matrix
        The matrix.
    loadings : Tensor (k, width)
        Of unit length, or zero.
    mean : Tensor (width,)
        Mean row of the matrix.
    """

    def __init__(self, matrix: Matrix, loadings: torch.Tensor, mean: torch.Tensor) -> None:
        k = len(loadings)
        self.loadings = loadings
        self._matrix = matrix
        self._gram = loadings @ loadings.T
        self._directions = torch.cat([loadings, mean[None] / mean.norm().clamp(min=1e-30)])
        self._n_sites = len(matrix.scan.columns)
        self._signed_energy = np.zeros(self._n_sites)
        self._energy = np.zeros(self._n_sites)
        self._factor_energy = torch.zeros(k, dtype=torch.float64)
        self._codes_gram = torch.zeros(k, k, dtype=torch.float64)
        self._products_gram = torch.zeros(k, k, dtype=torch.float64)
        self._codes_rows = torch.zeros(k, matrix.scan.width, dtype=torch.float64)  # P
        self._mean_energy = 0.0
        self._n_moving = 0

    def run(self, blocks: Iterable[Block], spool: IO[bytes]) -> None:
        """Take every row once, in row order; its scores go to the spool, ``(rows, k)`` float32."""
        for block in blocks:
            spool.write(self._update(block).T.contiguous().numpy().data)

    def _update(self, block: Block) -> torch.Tensor:
        """Add a block to the sums; return its codes, ``(k, n)``."""
        spans = self._matrix.scan.columns.values()
        values = block.values
        self._signed_energy += [energy(values[:, span]) for span in spans]
        rows = self._matrix.clip(values)
        self._energy += [energy(rows[:, span]) for span in spans]
        products = self._directions @ rows.T
        self._mean_energy += float(products[-1].double().square().sum())
        products = products[:-1]
        codes, n_moving = solve_codes(products, self._gram, n_sweeps=_SWEEPS, tolerance=_TOLERANCE)
        self._factor_energy += (products * codes).sum(1, dtype=torch.float64)
        self._codes_gram += codes @ codes.T
        self._products_gram += products @ products.T
        self._codes_rows += codes @ rows
        self._n_moving += n_moving
        return codes

    # -- what follows --------------------------------------------------------------------------

    @property
    def _total(self) -> float:
        return float(self._energy.sum()) or 1e-300

    @property
    def shares(self) -> npt.NDArray[np.float64]:
        """The energy of each factor as a part of the whole; they add up to ``1 - error²``."""
        return self._factor_energy.numpy() / self._total

    @property
    def site_shares(self) -> npt.NDArray[np.float64]:
        """How the energy of each factor is spread over the sites, ``(k, n_sites)``."""
        parts = self.loadings.double() * self._codes_rows
        spans = self._matrix.scan.columns.values()
        by_site = torch.stack([parts[:, span].sum(1) for span in spans], dim=1)
        found: npt.NDArray[np.float64] = (by_site / by_site.sum(1, True).clamp(min=1e-300)).numpy()
        return found

    def _error(self, span: slice, whole: float) -> float | None:
        """Return the relative error in some columns; None where they hold nothing."""
        loadings = self.loadings[:, span].double()
        cross = float((loadings * self._codes_rows[:, span]).sum())
        fitted = float((self._codes_gram * (loadings @ loadings.T)).sum())
        return math.sqrt(max(0.0, 1 - (2 * cross - fitted) / whole)) if whole > 0 else None

    def summary(self) -> dict[str, Any]:
        """Return error and certificates by name."""
        columns = self._matrix.scan.columns
        loadings = self.loadings.double()
        gram = loadings @ loadings.T
        explained = float((self._products_gram * torch.linalg.pinv(gram, rcond=1e-10)).sum())
        gradient = self._codes_gram @ loadings - self._codes_rows
        projected = torch.where(loadings > 0, gradient, gradient.clamp(max=0))
        scales = np.square(self._matrix.scales)
        # Of the scaled, unclipped values; `_energy` is of scaled values already.
        signed = self._signed_energy * scales
        return {
            "error": self._error(slice(None), self._total),
            "site_errors": {
                str(site): self._error(span, float(whole))
                for (site, span), whole in zip(columns.items(), self._energy, strict=True)
            },
            "certificates": {
                "kkt_residual": float(projected.norm() / self._codes_rows.norm().clamp(min=1e-300)),
                "signed_scores_error": math.sqrt(max(0.0, 1 - explained / self._total)),
                "one_factor_error": math.sqrt(max(0.0, 1 - self._mean_energy / self._total)),
                "clipped_energy": float(1 - self._energy.sum() / (signed.sum() or 1e-300)),
                "site_clipped_energy": {
                    str(site): float(1 - kept / (whole or 1e-300)) if whole else 0.0
                    for site, kept, whole in zip(columns, self._energy, signed, strict=True)
                },
                "unconverged_rows": self._n_moving,
            },
        }
