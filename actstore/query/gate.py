"""The gate: one statement that does nothing but read, decided by DuckDB's own parser.

A read-only in-memory DuckDB can still write files, attach databases and call functions that take
raw pointers, so a statement is admitted by what it is made of, not by what it lacks: one SELECT
(EXPLAIN, DESCRIBE, SHOW and SUMMARIZE of one are no more than that), made of queries only, over the
store's views and a short list of table functions.  The connection behind the gate is locked as well
(`Database`): either alone would do.

The gate also tells what a statement needs: the views it names, and the calls of macros whose tables
are made by Python, which have to stand there when the query runs, so their arguments are constants.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Mapping
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


_TABLE_MACROS = {name for name, macro in MACROS.items() if macro.columns}
_CATALOG_FUNCTIONS = {name for name in _TABLE_FUNCTIONS if name.startswith(("duckdb_", "pragma_"))}


@dataclass(frozen=True)
class Parameter:
    """An argument given as ``$name``."""

    name: str
    """The name."""


@dataclass(frozen=True)
class Call:
    """A call of a macro whose arguments are constants."""

    macro: str
    """Its name."""
    arguments: tuple[tuple[str, str | int | Parameter], ...]
    """Its arguments by parameter; a default that was not given is left out."""


@dataclass(frozen=True)
class Statement:
    """A statement that may run."""

    prefix: str
    """``EXPLAIN …`` before it, or nothing."""
    text: str
    """Its SQL, without the prefix."""
    names: frozenset[str]
    """The views and macros of the store that it names, and the views those read."""
    calls: tuple[Call, ...]
    """Its calls of macros whose tables are made before it runs."""
    reads_catalog: bool
    """Whether it asks what views and columns there are."""
    described: str | None
    """The view it describes, where it is ``DESCRIBE view``."""


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
        prefix = f"EXPLAIN {match[1] or ''}".rstrip() + " "
        kind, text = _only_statement(text[match.end() :])
    if kind == "MULTI":
        raise QueryError(
            f"{_short(query)} is a PIVOT without values, which runs as several statements. Name "
            "them: SELECT * FROM (PIVOT table ON column IN (value, …) USING sum(x))."
        )
    if kind != "SELECT":
        raise QueryError(f"{_short(query)} is a statement of the kind {kind}. {_REMEDY}")
    tree = _tree(text)
    names, reads_catalog = _names(tree, query)
    calls = tuple(dict.fromkeys(_calls(tree)))
    return Statement(prefix, text, names, calls, reads_catalog, _described(tree))


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


def _names(tree: Any, query: str) -> tuple[frozenset[str], bool]:
    """Return the views and macros that a statement names, and whether it asks for the catalog.

    Raises
    ------
    QueryError
        If it uses what it may not.
    """
    names: set[str] = set()
    tables: set[str] = set()
    common: set[str] = set()  # names of common table expressions
    reads_catalog = False
    for node in _nodes(tree):
        kind = str(node.get("type", ""))
        if kind.endswith("_NODE") and kind not in _QUERIES:
            raise QueryError(f"{_short(query)} holds a {kind.split('_')[0]}. {_REMEDY}")
        if kind == "TABLE_FUNCTION":
            name = str(node["function"].get("function_name", "")).lower()
            if name not in _TABLE_FUNCTIONS and name not in MACROS:
                known = sorted({*_TABLE_FUNCTIONS, *_TABLE_MACROS})
                raise QueryError(
                    f"the table function {name!r} is not open to queries of a store; there are "
                    f"{', '.join(known)}.{did_you_mean(name, known)} Read the store through its "
                    f"views: {', '.join(VIEWS)}."
                )
            reads_catalog |= name in _CATALOG_FUNCTIONS
        if kind == "SHOW_REF" and node.get("query") is None:
            reads_catalog = True
        if kind == "BASE_TABLE":
            if str(node.get("schema_name", "")).lower() in _CATALOGS:
                reads_catalog = True
            else:
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
    for name in names & set(MACROS):
        used.update(MACROS[name].reads)
    return frozenset(used.union(*(READS.get(name, ()) for name in used))), reads_catalog


def _calls(tree: Any) -> Iterator[Call]:
    """Yield the calls of macros whose tables are made before a statement runs."""
    for node in _nodes(tree):
        if node.get("type") != "TABLE_FUNCTION":
            continue
        name = str(node["function"]["function_name"]).lower()
        if name in MACROS and MACROS[name].constant:
            yield Call(name, tuple(_arguments(name, node["function"]["arguments"])))


def _arguments(name: str, given: list[Any]) -> Iterator[tuple[str, str | int | Parameter]]:
    macro = MACROS[name]
    usage = f"Expected {macro.call}: {macro.comment}."
    free = list(macro.constant)
    for argument in given:
        parameter = str(argument["name"]).lower() or (free[0] if free else "")
        if parameter not in free:
            raise QueryError(f"{name} was called with too many or unknown arguments. {usage}")
        free.remove(parameter)
        value = _constant(argument["expression"])
        if value is None:
            raise QueryError(
                f"{parameter} of {name} is not a constant. Its table is made before the query "
                f"runs, so it takes a text, a whole number or a $parameter. {usage}"
            )
        yield parameter, value
    if missing := [p for p in free if f"{p} :=" not in macro.call]:
        raise QueryError(f"{name} was called without {' and '.join(missing)}. {usage}")


def _constant(expression: Mapping[str, Any]) -> str | int | Parameter | None:
    if expression.get("type") == "VALUE_PARAMETER":
        return Parameter(str(expression["identifier"]))
    literal = expression.get("literal") or {}
    text = str(literal.get("text"))
    if literal.get("kind") == "STRING":
        return text
    if literal.get("kind") == "INTEGER" and re.fullmatch(r"-?\d+", text):
        return int(text)
    return None


def _described(tree: Any) -> str | None:
    """Return the view of ``DESCRIBE view`` or ``SHOW view``."""
    shown = tree["statements"][0]["node"].get("from_table") or {}
    if shown.get("type") != "SHOW_REF" or shown.get("show_type") not in ("DESCRIBE", "SHOW"):
        return None
    query = shown["query"]
    if query and [column.get("type") for column in query.get("select_list", ())] != ["STAR"]:
        return None  # other columns may have the same names
    table = query["from_table"] if query else shown
    if table.get("type") not in ("BASE_TABLE", "SHOW_REF"):
        return None
    name = str(table["table_name"]).lower().strip('"')
    return name if name in VIEWS else None


def _short(query: str) -> str:
    text = " ".join(query.split())
    return repr(text if len(text) <= 60 else text[:57] + "…")
