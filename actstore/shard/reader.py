"""Reading some rows or one column of a shard, every chunk verified on its first use."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actstore.errors import ArgumentError, DamagedFile, NeuronNotFound
from actstore.shard.checksum import CHECKSUM_BYTES, encoded, extend
from actstore.shard.layout import ShardLayout, bits_of, check_dtype, column_slices, index_of
from actstore.shard.stack import RowStack

_PIECE_BYTES = 1 << 19  # of a chunk of which one column is read; small enough to stay in a cache
_SCRATCH_BYTES = 1 << 17  # of rows that are scattered; in the second cache of any processor
_RESTORE = "Restore it from a copy, or capture into a new store."


class ShardReader:
    """Reads rows, columns and chunks of a shard, each chunk checked on its first use.

    Nothing is kept but one flag a chunk: any number of threads may read.  The memory of a read is
    its result and one chunk.

    Parameters
    ----------
    fd : int
        Descriptor of the file, open for reading; it stays the caller's.
    layout : ShardLayout
        The layout of the shard.
    n_bytes : int
        Size the file must have, as `ShardFacts` recorded it; the number of bands follows.
    label : str
        Name of the file in messages.
    checksums_crc32c : int, optional
        What `ShardFacts` recorded: proves at once that this is the very file written then.

    Raises
    ------
    DamagedFile
        If the file has another size, its index is damaged or does not place the chunks where
        `ShardWriter` does, or it is another shard than the recorded one.
    """

    def __init__(
        self,
        fd: int,
        layout: ShardLayout,
        n_bytes: int,
        label: str,
        checksums_crc32c: int | None = None,
    ) -> None:
        self._fd = fd
        self._layout = layout
        self._label = label
        self._n_bytes = n_bytes
        self._n_bands = self._verified_bands()
        # Whoever opens the file anew may hand on what was verified before.
        self.verified = np.zeros((self._n_bands, layout.n_column_chunks), bool)
        if checksums_crc32c is not None:
            self._verify_identity(checksums_crc32c)

    @property
    def rows_present(self) -> int:
        """Rows of the bands that were written; some of the last may be NaN."""
        return self._n_bands * self._layout.chunk_rows

    def read_rows(self, start: int, stop: int, out: NDArray[Any] | None = None) -> NDArray[Any]:
        """Return some rows, all columns.

        Parameters
        ----------
        start, stop : int
            First row, and the row after the last.
        out : ndarray (stop - start, width), dtype of the layout, optional
            Where to put them.

        Returns
        -------
        ndarray (stop - start, width)
            The rows; `out` where given.

        Raises
        ------
        DamagedFile
            If a chunk is damaged or missing.
        ArgumentError
            If the rows are outside the shard, or `out` has another shape or dtype.
        """
        layout = self._layout
        bands = self._bands(start, stop)
        out = self._result(out, (stop - start, layout.width))
        target = bits_of(out)
        buffer = self._buffer()
        for band, first, last, offset in bands:
            rows = target[offset : offset + last - first]
            strip_bytes = (last - first) * layout.row_bytes * layout.n_column_chunks
            if strip_bytes <= len(buffer) and self.verified[band].all():
                self._read_strip(band, first, rows, buffer)
                continue
            for c, columns in enumerate(column_slices(layout)):
                chunk = self._rows_of_chunk(band, c, first, last, buffer)
                rows[:, columns] = chunk[:, : columns.stop - columns.start]
        return out

    def scatter(
        self, rows: NDArray[np.int64], stack: RowStack, places: NDArray[np.int64]
    ) -> tuple[int, int]:
        """Read rows from anywhere, each into a place of its own; main memory is written once.

        Other threads run meanwhile.

        Parameters
        ----------
        rows : ndarray of int64 (n,)
            The rows, ascending.
        stack : RowStack
            Where to put them.
        places : ndarray of int64 (n,)
            The place of each.

        Returns
        -------
        n_reads, n_bytes : int
            How much was read: with what lies between rows that are near each other, and all of a
            chunk on its first use.

        Raises
        ------
        DamagedFile
            If a chunk is damaged or missing.
        ArgumentError
            If the rows are outside the shard or not ascending, or there are no such places.
        """
        # Here, since numba takes longer to import than all that opens a store.
        from actstore.shard.scatter import scatter

        layout = self._layout
        if (stack.width, stack.dtype) != (layout.width, layout.numpy_dtype):
            raise ArgumentError(
                f"the stack has {stack.width} columns of {stack.dtype}; expected {layout.width} of "
                f"{layout.dtype}, as {self._label} has."
            )
        if rows.shape != places.shape or (rows[1:] < rows[:-1]).any():
            raise ArgumentError(
                f"rows {rows.shape} and places {places.shape} do not go together; expected as many "
                f"of both, the rows of {self._label} ascending."
            )
        if not len(rows):
            return 0, 0
        addresses = stack.addresses(places)
        n_verified = self._verify_bands_of(rows)
        scratch = np.empty(max(_SCRATCH_BYTES, layout.row_bytes), np.uint8)
        width_bytes = layout.width * layout.itemsize
        while True:
            failed, n_reads, n_bytes = scatter(
                self._fd,
                rows,
                addresses,
                width_bytes,
                layout.row_bytes,
                layout.chunk_rows,
                scratch,
            )
            if failed < 0:
                return n_verified + n_reads, n_verified * layout.chunk_bytes + n_bytes
            self._read_into(scratch[:1], failed)  # raises what is the matter, if it still is

    def read_column(
        self, column: int, start: int = 0, stop: int | None = None, out: NDArray[Any] | None = None
    ) -> NDArray[Any]:
        """Return one column of some rows.

        Parameters
        ----------
        column : int
            The column, from 0.
        start, stop : int
            First row, and the row after the last; by default all rows present.
        out : ndarray (stop - start,), dtype of the layout, optional
            Where to put it.

        Returns
        -------
        ndarray (stop - start,)
            The values; `out` where given.

        Raises
        ------
        NeuronNotFound
            If there is no such column.
        DamagedFile
            If a chunk is damaged or missing.
        ArgumentError
            If the rows are outside the shard, or `out` has another shape or dtype.
        """
        stop = self.rows_present if stop is None else stop
        bands = self._bands(start, stop)
        out = self._result(out, (stop - start,))
        self._fill_column(column, bands, bits_of(out))
        return out

    def read_column_of_bands(
        self, column: int, bands: Sequence[int], out: NDArray[Any] | None = None
    ) -> NDArray[Any]:
        """Return one column of some bands: what lies between them is not touched.

        Parameters
        ----------
        column : int
            The column, from 0.
        bands : sequence of int, n of them
            The bands, best ascending; band ``b`` holds the rows from ``b * chunk_rows``.
        out : ndarray (n, chunk_rows), dtype of the layout, C-contiguous, optional
            Where to put them.

        Returns
        -------
        ndarray (n, chunk_rows)
            The values, NaN beyond the last row of the shard; `out` where given.

        Raises
        ------
        NeuronNotFound
            If there is no such column.
        DamagedFile
            If a chunk is damaged or missing.
        ArgumentError
            If `out` has another shape or dtype.
        """
        height = self._layout.chunk_rows
        out = self._result(out, (len(bands), height))
        for band in bands:
            self._require(band, 0)
        wanted = [(band, 0, height, i * height) for i, band in enumerate(bands)]
        self._fill_column(column, wanted, bits_of(out).reshape(-1))
        return out

    def _fill_column(
        self, column: int, bands: list[tuple[int, int, int, int]], target: NDArray[Any]
    ) -> None:
        """Put one column of rows of some bands, as `_bands` names them, into their places."""
        layout = self._layout
        if not 0 <= column < layout.width:
            raise NeuronNotFound(
                f"column = {column} is not in {self._label}; expected 0 … {layout.width - 1}."
            )
        c, inside = divmod(column, layout.chunk_columns)
        # Read, not mapped: rows lie closer than pages, so a mapping touches every page of a chunk
        # too, and finding them one by one takes twice as long as to copy them all.
        row_bytes, chunk_columns = layout.row_bytes, layout.chunk_columns
        n = min(max(1, _PIECE_BYTES // row_bytes), layout.chunk_rows)
        scratch = np.empty(n * row_bytes, np.uint8)
        for band, first, last, offset in bands:
            verified = bool(self.verified[band, c])
            start, stop = (first, last) if verified else (0, layout.chunk_rows)
            begin = self._offset(band, c)
            crc32c = 0
            for top in range(start, stop, n):
                bottom = min(top + n, stop)
                piece = scratch[: (bottom - top) * row_bytes]
                self._read_into(piece, begin + top * row_bytes)
                crc32c = crc32c if verified else extend(piece, crc32c)
                a, b = max(top, first), min(bottom, last)
                if a < b:
                    rows = piece.view(target.dtype).reshape(bottom - top, chunk_columns)
                    place = offset + a - first
                    target[place : place + b - a] = rows[a - top : b - top, inside]
            if not verified:
                checksum = np.empty(CHECKSUM_BYTES, np.uint8)
                self._read_into(checksum, begin + layout.chunk_bytes)
                self._compare(band, c, crc32c, checksum)

    def _offset(self, r: int, c: int) -> int:
        return r * self._layout.band_bytes + c * (self._layout.chunk_bytes + CHECKSUM_BYTES)

    def _buffer(self) -> NDArray[np.uint8]:
        return np.empty(self._layout.chunk_bytes + CHECKSUM_BYTES, np.uint8)

    def _require(self, r: int, c: int) -> None:
        if r >= self._n_bands:
            raise DamagedFile(
                f"chunk ({r}, {c}) is missing from {self._label}, which holds rows 0 … "
                f"{self.rows_present - 1} of {self._layout.rows}. Ask for rows that were written."
            )

    def _bands(self, start: int, stop: int) -> list[tuple[int, int, int, int]]:
        """Return (band, first row in it, row after the last in it, place in the result)."""
        height = self._layout.chunk_rows
        if not 0 <= start <= stop <= self._layout.rows:
            raise ArgumentError(
                f"rows {start} … {stop} are not in {self._label}; expected "
                f"0 <= start <= stop <= {self._layout.rows}."
            )
        bands = []
        for band in range(start // height, -(-stop // height) if start < stop else 0):
            top = band * height
            first, last = max(start - top, 0), min(stop - top, height)
            bands.append((band, first, last, top + first - start))
        if bands:
            self._require(bands[-1][0], 0)
        return bands

    def _result(self, out: NDArray[Any] | None, shape: tuple[int, ...]) -> NDArray[Any]:
        if out is None:
            return np.empty(shape, self._layout.numpy_dtype)
        if out.shape != shape:
            raise ArgumentError(f"out has shape {out.shape}; expected {shape}.")
        check_dtype("out", out, self._layout)
        return out

    def _rows_of_chunk(
        self, r: int, c: int, first: int, last: int, buffer: NDArray[np.uint8]
    ) -> NDArray[Any]:
        """Return rows of a chunk as unsigned integers, a view of the buffer."""
        layout = self._layout
        row_bytes = layout.row_bytes
        if self.verified[r, c]:
            part = buffer[: (last - first) * row_bytes]
            self._read_into(part, self._offset(r, c) + first * row_bytes)
        else:
            self._read_into(buffer, self._offset(r, c))
            self._verify_chunk(r, c, buffer)
            part = buffer[first * row_bytes : last * row_bytes]
        return part.view(f"<u{layout.itemsize}").reshape(last - first, layout.chunk_columns)

    def _read_strip(
        self, band: int, first: int, target: NDArray[Any], buffer: NDArray[np.uint8]
    ) -> None:
        """Read a few rows of all chunks of a band, then put them in place at once.

        Rows that are dealt come in short runs, where each step of Python costs as much as the read.
        """
        layout = self._layout
        n_bytes = len(target) * layout.row_bytes
        view = buffer.data
        step = layout.chunk_bytes + CHECKSUM_BYTES
        offset = self._offset(band, 0) + first * layout.row_bytes
        for c in range(layout.n_column_chunks):
            part = view[c * n_bytes : (c + 1) * n_bytes]
            if os.preadv(self._fd, [part], offset + c * step) != n_bytes:
                self._read_into(buffer[c * n_bytes : (c + 1) * n_bytes], offset + c * step)
        shape = (layout.n_column_chunks, len(target), layout.chunk_columns)
        strip = buffer[: n_bytes * shape[0]].view(target.dtype).reshape(shape)
        if layout.width == shape[0] * shape[2]:
            target.reshape(len(target), shape[0], shape[2])[:] = strip.transpose(1, 0, 2)
        else:
            for c, columns in enumerate(column_slices(layout)):
                target[:, columns] = strip[c, :, : columns.stop - columns.start]

    def _verify_chunk(self, r: int, c: int, data: NDArray[np.uint8]) -> None:
        self._compare(r, c, extend(data[:-CHECKSUM_BYTES]), data[-CHECKSUM_BYTES:])

    def _compare(self, r: int, c: int, crc32c: int, written: NDArray[np.uint8]) -> None:
        """Remember that a chunk has the checksum that was written behind it, or raise."""
        computed, checksum = encoded(crc32c), written.tobytes()
        if computed != checksum:
            raise DamagedFile(
                f"chunk ({r}, {c}) of {self._label} is damaged: its crc32c is "
                f"{computed[::-1].hex()}, the file says {checksum[::-1].hex()}. {_RESTORE}"
            )
        self.verified[r, c] = True

    def _verify_bands_of(self, rows: NDArray[np.int64]) -> int:
        """Verify what was not yet of the bands that hold some rows; return how many chunks."""
        height = self._layout.chunk_rows
        first, last = int(rows[0]), int(rows[-1])
        self._bands(first, last + 1)  # refuses rows that are not there
        if self.verified[first // height : last // height + 1].all():
            return 0
        bands = np.unique(rows // height)
        chunks = np.argwhere(~self.verified[bands])
        buffer = self._buffer()
        for band, c in chunks.tolist():
            self._rows_of_chunk(int(bands[band]), c, 0, height, buffer)
        return len(chunks)

    def _verified_bands(self) -> int:
        """Return the number of bands, after comparing size and index with what they must be."""
        layout, label = self._layout, self._label
        self._check_size()
        size = self._n_bytes
        n_bands, rest = divmod(size - layout.index_bytes, layout.band_bytes)
        if rest or not 0 <= n_bands <= layout.n_row_chunks:
            raise DamagedFile(
                f"{label} has {size} bytes; expected {layout.index_bytes} and up to "
                f"{layout.n_row_chunks} times {layout.band_bytes}. {_RESTORE}"
            )
        index = np.empty(layout.index_bytes, np.uint8)
        self._read_into(index, size - layout.index_bytes)
        expected = np.frombuffer(index_of(layout, n_bands), np.uint8)
        if encoded(extend(index[:-CHECKSUM_BYTES])) != index[-CHECKSUM_BYTES:].tobytes():
            raise DamagedFile(
                f"the index of {label} is damaged: its crc32c does not match. {_RESTORE}"
            )
        if different := np.flatnonzero(index != expected).tolist():
            r, c = divmod(different[0] // 16, layout.n_column_chunks)
            raise DamagedFile(
                f"the index of {label} places chunk ({r}, {c}) elsewhere than expected, or misses "
                "it: actstore did not write this file. Read it with zarr.open_array."
            )
        return n_bands

    def _check_size(self) -> None:
        size = os.fstat(self._fd).st_size
        if size != self._n_bytes:
            raise DamagedFile(
                f"{self._label} has {size} bytes; expected {self._n_bytes}. {_RESTORE}"
            )

    def _verify_identity(self, expected: int) -> None:
        computed = 0
        checksum = np.empty(CHECKSUM_BYTES, np.uint8)
        for r, c in np.ndindex(self.verified.shape):
            self._read_into(checksum, self._offset(r, c) + self._layout.chunk_bytes)
            computed = extend(checksum, computed)
        if computed != expected:
            raise DamagedFile(
                f"{self._label} is not the file that was recorded: the crc32c of its chunks' "
                f"checksums is {computed:08x}, expected {expected:08x}. {_RESTORE}"
            )

    def _read_into(self, buffer: NDArray[np.uint8], offset: int) -> None:
        done = 0
        while done < len(buffer):
            n = os.preadv(self._fd, [buffer[done:].data], offset + done)
            if not n:
                raise DamagedFile(
                    f"{self._label} ends at byte {offset + done}; expected {self._n_bytes} bytes. "
                    f"{_RESTORE}"
                )
            done += n
