"""One neuron or factor as JSON, for dashboards and for tools that have a model label neurons.

What is exported is what the index, or the result, says of the content rows it covers: statistics,
the histogram, the highest row of each of the windows with the highest values, and from a uniform
sample of rows some of every quantile bin and some of all.  Each row comes with the content rows
around it in its window and the values there: from the store where they are kept, else computed
again where the caller can do so, else unknown.  What is unknown is null, and the file says so.

Two forms of the same: ``"neuronpedia"`` has the fields of a feature and of its activations as
Neuronpedia serves and imports them; ``"neuron-record"`` is the record that OpenAI's
automated-interpretability loads, which knows no null.  Text stands in either as ASCII JSON: what a
corpus holds is escaped there, and comes back as it was.

References
----------
Neuronpedia, ``GET /api/feature/{modelId}/{layer}/{index}`` and the rows of its exports
(https://docs.neuronpedia.org/api-and-data/exports); fields as in hijohnnylin/neuronpedia,
``apps/webapp/prisma/schema.prisma``, models Neuron and Activation.
Bills et al., "Language models can explain neurons in language models", 2023; fields as in
openai/automated-interpretability, ``neuron_explainer/activations/activations.py``, ``NeuronRecord``
and ``ActivationRecord``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from actstore import arrow
from actstore.decompose import Factors
from actstore.errors import ArgumentError
from actstore.exporting.files import new_file, written_aside
from actstore.query.content_context import Context
from actstore.query.neuron import NeuronIndex, Replay
from actstore.query.portrait import (
    Column,
    Exemplar,
    Portrait,
    Shown,
    bins_of,
    numbers,
    statistics_of,
)
from actstore.site import Site
from actstore.store import CoreStore
from actstore.store.budget import as_count
from actstore.store.stored_rows import keep_text

Ids = npt.NDArray[np.int64]
Values = npt.NDArray[np.float32]

FORMS = ("neuronpedia", "neuron-record")
"""The forms a feature can be written in."""


class Feature:
    """A neuron or factor with its statistics and exemplars, ready to be written."""

    def __init__(
        self,
        store: CoreStore,
        space: str,
        identity: Mapping[str, Any],
        facts: Mapping[str, Any],
        column: Column,
        shown: Shown,
    ) -> None:
        self._identity, self._facts, self._column = identity, facts, column
        self._portrait = Portrait(store, space, column, shown)
        self.complete = self._portrait.complete
        """Whether the value at every token of every context is known."""

    def _in_context(self) -> Iterator[tuple[Exemplar, Context, Values]]:
        portrait = self._portrait
        return zip(portrait.exemplars, portrait.contexts, portrait.values, strict=True)

    def neuronpedia(self) -> dict[str, Any]:
        """Return the feature in the fields of Neuronpedia.

        Ours stand under ``"actstore"``: of the feature, and of each of its activations.
        """
        statistics = self._column.statistics
        bins = self._column.histogram
        return {
            **self._identity,
            "maxActApprox": statistics["max"],
            # Neuronpedia's features are zero or positive; of a GELU nothing is zero.
            "frac_nonzero": statistics["share_positive"],
            "freq_hist_data_bar_values": [_middle(b["low"], b["high"]) for b in bins],
            "freq_hist_data_bar_heights": [b["n"] for b in bins],
            "activations": [
                {**self._identity, **self._activation(*of)} for of in self._in_context()
            ],
            "actstore": {
                **self._facts,
                "rows": "content rows: neither special nor the first of a window without context",
                "frac_nonzero": "the share of values above zero",
                "values": self._column.what_is_known,
                "complete": self.complete,
                "statistics": statistics,
                "histogram": bins,
            },
        }

    def _activation(self, exemplar: Exemplar, context: Context, values: Values) -> dict[str, Any]:
        low, high, share = exemplar.bin or (None, None, None)
        if exemplar.group == "top":
            low = high = share = -1.0  # so Neuronpedia knows the highest ones
        return {
            "tokens": context.tokens,
            "values": numbers(values),
            "maxValue": float(np.nanmax(values)),
            "maxValueTokenIndex": int(np.nanargmax(values)),
            "minValue": float(np.nanmin(values)),
            "qualifyingTokenIndex": context.place,
            "binMin": low,
            "binMax": high,
            "binContains": share,
            "dataIndex": str(context.document),
            "dataSource": context.source,
            "actstore": {
                "group": exemplar.group,
                "bin" if exemplar.bin else "rank": exemplar.number,
                "row_id": exemplar.row_id,
                "value": exemplar.value,
                "row_ids": context.row_ids.tolist(),
            },
        }

    def neuron_record(self) -> dict[str, Any]:
        """Return the feature as a ``NeuronRecord`` of automated-interpretability.

        Raises
        ------
        ArgumentError
            If a value is not known: the record has a number at every token.
        """
        if not self.complete:
            raise ArgumentError(
                "form = 'neuron-record' has a number at every token, and not all are known: "
                f"{self._column.what_is_known}. Pass replay=True (--replay) to compute them, or "
                "form='neuronpedia', which has null there."
            )
        groups: dict[str, list[tuple[Exemplar, dict[str, Any]]]] = {
            "top": [],
            "quantile": [],
            "random": [],
        }
        for exemplar, context, values in self._in_context():
            record = {
                "dataclass_name": "ActivationRecord",
                "tokens": context.tokens,
                "activations": numbers(values),
            }
            groups[exemplar.group].append((exemplar, record))
        by_bin: dict[int, list[dict[str, Any]]] = {}
        for exemplar, record in groups["quantile"]:
            by_bin.setdefault(exemplar.number, []).append(record)
        statistics = self._column.statistics
        std = statistics["std"]
        return {
            "dataclass_name": "NeuronRecord",
            "neuron_id": {
                "dataclass_name": "NeuronId",
                "layer_index": self._facts["layer"],
                "neuron_index": int(self._identity["index"]),
            },
            "random_sample": [record for _, record in groups["random"]],
            "random_sample_by_quantile": list(by_bin.values()),
            "quantile_boundaries": self._portrait.quantile_edges[:-1],
            "mean": statistics["mean"],
            "variance": None if std is None else std**2,
            "skewness": statistics["skewness"],
            "kurtosis": statistics["kurtosis"],
            "most_positive_activation_records": [record for _, record in groups["top"]],
        }

    def write(self, to: str | Path, form: str = "neuronpedia") -> Path:
        """Write the feature as one JSON file.

        Raises
        ------
        ArgumentError
            If the form is none, or cannot say what is not known; or `to` is no ``.json``, or in no
        folder.
        ResultExists
            If there is something at `to`.
        """
        check_form(form)
        path = new_json(to)
        document = self.neuronpedia() if form == "neuronpedia" else self.neuron_record()
        with written_aside(path) as partial:
            text = json.dumps(document, indent=1, allow_nan=False)
            partial.write_text(text + "\n", encoding="ascii")
        return path


def new_json(to: str | Path) -> Path:
    """Return the path of a JSON file to be made, or raise as `Feature.write` does."""
    return new_file(to, (".json",))


def check_form(form: str) -> None:
    """Raise `ArgumentError` unless a feature can be written in a form."""
    if form not in FORMS:
        raise ArgumentError(f"form = {form!r} is not one of {', '.join(map(repr, FORMS))}.")


def neuron_feature(
    store: CoreStore,
    site: str | Site,
    neuron: int,
    shown: Shown | None = None,
    *,
    replay: Replay | None = None,
) -> Feature:
    """Return a neuron with its statistics and exemplars over the rows that the index covers.

    Cost: its rows of the index, and the rows around each exemplar.

    Parameters
    ----------
    store : CoreStore
        A store with an index.
    site : str or Site
        The site.
    neuron : int
        Index of the neuron, from 0.
    shown : Shown, optional
        How many rows, and how much around them.
    replay : callable, optional
        Computes the rows of the site that are not kept.

    Raises
    ------
    SiteNotFound, NeuronNotFound
        If there is no such site or neuron.
    ArgumentError
        If the store has no index.
    """
    index = NeuronIndex.of(store, site, neuron)
    info, generation = index.info, index.generation
    identity = {
        "modelId": store.meta.model["name"],
        "layer": str(info.site),
        "index": str(index.neuron),  # a string there
        "hookName": _hook_name(info.site),
    }
    facts = {
        **_facts(store),
        "site": str(info.site),
        "layer": info.site.layer,
        "dtype": info.dtype,
        "kept": keep_text(info.keep),
        "index_generation": generation.number,
        "segments": len(generation.covers),
        "committed_segments": len(store.committed),
    }
    return Feature(store, info.site.space, identity, facts, index.column(replay), shown or Shown())


def _hook_name(site: Site) -> str:
    """Return the name of a site in TransformerLens."""
    hook = "mlp.hook_post" if site.hook == "mlp_post" else f"hook_{site.hook}"
    blocks = f"{site.space}.{site.layer}" if site.space else f"blocks.{site.layer}"
    return f"{blocks}.{hook}"


def _facts(store: CoreStore) -> dict[str, Any]:
    return {
        "store_id": store.meta.store_id,
        "model": store.meta.model["name"],
        "revision": store.meta.model.get("revision"),
        "n_rows": store.n_rows(),
        "n_documents": store.n_documents,
    }


def factor_feature(factors: Factors, factor: int, shown: Shown | None = None) -> Feature:
    """Return a factor with the statistics of its scores, and its exemplars.

    Cost: its rows of the tables, and the scores around each exemplar.

    Parameters
    ----------
    factors : Factors
        The decomposition.
    factor : int
        Number of the factor, from 0.
    shown : Shown, optional
        How many rows, and how much around them.

    Raises
    ------
    ArgumentError
        If there is no such factor.
    """
    store, summary = factors.store, factors.summary
    factor = as_count("factor", factor, 0, factors.n_components - 1)
    name = f"{factors.result.kind}-{factors.name}"
    neurons = Factors.top_neurons(factors, factor, 20)  # as Arrow, however a subclass shows it
    identity = {
        "modelId": store.meta.model["name"],
        "layer": name,
        "index": str(factor),
        "hookName": None,
    }
    facts = {
        **_facts(store),
        "site": None,
        "layer": name,
        "result": name,
        "sites": [str(info.site) for info in factors.sites],
        "n_components": factors.n_components,
        "rows_of_the_result": summary["rows"],
        "top_neurons": neurons.select(["site", "neuron", "loading"]).to_pylist(),
    }
    column = _column_of_factor(factors, factor)
    return Feature(store, summary["space"], identity, facts, column, shown or Shown())


def _column_of_factor(factors: Factors, factor: int) -> Column:
    def rows_of(name: str) -> pa.Table:
        return factors.result.table(name, factor=factor)

    def side(name: str) -> tuple[Ids, Values]:
        of = exemplars.filter(pc.equal(exemplars.column("side"), name)).sort_by("rank")
        return arrow.numbers(of.column("row_id")), arrow.numbers(of.column("value"))

    exemplars, bins = rows_of("factor_exemplars"), rows_of("factor_histograms")
    (row,) = rows_of("factors").to_pylist()
    row_ids, values = side("random")
    ascending = np.argsort(row_ids)
    return Column(
        statistics_of({**row, "share_positive": row["active_share"]}),
        bins_of(*(arrow.numbers(bins.column(c)) for c in ("low", "high", "n"))),
        side("window"),
        side("bottom"),
        (row_ids[ascending], values[ascending]),
        lambda ids: factors.scores(ids)[:, factor],
        "the scores; null at rows that the result does not have",
    )


def _middle(low: float | None, high: float | None) -> float | None:
    """Return the middle of a bin; of one without an outer edge the edge it has."""
    return high if low is None else low if high is None else (low + high) / 2
