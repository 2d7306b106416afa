"""The neuron view: what one neuron does over all rows, and the texts it does it in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from actstore.counted import counted
from actstore.decompose import KINDS, Factors
from actstore.errors import ArgumentError, ModelError
from actstore.query import Answer, Database, NeuronIndex, Portrait, Shown
from actstore.query.neuron import Replay
from actstore.site import Site
from actstore.store import CoreStore
from actstore.store.budget import as_count
from actstore.store.stored_rows import keep_text
from actstore.view.cut import cut
from actstore.view.factor_detail import short
from actstore.view.notebook import neuron_notebook
from actstore.view.page import PlainTable, View, file_to_be
from actstore.view.promoted import neuron_weights, promoted_entries, promoted_table
from actstore.view.quantised import embedded, quantised

if TYPE_CHECKING:
    from actstore.models import LanguageModel

_SHOWN = Shown(k=20, n_bins=10, n_each=2, n_random=20, before=16, after=12, n_bottom=20)
_BARS = 96
_FITS = 4
_FACTORS = 6
_GROUPS_SHOWN = 24
_SCALE_QUANTILE = 0.995
_DIP = 0.25
_QUANTILES = {
    "q05": "5 % quantile",
    "q50": "median",
    "q95": "95 % quantile",
    "q99": "99 % quantile",
}

_GROUPS = {
    "top": "Highest, one a window",
    "bottom": "Lowest, one a window",
    "quantile": "Quantile bins",
    "random": "At random",
}


class Neuron:
    """A neuron of a store: its statistics, exemplars, kin and factors, and its view.

    Parameters
    ----------
    store : CoreStore
        A store with an index.
    site : str or Site
        The site.
    neuron : int
        Index of the neuron, from 0.
    database : Database
        The store's.
    replay : callable, optional
        Computes the rows of the site that are not kept; without it they are unknown.
    by : str, default "source"
        What means are grouped by: SQL on the columns of tokens, and on source, n_tokens and
        metadata of documents.
    model : callable, optional
        Loads the store's model: of a causal one the view shows the tokens that the neuron's output
        weights promote and suppress.
    named : str or Path, optional
        Where a notebook finds that model.

    Raises
    ------
    SiteNotFound, NeuronNotFound
        If there is no such site or neuron.
    ArgumentError
        If the store has no index.

    See Also
    --------
    actstore.api.Store.neuron : makes it.
    actstore.api.Store.export_neuron : the same as JSON for other tools.
    """

    def __init__(
        self,
        store: CoreStore,
        site: str | Site,
        neuron: int,
        *,
        database: Database,
        replay: Replay | None = None,
        by: str = "source",
        model: Callable[[], LanguageModel] | None = None,
        named: str | Path | None = None,
    ) -> None:
        self._index = NeuronIndex.of(store, site, neuron)
        self.store, self.by = store, by
        self.site: Site = self._index.info.site
        """Its site."""
        self.neuron: int = self._index.neuron
        """Its index there."""
        self._database, self._replay = database, replay
        self._model, self._named = model, named

    def __repr__(self) -> str:
        statistics = self.statistics
        return (
            f"<Neuron {self.site}:{self.neuron} of {self.store.path}: mean "
            f"{_words(statistics['mean'])}, max {_words(statistics['max'])} over "
            f"{counted(statistics['n'], 'content row')}>"
        )

    @cached_property
    def statistics(self) -> Mapping[str, Any]:
        """Statistics over the content rows that the index covers; quantiles as [low, high]."""
        return self._index.column().statistics

    def view(self) -> View:
        """Return the neuron view: histogram, statistics, exemplars in context, factors, kin, means.

        Reads the neuron's part of the index, the values around some 80 rows, the neuron's column
        for its means, and the loadings of the newest decompositions of its site.

        Raises
        ------
        QueryError
            If `by` is not one expression on the columns of tokens and documents.
        """
        written = None if self._model is None else self._written(self._model())
        return neuron_view(
            self._index, self._database, replay=self._replay, by=self.by, written=written
        )

    def promoted(self, k: int = 10) -> Answer:
        """Return the tokens whose logits the neuron raises and lowers most by the direct path.

        Parameters
        ----------
        k : int, default 10
            How many tokens on either side.

        Returns
        -------
        Answer
            neuron, site, side, rank, token_id, token, effect and
            deviations, as `actstore.view.Factors.promoted`.

        Raises
        ------
        ArgumentError
            If no model was given.
        ModelError, StoreMismatch
            If the model cannot be loaded, is another, is not causal, or has no direct path; or the
            site is not one of ``mlp_post``.
        """
        if self._model is None:
            raise ArgumentError(
                f"model = None; expected the model of {self.store.path}, whose output weights are "
                f"asked for. Pass it: store.neuron({str(self.site)!r}, {self.neuron}, model=…)."
            )
        weights = neuron_weights(self.store, self.site, self.neuron)
        table = promoted_table(self.store, self._model(), weights, as_count("k", k, 1), "neuron")
        mine = table.filter(table.column("site").is_valid())
        numbers = pa.array([self.neuron] * len(mine), pa.int32())
        return Answer(mine.set_column(0, "neuron", numbers))

    def _written(self, model: LanguageModel) -> dict[str, Any] | None:
        """Return the promoted tokens for the view, or why there are none."""
        if self.site.hook != "mlp_post":
            return None
        try:
            weights = neuron_weights(self.store, self.site, self.neuron)
            return promoted_entries(self.store, model, weights)[0]
        except ModelError as error:
            # A model may be given to compute values again; that it is no causal one ends nothing.
            return {"refused": str(error)}

    def to_html(self, path: str | Path) -> Path:
        """Write the neuron view as one HTML file that makes no request."""
        file_to_be(path)  # refused before the work
        return self.view().to_html(path)

    def to_notebook(self, path: str | Path) -> Path:
        """Write an executed notebook that opens the store again and shows this neuron.

        A model that was given as a module is loaded there by its name in the store.
        """
        return neuron_notebook(
            self.store.path,
            str(self.site),
            self.neuron,
            path,
            by=self.by,
            replay=self._replay is not None,
            model=self._named,
        )

    def _repr_html_(self) -> str:
        return self.view().html


def neuron_view(
    index: NeuronIndex,
    database: Database,
    *,
    replay: Replay | None = None,
    by: str = "source",
    written: Mapping[str, Any] | None = None,
) -> View:
    """Return the view of a neuron; parameters and cost as `Neuron`, and its promoted tokens."""
    store, info = index.store, index.info
    portrait = Portrait(store, info.site.space, index.column(replay), _SHOWN)
    column = portrait.column
    statistics = column.statistics
    held = [float(v) for values in portrait.values for v in values[~np.isnan(values)]]
    largest = max((abs(v) for v in held), default=1.0) or 1.0
    sizes = [abs(v) for v in held if v != 0]
    # A neuron that dips a little below zero, as GELU does, is one-sided to the eye all the same.
    signed = min(held, default=0.0) < -_DIP * max(held, default=0.0)
    kin, groups = index.kin(database), index.means(database, by, _GROUPS_SHOWN // 2)
    title = f"{info.site}, neuron {index.neuron} of {store.meta.model.get('name', store.path)}"
    return View(
        title,
        "neuron",
        {
            "facts": _facts(index, statistics),
            "statistics": _statistics(statistics),
            "histogram": _bars(column.histogram, statistics),
            "n": statistics["n"],
            "max": short(largest, 6),
            "scale": short(float(np.quantile(sizes, _SCALE_QUANTILE)), 4) if sizes else 1.0,
            "signed": signed,
            "groups": _exemplars(portrait, largest, signed),
            "known": column.what_is_known,
            "complete": portrait.complete,
            "factors": _factors(index),
            "promoted": written,
            "kin": {"measure": kin.measure, "words": kin.words, "neurons": kin.neurons},
            "means": {
                "by": by,
                "words": groups.words,
                "n_groups": groups.n_groups,
                "rows": [
                    [cut(_words(row["key"])), int(row["n"]), short(row["mean"])]
                    for row in groups.means.to_pylist()
                ],
            },
        },
        PlainTable(
            f"{title}: the rows with the highest values. The whole view needs a page or a notebook "
            "that runs scripts.",
            ["value", "row_id", "document", "text"],
            [
                [_words(e.value), str(e.row_id), c.source, "".join(map(cut, c.tokens))]
                for e, c in zip(portrait.exemplars, portrait.contexts, strict=True)
                if e.group == "top"
            ],
        ),
    )


def _facts(index: NeuronIndex, statistics: Mapping[str, Any]) -> list[list[str]]:
    info = index.info
    covered, committed = len(index.generation.covers), len(index.store.committed)
    behind = "" if covered == committed else f", {covered:,} of {counted(committed, 'segment')}"
    return [
        ["site", f"{info.site} ({info.side} of {info.module})"],
        ["rows", f"{statistics['n']:,} (content{behind})"],
        ["dtype", info.dtype],
        ["kept", keep_text(info.keep)],
    ]


def _statistics(statistics: Mapping[str, Any]) -> list[list[str]]:
    """Return what is said of all rows, as words and numbers."""
    found = [
        ["mean", _words(statistics["mean"])],
        ["standard deviation", _words(statistics["std"])],
        ["lowest", _words(statistics["min"])],
        ["highest", _words(statistics["max"])],
    ]
    if statistics["share_positive"] is not None:
        found.append(["above zero", f"{statistics['share_positive']:.1%} of rows"])
    for name, words in _QUANTILES.items():
        low, high = statistics.get(name, (None, None))
        if low is not None:
            found.append([words, f"{_words(low)} … {_words(high)}"])
    for name in ("skewness", "kurtosis"):
        found.append([name, _words(statistics[name])])
    return found


def _words(value: Any) -> str:
    """Return a number to three digits, or whatever else it is as text."""
    if value is None:
        return "none"
    return f"{value:,.3g}" if isinstance(value, float) else str(value)


def _bars(
    histogram: list[dict[str, float | int | None]], statistics: Mapping[str, Any]
) -> list[list[float]]:
    """Return [low, high, n] of the bins, those narrower than a bar of the chart joined."""
    low, high = statistics["min"], statistics["max"]
    if low is None:
        return []
    least = (high - low) / _BARS
    found: list[list[float]] = []
    for entry in histogram:
        # A bin may reach beyond the values in it, and the outermost have no outer edge.
        start = max(low, low if entry["low"] is None else entry["low"])
        stop = min(high, high if entry["high"] is None else entry["high"])
        n = entry["n"] or 0
        if found and stop - found[-1][0] <= least:
            found[-1][1:] = [stop, found[-1][2] + n]
        else:
            found.append([start, max(start, stop), n])
    return [[short(a, 6), short(b, 6), n] for a, b, n in found]


def _exemplars(portrait: Portrait, largest: float, signed: bool) -> list[list[Any]]:
    """Return [heading, rows] of each group, each row with its tokens and their values."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for exemplar, context, values in zip(
        portrait.exemplars, portrait.contexts, portrait.values, strict=True
    ):
        groups.setdefault(exemplar.group, []).append(
            {
                "row_id": exemplar.row_id,
                "value": short(exemplar.value),
                "bin": exemplar.number if exemplar.bin else None,
                "edges": [short(end) for end in exemplar.bin[:2]] if exemplar.bin else None,
                "source": context.source,
                "document": context.document,
                "place": context.place,
                "first": int(context.row_ids[0]),
                "rows": np.diff(context.row_ids).tolist(),
                "tokens": list(map(cut, context.tokens)),
                "values": embedded(quantised(values, largest, signed=signed)),
            }
        )
    return [[words, groups[group]] for group, words in _GROUPS.items() if group in groups]


def _factors(index: NeuronIndex) -> list[dict[str, Any]]:
    """Return the factors of the newest decompositions that the neuron loads on most."""
    found: list[dict[str, Any]] = []
    for result in reversed(index.store.results()):
        if result.kind not in KINDS:
            continue
        factors = Factors(index.store, result)
        if index.info.site not in [info.site for info in factors.sites]:
            continue
        place = factors.site_slice(index.info.site).start + index.neuron
        column = factors.loadings[:, place]
        best = [k for k in np.argsort(-np.abs(column), kind="stable") if column[k] != 0]
        found.append(
            {
                "result": factors.name,
                "kind": result.kind,
                "n_components": factors.n_components,
                "factors": [
                    [
                        int(k),
                        short(float(column[k]), 3),
                        int((np.abs(factors.loadings[k]) > abs(column[k])).sum()) + 1,
                    ]
                    for k in best[:_FACTORS]
                ],
            }
        )
        if len(found) == _FITS:
            break
    return found
