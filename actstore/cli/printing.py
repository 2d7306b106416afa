"""What the command line prints: answers in their formats, progress, text made safe to look at."""

from __future__ import annotations

import csv
import json
import math
import sys
import warnings
from contextlib import ExitStack
from decimal import Decimal
from pathlib import Path
from typing import Any

import click


def shown(anything: Any) -> str:
    """Return text for the terminal: what came from a corpus or a store must not act there."""
    from actstore.query import visible

    return "\n".join(visible(line) for line in str(anything).split("\n"))


def jsonable(value: Any) -> Any:
    """Return a value as JSON knows it: no NaN, no bytes."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, list):
        return [jsonable(item) for item in value]
    if isinstance(value, dict):
        return {key: jsonable(item) for key, item in value.items()}
    return value


def is_terminal() -> bool:
    """Return whether what is printed goes to a terminal."""
    return sys.stdout.isatty()


def _escaped(text: str) -> str:
    """Return JSON in which no character acts on a terminal or ends a line: the same data."""
    from actstore.query import is_hidden

    if text.isprintable():
        return text
    signs = {"\x7f": "\\u007f"}  # the one that JSON leaves as it is
    return "".join(signs.get(c) or json.dumps(c).strip('"') if is_hidden(c) else c for c in text)


def _cell(value: Any, terminal: bool) -> Any:
    """Return a value as CSV holds it; what is only looked at must not act on the terminal."""
    from actstore.query import visible

    if isinstance(value, (list, dict)):
        value = json.dumps(jsonable(value), ensure_ascii=False, default=str)
    return visible(value) if terminal and isinstance(value, str) else value


def echo(answer: Any, form: str | None) -> None:
    """Print an `Answer`."""
    terminal = is_terminal()
    form = form or ("table" if terminal else "json")
    if form == "table":
        click.echo(str(answer))
    elif form == "json":
        for row in answer:
            click.echo(_escaped(json.dumps(jsonable(row), ensure_ascii=False, default=str)))
    elif form == "csv":
        writer = csv.writer(sys.stdout, lineterminator="\n")
        for row in (answer.columns, *answer.rows()):
            writer.writerow([_cell(value, terminal) for value in row])
    elif terminal:
        raise click.UsageError(
            "--format parquet writes bytes that are not for a terminal; send them to a file: "
            "> answer.parquet"
        )
    else:
        from pyarrow import parquet

        parquet.write_table(answer.to_arrow(), sys.stdout.buffer)


class Bars:
    """Progress bars on stderr; called as ``bars(stage, done, total)``.  Warnings stand between."""

    def __init__(self) -> None:
        self._progress: Any = None
        self._tasks: dict[str, Any] = {}
        self._leave = ExitStack()

    def __enter__(self) -> Bars:
        self._leave.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("always", module=r"actstore\.")
        show = warnings.showwarning

        def warn(message: Any, category: Any, filename: str, lineno: int, *rest: Any) -> None:
            if Path(filename).is_relative_to(Path(__file__).parents[1]):
                self.pause()
                click.secho("warning: ", fg="yellow", bold=True, err=True, nl=False)
                click.echo(shown(message), err=True)
            else:
                show(message, category, filename, lineno, *rest)

        warnings.showwarning = warn  # type: ignore[assignment]  # Any where it says more
        return self

    def __exit__(self, *_: object) -> None:
        self.pause()
        self._leave.close()

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Move the bar of a stage."""
        if not sys.stderr.isatty():
            return
        if self._progress is None:
            from rich import progress
            from rich.console import Console

            self._progress = progress.Progress(
                progress.TextColumn("{task.description:<12}"),
                progress.BarColumn(),
                progress.MofNCompleteColumn(),
                progress.TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._progress.start()
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(stage, total=None)
        self._progress.update(self._tasks[stage], completed=done, total=total or None)

    def pause(self) -> None:
        """Leave the bars as they are: what is printed next would be drawn over otherwise."""
        if self._progress is not None:
            self._progress.stop()
        self._progress, self._tasks = None, {}

    def say(self, anything: Any) -> None:
        """Print something between bars."""
        self.pause()
        click.echo(shown(anything))
