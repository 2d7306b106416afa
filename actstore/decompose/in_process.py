"""Works over ranges in this process: blocks are read ahead, sums are added as one fixed tree."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, Self

import torch

from actstore.decompose.scan import BLOCK_ROWS, Block, Form, Range, Scan

Sums = dict[str, torch.Tensor]
"""What some rows add, by name: float64, float32 or int64."""

_READERS = 2


class Work(Protocol):
    """What one range of rows adds.

    Settings only: it travels to every worker, and several threads may call it at once.
    """

    def __call__(self, blocks: Iterable[Block]) -> Sums:
        """Go through the blocks of a range once; return new tensors under the same names always."""


class Tree:
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


class Here:
    """Steps in this process.  Ranges to come are being read, across the end of a step too."""

    def __init__(
        self,
        scan: Scan,
        steps: Iterable[Sequence[Range]],
        form: Form,
        at_once: int = 1,
        progress: Callable[[int], None] | None = None,
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
        self._opened: deque[tuple[int, int, Iterable[Block]]] = deque()

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
        """Return what the ranges of the next step add up to."""
        tree = Tree()
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
