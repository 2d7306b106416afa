"""A permuted copy: rows of some sites in random order on disk, for trainers that read in order.

Out of core, in two passes.  Every row draws a random key; sorted by key, rows are in a uniformly
random order.  The first pass reads the store in row order and scatters rows, by the leading part of
their key, to as many *spill* files as it takes for each to fit in memory; the second sorts one
spill after the other and writes it.  Keys follow from the seed and a row's rank alone, so the copy
is the same whatever the budget.

The copy is a Zarr v3 group that takes its name, whole, in one rename: an array of each site, named
like it, and ``row_ids``, which says where each row came from.

References
----------
Rao, C. R. (1961). Generation of random permutations of given number of elements using random
sampling numbers. Sankhyā A 23, 305–307.  Sandelius, M. (1962). A simple randomization procedure.
Journal of the Royal Statistical Society B 24, 472–481.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from actstore import durable
from actstore.decompose.ranked import RankedRows
from actstore.decompose.scan import chosen_rows
from actstore.errors import BudgetExceeded, NotEnoughDisk, ResultExists
from actstore.shard import ShardLayout, ShardWriter, to_band
from actstore.shard.checksum import encoded, extend
from actstore.site import Site, summarize
from actstore.store import CoreStore, Rows, SiteInfo
from actstore.store.budget import Progress, parse_budget

_SHARD_ROWS = 1 << 16
_CHUNK_ROWS = (64, 4096)  # least and most
_SPILL_BYTES = 1 << 27  # at most: fresh memory costs more than what is done with it
_PIECE_BYTES = 1 << 26  # read at once, or more so that each spill is given enough to write
_APPEND_BYTES = 1 << 20
_OVERHEAD_BYTES = 16 * 2**20  # a chunk being verified, the interpreter's own


def shuffle(
    store: CoreStore,
    sites: str | Site | Iterable[str | Site] | None,
    to: str | Path,
    *,
    rows: Rows | str = "content",
    seed: int = 0,
    budget: int | str | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write a uniformly permuted copy of the rows of some sites.

    Cost: the rows are read once, spilled once and written once; while it runs, the disk holds a
    spill or two more than the copy, at most twice as much.  The copy is the same for the same
    committed rows and seed.

    Parameters
    ----------
    store : CoreStore
        The store; the segments committed now are used.
    sites : str, Site, iterable of these, or None
        Sites of one space, as names or patterns; None means all.
    to : str or Path
        A new folder.  ``zarr.open_group(to)`` has an array ``(rows, width)`` for each site, in its
        stored dtype, and the array ``row_ids``, int64.
    rows : Rows or str, default "content"
        The rows to copy: ``"content"``, ``"all"``, or a set of rows.
    seed : int, default 0
        Decides the order.
    budget : int or str, optional
        Memory it may take, in bytes or as ``"2GB"``; by default the smaller of 4 GiB and half of
        what is free.
    progress : callable, optional
        Called with (stage, rows done, rows in all).

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    ResultExists
        If there is something at `to`.
    StoreBusy
        If another process is writing there.
    ArgumentError
        If `rows` chooses none, or the sites are of two spaces.
    SiteNotFound
        If the store does not have a site.
    BudgetExceeded, NotEnoughDisk
        If memory or disk do not suffice; nothing is written then.
    NonFiniteActivation
        If a row holds NaN.

    See Also
    --------
    actstore.decompose.Loader : mixed batches without a copy.
    """
    to = Path(to).absolute()
    infos = store.select(sites)
    ranked = RankedRows(store, infos, chosen_rows(store, rows, infos))
    copy = _Copy(to, infos, ranked.n_rows, parse_budget(budget))
    _refuse_taken(to)
    copy.refuse_too_large()
    durable.make_folder(to.parent)
    lock_file = to.with_name(f".{to.name}.lock")
    with durable.lock(lock_file, f"the permuted copy {to}"):
        _refuse_taken(to)  # whoever held the lock may have finished it
        try:
            copy.scatter(ranked, np.random.default_rng(seed), progress)
            copy.gather(progress)
            copy.publish(
                {
                    "store_id": store.meta.store_id,
                    "model": store.meta.model["name"],
                    "sites": [str(info.site) for info in infos],
                    "rows": ranked.rule,
                    "n_rows": ranked.n_rows,
                    "seed": seed,
                }
            )
        finally:
            shutil.rmtree(copy.folder, ignore_errors=True)
        lock_file.unlink()  # whoever still waits for it finds the copy
    return to


def _refuse_taken(to: Path) -> None:
    if to.exists():
        raise ResultExists(
            f"{to} exists, and a permuted copy is never written over. Name a new folder, or delete "
            "it."
        )


class _Copy:
    """The copy being written, in a folder beside the one it will be."""

    def __init__(self, to: Path, infos: Sequence[SiteInfo], n_rows: int, budget_bytes: int) -> None:
        self._to = to
        self._n_rows = n_rows
        self.folder = durable.partial_of(to)
        self._record = np.dtype(
            [("key", "<u8"), ("row_id", "<i8")]
            + [(str(info.site), f"V{info.row_bytes}") for info in infos]
        )
        self._row_bytes = self._record.itemsize
        free = budget_bytes - _OVERHEAD_BYTES
        # The second pass holds a spill in half of it, and a band as read, as rows and as chunks.
        chunk_rows = free // (8 * self._row_bytes)
        if chunk_rows < _CHUNK_ROWS[0]:
            needed = _OVERHEAD_BYTES + 8 * self._row_bytes * _CHUNK_ROWS[0]
            raise BudgetExceeded(
                f"{summarize(info.site for info in infos)} ({self._row_bytes:,} bytes a row) needs "
                f"at least {needed:,} bytes to permute, and the budget is {budget_bytes:,}. Pass "
                f"budget={needed} or more, or fewer sites."
            )
        chunk_rows = min(1 << (chunk_rows.bit_length() - 1), _CHUNK_ROWS[1])
        shard_rows = min(1 << (n_rows - 1).bit_length(), _SHARD_ROWS)
        self._chunk_rows = min(chunk_rows, shard_rows)
        self._arrays = {
            str(info.site): _SiteArray(
                self.folder / str(info.site),
                ShardLayout.for_width(info.width, shard_rows, info.dtype, self._chunk_rows),
            )
            for info in infos
        }
        self._row_ids = _IdsArray(self.folder / "row_ids", shard_rows)
        spill_rows = min(free // 2, _SPILL_BYTES) // self._row_bytes
        # Two thirds full on average: the fullest is then six standard deviations from its limit.
        self._n_spills = 1 if n_rows <= spill_rows else -(-3 * n_rows // (2 * spill_rows))
        # The first pass holds a piece, and half a dozen numbers of each of its rows.
        piece_bytes = min(free // 4, max(_PIECE_BYTES, self._n_spills * _APPEND_BYTES))
        self._piece_rows = min(piece_bytes // self._row_bytes, n_rows)

    def refuse_too_large(self) -> None:
        """Raise unless the disk holds all rows, and once more those of the largest spill."""
        n_spills = self._n_spills
        needed = self._n_rows * self._row_bytes * (n_spills + min(2, n_spills)) // n_spills
        parent = next(folder for folder in self._to.parents if folder.exists())
        free = shutil.disk_usage(parent).free
        if needed > free:
            raise NotEnoughDisk(
                f"permuting {self._n_rows:,} rows into {self._to} needs {needed:,} bytes while it "
                f"runs, and {free:,} are free there. Free some, name a folder on another disk, or "
                "give fewer sites or rows=..."
            )

    def _spill(self, number: int) -> Path:
        return self.folder / "spills" / str(number)

    def scatter(
        self, ranked: RankedRows, rng: np.random.Generator, progress: Progress | None
    ) -> None:
        """Read all rows in order, and append each to the spill its key says."""
        if self.folder.exists():  # left by a process that died
            shutil.rmtree(self.folder)
        durable.make_folder(self._spill(0).parent)
        memory = np.empty(self._piece_rows, self._record)
        sites = [[_values(memory, name, array.layout)] for name, array in self._arrays.items()]
        for start in range(0, self._n_rows, self._piece_rows):
            ranks = np.arange(start, min(start + self._piece_rows, self._n_rows))
            keys = rng.integers(0, 2**64, len(ranks), dtype=np.uint64)
            numbers = (keys >> np.uint64(32)) * np.uint64(self._n_spills) >> np.uint64(32)
            order = np.argsort(numbers, kind="stable")
            records = memory[: len(ranks)]
            records["key"] = keys[order]
            records["row_id"] = ranked.read(ranks[order], sites)
            edges = np.searchsorted(numbers[order], np.arange(self._n_spills + 1))
            for number in np.flatnonzero(np.diff(edges)):
                with self._spill(int(number)).open("ab") as file:
                    file.write(records[edges[number] : edges[number + 1]].view(np.uint8).data)
            if progress:
                progress("scatter", int(ranks[-1]) + 1, self._n_rows)

    def gather(self, progress: Progress | None) -> None:
        """Sort one spill after the other, and write their rows."""
        done = 0
        for band in self._bands():
            self._row_ids.write(band["row_id"])
            for name, array in self._arrays.items():
                array.write(band[name])
            done += len(band)
            if progress:
                progress("gather", done, self._n_rows)
        self._row_ids.finish(self._n_rows)
        for array in self._arrays.values():
            array.finish(self._n_rows)

    def _bands(self) -> Iterator[npt.NDArray[np.void]]:
        """Yield the rows in order, a band at a time; valid until the next."""
        band = np.empty(self._chunk_rows, self._record)
        sizes = [path.stat().st_size for path in self._spill(0).parent.iterdir()]
        memory = np.empty(max(sizes) // self._row_bytes, self._record)
        filled = 0
        for number in range(self._n_spills):
            if not self._spill(number).exists():
                continue
            with self._spill(number).open("rb") as file:
                n_bytes = file.readinto(memory.view(np.uint8).data)
            records = memory[: n_bytes // self._row_bytes]
            order = np.argsort(records["key"], kind="stable")
            start = 0
            while start < len(order):
                part = order[start : start + self._chunk_rows - filled]
                band[filled : filled + len(part)] = records[part]
                filled += len(part)
                start += len(part)
                if filled == self._chunk_rows:
                    yield band
                    filled = 0
            self._spill(number).unlink()
        if filled:
            yield band[:filled]

    def publish(self, attributes: dict[str, Any]) -> None:
        """Say what the copy is, and give it its name.

        Raises
        ------
        ResultExists
            If another process took the name meanwhile.
        """
        self._spill(0).parent.rmdir()
        group = {
            "zarr_format": 3,
            "node_type": "group",
            "attributes": {"actstore_shuffle": attributes},
        }
        durable.replace(self.folder / "zarr.json", durable.to_json(group))
        _refuse_taken(self._to)
        self.folder.rename(self._to)
        durable.sync_folder(self._to.parent)


class _SiteArray:
    """Writes a Zarr array of one site, band by band, each shard durable when it is full."""

    def __init__(self, folder: Path, layout: ShardLayout) -> None:
        self._folder = folder
        self.layout = layout
        """How the rows lie in a shard."""
        self._n_shards = 0
        self._n_bands = 0
        self._file: BinaryIO | None = None

    def write(self, rows: npt.NDArray[np.void]) -> None:
        """Append rows, given as their bytes; only the last time fewer than a band."""
        if self._file is None:
            self._path = self._folder / f"c/{self._n_shards}/0"
            durable.make_folder(self._path.parent)
            self._file = durable.partial_of(self._path).open("wb", buffering=0)
            self._writer = ShardWriter(self._file, self.layout)
        values = np.ascontiguousarray(rows).view(self.layout.numpy_dtype)
        self._writer.write_band(to_band(values.reshape(len(rows), -1), self.layout))
        self._n_bands += 1
        if self._n_bands == self.layout.n_row_chunks:
            self._finish_shard()

    def _finish_shard(self) -> None:
        if self._file is not None:
            self._writer.finish()
            self._file.close()
            durable.publish(durable.partial_of(self._path), self._path)
            self._file, self._n_bands = None, 0
            self._n_shards += 1

    def finish(self, n_rows: int) -> None:
        """Write what is open, and the array's metadata."""
        self._finish_shard()
        document = self.layout.zarr_metadata(self._n_shards, {})
        document["shape"] = [n_rows, self.layout.width]  # the last shard hangs over
        durable.replace(self._folder / "zarr.json", durable.to_json(document))


class _IdsArray:
    """Writes a Zarr array of row ids."""

    def __init__(self, folder: Path, chunk_rows: int) -> None:
        self._folder = folder
        self._chunk = np.full(chunk_rows, -1, "<i8")
        self._n_chunks = 0
        self._filled = 0

    def write(self, ids: npt.NDArray[np.int64]) -> None:
        """Append ids; chunks hold whole bands."""
        self._chunk[self._filled : self._filled + len(ids)] = ids
        self._filled += len(ids)
        if self._filled == len(self._chunk):
            self._finish_chunk()

    def _finish_chunk(self) -> None:
        if self._filled:
            self._chunk[self._filled :] = -1
            durable.make_folder(self._folder / "c")
            data = self._chunk.tobytes()
            durable.replace(self._folder / f"c/{self._n_chunks}", data + encoded(extend(data)))
            self._n_chunks, self._filled = self._n_chunks + 1, 0

    def finish(self, n_rows: int) -> None:
        """Write what is open, and the array's metadata."""
        self._finish_chunk()
        document = {
            "zarr_format": 3,
            "node_type": "array",
            "shape": [n_rows],
            "data_type": "int64",
            "chunk_grid": {
                "name": "regular",
                "configuration": {"chunk_shape": [len(self._chunk)]},
            },
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": -1,
            "codecs": [
                {"name": "bytes", "configuration": {"endian": "little"}},
                {"name": "crc32c"},
            ],
            "attributes": {},
        }
        durable.replace(self._folder / "zarr.json", durable.to_json(document))


def _values(records: npt.NDArray[np.void], name: str, layout: ShardLayout) -> npt.NDArray[Any]:
    """Return a field that holds rows as bytes, as an array of rows on the same memory."""
    first = records.dtype.fields[name][1] if records.dtype.fields else 0
    return np.ndarray(
        (len(records), layout.width),
        layout.numpy_dtype,
        records.view(np.uint8).data,
        first,
        (records.itemsize, layout.itemsize),
    )
