"""Make the notebook of ``examples/``: ``python -m docs.notebooks [STORE]``.

Takes the demo's store, or the one given, in which it leaves what it computes.  The notebook is run
where the store looks as it does from ``examples/``, and names no folder of the machine it ran on.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

from actstore.view import to_notebook

NOTEBOOK = Path(__file__).parent.parent / "examples" / "factors_of_speeches.ipynb"
STORE = "../actstore-demo/store"
TITLE = "Which factors does MiniLM have, and which of them can one trust?"
CELLS = [
    (
        "markdown",
        "MiniLM, a BERT of six layers, has read the State of the Union speeches of two centuries. "
        "`make demo` stored what every neuron did at every token. Here all its FFNN neurons are "
        "factorised together; then we ask what each factor responds to, and which factors come "
        "back when the fit is done again, on other speeches.",
    ),
    ("code", f'import actstore\n\nstore = actstore.open("{STORE}")\nprint(store.info())'),
    (
        "markdown",
        "## The factors\n\n"
        "The matrix is one row a token and one column a neuron, all layers side by side, scaled to "
        "the same energy. It is never in memory: the fit reads it twice. The headline says how "
        "good the factors are, and how much of the energy clipping at zero discarded before them.",
    ),
    ("code", 'factors = store.nmf("mlp_post", 10)\nprint(factors)'),
    (
        "markdown",
        "Where in the model is each factor? Its energy by layer: some are of the first layers, "
        "some of the last.",
    ),
    (
        "code",
        'sites = factors.table("factor_sites").to_pandas()\n'
        'sites.pivot(index="factor", columns="layer", values="share").round(2)',
    ),
    (
        "markdown",
        "## What they respond to\n\n"
        "First token types. By the share of a factor's energy common words lead; by its mean on "
        "the type, what it singles out (types of fewer than five tokens come last). *Lift* is that "
        "mean over its mean on all rows.",
    ),
    (
        "code",
        "import pandas as pd\n\n"
        'pd.set_option("display.max_colwidth", 90)\n'
        "types = []\n"
        "for factor in range(factors.n_components):\n"
        '    by_mean = factors.token_types(factor, 8, by="mean").df()\n'
        '    by_share = factors.token_types(factor, 6, by="share").df()\n'
        "    types.append(\n"
        "        {\n"
        '            "factor": factor,\n'
        '            "most energy": " ".join(by_share["token"]),\n'
        '            "highest mean": " ".join(by_mean["token"]),\n'
        '            "lift": round(by_mean["lift"][0], 1),\n'
        "        }\n"
        "    )\n"
        'types = pd.DataFrame(types).set_index("factor")\n'
        "types",
    ),
    (
        "markdown",
        "Then the tokens themselves, in their context. A list of maxima alone misleads: beside the "
        "highest of different windows stand rows drawn at random, most of which should be low.",
    ),
    (
        "code",
        'question = """\n'
        "    SELECT factor, side, rank, round(value, 2) AS score, snippet(row_id, 8, 4) AS text\n"
        "    FROM factor_exemplars\n"
        "    WHERE kind = 'nmf' AND result = $result AND rank <= 3\n"
        "      AND side IN ('window', 'random')\n"
        "    ORDER BY factor, side DESC, rank\n"
        '"""\n'
        "store.sql(question, result=factors.name).df()",
    ),
    ("markdown", "And whole speeches: where is each factor highest on average?"),
    (
        "code",
        "pd.DataFrame(\n"
        "    {\n"
        '        factor: factors.top_documents(factor, 5).df()["source"].tolist()\n'
        "        for factor in range(factors.n_components)\n"
        "    }\n"
        ").T",
    ),
    (
        "markdown",
        "In one speech, token by token: point at a factor, or choose it, and the text is shaded by "
        "its score. (GitHub shows no such output; a notebook that you open does.)",
    ),
    ("code", "factors.view(document=store.n_documents - 1)"),
    (
        "markdown",
        "## Which of them are stable\n\n"
        "NMF has no unique optimum. So the fit is done again: from five seeds, in each of two "
        "halves of the speeches that share none. Every fit is matched to the factors above, one "
        "to one. `seed_cosine` compares loadings of two fits to the same half, `split_cosine` "
        "those of fits to different halves; the correlations are of scores on speeches that "
        "neither has seen. `null_cosine` is what factors of permuted data reach (every neuron "
        "keeps its values, at rows of its own), `runner_up_cosine` the best factor that it was "
        "not matched to. Stable is what comes back in the other half at 0.9 or more, and above "
        "both of these.",
    ),
    ("code", "stability = factors.stability()\nstability"),
    (
        "code",
        'table = stability.df().set_index("factor").drop(columns="of_result")\n'
        'table.round(2).sort_values("split_cosine", ascending=False)',
    ),
    (
        "markdown",
        "So read the stable ones as properties of the model on such text, and the others as one "
        "way among several to divide up what is left.",
    ),
    (
        "code",
        'table.loc[table.stable, ["split_cosine", "split_correlation"]].round(2).join(types)',
    ),
]
"""Kind and source of each cell below the title."""


def write(store: Path, path: Path) -> Path:
    """Run the notebook on a store and write it; return its path."""
    store = store.resolve()
    with tempfile.TemporaryDirectory() as folder:
        examples = Path(folder).resolve() / "examples"
        examples.mkdir()
        seen = Path(os.path.normpath(examples / STORE))
        seen.parent.mkdir()
        seen.symlink_to(store)
        text = to_notebook(examples / path.name, CELLS, TITLE).read_text(encoding="utf-8")
    for place in (examples / STORE, seen, store):
        text = text.replace(json.dumps(str(place))[1:-1], STORE)
    path.write_text(text, encoding="utf-8")
    return path


def main() -> None:
    """Write the notebook."""
    store = Path(sys.argv[1] if len(sys.argv) > 1 else "actstore-demo/store")
    sys.stdout.write(f"{write(store, NOTEBOOK)}\n")


if __name__ == "__main__":
    main()
