"""The rows of sites that keep a sample: picked from the bands that pass, written a band at a time.

The bands that the model fills and the folds read hold every row.  Of those that a site keeps only
some, so many bands give one of its own: one of these is held for each such site.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from actstore.shard import DTYPES, ShardLayout
from actstore.site import Site
from actstore.store import SegmentWriter, SiteInfo, StoreMeta
from actstore.store.stored_rows import is_sample


def sampled_bytes(meta: StoreMeta) -> int:
    """Return the bytes that `SampledBands` takes."""
    return sum(band_bytes(meta.layout(info)) for info in meta.sites if is_sample(info.keep))


def band_bytes(layout: ShardLayout) -> int:
    """Return the bytes of a band in memory."""
    return layout.n_column_chunks * layout.chunk_bytes


class SampledBands:
    """One band under way for each site that keeps a sample; for one segment after the other.

    Parameters
    ----------
    meta : StoreMeta
        The facts of the store.
    """

    def __init__(self, meta: StoreMeta) -> None:
        self._bands: dict[Site, npt.NDArray[Any]] = {}
        for info in meta.sites:
            if is_sample(info.keep):
                layout = meta.layout(info)
                shape = (layout.n_column_chunks, layout.chunk_rows, layout.chunk_columns)
                self._bands[info.site] = np.full(shape, np.nan, DTYPES[info.dtype])
        self._filled: dict[Site, int] = {}
        self._writer: SegmentWriter | None = None

    def add(
        self, writer: SegmentWriter, info: SiteInfo, first: int, values: npt.NDArray[Any]
    ) -> None:
        """Take the rows of a site that are stored from a band that begins at an offset.

        Parameters
        ----------
        writer : SegmentWriter
            Of the segment; what was held of another one is dropped.
        info : SiteInfo
            The site.
        first : int
            Offset in the segment of the band's first row.
        values : ndarray (n_column_chunks, chunk_rows, chunk_columns)
            The band.
        """
        if writer is not self._writer:
            self._writer = writer
            self._filled = dict.fromkeys(self._bands, 0)
        offsets = writer.sample(info)
        low, high = np.searchsorted(offsets, [first, first + values.shape[1]])
        rows = offsets[low:high] - first
        band = self._bands[info.site]
        bits = np.dtype(f"u{band.itemsize}")
        while len(rows):
            at = self._filled[info.site]
            some = rows[: band.shape[1] - at]
            for target, source in zip(band.view(bits), values.view(bits), strict=True):
                target[at : at + len(some)] = source[some]
            rows = rows[len(some) :]
            self._filled[info.site] = at + len(some)
            if self._filled[info.site] == band.shape[1]:
                self._write(info)

    def finish(self, writer: SegmentWriter, info: SiteInfo) -> None:
        """Write the last rows of a segment at a site."""
        if writer is self._writer and self._filled[info.site]:
            self._write(info)

    def _write(self, info: SiteInfo) -> None:
        assert self._writer is not None
        band = self._bands[info.site]
        band[:, self._filled[info.site] :] = np.nan
        self._writer.write_band(info, band)
        self._filled[info.site] = 0
