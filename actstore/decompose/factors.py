"""Factors: a decomposition of sites, reopened from the store that holds it."""

from __future__ import annotations

from functools import cached_property
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from actstore.errors import ArgumentError, RowNotFound
from actstore.site import Site, summarize
from actstore.store import CoreStore, Result, SiteInfo
from actstore.store.rows import as_row_ids

Ids = npt.NDArray[np.int64]


class Factors:
    """Factors of some sites of a store; opening them computes nothing.

    ``scores @ loadings`` approximates the activations, clipped at zero, each site multiplied by its
    scale.  Loadings have unit length, so a score is in the units of the scaled activations.

    Parameters
    ----------
    store : CoreStore
        The store that holds them.
    result : Result
        A result of the kind ``nmf``.

    See Also
    --------
    actstore.decompose.nmf.nmf : computes them.
    """

    def __init__(self, store: CoreStore, result: Result) -> None:
        self.store = store
        self.result = result
        _ = result.document  # read now: its folder may be replaced by another of the name

    @classmethod
    def open(cls, store: CoreStore, name: str | None = None) -> Self:
        """Open factors by name; without one, the newest.

        Raises
        ------
        ResultNotFound
            If the store has none.
        """
        return cls(store, store.result("nmf", name))

    def __repr__(self) -> str:
        return (
            f"<Factors {self.name!r}: {self.n_components} factors of "
            f"{summarize(info.site for info in self.sites)} ({self.n_neurons:,} neurons) over "
            f"{self.summary['n_rows']:,} rows of {self.store.path}, error "
            f"{self.summary['error']:.4f}>"
        )

    @property
    def name(self) -> str:
        """Name of the result."""
        return self.result.name

    @cached_property
    def summary(self) -> dict[str, Any]:
        """How the factors were computed and how good they are."""
        return {key: value for key, value in self.result.document.items() if key != "files"}

    @property
    def n_components(self) -> int:
        """Number of factors."""
        return int(self.summary["n_components"])

    @cached_property
    def sites(self) -> list[SiteInfo]:
        """The sites, in the order of their columns."""
        return [self.store.site(name) for name in self.summary["sites"]]

    @property
    def n_neurons(self) -> int:
        """Columns of the loadings: the neurons of all sites."""
        return sum(info.width for info in self.sites)

    def site_slice(self, site: str | Site) -> slice:
        """Return the columns of a site in the loadings.

        Raises
        ------
        ArgumentError
            If the factors are of other sites.
        """
        wanted = self.store.site(site).site
        first = 0
        for info in self.sites:
            if info.site == wanted:
                return slice(first, first + info.width)
            first += info.width
        raise ArgumentError(
            f"site = {str(site)!r} is not part of factors {self.name!r} of {self.store.path}; "
            f"they are of {summarize(info.site for info in self.sites)}."
        )

    @cached_property
    def loadings(self) -> npt.NDArray[np.float32]:
        """The loadings ``(k, n_neurons)``; read on first use."""
        return self.result.array("loadings", self.n_components)

    def loadings_of(self, site: str | Site) -> npt.NDArray[np.float32]:
        """Return the loadings of one site, ``(k, width)``."""
        return self.loadings[:, self.site_slice(site)]

    def scores_of_segment(self, segment: int) -> npt.NDArray[np.float32]:
        """Return the scores of a segment, ``(rows, k)``; NaN at rows that were not chosen.

        Raises
        ------
        RowNotFound
            If the segment was captured after the factors were computed.
        """
        if f"scores/c/{segment}/0" not in self.result.files:
            raise RowNotFound(
                f"segment {segment} of {self.store.path} has no scores in factors {self.name!r}: "
                "it was captured after they were computed. Compute them again under a new name."
            )
        values: npt.NDArray[np.float32] = self.store.read_scores(self.result, "scores", segment)
        return values

    def scores(self, row_ids: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """Return the scores of rows, ``(n, k)``; NaN for rows that were not chosen.

        Cost: the scores of every segment that holds one of them.

        Raises
        ------
        RowNotFound
            If a row does not exist, or was captured after the factors were computed.
        """
        ids = as_row_ids(row_ids)
        segments, offsets = np.divmod(ids, self.store.meta.segment_rows)
        out = np.empty((len(ids), self.n_components), dtype=np.float32)
        for segment in np.unique(segments).tolist():
            mine = segments == segment
            # The highest id of a segment is a hole if any of its ids is.
            self.store.check_row(int(ids[mine].max()), self.summary["space"])
            out[mine] = self.scores_of_segment(segment)[offsets[mine]]
        return out

    def table(self, name: str) -> pa.Table:
        """Return one of the tables.

        Parameters
        ----------
        name : {"factors", "factor_sites", "loadings", "factor_exemplars"}
            ``factors``: one row a factor, largest first.  ``factor_sites``: how its energy is
            spread over sites.  ``loadings``: every loading above zero.  ``factor_exemplars``: the
            rows with its highest scores.

        Raises
        ------
        ArgumentError
            If there is no such table.
        """
        names = [file.removesuffix(".parquet") for file in self.result.files]
        known = sorted(n for n, f in zip(names, self.result.files, strict=True) if n != f)
        if name not in known:
            raise ArgumentError(f"table = {name!r} is unknown; expected one of {', '.join(known)}.")
        return self.result.table(name)

    def to_arrow(self) -> pa.Table:
        """Return the table ``factors``: one row a factor, largest first."""
        return self.table("factors")

    def df(self) -> pd.DataFrame:
        """Return the table ``factors`` as a pandas DataFrame."""
        return self.to_arrow().to_pandas()

    def top_neurons(self, factor: int, k: int = 20) -> pa.Table:
        """Return the neurons with a factor's largest loadings, as in the table ``loadings``."""
        table = self._of_factor("loadings", factor)
        order = pc.sort_indices(table, [("loading", "descending")])
        return table.take(order[:k])

    def top_tokens(self, factor: int, k: int = 20) -> pa.Table:
        """Return the rows with a factor's highest scores, with the text of their tokens.

        Raises
        ------
        ArgumentError
            If there is no such factor, or `k` is more than is kept.
        """
        n_kept = int(self.summary["n_exemplars"])
        if not 1 <= k <= n_kept:
            raise ArgumentError(
                f"k = {k} exemplars were asked for; expected 1 … {n_kept}. For more, sort "
                "scores_of_segment."
            )
        table = self._of_factor("factor_exemplars", factor).slice(0, k)
        vocabulary = self.store.vocabulary
        texts = pc.index_in(table.column("token_id"), vocabulary.column("token_id"))
        return table.append_column("token", vocabulary.column("text").take(texts))

    def _of_factor(self, name: str, factor: int) -> pa.Table:
        if not 0 <= factor < self.n_components:
            raise ArgumentError(
                f"factor = {factor} is not in {self.name!r}; expected 0 … {self.n_components - 1}."
            )
        table = self.result.table(name)
        return table.filter(pc.equal(table.column("factor"), factor))
