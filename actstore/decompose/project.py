"""Scores of rows that a factorisation was not made from: the loadings stay, scores are solved.

For rows of the same store that were not chosen, or captured later, and for rows of another store of
the same model, which is how new text is scored.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from actstore import arrow
from actstore.decompose.factors import Factors
from actstore.decompose.linear import LINEAR_KINDS, Linear
from actstore.decompose.matrix import Matrix
from actstore.decompose.online import Coder
from actstore.decompose.scan import Scan, chosen_rows
from actstore.errors import ArgumentError, BudgetExceeded, StoreMismatch
from actstore.store import CoreStore, Rows, SiteInfo
from actstore.store.budget import parse_budget
from actstore.store.rows import as_row_ids

if TYPE_CHECKING:
    import pandas as pd

Ids = npt.NDArray[np.int64]

_SWEEPS = 400
_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Projection:
    """Scores of some rows, and which rows they are."""

    store: CoreStore
    """The store that holds the rows."""
    space: str
    """Their space."""
    row_ids: Ids
    """The rows, shape (n,), in the order asked for."""
    scores: npt.NDArray[np.float32]
    """Their scores, shape (n, k)."""

    def __len__(self) -> int:
        return len(self.row_ids)

    def __repr__(self) -> str:
        n_rows, k = self.scores.shape
        return f"<Projection: {n_rows:,} rows of {self.store.path} x {k} factors>"

    def to_arrow(self) -> pa.Table:
        """Return one row a token: what it is, and its scores, ``factor_0`` and so on."""
        names = ["row_id", "document", "position", "token_id"]
        table = self.store.tokens_of(self.row_ids, self.space).select(names)
        texts = self.store.texts_of(arrow.numbers(table.column("token_id")))
        table = table.append_column("token", texts)
        for j, column in enumerate(self.scores.T):
            table = table.append_column(f"factor_{j}", pa.array(column))
        return table

    def df(self) -> pd.DataFrame:
        """Return the same as a pandas DataFrame."""
        return self.to_arrow().to_pandas()


def project(
    factors: Factors,
    rows: Rows | str | npt.ArrayLike = "content",
    *,
    store: CoreStore | None = None,
    budget: int | str | None = None,
) -> Projection:
    """Return the scores of rows, whether the factors were made from them or not.

    Cost: one read of the rows at the sites of the factors, ``2 n k n_neurons`` operations; memory
    the budget at most, with the scores.  Rows that the factors were made from get the scores that
    are stored, to rounding.

    Parameters
    ----------
    factors : Factors
        The factors.
    rows : Rows, str or sequence of int, default "content"
        Row ids, in any order; ``"content"``, ``"all"``, or a set of rows: as far as they are
        stored, in row order.
    store : CoreStore, optional
        The store that holds the rows, captured from the same model; default that of the factors.
    budget : int or str, optional
        Memory it may take.

    Returns
    -------
    Projection
        ``row_ids`` and ``scores``; ``.df()`` has the tokens beside them.

    Raises
    ------
    StoreMismatch
        If the other store is of another model or tokenizer, or lacks a site of the factors.
    RowNotFound
        If a row does not exist or is not stored.
    BudgetExceeded
        If scores and blocks do not fit the budget.
    """
    store = store or factors.store
    for what, own, other in (
        ("weights", factors.store.meta.model.get("weights"), store.meta.model.get("weights")),
        ("tokenizer", factors.store.meta.tokenizer, store.meta.tokenizer),
    ):
        if own != other:
            raise StoreMismatch(
                f"{store.path} was captured with other {what} than {factors.store.path}, so its "
                "activations have no scores in these factors; expected a store of the same model."
            )
    infos = [_alike(store, info) for info in factors.sites]
    space = infos[0].site.space
    k, width = factors.loadings.shape
    budget_bytes = parse_budget(budget)
    asked = None if isinstance(rows, (Rows, str)) else as_row_ids(rows)
    order: Ids | None = None
    if asked is None:
        chosen = chosen_rows(store, rows, infos)  # type: ignore[arg-type]  # as it was asked
        reserved = _reserve(chosen.n_rows, k, width, budget_bytes)
    else:
        reserved = _reserve(len(asked), k, width, budget_bytes)
        wanted, order = np.unique(asked, return_inverse=True)
        chosen = _rows_of(store, infos, wanted)
    scan = Scan(store, infos, chosen, budget_bytes=budget_bytes, reserved_bytes=reserved)
    scores_of = _scorer(factors, scan)
    row_ids = np.empty(chosen.n_rows, np.int64)
    scores = np.empty((chosen.n_rows, k), np.float32)
    done = 0
    for block in scan.ordered():
        here = slice(done, done + len(block.row_ids))
        row_ids[here], scores[here] = block.row_ids, scores_of(block.values).numpy()
        done = here.stop
    if order is not None:
        row_ids, scores = row_ids[order], scores[order]
    return Projection(store, space, row_ids, scores)


def _reserve(n_rows: int, k: int, width: int, budget_bytes: int) -> int:
    """Return what scores, before and after they are put in order, and loadings take."""
    reserved = 8 * k * n_rows + 16 * k * width
    if reserved > budget_bytes:
        raise BudgetExceeded(
            f"{n_rows:,} rows x {k} factors take {reserved:,} bytes, and the budget is "
            f"{budget_bytes:,}. Pass budget={2 * reserved} or more, or project fewer rows at a "
            "time."
        )
    return reserved


def _scorer(factors: Factors, scan: Scan) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return what gives the rows of a block, whose values it changes, their scores."""
    if factors.result.kind in LINEAR_KINDS:
        return Linear.of(factors).scores
    matrix = matrix_of(factors, scan)
    loadings = torch.from_numpy(factors.loadings)
    solved = solver(loadings, factors.summary.get("n_active"), _SWEEPS, _TOLERANCE)
    return lambda values: solved(matrix.rows(values))


def matrix_of(factors: Factors, scan: Scan) -> Matrix:
    """Return the matrix that factors are of, for a scan of their sites."""
    scales = [factors.summary["site_scales"][str(info.site)] for info in factors.sites]
    return Matrix.scaled(scan, scales, bool(factors.summary.get("signed")))


def solver(
    loadings: torch.Tensor, n_active: int | None, n_sweeps: int, tolerance: float
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return what gives rows of the matrix, ``(n, width)``, their scores, ``(n, k)``."""
    coder = Coder(loadings @ loadings.T, n_active)
    return lambda rows: coder.codes(loadings @ rows.T, n_sweeps, tolerance)[0].T


def _alike(store: CoreStore, info: SiteInfo) -> SiteInfo:
    """Return the site of a store that a site of the factors is."""
    if info.site in store.sites and store.site(info.site).width == info.width:
        return store.site(info.site)
    raise StoreMismatch(
        f"{store.path} has no {info.site} of {info.width:,} neurons, which the factors are of; "
        "expected a store of the same model and sites. Capture the text with the sites of "
        "factors.sites."
    )


def _rows_of(store: CoreStore, infos: list[SiteInfo], row_ids: Ids) -> Rows:
    """Return rows given by their ids, ascending, or raise if one is not stored at every site."""
    segments, offsets = np.divmod(row_ids, store.meta.segment_rows)
    for segment in np.unique(segments).tolist():
        mine = segments == segment
        store.check_row(int(row_ids[mine].max()), infos[0].site.space)
        for info in infos:
            store.positions(info, segment, offsets[mine])
    if not len(row_ids):
        raise ArgumentError("rows = [] names no row; expected one or more row ids.")
    rule = f"{len(row_ids):,} row ids"
    return Rows.from_row_ids(rule, store.meta.segment_rows, row_ids)
