"""Stores of a named size, made without a model: what `benchmarks.query` asks.

Plan, tokens, documents, commits, shards and index are what a capture writes, through the writers of
a capture wherever they are; what is made up is the text (words in random order) and, where no rows
are kept, the lists and statistics.  Commits and plan parts are not synced one by one: a store of
10,000 segments would take minutes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from actstore import durable
from actstore.capturing.compact import _GenerationWriter, _neurons
from actstore.capturing.lists import EXEMPLARS, TOPK, pack
from actstore.folds import Moments
from actstore.folds.histogram import HistogramState, bins_of
from actstore.folds.moments import MomentsState
from actstore.folds.sample import SampleState
from actstore.folds.topk import Ranked, TopKState
from actstore.folds.zones import ZonesState
from actstore.shard import to_band
from actstore.site import Site
from actstore.store import (
    FIRST,
    SPECIAL,
    Commit,
    CoreStore,
    Generation,
    Part,
    Segment,
    SiteInfo,
    StoreMeta,
    generations,
)
from actstore.store.tables import (
    DOCUMENT_GROUP,
    DOCUMENTS,
    TOKEN_GROUP,
    TOKENS,
    VOCABULARY,
    WINDOWS,
)

CONTEXT = 512
DOCUMENT_WINDOWS = 2
PART_SEGMENTS = 16
N_WORDS = 30_000
CHUNK_ROWS = 4096

Ids = npt.NDArray[np.int64]
Values = npt.NDArray[Any]


class MadeStore:
    """A store whose rows fill whole segments of windows of one length.

    Parameters
    ----------
    path : Path
        A new folder.
    n_segments : int
        How many segments.
    sites : mapping of str to int
        Width of each site.
    keep : float
        1 or 0.
    segment_rows : int
        S.
    rows : int, optional
        Rows of each segment, a multiple of the rows of a document; by default S.
    """

    def __init__(
        self,
        path: Path,
        n_segments: int,
        sites: Mapping[str, int],
        keep: float,
        segment_rows: int = 1 << 16,
        rows: int | None = None,
        context: int = CONTEXT,
    ) -> None:
        self.size, self.rows = segment_rows, rows or segment_rows
        self.n_segments, self.context = n_segments, context
        infos = tuple(
            SiteInfo(Site.parse(name), "made.up", "input", width, "float16", keep)
            for name, width in sites.items()
        )
        self.core = CoreStore.create(
            path,
            StoreMeta(
                store_id="made-up",
                created="2026-01-01T00:00:00+00:00",
                model={"name": "made-up", "dtype": "float32"},
                tokenizer="words",
                segment_rows=segment_rows,
                chunk_rows=min(CHUNK_ROWS, segment_rows),
                keep="all" if keep else "none",
                context=context,
                overlap=0,
                batch_tokens=4096,
                versions={"numpy": np.__version__},
                sites=tuple(sorted(infos, key=lambda info: info.site)),
            ),
        )
        words = [f"w{number}" for number in range(N_WORDS)]
        self.core.write_vocabulary(
            pa.table(
                {
                    "token_id": range(N_WORDS + 1),
                    "text": ["[CLS]", *(f" {word}" for word in words)],
                    "piece": ["[CLS]", *words],
                },
                schema=VOCABULARY,
            )
        )
        self._words = np.array(words)
        self._publish_parts()

    @property
    def n_rows(self) -> int:
        """Rows in all."""
        return self.n_segments * self.rows

    def _publish_parts(self) -> None:
        tokens, texts = self._tokens_of_part()
        for number in range(-(-self.n_segments // PART_SEGMENTS)):
            first = number * PART_SEGMENTS
            n = min(PART_SEGMENTS, self.n_segments - first)
            self._publish_part(number, range(first, first + n), tokens, texts)
        self.core.refresh()
        self.core.grow_arrays()

    def _tokens_of_part(self) -> tuple[dict[str, Values], list[str]]:
        """Return the tokens of a part's documents, and their texts; all parts have the same."""
        rng = np.random.default_rng(0)
        n = PART_SEGMENTS * self.rows
        row = np.arange(n)
        position = row % self.context
        word = rng.zipf(1.3, n) % N_WORDS
        texts = []
        starts, ends = np.zeros(n, np.int32), np.zeros(n, np.int32)
        doc_position = np.full(n, -1, np.int32)
        per_document = DOCUMENT_WINDOWS * self.context
        for first in range(0, n, per_document):
            own = first + np.flatnonzero(position[first : first + per_document])
            words = self._words[word[own]].tolist()
            stops = np.cumsum([len(w) + 1 for w in words]) - 1
            ends[own], starts[own] = stops, stops - [len(w) for w in words]
            doc_position[own] = np.arange(len(own))
            texts.append(" ".join(words))
        columns = {
            "position": position.astype(np.int32),
            "doc_position": doc_position,
            "token_id": np.where(position == 0, 0, word + 1).astype(np.int32),
            "char_start": starts,
            "char_end": ends,
            "flags": np.where(position == 0, SPECIAL | FIRST, 0).astype(np.uint8),
        }
        return columns, texts

    def _publish_part(
        self, number: int, segments: range, columns: Mapping[str, Values], texts: list[str]
    ) -> None:
        n_windows = len(segments) * self.rows // self.context
        first_window = segments[0] * self.rows // self.context
        n_documents = n_windows // DOCUMENT_WINDOWS
        first_document = first_window // DOCUMENT_WINDOWS
        row = np.arange(len(segments) * self.rows)
        row_ids = self._row_ids(segments[0] * self.rows + row)
        window = first_window + np.arange(n_windows)
        n_tokens = DOCUMENT_WINDOWS * (self.context - 1)
        tables = {
            "documents": pa.table(
                {
                    "document": first_document + np.arange(n_documents),
                    "source": [f"text {first_document + i}" for i in range(n_documents)],
                    "n_tokens": np.full(n_documents, n_tokens),
                    "text": texts[:n_documents],
                    "metadata": ["{}"] * n_documents,
                },
                schema=DOCUMENTS,
            ),
            "windows": pa.table(
                {
                    "space": [""] * n_windows,
                    "segment": (row_ids[:: self.context] // self.size).astype(np.int32),
                    "window_id": window,
                    "document": window // DOCUMENT_WINDOWS,
                    "first_token": (window % DOCUMENT_WINDOWS * (self.context - 1)).astype("i4"),
                    "context_tokens": np.zeros(n_windows, np.int32),
                    "context_ids": pa.array([[]] * n_windows, pa.list_(pa.int32())),
                    "first_row": row_ids[:: self.context],
                    "rows": np.full(n_windows, self.context, np.int32),
                },
                schema=WINDOWS,
            ),
            "tokens": pa.table(
                {
                    "row_id": row_ids,
                    "document": first_document + row // (DOCUMENT_WINDOWS * self.context),
                    "window_id": first_window + row // self.context,
                    **{name: values[: len(row)] for name, values in columns.items()},
                },
                schema=TOKENS,
            ),
        }
        planned = tuple(Segment(s, number, {"": self.rows}) for s in segments)
        done = segments[-1] == self.n_segments - 1
        draft = Part(number, planned, n_documents, n_windows, done, {"made": "up"}, {})
        files, groups = {}, {"documents": DOCUMENT_GROUP, "tokens": TOKEN_GROUP}
        for kind, table in tables.items():
            name = draft.file(kind)
            durable.make_folder((self.core.path / name).parent)
            group = groups.get(kind, durable.ROW_GROUP_ROWS)
            files[name] = durable.write_table(self.core.path / name, table, group)
        part = Part(number, planned, n_documents, n_windows, done, {"made": "up"}, files)
        self._write(f"plan/{number:05d}.json", part.to_json())

    def _write(self, name: str, document: Mapping[str, Any]) -> None:
        path = self.core.path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(durable.to_json(durable.sealed(document)))

    def _row_ids(self, rows: Ids) -> Ids:
        """Return the row_id of the n-th row."""
        return rows // self.rows * self.size + rows % self.rows

    def commit_nothing_kept(self) -> None:
        """Commit all segments as a capture does that keeps no rows."""
        partial = durable.FileFacts(1, 0)
        for segment in range(self.n_segments):
            relied_on = ((0, segment - 1),) if segment else ()
            files = {f"partials/folds/{segment:08d}.npz": partial}
            commit = Commit(segment, {"": self.rows}, files, {}, relied_on, {"host": "made up"})
            self._write(f"commits/{segment:08d}.json", commit.to_json())
        self.core.refresh()

    def commit_rows(self, values_of: Callable[[int], Values]) -> None:
        """Store the rows of the one site, ``(rows, width)`` of each segment, and commit them."""
        (info,) = self.core.meta.sites
        layout = self.core.layout(info)
        for segment in range(self.n_segments):
            with self.core.write_segment(segment) as writer:
                values = values_of(segment)
                for start in range(0, len(values), layout.chunk_rows):
                    writer.write_band(
                        info, to_band(values[start : start + layout.chunk_rows], layout)
                    )
                writer.commit({}, range(segment))
        self.core.refresh()

    def publish_index(self, states_of: Callable[[SiteInfo], dict[str, Any]]) -> None:
        """Write a generation of the index over all segments."""
        folder = self.core.path / "index/000000"
        durable.make_folder(folder)
        writer = _GenerationWriter(self.core, folder)
        neurons, packed = [], {}
        for info in self.core.meta.sites:
            states = states_of(info)
            writer.write_site(info, states, self._exemplars(states))
            neurons.append(_neurons(info, states))
            for state in ("moments", "others"):
                packed |= pack(info.site, state, states[state])
        writer.table("neurons.parquet", pa.concat_tables(neurons))
        writer.arrays("moments.npz", packed)
        covers = tuple(range(self.n_segments))
        generations.publish(self.core.path, Generation(0, covers, writer.files))

    def _exemplars(self, states: Mapping[str, Any]) -> pa.Table:
        """Return the lists as a capture orders them; what token a row is follows from the row."""
        sides = {
            "window": states["window_top"],
            "top": states["topk"].top,
            "bottom": states["topk"].bottom,
        }
        shape = (len(states["window_top"].counts), len(sides), TOPK.k)
        neuron, side, place = (axis.ravel() for axis in np.indices(shape))
        row_ids = np.stack([ranked.row_ids for ranked in sides.values()], axis=1).ravel()
        values = np.stack([ranked.values for ranked in sides.values()], axis=1).ravel()
        rows = row_ids // self.size * self.rows + row_ids % self.size
        tokens = self._token_ids()[rows % (PART_SEGMENTS * self.rows)]
        return pa.table(
            {
                "neuron": neuron.astype(np.int32),
                "side": pa.array(list(sides)).take(pa.array(side)),
                "rank": (place + 1).astype(np.int32),
                "row_id": row_ids,
                "value": values,
                "document": rows // (DOCUMENT_WINDOWS * self.context),
                "position": (rows % self.context).astype(np.int32),
                "token_id": tokens,
            },
            schema=EXEMPLARS,
        )

    def _token_ids(self) -> npt.NDArray[np.int32]:
        part = self.core.parts[0]
        first, stop = 0, PART_SEGMENTS * self.size
        table = self.core.tokens_tables.span(part, first, stop)
        return np.asarray(table.column("token_id").to_numpy())

    def made_up_states(self, info: SiteInfo) -> dict[str, Any]:
        """Return states as of values that nobody has: sorted lists of random rows."""
        rng = np.random.default_rng(info.site.layer)
        width, k = info.width, TOPK.k

        def ranked(sign: float) -> Ranked:
            rows = rng.integers(0, self.n_rows, (width, k))
            rows += rows % self.context == 0  # the first of a window is no content row
            values = np.sort(rng.gamma(2.0, 1.0, (width, k)).astype(np.float16), axis=1)
            values = (sign * values[:, ::-1]).astype(np.float32)
            order = np.lexsort((rows, -sign * values), axis=-1)
            return Ranked(
                np.take_along_axis(values, order, 1),
                self._row_ids(np.take_along_axis(rows, order, 1)),
                np.full(width, k, np.int32),
            )

        drawn = rng.normal(size=(512, width)).astype(np.float16)
        counts = np.zeros((width, 256), np.int64)
        np.add.at(counts, (np.arange(width), bins_of(drawn)), self.n_rows // 512)
        bands = np.arange(self.n_segments * -(-self.rows // self.core.meta.chunk_rows))
        per_segment = -(-self.rows // self.core.meta.chunk_rows)
        first = bands // per_segment * self.size + bands % per_segment * CHUNK_ROWS
        extremes = rng.random((len(bands), 2, width), np.float32)
        extremes[:, 0] *= -1
        sampled = np.sort(rng.choice(self.n_rows, 512, replace=False))
        return {
            "topk": TopKState(ranked(1.0), ranked(-1.0)),
            "window_top": ranked(1.0),
            "moments": _moments(drawn),
            "others": _moments(drawn[:9]),
            "histogram": HistogramState(counts),
            "zones": ZonesState(first, extremes),
            "sample": SampleState(self._row_ids(sampled), drawn),
        }

    def states_of_rows(self, info: SiteInfo) -> dict[str, Any]:
        """Return the states of the stored rows of a site: one pass, columns in memory."""
        values = np.empty((self.n_rows, info.width), np.float16)
        for segment in range(self.n_segments):
            part = values[segment * self.rows : (segment + 1) * self.rows]
            self.core.read(info, segment, 0, self.rows, out=part)
        content = np.flatnonzero(np.arange(len(values)) % self.context)
        bands = values.reshape(-1, CHUNK_ROWS, info.width)
        usable = (np.arange(CHUNK_ROWS) % self.context) != 0
        extremes = np.empty((len(bands), 2, info.width), np.float32)
        for band, (low, high) in zip(bands, extremes, strict=True):
            usable_values = band[usable].astype(np.float32)
            usable_values.min(0, out=low)
            usable_values.max(0, out=high)
        starts = np.arange(len(bands)) * CHUNK_ROWS
        some = np.sort(np.random.default_rng(0).choice(content, 512, replace=False))
        sampled = SampleState(self._row_ids(some), values[some])
        columns = np.ascontiguousarray(values.T)
        lists: dict[str, list[Ids]] = {"top": [], "bottom": [], "window": []}
        counts = np.zeros((info.width, 256), np.int64)
        for neuron in range(info.width):
            column = columns[neuron].astype(np.float32)
            mine = column[content]
            lists["top"].append(_best(-mine, content))
            lists["bottom"].append(_best(mine, content))
            windows = column.reshape(-1, self.context)[:, 1:]
            best = windows.argmax(axis=1)
            rows = np.arange(len(windows)) * self.context + 1 + best
            lists["window"].append(_best(-column[rows], rows))
            counts[neuron] = np.bincount(bins_of(mine), minlength=256)

        def ranked(side: str) -> Ranked:
            rows = np.stack(lists[side])
            found = np.take_along_axis(columns, rows, axis=1).astype(np.float32) + np.float32(0)
            return Ranked(found, self._row_ids(rows), np.full(info.width, TOPK.k, np.int32))

        return {
            "topk": TopKState(ranked("top"), ranked("bottom")),
            "window_top": ranked("window"),
            "moments": _moments(values[content[: 1 << 16]]),
            "others": _moments(values[:: self.context]),
            "histogram": HistogramState(counts),
            "zones": ZonesState(self._row_ids(starts), extremes),
            "sample": sampled,
        }


def _best(keys: npt.NDArray[np.float32], rows: Ids) -> Ids:
    """Return the rows with the lowest keys, equal ones in the order of rows."""
    near = np.flatnonzero(keys <= np.partition(keys, TOPK.k - 1)[TOPK.k - 1])
    return rows[near[np.lexsort((rows[near], keys[near]))[: TOPK.k]]]


def _moments(values: Values) -> MomentsState:
    fold = Moments()
    return fold.update(fold.start(values.shape[1]), values, np.arange(len(values)))


def jittered(base: Values, rows: int, seed: int) -> Callable[[int], Values]:
    """Return segments of values tiled in their own order, each moved by at most a float16 unit."""

    def values_of(segment: int) -> Values:
        rng = np.random.default_rng((seed, segment))
        places = (segment * rows + np.arange(rows)) % len(base)
        bits = base[places].view(np.int16)
        moved = bits + rng.integers(-1, 2, bits.shape, np.int16)
        # Of zero and the largest there is no unit on one side.
        far = (bits & 0x7FFF) - 1
        return np.where((far >= 0) & (far < 0x7BFE), moved, bits).view(np.float16)

    return values_of
