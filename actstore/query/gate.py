"""The gate: one statement that does nothing but read, decided by DuckDB's own parser.

A read-only in-memory DuckDB can still write files, attach databases and call functions that take
raw pointers, so a statement is admitted by what it is made of, not by what it lacks: one SELECT
(EXPLAIN, DESCRIBE, SHOW and SUMMARIZE of one are no more than that), made of queries only, over the
store's views and a short list of table functions.  The connection behind the gate is locked as well
(`Database`): either alone would do.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import duckdb

from actstore.errors import QueryError, did_you_mean
from actstore.query.schema import MACROS, READS, VIEWS

_QUERIES = {"SELECT_NODE", "SET_OPERATION_NODE", "RECURSIVE_CTE_NODE", "CTE_NODE"}
_TABLE_FUNCTIONS = {
    "unnest", "range", "generate_series", "repeat", "repeat_row", "json_each", "json_tree",
    "duckdb_columns", "duckdb_functions", "duckdb_tables", "duckdb_views", "pragma_table_info",
}  # fmt: skip
_CATALOGS = {"information_schema", "pg_catalog"}
_EXPLAIN = re.compile(
    r"(?:\s|--[^\n]*\n|/\*(?:[^*]|\*(?!/))*\*/)*EXPLAIN\b\s*(ANALYZE\b|\(\s*(?:ANALYZE|FORMAT)\b[^()]*\))?",
    re.IGNORECASE,
)
_REMEDY = (
    "A store is only read by SQL: give one SELECT, or EXPLAIN, DESCRIBE, SUMMARIZE or SHOW TABLES. "
    "To keep an answer, use .df() or .to_arrow() of it."
)


@dataclass(frozen=True)
class Statement:
    """A statement that may run."""

    text: str
    """Its SQL."""
    names: frozenset[str]
    """The views and macros of the store that it names, and the views those read."""


def admit(query: str) -> Statement:
    """Return the one statement of a query if it only reads the store.

    Raises
    ------
    QueryError
        If the query does not parse, is several statements, or would do more than read the store's
        views.
    """
    kind, text = _only_statement(query)
    prefix = ""
    if kind == "EXPLAIN":
        # DuckDB turns only a SELECT into JSON, so what is explained is looked at by itself, and
        # what was looked at is what will run.
        match = _EXPLAIN.match(text)
        if match is None:
            raise QueryError(f"EXPLAIN was not understood in {_short(query)}. {_REMEDY}")
        prefix = f"EXPLAIN {match[1] or ''} "
        kind, text = _only_statement(text[match.end() :])
    if kind == "MULTI":
        raise QueryError(
            f"{_short(query)} is a PIVOT without values, which runs as several statements. Name "
            "them: SELECT * FROM (PIVOT table ON column IN (value, …) USING sum(x))."
        )
    if kind != "SELECT":
        raise QueryError(f"{_short(query)} is a statement of the kind {kind}. {_REMEDY}")
    return Statement(prefix + text, _names(_tree(text), query))


@functools.cache
def _parser() -> duckdb.DuckDBPyConnection:
    return duckdb.connect(":memory:", config={"threads": 1, "enable_external_access": "false"})


def _only_statement(query: str) -> tuple[str, str]:
    try:
        statements = _parser().cursor().extract_statements(query)
    except duckdb.Error as error:
        raise QueryError(str(error)) from None
    if len(statements) != 1:
        raise QueryError(
            f"{_short(query)} holds {len(statements)} statements; expected one. {_REMEDY}"
        )
    return statements[0].type.name, statements[0].query


def _tree(text: str) -> Any:
    try:
        row = _parser().cursor().execute("SELECT json_serialize_sql($1)", [text]).fetchone()
    except duckdb.Error as error:
        raise QueryError(str(error)) from None
    tree = json.loads(row[0]) if row else {"error": True}
    if tree.get("error"):
        raise QueryError(f"{_short(text)} cannot be checked: {tree.get('error_message')} {_REMEDY}")
    return tree


def _nodes(tree: Any) -> Iterator[dict[str, Any]]:
    """Yield every object of a JSON tree."""
    waiting = [tree]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            yield item
            waiting.extend(item.values())
        elif isinstance(item, list):
            waiting.extend(item)


def _names(tree: Any, query: str) -> frozenset[str]:
    """Return the views and macros that a statement names, or refuse what it may not use."""
    names: set[str] = set()
    tables: set[str] = set()
    common: set[str] = set()  # names of common table expressions
    for node in _nodes(tree):
        kind = str(node.get("type", ""))
        if kind.endswith("_NODE") and kind not in _QUERIES:
            raise QueryError(f"{_short(query)} holds a {kind.split('_')[0]}. {_REMEDY}")
        if kind == "TABLE_FUNCTION":
            name = str(node["function"].get("function_name", "")).lower()
            if name not in _TABLE_FUNCTIONS and name not in MACROS:
                raise QueryError(
                    f"the table function {name!r} is not open to queries of a "
                    f"store; there are {', '.join(sorted({*_TABLE_FUNCTIONS, 'top_tokens'}))}. "
                    f"Read the store through its views: {', '.join(VIEWS)}."
                )
        if kind == "BASE_TABLE" and str(node.get("schema_name", "")).lower() not in _CATALOGS:
            tables.add(str(node["table_name"]).lower())
        if "function_name" in node:
            names.add(str(node["function_name"]).lower())
        if isinstance(node.get("cte_map"), dict):
            common.update(str(entry["key"]).lower() for entry in node["cte_map"].get("map", ()))
    for table in sorted(tables - common):
        if table not in VIEWS:
            raise QueryError(
                f"table {table!r} is not in the store; it has the views {', '.join(VIEWS)}."
                f"{did_you_mean(table, VIEWS)}"
            )
    used = (names & set(MACROS)) | (tables & set(VIEWS))
    return frozenset(used.union(*(READS.get(name, ()) for name in used)))


def _short(query: str) -> str:
    text = " ".join(query.split())
    return repr(text if len(text) <= 60 else text[:57] + "…")
