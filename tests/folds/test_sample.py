"""The sample: which rows, their values, and rows of quantile bins."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actstore.errors import ArgumentError
from actstore.folds.sample import EVERY_HASH, Sample, quantile_rows


def test_all_sites_sample_the_same_rows() -> None:
    """Which rows are sampled follows from the row_ids and the seed, not from values or order."""
    fold, rows = Sample(n_rows=7), np.arange(1000, 1101)
    rng = np.random.default_rng(1)
    states = []
    for width in (1, 3):
        order = rng.permutation(101)
        block = rng.normal(size=(101, width)).astype(np.float16)
        states.append(fold.update(fold.start(width), block[order], rows[order]))
        got = states[-1]
        assert got.values.tobytes() == block[got.row_ids - 1000].tobytes()
    assert states[0].row_ids.tolist() == states[1].row_ids.tolist()
    assert len(states[0].row_ids) == 7
    other = Sample(n_rows=7, seed=1)
    block = np.zeros((101, 1), np.float16)
    assert other.update(other.start(1), block, rows).row_ids.tolist() != states[0].row_ids.tolist()


def test_the_sample_is_uniform() -> None:
    """Rows of all parts of a store are drawn alike: chi-square over 16 parts, 2,048 draws."""
    rows = np.arange(65536)
    fold = Sample(n_rows=2048)
    drawn = fold.update(fold.start(0), np.empty((65536, 0), np.float16), rows).row_ids
    for part in (drawn // 4096, drawn % 16):
        counts = np.bincount(part, minlength=16)
        assert ((counts - 128) ** 2 / 128).sum() < 37.7  # 0.1 % of uniform samples exceed it


def test_bits_are_kept() -> None:
    """Values are held as they are stored, bfloat16, -0.0 and NaN too, and saved as bits."""
    block = np.array([[-0.0, np.nan]], ml_dtypes.bfloat16)
    fold = Sample()
    arrays = fold.to_arrays(fold.update(fold.start(2), block, np.array([5])))
    assert arrays["values"].dtype == np.uint16
    again = fold.from_arrays(arrays)
    assert again.values.dtype == block.dtype
    assert again.values.tobytes() == block.tobytes()


def test_thresholds_let_in_what_the_sample_needs_and_no_more() -> None:
    """Rows that pass the threshold of a full sample are those that would displace another."""
    fold = Sample(n_rows=5)
    assert fold.threshold(np.arange(4)) == EVERY_HASH
    first = fold.update(fold.start(1), np.zeros((50, 1), np.float16), np.arange(50))
    more = np.arange(50, 300)
    passed = more[fold.passes(more, fold.threshold(first.row_ids))]
    assert 0 < len(passed) < 100
    alone = fold.merge(
        first, fold.update(fold.start(1), np.zeros((250, 1), np.float16), more)
    ).row_ids
    assert set(alone) - set(first.row_ids) <= set(passed)


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_quantile_rows_are_of_their_bins(data: st.DataObject) -> None:
    """Bins are equal parts of the rows in order of value; of each, rows with the lowest hash."""
    n, n_bins = data.draw(st.integers(0, 30)), data.draw(st.sampled_from([1, 3, 10]))
    n_each = data.draw(st.sampled_from([1, 2, 40]))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    values = rng.choice([-1.5, 0.0, 2.0, 3.0, np.nan], (n, 2)).astype(np.float16)
    rows = np.sort(rng.permutation(999)[:n])
    got = quantile_rows(values, rows, n_bins, n_each)
    assert got.row_ids.shape == got.values.shape == (2, n_bins, n_each)
    for column in range(2):
        cells = [(v, r) for v, r in zip(values[:, column], rows, strict=True) if v == v]
        cells.sort()
        value_of = {row: value for value, row in cells}
        for b in range(n_bins):
            part = cells[b * len(cells) // n_bins : (b + 1) * len(cells) // n_bins]
            ids = got.row_ids[column, b]
            taken = ids[ids >= 0]
            assert len(set(taken)) == len(taken) == min(n_each, len(part))
            lowest = Sample(max(n_each, 1))
            ids_of_part = np.array([row for _, row in part], np.int64)
            want = lowest.update(lowest.start(0), np.empty((len(part), 0)), ids_of_part)
            assert set(taken) == set(want.row_ids)
            found = got.values[column, b]
            assert [value_of[row] for row in taken] == found[ids >= 0].tolist()
            assert np.isnan(found[ids < 0]).all()


def test_mistakes_are_named() -> None:
    """Nothing to draw, other widths and other dtypes are refused with the remedy."""
    with pytest.raises(ArgumentError, match=r"n_rows = 0 draws nothing; give 1 or more"):
        Sample(0)
    with pytest.raises(ArgumentError, match=r"n_bins = 0, n_each = 3 draw nothing; give 1 or more"):
        quantile_rows(np.zeros((1, 1)), np.arange(1), 0, 3)
    fold = Sample()
    a = fold.update(fold.start(2), np.zeros((1, 2), np.float16), np.arange(1))
    b = fold.update(fold.start(2), np.zeros((1, 2), np.float32), np.arange(1) + 1)
    with pytest.raises(ArgumentError, match=r"of float16 and of 2 columns of float32 .* one site"):
        fold.merge(a, b)
    with pytest.raises(ArgumentError, match=r"samples of 2 columns .* of 3 columns"):
        fold.merge(a, fold.start(3))
