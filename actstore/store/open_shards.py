"""Open files of shards: a bounded number, with what was verified of each remembered."""

from __future__ import annotations

import os
import threading
import weakref
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from actstore import durable
from actstore.durable import FileFacts
from actstore.errors import DamagedFile
from actstore.shard import ShardLayout, ShardReader

_OPEN_SHARDS = 256


@dataclass(frozen=True)
class OpenShard:
    """A reader of an open file, which closes with the last reference to it."""

    reader: ShardReader
    """Reads it."""


class OpenShards:
    """The open shards of a store; any number of threads may ask for them.

    Parameters
    ----------
    root : Path
        Folder of the store.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._shards: OrderedDict[tuple[str, int, FileFacts], OpenShard] = OrderedDict()
        self._verified: dict[tuple[str, int, FileFacts], npt.NDArray[np.bool_]] = {}
        self._lock = threading.Lock()

    def get(self, path: str, segment: int, layout: ShardLayout, facts: FileFacts) -> OpenShard:
        """Return the shard of a segment in the folder of an array, opened if it is not.

        Raises
        ------
        DamagedFile
            If the file is missing, or is not what `facts` say.
        """
        key = (path, segment, facts)  # a result may be deleted and computed again
        with self._lock:
            if key in self._shards:
                self._shards.move_to_end(key)
                return self._shards[key]
            name = f"{path}/c/{segment}/0"
            try:
                fd = os.open(durable.confined(self._root, name), os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                raise DamagedFile(
                    f"{name} is missing from {self._root}, though segment {segment} is committed. "
                    "Restore it from a copy, or capture into a new store."
                ) from None
            label = f"{name} of {self._root} (segment {segment})"
            try:
                reader = ShardReader(fd, layout, facts.n_bytes, label, facts.chunks_crc32c)
            except BaseException:
                os.close(fd)
                raise
            if key in self._verified:
                reader.verified = self._verified[key]
            self._verified[key] = reader.verified
            self._shards[key] = OpenShard(reader)
            weakref.finalize(self._shards[key], os.close, fd)
            if len(self._shards) > _OPEN_SHARDS:
                self._shards.popitem(last=False)
            return self._shards[key]
