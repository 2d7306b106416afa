"""Rows by rank: the chosen rows of some sites, read into memory as they are stored.

The rank of a row is its place among the chosen rows, in row order.  Who deals rows deals ranks, in
any order, and reads them here: they are looked up in the order of the disk, in as few reads as
there are stretches of near neighbours, and every row goes straight to where the deal has it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import Executor
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from actstore.errors import ArgumentError, NonFiniteActivation
from actstore.shard import RowStack
from actstore.site import Site, summarize
from actstore.store import CoreStore, Rows, SiteCounts, SiteInfo

Ids = npt.NDArray[np.int64]

_CHECK_ROWS = 256  # looked through for NaN at once
_TURNED_COLUMNS = 64  # copied at once


def more_rows(rule: str) -> str:
    """Return what to do where a rule chooses too few rows."""
    return "Capture more segments." if rule == "all" else "Pass rows='all', or capture more."


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
        if len({info.site.space for info in infos}) != 1:
            raise ArgumentError(
                f"sites = {summarize(info.site for info in infos) or 'none'} do not share rows; "
                f"expected sites of one space of {store.path}. Name them as "
                "'encoder.mlp_post' or 'decoder.mlp_post'."
            )
        rows = store.rows_stored(rows, infos)
        if not rows.n_rows:
            raise ArgumentError(
                f"rows = {rows.rule!r} chooses none of the {store.n_rows(infos[0].site.space):,} "
                f"committed rows of {store.path}. {more_rows(rows.rule)}"
            )
        self._store = store
        self._infos = list(infos)
        self._rows = rows
        self._segments = rows.segments
        counts = [len(rows.offsets(segment)) for segment in self._segments]
        self.edges: Ids = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        """The first rank of each segment that holds any, and at the end how many there are."""
        self.n_rows = rows.n_rows
        """How many ranks there are."""
        self.rule: str = rows.rule
        """What chose the rows."""
        self.row_bytes: int = sum(info.row_bytes for info in infos)
        """Bytes of a row of all sites."""
        self.n_reads = 0
        """Reads so far."""
        self.bytes_read = 0
        """Bytes of activations read so far."""

    def empty(self, n_rows: int) -> list[npt.NDArray[Any]]:
        """Return memory for so many rows: an array for each site."""
        return [
            np.empty((n_rows, info.width), self._store.layout(info).numpy_dtype)
            for info in self._infos
        ]

    def row_ids(self, ranks: Ids) -> Ids:
        """Return the row_id of each of some ranks, in any order."""
        number = np.searchsorted(self.edges, ranks, side="right") - 1
        row_ids = np.empty(len(ranks), dtype=np.int64)
        for n in np.unique(number).tolist():
            here, segment = number == n, self._segments[n]
            offsets = self._rows.offsets(segment)[ranks[here] - self.edges[n]]
            row_ids[here] = segment * self._rows.segment_rows + offsets
        return row_ids

    def read(
        self,
        ranks: Ids,
        out: Sequence[Sequence[npt.NDArray[Any]]],
        helper: Executor | None = None,
    ) -> Ids:
        """Read rows, each to where it stands in the order given.

        Parameters
        ----------
        ranks : ndarray of int64
            The ranks, in any order.
        out : sequence of sequences of ndarray
            For each site, the arrays that take the rows, one after the other: ``(n, width)`` in the
            stored dtype, with room for all of them.
        helper : Executor, optional
            Takes half of the reads.

        Returns
        -------
        ndarray of int64
            The row_id of each row.

        Raises
        ------
        NonFiniteActivation
            If a value is NaN.
        """
        order = np.argsort(ranks)
        ascending = ranks[order]
        edges = np.searchsorted(ascending, self.edges)
        row_ids = np.empty(len(ranks), dtype=np.int64)
        stacks = [RowStack(arrays) for arrays in out]
        reads: list[tuple[SiteInfo, int, Ids, RowStack, Ids]] = []
        numbers = np.flatnonzero(np.diff(edges)).tolist()
        for number in numbers:
            segment = self._segments[number]
            span = slice(edges[number], edges[number + 1])
            places = order[span]
            offsets = self._rows.offsets(segment)[ascending[span] - self.edges[number]]
            row_ids[places] = segment * self._rows.segment_rows + offsets
            # Sites that keep the same part of the rows have them in the same places.
            stored = {
                info.keep: self._store.positions(info, segment, offsets)
                for info in {info.keep: info for info in self._infos}.values()
            }
            for info, stack in zip(self._infos, stacks, strict=True):
                reads.append((info, segment, stored[info.keep], stack, places))
        half = helper.submit(self._read_all, reads[1::2]) if helper else None
        counts = self._read_all(reads[::2] if half else reads)
        counts += half.result() if half else 0
        self.n_reads += int(counts[0])
        self.bytes_read += int(counts[1])
        self._refuse_nan(out, row_ids, [self._segments[number] for number in numbers])
        return row_ids

    def _read_all(self, reads: list[tuple[SiteInfo, int, Ids, RowStack, Ids]]) -> Ids:
        """Return how many reads were made, and their bytes."""
        made = [self._store.scatter(*read) for read in reads]
        total: Ids = np.array(made, dtype=np.int64).reshape(-1, 2).sum(0)
        return total

    def _refuse_nan(
        self, out: Sequence[Sequence[npt.NDArray[Any]]], row_ids: Ids, segments: list[int]
    ) -> None:
        """Raise if a row holds NaN; looked for only where the commits count any."""
        for info, arrays in zip(self._infos, out, strict=True):
            name = str(info.site)
            commits = map(self._store.commit_of, segments)
            if not any(commit.counts.get(name, SiteCounts()).n_nan for commit in commits):
                continue
            first = 0
            for array in arrays:
                stop = min(len(array), len(row_ids) - first)
                for start in range(0, stop, _CHECK_ROWS):
                    bad = np.argwhere(np.isnan(array[start : min(start + _CHECK_ROWS, stop)]))
                    for row, neuron in bad[:1].tolist():
                        row_id = int(row_ids[first + start + row])
                        raise self.non_finite(info.site, math.nan, row_id, neuron)
                first += len(array)

    def non_finite(self, site: Site, value: float, row_id: int, neuron: int) -> NonFiniteActivation:
        """Return the error that a stored value is no finite number."""
        return NonFiniteActivation(
            f"{site} of {self._store.path} is {value} at row_id = {row_id}, neuron {neuron}; "
            "expected finite numbers. Leave the row out with rows=..., or capture again with "
            "--on-nan error to find its cause."
        )


class KeptRows:
    """Some rows that lie in memory, as they are stored; ranked as they were given.

    Parameters
    ----------
    ranked : RankedRows or KeptRows
        What reads them, now.
    ranks : ndarray of int64
        Their ranks there.
    """

    def __init__(self, ranked: RankedRows | KeptRows, ranks: Ids) -> None:
        self._ranked = ranked
        self._arrays = ranked.empty(len(ranks))
        self._ids = ranked.read(ranks, [[array] for array in self._arrays])
        self.edges: Ids = np.array([0, len(ranks)])
        """All its rows count as of one segment."""
        self.n_rows = len(ranks)
        """How many there are."""
        self.rule: str = ranked.rule
        """What chose the rows they are of."""
        self.row_bytes: int = ranked.row_bytes
        """Bytes of a row of all sites."""
        self.n_reads = 0
        """Nothing is read from disk."""
        self.bytes_read = 0
        """Likewise."""

    def empty(self, n_rows: int) -> list[npt.NDArray[Any]]:
        """Return memory for so many rows: an array for each site."""
        return self._ranked.empty(n_rows)

    def row_ids(self, ranks: Ids) -> Ids:
        """Return the row_id of each of some ranks, in any order."""
        return self._ids[ranks]

    def read(self, ranks: Ids, out: Sequence[Sequence[npt.NDArray[Any]]]) -> Ids:
        """Copy rows, each to where it stands in the order given; return their row ids."""
        for array, (target,) in zip(self._arrays, out, strict=True):
            np.take(array, ranks, axis=0, out=target[: len(ranks)], mode="clip")
        return self._ids[ranks]

    def turn_columns(self, rng: np.random.Generator) -> None:
        """Turn every column by an amount of its own, so that a row holds values of many rows.

        No two columns are turned alike unless there are more of them than rows.  Row ids name no
        rows any more.
        """
        width = sum(array.shape[1] for array in self._arrays)
        turns = rng.permutation(max(width, self.n_rows))[:width] % self.n_rows
        done = 0
        for array in self._arrays:
            for first in range(0, array.shape[1], _TURNED_COLUMNS):
                some = slice(first, first + _TURNED_COLUMNS)
                columns = np.ascontiguousarray(array[:, some].T)
                for column, turn in zip(columns, turns[done + first :].tolist(), strict=False):
                    column[:] = np.roll(column, turn)
                array[:, some] = columns.T
            done += array.shape[1]

    def non_finite(self, site: Site, value: float, row_id: int, neuron: int) -> NonFiniteActivation:
        """Return the error that a stored value is no finite number."""
        return self._ranked.non_finite(site, value, row_id, neuron)


def as_tensor(values: npt.NDArray[Any]) -> torch.Tensor:
    """Return stored values as a tensor on the same memory; torch knows no bfloat16 of NumPy."""
    bits = torch.from_numpy(values.view(f"i{values.itemsize}"))
    return bits.view(getattr(torch, values.dtype.name))
