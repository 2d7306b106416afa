"""The engine: where scans run, in this process or on Dask; the answer is the same.

What is computed of many rows is a sum over *ranges* of them: a `Work` says what one range adds, an
engine has it done for all ranges and adds up.  Ranges follow from the rows, the settings and the
seed, never from the workers, and sums are added as one fixed tree: neighbours first.  So the answer
does not depend on how many workers there are, nor on which of them did what.

In this process ranges come as prefetched blocks, one range after the other, or several at a time,
each in a thread of its own: threads that wait for each other within every product would lose more.
On Dask a task takes some ranges, opens the store itself and reads its own rows.  Of the data only
row ids travel, 8 bytes each; back comes what the ranges add up to.

An algorithm that improves step by step gives its steps ahead (`Engine.steps`), so that the rows of
a step are being read while the one before is worked on.
"""

from __future__ import annotations

import itertools
import platform
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any, Literal, Protocol, Self

import numpy as np
import numpy.typing as npt
import torch

from actstore.decompose.scan import AS_FLOAT32, BLOCK_ROWS, Block, Form, Ids, Range, Scan, Serving
from actstore.errors import ActstoreError, BudgetExceeded, StoreNotFound
from actstore.store import CoreStore, Rows

Sums = dict[str, torch.Tensor]
"""What some rows add, by name: float64, float32 or int64."""

_TASKS_PER_WORKER = 4
_RETRIES = 2
_ATTEMPTS = 3
_WAIT_SECONDS = 60
_FAN_IN = 8  # a power of two, so that every branch is one of the tree
_READERS = 2


class Work(Protocol):
    """What one range of rows adds.

    Settings only: it travels to every worker, and several threads may call it at once.
    """

    def __call__(self, blocks: Iterable[Block]) -> Sums:
        """Go through the blocks of a range once; return new tensors under the same names always."""


class _Tree:
    """Adds sums as they come, in the order of a binary tree: neighbours first."""

    def __init__(self) -> None:
        self._parts: list[tuple[int, Sums]] = []

    def add(self, sums: Sums) -> None:
        """Take the sums of the next range; memory: one more for every doubling of their number."""
        size = 1
        while self._parts and self._parts[-1][0] == size:
            sums = _added(self._parts.pop()[1], sums)
            size *= 2
        self._parts.append((size, sums))

    def total(self) -> Sums:
        """Return the sum of all, which must be of one range at least."""
        sums = self._parts.pop()[1]
        while self._parts:
            sums = _added(self._parts.pop()[1], sums)
        return sums


def _added(first: Sums, second: Sums) -> Sums:
    for name, value in second.items():
        first[name].add_(value)
    return first


class Engine:
    """Runs works over scans.

    Parameters
    ----------
    client : distributed.Client, optional
        Whose workers do it; each must see the store under the same path.  Without one, this
        process does.
    budget_bytes : int, optional
        Memory that each of its workers may take; by default that of the scan.

    See Also
    --------
    dask.array.reduction : the same idea for arrays of chunks; it keeps one partial sum a chunk.
    """

    def __init__(self, client: Any = None, *, budget_bytes: int | None = None) -> None:
        self._client = client
        self._budget_bytes = budget_bytes

    @classmethod
    def local(cls) -> Self:
        """Return an engine that works in this process."""
        return cls()

    @property
    def is_local(self) -> bool:
        """Whether this process does the work."""
        return self._client is None

    def n_at_once(self, here: int) -> int:
        """Return how many ranges are worked on at a time; in this process `here`."""
        return here if self._client is None else max(1, len(self._client.nthreads()))

    def total(
        self,
        scan: Scan,
        work: Work,
        ranges: Sequence[Range],
        *,
        form: Form = AS_FLOAT32,
        at_once: int = 1,
        progress: Callable[[int], None] | None = None,
    ) -> Sums:
        """Return what all ranges add up to.

        Parameters
        ----------
        scan : Scan
            What the ranges are of.
        work : Work
            What a range adds.
        ranges : sequence of Range
            One or more, from `Scan.ordered_ranges` or `Scan.mixed_ranges`.
        form : Form, optional
            How the values of blocks are wanted; float32 as they are by default.
        at_once : int, default 1
            Ranges to work on at a time in this process, if the budget allows; each has its sums.
            With 1 every product has all cores.
        progress : callable, optional
            Called with the rows of every range that is done.

        Raises
        ------
        BudgetExceeded
            If the blocks of one range do not fit the budget, or several workers died of a task.
        NonFiniteActivation
            If a row holds NaN or infinity.
        StoreNotFound
            If a worker does not see the store.
        """
        with self.steps(scan, [ranges], form=form, at_once=at_once, progress=progress) as steps:
            return steps.total(work)

    def steps(
        self,
        scan: Scan,
        steps: Iterable[Sequence[Range]],
        *,
        form: Form = AS_FLOAT32,
        at_once: int = 1,
        progress: Callable[[int], None] | None = None,
    ) -> Steps:
        """Return what runs one step after the other, as `total` would; to be entered."""
        if self._client is None:
            return _Here(scan, steps, form, at_once, progress)
        return _OnDask(self._client, self._budget_bytes, scan, steps, form, progress)


class Steps(Protocol):
    """Steps of a scan, each a total of its own ranges."""

    def total(self, work: Work) -> Sums:
        """Return what the ranges of the next step add up to."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


# -- in this process -----------------------------------------------------------------------------


class _Here:
    """Steps in this process.  Ranges to come are being read, across the end of a step too."""

    def __init__(
        self,
        scan: Scan,
        steps: Iterable[Sequence[Range]],
        form: Form,
        at_once: int,
        progress: Callable[[int], None] | None,
    ) -> None:
        self._scan = scan
        self._form = form
        self._progress = progress
        self._steps = ((number, range_) for number, step in enumerate(steps) for range_ in step)
        self._number = 0
        self._first = next(self._steps, None)
        block_rows = max(map(len, self._first[1])) if self._first else 1
        # One range more than are worked on is being read.
        served = scan.n_served(block_rows, at_once + 1)
        self._at_once = max(1, min(at_once, served - 1))
        self._n_served = max(1, served)
        self._rows = min(scan.rows_at_once(block_rows, self._n_served), max(block_rows, BLOCK_ROWS))
        self._opened: deque[tuple[int, int, Serving]] = deque()

    def __enter__(self) -> Self:
        self._readers = ThreadPoolExecutor(_READERS, "actstore-read")
        threads = max(1, torch.get_num_threads() // self._at_once)
        self._workers = ThreadPoolExecutor(
            self._at_once, "actstore-work", initializer=torch.set_num_threads, initargs=(threads,)
        )
        return self

    def __exit__(self, *_: object) -> None:
        for pool in (self._workers, self._readers):
            pool.shutdown(cancel_futures=True)

    def _open(self) -> None:
        """Begin to read the next range."""
        following = self._first or next(self._steps, None)
        self._first = None
        if following:
            number, blocks = following
            serving = self._scan.serve(blocks, self._rows, self._readers, self._form)
            self._opened.append((number, sum(map(len, blocks)), serving))

    def total(self, work: Work) -> Sums:
        tree = _Tree()
        running: deque[tuple[int, Future[Sums]]] = deque()

        def take() -> None:
            n_rows, future = running.popleft()
            tree.add(future.result())
            if self._progress:
                self._progress(n_rows)

        while True:
            while len(self._opened) + len(running) < self._n_served and self._more():
                self._open()
            if self._opened and self._opened[0][0] == self._number:
                if len(running) == self._at_once:
                    take()
                _, n_rows, serving = self._opened.popleft()
                if self._at_once > 1:
                    running.append((n_rows, self._workers.submit(work, serving)))
                else:  # in this thread, whose products have all cores
                    tree.add(work(serving))
                    if self._progress:
                        self._progress(n_rows)
            elif running:
                take()
            else:
                break
        self._number += 1
        return tree.total()

    def _more(self) -> bool:
        if self._first is None:
            self._first = next(self._steps, None)
        return self._first is not None


# -- on Dask -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Order:
    """What a worker must know to read rows; plain values, which the scheduler unpacks too."""

    store: str
    sites: tuple[str, ...]
    budget_bytes: int
    reserved_bytes: int
    dtype: Literal["float32", "bfloat16"]
    clip: bool


class _OnDask:
    """Steps on the workers of a client: tasks of some ranges each, added as a tree."""

    def __init__(
        self,
        client: Any,
        budget_bytes: int | None,
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
            tuple(str(site) for site in scan.columns),
            budget_bytes or scan.budget_bytes,
            scan.reserved_bytes,
            *form,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def total(self, work: Work) -> Sums:
        ranges = next(self._steps)
        import distributed

        for attempt in itertools.count(1):
            try:
                outcome = self._run(work, ranges)
                break
            except distributed.KilledWorker as error:
                raise BudgetExceeded(
                    f"{error.allowed_failures + 1} workers died, one after the other, over the "
                    f"same rows of {self._order.store}. Most often the machine had no memory left: "
                    "give fewer workers= (--workers) or a smaller budget= (--budget), and run the "
                    "same again; finished steps stand."
                ) from None
            except (distributed.CancelledError, OSError, KeyError):
                # A worker went while it was handed the settings, or was the only one that had them.
                if attempt == _ATTEMPTS:
                    raise
                self._client.wait_for_workers(1, timeout=_WAIT_SECONDS)
        if isinstance(outcome, Exception):
            raise outcome
        sums, n_reads, bytes_read = outcome
        self._scan.ranked.n_reads += n_reads
        self._scan.ranked.bytes_read += bytes_read
        return {name: torch.from_numpy(value) for name, value in sums.items()}

    def _run(self, work: Work, ranges: Sequence[Range]) -> Outcome:
        import distributed

        client = self._client
        n_workers = max(1, len(client.nthreads()))
        # The functions travel by value, the work as data: the scheduler, which unpacks what it
        # passes on but no data, need not import torch.  It goes to one worker, whom the others
        # ask: a broadcast waits forever for a worker that dies meanwhile.
        carried = client.scatter(work, hash=False)
        order = asdict(self._order)
        size = 1
        while -(-len(ranges) // size) > _TASKS_PER_WORKER * n_workers:
            size *= 2
        tasks = []
        rows_of: dict[str, int] = {}
        for start in range(0, len(ranges), size):
            chosen = [
                [self._scan.ranked.row_ids(ranks) for ranks in blocks]
                for blocks in ranges[start : start + size]
            ]
            task = client.submit(_task(), order, chosen, carried, pure=False, retries=_RETRIES)
            rows_of[task.key] = sum(len(ids) for blocks in chosen for ids in blocks)
            tasks.append(task)
        added = list(tasks)
        while len(added) > _FAN_IN:
            groups = [added[i : i + _FAN_IN] for i in range(0, len(added), _FAN_IN)]
            added = [client.submit(_adder(), group, pure=False) for group in groups]
        try:
            if self._progress:
                for done in distributed.as_completed(tasks):
                    if done.status == "finished":
                        self._progress(rows_of[done.key])
            outcomes = client.gather(added)
        finally:
            for task in (*tasks, *added):
                task.release()
        return add_outcomes(outcomes)


Outcome = tuple[dict[str, npt.NDArray[Any]], int, int] | Exception
"""Sums as arrays, reads and bytes read; or what no retry can mend."""


def _task() -> Callable[..., Outcome]:
    """Return the task of a worker as a function that travels by value."""

    def work_on(order: dict[str, Any], ranges: list[list[Ids]], work: Any) -> Any:
        from actstore.decompose import engine

        return engine.run_task(engine.Order(**order), ranges, work)

    return work_on


def _adder() -> Callable[[list[Outcome]], Outcome]:
    """Return what adds outcomes in a worker as a function that travels by value."""

    def add(outcomes: list[Any]) -> Any:
        from actstore.decompose import engine

        return engine.add_outcomes(outcomes)

    return add


def add_outcomes(outcomes: Sequence[Outcome]) -> Outcome:
    """Add what tasks gave, in order; the first that failed stands for all."""
    tree = _Tree()
    n_reads = bytes_read = 0
    for outcome in outcomes:
        if isinstance(outcome, Exception):
            return outcome
        # A task's value may be asked for again, and is not to be added to in place.
        tree.add({name: torch.tensor(value) for name, value in outcome[0].items()})
        n_reads += outcome[1]
        bytes_read += outcome[2]
    return _outcome(tree.total(), n_reads, bytes_read)


def _outcome(sums: Sums, n_reads: int, bytes_read: int) -> Outcome:
    return {name: value.numpy() for name, value in sums.items()}, n_reads, bytes_read


_stores: dict[str, CoreStore] = {}
_opening = threading.Lock()


def _store_at(path: str) -> CoreStore:
    """Return a worker's view of a store, kept from task to task."""
    with _opening:
        if path not in _stores:
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
    try:
        store = _store_at(order.store)
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
        sums = Engine.local().total(scan, work, own, form=Form(order.dtype, order.clip))
        return _outcome(sums, scan.ranked.n_reads, scan.ranked.bytes_read)
    except ActstoreError as error:
        return error
