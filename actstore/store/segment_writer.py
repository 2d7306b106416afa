"""Writing one segment: its shards band by band, its partials, then the commit that makes it real.

The writer holds the segment's lock from beginning to end, so there is one writer, and names that a
crashed attempt left behind are simply written over.  Nothing is visible before the commit.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from actstore import arrow, durable
from actstore.durable import FileFacts
from actstore.errors import StoreMismatch
from actstore.shard import ShardWriter
from actstore.store.meta import FIRST, SPECIAL, Commit, Segment, SiteCounts, SiteInfo, ranges
from actstore.store.stored_rows import is_sample, sample, sample_name

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
        self._streams = durable.Streams()
        self._samples: dict[str, npt.NDArray[np.int64]] = {}
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

    def sample(self, info: SiteInfo) -> npt.NDArray[np.int64]:
        """Return the offsets, ascending, whose rows a site stores that keeps 2^-j of them."""
        space, number = info.site.space, self.segment.segment
        name = sample_name(space, info.keep, number)
        if name not in self._samples:
            meta = self._store.meta
            flags = arrow.numbers(self._store.tokens(number, space).column("flags"))
            content = np.flatnonzero((flags & (SPECIAL | FIRST)) == 0)
            first = number * meta.segment_rows
            self._samples[name] = sample(content, first, info.keep, meta.sample_seed)
        return self._samples[name]

    def write_band(self, info: SiteInfo, band: npt.NDArray[Any]) -> None:
        """Append a band, ``(column chunks, chunk rows, chunk columns)``, to the site's shard.

        Where a site keeps a sample its bands hold the rows of `sample`, one after the other.
        """
        name = f"{info.path}/c/{self.segment.segment}/0"
        if name not in self._shards:
            path = self._store.path / name
            durable.make_folder(path.parent)
            file = self._streams.open(durable.partial_of(path))
            self._shards[name] = (path, file, ShardWriter(file, self._store.layout(info)))
        self._shards[name][2].write_band(band)

    def write_partial(self, fold: str, arrays: Iterable[tuple[str, npt.NDArray[Any]]]) -> None:
        """Write what the segment adds to a fold, named arrays one after the other."""
        name = f"partials/{fold}/{self.segment.segment:08d}.npz"
        path = self._store.path / name
        durable.make_folder(path.parent)
        self._files[name] = durable.write_arrays(path, arrays)

    def commit(self, counts: Mapping[str, SiteCounts], relied_on: Iterable[int]) -> Commit:
        """Make all files durable, those that name the stored rows too, then publish the commit.

        Raises
        ------
        StoreMismatch
            If the segment was committed meanwhile; nothing is changed then.
        """
        for name, (path, file, writer) in self._shards.items():
            facts = writer.finish()
            file.finish()
            durable.publish(durable.partial_of(path), path)
            self._files[name] = FileFacts(facts.n_bytes, facts.crc32c, facts.checksums_crc32c)
        for info in self._store.meta.sites:
            name = sample_name(info.site.space, info.keep, self.segment.segment)
            if is_sample(info.keep) and name not in self._files:
                path = self._store.path / name
                durable.make_folder(path.parent)
                self._files[name] = durable.write_array(path, self.sample(info).astype(np.uint32))
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


def read_partial(store: CoreStore, segment: int, fold: str) -> durable.ArraysFile:
    """Return what a committed segment adds to a fold: named arrays, each read when asked for."""
    name = f"partials/{fold}/{segment:08d}.npz"
    store.verifier.check({name: store.commit_of(segment).files[name]})
    return durable.ArraysFile(store.path / name)


def drop_partials(store: CoreStore, segments: Iterable[int]) -> None:
    """Delete the partials of segments that a durable prefix generation covers."""
    covered = set(segments)
    for path in (store.path / "partials").glob("*/*.npz"):
        if int(path.stem) in covered:
            path.unlink(missing_ok=True)
