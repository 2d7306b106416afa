"""Stores for the tests of queries: ties, zeros of both signs, NaN; an index made by brute force."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from actstore import durable
from actstore.store import FIRST, SPECIAL, CoreStore, Generation, generations
from tests.synthetic import synthetic_store

N_ROWS, SEGMENT_ROWS = 1801, 512
WIDTHS = {"mlp_post.0": 7, "mlp_post.10": 11, "resid_post.2": 5}


def activations(seed: int = 0) -> dict[str, npt.NDArray[np.float32]]:
    """Return values with many ties, zeros of both signs and a few NaN."""
    rng = np.random.default_rng(seed)
    found = {}
    for site, width in WIDTHS.items():
        values = np.round(rng.normal(size=(N_ROWS, width)) * 3).astype(np.float32)
        values[rng.random(values.shape) < 0.1] = -0.0
        values[rng.random(values.shape) < 0.01] = np.nan
        found[site] = values
    return found


def make_store(path: Path, commit: Sequence[int] | None = None, **options: Any) -> CoreStore:
    """Write the store of these tests; with `commit`, some segments only."""
    return synthetic_store(
        path,
        activations(),
        segment_rows=SEGMENT_ROWS,
        chunk_rows=128,
        context=48,
        commit=commit,
        **options,
    )


def ranked(
    store: CoreStore, site: str, neuron: int, largest: bool, segments: Sequence[int] | None = None
) -> list[tuple[int, float]]:
    """Return all content rows of a neuron in order as (row_id, value): plain NumPy."""
    info = store.site(site)
    pairs = []
    for segment in store.committed if segments is None else segments:
        flags = store.tokens(segment, info.site.space)["flags"].to_numpy()
        values = store.read(info, segment, 0, len(flags))[:, neuron].astype(np.float64)
        for offset in range(len(flags)):
            if not flags[offset] & (SPECIAL | FIRST) and not np.isnan(values[offset]):
                pairs.append((segment * store.meta.segment_rows + offset, float(values[offset])))
    return sorted(pairs, key=lambda pair: (-pair[1] if largest else pair[1], pair[0]))


def write_index(store: CoreStore, covers: Sequence[int], k: int = 20) -> Generation:
    """Publish an index generation over some segments, made by brute force."""
    number = generations.new_number(store.path)
    folder = store.path / f"index/{number:06d}"
    files, neurons = {}, []
    for info in store.meta.sites:
        rows: list[dict[str, Any]] = []
        for neuron, side in itertools.product(range(info.width), ("top", "bottom")):
            pairs = ranked(store, str(info.site), neuron, side == "top", covers)
            values = np.array([value for _, value in pairs])
            if side == "top":
                neurons.append(_statistics(info.site, neuron, values))
            rows += [
                {"neuron": neuron, "side": side, "rank": i + 1, "row_id": row, "value": value}
                for i, (row, value) in enumerate(pairs[:k])
            ]
        tokens = store.tokens_of([row["row_id"] for row in rows], info.site.space)
        table = pa.table(
            {
                "neuron": pa.array([row["neuron"] for row in rows], pa.int32()),
                "side": [row["side"] for row in rows],
                "rank": pa.array([row["rank"] for row in rows], pa.int32()),
                "row_id": pa.array([row["row_id"] for row in rows], pa.int64()),
                "value": pa.array([row["value"] for row in rows], pa.float32()),
                **{name: tokens[name] for name in ("document", "position", "token_id")},
            }
        )
        site = info.site
        space = f"space={site.space}/" if site.space else ""
        path = folder / f"exemplars/{space}hook={site.hook}/layer={site.layer}/exemplars.parquet"
        durable.make_folder(path.parent)
        name = path.relative_to(store.path).as_posix()
        files[name] = durable.write_table(path, table, 100)
    path = folder / "neurons.parquet"
    name = path.relative_to(store.path).as_posix()
    files[name] = durable.write_table(path, pa.Table.from_pylist(neurons))
    generation = Generation(number, tuple(covers), files)
    generations.publish(store.path, generation)
    return generation


def _statistics(site: Any, neuron: int, values: npt.NDArray[np.float64]) -> dict[str, Any]:
    return {
        "site": str(site),
        "space": site.space,
        "hook": site.hook,
        "layer": site.layer,
        "neuron": neuron,
        "n": len(values),
        "mean": values.mean(),
        "max": values.max(),
        "kurtosis": float("nan") if neuron == 3 else 0.5,
        "novelty": 1.0,
    }


def write_result(store: CoreStore, name: str, factors: Sequence[tuple[int, float]]) -> None:
    """Keep an NMF result whose table `factors` has the given rows."""
    sites = [str(site) for site in store.sites]
    with store.new_result("nmf", name, {"sites": sites}) as writer:
        writer.write_table(
            "factors",
            pa.table(
                {
                    "factor": pa.array([factor for factor, _ in factors], pa.int32()),
                    "share": [share for _, share in factors],
                }
            ),
        )
        writer.finish({"n_rows": 13})
