"""Between Arrow and NumPy without pandas.

Much of pyarrow asks if what it gets is an object of pandas, or shall become one, and imports pandas
to ask: 0.3 s and 30 MB of a process that may never see one.  That is `pyarrow.array` and all that
takes lists or NumPy's arrays by it (`pyarrow.table`, ``table.take``), `to_numpy`, functions of
`pyarrow.compute` with a plain value, and `pyarrow.parquet.read_table`.  A capture, and the
questions that are asked most, do without them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Values: TypeAlias = npt.NDArray[Any] | Sequence[str] | pa.Array | pa.ChunkedArray
"""Numbers, texts, or an Arrow column as it is."""


def numbers(values: pa.Array | pa.ChunkedArray) -> npt.NDArray[Any]:
    """Return a column of numbers as NumPy, to be read only; without a copy if it has one chunk.

    Raises
    ------
    pyarrow.ArrowTypeError
        If a value is null, or the values are no numbers.

    Examples
    --------
    >>> numbers(pa.chunked_array([[1, 2], [3]]))
    array([1, 2, 3])
    """
    if isinstance(values, pa.ChunkedArray):
        if not values.num_chunks:
            return np.empty(0, values.type.to_pandas_dtype())
        values = values.chunk(0) if values.num_chunks == 1 else values.combine_chunks()
    found: npt.NDArray[Any] = np.from_dlpack(values)
    return found


def names(values: pa.ChunkedArray) -> npt.NDArray[np.str_]:
    """Return a column of few different texts as NumPy; none is null or ends with a zero.

    Examples
    --------
    >>> names(pa.chunked_array([["top", "bottom"], ["top"]]))
    array(['top', 'bottom', 'top'], dtype='<U6')
    """
    if not values.num_chunks:
        return np.empty(0, np.str_)
    encoded = values.combine_chunks().dictionary_encode()
    found = np.array(encoded.dictionary.to_pylist(), np.str_)
    return np.asarray(found[numbers(encoded.indices)])


def column(values: Values, is_null: npt.NDArray[np.bool_] | None = None) -> pa.Array:
    """Return values as an Arrow column, numbers without a copy.

    Parameters
    ----------
    values : array of numbers, sequence of str, pyarrow.Array or pyarrow.ChunkedArray
        One dimension; the last two are returned as they are.
    is_null : bool array, optional
        Which numbers or texts are null.

    Raises
    ------
    TypeError
        If an array is not of one dimension, or of other than numbers in the machine's byte order.

    Examples
    --------
    >>> column(np.array([1, 2, 3]), is_null=np.array([False, True, False])).to_pylist()
    [1, None, 3]
    >>> column(["ä", ""]).to_pylist()
    ['ä', '']
    """
    if isinstance(values, pa.Array | pa.ChunkedArray):
        return values
    valid = None if is_null is None else pa.py_buffer(np.packbits(~is_null, bitorder="little"))
    if isinstance(values, np.ndarray):
        # `from_buffers` believes what it is told.
        if values.ndim != 1 or values.dtype.kind not in "iuf" or not values.dtype.isnative:
            raise TypeError(f"{values.dtype} of shape {values.shape} is no column of numbers")
        data = pa.py_buffer(np.ascontiguousarray(values))
        type_ = pa.from_numpy_dtype(values.dtype)
        return pa.Array.from_buffers(type_, len(values), [valid, data])
    encoded = [text.encode() for text in values]
    ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
    texts = [valid, pa.py_buffer(ends), pa.py_buffer(b"".join(encoded))]
    return pa.Array.from_buffers(pa.large_string(), len(encoded), texts)


def lists(values: Sequence[npt.NDArray[Any]]) -> pa.Array:
    """Return arrays of numbers as a column of lists; one at least.

    Examples
    --------
    >>> lists([np.array([1, 2]), np.array([], int)]).to_pylist()
    [[1, 2], []]
    """
    ends = np.cumsum([0, *map(len, values)], dtype=np.int64)
    return pa.LargeListArray.from_arrays(column(ends), column(np.concatenate(values)))


def table(columns: Mapping[str, Values], schema: pa.Schema) -> pa.Table:
    """Return a table, its columns in the schema's order and cast to its types.

    Raises
    ------
    KeyError
        If a column is not given.
    pyarrow.ArrowInvalid
        If a value does not fit into its column's type, or the columns differ in length.

    Examples
    --------
    >>> schema = pa.schema([("token_id", pa.int32()), ("text", pa.string())])
    >>> table({"text": ["a", "b"], "token_id": np.array([7, 9])}, schema).to_pylist()
    [{'token_id': 7, 'text': 'a'}, {'token_id': 9, 'text': 'b'}]
    """
    arrays = [column(columns[field.name]).cast(field.type) for field in schema]
    made = pa.Table.from_arrays(arrays, schema=schema)
    made.validate()
    return made


def empty(schema: pa.Schema) -> pa.Table:
    """Return a table without a row."""
    return pa.Table.from_batches([], schema)


def take(rows_of: pa.Table, places: npt.NDArray[np.integer[Any]]) -> pa.Table:
    """Return the rows of a table at some places, in their order."""
    return rows_of.take(column(places))
