"""Commands that make a store and look after it: demo, capture, sites, info, finish, verify."""

from __future__ import annotations

import json
import sys
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
from actstore.cli.printing import Bars, echo, jsonable, shown


def capture_options(command: Command) -> Command:
    """Add the options that say what to capture."""
    options = [
        click.option("--sites", multiple=True, metavar="SITE", help="mlp_post, resid_post.3-5, …"),
        click.option(
            "--keep",
            metavar="FRACTION",
            help="Rows to store: all, none, 1/64, or mlp_post=1/64,resid_post=all.",
        ),
        click.option("--grams", multiple=True, metavar="SITE", help="Sites to fold a Gram of too."),
        click.option(
            "--dtype",
            type=click.Choice(["auto", "float16", "float32", "bfloat16"]),
            default="auto",
            help="How activations are stored; auto decides for each site.",
        ),
        click.option("--context", type=int, help="Tokens of a window."),
        click.option("--overlap", type=int, help="Leading tokens of a window not stored again."),
        click.option("--max-tokens", type=int, help="Tokens wanted in all."),
        click.option("--max-document-tokens", type=int, help="Tokens wanted of each document."),
        click.option("--batch-tokens", type=int, help="Tokens of one forward pass."),
        click.option("--device", default="auto", help="auto, cpu, cuda, …"),
        click.option("--encoding", default="utf-8", help="Encoding of text files."),
        click.option("--errors", default="strict", help="strict, replace or ignore bad bytes."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@main.command(epilog=example("actstore demo my-demo"))
@click.argument("folder", required=False, type=click.Path(path_type=Path))
@click.option("--causal", is_flag=True, help="The causal model SmolLM2, on fewer tokens.")
@budget_option
def demo(folder: Path | None, causal: bool, budget: str | None) -> None:
    """Run a real model over a real corpus, end to end, in minutes."""
    from actstore.demo import run_demo

    with Bars() as progress:
        run_demo(folder, causal=causal, budget=budget, say=progress.say, progress=progress)


@main.command(
    epilog=example("actstore capture ./my-model 'speeches/*.txt' runs/speeches --dry-run")
)
@click.argument("model")
@click.argument("corpus")
@click.argument("store", type=click.Path(path_type=Path))
@capture_options
@budget_option
@click.option("--on-nan", type=click.Choice(["error", "count"]), default="error")
@click.option("--on-overflow", type=click.Choice(["error", "count"]), default="count")
@click.option(
    "--order",
    type=click.Choice(["corpus", "shuffled"]),
    default="corpus",
    help="Take the documents as they come, or in random order.",
)
@click.option("--add", is_flag=True, help="Add another corpus to a finished STORE.")
@workers_options
@click.option("--segments", metavar="I::N", help="Only share I of N; then: actstore finish STORE.")
@click.option("--dry-run", is_flag=True, help="Say what it would take, and stop.")
def capture(
    model: str,
    corpus: str,
    store: Path,
    on_nan: str,
    on_overflow: str,
    order: str,
    add: bool,
    workers: int | None,
    scheduler: str | None,
    segments: str | None,
    dry_run: bool,
    **options: Any,
) -> None:
    """Run CORPUS through MODEL once and keep its activations in STORE.

    The same command goes on with a capture that was stopped.
    """
    import actstore

    options["sites"] = options["sites"] or None
    with Bars() as progress:
        if dry_run:
            found = actstore.estimate(model, corpus, store, progress=progress, **options)
        else:
            made = actstore.capture(
                model,
                corpus,
                store,
                on_nan=on_nan,
                on_overflow=on_overflow,
                order=order,
                add=add,
                workers=workers,
                scheduler=scheduler,
                segments=segments,
                progress=progress,
                **options,
            )
    click.echo(shown(found if dry_run else made.info()))
    if not dry_run and made.timing and made.timing.n_positions:
        click.echo(shown(made.timing), err=True)


@main.command(epilog=example("actstore sites ./my-model"))
@click.argument("model")
@format_option
def sites(model: str, form: str | None) -> None:
    """List what can be captured of MODEL, and where it was found."""
    import pyarrow as pa

    from actstore.models import load
    from actstore.query import Answer

    loaded = load(model, device="cpu")
    rows = [
        {"site": str(p.site), "width": p.width, "side": p.side, "module": p.module}
        for p in loaded.points.values()
    ]
    echo(Answer(pa.Table.from_pylist(rows)), form)


@main.command(epilog=example("actstore info actstore-demo/store"))
@click.argument("store", type=click.Path(path_type=Path))
@click.option(
    "--format", "form", type=click.Choice(["table", "json"]), help="As for the other commands."
)
def info(store: Path, form: str | None) -> None:
    """Show STORE at a glance: model, corpus, rows, sites, size, results."""
    import actstore

    found = actstore.open(store).info()
    form = form or ("table" if sys.stdout.isatty() else "json")
    click.echo(shown(found) if form == "table" else json.dumps(found.to_dict(), ensure_ascii=False))


@main.command(epilog=example("actstore finish actstore-demo/store"))
@click.argument("store", type=click.Path(path_type=Path))
def finish(store: Path) -> None:
    """Compact what is committed of STORE into its index."""
    import actstore

    opened = actstore.open(store)
    with Bars() as progress:
        opened.finish(progress=progress)
    click.echo(shown(opened.info()))


@main.command(epilog=example("actstore verify actstore-demo/store --rows 2000"))
@click.argument("store", type=click.Path(path_type=Path))
@click.option("--rows", default=1000, help="Rows to compute again.", show_default=True)
@click.option("--seed", default=0, help="Which rows.", show_default=True)
@click.option("--model", help="The model STORE was captured from, if its name does not lead there.")
@click.option("--device", default="auto", help="auto, cpu, cuda, …")
@budget_option
@click.option(
    "--format", "form", type=click.Choice(["table", "json"]), help="As for the other commands."
)
def verify(store: Path, rows: int, form: str | None, **options: Any) -> None:
    """Check random rows of STORE against its model; exit 1 on any mismatch."""
    import actstore

    with Bars() as progress:
        found = actstore.open(store).verify(rows, progress=progress, **options)
    form = form or ("table" if sys.stdout.isatty() else "json")
    click.echo(
        shown(found)
        if form == "table"
        else json.dumps(jsonable(found.to_dict()), ensure_ascii=False)
    )
    if not found.ok:
        sys.exit(1)
