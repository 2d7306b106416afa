"""One shard: the file that holds the activations of one site in one segment.

A shard is one chunk of a Zarr v3 array under the ``sharding_indexed`` codec: inner chunks, then an
index of where each lies.  Without a compressor every inner chunk has the same size, so this module
writes them in one fixed order, and *where a value lies is arithmetic*: chunk ``(r, c)`` starts at
``(r * n_column_chunks + c) * (chunk_bytes + 4)``, in row-major order inside, followed by its
crc32c.  Any Zarr reader finds the chunks through the index; `ShardReader` computes them, reads
some rows or one column at any place, and demands that the index says the same.

A *band* is ``chunk_rows`` rows of all columns in chunk order, an array ``(n_column_chunks,
chunk_rows, chunk_columns)``: what is written at once.  Bands are written from the top; those that
were not are missing in the index, so every reader sees the fill value NaN there, and this one
raises.

What the checksums say.  Each chunk carries its crc32c, and the index carries its own.  The crc32c
of bytes followed by their own crc32c does not depend on the bytes, hence *all undamaged shards of
one layout and number of bands have the same crc32c as files*: it finds damage, but it does not tell
one shard from another.  The crc32c of the chunks' checksums in file order does
(`ShardFacts.checksums_crc32c`); whoever records it can prove that a file is the one that was
written, by reading four bytes a chunk.

Nothing here syncs, renames or knows a store; the store does.
"""

from __future__ import annotations

import functools
import mmap
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import google_crc32c
import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from actstore.errors import ArgumentError, DamagedFile, FormatError, NeuronNotFound

DTYPES: dict[str, np.dtype[Any]] = {
    "float16": np.dtype("<f2"),
    "float32": np.dtype("<f4"),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
"""NumPy dtypes of the data types a shard can hold, by their Zarr names."""

_CHECKSUM_BYTES = 4
_MISSING = 2**64 - 1  # offset and size of a missing chunk, by the Zarr specification
_RESTORE = "Restore the file from a copy, or capture its segment again."


@dataclass(frozen=True)
class ShardLayout:
    """The shape of a shard and of its inner chunks; everything else about its bytes follows.

    Raises
    ------
    ArgumentError
        If a number or the dtype cannot be used.
    """

    rows: int
    """Rows of a shard, a power of two; the last bands may be missing."""
    width: int
    """Columns."""
    dtype: str
    """One of `DTYPES`."""
    chunk_rows: int
    """Rows of an inner chunk, a divisor of `rows`."""
    chunk_columns: int
    """Columns of an inner chunk, at most `width` unless padded."""

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ArgumentError(
                f"dtype = {self.dtype!r} cannot be stored in a shard; choose one of "
                f"{', '.join(DTYPES)}."
            )
        for name in ("rows", "width", "chunk_rows", "chunk_columns"):
            if getattr(self, name) < 1:
                raise ArgumentError(f"{name} = {getattr(self, name)} of a shard must be positive.")
        if self.rows & (self.rows - 1):
            raise ArgumentError(f"rows = {self.rows} of a shard must be a power of two.")
        if self.rows % self.chunk_rows:
            raise ArgumentError(
                f"chunk_rows = {self.chunk_rows} must divide the rows of a shard, {self.rows}."
            )

    @classmethod
    def for_width(cls, width: int, rows: int, dtype: str, chunk_rows: int = 4096) -> ShardLayout:
        """Return the layout for a site of this width.

        Chunk columns are the largest divisor of the width in 64 … 256, else the whole width up to
        256, else 128 with padding.  Measured: chunks 128 to 256 columns wide cost nothing when all
        rows are read, and make one column 30 to 50 times cheaper than rows kept whole.

        Parameters
        ----------
        width : int
            Columns of the site.
        rows : int
            Rows of a shard, a power of two.
        dtype : str
            One of `DTYPES`.
        chunk_rows : int, default 4096
            Rows of an inner chunk; a smaller shard is one chunk high.

        Examples
        --------
        >>> ShardLayout.for_width(3072, 16384, "float16").chunk_columns
        256
        >>> ShardLayout.for_width(514, 16384, "float16").padded_width
        640
        """
        divisors = [n for n in range(256, 63, -1) if width % n == 0]
        chunk_columns = divisors[0] if divisors else width if width <= 256 else 128
        return cls(rows, width, dtype, min(chunk_rows, rows), chunk_columns)

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """NumPy dtype of the values; that of ml_dtypes for bfloat16."""
        return DTYPES[self.dtype]

    @property
    def itemsize(self) -> int:
        """Bytes of a value."""
        return self.numpy_dtype.itemsize

    @property
    def n_row_chunks(self) -> int:
        """Chunks from top to bottom: the number of bands."""
        return self.rows // self.chunk_rows

    @property
    def n_column_chunks(self) -> int:
        """Chunks from left to right."""
        return -(-self.width // self.chunk_columns)

    @property
    def padded_width(self) -> int:
        """Columns on disk: the width, rounded up to whole chunks."""
        return self.n_column_chunks * self.chunk_columns

    @property
    def row_bytes(self) -> int:
        """Bytes from a row of a chunk to the next."""
        return self.chunk_columns * self.itemsize

    @property
    def chunk_bytes(self) -> int:
        """Bytes of the values of a chunk, without its checksum."""
        return self.chunk_rows * self.row_bytes

    @property
    def band_bytes(self) -> int:
        """Bytes of a band in the file, checksums included."""
        return self.n_column_chunks * (self.chunk_bytes + _CHECKSUM_BYTES)

    @property
    def index_bytes(self) -> int:
        """Bytes of the index at the end of the file, its checksum included."""
        return 16 * self.n_row_chunks * self.n_column_chunks + _CHECKSUM_BYTES

    @property
    def max_bytes(self) -> int:
        """Bytes of a shard with all its bands."""
        return self.n_row_chunks * self.band_bytes + self.index_bytes

    def zarr_metadata(
        self,
        n_shards: int,
        attributes: Mapping[str, Any],
        dimension_names: Sequence[str] | None = None,
    ) -> dict[str, Any]:
        """Return the content of ``zarr.json`` of an array of such shards, one above the other.

        Parameters
        ----------
        n_shards : int
            Shards the array has room for; shard ``i`` is the file ``c/<i>/0``.
        attributes : mapping
            The user attributes of the array.
        dimension_names : sequence of two str, optional
            Names of rows and columns.

        Returns
        -------
        dict
            JSON of a Zarr v3 array ``(n_shards * rows, width)``.  Where the width is padded, the
            chunk grid overhangs the array, which Zarr allows.
        """
        values = {"name": "bytes", "configuration": {"endian": "little"}}
        codecs = [values, {"name": "crc32c"}]
        sharding = {
            "chunk_shape": [self.chunk_rows, self.chunk_columns],
            "codecs": codecs,
            "index_codecs": codecs,
            "index_location": "end",
        }
        metadata: dict[str, Any] = {
            "zarr_format": 3,
            "node_type": "array",
            "shape": [n_shards * self.rows, self.width],
            "data_type": self.dtype,
            "chunk_grid": {
                "name": "regular",
                "configuration": {"chunk_shape": [self.rows, self.padded_width]},
            },
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": "NaN",
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
            "attributes": dict(attributes),
        }
        if dimension_names is not None:
            metadata["dimension_names"] = list(dimension_names)
        return metadata

    @classmethod
    def from_zarr_metadata(
        cls, metadata: Mapping[str, Any], label: str = "zarr.json"
    ) -> ShardLayout:
        """Return the layout of an array from its ``zarr.json``; the inverse of `zarr_metadata`.

        Parameters
        ----------
        metadata : mapping
            The content of ``zarr.json``; attributes and dimension names may be anything.
        label : str
            Name of the file, for the message.

        Raises
        ------
        FormatError
            If it is not the metadata `zarr_metadata` returns for some layout: another codec,
            chunk grid, fill value or data type.
        """
        try:
            rows, _ = metadata["chunk_grid"]["configuration"]["chunk_shape"]
            chunks = metadata["codecs"][0]["configuration"]["chunk_shape"]
            n_rows, width = metadata["shape"]
            layout = cls(rows, width, metadata["data_type"], chunks[0], chunks[1])
            expected = layout.zarr_metadata(n_rows // rows, {})
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise FormatError(
                f"{label} does not describe an array of shards ({type(error).__name__}: {error}); "
                "expected a Zarr v3 array of two dimensions with the codec sharding_indexed. "
                "Open it with zarr.open_array."
            ) from error
        expected["storage_transformers"] = []
        for name, value in expected.items():
            if name != "attributes" and metadata.get(name, []) != value:
                raise FormatError(
                    f"{label} has {name} = {metadata.get(name)!r}; expected {value!r}. "
                    "Open it with zarr.open_array."
                )
        return layout


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
    _check_dtype("rows_block", rows_block, layout)
    shape = (layout.n_column_chunks, layout.chunk_rows, layout.chunk_columns)
    band = np.empty(shape, layout.numpy_dtype)
    if n_rows < layout.chunk_rows:
        band[:, n_rows:] = np.nan
    target, source = _bits(band), _bits(rows_block)
    for c, columns in enumerate(_column_slices(layout)):
        n_columns = columns.stop - columns.start
        target[c, :n_rows, :n_columns] = source[:, columns]
        if n_columns < layout.chunk_columns:
            band[c, :n_rows, n_columns:] = np.nan
    return band


class ShardWriter:
    """Streams bands into a shard; no band is kept, and no byte is read twice.

    Parameters
    ----------
    file : binary file
        Open for writing at its start; anything with ``write``.
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

    def __init__(self, file: BinaryIO, layout: ShardLayout) -> None:
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
        _check_dtype("band", band, layout)
        if self._finished or self._n_bands == layout.n_row_chunks:
            raise ArgumentError(
                f"the shard is {'finished' if self._finished else 'full'}: it holds "
                f"{self._n_bands} of {layout.n_row_chunks} bands. Write to a new shard."
            )
        for chunk in band.view(np.uint8).reshape(layout.n_column_chunks, layout.chunk_bytes):
            crc32c = _crc32c(chunk)
            checksum = _checksum(crc32c)
            self._write(chunk.data)
            self._write(checksum)
            after_chunk = _join_crc32c(self._crc32c, crc32c, layout.chunk_bytes)
            self._crc32c = _crc32c(checksum, after_chunk)
            self._checksums_crc32c = _crc32c(checksum, self._checksums_crc32c)
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
        index = _index(self._layout, self._n_bands)
        self._write(index)
        return ShardFacts(
            n_bytes=self._n_bands * self._layout.band_bytes + len(index),
            crc32c=_crc32c(index, self._crc32c),
            n_bands=self._n_bands,
            checksums_crc32c=self._checksums_crc32c,
        )

    def _write(self, data: bytes | memoryview) -> None:
        rest = memoryview(data)
        while rest:  # an unbuffered file may take a part only
            rest = rest[self._file.write(rest) :]


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
        target = _bits(out)
        buffer = self._buffer()
        for band, first, last, offset in bands:
            for c, columns in enumerate(_column_slices(layout)):
                chunk = self._rows_of_chunk(band, c, first, last, buffer)
                rows = slice(offset, offset + last - first)
                target[rows, columns] = chunk[:, : columns.stop - columns.start]
        return out

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
        layout = self._layout
        if not 0 <= column < layout.width:
            raise NeuronNotFound(
                f"column = {column} is not in {self._label}; expected 0 … {layout.width - 1}."
            )
        stop = self.rows_present if stop is None else stop
        bands = self._bands(start, stop)
        out = self._result(out, (stop - start,))
        target = _bits(out)
        c, inside = divmod(column, layout.chunk_columns)
        self._check_size()  # past its end a mapping kills the process instead of raising
        buffer = None
        # Mapped for this call alone: a mapping kept would leave every page ever touched resident.
        with mmap.mmap(self._fd, self._n_bytes, access=mmap.ACCESS_READ) as mapped:
            for band, first, last, offset in bands:
                if self.verified[band, c]:
                    start_of_row = self._offset(band, c) + first * layout.row_bytes
                    values = np.ndarray(
                        (last - first,),
                        target.dtype,
                        mapped,
                        start_of_row + inside * layout.itemsize,
                        (layout.row_bytes,),
                    )
                else:
                    buffer = self._buffer() if buffer is None else buffer
                    values = self._rows_of_chunk(band, c, first, last, buffer)[:, inside]
                target[offset : offset + last - first] = values
                del values  # a view of the mapping would keep it from closing
        return out

    def read_chunk(self, r: int, c: int) -> NDArray[Any]:
        """Return chunk ``(r, c)``, ndarray (chunk_rows, chunk_columns), its padding included.

        Raises
        ------
        DamagedFile
            If the chunk is damaged or missing.
        ArgumentError
            If the layout has no such chunk.
        """
        layout = self._layout
        if not (0 <= r < layout.n_row_chunks and 0 <= c < layout.n_column_chunks):
            raise ArgumentError(
                f"chunk ({r}, {c}) is not in {self._label}; expected "
                f"({layout.n_row_chunks}, {layout.n_column_chunks}) chunks."
            )
        self._require(r, c)
        chunk = self._rows_of_chunk(r, c, 0, layout.chunk_rows, self._buffer())
        return chunk.view(layout.numpy_dtype)

    def _offset(self, r: int, c: int) -> int:
        return r * self._layout.band_bytes + c * (self._layout.chunk_bytes + _CHECKSUM_BYTES)

    def _buffer(self) -> NDArray[np.uint8]:
        return np.empty(self._layout.chunk_bytes + _CHECKSUM_BYTES, np.uint8)

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
        _check_dtype("out", out, self._layout)
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

    def _verify_chunk(self, r: int, c: int, data: NDArray[np.uint8]) -> None:
        payload, checksum = data[:-_CHECKSUM_BYTES], data[-_CHECKSUM_BYTES:].tobytes()
        computed = _checksum(_crc32c(payload))
        if computed != checksum:
            raise DamagedFile(
                f"chunk ({r}, {c}) of {self._label} is damaged: its crc32c is "
                f"{computed[::-1].hex()}, the file says {checksum[::-1].hex()}. {_RESTORE}"
            )
        self.verified[r, c] = True

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
        expected = np.frombuffer(_index(layout, n_bands), np.uint8)
        if _checksum(_crc32c(index[:-_CHECKSUM_BYTES])) != index[-_CHECKSUM_BYTES:].tobytes():
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
        checksum = np.empty(_CHECKSUM_BYTES, np.uint8)
        for r, c in np.ndindex(self.verified.shape):
            self._read_into(checksum, self._offset(r, c) + self._layout.chunk_bytes)
            computed = _crc32c(checksum, computed)
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


def crc32c_of_file(path: str | os.PathLike[str]) -> int:
    """Return the crc32c of a file; one pass, memory one MiB.

    Raises
    ------
    OSError
        If the file cannot be opened or read.
    """
    crc32c = 0
    with open(path, "rb", buffering=0) as file:
        # Of bytes, unlike arrays, google_crc32c takes the checksum without the interpreter lock.
        while data := file.read(2**20):
            crc32c = _crc32c(data, crc32c)
    return crc32c


def _crc32c(data: bytes | NDArray[np.uint8], crc32c: int = 0) -> int:
    """Return the crc32c of data that follow bytes with a given crc32c."""
    return int(google_crc32c.extend(crc32c, data))


def _checksum(crc32c: int) -> bytes:
    """Return a crc32c as Zarr's crc32c codec writes it."""
    return crc32c.to_bytes(_CHECKSUM_BYTES, "little")


def _join_crc32c(crc32c: int, next_crc32c: int, next_bytes: int) -> int:
    """Return the crc32c of two runs of bytes from those of each and the length of the second."""
    for bit, image in enumerate(_shift(next_bytes)):
        if crc32c >> bit & 1:
            next_crc32c ^= image
    return next_crc32c


@functools.lru_cache(maxsize=64)
def _shift(n_bytes: int) -> tuple[int, ...]:
    """Return what n zero bytes make of each bit of a crc32c register: a 32 x 32 matrix over GF(2).

    Appending bytes is linear in the register, so n of them are the n-th power of one, by squaring.

    References
    ----------
    crc32_combine of zlib (M. Adler), with the polynomial of RFC 3720, appendix B.4.
    """

    def times(left: tuple[int, ...], right: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(
            functools.reduce(int.__xor__, (left[i] for i in range(32) if column >> i & 1), 0)
            for column in right
        )

    # One zero bit: shift right, and fold the bit that falls out back in.
    power: tuple[int, ...] = (0x82F63B78, *(1 << bit for bit in range(31)))
    result = tuple(1 << bit for bit in range(32))
    n_bits = 8 * n_bytes
    while n_bits:
        if n_bits & 1:
            result = times(power, result)
        power = times(power, power)
        n_bits >>= 1
    return result


def _index(layout: ShardLayout, n_bands: int) -> bytes:
    """Return the index of a shard with its first bands written: offset and size of every chunk."""
    entries = np.full((layout.n_row_chunks * layout.n_column_chunks, 2), _MISSING, "<u8")
    n_chunks = n_bands * layout.n_column_chunks
    size = layout.chunk_bytes + _CHECKSUM_BYTES
    entries[:n_chunks, 0] = np.arange(n_chunks, dtype="<u8") * np.uint64(size)
    entries[:n_chunks, 1] = size
    index = entries.tobytes()
    return index + _checksum(_crc32c(index))


def _column_slices(layout: ShardLayout) -> list[slice]:
    """Return the columns of the site that each chunk of a band holds."""
    step = layout.chunk_columns
    return [slice(c, min(c + step, layout.width)) for c in range(0, layout.width, step)]


def _bits(array: NDArray[Any]) -> NDArray[Any]:
    """View values as unsigned integers: copied as they are, NaN payloads included, and fast."""
    return array.view(f"<u{array.dtype.itemsize}")


def _check_dtype(name: str, array: NDArray[Any], layout: ShardLayout) -> None:
    if array.dtype != layout.numpy_dtype:
        raise ArgumentError(
            f"{name} has dtype {array.dtype}; expected {layout.dtype}. Cast it first."
        )
