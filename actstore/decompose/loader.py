"""Rows for training: batches of activations, mixed across documents, row by row.

Neighbouring rows are alike, and a trainer wants rows that are not; a disk wants to be read in runs.
So rows are dealt twice.  A seeded permutation deals *runs* of neighbours from all over the store to
*buffers* as large as the budget allows; a buffer's rows are then permuted *one by one* and dealt to
batches.  Two rows of a batch are of one document hardly more often than chance has it.

Everything is arithmetic: which rows the batch with a given number holds follows from the seed, the
number and the shape of the deal alone (`Deal`), so a worker goes straight to its own batches, and a
training that was stopped goes on at batch n without the n before it.  Batches are numbered through
all epochs.  Worker ``w`` of ``W`` gives the numbers ``w``, ``w + W``, ``w + 2 W`` and so on, which
is the order in which a `torch.utils.data.DataLoader` asks its workers.  So that no worker reads
rows for another, its batches of an epoch form a *lane*: a part of the deal of its own.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import IterableDataset, get_worker_info

from actstore.decompose.ranked import RankedRows, as_tensor
from actstore.decompose.scan import chosen_rows
from actstore.errors import ArgumentError, BudgetExceeded, StoreMismatch
from actstore.site import Site, summarize
from actstore.store import CoreStore, Rows, SiteInfo
from actstore.store.budget import parse_budget

Ids = npt.NDArray[np.int64]

BUDGET = 2**30
"""Memory of a loader where no budget is given; fixed, since the order of rows depends on it."""

_RUNS = 128  # runs that a buffer should hold at least
_RUN_ROWS = (16, 256)  # least and most rows of a run
_ONE_THREAD = 1 << 15  # values that torch does not share among threads
_OVERHEAD_BYTES = 16 * 2**20  # a chunk being verified, the interpreter's own
_NUMBERS_BYTES = (
    64  # of a row in a buffer: rank, order, place, row_id, and some while they are made
)


class Batch(NamedTuple):
    """Rows to train on; the tensors are the caller's."""

    values: torch.Tensor | dict[str, torch.Tensor]
    """``(rows, width)``: a tensor where one site was named, else one for each site by name."""
    row_ids: torch.Tensor
    """Int64 ``(rows,)``: the row_id of each row."""


@dataclass(frozen=True)
class Hand:
    """The batches of a buffer that are still to be dealt."""

    ranks: Ids
    """The ranks of their rows, in the order in which they come."""
    n_batches: int
    """How many batches they make; only the last may be short."""


@dataclass(frozen=True)
class Deal:
    """Which rows every batch of a worker holds: arithmetic, no reading."""

    n_rows: int
    """Rows of an epoch, over all ranks."""
    batch_rows: int
    """Rows of a batch."""
    buffer_batches: int
    """Batches that a buffer holds at most."""
    seed: int
    """Decides the order."""
    rank: int
    """Which of `world_size` parts of the rows is dealt."""
    world_size: int
    """Parts of the rows."""
    n_workers: int
    """Workers that deal the part together."""
    drop_last: bool
    """Whether rows that fill no batch are left out, and every rank has as many batches."""

    @property
    def _span(self) -> tuple[int, int]:
        """The places of the rank's rows among all that are dealt."""
        low, high = (self.n_rows * r // self.world_size for r in (self.rank, self.rank + 1))
        return low, high

    @property
    def n_batches(self) -> int:
        """Batches of the rank in an epoch."""
        if self.drop_last:
            return self.n_rows // self.world_size // self.batch_rows
        low, high = self._span
        return -(-(high - low) // self.batch_rows)

    @cached_property
    def run_rows(self) -> int:
        """Rows of a run: as many as make a buffer of enough runs."""
        lane_rows = self.n_rows // (self.world_size * self.n_workers)
        rows = min(self.buffer_batches * self.batch_rows, lane_rows) // _RUNS
        return min(max(rows, _RUN_ROWS[0]), _RUN_ROWS[1])

    def hand(self, number: int) -> Hand:
        """Return the buffer that holds a batch, from that batch on."""
        epoch, batch = divmod(number, self.n_batches)
        batch, lane = divmod(batch, self.n_workers)
        whole, rest = divmod(self.n_batches, self.n_workers)
        n_mine = whole + (lane < rest)
        # Buffers of about the same size: a small one would mix less.
        n_buffers = -(-n_mine // self.buffer_batches)
        edges = np.arange(n_buffers + 1) * n_mine // n_buffers
        buffer = int(np.searchsorted(edges, batch, side="right")) - 1
        first, last = int(edges[buffer]), int(edges[buffer + 1])

        low, high = self._span
        lane_start = lane * whole + min(lane, rest)
        start, stop = (low + (lane_start + b) * self.batch_rows for b in (first, last))
        # The short batch is the last of the epoch, and so of its lane, but not of all lanes.
        missing = max(0, self.n_batches * self.batch_rows - (high - low))
        short_lane = (self.n_batches - 1) % self.n_workers
        start -= missing * (lane > short_lane)
        stop -= missing * (lane > short_lane or (lane == short_lane and last == n_mine))

        rng = np.random.default_rng([self.seed, epoch, self.rank, lane, buffer])
        order = rng.permutation(stop - start)[(batch - first) * self.batch_rows :]
        return Hand(self._dealt(epoch, start, stop)[order], last - batch)

    def _dealt(self, epoch: int, start: int, stop: int) -> Ids:
        """Return the ranks at some places of an epoch's deal of runs."""
        runs, turn = _runs(self.seed, epoch, self.n_rows, self.run_rows)
        # Rows that make no whole run come after all runs; the turn puts them anywhere.
        places = (np.arange(start, stop) + turn) % self.n_rows
        ranks: Ids = runs[places // self.run_rows] * self.run_rows + places % self.run_rows
        return ranks


@lru_cache(maxsize=2)  # one being dealt, one being read ahead
def _runs(seed: int, epoch: int, n_rows: int, run_rows: int) -> tuple[Ids, int]:
    """Return the order of an epoch's runs, the incomplete one last, and where the deal begins."""
    rng = np.random.default_rng([seed, epoch])
    n_whole = n_rows // run_rows
    return np.append(rng.permutation(n_whole), n_whole), int(rng.integers(n_rows))


class Loader(IterableDataset[Batch]):
    """Serves rows of sites in mixed batches, for `torch.utils.data.DataLoader` or by itself.

    Every row comes once an epoch, in another order each epoch, the same for the same seed, budget
    and number of ranks and workers.  Iterating again gives the same again; ask for more epochs, not
    more iterations.  Cost: one read of the sites an epoch; in the first, whole chunks are read
    once more to verify them.

    Parameters
    ----------
    store : CoreStore
        The store; the segments committed now are used.
    sites : str, Site, iterable of these, or None
        Sites of one space, as names or patterns; None means all.  One name that stands for one
        site makes the values of a batch a tensor, else they are a dict by site.
    batch_rows : int, default 4096
        Rows of a batch.
    rows : Rows or str, default "content"
        The rows to serve: ``"content"``, ``"all"``, or a set of rows.
    seed : int, default 0
        Decides the order.
    epochs : int or None, default 1
        Passes over the rows; None means no end.
    dtype : torch.dtype or str, optional
        Of the values; by default as each site is stored.
    drop_last : bool, default False
        Leave out, in each epoch, rows that do not fill a batch; every rank then has as many
        batches, and else some may have one more.
    rank, world_size : int, optional
        Serve only part `rank` of `world_size` disjoint parts of the rows; by default what
        `torch.distributed` says, where it is initialised when the loader is made, else all.  All
        ranks need the same arguments and as many workers.
    budget : int or str, optional
        Memory of the loader, shared by the workers of a DataLoader, but not of the batches that
        wait there; by default 1 GiB.  The larger, the better rows are mixed.

    Raises
    ------
    ArgumentError
        If an argument cannot be used, or `rows` chooses none.
    SiteNotFound
        If the store does not have a site.
    BudgetExceeded
        If two buffers of one batch do not fit the budget.
    NonFiniteActivation
        While iterating, if a row holds NaN.

    See Also
    --------
    actstore.decompose.shuffle : the same rows, permuted on disk.
    torch.utils.data.DataLoader : give it ``batch_size=None``, since batches are made here.
    """

    def __init__(
        self,
        store: CoreStore,
        sites: str | Site | Iterable[str | Site] | None,
        batch_rows: int = 4096,
        *,
        rows: Rows | str = "content",
        seed: int = 0,
        epochs: int | None = 1,
        dtype: torch.dtype | str | None = None,
        drop_last: bool = False,
        rank: int | None = None,
        world_size: int | None = None,
        budget: int | str | None = None,
    ) -> None:
        self._store: CoreStore | None = store  # also keeps a temporary store alive
        self._path: Path = store.path
        self._infos: list[SiteInfo] = store.select(sites)
        self._single = isinstance(sites, (str, Site)) and len(self._infos) == 1
        self._rows = chosen_rows(store, rows, self._infos)
        self._epochs = epochs
        self._dtype = _as_dtype(dtype)
        self._batch_rows = batch_rows
        self._seed = seed
        self._drop_last = drop_last
        self._rank, self._world_size = _part(rank, world_size)
        self._budget_bytes = BUDGET if budget is None else parse_budget(budget)
        self._n_rows = RankedRows(store, self._infos, self._rows).n_rows
        self._given = 0  # batches given so far, by all workers that deal with this one
        self._workers = 1
        self._resumed = False
        deal = self._deal(1)
        if not deal.n_batches:
            raise ArgumentError(
                f"batch_rows = {batch_rows:,} is too large: the {self._n_rows:,} rows "
                f"({self._rows.rule}) of {store.path} fill no batch of rank {self._rank} of "
                f"{self._world_size}. Pass smaller batches, or drop_last=False."
            )
        self.buffer_rows = min(deal.buffer_batches * batch_rows, self._n_rows)
        """Rows that are mixed with each other, where no workers share the budget."""

    def __len__(self) -> int:
        """Return the number of batches of this rank over all epochs."""
        if self._epochs is None:
            raise TypeError("a loader with epochs=None has no length")
        return self._epochs * self._deal(1).n_batches

    def __getstate__(self) -> dict[str, Any]:
        # A worker opens the store anew: file descriptors and locks belong to one process.
        return {**self.__dict__, "_store": None}

    # -- going on ------------------------------------------------------------------------------

    def state_dict(self, batches: int | None = None, workers: int | None = None) -> dict[str, Any]:
        """Return where the loader is, for `load_state_dict` of a loader made in the same way.

        Parameters
        ----------
        batches, workers : int, optional
            Where a DataLoader with workers iterates, of which the loader in this process knows
            nothing: the number of batches taken in all, and of workers.
        """
        return {
            **self._identity(),
            "batches": self._given if batches is None else batches,
            "workers": self._workers if workers is None else max(1, workers),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on behind the batches a state counts, on the next iteration; none is read again.

        Raises
        ------
        StoreMismatch
            If the state is of a loader that deals other rows, or in another order.
        """
        for name, mine in self._identity().items():
            if state.get(name) != mine:
                raise StoreMismatch(
                    f"{name} = {mine!r} in this loader of {self._path}, and {state.get(name)!r} in "
                    "the state that was given; expected the same. Make the loader with the same "
                    "arguments over the same committed segments."
                )
        self._given, self._workers = int(state["batches"]), int(state["workers"])
        self._resumed = True

    def _identity(self) -> dict[str, Any]:
        """Return what the order of the batches follows from, but for the number of workers."""
        return {
            "sites": [str(info.site) for info in self._infos],
            "rows": self._rows.rule,
            "n_rows": self._n_rows,
            "batch_rows": self._batch_rows,
            "seed": self._seed,
            "drop_last": self._drop_last,
            "world_size": self._world_size,
            "budget": self._budget_bytes,
        }

    # -- iterating -----------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        worker, n_workers = (info.id, info.num_workers) if info else (0, 1)
        if self._resumed and self._workers != n_workers:
            raise ArgumentError(
                f"workers = {self._workers} in the state that was loaded, and {n_workers} iterate; "
                "the order depends on it. Use a DataLoader with as many, or pass "
                "state_dict(batches=..., workers=...) what it had."
            )
        self._given = self._given if self._resumed else 0
        self._workers, self._resumed = n_workers, False
        # A worker that was forked has the store of its parent, whose locks may be held for ever.
        store = CoreStore(self._path) if info or self._store is None else self._store
        return self._serve(store, self._deal(n_workers), self._given + worker)

    def _serve(self, store: CoreStore, deal: Deal, number: int) -> Iterator[Batch]:
        """Yield the batches of a worker from a number on, reading one buffer ahead."""
        ranked = RankedRows(store, self._infos, self._rows)
        n_rows = min(deal.batch_rows, self._n_rows)
        # Two buffers, and the batch of the one before that is in the caller's hands.
        n_batches = 2 * deal.buffer_batches + 1
        stored = [_Memory(n_rows * info.row_bytes, n_batches) for info in self._infos]
        # One in the caller's hands, and the next.
        item_bytes = self._dtype.itemsize if self._dtype else 0
        converted = [_Memory(n_rows * info.width * item_bytes, 2) for info in self._infos]
        hands = self._hands(deal, number)
        with ThreadPoolExecutor(2, "actstore-loader") as threads:

            def read() -> _Reading | None:
                hand = next(hands, None)
                if hand is None:
                    return None
                sizes = np.diff([*range(0, len(hand.ranks), deal.batch_rows), len(hand.ranks)])
                sites = [
                    deque(
                        memory.empty(int(n) * info.row_bytes)
                        .view(store.layout(info).numpy_dtype)
                        .reshape(-1, info.width)
                        for n in sizes
                    )
                    for info, memory in zip(self._infos, stored, strict=True)
                ]
                out = [list(arrays) for arrays in sites]  # of its own: batches leave the deque
                return _Reading(sites, threads.submit(ranked.read, hand.ranks, out, threads))

            reading = read()
            while reading:
                sites, row_ids = reading.sites, reading.row_ids.result()
                reading = read()
                for first in range(0, len(row_ids), deal.batch_rows):
                    self._given += deal.n_workers
                    # Held by nobody here, so that its memory is free once the caller drops it.
                    yield self._batch(
                        [arrays.popleft() for arrays in sites],
                        row_ids[first : first + deal.batch_rows],
                        converted,
                    )

    def _hands(self, deal: Deal, number: int) -> Iterator[Hand]:
        while self._epochs is None or number < self._epochs * deal.n_batches:
            hand = deal.hand(number)
            number += hand.n_batches * deal.n_workers
            yield hand

    def _batch(
        self, arrays: list[npt.NDArray[Any]], row_ids: Ids, memories: list[_Memory]
    ) -> Batch:
        values = {}
        for info, array, memory in zip(self._infos, arrays, memories, strict=True):
            rows = as_tensor(array)
            if self._dtype not in (None, rows.dtype):
                out = torch.from_numpy(memory.empty(array.size * self._dtype.itemsize))
                stored, rows = rows, out.view(self._dtype).view(rows.shape)
                # So few at once that torch does it in this thread: beside reads its threads wait
                # for each other more than they help.
                n_rows = max(1, _ONE_THREAD // info.width)
                for start in range(0, len(rows), n_rows):
                    rows[start : start + n_rows] = stored[start : start + n_rows]
            values[str(info.site)] = rows
        first = next(iter(values.values()))
        return Batch(first if self._single else values, torch.from_numpy(row_ids.copy()))

    def _deal(self, n_workers: int) -> Deal:
        """Return the deal that so many workers share.

        Raises
        ------
        BudgetExceeded
            If buffers of one batch do not fit.
        """
        row_bytes = sum(info.row_bytes for info in self._infos)
        given = 0 if self._dtype is None else self._dtype.itemsize
        width = sum(info.width for info in self._infos)
        # A batch in the caller's hands and one being made, stored and converted.
        fixed = _OVERHEAD_BYTES + 2 * self._batch_rows * (row_bytes + given * width)
        two_buffers = 2 * self._batch_rows * (row_bytes + _NUMBERS_BYTES)
        n_batches = (self._budget_bytes // n_workers - fixed) // two_buffers
        if n_batches < 1:
            needed = n_workers * (fixed + two_buffers)
            raise BudgetExceeded(
                f"batches of {self._batch_rows:,} rows of "
                f"{summarize(info.site for info in self._infos)} ({width:,} neurons) need at least "
                f"{needed:,} bytes in {n_workers} workers, and the budget is "
                f"{self._budget_bytes:,}. Pass budget={needed} or more, or a smaller batch_rows."
            )
        return Deal(
            self._n_rows,
            self._batch_rows,
            n_batches,
            self._seed,
            self._rank,
            self._world_size,
            n_workers,
            self._drop_last,
        )


class _Reading(NamedTuple):
    """A buffer that is being read."""

    sites: list[deque[npt.NDArray[Any]]]
    """The values of its batches at each site; those given are no longer there."""
    row_ids: Future[Ids]
    """The row_id of each row."""


class _Memory:
    """Memory of batches, used again when nobody holds an array or tensor on it any more.

    Fresh memory costs as much as what is written to it, and a batch is too large for the allocator
    to keep.

    Parameters
    ----------
    piece_bytes : int
        Bytes of the largest batch.
    n_pieces : int
        Batches at once; more are made where the caller holds more, and forgotten.
    """

    def __init__(self, piece_bytes: int, n_pieces: int) -> None:
        self._piece_bytes = piece_bytes
        self._pieces: deque[npt.NDArray[np.uint8]] = deque(maxlen=n_pieces)

    def empty(self, n_bytes: int) -> npt.NDArray[np.uint8]:
        """Return memory that holds anything."""
        for i in range(len(self._pieces)):
            # Held by the deque and, while it is asked, by the question alone.
            if sys.getrefcount(self._pieces[i]) <= 2:
                return self._pieces[i][:n_bytes]
        piece = np.empty(self._piece_bytes, np.uint8)
        self._pieces.append(piece)
        return piece[:n_bytes]


def _as_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise ArgumentError(
            f"dtype = {dtype!r} is no floating-point dtype of torch; expected 'float32', "
            "'bfloat16', 'float16', or None for values as they are stored."
        )
    return found


def _part(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """Return which part of the rows to serve, and of how many."""
    if (rank is None) != (world_size is None):
        raise ArgumentError(
            f"rank = {rank} and world_size = {world_size} were given; expected both or neither."
        )
    if rank is None or world_size is None:
        distributed = torch.distributed
        if not (distributed.is_available() and distributed.is_initialized()):
            return 0, 1
        return distributed.get_rank(), distributed.get_world_size()
    if not 0 <= rank < world_size:
        raise ArgumentError(
            f"rank = {rank} was given; expected 0 … {world_size - 1} for world_size = {world_size}."
        )
    return rank, world_size
