"""Answers: tables that print themselves.

Text from a corpus is untrusted: it may hold escape sequences that repaint a terminal, marks that
turn the reading direction, or markup.  What is printed shows such characters instead of obeying
them; what is returned as data is untouched.
"""

from __future__ import annotations

import html
import io
import itertools
import shutil
import unicodedata
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    import pandas as pd

_SHOWN_ROWS = 40
_SHOWN_CHARACTERS = 2000
_CELL_WIDTHS = (48, 32, 24, 16)  # the widest that shows the most columns is taken
_SIGNS = {"\n": "↵", "\r": "␍", "\t": "⇥"}
_HIDDEN = {"Cc", "Cf", "Co", "Cs", "Zl", "Zp"}  # controls, formats, private use, separators


def visible(text: str) -> str:
    r"""Return a text with the characters that act, or cannot be seen, made visible.

    Examples
    --------
    >>> visible("one\ntwo \x1b[31m")
    'one↵two \\x1b[31m'
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(_sign(c) if is_hidden(c) else c for c in text)


def is_hidden(character: str) -> bool:
    """Return whether a character acts on what shows it, or cannot be seen."""
    return unicodedata.category(character) in _HIDDEN


def _sign(character: str) -> str:
    return _SIGNS.get(character) or character.encode("unicode_escape", "surrogatepass").decode()


def _unique(names: list[str]) -> list[str]:
    """Return names with a number behind those that stand there already: text, text_1."""
    found: list[str] = []
    for name in names:
        candidates = itertools.chain([name], (f"{name}_{i}" for i in itertools.count(1)))
        found.append(next(c for c in candidates if c not in found))
    return found


def _with_integers(table: pa.Table) -> pa.Table:
    """Return a table whose sums of integers are integers, where they fit into 64 bits.

    DuckDB adds integers in 128 bits, which Arrow and pandas hold as decimal numbers.
    """
    for place, kind in enumerate(table.schema.types):
        if kind == pa.decimal128(38, 0):
            with suppress(pa.ArrowInvalid):
                column = table.column(place).cast(pa.int64())
                table = table.set_column(place, table.column_names[place], column)
    return table


class Answer:
    """The answer to a question: a table, already in memory.

    It prints as a table in a terminal and in a notebook.  ``len`` counts its rows; iterating gives
    them as dicts.  pandas, Polars, pyarrow and DuckDB take it for a table.

    Parameters
    ----------
    table : pyarrow.Table
        The rows.
    """

    uncut: frozenset[str] = frozenset()
    """Columns that are printed whole."""

    def __init__(self, table: pa.Table) -> None:
        # Rows are given as dicts, so every column needs a name of its own.
        self._table = _with_integers(table.rename_columns(_unique(table.column_names)))

    def to_arrow(self) -> pa.Table:
        """Return the answer as an Arrow table."""
        return self._table

    def __arrow_c_stream__(self, requested_schema: object | None = None) -> object:
        return self._table.__arrow_c_stream__(requested_schema)

    def df(self) -> pd.DataFrame:
        """Return the answer as a pandas DataFrame."""
        return self._table.to_pandas()

    def rows(self) -> list[tuple[Any, ...]]:
        """Return the rows as tuples."""
        columns = [column.to_pylist() for column in self._table.columns]
        return list(zip(*columns, strict=True))

    @property
    def columns(self) -> list[str]:
        """The names of the columns."""
        return list(self._table.column_names)

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in self._table.to_batches():
            yield from batch.to_pylist()

    def __repr__(self) -> str:
        if self.columns == ["explain_key", "explain_value"]:
            lines = "\n".join(str(row["explain_value"]) for row in self).split("\n")
            return "\n".join(visible(line) for line in lines)
        width = max(40, shutil.get_terminal_size((120, 24)).columns)
        rows = Answer(self._table.slice(0, _SHOWN_ROWS)).rows()
        plain = [[visible(name) for name in self.columns], *([_plain(v) for v in r] for r in rows)]
        cells, shown = plain, 0
        for cell_width in _CELL_WIDTHS:
            narrower = [
                [
                    cell if name in self.uncut else fit(cell, cell_width, name)
                    for cell, name in zip(row, self.columns, strict=True)
                ]
                for row in plain
            ]
            n_columns = _columns_that_fit(narrower, width)
            if n_columns > shown:  # cut no cell more than shows another column
                cells, shown = narrower, n_columns
        table = Table(box=None, pad_edge=False, header_style="", show_edge=False)
        for place in range(shown):
            kind = self._table.schema.field(place).type
            right = pa.types.is_integer(kind) or pa.types.is_floating(kind)
            right = right or self.columns[place] == "before"
            table.add_column(
                Text(cells[0][place]), justify="right" if right else "left", no_wrap=True
            )
        for row in cells[1:]:
            table.add_row(*(Text(cell) for cell in row[:shown]))
        out = io.StringIO()
        Console(file=out, width=width, color_system=None, legacy_windows=False).print(table)
        lines = [line.rstrip() for line in out.getvalue().splitlines()]
        return "\n".join([*lines, *self._footer(shown)])

    def _footer(self, shown: int) -> list[str]:
        """Return the lines that say what of the answer is not printed above them."""
        lines = []
        if len(self) > _SHOWN_ROWS:
            lines.append(f"… {len(self) - _SHOWN_ROWS:,} more of {len(self):,} rows")
        if len(self) == 0:
            lines.append("no rows")
        if shown < len(self.columns):
            hidden = ", ".join(visible(name) for name in self.columns[shown:])
            lines.append(f"… not shown: {hidden}")
        return lines

    def _repr_html_(self) -> str:
        names = "".join(f"<th>{html.escape(visible(name))}</th>" for name in self.columns)
        body = []
        for row in Answer(self._table.slice(0, _SHOWN_ROWS)).rows():
            cells = (html.escape(_plain(value)) for value in row)
            body.append("<tr>" + "".join(f'<td dir="auto">{cell}</td>' for cell in cells) + "</tr>")
        footer = "".join(f"<p>{html.escape(line)}</p>" for line in self._footer(len(self.columns)))
        return (
            f"<table><thead><tr>{names}</tr></thead><tbody>{''.join(body)}</tbody></table>{footer}"
        )


def _plain(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:.6g}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_plain(item) for item in value) + "]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_plain(k)}: {_plain(v)}" for k, v in value.items()) + "}"
    text = str(value)
    if len(text) > _SHOWN_CHARACTERS:  # more than a cell holds: the ends are enough
        text = f"{text[: _SHOWN_CHARACTERS // 2]}…{text[-_SHOWN_CHARACTERS // 2 :]}"
    return visible(text)


def fit(text: str, width: int, name: str) -> str:
    """Return a text cut to a cell; of the context before a token the end is what matters."""
    if cell_len(text) <= width:
        return text
    kept, used = [], 1
    for character in reversed(text) if name == "before" else text:
        used += cell_len(character)
        if used > width:
            break
        kept.append(character)
    return "…" + "".join(reversed(kept)) if name == "before" else "".join(kept) + "…"


def _columns_that_fit(rows: list[list[str]], width: int) -> int:
    """Return how many leading columns can be printed side by side; at least one."""
    n_columns = len(rows[0])
    used = 0
    for place in range(n_columns):
        used += max(cell_len(row[place]) for row in rows) + (2 if place else 0)
        if used > width and place > 0:
            return place
    return n_columns
