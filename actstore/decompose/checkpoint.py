"""What an interrupted fit goes on from: a folder of the store's work folder, named by the fit.

The name is a digest of everything that decides the outcome: settings, rows, commits and versions.
So the same call finds what it left, another does not, and what nobody came back for is removed by
the next fit.  A lock inside keeps two processes from one fit, and a running one from being removed.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
import zipfile
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack, suppress
from pathlib import Path
from typing import Any, Self

import numpy.typing as npt

from actstore import durable
from actstore.errors import StoreBusy

_SAVE_SECONDS = 5.0


class Checkpoint:
    """The state of one fit, on disk.

    Parameters
    ----------
    root : Path
        Folder of the store.
    settings : mapping
        What decides the outcome, as JSON can hold it.

    Raises
    ------
    StoreBusy
        On entering, if another process is at the same fit.
    """

    def __init__(self, root: Path, settings: Mapping[str, Any]) -> None:
        text = json.dumps(settings, sort_keys=True)
        self._work = root / "work"
        self.folder = self._work / f"fit-{hashlib.sha256(text.encode()).hexdigest()[:24]}"
        """Where it is, and where tasks may leave files."""
        self._root = root
        self._held = ExitStack()
        self._saved_at = time.monotonic()

    def __enter__(self) -> Self:
        with self._alone():
            self._hold(self._held, self.folder)
            for other in self._work.glob("fit-*"):
                if other != self.folder:
                    with suppress(StoreBusy, FileNotFoundError), ExitStack() as held:
                        self._hold(held, other)
                        shutil.rmtree(other)
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def _alone(self) -> AbstractContextManager[None]:
        """Keep folders from being removed by one process while another locks them."""
        what = f"the factorisations of {self._root}"
        return durable.lock(self._work / "fits.lock", what, wait=True)

    def _hold(self, held: ExitStack, folder: Path) -> None:
        what = f"a factorisation of {self._root} with the same arguments"
        held.enter_context(durable.lock(folder / "lock", what))

    def load(self) -> dict[str, npt.NDArray[Any]] | None:
        """Return the state that was saved last; None if there is none, or it was torn."""
        path = self.folder / "state.npz"
        try:
            with path.open("rb") as file, durable.ArraysFile(file) as arrays:
                return dict(arrays)  # each member is checked by its crc32
        except (FileNotFoundError, zipfile.BadZipFile, ValueError, EOFError):
            return None

    def save(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Save a state, unless that was done a few seconds ago."""
        if time.monotonic() - self._saved_at >= _SAVE_SECONDS:
            durable.write_arrays(self.folder / "state.npz", state)
            self._saved_at = time.monotonic()

    def clear(self) -> None:
        """Remove it: the fit is done, or can never be."""
        with self._alone():
            shutil.rmtree(self.folder, ignore_errors=True)
