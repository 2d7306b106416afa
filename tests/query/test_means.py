from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from actstore.errors import ArgumentError, BudgetExceeded, QueryError, SiteNotFound
from actstore.query import Database, means
from actstore.store import FIRST, SPECIAL, CoreStore
from tests.query.stores import make_store
from tests.synthetic import synthetic_store

SITE = "mlp_post.10"


@pytest.fixture
def database(shared: CoreStore) -> Database:
    """The database over the shared store."""
    return Database(shared, "500MB")


def by_hand(store: CoreStore, key: Any, site: str = SITE) -> dict[tuple[Any, int], tuple[Any, Any]]:
    """Return n and mean by key and neuron, in plain NumPy; `key` is of a token's dict."""
    space = store.site(site).site.space
    rows: dict[Any, list[Any]] = {}
    for row_id, values in zip(store[site].row_ids(), store[site][:], strict=True):
        token = store.tokens_of([row_id], space).to_pylist()[0]
        if not token["flags"] & (SPECIAL | FIRST):
            rows.setdefault(key(token), []).append(values.astype(np.float64))
    found = {}
    for value, blocks in rows.items():
        block = np.array(blocks)
        for neuron in range(block.shape[1]):
            column = block[:, neuron][~np.isnan(block[:, neuron])]
            mean = column.mean() if len(column) else None
            found[value, neuron] = (len(column), None if mean is None else pytest.approx(mean))
    return found


def table(answer: Any) -> dict[tuple[Any, int], tuple[Any, Any]]:
    """Return an answer of `means` by key and neuron."""
    return {(key, neuron): (n, mean) for key, neuron, n, mean in answer.rows()}


@pytest.mark.parametrize(
    ("key", "of_token"),
    [
        ("source", lambda token: f"document-{token['document']}.txt"),
        ("document", lambda token: token["document"]),
        ("position % 3 = 0", lambda token: token["position"] % 3 == 0),
        ("nullif(position % 3, 0)", lambda token: token["position"] % 3 or None),
        ("row_id", lambda token: token["row_id"]),
        ("'all'", lambda token: "all"),
    ],
)
def test_means_are_those_of_numpy(
    shared: CoreStore, database: Database, key: str, of_token: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For keys of any type, NULL too, n and mean leave NaN out, over blocks and stretches."""
    monkeypatch.setattr(means, "_STRETCH_ROWS", 1024)
    monkeypatch.setattr(means, "_BLOCK_BYTES", 1)
    found = table(database.sql(f"FROM means('{SITE}', $key)", key=key))
    assert found == by_hand(shared, of_token)


def test_neurons_that_differ_most_between_two_sources(
    shared: CoreStore, database: Database
) -> None:
    """One query compares the groups."""
    hand = by_hand(shared, lambda token: token["document"])
    differences = {
        neuron: abs(hand[3, neuron][1].expected - hand[7, neuron][1].expected)
        for neuron in range(11)
    }
    answer = database.sql(
        f"WITH m AS (FROM means('{SITE}', 'document')) SELECT a.neuron FROM m a JOIN m b "
        "USING (neuron) WHERE a.key = 3 AND b.key = 7 ORDER BY abs(a.mean - b.mean) DESC"
    )
    assert [neuron for (neuron,) in answer.rows()] == sorted(
        differences, key=lambda neuron: -differences[neuron]
    )


def test_a_query_that_cannot_run_makes_no_pass(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A misspelt column is found, and a plan is shown, before the values are read."""

    def never(*_: Any) -> None:
        raise AssertionError("values were read")

    monkeypatch.setattr(CoreStore, "read", never)
    with pytest.raises(QueryError, match='"maen" not found'):
        database.sql(f"SELECT maen FROM means('{SITE}', 'source')")
    assert "mean" in repr(database.sql(f"EXPLAIN SELECT mean FROM means('{SITE}', 'source')"))
    with pytest.raises(AssertionError):
        database.sql(f"EXPLAIN ANALYZE SELECT mean FROM means('{SITE}', 'source')")


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("documnt", r'"documnt" not found.*(\n.*)*documents\.document'),
        ("document, position", "is 2 columns; expected one expression"),
        ("1), (2", "syntax error"),
        ("1) AS key FROM tokens --", "syntax error"),
        ("[position]", "has values of the type list.*cannot be told apart"),
        ("(SELECT content FROM read_text('/etc/passwd'))", "'read_text' is not open"),
        ("getenv('HOME')", "getenv"),
        ("row_id; DROP VIEW tokens", "statements; expected one|syntax error"),
    ],
)
def test_a_key_is_one_expression_that_only_reads(
    database: Database, key: str, message: str
) -> None:
    """What the gate would refuse in a query it refuses in a key."""
    with pytest.raises(QueryError, match=message):
        database.sql(f"FROM means('{SITE}', $key)", key=key)


def test_a_sample_is_refused_unless_asked_for(tmp_path: Path) -> None:
    """Means over all rows need all rows; those over the stored rows must be called so."""
    keep = {"mlp_post.0": 0.0, "mlp_post.10": 1 / 8, "resid_post.2": 1.0}
    store = make_store(tmp_path / "s", keep=keep)
    database = Database(store, "500MB")
    with pytest.raises(ArgumentError, match=r"\(keep = '1/8'\).*rows := 'stored'"):
        database.sql("FROM means('mlp_post.10', 'document')")
    found = table(database.sql("FROM means('mlp_post.10', 'document', rows := 'stored')"))
    hand = by_hand(store, lambda token: token["document"])
    assert {place: found[place] for place in hand} == hand
    assert all(n == 0 and mean is None for place, (n, mean) in found.items() if place not in hand)
    with pytest.raises(ArgumentError, match=r"no rows of mlp_post\.0 .*`neurons` has the means"):
        database.sql("FROM means('mlp_post.0', 'document', rows := 'stored')")


def test_wrong_arguments_are_refused(shared: CoreStore, database: Database) -> None:
    """Site, rows and the number of groups are checked."""
    with pytest.raises(SiteNotFound, match=r"Did you mean 'mlp_post\.10'"):
        database.sql("FROM means('mlp_pots.10', 'source')")
    with pytest.raises(
        ArgumentError, match="rows = 'all' of means; expected 'content' or 'stored'"
    ):
        database.sql(f"FROM means('{SITE}', 'source', rows := 'all')")
    with pytest.raises(BudgetExceeded, match=r"1,746 groups of key = 'row_id' .*fewer\s+values"):
        means.Means(
            shared,
            lambda query: database.sql(query).to_arrow(),
            SITE,
            "row_id",
            "content",
            1_000_000,
        )


def test_two_spaces(tmp_path: Path) -> None:
    """The rows of a site are those of its space."""
    rng = np.random.default_rng(3)
    values = {
        "encoder.mlp_post.0": rng.normal(size=(150, 5)),
        "decoder.mlp_post.1": rng.normal(size=(150, 3)),
    }
    store = synthetic_store(tmp_path / "s", values, segment_rows=128, chunk_rows=64)
    found = table(Database(store, "200MB").sql("FROM means('decoder.mlp_post.1', 'document')"))
    assert found == by_hand(store, lambda token: token["document"], "decoder.mlp_post.1")


def test_first_rows_are_left_out(tmp_path: Path) -> None:
    """Where the first row of a window is a word it is still no content row."""
    values = {SITE: np.random.default_rng(4).normal(size=(150, 3))}
    store = synthetic_store(
        tmp_path / "s", values, special=False, segment_rows=128, chunk_rows=64, context=30
    )
    found = table(Database(store, "200MB").sql(f"FROM means('{SITE}', 'document')"))
    assert found == by_hand(store, lambda token: token["document"])


def test_text_of_any_kind_is_a_key(database: Database) -> None:
    """Quotes and brackets in a key stay inside it."""
    key = """'a "quoted" ''name'', ' || document"""
    answer = database.sql(f"SELECT DISTINCT key FROM means('{SITE}', $key)", key=key)
    assert ("a \"quoted\" 'name', 3",) in answer.rows()
    assert pa.types.is_string(answer.to_arrow()["key"].type)
