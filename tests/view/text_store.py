"""A real store of given texts, with activations in which planted factors follow the words."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from actstore import durable
from actstore.shard import to_band
from actstore.site import Site
from actstore.store import FIRST, SPECIAL, CoreStore, Part, Segment, SiteInfo, StoreMeta
from actstore.store.tables import DOCUMENT_GROUP, DOCUMENTS, TOKENS, VOCABULARY, WINDOWS

Spans = Sequence[tuple[int, int, str]]
"""Start, end and vocabulary text of each token of a document."""


def words(text: str) -> Spans:
    """Return words, pieces of at most six letters, and marks as tokens."""
    found = re.finditer(r"\w{1,6}|[^\w\s]", text)
    return [(m.start(), m.end(), m[0]) for m in found]


def planted(tokens: Sequence[str], n_factors: int, widths: Mapping[str, int]) -> dict[str, Any]:
    """Return activations of rank `n_factors`: a factor is high at words of one length."""
    rng = np.random.default_rng(0)
    scores = rng.gamma(0.3, 0.2, (len(tokens), n_factors))
    for row, token in enumerate(tokens):
        scores[row, len(token) % n_factors] += 1 + len(token) / 10
    return {
        site: scores @ (rng.gamma(0.3, 1.0, (n_factors, width)))
        for site, width in sorted(widths.items())
    }


def text_store(
    path: Path,
    documents: Sequence[tuple[str, str]],
    widths: Mapping[str, int],
    *,
    n_factors: int = 4,
    spans: Sequence[Spans] | None = None,
    values: Mapping[str, npt.NDArray[Any]] | None = None,
    model: str = "made/up",
) -> CoreStore:
    """Write a store of (source, text) documents: one window each, ``[CLS]`` first.

    Parameters
    ----------
    path : Path
        A new folder.
    documents : sequence of (str, str)
        Source and text of each.
    widths : mapping of str to int
        Width of each site.
    n_factors : int, default 4
        Rank of the planted activations.
    spans : sequence of Spans, optional
        Tokens of each document; by default its words and marks.
    values : mapping of str to ndarray, optional
        Activations of all rows, ``[CLS]`` counted; by default planted ones.
    model : str, default "made/up"
        Name of the model.
    """
    spans = [words(text) for _, text in documents] if spans is None else spans
    types = {t: i + 1 for i, t in enumerate(sorted({t for doc in spans for *_, t in doc}))}
    size = 1024
    if values is None:
        rows_of = [text for doc in spans for text in ["[CLS]", *(span[2] for span in doc)]]
        values = planted(rows_of, n_factors, widths)
    infos = tuple(
        SiteInfo(site, "made.up", "output", widths[str(site)], "float16")
        for site in sorted(Site.parse(name) for name in widths)
    )
    meta = StoreMeta(
        store_id="texts",
        created="2026-01-01T00:00:00+00:00",
        model={
            "name": model,
            "architecture": "MadeUp",
            "n_parameters": 0,
            "dtype": "float32",
        },
        tokenizer="words",
        segment_rows=size,
        chunk_rows=256,
        keep="all",
        context=size,
        overlap=0,
        batch_tokens=4096,
        versions={"numpy": np.__version__},
        sites=infos,
    )
    store = CoreStore.create(path, meta)
    store.write_vocabulary(
        pa.table(
            {
                "token_id": [0, *types.values()],
                "text": ["[CLS]", *types],
                "piece": ["[CLS]", *types],
            },
            schema=VOCABULARY,
        )
    )
    tokens: list[dict[str, int]] = []
    windows: list[dict[str, Any]] = []
    segment = offset = 0
    for document, doc in enumerate(spans):
        rows = len(doc) + 1
        if offset + rows > size:
            segment, offset = segment + 1, 0
        first = segment * size + offset
        windows.append(
            {
                "space": "",
                "segment": segment,
                "window_id": document,
                "document": document,
                "first_token": 0,
                "context_tokens": 0,
                "context_ids": [],
                "first_row": first,
                "rows": rows,
            }
        )
        for position, (start, end, text) in enumerate([(0, 0, "[CLS]"), *doc]):
            tokens.append(
                {
                    "row_id": first + position,
                    "document": document,
                    "window_id": document,
                    "position": position,
                    "doc_position": position - 1,
                    "token_id": types[text] if position else 0,
                    "char_start": start,
                    "char_end": end,
                    "flags": 0 if position else FIRST | SPECIAL,
                }
            )
        offset += rows
    counts = {s: sum(w["rows"] for w in windows if w["segment"] == s) for s in range(segment + 1)}
    segments = tuple(Segment(s, 0, {"": n}) for s, n in counts.items())
    draft = Part(0, segments, len(documents), len(windows), True, {}, {})
    tables = {
        "documents": (
            pa.Table.from_pylist(
                [
                    {
                        "document": i,
                        "source": source,
                        "n_tokens": len(spans[i]),
                        "text": text,
                        "metadata": "{}",
                    }
                    for i, (source, text) in enumerate(documents)
                ],
                schema=DOCUMENTS,
            ),
            DOCUMENT_GROUP,
        ),
        "windows": (pa.Table.from_pylist(windows, schema=WINDOWS), 65536),
        "tokens": (pa.Table.from_pylist(tokens, schema=TOKENS), 65536),
    }
    files = {}
    for kind, (table, rows) in tables.items():
        name = draft.file(kind)
        durable.make_folder((store.path / name).parent)
        files[name] = durable.write_table(store.path / name, table, rows)
    store.publish_part(Part(0, segments, len(documents), len(windows), True, {}, files))
    done = 0
    for number, rows in counts.items():
        with store.write_segment(number) as writer:
            for info in infos:
                layout = store.layout(info)
                block = values[str(info.site)][done : done + rows].astype(np.float16)
                for start in range(0, rows, layout.chunk_rows):
                    band = to_band(block[start : start + layout.chunk_rows], layout)
                    writer.write_band(info, band)
            writer.commit({}, ())
        done += rows
    store.refresh()
    return store
