"""Running sums of a site on the device that folds its bands: of powers, and of products.

Both are of float64: float32 does not hold moments to 1e-9, ten operations a value are not what
takes time even where float64 is slow, and PyTorch may have been told to shorten float32 products.
A Gram is another matter: on such cards it takes long.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actstore.folds.device.band import BandView
from actstore.folds.device.pieces import to_device
from actstore.folds.gram import Gram, GramState
from actstore.folds.moments import MomentsState, from_power_sums
from actstore.folds.passes import SAMPLE_ROWS

_GRAM_ROWS = 1024


class RunningSums:
    """Running sums of some rows of one site."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.shift: Tensor | None = None
        """What the powers are taken about, near the mean of the first rows."""
        self.powers = torch.zeros((5, width), dtype=torch.float64, device=device)
        """Sums of (value - shift)**p, p = 1 … 4, and of the squares of positive values."""
        self.extremes = torch.full((2, width), -torch.inf, device=device)
        """Largest value and largest negated value."""

    def tensors(self) -> list[Tensor]:
        """Return what takes memory."""
        shift = [] if self.shift is None else [self.shift]
        return [self.powers, self.extremes, *shift]

    def begin_at(self, view: BandView, rows: Tensor) -> Tensor:
        """Return the shift; the first time from some rows of a band, evenly spread."""
        if self.shift is None:
            return self.begin(view.rows(rows[_spread(rows)]))
        return self.shift

    def begin(self, values: Tensor) -> Tensor:
        """Return the shift; the first time the mean of some rows, 0 where all of them are NaN."""
        if self.shift is None:
            sample = values[_spread(values)].double()
            n = sample.isnan().logical_not_().sum(0).clamp_(min=1)
            self.shift = sample.nan_to_num_(0.0).sum(0) / n
        return self.shift

    def state(self, n: NDArray[np.int64], n_positive: NDArray[np.int64]) -> MomentsState:
        """Return the moments, given the number of values and of those above 0."""
        high, low = (self.extremes * signs(self.extremes) + 0.0).cpu().numpy()
        powers = self.powers.cpu().numpy()
        shift = np.zeros(len(n)) if self.shift is None else self.shift.cpu().numpy()
        return from_power_sums(n, shift, powers[:4], (low, high), n_positive, powers[4])


class GramSums:
    """Running sums of products about a fixed number near the mean."""

    def __init__(self, width: int, device: torch.device) -> None:
        self._n = torch.zeros((), dtype=torch.int64, device=device)
        self._sums = torch.zeros(width, dtype=torch.float64, device=device)
        self._products = torch.zeros((width, width), dtype=torch.float64, device=device)

    def tensors(self) -> list[Tensor]:
        """Return what takes memory."""
        return [self._n, self._sums, self._products]

    def add(self, view: BandView, rows: Tensor, shift: Tensor) -> None:
        """Add rows; one with NaN is left out whole."""
        for some in torch.split(rows, _GRAM_ROWS):
            values = view.rows(some)
            is_bad = values.isnan().any(1)
            d = (values - shift).masked_fill_(is_bad[:, None], 0.0)
            self._n += is_bad.logical_not().sum()
            self._sums += d.sum(0)
            self._products.addmm_(d.T, d)

    def state(self, shift: Tensor | None) -> GramState:
        """Return the moments of the rows added."""
        n, sums = int(self._n), self._sums.cpu().numpy()
        if not n or shift is None:
            return Gram().start(sums.size)
        m2 = self._products.cpu().numpy() - np.outer(sums, sums / n)
        return GramState(n, shift.cpu().numpy() + sums / n, m2)


def _spread(rows: Tensor) -> Tensor:
    """Return some places in rows, evenly spread."""
    places = np.linspace(0, len(rows) - 1, min(len(rows), SAMPLE_ROWS))
    return to_device(places.astype(np.int64), rows.device)


def signs(like: Tensor) -> Tensor:
    """Return 1 for highest and -1 for lowest values, (2, 1)."""
    return (1 - 2 * torch.arange(2, device=like.device))[:, None]


def power_sums(values: Tensor, shift: Tensor, hide_nan: bool) -> Tensor:
    """Return the `RunningSums.powers`, (5, columns), of values (chunks, rows, columns)."""
    zero = torch.zeros((1, 1, 1), dtype=torch.float64, device=values.device)
    d = values - shift
    positive = torch.maximum(values, zero)
    if hide_nan:
        is_nan = values.isnan()
        d.masked_fill_(is_nan, 0.0)
        positive.masked_fill_(is_nan, 0.0)
    energy = torch.linalg.vector_norm(positive, dim=1).square_()
    del positive
    square = d.square()
    # A norm squares and adds in one go.
    s1, s2, s4 = d.sum(1), square.sum(1), torch.linalg.vector_norm(square, dim=1).square_()
    s3 = d.mul_(square).sum(1)
    return torch.stack([s1, s2, s3, s4, energy]).flatten(1)
