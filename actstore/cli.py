"""The command line: one command is one call of the library.

Tables go to a terminal, JSON lines to a pipe, progress to stderr.  Exit 2 for usage, 1 for a known
error in one line; a traceback only with ``--debug``.
"""

from __future__ import annotations

import csv
import json
import math
import sys
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from decimal import Decimal
from pathlib import Path
from typing import Any

import click

from actstore.errors import ActstoreError

Command = Callable[..., None]


def example(text: str) -> str:
    """Return the end of a help page: an example that runs."""
    return f"\b\nExample:\n  {text}"


def _complain(error: Exception) -> None:
    click.secho("error: ", fg="red", bold=True, err=True, nl=False)
    click.echo(_shown(error), err=True)


def _shown(anything: Any) -> str:
    """Return text for the terminal: what came from a corpus or a store must not act there."""
    from actstore.query import visible

    return "\n".join(visible(line) for line in str(anything).split("\n"))


def _jsonable(value: Any) -> Any:
    """Return a value as JSON knows it: no NaN, no bytes."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, list):
        return [_jsonable(item) for item in value]
    if isinstance(value, dict):
        return {key: _jsonable(item) for key, item in value.items()}
    return value


def _is_terminal() -> bool:
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
        value = json.dumps(_jsonable(value), ensure_ascii=False, default=str)
    return visible(value) if terminal and isinstance(value, str) else value


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


def format_option(command: Command) -> Command:
    """Add ``--format``."""
    return click.option(
        "--format",
        "form",
        type=click.Choice(["table", "json", "csv", "parquet"]),
        help="How to print; default a table to a terminal, JSON lines to a pipe.",
    )(command)


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
        click.option("--dtype", default="auto", help="auto, float16, bfloat16 or float32."),
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


def echo(answer: Any, form: str | None) -> None:
    """Print an `Answer`."""
    terminal = _is_terminal()
    form = form or ("table" if terminal else "json")
    if form == "table":
        click.echo(str(answer))
    elif form == "json":
        for row in answer:
            click.echo(_escaped(json.dumps(_jsonable(row), ensure_ascii=False, default=str)))
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
            if Path(filename).is_relative_to(Path(__file__).parent):
                self.pause()
                click.secho("warning: ", fg="yellow", bold=True, err=True, nl=False)
                click.echo(_shown(message), err=True)
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

    def say(self, shown: Any) -> None:
        """Print something between bars."""
        self.pause()
        click.echo(_shown(shown))


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
@click.option("--workers", type=int, help="Processes of this machine, one a GPU or CPUs divided.")
@click.option("--scheduler", metavar="ADDRESS", help="A running Dask scheduler, tcp://host:8786.")
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
    click.echo(_shown(found if dry_run else made.info()))
    if not dry_run and made.timing and made.timing.n_positions:
        click.echo(_shown(made.timing), err=True)


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
    click.echo(
        _shown(found) if form == "table" else json.dumps(found.to_dict(), ensure_ascii=False)
    )


@main.command(epilog=example("actstore finish actstore-demo/store"))
@click.argument("store", type=click.Path(path_type=Path))
def finish(store: Path) -> None:
    """Compact what is committed of STORE into its index."""
    import actstore

    opened = actstore.open(store)
    with Bars() as progress:
        opened.finish(progress=progress)
    click.echo(_shown(opened.info()))


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
        _shown(found)
        if form == "table"
        else json.dumps(_jsonable(found.to_dict()), ensure_ascii=False)
    )
    if not found.ok:
        sys.exit(1)


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
        click.echo(f"({_shown(found.reached)})", err=True)


@main.command(epilog=example("actstore nmf actstore-demo/store --components 16 --name sixteen"))
@click.argument("store", type=click.Path(path_type=Path))
@click.option("--sites", multiple=True, default=["mlp_post"], show_default=True)
@click.option("--components", default=10, help="Number of factors.", show_default=True)
@click.option("--scale", type=click.Choice(["site", "none"]), default="site", show_default=True)
@click.option("--mode", type=click.Choice(["ecco"]), help="The objective of Ecco: no scales.")
@click.option("--signed", is_flag=True, help="Keep negative values; needs --active.")
@click.option("--active", type=float, help="With --signed: share of a row's scores above zero.")
@click.option("--passes", default=1, help="Online passes.", show_default=True)
@click.option("--tolerance", type=float, help="Then run to this KKT residual.")
@click.option("--bound", type=click.Choice(["exact"]), help="Add what no factors fall below.")
@click.option("--rows", default="content", help="content, all, or an SQL condition on tokens.")
@click.option("--seed", default=0, show_default=True)
@click.option("--name", help="Name of the result; never overwritten.")
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
    click.echo(_shown(found), err=True)
    echo(Answer(found.to_arrow()), form)


def _echo_factors(factors: Any, form: str | None) -> None:
    """Print factors in brief, or their table as data and how good they are on stderr."""
    from actstore.query import Answer
    from actstore.view import factor_table, headline

    if (form or ("table" if _is_terminal() else "json")) == "table":
        click.echo(_shown(headline(factors)))
        echo(factor_table(factors), "table")
    else:
        click.echo(_shown(headline(factors)), err=True)
        echo(Answer(factors.table("factors")), form)


@main.command(epilog=example("actstore similarity actstore-demo/store --sites mlp_post"))
@click.argument("store", type=click.Path(path_type=Path))
@click.option("--sites", multiple=True, help="Sites or patterns; default all.")
@click.option(
    "--measure", default="cka", help="cka, cca, svcca or pwcca.", show_default=True, metavar="NAME"
)
@click.option("--method", metavar="NAME", help="Of CKA: estimate (default) or exact.")
@click.option("--tolerance", default=0.005, help="Half-width to stop at.", show_default=True)
@click.option("--rows", default="content", help="content, all, or an SQL condition on tokens.")
@click.option("--standardize", is_flag=True, help="Give every column the same variance.")
@click.option(
    "--other", type=click.Path(path_type=Path), help="Another store over the same documents."
)
@click.option("--variant", default="paper", help="Of PWCCA: paper or svcca.", metavar="NAME")
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
@budget_option
@format_option
def similarity(store: Path, form: str | None, sites: tuple[str, ...], **options: Any) -> None:
    """Compare all pairs of sites of STORE, or its sites with those of another."""
    import actstore
    from actstore.query import Answer

    with Bars() as progress:
        found = actstore.open(store).similarity(sites or None, progress=progress, **options)
    click.echo(_shown(found), err=True)
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
@click.option("--compare", metavar="NAME", help="factors: another result to compare with.")
@click.option("--by", metavar="SQL", help="neuron: what its means are grouped by; default source.")
@click.option("--form", type=click.Choice(["neuronpedia", "neuron-record"]), help="Of the JSON.")
@click.option("-k", type=int, help="Rows with the highest values.")
@click.option("--before", type=int, help="Content rows before each row.")
@click.option("--after", type=int, help="Content rows after each row.")
@click.option("--replay", is_flag=True, help="Compute values that are not stored again.")
@click.option("--model", help="The model of STORE, if its name does not lead there.")
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
    allowed, n_arguments, _ = next(kind for kind in kinds if to.suffix in kind[2])
    if unknown := sorted(given.keys() - set(allowed)):
        raise click.UsageError(f"{what} as {to.suffix} takes no --{unknown[0]}")
    if len(which) != n_arguments:
        raise click.UsageError(f"{what} takes {n_arguments} arguments, not {len(which)}")
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
        "factors": lambda: store.factors(given.pop("name", None)),
        "similarity": lambda: store.similarity_result(given.pop("name", None)),
        "neuron": lambda: store.neuron(which[0], _whole(which[1]), **given),
    }
    view = views[what]()
    options = {"compare": given["compare"]} if "compare" in given else {}
    (view.to_notebook if to.suffix == ".ipynb" else view.to_html)(to, **options)


_FEATURE = ("form", "k", "before", "after")
_VIEWS = (".html", ".ipynb")
_EXPORTS: dict[str, tuple[tuple[tuple[str, ...], int, tuple[str, ...]], ...]] = {
    "overview": (((), 0, _VIEWS),),
    "factors": ((("name", "compare"), 0, _VIEWS),),
    "similarity": ((("name",), 0, _VIEWS),),
    "neuron": (
        (("by", "replay", "model", "budget"), 2, _VIEWS),
        ((*_FEATURE, "replay", "model", "budget"), 2, (".json",)),
    ),
    "factor": (((*_FEATURE, "name"), 1, (".json",)),),
    "slice": ((("sites", "rows", "budget"), 0, (".parquet", ".safetensors")),),
}
"""What can be exported: for files of some endings, its options and its arguments."""


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise click.UsageError(f"{text!r} is not a whole number") from None
