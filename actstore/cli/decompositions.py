"""Commands that compute: nmf, pca, ica, stability, similarity, shuffle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from actstore.cli.group import (
    Command,
    budget_option,
    example,
    format_option,
    main,
    workers_options,
)
from actstore.cli.printing import Bars, echo, is_terminal, shown


@main.command(epilog=example("actstore nmf actstore-demo/store --components 16 --name sixteen"))
@click.argument("store", type=click.Path(path_type=Path))
@click.option("--sites", multiple=True, default=["mlp_post"], show_default=True)
@click.option("--components", default=10, help="Number of factors.", show_default=True)
@click.option("--scale", type=click.Choice(["site", "none"]), default="site", show_default=True)
@click.option("--mode", type=click.Choice(["ecco"]), help="The objective of Ecco: no scales.")
@click.option("--signed", is_flag=True, help="Keep negative values; needs --active.")
@click.option("--active", type=float, help="With --signed: share of a row's scores above zero.")
@click.option(
    "--passes",
    default=1,
    help="Online passes; with two or more the best of several beginnings is taken.",
    show_default=True,
)
@click.option("--tolerance", type=float, help="Then run to this KKT residual.")
@click.option("--bound", type=click.Choice(["exact"]), help="Add what no factors fall below.")
@click.option("--rows", default="content", help="content, all, or an SQL condition on tokens.")
@click.option("--seed", default=0, show_default=True)
@click.option("--name", help="Name of the result; never overwritten.")
@workers_options
@budget_option
@format_option
def nmf(store: Path, form: str | None, components: int, scale: str, **options: Any) -> None:
    """Factorise sites of STORE as one non-negative matrix, out of core.

    A terminal shows the factors in brief; a pipe gets the table factors.
    """
    import actstore

    with Bars() as progress:
        factors = actstore.open(store).nmf(
            n_components=components,
            scale=None if scale == "none" else scale,
            progress=progress,
            **options,
        )
    _echo_factors(factors, form)


def linear_options(command: Command) -> Command:
    """Add the options of ``pca`` and ``ica``."""
    options = [
        click.argument("store", type=click.Path(path_type=Path)),
        click.option("--sites", multiple=True, default=["mlp_post"], show_default=True),
        click.option("--components", default=10, help="How many.", show_default=True),
        click.option("--scale", type=click.Choice(["site", "none"]), default="none"),
        click.option("--rows", default="content", help="content, all, or an SQL condition."),
        click.option("--name", help="Name of the result; never overwritten."),
    ]
    for option in reversed(options):
        command = option(command)
    return budget_option(format_option(command))


@main.command(epilog=example("actstore pca actstore-demo/store --sites mlp_post.5"))
@linear_options
def pca(store: Path, form: str | None, components: int, scale: str, **options: Any) -> None:
    """Find the principal components of sites of STORE, exactly."""
    import actstore

    scaled = None if scale == "none" else scale
    with Bars() as progress:
        opened = actstore.open(store)
        found = opened.pca(n_components=components, scale=scaled, progress=progress, **options)
    _echo_factors(found, form)


@main.command(epilog=example("actstore ica actstore-demo/store --sites mlp_post.5"))
@linear_options
@click.option("--seed", default=0, show_default=True)
def ica(store: Path, form: str | None, components: int, scale: str, **options: Any) -> None:
    """Find independent components of sites of STORE by FastICA."""
    import actstore

    scaled = None if scale == "none" else scale
    with Bars() as progress:
        opened = actstore.open(store)
        found = opened.ica(n_components=components, scale=scaled, progress=progress, **options)
    _echo_factors(found, form)


@main.command(epilog=example("actstore stability actstore-demo/store demo --seeds 3"))
@click.argument("store", type=click.Path(path_type=Path))
@click.argument("factors", required=False)
@click.option("--seeds", default=5, help="Fits to each part of the documents.", show_default=True)
@click.option("--splits", default=2, help="Disjoint parts of the documents.", show_default=True)
@click.option("--nulls", default=2, help="Fits to permuted neurons.", show_default=True)
@click.option("--seed", default=0, help="Which documents are together.", show_default=True)
@click.option("--name", help="Name of the result; never overwritten.")
@budget_option
@format_option
def stability(store: Path, factors: str | None, form: str | None, **options: Any) -> None:
    """Fit FACTORS of STORE again, by seeds and on parts of the documents; say which come back.

    FACTORS is the name of an nmf result, by default the newest.
    """
    import actstore
    from actstore.query import Answer

    with Bars() as progress:
        found = actstore.open(store).factors(factors).stability(progress=progress, **options)
    click.echo(shown(found), err=True)
    # The verdict first: a terminal may be too narrow for all columns.
    echo(Answer(found.to_arrow().select(_STABILITY)), form)


_STABILITY = [
    "factor",
    "stable",
    "split_cosine",
    "seed_cosine",
    "null_cosine",
    "runner_up_cosine",
    "cosine",
    "split_correlation",
    "seed_correlation",
    "of_result",
]


def _echo_factors(factors: Any, form: str | None) -> None:
    """Print factors in brief, or their table as data and how good they are on stderr."""
    from actstore.query import Answer
    from actstore.view import factor_table, headline

    if (form or ("table" if is_terminal() else "json")) == "table":
        click.echo(shown(headline(factors)))
        echo(factor_table(factors), "table")
    else:
        click.echo(shown(headline(factors)), err=True)
        echo(Answer(factors.table("factors")), form)


@main.command(epilog=example("actstore similarity actstore-demo/store --sites mlp_post"))
@click.argument("store", type=click.Path(path_type=Path))
@click.option("--sites", multiple=True, help="Sites or patterns; default all.")
@click.option(
    "--measure",
    type=click.Choice(["cka", "cca", "svcca", "pwcca"]),
    default="cka",
    show_default=True,
)
@click.option(
    "--method", type=click.Choice(["estimate", "exact"]), help="Of CKA; default estimate."
)
@click.option("--tolerance", default=0.005, help="Half-width to stop at.", show_default=True)
@click.option("--rows", default="content", help="content, all, or an SQL condition on tokens.")
@click.option("--standardize", is_flag=True, help="Give every column the same variance.")
@click.option(
    "--other", type=click.Path(path_type=Path), help="Another store over the same documents."
)
@click.option(
    "--variant",
    type=click.Choice(["paper", "svcca"]),
    default="paper",
    help="Of PWCCA: as in its paper, or as google/svcca and Ecco compute it.",
    show_default=True,
)
@click.option("--share", type=float, help="Of CCA: leading correlations only; 0.98 as Ecco.")
@click.option(
    "--principal",
    default=0.99,
    callback=lambda *given: given[-1] if given[-1] <= 1 else int(given[-1]),
    help="Of SVCCA: share of the variance that principal directions hold, or how many.",
    show_default=True,
)
@click.option("--seed", default=0, show_default=True)
@click.option("--name", help="Name of the result; never overwritten.")
@workers_options
@budget_option
@format_option
def similarity(store: Path, form: str | None, sites: tuple[str, ...], **options: Any) -> None:
    """Compare all pairs of sites of STORE, or its sites with those of another."""
    import actstore
    from actstore.query import Answer

    with Bars() as progress:
        found = actstore.open(store).similarity(sites or None, progress=progress, **options)
    click.echo(shown(found), err=True)
    echo(Answer(found.to_arrow()), form)


@main.command(
    epilog=example("actstore shuffle actstore-demo/store --sites mlp_post.5 --to mlp_post.5.zarr")
)
@click.argument("store", type=click.Path(path_type=Path))
@click.option("--sites", multiple=True, help="Sites or patterns; default all.")
@click.option("--to", required=True, type=click.Path(path_type=Path), help="A new folder.")
@click.option("--rows", default="content", help="content, all, or an SQL condition on tokens.")
@click.option("--seed", default=0, show_default=True)
@budget_option
def shuffle(store: Path, sites: tuple[str, ...], to: Path, **options: Any) -> None:
    """Write rows of STORE in random order, as a Zarr group to train on."""
    import actstore

    with Bars() as progress:
        made = actstore.open(store).shuffle(sites or None, to, progress=progress, **options)
    click.echo(made)
