from __future__ import annotations

import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from actstore import durable
from actstore.errors import BudgetExceeded, DamagedFile, QueryError, RowNotFound
from actstore.folds.histogram import bins_of
from actstore.query import MACROS, VIEWS, Activations, Database
from actstore.query.gate import admit
from actstore.query.views import Snapshot
from actstore.store import CoreStore, Generation, generations
from tests.query.stores import SEGMENT_ROWS, make_store, ranked, write_index, write_result
from tests.synthetic import synthetic_store


@pytest.fixture
def database(shared: CoreStore) -> Database:
    """The database over the shared store."""
    return Database(shared, "500MB")


def test_every_view_exists_with_its_columns_before_anything_is_behind_it(tmp_path: Path) -> None:
    """A store without commits, index and results has all views, empty where nothing is there."""
    database = Database(make_store(tmp_path / "s", commit=[]), "500MB")
    for name, view in VIEWS.items():
        answer = database.sql(f"SELECT * FROM {name}")
        assert answer.columns[: len(view.columns)] == [c.name for c in view.columns]
        assert (len(answer) > 0) == (name in {"documents", "vocabulary", "sites"})


def test_every_column_says_what_it_means(database: Database) -> None:
    """DuckDB's catalog holds a comment for each view and column."""
    rows = database.sql(
        "SELECT table_name, column_name, comment FROM duckdb_columns() WHERE NOT internal"
    ).rows()
    comments = {(table, column): comment for table, column, comment in rows}
    for name, view in VIEWS.items():
        for column in view.columns:
            assert comments[name, column.name] == column.comment


def test_describe_says_what_columns_mean(database: Database) -> None:
    """DESCRIBE and SHOW of a view give the comment of each column; of other columns they do not."""
    for query in ("DESCRIBE neurons", "DESCRIBE SELECT * FROM neurons", "SHOW neurons"):
        rows = {row["column_name"]: row["comment"] for row in database.sql(query)}
        for column in VIEWS["neurons"].columns:
            assert rows[column.name] == column.comment
    assert "comment" not in database.sql("DESCRIBE SELECT 1 AS mean FROM neurons").columns


def test_macros_give_the_columns_they_promise(database: Database) -> None:
    """The table of each macro has its documented columns."""
    calls = {
        "top_tokens": "top_tokens('mlp_post.0', 1)",
        "activations": "activations('mlp_post.0', 1)",
        "means": "means('mlp_post.0', 'source')",
    }
    assert {name for name, macro in MACROS.items() if macro.columns} == set(calls)
    for name, call in calls.items():
        rows = database.sql(f"DESCRIBE FROM {call}").rows()
        columns = MACROS[name].columns
        assert [row[0] for row in rows] == [column.name for column in columns]
        for row, column in zip(rows, columns, strict=True):
            assert column.type in (row[1], "ANY")


def test_a_query_makes_the_views_it_names(database: Database) -> None:
    """Other views are not there, unless the query asks what views there are."""
    database.sql("SELECT 1 FROM sites")
    assert database._open is not None
    made = "SELECT view_name FROM duckdb_views() WHERE NOT internal"
    assert database._open.connection.execute(made).fetchall() == [("sites",)]
    assert {name for (name,) in database.sql("SHOW TABLES").rows()} == set(VIEWS)


def test_views_equal_the_files(shared: CoreStore, database: Database) -> None:
    """Sums over tokens, exemplars and documents are those of pyarrow over the same files."""
    tokens = pq.read_table(shared.path / "tokens/00000.parquet")
    expected = [pc.sum(tokens[name]).as_py() for name in ("row_id", "token_id", "char_end")]
    sums = database.sql("SELECT sum(row_id), sum(token_id), sum(char_end) FROM tokens").rows()
    assert [int(value) for value in sums[0]] == expected
    texts = pq.read_table(shared.path / "documents/00000.parquet")["text"].to_pylist()
    assert (
        database.sql("SELECT text FROM documents ORDER BY document").to_arrow()["text"].to_pylist()
        == texts
    )
    index = shared.index()
    assert index is not None
    for site in shared.sites:
        (file,) = index.named(f"exemplars/hook={site.hook}/layer={site.layer}/")
        expected_sum = pc.sum(pq.ParquetFile(shared.path / file).read()["value"]).as_py()
        found = database.sql(
            "SELECT sum(value), any_value(hook), any_value(layer) FROM exemplars "
            "WHERE site = $site",
            site=str(site),
        ).rows()
        assert found == [(expected_sum, site.hook, site.layer)]


def test_tokens_carry_text_and_flags(shared: CoreStore, database: Database) -> None:
    """The text of a token comes from the vocabulary, its flags are booleans."""
    answer = database.sql("SELECT text, special, first, generated, space FROM tokens LIMIT 2")
    assert answer.rows()[0] == ("[CLS]", True, True, False, "")
    text = str(shared.document(0)["text"]).split()[0]
    assert answer.rows()[1] == (f" {text}", False, False, False, "")


def test_only_the_file_of_the_site_is_read(database: Database) -> None:
    """A condition on the site leaves the other sites' exemplars closed."""
    plan = repr(database.sql("EXPLAIN SELECT * FROM exemplars WHERE site = 'mlp_post.10'"))
    assert "Scanning Files: 1/3" in plan
    plan = repr(database.sql("EXPLAIN SELECT * FROM exemplars WHERE layer > 1"))
    assert "Scanning Files: 2/3" in plan


def bytes_read() -> int:
    """Return how many bytes this process has asked the system for."""
    for line in Path("/proc/self/io").read_text().splitlines():
        if line.startswith("rchar"):
            return int(line.split()[1])
    raise AssertionError


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="needs Linux's counters")
def test_only_the_columns_and_row_groups_asked_for_are_read(tmp_path: Path) -> None:
    """Through the views a query reads the bytes of its columns and of few row groups."""
    rng = np.random.default_rng(0)
    values = {f"mlp_post.{layer}": rng.normal(size=(6000, 64)) for layer in range(3)}
    store = synthetic_store(tmp_path / "s", values, segment_rows=4096)
    index_of_columns(store, 64)
    database = Database(store, "500MB")
    database.sql("SELECT * FROM exemplars, tokens, histograms LIMIT 0")  # checksums

    def cost(query: str) -> int:
        start = bytes_read()
        database.sql(query)
        return bytes_read() - start

    base = cost("SELECT 1")
    whole = cost("SELECT value, row_id FROM exemplars")
    site = cost("SELECT value, row_id FROM exemplars WHERE site = 'mlp_post.1'")
    one = cost("SELECT value, row_id FROM exemplars WHERE site = 'mlp_post.1' AND neuron = 7")
    assert one - base < (site - base) / 2 < (whole - base) / 5
    plan = repr(
        database.sql(
            "EXPLAIN ANALYZE SELECT n FROM histograms WHERE hook = 'mlp_post' AND layer = 2 "
            "AND neuron BETWEEN 7 AND 8"
        )
    )
    assert "Scanning Files: 1/3" in plan
    assert "Row Groups Scanned: 1 / 7" in plan
    file = pq.ParquetFile(store.path / "tokens/00000.parquet").metadata
    assert file.num_row_groups == 1
    columns = [file.row_group(0).column(place) for place in range(file.num_columns)]
    sizes = {column.path_in_schema: column.total_compressed_size for column in columns}
    everything = cost("SELECT * EXCLUDE (text) FROM tokens")
    two = cost("SELECT sum(position), sum(token_id) FROM tokens")
    saved = sum(sizes.values()) - sizes["position"] - sizes["token_id"]
    assert everything - two > saved / 2  # ranges near each other are read as one


def index_of_columns(store: CoreStore, width: int) -> None:
    """Publish an index with lists and histograms in small row groups."""
    files = {}
    for info in store.meta.sites:
        neurons = np.repeat(np.arange(width, dtype=np.int32), 1000)
        numbers = np.tile(np.arange(1000), width)
        tables = {
            "exemplars": {
                "side": pa.array(["top"] * len(neurons)),
                "rank": pa.array(numbers + 1, pa.int32()),
                "row_id": pa.array(np.random.default_rng(1).integers(0, 6000, len(neurons))),
                "value": np.random.default_rng(2).random(len(neurons), np.float32),
            },
            "histograms": {
                "bin": pa.array(numbers % 256, pa.int32()),
                "low": numbers.astype(np.float32),
                "high": numbers.astype(np.float32),
                "n": numbers,
            },
        }
        for kind, columns in tables.items():
            name = f"index/000000/{kind}/hook=mlp_post/layer={info.site.layer}/{kind}.parquet"
            durable.make_folder((store.path / name).parent)
            table = pa.table({"neuron": neurons, **columns})
            files[name] = durable.write_table(store.path / name, table, 10_000)
    generations.publish(store.path, Generation(0, tuple(store.committed), files))


def test_histograms_count_what_the_column_holds(small_store: CoreStore) -> None:
    """Bins, their edges and counts are those of the stored values, at every site."""
    database = Database(small_store, "500MB")
    for info in small_store.meta.sites:
        column = Activations(small_store, info.site, 5).to_arrow()["value"].to_numpy()
        rows = database.sql(
            "SELECT bin, low, high, n FROM histograms WHERE site = $site AND neuron = 5",
            site=str(info.site),
        ).rows()
        bins = bins_of(column[:, None])[:, 0]
        assert [(number, n) for number, _, _, n in rows] == [
            (number, int(np.count_nonzero(bins == number))) for number in np.unique(bins)
        ]
        for _, low, high, n in rows:
            assert np.count_nonzero((column >= low) & (column <= high)) >= n
        total = database.sql(
            "SELECT sum(h.n) = any_value(s.n) AND any_value(keep) = 1 FROM histograms h "
            "JOIN neurons s USING (site, neuron) JOIN sites USING (site) WHERE site = $site "
            "AND neuron = 5",
            site=str(info.site),
        )
        assert total.rows() == [(True,)]


def test_statistics_are_those_of_the_column(small_store: CoreStore) -> None:
    """n, mean, std, extremes, shape and the quantiles' bins are those NumPy finds."""
    database = Database(small_store, "500MB")
    x = Activations(small_store, "mlp_post.2", 9).to_arrow()["value"].to_numpy().astype(np.float64)
    (row,) = database.sql("FROM neurons WHERE site = 'mlp_post.2' AND neuron = 9")
    z = (x - x.mean()) / x.std()
    wanted = {
        "n": len(x),
        "mean": x.mean(),
        "std": x.std(),
        "min": x.min(),
        "max": x.max(),
        "share_positive": np.mean(x > 0),
        "skewness": np.mean(z**3),
        "kurtosis": np.mean(z**4) - 3,
        "energy": np.sum(x**2),
    }
    assert {name: row[name] for name in wanted} == pytest.approx(wanted, rel=1e-4)
    for percent in (1, 5, 25, 50, 75, 95, 99):
        quantile = np.quantile(x, percent / 100, method="inverted_cdf")
        assert row[f"q{percent:02d}_low"] <= quantile <= row[f"q{percent:02d}_high"]


def test_a_connection_of_ones_own(shared: CoreStore, tmp_path: Path) -> None:
    """It has the views and macros, and does what `sql` refuses."""
    connection = Database(shared, "500MB").connect()
    for name in VIEWS:
        connection.execute(f"FROM {name}").fetchall()
    assert connection.sql("FROM top_tokens('mlp_post.10', 4)").fetchall()
    assert connection.sql("SELECT snippet(5)").fetchall()[0][0]
    driven = Activations(shared, "mlp_post.10", 4)
    counted = "SELECT count(*) FROM driven JOIN tokens USING (row_id)"
    assert connection.sql(counted).fetchall() == [(len(driven),)]
    connection.execute(f"COPY (FROM sites) TO '{tmp_path}/sites.csv'")
    connection.execute("CREATE TABLE loud AS FROM neurons WHERE max > 0")
    connection.close()
    assert len((tmp_path / "sites.csv").read_text().splitlines()) == 4
    assert len(Database(shared, "500MB").sql("FROM sites")) == 3


def test_a_connection_opens_verified_files_only(shared: CoreStore, tmp_path: Path) -> None:
    """A damaged file keeps the connection from being made."""
    root = tmp_path / "copy"
    shutil.copytree(shared.path, root)
    data = bytearray((root / "tokens/00000.parquet").read_bytes())
    data[50] ^= 4
    (root / "tokens/00000.parquet").write_bytes(data)
    with pytest.raises(DamagedFile, match=r"00000\.parquet in .* has changed"):
        Database(CoreStore(root), "500MB").connect()


def test_sums_of_integers_are_integers(database: Database) -> None:
    """DuckDB adds in 128 bits; what fits into 64 is an integer everywhere, the rest is kept."""
    answer = database.sql("SELECT sum(row_id) AS s FROM tokens")
    assert answer.to_arrow().schema.field("s").type == pa.int64()
    assert answer.df()["s"].dtype == np.int64
    ((huge,),) = database.sql("SELECT sum(9223372036854775807) FROM tokens").rows()
    assert int(huge) == (2**63 - 1) * 1801


def test_layers_are_integers(database: Database) -> None:
    """Layer 10 sorts after layer 2."""
    layers = [row[0] for row in database.sql("SELECT layer FROM sites ORDER BY layer").rows()]
    assert layers == [0, 2, 10]


def test_statistics_without_a_value_are_null_and_never_win(database: Database) -> None:
    """NaN in a file is NULL in the view, so that it is neither the maximum nor beyond a bound."""
    rows = database.sql("SELECT kurtosis FROM neurons ORDER BY kurtosis DESC LIMIT 1").rows()
    assert rows == [(0.5,)]
    assert database.sql("SELECT count(*) FROM neurons WHERE kurtosis > 0.7").rows() == [(0,)]
    assert database.sql("SELECT count(*) FROM neurons WHERE kurtosis IS NULL").rows() == [(3,)]


def test_columns_a_file_brings_along_are_shown(database: Database) -> None:
    """What the index knows beyond the named columns stands after them."""
    assert database.sql("SELECT * FROM neurons LIMIT 1").columns[-1] == "novelty"
    assert database.sql("SELECT std, novelty FROM neurons LIMIT 1").rows() == [(None, 1.0)]


def test_a_store_being_captured_answers_with_what_is_committed(tmp_path: Path) -> None:
    """Tokens of planned segments that are not committed are not there."""
    store = make_store(tmp_path / "s", commit=[0, 2])
    database = Database(store, "500MB")
    found = database.sql("SELECT row_id FROM tokens ORDER BY row_id").to_arrow()["row_id"]
    expected = [
        segment * SEGMENT_ROWS + offset
        for segment, rows in store.committed_rows().items()
        for offset in range(rows)
    ]
    assert found.to_pylist() == expected
    with pytest.raises(RowNotFound, match="planned but not captured yet"):
        database.sql("SELECT snippet($row)", row=SEGMENT_ROWS)


def test_the_first_segments_alone_are_a_range(tmp_path: Path) -> None:
    """Where the committed segments have no gap the view is a range of row ids."""
    database = Database(make_store(tmp_path / "s", commit=[0]), "500MB")
    assert database.sql("SELECT max(row_id) < 512, count(*) > 400 FROM tokens").rows() == [
        (True, True)
    ]


def test_results_and_generations_appear_as_they_are_written(tmp_path: Path) -> None:
    """The next query sees a result or an index generation that was published meanwhile."""
    store = make_store(tmp_path / "s")
    database = Database(store, "500MB")
    assert len(database.sql("FROM factors")) == 0
    assert len(database.sql("FROM exemplars")) == 0
    write_result(store, "a", [(0, 0.5), (1, float("nan"))])
    assert database.sql("SELECT kind, result, factor, share FROM factors").rows() == [
        ("nmf", "a", 0, 0.5),
        ("nmf", "a", 1, None),
    ]
    write_index(store, [0], k=3)
    assert database.sql("SELECT max(rank) FROM exemplars").rows() == [(3,)]
    write_index(store, [0, 1, 2], k=5)
    generations.sweep(store.path)
    assert database.sql("SELECT max(rank) FROM exemplars").rows() == [(5,)]


def test_results_with_different_columns_share_a_view(tmp_path: Path) -> None:
    """A column that one result lacks is NULL there."""
    store = make_store(tmp_path / "s")
    write_result(store, "a", [(0, 0.5)])
    with store.new_result("pca", "b", {"sites": ["mlp_post.0"]}) as writer:
        writer.write_table("factors", pa.table({"factor": [0], "singular value": [7.0]}))
        writer.finish({"n_rows": 17, "seed": 3})
    database = Database(store, "500MB")
    answer = database.sql(
        'SELECT kind, result, share, "singular value" AS s FROM factors ORDER BY result'
    )
    assert answer.rows() == [("nmf", "a", 0.5, None), ("pca", "b", None, 7.0)]
    answer = database.sql("SELECT sites, n_rows, document->>'$.seed' FROM results WHERE kind='pca'")
    assert answer.rows() == [(["mlp_post.0"], 17, "3")]


def test_parameters_are_values_not_sql(database: Database) -> None:
    """A parameter is compared, not parsed; NumPy numbers are taken."""
    query = "SELECT count(*) FROM sites WHERE site = $name OR width = $width"
    assert database.sql(query, name="'; DROP VIEW sites --", width=np.int64(7)).rows() == [(1,)]
    with pytest.raises(QueryError, match="not provided for the following parameters: name"):
        database.sql("SELECT $name")


def test_duckdbs_own_words_reach_the_user(database: Database) -> None:
    """An error of DuckDB is a QueryError with its message, which suggests names."""
    with pytest.raises(QueryError, match=r'"wdth" not found.*(\n.*)*"width"') as caught:
        database.sql("SELECT wdth FROM sites")
    assert caught.value.__suppress_context__
    with pytest.raises(QueryError, match="Could not convert string 'x'"):
        database.sql("SELECT CAST(hook[1:0] || 'x' AS INTEGER) FROM sites")


def test_top_tokens_lists_the_strongest_rows(shared: CoreStore, database: Database) -> None:
    """The macro gives the index's list with the tokens' texts."""
    answer = database.sql("FROM top_tokens('mlp_post.10', 4, 6)")
    expected = ranked(shared, "mlp_post.10", 4, True)[:6]
    assert [(row["row_id"], row["value"]) for row in answer] == expected
    tokens = shared.tokens_of([row for row, _ in expected])["token_id"].to_pylist()
    texts = {row["token_id"]: row["text"] for row in shared.vocabulary.to_pylist()}
    assert [row["token"] for row in answer] == [texts[token] for token in tokens]
    assert len(database.sql("FROM top_tokens('mlp_post.10', 4)")) == 20


def test_top_tokens_of_an_unknown_site_says_what_there_is(database: Database) -> None:
    """A misspelt site or a neuron too many is an error, not an empty answer."""
    with pytest.raises(QueryError, match=r"'mlp_pots\.1' is not in .*mean 'mlp_post\.0'\?"):
        database.sql("FROM top_tokens('mlp_pots.1', 4)")
    with pytest.raises(QueryError, match=r"neuron = 11 is not at mlp_post\.10; .* 0 … 10\."):
        database.sql("FROM top_tokens('mlp_post.10', 11)")


def test_snippet_shows_the_source_text(shared: CoreStore, database: Database) -> None:
    """The macro gives the words around a row; NULL for NULL; a hole is an error."""
    words = str(shared.document(0)["text"]).split()
    answer = database.sql("SELECT snippet(row_id, 1, 2) FROM tokens WHERE row_id = 4")
    assert answer.rows() == [(" ".join(words[2:6]),)]
    assert database.sql("SELECT snippet(NULL)").rows() == [(None,)]
    many = database.sql("SELECT snippet(row_id) AS s FROM tokens WHERE NOT special").to_arrow()["s"]
    assert len(many) > 1400
    assert many.null_count == 0
    with pytest.raises(RowNotFound, match="is a hole"):
        database.sql("SELECT snippet(99999)")


@pytest.mark.parametrize(
    ("file", "query"),
    [
        ("documents/00000.parquet", "SELECT count(*) FROM documents"),
        ("tokens/00000.parquet", "SELECT sum(position) FROM tokens"),
        ("tokens/00000.parquet", "EXPLAIN ANALYZE WITH t AS (FROM tokens) FROM t"),
        ("tokens/00000.parquet", "SELECT snippet(5)"),
        ("vocabulary.parquet", "SELECT text FROM tokens LIMIT 1"),
        ("index/000000/neurons.parquet", "SELECT max(max) FROM neurons"),
        (
            "index/000000/exemplars/hook=mlp_post/layer=10/exemplars.parquet",
            "FROM top_tokens('mlp_post.10', 1)",
        ),
        ("results/nmf/first/factors.parquet", "SELECT * FROM factors"),
    ],
)
def test_a_flipped_bit_raises_and_never_gives_a_number(
    shared: CoreStore, tmp_path: Path, file: str, query: str
) -> None:
    """A damaged file is named by DamagedFile, and only queries that need it fail."""
    root = tmp_path / "copy"
    shutil.copytree(shared.path, root)
    data = bytearray((root / file).read_bytes())
    data[len(data) // 3] ^= 4
    (root / file).write_bytes(data)
    database = Database(CoreStore(root), "500MB")
    with pytest.raises(DamagedFile, match=f"{file.rsplit('/', 1)[-1]} in .* has changed"):
        database.sql(query)
    assert len(database.sql("SELECT * FROM sites")) == 3


def test_a_missing_file_raises(shared: CoreStore, tmp_path: Path) -> None:
    """A file that a manifest names and that is gone is named by DamagedFile."""
    root = tmp_path / "copy"
    shutil.copytree(shared.path, root)
    (root / "index/000000/neurons.parquet").unlink()
    with pytest.raises(DamagedFile, match=r"neurons\.parquet is missing"):
        Database(CoreStore(root), "500MB").sql("SELECT * FROM neurons")


def test_a_view_whose_files_were_not_verified_answers_nothing(
    shared: CoreStore, database: Database
) -> None:
    """A query that reached a view unnoticed would raise."""
    statement = replace(admit("SELECT count(*) FROM tokens"), reads_catalog=True)
    with pytest.raises(QueryError, match="files of the view tokens were not verified"):
        database._run(Snapshot.of(shared), replace(statement, names=frozenset()), {})


def test_what_does_not_fit_is_refused_with_the_budget(shared: CoreStore) -> None:
    """Neither DuckDB nor the answer goes beyond the budget."""
    database = Database(shared, "100MB")
    with pytest.raises(BudgetExceeded, match=r"answer is larger .*LIMIT, or give a larger budget="):
        database.sql("FROM range(20_000_000)")
    with pytest.raises(BudgetExceeded, match=r"query does not fit .*give a larger budget="):
        database.sql("SELECT list(range) FROM range(30_000_000)")
    assert database.sql("SELECT 7").rows() == [(7,)]


def test_spaces_are_kept_apart(tmp_path: Path) -> None:
    """In a model with two spaces a row of one is not a row of the other."""
    rng = np.random.default_rng(3)
    values = {
        "encoder.mlp_post.0": rng.normal(size=(150, 5)),
        "decoder.mlp_post.1": rng.normal(size=(150, 3)),
    }
    store = synthetic_store(tmp_path / "s", values, segment_rows=128, chunk_rows=64)
    write_index(store, store.committed)
    database = Database(store, "500MB")
    assert database.sql("SELECT space, count(*) FROM tokens GROUP BY 1 ORDER BY 1").rows() == [
        ("decoder", 150),
        ("encoder", 150),
    ]
    answer = database.sql("SELECT DISTINCT site, space, hook, layer FROM exemplars ORDER BY site")
    assert answer.rows() == [
        ("decoder.mlp_post.1", "decoder", "mlp_post", 1),
        ("encoder.mlp_post.0", "encoder", "mlp_post", 0),
    ]
    rows = database.sql("SELECT snippet(row_id, 0, 0, 'decoder') FROM tokens WHERE row_id=1").rows()
    assert rows[0] == (str(store.document(0)["text"]).split()[0],)


def test_threads_may_ask_at_once(database: Database) -> None:
    """Queries over different views from several threads answer as one after the other."""
    queries = [f"SELECT count(*) FROM {name}" for name in VIEWS]
    expected = [database.sql(query).rows() for query in queries]
    fresh = Database(database._store, "500MB")
    with ThreadPoolExecutor(4) as pool:
        assert [answer.rows() for answer in pool.map(fresh.sql, queries)] == expected


def test_nothing_is_said_when_python_ends(shared: CoreStore) -> None:
    """A script that used `snippet` ends with nothing on stderr."""
    code = (
        "import sys; from actstore.store import CoreStore; from actstore.query import Database\n"
        "database = Database(CoreStore(sys.argv[1]), '200MB')\n"
        "print(database.sql('SELECT snippet(1)'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(shared.path)], capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    assert "snippet(1)" in done.stdout
