"""Rows for training against plain reads: ``python -m benchmarks.loader [--tiny]``.

A synthetic store of three sites x 1,536 float16 is read in three ways: plain sequential reads of
the same shard files into memory of their own, the loader's mixed batches, and blocks in row order
by store.read.  All are warm: a first pass, not counted, brings the files into the page cache and
verifies every chunk.  An epoch of an endless loader is timed, since its buffers are made once for
all epochs.  Rounds alternate over the contestants; each runs twice, and the second time is taken,
which begins and ends with as much read ahead.  Figures are medians.  The processor's seconds stand
beside, because on a machine with other work two threads wait more than one does.
"""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import zarr
from rich.console import Console
from rich.table import Table

import actstore
from actstore.store import CoreStore
from tests.synthetic import synthetic_store

WIDTH = 1536
N_SITES = 3
BATCH_ROWS = 4096
_PAUSE_SECONDS = 0.2  # until nothing is read ahead any more


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loader", description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="a few MB, one round: only to run it")
    parser.add_argument("--folder", type=Path, help="where to write (default: the temporary one)")
    options = parser.parse_args(argv)
    n_rows, n_rounds = (4096, 1) if options.tiny else (28 * 4096, 9)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        store = _made(Path(folder) / "store", n_rows)
        table, notes = _loading(store, n_rounds)
        shuffled = _shuffling(store, Path(folder) / "copy")
    console = Console(width=120)
    console.print(table)
    console.print(f"{notes}\n{shuffled}", highlight=False)
    console.print(
        f"medians of {n_rounds} alternating rounds, warm and verified; Python "
        f"{platform.python_version()}, NumPy {np.__version__}, torch {torch.__version__}, zarr "
        f"{zarr.__version__}, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads",
        highlight=False,
    )


def _made(path: Path, n_rows: int) -> actstore.Store:
    """Return a store of documents of 448 rows in windows of 256, as captured text has them."""
    rng = np.random.default_rng(0)
    base = rng.normal(size=(4096, WIDTH)).astype(np.float16)
    tiled = np.tile(base, (n_rows // len(base), 1))
    documents = [448] * (n_rows // 448) + ([n_rows % 448] if n_rows % 448 else [])
    synthetic_store(
        path,
        {f"mlp_post.{layer}": np.roll(tiled, layer, axis=1) for layer in range(N_SITES)},
        documents=documents,
        context=256,
        segment_rows=min(n_rows, 1 << 14),
        chunk_rows=4096,
    )
    return actstore.open(path)


def _loading(store: CoreStore, n_rounds: int) -> tuple[Table, str]:
    """Time an epoch of the loader against reads of the same bytes."""
    infos = store.select(None)
    files = sorted((store.path / "activations").glob("*/*/c/*/0"))
    n_bytes = sum(path.stat().st_size for path in files)
    whole = memoryview(np.zeros(max(path.stat().st_size for path in files), np.uint8))

    def plain() -> None:
        for path in files:
            with path.open("rb", buffering=0) as file:
                while file.readinto(whole):
                    pass

    def in_order() -> None:
        for segment in store.committed:
            for info in infos:
                store.read(info, segment, 0, store.planned[segment].rows[""])

    def epochs(**options: object) -> Callable[[], None]:
        loader = store.loader(None, BATCH_ROWS, rows="all", epochs=None, **options)
        n_batches = -(-store.n_rows() // BATCH_ROWS)
        batches = iter(loader)

        def epoch() -> None:
            n_rows = sum(len(b.row_ids) for b in itertools.islice(batches, n_batches))
            assert n_rows == store.n_rows()

        return epoch

    contestants = {
        "plain reads of the shards": plain,
        "rows in order, store.read": in_order,
        "loader, as stored": epochs(),
        "loader, budget 512MB": epochs(budget="512MB"),
        "loader, float32": epochs(dtype="float32"),
    }
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
    for counted in [False] + [True] * n_rounds:
        for name, run in contestants.items():
            run()
            start, processor = time.perf_counter(), time.process_time()
            run()
            if counted:
                seconds[name].append((time.perf_counter() - start, time.process_time() - processor))
            time.sleep(_PAUSE_SECONDS)
    size = f"{store.n_rows():,} rows x {N_SITES} sites x {WIDTH} float16"
    table = Table(title=f"{size}, {n_bytes / 1e6:,.0f} MB")
    for column in ("what", "seconds", "rows/s", "GB/s", "ratio to plain", "CPU seconds", "ratio"):
        table.add_column(column, justify="left" if column == "what" else "right")
    medians = {
        name: [statistics.median(part) for part in zip(*times, strict=True)]
        for name, times in seconds.items()
    }
    base = medians["plain reads of the shards"]
    for name, (wall, processor) in medians.items():
        table.add_row(
            name,
            f"{wall:.3f}",
            f"{store.n_rows() / wall:,.0f}",
            f"{n_bytes / wall / 1e9:.2f}",
            f"{base[0] / wall:.2f}",
            f"{processor:.3f}",
            f"{base[1] / processor:.2f}",
        )
    mixed = store.loader(None, BATCH_ROWS, rows="all").buffer_rows
    return table, f"batches of {BATCH_ROWS:,} rows out of buffers of {mixed:,} (budget 1 GiB)"


def _shuffling(store: actstore.Store, to: Path) -> str:
    """Time a permuted copy; return what it took."""
    start = time.perf_counter()
    store.shuffle(None, to, rows="all", budget="256MB")
    seconds = time.perf_counter() - start
    return f"store.shuffle, durable, budget 256 MB: {store.n_rows() / seconds:,.0f} rows/s"


if __name__ == "__main__":
    main()
