"""The list over windows: one row each."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actstore.errors import ArgumentError
from actstore.folds.window_top import WindowTop


def test_a_window_gives_its_highest_value_once() -> None:
    """A repeated sentence takes one place, by the first row of its highest value."""
    values = np.float32([5, 9, 9, 8, 3, 3, 7, 9])[:, None]
    windows = np.array([4, 4, 4, 4, 2, 2, 6, 6])
    fold = WindowTop(k=5)
    state = fold.update(fold.start(1), values, np.arange(10, 18), windows)
    assert state.values[0, :3].tolist() == [9, 9, 3]
    assert state.row_ids[0].tolist() == [11, 17, 14, -1, -1]
    assert state.counts.tolist() == [3]


def test_nan_is_no_value_of_a_window() -> None:
    """A window of NaN alone gives nothing; beside others NaN is left out."""
    values = np.float32([[np.nan], [np.nan], [np.nan], [-np.inf], [-3.0]])
    fold = WindowTop(k=3)
    state = fold.update(fold.start(1), values, np.arange(5), np.array([0, 0, 1, 1, 1]))
    assert state.row_ids.tolist() == [[4, -1, -1]]


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_split_into_windows_gives_the_same_list(data: st.DataObject) -> None:
    """Parts of whole windows, in any order and grouping, give the list of a plain sort."""
    rng = np.random.default_rng(data.draw(st.integers(0, 999)))
    n, k = 40, data.draw(st.sampled_from([1, 3, 50]))
    block = rng.integers(-2, 3, (n, 2)).astype(np.float16)
    windows = np.sort(rng.integers(0, 12, n))
    rows = np.arange(n)
    fold = WindowTop(k)
    order = data.draw(st.permutations(np.unique(windows).tolist()))
    cut = data.draw(st.integers(0, len(order)))
    states = []
    for part in (order[:cut], order[cut:]):
        mine = np.isin(windows, part)
        states.append(fold.update(fold.start(2), block[mine], rows[mine], windows[mine]))
    merged = fold.merge(*states)
    for column in range(2):
        bests = [
            max((float(block[i, column]), -i) for i in np.flatnonzero(windows == window))
            for window in np.unique(windows)
        ]
        want = sorted(((-value, -row) for value, row in bests))[:k]
        got = zip(-merged.values[column], merged.row_ids[column], strict=True)
        assert list(got)[: len(want)] == want


def test_the_threshold_is_the_last_place_of_a_full_list() -> None:
    """A full list gives its k-th value and row; one with room lets everything in."""
    fold = WindowTop(k=2)
    full = fold.update(fold.start(1), np.float32([[4], [5], [6]]), np.arange(3))
    assert fold.thresholds(full) == (5, 1)
    assert fold.thresholds(fold.start(1)) == (-np.inf, -1)


def test_mistakes_are_named() -> None:
    """A useless k and lists of another k are refused with the remedy."""
    with pytest.raises(ArgumentError, match=r"k = 0 keeps nothing; give k >= 1"):
        WindowTop(k=0)
    with pytest.raises(ArgumentError, match=r"\(2, 3\) and \(2, 5\) .* this k only"):
        WindowTop(3).merge(WindowTop(3).start(2), WindowTop(5).start(2))
    arrays = WindowTop(2).to_arrays(
        WindowTop(2).update(WindowTop(2).start(1), np.float32([[1], [2]]), np.arange(2))
    )
    with pytest.raises(ArgumentError, match=r"a window list of 2 places does not fit k=1"):
        WindowTop(1).from_arrays(arrays)
