"""Durable files: whole under their name or not there, published once, checked before use."""

from __future__ import annotations

import ast
import errno
import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actstore import durable
from actstore.durable import FileFacts, TableWriter, Verifier
from actstore.errors import DamagedFile, NotEnoughDisk, NotWritable, StoreBusy


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that fills with the system calls that make a file durable."""
    found: list[str] = []

    def watch(name: str, where: Callable[..., str]) -> None:
        call = getattr(os, name)

        def watched(*args: object, **kwargs: object) -> object:
            found.append(f"{name} {where(*args)}")
            return call(*args, **kwargs)

        monkeypatch.setattr(os, name, watched)

    watch("fsync", lambda fd: Path(os.readlink(f"/proc/self/fd/{fd}")).name)
    watch("replace", lambda old, new: f"{Path(old).name} -> {Path(new).name}")
    watch("link", lambda old, new: f"{Path(old).name} -> {Path(new).name}")
    return found


def test_a_file_is_synced_before_it_has_its_name_and_the_name_after(
    tmp_path: Path, steps: list[str]
) -> None:
    """Content, name, folder: in this order, or a crash could leave half a file under its name."""
    folder = tmp_path.name
    durable.replace(tmp_path / "a", b"1")
    durable.create(tmp_path / "b", b"2")
    pid = os.getpid()
    assert steps == [
        "fsync a.partial",
        "replace a.partial -> a",
        f"fsync {folder}",
        f"fsync b.{pid}.partial",
        f"link b.{pid}.partial -> b",
        f"fsync {folder}",
    ]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


@pytest.mark.parametrize("kind", ["table", "arrays"])
def test_tables_and_arrays_are_synced_too(kind: str, tmp_path: Path, steps: list[str]) -> None:
    """Neither Arrow nor NumPy syncs; what is written through here is."""
    if kind == "table":
        facts = durable.write_table(tmp_path / "a", pa.table({"x": [1, 2]}))
    else:
        facts = durable.write_arrays(tmp_path / "a", {"x": np.arange(2)})
    assert steps == ["fsync a.partial", "replace a.partial -> a", f"fsync {tmp_path.name}"]
    assert facts == FileFacts.of(tmp_path / "a")


def test_folders_are_made_durably(tmp_path: Path, steps: list[str]) -> None:
    """Every new name stands in a folder that was synced after it; old ones cost nothing."""
    durable.make_folder(tmp_path / "x/y/z")
    assert steps == [f"fsync {tmp_path.name}", "fsync x", "fsync y"]
    durable.make_folder(tmp_path / "x/y/z")
    assert len(steps) == 3


def test_a_name_is_created_once(tmp_path: Path) -> None:
    """Whoever comes second is told, and changes nothing."""
    durable.create(tmp_path / "a", b"first")
    with pytest.raises(FileExistsError):
        durable.create(tmp_path / "a", b"second")
    assert (tmp_path / "a").read_bytes() == b"first"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_arrays_have_the_same_bytes_every_time(tmp_path: Path) -> None:
    """No time of writing is kept: equal arrays make equal files."""
    arrays = {"a/b": np.arange(3.0), "c": np.zeros((2, 0), np.int8)}
    facts = [durable.write_arrays(tmp_path / name, arrays) for name in "xy"]
    assert facts[0] == facts[1]
    with np.load(tmp_path / "x", allow_pickle=False) as found:
        assert {name: found[name].tolist() for name in found.files} == {
            "a/b": [0, 1, 2],
            "c": [[], []],
        }


def test_objects_are_not_pickled(tmp_path: Path) -> None:
    """An array of objects is refused: reading it would run code."""
    with pytest.raises(ValueError, match="allow_pickle"):
        durable.write_arrays(tmp_path / "a", {"x": np.array([{}], dtype=object)})
    assert not (tmp_path / "a").exists()


def test_a_table_is_written_piece_by_piece(tmp_path: Path) -> None:
    """Row groups have the size asked for; nothing has the name before the end."""
    schema = pa.schema([("x", pa.int64())])
    writer = TableWriter(tmp_path / "a", schema, row_group_rows=4)
    writer.write(pa.table({"x": range(10)}, schema=schema))
    assert not (tmp_path / "a").exists()
    writer.write(pa.table({"x": range(10, 13)}, schema=schema))
    facts = writer.finish()
    file = pq.ParquetFile(tmp_path / "a")
    groups = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    assert groups == [4, 4, 2, 3]
    assert file.read()["x"].to_pylist() == list(range(13))
    assert facts.n_bytes == (tmp_path / "a").stat().st_size


def test_the_verifier_reads_each_file_once_and_finds_any_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Size and crc32c are compared on first use; a second use costs nothing."""
    path = tmp_path / "a"
    path.write_bytes(b"0123456789")
    facts = {"a": FileFacts.of(path)}
    read: list[str] = []
    crc32c = durable.crc32c_of_file
    monkeypatch.setattr(durable, "crc32c_of_file", lambda p: read.append(p) or crc32c(p))
    verifier = Verifier(tmp_path)
    verifier.check(facts)
    verifier.check(facts)
    assert len(read) == 1
    for data, message in (
        (b"0123456788", r"a in .* has changed since it was written .* Restore it from a copy"),
        (b"012345678", r"a in .* has 9 bytes, expected 10\. Restore it"),
        (None, r"a is missing from .*; a commit or manifest names it\. Restore it"),
    ):
        path.unlink() if data is None else path.write_bytes(data)
        with pytest.raises(DamagedFile, match=message):
            Verifier(tmp_path).check(facts)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)


@given(st.dictionaries(st.text().filter(lambda key: key != "crc32c"), JSON, max_size=4))
def test_sealed_documents_come_back_and_no_others(document: dict[str, object]) -> None:
    """What is sealed comes back through JSON; any other content under that seal does not."""
    sealed = json.loads(durable.to_json(durable.sealed(document)))
    assert durable.unsealed(sealed, "a") == document
    for other in (
        {**sealed, "new": 1},
        {**sealed, "crc32c": sealed["crc32c"] ^ 1},
        document,
        [],
        7,
    ):
        with pytest.raises(DamagedFile, match="a has changed since it was written"):
            durable.unsealed(other, "a")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"{", "is not the JSON file it should be"),
        (b"\xff\xfe", "is not the JSON"),
        (None, "is missing"),
    ],
)
def test_json_that_cannot_be_read_is_damage(
    data: bytes | None, message: str, tmp_path: Path
) -> None:
    """Half a file, no text or no file: an error of the tree that names the file."""
    path = tmp_path / "a.json"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(DamagedFile, match=rf"a\.json {message}.*Restore it from a copy"):
        durable.read_json(path)


def test_a_lock_is_held_by_one(tmp_path: Path) -> None:
    """A second holder is told at once who has it and what to do, and may have it after."""
    path = tmp_path / "work/a.lock"
    with durable.lock(path, "the plan of runs/x"):
        with pytest.raises(StoreBusy, match=r"^the plan of runs/x is being written by another"):
            durable.lock(path, "the plan of runs/x").__enter__()
        with pytest.raises(BlockingIOError):
            durable.lock(path, "x").__enter__()
    with durable.lock(path, "x"):
        pass


@pytest.mark.parametrize("name", ["/etc/passwd", "../a", "a/../../b", "a/.."])
def test_names_lead_nowhere_else(name: str, tmp_path: Path) -> None:
    """A name from metadata is a path inside of the store or an error."""
    with pytest.raises(DamagedFile, match="lies outside of the store"):
        durable.confined(tmp_path, name)
    assert durable.confined(tmp_path, "a/b..c") == tmp_path / "a/b..c"


def test_facts_come_back_from_json() -> None:
    """Bytes, crc32c and, of shards, the crc32c of their chunks' checksums."""
    for facts in (FileFacts(1, 2), FileFacts(1, 2, 3)):
        assert FileFacts.from_json(json.loads(json.dumps(facts.to_json()))) == facts


def test_one_thread_at_a_time_parses_headers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some versions of Python fail where two threads parse at once."""
    durable.write_arrays(tmp_path / "a.npz", {str(i): np.arange(i) for i in range(5)})
    durable.write_array(tmp_path / "a.npy", np.arange(7))
    parse, inside, most = ast.literal_eval, [0], [0]

    def watched(text: str) -> object:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        time.sleep(1e-3)
        inside[0] -= 1
        return parse(text)

    def read(_: int) -> list[int]:
        with durable.ArraysFile(tmp_path / "a.npz") as arrays:
            lengths = [len(arrays[name]) for name in arrays]
        return [*lengths, len(durable.read_array(tmp_path / "a.npy"))]

    monkeypatch.setattr(ast, "literal_eval", watched)
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(read, range(8)))

    assert found == [[0, 1, 2, 3, 4, 7]] * 8
    assert most == [1]


@pytest.mark.parametrize(
    ("code", "error", "message"),
    [
        (errno.ENOSPC, NotEnoughDisk, r"page\.html cannot be written: its disk is full\. Free"),
        (errno.EACCES, NotWritable, r"page\.html cannot be written: Permission denied\. Choose"),
    ],
)
def test_a_users_file_is_replaced_whole_or_stays(
    code: int, error: type[Exception], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What hinders the writing is named; nothing is left of it beside the older file."""
    path = tmp_path / "page.html"
    durable.write_file(path, b"old")

    def refuse(path: Path) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(durable, "sync_file", refuse)
    with pytest.raises(error, match=message):
        durable.write_file(path, b"new")
    with pytest.raises(OSError, match=os.strerror(code)):
        durable.create(tmp_path / "fact.json", b"{}")
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize("shape", [(7, 5), (0, 5), ()])
def test_arrays_are_what_numpy_writes_and_say_when_the_disk_is_full(
    shape: tuple[int, ...], tmp_path: Path
) -> None:
    """The same bytes as by `numpy.save`; NumPy's own error has no number to know it by."""
    array = np.arange(np.prod(shape, dtype=int), dtype=np.float32).reshape(shape)
    np.save(tmp_path / "wanted.npy", np.ascontiguousarray(array))
    durable.write_array(tmp_path / "found.npy", array)
    assert (tmp_path / "found.npy").read_bytes() == (tmp_path / "wanted.npy").read_bytes()
    durable.partial_of(tmp_path / "full.npy").symlink_to("/dev/full")
    with pytest.raises(OSError) as caught:
        durable.write_array(tmp_path / "full.npy", array)
    assert caught.value.errno == errno.ENOSPC


def test_only_the_groups_of_a_value_are_read(tmp_path: Path) -> None:
    """`where` gives the rows with a value, in their order, and reads no group without it."""
    path = tmp_path / "windows.parquet"
    segment = np.sort(np.random.default_rng(0).integers(0, 9, 1_000)).astype(np.int32)
    table = pa.table(
        {
            "ids": [[i, i] for i in range(1_000)],
            "segment": segment,
            "text": [f"{i}" for i in range(1_000)],
        }
    )
    durable.write_table(path, table, 50)
    with mock.patch.object(pq.ParquetFile, "read_row_groups", autospec=True) as read:
        read.return_value = table.slice(0, 0)
        durable.read_table(path, where=("segment", 4))
        groups = read.call_args.args[1]
    assert [g for g in range(20) if (segment[50 * g : 50 * g + 50] == 4).any()] == groups
    for value in (0, 4, 8, 9):
        wanted = table.filter(pa.array(segment == value))
        assert durable.read_table(path, where=("segment", value)).equals(wanted)
        some = durable.read_table(path, ["text", "segment"], where=("segment", value))
        assert some.select(["text", "segment"]).equals(wanted.select(["text", "segment"]))
    durable.write_table(tmp_path / "none.parquet", table.slice(0, 0))
    assert durable.read_table(tmp_path / "none.parquet", where=("segment", 4)).num_rows == 0
