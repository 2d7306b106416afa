"""SQL over a store: DuckDB in memory, its views over the store's Parquet files.

Nothing is copied into DuckDB and nothing is loaded that a query does not need.  DuckDB does not
check what it reads (it returned wrong sums for 391 of 400 flipped bits), so the files behind a view
are compared with their checksums before DuckDB is let near them, once a process: a connection may
open the verified files of the views that a query names, and no other file.  A view that was not
needed yet is a placeholder with the right columns that raises when it is read, so a query that
reached it some other way would fail rather than answer.

Whatever was published since the last query, a result or a new generation of the index, changes the
`_Snapshot`, and with it the connection.
"""

from __future__ import annotations

import json
import threading
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from actstore.durable import FileFacts
from actstore.errors import ActstoreError, BudgetExceeded, QueryError
from actstore.query.answer import Answer
from actstore.query.context import snippets
from actstore.query.gate import admit
from actstore.query.schema import VIEWS, Column
from actstore.site import summarize
from actstore.store import FIRST, GENERATED, SPECIAL, CoreStore, Generation, Result
from actstore.store.budget import parse_budget


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
        process.  The views are `actstore.query.VIEWS`; ``top_tokens(site, neuron, k)`` is a table
        of the strongest rows in the index, ``snippet(row_id, before, after)`` the text around a
        row.

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
        DamagedFile
            If a file that the query needs is missing or has changed.
        BudgetExceeded
            If the query or its answer does not fit into the budget.
        """
        statement = admit(query)
        values = {k: v.item() if isinstance(v, np.generic) else v for k, v in params.items()}
        while True:
            snapshot = _Snapshot.of(self._store)
            try:
                return self._run(snapshot, statement.text, statement.names, values)
            except (ActstoreError, OSError):
                # A capture that goes on may replace the generation of the index under our hands.
                if _Snapshot.of(self._store) == snapshot:
                    raise

    def _run(
        self, snapshot: _Snapshot, text: str, names: frozenset[str], values: Mapping[str, Any]
    ) -> Answer:
        with self._lock:
            if (
                self._open is None
                or self._open.snapshot != snapshot
                or not names <= self._open.names
            ):
                if self._open is not None and self._open.snapshot == snapshot:
                    names = names | self._open.names
                self._open = _Open(self._store, snapshot, names, self._budget // 2)
            opened = self._open
        cursor = opened.connection.cursor()
        try:
            return Answer(self._read(cursor.sql(text, params=dict(values))))
        except duckdb.OutOfMemoryException:
            raise BudgetExceeded(
                f"the query does not fit into half of the budget of {self._budget:,} bytes on "
                f"{self._store.path}. Ask for less (WHERE, LIMIT), or give a larger budget=."
            ) from None
        except duckdb.Error as error:
            if opened.snippet.failures:
                raise opened.snippet.failures.pop() from None
            raise QueryError(str(error)) from None
        finally:
            cursor.close()

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


@dataclass(frozen=True)
class _Snapshot:
    """What of a store is published; two that are equal have the same files behind every view."""

    committed: tuple[int, ...]
    n_parts: int
    generation: int | None
    results: tuple[tuple[str, str, str], ...]
    index: Generation | None = field(compare=False)
    found: tuple[Result, ...] = field(compare=False)

    @classmethod
    def of(cls, store: CoreStore) -> _Snapshot:
        index = store.index()  # first: it refreshes a store that it is newer than
        found = tuple(store.results())
        return cls(
            tuple(store.committed),
            len(store.parts),
            index.number if index else None,
            tuple((r.kind, r.name, str(r.document["created"])) for r in found),
            index,
            found,
        )


@dataclass(frozen=True)
class _Source:
    """Parquet files of one shape behind a view, read by one scan."""

    files: Mapping[str, FileFacts]
    """The files by path inside the store."""
    derived: Mapping[str, str] = field(default_factory=dict)
    """Columns that are not in the files, as SQL."""
    where: str = ""
    """Condition on its rows."""
    joins: str = ""
    """Further tables that `derived` names; the files are ``t``."""
    hidden: frozenset[str] = frozenset()
    """Columns of the files that the view does not show."""
    may_hold_nan: bool = False
    """Whether a number can be NaN, which the view shows as NULL.  Parquet's statistics leave NaN
    out, and DuckDB believes them unless it is told."""


class _Open:
    """A locked connection that may read the verified files of some views, and nothing else."""

    def __init__(
        self, store: CoreStore, snapshot: _Snapshot, names: frozenset[str], memory_bytes: int
    ) -> None:
        self.snapshot = snapshot
        self.names = names
        self.snippet = _SnippetFunction(store)
        self._store = store
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
        allowed: list[str] = []
        definitions = {}
        for name in VIEWS:
            sources = _sources(store, snapshot, name)
            if name in names:
                for source in sources:
                    store.verifier.check(source.files)
                    allowed += [_absolute(store, file) for file in source.files]
            definitions[name] = self._definition(name, sources, name in names)
        self.connection.execute(
            f"SET allowed_paths = [{', '.join(map(_literal, allowed))}]; "
            "SET enable_external_access = false"
        )
        script = [_create_view(name, select) for name, select in definitions.items()]
        self.connection.execute(f"BEGIN; {' '.join(script)} COMMIT")
        self._create_macros("snippet" in names)
        self.connection.execute("SET lock_configuration = true")

    def _definition(self, name: str, sources: list[_Source], needed: bool) -> str:
        if name == "sites":
            return _inline(VIEWS[name].columns, _site_rows(self._store))
        if name == "results":
            return _inline(VIEWS[name].columns, _result_rows(self.snapshot.found))
        if not sources:
            return _inline(VIEWS[name].columns, [])
        if not needed:
            empty = _inline(VIEWS[name].columns, [])
            return f"{empty} OR error('the files of the view {name} were not verified')::BOOLEAN"
        return _union(self._store, VIEWS[name].columns, sources)

    def _create_macros(self, with_snippet: bool) -> None:
        sites = ", ".join(_literal(str(site)) for site in self._store.sites)
        known = summarize(self._store.sites)
        unknown = _literal(f" is not in {self._store.path}; it has {known}.")
        self.connection.execute(
            f"""CREATE MACRO top_tokens(site, neuron, k := 20) AS TABLE
            SELECT e.rank, e.row_id, e.value, e.document, e.position, e.token_id, v.text AS token
            FROM exemplars e LEFT JOIN vocabulary v ON e.token_id = v.token_id
            WHERE e.site = site AND e.neuron = neuron AND e.side = 'top' AND e.rank <= k
            UNION ALL SELECT CAST(error('site ' || site || {unknown}) AS INTEGER),
            NULL, NULL, NULL, NULL, NULL, NULL WHERE site NOT IN ({sites})
            ORDER BY rank"""
        )
        if with_snippet:
            self.connection.create_function(  # type: ignore[call-overload]  # stubs lack Arrow
                "_snippet",
                self.snippet,
                ["BIGINT", "BIGINT", "BIGINT", "VARCHAR"],
                "VARCHAR",
                type="arrow",
            )
            self.connection.execute(
                "CREATE MACRO snippet(row_id, before := 8, after := 8, space := '') AS "
                "_snippet(row_id, before, after, space)"
            )


def _create_view(name: str, select: str) -> str:
    """Return the statements that create a view and say what it is."""
    comments = [f"COMMENT ON VIEW {name} IS {_literal(VIEWS[name].comment)};"]
    for column in VIEWS[name].columns:
        comments.append(f'COMMENT ON COLUMN {name}."{column.name}" IS {_literal(column.comment)};')
    return f"CREATE VIEW {name} AS {select}; {' '.join(comments)}"


class _SnippetFunction:
    """The text around rows, as a function for DuckDB.

    It holds the store weakly: DuckDB's reference to it is one that Python's collector cannot see.
    """

    def __init__(self, store: CoreStore) -> None:
        self._store = weakref.ref(store)
        self.failures: list[ActstoreError] = []
        """Errors raised inside DuckDB, which would keep no more than their messages."""

    def __call__(self, row_ids: Any, before: Any, after: Any, spaces: Any) -> pa.Array:
        """Return the text around each row; columns come in, rows with a NULL left out."""
        store = self._store()
        if store is None:  # no query runs without a Database, which holds the store
            raise RuntimeError("the store is gone")
        texts: list[str | None] = [None] * len(row_ids)
        calls: dict[tuple[int, int, str], list[int]] = {}
        wanted = zip(before.to_pylist(), after.to_pylist(), spaces.to_pylist(), strict=True)
        for place, key in enumerate(wanted):
            calls.setdefault(key, []).append(place)
        ids = row_ids.to_numpy()
        try:
            for (n_before, n_after, space), places in calls.items():
                found = snippets(store, ids[places], n_before, n_after, space)
                for place, snippet in zip(places, found, strict=True):
                    texts[place] = str(snippet)
        except ActstoreError as error:
            self.failures.append(error)
            raise
        return pa.array(texts, pa.string())


def _sources(store: CoreStore, snapshot: _Snapshot, name: str) -> list[_Source]:
    """Return the files behind a view; none if nothing was written yet."""
    if (table := VIEWS[name].table) is not None:
        return _result_sources(snapshot.found, table)
    if name == "vocabulary" and (store.path / "vocabulary.json").exists():
        return [_Source(store.vocabulary_files())]
    if name == "documents":
        files = {p.file(name): p.files[p.file(name)] for p in store.parts}
        return [_Source(files)] if files else []
    if name == "tokens":
        found = (_token_source(store, snapshot, space) for space in store.meta.spaces)
        return [source for source in found if source is not None]
    if name == "neurons" and snapshot.index:
        files = snapshot.index.named("neurons")
        return [_Source(files, may_hold_nan=True)] if files else []
    if name == "exemplars" and snapshot.index:
        files = snapshot.index.named("exemplars/")
        return [_Source(files, _site_of_file(store))] if files else []
    return []


def _site_of_file(store: CoreStore) -> dict[str, str]:
    """Return the columns that name the site of an exemplar, taken from the name of its file.

    DuckDB skips files by such expressions.  Its own reading of folders called ``layer=3`` would
    take those above the store for columns too.
    """
    hook = "string_split(t.filename, '/')[-3][6:]"
    layer = "string_split(t.filename, '/')[-2][7:]"
    space, family = "''", hook
    if store.meta.spaces != ("",):
        space = "string_split(t.filename, '/')[-4][7:]"
        family = f"{space} || '.' || {hook}"
    return {
        "site": f"{family} || '.' || {layer}",
        "space": space,
        "hook": hook,
        "layer": f"CAST({layer} AS INTEGER)",
    }


def _token_source(store: CoreStore, snapshot: _Snapshot, space: str) -> _Source | None:
    """Return the token index of a space, its committed rows only."""
    committed = set(snapshot.committed)
    parts = [p for p in store.parts if any(s.segment in committed for s in p.segments)]
    if not parts:
        return None
    size = store.meta.segment_rows
    planned = sorted(s.segment for p in parts for s in p.segments)
    mine = [s for s in planned if s in committed]
    where = ""
    if mine != planned:
        # A range of row_id lets DuckDB skip row groups; the list settles what is inside it.
        where = f"t.row_id >= {mine[0] * size} AND t.row_id < {(mine[-1] + 1) * size}"
        if len(mine) != mine[-1] - mine[0] + 1:
            where += f" AND t.row_id // {size} IN ({', '.join(map(str, mine))})"
    derived = {
        "special": f"(t.flags & {SPECIAL}) <> 0",
        "first": f"(t.flags & {FIRST}) <> 0",
        "generated": f"(t.flags & {GENERATED}) <> 0",
        "space": _literal(space),
        "text": "v.text",
    }
    # Grouped, the join is known to add no rows, so DuckDB leaves it out where text is not used.
    joins = (
        "LEFT JOIN (SELECT w.token_id, any_value(w.text) AS text FROM vocabulary w "
        "GROUP BY w.token_id) v ON t.token_id = v.token_id"
    )
    files = {p.file("tokens", space): p.files[p.file("tokens", space)] for p in parts}
    return _Source(files, derived, where, joins, frozenset({"flags"}))


def _result_sources(results: tuple[Result, ...], table: str) -> list[_Source]:
    sources = []
    for result in results:
        if facts := result.files.get(f"{table}.parquet"):
            name = f"results/{result.kind}/{result.name}/{table}.parquet"
            named = {"kind": _literal(result.kind), "result": _literal(result.name)}
            sources.append(_Source({name: facts}, named, may_hold_nan=True))
    return sources


def _union(store: CoreStore, columns: tuple[Column, ...], sources: list[_Source]) -> str:
    """Return the SELECT over sources: the view's columns, then further ones of the files."""
    schemas = []
    for source in sources:
        first = next(iter(source.files))
        in_file = pq.read_schema(store.path / first)
        schemas.append({f.name: f.type for f in in_file if f.name not in source.hidden})
    types = {column.name: column.type for column in columns}
    further = [name for names in schemas for name in names if name not in types]
    selects = []
    for source, names in zip(sources, schemas, strict=True):
        chosen = []
        for name in dict.fromkeys([*types, *further]):
            quoted = '"' + name.replace('"', '""') + '"'
            if name in source.derived:
                value = source.derived[name]
            elif name in names:
                value = f"t.{quoted}"
                if source.may_hold_nan and pa.types.is_floating(names[name]):
                    value = f"nullif({value}, 'NaN')"  # DuckDB sorts NaN above all numbers
            else:
                value = f"CAST(NULL AS {types[name]})" if name in types else "NULL"
            chosen.append(f"{value} AS {quoted}")
        files = ", ".join(_literal(_absolute(store, file)) for file in source.files)
        options = "hive_partitioning = false"
        options += ", can_have_nan = true" if source.may_hold_nan else ""
        options += ", filename = true" if "t.filename" in "".join(source.derived.values()) else ""
        where = f" WHERE {source.where}" if source.where else ""
        selects.append(
            f"SELECT {', '.join(chosen)} FROM read_parquet([{files}], {options}) t "
            f"{source.joins}{where}"
        )
    return " UNION ALL ".join(selects)


def _inline(columns: tuple[Column, ...], rows: list[list[str]]) -> str:
    """Return the SELECT of rows written as SQL; without any, ending in a false condition."""
    values = ", ".join(f"({', '.join(row)})" for row in rows or [["NULL"] * len(columns)])
    names = ", ".join(f'"{column.name}"' for column in columns)
    # Qualified: a bare name would also mean the parameter of a macro that reads the view.
    casts = ", ".join(f'CAST(t."{c.name}" AS {c.type}) AS "{c.name}"' for c in columns)
    condition = "" if rows else " WHERE false"
    return f"SELECT {casts} FROM (VALUES {values}) t({names}){condition}"


def _site_rows(store: CoreStore) -> list[list[str]]:
    rows = []
    for info in store.meta.sites:
        site = info.site
        texts = (info.dtype, info.module, info.side, info.path)
        rows.append(
            [
                *(_literal(text) for text in (str(site), site.space, site.hook)),
                str(site.layer),
                str(info.width),
                *map(_literal, texts),
            ]
        )
    return rows


def _result_rows(results: tuple[Result, ...]) -> list[list[str]]:
    rows = []
    for result in results:
        document = {k: v for k, v in result.document.items() if k != "files"}
        sites = ", ".join(_literal(str(site)) for site in document.get("sites", ()))
        n_rows = document.get("n_rows")
        rows.append(
            [
                _literal(result.kind),
                _literal(result.name),
                _literal(str(document["created"])),
                f"[{sites}]",
                "NULL" if n_rows is None else str(int(n_rows)),
                _literal(json.dumps(document, ensure_ascii=False)),
            ]
        )
    return rows


def _absolute(store: CoreStore, name: str) -> str:
    return str((store.path / name).absolute())


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
