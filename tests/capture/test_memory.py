"""Memory of a capture: bounded by the budget, and the same for any corpus."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from actstore.capturing import run
from actstore.capturing.worker import Worker
from actstore.store import CoreStore
from tests.captured import Captured

_RUN = """
import json, resource, sys
import actstore
from actstore.capturing import Limits, Settings, run_capture
from actstore.models import load
from tests.toys import TEXT, toy_model

model = load(*toy_model("gpt2", n_layers=3, hidden=128, ffn=512), device="cpu")
def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
class Corpus:
    def __iter__(self):
        for _ in range(int(sys.argv[2]) // 200):
            yield {"text": TEXT * 8}
settings = Settings(context=64, limits=Limits(int(sys.argv[2]), 256), batch_tokens=512)
run_capture(model, text=TEXT)  # what libraries and compiled code take, once
before = peak()
store, _ = run_capture(model, Corpus(), sys.argv[1], settings=settings, budget="64MiB")
found = {"grown": peak() - before, "rows": store.n_rows(), "bytes": store.n_bytes()}
store = actstore.open(sys.argv[1])
store.top("mlp_post.1", 5, k=3).rows()
store.top("mlp_post.1", 5, k=3, activations=True).rows()
store.top("mlp_post.1", 5, k=200, where="document > 3", distinct="document").rows()
store.top("mlp_post.1", 5, k=200, before=0, after=0).rows()
run_capture(model, text=TEXT, path=sys.argv[1] + "-shuffled", order="shuffled")
print(json.dumps({**found, "has_pandas": "pandas" in sys.modules}))
"""


def measured(path: Path, rows: int) -> dict[str, int]:
    """Return how far a capture of some rows, in a process of its own, raised its peak memory."""
    command = [sys.executable, "-c", _RUN, str(path), str(rows)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_a_store_of_twice_the_budget_is_captured_within_it(tmp_path: Path) -> None:
    """Peak memory beyond the model stays in the budget, though the rows would not fit into it.

    Nor is pandas, 30 MB and 0.3 s of a process, imported by a capture or a question.
    """
    found = measured(tmp_path / "store", 32_768)

    assert found["rows"] == 32_768
    assert found["bytes"] > 2 * 64 * 2**20
    assert found["grown"] <= 64 * 2**20
    assert not found["has_pandas"]


@pytest.mark.parametrize("keep", ["all", "none"])
def test_slow_commits_hold_the_model_back(
    keep: str, toy_capture: Callable[..., Captured], monkeypatch: pytest.MonkeyPatch
) -> None:
    """States of two segments are held at most, however long the commits of small ones take."""
    held: list[int] = []
    begin, commit = Worker._begin, Worker._commit

    def counting(self: Worker, segment: int) -> Any:
        held.append(len(self._under_way) + 1)
        return begin(self, segment)

    def slow(self: Worker, work: Any) -> None:
        time.sleep(0.1)
        commit(self, work)

    monkeypatch.setattr(Worker, "_begin", counting)
    monkeypatch.setattr(Worker, "_commit", slow)

    store = toy_capture(keep=keep).store

    assert len(store.committed) == len(held) >= 5
    assert max(held) == 2


def test_a_commit_that_fails_stops_the_model_and_leaves_the_worker_usable(
    toy_capture: Callable[..., Captured], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No further segment is begun, though none waits for a band; and the next run gets through.

    Nor does one that is interrupted keep the bands that the model held: without them the next would
    wait for ever.
    """
    whole = toy_capture(keep="none")
    path = tmp_path / "again"
    shutil.copytree(whole.store.path, path)
    for folder in ("commits", "partials", "index"):
        shutil.rmtree(path / folder, ignore_errors=True)
    store = CoreStore(path)
    worker = Worker(store, whole.model, budget=1 << 30)
    begun: list[int] = []
    begin, commit = Worker._begin, Worker._commit

    def counting(self: Worker, segment: int) -> Any:
        begun.append(segment)
        return begin(self, segment)

    def failing(self: Worker, work: Any) -> None:
        time.sleep(0.5)  # until the model waits for the place
        raise OSError("no space")

    forward = Worker._forward

    def interrupted(self: Worker, work: Any, batch: Any) -> None:
        forward(self, work, batch)
        assert work.open_bands
        raise KeyboardInterrupt

    monkeypatch.setattr(Worker, "_begin", counting)
    monkeypatch.setattr(Worker, "_commit", failing)
    with pytest.raises(OSError, match="no space"):
        worker.run(store.planned)
    assert begun == [0, 1]
    with monkeypatch.context() as patched:
        patched.setattr(Worker, "_forward", interrupted)
        for _ in range(3):
            with pytest.raises(KeyboardInterrupt):
                worker.run(store.planned)
    monkeypatch.setattr(Worker, "_commit", commit)
    rows: list[int] = []
    last = threading.Thread(target=lambda: rows.append(worker.run(store.planned)), daemon=True)
    last.start()
    last.join(60)

    assert len(rows) == 1
    store.refresh()
    assert set(store.committed) == set(store.planned)


def test_an_index_is_made_without_the_worker(
    toy_capture: Callable[..., Captured], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bands and lists of the capture are gone before the index takes memory."""
    workers: list[weakref.ref[Worker]] = []
    init, real = Worker.__init__, run.compact
    alive: list[bool] = []

    def noting(self: Worker, *args: Any, **options: Any) -> None:
        workers.append(weakref.ref(self))
        init(self, *args, **options)

    def compacting(*args: Any, **options: Any) -> Any:
        alive.extend(worker() is not None for worker in workers)
        return real(*args, **options)

    monkeypatch.setattr(Worker, "__init__", noting)
    monkeypatch.setattr(run, "compact", compacting)
    toy_capture()
    assert alive == [False]
