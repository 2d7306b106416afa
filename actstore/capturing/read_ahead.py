"""Planning in a thread of its own, one part ahead of the capture.

While the model runs over one part the next is tokenised and published; then the thread waits until
the capture begins that one.  So the model never waits for text, a long corpus does not fill the
disk with plan, and memory is that of one part.  What the parts are follows from the corpus and the
store (`actstore.capturing.parts`), not from the time that any of it takes.

The thread holds the right to plan while it works.  Where another process holds it, the thread waits
for it, and the capture goes on with what that process publishes.
"""

from __future__ import annotations

import threading
from types import TracebackType

from actstore.capturing.corpus import Corpus
from actstore.capturing.plan import Limits, plan_parts
from actstore.models import LanguageModel
from actstore.store import CoreStore
from actstore.store.budget import Progress

_POLL_SECONDS = 0.2


class _Stopped(Exception):
    """Ends a plan whose capture has ended."""


class ReadAhead:
    """The plan of a corpus, being made; a context manager, inside which its thread runs.

    Parameters
    ----------
    store : CoreStore
        The store; the thread uses one of its own on the same folder.
    model, corpus, limits, order, add
        As for `plan_parts`.
    progress : callable, optional
        Told by `tell`.

    Raises
    ------
    StoreMismatch
        If the store was planned from another corpus.

    Attributes
    ----------
    finished : bool
        Whether all of the corpus is planned.
    n_rows : int
        Rows of the whole plan; 0 until it has reached the end of the corpus.
    """

    def __init__(
        self,
        store: CoreStore,
        model: LanguageModel,
        corpus: Corpus,
        limits: Limits,
        *,
        order: str = "corpus",
        add: bool = False,
        progress: Progress | None = None,
    ) -> None:
        self.finished = False
        self.n_rows = 0
        self._progress = progress
        self._store = CoreStore(store.path)
        self._parts = plan_parts(
            self._store,
            model,
            corpus,
            limits,
            self._tell_or_stop,
            order=order,
            add=add,
            beside=model.device.type == "cpu",
        )
        self._changed = threading.Condition()
        self._telling = threading.Lock()
        self._n_parts: int | None = None
        self._n_begun = 0
        self._stopping = False
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="actstore-plan", daemon=True)

    def __enter__(self) -> ReadAhead:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
            holds_lock = self._n_parts is not None
        # A thread that waits for another process ends when that process lets it go on.
        self._thread.join(None if holds_lock else 0)

    def begin(self, n_parts: int) -> None:
        """Say that the capture begins with the last of so many parts: the next may be planned."""
        with self._changed:
            self._n_begun = max(self._n_begun, n_parts)
            self._changed.notify_all()

    def may_capture(self, store: CoreStore) -> bool:
        """Return whether the arrays are there for what is planned.

        Where another process plans, its first part may be out before them.
        """
        return self._n_parts is not None or len(store.parts) > 1

    def wait(self, n_parts: int) -> None:
        """Return when there may be more than so many parts, or none will come.

        Raises what ended the plan too soon.
        """
        with self._changed:
            if self._failure is None and not self.finished and (self._n_parts or 0) <= n_parts:
                self._changed.wait(_POLL_SECONDS)
            if self._failure is not None:
                raise self._failure

    def tell(self, stage: str, done: int, total: int) -> None:
        """Pass on progress from any thread, one at a time.

        The total of rows to capture is unknown, 0, until all of them are planned.
        """
        if self._progress:
            with self._telling:
                self._progress(stage, done, self.n_rows if stage == "capture" else total)

    def _tell_or_stop(self, stage: str, done: int, total: int) -> None:
        if self._stopping:
            raise _Stopped
        self.tell(stage, done, total)

    def _run(self) -> None:
        try:
            for n_parts in self._parts:
                complete = self._store.plan_complete
                if complete:
                    self.n_rows = sum(s.rows[""] for s in self._store.planned.values())
                with self._changed:
                    self._n_parts = n_parts
                    self._changed.notify_all()
                    while self._n_begun < n_parts and not complete and not self._stopping:
                        self._changed.wait()
                    if self._stopping:
                        return
            self.finished = True
        except _Stopped:
            pass
        except BaseException as error:
            self._failure = error
        finally:
            self._parts.close()
            with self._changed:
                self._changed.notify_all()
