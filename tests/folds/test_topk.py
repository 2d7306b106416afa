"""Top-k: the order, the thresholds, the compiled merge."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actstore.errors import ArgumentError
from actstore.folds.topk import SIDES, Ranked, TopK, TopKState


def of(values: list[float], rows: list[int], k: int) -> TopKState:
    """The lists of one column."""
    fold = TopK(k)
    block = np.array(values, np.float32)[:, None]
    return fold.update(fold.start(1), block, np.array(rows, np.int64))


def pairs(ranked: Ranked, column: int = 0) -> list[tuple[float, int]]:
    """One column's list as (value, row_id)."""
    n = ranked.counts[column]
    return list(zip(ranked.values[column, :n], ranked.row_ids[column, :n], strict=True))


def test_ties_go_to_the_lower_row_on_both_sides() -> None:
    """Equal values are ordered by row_id, ascending, in the top and in the bottom list."""
    state = of([2, 5, 5, 2, 5], [11, 13, 7, 3, 17], k=2)
    assert pairs(state.top) == [(5, 7), (5, 13)]
    assert pairs(state.bottom) == [(2, 3), (2, 11)]


def test_negative_zero_ties_with_zero() -> None:
    """-0.0 takes its place by row and is held as 0.0."""
    state = of([0.0, -0.0, 0.0], [5, 2, 3], k=3)
    assert [row for _, row in pairs(state.top)] == [2, 3, 5]
    assert [row for _, row in pairs(state.bottom)] == [2, 3, 5]
    assert not np.signbit(state.top.values).any()


def test_nan_never_enters() -> None:
    """Places that only NaN could take stay free: NaN, row -1, not counted."""
    state = of([np.nan, 1.0, np.nan], [1, 2, 3], k=3)
    for side in (state.top, state.bottom):
        assert pairs(side) == [(1.0, 2)]
        assert side.row_ids.tolist() == [[2, -1, -1]]
        assert np.isnan(side.values[0, 1:]).all()
        assert side.taken.tolist() == [[True, False, False]]


def test_lists_are_those_of_sorted() -> None:
    """The lists are what Python's sort says, column by column."""
    rng = np.random.default_rng(7)
    block = rng.integers(-6, 7, size=(211, 5)).astype(np.float16)
    rows = rng.permutation(1000)[:211].astype(np.int64)
    fold = TopK(k=17)
    state = fold.update(fold.start(5), block, rows)
    for column in range(5):
        cells = list(zip(block[:, column], rows, strict=True))
        assert pairs(state.top, column) == sorted(cells, key=lambda c: (-c[0], c[1]))[:17]
        assert pairs(state.bottom, column) == sorted(cells)[:17]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_compiled_merge_is_the_sort(data: st.DataObject) -> None:
    """Merging two states is sorting the rows of both, and commutes, bit for bit."""
    k = data.draw(st.integers(1, 7))
    fold, n = TopK(k), data.draw(st.integers(0, 19))
    cells = st.lists(st.sampled_from([-1.0, 0.0, 1.0, 2.0, np.nan]), min_size=2 * n, max_size=2 * n)
    block = np.array(data.draw(cells), np.float32).reshape(n, 2)
    rows = np.array(data.draw(st.permutations(range(n))), np.int64)
    cut = data.draw(st.integers(0, n))
    a = fold.update(fold.start(2), block[:cut], rows[:cut])
    b = fold.update(fold.start(2), block[cut:], rows[cut:])
    whole = fold.update(fold.start(2), block, rows)
    for merged in (fold.merge(a, b), fold.merge(b, a)):
        for side in SIDES:
            got, want = getattr(merged, side), getattr(whole, side)
            np.testing.assert_array_equal(got.values, want.values)
            np.testing.assert_array_equal(got.row_ids, want.row_ids)
            np.testing.assert_array_equal(got.counts, want.counts)


def test_thresholds_are_the_last_places_of_full_lists() -> None:
    """A full list gives its k-th value and row; one with room lets everything in."""
    fold = TopK(k=3)
    full = fold.thresholds(of([1, 2, 3, 4, 5], [11, 12, 13, 14, 15], k=3))
    assert (full.top_floor, full.bottom_ceiling) == (3, 3)
    assert (full.top_row_ids, full.bottom_row_ids) == (13, 13)
    room = fold.thresholds(of([1, 2], [1, 2], k=3))
    assert (room.top_floor, room.bottom_ceiling) == (-np.inf, np.inf)
    assert (room.top_row_ids, room.bottom_row_ids) == (-1, -1)
    assert room.top_floor.dtype == full.bottom_ceiling.dtype == np.float32


def test_a_segment_saves_in_six_bytes_a_place() -> None:
    """Rows of one segment are saved as 16-bit distances, however large their row_ids."""
    fold = TopK(k=4)
    rows = np.arange(65536, dtype=np.int64) + 7 * 2**40
    state = fold.update(fold.start(1), np.arange(65536, dtype=np.float32)[:, None], rows)
    arrays = fold.to_arrays(state)
    assert arrays["top_row_distances"].dtype.itemsize <= 2
    assert arrays["top_values"].nbytes == 16
    assert pairs(fold.from_arrays(arrays).top) == pairs(state.top)


def test_mistakes_are_named() -> None:
    """A useless k, lists of another k and of another width are refused with the remedy."""
    with pytest.raises(ArgumentError, match=r"k = 0 keeps nothing; give k >= 1"):
        TopK(k=0)
    with pytest.raises(ArgumentError, match=r"\(2, 3\) and \(2, 5\) .* with k=3"):
        TopK(3).merge(TopK(3).start(2), TopK(5).start(2))
    with pytest.raises(ArgumentError, match=r"merge states of one site and this k only"):
        TopK(3).merge(TopK(3).start(2), TopK(3).start(4))
    arrays = TopK(5).to_arrays(of([1, 2, 3, 4, 5], [1, 2, 3, 4, 5], k=5))
    with pytest.raises(
        ArgumentError, match=r"a top list of 5 places does not fit k=3; read it with k=5"
    ):
        TopK(3).from_arrays(arrays)
