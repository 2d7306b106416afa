"""The command that exports views, features and slices."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from actstore.cli.group import budget_option, example, main
from actstore.cli.printing import Bars

_FEATURE = ("form", "k", "before", "after")
_VIEWS = (".html", ".ipynb")
_EXPORTS: dict[str, tuple[tuple[tuple[str, ...], int, tuple[str, ...]], ...]] = {
    "overview": (((), 0, _VIEWS),),
    "factors": ((("name", "kind", "compare", "model"), 0, _VIEWS),),
    "similarity": ((("name",), 0, _VIEWS),),
    "neuron": (
        (("by", "replay", "model", "budget"), 2, _VIEWS),
        ((*_FEATURE, "replay", "model", "budget"), 2, (".json",)),
    ),
    "factor": (((*_FEATURE, "name", "kind"), 1, (".json",)),),
    "slice": ((("sites", "rows", "budget"), 0, (".parquet", ".safetensors")),),
}
"""What can be exported: for files of some endings, its options and its arguments."""
_TAKES = (
    "no further argument",
    "one further argument: FACTOR",
    "two further arguments: SITE NEURON",
)


@main.command(
    epilog="""\b
What and where to:
  overview               the store at a glance: x.html, or a notebook x.ipynb
  factors, similarity    a view: x.html or x.ipynb
  neuron SITE NEURON     a view: x.html or x.ipynb; or for other tools x.json
  factor FACTOR          statistics and exemplars in context: x.json
  slice                  activations of rows: x.parquet or x.safetensors

"""
    + example("actstore export actstore-demo/store neuron mlp_post.5 77 --to 77.json")
)
@click.argument("store", type=click.Path(path_type=Path))
@click.argument(
    "what",
    type=click.Choice(["overview", "factors", "similarity", "neuron", "factor", "slice"]),
)
@click.argument("which", nargs=-1, metavar="[SITE NEURON | FACTOR]")
@click.option("--to", required=True, type=click.Path(path_type=Path), help="A new file.")
@click.option("--name", help="Name of the result; default the newest.")
@click.option(
    "--kind", type=click.Choice(["nmf", "pca", "ica"]), help="Of factors: what computed them."
)
@click.option("--compare", metavar="NAME", help="factors: another result to compare with.")
@click.option("--by", metavar="SQL", help="neuron: what its means are grouped by; default source.")
@click.option("--form", type=click.Choice(["neuronpedia", "neuron-record"]), help="Of the JSON.")
@click.option("-k", type=int, help="Rows with the highest values.")
@click.option("--before", type=int, help="Content rows before each row.")
@click.option("--after", type=int, help="Content rows after each row.")
@click.option("--replay", is_flag=True, help="Compute values that are not stored again.")
@click.option("--model", help="The model of STORE, for --replay and promoted tokens.")
@click.option("--sites", multiple=True, help="Sites or patterns; default all.")
@click.option("--rows", help="content, all, row ids such as 5,6,7, or an SQL condition on tokens.")
@budget_option
def export(store: Path, what: str, which: tuple[str, ...], to: Path, **options: Any) -> None:
    """Write a part of STORE for other tools, or a view of it that needs no network."""
    import actstore

    given = {key: value for key, value in options.items() if value not in (None, False, ())}
    kinds = _EXPORTS[what]
    suffixes = [suffix for _, _, of in kinds for suffix in of]
    if to.suffix not in suffixes:
        raise click.UsageError(f"--to {to} must end in {' or '.join(suffixes)}")
    if not to.absolute().parent.is_dir():
        raise click.UsageError(f"--to {to} is in no folder: {to.parent} does not exist")
    allowed, n_arguments, _ = next(kind for kind in kinds if to.suffix in kind[2])
    if unknown := sorted(given.keys() - set(allowed)):
        raise click.UsageError(f"{what} as {to.suffix} takes no --{unknown[0]}")
    if len(which) != n_arguments:
        raise click.UsageError(f"{what} takes {_TAKES[n_arguments]}, not {len(which)}")
    opened = actstore.open(store)
    if to.suffix in _VIEWS:
        _export_view(opened, what, which, to, given)
    elif what == "neuron":
        opened.export_neuron(which[0], _whole(which[1]), to, **given)
    elif what == "factor":
        opened.export_factor(_whole(which[0]), to, **given)
    else:
        rows = given.pop("rows", "content")
        if all(part.strip().isdecimal() for part in rows.split(",")):
            rows = [int(part) for part in rows.split(",")]
        with Bars() as progress:
            opened.export_slice(to, given.pop("sites", None), rows=rows, progress=progress, **given)
    click.echo(to)


def _export_view(
    store: Any, what: str, which: tuple[str, ...], to: Path, given: dict[str, Any]
) -> None:
    views: dict[str, Callable[[], Any]] = {
        "overview": lambda: store,
        "factors": lambda: store.factors(given.pop("name", None), given.pop("kind", "nmf")),
        "similarity": lambda: store.similarity_result(given.pop("name", None)),
        "neuron": lambda: store.neuron(which[0], _whole(which[1]), **given),
    }
    view = views[what]()
    options = given if what == "factors" else {}
    (view.to_notebook if to.suffix == ".ipynb" else view.to_html)(to, **options)


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise click.UsageError(f"{text!r} is not a whole number") from None
