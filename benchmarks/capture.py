"""Capture against the bare forward pass over the same batches: ``python -m benchmarks.capture``.

Alternates, in one process: a whole capture, from text to the compacted store (tokenising, hooks,
folds, shards synced to disk, commits, index), and then the model alone over the batches it ran: no
hooks, no head, nothing kept.  What ``--dry-run`` says beforehand stands below.

``--model smollm2``, ``--keep none``: other lines of the ledger.  ``--peers DIR``: against Ecco,
TransformerLens, nnsight and SAELens instead, each in its own venv below DIR, where
``python -m benchmarks.peers.install DIR`` has put them.  ``--device cuda``: a random GPT-2-small
and a random Llama-3.1-8B in bfloat16 on the GPU, with keep none and all, beside the rates of the
link and of the disk in the same run.

The other figures of capture: ``benchmarks.memory`` (peak memory as the corpus grows),
``benchmarks.shard`` (the writer alone), ``benchmarks.folds`` (the top-k fold alone).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table

from actstore.capturing import Limits, Settings, run_capture, run_estimate
from actstore.capturing.batches import batches
from actstore.errors import NotEnoughDisk
from actstore.models import LanguageModel, load
from actstore.store import CoreStore
from benchmarks._inputs import MODELS, SPEECHES, RandomText, installed, random_model
from benchmarks.peers.compare import compare

_CONSOLE = Console(width=110)
_DEFAULT_TOKENS = {"minilm": 65_536, "smollm2": 16_384}


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="minilm")
    parser.add_argument("--keep", choices=("all", "none"), default="all")
    parser.add_argument("--tokens", type=int, help="default 65,536; of SmolLM2 16,384")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-tokens", type=int, help="default: the capture's own")
    parser.add_argument("--budget", help="memory beyond the model; default: the capture's own")
    parser.add_argument("--folder", type=Path, help="where to write; default: the temporary one")
    parser.add_argument("--peers", type=Path, metavar="DIR", help="where the peers are installed")
    parser.add_argument(
        "--beside",
        nargs="+",
        choices=("bert", "gpt2"),
        default=("bert", "gpt2"),
        help="models for --peers: MiniLM, and a random GPT-2 of its size; default both",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--tiny", action="store_true", help="a few seconds, for the tests")
    options = parser.parse_args(argv)
    if options.tiny:
        options.tokens, options.rounds = 512, 1
    with tempfile.TemporaryDirectory(prefix="actstore-bench-", dir=options.folder) as name:
        folder = Path(name)
        if options.device == "cuda":
            _on_cuda(folder, options)
        elif options.peers:
            tokens = options.tokens or _DEFAULT_TOKENS["minilm"]
            compare(
                folder,
                options.peers,
                tokens,
                options.rounds,
                context=512,
                batch_tokens=4096,
                models=options.beside,
                budget=options.budget,
            )
        else:
            _on_cpu(folder, options)
            if options.tiny:
                compare(folder, None, 256, 1, context=64, batch_tokens=128, models=("gpt2",))


def _on_cpu(folder: Path, options: argparse.Namespace) -> None:
    model = load(installed(*MODELS[options.model]), device="cpu")
    settings = Settings(
        context=min(512, model.context_limit),
        keep=options.keep,
        limits=Limits(options.tokens or _DEFAULT_TOKENS[options.model]),
        batch_tokens=options.batch_tokens,
    )
    corpus = installed(*SPEECHES)
    estimate = run_estimate(
        model, corpus, folder / "estimated", settings=settings, budget=options.budget
    )
    rounds = measure(folder, model, corpus, settings, options.rounds, budget=options.budget)
    _print(options.model, f"keep={options.keep}", rounds, f"{torch.get_num_threads()} threads")
    seconds, n_bytes = statistics.median(r.capture for r in rounds), rounds[0].n_bytes
    _CONSOLE.print(
        f"estimated before it: {estimate.seconds:.1f} s, {estimate.seconds / seconds:.3f} of the "
        f"median; {estimate.total_bytes / 1e9:.3f} GB, {n_bytes / 1e9:.3f} there were"
    )


# -- one model ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Round:
    """A capture, and the model alone over its batches."""

    bare: float
    """Seconds of the model alone."""
    capture: float
    """Seconds of the capture."""
    made: float
    """Seconds of it until there was a store; they do not grow with the corpus."""
    parts: dict[str, float]
    """What it consists of: in turn, then the stages, which overlap."""
    rows: int
    """Rows captured."""
    n_bytes: int
    """Bytes of the store."""
    padding: float
    """Share of the positions fed that held no token."""
    gpu_bytes: int
    """Most memory allocated on the GPU, the model's included."""


def measure(
    folder: Path,
    model: LanguageModel,
    corpus: Any,
    settings: Settings,
    n_rounds: int,
    budget: str | None = None,
) -> list[Round]:
    """Return what capture and the bare forward took, alternating.

    A first capture of a few tokens compiles what is compiled, and is not counted.
    """
    few = replace(settings, limits=replace(settings.limits, max_tokens=4096))
    run_capture(model, corpus, folder / "warm", settings=few, budget=budget)
    shutil.rmtree(folder / "warm")
    rounds = []
    for number in range(n_rounds):
        path = folder / str(number)
        marks: dict[str, list[float]] = {}

        def progress(
            stage: str, done: int, total: int, marks: dict[str, list[float]] = marks
        ) -> None:
            marks.setdefault(stage, []).append(time.perf_counter())

        _synchronize(model)
        started = time.perf_counter()
        store, timing = run_capture(
            model, corpus, path, settings=settings, budget=budget, progress=progress
        )
        _synchronize(model)
        done = time.perf_counter()
        captured = marks["capture"][-1]
        made = marks["plan"][0] - started
        parts = {
            "  store made: dtypes probed, fingerprints": made,
            "  plan begun, first batch": marks["capture"][0] - started - made,
            "  the other batches": captured - marks["capture"][0],
            "  last writes, commit and index": done - captured,
        }
        for stage, spent in asdict(timing).items():
            if isinstance(spent, float):  # the others are counts
                parts[f"    {stage} (stages overlap)"] = spent
        rounds.append(
            Round(
                bare_forward(store, model),
                done - started,
                made,
                parts,
                store.n_rows(),
                store.n_bytes(),
                timing.padding,
                _gpu_bytes(model),
            )
        )
        shutil.rmtree(path)
    return rounds


def bare_forward(store: CoreStore, model: LanguageModel) -> float:
    """Return the seconds the model alone takes for the batches of a store."""
    work = [batch for segment in store.planned for batch in batches(store, model, segment)]
    with torch.inference_mode():
        _synchronize(model)
        started = time.perf_counter()
        for batch in work:
            mask = None
            if len(set(batch.lengths)) > 1:
                lengths = torch.tensor(batch.lengths)[:, None]
                mask = (torch.arange(batch.input_ids.shape[1]) < lengths).long().to(model.device)
            model.module(input_ids=batch.input_ids.to(model.device), attention_mask=mask)
        _synchronize(model)
        return time.perf_counter() - started


def _synchronize(model: LanguageModel) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)


def _gpu_bytes(model: LanguageModel) -> int:
    if model.device.type != "cuda":
        return 0
    return torch.cuda.max_memory_allocated(model.device)


def _print(name: str, keep: str, rounds: list[Round], where: str) -> None:
    first = rounds[0]
    versions = ", ".join(f"{n} {importlib.metadata.version(n)}" for n in ("torch", "transformers"))
    table = Table(
        title=f"{name}, {keep}: {first.rows:,} tokens, {first.n_bytes / 1e9:.2f} GB, padding "
        f"{first.padding:.1%}",
        caption=versions,
    )
    for column in ("part", "seconds", "us a token", "ratio to bare"):
        table.add_column(column, justify="left" if column == "part" else "right")
    lines = [{"bare forward": r.bare, "capture": r.capture} | r.parts for r in rounds]
    for part in lines[0]:
        seconds = statistics.median(line[part] for line in lines)
        ratio = statistics.median(line[part] / line["bare forward"] for line in lines)
        table.add_row(part, f"{seconds:.2f}", f"{seconds / first.rows * 1e6:.1f}", f"{ratio:.3f}")
    _CONSOLE.print(table)
    for what, ratios in (
        ("capture / bare forward", [r.capture / r.bare for r in rounds]),
        ("the same once the store was made", [(r.capture - r.made) / r.bare for r in rounds]),
    ):
        shown = ", ".join(f"{ratio:.3f}" for ratio in ratios)
        _CONSOLE.print(f"{what}: median {statistics.median(ratios):.3f} of {shown}; {where}")


# -- on a GPU ----------------------------------------------------------------------------------

PUBLISHED = (
    ("Observatory, Llama-3.1-8B, all FFNN neurons, 2 A100", 412, "64 h for 95 M tokens"),
    ("GLUScope, 8B, all FFNN neurons, A100", 278, "20 h for 20 M tokens"),
    ("interp-engine, Llama-3.1-8B, all residuals, in RAM, B200", 13_000, "38.6 ms for 512 tokens"),
)
"""Tokens a second that others state, or that follow from what they state."""


def _gpt2_small() -> transformers.PretrainedConfig:
    return transformers.GPT2Config()


def _llama_8b() -> transformers.PretrainedConfig:
    return transformers.LlamaConfig(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
    )


CUDA_LINES: tuple[tuple[str, Callable[[], transformers.PretrainedConfig], str, int], ...] = (
    ("GPT-2-small", _gpt2_small, "none", 2_097_152),
    ("GPT-2-small", _gpt2_small, "all", 131_072),
    ("Llama-3.1-8B", _llama_8b, "none", 262_144),
    ("Llama-3.1-8B", _llama_8b, "all", 16_384),
)
"""Shape, keep and tokens: about 12 GB and 19 GB on disk where all is kept."""


def _on_cuda(folder: Path, options: argparse.Namespace) -> None:
    if not torch.cuda.is_available():
        _CONSOLE.print("no CUDA device: not measured")
        return
    where = torch.cuda.get_device_name()
    link, disk = link_rate(), disk_rate(folder)
    _CONSOLE.print(
        f"{where}: link to pinned memory {link / 1e9:.1f} GB/s, write + fsync {disk / 1e9:.1f} GB/s"
    )
    made: tuple[str, LanguageModel | None] = ("", None)
    for name, config, keep, n_tokens in CUDA_LINES:
        if made[0] != name:
            made = ("", None)  # one at a time
            torch.cuda.empty_cache()
            made = name, load(*random_model(config(), "cuda", torch.bfloat16))
        model = made[1]
        assert model is not None
        torch.cuda.reset_peak_memory_stats()
        n_tokens = options.tokens or n_tokens
        settings = Settings(
            context=512,
            keep=keep,
            limits=Limits(n_tokens),
            batch_tokens=options.batch_tokens or 16_384,
        )
        # More than enough: a word of it is at least a token.
        corpus = list(RandomText(n_tokens // 2_000 + 1, 2_000))
        try:
            rounds = measure(folder, model, corpus, settings, options.rounds, options.budget)
        except NotEnoughDisk as error:
            _CONSOLE.print(f"{name}, keep={keep}: not measured: {error}")
            continue
        _print(name, f"keep={keep}", rounds, where)
        seconds = statistics.median(r.capture for r in rounds)
        rate = rounds[0].n_bytes / seconds
        _CONSOLE.print(
            f"{rounds[0].rows / seconds:,.0f} tokens/s; {rate / 1e9:.2f} GB/s to disk, "
            f"{rate / min(link, disk):.2f} of the slower of link and disk; "
            f"{rounds[0].gpu_bytes / 1e9:.1f} GB of the GPU's memory"
        )
    for name, rate, source in PUBLISHED:
        _CONSOLE.print(f"published: {name}: {rate:,} tokens/s ({source})")


def link_rate(n_bytes: int = 2**28, repeats: int = 8) -> float:
    """Return bytes a second from the GPU into pinned memory."""
    source = torch.empty(n_bytes, dtype=torch.uint8, device="cuda")
    target = torch.empty(n_bytes, dtype=torch.uint8, pin_memory=True)
    target.copy_(source)
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(repeats):
        target.copy_(source, non_blocking=True)
    torch.cuda.synchronize()
    return n_bytes * repeats / (time.perf_counter() - started)


def disk_rate(folder: Path, n_bytes: int = 2**30, repeats: int = 4) -> float:
    """Return bytes a second of plain writes of files, each synced."""
    block = os.urandom(2**24)
    started = time.perf_counter()
    for number in range(repeats):
        with (folder / f"plain-{number}").open("wb") as file:
            for _ in range(n_bytes // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
    seconds = time.perf_counter() - started
    for number in range(repeats):
        (folder / f"plain-{number}").unlink()
    return n_bytes * repeats / seconds


if __name__ == "__main__":
    main()
