"""The exact pass: scores of every row for fixed loadings, and how good the factorisation is.

With ``C = A Lᵀ`` and converged codes S, everything follows from sums that are added in float64 and
small beside the data: ``|A|²``, ``<C, S>``, ``SᵀS``, ``CᵀC`` and ``P = SᵀA``.

- ``|A - S L|² = |A|² - 2 <C, S> + <SᵀS, LLᵀ>``; by site with the site's columns of P and L.
- ``shares[j] = Σ C_ij S_ij / |A|²``: at converged codes they add up to ``1 - error²``.
- With the same loadings and scores of any sign the energy explained is ``<CᵀC, (LLᵀ)⁺>``.
- The gradient by L is ``SᵀS L - P``; where a loading is zero only its negative part counts.

Sums of a block are float32, so ``error²`` is good to about 1e-6 of the whole: an error below 1e-3
is not told from zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from actstore import durable
from actstore.decompose.device import here, there
from actstore.decompose.engine import Sums
from actstore.decompose.matrix import Matrix
from actstore.decompose.online import Coder
from actstore.decompose.scan import Block

_SWEEPS = 400
_TOLERANCE = 1e-4


@dataclass(frozen=True)
class ExactWork:
    """What the rows of a segment add, for several dictionaries; their scores go to files."""

    matrix: Matrix
    """The matrix."""
    stack: torch.Tensor
    """Loadings of unit length, one dictionary below the other, and at last the mean's direction."""
    coders: tuple[Coder, ...]
    """What solves each one's codes."""
    folder: str
    """Where the scores go."""
    segment_rows: int
    """S of the store."""

    @classmethod
    def of(
        cls,
        matrix: Matrix,
        loadings: Sequence[torch.Tensor],
        n_active: Sequence[int | None],
        mean: torch.Tensor,
        folder: Path,
        segment_rows: int,
    ) -> ExactWork:
        """Return the work for loadings of unit length."""
        stack = torch.cat([*loadings, mean[None] / mean.norm().clamp(min=1e-30)])
        coders = tuple(Coder(x @ x.T, n) for x, n in zip(loadings, n_active, strict=True))
        return cls(matrix, stack, coders, str(folder), segment_rows)

    def __call__(self, blocks: Iterable[Block]) -> Sums:
        """Write the scores of the segment; return the sums of its rows."""
        n_sites = len(self.matrix.spans)
        sizes = [len(coder.gram) for coder in self.coders]
        edges = np.cumsum([0, *sizes])
        signed_energy = torch.zeros(n_sites, dtype=torch.float64)
        energy = torch.zeros(n_sites, dtype=torch.float64)
        mean_energy = torch.zeros((), dtype=torch.float64)
        stack = there(self.stack)
        images = stack.new_zeros(sum(sizes), stack.shape[1], dtype=torch.float64)
        parts = [
            {
                "factor_energy": torch.zeros(k, dtype=torch.float64),
                "codes_gram": torch.zeros(k, k, dtype=torch.float64),
                "products_gram": torch.zeros(k, k, dtype=torch.float64),
                "n_moving": torch.zeros((), dtype=torch.int64),
            }
            for k in sizes
        ]
        scores: list[list[torch.Tensor]] = [[] for _ in sizes]
        segment = -1
        for block in blocks:
            segment = int(block.row_ids[0]) // self.segment_rows
            values = there(block.values)
            signed_energy += here(self.matrix.energies(values))
            rows = self.matrix.rows(values)
            energy += here(self.matrix.energies(rows))
            products = here((rows @ stack.T).T.contiguous())
            mean_energy += products[-1].double().square().sum()
            found = []
            for i, (coder, part) in enumerate(zip(self.coders, parts, strict=True)):
                mine = products[edges[i] : edges[i + 1]]
                codes, n_moving = coder.codes(mine, _SWEEPS, _TOLERANCE)
                part["factor_energy"] += (mine * codes).sum(1, dtype=torch.float64)
                part["codes_gram"] += codes @ codes.T
                part["products_gram"] += mine @ mine.T
                part["n_moving"] += n_moving
                scores[i].append(codes.T)
                found.append(codes)
            images += there(torch.cat(found)) @ rows
        for i, pieces in enumerate(scores):
            path = scores_file(Path(self.folder), i, segment)
            durable.write_array(path, torch.cat(pieces).numpy())
        return {
            "signed_energy": signed_energy,
            "energy": energy,
            "mean_energy": mean_energy,
            "images": here(images),
            **{f"{name} {i}": v for i, part in enumerate(parts) for name, v in part.items()},
        }


def scores_file(folder: Path, number: int, segment: int) -> Path:
    """Return where the scores of a dictionary in a segment are, ``(rows, k)`` float32."""
    return folder / f"scores-{number}-{segment:08d}.npy"


@dataclass(frozen=True)
class Exact:
    """What follows from the sums of an exact pass for one of its dictionaries."""

    matrix: Matrix
    """The matrix."""
    sites: Sequence[str]
    """The names of its sites."""
    loadings: torch.Tensor
    """Of unit length, ``(k, width)``."""
    is_signed: bool
    """Whether they may be negative."""
    sums: Sums
    """The sums of all its works, those of the dictionary under their own names."""

    @classmethod
    def of(
        cls,
        matrix: Matrix,
        sites: Sequence[str],
        loadings: Sequence[torch.Tensor],
        is_signed: bool,
        sums: Sums,
    ) -> list[Exact]:
        """Return what follows for each of the dictionaries."""
        found = []
        first = 0
        for i, mine in enumerate(loadings):
            named = {
                name.removesuffix(f" {i}"): value
                for name, value in sums.items()
                if " " not in name or name.endswith(f" {i}")
            }
            named["images"] = sums["images"][first : first + len(mine)]
            first += len(mine)
            found.append(cls(matrix, sites, mine, is_signed, named))
        return found

    @property
    def _total(self) -> float:
        return float(self.sums["energy"].sum()) or 1e-300

    @property
    def shares(self) -> npt.NDArray[np.float64]:
        """The energy of each factor as a part of the whole; they add up to ``1 - error²``."""
        return self.sums["factor_energy"].numpy() / self._total

    @property
    def site_shares(self) -> npt.NDArray[np.float64]:
        """How the energy of each factor is spread over the sites, ``(k, n_sites)``."""
        parts = self.loadings.double() * self.sums["images"]
        by_site = torch.stack([parts[:, a:b].sum(1) for a, b in self.matrix.spans], dim=1)
        found: npt.NDArray[np.float64] = (by_site / by_site.sum(1, True).clamp(min=1e-300)).numpy()
        return found

    def _error(self, columns: slice, whole: float) -> float | None:
        """Return the relative error in some columns; None where they hold nothing."""
        loadings = self.loadings[:, columns].double()
        cross = float((loadings * self.sums["images"][:, columns]).sum())
        fitted = float((self.sums["codes_gram"] * (loadings @ loadings.T)).sum())
        return math.sqrt(max(0.0, 1 - (2 * cross - fitted) / whole)) if whole > 0 else None

    @property
    def error(self) -> float:
        """``|A - S L| / |A|``; 0 where there is nothing to factorise."""
        return self._error(slice(None), float(self.sums["energy"].sum())) or 0.0

    @property
    def clipped_energy(self) -> float:
        """The part of the energy that clipping at zero threw away."""
        signed = self.sums["signed_energy"] * torch.tensor(self.matrix.scales).double().square()
        return float(1 - self.sums["energy"].sum() / (float(signed.sum()) or 1e-300))

    def summary(self) -> dict[str, Any]:
        """Return error and certificates by name."""
        sums = self.sums
        loadings = self.loadings.double()
        gram = loadings @ loadings.T
        explained = float((sums["products_gram"] * torch.linalg.pinv(gram, rcond=1e-10)).sum())
        gradient = sums["codes_gram"] @ loadings - sums["images"]
        if not self.is_signed:
            gradient = torch.where(loadings > 0, gradient, gradient.clamp(max=0))
        # Of the scaled, unclipped values; `energy` is of scaled values already.
        signed = sums["signed_energy"] * torch.tensor(self.matrix.scales).double().square()
        by_site = [
            (name, slice(*span), float(kept), float(whole))
            for name, span, kept, whole in zip(
                self.sites, self.matrix.spans, sums["energy"], signed, strict=True
            )
        ]
        return {
            "error": self.error,
            "site_errors": {name: self._error(span, kept) for name, span, kept, _ in by_site},
            "certificates": {
                "kkt_residual": float(gradient.norm() / sums["images"].norm().clamp(min=1e-300)),
                "signed_scores_error": math.sqrt(max(0.0, 1 - explained / self._total)),
                "one_factor_error": math.sqrt(
                    max(0.0, 1 - float(sums["mean_energy"]) / self._total)
                ),
                "clipped_energy": self.clipped_energy,
                "site_clipped_energy": {
                    name: 1 - kept / whole if whole else 0.0 for name, _, kept, whole in by_site
                },
                "unconverged_rows": int(sums["n_moving"]),
            },
        }
