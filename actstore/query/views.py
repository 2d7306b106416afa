"""The views of a store as SQL: which Parquet files stand behind each, and how they become columns.

Whatever was published since the last query, a result or a new generation of the index, changes the
`Snapshot`, and with it the files.  A view that a query does not name is not made, or is a
placeholder with the right columns that raises when it is read, so a query that reached it some
other way would fail rather than answer.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.parquet as pq

from actstore.durable import FileFacts
from actstore.query.schema import VIEWS, Column
from actstore.store import FIRST, GENERATED, SPECIAL, CoreStore, Generation, Result


@dataclass(frozen=True)
class Snapshot:
    """What of a store is published; two that are equal have the same files behind every view."""

    committed: tuple[int, ...]
    n_parts: int
    generation: int | None
    results: tuple[tuple[str, str, str], ...]
    index: Generation | None = field(compare=False)
    found: tuple[Result, ...] = field(compare=False)

    @classmethod
    def of(cls, store: CoreStore) -> Snapshot:
        """Return what is published now."""
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


class Views:
    """The views of a store as of a snapshot."""

    def __init__(self, store: CoreStore, snapshot: Snapshot) -> None:
        self._store = store
        self._snapshot = snapshot

    def files(self, names: Collection[str]) -> dict[str, FileFacts]:
        """Return the files behind some views, by path inside the store."""
        return {
            file: facts
            for name in VIEWS
            if name in names
            for source in _sources(self._store, self._snapshot, name)
            for file, facts in source.files.items()
        }

    def script(self, names: Collection[str]) -> str:
        """Return the statements that create some views."""
        return " ".join(
            f"CREATE VIEW {name} AS {self._select(name)};" for name in VIEWS if name in names
        )

    def catalog_script(self, names: Collection[str]) -> str:
        """Return the statements that say what all views are, those not named as placeholders."""
        statements = []
        for name, view in VIEWS.items():
            if name not in names:
                empty = _inline(view.columns, [])
                statements.append(
                    f"CREATE VIEW {name} AS {empty} OR "
                    f"error('the files of the view {name} were not verified')::BOOLEAN;"
                )
            statements.append(f"COMMENT ON VIEW {name} IS {literal(view.comment)};")
            statements += [
                f'COMMENT ON COLUMN {name}."{column.name}" IS {literal(column.comment)};'
                for column in view.columns
            ]
        return " ".join(statements)

    def _select(self, name: str) -> str:
        if name == "sites":
            return _inline(VIEWS[name].columns, _site_rows(self._store))
        if name == "results":
            return _inline(VIEWS[name].columns, _result_rows(self._snapshot.found))
        sources = _sources(self._store, self._snapshot, name)
        if not sources:
            return _inline(VIEWS[name].columns, [])
        return _union(self._store, VIEWS[name].columns, sources)


def _sources(store: CoreStore, snapshot: Snapshot, name: str) -> list[_Source]:
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
    if name in ("exemplars", "histograms") and snapshot.index:
        files = snapshot.index.named(f"{name}/")
        return [_Source(files, _site_of_file(store))] if files else []
    return []


def _site_of_file(store: CoreStore) -> dict[str, str]:
    """Return the columns that name the site of a row, taken from the name of its file.

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


def _token_source(store: CoreStore, snapshot: Snapshot, space: str) -> _Source | None:
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
        "space": literal(space),
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
            named = {"kind": literal(result.kind), "result": literal(result.name)}
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
        files = ", ".join(literal(absolute(store, file)) for file in source.files)
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
                *(literal(text) for text in (str(site), site.space, site.hook)),
                str(site.layer),
                str(info.width),
                *map(literal, texts),
                repr(info.keep),
            ]
        )
    return rows


def _result_rows(results: tuple[Result, ...]) -> list[list[str]]:
    rows = []
    for result in results:
        document = {k: v for k, v in result.document.items() if k != "files"}
        sites = ", ".join(literal(str(site)) for site in document.get("sites", ()))
        n_rows = document.get("n_rows")
        rows.append(
            [
                literal(result.kind),
                literal(result.name),
                literal(str(document["created"])),
                f"[{sites}]",
                "NULL" if n_rows is None else str(int(n_rows)),
                literal(json.dumps(document, ensure_ascii=False)),
            ]
        )
    return rows


def absolute(store: CoreStore, name: str) -> str:
    """Return the path of a file of the store."""
    return str((store.path / name).absolute())


def literal(text: str) -> str:
    """Return a text as SQL."""
    return "'" + text.replace("'", "''") + "'"
