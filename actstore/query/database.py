"""SQL over a store: DuckDB in memory, its views over the store's Parquet files.

Nothing is copied into DuckDB and nothing is loaded that a query does not need.  DuckDB does not
check what it reads (it returned wrong sums for 391 of 400 flipped bits), so the files behind a view
are compared with their checksums before DuckDB is let near them, once a process: a connection may
open the verified files of the views that a query names, and no other file.  Whatever was published
since the last query changes the `Snapshot`, and with it the connection.

What `activations` and `means` give stands in no file.  The gate finds the calls; the macros look
for a table of the call's name, and a query finds it among the temporary views of its own cursor.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Collection, Mapping
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa

from actstore import arrow
from actstore.errors import ActstoreError, ArgumentError, BudgetExceeded, QueryError
from actstore.query.answer import Answer
from actstore.query.columns import Activations
from actstore.query.context import snippets
from actstore.query.gate import Call, Parameter, Statement, admit
from actstore.query.means import Means
from actstore.query.schema import MACROS, VIEWS
from actstore.query.views import Snapshot, Views, absolute, literal
from actstore.site import summarize
from actstore.store import CoreStore
from actstore.store.budget import parse_budget

_CATALOG = "the catalog"  # among names, that all views are there with what they mean


class Database:
    """The SQL database over a store.

    Parameters
    ----------
    store : CoreStore
        The store; committed segments are seen as of its last ``refresh()``.
    budget : int or str, optional
        Memory for queries: half for DuckDB, which has no temporary files, half for the answer.

    Examples
    --------
    >>> Database(store).sql("SELECT site, width FROM sites ORDER BY layer")  # doctest: +SKIP
    """

    def __init__(self, store: CoreStore, budget: int | str | None = None) -> None:
        self._store = store
        self._budget = parse_budget(budget)
        self._open: _Open | None = None
        self._lock = threading.Lock()

    def sql(self, query: str, /, **params: Any) -> Answer:
        """Return the answer to one SELECT over the views of the store.

        Costs what DuckDB reads, plus one checksum of each file behind a view it names, once a
        process.  The views are `actstore.query.VIEWS`, the macros `actstore.query.MACROS`.

        Parameters
        ----------
        query : str
            One SELECT, or EXPLAIN, DESCRIBE, SUMMARIZE or SHOW TABLES.
        **params
            Values of ``$name`` in the query.

        Raises
        ------
        QueryError
            If DuckDB refuses the query, or it would do more than read the store.
        SiteNotFound, NeuronNotFound, RowNotFound, ArgumentError
            If ``activations`` or ``means`` is asked for what the store does not have.
        DamagedFile
            If a file that the query needs is missing or has changed.
        BudgetExceeded
            If the query or its answer does not fit into the budget.
        """
        statement = admit(query)
        values = {k: v.item() if isinstance(v, np.generic) else v for k, v in params.items()}
        while True:
            snapshot = Snapshot.of(self._store)
            try:
                answer = self._run(snapshot, statement, values)
            except (ActstoreError, OSError):
                # A capture that goes on may replace the generation of the index under our hands.
                if Snapshot.of(self._store) == snapshot:
                    raise
            else:
                if statement.described and not statement.prefix:
                    return _with_comments(answer, statement.described)
                return answer

    def connect(self) -> duckdb.DuckDBPyConnection:
        """Return a DuckDB connection of the caller's own, with the views and macros of the store.

        It is not locked: it reads, writes, attaches and installs whatever DuckDB can, within
        DuckDB's own limits of memory.  All files behind the views are compared with their checksums
        first; what is published later is not in it.  Of the macros it has `top_tokens` and
        `snippet`; `Activations` come in by ``connection.register(name, activations)``.  The caller
        closes it.

        Raises
        ------
        DamagedFile
            If a file behind a view is missing or has changed.
        """
        views = Views(self._store, Snapshot.of(self._store))
        self._store.verifier.check(views.files(VIEWS))
        connection = duckdb.connect(":memory:")
        connection.execute(f"BEGIN; {views.script(VIEWS)} {views.catalog_script(VIEWS)} COMMIT")
        store = self._store
        snippet = _SnippetFunction(lambda: store)  # the connection may outlive all else
        _create_macros(connection, store, snippet, ("top_tokens", "snippet"))
        return connection

    def _run(self, snapshot: Snapshot, statement: Statement, values: Mapping[str, Any]) -> Answer:
        opened = self._opened(snapshot, statement)
        cursor = opened.connection.cursor()
        columns: list[Activations] = []
        try:
            means = []
            for call in statement.calls:
                name, arguments = _resolved(call, values)
                if call.macro == "activations":
                    columns.append(self._activations(*arguments))
                    cursor.register(name, columns[-1])
                else:
                    means.append((name, self._means(*arguments)))
                    cursor.register(name, arrow.empty(means[-1][1].schema))
            if means:
                # A pass is made for a query that can run, and for none that only explains itself.
                cursor.execute(f"EXPLAIN {statement.text}", dict(values) or None).fetchall()
                if not statement.prefix or "ANALYZE" in statement.prefix.upper():
                    for name, table in means:
                        cursor.register(name, table.table())
            query = statement.prefix + statement.text
            return Answer(self._read(cursor.sql(query, params=dict(values))))
        except duckdb.OutOfMemoryException:
            raise BudgetExceeded(
                f"the query does not fit into half of the budget of {self._budget:,} bytes on "
                f"{self._store.path}. Ask for less (WHERE, LIMIT), or give a larger budget=."
            ) from None
        except duckdb.Error as error:
            for failures in (opened.snippet.failures, *(column.failures for column in columns)):
                if failures:
                    raise failures.pop() from None
            raise QueryError(str(error)) from None
        finally:
            cursor.close()

    def _opened(self, snapshot: Snapshot, statement: Statement) -> _Open:
        """Return a connection that has what a statement needs."""
        names = statement.names | ({_CATALOG} if statement.reads_catalog else frozenset())
        with self._lock:
            kept = self._open
            if kept is None or kept.snapshot != snapshot or not names <= kept.names:
                if kept is not None and kept.snapshot == snapshot:
                    names = names | kept.names
                self._open = kept = _Open(self._store, snapshot, names, self._budget // 2)
            return kept

    def _activations(self, site: str, neuron: int, rows: str = "content") -> Activations:
        if rows not in ("content", "all"):
            raise ArgumentError(
                f"rows = {rows!r} of activations; expected 'content' or 'all'. To choose among "
                "them, join with tokens and say WHERE."
            )
        space = self._store.site(site).site.space
        return Activations(self._store, site, neuron, self._store.rows(rows, space))

    def _means(self, site: str, key: str, rows: str = "content") -> Means:
        def ask(query: str) -> pa.Table:
            return self.sql(query).to_arrow()

        return Means(self._store, ask, site, key, rows, self._budget // 2)

    def _read(self, relation: duckdb.DuckDBPyRelation) -> pa.Table:
        reader = pa.RecordBatchReader.from_stream(relation)
        batches, n_bytes = [], 0
        try:
            for batch in reader:
                batches.append(batch)
                n_bytes += batch.nbytes
                if n_bytes > self._budget // 2:
                    raise BudgetExceeded(
                        f"the answer is larger than half of the budget of {self._budget:,} bytes: "
                        f"it has more than {sum(b.num_rows for b in batches):,} rows. Aggregate, "
                        "add a LIMIT, or give a larger budget=."
                    )
        except (pa.ArrowException, OSError) as error:
            # Arrow's stream hides the kind of DuckDB's error, and keeps its message.
            message = str(error)
            if "Out of Memory Error" in message:
                raise duckdb.OutOfMemoryException(message) from None
            raise duckdb.Error(message) from None
        return pa.Table.from_batches(batches, schema=reader.schema)


def _resolved(call: Call, values: Mapping[str, Any]) -> tuple[str, list[Any]]:
    """Return the name under which a macro looks for the table of a call, and its arguments."""
    macro = MACROS[call.macro]
    given = dict(call.arguments)
    arguments: list[Any] = []
    for parameter in macro.constant:
        value = given.get(parameter, "content")
        if isinstance(value, Parameter):
            if value.name not in values:
                raise QueryError(
                    f"${value.name} of {call.macro} has no value; expected a keyword argument: "
                    f"store.sql(…, {value.name}=…)."
                )
            value = values[value.name]
        expected = int if parameter == "neuron" else str
        if not isinstance(value, expected) or isinstance(value, bool):
            what = "a whole number" if expected is int else "a text"
            raise ArgumentError(
                f"{parameter} = {value!r} of {call.macro}; expected {what}: {macro.call}."
            )
        arguments.append(value)
    return f"{call.macro}({', '.join(map(str, arguments))})", arguments


def _with_comments(answer: Answer, view: str) -> Answer:
    """Return the columns of a view with what they mean."""
    comments = {column.name: column.comment for column in VIEWS[view].columns}
    table = answer.to_arrow().select(["column_name", "column_type"])
    names = table.column("column_name").to_pylist()
    return Answer(
        table.append_column(
            "comment", pa.array([comments.get(name) for name in names], pa.string())
        )
    )


class _Open:
    """A locked connection that may read the verified files of some views, and nothing else."""

    def __init__(
        self, store: CoreStore, snapshot: Snapshot, names: Collection[str], memory_bytes: int
    ) -> None:
        self.snapshot = snapshot
        self.names = frozenset(names)
        # Weakly: DuckDB's reference to the function is one that Python's collector cannot see.
        self.snippet = _SnippetFunction(weakref.ref(store))
        views = Views(store, snapshot)
        files = views.files(names)
        store.verifier.check(files)
        self.connection = duckdb.connect(
            ":memory:",
            config={
                "memory_limit": f"{memory_bytes}B",
                "temp_directory": "",
                "python_enable_replacements": "false",
                "autoinstall_known_extensions": "false",
                "autoload_known_extensions": "false",
            },
        )
        # DuckDB's Python binding complains on stderr of a connection alive at exit that holds a
        # Python function, as `snippet` is one.
        weakref.finalize(self, self.connection.close)
        allowed = ", ".join(literal(absolute(store, file)) for file in files)
        script = views.script(names)
        if _CATALOG in names:
            script += views.catalog_script(names)
        self.connection.execute(
            f"SET allowed_paths = [{allowed}]; SET enable_external_access = false; "
            f"BEGIN; {script} COMMIT"
        )
        macros = MACROS if _CATALOG in names else names
        _create_macros(self.connection, store, self.snippet, macros)
        self.connection.execute("SET lock_configuration = true")


def _create_macros(
    connection: duckdb.DuckDBPyConnection,
    store: CoreStore,
    snippet: _SnippetFunction,
    names: Collection[str],
) -> None:
    """Create some of the macros."""
    if "top_tokens" in names:
        connection.execute(_top_tokens(store))
    if "snippet" in names:
        connection.create_function(  # type: ignore[call-overload]  # stubs lack Arrow
            "_snippet",
            snippet,
            ["BIGINT", "BIGINT", "BIGINT", "VARCHAR"],
            "VARCHAR",
            type="arrow",
        )
        connection.execute(
            "CREATE MACRO snippet(row_id, before := 8, after := 8, space := '') AS "
            "_snippet(row_id, before, after, space)"
        )
    for name, macro in MACROS.items():
        if name in names and macro.constant:
            called = f"'{name}(' || concat_ws(', ', {', '.join(macro.constant)}) || ')'"
            connection.execute(
                f"CREATE MACRO {macro.call} AS TABLE "
                f"""FROM query_table('"' || replace({called}, '"', '""') || '"')"""
            )


def _top_tokens(store: CoreStore) -> str:
    """Return the statement that creates the macro `top_tokens`.

    A site or neuron that the store does not have is an error, not an empty answer.
    """
    widths = ", ".join(f"({literal(str(i.site))}, {i.width})" for i in store.meta.sites)
    unknown = literal(f" is not in {store.path}; it has {summarize(store.sites)}. Did you mean '")
    return f"""CREATE MACRO top_tokens(site, neuron, k := 20) AS TABLE
    SELECT e.rank, e.row_id, e.value, e.document, e.position, e.token_id, v.text AS token
    FROM exemplars e LEFT JOIN vocabulary v ON e.token_id = v.token_id
    WHERE e.site = site AND e.neuron = neuron AND e.side = 'top' AND e.rank <= k
    UNION ALL SELECT CAST(error(
        CASE WHEN w.width IS NULL
        THEN 'site ''' || site || '''' || {unknown} || w.near || '''?'
        ELSE 'neuron = ' || neuron || ' is not at ' || site || '; it has neurons 0 … '
            || (w.width - 1) || '.' END) AS INTEGER),
    NULL, NULL, NULL, NULL, NULL, NULL
    FROM (SELECT max(t.width) FILTER (t.name = site) AS width,
        arg_min(t.name, levenshtein(t.name, site)) AS near
        FROM (VALUES {widths}) t(name, width)) w
    WHERE w.width IS NULL OR neuron NOT BETWEEN 0 AND w.width - 1
    ORDER BY rank"""


class _SnippetFunction:
    """The text around rows, as a function for DuckDB."""

    def __init__(self, store: Callable[[], CoreStore | None]) -> None:
        self._store = store
        self.failures: list[ActstoreError] = []
        """Errors raised inside DuckDB, which would keep no more than their messages."""

    def __call__(self, row_ids: Any, before: Any, after: Any, spaces: Any) -> pa.Array:
        """Return the text around each row; columns come in, rows with a NULL left out."""
        store = self._store()
        if store is None:  # no query runs without a Database, which holds the store
            raise RuntimeError("the store is gone")
        texts = [""] * len(row_ids)
        calls: dict[tuple[int, int, str], list[int]] = {}
        wanted = zip(before.to_pylist(), after.to_pylist(), spaces.to_pylist(), strict=True)
        for place, key in enumerate(wanted):
            calls.setdefault(key, []).append(place)
        ids = arrow.numbers(row_ids)
        try:
            for (n_before, n_after, space), places in calls.items():
                found = snippets(store, ids[places], n_before, n_after, space)
                for place, snippet in zip(places, found, strict=True):
                    texts[place] = str(snippet)
        except ActstoreError as error:
            self.failures.append(error)
            raise
        return arrow.column(texts).cast(pa.string())
