"""The views and macros of a store: their columns, and what each means.

A view has these columns whether or not there is anything behind it yet, then whatever further ones
its files bring.  The words here become the comments of the columns in DuckDB (``DESCRIBE neurons``,
``SELECT column_name, comment FROM duckdb_columns()``) and the reference in the documentation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Column:
    """A column of a view."""

    name: str
    """Its name."""
    type: str
    """Its DuckDB type where no file says another."""
    comment: str
    """What it means."""


@dataclass(frozen=True)
class View:
    """A view of the store."""

    comment: str
    """What one row of it is."""
    columns: tuple[Column, ...]
    """Its columns, in order."""
    table: str | None = None
    """The Parquet table of results it shows, where it shows results."""


@dataclass(frozen=True)
class Macro:
    """A macro of the store."""

    call: str
    """How it is called, with its defaults."""
    comment: str
    """What it gives."""
    columns: tuple[Column, ...] = ()
    """The columns of a table; without any it is a value."""
    reads: tuple[str, ...] = ()
    """The views it reads."""
    constant: tuple[str, ...] = ()
    """Its parameters, where all arguments must be constants: it is computed before the query."""


def _columns(*columns: tuple[str, str, str]) -> tuple[Column, ...]:
    return tuple(Column(*column) for column in columns)


_SITE = _columns(
    ("site", "VARCHAR", "name of the site, such as 'mlp_post.5'"),
    ("space", "VARCHAR", "'encoder' or 'decoder'; empty where the model has one space"),
    ("hook", "VARCHAR", "hook point"),
    ("layer", "INTEGER", "number of the block, from 0"),
)
_RESULT = _columns(
    ("kind", "VARCHAR", "kind of the result: 'nmf', 'pca', 'ica' …"),
    ("result", "VARCHAR", "name of the result"),
)
_EXEMPLAR = _columns(
    ("side", "VARCHAR", "'top' for the highest values, 'bottom' the lowest, 'window' one a window"),
    ("rank", "INTEGER", "place in that list, from 1; equal values in the order of rows"),
    ("row_id", "BIGINT", "the row; see `tokens`"),
    ("value", "FLOAT", "value at that row"),
    ("document", "BIGINT", "document of the row"),
    ("position", "INTEGER", "position of the row in its window"),
    ("token_id", "INTEGER", "token of the row; see `vocabulary`"),
)
_QUANTILES = tuple(
    (f"q{q}_{end}", "DOUBLE", f"{end} end of the histogram bin of the {q} % quantile")
    for q in ("01", "05", "25", "50", "75", "95", "99")
    for end in ("low", "high")
)
_FACTOR = Column("factor", "INTEGER", "number of the factor, from 0")
_PLACE = Column("rank", "INTEGER", "place by the mean, from 1; those of fewer than 5 rows last")
_ON_GROUP = _columns(
    ("n", "BIGINT", "rows of it that have scores"),
    ("mean", "DOUBLE", "mean score on them"),
    ("share", "DOUBLE", "share of the factor's energy, of its squared scores, that lies there"),
)

VIEWS: Mapping[str, View] = {
    "documents": View(
        "a source text of the plan",
        _columns(
            ("document", "BIGINT", "number of the document, from 0"),
            ("source", "VARCHAR", "where it came from: a file, or a row of a data set"),
            ("n_tokens", "BIGINT", "tokens of its text"),
            ("text", "VARCHAR", "its text as far as it was tokenised"),
            (
                "metadata",
                "VARCHAR",
                "what came with it, a JSON object: metadata->>'$.speaker'",
            ),
        ),
    ),
    "vocabulary": View(
        "a token type of the tokenizer",
        _columns(
            ("token_id", "INTEGER", "number of the token type"),
            ("text", "VARCHAR", "its text, with real whitespace"),
            ("piece", "VARCHAR", "the tokenizer's own spelling of it"),
        ),
    ),
    "tokens": View(
        "a committed row: one token of one space",
        _columns(
            ("row_id", "BIGINT", "the row: segment * S + offset; stable, ordered, not dense"),
            ("document", "BIGINT", "document the token is of"),
            ("window_id", "BIGINT", "span of the document that went through the model at once"),
            ("position", "INTEGER", "index of the token in its window"),
            ("doc_position", "INTEGER", "index of the token in its document; -1 if special"),
            ("token_id", "INTEGER", "number of the token type"),
            ("text", "VARCHAR", "text of the token type, from `vocabulary`"),
            ("char_start", "INTEGER", "first code point in the document's text, from 0"),
            ("char_end", "INTEGER", "code point past the last"),
            ("special", "BOOLEAN", "added by the tokenizer, such as [CLS]; not a content row"),
            ("first", "BOOLEAN", "first of a window without left context; not a content row"),
            ("generated", "BOOLEAN", "written by the model itself"),
            ("space", "VARCHAR", "'encoder' or 'decoder'; empty where the model has one space"),
        ),
    ),
    "sites": View(
        "a captured site",
        _SITE
        + _columns(
            ("width", "INTEGER", "neurons, or channels in a residual site"),
            ("dtype", "VARCHAR", "stored dtype"),
            ("module", "VARCHAR", "module of the model whose input or output is stored"),
            ("side", "VARCHAR", "'input' or 'output' of that module"),
            ("path", "VARCHAR", "folder of the Zarr array inside the store"),
            ("keep", "DOUBLE", "part of its content rows that is stored: 1, a power of 2, or 0"),
        ),
    ),
    "neurons": View(
        "a neuron and its statistics over the content rows that the index covers",
        _SITE
        + _columns(
            ("neuron", "INTEGER", "index of the neuron, from 0"),
            ("n", "BIGINT", "content rows, NaN left out"),
            ("mean", "DOUBLE", "mean"),
            ("std", "DOUBLE", "standard deviation, over n"),
            ("min", "DOUBLE", "lowest value"),
            ("max", "DOUBLE", "highest value"),
            ("share_positive", "DOUBLE", "share of rows above zero"),
            ("skewness", "DOUBLE", "third standardised moment"),
            ("kurtosis", "DOUBLE", "fourth standardised moment, less 3"),
            *_QUANTILES,
            ("energy", "DOUBLE", "sum of squares"),
            ("energy_positive", "DOUBLE", "sum of squares of the values above zero"),
            ("other_n", "BIGINT", "special and first rows"),
            ("other_mean", "DOUBLE", "mean over those"),
            ("other_std", "DOUBLE", "standard deviation over those"),
            ("other_min", "DOUBLE", "lowest value of those"),
            ("other_max", "DOUBLE", "highest value of those"),
        ),
    ),
    "histograms": View(
        "a bin of a neuron's histogram that holds a value; the bins are the same for all neurons",
        _SITE
        + _columns(
            ("neuron", "INTEGER", "index of the neuron, from 0"),
            ("bin", "INTEGER", "number of the bin, 0 to 255; bins ascend with the value"),
            ("low", "FLOAT", "least value of the bin"),
            ("high", "FLOAT", "greatest value of the bin; infinite in the last of each sign"),
            ("n", "BIGINT", "content rows in it, of those that the index covers"),
        ),
    ),
    "exemplars": View(
        "a row among the highest or lowest of a neuron, over the rows that the index covers",
        (*_SITE, Column("neuron", "INTEGER", "index of the neuron, from 0"), *_EXEMPLAR),
    ),
    "factors": View(
        "a factor of a decomposition and the statistics of its scores, over the rows that have any",
        (
            *_RESULT,
            _FACTOR,
            *_columns(
                ("share", "DOUBLE", "share of the energy of all sites that it explains"),
                ("active_share", "DOUBLE", "share of rows with a score above zero"),
                (
                    "effective_neurons",
                    "DOUBLE",
                    "1 over the sum of fourth powers of its loadings",
                ),
                ("peak_position", "INTEGER", "position in the window with most of its energy"),
                ("peak_position_share", "DOUBLE", "share of its energy, of squared scores, there"),
                ("early_share", "DOUBLE", "share of its energy in positions 0 to 3"),
                ("n", "BIGINT", "rows that have scores"),
                ("mean", "DOUBLE", "mean score"),
                ("std", "DOUBLE", "standard deviation, over n"),
                ("min", "DOUBLE", "lowest score"),
                ("max", "DOUBLE", "highest score"),
                ("skewness", "DOUBLE", "third standardised moment"),
                ("kurtosis", "DOUBLE", "fourth standardised moment, less 3"),
                *_QUANTILES,
                ("energy", "DOUBLE", "sum of squared scores"),
                ("energy_positive", "DOUBLE", "sum of squares of the scores above zero"),
            ),
        ),
        "factors",
    ),
    "loadings": View(
        "the weight of a neuron in a factor",
        (
            *_RESULT,
            _FACTOR,
            *_SITE,
            Column("neuron", "INTEGER", "index of the neuron, from 0"),
            Column("loading", "FLOAT", "its weight in the factor"),
        ),
        "loadings",
    ),
    "factor_exemplars": View(
        "a row that shows what a factor responds to: of its highest scores, or drawn",
        (
            *_RESULT,
            _FACTOR,
            Column(
                "side",
                "VARCHAR",
                "'top' for the highest scores, 'window' one a window, 'bottom' the lowest where "
                "scores have both signs, 'quantile' of a quantile bin, 'random' a uniform sample",
            ),
            *_EXEMPLAR[1:],
            Column("bin", "INTEGER", "quantile bin, from 1; NULL on other sides"),
        ),
        "factor_exemplars",
    ),
    "factor_positions": View(
        "a position of the window, and how high a factor is there",
        (*_RESULT, _FACTOR, Column("position", "INTEGER", "index in the window"), *_ON_GROUP),
        "factor_positions",
    ),
    "factor_documents": View(
        "a document, and how high a factor is in it; of each factor the 500 with the highest mean "
        "and the 500 with the largest share",
        (*_RESULT, _FACTOR, _PLACE, Column("document", "BIGINT", "the document"), *_ON_GROUP),
        "factor_documents",
    ),
    "factor_tokens": View(
        "a token type, and how high a factor is on it; of each factor the 100 with the highest "
        "mean and the 100 with the largest share",
        (
            *_RESULT,
            _FACTOR,
            _PLACE,
            Column("token_id", "INTEGER", "the token type; see `vocabulary`"),
            *_ON_GROUP,
            Column("lift", "DOUBLE", "that mean over the factor's mean on all rows"),
        ),
        "factor_tokens",
    ),
    "factor_histograms": View(
        "a bin of the histogram of a factor's scores; the bins are those of `histograms`",
        (
            *_RESULT,
            _FACTOR,
            *_columns(
                ("bin", "INTEGER", "number of the bin, 0 to 255; bins ascend with the score"),
                ("low", "FLOAT", "least score of the bin"),
                ("high", "FLOAT", "greatest score of the bin; infinite in the last of each sign"),
                ("n", "BIGINT", "rows in it"),
            ),
        ),
        "factor_histograms",
    ),
    "factor_sites": View(
        "how much of a factor lies at a site",
        (
            *_RESULT,
            _FACTOR,
            *_SITE,
            Column("share", "DOUBLE", "share of the factor's energy that lies there"),
        ),
        "factor_sites",
    ),
    "factor_stability": View(
        "how a factor comes back in fits from other seeds and to other documents",
        (
            *_RESULT,
            Column("of_result", "VARCHAR", "name of the decomposition that the factor is of"),
            _FACTOR,
            *_columns(
                ("cosine", "DOUBLE", "cosine with its match in each fit, on average"),
                ("seed_cosine", "DOUBLE", "of its matches in two fits to the same documents"),
                ("split_cosine", "DOUBLE", "of its matches in fits to disjoint documents"),
                ("seed_correlation", "DOUBLE", "of the scores of the former on held-out rows"),
                ("split_correlation", "DOUBLE", "of the scores of the latter on held-out rows"),
                ("null_cosine", "DOUBLE", "with its match in fits to permuted neurons"),
                ("runner_up_cosine", "DOUBLE", "highest with a factor that it was not matched to"),
                ("stable", "BOOLEAN", "found in other documents at 0.9, and above those two"),
            ),
        ),
        "factor_stability",
    ),
    "similarity": View(
        "how alike two sites are",
        _RESULT
        + _columns(
            ("site_a", "VARCHAR", "one site"),
            ("site_b", "VARCHAR", "the other"),
            ("value", "DOUBLE", "the measure; which one is told by `results`"),
            ("low", "DOUBLE", "lower end of its 95 % interval for this store"),
            ("high", "DOUBLE", "upper end of it; the value itself where all rows were read"),
            ("text_low", "DOUBLE", "lower end of its 95 % interval for text like this; or NULL"),
            ("text_high", "DOUBLE", "upper end of that"),
            ("null_mean", "DOUBLE", "mean over 20 shifts of one side by whole documents"),
            ("null_p95", "DOUBLE", "95th percentile of those"),
            ("rank_a", "INTEGER", "directions kept of site_a, in the CCA family"),
            ("rank_b", "INTEGER", "directions kept of site_b"),
            ("max_channel_share_a", "DOUBLE", "largest share of site_a's variance in one channel"),
            ("max_channel_share_b", "DOUBLE", "the same of site_b"),
            ("biased", "DOUBLE", "exact CKA without debiasing"),
            ("r2", "DOUBLE", "mean squared canonical correlation"),
            ("weighing_site", "VARCHAR", "the site by which PWCCA weighs"),
        ),
        "similarity",
    ),
    "results": View(
        "a result computed from the store and kept in it",
        _RESULT
        + _columns(
            ("created", "VARCHAR", "time it was written, ISO 8601, UTC"),
            ("sites", "VARCHAR[]", "the sites it was computed from"),
            ("n_rows", "BIGINT", "rows it was computed from"),
            ("document", "VARCHAR", "all that is known of it, a JSON object: document->>'$.seed'"),
        ),
    ),
}
"""The views of a store by name, each after those it reads."""

# Of documents only what tokens do not have: `text` is then the token's.
DOCUMENT_COLUMNS = ("source", "n_tokens", "metadata")
"""Columns of `documents` that conditions and groups may name beside those of `tokens`."""

TOKENS_AND_DOCUMENTS = (
    f"FROM tokens JOIN (SELECT document, {', '.join(DOCUMENT_COLUMNS)} FROM documents) "
    "AS documents USING (document)"
)
"""What conditions on rows and groups of rows are asked of."""

READS: Mapping[str, tuple[str, ...]] = {"tokens": ("vocabulary",)}
"""The views that a view reads."""

MACROS: Mapping[str, Macro] = {
    "top_tokens": Macro(
        "top_tokens(site, neuron, k := 20)",
        "the strongest rows of a neuron, from the index",
        _columns(
            ("rank", "INTEGER", "place in the list, from 1"),
            ("row_id", "BIGINT", "the row"),
            ("value", "FLOAT", "value at that row"),
            ("document", "BIGINT", "document of the row"),
            ("position", "INTEGER", "position of the row in its window"),
            ("token_id", "INTEGER", "token of the row"),
            ("token", "VARCHAR", "text of the token type"),
        ),
        ("exemplars", "vocabulary"),
    ),
    "snippet": Macro(
        "snippet(row_id, before := 8, after := 8, space := '')",
        "the text around a row, a VARCHAR: so many tokens before and after it",
    ),
    "activations": Macro(
        "activations(site, neuron, rows := 'content')",
        "a neuron's stored column; rows := 'all' adds special and first rows; arguments are "
        "constants or $parameters",
        _columns(
            ("row_id", "BIGINT", "the row; join with `tokens`"),
            ("value", "FLOAT", "value at that row; NULL where it is NaN"),
        ),
        constant=("site", "neuron", "rows"),
    ),
    "means": Macro(
        "means(site, key, rows := 'content')",
        "the mean of every neuron of a site in each group of rows; key is SQL on the columns of "
        "`tokens`, and on source, n_tokens and metadata of `documents`; arguments are constants or "
        "$parameters; where not all rows are stored, rows := 'stored' takes those that are",
        _columns(
            ("key", "ANY", "value of the key, which tells the groups apart"),
            ("neuron", "INTEGER", "index of the neuron, from 0"),
            ("n", "BIGINT", "content rows of the group, NaN left out"),
            ("mean", "DOUBLE", "mean over them"),
        ),
        constant=("site", "key", "rows"),
    ),
}
"""The macros of a store by name."""
