"""Works over ranges on Dask: tasks that read their own rows, and tasks that add what they gave.

Everything travels as bytes that nobody unpacks but the tasks themselves: no process has to import
torch on the way, least of all in the thread that keeps it in touch with the others.  And everything
can be made again from what the scheduler has, so that a worker that dies takes nothing along.
"""

from __future__ import annotations

import platform
import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
import torch

from actstore.decompose.in_process import Here, Sums, Tree, Work
from actstore.decompose.scan import Form, Ids, Range, Scan
from actstore.errors import ActstoreError, ArgumentError, BudgetExceeded, StoreNotFound
from actstore.store import CoreStore, Rows

MOST_RANGES = 32
"""Ranges of a total whose sums take much of the budget."""

SUMS_OF_WORKER = 6
"""Sums a worker holds at a time where there is no room for more than is reserved: a task with all
32 ranges those of 16, 8, 4, 2 and 1 of them and of the next; one that adds two, these, what they
are unpacked to, and what their sum is packed to; and what it did before."""

_TASKS_PER_WORKER = 4
_RETRIES = 2
_POLL_SECONDS = 1
_WAIT_SECONDS = 120
_SMALL_BYTES = 4 * 2**20
_FAN_IN = 8  # a power of two, so that every branch is one of the tree


@dataclass(frozen=True)
class Order:
    """What a worker must know to read rows; plain values, which the scheduler unpacks too."""

    store: str
    store_id: str
    sites: tuple[str, ...]
    budget_bytes: int
    reserved_bytes: int
    dtype: Literal["float32", "bfloat16"]
    clip: bool


class OnDask:
    """Steps on the workers of a client: tasks of some ranges each, added as a tree."""

    def __init__(
        self,
        client: Any,
        scan: Scan,
        steps: Iterable[Sequence[Range]],
        form: Form,
        progress: Callable[[int], None] | None,
    ) -> None:
        self._client = client
        self._scan = scan
        self._steps = iter(steps)
        self._progress = progress
        self._order = Order(
            str(scan.store.path),
            scan.store.meta.store_id,
            tuple(str(site) for site in scan.columns),
            scan.budget_bytes,
            scan.reserved_bytes,
            *form,
        )
        self._n_workers = max(1, len(client.nthreads()))
        self._thread = ThreadPoolExecutor(1, "actstore-gather")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        # On an error it may be waiting for workers that do not answer any more.
        self._thread.shutdown(wait=kind is None, cancel_futures=True)

    def total(self, work: Work) -> Sums:
        """Return what the ranges of the next step add up to."""
        ranges = next(self._steps)
        import distributed

        try:
            outcome = add_outcomes(map(_unpacked, self._run(work, ranges)))
        except distributed.KilledWorker as error:
            raise BudgetExceeded(
                f"{error.allowed_failures + 1} workers died, one after the other, over the "
                f"same rows of {self._order.store}. Most often the machine had no memory left: "
                "give fewer workers= (--workers) or a smaller budget= (--budget), and run the "
                "same again; finished steps stand."
            ) from None
        except distributed.CancelledError as error:
            raise self._gone(f"lost what they were at ({error})") from None
        if isinstance(outcome, Exception):
            raise outcome
        sums, n_reads, bytes_read = outcome
        self._scan.ranked.n_reads += n_reads
        self._scan.ranked.bytes_read += bytes_read
        return {name: torch.from_numpy(value) for name, value in sums.items()}

    def _run(self, work: Work, ranges: Sequence[Range]) -> list[bytes]:
        client = self._client
        order = asdict(self._order)
        # What was reserved holds sums: so many times as many are at one place as the budget takes.
        spare = max(1, self._order.budget_bytes // max(1, self._order.reserved_bytes))
        n_tasks = min(_TASKS_PER_WORKER, spare) * self._n_workers
        fan_in = max(2, min(_FAN_IN, 1 << (spare.bit_length() - 1)))
        size = 1
        while -(-len(ranges) // size) > n_tasks:
            size *= 2
        starts = range(0, len(ranges), size)
        rows_of: dict[Any, int] = {}
        futures: list[Any] = []
        try:
            # A task that has nothing but its own bytes needs no other worker.  Where these are
            # many they are a task too, which unlike scattered data can be done again.
            carried: Any = _packed(work)
            if len(carried) * len(starts) > _SMALL_BYTES:
                carried = _submit(client, _carrier(), carried)
                futures.append(carried)
            for start in starts:
                chosen = [
                    [self._scan.ranked.row_ids(ranks) for ranks in blocks]
                    for blocks in ranges[start : start + size]
                ]
                task = _submit(client, _task(), order, _packed(chosen), carried)
                rows_of[task] = sum(len(ids) for blocks in chosen for ids in blocks)
            futures += rows_of
            added = list(rows_of)
            while len(added) > min(_FAN_IN, spare):
                groups = [added[i : i + fan_in] for i in range(0, len(added), fan_in)]
                added = [_submit(client, _adder(), group) for group in groups]
                futures += added
            return self._gathered(added, rows_of)
        except BaseException:
            with suppress(Exception):
                client.cancel(futures)
            raise
        finally:
            for future in futures:
                future.release()

    def _gathered(self, wanted: list[Any], rows_of: dict[Any, int]) -> list[bytes]:
        """Return the results of tasks; tell the progress of others."""
        ended: queue.SimpleQueue[Any] = queue.SimpleQueue()
        left = dict(rows_of)
        if self._progress:
            for task in rows_of:
                task.add_done_callback(ended.put)
        # In a thread: it waits for as long as it takes, and nobody would see that no worker is left
        # to take it.
        gathering = self._thread.submit(self._client.gather, wanted)
        gathering.add_done_callback(ended.put)
        alive = time.monotonic()
        while not gathering.done():
            try:
                task = ended.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                if self._client.nthreads():
                    alive = time.monotonic()
                elif time.monotonic() - alive > _WAIT_SECONDS:
                    raise self._gone(f"are gone, for {_WAIT_SECONDS} seconds") from None
                continue
            if task in left and task.status == "finished":
                self._tell(left.pop(task))
        results: list[bytes] = gathering.result()
        self._tell(sum(left.values()))
        return results

    def _tell(self, n_rows: int) -> None:
        if self._progress and n_rows:
            self._progress(n_rows)

    def _gone(self, what: str) -> ArgumentError:
        return ArgumentError(
            f"the workers of {self._client.scheduler.address} {what}; expected one at least. What "
            "is finished stands: start some and run the same again, or here, without client=, "
            "workers= and scheduler= (--workers, --scheduler)."
        )


def _submit(client: Any, function: Callable[..., Any], *arguments: Any) -> Any:
    """Return the future of a task whose own bytes may be many."""
    import dask

    # Dask would have large ones scattered, and lose them with a worker.
    with dask.config.set({"distributed.admin.large-graph-warning-threshold": "1TiB"}):
        return client.submit(function, *arguments, pure=False, retries=_RETRIES)


def _packed(value: Any) -> bytes:
    """Return anything as bytes, a work that the user's own script defines too."""
    from distributed.protocol import pickle

    packed: bytes = pickle.dumps(value)
    return packed


def _unpacked(value: bytes) -> Any:
    from distributed.protocol import pickle

    return pickle.loads(value)


Outcome = tuple[dict[str, npt.NDArray[Any]], int, int] | Exception
"""Sums as arrays, reads and bytes read; or what no retry can mend."""


# These functions travel by value: one that travels by name would be looked up on its way, and have
# the scheduler import torch.


def _task() -> Callable[..., bytes]:
    """Return the task of a worker."""

    def work_on(order: dict[str, Any], ranges: bytes, work: bytes) -> bytes:
        from actstore.decompose import on_dask

        return on_dask.run_packed(on_dask.Order(**order), ranges, work)

    return work_on


def _carrier() -> Callable[[bytes], bytes]:
    """Return what holds bytes in a worker, for others to fetch."""

    def carry(work: bytes) -> bytes:
        return work

    return carry


def _adder() -> Callable[[list[bytes]], bytes]:
    """Return what adds outcomes in a worker."""

    def add(outcomes: list[bytes]) -> bytes:
        from actstore.decompose import on_dask

        return on_dask.add_packed(outcomes)

    return add


def run_packed(order: Order, ranges: bytes, work: bytes) -> bytes:
    """Do what `run_task` does, with what travels."""
    return _packed(run_task(order, _unpacked(ranges), _unpacked(work)))


def add_packed(outcomes: Sequence[bytes]) -> bytes:
    """Do what `add_outcomes` does, with what travels."""
    return _packed(add_outcomes(map(_unpacked, outcomes)))


def add_outcomes(outcomes: Iterable[Outcome]) -> Outcome:
    """Add what tasks gave, in order; the first that failed stands for all."""
    tree = Tree()
    n_reads = bytes_read = 0
    for outcome in outcomes:
        if isinstance(outcome, Exception):
            return outcome
        tree.add({name: torch.from_numpy(value) for name, value in outcome[0].items()})
        n_reads += outcome[1]
        bytes_read += outcome[2]
    return _outcome(tree.total(), n_reads, bytes_read)


def _outcome(sums: Sums, n_reads: int, bytes_read: int) -> Outcome:
    return {name: value.numpy() for name, value in sums.items()}, n_reads, bytes_read


_stores: dict[str, CoreStore] = {}
_opening = threading.Lock()
_working = threading.Lock()  # a worker of several threads has one budget, and they share products


def _store_at(path: str, store_id: str) -> CoreStore:
    """Return a worker's view of a store, kept from task to task: the last one."""
    with _opening:
        # Another store may have been made where one was.
        if path not in _stores or _stores[path].meta.store_id != store_id:
            _stores.clear()
            try:
                _stores[path] = CoreStore(path)
            except StoreNotFound:
                raise StoreNotFound(
                    f"the worker on {platform.node()} does not find the store at {path}. Workers "
                    "read the store themselves: name a folder that all machines see under the "
                    "same path, or leave out client= and scheduler= (--scheduler)."
                ) from None
        return _stores[path]


def run_task(order: Order, ranges: list[list[Ids]], work: Work) -> Outcome:
    """Work on some ranges in a worker; return what they add, or what no retry can mend."""
    import distributed

    with suppress(ValueError):  # no worker: a test calls it by itself
        torch.set_num_threads(distributed.get_worker().state.nthreads)
    with _working:
        return _run_task(order, ranges, work)


def _run_task(order: Order, ranges: list[list[Ids]], work: Work) -> Outcome:
    try:
        store = _store_at(order.store, order.store_id)
        ids = np.sort(np.concatenate([block for blocks in ranges for block in blocks]))
        rows = Rows.from_row_ids("of a task", store.meta.segment_rows, ids)
        if not set(store.committed).issuperset(rows.segments):
            store.refresh()
        scan = Scan(
            store,
            store.select(order.sites),
            rows,
            budget_bytes=order.budget_bytes,
            reserved_bytes=order.reserved_bytes,
        )
        own = [[np.searchsorted(ids, block) for block in blocks] for blocks in ranges]
        with Here(scan, [own], Form(order.dtype, order.clip)) as steps:
            sums = steps.total(work)
        return _outcome(sums, scan.ranked.n_reads, scan.ranked.bytes_read)
    except ActstoreError as error:
        return error
