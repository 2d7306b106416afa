"""Segments captured by many workers: the bytes are those of one process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import distributed
import psutil
import pytest
import torch
import transformers
from click.testing import CliRunner

from actstore.capturing import Settings, cluster, compact, run_capture
from actstore.cli import main
from actstore.errors import (
    ArgumentError,
    BudgetExceeded,
    ModelError,
    NonFiniteActivation,
    StoreMismatch,
    StoreNotFound,
)
from actstore.store import CoreStore
from tests.captured import (
    DOCUMENTS,
    small_segments,
    stored_bytes,
)
from tests.toys import toy_model

Go = Callable[..., CoreStore]


SETTINGS = Settings(context=24, batch_tokens=96)


@pytest.fixture(scope="module", autouse=True)
def _small() -> Iterator[None]:
    with small_segments(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("actstore.capturing.parts.PART_ROWS", 150)
        yield


@pytest.fixture(scope="module")
def alone(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Return the bytes of the documents captured by one process."""
    path = tmp_path_factory.mktemp("alone") / "store"
    store, _ = run_capture(model_folder, DOCUMENTS, path, settings=SETTINGS)
    assert len(store.parts) > 2
    assert len(store.committed) > 8
    return stored_bytes(store)


@pytest.fixture
def go(model_folder: Path, tmp_path: Path) -> Go:
    """Return a function that captures the documents into a store of many segments."""

    def go(path: Path | None = tmp_path / "store", **options: Any) -> CoreStore:
        model = options.pop("model", model_folder)
        return run_capture(model, DOCUMENTS, path, settings=SETTINGS, **options)[0]

    return go


@pytest.fixture
def scheduler() -> Iterator[str]:
    """Return the address of a scheduler whose two workers are threads."""
    options = {"processes": False, "dashboard_address": None}
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, **options) as running:
        yield running.scheduler_address


def children() -> list[psutil.Process]:
    """Return the processes that descend from this one."""
    found = psutil.Process().children(recursive=True)
    # A browser that other tests opened starts and ends processes of its own accord.
    return [p for p in found if p.is_running() and "chrom" not in p.name()]


def committed(path: Path) -> list[int]:
    """Return the committed segments of a store that is being captured."""
    names = path.glob("commits/*.json")
    return sorted(int(name.stem) for name in names if name.stem.isdigit())


def test_a_killed_worker_loses_only_what_it_was_at(
    go: Go, alone: dict[str, bytes], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """One of two processes is killed in mid-run; the capture ends with the bytes of one process."""
    before = children()
    path = tmp_path / "store"
    seen: list[int] = []

    def kill_first() -> None:
        while not seen and time.monotonic() < deadline:
            seen.extend(committed(path))
            time.sleep(0.002)
        victim = CoreStore(path).commit_of(seen[0]).writer["process"]
        os.kill(victim, signal.SIGKILL)
        seen.append(victim)

    deadline = time.monotonic() + 300
    killer = threading.Thread(target=kill_first)
    killer.start()
    told: list[int] = []
    store = go(workers=2, progress=lambda stage, done, _: stage == "capture" and told.append(done))
    killer.join()

    *at_kill, victim = seen
    assert 0 < len(at_kill) < len(store.planned)
    assert stored_bytes(store) == alone
    writers = {store.commit_of(segment).writer["process"] for segment in store.committed}
    assert victim in writers
    assert os.getpid() not in writers
    assert told == sorted(told)
    assert told[-1] == store.n_rows()
    assert children() == before
    assert capfd.readouterr().err == ""


@pytest.fixture
def heeds_interrupts() -> Iterator[None]:
    """Let Ctrl-C through: a process that a shell started in the background ignores it."""
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, usual)


@pytest.mark.usefixtures("heeds_interrupts")
def test_an_interrupt_leaves_no_process(
    go: Go, alone: dict[str, bytes], capfd: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C while the cluster starts ends it, quietly, and the capture can go on."""
    before = children()

    def interrupt() -> None:
        while children() == before:
            time.sleep(0.01)
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGINT)

    started = threading.Thread(target=interrupt)
    started.start()
    with pytest.raises(KeyboardInterrupt):
        go(workers=2)

    started.join()
    assert children() == before
    assert capfd.readouterr().err == ""
    assert stored_bytes(go()) == alone


def test_an_interrupt_stops_the_workers_of_a_scheduler(
    go: Go, scheduler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They go on living: what they are at ends with the batch, and the model is let go."""
    begun = threading.Event()

    def endless(self: Any, _: Any) -> int:
        while True:
            begun.set()
            self._progress("capture", 0, 0)
            time.sleep(0.01)

    def interrupt(stage: str, *_: int) -> None:
        if stage == "capture":
            begun.wait()
            raise KeyboardInterrupt

    monkeypatch.setattr(cluster.Worker, "run", endless)
    with pytest.raises(KeyboardInterrupt):
        go(scheduler=scheduler, progress=interrupt)
    assert cluster._at_work.acquire(timeout=30)
    cluster._at_work.release()
    assert cluster._held is None


def test_a_running_scheduler_captures(go: Go, alone: dict[str, bytes], scheduler: str) -> None:
    """The workers of a scheduler write the same bytes; only the index is made here."""
    here = threading.get_ident()
    wrote: set[int] = set()
    run = cluster.Worker.run

    def watched(self: Any, segments: Any) -> int:
        wrote.add(threading.get_ident())
        return run(self, segments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cluster.Worker, "run", watched)
        store = go(scheduler=scheduler)
    assert wrote
    assert here not in wrote
    assert cluster._held is None, "the model is let go with the capture"
    assert stored_bytes(store) == alone


def test_what_fails_once_is_tried_again(
    go: Go, alone: dict[str, bytes], scheduler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error that is not about the capture is the scheduler's to retry."""
    run = cluster.Worker.run
    failures = iter([RuntimeError("the machine hiccuped"), OSError("stale file handle")])

    def failing(self: Any, segments: Any) -> int:
        for failure in failures:
            raise failure
        return run(self, segments)

    monkeypatch.setattr(cluster.Worker, "run", failing)
    store = go(scheduler=scheduler)
    assert next(failures, None) is None
    assert stored_bytes(store) == alone


def test_what_no_retry_can_mend_is_raised_at_once(
    go: Go, scheduler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NaN in a worker is the error it is in one process, and no other segment is begun after it."""
    module, tokenizer = toy_model("gpt2")
    with torch.no_grad():
        module.h[1].mlp.c_proj.weight.fill_(torch.nan)
    folder = tmp_path / "nan"
    module.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    runs: list[list[int]] = []
    run = cluster.Worker.run
    monkeypatch.setattr(
        cluster.Worker, "run", lambda self, segments: runs.append(segments) or run(self, segments)
    )

    with pytest.raises(NonFiniteActivation, match=r"resid_post.1 of .* NaN, the first"):
        go(model=folder, scheduler=scheduler)
    assert len(runs) == len({tuple(segments) for segments in runs}), "nothing was retried"


def test_workers_that_die_of_a_segment_are_told(
    go: Go, scheduler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A segment that kills one worker after the other ends the capture, with the likely reason."""

    def dying(*_: Any) -> int:
        raise distributed.KilledWorker("task", SimpleNamespace(address="tcp://here"), 3)

    monkeypatch.setattr(cluster.Worker, "run", dying)
    with pytest.raises(BudgetExceeded, match=r"4 workers died, .* segments \d+–\d+ .*--workers"):
        go(scheduler=scheduler)


def test_a_worker_with_another_model_is_refused(
    go: Go, scheduler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the worker is, the path stands for other weights, or for nothing."""
    other = tmp_path / "other"
    module, tokenizer = toy_model("gpt2", seed=5)
    module.save_pretrained(other)
    tokenizer.save_pretrained(other)
    model_of = cluster.model_of
    for there, error, message in (
        (other, StoreMismatch, "captured from .* with weights .*same on all machines"),
        (tmp_path / "nothing", ModelError, "'.*nothing' does not exist.*same on all machines"),
    ):
        monkeypatch.setattr(
            cluster, "model_of", lambda store, _, *rest, there=there: model_of(store, there, *rest)
        )
        with pytest.raises(error, match=f"worker on .* loads the model itself.*{message}"):
            go(scheduler=scheduler)
    assert committed(tmp_path / "store") == []


def test_workers_share_the_gpus_of_this_machine(go: Go, monkeypatch: pytest.MonkeyPatch) -> None:
    """Worker 7 of a machine with three GPUs takes the second, unless the user named one."""
    store = go(segments="0::9")
    devices: list[str] = []

    def model_of(_store: CoreStore, _model: str, _tokenizer: None, device: str) -> None:
        devices.append(device)
        raise InterruptedError

    monkeypatch.setattr(cluster, "model_of", model_of)
    monkeypatch.setattr(distributed, "get_worker", lambda: SimpleNamespace(name=7))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    fixed: dict[str, Any] = {"on_nan": "error", "on_overflow": "count", "progress": None}
    fixed |= {"budget": 1 << 30, "budget_given": True, "compact_every": 64}
    for workers, scheduler, device in (
        (8, None, "auto"),
        (8, None, "cuda"),
        (8, None, "cuda:2"),
        (8, None, "cpu"),
        (None, "tcp://host:8786", "auto"),
    ):
        many = cluster.Workers.wanted(workers, scheduler, "model", None, device)
        with cluster.Cluster(store, many, **fixed) as made, pytest.raises(InterruptedError):
            cluster._prepare(made._order)
    assert devices == ["cuda:1", "cuda:1", "cuda:2", "cpu", "auto"]


def test_a_store_the_workers_cannot_see_is_told(
    go: Go, scheduler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On another machine the path may name nothing; the error says that workers need it."""

    def unseen(path: Path) -> CoreStore:
        raise StoreNotFound(f"{path} is not a folder")

    monkeypatch.setattr(cluster, "CoreStore", unseen)
    with pytest.raises(StoreNotFound, match=r"worker on .* does not find .*--workers"):
        go(scheduler=scheduler)


def test_a_scheduler_that_is_not_there_is_told(go: Go, monkeypatch: pytest.MonkeyPatch) -> None:
    """An address without a scheduler, or a scheduler without workers, ends with the remedy."""
    monkeypatch.setattr("actstore.workers._START_SECONDS", 0.5)
    with pytest.raises(ArgumentError, match=r"scheduler = 'tcp://127.0.0.1:9' does not answer"):
        go(scheduler="tcp://127.0.0.1:9")
    options = {"processes": False, "dashboard_address": None}
    with (
        distributed.LocalCluster(n_workers=0, threads_per_worker=1, **options) as empty,
        pytest.raises(ArgumentError, match=r"has no workers .* expected the address of a Dask"),
    ):
        go(scheduler=empty.scheduler_address)


def test_a_share_of_the_budget_that_is_too_small_is_refused(go: Go, tmp_path: Path) -> None:
    """Before anything is started: the workers share the budget."""
    with pytest.raises(BudgetExceeded, match=r"share of each of 500 workers; fewer workers="):
        go(workers=500, budget="64MiB")
    assert committed(tmp_path / "store") == []


@pytest.mark.parametrize("options", [{"workers": 2}, {"scheduler": "tcp://127.0.0.1:9"}])
def test_a_model_in_memory_is_refused(go: Go, options: dict[str, Any]) -> None:
    """A module cannot travel to another process: the error says to save it."""
    module, tokenizer = toy_model("gpt2")
    with pytest.raises(ArgumentError, match=r"model is a GPT2Model in memory.* model.save_pretr"):
        go(model=module, tokenizer=tokenizer, **options)


def test_a_tokenizer_in_memory_is_refused(go: Go, model_folder: Path) -> None:
    """Nor does a tokenizer travel."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder)
    with pytest.raises(ArgumentError, match=r"tokenizer is a .* tokenizer.save_pretrained"):
        go(tokenizer=tokenizer, workers=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": 2, "scheduler": "tcp://host:8786"}, "exclude each other"),
        ({"workers": 0}, "workers = 0 was given; expected 1"),
        ({"workers": "two"}, "not a whole number"),
        ({"scheduler": 8786}, "scheduler is a int; expected the address"),
        ({"segments": "4::4"}, "'4::4' is no share; expected 'I::N' with I below N"),
        ({"segments": "1:2"}, "is no share"),
        ({"segments": slice(0, 8, 2)}, "is no share"),
        ({"segments": slice(-1, None, 2)}, "is no share"),
        ({"segments": 3}, "is no share"),
    ],
)
def test_options_that_cannot_be_are_refused(
    options: dict[str, Any], message: str, go: Go, tmp_path: Path
) -> None:
    """Before the model is loaded, and with what was expected."""
    with pytest.raises(ArgumentError, match=message):
        go(model="no-such-model", **options)
    assert not (tmp_path / "store").exists()


def test_a_share_of_a_temporary_store_is_refused(go: Go) -> None:
    """Other processes could not fill it."""
    with pytest.raises(ArgumentError, match="there is no store="):
        go(None, segments="0::2")


_SHARE = """
import sys, torch
from tests.captured import DOCUMENTS, small_segments
from actstore.capturing import Settings, parts, run_capture
torch.set_num_threads(1)
parts.PART_ROWS = 150
print("ready", flush=True)
sys.stdin.readline()
with small_segments():
    run_capture(
        sys.argv[1],
        DOCUMENTS,
        sys.argv[2],
        settings=Settings(context=24, batch_tokens=96),
        segments="2::3",
    )
"""


def test_shares_make_the_whole(
    go: Go, alone: dict[str, bytes], model_folder: Path, tmp_path: Path
) -> None:
    """Processes that begin at once, and one that comes last, fill a store; `compact` ends it."""
    path = tmp_path / "store"
    other = subprocess.Popen(
        [sys.executable, "-c", _SHARE, str(model_folder), str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert other.stdout
    assert other.stdout.readline() == "ready\n"
    with ThreadPoolExecutor(1) as pool:
        ended = pool.submit(other.communicate, "go\n")
        go(segments=slice(0, None, 3))
        ended.result()
    assert other.returncode == 0
    store = CoreStore(path)
    assert set(store.committed) == {s for s in store.planned if s % 3 != 1}
    assert store.index() is None, "the index is left to finish"
    store = go(segments="1::3")
    assert set(store.committed) == set(store.planned)
    assert {store.commit_of(s).writer["process"] for s in range(2, 12, 3)} == {other.pid}
    compact(store)
    assert stored_bytes(store) == alone


def test_one_share_does_not_wait_for_the_others(go: Go) -> None:
    """A batch system may run the shares one after the other."""
    store = go(segments="1::2")
    assert {segment % 2 for segment in store.committed} == {1}
    assert store.plan_complete


def test_the_command_line_takes_them(
    model_folder: Path, texts_folder: Path, tmp_path: Path, scheduler: str
) -> None:
    """`--segments` leaves the index to `actstore finish`; `--scheduler` makes the same store."""

    def run(*options: str, command: str = "capture") -> str:
        arguments = [str(model_folder), str(texts_folder)] if command == "capture" else []
        done = CliRunner().invoke(
            main, [command, *arguments, str(path), *options], catch_exceptions=False
        )
        return done.output if done.exit_code == 0 else f"exit {done.exit_code}: {done.stderr}"

    path = tmp_path / "store"
    run("--context", "16", "--segments", "1::2")
    assert 0 not in CoreStore(path).committed
    assert CoreStore(path).plan_complete
    run("--context", "16", "--segments", "0::2")
    assert CoreStore(path).index() is None
    run(command="finish")
    assert CoreStore(path).index() is not None
    path = tmp_path / "another"
    run("--context", "16", "--scheduler", scheduler)
    assert stored_bytes(CoreStore(path)) == stored_bytes(CoreStore(tmp_path / "store"))
    assert run("--workers", "0").startswith("exit 1: error: workers = 0 was given")
