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

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Protocol, Self

import torch

from actstore.decompose.in_process import Here, Sums, Work
from actstore.decompose.on_dask import SUMS_OF_WORKER, OnDask
from actstore.decompose.scan import AS_FLOAT32, Form, Range, Scan
from actstore.errors import ArgumentError, BudgetExceeded
from actstore.workers import Connection, Where

__all__ = ["Engine", "Steps", "Sums", "Work"]


class Engine:
    """Runs works over scans.

    Parameters
    ----------
    client : distributed.Client, optional
        Whose workers do it; each must see the store under the same path, and may take the budget of
        the scan.  Without one, this process does.
    connection : Connection, optional
        What connects to the workers when there is something to do, instead.
    n_shares : int, default 1
        How many processes of this machine share a budget.

    See Also
    --------
    dask.array.reduction : the same idea for arrays of chunks; it keeps one partial sum a chunk.
    """

    def __init__(
        self, client: Any = None, *, connection: Connection | None = None, n_shares: int = 1
    ) -> None:
        self._given = client
        self._connection = connection
        self._n_shares = n_shares

    @classmethod
    def local(cls) -> Self:
        """Return an engine that works in this process."""
        return cls()

    @classmethod
    @contextmanager
    def on(
        cls, client: Any = None, workers: int | None = None, scheduler: str | None = None
    ) -> Iterator[Self]:
        """Yield an engine on the workers that arguments ask for; by default in this process.

        Parameters
        ----------
        client : distributed.Client, optional
            As above.
        workers : int, optional
            So many processes of this machine, that end with it and share the budget with this one.
        scheduler : str, optional
            Address of a running Dask scheduler; the budget is that of each of its workers.

        Raises
        ------
        ArgumentError
            If they contradict each other.
        BudgetExceeded
            What was raised within, with what a share of it is.
        """
        where = Where.asked(workers, scheduler)
        if client is not None and (workers is not None or scheduler is not None):
            raise ArgumentError(
                f"client and {'scheduler' if workers is None else 'workers'} were given; a client "
                "has workers of its own. Give one of the two."
            )
        if where is None:
            yield cls(client)
            return
        n_threads = torch.get_num_threads()
        # This process keeps what the workers add up, and so has a share like any of them.
        n_shares = 1 + (where.n_local or 0)
        with Connection(where, preload="actstore.decompose", n_threads=n_threads) as connection:
            try:
                yield cls(connection=connection, n_shares=n_shares)
            except BudgetExceeded as error:
                if where.n_local is None:
                    raise
                raise BudgetExceeded(
                    f"{error} The budget is shared: that is the part of one of {n_shares} "
                    f"processes, this one and {where.n_local} workers. Fewer workers= (--workers) "
                    "leave more to each."
                ) from None

    def share_of(self, budget_bytes: int) -> int:
        """Return what of a budget a process may take, this one or a worker."""
        return budget_bytes // self._n_shares

    @property
    def _client(self) -> Any:
        return self._given if self._connection is None else self._connection.client

    @property
    def is_local(self) -> bool:
        """Whether this process does the work."""
        return self._given is None and self._connection is None

    @property
    def n_sums(self) -> int:
        """How many sums a process holds at a time of `MOST_RANGES` ranges; here, of one range."""
        return 1 if self.is_local else SUMS_OF_WORKER

    def n_at_once(self, here: int) -> int:
        """Return how many ranges are worked on at a time; in this process `here`."""
        return here if self.is_local else max(1, len(self._client.nthreads()))

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
        if self.is_local:
            return Here(scan, steps, form, at_once, progress)
        return OnDask(self._client, scan, steps, form, progress)


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
