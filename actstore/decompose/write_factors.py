"""Writes what a factorisation gives back: loadings, scores, and the tables that follow from them.

Whatever found the factors hands over its loadings, and the scores a segment at a time; all tables
come from these.  What the scores respond to (`profiles`, `score_folds`) takes memory for every
position and token type of every factor, so it is found for as many factors at a time as the budget
holds, going through the scores once for each lot.  Scores are small beside the activations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from actstore.decompose.profiles import EARLY_POSITIONS, Groups, Profiles
from actstore.decompose.score_folds import ScoreFolds, factor_bytes
from actstore.store import CoreStore, ResultWriter, Rows, SiteInfo
from actstore.store.results import rows_layout

Ids = npt.NDArray[np.int64]
Scores = npt.NDArray[np.float32]

LOADINGS_AT_ONCE = 2**18
"""Rows of the long table of loadings that are written at once."""

LOADING_BYTES = 80
"""What one of them takes."""

_LOADING_FILE_BYTES = 32  # a loading: in array and long table, and in the state of a fit


@dataclass(frozen=True)
class Found:
    """A factorisation of some rows of some sites, its factors in their order."""

    infos: Sequence[SiteInfo]
    """The sites, whose columns stand side by side."""
    rows: Rows
    """The rows that have scores."""
    loadings: npt.NDArray[np.float32]
    """Shape (k, n_neurons)."""
    scores_of: Callable[[int], Scores]
    """Returns the scores of the chosen rows of a segment, ``(rows, k)``, in row order."""
    columns: Mapping[str, npt.NDArray[Any]]
    """What is known of each factor besides: columns of the table ``factors``, shape (k,)."""
    site_shares: npt.NDArray[np.float64]
    """How the energy of each factor is spread over the sites, ``(k, n_sites)``."""
    one_sided: bool = True
    """Whether no score is below zero."""


def check_disk(
    store: CoreStore,
    infos: Sequence[SiteInfo],
    rows: Rows,
    ks: Sequence[int],
    *,
    written_bytes: int = 0,
) -> None:
    """Refuse factorisations that the store's disk cannot hold, before anything is read for them.

    Scores lie there twice: as they come, and in the result.

    Parameters
    ----------
    store : CoreStore
        The store.
    infos : sequence of SiteInfo
        The sites.
    rows : Rows
        The rows that get scores.
    ks : sequence of int
        The number of factors of each factorisation.
    written_bytes : int, default 0
        What of it is written already.

    Raises
    ------
    NotEnoughDisk
        If it cannot.
    """
    least = min(infos, key=lambda info: info.keep)
    counts = [len(store.stored_offsets(least, segment)) for segment in store.committed]
    width = sum(info.width for info in infos)
    needed = -written_bytes
    for k in ks:
        layout = rows_layout(k, "float32", store.meta.layout(least).rows)
        needed += 4 * k * rows.n_rows + sum(map(layout.file_bytes, counts))
        needed += _LOADING_FILE_BYTES * k * width
    store.check_disk(
        needed,
        f"factorising {rows.n_rows:,} rows into {sum(ks):,} factors in",
        "Free some and run the same again, or give fewer n_components= (--components) or rows= "
        "(--rows).",
    )


def write_factors(writer: ResultWriter, store: CoreStore, found: Found, budget_bytes: int) -> None:
    """Write a factorisation into a result.

    Cost: one pass over the scores to write them, and one for each lot of factors.

    Parameters
    ----------
    writer : ResultWriter
        The result, entered.
    store : CoreStore
        The store.
    found : Found
        The factorisation.
    budget_bytes : int
        Memory it may take beside the loadings and the scores of one segment.
    """
    _write_scores(writer, store, found)
    writer.write_array("loadings", found.loadings)
    _write_loadings(writer, found)
    k, n_sites = found.site_shares.shape
    sites = {
        "factor": np.repeat(np.arange(k, dtype=np.int32), n_sites),
        **site_columns(found.infos, np.tile(np.arange(n_sites), k)),
        "share": found.site_shares.ravel(),
    }
    writer.write_table("factor_sites", pa.table(sites))
    responses = _write_responses(writer, store, found, budget_bytes)
    fourth = np.square(np.square(found.loadings, dtype=np.float64)).sum(1)
    factors = {
        "factor": np.arange(k, dtype=np.int32),
        **found.columns,
        "active_share": responses.pop("active_share"),
        "effective_neurons": np.divide(1.0, fourth, out=np.zeros(k), where=fourth > 0),
        **responses,
    }
    writer.write_table("factors", pa.table(factors))


def _write_scores(writer: ResultWriter, store: CoreStore, found: Found) -> None:
    """Write the scores of the rows that all sites store; NaN where a row was not chosen."""
    least = min(found.infos, key=lambda info: info.keep)
    k = len(found.loadings)
    array = writer.rows_array("scores", k, "float32", store.meta.layout(least).rows)
    for segment in store.committed:
        offsets = found.rows.offsets(segment)
        values = np.full((len(store.stored_offsets(least, segment)), k), np.nan, np.float32)
        if len(offsets):
            values[store.positions(least, segment, offsets)] = found.scores_of(segment)
        array.write(segment, values)
    writer.add_rows_array("scores", array, store.committed[-1] + 1)


def _write_responses(
    writer: ResultWriter, store: CoreStore, found: Found, budget_bytes: int
) -> dict[str, npt.NDArray[Any]]:
    """Write profiles, histograms and exemplars; return what the table ``factors`` has of them."""
    space = found.infos[0].site.space
    groups = Groups.of(store, found.rows, space)
    k = len(found.loadings)
    at_once = max(1, min(k, budget_bytes // (groups.factor_bytes + factor_bytes())))
    columns = []
    for first in range(0, k, at_once):
        n_factors = min(at_once, k - first)
        profiles = Profiles(store, found.rows, space, groups, n_factors)
        folds = ScoreFolds(store, found.rows, space, n_factors)
        for segment in found.rows.segments:
            scores = np.ascontiguousarray(found.scores_of(segment)[:, first : first + n_factors])
            profiles.update(segment, scores)
            folds.update(segment, scores)
        tables = {
            **profiles.tables(first, found.one_sided),
            "factor_histograms": folds.histograms(first),
            "factor_exemplars": folds.exemplars(first, found.one_sided),
        }
        for name, table in tables.items():
            writer.append_table(name, table)
        shares = profiles.position_shares
        statistics = folds.statistics()
        columns.append(
            {
                "active_share": statistics.pop("share_positive"),
                "peak_position": shares.argmax(0).astype(np.int32),
                "peak_position_share": shares.max(0),
                "early_share": shares[:EARLY_POSITIONS].sum(0),
                **statistics,
            }
        )
    return {name: np.concatenate([c[name] for c in columns]) for name in columns[0]}


def site_columns(infos: Sequence[SiteInfo], number: Ids) -> dict[str, pa.Array]:
    """Return the columns that name a site, for rows of the sites with the given numbers."""

    def words(values: Sequence[str]) -> pa.Array:
        codes = pa.array(number.astype(np.int32))
        return pa.DictionaryArray.from_arrays(codes, pa.array(values)).cast(pa.string())

    layers = np.array([info.site.layer for info in infos], np.int32)
    return {
        "site": words([str(info.site) for info in infos]),
        "space": words([info.site.space for info in infos]),
        "hook": words([info.site.hook for info in infos]),
        "layer": pa.array(layers[number]),
    }


def _write_loadings(writer: ResultWriter, found: Found) -> None:
    """Write the loadings that are not zero, one a row, by factor, site and neuron."""
    edges = np.cumsum([0] + [info.width for info in found.infos])
    at_once = max(1, LOADINGS_AT_ONCE // found.loadings.shape[1])
    for first in range(0, len(found.loadings), at_once):
        some = found.loadings[first : first + at_once]
        factor, column = np.nonzero(some)
        number = np.searchsorted(edges, column, side="right") - 1
        table = {
            "factor": (factor + first).astype(np.int32),
            **site_columns(found.infos, number),
            "neuron": (column - edges[number]).astype(np.int32),
            "loading": some[factor, column],
        }
        writer.append_table("loadings", pa.table(table))
