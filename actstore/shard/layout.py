"""The shape of a shard and its chunks, its metadata as a Zarr array, and its index."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from actstore.errors import ArgumentError, FormatError
from actstore.shard.checksum import CHECKSUM_BYTES, encoded, extend

DTYPES: dict[str, np.dtype[Any]] = {
    "float16": np.dtype("<f2"),
    "float32": np.dtype("<f4"),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
"""NumPy dtypes of the data types a shard can hold, by their Zarr names."""

_MISSING = 2**64 - 1  # offset and size of a missing chunk, by the Zarr specification


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
        return self.n_column_chunks * (self.chunk_bytes + CHECKSUM_BYTES)

    @property
    def index_bytes(self) -> int:
        """Bytes of the index at the end of the file, its checksum included."""
        return 16 * self.n_row_chunks * self.n_column_chunks + CHECKSUM_BYTES

    def file_bytes(self, rows: int) -> int:
        """Return the bytes of a shard that holds some rows: whole bands and the index."""
        return -(-rows // self.chunk_rows) * self.band_bytes + self.index_bytes

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


def index_of(layout: ShardLayout, n_bands: int) -> bytes:
    """Return the index of a shard with its first bands written: offset and size of every chunk."""
    entries = np.full((layout.n_row_chunks * layout.n_column_chunks, 2), _MISSING, "<u8")
    n_chunks = n_bands * layout.n_column_chunks
    size = layout.chunk_bytes + CHECKSUM_BYTES
    entries[:n_chunks, 0] = np.arange(n_chunks, dtype="<u8") * np.uint64(size)
    entries[:n_chunks, 1] = size
    index = entries.tobytes()
    return index + encoded(extend(index))


def column_slices(layout: ShardLayout) -> list[slice]:
    """Return the columns of the site that each chunk of a band holds."""
    step = layout.chunk_columns
    return [slice(c, min(c + step, layout.width)) for c in range(0, layout.width, step)]


def bits_of(array: NDArray[Any]) -> NDArray[Any]:
    """View values as unsigned integers: copied as they are, NaN payloads included, and fast."""
    return array.view(f"<u{array.dtype.itemsize}")


def check_dtype(name: str, array: NDArray[Any], layout: ShardLayout) -> None:
    """Raise `ArgumentError` unless values have the dtype of the layout."""
    if array.dtype != layout.numpy_dtype:
        raise ArgumentError(
            f"{name} has dtype {array.dtype}; expected {layout.dtype}. Cast it first."
        )
