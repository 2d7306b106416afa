"""The store against a dict of arrays, through any sequence of operations."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from actstore import durable
from actstore.errors import RowNotFound, StoreMismatch
from actstore.shard import to_band
from actstore.site import Site
from actstore.store import CoreStore, Part, Segment, SiteCounts, SiteInfo, StoreMeta
from actstore.store.tables import DOCUMENTS, TOKENS, WINDOWS

SIZE, CHUNK = 16, 4
WIDTHS = {"mlp_post.0": 3, "resid_post.10": 5}
META = StoreMeta(
    store_id="machine",
    created="now",
    model={"name": "made/up"},
    tokenizer="",
    segment_rows=SIZE,
    chunk_rows=CHUNK,
    keep="all",
    context=SIZE,
    overlap=0,
    batch_tokens=SIZE,
    versions={},
    sites=tuple(
        SiteInfo(Site.parse(name), "made.up", "output", width, "float16")
        for name, width in WIDTHS.items()
    ),
)


class StoreMachine(RuleBasedStateMachine):
    """Publishes parts, commits segments in any order, reads, and opens the store again."""

    @initialize()
    def create(self) -> None:
        """Make an empty store and open it a second time, as another process would."""
        self.folder = tempfile.mkdtemp()
        self.store = CoreStore.create(f"{self.folder}/store", META)
        self.other = CoreStore(self.store.path)
        self.planned: dict[int, int] = {}
        self.committed: dict[int, dict[str, np.ndarray]] = {}

    def teardown(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.folder)

    @rule(rows=st.lists(st.integers(1, SIZE), max_size=3))
    def publish_part(self, rows: list[int]) -> None:
        """Publish the next part of the plan; the other process sees it when it looks."""
        number, first = len(self.store.parts), len(self.planned)
        segments = tuple(Segment(first + i, number, {"": n}) for i, n in enumerate(rows))
        draft = Part(number, segments, 0, len(rows), False, {}, {})
        row_ids = [(first + i) * SIZE + offset for i, n in enumerate(rows) for offset in range(n)]
        columns = {name: [0] * len(row_ids) for name in TOKENS.names} | {"row_id": row_ids}
        tables = {
            "tokens": pa.table(columns).cast(TOKENS),
            "documents": DOCUMENTS.empty_table(),
            "windows": WINDOWS.empty_table(),
        }
        files = {}
        for kind, table in tables.items():
            path = self.store.path / draft.file(kind)
            durable.make_folder(path.parent)
            files[draft.file(kind)] = durable.write_table(path, table)
        with self.store.plan_lock():
            self.store.publish_part(Part(number, segments, 0, len(rows), False, {}, files))
        self.planned |= {s.segment: s.rows[""] for s in segments}
        self.other.refresh()

    @precondition(lambda self: set(self.planned) - set(self.committed))
    @rule(data=st.data(), seed=st.integers(0, 99), through_other=st.booleans())
    def commit(self, data: st.DataObject, seed: int, through_other: bool) -> None:
        """Write and commit any planned segment; a second commit of it is refused."""
        store = self.other if through_other else self.store
        segment = data.draw(st.sampled_from(sorted(set(self.planned) - set(self.committed))))
        values = self._write(store, segment, seed, commit=True)
        self.committed[segment] = values
        with pytest.raises(StoreMismatch, match="is committed already; what was there stands"):
            self._write(store, segment, seed + 1, commit=True)
        self.store.refresh_commits()
        self.other.refresh()

    @precondition(lambda self: set(self.planned) - set(self.committed))
    @rule(data=st.data(), seed=st.integers(0, 99))
    def write_without_commit(self, data: st.DataObject, seed: int) -> None:
        """Write shards as a process does that dies before its commit."""
        segment = data.draw(st.sampled_from(sorted(set(self.planned) - set(self.committed))))
        self._write(self.store, segment, seed, commit=False)

    def _write(
        self, store: CoreStore, segment: int, seed: int, commit: bool
    ) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(seed)
        values = {}
        # What was committed must not be written over: the writer looks before it writes.
        with store.write_segment(segment) as writer:
            assert writer.committed == (segment in self.committed)
            for info in store.meta.sites:
                rows = rng.normal(size=(self.planned[segment], info.width)).astype(np.float16)
                values[str(info.site)] = rows
                if writer.committed:
                    continue
                for start in range(0, len(rows), CHUNK):
                    band = to_band(rows[start : start + CHUNK], store.layout(info))
                    writer.write_band(info, band)
            if commit:
                writer.commit({"mlp_post.0": SiteCounts(1, 2, ((3, 4),))}, [])
        return values

    @rule()
    def reopen(self) -> None:
        """Open the store anew."""
        self.store = CoreStore(self.store.path)

    @rule(data=st.data(), name=st.sampled_from(sorted(WIDTHS)))
    def read_rows(self, data: st.DataObject, name: str) -> None:
        """Read any row ids: those of committed segments are there, no others."""
        ids = data.draw(st.lists(st.integers(0, (len(self.planned) + 1) * SIZE), max_size=6))
        inside = [i for i in ids if i % SIZE < self.planned.get(i // SIZE, 0)]
        there = [i for i in inside if i // SIZE in self.committed]
        if there == ids:
            expected = [self.committed[i // SIZE][name][i % SIZE] for i in ids]
            found = self.store[name][ids]
            assert found.shape == (len(ids), WIDTHS[name])
            assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
        else:
            with pytest.raises(RowNotFound):
                self.store[name][ids]

    @precondition(lambda self: self.committed)
    @rule(data=st.data(), name=st.sampled_from(sorted(WIDTHS)))
    def read_column(self, data: st.DataObject, name: str) -> None:
        """Read a neuron over a segment."""
        segment = data.draw(st.sampled_from(sorted(self.committed)))
        neuron = data.draw(st.integers(0, WIDTHS[name] - 1))
        column = self.store.read_column(self.store.site(name), segment, neuron)
        assert np.array_equal(column, self.committed[segment][name][:, neuron])

    @invariant()
    def agrees(self) -> None:
        """Plan, commits, counts and whole slices are those of the dict."""
        for store in (self.store, self.other):
            assert {s: p.rows[""] for s, p in store.planned.items()} == self.planned
            assert store.committed == tuple(sorted(self.committed))
            assert store.n_rows() == sum(self.planned[s] for s in self.committed)
        for segment in self.committed:
            commit = self.store.commit_of(segment)
            assert commit.rows == {"": self.planned[segment]}
            assert commit.counts == {"mlp_post.0": SiteCounts(1, 2, ((3, 4),))}
        for name, width in WIDTHS.items():
            rows = [self.committed[s][name] for s in sorted(self.committed)]
            expected = np.concatenate([np.empty((0, width), np.float16), *rows])
            assert np.array_equal(self.store[name][:], expected)


StoreMachine.TestCase.settings = settings(max_examples=12, stateful_step_count=15, deadline=None)
TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.__doc__ = "Any sequence of publishing, committing, crashing and reading."


def test_a_plan_part_is_published_once(tmp_path: Path) -> None:
    """A part under a number that is taken changes nothing."""
    store = CoreStore.create(tmp_path / "store", META)
    part = Part(0, (Segment(0, 0, {"": 3}),), 0, 0, True, {}, {})
    store.publish_part(part)
    with pytest.raises(FileExistsError):
        store.publish_part(Part(0, (), 0, 0, True, {}, {}))
    assert CoreStore(store.path).parts == [part]
