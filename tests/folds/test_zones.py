"""Zones: extremes of bands."""

import numpy as np
import pytest

from actstore.errors import ArgumentError
from actstore.folds.zones import Zones


def test_zones_are_the_extremes_of_bands() -> None:
    """Bands are counted in row_ids; one without rows is not there, NaN is no value."""
    fold = Zones(chunk_rows=4)
    rows = np.array([13, 8, 15, 9, 23])
    block = np.float16([[3, np.nan], [5, 1], [-7, np.nan], [11, -0.0], [2, 2]])
    state = fold.update(fold.start(2), block, rows)
    assert state.first_row_ids.tolist() == [8, 12, 20]
    np.testing.assert_array_equal(
        state.extremes,
        np.float32([[[5, 0], [11, 1]], [[-7, np.nan], [3, np.nan]], [[2, 2], [2, 2]]]),
    )
    assert not np.signbit(state.extremes[0, 0, 1])


def test_bands_that_were_cut_are_joined() -> None:
    """Rows of one band in two states become one zone, whichever comes first."""
    fold, block = Zones(4), np.float32([[1], [9], [4], [6]])
    a = fold.update(fold.start(1), block[:2], np.array([1, 5]))
    b = fold.update(fold.start(1), block[2:], np.array([2, 9]))
    for merged in (fold.merge(a, b), fold.merge(b, a)):
        assert merged.first_row_ids.tolist() == [0, 4, 8]
        assert merged.extremes[:, :, 0].tolist() == [[1, 4], [9, 9], [6, 6]]


def test_mistakes_are_named() -> None:
    """A band of no rows and other widths are refused with the remedy."""
    with pytest.raises(ArgumentError, match=r"chunk_rows = 0 is no band; give 1 or more"):
        Zones(0)
    with pytest.raises(ArgumentError, match=r"of 2 and of 3 columns .* merge states of one site"):
        Zones().merge(Zones().start(2), Zones().start(3))
