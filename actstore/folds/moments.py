"""Moments of every column, to the fourth, with extremes and the energy that clipping keeps.

A state holds sums about its own mean, which merge without cancellation; power sums about a fixed
number near the mean, which a compiled pass can add up faster, become such a state by
`from_power_sums`.

References
----------
P. Pébay, Formulas for robust, one-pass parallel computation of covariances and arbitrary-order
statistical moments, SAND2008-6212, 2008, equations 2.1 and 3.1 with p = 2, 3, 4.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import final

import numpy as np
from numpy.typing import NDArray

from actstore.errors import ArgumentError
from actstore.folds.base import Array, read_values

Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class MomentsState:
    """Moments of some rows; every array has shape (width,)."""

    n: NDArray[np.int64]
    """Number of values, NaN not counted."""
    mean: Float64
    """Mean of the values; 0 where there are none."""
    m2: Float64
    """Sum of (value - mean)**2."""
    m3: Float64
    """Sum of (value - mean)**3."""
    m4: Float64
    """Sum of (value - mean)**4."""
    min: NDArray[np.float32]
    """Smallest value, +inf where there are none; -0.0 is held as 0.0."""
    max: NDArray[np.float32]
    """Largest value, -inf where there are none; -0.0 is held as 0.0."""
    n_positive: NDArray[np.int64]
    """Number of values above 0."""
    energy_positive: Float64
    """Sum of squares of the values above 0: what clipping at 0 keeps."""


@final
@dataclass(frozen=True)
class Moments:
    """Count, mean, central moments to the fourth, extremes and positive energy of each column.

    One pass; memory 9 numbers a column.
    """

    name: str = field(default="moments", init=False)

    def start(self, width: int) -> MomentsState:
        """Return the moments of no rows."""
        return MomentsState(
            n=np.zeros(width, np.int64),
            mean=np.zeros(width),
            m2=np.zeros(width),
            m3=np.zeros(width),
            m4=np.zeros(width),
            min=np.full(width, np.inf, np.float32),
            max=np.full(width, -np.inf, np.float32),
            n_positive=np.zeros(width, np.int64),
            energy_positive=np.zeros(width),
        )

    def update(
        self,
        state: MomentsState,
        block: Array,
        row_ids: NDArray[np.int64],
        windows: NDArray[np.int64] | None = None,
    ) -> MomentsState:
        """Return the moments with the rows of a block added; which rows they are is of no account.

        See Also
        --------
        actstore.folds.base.Fold.update : the parameters.
        actstore.folds.cpu.BandFolds : the same in one compiled pass with all other folds.
        """
        x = read_values(block, np.float64)
        valid = ~np.isnan(x)
        n = valid.sum(axis=0)
        divisor = np.maximum(n, 1)
        mean = np.where(valid, x, 0.0).sum(axis=0) / divisor
        # The second step makes the mean of a constant column that constant, so that m2 is 0.
        mean += np.where(valid, x - mean, 0.0).sum(axis=0) / divisor
        d = np.where(valid, x - mean, 0.0)
        positive = np.where(valid & (x > 0), x, 0.0)
        added = MomentsState(
            n=n.astype(np.int64),
            mean=mean,
            m2=(d**2).sum(axis=0),
            m3=(d**3).sum(axis=0),
            m4=(d**4).sum(axis=0),
            min=np.where(valid, x, np.inf).min(axis=0, initial=np.inf).astype(np.float32),
            max=np.where(valid, x, -np.inf).max(axis=0, initial=-np.inf).astype(np.float32),
            n_positive=np.count_nonzero(positive, axis=0).astype(np.int64),
            energy_positive=(positive**2).sum(axis=0),
        )
        return self.merge(state, added)

    def merge(self, a: MomentsState, b: MomentsState) -> MomentsState:
        """Return the moments of the rows of `a` and `b` together.

        Raises
        ------
        ArgumentError
            If the states are of different widths.
        """
        if a.n.shape != b.n.shape:
            raise ArgumentError(
                f"moments of {a.n.size} and of {b.n.size} columns cannot be merged; "
                "merge states of one site only."
            )
        n = a.n + b.n
        delta = b.mean - a.mean
        share_a = a.n / np.maximum(n, 1)
        share_b = b.n / np.maximum(n, 1)
        # An empty side holds mean 0, which must not move the other's mean even by rounding.
        mean = np.where(a.n == 0, b.mean, a.mean + share_b * delta)
        between = a.n * share_b * delta**2
        return MomentsState(
            n=n,
            mean=mean,
            m2=a.m2 + b.m2 + between,
            m3=a.m3
            + b.m3
            + between * delta * (share_a - share_b)
            + 3 * delta * (share_a * b.m2 - share_b * a.m2),
            m4=a.m4
            + b.m4
            + between * delta**2 * (share_a**2 - share_a * share_b + share_b**2)
            + 6 * delta**2 * (share_a**2 * b.m2 + share_b**2 * a.m2)
            + 4 * delta * (share_a * b.m3 - share_b * a.m3),
            min=np.minimum(a.min, b.min),
            max=np.maximum(a.max, b.max),
            n_positive=a.n_positive + b.n_positive,
            energy_positive=a.energy_positive + b.energy_positive,
        )

    def finish(self, state: MomentsState) -> dict[str, Array]:
        """Return the columns of the ``neurons`` table.

        Returns
        -------
        dict of arrays, shape (width,)
            ``n``; ``mean``; ``std``, of the population (divided by n); ``skewness``;
            ``kurtosis``, in excess of the normal distribution's 3; ``min``; ``max``;
            ``share_positive``, the share of values above 0; ``energy``, the sum of squares;
            ``energy_positive``, the sum of squares of the values above 0.
            Without values, energies are 0 and the rest NaN; of a constant column skewness and
            kurtosis are NaN.
        """
        some = state.n > 0
        n = np.where(some, state.n, np.nan)
        m2 = np.where(state.m2 > 0, state.m2, np.nan)
        return {
            "n": state.n,
            "mean": np.where(some, state.mean, np.nan),
            "std": np.sqrt(state.m2 / n),
            "skewness": np.sqrt(n) * state.m3 / m2**1.5,
            "kurtosis": n * state.m4 / m2**2 - 3.0,
            "min": np.where(some, state.min, np.float32(np.nan)),
            "max": np.where(some, state.max, np.float32(np.nan)),
            "share_positive": state.n_positive / n,
            "energy": state.m2 + state.n * state.mean**2,
            "energy_positive": state.energy_positive,
        }

    def to_arrays(self, state: MomentsState) -> dict[str, Array]:
        """Return the state's arrays by name."""
        return {item.name: getattr(state, item.name) for item in fields(state)}

    def from_arrays(self, arrays: Mapping[str, Array]) -> MomentsState:
        """Return the state that `to_arrays` was given."""
        return MomentsState(**{item.name: arrays[item.name] for item in fields(MomentsState)})


def from_power_sums(
    n: NDArray[np.int64],
    shift: Float64,
    powers: Float64,
    extremes: tuple[NDArray[np.float32], NDArray[np.float32]],
    n_positive: NDArray[np.int64],
    energy_positive: Float64,
) -> MomentsState:
    """Return the state that power sums about a fixed number stand for.

    With a shift d standard deviations from the mean, rounding of the p-th moment grows by d**p.

    Parameters
    ----------
    n : int64 array, shape (width,)
        Number of values.
    shift : float64 array, shape (width,)
        The number the powers are taken about; a value near the mean.
    powers : float64 array, shape (4, width)
        Sums of (value - shift)**p for p = 1, 2, 3, 4.
    extremes : pair of float32 arrays, shape (width,)
        Smallest and largest value.
    n_positive, energy_positive : arrays, shape (width,)
        As in `MomentsState`.
    """
    s1, s2, s3, s4 = powers
    delta = s1 / np.maximum(n, 1)
    return MomentsState(
        n=n,
        mean=np.where(n > 0, shift + delta, 0.0),
        m2=np.maximum(s2 - delta * s1, 0.0),
        m3=s3 - 3 * delta * s2 + 2 * delta**2 * s1,
        m4=np.maximum(s4 - 4 * delta * s3 + 6 * delta**2 * s2 - 3 * delta**3 * s1, 0.0),
        min=extremes[0],
        max=extremes[1],
        n_positive=n_positive,
        energy_positive=energy_positive,
    )
