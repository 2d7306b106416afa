"""What a capture would take: rows and bytes counted, seconds from a short capture made aside."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from actstore.capturing.corpus import Corpus, Document, Texts, open_corpus
from actstore.capturing.plan import Limits, cut_corpus, make_plan
from actstore.capturing.run import (
    Settings,
    bytes_needed,
    check_disk,
    check_path,
    new_meta,
    shard_bytes,
)
from actstore.capturing.worker import Worker, list_bytes
from actstore.errors import CorpusError
from actstore.models import LanguageModel, load
from actstore.shard import ShardLayout
from actstore.store import CoreStore, StoreMeta
from actstore.store.budget import Progress, parse_budget

_PROBE_BATCHES = 3
_PROBE_DOCUMENTS = 64


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
    site_bytes: Mapping[str, int]
    """Bytes on disk by site."""
    seconds: float
    """Time of the capture, extrapolated from a short one."""
    bottleneck: str
    """``"compute"``, or ``"disk"`` if the short capture waited for it."""
    memory_bytes: int
    """Peak bytes beyond the loaded model."""
    free_bytes: int
    """Bytes free on the disk of the store."""

    @property
    def total_bytes(self) -> int:
        """Bytes on disk over all sites."""
        return sum(self.site_bytes.values())

    def __str__(self) -> str:
        sites = "\n".join(f"  {name:<16} {n:>16,}" for name, n in self.site_bytes.items())
        enough = "" if self.total_bytes <= self.free_bytes else "  NOT ENOUGH"
        return (
            f"model      {self.model}\n"
            f"documents  {self.n_documents:,}\n"
            f"rows       {self.rows:,} tokens in {self.segments:,} segments\n"
            f"bytes      {self.total_bytes:,} on disk, {self.free_bytes:,} free{enough}\n{sites}\n"
            f"seconds    about {self.seconds:,.0f}; bottleneck: {self.bottleneck}\n"
            f"memory     about {self.memory_bytes / 1e6:,.0f} MB beyond the model"
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
    sizes = [0]
    head: list[Document] = []
    n_documents = 0
    for cut in cut_corpus(documents, loaded, meta, settings.limits):
        for window in cut.windows:
            if sizes[-1] + window.rows > meta.segment_rows:
                sizes.append(0)
            sizes[-1] += window.rows
        if cut.windows and len(head) < _PROBE_DOCUMENTS:
            head.append(cut.document)
        n_documents += 1
        if progress:
            progress("plan", n_documents, 0)
    if not sum(sizes):
        raise CorpusError("the corpus holds no token; give one with text in it.")
    site_bytes = {}
    for info in meta.sites:
        layout = ShardLayout.for_width(info.width, meta.segment_rows, info.dtype, meta.chunk_rows)
        site_bytes[str(info.site)] = sum(shard_bytes(layout, rows) for rows in sizes)
    folder = Path(path or tempfile.gettempdir()).absolute()
    while not folder.is_dir():
        folder = folder.parent
    # Beside the store, so that it is its disk that is measured.
    rate, waited, bands = _probe(loaded, Texts(head), meta, n_bytes, folder)
    return Estimate(
        loaded.name,
        n_documents,
        sum(sizes),
        len(sizes),
        site_bytes,
        sum(sizes) / rate,
        "disk" if waited > 0.2 else "compute",
        bands * meta.chunk_rows * meta.row_bytes + list_bytes(meta.sites),
        shutil.disk_usage(folder).free,
    )


def _probe(
    model: LanguageModel, corpus: Corpus, meta: StoreMeta, budget: int, beside: Path
) -> tuple[float, float, int]:
    """Capture a few batches aside: rows a second, share of time waited for the disk, bands."""
    with tempfile.TemporaryDirectory(prefix="actstore-probe-", dir=beside) as folder:
        store = CoreStore.create(folder, replace(meta, store_id="probe"))
        wanted = Limits(max_tokens=(_PROBE_BATCHES + 1) * meta.batch_tokens)
        make_plan(store, model, corpus, wanted)
        check_disk(store, bytes_needed(store, store.planned))
        marks: list[tuple[float, int]] = []
        worker = Worker(
            store,
            model,
            budget=budget,
            progress=lambda _stage, done, _total: marks.append((time.perf_counter(), done)),
        )
        worker.run(store.planned)
        end = time.perf_counter()
        # The first batch pays for compilation and allocation.
        (start, first), (_, last) = marks[0], marks[-1]
        if last == first:
            start, first = start - worker.timing.forward, 0
        seconds = max(end - start, 1e-6)
        return (last - first) / seconds, worker.timing.waiting / seconds, worker.n_bands
