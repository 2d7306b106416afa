"""One neuron's stored column as Arrow, read a segment at a time when somebody asks.

DuckDB, Polars, pandas and pyarrow take an object with ``__arrow_c_stream__`` for a table.  Each
reading of `Activations` opens a new stream, which holds the rows of one segment; nothing is read
before, and nothing is kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from actstore.counted import counted
from actstore.errors import ActstoreError
from actstore.site import Site
from actstore.store import CoreStore, Rows
from actstore.store.stored_rows import ALL, NONE, keep_text

if TYPE_CHECKING:
    import pandas as pd


class Activations:
    """The stored values of a neuron with their row ids: columns row_id and value.

    It is an Arrow stream that can be read again and again: ``pyarrow.table(column)``, or
    ``duckdb.sql("FROM column")``.

    Parameters
    ----------
    store : CoreStore
        The store.
    site : str or Site
        The site.
    neuron : int
        Index of the neuron, from 0.
    rows : Rows, optional
        Which rows, of those stored; default the content rows.

    Raises
    ------
    SiteNotFound, NeuronNotFound
        If there is no such site or neuron.
    RowNotFound
        If no rows of the site are stored.
    """

    schema = pa.schema([("row_id", pa.int64()), ("value", pa.float32())])
    """Its columns; the value is NULL where it is NaN."""

    def __init__(
        self, store: CoreStore, site: str | Site, neuron: int, rows: Rows | None = None
    ) -> None:
        self.info = store.site(site)
        self.neuron = store.check_neuron(self.info, neuron)
        if self.info.keep == NONE:
            raise store.not_stored(self.info)
        rows = store.rows("content", self.info.site.space) if rows is None else rows
        self.rows = store.rows_stored(rows, [self.info])
        self.failures: list[ActstoreError] = []
        """Errors raised inside a stream, whose reader may keep no more than their messages."""
        self._store = store

    def __len__(self) -> int:
        return self.rows.n_rows

    def __repr__(self) -> str:
        kept = "" if self.info.keep == ALL else f", {keep_text(self.info.keep)} of them stored"
        rows = f"{counted(len(self), 'row')} ({self.rows.rule}{kept})"
        return f"<{self.info.site}, neuron {self.neuron}: {rows}>"

    def __arrow_c_stream__(self, requested_schema: object | None = None) -> object:
        reader = pa.RecordBatchReader.from_batches(self.schema, self._batches())
        return reader.__arrow_c_stream__(requested_schema)

    def to_arrow(self) -> pa.Table:
        """Return the column as an Arrow table: 12 bytes a row."""
        return pa.Table.from_batches(self._batches(), self.schema)

    def df(self) -> pd.DataFrame:
        """Return the column as a pandas DataFrame."""
        return self.to_arrow().to_pandas()

    def _batches(self) -> Iterator[pa.RecordBatch]:
        for segment in self.rows.segments:
            try:
                row_ids, values = self._segment(segment)
            except ActstoreError as error:
                self.failures.append(error)
                raise
            columns = [pa.array(row_ids), pa.array(values, from_pandas=True)]
            yield pa.record_batch(columns, schema=self.schema)

    def _segment(self, segment: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        offsets = self.rows.offsets(segment)
        column = self._store.read_column(self.info, segment, self.neuron)
        values = column[self._store.positions(self.info, segment, offsets)].astype(np.float32)
        return offsets + segment * self._store.meta.segment_rows, values
