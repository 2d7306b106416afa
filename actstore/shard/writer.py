"""Writing a shard band by band."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from actstore.errors import ArgumentError
from actstore.shard.checksum import encoded, extend, join
from actstore.shard.layout import ShardLayout, bits_of, check_dtype, column_slices, index_of


@dataclass(frozen=True)
class ShardFacts:
    """What was written: enough to find any damage to the file, or its exchange for another."""

    n_bytes: int
    """Size of the file."""
    crc32c: int
    """crc32c of the whole file.  It depends on the layout and `n_bands` alone: see the module."""
    n_bands: int
    """Bands written."""
    checksums_crc32c: int
    """crc32c of the chunks' checksums in file order (little endian): it depends on every value."""


class Writable(Protocol):
    """A file open for writing at its start."""

    def write(self, data: bytes | memoryview, /) -> int:
        """Write some or all of the data; return how many bytes."""
        ...


def to_band(rows_block: NDArray[Any], layout: ShardLayout) -> NDArray[Any]:
    """Return rows laid out as a band; one copy.

    Parameters
    ----------
    rows_block : ndarray (n, width), dtype of the layout
        At most ``chunk_rows`` rows, of any strides.
    layout : ShardLayout
        The layout of the shard.

    Returns
    -------
    ndarray (n_column_chunks, chunk_rows, chunk_columns)
        The rows in chunk order; NaN below the last row and right of the last column.

    Raises
    ------
    ArgumentError
        If the rows have another width or dtype, or are more than a band holds.
    """
    n_rows = len(rows_block)
    if rows_block.shape[1:] != (layout.width,) or n_rows > layout.chunk_rows:
        raise ArgumentError(
            f"rows_block has shape {rows_block.shape}; expected at most {layout.chunk_rows} rows "
            f"of {layout.width} columns. Give each band its own call."
        )
    check_dtype("rows_block", rows_block, layout)
    shape = (layout.n_column_chunks, layout.chunk_rows, layout.chunk_columns)
    band = np.empty(shape, layout.numpy_dtype)
    if n_rows < layout.chunk_rows:
        band[:, n_rows:] = np.nan
    target, source = bits_of(band), bits_of(rows_block)
    for c, columns in enumerate(column_slices(layout)):
        n_columns = columns.stop - columns.start
        target[c, :n_rows, :n_columns] = source[:, columns]
        if n_columns < layout.chunk_columns:
            band[c, :n_rows, n_columns:] = np.nan
    return band


class ShardWriter:
    """Streams bands into a shard; no band is kept, and no byte is read twice.

    Parameters
    ----------
    file : Writable
        Open for writing at its start: a binary file, or anything with ``write``.
    layout : ShardLayout
        The layout of the shard.

    Examples
    --------
    >>> import io
    >>> layout = ShardLayout(rows=4, width=3, dtype="float32", chunk_rows=2, chunk_columns=3)
    >>> writer = ShardWriter(io.BytesIO(), layout)
    >>> writer.write_band(to_band(np.ones((2, 3), "float32"), layout))
    >>> writer.finish().n_bytes == layout.band_bytes + layout.index_bytes
    True
    """

    def __init__(self, file: Writable, layout: ShardLayout) -> None:
        self._file = file
        self._layout = layout
        self._n_bands = 0
        self._crc32c = 0
        self._checksums_crc32c = 0
        self._finished = False

    def write_band(self, band: NDArray[Any]) -> None:
        """Write the next band.

        Parameters
        ----------
        band : ndarray (n_column_chunks, chunk_rows, chunk_columns), C-contiguous
            The band, as `to_band` returns it.

        Raises
        ------
        ArgumentError
            If the band has another shape, dtype or order, or the shard is full or finished.
        """
        layout = self._layout
        shape = (layout.n_column_chunks, layout.chunk_rows, layout.chunk_columns)
        if band.shape != shape or not band.flags.c_contiguous:
            raise ArgumentError(
                f"band has shape {band.shape}; expected {shape}, C-contiguous. "
                "Lay rows out with to_band."
            )
        check_dtype("band", band, layout)
        if self._finished or self._n_bands == layout.n_row_chunks:
            raise ArgumentError(
                f"the shard is {'finished' if self._finished else 'full'}: it holds "
                f"{self._n_bands} of {layout.n_row_chunks} bands. Write to a new shard."
            )
        for chunk in band.view(np.uint8).reshape(layout.n_column_chunks, layout.chunk_bytes):
            crc32c = extend(chunk)
            checksum = encoded(crc32c)
            self._write(chunk.data)
            self._write(checksum)
            after_chunk = join(self._crc32c, crc32c, layout.chunk_bytes)
            self._crc32c = extend(checksum, after_chunk)
            self._checksums_crc32c = extend(checksum, self._checksums_crc32c)
        self._n_bands += 1

    def finish(self) -> ShardFacts:
        """Write the index, in which bands not written are missing, and return the facts.

        The file is neither flushed, synced nor closed.

        Raises
        ------
        ArgumentError
            If the shard is finished already.
        """
        if self._finished:
            raise ArgumentError("the shard is finished already. Write to a new shard.")
        self._finished = True
        index = index_of(self._layout, self._n_bands)
        self._write(index)
        return ShardFacts(
            n_bytes=self._n_bands * self._layout.band_bytes + len(index),
            crc32c=extend(index, self._crc32c),
            n_bands=self._n_bands,
            checksums_crc32c=self._checksums_crc32c,
        )

    def _write(self, data: bytes | memoryview) -> None:
        rest = memoryview(data)
        while rest:  # an unbuffered file may take a part only
            rest = rest[self._file.write(rest) :]
