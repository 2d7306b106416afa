"""Arrow's columns made and read without pandas, against pyarrow's own ways."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actstore import arrow

TYPES = ["int8", "uint8", "int32", "int64", "float16", "float32", "float64"]


@given(
    st.sampled_from(TYPES), st.lists(st.integers(0, 99)), st.lists(st.booleans()), st.integers(0, 9)
)
def test_numbers_go_there_and_back(
    dtype: str, values: list[int], nulls: list[bool], first: int
) -> None:
    """They are what `pyarrow.array` and `to_numpy` make of them, in slices and chunks too."""
    array = np.array(values, dtype)
    made = arrow.column(array)
    assert made.equals(pa.array(array))
    for column in (
        made,
        made[first:],
        pa.chunked_array([made]),
        pa.chunked_array([made[first:], made]),
        pa.chunked_array([], made.type),
    ):
        got, want = arrow.numbers(column), column.to_numpy(zero_copy_only=False)
        assert got.dtype == want.dtype
        assert got.tolist() == want.tolist()
    is_null = np.resize(np.array([*nulls, False]), len(array))
    assert arrow.column(array, is_null).equals(pa.array(array, mask=is_null))


def test_every_other_number_of_an_array_is_taken_right() -> None:
    """What lies apart in memory is copied."""
    array = np.arange(10).reshape(5, 2)
    assert arrow.column(array[:, 1]).to_pylist() == [1, 3, 5, 7, 9]


@given(st.lists(st.text()), st.lists(st.integers(0, 99)))
def test_texts_go_there_and_back(texts: list[str], rows: list[int]) -> None:
    """Empty ones, those of many bytes and those with a zero in them."""
    assert arrow.column(texts).equals(pa.array(texts, pa.large_string()))
    schema = pa.schema([("text", pa.string()), ("n", pa.int32())])
    table = arrow.table({"n": np.arange(len(texts)), "text": texts}, schema)
    wanted = pa.table({"text": texts, "n": range(len(texts))}, schema=schema)
    assert table.equals(wanted)
    assert arrow.empty(schema).equals(wanted[:0])
    places = np.array([row for row in rows if row < len(texts)], np.int64)
    assert arrow.take(table, places).equals(wanted.take(places))
    if not any("\0" in text for text in texts):  # which ends a text of NumPy's
        assert arrow.names(table["text"]).tolist() == texts
        assert arrow.names(pa.chunked_array([table["text"].combine_chunks()] * 2)).tolist() == (
            texts + texts
        )


def test_lists_are_told_apart() -> None:
    """Where each ends is kept, of empty ones too."""
    parts = [np.array([1, 2], np.int32), np.array([], np.int32), np.array([3], np.int32)]
    assert arrow.lists(parts).to_pylist() == [[1, 2], [], [3]]


@pytest.mark.parametrize(
    "values",
    [np.array([True, False]), np.array([1, 2], ">i4"), np.zeros((2, 2)), np.array(["a"])],
)
def test_other_arrays_are_refused(values: np.ndarray) -> None:
    """Their bytes are not those of an Arrow column."""
    with pytest.raises(TypeError, match="is no column of numbers"):
        arrow.column(values)


def test_what_is_lost_is_told() -> None:
    """Nulls are no numbers, and a number that does not fit is not cut."""
    with pytest.raises(pa.ArrowTypeError):
        arrow.numbers(pa.array([1, None]))
    with pytest.raises(pa.ArrowInvalid):
        arrow.table({"n": np.array([2**40])}, pa.schema([("n", pa.int32())]))
    with pytest.raises(pa.ArrowInvalid):
        arrow.table(
            {"n": np.array([1]), "m": np.array([1, 2])},
            pa.schema([("n", pa.int32()), ("m", pa.int32())]),
        )
