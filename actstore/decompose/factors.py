"""Factors: a decomposition of sites, reopened from the store that holds it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from actstore import arrow
from actstore.errors import ArgumentError, RowNotFound
from actstore.folds import TopK
from actstore.site import Site, summarize
from actstore.store import CoreStore, Result, Rows, SiteInfo
from actstore.store.budget import as_count
from actstore.store.rows import as_row_ids

if TYPE_CHECKING:
    import pandas as pd

Ids = npt.NDArray[np.int64]

KINDS = ("nmf", "pca", "ica")
"""What computes factors."""

_POSITIONAL = 0.5
_FEW_NEURONS = 5


class Factors:
    """Factors of some sites of a store; opening them computes nothing.

    ``scores @ loadings`` approximates the activations, clipped at zero, each site multiplied by its
    scale.  Loadings have unit length, so a score is in the units of the scaled activations.

    Parameters
    ----------
    store : CoreStore
        The store that holds them.
    result : Result
        A result of the kind ``nmf``, ``pca`` or ``ica``.

    See Also
    --------
    actstore.decompose.nmf.nmf : computes them.
    """

    def __init__(self, store: CoreStore, result: Result) -> None:
        self.store = store
        self.result = result
        _ = result.document  # read now: its folder may be replaced by another of the name

    @classmethod
    def open(cls, store: CoreStore, name: str | None = None, kind: str = "nmf") -> Self:
        """Open factors of a kind by name; without one, the newest.

        Raises
        ------
        ArgumentError
            If `kind` is none of `KINDS`.
        ResultNotFound
            If the store has none.
        """
        if kind not in KINDS:
            raise ArgumentError(f"kind = {kind!r}; expected one of {', '.join(KINDS)}.")
        return cls(store, store.result(kind, name))

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

    @cached_property
    def segments(self) -> list[int]:
        """The segments that have scores, ascending."""
        parts = [name.split("/") for name in self.result.files]
        return sorted(int(p[2]) for p in parts if p[:2] == ["scores", "c"])

    @cached_property
    def rows(self) -> Rows:
        """The rows that have scores; found by reading these, on first use."""

        def masks() -> Iterator[tuple[int, npt.NDArray[np.bool_]]]:
            for segment in self.segments:
                yield segment, ~np.isnan(self.scores_of_segment(segment)[:, 0])

        return Rows.from_masks(self.summary["rows"], self.store.meta.segment_rows, masks())

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
        name : str
            ``factors``: one row a factor, largest first, with the statistics of its scores.
            ``factor_sites``: how its energy is spread over sites.  ``loadings``: every loading that
            is not zero.  ``factor_exemplars``: rows with its highest scores (``side`` = "top"), the
            highest of each window ("window"), rows of each quantile bin ("quantile"), a uniform
            sample ("random").  ``factor_positions``, ``factor_documents``, ``factor_tokens``: its
            mean and the share of its energy at a position, in a document, on a token type; all
            positions, and the documents and types that lead.  ``factor_histograms``: its scores
            in bins.

        Raises
        ------
        ArgumentError
            If there is no such table.
        """
        if name not in self.tables:
            known = ", ".join(self.tables)
            raise ArgumentError(f"table = {name!r} is unknown; expected one of {known}.")
        return self.result.table(name)

    @property
    def tables(self) -> list[str]:
        """The names of the tables."""
        suffix = ".parquet"
        return sorted(n.removesuffix(suffix) for n in self.result.files if n.endswith(suffix))

    def to_arrow(self) -> pa.Table:
        """Return the table ``factors``: one row a factor, largest first."""
        return self.table("factors")

    def df(self) -> pd.DataFrame:
        """Return the table ``factors`` as a pandas DataFrame."""
        return self.to_arrow().to_pandas()

    def badges(self) -> list[list[str]]:
        """Return what stands out of each factor, in a word each.

        ``dead``: no row has a score.  ``positional``: half of its energy lies at one position of a
        window, or in the first four.  ``few neurons``: fewer than five make it up.
        """
        found = []
        for row in self.to_arrow().to_pylist():
            words = {
                "dead": row["energy"] == 0,
                "positional": max(row["peak_position_share"], row["early_share"]) >= _POSITIONAL,
                "few neurons": 0 < row["effective_neurons"] < _FEW_NEURONS,
            }
            found.append([word for word, holds in words.items() if holds])
        return found

    def top_neurons(self, factor: int, k: int = 20) -> pa.Table:
        """Return the neurons with a factor's largest loadings, as in the table ``loadings``."""
        table = self._of_factor("loadings", factor)
        size = pc.abs(table.column("loading"))
        order = pc.sort_indices(table.append_column("size", size), [("size", "descending")])
        return table.take(order[:k])

    def top_tokens(self, factor: int, k: int = 20, side: str = "top") -> pa.Table:
        """Return the rows with a factor's highest scores, with the text of their tokens.

        Reads the table, or where it holds fewer than `k` rows all scores of the factor: exact for
        every k.

        Parameters
        ----------
        factor : int
            Number of the factor, from 0.
        k : int, default 20
            How many rows at most.
        side : str, default "top"
            ``"top"``; ``"window"`` for the highest of each window; or another side of the table
            ``factor_exemplars``.

        Returns
        -------
        Table
            As ``factor_exemplars``, and token, the text.

        Raises
        ------
        ArgumentError
            If there is no such factor or side, or it holds fewer than `k` rows and is not "top".
        """
        k = as_count("k", k, 1)
        table = self._of_factor("factor_exemplars", factor)
        sides = sorted(set(table.column("side").to_pylist()) | {"top", "window"})
        if side not in sides:
            raise ArgumentError(f"side = {side!r} is unknown; expected one of {', '.join(sides)}.")
        table = table.filter(pc.equal(table.column("side"), side))
        n_kept = int(self.summary["n_exemplars"])
        if k > n_kept and side == "top":
            table = self._ranked(factor, k)
        elif k > n_kept and side == "window":
            raise ArgumentError(
                f"k = {k} exemplars of side 'window' were asked for; expected 1 … {n_kept}. "
                "side='top' has as many as are asked for."
            )
        return self._with_text(table.slice(0, k))

    def _ranked(self, factor: int, k: int) -> pa.Table:
        """Return the rows with the k highest scores of a factor that are above zero."""
        fold = TopK(k)
        state = fold.start(1)
        for segment in self.segments:
            scores = self.scores_of_segment(segment)[:, factor, None]
            (rows,) = np.nonzero(scores[:, 0] > 0)
            state = fold.update(state, scores[rows], rows + segment * self.store.meta.segment_rows)
        taken = state.top.taken
        row_ids = state.top.row_ids[taken]
        tokens = self.store.tokens_of(row_ids, self.summary["space"])
        return pa.table(
            {
                "factor": np.full(len(row_ids), factor, np.int32),
                "side": pa.array(["top"] * len(row_ids), pa.string()),
                "rank": np.arange(1, len(row_ids) + 1, dtype=np.int32),
                "row_id": row_ids,
                "value": state.top.values[taken],
                **{name: tokens.column(name) for name in ("document", "position", "token_id")},
                "bin": pa.nulls(len(row_ids), pa.int32()),
            }
        )

    def token_types(self, factor: int, k: int = 20, by: str = "mean") -> pa.Table:
        """Return the token types on which a factor is highest, with their text.

        Parameters
        ----------
        factor : int
            Number of the factor, from 0.
        k : int, default 20
            How many at most; up to 100 are kept by either order.
        by : {"mean", "share"}
            By the mean of the factor on the type, types of fewer than five rows last; or by the
            share of its energy that lies there, where common types lead.

        Returns
        -------
        Table
            Columns factor, rank (by mean), token_id, n, mean, share, lift (mean on the type over
            mean on all rows), token.
        """
        return self._with_text(self._leading("factor_tokens", factor, k, by))

    def top_documents(self, factor: int, k: int = 20, by: str = "mean") -> pa.Table:
        """Return the documents in which a factor is highest, with their source.

        Parameters
        ----------
        factor, k, by
            As for `token_types`; up to 500 documents are kept by either order.

        Returns
        -------
        Table
            Columns factor, rank (by mean), document, n, mean, share, source.
        """
        table = self._leading("factor_documents", factor, k, by)
        numbers = table.column("document").to_pylist()
        sources = [str(self.store.document(number)["source"]) for number in numbers]
        return table.append_column("source", pa.array(sources, pa.string()))

    def top_positions(self, factor: int, k: int = 20, by: str = "share") -> pa.Table:
        """Return the positions at which a factor is highest: position, n, mean, share.

        Parameters
        ----------
        factor, k, by
            As for `token_types`, by share.
        """
        table = self._of_factor("factor_positions", factor)
        _check_order(by)
        return table.sort_by([(by, "descending"), ("position", "ascending")]).slice(0, k)

    def _leading(self, name: str, factor: int, k: int, by: str) -> pa.Table:
        table = self._of_factor(name, factor)
        _check_order(by)
        order = [("rank", "ascending")] if by == "mean" else [("share", "descending")]
        return table.sort_by([*order, ("rank", "ascending")]).slice(0, as_count("k", k, 1))

    def _with_text(self, table: pa.Table) -> pa.Table:
        """Return a table with the text of its token types."""
        texts = self.store.texts_of(arrow.numbers(table.column("token_id")))
        return table.append_column("token", texts)

    def _of_factor(self, name: str, factor: int) -> pa.Table:
        if not 0 <= as_count("factor", factor, -(2**31)) < self.n_components:
            raise ArgumentError(
                f"factor = {factor} is not in {self.name!r}; expected 0 … {self.n_components - 1}."
            )
        return self.result.table(name, factor=int(factor))


def _check_order(by: str) -> None:
    if by not in ("mean", "share"):
        raise ArgumentError(f"by = {by!r} is unknown; expected 'mean' or 'share'.")
