"""Results: written whole or not at all, reopened, never overwritten."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from actstore import durable
from actstore.errors import (
    ArgumentError,
    DamagedFile,
    NotEnoughDisk,
    ResultExists,
    ResultNotFound,
    StoreBusy,
)
from actstore.store import CoreStore, Result, ResultWriter
from tests.synthetic import synthetic_store


@pytest.fixture
def store(tmp_path: Path) -> CoreStore:
    """Return a small store of two segments."""
    values = {"mlp_post.0": np.arange(300, dtype=np.float32).reshape(100, 3)}
    return synthetic_store(tmp_path / "store", values, segment_rows=64, chunk_rows=16)


def write(store: CoreStore, name: str | None = None, kind: str = "nmf") -> Result:
    """Write a result with a table, a matrix and scores at every row."""
    with store.new_result(kind, name, {"seed": 7}) as writer:
        writer.write_table("factors", pa.table({"factor": [0, 1]}))
        writer.write_array("loadings", np.arange(6, dtype=np.float32).reshape(2, 3))
        scores = writer.rows_array("scores", 2, "float32", store.meta.segment_rows)
        for segment in sorted(store.committed, reverse=True):
            scores.write(segment, scores_of(store, segment))
        writer.add_rows_array("scores", scores, len(store.planned))
        return writer.finish({"error": 0.25})


def scores_of(store: CoreStore, segment: int) -> np.ndarray:
    """Return the scores that `write` gives a segment."""
    rows = store.planned[segment].rows[""]
    return np.arange(2 * rows, dtype=np.float32).reshape(rows, 2) + 1000 * segment


def test_a_result_reopens_as_it_was_written(store: CoreStore) -> None:
    """Tables, matrices, scores, provenance: all there in another process."""
    write(store)
    again = CoreStore(store.path)
    found = again.result("nmf")
    assert (found.kind, found.name) == ("nmf", "nmf-1")
    assert found.table("factors").to_pydict() == {"factor": [0, 1]}
    assert found.array("loadings", 2).tolist() == [[0, 1, 2], [3, 4, 5]]
    for segment in again.committed:
        scores = again.read_scores(found, "scores", segment)
        assert np.array_equal(scores, scores_of(store, segment))
    assert found.document["seed"] == 7
    assert found.document["error"] == 0.25
    assert found.document["store_id"] == store.meta.store_id
    assert found.document["committed"] == len(store.committed)


def test_names_are_given_and_never_taken_twice(store: CoreStore) -> None:
    """Without a name results are numbered; a name that is taken stands."""
    assert [write(store).name for _ in range(2)] == ["nmf-1", "nmf-2"]
    assert write(store, "mine").name == "mine"
    assert write(store, "mine", kind="similarity").name == "mine"
    with pytest.raises(ResultExists, match=r"nmf result 'mine' exists in .* Choose another name"):
        write(store, "mine")
    with pytest.raises(FileExistsError):
        write(store, "mine")
    assert [r.name for r in store.results("nmf")] == ["nmf-1", "nmf-2", "mine"]
    assert {r.kind for r in store.results()} == {"nmf", "similarity"}
    assert store.result("nmf").name == "mine", "the newest"
    assert store.result("nmf", "nmf-1").name == "nmf-1"


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "a b", "x" * 101, "-x", "a\n", 5])
def test_names_are_plain_words(name: Any, store: CoreStore) -> None:
    """What could be another path is no name."""
    with pytest.raises(ArgumentError, match=r"cannot name a result; expected a letter or digit"):
        write(store, name)
    write(store, "mine")
    with pytest.raises(ResultNotFound, match=r"has no nmf result .*; it has mine\."):
        store.result("nmf", name)


def test_results_without_a_name_do_not_meet(store: CoreStore) -> None:
    """Writers made before either began get names of their own."""
    writers = [store.new_result("nmf", None, {}) for _ in range(2)]
    with writers[0] as first, writers[1] as second:
        assert [first.finish({}).name, second.finish({}).name] == ["nmf-1", "nmf-2"]


def test_a_full_disk_is_named_and_nothing_is_left(
    store: CoreStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error says what could not be written; its name is free again."""

    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(durable, "sync_file", full)
        with pytest.raises(NotEnoughDisk, match=r"results/nmf/mine cannot be .* Free some and do"):
            write(store, "mine")
    assert list((store.path / "results/nmf").iterdir()) == []
    assert write(store, "mine").name == "mine"


def test_a_failure_leaves_nothing(store: CoreStore) -> None:
    """An error inside the block, or no finish, takes everything back."""
    with pytest.raises(AttributeError), store.new_result("nmf", "broken", {}) as writer:
        writer.write_table("factors", None)
    with store.new_result("nmf", "unfinished", {}) as writer:
        writer.write_table("factors", pa.table({"factor": [0]}))
    assert store.results() == []
    assert list((store.path / "results/nmf").iterdir()) == []


def test_a_crash_leaves_nothing_that_counts(store: CoreStore) -> None:
    """What a killed process left is no result, does not take the name, and is swept with it."""
    killed = store.new_result("nmf", None, {}).__enter__()
    killed.write_table("factors", pa.table({"factor": [0]}))
    left = [p.name for p in (store.path / "results/nmf").iterdir()]
    assert len(left) == 1
    assert CoreStore(store.path).results() == []
    killed._folder.rename(killed._folder.with_name(".mine"))
    assert write(store, "mine").table("factors").num_rows == 2
    assert not killed._folder.with_name(".mine").exists()


def test_the_name_may_be_taken_meanwhile(store: CoreStore) -> None:
    """Two that write one name: the second waits for nobody, and learns of it before its work."""
    late, busy = (ResultWriter(store.path, "nmf", "mine", {}) for _ in range(2))
    with store.new_result("nmf", "mine", {}), pytest.raises(StoreBusy, match="nmf result 'mine'"):
        busy.__enter__()
    write(store, "mine")
    with pytest.raises(ResultExists, match=r"nmf result 'mine' exists in .* another name"):
        late.__enter__()
    assert store.result("nmf", "mine").table("factors").num_rows == 2


def test_a_missing_result_is_named_with_what_there_is(store: CoreStore) -> None:
    """The message lists the names, the nearest one, and the command that makes one."""
    with pytest.raises(
        ResultNotFound, match=r"has no nmf result yet\. Compute one with `actstore nmf"
    ):
        store.result("nmf")
    write(store, "speech")
    with pytest.raises(ResultNotFound, match=r"result 'speach'; it has .* Did you mean 'speech'\?"):
        store.result("nmf", "speach")
    with pytest.raises(KeyError):
        store.result("similarity")


@pytest.mark.parametrize(
    "name", ["result.json", "factors.parquet", "loadings/c/0/0", "loadings/zarr.json",
             "scores/c/1/0", "scores/zarr.json"],
)  # fmt: skip
def test_damage_is_found_on_use(name: str, store: CoreStore) -> None:
    """A changed or missing byte of any file of a result raises and names the file."""
    path = write(store).path / name
    data = path.read_bytes()

    def use() -> None:
        found = CoreStore(store.path).result("nmf", "nmf-1")
        found.table("factors")
        found.array("loadings", 2)
        for segment in store.committed:
            store_again = CoreStore(store.path)
            store_again.read_scores(found, "scores", segment)

    use()
    for place in {0, len(data) // 3, len(data) - 2}:
        changed = bytearray(data)
        changed[place] ^= 1
        path.write_bytes(changed)
        with pytest.raises(DamagedFile):
            use()
    path.write_bytes(data[:-3])
    with pytest.raises(
        DamagedFile, match=name if "/c/" in name else f"Delete {path.parents[name.count('/')]}, and"
    ):
        use()
    path.unlink()
    with pytest.raises((DamagedFile, ResultNotFound)):
        use()
