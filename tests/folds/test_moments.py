"""Moments: against scipy, and where there is nothing to divide by."""

import warnings

import numpy as np
import pytest
import scipy.stats

from actstore.errors import ArgumentError
from actstore.folds.moments import Moments, from_power_sums

FOLD = Moments()


def of(block: np.ndarray) -> dict[str, np.ndarray]:
    """The finished columns of one block."""
    state = FOLD.update(FOLD.start(block.shape[1]), block, np.arange(len(block)))
    return FOLD.finish(state)


def test_columns_agree_with_scipy() -> None:
    """Mean, std, skewness and excess kurtosis are scipy's, over blocks of unequal size."""
    rng = np.random.default_rng(3)
    block = (rng.gamma(2.0, size=(1009, 7)) * rng.normal(5, 20, size=7)).astype(np.float16)
    state = FOLD.start(7)
    for part in np.split(block, [1, 14, 500]):
        state = FOLD.update(state, part, np.arange(len(part)))
    columns, x = FOLD.finish(state), block.astype(np.float64)
    np.testing.assert_array_equal(columns["n"], 1009)
    np.testing.assert_allclose(columns["mean"], x.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(columns["std"], x.std(axis=0), rtol=1e-12)
    np.testing.assert_allclose(columns["skewness"], scipy.stats.skew(x), rtol=1e-9)
    np.testing.assert_allclose(columns["kurtosis"], scipy.stats.kurtosis(x), rtol=1e-9)
    np.testing.assert_array_equal(columns["min"], block.min(axis=0))
    np.testing.assert_array_equal(columns["max"], block.max(axis=0))
    np.testing.assert_allclose(columns["share_positive"], (x > 0).mean(axis=0))
    np.testing.assert_allclose(columns["energy"], (x**2).sum(axis=0), rtol=1e-12)
    np.testing.assert_allclose(
        columns["energy_positive"], (np.maximum(x, 0) ** 2).sum(axis=0), rtol=1e-12
    )


def test_a_large_mean_costs_no_digits() -> None:
    """A mean of a million deviations leaves the variance right, across many merges."""
    x = np.float32(1_000_000) + np.arange(64, dtype=np.float32)[:, None] % 3
    state = FOLD.start(1)
    for row in x:
        state = FOLD.update(state, row[None], np.arange(1))
    np.testing.assert_allclose(state.m2, ((x - x.mean(dtype=np.float64)) ** 2).sum(), rtol=1e-9)


def test_no_values_give_nan_and_no_warning() -> None:
    """Without rows, or with NaN alone, averages are NaN, counts and energies 0."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nothing = FOLD.finish(FOLD.start(2))
        only_nan = of(np.full((5, 2), np.nan, np.float16))
    for columns in (nothing, only_nan):
        for name in ("n", "energy", "energy_positive"):
            np.testing.assert_array_equal(columns[name], 0)
        for name in ("mean", "std", "skewness", "kurtosis", "min", "max", "share_positive"):
            assert np.isnan(columns[name]).all(), name


def test_constant_columns_have_no_shape() -> None:
    """A constant column has std 0 exactly, and neither skewness nor kurtosis."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        columns = of(np.full((1013, 1), 0.1, np.float32))
    assert columns["std"] == 0
    assert columns["mean"] == np.float32(0.1)
    assert np.isnan(columns["skewness"])
    assert np.isnan(columns["kurtosis"])


def test_nan_is_left_out_of_every_number() -> None:
    """A column with NaN has the numbers of the column without it."""
    block = np.array([[1.0], [np.nan], [-3.0], [np.nan], [11.0]], np.float32)
    for name, column in of(block).items():
        np.testing.assert_array_equal(column, of(block[[0, 2, 4]])[name], err_msg=name)


def test_negative_zero_is_zero() -> None:
    """Extremes of zeros are 0.0 whatever the sign that came first, and zeros are not positive."""
    columns = of(np.array([[-0.0], [0.0], [-0.0]], np.float16))
    assert not np.signbit(columns["min"])
    assert not np.signbit(columns["max"])
    assert columns["share_positive"] == 0


def test_power_sums_about_any_number_are_moments() -> None:
    """Power sums about a number near the mean become the same state."""
    x = np.random.default_rng(5).normal(3, 2, size=(997, 4)).astype(np.float32)
    shift = np.array([3.0, 2.0, 0.0, 7.0])
    d = x.astype(np.float64) - shift
    want = FOLD.update(FOLD.start(4), x, np.arange(997))
    got = from_power_sums(
        n=np.full(4, 997),
        shift=shift,
        powers=np.stack([(d**p).sum(axis=0) for p in (1, 2, 3, 4)]),
        extremes=(want.min, want.max),
        n_positive=want.n_positive,
        energy_positive=want.energy_positive,
    )
    for name in ("mean", "m2", "m4"):
        np.testing.assert_allclose(getattr(got, name), getattr(want, name), rtol=1e-11)
    np.testing.assert_allclose(got.m3, want.m3, atol=1e-9 * (np.abs(d) ** 3).sum())


def test_other_widths_are_refused() -> None:
    """States of different widths are told apart, with the remedy."""
    with pytest.raises(ArgumentError, match=r"of 2 and of 3 columns .* merge states of one site"):
        FOLD.merge(FOLD.start(2), FOLD.start(3))
