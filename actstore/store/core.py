"""The core store: create, open, publish a plan, commit segments, read rows, keep results.

A store is a folder of facts that are published once and never change: the root metadata, plan
parts, one commit for each stored segment, generations of the compacted index, results.  Readers see
committed segments only and count rows from commits, never from array shapes; what a crash left
behind without a commit is not there.
"""

from __future__ import annotations

import shutil
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from operator import index as as_integer
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from actstore import arrow, durable
from actstore.errors import (
    ArgumentError,
    DamagedFile,
    FormatError,
    NeuronNotFound,
    NotEnoughDisk,
    ResultNotFound,
    RowNotFound,
    SiteNotFound,
    did_you_mean,
)
from actstore.shard import DTYPES, RowStack, ShardLayout
from actstore.site import Site, select, summarize
from actstore.store.facts import Facts
from actstore.store.generations import Generation, latest, latest_prefix
from actstore.store.index_tables import IndexTables
from actstore.store.meta import FIRST, SPECIAL, SiteInfo
from actstore.store.open_shards import OpenShard, OpenShards
from actstore.store.results import Result, ResultWriter
from actstore.store.rows import Rows, SiteRows
from actstore.store.segment_writer import SegmentWriter
from actstore.store.stored_rows import ALL, NONE, is_sample, keep_text, sample_name
from actstore.store.tables import TOKENS, DocumentTables, TokenTables

_SAMPLES = 64  # of at most S / 2 rows, 8 bytes each


class CoreStore(Facts):
    """A store on a local disk.

    Parameters
    ----------
    path : str or Path
        Folder of the store.

    Raises
    ------
    StoreNotFound
        If the folder does not exist or holds no store.
    FormatError
        If its format version is not the one this code reads.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        self.tokens_tables = TokenTables(self.verifier, str(self.path))
        self.documents_tables = DocumentTables(self.verifier, str(self.path))
        self.index_tables = IndexTables(self.verifier, self.path)
        self._infos = {info.site: info for info in self.meta.sites}
        self._layouts: dict[Site, ShardLayout] = {}
        self._shards = OpenShards(self.path)
        self._samples: OrderedDict[str, npt.NDArray[np.int64]] = OrderedDict()
        self._chosen: dict[tuple[str, str], tuple[tuple[int, ...], Rows]] = {}
        self._lock = threading.Lock()  # scans read ahead in a thread of their own

    # -- sites and rows ------------------------------------------------------------------------

    @property
    def sites(self) -> list[Site]:
        """The captured sites, sorted."""
        return [info.site for info in self.meta.sites]

    def select(self, sites: str | Site | Iterable[str | Site] | None) -> list[SiteInfo]:
        """Return the sites that names or patterns stand for; None means all."""
        return [self._infos[site] for site in select(sites, self.sites, str(self.path))]

    def site(self, site: str | Site) -> SiteInfo:
        """Return one site by name.

        Raises
        ------
        SiteNotFound
            If the store does not have it, or the name stands for several.
        """
        found = self.select(site)
        if len(found) != 1:
            raise SiteNotFound(
                f"{str(site)!r} stands for {len(found)} sites of {self.path} "
                f"({summarize(info.site for info in found)}); name one, such as '{found[0].site}'."
            )
        return found[0]

    def __getitem__(self, site: str | Site) -> SiteRows:
        return SiteRows(self, self.site(site))

    def layout(self, info: SiteInfo) -> ShardLayout:
        """Return how the site's array is laid out on disk.

        Raises
        ------
        RowNotFound
            If the site keeps no rows, and so has no array.
        """
        if info.keep == NONE:
            raise self.not_stored(info)
        if info.site not in self._layouts:
            path = self.path / info.path / "zarr.json"
            if not path.exists():
                raise DamagedFile(f"{path} is missing; the plan of {self.path} is not complete.")
            layout = ShardLayout.from_zarr_metadata(durable.read_json(path))
            if (layout.width, layout.dtype, layout.rows) != (
                info.width,
                info.dtype,
                self.meta.layout(info).rows,
            ):
                raise FormatError(f"{path} does not agree with the metadata of {self.path}.")
            self._layouts[info.site] = layout
        return self._layouts[info.site]

    def check_neuron(self, info: SiteInfo, neuron: int) -> int:
        """Return the index of a neuron as an int.

        Raises
        ------
        ArgumentError
            If it is no integer.
        NeuronNotFound
            If the site has no such neuron.
        """
        try:
            number = as_integer(neuron)
        except TypeError:
            raise ArgumentError(f"neuron = {neuron!r}; expected an integer.") from None
        if not 0 <= number < info.width:
            raise NeuronNotFound(
                f"neuron = {number} is not at {info.site} of {self.path}; it has neurons "
                f"0 … {info.width - 1}."
            )
        return number

    def check_row(self, row_id: int, space: str = "") -> None:
        """Raise `RowNotFound` unless the row is committed."""
        segment, offset = divmod(row_id, self.meta.segment_rows)
        planned = self.planned.get(segment)
        if row_id < 0 or planned is None or offset >= planned.rows.get(space, 0):
            raise RowNotFound(
                f"row_id = {row_id} is a hole of {self.path}: no token was planned there. Row ids "
                "are not dense; take them from `tokens`, `top`, or store[site].row_ids()."
            )
        if segment not in self._stored:
            raise RowNotFound(
                f"row_id = {row_id} is planned but not captured yet in {self.path}. Run the same "
                "capture again to go on with it, or store.refresh() if it is running."
            )

    def _site_shard(self, info: SiteInfo, segment: int) -> OpenShard:
        self._check_committed(segment)
        layout = self.layout(info)
        facts = self.commit_of(segment).files[f"{info.path}/c/{segment}/0"]
        return self._shards.get(info.path, segment, layout, facts)

    def stored_offsets(self, info: SiteInfo, segment: int) -> npt.NDArray[np.int64]:
        """Return the offsets of a committed segment whose rows are stored at a site, ascending.

        Row ``i`` of the segment's shard is the row at offset ``stored_offsets[i]``.
        """
        if info.keep == ALL:
            return np.arange(self.planned[segment].rows.get(info.site.space, 0), dtype=np.int64)
        if info.keep == NONE:
            return np.empty(0, dtype=np.int64)
        self._check_committed(segment)
        name = sample_name(info.site.space, info.keep, segment)
        with self._lock:
            if name not in self._samples:
                self.verifier.check({name: self.commit_of(segment).files[name]})
                offsets = durable.read_array(self.path / name)
                self._samples[name] = offsets.astype(np.int64)
                if len(self._samples) > _SAMPLES:
                    self._samples.popitem(last=False)
            self._samples.move_to_end(name)
            return self._samples[name]

    def positions(
        self, info: SiteInfo, segment: int, offsets: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int64]:
        """Return where rows lie in a segment's shard, given their offsets in the segment.

        Raises
        ------
        RowNotFound
            If a row is not stored at the site.
        """
        if info.keep == ALL:
            return offsets
        stored = self.stored_offsets(info, segment)
        places = np.searchsorted(stored, offsets)
        found = places < len(stored)
        found[found] = stored[places[found]] == offsets[found]
        if not found.all():
            row_id = segment * self.meta.segment_rows + int(offsets[~found][0])
            raise self.not_stored(info, row_id)
        return places

    def not_stored(self, info: SiteInfo, row_id: int | None = None) -> RowNotFound:
        """Return the error that a row is not stored at a site, or that none are."""
        if info.keep == NONE:
            what = f"no rows of {info.site} are stored in {self.path} (keep = 'none')"
        else:
            what = (
                f"row_id = {row_id} is not stored at {info.site} of {self.path}, which keeps "
                f"{keep_text(info.keep)} of the content rows: those that "
                f"store[{str(info.site)!r}].row_ids() names"
            )
        return RowNotFound(
            f"{what}. store.replay(rows, sites) computes any rows again from the stored tokens."
        )

    def rows_stored(self, rows: Rows, infos: Sequence[SiteInfo]) -> Rows:
        """Return those of some committed rows that are stored at all of some sites of one space.

        Raises
        ------
        ArgumentError
            If one of the sites stores no rows.
        """
        least = min(infos, key=lambda info: info.keep)
        if least.keep == ALL:
            return rows
        if least.keep == NONE:
            unkept = summarize(info.site for info in infos if info.keep == NONE)
            kept = summarize(info.site for info in self.meta.kept_sites) or "none"
            raise ArgumentError(
                f"sites = {unkept}: no rows of them are stored in {self.path} (keep = 'none'); "
                f"expected sites that store rows, which are: {kept}. Capture into a new store with "
                "keep='all' or a fraction such as keep='1/64' (--keep 1/64)."
            )

        def masks() -> Iterator[tuple[int, npt.NDArray[np.bool_]]]:
            for segment in rows.segments:
                mask = np.zeros(self.meta.segment_rows, dtype=np.bool_)
                # Samples are nested: what the smallest has, all have.
                mask[self.stored_offsets(least, segment)] = True
                wanted = np.zeros_like(mask)
                wanted[rows.offsets(segment)] = True
                yield segment, mask & wanted

        rule = f"{rows.rule}, {keep_text(least.keep)} of the content rows stored"
        found = Rows.from_masks(rule, rows.segment_rows, masks())
        return rows if found.n_rows == rows.n_rows else found

    def _check_committed(self, segment: int) -> None:
        if segment not in self._stored:
            raise RowNotFound(
                f"segment {segment} of {self.path} is not captured yet. Run the same capture again."
            )

    def read(
        self,
        info: SiteInfo,
        segment: int,
        start: int,
        stop: int,
        out: npt.NDArray[Any] | None = None,
    ) -> npt.NDArray[Any]:
        """Return rows ``start … stop`` of a segment's shard, ``(rows, width)``, stored dtype.

        Where all rows are kept these are offsets in the segment; else see `positions`.
        """
        shard = self._site_shard(info, segment)  # held: the file closes with the last reference
        return shard.reader.read_rows(start, stop, out=out)

    def scatter(
        self,
        info: SiteInfo,
        segment: int,
        rows: npt.NDArray[np.int64],
        stack: RowStack,
        places: npt.NDArray[np.int64],
    ) -> tuple[int, int]:
        """Read rows of a segment's shard, ascending, each into a place of a stack of its own.

        Return reads and bytes.  Where not all rows are kept, `positions` says what rows they are.
        """
        shard = self._site_shard(info, segment)
        return shard.reader.scatter(rows, stack, places)

    def read_column(self, info: SiteInfo, segment: int, neuron: int) -> npt.NDArray[Any]:
        """Return one neuron over the rows of a segment's shard, ``(rows,)``, stored dtype."""
        rows = self.planned[segment].rows[info.site.space]
        if is_sample(info.keep):
            rows = len(self.stored_offsets(info, segment))
            if not rows:  # and so no shard
                return np.empty(0, DTYPES[info.dtype])
        shard = self._site_shard(info, segment)
        return shard.reader.read_column(neuron, 0, rows)

    def read_column_of_bands(
        self,
        info: SiteInfo,
        segment: int,
        neuron: int,
        bands: Sequence[int],
        out: npt.NDArray[Any] | None = None,
    ) -> npt.NDArray[Any]:
        """Return one neuron over some bands of a segment's shard, ``(bands, chunk_rows)``.

        NaN where a band goes on beyond the last row.
        """
        shard = self._site_shard(info, segment)
        return shard.reader.read_column_of_bands(neuron, bands, out)

    def token_column(self, segment: int, name: str, space: str = "") -> npt.NDArray[Any]:
        """Return one column of the token index of a planned segment, ``(rows,)``, in row order."""
        return self.token_columns(segment, [name], space)[0]

    def token_columns(
        self,
        segment: int,
        names: Sequence[str],
        space: str = "",
        start: int = 0,
        stop: int | None = None,
    ) -> list[npt.NDArray[Any]]:
        """Return columns of the token index at offsets ``start … stop`` of a planned segment.

        Reads these columns of the row groups that the rows lie in; by default of all rows.
        """
        planned = self.planned[segment]
        first, n_rows = self._first_place(segment, space), planned.rows.get(space, 0)
        stop = n_rows if stop is None else min(stop, n_rows)
        part = self.parts[planned.part]
        return self.tokens_tables.columns(part, names, first + start, first + stop, space)

    def token_values(
        self, row_ids: npt.NDArray[np.int64], names: Sequence[str], space: str = ""
    ) -> list[npt.NDArray[Any]]:
        """Return columns of the token index at planned rows, in their order.

        Reads these columns of the row groups that the rows lie in.
        """
        segments, offsets = np.divmod(row_ids, self.meta.segment_rows)
        known, which = np.unique(segments, return_inverse=True)
        firsts = [self._first_place(segment, space) for segment in known.tolist()]
        parts = np.array([self.planned[segment].part for segment in known.tolist()], np.int64)[
            which
        ]
        places = np.array(firsts, np.int64)[which] + offsets
        found = [
            np.empty(len(row_ids), TOKENS.field(name).type.to_pandas_dtype()) for name in names
        ]
        for number in np.unique(parts).tolist():
            mine = np.flatnonzero(parts == number)
            values = self.tokens_tables.values(self.parts[number], names, places[mine], space)
            for column, of_part in zip(found, values, strict=True):
                column[mine] = of_part
        return found

    def _first_place(self, segment: int, space: str) -> int:
        """Return the place of a planned segment's first row in the tokens of its part."""
        places = self._places.setdefault(space, {})
        if segment not in places:
            part = self.parts[self.planned[segment].part]
            counts = [s.rows.get(space, 0) for s in part.segments]
            starts = np.cumsum([0, *counts]).tolist()
            places |= {s.segment: n for s, n in zip(part.segments, starts, strict=False)}
        return places[segment]

    def tokens(self, segment: int, space: str = "") -> pa.Table:
        """Return the token index of a planned segment, in row order."""
        planned = self.planned[segment]
        first = segment * self.meta.segment_rows
        stop = first + planned.rows.get(space, 0)
        return self.tokens_tables.span(self.parts[planned.part], first, stop, space)

    def tokens_of(self, row_ids: npt.ArrayLike, space: str = "") -> pa.Table:
        """Return the token index of the given rows, in their order."""
        ids = np.asarray(row_ids, dtype=np.int64)
        segments, which = np.unique(ids // self.meta.segment_rows, return_inverse=True)
        for i, segment in enumerate(segments.tolist()):
            if segment not in self.planned:
                self.check_row(int(ids[which == i][0]), space)
        part_of = np.array([self.planned[s].part for s in segments.tolist()], np.int64)[which]
        order = np.argsort(part_of, kind="stable")
        pieces = [
            self.tokens_tables.rows(self.parts[int(p)], ids[order][part_of[order] == p], space)
            for p in np.unique(part_of)
        ]
        back = np.empty(len(order), dtype=np.int64)
        back[order] = np.arange(len(order))
        return arrow.take(pa.concat_tables(pieces), back) if pieces else arrow.empty(TOKENS)

    def windows(self, segment: int) -> pa.Table:
        """Return the windows of a planned segment, in row order."""
        part = self.parts[self.planned[segment].part]
        name = part.file("windows")
        self.verifier.check({name: part.files[name]})
        return durable.read_table(self.path / name, where=("segment", segment))

    def document(self, document: int) -> dict[str, Any]:
        """Return a document: number, source, n_tokens, text and metadata (JSON)."""
        return self.documents_tables.row(self.parts, document)

    def sources(self, documents: npt.NDArray[np.int64]) -> list[str]:
        """Return where documents came from, in their order, without reading their texts."""
        return self.documents_tables.sources(self.parts, documents)

    @property
    def n_documents(self) -> int:
        """Number of planned documents."""
        return sum(part.n_documents for part in self.parts)

    def rows(self, rule: str = "content", space: str | None = None) -> Rows:
        """Return the committed rows: ``"content"`` (neither special nor first) or ``"all"``."""
        if rule not in ("content", "all"):
            raise ArgumentError(f"rows = {rule!r} is not 'content' or 'all'.")
        space = self.meta.spaces[0] if space is None else space
        committed = self.committed
        if (rule, space) in self._chosen and self._chosen[rule, space][0] == committed:
            return self._chosen[rule, space][1]

        def masks() -> Iterator[tuple[int, npt.NDArray[np.bool_]]]:
            for segment in committed:
                n_rows = self.planned[segment].rows.get(space, 0)
                if rule == "all":
                    yield segment, np.ones(n_rows, dtype=np.bool_)
                else:
                    flags = self.token_column(segment, "flags", space)
                    yield segment, (flags & (SPECIAL | FIRST)) == 0

        found = Rows.from_masks(rule, self.meta.segment_rows, masks())
        self._chosen[rule, space] = (committed, found)  # a bit a row, against reading all tokens
        return found

    # -- the compacted index -------------------------------------------------------------------

    def index(self) -> Generation | None:
        """Return the newest whole generation of the compacted index, or None.

        Raises
        ------
        DamagedFile
            If it covers a segment whose commit is missing.
        """
        generation = latest(self.path)
        if generation is not None and not set(generation.covers) <= set(self.committed):
            self.refresh()  # another process may have gone on since
            if missing := sorted(set(generation.covers) - set(self.committed)):
                raise DamagedFile(
                    f"{generation.folder} of {self.path} covers segment {missing[0]}, whose commit "
                    f"commits/{missing[0]:08d}.json is missing. Restore it from a copy, or run the "
                    "same capture again."
                )
        return generation

    def prefix_index(self) -> Generation | None:
        """Return the newest generation that covers segments 0 … n without a gap, or None."""
        return latest_prefix(self.path)

    def compaction_lock(self) -> Any:
        """Hold the right to publish an index generation."""
        return durable.lock(self.path / "work" / "index.lock", f"the index of {self.path}", True)

    # -- results -------------------------------------------------------------------------------

    def new_result(
        self, kind: str, name: str | None, provenance: Mapping[str, Any]
    ) -> ResultWriter:
        """Return a writer of a result; its name must be new.

        Raises
        ------
        ResultExists
            If the name is taken.
        ArgumentError
            If the name is not a plain word.
        """
        generation = self.index()
        return ResultWriter(
            self.path,
            kind,
            name,
            {
                **provenance,
                "store_id": self.meta.store_id,
                "index_generation": generation.number if generation else None,
                "committed": len(self.committed),
            },
        )

    def results(self, kind: str | None = None) -> list[Result]:
        """Return the whole results of a kind, or of all kinds, oldest first."""
        folder = self.path / "results"
        found = [
            Result(self.path, path.parent.parent.name, path.parent.name)
            for path in folder.glob("*/*/result.json")
            if not path.parent.name.startswith(".") and kind in (None, path.parent.parent.name)
        ]
        return sorted(found, key=lambda result: (str(result.document["created"]), result.name))

    def result(self, kind: str, name: str | None = None) -> Result:
        """Return a result by name; without one, the newest of its kind.

        Raises
        ------
        ResultNotFound
            If there is none.
        """
        found = self.results(kind)
        for result in found:
            if result.name == name:
                return result
        if name is None and found:
            return found[-1]
        names = [result.name for result in found]
        raise ResultNotFound(
            f"{self.path} has no {kind} result"
            + (f" {name!r}; it has {', '.join(names) or 'none'}." if name is not None else " yet.")
            + f"{did_you_mean(str(name), names)} Compute one with `actstore {kind} {self.path}`."
        )

    def read_scores(self, result: Result, array: str, segment: int) -> npt.NDArray[Any]:
        """Return a result's values at the rows of a segment, ``(rows, columns)``.

        Where its sites do not store all rows it has values for those only, and NaN for the others.
        """
        layout = result.layout(array)
        name = f"{array}/c/{segment}/0"
        path = result.path.relative_to(self.path).as_posix()
        shard = self._shards.get(f"{path}/{array}", segment, layout, result.files[name])
        rows = self.planned[segment].rows[result.document.get("space", "")]
        infos = [self.site(site) for site in result.document.get("sites", ())]
        least = min(infos, key=lambda info: info.keep, default=None)
        if least is None or least.keep == ALL:
            return shard.reader.read_rows(0, rows)
        stored = self.stored_offsets(least, segment)
        values = np.full((rows, layout.width), np.nan, layout.numpy_dtype)
        if len(stored):
            values[stored] = shard.reader.read_rows(0, len(stored))
        return values

    def write_segment(self, segment: int) -> SegmentWriter:
        """Return a writer that holds the segment's lock; see `SegmentWriter`."""
        return SegmentWriter(self, self.planned[segment])

    def n_bytes(self) -> int:
        """Return the bytes of the committed activations, as their commits say."""
        return sum(
            facts.n_bytes
            for segment in self.committed
            for name, facts in self.commit_of(segment).files.items()
            if name.startswith("activations/")
        )

    def free_bytes(self) -> int:
        """Return the bytes free on the store's disk."""
        return shutil.disk_usage(self.path).free

    def check_disk(self, n_bytes: int, what: str, remedy: str) -> None:
        """Refuse to write what the store's disk cannot hold, before it is computed.

        Raises
        ------
        NotEnoughDisk
            If so many bytes are not free.
        """
        free = self.free_bytes()
        if n_bytes > free:
            raise NotEnoughDisk(
                f"{what} {self.path} needs {n_bytes:,} bytes and {free:,} are free there. {remedy}"
            )
