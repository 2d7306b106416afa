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
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from actstore.decompose import Factors
from actstore.errors import ArgumentError
from actstore.exporting.contexts import Context, contexts
from actstore.exporting.files import new_file, written_aside
from actstore.folds import Sample
from actstore.folds.sample import SampleState, quantile_rows
from actstore.site import Site
from actstore.store import CoreStore, Generation, SiteInfo
from actstore.store.budget import as_count
from actstore.store.stored_rows import ALL, NONE, hash_rows, keep_text

Ids = npt.NDArray[np.int64]
Values = npt.NDArray[np.float32]
Replay = Callable[[Ids], npt.NDArray[Any]]
"""Returns the values of a site at some rows, ``(n, width)``, whether they are kept or not."""

FORMS = ("neuronpedia", "neuron-record")
"""The forms a feature can be written in."""

_ROWS_AT_ONCE = 512
_NAMES = ("n", "mean", "std", "skewness", "kurtosis", "min", "max", "share_positive")


@dataclass(frozen=True)
class Shown:
    """How many rows of a neuron or factor are exported, and how much around them."""

    k: int = 20
    """Rows with the highest values, one of a window."""
    n_bins: int = 10
    """Quantile bins of the uniform sample."""
    n_each: int = 2
    """Rows from each of them."""
    n_random: int = 20
    """Rows drawn uniformly."""
    before: int = 32
    """Rows before each of them."""
    after: int = 32
    """Rows after each of them."""


@dataclass(frozen=True)
class _Column:
    """What is known of a neuron or factor over all its rows."""

    statistics: Mapping[str, Any]
    """`_NAMES`, and the quantiles as ``q01`` … ``q99``: [low, high]."""
    histogram: list[dict[str, float | int | None]]
    """The bins that hold something, ascending: low, high, n."""
    top: tuple[Ids, Values]
    """The rows with the highest values, best first, one of a window."""
    sample: tuple[Ids, Values]
    """Rows drawn uniformly, ascending, and their values."""
    values_at: Callable[[Ids], Values]
    """Returns values at any rows, NaN where they are not known."""
    what_is_known: str
    """Where values around a row come from, in words."""


@dataclass(frozen=True)
class _Exemplar:
    group: str
    number: int
    """Its place in the group, or of what quantile bin it is; from 1."""
    row_id: int
    value: float
    bin: tuple[float, float, float] | None
    """Lowest and highest value of its quantile bin, and the bin's share of the rows."""


class Feature:
    """A neuron or factor with its statistics and exemplars, ready to be written."""

    def __init__(
        self,
        store: CoreStore,
        space: str,
        identity: Mapping[str, Any],
        facts: Mapping[str, Any],
        column: _Column,
        shown: Shown,
    ) -> None:
        self._identity, self._facts, self._column = identity, facts, column
        self._quantile_edges: list[float] = []
        self._exemplars = self._choose(shown)
        ids = np.array([e.row_id for e in self._exemplars], np.int64)
        self._contexts = contexts(store, ids, shown.before, shown.after, space)
        rows = np.unique(np.concatenate([ids, *(c.row_ids for c in self._contexts)]))
        pieces = [
            column.values_at(rows[start : start + _ROWS_AT_ONCE])
            for start in range(0, len(rows), _ROWS_AT_ONCE)
        ]
        known = np.concatenate([np.empty(0, np.float32), *pieces])
        self._values = [known[np.searchsorted(rows, c.row_ids)] for c in self._contexts]
        for exemplar, context, values in zip(
            self._exemplars, self._contexts, self._values, strict=True
        ):
            values[context.place] = exemplar.value  # what is computed again may round otherwise
        self.complete = not any(np.isnan(values).any() for values in self._values)
        """Whether the value at every token of every context is known."""

    def _choose(self, shown: Shown) -> list[_Exemplar]:
        ids, values = self._column.top
        found = [
            _Exemplar("top", i + 1, row_id, value, None)
            for i, (row_id, value) in enumerate(
                zip(ids[: shown.k].tolist(), values[: shown.k].tolist(), strict=True)
            )
        ]
        ids, values = self._column.sample
        drawn = quantile_rows(values[:, None], ids, shown.n_bins, shown.n_each)
        ascending = np.sort(values)
        for b in range(shown.n_bins):
            part = ascending[b * len(ids) // shown.n_bins : (b + 1) * len(ids) // shown.n_bins]
            if not len(part):
                continue
            edges = (float(part[0]), float(part[-1]), len(part) / len(ids))
            self._quantile_edges.append(edges[1])
            for row_id, value in zip(
                drawn.row_ids[0, b].tolist(), drawn.values[0, b].tolist(), strict=True
            ):
                if row_id >= 0:
                    found.append(_Exemplar("quantile", b + 1, row_id, value, edges))
        lowest = np.argsort(hash_rows(ids, Sample.seed))[: shown.n_random]
        found += [
            _Exemplar("random", i + 1, int(ids[j]), float(values[j]), None)
            for i, j in enumerate(lowest.tolist())
        ]
        return found

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
                {**self._identity, **self._activation(*of)}
                for of in zip(self._exemplars, self._contexts, self._values, strict=True)
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

    def _activation(self, exemplar: _Exemplar, context: Context, values: Values) -> dict[str, Any]:
        low, high, share = exemplar.bin or (None, None, None)
        if exemplar.group == "top":
            low = high = share = -1.0  # so Neuronpedia knows the highest ones
        return {
            "tokens": context.tokens,
            "values": _numbers(values),
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
        groups: dict[str, list[tuple[_Exemplar, dict[str, Any]]]] = {
            "top": [],
            "quantile": [],
            "random": [],
        }
        for exemplar, context, values in zip(
            self._exemplars, self._contexts, self._values, strict=True
        ):
            record = {
                "dataclass_name": "ActivationRecord",
                "tokens": context.tokens,
                "activations": _numbers(values),
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
            "quantile_boundaries": self._quantile_edges[:-1],
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
            If the form is none, or cannot say what is not known; or `to` is no ``.json``.
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
    info = store.site(site)
    neuron = store.check_neuron(info, neuron)
    generation = store.index()
    if generation is None:
        raise ArgumentError(
            f"{store.path} has no index, which statistics and exemplars are taken from. Run "
            f"`actstore finish {store.path}`, or store.finish(), first."
        )
    identity = {
        "modelId": store.meta.model["name"],
        "layer": str(info.site),
        "index": str(neuron),  # a string there
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
    index = _IndexOfNeuron(store, generation, info, neuron)
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


@dataclass(frozen=True)
class _IndexOfNeuron:
    """Reads what a generation of the index holds of one neuron."""

    store: CoreStore
    generation: Generation
    info: SiteInfo
    neuron: int

    def _file(self, kind: str, of_space: str = "") -> Path:
        """Return a file of the site, or one that all sites of its space share."""
        site = self.info.site
        space = f"space={site.space}/" if site.space else ""
        own = of_space or f"hook={site.hook}/layer={site.layer}/"
        found = self.generation.named(f"{kind}/{space}{own}")
        self.store.verifier.check(found)
        return self.store.path / next(iter(found))

    def column(self, replay: Replay | None) -> _Column:
        name = f"{self.generation.folder}/neurons.parquet"
        self.store.verifier.check({name: self.generation.files[name]})
        mine = [("site", "=", str(self.info.site)), ("neuron", "=", self.neuron)]
        (row,) = pq.read_table(self.store.path / name, filters=mine).to_pylist()
        bins = pq.read_table(
            self._file("histograms"),
            columns=["low", "high", "n"],
            filters=[("neuron", "=", self.neuron)],
        )
        lists = pq.read_table(
            self._file("exemplars"),
            columns=["row_id", "value", "rank"],
            filters=[("neuron", "=", self.neuron), ("side", "=", "window")],
        ).sort_by("rank")
        row_ids = np.load(self._file("samples", "row_ids.npy"), allow_pickle=False)
        values = np.load(self._file("samples"), mmap_mode="r", allow_pickle=False)
        column = np.ascontiguousarray(values[:, self.neuron, None])
        sample = Sample().from_arrays({"row_ids": row_ids, "values": column})
        return _Column(
            _statistics(row),
            _bins(*(bins.column(c).to_numpy() for c in ("low", "high", "n"))),
            (lists.column("row_id").to_numpy(), lists.column("value").to_numpy()),
            _valid(sample),
            lambda ids: self._values_at(ids, replay),
            self._what_is_known(replay),
        )

    def _values_at(self, row_ids: Ids, replay: Replay | None) -> Values:
        info = self.info
        found = np.full(len(row_ids), np.nan, np.float32)
        stored = np.full(len(row_ids), info.keep == ALL)
        segments, offsets = np.divmod(row_ids, self.store.meta.segment_rows)
        if info.keep not in (ALL, NONE):
            for segment in np.unique(segments).tolist():
                mine = segments == segment
                kept = self.store.stored_offsets(info, segment)
                stored[mine] = np.isin(offsets[mine], kept)
        if stored.any():
            found[stored] = self.store[info.site][row_ids[stored]][:, self.neuron]
        if replay is not None and not stored.all():
            found[~stored] = replay(row_ids[~stored])[:, self.neuron]
        return found

    def _what_is_known(self, replay: Replay | None) -> str:
        keep = self.info.keep
        if keep == ALL:
            return "stored"
        some = "" if keep == NONE else f"stored for {keep_text(keep)} of the content rows, else "
        if replay is not None:
            return f"{some}computed again, but for the exemplar's own"
        return f"{some}not stored, and null, but for the exemplar's own"


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
    neurons = factors.top_neurons(factor, 20)
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


def _column_of_factor(factors: Factors, factor: int) -> _Column:
    def rows_of(name: str) -> pa.Table:
        return factors.result.table(name, factor=factor)

    def side(name: str) -> tuple[Ids, Values]:
        of = exemplars.filter(pc.equal(exemplars.column("side"), name)).sort_by("rank")
        return of.column("row_id").to_numpy(), of.column("value").to_numpy()

    exemplars, bins = rows_of("factor_exemplars"), rows_of("factor_histograms")
    (row,) = rows_of("factors").to_pylist()
    row_ids, values = side("random")
    ascending = np.argsort(row_ids)
    return _Column(
        _statistics({**row, "share_positive": row["active_share"]}),
        _bins(*(bins.column(c).to_numpy() for c in ("low", "high", "n"))),
        side("window"),
        (row_ids[ascending], values[ascending]),
        lambda ids: factors.scores(ids)[:, factor],
        "the scores; null at rows that the result does not have",
    )


def _statistics(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return statistics by name, quantiles as [low, high] within the extremes."""
    found: dict[str, Any] = {name: _number(row[name]) for name in _NAMES}
    for name in row:
        if name.endswith("_low"):
            quantile = name.removesuffix("_low")
            ends = np.array([row[name], row[f"{quantile}_high"]], np.float64)
            if found["min"] is not None:  # a bin may reach beyond the values that are in it
                ends = np.clip(ends, found["min"], found["max"])
            found[quantile] = _numbers(ends)
    return found


def _bins(
    low: npt.NDArray[Any], high: npt.NDArray[Any], n: npt.NDArray[Any]
) -> list[dict[str, float | int | None]]:
    ends = zip(_numbers(low), _numbers(high), n.tolist(), strict=True)
    return [{"low": a, "high": b, "n": count} for a, b, count in ends]


def _middle(low: float | None, high: float | None) -> float | None:
    """Return the middle of a bin; of one without an outer edge the edge it has."""
    return high if low is None else low if high is None else (low + high) / 2


def _valid(sample: SampleState) -> tuple[Ids, Values]:
    values = sample.values[:, 0].astype(np.float32)
    return sample.row_ids[~np.isnan(values)], values[~np.isnan(values)]


def _number(value: float | int | None) -> float | int | None:
    """Return a number as JSON knows it."""
    return value if value is not None and math.isfinite(value) else None


def _numbers(values: npt.NDArray[Any] | Sequence[float]) -> list[Any]:
    return [_number(value) for value in np.asarray(values).tolist()]
