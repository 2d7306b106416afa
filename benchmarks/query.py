"""Questions about neurons: ``python -m benchmarks.query [--rows N] [--kept-rows N] [--tiny]``.

Three stores are made. One holds an index alone, ``keep="none"``: N rows (10 M by default; 100 M
takes 15 GB and some minutes) x 12 sites of 3,072 neurons, words in random order. One keeps all rows
of one site of 256 neurons, the first of MiniLM's mlp_post.5 over speeches, tiled in their own
order, each value moved by at most one float16 unit: columns of a site are read from chunks of 256,
so a neuron of a wider one costs the same. One has 10,000 segments.

Beside our answers stand a brute-force scan, where rows are kept (the column of one neuron, read and
sorted; and a whole band of rows for every row, as a reader without columns would), and DuckDB over
long-format Parquet (row_id, site, neuron, value) of fewer rows, as its title says. A process is
timed from its start to its end; the first question of a process after its imports. All is warm: in
the page cache, and, but for new processes, verified. Figures are medians.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

import actstore
from benchmarks._inputs import MODELS, SPEECHES, installed
from benchmarks._made_stores import MadeStore, jittered

_ALL_TOP = (
    "SELECT e.site, e.neuron, e.rank, e.value, v.text FROM exemplars e "
    "JOIN vocabulary v USING (token_id) WHERE e.side = 'top' AND e.rank <= 20"
)
_FIRST = """
import json, sys, time
import duckdb, numba, numpy, pandas, pyarrow.dataset, pyarrow.parquet
import actstore.api, actstore.folds, actstore.query
started = time.perf_counter()
store = actstore.open(sys.argv[1])
opened = time.perf_counter()
{question}
print(json.dumps([opened - started, time.perf_counter() - opened]))
"""
_TOP = "store.top(sys.argv[2], 7)"
_SQL = "store.sql('SELECT max(value) FROM exemplars WHERE site = $site AND neuron = 7', "
_SQL += "site=sys.argv[2])"


class Report:
    """The table, filled row by row."""

    def __init__(self) -> None:
        self.table = Table(title="questions to a store")
        for column in ("store", "question", "median", "at most", "beside", "ratio"):
            self.table.add_column(column)

    def add(
        self,
        store: str,
        question: str,
        seconds: float,
        bar: str,
        beside: str = "",
        other: float | None = None,
    ) -> None:
        """Add a figure; `other` is the time of what stands beside it."""
        if other is not None:
            beside = f"{beside}: {_time(other)}"
        ratio = "" if other is None else f"{other / seconds:,.1f} x"
        self.table.add_row(store, question, _time(seconds), bar, beside, ratio)


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:,.1f} ms" if seconds < 1 else f"{seconds:,.2f} s"


def timed(ask: Callable[[], Any], n: int) -> float:
    """Return the median seconds of a call, the first one left out."""
    ask()
    found = []
    for _ in range(n):
        started = time.perf_counter()
        ask()
        found.append(time.perf_counter() - started)
    return statistics.median(found)


def in_turn(calls: Mapping[str, Callable[[], Any]], n: int) -> dict[str, float]:
    """Return the median seconds of calls that alternate, the first round left out."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for counted in [False] + [True] * n:
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            if counted:
                found[name].append(time.perf_counter() - started)
    return {name: statistics.median(times) for name, times in found.items()}


def _process(*words: str, n: int) -> tuple[float, list[str]]:
    """Return the median seconds of a process, and what each printed; the first one left out."""
    seconds, said = [], []
    for counted in [False] + [True] * n:
        started = time.perf_counter()
        done = subprocess.run([sys.executable, *words], check=True, capture_output=True, text=True)
        if counted:
            seconds.append(time.perf_counter() - started)
            said.append(done.stdout)
    return statistics.median(seconds), said


def _first_question(path: Path, site: str, question: str, n: int) -> tuple[float, float]:
    _, said = _process("-c", _FIRST.format(question=question), str(path), site, n=n)
    opened, asked = zip(*(json.loads(line) for line in said), strict=True)
    return statistics.median(opened), statistics.median(asked)


def ask_index(report: Report, folder: Path, n_segments: int, width: int, n: int) -> None:
    """Questions that the index answers, of a store that keeps no rows."""
    sites = {f"mlp_post.{layer}": width for layer in range(12)}
    made = MadeStore(folder / "index", n_segments, sites, keep=0.0)
    made.commit_nothing_kept()
    made.publish_index(made.made_up_states)
    path, title = made.core.path, f"{made.n_rows / 1e6:,.1f} M rows x {12 * width:,}"
    n_rows, rng = made.n_rows, np.random.default_rng(1)
    del made
    store = actstore.open(path)

    def any_neuron() -> tuple[str, int]:
        return f"mlp_post.{rng.integers(12)}", int(rng.integers(width))

    for site in sites:
        store.top(site, 0, before=0, after=0)  # verified
    long = f"{min(n_rows, 1 << 20) / 1e6:,.1f} M rows x 16, DuckDB long"
    beside = timed(_long_format(folder, min(n_rows, 1 << 20), 16), 3)
    lists = "SELECT row_id, value FROM top_tokens($site, $neuron, 20)"

    def by_sql() -> None:
        site, neuron = any_neuron()
        store.sql(lists, site=site, neuron=neuron)

    report.add(title, "top 20 by SQL, index", timed(by_sql, n), "", long, beside)
    found = timed(lambda: store.top(*any_neuron(), 20), n)
    report.add(title, "top 20 with snippets", found, "40 ms", long, beside)
    found = timed(lambda: store.top(*any_neuron(), 20, before=0, after=0), n)
    report.add(title, "top 20 with tokens", found, "5 ms", long, beside)
    found = timed(lambda: store.sql(_ALL_TOP), max(n // 10, 3))
    report.add(title, f"all {12 * width:,} neurons' top 20 with texts", found, "1 s")
    few = max(n // 10, 1)
    for name, question in (("top", _TOP), ("sql", _SQL)):
        opened, asked = _first_question(path, "mlp_post.5", question, few)
        report.add(title, f"first question of a process, {name}", asked, "250 ms")
        report.add(title, "opening it before that", opened, "")
    command = "from actstore.cli import main; main()"
    found, _ = _process("-c", command, "top", str(path), "mlp_post.5", "7", n=few)
    bare, _ = _process("-c", "import numpy, pyarrow.parquet, duckdb, pandas", n=few)
    report.add(title, "actstore top, a whole process", found, "1.5 s", "imports alone", bare)


def _long_format(folder: Path, n_rows: int, n_neurons: int) -> Callable[[], Any]:
    """Write (row_id, site, neuron, value) row after row; return a top 20 of one neuron of it."""
    path = folder / "long.parquet"
    rng = np.random.default_rng(2)
    step = 1 << 16
    writer: pq.ParquetWriter | None = None
    for start in range(0, n_rows, step):
        n = min(step, n_rows - start)
        table = pa.table(
            {
                "row_id": np.repeat(np.arange(start, start + n), n_neurons),
                "site": pa.DictionaryArray.from_arrays(
                    np.zeros(n * n_neurons, np.int8), ["mlp_post.5"]
                ),
                "neuron": np.tile(np.arange(n_neurons, dtype=np.int32), n),
                "value": rng.normal(size=n * n_neurons).astype(np.float32),
            }
        )
        writer = writer or pq.ParquetWriter(path, table.schema, compression="zstd")
        writer.write_table(table)
    assert writer is not None
    writer.close()
    connection = duckdb.connect(config={"threads": 2})
    query = (
        f"SELECT row_id, value FROM '{path}' WHERE site = 'mlp_post.5' AND neuron = 7 "
        "ORDER BY value DESC, row_id LIMIT 20"
    )
    return lambda: connection.sql(query).fetchall()


def ask_rows(report: Report, folder: Path, n_segments: int, real_rows: int, n: int) -> None:
    """Questions that need the rows, of a store that keeps them."""
    base = _real_activations(folder, real_rows)
    size = 1 << 16
    made = MadeStore(folder / "rows", n_segments, {"mlp_post.5": base.shape[1]}, keep=1.0)
    made.commit_rows(jittered(base, size, 0))
    made.publish_index(made.states_of_rows)
    store = actstore.open(made.core.path)
    info = store.site("mlp_post.5")
    title = f"{made.n_rows / 1e6:,.1f} M rows x {info.width}, kept"
    width = info.width
    del made, base
    rng = np.random.default_rng(3)
    neurons = rng.choice(width, min(n, width), replace=False).tolist()

    def column(neuron: int, segments: int) -> npt.NDArray[Any]:
        parts = [store.read_column(info, s, neuron) for s in store.committed[:segments]]
        return np.concatenate(parts)

    def brute(neuron: int, k: int) -> list[tuple[int, float]]:
        values = column(neuron, n_segments).astype(np.float32) + np.float32(0)
        rows = np.flatnonzero(np.arange(len(values)) % 512)
        keys = -values[rows]
        near = np.flatnonzero(keys <= np.partition(keys, k - 1)[k - 1])
        order = near[np.lexsort((rows[near], keys[near]))[:k]]
        return list(zip(rows[order].tolist(), (-keys[order]).tolist(), strict=True))

    for k in (200, 1000):
        if k >= store.n_rows() // 2:
            continue
        ours: list[float] = []
        theirs: list[float] = []
        scans: list[float] = []
        tops = {}
        for counted, neuron in [(False, neurons[0])] + [(True, neuron) for neuron in neurons]:
            started = time.perf_counter()
            tops[neuron] = store.top(info.site, neuron, k, before=0, after=0)
            asked = time.perf_counter()
            column(neuron, n_segments)
            read = time.perf_counter()
            if counted:
                ours.append(asked - started)
                theirs.append(read - asked)
        for neuron, top in tops.items():
            started = time.perf_counter()
            expected = brute(neuron, k)
            scans.append(time.perf_counter() - started)
            table = top.to_arrow()
            pairs = zip(table["row_id"].to_pylist(), table["value"].to_pylist(), strict=True)
            assert list(pairs) == expected, f"neuron {neuron}, k = {k}"
        question = f"top {k:,} with tokens ({top.reached})"
        bar = "1/3.5 of the column" if k == 200 else "the column"
        found = statistics.median(ours)
        report.add(title, question, found, bar, "reading the column", statistics.median(theirs))
        report.add("", "", found, "", "brute force", statistics.median(scans))
    part = min(16, n_segments)
    times = in_turn(
        {
            "column": lambda: column(neurons[0], part),
            "rows": lambda: [
                store.read(info, s, 0, size)[:, neurons[0]].copy() for s in range(part)
            ],
        },
        n,
    )
    question = f"a column of {part * size / 1e6:,.2f} M rows"
    report.add(title, question, times["column"], "50 ms", "from whole rows", times["rows"])


def _real_activations(folder: Path, n_rows: int) -> npt.NDArray[np.float16]:
    """Return content rows of MiniLM over speeches, 256 neurons; noise where it is not installed."""
    try:
        model, texts = installed(*MODELS["minilm"]), installed(*SPEECHES)
    except importlib.metadata.PackageNotFoundError:
        print("no MiniLM: activations are noise, of which zones prune nothing", file=sys.stderr)
        return np.random.default_rng(0).normal(size=(n_rows, 256)).astype(np.float16)
    path = folder / "captured"
    store = actstore.capture(
        model, texts, path, sites="mlp_post.5", keep="all", dtype="float16", max_tokens=n_rows
    )
    rows = store.rows("content").row_ids()
    found = store["mlp_post.5"][rows][:, :256].copy()
    shutil.rmtree(path)
    return found


def ask_many_segments(report: Report, folder: Path, n_segments: int, n: int) -> None:
    """Opening a store of many segments, and its first question."""
    made = MadeStore(
        folder / "many", n_segments, {"mlp_post.5": 16}, 0.0, 4096, rows=128, context=64
    )
    made.commit_nothing_kept()
    made.publish_index(made.made_up_states)
    path, parts = made.core.path, len(made.core.parts)
    del made
    title = f"{n_segments:,} segments, {parts:,} plan parts"
    report.add(title, "opening", timed(lambda: actstore.open(path), n), "1 s")
    opened, asked = _first_question(path, "mlp_post.5", "store.top(sys.argv[2], 7)", 3)
    report.add(title, "opening, a new process", opened, "1 s")
    report.add(title, "its first question", asked, "250 ms")


def main(argv: list[str] | None = None) -> None:
    """Make the stores, ask, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.query", description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="small stores: only to run it")
    parser.add_argument("--rows", type=float, default=10e6, help="rows of the index-only store")
    parser.add_argument("--kept-rows", type=float, default=4e6, help="rows of the kept store")
    parser.add_argument("--only", choices=["index", "rows", "segments"], help="one of the stores")
    parser.add_argument("--folder", type=Path, help="where to write (default: the temporary one)")
    options = parser.parse_args(argv)
    tiny, segments = options.tiny, 1 << 16
    report = Report()
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = Path(temporary)
        if options.only in (None, "index"):
            n_segments = 2 if tiny else -(-int(options.rows) // segments)
            ask_index(report, folder, n_segments, 64 if tiny else 3072, 3 if tiny else 50)
        if options.only in (None, "rows"):
            n_segments = 1 if tiny else -(-int(options.kept_rows) // segments)
            ask_rows(report, folder, n_segments, 512 if tiny else 1 << 16, 3 if tiny else 11)
        if options.only in (None, "segments"):
            ask_many_segments(report, folder, 40 if tiny else 10_000, 3 if tiny else 7)
    console = Console(width=160)
    console.print(report.table)
    console.print(
        f"Python {platform.python_version()}, DuckDB {duckdb.__version__}, pyarrow "
        f"{pa.__version__}, NumPy {np.__version__}, {os.cpu_count()} cores",
        highlight=False,
    )


if __name__ == "__main__":
    main()
