"""The worker: runs the model once over every window and leaves committed segments behind.

    batches of neighbouring windows -> forward, hooks -> bands -> folds -> writer thread -> commit

A *band* is `chunk_rows` rows of every site in the order the shard will have.  The hooks cast and
re-lay activations straight into it, so each value is touched once between the model and the disk;
when all its rows are there, one compiled pass folds it, and the writer thread appends it to the
segment's shards.  Bands come from a pool of fixed size: when the disk is slow the pool runs dry and
the model waits; memory does not grow.

Batches follow from the plan alone, bands are folded in row order, and commits happen in segment
order, so what is written does not depend on timing.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal

import ml_dtypes
import numpy as np
import numpy.typing as npt
import torch

from actstore.capturing.compact import compact, needs_compaction
from actstore.capturing.lists import TOPK, RunningLists, pack
from actstore.errors import BudgetExceeded, NonFiniteActivation, StoreBusy
from actstore.folds.cpu import BandFolds, SiteFolds
from actstore.models import LanguageModel
from actstore.site import Site
from actstore.store import FIRST, SPECIAL, CoreStore, SegmentWriter, SiteCounts, SiteInfo, StoreMeta
from actstore.store.budget import Progress

OnFault = Literal["error", "count"]

# Per place of a list: candidates of two segments under way, and the running lists of both sides.
_LIST_BYTES = 2 * 40
_TORCH = {"float16": torch.float16, "float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class Timing:
    """Seconds the stages of a capture took; they overlap."""

    forward: float = 0.0
    """Model and hooks, with the copy into bands."""
    folds: float = 0.0
    """The compiled pass over bands."""
    waiting: float = 0.0
    """The model's wait for a free band: the disk is the bottleneck."""
    writing: float = 0.0
    """The writer thread at work."""


@dataclass(frozen=True)
class Batch:
    """Neighbouring windows that go through the model together."""

    input_ids: torch.Tensor
    """Token ids, padded on the right, (windows, positions)."""
    lengths: list[int]
    """Tokens of each window."""
    skip: list[int]
    """Leading context tokens of each window that are fed but not stored."""
    n_prefix: int
    """Special tokens before the context, which are stored."""
    rows: int
    """Stored rows of the batch."""


def batches(store: CoreStore, model: LanguageModel, segment: int) -> Iterator[Batch]:
    """Yield the batches of a segment; at most `batch_tokens` tokens each, padding counted."""
    windows = store.windows(segment).to_pylist()
    ids = store.tokens(segment).column("token_id").to_numpy()
    first = segment * store.meta.segment_rows
    n_prefix = len(model.prefix_ids)
    start = 0
    while start < len(windows):
        longest = windows[start]["context_tokens"] + windows[start]["rows"]
        count = max(1, store.meta.batch_tokens // longest)
        chosen = windows[start : start + count]
        input_ids = np.full((len(chosen), longest), model.pad_id, dtype=np.int64)
        lengths = []
        for i, window in enumerate(chosen):
            own = ids[window["first_row"] - first : window["first_row"] - first + window["rows"]]
            fed = np.concatenate([own[:n_prefix], window["context_ids"], own[n_prefix:]])
            input_ids[i, : len(fed)] = fed
            lengths.append(len(fed))
        yield Batch(
            torch.from_numpy(input_ids),
            lengths,
            [window["context_tokens"] for window in chosen],
            n_prefix,
            sum(window["rows"] for window in chosen),
        )
        start += count


class _Band:
    """One buffer of `chunk_rows` rows for every site, in chunk order."""

    def __init__(self, store: CoreStore) -> None:
        self.buffers: dict[Site, torch.Tensor] = {}
        for info in store.meta.sites:
            layout = store.layout(info)
            shape = (layout.n_column_chunks, layout.chunk_rows, layout.chunk_columns)
            # NaN marks what no row fills: padded columns, and the hole at a segment's end.
            self.buffers[info.site] = torch.full(shape, torch.nan, dtype=_TORCH[info.dtype])

    def put(self, site: Site, row: int, values: torch.Tensor) -> None:
        """Cast rows ``(n, width)`` into the band from a row on."""
        buffer = self.buffers[site]
        n, width = values.shape
        columns = buffer.shape[2]
        full = width // columns
        buffer[:full, row : row + n].copy_(
            values[:, : full * columns].reshape(n, full, columns).transpose(0, 1)
        )
        if width % columns:
            buffer[full, row : row + n, : width % columns].copy_(values[:, full * columns :])

    def end_at(self, row: int) -> None:
        """Mark the rows from one on as not there."""
        for buffer in self.buffers.values():
            buffer[:, row:] = torch.nan

    def array(self, site: Site) -> npt.NDArray[Any]:
        """Return the site's buffer as NumPy, without a copy."""
        buffer = self.buffers[site]
        if buffer.dtype == torch.bfloat16:
            return buffer.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        found: npt.NDArray[Any] = buffer.numpy()
        return found


@dataclass
class _SegmentWork:
    """A segment on its way through the pipeline."""

    segment: int
    writer: SegmentWriter
    folds: BandFolds
    content: npt.NDArray[np.int64]
    others: npt.NDArray[np.int64]
    rows: int
    relied_on: list[int]
    leave: ExitStack
    open_bands: dict[int, _Band] = field(default_factory=dict)
    filled: int = 0
    abandoned: bool = False


def list_bytes(infos: Iterable[SiteInfo]) -> int:
    """Return the bytes the top-k lists of some sites take during a capture."""
    return sum(info.width for info in infos) * TOPK.k * _LIST_BYTES


def affordable_bands(meta: StoreMeta, budget: int) -> int:
    """Return how many bands a capture may hold within a budget.

    Raises
    ------
    BudgetExceeded
        If not even the fewest bands fit.
    """
    band_bytes = meta.chunk_rows * meta.row_bytes
    # A batch may begin in one band and end in another; one more may be on its way to disk.
    fewest = -(-meta.batch_tokens // meta.chunk_rows) + 2
    lists = list_bytes(meta.sites)
    if fewest * band_bytes + lists > budget:
        raise BudgetExceeded(
            f"capturing {len(meta.sites)} sites needs {(fewest * band_bytes + lists) / 1e6:,.0f} "
            f"MB ({fewest} bands of {meta.chunk_rows} rows, {band_bytes / 1e6:,.0f} MB each, and "
            f"the top-k lists); the budget is {budget / 1e6:,.0f} MB. Give a larger budget= "
            "(--budget), a smaller batch_tokens= (--batch-tokens), or fewer sites= (--sites)."
        )
    return int(min(fewest + 2, (budget - lists) // band_bytes))


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
        self.n_bands = affordable_bands(store.meta, budget)
        self._pool: queue.Queue[_Band] = queue.Queue()
        for _ in range(self.n_bands):
            self._pool.put(_Band(store))
        # Bounded by the pool: every band in it was taken from there.
        self._tasks: queue.Queue[tuple[_SegmentWork, _Band | None] | None] = queue.Queue()
        self._failure: BaseException | None = None
        self._under_way: list[_SegmentWork] = []
        self._rows_done = self._rows_planned = 0
        self._lists = RunningLists(store)
        self._lists_lock = threading.Lock()

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
        writer = threading.Thread(target=self._write_all, name="actstore-writer", daemon=True)
        writer.start()
        rows = 0
        try:
            for segment in sorted(segments):
                self._check_writer()
                rows += self._capture(segment)
        except BaseException:
            # What is whole is still committed; the segment that failed is not.
            for work in self._under_way:
                work.abandoned = work.filled < work.rows or bool(work.open_bands)
            raise
        finally:
            self._tasks.put(None)
            writer.join()
            for work in self._under_way:
                work.leave.close()
        self._check_writer()
        return rows

    def _check_writer(self) -> None:
        if self._failure is not None:
            raise self._failure

    # -- the model's side ----------------------------------------------------------------------

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
        flags = store.tokens(segment).column("flags").to_numpy()
        content = (flags & (SPECIAL | FIRST)) == 0
        folds = BandFolds(
            [info.width for info in store.meta.sites],
            [info.dtype for info in store.meta.sites],
            first_row_id=segment * store.meta.segment_rows,
            k=TOPK.k,
        )
        rows = np.flatnonzero(content), np.flatnonzero(~content)
        return _SegmentWork(segment, writer, folds, *rows, len(flags), [], leave)

    def _capture(self, segment: int) -> int:
        work = self._begin(segment)
        if work is None:
            return 0
        self._under_way.append(work)
        for batch in batches(self._store, self._model, segment):
            self._forward(work, batch)
            self._pass_on(work)
            if self._progress:
                self._progress("capture", self._rows_done + work.filled, self._rows_planned)
        for number, band in list(work.open_bands.items()):
            band.end_at(work.rows - number * self._store.meta.chunk_rows)
            self._fold(work, number, band)
        self._rows_done += work.rows
        self._tasks.put((work, None))
        return work.rows

    def _take_band(self) -> _Band:
        started = time.perf_counter()
        while True:
            self._check_writer()
            try:
                return self._pool.get(timeout=0.2)
            except queue.Empty:
                continue
            finally:
                self.timing.waiting += time.perf_counter() - started
                started = time.perf_counter()

    def _forward(self, work: _SegmentWork, batch: Batch) -> None:
        size = self._store.meta.chunk_rows
        for number in range(work.filled // size, -(-(work.filled + batch.rows) // size)):
            if number not in work.open_bands:
                work.open_bands[number] = self._take_band()
        started = time.perf_counter()

        def put(site: Site, row: int, values: torch.Tensor) -> None:
            while len(values):
                band, offset = work.open_bands[row // size], row % size
                n = min(len(values), size - offset)
                band.put(site, offset, values[:n])
                values, row = values[n:], row + n

        def sink(site: Site, values: torch.Tensor) -> None:
            row = work.filled
            if len(set(batch.lengths)) == 1 and not any(batch.skip):
                put(site, row, values.flatten(0, 1))
                return
            for i, (length, skip) in enumerate(zip(batch.lengths, batch.skip, strict=True)):
                head = batch.n_prefix if skip else 0
                put(site, row, values[i, :head])
                put(site, row + head, values[i, head + skip : length])
                row += length - skip

        self._model.forward(batch.input_ids, batch.lengths, self._store.sites, sink)
        work.filled += batch.rows
        self.timing.forward += time.perf_counter() - started

    def _pass_on(self, work: _SegmentWork) -> None:
        """Fold the bands whose rows are all there, and hand them to the writer."""
        for number in sorted(work.open_bands):
            if (number + 1) * self._store.meta.chunk_rows <= work.filled:
                self._fold(work, number, work.open_bands[number])

    def _fold(self, work: _SegmentWork, number: int, band: _Band) -> None:
        started = time.perf_counter()
        first = number * self._store.meta.chunk_rows
        stop = first + self._store.meta.chunk_rows
        content, others = (
            rows[np.searchsorted(rows, first) : np.searchsorted(rows, stop)] - first
            for rows in (work.content, work.others)
        )
        with self._lists_lock:
            self._lists.advance(work.segment)
            work.relied_on = [s for s in self._lists.relied_on if s < work.segment]
            thresholds = self._lists.thresholds() if work.relied_on else {}
        # In the order of the model, so that a fault is told where it began.
        for i, info in sorted(enumerate(self._store.meta.sites), key=_place_in_model):
            n_nan, n_overflow = work.folds.update(
                i, band.array(info.site), content, others, first, thresholds.get(info.site)
            )
            if (n_nan and self._on_nan == "error") or (n_overflow and self._on_overflow == "error"):
                raise self._fault(work, i, info, "NaN" if n_nan else "overflow")
        self.timing.folds += time.perf_counter() - started
        del work.open_bands[number]
        self._tasks.put((work, band))

    def _fault(
        self, work: _SegmentWork, index: int, info: SiteInfo, kind: str
    ) -> NonFiniteActivation:
        found = work.folds.finish(index)
        faults = found.nan if kind == "NaN" else found.overflow
        row_id, neuron = faults.places[0]
        token = self._store.tokens_of([row_id]).to_pylist()[0]
        document = self._store.document(token["document"])
        text = document["text"][token["char_start"] : token["char_end"]]
        text = text or self._store.vocabulary["text"][token["token_id"]].as_py()
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
            work, band = task
            started = time.perf_counter()
            try:
                if self._failure is not None or work.abandoned:
                    pass
                elif band is not None:
                    for info in self._store.meta.sites:
                        work.writer.write_band(info, band.array(info.site))
                else:
                    self._commit(work)
            except BaseException as error:
                self._failure = error
            finally:
                if band is not None:
                    self._pool.put(band)
            self.timing.writing += time.perf_counter() - started

    def _commit(self, work: _SegmentWork) -> None:
        found = {info.site: work.folds.finish(i) for i, info in enumerate(self._store.meta.sites)}
        arrays: dict[str, npt.NDArray[Any]] = {}
        for site, folds in found.items():
            arrays |= pack(site, "moments", folds.moments)
            arrays |= pack(site, "others", folds.moments_others)
            arrays |= pack(site, "topk", folds.topk)
        work.writer.write_partial("folds", arrays)
        counts = {str(s): _counts(f) for s, f in found.items() if f.nan.n or f.overflow.n}
        work.writer.commit(counts, work.relied_on)
        with self._lists_lock:
            self._lists.add(work.segment, {site: folds.topk for site, folds in found.items()})
            self._store.refresh_commits()
        self._under_way.remove(work)
        work.leave.close()
        if needs_compaction(self._store, self._compact_every):
            compact(self._store, only_prefix=True)


def _place_in_model(item: tuple[int, SiteInfo]) -> tuple[int, int]:
    site = item[1].site
    return site.layer, site.hook_rank


def _counts(folds: SiteFolds) -> SiteCounts:
    places = (*folds.nan.places, *folds.overflow.places)
    return SiteCounts(folds.nan.n, folds.overflow.n, tuple(places[:16]))
