"""What every peer of capture is made to do, in its own interpreter.

A peer gives a function from a batch of windows to the rows of every site, in the fastest way it
documents.  The harness feeds it the windows that our capture ran, in the same batches, and times

- in RAM: that function alone, its result dropped at once;
- on disk: each batch written as one safetensors file in the dtypes of our store, the files synced
  at the end, and the exact highest values of every neuron over the content rows, by torch.topk of
  every batch and of what it gives with what was kept.

What was left on disk is read back where it will be compared with ours.  Peak memory is that of a
process of its own, which goes to disk at once: what a run in RAM has taken is not all given back.
Only torch, NumPy and safetensors are needed here: this file runs beside whatever the peer depends
on.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

Rows = Mapping[str, torch.Tensor]
"""Site to rows, (windows x positions, width)."""

TORCH = {"float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Job:
    """What is to be captured; the same for all."""

    model: str
    """Folder of the model: config, safetensors, tokenizer."""
    architecture: str
    """``"bert"`` or ``"gpt2"``."""
    corpus: str
    """The documents, .jsonl; each gives one window."""
    windows: str
    """Token ids of the windows, safetensors; (windows, context)."""
    context: int
    """Tokens of every window."""
    batch_windows: int
    """Windows of a batch."""
    content: tuple[int, int]
    """First position of a window that is content, and the one past the last."""
    dtypes: dict[str, str]
    """The sites, in order, and their dtypes on disk."""
    widths: dict[str, int]
    """Neurons of each."""
    k: int
    """How many of the highest values of a neuron are wanted."""
    budget: str | None
    """Of our capture; None for its default."""
    folder: str
    """Where to write; empty."""
    for_memory: bool = False
    """Whether memory is what is asked for: then nothing is run but what ends on disk."""

    def batches(self) -> list[torch.Tensor]:
        """Return the token ids of the batches."""
        return list(load_file(self.windows)["input_ids"].split(self.batch_windows))

    def sampled(self) -> list[int]:
        """Return the windows whose rows are compared: the first and the last."""
        return [0, len(load_file(self.windows)["input_ids"]) - 1]


@dataclass
class Report:
    """What it cost."""

    version: str
    """Of the peer."""
    bare: float = 0.0
    """Seconds of the model alone, told by ours."""
    in_ram: float = 0.0
    """Seconds of the capture alone."""
    on_disk: float = 0.0
    """Seconds until rows are on disk and the highest values are known."""
    parts: dict[str, float] = field(default_factory=dict)
    """What `on_disk` consists of, in seconds."""
    n_bytes: int = 0
    """Bytes on disk."""
    loaded_bytes: int = 0
    """Resident when the model was loaded."""
    peak_bytes: int = 0
    """Most that was ever resident."""


def job_of(argv: list[str]) -> Job:
    """Return the job a script was started with: the path of its JSON."""
    told = json.loads(Path(argv[1]).read_text())
    return Job(**told | {"content": tuple(told["content"])})


def memory(what: str) -> int:
    """Return ``VmRSS`` or ``VmHWM`` of this process, in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{what}:\s+(\d+)", status)[1]) * 1024


class Highest:
    """The k highest values of every neuron, and their rows, by torch.topk."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._kept: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def add(self, rows: Rows, first_row: int) -> None:
        """Take a batch whose first row has this number."""
        start, stop = self._job.content
        context = self._job.context
        for site, values in rows.items():
            windows = values.view(-1, context, values.shape[-1])[:, start:stop]
            numbers = first_row + torch.arange(len(values)).view(-1, context)[:, start:stop]
            # Along contiguous memory, and unsorted until the end: twice as fast as along rows.
            columns = windows.permute(2, 0, 1).reshape(windows.shape[2], -1)
            found = columns.topk(min(self._job.k, columns.shape[1]), dim=1, sorted=False)
            best = found.values, numbers.flatten()[found.indices]
            if site in self._kept:
                both = [torch.cat(pair, dim=1) for pair in zip(self._kept[site], best, strict=True)]
                kept = both[0].topk(min(self._job.k, both[0].shape[1]), dim=1, sorted=False)
                best = kept.values, both[1].gather(1, kept.indices)
            self._kept[site] = best

    def save(self, path: Path) -> None:
        """Write the values, highest first, and their rows."""
        tensors = {}
        for site, (values, numbers) in self._kept.items():
            order = values.argsort(dim=1, descending=True, stable=True)
            tensors[f"{site}/values"] = values.gather(1, order)
            tensors[f"{site}/rows"] = numbers.gather(1, order)
        save_file(tensors, path)


def measure(job: Job, version: str, capture: Callable[[torch.Tensor], Rows]) -> None:
    """Run a job for a peer and report it.

    Parameters
    ----------
    job : Job
        What to do.
    version : str
        Of the peer.
    capture : callable
        From token ids ``(windows, context)`` to the rows of every site.
    """
    report = Report(version)
    folder = Path(job.folder)
    batches = job.batches()
    with torch.no_grad():
        capture(batches[0])
        report.loaded_bytes = memory("VmRSS")
        if not job.for_memory:
            started = time.perf_counter()
            for batch in batches:
                capture(batch)
            report.in_ram = time.perf_counter() - started
        report.parts = dict.fromkeys(("capture", "write", "top-k"), 0.0)
        _on_disk(job, folder, batches, capture, report)
    report.n_bytes = sum(path.stat().st_size for path in folder.glob("batch-*"))
    report.peak_bytes = memory("VmHWM")
    _sample(job, folder)
    finish(job, report)


def _on_disk(
    job: Job,
    folder: Path,
    batches: list[torch.Tensor],
    capture: Callable[[torch.Tensor], Rows],
    report: Report,
) -> None:
    highest = Highest(job)
    first_row = 0

    def spent(part: str, since: float) -> float:
        now = time.perf_counter()
        report.parts[part] += now - since
        return now

    started = now = time.perf_counter()
    for i, batch in enumerate(batches):
        rows = capture(batch)
        now = spent("capture", now)
        stored = {
            site: rows[site].to(TORCH[dtype]).contiguous() for site, dtype in job.dtypes.items()
        }
        save_file(stored, folder / f"batch-{i:05d}.safetensors")
        del stored
        now = spent("write", now)
        highest.add(rows, first_row)
        first_row += batch.numel()
        now = spent("top-k", now)
    sync(folder)
    now = spent("write", now)
    highest.save(folder / "highest.safetensors")
    spent("top-k", now)
    report.on_disk = time.perf_counter() - started


def sync(folder: Path) -> None:
    """Make the files of a folder last."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _sample(job: Job, folder: Path) -> None:
    found: dict[str, list[torch.Tensor]] = {site: [] for site in job.dtypes}
    for window in job.sampled():
        number, place = divmod(window, job.batch_windows)
        with safe_open(folder / f"batch-{number:05d}.safetensors", "pt") as file:
            for site, parts in found.items():
                first = place * job.context
                parts.append(file.get_slice(site)[first : first + job.context])
    save_file({s: torch.cat(parts) for s, parts in found.items()}, folder / "sample.safetensors")


def finish(job: Job, report: Report) -> None:
    """Write the report where it is looked for."""
    Path(job.folder, "report.json").write_text(json.dumps(asdict(report)))


def threads() -> None:
    """Use as many threads as our own capture does."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))


def start() -> Job:
    """Return the job of this process."""
    threads()
    return job_of(sys.argv)
