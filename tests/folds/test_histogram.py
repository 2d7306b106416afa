"""Histograms: the bins, their edges, and quantiles."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actstore.errors import ArgumentError
from actstore.folds.histogram import Histogram, HistogramState, bin_edges, bins_of, quantile_bounds

FOLD = Histogram()


def of(block: np.ndarray) -> HistogramState:
    """The histogram of one block."""
    return FOLD.update(FOLD.start(block.shape[1]), block, np.arange(len(block)))


def test_bins_are_the_high_bytes_of_float16() -> None:
    """Two finite float16 share a bin if the high bytes of their bits are equal, and only then."""
    codes = np.arange(65536, dtype=np.uint16)
    values = codes.view(np.float16)
    finite = np.isfinite(values) & (codes != 0x8000)
    high_bytes, bins = codes[finite] >> 8, bins_of(values[finite])
    pairs = np.unique(np.stack([high_bytes, bins], axis=1), axis=0)
    assert len(pairs) == len(np.unique(high_bytes)) == len(np.unique(bins)) == 248


def test_bins_are_numbered_by_value() -> None:
    """Greater values are in greater bins, and -0.0 is where 0.0 is."""
    values = np.arange(65536, dtype=np.uint16).view(np.float16)
    values = np.sort(values[~np.isnan(values)])
    assert (np.diff(bins_of(values)) >= 0).all()
    assert bins_of(np.float16([-0.0, 0.0])).tolist() == [128, 128]
    assert bins_of(np.float32([-1e-45, 1e-45])).tolist() == [127, 128]


@given(
    st.floats(width=32, allow_nan=False),
    st.sampled_from([np.float16, np.float32, ml_dtypes.bfloat16]),
)
def test_every_value_lies_within_the_edges_of_its_bin(value: float, dtype: type) -> None:
    """Of any dtype, infinities too; edges of greater magnitude belong to the next bin."""
    with np.errstate(over="ignore"):
        x = np.array([value], dtype)
    low, high = bin_edges()
    (place,) = bins_of(x)
    wide = np.float32(x[0])
    assert low[place] <= wide <= high[place]
    if np.isfinite(wide) and wide:
        assert abs(wide) < max(abs(low[place]), abs(high[place]))


def test_edges_leave_no_gap() -> None:
    """Bins 4 to 251 follow each other from -inf to inf through 0; the others have no edges."""
    low, high = bin_edges()
    assert np.isnan([*low[:4], *low[252:], *high[:4], *high[252:]]).all()
    assert (low[5:252] == high[4:251]).all()
    assert (low[4], high[251]) == (-np.inf, np.inf)
    assert (low[128], high[127], low[251]) == (0.0, 0.0, 57344.0)
    assert not np.signbit(high[127])
    assert low[129] == 2.0**-16


def test_nan_is_not_counted_and_infinities_are_in_the_last_bins() -> None:
    """Counts are of values; what is beyond float16 is in the last bin of its sign."""
    counts = of(np.float32([[np.nan], [1e30], [np.inf], [-7e4], [70.0]])).counts[0]
    assert counts.sum() == 4
    assert (counts[251], counts[4]) == (2, 1)


@given(st.data())
def test_quantiles_lie_within_their_bounds(data: st.DataObject) -> None:
    """The bounds hold what NumPy calls the quantile by the inverted distribution."""
    n, q = data.draw(st.integers(1, 60)), data.draw(st.sampled_from([0, 0.01, 0.25, 0.5, 0.99, 1]))
    values = st.floats(-(2.0**15), 2.0**15, width=16)
    block = np.array(data.draw(st.lists(values, min_size=n, max_size=n)), np.float16)[:, None]
    low, high = quantile_bounds(of(block).counts, q)
    assert low <= np.quantile(block.astype(np.float64), q, method="inverted_cdf") <= high


def test_quantiles_are_columns_of_neurons() -> None:
    """Seven quantiles have a low and a high; columns without values have NaN."""
    block = np.stack([np.arange(1, 101), np.full(100, np.nan)], axis=1).astype(np.float32)
    columns = FOLD.finish(of(block))
    names = [f"q{p:02d}_{end}" for p in (1, 5, 25, 50, 75, 95, 99) for end in ("low", "high")]
    assert list(columns) == names
    assert (columns["q50_low"][0], columns["q50_high"][0]) == (48.0, 56.0)
    assert (columns["q95_low"][0], columns["q95_high"][0]) == (80.0, 96.0)
    assert all(np.isnan(column[1]) for column in columns.values())
    assert columns["q01_low"].dtype == np.float32


def test_a_state_saves_only_bins_that_hold_something() -> None:
    """Five bytes a bin, and three where counts are small."""
    arrays = FOLD.to_arrays(of(np.float16([[1.0, 2.0]] * 300 + [[1.0, -2.0]] * 7)))
    assert arrays["n_bins"].tolist() == [1, 2]
    assert arrays["bins"].nbytes == 3
    assert arrays["counts"].tolist() == [307, 7, 300]
    assert arrays["counts"].dtype == np.uint16


def test_mistakes_are_named() -> None:
    """Other widths and impossible quantiles are refused with the remedy."""
    with pytest.raises(ArgumentError, match=r"of 2 and of 3 columns .* merge states of one site"):
        FOLD.merge(FOLD.start(2), FOLD.start(3))
    with pytest.raises(ArgumentError, match=r"q = 1.5 is no quantile; give a share from 0 to 1"):
        quantile_bounds(FOLD.start(1).counts, 1.5)
