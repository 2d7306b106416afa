"""Shards against plain writes and zarr-python: ``python -m benchmarks.shard [--tiny]``.

The baselines of writing are the same bytes written with one ``write`` a shard, and zarr-python
given whole shards of the same layout, its fastest documented way.  zarr-python syncs nothing by
itself, so after its write the shard is opened and synced, as the others are.  Reads are warm: the
files have just been written.  Rounds alternate over the contestants; figures are medians.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import google_crc32c
import numpy as np
import zarr
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from actstore.shard import (
    ShardFacts,
    ShardLayout,
    ShardReader,
    ShardWriter,
    crc32c_of_file,
    to_band,
)

N_SHARDS = 4


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.shard", description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="a few MB, one round: only to run it")
    parser.add_argument("--folder", type=Path, help="where to write (default: the temporary one)")
    options = parser.parse_args(argv)
    n_rounds, rows = (1, 512) if options.tiny else (5, 16384)
    layout = ShardLayout.for_width(3072, rows, "float16", chunk_rows=rows // 4)
    n_bytes = N_SHARDS * layout.n_row_chunks * layout.chunk_bytes * layout.n_column_chunks

    table = Table(title=f"{N_SHARDS} shards of {rows:,} x 3072 float16, {n_bytes / 1e6:.0f} MB")
    for column in ("what", "seconds", "GB/s", "ratio", "of"):
        table.add_column(column, justify="left" if column in ("what", "of") else "right")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        values = np.random.default_rng(3).normal(size=(rows, layout.width)).astype(np.float16)
        facts = _writing(table, Path(folder), layout, values, n_bytes, n_rounds)
        _reading(table, Path(folder), layout, facts, values, n_bytes, n_rounds)
        _checking(table, Path(folder), (1, 10) if options.tiny else (100, 1000), n_rounds)
    console = Console()
    console.print(table)
    console.print(
        f"medians of {n_rounds} alternating rounds; ours and zarr-python's with a crc32c a chunk; "
        "one fsync a shard, which zarr-python does not do by itself; "
        f"Python {platform.python_version()}, NumPy {np.__version__}, "
        f"zarr {zarr.__version__}, google-crc32c {google_crc32c.implementation}, "
        f"{os.cpu_count()} cores",
        highlight=False,
    )


def _writing(
    table: Table, folder: Path, layout: ShardLayout, values: NDArray, n_bytes: int, n_rounds: int
) -> ShardFacts:
    """Time the writing of rows already in memory; leaves arrays `ours` and `zarr` behind."""
    bands = [to_band(rows, layout) for rows in np.split(values, layout.n_row_chunks)]
    arrays = {name: folder / name for name in ("ours", "zarr")}
    for path in arrays.values():
        path.mkdir()
        (path / "zarr.json").write_text(json.dumps(layout.zarr_metadata(N_SHARDS, {})))
    facts: list[ShardFacts] = []
    with zarr.config.set({"array.write_empty_chunks": True}):  # spares it a look at every value
        array = zarr.open_array(arrays["zarr"], mode="r+")

    def plain(i: int, sync: bool) -> None:
        with _created(folder / "plain" / f"{i}") as file:
            file.write(values.data)
            if sync:
                os.fsync(file.fileno())

    def ours(i: int, sync: bool, relayout: bool) -> None:
        with _created(arrays["ours"] / "c" / f"{i}" / "0") as file:
            writer = ShardWriter(file, layout)
            for r, band in enumerate(bands):
                if relayout:
                    top = r * layout.chunk_rows
                    band = to_band(values[top : top + layout.chunk_rows], layout)
                writer.write_band(band)
            facts[:] = [writer.finish()]
            if sync:
                file.flush()
                os.fsync(file.fileno())

    def zarr_python(i: int, sync: bool) -> None:
        array[i * layout.rows : (i + 1) * layout.rows] = values
        if sync:
            with open(arrays["zarr"] / "c" / f"{i}" / "0", "rb") as file:
                os.fsync(file.fileno())

    def each(write: Callable[..., None], *args: bool) -> Callable[[], None]:
        return lambda: [write(i, *args) for i in range(N_SHARDS)] and None

    def clear() -> None:
        # A fresh file each time: overwriting is another cost, and no store overwrites.
        for path in (folder / "plain", arrays["ours"] / "c", arrays["zarr"] / "c"):
            shutil.rmtree(path, ignore_errors=True)

    for sync, label in ((True, "write + fsync"), (False, "write")):
        contestants = {
            f"{label}: plain": each(plain, sync),
            f"{label}: ours, from bands": each(ours, sync, False),
            f"{label}: ours, from rows": each(ours, sync, True),
            f"{label}: zarr-python": each(zarr_python, sync),
        }
        _add(table, _rounds(contestants, n_rounds, clear), n_bytes, f"{label}: plain")
    clear()
    each(ours, False, False)()
    each(zarr_python, False)()
    return facts[0]


def _reading(
    table: Table,
    folder: Path,
    layout: ShardLayout,
    facts: ShardFacts,
    values: NDArray,
    n_bytes: int,
    n_rounds: int,
) -> None:
    """Time warm reads of all rows, of one column, and of 64 rows."""
    paths = [folder / "ours" / "c" / f"{i}" / "0" for i in range(N_SHARDS)]
    files = [path.open("rb", buffering=0) for path in paths]

    def readers() -> list[ShardReader]:
        return [ShardReader(f.fileno(), layout, facts.n_bytes, f.name) for f in files]

    checked = readers()
    array = zarr.open_array(folder / "zarr", mode="r")
    out = np.empty_like(values)
    data = memoryview(out).cast("B")
    for i, reader in enumerate(checked):
        assert np.array_equal(reader.read_rows(0, layout.rows, out), values)
        assert np.array_equal(array[i * layout.rows :][: layout.rows], values)

    def plain() -> None:
        for file in files:
            os.preadv(file.fileno(), [data], 0)

    def first() -> None:
        for reader in readers():
            reader.read_rows(0, layout.rows, out)

    def later() -> None:
        for reader in checked:
            reader.read_rows(0, layout.rows, out)

    def zarr_rows() -> None:
        for i in range(N_SHARDS):
            array[i * layout.rows : (i + 1) * layout.rows]

    rows = {
        "all rows: plain read": plain,
        "all rows: ours, first (checked)": first,
        "all rows: ours, later": later,
        "all rows: zarr-python": zarr_rows,
    }
    _add(table, _rounds(rows, n_rounds), n_bytes, "all rows: plain read")

    n_values = N_SHARDS * layout.rows
    columns = {
        "a column: zarr-python": lambda: array[:, 1499],
        "a column: ours, first (checked)": lambda: [r.read_column(1499) for r in readers()],
        "a column: ours, later": lambda: [r.read_column(1499) for r in checked],
    }
    _add(table, _rounds(columns, n_rounds), n_values * 2, "a column: zarr-python")

    windows = {
        "64 rows: zarr-python": lambda: array[101:165],
        "64 rows: ours, first (checked)": lambda: readers()[0].read_rows(101, 165),
        "64 rows: ours, later": lambda: checked[0].read_rows(101, 165),
    }
    _add(table, _rounds(windows, n_rounds), 64 * layout.width * 2, "64 rows: zarr-python")
    for file in files:
        file.close()


def _checking(table: Table, folder: Path, sizes_mb: tuple[int, ...], n_rounds: int) -> None:
    """Time the check of whole files against reading them, both warm."""
    block = np.random.default_rng(5).bytes(10**6)
    for n_mb in sizes_mb:
        path = folder / f"{n_mb}.bin"
        with path.open("wb") as file:
            for _ in range(n_mb):
                file.write(block)

        def read(path: Path = path) -> None:
            with open(path, "rb", buffering=0) as file:
                while file.read(2**20):
                    pass

        names = f"{n_mb} MB: plain read", f"{n_mb} MB: crc32c_of_file"
        contestants = {names[0]: read, names[1]: lambda path=path: crc32c_of_file(path)}
        _add(table, _rounds(contestants, n_rounds), n_mb * 10**6, names[0])


def _created(path: Path):
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.open("wb")


def _rounds(
    contestants: dict[str, Callable[[], object]],
    n_rounds: int,
    before: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Return the median seconds of each contestant over alternating rounds."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(n_rounds):
        for name, run in contestants.items():
            before()
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def _add(table: Table, medians: dict[str, float], n_bytes: int, baseline: str) -> None:
    """Add a section; the ratio is the speed relative to that of the baseline."""
    for name, seconds in medians.items():
        table.add_row(
            name,
            f"{seconds:.4g}",
            f"{n_bytes / seconds / 1e9:.3g}",
            f"{medians[baseline] / seconds:.2f}",
            "" if name == baseline else baseline.split(": ")[1],
        )
    table.add_section()


if __name__ == "__main__":
    main()
