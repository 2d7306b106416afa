"""The worker: runs the model once over every window and leaves committed segments behind.

    batches of neighbouring windows -> forward, hooks -> bands -> folds -> writer thread -> commit

The hooks cast and re-lay activations straight into a *band* (`actstore.capturing.bands`).  When all
its rows are there it is folded, where the model runs, and the writer thread appends it to the
site's shard, or picks from it the rows that are kept.  Folds wait for the end of the batch, or
until the model needs a band and none is left: memory that is short costs some time, as the threads
of the model and of the folds get in each other's way where they take turns.

Batches follow from the plan alone, bands are folded in row order, and commits happen in segment
order, so what is written does not depend on timing.
"""

from __future__ import annotations

import queue
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from actstore import arrow
from actstore.capturing.allocator import freed_memory_kept, give_back, resident_bytes
from actstore.capturing.bands import (
    Band,
    DeviceBands,
    Folds,
    HostBands,
    bands_bytes,
    bands_of,
    n_bands,
)
from actstore.capturing.batches import Batch, batches
from actstore.capturing.compact import compact, needs_compaction
from actstore.capturing.lists import SAMPLE, TOPK, RunningLists, SiteLists, pack_site
from actstore.capturing.sampled import SampledBands, sampled_bytes
from actstore.errors import BudgetExceeded, NonFiniteActivation, StoreBusy
from actstore.folds.cpu import state_bytes
from actstore.folds.passes import SiteFolds, SiteThresholds
from actstore.models import LanguageModel
from actstore.site import Site
from actstore.store import FIRST, SPECIAL, CoreStore, SegmentWriter, SiteCounts, SiteInfo, StoreMeta
from actstore.store.budget import Progress
from actstore.store.stored_rows import is_sample

OnFault = Literal["error", "count"]

# Per place of a running list, and of one that is taken in: the value in the top, the bottom and
# the window list.
_LIST_BYTES = 2 * 3 * 4
# Of the budget that a capture may grow into before free memory is given back: it is looked at after
# a batch, which has gone further meanwhile.
_KEPT_SHARE = 7 / 8
# Segments whose states are held at a time.
_UNDER_WAY = 2
# A wait that is less than this part of the time is no bottleneck.
_WAITING_SHARE = 0.1


@dataclass
class Timing:
    """Seconds the stages of a capture took; they overlap."""

    forward: float = 0.0
    """Model and hooks, with the copy into bands."""
    folds: float = 0.0
    """The pass over bands; on a GPU, the wait for the model that fills them is in it."""
    waiting: float = 0.0
    """The model's wait for what the disk has not given back yet: a free band, or a commit."""
    planning: float = 0.0
    """The model's wait for a part of the plan."""
    writing: float = 0.0
    """The writer thread at work."""
    committing: float = 0.0
    """What of that were commits: lists and statistics written, files synced."""
    n_positions: int = 0
    """Positions that went through the model; not seconds, but what they were spent on."""
    n_padding: int = 0
    """Those of them that held no token."""

    @property
    def padding(self) -> float:
        """Share of the positions that held no token."""
        return self.n_padding / max(self.n_positions, 1)

    @property
    def bottleneck(self) -> str:
        """What a faster capture needs first: ``"compute"``, ``"disk"`` or ``"tokenise"``.

        A stage beside the model is the bottleneck once the model waits for it.
        """
        whole = self.forward + self.folds + self.waiting + self.planning
        for stage, seconds in (("disk", self.waiting), ("tokenise", self.planning)):
            if seconds > _WAITING_SHARE * whole and seconds == max(self.waiting, self.planning):
                return stage
        return "compute"

    def __str__(self) -> str:
        return (
            f"seconds    forward {self.forward:,.1f}, folds {self.folds:,.1f}, waiting for the "
            f"disk {self.waiting:,.1f}, for the plan {self.planning:,.1f}; beside the model: "
            f"writing {self.writing:,.1f}, of that commits {self.committing:,.1f}\n"
            f"padding    {self.padding:.1%} of the positions\n"
            f"bottleneck {self.bottleneck}"
        )


class _Folded(NamedTuple):
    """A band on its way to the disk."""

    work: _SegmentWork
    info: SiteInfo
    first: int
    """Offset of its first row in the segment."""
    band: Band


@dataclass
class _SegmentWork:
    """A segment on its way through the pipeline."""

    segment: int
    writer: SegmentWriter
    folds: Folds
    content: npt.NDArray[np.int64]
    others: npt.NDArray[np.int64]
    windows: npt.NDArray[np.int64]
    """The window_id of each content row."""
    rows: int
    relied_on: list[int]
    leave: ExitStack
    thresholds: Mapping[Site, SiteThresholds] = field(default_factory=dict)
    """What the rows of the batch under way must reach."""
    open_bands: dict[int, Band] = field(default_factory=dict)
    """The band that each site's next rows go to, by the index of the site."""
    whole_bands: list[tuple[int, int, Band]] = field(default_factory=list)
    """Bands whose rows are all there, to be folded: number of the band, index of the site."""
    filled: int = 0
    is_through: bool = False
    """Whether nothing is left to do but to write and to commit it."""
    abandoned: bool = False


def list_bytes(infos: Iterable[SiteInfo], n_bands: int, grams: Collection[str]) -> int:
    """Return the bytes the folds of some sites take during a capture.

    They are the states of two segments under way, of `n_bands` bands each, and the running lists;
    of sites named in `grams`, Gram matrices too.
    """
    return sum(
        _UNDER_WAY
        * state_bytes(
            info.width, info.dtype, TOPK.k, SAMPLE.n_rows, n_bands, str(info.site) in grams
        )
        + info.width * TOPK.k * _LIST_BYTES
        for info in infos
    )


def spare_bands(meta: StoreMeta, budget: int) -> int:
    """Return how many bands of a kind a capture may hold within a budget, beside one for each site.

    Raises
    ------
    BudgetExceeded
        If not even one fits.
    """

    def needed(n_spare: int) -> int:
        return beside + bands_bytes(meta, n_bands(meta.sites, n_spare))

    lists = list_bytes(meta.sites, meta.segment_rows // meta.chunk_rows, meta.grams)
    # The model's own activations, of all layers at the most.
    batch = meta.batch_tokens * meta.row_bytes
    beside = lists + sampled_bytes(meta) + batch
    if needed(1) > budget:
        raise BudgetExceeded(
            f"capturing {len(meta.sites)} sites needs {needed(1) / 1e6:,.0f} MB (a batch of "
            f"{meta.batch_tokens} tokens, {batch / 1e6:,.0f} MB, bands of {meta.chunk_rows} rows, "
            f"{(needed(1) - beside) / 1e6:,.0f} MB, and the folds); the budget is "
            f"{budget / 1e6:,.0f} MB. Give a larger budget= (--budget), a smaller batch_tokens= "
            "(--batch-tokens), or fewer sites= (--sites)."
        )
    # More than two for each site there never are.
    return bisect_right(range(2 * len(meta.sites) + 1), budget, key=needed) - 1


class Worker:
    """Captures segments of a planned store.

    Parameters
    ----------
    store : CoreStore
        A store with a plan.
    model : LanguageModel
        The model it was planned for.
    budget : int
        Peak bytes allowed beyond the loaded model.
    on_nan, on_overflow : {"error", "count"}
        What to do with NaN, and with values outside the stored dtype (saturated when counted).
    progress : callable, optional
        Told the rows committed or under way.
    compact_every : int
        Compact the index when so many commits are not in it.

    Raises
    ------
    BudgetExceeded
        If not even the fewest bands fit into the budget.
    """

    def __init__(
        self,
        store: CoreStore,
        model: LanguageModel,
        *,
        budget: int,
        on_nan: OnFault = "error",
        on_overflow: OnFault = "count",
        progress: Progress | None = None,
        compact_every: int = 64,
    ) -> None:
        self._store = store
        self._model = model
        self._compact_every = compact_every
        self._on_nan = on_nan
        self._on_overflow = on_overflow
        self._progress = progress
        self.timing = Timing()
        self.n_spare = spare_bands(store.meta, budget)
        """Bands of each kind beside one for each site."""
        give_back()
        self._most_bytes = resident_bytes() + int(_KEPT_SHARE * budget)
        self._bands = self._new_bands()
        # Bounded by the pools of bands: every one in it was taken from there.
        self._tasks: queue.Queue[_SegmentWork | _Folded | None] = queue.Queue()
        self._sampled = SampledBands(store.meta)
        self._index_of = {info.site: i for i, info in enumerate(store.meta.sites)}
        self._failure: BaseException | None = None
        self._under_way: list[_SegmentWork] = []
        # A segment is captured while the one before is committed: so many states are in the budget.
        self._places = threading.Semaphore(_UNDER_WAY)
        self._rows_done = self._rows_planned = 0
        self._lists = RunningLists(store)
        self._lists_lock = threading.Lock()

    @property
    def device_bytes(self) -> int:
        """Bytes of the model's GPU that the capture takes beyond the model, about."""
        return self._bands.device_bytes

    def run(self, segments: Iterable[int]) -> int:
        """Capture the segments that are not committed, in ascending order; return their rows.

        Raises
        ------
        NonFiniteActivation
            If NaN, or overflow, was met and the policy is to stop; the segment is not committed.
        """
        planned = self._store.planned
        self._rows_planned = sum(s.rows[""] for s in planned.values())
        self._rows_done = self._store.n_rows()
        self._failure = None
        writer = threading.Thread(target=self._write_all, name="actstore-writer", daemon=True)
        writer.start()
        rows = 0
        interrupted = False
        try:
            with freed_memory_kept(self._most_bytes) as keep_within:
                for segment in sorted(segments):
                    self._check_writer()
                    rows += self._capture(segment, keep_within)
        except BaseException:
            interrupted = True
            # What is whole is still committed; the segment that failed is not.
            for work in self._under_way:
                work.abandoned = not work.is_through
            raise
        finally:
            self._tasks.put(None)
            writer.join()
            for work in self._under_way:
                work.leave.close()
            self._under_way.clear()
            self._places = threading.Semaphore(_UNDER_WAY)
            if interrupted:  # bands that the model held come back no more
                self._bands = self._new_bands()
        self._check_writer()
        return rows

    def _new_bands(self) -> HostBands | DeviceBands:
        device = self._model.device
        return bands_of(device)(self._store, device, self.n_spare)

    def _check_writer(self) -> None:
        if self._failure is not None:
            raise self._failure

    # -- the model's side ----------------------------------------------------------------------

    def _order_in_model(self, index: int) -> tuple[int, int]:
        site = self._store.meta.sites[index].site
        return site.layer, site.hook_rank

    def _begin(self, segment: int) -> _SegmentWork | None:
        """Take the segment's lock; None if it is committed, or another process has it."""
        store = self._store
        leave = ExitStack()
        try:
            writer = leave.enter_context(store.write_segment(segment))
        except StoreBusy:
            return None
        if writer.committed:
            leave.close()
            return None
        tokens = store.tokens(segment)
        flags = arrow.numbers(tokens.column("flags"))
        content = (flags & (SPECIAL | FIRST)) == 0
        windows = arrow.numbers(tokens.column("window_id"))[content]
        folds = self._bands.start_folds(segment * store.meta.segment_rows)
        rows = np.flatnonzero(content), np.flatnonzero(~content)
        return _SegmentWork(segment, writer, folds, *rows, windows, len(flags), [], leave)

    def _capture(self, segment: int, keep_within: Callable[[], None]) -> int:
        self._wait_for_place()
        work = self._begin(segment)
        if work is None:
            self._places.release()
            return 0
        self._under_way.append(work)
        for batch in batches(self._store, self._model, segment):
            self._look_at_lists(work)
            self._forward(work, batch)
            keep_within()
            if self._progress:
                self._progress("capture", self._rows_done + work.filled, self._rows_planned)
        number, n_rows = divmod(work.rows, self._store.meta.chunk_rows)
        for index in sorted(work.open_bands, key=self._order_in_model):
            work.open_bands[index].end_at(n_rows)
            work.whole_bands.append((number, index, work.open_bands.pop(index)))
        self._fold_all(work)
        self._rows_done += work.rows
        work.is_through = True
        self._tasks.put(work)
        return work.rows

    def _wait_for_place(self) -> None:
        """Wait until few enough segments are under way, as the commits of small ones may lag."""
        started = time.perf_counter()
        while not self._places.acquire(timeout=0.2):
            self._check_writer()
        self._check_writer()  # a commit that failed gave its place back too
        self.timing.waiting += time.perf_counter() - started

    def _wait(self, bands: queue.Queue[Band]) -> Band:
        """Return a band that the writer gave back, once it has."""
        started = time.perf_counter()
        while True:
            self._check_writer()
            try:
                return bands.get(timeout=0.2)
            except queue.Empty:
                continue
            finally:
                self.timing.waiting += time.perf_counter() - started
                started = time.perf_counter()

    def _look_at_lists(self, work: _SegmentWork) -> None:
        """Take the thresholds of the segments that are committed below one by now."""
        started = time.perf_counter()
        with self._lists_lock:
            self._lists.advance(work.segment)
            work.relied_on = list(self._lists.relied_on)
            work.thresholds = self._lists.thresholds()
        self.timing.folds += time.perf_counter() - started

    def _forward(self, work: _SegmentWork, batch: Batch) -> None:
        timing, size = self.timing, self._store.meta.chunk_rows
        started, beside = time.perf_counter(), timing.folds + timing.waiting

        def sink(site: Site, values: torch.Tensor) -> None:
            index, row = self._index_of[site], work.filled
            for rows in self._bands.stored(batch, values):
                while len(rows):
                    number, offset = divmod(row, size)
                    some = rows[: size - offset]
                    self._band(work, index).put(offset, some)
                    rows, row = rows[len(some) :], row + len(some)
                    if row % size == 0:
                        work.whole_bands.append((number, index, work.open_bands.pop(index)))

        self._model.forward(batch.input_ids, batch.lengths, self._store.sites, sink)
        self._fold_all(work)
        work.filled += batch.rows
        timing.n_positions += batch.input_ids.numel()
        timing.n_padding += batch.input_ids.numel() - sum(batch.lengths)
        timing.forward += time.perf_counter() - started - (timing.folds + timing.waiting - beside)

    def _band(self, work: _SegmentWork, index: int) -> Band:
        """Return the band that the next rows of a site go to."""
        if index not in work.open_bands:
            info = self._store.meta.sites[index]
            if not self._bands.has_free(info):
                self._fold_all(work)
            work.open_bands[index] = self._bands.take(info, self._wait)
        return work.open_bands[index]

    def _fold_all(self, work: _SegmentWork) -> None:
        """Fold the bands whose rows are all there, and hand them to the writer."""
        whole, work.whole_bands = work.whole_bands, []
        # Band by band; the sites stay in the order of the model, so that a fault is told where it
        # began.
        for number, index, band in sorted(whole, key=itemgetter(0)):
            self._fold(work, number, index, band)

    def _fold(self, work: _SegmentWork, number: int, index: int, band: Band) -> None:
        started = time.perf_counter()
        info = self._store.meta.sites[index]
        first = number * self._store.meta.chunk_rows
        stop = first + self._store.meta.chunk_rows
        content, others = (
            rows[np.searchsorted(rows, first) : np.searchsorted(rows, stop)] - first
            for rows in (work.content, work.others)
        )
        at = int(np.searchsorted(work.content, first))
        windows = work.windows[at : at + len(content)]
        n_nan, n_overflow = work.folds.update(
            *(index, self._bands.values(band), content, others, windows),
            *(first, work.thresholds.get(info.site)),
        )
        if (n_nan and self._on_nan == "error") or (n_overflow and self._on_overflow == "error"):
            raise self._fault(work, index, info, "NaN" if n_nan else "overflow")
        self.timing.folds += time.perf_counter() - started
        if info.keep:
            passed = self._bands.pass_on(info, band, self._wait)
            self._tasks.put(_Folded(work, info, first, passed))
        else:
            self._bands.drop(info, band)

    def _fault(
        self, work: _SegmentWork, index: int, info: SiteInfo, kind: str
    ) -> NonFiniteActivation:
        found = work.folds.finish(index)
        faults = found.nan if kind == "NaN" else found.overflow
        row_id, neuron = faults.places[0]
        token = self._store.tokens_of([row_id]).to_pylist()[0]
        document = self._store.document(token["document"])
        text = document["text"][token["char_start"] : token["char_end"]]
        text = text or self._store.texts_of(np.array([token["token_id"]]))[0].as_py()
        remedy = (
            "Give on_nan='count' (--on-nan count) to store them and keep them out of every fold"
            if kind == "NaN"
            else "Give on_overflow='count' (--on-overflow count) to saturate them, or "
            "dtype='float32' (--dtype float32), with a new store, to hold them"
        )
        what = "NaN" if kind == "NaN" else f"values outside {info.dtype}"
        return NonFiniteActivation(
            f"{info.site} of {self._model.name} has {faults.n:,} {what}, the first at row_id = "
            f"{row_id}, neuron = {neuron} (token {text!r} of document {document['source']!r}). "
            f"Segment {work.segment} is not stored. {remedy}."
        )

    # -- the disk's side -----------------------------------------------------------------------

    def _write_all(self) -> None:
        """Write bands and commit segments until told to end; remember the first failure."""
        while (task := self._tasks.get()) is not None:
            work = task.work if isinstance(task, _Folded) else task
            started = time.perf_counter()
            try:
                if self._failure is not None or work.abandoned:
                    pass
                elif isinstance(task, _Folded):
                    self._write(*task)
                else:
                    self._commit(work)
            except BaseException as error:
                self._failure = error
            finally:
                if isinstance(task, _Folded):
                    self._bands.written(task.info, task.band)
                else:
                    self._places.release()
            seconds = time.perf_counter() - started
            self.timing.writing += seconds
            if not isinstance(task, _Folded):
                self.timing.committing += seconds

    def _write(self, work: _SegmentWork, info: SiteInfo, first: int, band: Band) -> None:
        """Write the rows of a band that are kept; it begins at an offset in the segment."""
        if is_sample(info.keep):
            self._sampled.add(work.writer, info, first, band.array())
        else:
            work.writer.write_band(info, band.array())

    def _commit(self, work: _SegmentWork) -> None:
        for info in self._store.meta.kept_sites:
            if is_sample(info.keep):
                self._sampled.finish(work.writer, info)
        lists: dict[Site, SiteLists] = {}
        counts: dict[str, SiteCounts] = {}
        work.writer.write_partial("folds", self._packed(work, lists, counts))
        work.writer.commit(counts, work.relied_on)
        with self._lists_lock:
            self._lists.add(work.segment, lists)
            self._store.refresh_commits()
        self._under_way.remove(work)
        work.leave.close()
        # What a segment needed would add up with what the next ones need.
        del work, lists
        self._store.tokens_tables.forget()
        give_back()
        if needs_compaction(self._store, self._compact_every):
            compact(self._store, only_prefix=True)

    def _packed(
        self, work: _SegmentWork, lists: dict[Site, SiteLists], counts: dict[str, SiteCounts]
    ) -> Iterator[tuple[str, npt.NDArray[Any]]]:
        """Yield the states of a segment as named arrays; its lists and faults are noted on the way.

        Site by site: all at once they would be nearly as much memory again as the folds take.
        """
        for i, site in enumerate(self._store.sites):
            found = work.folds.finish(i)
            lists[site] = SiteLists.of(found.topk, found.window_top, found.sample.row_ids)
            if found.nan.n or found.overflow.n:
                counts[str(site)] = _counts(found)
            yield from pack_site(site, found).items()


def _counts(folds: SiteFolds) -> SiteCounts:
    places = (*folds.nan.places, *folds.overflow.places)
    return SiteCounts(folds.nan.n, folds.overflow.n, tuple(places[:16]))
