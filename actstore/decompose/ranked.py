"""Rows by rank: the chosen rows of some sites, read into memory as they are stored.

The rank of a row is its place among the chosen rows, in row order.  Who deals rows deals ranks, and
reads them here: ascending ranks come from the disk in as few reads as there are stretches of
neighbours.  Where a few rows that were not asked for lie between two stretches (the first rows of
windows, among content rows) it costs less to read them too, straight into the buffer, than to step
over them; a buffer has a little room for that, and the *places* say where in it each rank came to
lie.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from actstore.decompose.scan import Scan
from actstore.errors import NonFiniteActivation
from actstore.store import CoreStore, Rows, SiteCounts, SiteInfo
from actstore.store.rows import stretches

Ids = npt.NDArray[np.int64]

_ROOM = 16  # a buffer has room for one row not asked for in so many
_GAP_ROWS = 16  # it costs less to read so many rows than to step over them


class RankedRows:
    """Reads rows of some sites by rank, in the stored dtype.

    Parameters
    ----------
    store : CoreStore
        The store to read.
    infos : sequence of SiteInfo
        The sites, of one space.
    rows : Rows
        The rows that have ranks, as far as they are stored at all of the sites.

    Raises
    ------
    ArgumentError
        If there are no sites or no rows, the sites are of two spaces, or one stores no rows.
    """

    def __init__(self, store: CoreStore, infos: Sequence[SiteInfo], rows: Rows) -> None:
        Scan(store, infos, rows, budget_bytes=0)  # refuses what cannot be served
        self._store = store
        self._infos = list(infos)
        self._rows = store.rows_stored(rows, infos)
        self._segments = self._rows.segments
        counts = [len(self._rows.offsets(segment)) for segment in self._segments]
        self._firsts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        self.n_rows = self._rows.n_rows
        """How many ranks there are."""
        self.rule = self._rows.rule
        """What chose the rows."""

    @staticmethod
    def buffer_rows(n_rows: int) -> int:
        """Return the height of a buffer that can take so many rows."""
        return n_rows + -(-n_rows // _ROOM)

    def buffers(self, n_rows: int) -> list[npt.NDArray[Any]]:
        """Return memory for so many rows, an array for each site."""
        return [
            np.empty((self.buffer_rows(n_rows), info.width), self._store.layout(info).numpy_dtype)
            for info in self._infos
        ]

    def read(
        self, ranks: Ids, buffers: list[npt.NDArray[Any]], helper: Executor | None = None
    ) -> tuple[list[Ids], Ids]:
        """Read rows into buffers.

        Parameters
        ----------
        ranks : ndarray of int64
            The ranks, ascending.
        buffers : list of ndarray
            What `buffers` returned for at least so many rows.
        helper : Executor, optional
            Takes half of the reads.

        Returns
        -------
        places : list of ndarray of int64
            For each site, where in its buffer each row is.
        row_ids : ndarray of int64
            The row_id of each row.

        Raises
        ------
        NonFiniteActivation
            If a value is NaN.
        """
        edges = np.searchsorted(ranks, self._firsts)
        numbers = np.flatnonzero(np.diff(edges))
        row_ids = np.empty(len(ranks), dtype=np.int64)
        # Sites that keep the same part of the rows have them in the same places.
        groups = {info.keep: info for info in self._infos}
        stored = {keep: np.empty_like(row_ids) for keep in groups}
        for number in numbers:
            span = slice(int(edges[number]), int(edges[number + 1]))
            segment = self._segments[number]
            offsets = self._rows.offsets(segment)[ranks[span] - self._firsts[number]]
            first = segment * self._rows.segment_rows
            row_ids[span] = first + offsets
            for keep, info in groups.items():
                stored[keep][span] = first + self._store.positions(info, segment, offsets)
        places: list[Ids] = []
        reads: list[tuple[SiteInfo, int, int, npt.NDArray[Any]]] = []
        for info, buffer in zip(self._infos, buffers, strict=True):
            where, spans = self._spans(stored[info.keep], len(buffer) - len(ranks))
            places.append(where)
            for a, b in spans:
                start, n = int(stored[info.keep][a]), int(where[b - 1] - where[a]) + 1
                reads.append((info, start, n, buffer[where[a] : where[a] + n]))
        half = helper.submit(self._read_all, reads[1::2]) if helper else None
        self._read_all(reads[::2] if half else reads)
        if half:
            half.result()
        self._refuse_nan(buffers, places, row_ids, [self._segments[n] for n in numbers])
        return places, row_ids

    def _spans(self, stored: Ids, room: int) -> tuple[Ids, list[tuple[int, int]]]:
        """Return the place of each row in a buffer, and the spans that one read each fills."""
        gaps = np.diff(stored) - 1
        leaves = np.diff(stored // self._rows.segment_rows) != 0  # the segment
        # The smallest gaps are read over, as many as there is room for.
        sizes, counts = np.unique(gaps[~leaves & (gaps <= _GAP_ROWS)], return_counts=True)
        largest = sizes[np.cumsum(sizes * counts) <= room].max(initial=0)
        bridged = ~leaves & (gaps <= largest)
        where = np.arange(len(stored))
        where[1:] += np.cumsum(np.where(bridged, gaps, 0))
        return where, list(stretches(~bridged, len(stored)))

    def _read_all(self, reads: list[tuple[SiteInfo, int, int, npt.NDArray[Any]]]) -> None:
        for info, first, n, out in reads:
            segment, start = divmod(first, self._rows.segment_rows)
            self._store.read(info, segment, start, start + n, out=out)

    def _refuse_nan(
        self, buffers: list[npt.NDArray[Any]], places: list[Ids], row_ids: Ids, segments: list[int]
    ) -> None:
        """Raise if a row holds NaN; looked for only where the commits count any."""
        for info, buffer, where in zip(self._infos, buffers, places, strict=True):
            name = str(info.site)
            for segment in segments:
                if not self._store.commit_of(segment).counts.get(name, SiteCounts()).n_nan:
                    continue
                for i in np.flatnonzero(row_ids // self._rows.segment_rows == segment):
                    if (bad := torch.isnan(as_tensor(buffer[where[i]]))).any():
                        raise NonFiniteActivation(
                            f"{name} of {self._store.path} is nan at row_id = {row_ids[i]}, neuron "
                            f"{int(bad.nonzero()[0])}; expected finite numbers. Leave the row out "
                            "with rows=..., or capture again with --on-nan error to find its cause."
                        )


def as_tensor(values: npt.NDArray[Any]) -> torch.Tensor:
    """Return stored values as a tensor on the same memory; torch knows no bfloat16 of NumPy."""
    bits = torch.from_numpy(values.view(f"i{values.itemsize}"))
    return bits.view(getattr(torch, values.dtype.name))
