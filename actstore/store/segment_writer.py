"""Writing one segment: its shards band by band, its partials, then the commit that makes it real.

The writer holds the segment's lock from beginning to end, so there is one writer, and names that a
crashed attempt left behind are simply written over.  Nothing is visible before the commit.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from actstore import durable
from actstore.durable import FileFacts
from actstore.errors import StoreMismatch
from actstore.shard import ShardWriter
from actstore.store.meta import Commit, Segment, SiteCounts, SiteInfo, ranges

if TYPE_CHECKING:
    from actstore.store.core import CoreStore


class SegmentWriter:
    """Writes one segment and commits it; a context manager that holds the segment's lock.

    Raises
    ------
    StoreBusy
        On entering, if another process is writing the segment.
    """

    def __init__(self, store: CoreStore, segment: Segment) -> None:
        self._store = store
        self.segment = segment
        self._files: dict[str, FileFacts] = {}
        self._shards: dict[str, tuple[Path, Any, ShardWriter]] = {}
        self._lock_file = store.path / "work" / f"segment-{segment.segment:08d}.lock"
        self._lock = durable.lock(self._lock_file, f"segment {segment.segment} of {store.path}")

    def __enter__(self) -> SegmentWriter:
        self._lock.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for _, file, _ in self._shards.values():
            file.close()
        if self.committed:
            # Whoever still waits for this lock looks for the commit first and finds it.
            self._lock_file.unlink(missing_ok=True)
        self._lock.__exit__(kind, error, trace)

    @property
    def committed(self) -> bool:
        """Whether the segment is committed, looked up on disk: true if another writer was first."""
        return (self._store.path / self._commit_name).exists()

    @property
    def _commit_name(self) -> str:
        return f"commits/{self.segment.segment:08d}.json"

    def write_band(self, info: SiteInfo, band: npt.NDArray[Any]) -> None:
        """Append a band, ``(column chunks, chunk rows, chunk columns)``, to the site's shard."""
        name = f"{info.path}/c/{self.segment.segment}/0"
        if name not in self._shards:
            path = self._store.path / name
            durable.make_folder(path.parent)
            file = durable.partial_of(path).open("wb", buffering=0)
            self._shards[name] = (path, file, ShardWriter(file, self._store.layout(info)))
        self._shards[name][2].write_band(band)

    def write_partial(self, fold: str, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """Write what the segment adds to a fold."""
        name = f"partials/{fold}/{self.segment.segment:08d}.npz"
        path = self._store.path / name
        durable.make_folder(path.parent)
        self._files[name] = durable.write_arrays(path, arrays)

    def commit(self, counts: Mapping[str, SiteCounts], relied_on: Iterable[int]) -> Commit:
        """Make all files durable, then publish the commit.

        Raises
        ------
        StoreMismatch
            If the segment was committed meanwhile; nothing is changed then.
        """
        for name, (path, file, writer) in self._shards.items():
            facts = writer.finish()
            file.close()
            durable.publish(durable.partial_of(path), path)
            self._files[name] = FileFacts(facts.n_bytes, facts.crc32c, facts.checksums_crc32c)
        commit = Commit(
            self.segment.segment,
            self.segment.rows,
            self._files,
            counts,
            ranges(relied_on),
            {
                "host": platform.node(),
                "process": os.getpid(),
                "time": datetime.now(UTC).isoformat(timespec="seconds"),
            },
        )
        durable.make_folder(self._store.path / "commits")
        document = durable.sealed(commit.to_json())
        try:
            durable.create(self._store.path / self._commit_name, durable.to_json(document))
        except FileExistsError:
            raise StoreMismatch(
                f"segment {self.segment.segment} of {self._store.path} is committed already; "
                "what was there stands."
            ) from None
        return commit


class PartialReader(Mapping[str, npt.NDArray[Any]]):
    """What a committed segment adds to a fold: named arrays, each read when asked for."""

    def __init__(self, store: CoreStore, segment: int, fold: str) -> None:
        name = f"partials/{fold}/{segment:08d}.npz"
        store.verifier.check({name: store.commit_of(segment).files[name]})
        self._arrays = np.load(store.path / name, allow_pickle=False)

    def __enter__(self) -> PartialReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._arrays.close()

    def __getitem__(self, name: str) -> npt.NDArray[Any]:
        values: npt.NDArray[Any] = self._arrays[name]
        return values

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays.files)

    def __len__(self) -> int:
        return len(self._arrays.files)


def drop_partials(store: CoreStore, segments: Iterable[int]) -> None:
    """Delete the partials of segments that a durable prefix generation covers."""
    covered = set(segments)
    for path in (store.path / "partials").glob("*/*.npz"):
        if int(path.stem) in covered:
            path.unlink(missing_ok=True)
