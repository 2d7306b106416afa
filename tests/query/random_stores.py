"""Random stores with a whole index made by brute force, and what NumPy says of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from actstore import durable
from actstore.store import FIRST, SPECIAL, CoreStore, Generation, generations
from actstore.store.generations import site_file, space_file
from tests.synthetic import synthetic_store

CONDITIONS = {
    "position < 12": lambda t: t["position"] < 12,
    "text = ' amber'": lambda t: t["token_id"] == 1,
    "source LIKE '%3.txt' OR n_tokens < 20": lambda t: (
        (t["document"] % 10 == 3) | (t["n_tokens"] < 20)
    ),
    "row_id % 97 = 5 -- a few": lambda t: t["row_id"] % 97 == 5,
    "doc_position > 100000": lambda t: t["doc_position"] > 100000,
}
"""Conditions on rows in SQL, and the same in NumPy."""


@dataclass(frozen=True)
class Truth:
    """The committed content rows of a store, and their values: plain NumPy."""

    columns: dict[str, npt.NDArray[Any]]
    values: dict[str, npt.NDArray[np.float64]]

    def top(
        self,
        site: str,
        neuron: int,
        k: int,
        largest: bool,
        where: str | None = None,
        distinct: str | None = None,
    ) -> list[tuple[int, float]]:
        """Return (row_id, value) of the best rows, by sorting all of them."""
        values = self.values[site][:, neuron]
        keep = ~np.isnan(values)
        if where is not None:
            keep &= CONDITIONS[where](self.columns)
        rows, values = self.columns["row_id"][keep], values[keep] + 0.0
        order = np.lexsort((rows, -values if largest else values))
        groups = self.columns["row_id" if distinct is None else GROUPS[distinct]][keep]
        seen: set[int] = set()
        found = []
        for i in order.tolist():
            if groups[i] not in seen:
                seen.add(groups[i])
                found.append((int(rows[i]), float(values[i])))
        return found[:k]


GROUPS = {"window": "window_id", "document": "document"}


def hard_values(rng: np.random.Generator, shape: tuple[int, int], dtype: str) -> Any:
    """Return values with ties, zeros of both signs, subnormals, the largest numbers and NaN."""
    limits = {"float16": (65504.0, 6e-8), "bfloat16": (3.3e38, 1e-40), "float32": (3.4e38, 1e-45)}
    largest, smallest = limits[dtype]
    kind = rng.integers(4)
    if kind == 0:
        values = np.round(rng.normal(size=shape) * 3)
    elif kind == 1:
        values = np.maximum(rng.normal(size=shape), 0)
    elif kind == 2:
        values = rng.integers(-9, 9, shape) * smallest
    else:  # each stretch of rows has a level of its own, as texts have
        values = (
            rng.normal(size=shape)
            + np.repeat(rng.normal(size=shape[0] // 64 + 1) * 3, 64)[: shape[0], None]
        )
    for share, value in ((0.05, -0.0), (0.01, np.nan), (0.003, largest), (0.003, -largest)):
        values[rng.random(shape) < share] = value
    return values


def random_store(path: Path, rng: np.random.Generator) -> tuple[CoreStore, Truth]:
    """Write a store of random sizes, committed in part, and an index over a part of that."""
    segment_rows = int(rng.choice([128, 256, 512]))
    chunk_rows = int(rng.choice([8, 32, segment_rows]))
    dtype = str(rng.choice(["float16", "bfloat16", "float32"]))
    n_rows = int(rng.integers(300, 1500))
    documents = []
    while sum(documents) < n_rows:
        documents.append(min(int(rng.integers(1, 150)), n_rows - sum(documents)))
    values = {
        name: hard_values(rng, (n_rows, width), dtype)
        for name, width in (("mlp_post.0", 3), ("resid_post.1", 2))
    }
    options: dict[str, Any] = {
        "dtype": dtype,
        "segment_rows": segment_rows,
        "chunk_rows": chunk_rows,
        "context": int(rng.choice([7, 40, 100])),
        "special": bool(rng.integers(2)),
        "documents": documents,
    }
    n_segments = -(-n_rows // segment_rows)  # at least
    commit = [s for s in range(n_segments) if rng.random() < 0.8] if rng.integers(2) else None
    store = synthetic_store(path, values, commit=commit, **options)
    covers = [s for s in store.committed if rng.random() < 0.8]
    truth = truth_of(store)
    write_whole_index(store, truth, covers, int(rng.choice([5, 20])))
    return store, truth


def truth_of(store: CoreStore) -> Truth:
    """Read tokens, documents and values past everything that answers questions."""
    tokens = pq.read_table(store.path / "tokens/00000.parquet")
    size = store.meta.segment_rows
    keep = np.isin(tokens["row_id"].to_numpy() // size, store.committed)
    keep &= (tokens["flags"].to_numpy() & (SPECIAL | FIRST)) == 0
    columns = {name: tokens[name].to_numpy()[keep] for name in tokens.column_names}
    documents = pq.read_table(store.path / "documents/00000.parquet")
    columns["n_tokens"] = documents["n_tokens"].to_numpy()[columns["document"]]
    values = {}
    for info in store.meta.sites:
        parts = [
            store.read(info, s, 0, n).astype(np.float64) for s, n in store.committed_rows().items()
        ]
        ids = np.concatenate(
            [np.arange(n) + s * size for s, n in store.committed_rows().items()]
            or [np.empty(0, np.int64)]
        )
        whole = np.concatenate(parts or [np.empty((0, info.width))])
        values[str(info.site)] = whole[np.isin(ids, columns["row_id"])]
    return Truth(columns, values)


def write_whole_index(
    store: CoreStore, truth: Truth, covers: Sequence[int], k: int
) -> Generation | None:
    """Publish a generation with lists, counts and zones over some segments, by brute force."""
    if not len(covers):
        return None
    number = generations.new_number(store.path)
    folder = store.path / f"index/{number:06d}"
    covered = np.isin(truth.columns["row_id"] // store.meta.segment_rows, covers)
    part = Truth(
        {name: column[covered] for name, column in truth.columns.items()},
        {name: values[covered] for name, values in truth.values.items()},
    )
    files, neurons = {}, []
    first_rows = part.columns["row_id"] // store.meta.chunk_rows * store.meta.chunk_rows
    bands = np.unique(first_rows)

    def path_of(name: str) -> Path:
        durable.make_folder((folder / name).parent)
        return folder / name

    for info in store.meta.sites:
        site = str(info.site)
        rows: list[dict[str, Any]] = []
        zones = np.full((info.width, len(bands), 2), np.nan, np.float32)
        for neuron in range(info.width):
            values = part.values[site][:, neuron]
            neurons.append({"site": site, "neuron": neuron, "n": int((~np.isnan(values)).sum())})
            for side, distinct in (("window", "window"), ("top", None), ("bottom", None)):
                best = part.top(site, neuron, k, side != "bottom", distinct=distinct)
                rows += [
                    {"neuron": neuron, "side": side, "rank": i + 1, "row_id": row, "value": value}
                    for i, (row, value) in enumerate(best)
                ]
            for i, band in enumerate(bands):
                mine = values[first_rows == band]
                zones[neuron, i] = np.fmin.reduce(mine), np.fmax.reduce(mine)
        tokens = store.tokens_of([row["row_id"] for row in rows])
        table = pa.Table.from_pylist(
            rows,
            schema=pa.schema(
                [
                    ("neuron", pa.int32()),
                    ("side", pa.string()),
                    ("rank", pa.int32()),
                    ("row_id", pa.int64()),
                    ("value", pa.float32()),
                ]
            ),
        )
        for name in ("document", "position", "token_id"):
            table = table.append_column(name, tokens[name])
        name = site_file(info.site, "exemplars", "exemplars.parquet")
        files[name] = durable.write_table(path_of(name), table, 17)
        name = site_file(info.site, "zones", "zones.npy")
        files[name] = durable.write_array(path_of(name), zones)
    places = np.stack(np.divmod(bands, store.meta.segment_rows), axis=1)
    places[:, 1] //= store.meta.chunk_rows
    name = space_file("", "zones", "bands.npy")
    files[name] = durable.write_array(path_of(name), places.astype(np.int32))
    files["neurons.parquet"] = durable.write_table(
        path_of("neurons.parquet"), pa.Table.from_pylist(neurons), 4
    )
    generation = Generation(
        number, tuple(covers), {f"index/{number:06d}/{name}": f for name, f in files.items()}
    )
    generations.publish(store.path, generation)
    return generation
