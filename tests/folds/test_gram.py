"""The Gram: against numpy.cov, and its float32 products."""

import numpy as np
import pytest

from actstore.errors import ArgumentError
from actstore.folds.gram import Gram, RunningGram

FOLD = Gram()


def test_the_gram_is_the_covariance() -> None:
    """Over blocks of unequal size it is numpy.cov's, times n - 1, and the mean is the mean."""
    rng = np.random.default_rng(3)
    block = (rng.normal(size=(1009, 5)) @ rng.normal(size=(5, 5)) + 30).astype(np.float16)
    state = FOLD.start(5)
    for part in np.split(block, [0, 1, 14, 500]):
        state = FOLD.update(state, part, np.arange(len(part)))
    x = block.astype(np.float64)
    assert state.n == 1009
    np.testing.assert_allclose(state.mean, x.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(state.m2, np.cov(x.T) * 1008, rtol=1e-9)


def test_a_row_with_nan_is_left_out_whole() -> None:
    """NaN in one column takes the row out of every column."""
    block = np.float32([[1, 2], [np.nan, 900], [3, 5]])
    whole = FOLD.update(FOLD.start(2), block, np.arange(3))
    without = FOLD.update(FOLD.start(2), block[[0, 2]], np.arange(2))
    assert whole.n == 2
    assert whole.m2.tolist() == without.m2.tolist()


def test_running_products_are_the_gram_however_large_the_mean() -> None:
    """Blocks of products in float32, about the first rows' mean, give the Gram to 1e-5."""
    rng = np.random.default_rng(4)
    block = (rng.normal(size=(3001, 4)) @ rng.normal(size=(4, 4)) + 5000).astype(np.float32)
    block[2, 1] = np.nan
    running = RunningGram(4)
    running.add(block[:0])
    running.add(block[2:3])
    for part in np.split(np.delete(block, 2, axis=0), [7, 1999]):
        running.add(part)
    got, want = running.state(), FOLD.update(FOLD.start(4), block, np.arange(3001))
    assert got.n == want.n == 3000
    np.testing.assert_allclose(got.mean, want.mean, rtol=1e-9)
    scale = np.sqrt(np.outer(np.diag(want.m2), np.diag(want.m2)))
    assert (np.abs(got.m2 - want.m2) <= 1e-5 * scale).all()
    assert (got.m2 == got.m2.T).all()


def test_other_widths_are_refused() -> None:
    """States of different widths are told apart, with the remedy."""
    with pytest.raises(ArgumentError, match=r"of 2 and of 3 columns .* merge states of one site"):
        FOLD.merge(FOLD.start(2), FOLD.start(3))
