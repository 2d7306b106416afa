"""Peak memory of the demo as the corpus grows: ``python -m benchmarks.memory``.

Each size runs in a process of its own: model, capture, NMF, CKA, queries, page and notebook.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

_RUN = """
import itertools, json, resource, sys, time
from actstore.demo import Speeches, run_demo

class Repeated:
    def __init__(self, times, first):
        self.speeches, self.times, self.first = Speeches(), times, first
    def __iter__(self):
        for _ in range(self.times):
            yield from itertools.islice(self.speeches, self.first)

folder, times, first = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]) or None
started = time.perf_counter()
store = run_demo(folder, corpus=Repeated(times, first), say=lambda shown: None)
print(json.dumps({
    "rows": store.n_rows(),
    "gigabytes": store.n_bytes() / 1e9,
    "seconds": time.perf_counter() - started,
    "peak_megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
}))
"""


def measure(times: int, first: int) -> dict[str, float]:
    """Return rows, bytes, seconds and peak memory of the demo over the speeches, repeated."""
    with tempfile.TemporaryDirectory(prefix="actstore-bench-") as folder:
        done = subprocess.run(
            [sys.executable, "-c", _RUN, folder, str(times), str(first)],
            check=True,
            capture_output=True,
            text=True,
        )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="two speeches, for the tests")
    options = parser.parse_args(argv)
    table = Table(title="peak memory of the demo")
    for column in ("corpus", "rows", "GB stored", "seconds", "peak MB", "ratio"):
        table.add_column(column, justify="right")
    first = None
    for times in (1, 2):
        found = measure(times, 2 if options.tiny else 0)
        first = first or found["peak_megabytes"]
        table.add_row(
            f"x {times}",
            f"{found['rows']:,.0f}",
            f"{found['gigabytes']:.2f}",
            f"{found['seconds']:.0f}",
            f"{found['peak_megabytes']:,.0f}",
            f"{found['peak_megabytes'] / first:.3f}",
        )
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
