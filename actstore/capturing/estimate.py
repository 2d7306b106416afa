"""What a capture would take: rows and bytes counted, time and memory from a short one made aside.

The corpus is tokenised and cut as the plan will do it, which gives rows, segments, padding and the
bytes of every site exactly.  Then a few short segments are captured into a temporary folder on the
same disk, and each stage is timed by itself: what the model's thread takes for a position, the
writer's for a byte and for a commit, and the last compaction.  The stages run beside each other, so
the longest of them is the bottleneck, and what cannot overlap is added.
"""

from __future__ import annotations

import math
import shutil
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil

from actstore.capturing.bands import bands_bytes, n_bands
from actstore.capturing.compact import compact
from actstore.capturing.corpus import Corpus, Document, Texts, open_corpus
from actstore.capturing.parts import part_ends, part_rows
from actstore.capturing.plan import Limits, Window, cut_corpus, make_plan
from actstore.capturing.run import (
    COMPACT_EVERY,
    Settings,
    bytes_needed,
    check_disk,
    check_path,
    new_meta,
)
from actstore.capturing.sampled import sampled_bytes
from actstore.capturing.worker import Timing, Worker, list_bytes
from actstore.counted import counted
from actstore.errors import CorpusError
from actstore.models import LanguageModel, load
from actstore.store import FIRST, SPECIAL, CoreStore, StoreMeta
from actstore.store.budget import Progress, parse_budget
from actstore.store.stored_rows import is_sample

_PROBE_BATCHES = 2  # of a segment
_PROBE_SEGMENTS = 5
_PROBE_SECONDS = 8.0
_PROBE_DOCUMENTS = 64
_WATCH_SECONDS = 0.01
_COMMIT_SHARE = 0.5  # of a commit's time is taken from a model on the same processor


@dataclass(frozen=True)
class Estimate:
    """What a capture would take."""

    model: str
    """Name of the model."""
    n_documents: int
    """Documents of the corpus."""
    rows: int
    """Rows, special tokens counted."""
    segments: int
    """Segments they fill."""
    keep: str
    """What part of the rows is stored."""
    site_bytes: Mapping[str, int]
    """Bytes of the stored rows by site."""
    other_bytes: int
    """Bytes of everything else, about: text, token index, statistics and exemplars."""
    seconds: float
    """Time of the capture once the model is loaded, extrapolated from a short one."""
    bottleneck: str
    """What takes longest: ``"compute"``, ``"disk"`` or ``"tokenise"``."""
    memory_bytes: int
    """Peak bytes beyond the loaded model, measured in the short capture."""
    free_bytes: int
    """Bytes free on the disk of the store."""
    device_bytes: int
    """Bytes of the model's GPU beyond the model, about; 0 where it runs on the CPU."""

    @property
    def total_bytes(self) -> int:
        """Bytes of the stored rows over all sites."""
        return sum(self.site_bytes.values())

    def __str__(self) -> str:
        sites = "\n".join(f"  {name:<16} {n:>16,}" for name, n in self.site_bytes.items())
        needed = self.total_bytes + self.other_bytes
        enough = "" if needed <= self.free_bytes else "  NOT ENOUGH"
        on_gpu = f", {self.device_bytes / 1e6:,.0f} MB of the GPU" if self.device_bytes else ""
        return (
            f"model      {self.model}\n"
            f"documents  {self.n_documents:,}\n"
            f"rows       {self.rows:,} tokens in {counted(self.segments, 'segment')}\n"
            f"kept       {self.keep}\n"
            f"bytes      {self.total_bytes:,} of rows, about {self.other_bytes:,} beside, "
            f"{self.free_bytes:,} free{enough}\n{sites}\n"
            f"seconds    about {self.seconds:,.0f}; bottleneck: {self.bottleneck}\n"
            f"memory     about {self.memory_bytes / 1e6:,.0f} MB{on_gpu} beyond the model"
        )

    __repr__ = __str__


def run_estimate(
    model: str | Path | LanguageModel | Any,
    corpus: Any = None,
    path: str | Path | None = None,
    *,
    text: str | Iterable[str] | None = None,
    tokenizer: Any = None,
    settings: Settings = Settings(),  # noqa: B008 - frozen
    device: str = "auto",
    budget: int | str | None = None,
    encoding: str = "utf-8",
    errors: str = "strict",
    progress: Progress | None = None,
) -> Estimate:
    """Return what `run_capture` with the same arguments would take; writes nothing to the store.

    One tokenisation of the corpus, and a capture of a few batches into a temporary folder.

    Raises
    ------
    CorpusError
        If the corpus holds no token.
    """
    n_bytes = parse_budget(budget)
    documents = open_corpus(corpus, text=text, encoding=encoding, errors=errors)
    check_path(path)
    loaded = model if isinstance(model, LanguageModel) else load(model, tokenizer, device=device)
    meta = new_meta(loaded, documents, settings, n_bytes)
    on_cpu = loaded.device.type == "cpu"
    segments = _Segments(meta)
    head: list[Document] = []
    n_documents = 0
    started = time.perf_counter()
    for cut in cut_corpus(documents, loaded, meta, settings.limits, beside=on_cpu):
        segments.add_document(cut.windows)
        if cut.windows and len(head) < _PROBE_DOCUMENTS:
            head.append(cut.document)
        n_documents += 1
        if progress:
            progress("plan", n_documents, 0)
    segments.close()
    tokenising = time.perf_counter() - started
    if not segments.rows:
        raise CorpusError("the corpus holds no token; give one with text in it.")
    site_bytes = segments.site_bytes()
    folder = Path(path or tempfile.gettempdir()).absolute()
    while not folder.is_dir():
        folder = folder.parent
    # Beside the store, so that it is its disk that is measured.
    probe = _Probe(loaded, Texts(head), meta, n_bytes, folder)
    n_segments = len(segments.rows)
    seconds = {
        "compute": segments.positions * probe.position_seconds,
        "disk": sum(site_bytes.values()) * probe.byte_seconds + n_segments * probe.commit_seconds,
        "tokenise": tokenising,
    }
    bottleneck = max(seconds, key=lambda stage: seconds[stage])
    if on_cpu:  # what runs beside the model takes processor time from it
        n_threads = psutil.cpu_count() or 1
        commits = (n_segments - 1) * probe.commit_seconds * _COMMIT_SHARE
        seconds["compute"] += commits + tokenising / n_threads
    first_part = min(1.0, part_rows(0) / sum(segments.rows)) * tokenising
    alone = first_part + probe.commit_seconds
    alone += probe.compact_seconds * (1 + n_segments // COMPACT_EVERY)
    return Estimate(
        loaded.name,
        n_documents,
        sum(segments.rows),
        n_segments,
        meta.keep,
        site_bytes,
        probe.index_bytes + round(probe.plan_bytes_per_row * sum(segments.rows)),
        max(seconds.values()) + alone,
        bottleneck,
        probe.memory_bytes,
        shutil.disk_usage(folder).free,
        probe.device_bytes,
    )


@dataclass
class _Segments:
    """The segments that the plan will make."""

    meta: StoreMeta
    rows: list[int] = field(default_factory=list)
    """Rows of each segment."""
    content: list[int] = field(default_factory=list)
    """Content rows of each segment."""
    positions: int = 0
    """Tokens fed to the model, padding counted."""
    _open: list[Window] = field(default_factory=list)
    _open_rows: int = 0
    _part_rows: int = 0
    _part_documents: int = 0
    _part_segments: int = 0
    """Segments of the parts before."""
    _n_parts: int = 0

    def add_document(self, windows: Sequence[Window]) -> None:
        """Take the next document of the corpus."""
        n_segments = len(self.rows) - self._part_segments + 1
        if part_ends(
            *(self.meta.segment_rows, part_rows(self._n_parts), self._part_rows),
            *(self._part_documents, n_segments, self._open_rows),
            (window.rows for window in windows),
        ):
            self.close()
            self._part_rows = self._part_documents = 0
            self._part_segments = len(self.rows)
            self._n_parts += 1
        for window in windows:
            if self._open_rows + window.rows > self.meta.segment_rows:
                self.close()
            self._open.append(window)
            self._open_rows += window.rows
            self._part_rows += window.rows
        self._part_documents += 1

    def close(self) -> None:
        """End the segment."""
        if not self._open:
            return
        self.rows.append(self._open_rows)
        flags = [window.columns["flags"] for window in self._open]
        self.content.append(sum(int(((f & (SPECIAL | FIRST)) == 0).sum()) for f in flags))
        lengths = sorted((window.length for window in self._open), reverse=True)
        start = 0
        while start < len(lengths):
            count = max(1, self.meta.batch_tokens // lengths[start])
            self.positions += lengths[start] * len(lengths[start : start + count])
            start += count
        self._open, self._open_rows = [], 0

    def site_bytes(self) -> dict[str, int]:
        """Return the bytes of the shards of each site."""
        found = {str(info.site): 0 for info in self.meta.sites}
        for info in self.meta.kept_sites:
            stored = self.rows
            if is_sample(info.keep):
                stored = [math.ceil(n * info.keep) for n in self.content]
            layout = self.meta.layout(info)
            found[str(info.site)] = sum(layout.file_bytes(n) for n in stored if n)
        return found


class _Probe:
    """A short capture, made aside and timed."""

    def __init__(
        self, model: LanguageModel, corpus: Corpus, meta: StoreMeta, budget: int, beside: Path
    ) -> None:
        # Short segments: a few of them show what a commit takes, and what its lists then spare.
        rows = 1 << (_PROBE_BATCHES * meta.batch_tokens - 1).bit_length()
        rows = max(meta.chunk_rows, min(meta.segment_rows, rows))
        whole, meta = meta, replace(meta, store_id="probe", segment_rows=rows)
        wanted = Limits(max_tokens=_PROBE_SEGMENTS * rows)
        with (
            tempfile.TemporaryDirectory(prefix="actstore-probe-", dir=beside) as folder,
            _PeakMemory() as memory,
        ):
            store = CoreStore.create(folder, meta)
            make_plan(store, model, corpus, wanted)
            check_disk(store, bytes_needed(store, store.planned))
            worker = Worker(store, model, budget=budget)
            self._capture(store, worker)
            n_spare = worker.n_spare
            self.device_bytes = worker.device_bytes
            """Bytes of the model's GPU, beyond the model."""
            del worker  # as a capture does
            started = time.perf_counter()
            compact(store)
            self.compact_seconds = time.perf_counter() - started
            """Seconds of a compaction."""
            self.index_bytes = _bytes_in(store.path, ("index", "vocabulary.parquet"))
            """Bytes of the index and the vocabulary, which hardly depend on the rows."""
            plan_bytes = _bytes_in(store.path, ("plan", "documents", "tokens"))
            n_planned = sum(s.rows[""] for s in store.planned.values())
            self.plan_bytes_per_row = plan_bytes / n_planned
            """Bytes of text and tokens, for a row."""
        bands = bands_bytes(meta, n_bands(meta.sites, n_spare))
        folds = list_bytes(meta.sites, whole.segment_rows // meta.chunk_rows, meta.grams)
        computed = bands + folds + sampled_bytes(whole)
        # Memory that was used before and is free in this process does not show as growth.
        self.memory_bytes = max(memory.grown, computed)
        """Peak bytes beyond the model."""

    def _capture(self, store: CoreStore, worker: Worker) -> None:
        begun, before, n_bytes, n_commits = time.perf_counter(), Timing(), 0, 0
        for segment in store.planned:
            worker.run([segment])
            if segment == 0 and len(store.planned) > 1:
                # The first one paid for compilation, allocation and empty lists.
                begun, before = time.perf_counter(), replace(worker.timing)
                n_bytes, n_commits = store.n_bytes(), 1
            elif time.perf_counter() - begun > _PROBE_SECONDS:
                break
        after = worker.timing
        stored = store.n_bytes() - n_bytes
        committing = after.committing - before.committing
        model = after.forward + after.folds - before.forward - before.folds
        self.position_seconds = model / (after.n_positions - before.n_positions)
        """Seconds of the model's thread for a token fed to it: forward, copies and folds."""
        self.byte_seconds = (
            (after.writing - before.writing - committing) / stored if stored else 0.0
        )
        """Seconds of the writer's thread for a byte."""
        self.commit_seconds = committing / (len(store.committed) - n_commits)
        """Seconds of a commit."""


class _PeakMemory:
    """How far the memory of this process grows while it is entered."""

    def __init__(self) -> None:
        self.grown = 0
        """Bytes above the beginning, at the highest."""
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="actstore-memory", daemon=True)

    def __enter__(self) -> _PeakMemory:
        self._process = psutil.Process()
        self._first = self._process.memory_info().rss
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._left.wait(_WATCH_SECONDS):
            self.grown = max(self.grown, self._process.memory_info().rss - self._first)


def _bytes_in(root: Path, names: Iterable[str]) -> int:
    """Return the bytes of some files and folders of a store."""
    paths = [path for name in names for path in (root / name, *(root / name).rglob("*"))]
    return sum(path.stat().st_size for path in paths if path.is_file())
