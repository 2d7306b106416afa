"""What holds for every fold of the table."""

import io
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actstore.folds import FOLDS, Fold, Moments, Sample, TopK, WindowTop, Zones

# With rows as windows of their own, which any split leaves whole.
ALL = [*FOLDS.values(), TopK(k=3), WindowTop(k=3), Zones(chunk_rows=16), Sample(n_rows=3)]


def blocks(draw: Any, dtype: Any = np.float16) -> tuple[np.ndarray, np.ndarray]:
    """Rows with many ties, zeros of both signs, subnormals and NaN, and their shuffled row_ids."""
    n, width = draw(st.integers(0, 23)), draw(st.integers(1, 5))
    values = [0.0, -0.0, 6e-8, -6e-8, 1.0, -1.0, 2.5, 7.0, -65504.0, 65504.0, np.nan]
    cells = draw(st.lists(st.sampled_from(values), min_size=n * width, max_size=n * width))
    rows = draw(st.permutations(range(5, 5 + 7 * n, 7)))
    return np.array(cells, dtype).reshape(n, width), np.array(rows, np.int64)


def fold_parts(
    fold: Fold[Any], block: np.ndarray, rows: np.ndarray, parts: list[np.ndarray]
) -> list[Any]:
    """The state of each part of the rows."""
    start = fold.start(block.shape[1])
    return [fold.update(start, block[part], rows[part]) for part in parts]


def assert_same(a: dict[str, np.ndarray], b: dict[str, np.ndarray], scale: float) -> None:
    """Equal: sums to rounding, everything else exactly."""
    assert a.keys() == b.keys()
    for name in a:
        if a[name].dtype == np.float64:
            power = {"mean": 1, "m2": 2, "m3": 3, "m4": 4, "energy_positive": 2}[name]
            np.testing.assert_allclose(
                a[name], b[name], rtol=1e-9, atol=1e-9 * scale**power, err_msg=name
            )
        else:
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)
            assert a[name].dtype == b[name].dtype


@pytest.mark.parametrize("fold", ALL, ids=str)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_split_order_and_grouping_gives_the_same_state(fold: Fold[Any], data: Any) -> None:
    """Parts of the rows, in any order and merged in any grouping, give the state of all rows."""
    block, rows = blocks(data.draw)
    whole = fold.update(fold.start(block.shape[1]), block, rows)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(rows)), max_size=3)))
    order = np.array(data.draw(st.permutations(range(len(rows)))), np.int64)
    states = fold_parts(fold, block, rows, np.split(order, cuts))
    left = states[0]
    for state in states[1:]:
        left = fold.merge(left, state)
    right = states[-1]
    for state in reversed(states[:-1]):
        right = fold.merge(right, state)
    scale = float(np.nanmax(np.abs(block), initial=0.0)) * max(len(rows), 1)
    assert_same(fold.to_arrays(left), fold.to_arrays(whole), scale)
    assert_same(fold.to_arrays(right), fold.to_arrays(whole), scale)


@pytest.mark.parametrize("fold", ALL, ids=str)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_states_survive_saving(fold: Fold[Any], data: Any) -> None:
    """A state saved with numpy.savez and loaded without pickle is the same, bit for bit."""
    block, rows = blocks(data.draw)
    state = fold.update(fold.start(block.shape[1]), block, rows)
    file = io.BytesIO()
    np.savez(file, **fold.to_arrays(state))
    file.seek(0)
    with np.load(file, allow_pickle=False) as arrays:
        again = fold.from_arrays(arrays)
    for name, array in fold.to_arrays(state).items():
        assert array.tobytes() == fold.to_arrays(again)[name].tobytes()
        assert array.dtype == fold.to_arrays(again)[name].dtype
    merged = fold.merge(again, fold.start(block.shape[1]))
    assert_same(fold.to_arrays(merged), fold.to_arrays(state), 0.0)


@pytest.mark.parametrize("fold", ALL, ids=str)
def test_updating_leaves_the_given_state_alone(fold: Fold[Any]) -> None:
    """`update` and `merge` return new states and change none."""
    start = fold.start(2)
    before = {name: array.copy() for name, array in fold.to_arrays(start).items()}
    one = fold.update(start, np.ones((3, 2), np.float32), np.arange(3))
    fold.merge(one, start)
    for name, array in fold.to_arrays(start).items():
        np.testing.assert_array_equal(array, before[name])


@pytest.mark.parametrize("fold", ALL, ids=str)
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_every_stored_dtype_is_read(fold: Fold[Any], dtype: Any) -> None:
    """The same exactly representable values give the same state in every stored dtype."""
    values = np.array([[1.5, -2.0], [0.25, 7.0], [-0.0, 3.0]])
    state = fold.update(fold.start(2), values.astype(dtype), np.arange(3))
    wide = fold.update(fold.start(2), values.astype(np.float32), np.arange(3))
    if isinstance(fold, Sample):  # the one that holds values as they are stored
        np.testing.assert_array_equal(state.values, values.astype(dtype))
        assert state.values.dtype == dtype
    else:
        assert_same(fold.to_arrays(state), fold.to_arrays(wide), 0.0)


def test_the_table_names_its_folds() -> None:
    """Each fold stands in the table under its own name."""
    assert all(fold.name == name for name, fold in FOLDS.items())
    names = "moments topk window_top histogram zones sample gram"
    assert list(FOLDS) == names.split()
    assert FOLDS["topk"] == TopK(k=100)
    assert FOLDS["window_top"] == WindowTop(k=100)
    assert FOLDS["moments"] == Moments()
    assert FOLDS["sample"] == Sample(n_rows=512)
