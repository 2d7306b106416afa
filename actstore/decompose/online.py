"""Online passes: many dictionaries improved together, super-step by super-step.

A *dictionary* is what one fit has come to: loadings L and the surrogate ``P = Σ HᵀA`` and
``Q = Σ HᵀH`` of the codes H so far, older ones decaying since they came from worse loadings.
Within a super-step loadings stay, so its rows may be shared out; at its end they are improved given
P and Q.

All dictionaries of a scan, of different seeds and numbers of factors, are stacked: a block is read
and converted once, and one product with the stack serves them all.  Only the codes, small, are
solved for each by itself, so that a dictionary comes out as it would alone.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from actstore.decompose.codes import descend, solve_codes, solve_sparse_codes
from actstore.decompose.device import here, there
from actstore.decompose.engine import Sums
from actstore.decompose.matrix import Matrix
from actstore.decompose.scan import Block, Form


@functools.cache
def product_dtype() -> Literal["float32", "bfloat16"]:
    """Return the dtype of the online passes' products: bfloat16 where the processor computes in it.

    They lead to the loadings only, and rounding them to eight bits leaves the error as it is while
    the products take a sixth of the time.  Scores, error and certificates come from float32.
    """
    cpuinfo = Path("/proc/cpuinfo")
    flags = set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()
    return "bfloat16" if flags & {"avx512_bf16", "amx_bf16", "bf16"} else "float32"


@dataclass(frozen=True)
class Coder:
    """What solves the codes of one dictionary."""

    gram: torch.Tensor
    """``L Lᵀ``."""
    n_active: int | None
    """Codes of a row that may be above zero; None is all."""

    def codes(
        self, products: torch.Tensor, n_sweeps: int, tolerance: float = 0.0
    ) -> tuple[torch.Tensor, int]:
        """Return the codes of some rows, ``(k, n)``, from ``L Aᵀ``; and how many still moved."""
        if self.n_active is None:
            return solve_codes(products, self.gram, n_sweeps=n_sweeps, tolerance=tolerance)
        return solve_sparse_codes(
            products, self.gram, self.n_active, n_sweeps=n_sweeps, tolerance=tolerance
        )


class Dictionary:
    """The loadings of one fit, and the surrogate that improves them.

    Parameters
    ----------
    loadings : Tensor (k, width)
        Where they start; changed in place.
    n_active : int, optional
        Scores of a row that may be above zero; given for signed loadings only.
    """

    def __init__(self, loadings: torch.Tensor, n_active: int | None = None) -> None:
        k, width = loadings.shape
        self.loadings = loadings.contiguous()
        """What was found so far, of any length."""
        self.n_active = n_active
        self.images = torch.zeros(k, width)
        """P."""
        self.gram = torch.zeros(k, k)
        """Q."""

    @property
    def coder(self) -> Coder:
        """What solves codes for the loadings as they are."""
        return Coder(self.loadings @ self.loadings.T, self.n_active)

    @property
    def is_signed(self) -> bool:
        """Whether loadings may be negative."""
        return self.n_active is not None

    def add(self, images: torch.Tensor, gram: torch.Tensor, decay: float) -> None:
        """Take in what some rows give; what was there counts for `decay` of itself."""
        self.images.mul_(decay).add_(images)
        self.gram.mul_(decay).add_(gram)

    def objective(self) -> float:
        """Return the squared error on the rows of the surrogate, but for their own energy."""
        loadings = self.loadings.double()
        fitted = (self.gram.double() * (loadings @ loadings.T)).sum()
        return float(fitted - 2 * (self.images.double() * loadings).sum())

    def kkt_residual(self) -> float:
        """Return the projected gradient of the surrogate as a part of P."""
        gradient = self.gram.double() @ self.loadings.double() - self.images.double()
        if not self.is_signed:
            gradient = torch.where(self.loadings > 0, gradient, gradient.clamp(max=0))
        return float(gradient.norm() / self.images.double().norm().clamp(min=1e-300))

    def improve(self, threads: Executor, n_sweeps: int) -> None:
        """Improve the loadings given P and Q: by HALS sweeps, or where signed by least squares."""
        weights = self.gram.diagonal()[:, None]
        used = weights > 0
        if self.is_signed:
            gram = self.gram.double()
            ridge = 1e-6 * gram.diagonal().mean().clamp(min=1e-300)
            gram = gram + ridge * torch.eye(len(gram))
            found = torch.linalg.solve(gram, self.images.double()).float()
            self.loadings = torch.where(used, found, self.loadings).contiguous()
            return
        targets = torch.where(used, self.images / weights, self.loadings)
        shares = torch.where(used, self.gram / weights, 0)
        descend(targets, shares, self.loadings, n_sweeps=n_sweeps, threads=threads)

    @property
    def dead(self) -> list[int]:
        """Components that no row uses."""
        unused = (self.gram.diagonal() <= 0) | (self.loadings.abs().amax(1) <= 0)
        return [int(j) for j in torch.nonzero(unused).ravel()]

    def revive(self, rows: torch.Tensor) -> None:
        """Give dead components what the worst explained of some rows are missing."""
        codes, _ = self.coder.codes(self.loadings @ rows.T, n_sweeps=20)
        residual = rows - codes.T @ self.loadings
        worst = torch.argsort(residual.norm(dim=1), descending=True, stable=True)
        for j, row in zip(self.dead, worst.tolist(), strict=False):
            self.loadings[j] = residual[row] if self.is_signed else residual[row].clamp(min=0)
            self.images[j] = 0
            self.gram[j] = 0
            self.gram[:, j] = 0

    def unit_loadings(self) -> torch.Tensor:
        """Return the loadings, each of length one, or zero."""
        lengths: torch.Tensor = torch.linalg.vector_norm(self.loadings, dim=1, keepdim=True)
        return self.loadings / lengths.clamp(min=1e-30)

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """Return all there is to go on from."""
        return {
            "loadings": self.loadings.numpy(),
            "images": self.images.numpy(),
            "gram": self.gram.numpy(),
        }

    def resume(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Go on from a state."""
        self.loadings, self.images, self.gram = (
            torch.from_numpy(np.array(state[name])) for name in ("loadings", "images", "gram")
        )


@dataclass(frozen=True)
class SurrogateWork:
    """What a range adds to P and Q of every dictionary of a stack, and to the sum of all rows."""

    stack: torch.Tensor
    """Loadings of all dictionaries, one below the other, times the scales of the columns."""
    coders: tuple[Coder, ...]
    """What solves each one's codes."""
    n_sweeps: int
    """Sweeps of the codes, at most."""
    tolerance: float = 0.0
    """When they may stop."""

    @classmethod
    def of(
        cls,
        dictionaries: Sequence[Dictionary],
        matrix: Matrix,
        form: Form,
        n_sweeps: int,
        tolerance: float = 0.0,
    ) -> SurrogateWork:
        """Return the work for dictionaries as they are, on blocks of a form."""
        stack = torch.cat([d.loadings for d in dictionaries]) * matrix.column_scales
        coders = tuple(d.coder for d in dictionaries)
        return cls(stack.to(getattr(torch, form.dtype)), coders, n_sweeps, tolerance)

    def __call__(self, blocks: Iterable[Block]) -> Sums:
        """Return the sums: ``images``, ``gram 0`` and so on, ``n_rows``."""
        sizes = [len(coder.gram) for coder in self.coders]
        stack = there(self.stack)
        images = stack.new_zeros(sum(sizes) + 1, stack.shape[1], dtype=torch.float32)
        grams = [torch.zeros(k, k) for k in sizes]
        n_rows = 0
        for block in blocks:
            rows = there(block.values)
            products = torch.split(here((rows @ stack.T).float().T), sizes)
            codes = [
                coder.codes(mine.contiguous(), self.n_sweeps, self.tolerance)[0]
                for coder, mine in zip(self.coders, products, strict=True)
            ]
            # A last row of ones, and the mean costs no pass over the block of its own.
            left = torch.cat([*codes, torch.ones(1, len(rows))]).to(rows.dtype)
            images += there(left) @ rows
            for gram, mine in zip(grams, codes, strict=True):
                gram.addmm_(mine, mine.T)
            n_rows += len(rows)
        sums = {"images": here(images), "n_rows": torch.tensor(n_rows)}
        return {**sums, **{f"gram {i}": gram for i, gram in enumerate(grams)}}


def take(
    dictionaries: Sequence[Dictionary], matrix: Matrix, sums: Sums, decay: float
) -> torch.Tensor:
    """Give every dictionary its part of the sums; return the sum of all rows, ``(width,)``."""
    images = sums["images"] * matrix.column_scales
    first = 0
    for number, dictionary in enumerate(dictionaries):
        stop = first + len(dictionary.loadings)
        dictionary.add(images[first:stop], sums[f"gram {number}"], decay)
        first = stop
    return images[-1]
