"""Commands that ask: sql, top."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from actstore.cli.group import example, format_option, main
from actstore.cli.printing import echo, shown


@main.command(
    epilog=example(
        'actstore sql actstore-demo/store "SELECT layer, neuron, max FROM neurons LIMIT 5"'
    )
)
@click.argument("store", type=click.Path(path_type=Path))
@click.argument("query")
@format_option
def sql(store: Path, query: str, form: str | None) -> None:
    """Answer QUERY, one SELECT over the views of STORE.

    What views and columns there are: SHOW TABLES, DESCRIBE neurons.
    """
    import actstore

    echo(actstore.open(store).sql(query), form)


@main.command(epilog=example("actstore top actstore-demo/store mlp_post.5 77 -k 10"))
@click.argument("store", type=click.Path(path_type=Path))
@click.argument("site")
@click.argument("neuron", type=int)
@click.option("-k", default=20, help="How many rows.", show_default=True)
@click.option("--smallest", is_flag=True, help="The lowest values instead of the highest.")
@click.option("--where", metavar="SQL", help="Only rows that meet it: \"source LIKE '%1946%'\".")
@click.option(
    "--distinct",
    type=click.Choice(["window", "document"]),
    help="At most one row of each, its best.",
)
@click.option("--before", default=8, help="Tokens of context before each.", show_default=True)
@click.option("--after", default=8, help="Tokens of context after each.", show_default=True)
@click.option("--activations", is_flag=True, help="Add the neuron's values over the context.")
@click.option("--replay", is_flag=True, help="The same, computing what is not stored again.")
@click.option("--model", help="For --replay: the model, if its name in STORE does not lead there.")
@click.option("--device", default="auto", help="For --replay: auto, cpu, cuda, …")
@format_option
def top(
    store: Path, site: str, neuron: int, smallest: bool, form: str | None, **options: Any
) -> None:
    """Show the tokens that drive NEURON of SITE most, in context; how they were found on stderr."""
    import actstore

    found = actstore.open(store).top(site, neuron, largest=not smallest, **options)
    echo(found, form)
    if (form or ("table" if sys.stdout.isatty() else "json")) != "table":
        click.echo(f"({shown(found.reached)})", err=True)
