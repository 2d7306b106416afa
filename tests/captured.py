"""Small stores of many segments, captured by the one entry point that users call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from actstore.capturing import Limits, Settings, run, run_capture
from actstore.models import LanguageModel
from actstore.store import FIRST, SPECIAL, CoreStore
from actstore.store import core as core_store
from tests.toys import TEXT

DOCUMENTS = [
    TEXT[:150],
    TEXT * 2,
    "",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Deich – 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 🎉, tabs\tand\n\nlines.",
    "war",
    TEXT[100:330] + TEXT,
    " \n\t ",
    "It was the war. " * 9,
]
"""Texts shorter and longer than a window, empty ones, and one outside of ASCII."""


@dataclass(frozen=True)
class Captured:
    """A store and what it was made from."""

    store: CoreStore
    model: LanguageModel
    documents: list[str]
    windows_fed: int
    """Windows that went through the model, those of the dtype probe counted."""


@contextmanager
def small_segments(segment_rows: int = 64, chunk_rows: int = 16) -> Iterator[None]:
    """Let stores made inside have small segments: real ones hold thousands of rows."""
    with (
        mock.patch.object(run, "segment_rows", return_value=segment_rows),
        mock.patch.object(run, "chunk_rows", return_value=chunk_rows),
    ):
        yield


@contextmanager
def counted(model: LanguageModel) -> Iterator[list[npt.NDArray[np.int64]]]:
    """Collect the token ids of every window that goes through the model."""
    fed: list[npt.NDArray[np.int64]] = []
    forward = model.forward

    def counting(input_ids: Any, lengths: Any, *rest: Any) -> None:
        fed.extend(ids[:n].numpy() for ids, n in zip(input_ids, lengths, strict=True))
        forward(input_ids, lengths, *rest)

    with mock.patch.object(model, "forward", counting):
        yield fed


def capture(
    model: LanguageModel,
    documents: Any,
    path: Path | None,
    *,
    segment_rows: int = 64,
    chunk_rows: int = 16,
    limits: Limits = Limits(),  # noqa: B008 - frozen
    **options: Any,
) -> Captured:
    """Capture documents with small segments; options of `Settings` and of `run_capture`."""
    options.setdefault("context", 24)  # a window must fit into a segment
    names = [name for name in Settings.__dataclass_fields__ if name in options]
    settings = Settings(limits=limits, **{name: options.pop(name) for name in names})
    with small_segments(segment_rows, chunk_rows), counted(model) as fed:
        store, _ = run_capture(model, documents, path, settings=settings, **options)
    return Captured(store, model, documents, len(fed))


def all_tokens(store: CoreStore) -> pa.Table:
    """Return the token index of all parts, read past the store's own readers."""
    return pa.concat_tables(
        [pq.read_table(store.path / part.file("tokens")) for part in store.parts]
    )


def content(
    store: CoreStore, site: str, segments: Sequence[int] | None = None
) -> tuple[npt.NDArray[np.int64], npt.NDArray[Any]]:
    """Return row ids and values of the content rows of some segments; by default all committed."""
    tokens = all_tokens(store)
    segment_of = tokens["row_id"].to_numpy() // store.meta.segment_rows
    keep = np.isin(segment_of, store.committed if segments is None else segments)
    keep &= (tokens["flags"].to_numpy() & (SPECIAL | FIRST)) == 0
    row_ids = tokens["row_id"].to_numpy()[keep]
    return row_ids, store[site][row_ids]


def brute_lists(
    store: CoreStore, site: str, segments: Sequence[int] | None = None, k: int = 100
) -> dict[str, list[list[tuple[int, float]]]]:
    """Return the k highest and lowest (row_id, value) of each neuron by sorting all of them."""
    row_ids, values = content(store, site, segments)
    found = {}
    for side, sign in (("top", -1.0), ("bottom", 1.0)):
        keys = sign * values.astype(np.float64)
        orders = [np.lexsort((row_ids, keys[:, n]))[:k] for n in range(values.shape[1])]
        found[side] = [
            [(int(row_ids[i]), float(values[i, n])) for i in order if not np.isnan(values[i, n])]
            for n, order in enumerate(orders)
        ]
    return found


def indexed_lists(store: CoreStore, site: str) -> dict[str, list[list[tuple[int, float]]]]:
    """Return the lists of the newest index generation, in the form of `brute_lists`."""
    generation = store.index()
    assert generation is not None
    info = store.site(site)
    (name,) = generation.named(f"exemplars/hook={info.site.hook}/layer={info.site.layer}/")
    found = {side: [[] for _ in range(info.width)] for side in ("top", "bottom")}
    for row in pq.ParquetFile(store.path / name).read().to_pylist():
        if row["side"] not in found:
            continue
        places = found[row["side"]][row["neuron"]]
        places.append((row["row_id"], row["value"]))
        assert row["rank"] == len(places)
    return found


def stored_bytes(store: CoreStore) -> dict[str, bytes]:
    """Return what must not depend on how a capture went: rows, plan tables, newest index.

    Generations are numbered by how often the index was compacted; their names leave that out.
    """
    root = store.path
    kinds = ("activations/", "stored_rows/", "documents/", "tokens/", "vocabulary.", "plan/")
    found = {}
    for path in root.rglob("*"):
        name = str(path.relative_to(root))
        if name.startswith(kinds) and path.is_file() and path.suffix != ".partial":
            found[name] = path.read_bytes()
    generation = core_store.latest(root)
    if generation is not None:
        for name in generation.files:
            found[name.replace(generation.folder, "index/newest")] = (root / name).read_bytes()
    return found
