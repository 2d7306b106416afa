"""Write docs/sql.md, the reference of views and macros, from what the code says of them."""

from pathlib import Path

from actstore.query import MACROS, VIEWS

PAGE = Path(__file__).parent / "sql.md"

_HEAD = """# SQL: views and macros

`store.sql("…")` and `actstore sql STORE "…"` answer one SELECT, or EXPLAIN, DESCRIBE or SUMMARIZE
of one, over these views and macros; `DESCRIBE neurons` says of a view what this page says. A view
may have further columns behind those named here, which its files bring. Questions to start from,
and the door to a connection that may write, are in [How to](howto.md).
"""


def page() -> str:
    """Return the page."""
    parts = [_HEAD, "\n## Views\n"]
    for name, view in VIEWS.items():
        parts.append(f"\n### {name}\n\n{view.comment[0].upper()}{view.comment[1:]}.\n\n")
        parts.append(_table(view.columns))
    parts.append("\n## Macros\n")
    for macro in MACROS.values():
        parts.append(f"\n### {macro.call}\n\n{macro.comment[0].upper()}{macro.comment[1:]}.\n")
        if macro.columns:
            parts.append("\n" + _table(macro.columns))
    return "".join(parts)


def _table(columns) -> str:
    rows = [
        f"| {column.name} | {column.type.replace('ANY', 'any')} | {column.comment} |\n"
        for column in columns
    ]
    return "| column | type | |\n| --- | --- | --- |\n" + "".join(rows)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
