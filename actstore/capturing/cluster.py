"""Many workers: segments are tasks on Dask, each captured by the same `Worker` as in one process.

Retry is the scheduler's, safety is the commit's.  A worker that dies takes nothing with it but its
segments in flight: the kernel frees their locks with the process, the scheduler gives the task to
another worker, and that one passes over what is committed.  Rows follow from the plan and the
compacted index from the rows, so neither depends on who captured what.

Which workers there are, and how those of this machine start and end, is told in `workers`.
"""

from __future__ import annotations

import errno
import os
import platform
import queue
import re
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch

from actstore.capturing.replay import model_of
from actstore.capturing.worker import OnFault, Timing, Worker, spare_bands
from actstore.errors import (
    ActstoreError,
    ArgumentError,
    BudgetExceeded,
    ModelError,
    StoreMismatch,
    StoreNotFound,
)
from actstore.models import LanguageModel
from actstore.store import CoreStore
from actstore.store.budget import Progress, parse_budget
from actstore.workers import Connection, Where, quiet

_RETRIES = 2
_POLL_SECONDS = 0.5
_TASKS_PER_WORKER = 8
_MOST_SEGMENTS = 8


@dataclass(frozen=True)
class Share:
    """The segments that one process of several captures: those with number % n == i."""

    i: int = 0
    """Which share."""
    n: int = 1
    """How many shares there are."""

    @classmethod
    def parse(cls, segments: str | slice | None, path: str | Path | None) -> Share:
        """Return the share that ``"I::N"`` or ``slice(I, None, N)`` names; None is everything.

        Raises
        ------
        ArgumentError
            If it is neither, I is not below N, or the store is a temporary one, without a path.
        """
        if segments is None:
            return cls()
        if isinstance(segments, slice) and segments.stop is None:
            i, n = segments.start or 0, 1 if segments.step is None else segments.step
        elif isinstance(segments, str) and (match := re.fullmatch(r"(\d+)::(\d+)", segments)):
            i, n = int(match[1]), int(match[2])
        else:
            i, n = -1, 0
        if not (isinstance(i, int) and isinstance(n, int) and 0 <= i < n):
            raise ArgumentError(
                f"segments = {segments!r} is no share; expected 'I::N' with I below N: process I "
                "of N captures the segments I, I + N, I + 2N, …, such as '0::4' (--segments 0::4)."
            )
        if path is None:
            raise ArgumentError(
                f"segments = {segments!r} is a share of a store that several processes fill, but "
                "there is no store=; name its folder, the same for all of them."
            )
        return cls(i, n)

    @property
    def is_all(self) -> bool:
        """Whether it is all segments."""
        return self.n == 1

    def of(self, segments: Iterable[int]) -> set[int]:
        """Return those of some segments that belong to the share."""
        return {segment for segment in segments if segment % self.n == self.i}


@dataclass(frozen=True)
class Workers(Where):
    """Where segments are captured, and what is loaded there."""

    model: str
    """What every worker loads: a path, absolute, or a name on the hub."""
    tokenizer: str | None
    """Likewise, where it is not the model's own."""
    device: str
    """As given by the user."""

    @classmethod
    def wanted(
        cls, workers: int | None, scheduler: str | None, model: Any, tokenizer: Any, device: str
    ) -> Workers | None:
        """Return the workers that arguments ask for; None where this process does it alone.

        Raises
        ------
        ArgumentError
            If they contradict each other, or the model cannot be loaded by another process.
        """
        where = Where.asked(workers, scheduler)
        if where is None:
            return None
        for name, value in (("model", model), ("tokenizer", tokenizer or "")):
            if not isinstance(value, (str, os.PathLike)):
                raise ArgumentError(
                    f"{name} is a {type(value).__name__} in memory, which other processes cannot "
                    "load; with workers= or scheduler= give its name or directory. Save it with "
                    f"{name}.save_pretrained(directory), or leave them out."
                )
        source = None if tokenizer is None else _absolute(tokenizer)
        return cls(where.n_local, where.scheduler, _absolute(model), source, str(device))


def _absolute(source: str | os.PathLike[str]) -> str:
    """Return a path that means the same in another folder; names of the hub stay."""
    path = Path(source).expanduser()
    return str(path.absolute()) if path.exists() else os.fspath(source)


# -- in a worker's process -------------------------------------------------------------------------


@dataclass(frozen=True)
class Order:
    """What a worker must know to capture segments of a store."""

    run_id: str
    """Tells this capture from any other."""
    store: str
    """Path of the store."""
    model: str
    tokenizer: str | None
    device: str
    """As in `Workers`."""
    one_a_gpu: bool
    """Whether the workers of this machine share its GPUs by their numbers."""
    budget: int | None
    """Bytes for this worker; None for what its machine has."""
    on_nan: OnFault
    on_overflow: OnFault
    compact_every: int
    """As in `Worker`."""


class _Ended(Exception):
    """The capture was stopped while this worker was at it."""


def _task() -> Callable[[dict[str, Any], list[int]], Timing | Exception]:
    """Return the task of a worker as a function that travels by value.

    One that travels by name would be looked up on its way, and have the scheduler import torch.
    """

    def capture(order: dict[str, Any], segments: list[int]) -> Timing | Exception:
        from actstore.capturing import cluster

        return cluster.capture_segments(cluster.Order(**order), segments)

    return capture


def _end() -> Callable[[str], None]:
    """Return the end of a capture as a function that travels by value, to workers that took part.

    One that did not shall not load this module for it.
    """

    def end(run_id: str) -> None:
        import sys

        if cluster := sys.modules.get("actstore.capturing.cluster"):
            cluster.end_run(run_id)

    return end


# A process captures one segment at a time, however many threads Dask gives it, and keeps the model
# and the bands from task to task.
_at_work = threading.Lock()
_held: tuple[Order, CoreStore, Worker] | None = None
_ended_runs: set[str] = set()


def capture_segments(order: Order, segments: Sequence[int]) -> Timing | Exception:
    """Capture segments in a worker; return the seconds of its stages, or what no retry can mend."""
    global _held
    import distributed

    with _at_work:
        try:
            _check_wanted(order)
            n_threads = distributed.get_worker().state.nthreads
            if n_threads > 1:
                torch.set_num_threads(n_threads)
            if _held is None or _held[0] != order:
                _held = None  # before another model is loaded
                _held = (order, *_prepare(order))
            _, store, worker = _held
            store.refresh()
            worker.timing = Timing()
            worker.run(segments)
            return worker.timing
        except (ActstoreError, OSError) as error:
            _held = None
            if isinstance(error, ActstoreError) or error.errno in (errno.ENOSPC, errno.EDQUOT):
                return error
            raise
        except BaseException:
            _held = None
            raise


def end_run(run_id: str) -> None:
    """Let go of what a worker keeps for a capture, and stop it after the batch it is at."""
    global _held
    _ended_runs.add(run_id)
    if _held is not None and _held[0].run_id == run_id:
        _held = None


def _check_wanted(order: Order) -> None:
    if order.run_id in _ended_runs:
        raise _Ended


def _prepare(order: Order) -> tuple[CoreStore, Worker]:
    """Open the store and load the model it was made from."""
    where = f"the worker on {platform.node()}"
    try:
        store = CoreStore(order.store)
    except StoreNotFound:
        raise StoreNotFound(
            f"{where} does not find the store at {order.store}. Workers read and write the store "
            "themselves: name a folder that all machines see under the same path, or capture with "
            "workers= (--workers) on this machine."
        ) from None
    try:
        model = model_of(store, order.model, order.tokenizer, _device(order))
    except (ModelError, StoreMismatch) as error:
        raise type(error)(
            f"{where} loads the model itself, and did not get the one that was captured so far. "
            f"{error} It must be the same on all machines, under the same name or path."
        ) from error
    worker = Worker(
        store,
        model,
        budget=parse_budget(None) if order.budget is None else order.budget,
        on_nan=order.on_nan,
        on_overflow=order.on_overflow,
        progress=lambda *_: _check_wanted(order),
        compact_every=order.compact_every,
    )
    return store, worker


def _device(order: Order) -> str:
    """Return the worker's own device."""
    import distributed

    if order.one_a_gpu and torch.cuda.is_available():
        return f"cuda:{int(distributed.get_worker().name) % torch.cuda.device_count()}"
    return order.device


# -- in the process that was asked to capture ------------------------------------------------------


class Alone:
    """Captures segments in this process, by the parameters of `Worker`; as `Cluster` is used."""

    under_way = False
    """Whether segments are being captured while `run` does not run."""

    def __init__(self, store: CoreStore, model: LanguageModel, **options: Any) -> None:
        self._make_worker = partial(Worker, store, model, **options)
        self._worker: Worker | None = None
        self.timing = Timing()
        """Seconds of the stages of all runs."""

    def __enter__(self) -> Alone:
        return self

    def __exit__(self, *_: object) -> None:
        # Its bands and lists would add up with what the index takes.
        self._worker = None

    def run(self, segments: Iterable[int]) -> None:
        """Capture the segments that are not committed, and that no other process has."""
        if self._worker is None:
            self._worker = self._make_worker()
            self.timing = self._worker.timing
        self._worker.run(segments)


class Cluster:
    """Captures segments on the workers of a scheduler; nothing is started before the first.

    Parameters
    ----------
    store : CoreStore
        A store with a plan.
    workers : Workers
        Which.
    budget : int
        Peak bytes beyond the loaded models: of all workers here together, or, with a scheduler, of
        each.
    budget_given : bool
        Whether the user named it; if not, workers on other machines take their own.
    on_nan, on_overflow, compact_every
        As in `Worker`.
    progress : callable, optional
        Told the rows committed.

    Raises
    ------
    BudgetExceeded
        If a worker's share of the budget does not hold its bands.
    """

    def __init__(
        self,
        store: CoreStore,
        workers: Workers,
        *,
        budget: int,
        budget_given: bool,
        on_nan: OnFault,
        on_overflow: OnFault,
        progress: Progress | None,
        compact_every: int,
    ) -> None:
        self.timing = Timing()
        self._store = store
        self._workers = workers
        self._progress = progress
        share: int | None = budget if budget_given else None
        if workers.n_local:
            share = budget // workers.n_local
            try:
                spare_bands(store.meta, share)
            except BudgetExceeded as error:
                raise BudgetExceeded(
                    f"{error} It is the share of each of {workers.n_local} workers; fewer workers= "
                    "(--workers) leave more to each."
                ) from None
        self._order = Order(
            uuid.uuid4().hex,
            str(store.path),
            workers.model,
            workers.tokenizer,
            workers.device,
            workers.n_local is not None and workers.device in ("auto", "cuda"),
            share,
            on_nan,
            on_overflow,
            compact_every,
        )
        self._connection = Connection(
            workers, preload="actstore.capturing", n_threads=torch.get_num_threads()
        )
        self._tasks: dict[Any, list[int]] = {}
        self._ended: queue.Queue[Any] = queue.Queue()

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def under_way(self) -> bool:
        """Whether workers have segments that are not done."""
        return bool(self._tasks)

    def run(self, segments: Iterable[int]) -> None:
        """Hand out the segments that are new; return as soon as there are workers without one.

        Called again and again with all that is missing, it keeps the workers at work while the plan
        is still growing.

        Raises
        ------
        NonFiniteActivation, StoreMismatch, StoreNotFound, …
            What stopped a worker, with its own message.
        BudgetExceeded
            If several workers died of the same segments.
        ArgumentError
            If there is no scheduler, or it has no workers.
        """
        client = self._connection.client
        known = {segment for run in self._tasks.values() for segment in run}
        n_workers = max(1, len(client.nthreads()))  # none where all of them died just now
        for run in _runs(sorted(set(segments) - known), n_workers):
            task = client.submit(_task(), asdict(self._order), run, pure=False, retries=_RETRIES)
            self._tasks[task] = run
            task.add_done_callback(self._ended.put)
        while self._tasks:
            with suppress(queue.Empty):
                self._collect(self._ended.get(timeout=_POLL_SECONDS))
                while True:
                    self._collect(self._ended.get_nowait())
            if self._progress:
                self._store.refresh()
                planned = sum(s.rows[""] for s in self._store.planned.values())
                self._progress("capture", self._store.n_rows(), planned)
            if len(self._tasks) < n_workers:
                return

    def _collect(self, task: Any) -> None:
        """Take in a task that ended; raise what it could not do."""
        import distributed

        run = self._tasks.pop(task)
        try:
            outcome = task.result()
        except distributed.KilledWorker as error:
            raise BudgetExceeded(
                f"{error.allowed_failures + 1} workers died, one after the other, while they "
                f"captured segments {run[0]}–{run[-1]} of {self._store.path}. Most often the "
                "machine had no memory left: give fewer workers= (--workers), a smaller budget= "
                "(--budget) or batch_tokens= (--batch-tokens), and run the same capture again; "
                "what is committed stands."
            ) from None
        except distributed.CancelledError:
            raise self._connection.gone("was lost") from None
        if isinstance(outcome, Exception):
            raise outcome
        for field in fields(Timing):
            seconds = getattr(self.timing, field.name) + getattr(outcome, field.name)
            setattr(self.timing, field.name, seconds)

    def close(self) -> None:
        """Stop what is under way, and end the processes that were started here."""
        # Workers that were started here are ended: what is not committed is not there.
        with quiet(), suppress(Exception):
            if self._connection.is_open and self._workers.n_local is None:
                self._connection.client.cancel(list(self._tasks))
                self._connection.client.run(_end(), self._order.run_id, on_error="ignore")
        self._connection.close()


def _runs(segments: Sequence[int], n_workers: int) -> Iterator[list[int]]:
    """Yield tasks: single segments, or short runs of them where there are very many.

    Between the segments of a run the model need not wait for a commit.
    """
    size = min(_MOST_SEGMENTS, max(1, len(segments) // (_TASKS_PER_WORKER * n_workers)))
    for start in range(0, len(segments), size):
        yield list(segments[start : start + size])
