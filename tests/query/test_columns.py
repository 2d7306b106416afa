from __future__ import annotations

import itertools
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pytest

from actstore.errors import ArgumentError, DamagedFile, NeuronNotFound, RowNotFound, SiteNotFound
from actstore.query import Activations, Database
from actstore.store import FIRST, SPECIAL, CoreStore
from tests.query.stores import make_store
from tests.synthetic import synthetic_store

SITE = "mlp_post.10"


def pairs(table: pa.Table) -> list[tuple[int, float | None]]:
    """Return row ids and values as tuples."""
    return list(zip(table["row_id"].to_pylist(), table["value"].to_pylist(), strict=True))


def expected(
    store: CoreStore, neuron: int, all_rows: bool = False
) -> list[tuple[int, float | None]]:
    """Return the rows of a neuron with their values, by reading whole rows."""
    found = []
    for row_id, row in zip(store[SITE].row_ids(), store[SITE][:], strict=True):
        flags = store.tokens_of([row_id])["flags"][0].as_py()
        if all_rows or not flags & (SPECIAL | FIRST):
            value = float(row[neuron])
            found.append((int(row_id), None if np.isnan(value) else value))
    return found


def test_a_column_is_what_its_rows_hold(shared: CoreStore) -> None:
    """Row ids and values of content rows are those of reading rows; NaN is NULL."""
    column = Activations(shared, SITE, 4)
    wanted = expected(shared, 4)
    assert pairs(column.to_arrow()) == wanted
    assert None in [value for _, value in wanted]
    assert len(column) == len(wanted)
    assert column.to_arrow().schema == Activations.schema
    assert column.df()["value"].isna().sum() == sum(value is None for _, value in wanted)
    assert repr(column) == f"<mlp_post.10, neuron 4: {len(wanted):,} rows (content)>"


def test_a_column_is_an_arrow_stream_that_opens_again(shared: CoreStore) -> None:
    """Any reader of Arrow streams takes it, more than once, a segment at a time."""
    stored = Activations(shared, SITE, 4)
    reader = pa.RecordBatchReader.from_stream(stored)
    batches = list(reader)
    assert len(batches) == len(shared.committed)
    assert pa.table(stored) == pa.Table.from_batches(batches) == stored.to_arrow()
    total = duckdb.sql("SELECT sum(a.value + b.value) FROM stored a JOIN stored b USING (row_id)")
    values = [value for _, value in expected(shared, 4) if value is not None]
    assert total.fetchall() == [(2 * sum(values),)]


def test_nothing_is_read_before_somebody_asks(
    shared: CoreStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader that stops after the first batch has read one segment."""
    seen: list[int] = []
    read = CoreStore.read_column

    def counted(self: CoreStore, info: object, segment: int, neuron: int) -> object:
        seen.append(segment)
        return read(self, info, segment, neuron)  # type: ignore[arg-type]

    monkeypatch.setattr(CoreStore, "read_column", counted)
    column = Activations(shared, SITE, 4)
    stream = pa.RecordBatchReader.from_stream(column)
    assert seen == []
    stream.read_next_batch()
    assert seen == [0]
    Database(shared, "200MB").sql(f"SELECT value FROM activations('{SITE}', 4) LIMIT 3")
    assert set(seen) == {0}


def test_sql_joins_a_column_to_tokens(shared: CoreStore) -> None:
    """The mean by token text is that of Python over the same rows."""
    texts = {row["token_id"]: row["text"] for row in shared.vocabulary.to_pylist()}
    groups: dict[str, list[float]] = {}
    for row_id, value in expected(shared, 4):
        if value is not None:
            token = shared.tokens_of([row_id])["token_id"][0].as_py()
            groups.setdefault(texts[token], []).append(value)
    answer = Database(shared, "500MB").sql(
        f"SELECT text, avg(value), count(value) FROM activations('{SITE}', 4) "
        "JOIN tokens USING (row_id) GROUP BY text"
    )
    assert {text: (mean, n) for text, mean, n in answer.rows()} == {
        text: (pytest.approx(np.mean(values)), len(values)) for text, values in groups.items()
    }


@pytest.mark.parametrize(
    "call",
    [
        "activations('mlp_post.10', 4, rows := 'all')",
        "activations('mlp_post.10', 4, 'all')",
        "activations(neuron := 4, site := 'mlp_post.10', rows := 'all')",
        "activations($site, $neuron, rows := $rows)",
        "ACTIVATIONS('blocks.10.mlp.hook_post', 4, rows => 'all')",
    ],
)
def test_a_call_takes_constants_and_parameters(shared: CoreStore, call: str) -> None:
    """Arguments come in order, by name, or as parameters; sites by any of their names."""
    given = {"site": SITE, "neuron": np.int64(4), "rows": "all"} if "$" in call else {}
    answer = Database(shared, "500MB").sql(f"FROM {call} ORDER BY row_id", **given)
    assert pairs(answer.to_arrow()) == expected(shared, 4, all_rows=True)


def test_several_columns_in_one_query(shared: CoreStore) -> None:
    """Columns of one query are told apart, and one that stands there twice is read twice."""
    wanted = [dict(expected(shared, neuron)) for neuron in (4, 5)]
    both = [(a, b) for a, b in zip(*(w.values() for w in wanted), strict=True)]
    total = sum(a * b for a, b in both if a is not None and b is not None)
    answer = Database(shared, "500MB").sql(
        f"SELECT sum(a.value * b.value), count(*) FROM activations('{SITE}', 4) a "
        f"JOIN activations('{SITE}', 5) b USING (row_id) JOIN activations('{SITE}', 4) c "
        "USING (row_id)"
    )
    assert answer.rows() == [(total, len(both))]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        ("activations('mlp_pots.10', 4)", SiteNotFound, r"Did you mean 'mlp_post\.10'"),
        ("activations('mlp_post.10', 11)", NeuronNotFound, r"neuron = 11 .* neurons 0 … 10\."),
        ("activations('mlp_post.10', -1)", NeuronNotFound, "neuron = -1"),
        ("activations('mlp_post', 1)", SiteNotFound, "stands for 2 sites"),
        ("activations('mlp_post.10', '4')", ArgumentError, "neuron = '4' .*; expected a whole"),
        ("activations(10, 4)", ArgumentError, "site = 10 of activations; expected a text"),
        ("activations('mlp_post.10', 4, rows := 'best')", ArgumentError, "'content' or 'all'"),
    ],
)
def test_what_is_not_there_is_said_before_the_query_runs(
    shared: CoreStore, call: str, error: type[Exception], message: str
) -> None:
    """Unknown sites, neurons and rules are named with what there is."""
    with pytest.raises(error, match=message):
        Database(shared, "200MB").sql(f"FROM {call}")


def test_a_sample_gives_the_rows_that_are_stored(tmp_path: Path) -> None:
    """Of a site that keeps a part the column holds that part and says so; of none it is refused."""
    keep = {"mlp_post.0": 0.0, "mlp_post.10": 1 / 8, "resid_post.2": 1.0}
    store = make_store(tmp_path / "s", keep=keep)
    column = Activations(store, SITE, 2)
    assert pairs(column.to_arrow()) == expected(store, 2)
    assert len(column) == len(store[SITE].row_ids())
    assert "1/8 of the content rows stored" in repr(column)
    with pytest.raises(RowNotFound, match=r"no rows of mlp_post\.0 are stored .*store\.replay"):
        Database(store, "200MB").sql("FROM activations('mlp_post.0', 2)")


def test_bfloat16_and_two_spaces(tmp_path: Path) -> None:
    """Any stored dtype comes as float32; a site of a space has the rows of its space."""
    rng = np.random.default_rng(3)
    values = {
        "encoder.mlp_post.0": rng.normal(size=(150, 5)),
        "decoder.mlp_post.1": rng.normal(size=(150, 3)),
    }
    store = synthetic_store(
        tmp_path / "s", values, dtype="bfloat16", segment_rows=128, chunk_rows=64
    )
    table = Activations(store, "decoder.mlp_post.1", 2).to_arrow()
    stored = store["decoder.mlp_post.1"][table["row_id"].to_numpy()]
    assert table["value"].to_pylist() == stored[:, 2].astype(np.float32).tolist()
    answer = Database(store, "200MB").sql(
        "SELECT count(*) FROM activations('decoder.mlp_post.1', 2) "
        "JOIN (FROM tokens WHERE space = 'decoder') USING (row_id)"
    )
    assert answer.rows() == [(len(table),)]


def test_damage_is_named_though_duckdb_reads(shared: CoreStore, tmp_path: Path) -> None:
    """A damaged chunk that is found while DuckDB reads raises as everywhere."""
    root = tmp_path / "copy"
    shutil.copytree(shared.path, root)
    file = root / "activations/mlp_post/10/c/2/0"
    data = bytearray(file.read_bytes())
    data[100] ^= 1
    file.write_bytes(data)
    database = Database(CoreStore(root), "200MB")
    with pytest.raises(DamagedFile, match=r"c/2/0 of .* is damaged"):
        database.sql(f"SELECT sum(value) FROM activations('{SITE}', 4)")
    assert len(database.sql(f"FROM activations('{SITE}', 4) LIMIT 5")) == 5


def test_columns_of_one_database_do_not_meet(shared: CoreStore) -> None:
    """A later query with another column of the same shape gets its own."""
    database = Database(shared, "500MB")
    for neuron, _ in itertools.product((4, 5), range(2)):
        values = [value for _, value in expected(shared, neuron) if value is not None]
        found = database.sql(f"SELECT sum(value) FROM activations('{SITE}', {neuron})").rows()
        assert found == [(sum(values),)]


def test_threads_may_ask_for_columns_at_once(shared: CoreStore) -> None:
    """Columns and means of queries that run at the same time do not meet."""
    database = Database(shared, "500MB")
    queries = [f"SELECT sum(value) FROM activations('{SITE}', {neuron})" for neuron in range(11)]
    queries += [f"SELECT sum(mean) FROM means('{SITE}', '{key}')" for key in ("source", "position")]
    wanted = [database.sql(query).rows() for query in queries]
    fresh = Database(shared, "500MB")
    with ThreadPoolExecutor(4) as pool:
        found = [answer.rows() for answer in pool.map(fresh.sql, queries)]
    assert np.array(found).ravel() == pytest.approx(np.array(wanted).ravel())
