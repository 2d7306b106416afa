from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import actstore
from actstore.errors import DamagedFile
from actstore.query import Database, Top, top
from actstore.store import CoreStore, Generation
from tests.captured import content, small_segments
from tests.query.random_stores import (
    CONDITIONS,
    Truth,
    random_store,
    truth_of,
    write_whole_index,
)
from tests.synthetic import synthetic_store
from tests.toys import TEXT, toy_model


class WithoutLists(CoreStore):
    """A store whose index has zones and no lists."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.index_tables.ranked = lambda *_: None  # type: ignore[method-assign]


class WithoutIndex(CoreStore):
    """A store without an index."""

    def index(self) -> Generation | None:
        """Return no generation."""
        return None


def pairs(answer: Top) -> list[tuple[int, float]]:
    """Return an answer as (row_id, value)."""
    table = answer.to_arrow()
    return list(zip(table["row_id"].to_pylist(), table["value"].to_pylist(), strict=True))


def random_question(rng: np.random.Generator, store: CoreStore) -> dict[str, Any]:
    """Return the arguments of a question."""
    info = store.meta.sites[rng.integers(2)]
    ks = [1, 4, 5, 6, 20, 21, 50, 10**6]
    return {
        "site": str(info.site),
        "neuron": int(rng.integers(info.width)),
        "k": int(rng.choice(ks, p=[0.1, 0.1, 0.15, 0.15, 0.2, 0.2, 0.09, 0.01])),
        "largest": bool(rng.integers(2)),
        "where": str(rng.choice(list(CONDITIONS))) if rng.random() < 0.2 else None,
        "distinct": [None, None, "window", "document"][rng.integers(4)],
    }


@pytest.mark.parametrize("n_threads", [1, 2, 4])
def test_every_way_gives_the_rows_of_numpy(tmp_path: Path, n_threads: int) -> None:
    """Of 500 questions index, pruned scan and whole scan give the same rows in the same order."""
    rng = np.random.default_rng(n_threads)
    reached: set[str] = set()
    for number in range(14):
        store, truth = random_store(tmp_path / str(number), rng)
        stores = [store, WithoutLists(store.path), WithoutIndex(store.path)]
        database = Database(store, "200MB")
        questions = [random_question(rng, store) for _ in range(12)]

        def ask(
            question: dict[str, Any],
            truth: Truth = truth,
            ways: Any = tuple(stores),
            database: Database = database,
        ) -> None:
            expected = truth.top(**question)
            for way in ways:
                answer = top(way, **question, before=0, after=0, database=database)
                assert pairs(answer) == expected, (answer.reached, question)
                reached.add(answer.reached.split(":")[0].split(" + ")[0].split(";")[0])

        with ThreadPoolExecutor(n_threads) as pool:
            list(pool.map(ask, questions))
    assert reached == {"index", "pruned scan", "column scan"}


def level_store(path: Path) -> CoreStore:
    """Return a store of 15 bands whose levels differ, with a whole index of lists of 20."""
    rng = np.random.default_rng(3)
    values = rng.normal(size=(1920, 2)) + np.repeat(rng.permutation(15) * 9.0, 128)[:, None]
    options: dict[str, Any] = {"segment_rows": 512, "chunk_rows": 128, "context": 128}
    store = synthetic_store(path, {"mlp_post.0": values}, documents=[128] * 15, **options)
    write_whole_index(store, truth_of(store), store.committed, 20)
    return store


def test_a_pruned_scan_says_what_it_read_and_reads_no_more(tmp_path: Path) -> None:
    """Chunks that cannot matter are not opened: damage in them is not met, in others it is."""
    store = level_store(tmp_path / "s")
    truth = truth_of(store)
    answer = top(store, "mlp_post.0", 1, 200)
    assert pairs(answer) == truth.top("mlp_post.0", 1, 200, True)
    assert answer.reached == "pruned scan: 8 of 15 chunks read"
    info = store.site("mlp_post.0")
    band_of_best = answer.to_arrow()["row_id"][0].as_py() // 128
    band_of_worst = truth.top("mlp_post.0", 1, 1, False)[0][0] // 128
    for band, is_read in ((band_of_worst, False), (band_of_best, True)):
        file = store.path / info.path / f"c/{band // 4}/0"
        data = bytearray(file.read_bytes())
        data[(band % 4) * store.layout(info).band_bytes + 5] ^= 1
        file.write_bytes(data)
        fresh = CoreStore(store.path)
        if is_read:
            with pytest.raises(DamagedFile, match=r"chunk \(\d, 0\) of .* is damaged"):
                top(fresh, "mlp_post.0", 1, 200)
        else:
            assert pairs(top(fresh, "mlp_post.0", 1, 200)) == pairs(answer)


def test_zones_are_verified_before_they_prune(tmp_path: Path) -> None:
    """A flipped bit in the zones is found; it would hide rows."""
    store = level_store(tmp_path / "s")
    file = store.path / "index/000000/zones/hook=mlp_post/layer=0/zones.npy"
    data = bytearray(file.read_bytes())
    data[-3] ^= 64
    file.write_bytes(data)
    with pytest.raises(DamagedFile, match=r"zones\.npy in .* has changed"):
        top(CoreStore(store.path), "mlp_post.0", 1, 200)


def test_bands_without_a_row_of_the_condition_are_left_out(tmp_path: Path) -> None:
    """A condition on one document reads the chunk it lies in."""
    store = level_store(tmp_path / "s")
    answer = top(store, "mlp_post.0", 0, 50, where="document = 5")
    assert answer.reached == "pruned scan: 1 of 15 chunks read; 127 content rows meet the condition"
    assert set(answer.to_arrow()["document"].to_pylist()) == {5}


def test_a_condition_that_the_list_can_answer_reads_no_column(tmp_path: Path) -> None:
    """The first rows of the list that meet it are the first of all that do."""
    store = level_store(tmp_path / "s")
    best = truth_of(store).top("mlp_post.0", 0, 20, True)
    wanted = f"row_id % 2 = {best[3][0] % 2}"
    expected = [pair for pair in best if pair[0] % 2 == best[3][0] % 2]
    answer = top(store, "mlp_post.0", 0, len(expected), where=wanted)
    assert (answer.reached, pairs(answer)) == ("index", expected)


def test_the_list_of_windows_answers_for_windows_and_documents(tmp_path: Path) -> None:
    """One row a window or document comes from the index alone."""
    store = level_store(tmp_path / "s")
    truth = truth_of(store)
    for distinct in ("window", "document"):
        answer = top(store, "mlp_post.0", 0, 15, distinct=distinct)
        assert answer.reached == "index"
        assert pairs(answer) == truth.top("mlp_post.0", 0, 15, True, distinct=distinct)
    answer = top(store, "mlp_post.0", 0, 99, distinct="document")
    assert answer.reached == "index; k = 99, and there are 15 documents with such a row"


def test_a_real_capture_has_zones_that_prune(tmp_path: Path) -> None:
    """Over an index that a capture made, every k gives the rows of NumPy."""
    module, tokenizer = toy_model("gpt2")
    texts = [TEXT[i * 60 : i * 60 + 900] for i in range(6)]
    with small_segments(64, 16):
        store = actstore.capture(
            module, text=texts, store=tmp_path / "s", tokenizer=tokenizer, context=24
        )
    (rows, values), (info,) = content(store, "mlp_post.1"), store.select("mlp_post.1")
    reached = set()
    for neuron in range(0, info.width, 5):
        for k, largest in ((3, True), (101, True), (130, False)):
            column = values[:, neuron].astype(np.float64) + 0.0
            order = np.lexsort((rows, -column if largest else column))[:k]
            answer = store.top("mlp_post.1", neuron, k, largest=largest)
            assert answer.to_arrow()["row_id"].to_pylist() == rows[order].tolist()
            assert answer.to_arrow()["value"].to_pylist() == column[order].tolist()
            reached.add(answer.reached.split(":")[0])
    assert {"index", "pruned scan"} <= reached
