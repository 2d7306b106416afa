"""Peak memory as the corpus grows: ``python -m benchmarks.memory [capture|demo]``.

Each size runs in a process of its own.  ``capture``: a small random model, all rows kept, a budget
of 128 MB.  ``demo``: model, capture, NMF, CKA, queries, page and notebook.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

_CAPTURE = """
import transformers
from actstore.capturing import Limits, Settings, run_capture
from actstore.models import load
from benchmarks._inputs import RandomText, random_model

n_tokens = int(sys.argv[2])
config = transformers.GPT2Config(
    n_embd=64, n_layer=2, n_head=4, n_positions=256, vocab_size=512, bos_token_id=0, eos_token_id=0
)
model = load(*random_model(config))
before = memory("VmRSS")
started = time.perf_counter()
store, _ = run_capture(
    model,
    RandomText(n_tokens // 500 + 1, 500),
    sys.argv[1] + "/store",
    settings=Settings(keep="all", limits=Limits(n_tokens)),
    budget="128MB",
)
"""
_DEMO = """
import itertools
from actstore.demo import Speeches, run_demo

class Repeated:
    def __init__(self, times, first):
        self.speeches, self.times, self.first = Speeches(), times, first
    def __iter__(self):
        for _ in range(self.times):
            yield from itertools.islice(self.speeches, self.first)

times, first = int(sys.argv[2]), int(sys.argv[3]) or None
before = memory("VmRSS")
started = time.perf_counter()
store = run_demo(sys.argv[1], corpus=Repeated(times, first), say=lambda shown: None)
"""
_BEFORE = """
import json, sys, time
from benchmarks.peers.harness import memory
"""
_AFTER = """
print(json.dumps({
    "rows": store.n_rows(),
    "bytes": store.n_bytes(),
    "seconds": time.perf_counter() - started,
    "before": before,
    "peak": memory("VmHWM"),
}))
"""


def measure(code: str, *arguments: int) -> dict[str, float]:
    """Return rows, bytes, seconds and memory of what some code does in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="actstore-bench-") as folder:
        done = subprocess.run(
            [sys.executable, "-c", _BEFORE + code + _AFTER, folder, *map(str, arguments)],
            cwd=Path(__file__).parents[1],
            check=True,
            capture_output=True,
            text=True,
        )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _capture(tiny: bool) -> None:
    # The first also compiles, for those that follow.
    sizes = [1_000] if tiny else [10_000, 100_000, 1_000_000]
    cases = [(f"{n:,} tokens", lambda n=n: measure(_CAPTURE, n)) for n in sizes]
    _print("peak memory of capture, budget 128 MB", cases)


def _demo(tiny: bool) -> None:
    first = 2 if tiny else 0
    repeats = (1,) if tiny else (1, 2)
    cases = [(f"speeches x {n}", lambda n=n: measure(_DEMO, n, first)) for n in repeats]
    _print("peak memory of the demo", cases)


def _print(title: str, cases: Sequence[tuple[str, Callable[[], dict[str, float]]]]) -> None:
    """Print what the cases took; ratios are to the last but one."""
    baseline = cases[max(0, len(cases) - 2)][0]
    table = Table(title=title)
    for column in ("corpus", "rows", "GB stored", "seconds", "start MB", "peak MB", "ratio"):
        table.add_column(column, justify="right")
    found = {name: run() for name, run in cases}
    for name, its in found.items():
        table.add_row(
            name,
            f"{its['rows']:,.0f}",
            f"{its['bytes'] / 1e9:.2f}",
            f"{its['seconds']:.0f}",
            f"{its['before'] / 1e6:,.0f}",
            f"{its['peak'] / 1e6:,.0f}",
            f"{its['peak'] / found[baseline]['peak']:.3f}",
        )
    Console(width=100).print(table)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="?", choices=("capture", "demo"), help="default: both")
    parser.add_argument("--tiny", action="store_true", help="little text, for the tests")
    options = parser.parse_args(argv)
    for name, run in (("capture", _capture), ("demo", _demo)):
        if options.what in (None, name):
            run(options.tiny)


if __name__ == "__main__":
    main()
