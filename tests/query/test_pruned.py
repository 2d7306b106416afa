from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actstore.errors import DamagedFile
from actstore.query import Database, Top, top
from actstore.store import CoreStore, Generation
from tests.query.random_stores import CONDITIONS, Truth, random_store
from tests.synthetic import synthetic_store


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
