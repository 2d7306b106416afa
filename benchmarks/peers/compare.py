"""Ours and every installed peer on the same model, windows, batches and sites, a process each.

A round runs ours and then each peer, so they alternate; figures are medians over the rounds, and
ratios are taken inside a round.  Behind the last round each runs once more, for its memory alone.
What each left on disk, and the highest values it found, are compared with ours before they are
deleted.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file

from actstore.api import Store
from benchmarks._inputs import MODELS, SPEECHES, gpt2_like_minilm, installed
from benchmarks.peers.harness import Job, Report, Rows
from benchmarks.peers.install import python_of

PEERS = {
    "hooks": ("bert", "gpt2"),
    "ecco": ("bert",),
    "nnsight": ("bert",),
    "transformerlens": ("gpt2",),
    "saelens": ("gpt2",),
}
"""Which model each is compared on.  SAELens takes causal models only; of TransformerLens' BERT the
head, which this checkpoint lacks, would cost more than all blocks."""

_TITLES = {
    "bert": "MiniLM",
    "gpt2": "a random GPT-2 of MiniLM's size (6 layers, 384 wide, 1,536 neurons; 8,192 tokens)",
}
_COLUMNS = (
    "us a token",
    "in RAM",
    "/ bare",
    "on disk, top 100",
    "/ bare",
    "/ ours",
    "of that",
    "GB",
    "peak MB",
    "start MB",
    "rows off",
    "top off",
)
_HIGHEST = 100
_ROOT = Path(__file__).parents[2]


def compare(
    folder: Path,
    peers: Path | None,
    n_tokens: int,
    rounds: int,
    context: int,
    batch_tokens: int,
    models: Sequence[str] = ("bert", "gpt2"),
    budget: str | None = None,
) -> None:
    """Print a table for each model.

    Parameters
    ----------
    folder : Path
        An empty one, for what is captured.
    peers : Path, optional
        Where the peers were installed; without it only plain hooks are compared.
    n_tokens : int
        Tokens wanted; whole batches of whole windows are taken.
    rounds : int
        Runs of each.
    context, batch_tokens : int
        Tokens of a window and of a batch.
    models : sequence of {"bert", "gpt2"}
        MiniLM, and a random GPT-2 of its size.
    budget : str, optional
        Of our capture; default its own.
    """
    n_windows = max(1, n_tokens // batch_tokens) * (batch_tokens // context)
    for architecture in models:
        names = [n for n, runs in PEERS.items() if architecture in runs and (n == "hooks" or peers)]
        if architecture == "bert":
            model = Path(installed(*MODELS["minilm"]))
        else:
            model = gpt2_like_minilm(folder / "model")
        its = folder / architecture
        its.mkdir()
        _write_corpus(its / "corpus.jsonl", n_windows, context)
        job = Job(
            model=str(model),
            architecture=architecture,
            corpus=str(its / "corpus.jsonl"),
            windows=str(its / "windows.safetensors"),
            context=context,
            batch_windows=batch_tokens // context,
            content=(0, context),  # this, dtypes and widths: as our capture will find them
            dtypes={},
            widths={},
            k=_HIGHEST,
            budget=budget,
            folder=str(its),
        )
        threads = os.environ.get("OMP_NUM_THREADS", os.cpu_count())
        table = Table(
            title=f"{_TITLES[architecture]}: {n_windows * context:,} tokens, median of {rounds}; "
            f"torch {torch.__version__}, {threads} threads",
            caption="off: largest difference from ours, in units of the site's largest value; "
            "peak, start: of a process of its own, the most resident and what was there before",
        )
        for column in _COLUMNS:
            table.add_column(column, justify="left" if column == "of that" else "right")
        for row in _rows(job, n_windows * context, _run_all(job, names, peers, rounds)):
            table.add_row(*row)
        Console(width=170).print(table)


def _write_corpus(path: Path, n_windows: int, context: int) -> None:
    """Write beginnings of speeches that give a whole window each, whatever the tokenizer.

    The rest of them would be tokenised by ours and read by none.
    """
    n_chars = 12 * context
    speeches = [p.read_text(encoding="utf-8") for p in sorted(Path(installed(*SPEECHES)).iterdir())]
    texts = [text[:n_chars] for text in speeches if len(text) > n_chars]
    lines = [json.dumps({"text": texts[i % len(texts)]}) + "\n" for i in range(n_windows)]
    path.write_text("".join(lines), encoding="utf-8")


# -- running -----------------------------------------------------------------------------------


class _Failure(Exception):
    """A peer did not finish; its text is the last line it said."""


Runs = Mapping[str, list[Report]]


def _run_all(
    job: Job, names: list[str], peers: Path | None, rounds: int
) -> tuple[Runs, dict[str, tuple[float, float]], dict[str, str]]:
    """Return the reports by name, what was off, and why others failed."""
    runs: dict[str, list[Report]] = {"ours": []}
    off: dict[str, tuple[float, float]] = {}
    failed: dict[str, str] = {}
    for _ in range(rounds):
        with _own_folder(job, "ours") as its:
            runs["ours"].append(_run("ours", _python_of("ours", peers), its))
            store = Store(Path(its.folder, "store"))
            job = _as_captured(job, store)
            ours = _rows_of(store, job), _highest_of(store, job)
        for name in names:
            if name in failed:
                continue
            with _own_folder(job, name) as its:
                try:
                    runs.setdefault(name, []).append(_run(name, _python_of(name, peers), its))
                except (_Failure, FileNotFoundError) as error:
                    failed[name] = str(error)
                    continue
                theirs = Path(its.folder)
                off[name] = (
                    _difference(ours[0], load_file(theirs / "sample.safetensors")),
                    _difference(ours[1], load_file(theirs / "highest.safetensors")),
                )
    runs = {name: found for name, found in runs.items() if found}
    for name, found in runs.items():
        with _own_folder(replace(job, for_memory=True), name) as its:
            try:
                alone = _run(name, _python_of(name, peers), its)
            except _Failure as error:
                failed[name] = str(error)
                continue
        for report in found:
            report.peak_bytes, report.loaded_bytes = alone.peak_bytes, alone.loaded_bytes
    return runs, off, failed


def _python_of(name: str, peers: Path | None) -> str:
    return sys.executable if name in ("ours", "hooks") else str(python_of(peers, name))


@contextmanager
def _own_folder(job: Job, name: str) -> Iterator[Job]:
    """Yield the job in a folder of its own, which is deleted at the end."""
    folder = Path(job.folder, name)
    folder.mkdir()
    try:
        yield replace(job, folder=str(folder))
    finally:
        shutil.rmtree(folder)


def _run(name: str, python: str, job: Job) -> Report:
    path = Path(job.folder, "job.json")
    path.write_text(json.dumps(asdict(job)))
    done = subprocess.run(
        [python, "-m", f"benchmarks.peers.{name}", str(path)],
        cwd=_ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise _Failure((done.stderr.strip() or f"exit {done.returncode}").splitlines()[-1])
    return Report(**json.loads(Path(job.folder, "report.json").read_text()))


# -- comparing ---------------------------------------------------------------------------------


def _as_captured(job: Job, store: Store) -> Job:
    """Return the job with what our capture decided; writes the windows it ran."""
    tables = [store.tokens(segment) for segment in sorted(store.committed)]
    ids, flags = (
        np.concatenate([t.column(name).to_numpy() for t in tables]).reshape(-1, job.context)
        for name in ("token_id", "flags")
    )
    windows = torch.from_numpy(ids.astype(np.int64))
    save_file({"input_ids": windows}, job.windows)
    content = np.flatnonzero((flags == 0).all(axis=0))
    assert ((flags == 0) == (flags[0] == 0)).all(), "windows differ in what is content"
    return replace(
        job,
        content=(int(content[0]), int(content[-1]) + 1),
        dtypes={str(info.site): info.dtype for info in store.meta.sites},
        widths={str(info.site): info.width for info in store.meta.sites},
    )


def _rows_of(store: Store, job: Job) -> Rows:
    """Return our rows of the windows that are compared."""
    ids = store[next(iter(job.dtypes))].row_ids().reshape(-1, job.context)[job.sampled()]
    return {site: torch.from_numpy(store[site][ids.flatten()]) for site in job.dtypes}


def _highest_of(store: Store, job: Job) -> Rows:
    """Return our highest values of every neuron, from the index."""
    found = {}
    for site, width in job.widths.items():
        top = store.sql(
            "SELECT value FROM exemplars WHERE site = $site AND side = 'top' ORDER BY neuron, rank",
            site=site,
        )
        values = top.to_arrow().column("value").to_numpy().reshape(width, -1)
        found[f"{site}/values"] = torch.tensor(values[:, : job.k])
    return found


def _difference(ours: Rows, theirs: Rows) -> float:
    return max(
        float((theirs[name].float() - mine.float()).abs().max() / mine.float().abs().max())
        for name, mine in ours.items()
    )


# -- the table ---------------------------------------------------------------------------------


def _rows(
    job: Job,
    n_tokens: int,
    found: tuple[Runs, dict[str, tuple[float, float]], dict[str, str]],
) -> Iterator[tuple[str, ...]]:
    runs, off, failed = found
    ours = runs["ours"]

    def micro(seconds: Callable[[Report], float], reports: list[Report]) -> str:
        return f"{statistics.median(map(seconds, reports)) / n_tokens * 1e6:.1f}"

    def ratio(
        part: Callable[[Report], float], whole: Callable[[Report], float], reports: list[Report]
    ) -> str:
        pairs = zip(reports, ours, strict=False)
        return f"{statistics.median(part(its) / whole(mine) for its, mine in pairs):.2f}"

    yield ("model alone", micro(lambda r: r.bare, ours), "1.00")
    for name, reports in runs.items():
        parts = ", ".join(
            f"{part} {micro(lambda r, part=part: r.parts[part], reports)}"
            for part in reports[0].parts
        )
        yield (
            f"{name} {reports[0].version}",
            micro(lambda r: r.in_ram, reports),
            ratio(lambda r: r.in_ram, lambda r: r.bare, reports),
            micro(lambda r: r.on_disk, reports),
            ratio(lambda r: r.on_disk, lambda r: r.bare, reports),
            ratio(lambda r: r.on_disk, lambda r: r.on_disk, reports),
            parts,
            f"{reports[0].n_bytes / 1e9:.2f}",
            f"{reports[0].peak_bytes / 1e6:,.0f}",
            f"{reports[0].loaded_bytes / 1e6:,.0f}",
            *(f"{value:.1e}" for value in off.get(name, ())),
        )
    for name, said in failed.items():
        yield (name, "failed", "", "", "", "", said)
