from __future__ import annotations

from pathlib import Path

import duckdb
import pytest

from actstore.errors import QueryError
from actstore.query import Database
from actstore.query.gate import admit
from actstore.store import CoreStore

ATTACKS = [
    "COPY (SELECT 1) TO '{out}'",
    "COPY tokens TO '{out}' (FORMAT parquet)",
    "SELECT * FROM '/etc/passwd'",
    "SELECT * FROM read_text('/etc/passwd')",
    "SELECT * FROM read_blob('/etc/passwd')",
    "SELECT * FROM read_csv('/etc/passwd')",
    "FROM sniff_csv('/etc/passwd')",
    "SELECT * FROM read_parquet('{store}/tokens/00000.parquet')",
    "SELECT * FROM '{store}/tokens/00000.parquet'",
    "SELECT * FROM parquet_metadata('{store}/tokens/00000.parquet')",
    "SELECT * FROM glob('/etc/*')",
    "SELECT (SELECT content FROM read_text('/etc/passwd'))",
    "WITH t AS (FROM read_text('/etc/passwd')) SELECT * FROM t",
    "SELECT * FROM sites WHERE site IN (SELECT content FROM read_text('/etc/passwd'))",
    "SELECT * FROM sites, LATERAL (FROM read_text('/etc/passwd'))",
    "EXPLAIN ANALYZE SELECT * FROM read_text('/etc/passwd')",
    "EXPLAIN COPY (SELECT 1) TO '{out}'",
    "EXPLAIN ANALYZE COPY (SELECT 1) TO '{out}'",
    "SUMMARIZE SELECT * FROM read_text('/etc/passwd')",
    "ATTACH '{out}' AS other",
    "INSTALL httpfs",
    "LOAD httpfs",
    "SET enable_external_access = true",
    "SET VARIABLE x = 1",
    "RESET ALL",
    "USE memory",
    "PRAGMA enable_profiling",
    "PRAGMA table_info('tokens')",
    "CALL enable_logging()",
    "FROM enable_logging(storage := 'file', storage_config := {{'path': '{out}'}})",
    "FROM enable_profiling(save_location := '{out}')",
    "CREATE TABLE t AS SELECT 1",
    "CREATE MACRO f() AS 1",
    "DROP VIEW tokens",
    "INSERT INTO sites VALUES (1)",
    "WITH t AS (DELETE FROM sites RETURNING *) SELECT * FROM t",
    "EXPORT DATABASE '{out}'",
    "PREPARE p AS SELECT 1",
    "VACUUM",
    "CHECKPOINT",
    "SELECT 1; SELECT 2",
    "SELECT 1; COPY (SELECT 1) TO '{out}'",
    "SELECT 1; -- harmless\nDROP VIEW tokens",
    "/* SELECT */ DROP VIEW tokens -- SELECT",
    "/* /* nested */ SELECT 1; */ DROP VIEW tokens",
    "FROM query('SELECT * FROM read_text(''/etc/passwd'')')",
    "FROM query_table(['tokens'])",
    "FROM json_execute_serialized_sql('{{}}')",
    "SELECT * FROM arrow_scan(1, 2, 3)",
    "SELECT * FROM pandas_scan(1)",
    "SELECT * FROM python_map_function(1)",
    "SELECT * FROM duckdb_secrets()",
    "SELECT getenv('HOME')",
    "FROM top_tokens((SELECT content FROM read_text('/etc/passwd')), 1)",
    "FROM top_tokens('mlp_post.0', (SELECT 1 FROM glob('/etc/*')))",
    "FROM activations((SELECT content FROM read_text('/etc/passwd')), 1)",
    "FROM activations('mlp_post.0', getenv('HOME'))",
    "FROM sites, activations(sites.site, 1)",
    "FROM means('mlp_post.0', '(SELECT content FROM read_text(''/etc/passwd''))')",
    "FROM means('mlp_post.0', '1) AS key FROM read_text(''/etc/passwd'') --')",
    "FROM means('mlp_post.0', 'row_id; COPY tokens TO ''{out}''')",
    "FROM query_table('activations(mlp_post.0, 1, content)')",
    'FROM "activations(mlp_post.0, 1, content)"',
    "SELECT snippet((SELECT 1 FROM read_csv('/etc/passwd')))",
    "SELECT * FROM sites ORDER BY (SELECT content FROM read_text('/etc/passwd'))",
    "SELECT * FROM sites LIMIT (SELECT count(*) FROM glob('/etc/*'))",
    "SELECT * FROM sites QUALIFY row_number() OVER (ORDER BY (FROM read_text('/etc/passwd'))) = 1",
    "SELECT [x FOR x IN (FROM read_text('/etc/passwd'))]",
    "VALUES ((SELECT content FROM read_text('/etc/passwd')))",
    "WITH RECURSIVE t AS (SELECT 1 UNION ALL FROM glob('/*')) FROM t",
    "WITH read_text AS (SELECT 1) FROM read_text('/etc/passwd')",
    "FROM (DESCRIBE (FROM read_text('/etc/passwd')))",
    "FROM read_json('/etc/passwd')",
    "FROM read_ndjson_objects('/etc/passwd')",
    "FROM read_duckdb('{out}')",
    "FROM parquet_scan('{store}/tokens/00000.parquet')",
    "FROM main.read_text('/etc/passwd')",
    "FROM system.main.read_text('/etc/passwd')",
    "FROM ReAd_TeXt('/etc/passwd')",
    "FROM duckdb_settings()",
    "FROM duckdb_logs()",
    "FROM which_secret('s3://a', 's3')",
    "FROM create_external_resource('a')",
    "FROM checkpoint()",
    "EXECUTE p",
    "DEALLOCATE p",
    "BEGIN",
    "COMMENT ON VIEW tokens IS 'x'",
    "ALTER VIEW tokens RENAME TO t",
    "UPDATE sites SET width = 0",
    "TRUNCATE sites",
    "IMPORT DATABASE '{out}'",
    "DETACH memory",
    "GRANT ALL ON tokens TO public",
    "PIVOT sites ON hook",
    "local",
    "",
    ";",
    "-- nothing",
]


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_query_that_would_do_more_than_read_the_store_is_refused(
    shared: CoreStore, tmp_path: Path, attack: str
) -> None:
    """Whatever reads, writes or runs something outside the store's views is a QueryError."""
    local = ["a python variable is no table"]
    out = tmp_path / "out"
    path = str(shared.path).replace("'", "''")
    with pytest.raises(QueryError):
        Database(shared, "200MB").sql(attack.format(out=out, store=path))
    assert local
    assert not out.exists()


@pytest.mark.parametrize(
    "attack",
    [
        "COPY (SELECT 1) TO '{out}'",
        "SELECT * FROM read_text('/etc/passwd')",
        "SELECT * FROM '/etc/passwd'",
        "SELECT * FROM glob('/etc/*')",
        "ATTACH '{out}' AS other",
        "SET enable_external_access = true",
        "SET allowed_paths = ['/etc/passwd']",
        "SET memory_limit = '100GB'",
        "SET python_enable_replacements = true",
        "INSTALL httpfs",
        "FROM read_parquet('{store}/documents/00000.parquet')",
        "SELECT * FROM local",
    ],
)
def test_the_connection_behind_the_gate_is_locked_by_itself(
    shared: CoreStore, tmp_path: Path, attack: str
) -> None:
    """What passed the gate by mistake could still open no file but those of the views in use."""
    local = duckdb.sql("SELECT 1")
    database = Database(shared, "200MB")
    database.sql("SELECT count(*) FROM tokens")
    assert database._open is not None
    path = str(shared.path).replace("'", "''")
    with pytest.raises(duckdb.Error):
        database._open.connection.execute(attack.format(out=tmp_path / "out", store=path))
    assert local is not None
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("query", "names"),
    [
        ("SELECT 1", set()),
        ("SELECT 1; -- one statement", set()),
        ("SELECT 'DROP VIEW tokens; COPY' -- ; DROP", set()),
        ("FROM Sites", {"sites"}),
        ('SELECT * FROM memory.main."SITES"', {"sites"}),
        ("SELECT * FROM sites JOIN neurons USING (site)", {"sites", "neurons"}),
        ("SELECT * FROM tokens", {"tokens", "vocabulary"}),
        ("WITH t AS (FROM documents) FROM t", {"documents"}),
        ("SELECT (SELECT max(layer) FROM sites)", {"sites"}),
        ("FROM top_tokens('mlp_post.0', 1, 3)", {"top_tokens", "exemplars", "vocabulary"}),
        ("SELECT snippet(0)", {"snippet"}),
        ("EXPLAIN SELECT * FROM sites", {"sites"}),
        ("-- why\n/* so */ explain analyze FROM sites", {"sites"}),
        ("EXPLAIN (FORMAT json) (SELECT * FROM sites)", {"sites"}),
        ("DESCRIBE neurons", {"neurons"}),
        ("SUMMARIZE neurons", {"neurons"}),
        ("SHOW TABLES", set()),
        ("SELECT * FROM information_schema.tables", set()),
        ("SELECT comment FROM duckdb_columns()", set()),
        ("FROM range(3)", set()),
        ("SELECT * FROM (PIVOT sites ON hook IN ('mlp_post') USING count(*))", {"sites"}),
        ("FROM sites UNION ALL FROM sites", {"sites"}),
    ],
)
def test_a_query_that_reads_is_admitted_with_what_it_names(query: str, names: set[str]) -> None:
    """Every form of one reading statement passes, and the gate knows its views and macros."""
    assert admit(query).names == names


def test_admitted_statements_run(shared: CoreStore) -> None:
    """EXPLAIN, DESCRIBE, SUMMARIZE and SHOW answer as SELECT does."""
    database = Database(shared, "200MB")
    assert "mlp_post" in repr(database.sql("EXPLAIN SELECT * FROM sites WHERE hook = 'mlp_post'"))
    assert "Total Time" in repr(database.sql("EXPLAIN ANALYZE SELECT * FROM sites"))
    names = [row["column_name"] for row in database.sql("DESCRIBE tokens")]
    assert names[:3] == ["row_id", "document", "window_id"]
    assert len(database.sql("SUMMARIZE sites")) == 10
    assert ("tokens",) in database.sql("SHOW TABLES").rows()


def test_a_refusal_says_what_to_do_instead() -> None:
    """The message names the statement, what is expected, and the remedy."""
    with pytest.raises(QueryError, match=r"'DROP VIEW tokens' is a statement of the kind DROP\. .*"
                       r"give one SELECT, or EXPLAIN.*use \.df\(\)"):  # fmt: skip
        admit("DROP VIEW tokens")
    with pytest.raises(QueryError, match="holds 2 statements; expected one"):
        admit("SELECT 1; SELECT 2")
    with pytest.raises(QueryError, match=r"table 'neuron' is not in the store; it has the views "
                       r"documents, .*Did you mean 'neurons'\?"):  # fmt: skip
        admit("SELECT * FROM neuron")
    with pytest.raises(
        QueryError, match=r"table function 'read_csv' is not open.*Read the store through its"
    ):
        admit("FROM read_csv('x')")
    with pytest.raises(QueryError, match=r"holds a DELETE\. A store is only read"):
        admit("WITH t AS (DELETE FROM sites RETURNING *) SELECT * FROM t")
    with pytest.raises(QueryError, match=r"PIVOT without values.*column IN \(value"):
        admit("PIVOT sites ON hook")
    with pytest.raises(QueryError, match='syntax error at or near "SELEC"'):
        admit("SELEC 1")
