"""Files that survive a crash: written aside, synced, then given their name.

Neither zarr-python nor Arrow nor DuckDB syncs what it writes, so every file of a store goes through
here.  A file appears under its name whole or not at all; `create` publishes a name exactly once,
whoever races for it.  What was written is remembered as bytes and crc32c, and `Verifier` checks a
file against them before its first use in a process.
"""

from __future__ import annotations

import errno
import fcntl
import json
import mmap
import os
import threading
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Self

import google_crc32c
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from actstore import arrow
from actstore.errors import DamagedFile, NotEnoughDisk, NotWritable, StoreBusy
from actstore.shard import crc32c_of_file

ROW_GROUP_ROWS = 1 << 16
"""Rows of a Parquet row group where nothing else is asked for."""

RESTORE = "Restore it from a copy, or capture into a new store."
"""What to do where a file of a store is damaged, unless there is something better."""

_STREAM_BYTES = 1 << 20
_BLOCK_BYTES = 4096  # of any disk, or a multiple
_DIRECT = getattr(os, "O_DIRECT", 0)

# NumPy parses the header of an array as Python, and up to 3.11.7 and 3.12.1 two threads that parse
# at once may fail with "AST constructor recursion depth mismatch" (CPython issue 106905).
_HEADERS = threading.Lock()


@dataclass(frozen=True)
class FileFacts:
    """What is known of a file that was written."""

    n_bytes: int
    """Its size in bytes."""
    crc32c: int
    """Its CRC-32C (Castagnoli)."""
    chunks_crc32c: int | None = None
    """Of a shard, the CRC-32C of its chunks' checksums.  Bytes followed by their own checksum have
    the same CRC-32C whatever they are, so the one above finds damage in a shard but cannot tell it
    from another."""

    def to_json(self) -> dict[str, int]:
        """Return the facts as they stand in commits and manifests."""
        entry = {"bytes": self.n_bytes, "crc32c": self.crc32c}
        return entry if self.chunks_crc32c is None else {**entry, "chunks": self.chunks_crc32c}

    @classmethod
    def from_json(cls, entry: Mapping[str, int]) -> FileFacts:
        """Return the facts of an entry of a commit or manifest."""
        chunks = int(entry["chunks"]) if "chunks" in entry else None
        return cls(int(entry["bytes"]), int(entry["crc32c"]), chunks)

    @classmethod
    def of(cls, path: Path) -> FileFacts:
        """Return the facts of a file by reading it once."""
        return cls(path.stat().st_size, crc32c_of_file(path))


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_folder(path: Path) -> None:
    """Create a folder and its parents, durably."""
    missing = []
    folder = path
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _not_writable(path, error) from error
    for made in reversed(missing):
        sync_folder(made.parent)


def _not_writable(path: Path, error: OSError) -> OSError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return error
    return NotWritable(
        f"{path} cannot be written: {error.strerror}. Choose another place, or get the right to "
        "write there."
    )


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Name what is written where the system only says that it cannot be.

    Raises
    ------
    NotEnoughDisk
        If the disk is full.
    NotWritable
        If there is no right to write.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NotEnoughDisk(
                f"{path} cannot be written: its disk is full. Free some and do the same again."
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise _not_writable(path, error) from error
        raise


@contextmanager
def aside(path: Path) -> Iterator[Path]:
    """Give the name of a user's file while it is written: this process's own, gone afterwards.

    Raises
    ------
    NotEnoughDisk, NotWritable
        As `writing`.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with writing(path):
        try:
            yield partial
        finally:
            partial.unlink(missing_ok=True)


def write_file(path: Path, data: bytes) -> None:
    """Write a user's file durably, replacing an older one; the last of several writers stands."""
    with aside(path) as partial:
        partial.write_bytes(data)
        publish(partial, path)


def sync_file(path: Path) -> None:
    """Make the content of a file durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def publish(partial: Path, final: Path) -> None:
    """Give a written file its name, replacing what an attempt that never committed left there."""
    sync_file(partial)
    os.replace(partial, final)
    sync_folder(final.parent)


class Streams:
    """Files written from their start, past the operating system's cache where that is possible.

    What goes through the cache is copied into pages that first have to be found, which takes the
    processor several times as long as to hand the bytes to the disk.  That wants whole blocks at
    aligned addresses, so bytes are gathered in one buffer that all files share; a file that is not
    at its turn keeps less than a block of its own.

    For one thread.
    """

    def __init__(self) -> None:
        # Anonymous memory begins at a page, which is what direct writing asks of an address.
        self.buffer = np.frombuffer(mmap.mmap(-1, _STREAM_BYTES), np.uint8)
        self.turn: StreamFile | None = None

    def open(self, path: Path) -> StreamFile:
        """Open a file; what it held is gone."""
        return StreamFile(self, path)


class StreamFile:
    """A file of `Streams`."""

    def __init__(self, streams: Streams, path: Path) -> None:
        self._streams = streams
        self._begun = b""  # of a block, while other files are at their turn
        self._held = 0
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        # Asked for once it is open: where a file system has no direct writing, it just says no.
        with suppress(OSError):
            self._set_direct(True)

    def write(self, data: bytes | memoryview) -> int:
        """Take all of `data`; return its bytes."""
        self._take_turn()
        source = np.frombuffer(data, np.uint8)
        done = 0
        while done < len(source):
            n = min(len(source) - done, _STREAM_BYTES - self._held)
            self._streams.buffer[self._held : self._held + n] = source[done : done + n]
            self._held += n
            done += n
            if self._held == _STREAM_BYTES:
                self._flush(self._held)
        return done

    def finish(self) -> None:
        """Write what is held, and close the file; it is not synced."""
        self._take_turn()
        self._flush(self._held - self._held % _BLOCK_BYTES)
        self._set_direct(False)
        self._flush(self._held)
        self.close()

    def close(self) -> None:
        """Close the file as it is; what was not written is lost, unless it was finished."""
        if self._fd >= 0:
            if self._streams.turn is self:
                self._streams.turn = None
            os.close(self._fd)
            self._fd = -1

    def _take_turn(self) -> None:
        before = self._streams.turn
        if before is self:
            return
        if before is not None:
            before._yield_turn()
        self._streams.turn = self
        self._held = len(self._begun)
        self._streams.buffer[: self._held] = np.frombuffer(self._begun, np.uint8)

    def _yield_turn(self) -> None:
        self._flush(self._held - self._held % _BLOCK_BYTES)
        self._begun = self._streams.buffer[: self._held].tobytes()

    @property
    def _is_direct(self) -> bool:
        return bool(fcntl.fcntl(self._fd, fcntl.F_GETFL) & _DIRECT)

    def _set_direct(self, direct: bool) -> None:
        usual = fcntl.fcntl(self._fd, fcntl.F_GETFL) & ~_DIRECT
        fcntl.fcntl(self._fd, fcntl.F_SETFL, usual | _DIRECT if direct else usual)

    def _flush(self, n_bytes: int) -> None:
        """Write the first bytes of the buffer; what is behind them moves to its start."""
        rest = self._streams.buffer[:n_bytes].data
        while rest:
            try:
                rest = rest[os.write(self._fd, rest) :]
            except OSError as error:
                # A file system may take the flag and not the write, or wants larger blocks.
                if error.errno != errno.EINVAL or not self._is_direct:
                    raise
                self._set_direct(False)
        self._held -= n_bytes
        self._streams.buffer[: self._held] = self._streams.buffer[n_bytes : n_bytes + self._held]


def partial_of(path: Path) -> Path:
    """Return the name a file has while it is written; the writer's lock keeps it to one writer."""
    return path.with_name(path.name + ".partial")


def replace(path: Path, data: bytes) -> None:
    """Write a small file durably, replacing an older one."""
    partial = partial_of(path)
    partial.write_bytes(data)
    publish(partial, path)


def create(path: Path, data: bytes) -> None:
    """Write a small file durably under a name that must be new.

    Raises
    ------
    FileExistsError
        If the name is taken; the file there is untouched.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(data)
        sync_file(partial)
        os.link(partial, path)  # unlike rename, link never overwrites
    finally:
        partial.unlink(missing_ok=True)
    sync_folder(path.parent)


def to_json(document: Any) -> bytes:
    """Return a document as indented UTF-8 JSON."""
    return (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode()


def read_json(path: Path, remedy: str = RESTORE) -> Any:
    """Return the document in a JSON file, or raise `DamagedFile` if it is none, or missing."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DamagedFile(f"{path} is missing. {remedy}") from None
    except (ValueError, UnicodeDecodeError) as error:
        raise DamagedFile(f"{path} is not the JSON file it should be: {error}. {remedy}") from error


def sealed(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return a document with the crc32c of its content as the last key.

    Commits and manifests vouch for every other file; nothing else vouches for them.
    """
    return {**document, "crc32c": _crc32c_of_json(document)}


def unsealed(document: Any, where: object, remedy: str = RESTORE) -> dict[str, Any]:
    """Return the content of a sealed document.

    Raises
    ------
    DamagedFile
        If it has no seal, or the seal of another content.
    """
    if isinstance(document, dict) and "crc32c" in document:
        content = {key: value for key, value in document.items() if key != "crc32c"}
        if document["crc32c"] == _crc32c_of_json(content):
            return content
    raise DamagedFile(f"{where} has changed since it was written (crc32c does not match). {remedy}")


def read_sealed(path: Path, remedy: str = RESTORE) -> dict[str, Any]:
    """Return the content of a sealed JSON file, or raise `DamagedFile`."""
    return unsealed(read_json(path, remedy), path, remedy)


def _crc32c_of_json(document: Any) -> int:
    # As JSON gives it back: tuples are lists there, and keys are strings.
    return int(google_crc32c.value(json.dumps(document, sort_keys=True).encode()))


class TableWriter:
    """Writes one Parquet file, table by table, and publishes it on `finish`."""

    def __init__(self, path: Path, schema: pa.Schema, row_group_rows: int = ROW_GROUP_ROWS) -> None:
        self._path = path
        self._row_group_rows = row_group_rows
        # Integers as packed differences are as small as after zstd, written and read in less than
        # half the time; a dictionary of row ids would be as long as the column.
        integers = [f.name for f in schema if pa.types.is_integer(f.type)]
        floats = [f.name for f in schema if pa.types.is_floating(f.type)]
        others = [f.name for f in schema if f.name not in (*integers, *floats)]
        self._writer = pq.ParquetWriter(
            partial_of(path),
            schema,
            compression={f.name: "zstd" if f.name in others else "none" for f in schema},
            use_dictionary=others,
            column_encoding=dict.fromkeys(integers, "DELTA_BINARY_PACKED"),
            write_page_checksum=True,
        )

    def write(self, table: pa.Table) -> None:
        """Append the rows of a table."""
        self._writer.write_table(table, row_group_size=self._row_group_rows)

    def finish(self) -> FileFacts:
        """Close, sync and name the file; return its bytes and crc32c."""
        self._writer.close()
        partial = partial_of(self._path)
        facts = FileFacts.of(partial)
        publish(partial, self._path)
        return facts

    def abandon(self) -> None:
        """Close the file without giving it its name, unless it has it.

        Left open it would write its end when it is collected, by then into a later attempt's file.
        """
        with suppress(OSError, pa.ArrowException):
            self._writer.close()
        partial_of(self._path).unlink(missing_ok=True)


def write_table(path: Path, table: pa.Table, row_group_rows: int = ROW_GROUP_ROWS) -> FileFacts:
    """Write a table as one durable Parquet file; return its bytes and crc32c."""
    writer = TableWriter(path, table.schema, row_group_rows)
    writer.write(table)
    return writer.finish()


def read_table(
    path: Path | str,
    columns: Sequence[str] | None = None,
    where: tuple[str, int] | None = None,
) -> pa.Table:
    """Return a Parquet table.

    Parameters
    ----------
    path : Path or str
        Its file.
    columns : sequence of str, optional
        What to read of each row; default all.
    where : (str, int), optional
        Return only the rows where this column, one of those read, has this value.  Only row groups
        that may hold it are read.
    """
    with pq.ParquetFile(path) as file:
        if where is None:
            return file.read(columns)
        name, value = where
        schema, facts = file.metadata.schema, file.metadata
        leaf = next(i for i in range(len(schema)) if schema.column(i).path == name)
        groups = []
        for number in range(facts.num_row_groups if facts.num_rows else 0):
            statistics = facts.row_group(number).column(leaf).statistics
            if statistics.min <= value <= statistics.max:
                groups.append(number)
        found = file.read_row_groups(groups, columns)
    return arrow.take(found, np.flatnonzero(arrow.numbers(found[name]) == value))


def write_array(path: Path, array: npt.NDArray[Any]) -> FileFacts:
    """Write one array durably, so that readers may map it; return bytes and crc32c."""
    partial = partial_of(path)
    with partial.open("wb") as file:
        whole = np.ascontiguousarray(array)
        header = np.lib.format.header_data_from_array_1_0(whole)
        np.lib.format.write_array_header_1_0(file, header)
        # Unlike NumPy's own writing, that of a file says when the disk is full.
        file.write(whole.reshape(-1).view(np.uint8).data)
    facts = FileFacts.of(partial)
    publish(partial, path)
    return facts


def read_array(path: Path | str, *, mapped: bool = False) -> npt.NDArray[Any]:
    """Return an array that `write_array` wrote, in memory or mapped; any thread may ask."""
    with _HEADERS:
        array: npt.NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    return array if mapped else np.array(array)


class ArraysFile(Mapping[str, npt.NDArray[Any]]):
    """Named arrays that `write_arrays` wrote, each read when asked for; any thread may ask.

    To be entered, or closed.
    """

    def __init__(self, file: Path | str | IO[bytes]) -> None:
        self._arrays = np.load(file, allow_pickle=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._arrays.close()

    def __getitem__(self, name: str) -> npt.NDArray[Any]:
        with _HEADERS:
            values: npt.NDArray[Any] = self._arrays[name]
        return values

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays.files)

    def __len__(self) -> int:
        return len(self._arrays.files)


def write_arrays(
    path: Path,
    arrays: Mapping[str, npt.NDArray[Any]] | Iterable[tuple[str, npt.NDArray[Any]]],
) -> FileFacts:
    """Write named arrays durably, the same bytes for the same arrays; return bytes and crc32c.

    Of an iterable of names and arrays each is asked for once the one before is written.
    """
    partial = partial_of(path)
    with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for name, array in arrays.items() if isinstance(arrays, Mapping) else arrays:
            # np.savez stamps the time into every member; a fixed one keeps equal stores equal.
            member = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            with archive.open(member, "w", force_zip64=True) as file:
                np.lib.format.write_array(file, np.asarray(array), allow_pickle=False)
    facts = FileFacts.of(partial)
    publish(partial, path)
    return facts


@contextmanager
def lock(path: Path, what: str, wait: bool = False) -> Iterator[None]:
    """Hold the lock file at a path; the kernel frees it when the process ends, however it ends.

    Raises
    ------
    StoreBusy
        If another process holds it and `wait` is False.
    """
    make_folder(path.parent)
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise _not_writable(path, error) from error
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise StoreBusy(
                f"{what} is being written by another process (lock {path}). Wait for it, or end it."
            ) from None
        yield
    finally:
        os.close(fd)


class Verifier:
    """Checks files of a store against their recorded size and crc32c, once a process.

    Parameters
    ----------
    root : Path
        What their names are below.
    remedy : str, optional
        What to do where one is damaged.
    """

    def __init__(self, root: Path, remedy: str = RESTORE) -> None:
        self._root = root
        self._remedy = remedy
        self._checked: set[tuple[str, FileFacts]] = set()

    def check(self, files: Mapping[str, FileFacts]) -> None:
        """Read every named file that was not yet read here and compare it with its facts.

        Raises
        ------
        DamagedFile
            If a file is missing, has another size, or another checksum.
        """
        for name, facts in files.items():
            if (name, facts) in self._checked:
                continue
            path = confined(self._root, name)
            try:
                found = path.stat().st_size
            except FileNotFoundError:
                raise DamagedFile(
                    f"{name} is missing from {self._root}; a commit or manifest names it. "
                    f"{self._remedy}"
                ) from None
            if found != facts.n_bytes:
                raise DamagedFile(
                    f"{name} in {self._root} has {found:,} bytes, expected {facts.n_bytes:,}. "
                    f"{self._remedy}"
                )
            if crc32c_of_file(path) != facts.crc32c:
                raise DamagedFile(
                    f"{name} in {self._root} has changed since it was written (crc32c does not "
                    f"match). {self._remedy}"
                )
            self._checked.add((name, facts))


def confined(root: Path, name: str) -> Path:
    """Return the path of a name inside a root; a store's metadata cannot point out of the store.

    Raises
    ------
    DamagedFile
        If the name leads out of the root.
    """
    path = root / name
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise DamagedFile(f"{name!r}, named by the metadata of {root}, lies outside of the store.")
    return path
