"""A capture that is killed and run again leaves the bytes of one that was not."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from actstore import durable
from actstore.capturing import Settings, compact, run_capture
from actstore.capturing.worker import Worker
from actstore.errors import DamagedFile, StoreBusy
from actstore.models import LanguageModel, load
from actstore.store import CoreStore, generations
from tests.captured import (
    DOCUMENTS,
    Captured,
    brute_lists,
    content,
    indexed_lists,
    small_segments,
    stored_bytes,
)
from tests.toys import toy_model

Run = Callable[..., object]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """Return a function that captures in a process of its own, and says how that ended."""
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.capture.killed_capture"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert server.stdin
    assert server.stdout
    assert json.loads(server.stdout.readline()) == "ready"

    def ask(path: Path, **request: Any) -> object:
        server.stdin.write(json.dumps({"path": str(path), **request}) + "\n")
        server.stdin.flush()
        return json.loads(server.stdout.readline())

    yield ask
    server.stdin.close()
    server.wait()


@pytest.fixture(scope="module")
def whole(run: Run, tmp_path_factory: pytest.TempPathFactory) -> tuple[CoreStore, list[str]]:
    """Return the store of an uninterrupted capture, and its durable steps."""
    path = tmp_path_factory.mktemp("whole")
    assert run(path / "store", log=str(path / "log")) == 0
    store = CoreStore(path / "store")
    assert len(store.parts) > 2
    assert len(store.committed) > 8
    assert_index_is_exact(store)
    return store, (path / "log").read_text().splitlines()


def assert_index_is_exact(store: CoreStore) -> None:
    """Fail unless the newest index holds exactly the best of the rows that it covers."""
    generation = store.index()
    assert generation is not None
    assert set(generation.covers) == set(store.committed)
    for site in store.sites:
        assert indexed_lists(store, str(site)) == brute_lists(store, str(site)), site


def check_killed(path: Path, whole: CoreStore, run: Run, compacted: bool) -> None:
    """Compact what a killed capture committed, then finish it, and compare all bytes."""
    if (path / "zarr.json").exists():
        if not compacted:  # on a copy: what is compacted must not matter either
            shutil.copytree(path, path.with_name("copy"))
        store = CoreStore(path if compacted else path.with_name("copy"))
        compact(store)
        if store.committed:
            assert_index_is_exact(store)
    assert run(path) == 0
    assert stored_bytes(CoreStore(path)) == stored_bytes(whole)


def test_an_uninterrupted_capture_is_the_same_every_time(
    whole: tuple[CoreStore, list[str]], run: Run, tmp_path: Path
) -> None:
    """Two captures of one corpus leave the same rows, tables and index."""
    assert run(tmp_path / "store") == 0
    found = stored_bytes(CoreStore(tmp_path / "store"))
    assert found == stored_bytes(whole[0])
    assert any(name.startswith("index/newest/exemplars/") for name in found)
    assert any(name.endswith("/c/3/0") for name in found)


# One step of each kind and place: the root, a part, its arrays, the vocabulary, shards of two
# segments in flight, partials, commits, generations.
@pytest.mark.parametrize(
    ("when", "compacted"), [("before", True), ("after", True), ("after", False)]
)
def test_killed_at_every_create(
    when: str, compacted: bool, whole: tuple[CoreStore, list[str]], run: Run, tmp_path: Path
) -> None:
    """Killed before or after a fact is published: every plan part, commit and generation."""
    store, steps = whole
    creates = [i for i, step in enumerate(steps) if step.startswith("create")]
    assert len(creates) > 1 + len(store.parts) + len(store.committed)
    chosen = creates[compacted::2] if when == "after" else creates[::4]
    for number in chosen:
        path = tmp_path / str(number) / "store"
        path.parent.mkdir()
        assert run(path, kill=number, when=when) == "killed", steps[number]
        check_killed(path, store, run, compacted)


def test_killed_between_steps(whole: tuple[CoreStore, list[str]], run: Run, tmp_path: Path) -> None:
    """Killed after other durable steps: a shard, a partial, a table, the shape of an array."""
    store, steps = whole
    first = {re.sub(r"\d+", "", step): i for i, step in reversed(list(enumerate(steps)))}
    chosen = {number for step, number in first.items() if step.startswith("publish")}
    # Inside a create: the file is written under another name, and not linked yet.
    chosen |= {number + 1 for step, number in first.items() if step.startswith("create")}
    assert len(chosen) > 10
    for number in sorted(chosen):
        path = tmp_path / str(number) / "store"
        path.parent.mkdir()
        assert run(path, kill=number) == "killed", steps[number]
        check_killed(path, store, run, compacted=number % 2 == 0)


def test_killed_at_random_moments(
    whole: tuple[CoreStore, list[str]], run: Run, tmp_path: Path
) -> None:
    """Killed from outside, again and again, until it is through."""
    path = tmp_path / "store"
    endings = [run(path, seconds=0.2 + 0.13 * attempt) for attempt in range(8)]
    assert "killed" in endings
    check_killed(path, whole[0], run, compacted=True)


def test_segments_in_any_order_end_in_the_same_index(
    toy_capture: Callable[..., Captured], tmp_path: Path
) -> None:
    """Segment 2 before 1, and an index of what has a gap: the finished store is the same."""
    whole = toy_capture(name="whole")
    path = tmp_path / "store"
    shutil.copytree(whole.store.path, path)
    for folder in ("commits", "partials", "index"):
        shutil.rmtree(path / folder)
    for shard in path.glob("activations/**/c"):
        shutil.rmtree(shard)
    last = max(whole.store.planned)
    for segments in ([2], [1, last], [0], [4, 3], range(last + 1)):
        store = CoreStore(path)
        Worker(store, whole.model, budget=1 << 30).run(segments)
        store.refresh()
        generation = compact(store)
        assert generation is not None
        assert set(segments) <= set(generation.covers)
        assert_index_is_exact(store)
        assert compact(store) == generation, "nothing new: no new generation"
    assert store.committed == tuple(range(last + 1))
    assert stored_bytes(store) == stored_bytes(whole.store)
    assert not list(path.glob("partials/*/*.npz")), "a whole prefix needs no partials"
    assert len(list(path.glob("index/*"))) == 1, "older generations are swept"


def test_a_generation_with_a_gap_is_not_built_upon(
    toy_capture: Callable[..., Captured], tmp_path: Path
) -> None:
    """Sums depend on their order: only what covers 0 … n is gone on from, and that is kept."""
    whole = toy_capture(name="whole")
    path = tmp_path / "store"
    shutil.copytree(whole.store.path, path)
    for folder in ("commits", "partials", "index"):
        shutil.rmtree(path / folder)
    store = CoreStore(path)
    worker = Worker(store, whole.model, budget=1 << 30)
    worker.run([0, 1])
    assert compact(store, only_prefix=True).covers == (0, 1)
    Worker(store, whole.model, budget=1 << 30).run([3])
    assert compact(store, only_prefix=True).covers == (0, 1)
    assert compact(store).covers == (0, 1, 3)
    assert not store.index().is_prefix
    assert store.prefix_index().covers == (0, 1)
    assert [p.name for p in (path / "partials/folds").glob("*.npz")] == ["00000003.npz"]


def test_thresholds_come_from_committed_segments_below(
    toy_capture: Callable[..., Captured], tmp_path: Path
) -> None:
    """Segments above, though committed before, leave no mark: an index of those below is exact."""
    whole = toy_capture(name="whole")
    path = tmp_path / "store"
    shutil.copytree(whole.store.path, path)
    for folder in ("commits", "partials", "index"):
        shutil.rmtree(path / folder)
    store = CoreStore(path)
    above = [s for s in store.planned if s > 3]
    worker = Worker(store, whole.model, budget=1 << 30)
    for segments in (above, [0, 1, 2]):
        worker.run(segments)
    rows, _ = content(store, "mlp_post.0", above)
    assert len(rows) > 100, "enough to fill the lists, or there is no threshold"
    assert compact(store, only_prefix=True).covers == (0, 1, 2)
    for site in store.sites:
        exact = brute_lists(store, str(site), [0, 1, 2])
        assert indexed_lists(store, str(site)) == exact, site


def test_commits_name_what_they_relied_on(toy_capture: Callable[..., Captured]) -> None:
    """Every commit names the segments behind its thresholds, all committed before and below."""
    store = toy_capture().store
    commits = [store.commit_of(segment) for segment in store.committed]
    assert any(commit.relied_on for commit in commits)
    for commit in commits:
        assert all(first <= last < commit.segment for first, last in commit.relied_on)


def test_an_index_over_a_missing_commit_is_refused(toy_capture: Callable[..., Captured]) -> None:
    """A commit that others relied on is gone: neither the index nor a compaction goes on."""
    store = toy_capture().store
    (store.path / "commits/00000001.json").unlink()
    again = CoreStore(store.path)
    with pytest.raises(DamagedFile, match=r"segment 1, whose commit commits/00000001.json is miss"):
        again.index()
    shutil.rmtree(store.path / "index")
    with pytest.raises(DamagedFile, match="relied on the lists of segment 1, which is not comm"):
        compact(CoreStore(store.path))


def test_a_segment_another_process_writes_is_left_to_it(
    toy_capture: Callable[..., Captured],
) -> None:
    """A held lock is respected: the segment is skipped, and what it commits stands."""
    whole = toy_capture()
    store = whole.store
    (store.path / "commits/00000001.json").unlink()
    store = CoreStore(store.path)
    other = CoreStore(store.path)
    with other.write_segment(1):
        Worker(store, whole.model, budget=1 << 30).run([1])
        assert 1 not in CoreStore(store.path).committed
        with pytest.raises(StoreBusy, match=r"segment 1 of .* is being written by another proc"):
            store.write_segment(1).__enter__()


@pytest.mark.parametrize("held", ["plan", "segment"])
def test_a_capture_takes_up_what_another_process_gave_up(
    held: str, toy_capture: Callable[..., Captured]
) -> None:
    """It waits for whoever plans or writes a segment, and does itself what is then not done."""
    store = toy_capture().store
    expected = stored_bytes(store)
    (store.path / "commits/00000001.json").unlink()
    other = CoreStore(store.path)
    lock = other.plan_lock() if held == "plan" else other.write_segment(1)
    with ThreadPoolExecutor(1) as pool:
        with lock:
            going_on = pool.submit(toy_capture)
            with pytest.raises(TimeoutError):
                going_on.result(timeout=1)
            assert 1 not in CoreStore(store.path).committed
        finished = going_on.result(timeout=60).store
    assert stored_bytes(finished) == expected


def test_a_crash_before_the_store_exists_leaves_a_vacant_folder(
    toy_capture: Callable[..., Captured], tmp_path: Path
) -> None:
    """What was written of the root metadata by a process that died is no foreign file."""
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "zarr.json.4711.partial").write_bytes(b"{")
    assert toy_capture().store.committed


def test_half_a_generation_is_not_there(toy_capture: Callable[..., Captured]) -> None:
    """Without its manifest a generation does not count, and the next one sweeps it away."""
    store = toy_capture().store
    whole = store.index()
    half = store.path / f"index/{generations.new_number(store.path):06d}"
    durable.make_folder(half)
    (half / "neurons.parquet").write_bytes(b"PAR1")
    assert store.index() == whole
    generations.sweep(store.path)
    assert not half.exists()
    assert os.listdir(store.path / "index") == [whole.folder.removeprefix("index/")]


def test_small_parts_and_one_part_plan_alike(
    toy_capture: Callable[..., Captured], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where parts end decides where segments end, and nothing else."""
    whole = toy_capture(name="whole").store
    monkeypatch.setattr("actstore.capturing.parts.PART_ROWS", 40)
    with small_segments():
        parts = toy_capture(name="parts").store
    assert len(parts.parts) > 3
    assert [p.complete for p in parts.parts] == [False] * (len(parts.parts) - 1) + [True]
    assert parts.n_documents == whole.n_documents
    assert parts.n_rows() == whole.n_rows()


def test_two_captures_at_once_share_the_work(
    toy_capture: Callable[..., Captured], tmp_path: Path
) -> None:
    """Segments are captured by whoever is first; both return a whole store with the same bytes."""
    whole = toy_capture(name="whole")
    planned = tmp_path / "store"
    shutil.copytree(whole.store.path, planned)
    for folder in ("commits", "partials", "index"):
        shutil.rmtree(planned / folder)
    settings = Settings(context=24, batch_tokens=96)

    def go(model: LanguageModel) -> CoreStore:
        while True:
            # The plan is looked at by one process at a time, for a moment.
            with suppress(StoreBusy):
                return run_capture(model, DOCUMENTS, planned, settings=settings)[0]

    models = [load(*toy_model("bert")) for _ in range(2)]
    with ThreadPoolExecutor(2) as pool:
        stores = list(pool.map(go, models))
    for store in stores:
        assert store.committed == whole.store.committed
    assert stored_bytes(CoreStore(planned)) == stored_bytes(whole.store)
    assert_index_is_exact(CoreStore(planned))


def test_a_sample_is_the_same_after_a_kill(run: Run, tmp_path: Path) -> None:
    """Killed around shards, the files of stored rows, partials and commits: the same bytes."""
    options = {"keep": {"mlp_post": "1/4", "resid_post": "none"}}
    assert run(tmp_path / "whole", options=options, log=str(tmp_path / "log")) == 0
    whole = CoreStore(tmp_path / "whole")
    steps = (tmp_path / "log").read_text().splitlines()
    last = f"{max(whole.committed) - 1:08d}"
    chosen = [i for i, step in enumerate(steps) if last in step or step == "publish 0"]
    assert any("npy" in steps[i] for i in chosen)
    assert any("json" in steps[i] for i in chosen)
    for number in chosen[:: max(1, len(chosen) // 8)]:
        path = tmp_path / str(number)
        assert run(path, kill=number, options=options) == "killed", steps[number]
        assert run(path, options=options) == 0
        assert stored_bytes(CoreStore(path)) == stored_bytes(whole)
