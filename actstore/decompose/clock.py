"""Times the stages of a computation, and reports how far each of them is."""

from __future__ import annotations

import time
from typing import TypeVar

from actstore.store.budget import Progress

_T = TypeVar("_T")


class Clock:
    """Times the stages and reports their progress."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress
        self._stage = ""
        self._began = 0.0
        self._done = self._all = 0
        self.seconds: dict[str, float] = {}
        """Of each stage."""

    def start(self, stage: str, n_all: int = 0) -> None:
        """Begin a stage of so many rows or fits; the one before ends."""
        self.stop()
        self._stage, self._began = stage, time.perf_counter()
        self._done, self._all = 0, n_all

    def stop(self) -> None:
        """End the stage."""
        if self._stage:
            spent = time.perf_counter() - self._began
            self.seconds[self._stage] = round(self.seconds.get(self._stage, 0.0) + spent, 3)
        self._stage = ""

    def advance(self, n: int) -> None:
        """Count so many of the stage as done."""
        self._done += n
        if self._progress:
            self._progress(self._stage, self._done, self._all)

    def counted(self, done: _T) -> _T:
        """Count one of the stage as done; return what it gave."""
        self.advance(1)
        return done
