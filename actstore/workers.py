"""Workers: processes of this machine that are started for a call, or those of a Dask scheduler.

The workers of `workers=` belong to a cluster in a process of its own, which serves an address, as a
scheduler elsewhere does, and ends with its standard input: whatever happens to this process, none
of the others outlives it.  They never import the user's script, which needs no main guard, and what
Dask logs does not reach the terminal.

What they are to do is the business of those who call.  A caller must not let the scheduler, which
may be elsewhere, import what only workers need: what is sent are functions that travel by value,
and plain data.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from actstore.errors import ArgumentError
from actstore.store.budget import as_count

_START_SECONDS = 60

# Memory and dashboard are not Dask's to watch, and its malloc settings slow the forward down.  No
# task goes to a worker that has not loaded PyTorch yet: another would be done with it sooner.  A
# worker that died comes back, however long a busy machine takes for that: by default one that takes
# 15 seconds is given up, and when all are, tasks wait for ever.
_SERVE = """
import shutil, sys
import dask
from distributed import LocalCluster
with (
    dask.config.set(
        {
            "distributed.nanny.pre-spawn-environ": {},
            "distributed.deploy.lost-worker-timeout": "8760 h",
        }
    ),
    LocalCluster(
        n_workers=int(sys.argv[1]),
        threads_per_worker=1,
        memory_limit=0,
        dashboard_address=None,
        local_directory=sys.argv[2],
        preload=sys.argv[3],
    ) as cluster,
):
    print(cluster.scheduler_address, flush=True)
    sys.stdin.read()
shutil.rmtree(sys.argv[2], ignore_errors=True)
"""


@dataclass(frozen=True)
class Where:
    """Which workers: so many processes here, or those of a scheduler."""

    n_local: int | None
    """Processes of a cluster on this machine; None where there is a scheduler."""
    scheduler: str | None
    """Address of a running scheduler."""

    @classmethod
    def asked(cls, workers: int | None, scheduler: str | None) -> Where | None:
        """Return the workers that arguments ask for; None where this process does it alone.

        Raises
        ------
        ArgumentError
            If they contradict each other, or are no number and no address.
        """
        if workers is not None:
            workers = as_count("workers", workers, 1)
        if workers is not None and scheduler is not None:
            raise ArgumentError(
                f"workers = {workers} and scheduler = {scheduler!r} exclude each other: a running "
                "cluster has its own workers. Give one of the two."
            )
        if not isinstance(scheduler, str | None):
            raise ArgumentError(
                f"scheduler is a {type(scheduler).__name__}; expected the address of a Dask "
                "scheduler, such as 'tcp://host:8786'. Of a client it is client.scheduler.address."
            )
        return None if scheduler is None and workers in (None, 1) else cls(workers, scheduler)


class Connection:
    """Connects to workers when they are first wanted, and ends those that were started for it.

    Parameters
    ----------
    where : Where
        Which workers.
    preload : str
        Module that workers of this machine load before they are given anything.
    n_threads : int
        Threads that workers of this machine share.
    """

    def __init__(self, where: Where, *, preload: str, n_threads: int) -> None:
        self._where = where
        self._preload = preload
        self._n_threads = n_threads
        self._client: Any = None
        self._process: subprocess.Popen[str] | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def is_open(self) -> bool:
        """Whether there is a client."""
        return self._client is not None

    @property
    def client(self) -> Any:
        """A ``distributed.Client`` with at least one worker.

        Raises
        ------
        ArgumentError
            If there is no scheduler, or it has no workers.
        """
        if self._client is None:
            import distributed

            address = self._where.scheduler or self._serve()
            try:
                with quiet():
                    self._client = distributed.Client(
                        address,
                        timeout=_START_SECONDS,
                        set_as_default=False,
                        # What workers elsewhere have may be within the scheduler's reach only.
                        direct_to_workers=self._where.n_local is not None,
                    )
                    self._client.wait_for_workers(1, timeout=_START_SECONDS)
            except (OSError, ValueError, TimeoutError) as error:
                what = "does not answer" if self._client is None else "has no workers"
                raise self.gone(f"{what} ({error})") from error
        return self._client

    def _serve(self) -> str:
        """Start the cluster of this machine; return its address."""
        assert self._where.n_local
        threads = str(max(1, self._n_threads // self._where.n_local))
        self._folder = tempfile.TemporaryDirectory(prefix="actstore-cluster-")
        folder = self._folder.name
        with open(Path(folder) / "log", "w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _SERVE, str(self._where.n_local), folder, self._preload],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={
                    **os.environ,
                    "OMP_NUM_THREADS": threads,
                    "MKL_NUM_THREADS": threads,
                    "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path)),
                },
                start_new_session=True,  # Ctrl-C is for this process, which ends the others
            )
        assert self._process.stdout
        address = self._process.stdout.readline().strip()
        if not address:
            raise self.gone("did not start")
        return address

    def gone(self, what: str) -> ArgumentError:
        """Return the error that the workers are not there, and what to do."""
        if self._where.scheduler is not None:
            return ArgumentError(
                f"scheduler = {self._where.scheduler!r} {what}; expected the address of a Dask "
                "scheduler with workers, such as 'tcp://host:8786'. What is finished stands; run "
                "the same again, or on this machine with workers= (--workers)."
            )
        said = ""
        if self._folder is not None:
            log = (Path(self._folder.name) / "log").read_text(errors="replace")
            said = "".join(log.strip().splitlines()[-1:])
        return ArgumentError(
            f"workers = {self._where.n_local}: the cluster of this machine {what} "
            f"({said or 'it said nothing'}). What is finished stands; run the same again, or "
            "without workers= (--workers)."
        )

    def close(self) -> None:
        """Close the client, and end the processes that were started here, whatever they are at."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.communicate()
        with quiet(), suppress(Exception):
            if self._client is not None:
                self._client.close()
        if self._folder is not None:
            self._folder.cleanup()


@contextmanager
def quiet() -> Iterator[None]:
    """Keep Dask's log off the terminal; what matters is raised."""
    loggers = [logging.getLogger(name) for name in ("distributed", "distributed.client")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
