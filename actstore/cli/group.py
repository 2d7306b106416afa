"""The command that holds all others, its errors, and options that several of them take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from actstore.cli.printing import shown
from actstore.errors import ActstoreError

Command = Callable[..., None]


def example(text: str) -> str:
    """Return the end of a help page: an example that runs."""
    return f"\b\nExample:\n  {text}"


def _complain(error: Exception) -> None:
    click.secho("error: ", fg="red", bold=True, err=True, nl=False)
    click.echo(shown(error), err=True)


class _Commands(click.Group):
    """Shows known errors in one line, and commands in the order of use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ActstoreError as error:
            if ctx.params["debug"]:
                raise
            _complain(error)
            ctx.exit(1)
        except BrokenPipeError:
            ctx.exit(0)  # whoever read has read enough
        except OSError as error:
            if ctx.params["debug"]:
                raise
            _complain(error)
            ctx.exit(1)
        except KeyboardInterrupt:
            goes_on = ctx.invoked_subcommand in ("capture", "demo")
            how = "; the same command goes on where it was" if goes_on else ""
            click.echo(f"\nstopped{how}", err=True)
            ctx.exit(130)


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=example("actstore demo"),
)
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.version_option(package_name="actstore")
def main(debug: bool) -> None:
    """Every activation of a transformer over a whole corpus: capture, factorise, ask."""


def budget_option(command: Command) -> Command:
    """Add ``--budget``."""
    return click.option(
        "--budget", metavar="SIZE", help="Peak memory beyond the model, such as 2GB."
    )(command)


def workers_options(command: Command) -> Command:
    """Add ``--workers`` and ``--scheduler``."""
    command = click.option(
        "--scheduler", metavar="ADDRESS", help="A running Dask scheduler, tcp://host:8786."
    )(command)
    return click.option(
        "--workers",
        type=int,
        help="Processes of this machine; they share its CPUs or GPUs.",
    )(command)


def format_option(command: Command) -> Command:
    """Add ``--format``."""
    return click.option(
        "--format",
        "form",
        type=click.Choice(["table", "json", "csv", "parquet"]),
        help="How to print; default a table to a terminal, JSON lines to a pipe.",
    )(command)
