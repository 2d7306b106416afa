"""What a store knows of one neuron: its column of the index, its kin, and its means by source."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from actstore import arrow, durable
from actstore.errors import ArgumentError
from actstore.folds import Gram, Sample
from actstore.query.database import Database
from actstore.query.means import check_key
from actstore.query.portrait import (
    Column,
    Ids,
    Values,
    bins_of,
    statistics_of,
    valid_sample,
)
from actstore.query.schema import TOKENS_AND_DOCUMENTS
from actstore.site import Site
from actstore.store import CoreStore, Generation, SiteInfo
from actstore.store.generations import site_file
from actstore.store.stored_rows import ALL, NONE, keep_text

Replay = Callable[[Ids], npt.NDArray[Any]]
"""Returns the values of a site at some rows, ``(n, width)``, whether they are kept or not."""

_LISTED = 100  # rows of a list that the index keeps
_MOST_ROWS = 1 << 22  # of a column, whose chunks hold the columns beside it too


@dataclass(frozen=True)
class Kin:
    """Neurons that go with a neuron, and by what measure."""

    measure: str
    """``"correlation"`` or ``"jaccard"``."""
    words: str
    """The measure in words."""
    neurons: list[tuple[str, int, float]]
    """Site, neuron and measure, nearest first."""


@dataclass(frozen=True)
class Groups:
    """Means of a neuron in groups of rows: those with the highest means, and with the lowest."""

    means: pa.Table
    """Columns key, n and mean; highest mean first."""
    n_groups: int
    """How many groups there are."""
    words: str
    """Which rows the means are over, or why there are none."""


@dataclass(frozen=True)
class NeuronIndex:
    """Reads what a generation of the index holds of one neuron."""

    store: CoreStore
    generation: Generation
    info: SiteInfo
    neuron: int

    @classmethod
    def of(cls, store: CoreStore, site: str | Site, neuron: int) -> NeuronIndex:
        """Return the index of a neuron as of now.

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
        return cls(store, generation, info, neuron)

    def _file(self, kind: str, of_space: str = "") -> Path:
        """Return a file of the site, or one that all sites of its space share."""
        site = self.info.site
        space = f"space={site.space}/" if site.space else ""
        own = of_space or f"hook={site.hook}/layer={site.layer}/"
        found = self.generation.named(f"{kind}/{space}{own}")
        self.store.verifier.check(found)
        return self.store.path / next(iter(found))

    def column(self, replay: Replay | None = None) -> Column:
        """Return what is known of the neuron over the content rows that the index covers.

        Parameters
        ----------
        replay : callable, optional
            Computes the rows of the site that are not kept.
        """
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
            columns=["side", "row_id", "value", "rank"],
            filters=[("neuron", "=", self.neuron)],
        ).sort_by("rank")
        row_ids = durable.read_array(self._file("samples", "row_ids.npy"))
        values = durable.read_array(self._file("samples"), mapped=True)
        column = np.ascontiguousarray(values[:, self.neuron, None])
        sample = Sample().from_arrays({"row_ids": row_ids, "values": column})
        return Column(
            statistics_of(row),
            bins_of(*(arrow.numbers(bins.column(c)) for c in ("low", "high", "n"))),
            _list(lists, "window"),
            _list(lists, "bottom"),
            valid_sample(sample),
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

    def kin(self, database: Database, k: int = 12) -> Kin:
        """Return the neurons that go with this one most.

        By correlation over all rows of its own site where the index has the site's Gram; else by
        how many of their highest rows are the same, among all neurons of all sites of the space:
        that reads the row ids of all exemplars, 8 bytes x 300 a neuron.

        Parameters
        ----------
        database : Database
            The store's.
        k : int, default 12
            How many.
        """
        grams = self.generation.named(site_file(self.info.site, "grams", ""))
        return self._correlated(next(iter(grams)), k) if grams else self._overlapping(database, k)

    def _correlated(self, file: str, k: int) -> Kin:
        self.store.verifier.check({file: self.generation.files[file]})
        with durable.ArraysFile(self.store.path / file) as arrays:
            state = Gram().from_arrays(dict(arrays))
        deviations = np.sqrt(np.diagonal(state.m2))
        with np.errstate(invalid="ignore", divide="ignore"):
            found = state.m2[self.neuron] / (deviations[self.neuron] * deviations)
        found[self.neuron] = np.nan
        usable = np.flatnonzero(np.isfinite(found))
        best = usable[np.argsort(-np.abs(found[usable]), kind="stable")][:k]
        site = str(self.info.site)
        return Kin(
            "correlation",
            f"Pearson correlation over {state.n:,} rows with the other neurons of {site}, from its "
            "Gram",
            [(site, n, float(found[n])) for n in best.tolist()],
        )

    def _overlapping(self, database: Database, k: int) -> Kin:
        # Rows that tie at the end of a full list are there by their row_id, not by their value: the
        # lists of two neurons that are never above zero would be the same rows.
        found = database.sql(
            "WITH mine AS (SELECT row_id FROM exemplars "
            "WHERE site = $site AND neuron = $neuron AND side = 'top' "
            "QUALIFY value > min(value) OVER () OR count(*) OVER (PARTITION BY value) = 1 "
            f"OR count(*) OVER () < {_LISTED}), "
            "shared AS (SELECT site, neuron, count(*) AS n_both FROM exemplars "
            "WHERE side = 'top' AND space = $space AND row_id IN (SELECT row_id FROM mine) "
            "GROUP BY site, neuron) "
            f"SELECT shared.site, shared.neuron, n_both / (least({_LISTED}, n) + "
            "(SELECT count(*) FROM mine) - n_both) AS jaccard FROM shared "
            "JOIN neurons ON neurons.site = shared.site AND neurons.neuron = shared.neuron "
            "WHERE NOT (shared.site = $site AND shared.neuron = $neuron) "
            "ORDER BY jaccard DESC, hook, layer, shared.neuron LIMIT $k",
            site=str(self.info.site),
            space=self.info.site.space,
            neuron=self.neuron,
            k=k,
        )
        return Kin(
            "jaccard",
            f"Jaccard overlap of the {_LISTED} highest rows of each, among all sites",
            found.rows(),
        )

    def means(self, database: Database, key: str = "source", k: int = 12) -> Groups:
        """Return the means of the neuron's stored rows in groups.

        Reads the neuron's column; of a column of more than 4 million rows nothing, and the words
        say so.

        Parameters
        ----------
        database : Database
            The store's.
        key : str, default "source"
            SQL on the columns of tokens, and on source, n_tokens and metadata of documents.
        k : int, default 12
            How many groups at either end.

        Raises
        ------
        QueryError
            If `key` is not one expression on these columns.
        """
        store, info = self.store, self.info
        check_key(lambda query: database.sql(query).to_arrow(), "by", key)
        empty = pa.table({"key": pa.array([], pa.string()), "n": [], "mean": []})
        if info.keep == NONE:
            return Groups(empty, 0, "none: no rows of the site are stored")
        n_rows = store.n_rows(info.site.space) * info.keep
        if n_rows > _MOST_ROWS:
            words = (
                f"none: the column has about {n_rows:,.0f} rows, which only means() in SQL reads"
            )
            return Groups(empty, 0, words)
        found = database.sql(
            f"WITH by_key AS MATERIALIZED (SELECT ({key}\n) AS key, count(a.value) AS n, "
            f"avg(a.value) AS mean {TOKENS_AND_DOCUMENTS} "
            "JOIN activations($site, $neuron) AS a USING (row_id) WHERE space = $space "
            "GROUP BY 1 HAVING n > 0) "
            "SELECT *, (SELECT count(*) FROM by_key) AS n_groups FROM ("
            "(SELECT * FROM by_key ORDER BY mean DESC, key LIMIT $k) UNION "
            "(SELECT * FROM by_key ORDER BY mean, key DESC NULLS FIRST LIMIT $k)) "
            "ORDER BY mean DESC, key",
            site=str(info.site),
            neuron=self.neuron,
            space=info.site.space,
            k=k,
        ).to_arrow()
        of = "all" if info.keep == ALL else f"{keep_text(info.keep)} of the"
        n_groups = found.column("n_groups")[0].as_py() if len(found) else 0
        return Groups(found.drop_columns("n_groups"), n_groups, f"over {of} content rows")


def _list(lists: pa.Table, side: str) -> tuple[Ids, Values]:
    mine = lists.filter(pc.equal(lists.column("side"), side))
    return arrow.numbers(mine.column("row_id")), arrow.numbers(mine.column("value"))
