"""A real store on disk from arrays in memory, with made-up documents, for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from actstore import durable
from actstore.shard import DTYPES, to_band
from actstore.site import Site
from actstore.store import FIRST, SPECIAL, CoreStore, Part, Segment, SiteInfo, StoreMeta
from actstore.store.tables import (
    DOCUMENT_GROUP,
    DOCUMENTS,
    TOKEN_GROUP,
    TOKENS,
    VOCABULARY,
    WINDOWS,
)

WORDS = [
    "amber",
    "basin",
    "cedar",
    "delta",
    "ember",
    "fjord",
    "grove",
    "heron",
    "inlet",
    "jetty",
    "kelp",
    "larch",
    "maple",
    "night",
    "ocean",
    "prairie",
    "quartz",
    "river",
    "stone",
    "tundra",
    "umber",
    "valley",
    "willow",
    "xylem",
    "yarrow",
    "zenith",
]
"""The words of the made-up documents; word ``i`` has the token_id ``i + 1``."""

CLS = 0
"""The token_id of the special token ``[CLS]``."""


@dataclass(frozen=True)
class _Window:
    document: int
    first_token: int
    rows: int
    segment: int
    offset: int


def synthetic_store(
    path: str | Path,
    values: Mapping[str, npt.NDArray[Any]],
    *,
    dtype: str | Mapping[str, str] = "float16",
    keep: float | Mapping[str, float] = 1.0,
    documents: Sequence[int] | None = None,
    special: bool = True,
    context: int = 64,
    segment_rows: int = 1024,
    chunk_rows: int = 256,
    commit: Collection[int] | None = None,
    seed: int = 0,
) -> CoreStore:
    """Write a store that holds the given activations, and return it.

    Rows go to documents in order, documents to windows of at most `context` rows, whole windows to
    segments: a segment ends in a hole where the next window does not fit.  Text and tokens follow
    from `seed`.  There are no fold partials and there is no index.

    Parameters
    ----------
    path : str or Path
        A new folder.
    values : mapping of str to ndarray (n_rows, width)
        The activations of each site; ``store[site].row_ids()`` are the ids of their rows.  Sites
        of two spaces get the same rows in each.
    dtype : str or mapping of str to str, default "float16"
        Stored dtype, of all sites or of each.
    keep : float or mapping of str to float, default 1
        The part of the rows that is stored, at all sites or at each.
    documents : sequence of int, optional
        Rows of each document, special ones counted; by default 100 each.
    special : bool, default True
        Whether the first row of a window is ``[CLS]``; else it is a word, flagged as first.
    context : int, default 64
        Rows of a window.
    segment_rows, chunk_rows : int, default 1024 and 256
        Rows a segment can hold, and rows of a chunk; powers of two.
    commit : collection of int, optional
        The segments to commit; by default all.
    seed : int, default 0
        Chooses the words.
    """
    n_rows = len(next(iter(values.values())))
    if documents is None:
        documents = [100] * (n_rows // 100) + ([n_rows % 100] if n_rows % 100 else [])
    if sum(documents) != n_rows or any(len(block) != n_rows for block in values.values()):
        raise ValueError("documents and sites must agree on the number of rows")
    windows = _windows(documents, context, segment_rows)
    dtypes = {name: dtype if isinstance(dtype, str) else dtype[name] for name in values}
    keeps = {name: keep if isinstance(keep, float) else keep[name] for name in values}
    sites = {Site.parse(name): name for name in values}
    infos = tuple(
        SiteInfo(site, "made.up", "output", values[name].shape[1], dtypes[name], keeps[name])
        for site, name in sorted(sites.items())
    )
    meta = StoreMeta(
        store_id=f"synthetic-{seed}",
        created="2026-01-01T00:00:00+00:00",
        model={"name": "synthetic", "dtype": "float32"},
        tokenizer="words",
        segment_rows=segment_rows,
        chunk_rows=chunk_rows,
        keep="all" if keep == 1.0 else str(keep),
        context=context,
        overlap=0,
        batch_tokens=4096,
        versions={"numpy": np.__version__},
        sites=infos,
    )
    store = CoreStore.create(path, meta)
    store.write_vocabulary(
        pa.table(
            {
                "token_id": list(range(len(WORDS) + 1)),
                "text": ["[CLS]", *(f" {word}" for word in WORDS)],
                "piece": ["[CLS]", *WORDS],
            },
            schema=VOCABULARY,
        )
    )
    _publish_plan(store, windows, len(documents), special, seed)
    first_of_segment = _first_rows(windows)
    for segment in store.planned if commit is None else commit:
        first = first_of_segment[segment]
        stop = first_of_segment.get(segment + 1, n_rows)
        with store.write_segment(segment) as writer:
            for info in store.meta.kept_sites:
                layout = store.layout(info)
                block = np.asarray(values[sites[info.site]][first:stop])
                block = block.astype(DTYPES[info.dtype])
                if info.keep < 1:
                    block = block[writer.sample(info)]
                for start in range(0, len(block), layout.chunk_rows):
                    band = to_band(block[start : start + layout.chunk_rows], layout)
                    writer.write_band(info, band)
            writer.commit({}, ())
    store.refresh()
    return store


def _windows(documents: Sequence[int], context: int, segment_rows: int) -> list[_Window]:
    windows = []
    segment = offset = 0
    for document, n_rows in enumerate(documents):
        for start in range(0, n_rows, context):
            rows = min(context, n_rows - start)
            if offset + rows > segment_rows:
                segment, offset = segment + 1, 0
            windows.append(_Window(document, start, rows, segment, offset))
            offset += rows
    return windows


def _first_rows(windows: Sequence[_Window]) -> dict[int, int]:
    """Return where the rows of each segment begin among all rows."""
    firsts: dict[int, int] = {}
    done = 0
    for window in windows:
        firsts.setdefault(window.segment, done)
        done += window.rows
    return firsts


def _publish_plan(
    store: CoreStore, windows: Sequence[_Window], n_documents: int, special: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    size = store.meta.segment_rows
    texts = [""] * n_documents
    n_tokens = [0] * n_documents
    columns: dict[str, list[int]] = {name: [] for name in TOKENS.names}
    for window_id, window in enumerate(windows):
        words = rng.integers(0, len(WORDS), window.rows)
        for position in range(window.rows):
            is_first = position == 0
            start = end = 0
            doc_position = -1
            if not (is_first and special):
                text = texts[window.document]
                start = len(text) + bool(text)
                texts[window.document] = (
                    f"{text} {WORDS[words[position]]}" if text else (WORDS[words[position]])
                )
                end = len(texts[window.document])
                doc_position = n_tokens[window.document]
                n_tokens[window.document] += 1
            row = {
                "row_id": window.segment * size + window.offset + position,
                "document": window.document,
                "window_id": window_id,
                "position": position,
                "doc_position": doc_position,
                "token_id": CLS if is_first and special else int(words[position]) + 1,
                "char_start": start,
                "char_end": end,
                "flags": (FIRST | (SPECIAL if special else 0)) if is_first else 0,
            }
            for name, value in row.items():
                columns[name].append(value)
    spaces = store.meta.spaces
    rows: dict[int, int] = {}
    for window in windows:
        rows[window.segment] = rows.get(window.segment, 0) + window.rows
    segments = tuple(Segment(s, 0, dict.fromkeys(spaces, n)) for s, n in sorted(rows.items()))
    draft = Part(0, segments, n_documents, len(windows) * len(spaces), True, {"made": "up"}, {})
    tables: dict[str, tuple[pa.Table, int]] = {
        draft.file("documents"): (
            pa.table(
                {
                    "document": list(range(n_documents)),
                    "source": [f"document-{d}.txt" for d in range(n_documents)],
                    "n_tokens": n_tokens,
                    "text": texts,
                    "metadata": ["{}"] * n_documents,
                },
                schema=DOCUMENTS,
            ),
            DOCUMENT_GROUP,
        ),
        draft.file("windows"): (_windows_table(windows, spaces, size), durable.ROW_GROUP_ROWS),
    }
    for space in spaces:
        tokens = pa.table(columns, schema=TOKENS)
        tables[draft.file("tokens", space)] = (tokens, TOKEN_GROUP)
    files = {}
    for name, (table, group_rows) in tables.items():
        durable.make_folder((store.path / name).parent)
        files[name] = durable.write_table(store.path / name, table, group_rows)
    store.publish_part(
        Part(0, segments, n_documents, len(windows) * len(spaces), True, {"made": "up"}, files)
    )


def _windows_table(windows: Sequence[_Window], spaces: Sequence[str], size: int) -> pa.Table:
    records = [
        {
            "space": space,
            "segment": window.segment,
            "window_id": window_id,
            "document": window.document,
            "first_token": window.first_token,
            "context_tokens": 0,
            "context_ids": [],
            "first_row": window.segment * size + window.offset,
            "rows": window.rows,
        }
        for space in spaces
        for window_id, window in enumerate(windows)
    ]
    return pa.Table.from_pylist(records, schema=WINDOWS)
