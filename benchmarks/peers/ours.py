"""actstore on the same job: one capture of the corpus, from text to the finished store.

Its seconds hold what the peers are spared: tokenising, the token index, all folds, the index.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch

from actstore.capturing import Limits, Settings, run_capture
from actstore.capturing.batches import batches
from actstore.models import LanguageModel, load
from actstore.store import CoreStore
from benchmarks.peers.harness import Job, Report, finish, memory, start


def _capture(job: Job, model: LanguageModel, path: Path, n_tokens: int | None):
    settings = Settings(
        keep="all",
        context=job.context,
        batch_tokens=job.batch_windows * job.context,
        limits=Limits(n_tokens, job.context),
    )
    return run_capture(model, job.corpus, path, settings=settings, budget=job.budget)


def _forwards(store: CoreStore, model: LanguageModel) -> tuple[float, float]:
    """Return the seconds of the model alone, and of the model with hooks that drop all."""
    work = [batch for segment in store.planned for batch in batches(store, model, segment)]
    with torch.inference_mode():
        model.module(input_ids=work[0].input_ids)
        started = time.perf_counter()
        for batch in work:
            model.module(input_ids=batch.input_ids)
        alone = time.perf_counter()
        for batch in work:
            model.forward(batch.input_ids, batch.lengths, store.sites, lambda site, values: None)
        return alone - started, time.perf_counter() - alone


def main() -> None:
    """Run the job."""
    job = start()
    folder = Path(job.folder)
    model = load(job.model)
    report = Report(version("actstore"))
    if not job.for_memory:
        # Compiles, and finds what the second capture finds: a warm file cache.
        _capture(job, model, folder / "warm", job.context)
    report.loaded_bytes = memory("VmRSS")
    started = time.perf_counter()
    store, timing = _capture(job, model, folder / "store", None)
    report.on_disk = time.perf_counter() - started
    # The others are counts.  These overlap: they do not add up to the whole.
    report.parts = {name: s for name, s in asdict(timing).items() if isinstance(s, float)}
    report.peak_bytes = memory("VmHWM")
    report.n_bytes = store.n_bytes()
    if not job.for_memory:
        report.bare, report.in_ram = _forwards(store, model)
    finish(job, report)


if __name__ == "__main__":
    main()
