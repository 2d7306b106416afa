"""Results: what was computed from a store, kept beside it, reopened without computing again.

A result is a folder of Zarr arrays and Parquet tables that takes its name in one rename, with
``result.json`` (provenance, checksums) inside; a name is never overwritten.
"""

from __future__ import annotations

import errno
import itertools
import re
import shutil
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack, suppress
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from actstore import durable
from actstore.durable import FileFacts, Verifier
from actstore.errors import ArgumentError, DamagedFile, ResultExists, StoreBusy
from actstore.shard import ShardLayout, ShardReader, ShardWriter, to_band

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")


class ResultWriter:
    """Writes one result; leaves nothing behind unless `finish` was called.

    Raises
    ------
    ResultExists, ArgumentError
        If the name is taken, or is none.
    StoreBusy
        On entering, if another process is writing a result of this name.
    NotEnoughDisk, NotWritable
        If the disk is full or nothing can be written there, while the result is.
    """

    def __init__(
        self, root: Path, kind: str, name: str | None, provenance: Mapping[str, Any]
    ) -> None:
        if name is not None and not (isinstance(name, str) and _NAME.fullmatch(name)):
            raise ArgumentError(
                f"name = {name!r} cannot name a result; expected a letter or digit, then up to 99 "
                "letters, digits, '-' and '_'."
            )
        self.kind, self.name = kind, name
        self._root = root
        self._refuse_taken()
        self._provenance = dict(provenance)
        self._files: dict[str, FileFacts] = {}
        self._open_tables: dict[str, durable.TableWriter] = {}

    @property
    def _final(self) -> Path:
        return self._root / "results" / self.kind / str(self.name)

    @property
    def _folder(self) -> Path:
        return self._final.with_name(f".{self.name}")

    def _refuse_taken(self) -> None:
        if self.name is not None and self._final.exists():
            raise ResultExists(
                f"{self.kind} result {self.name!r} exists in {self._root}, and results are never "
                f"overwritten. Choose another name, or delete {self._final}."
            )

    def __enter__(self) -> ResultWriter:
        with ExitStack() as held, durable.writing(self._root / "results" / self.kind):
            if self.name is None:
                self.name = _take_free_name(self._root, self.kind, held)
            else:
                held.enter_context(_lock(self._root, self.kind, self.name))
                self._refuse_taken()  # by who held the lock until now
            if self._folder.exists():  # left by a process that died
                shutil.rmtree(self._folder)
            durable.make_folder(self._folder)
            self._held = held.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for table in self._open_tables.values():
            table.abandon()
        if self._folder.exists():
            shutil.rmtree(self._folder)
        self._held.close()
        if isinstance(error, OSError):
            with durable.writing(self._final):
                raise error

    def write_table(self, name: str, table: pa.Table) -> None:
        """Write a table as ``<name>.parquet``."""
        self._files[f"{name}.parquet"] = durable.write_table(
            self._folder / f"{name}.parquet", table
        )

    def append_table(self, name: str, table: pa.Table) -> None:
        """Write rows of ``<name>.parquet`` behind those written before; all of the same columns."""
        if name not in self._open_tables:
            path = self._folder / f"{name}.parquet"
            self._open_tables[name] = durable.TableWriter(path, table.schema)
        self._open_tables[name].write(table)

    def write_array(self, name: str, values: npt.NDArray[Any]) -> None:
        """Write a matrix of at most a few thousand rows as a Zarr array of one shard."""
        rows = 1 << max(0, (len(values) - 1).bit_length())
        layout = ShardLayout.for_width(values.shape[1], rows, str(values.dtype), min(rows, 4096))
        array = RowsArray(self._folder / name, layout)
        array.write(0, values)
        self._files.update({f"{name}/{key}": facts for key, facts in array.finish(1).items()})

    def rows_array(self, name: str, width: int, dtype: str, segment_rows: int) -> RowsArray:
        """Return a writer of values at rows: a Zarr array with one shard for each segment."""
        return RowsArray(self._folder / name, rows_layout(width, dtype, segment_rows))

    def add_rows_array(self, name: str, array: RowsArray, n_segments: int) -> None:
        """Take a finished array of values at rows into the result."""
        files = array.finish(n_segments)
        self._files.update({f"{name}/{key}": facts for key, facts in files.items()})

    def finish(self, summary: Mapping[str, Any]) -> Result:
        """Write ``result.json`` and give the result its name.

        Raises
        ------
        ResultExists
            If another process took the name meanwhile.
        """
        for name, table in self._open_tables.items():
            self._files[f"{name}.parquet"] = table.finish()
        self._open_tables.clear()
        document = {
            "kind": self.kind,
            "name": self.name,
            "created": datetime.now(UTC).isoformat(timespec="microseconds"),
            **self._provenance,
            **summary,
            "files": {name: facts.to_json() for name, facts in self._files.items()},
        }
        durable.replace(self._folder / "result.json", durable.to_json(durable.sealed(document)))
        try:
            self._folder.rename(self._final)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
            raise ResultExists(
                f"{self.kind} result {self.name!r} exists in {self._root}. Choose another name."
            ) from error
        durable.sync_folder(self._final.parent)
        return Result(self._root, self.kind, str(self.name))


def rows_layout(width: int, dtype: str, segment_rows: int) -> ShardLayout:
    """Return how values at rows are laid out."""
    return ShardLayout.for_width(width, segment_rows, dtype, min(4096, segment_rows))


def _take_free_name(root: Path, kind: str, held: ExitStack) -> str:
    """Hold the first ``<kind>-<number>`` that names no result and that nobody is writing."""
    for number in itertools.count(1):
        name = f"{kind}-{number}"
        with ExitStack() as lock, suppress(StoreBusy):
            lock.enter_context(_lock(root, kind, name))
            if not (root / "results" / kind / name).exists():
                held.push(lock.pop_all())
                return name
    raise AssertionError


def _lock(root: Path, kind: str, name: str) -> AbstractContextManager[None]:
    return durable.lock(
        root / "work" / f"result-{kind}-{name}.lock", f"{kind} result {name!r} of {root}"
    )


class RowsArray:
    """Writes a Zarr array, one shard a segment, whole segments in any order."""

    def __init__(self, folder: Path, layout: ShardLayout) -> None:
        self._folder = folder
        self._layout = layout
        self._facts: dict[str, FileFacts] = {}

    def write(self, segment: int, values: npt.NDArray[Any]) -> None:
        """Write the values of a segment, ``(rows, width)``, in row order."""
        path = self._folder / f"c/{segment}/0"
        durable.make_folder(path.parent)
        with durable.partial_of(path).open("wb", buffering=0) as file:
            writer = ShardWriter(file, self._layout)
            step = self._layout.chunk_rows
            for start in range(0, len(values), step):
                writer.write_band(to_band(values[start : start + step], self._layout))
            facts = writer.finish()
        durable.publish(durable.partial_of(path), path)
        self._facts[f"c/{segment}/0"] = FileFacts(
            facts.n_bytes, facts.crc32c, facts.checksums_crc32c
        )

    def finish(self, n_segments: int) -> dict[str, FileFacts]:
        """Write the array's metadata; return the facts of its files."""
        path = self._folder / "zarr.json"
        durable.make_folder(self._folder)
        durable.replace(path, durable.to_json(self._layout.zarr_metadata(n_segments, {})))
        return {**self._facts, "zarr.json": FileFacts.of(path)}


class Result:
    """A whole result of a store."""

    def __init__(self, root: Path, kind: str, name: str) -> None:
        self.kind, self.name = kind, name
        self.path = root / "results" / kind / name
        self._remedy = f"Delete {self.path}, and compute it again."
        self._verifier = Verifier(self.path, self._remedy)

    @cached_property
    def document(self) -> dict[str, Any]:
        """The contents of ``result.json``: provenance and summary."""
        document = durable.read_sealed(self.path / "result.json", self._remedy)
        if "files" not in document:
            raise DamagedFile(
                f"{self.path}/result.json breaks the format: it names no files. {self._remedy}"
            )
        return document

    @cached_property
    def files(self) -> dict[str, FileFacts]:
        """Its files by path inside the result."""
        return {n: FileFacts.from_json(entry) for n, entry in self.document["files"].items()}

    def layout(self, array: str) -> ShardLayout:
        """Return how one of its arrays is laid out."""
        name = f"{array}/zarr.json"
        self._verifier.check({name: self.files[name]})
        return ShardLayout.from_zarr_metadata(durable.read_json(self.path / name))

    def table(self, name: str, **only: int | str) -> pa.Table:
        """Return one of its tables, or the rows of it whose columns have the given values."""
        self._verifier.check({f"{name}.parquet": self.files[f"{name}.parquet"]})
        filters = [(column, "=", value) for column, value in only.items()] or None
        return pq.read_table(self.path / f"{name}.parquet", filters=filters)

    def array(self, name: str, rows: int) -> npt.NDArray[np.float32]:
        """Return the first `rows` rows of one of its single-shard arrays."""
        layout = self.layout(name)
        path = self.path / name / "c/0/0"
        if not path.exists():
            raise DamagedFile(
                f"{path} is missing, though {self.path}/result.json names it. {self._remedy}"
            )
        with path.open("rb", buffering=0) as file:
            facts = self.files[f"{name}/c/0/0"]
            reader = ShardReader(
                file.fileno(), layout, facts.n_bytes, str(path), facts.chunks_crc32c
            )
            values: npt.NDArray[np.float32] = reader.read_rows(0, rows)
            return values
