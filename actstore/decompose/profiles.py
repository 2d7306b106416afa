"""What factors respond to: their scores by position, by document and by token type.

For every factor and every group of rows (all rows at a position of their window, of a document, of
a token type) two sums in float64, of the scores and of their squares, give the factor's mean on the
group and the share of its energy that lies there.  Positions are kept whole.  Documents and token
types are without bound, so each factor keeps those that lead: by their mean, where those of fewer
than `FEW_ROWS` rows come last, since a mean over two rows says little, and by their share.

Rows come segment by segment, in row order.  A document is finished once no later segment has rows
of it, so that the documents of a segment are held, not those of the corpus.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from actstore.compiled import compiled
from actstore.store import CoreStore, Rows

Ids = npt.NDArray[np.int64]
Float64 = npt.NDArray[np.float64]
Scores = npt.NDArray[np.float32]

FEW_ROWS = 5
"""Groups of fewer rows come after all others where groups are ranked by their mean."""

LEADING_DOCUMENTS = 500
"""Documents that are kept of each factor by their mean, and by their share."""

LEADING_TOKENS = 100
"""Token types that are kept of each factor by their mean, and by their share."""

EARLY_POSITIONS = 4
"""Positional factors of real models live in the first few positions of a window."""


@dataclass(frozen=True)
class Groups:
    """Which groups the chosen rows of a store fall into."""

    position_rows: Ids
    """Rows at each position of a window, from 0."""
    token_ids: Ids
    """The token types that occur, ascending."""
    token_rows: Ids
    """Rows of each of them."""
    later_documents: Mapping[int, int]
    """For each segment, the lowest document that a later one has rows of."""
    most_documents: int
    """The most documents that one segment has rows of."""

    @classmethod
    def of(cls, store: CoreStore, rows: Rows, space: str) -> Groups:
        """Count the rows; reads three columns of their tokens."""
        positions = tokens = np.zeros(0, np.int64)
        lowest: dict[int, int] = {}
        most = 0
        for segment in rows.segments:
            position, token, document = group_columns(store, rows, space, segment)
            positions = _added(positions, np.bincount(position))
            tokens = _added(tokens, np.bincount(token))
            lowest[segment] = int(document.min())
            most = max(most, len(np.unique(document)))
        later: dict[int, int] = {}
        least = 2**62
        for segment in reversed(rows.segments):
            later[segment] = least
            least = min(least, lowest[segment])
        (token_ids,) = np.nonzero(tokens)
        return cls(positions, token_ids, tokens[token_ids], later, most)

    @property
    def factor_bytes(self) -> int:
        """Bytes that `Profiles` takes for each factor."""
        sums = 16 * (len(self.position_rows) + len(self.token_ids))
        # Two lists of documents, those of a segment, and both together while they are ranked.
        return sums + 2 * 72 * (LEADING_DOCUMENTS + 2 * self.most_documents)


def group_columns(store: CoreStore, rows: Rows, space: str, segment: int) -> tuple[Ids, Ids, Ids]:
    """Return position, token_id and document of the chosen rows of a segment, in row order."""
    offsets = rows.offsets(segment)
    position, token, document = (
        store.token_column(segment, name, space)[offsets].astype(np.int64)
        for name in ("position", "token_id", "document")
    )
    return position, token, document


class Profiles:
    """Sums of the scores of some factors by position, token type and document.

    Memory ``groups.factor_bytes`` a factor.

    Parameters
    ----------
    store : CoreStore
        The store.
    rows : Rows
        The rows that have scores.
    space : str
        Their space.
    groups : Groups
        The groups these rows fall into.
    n_factors : int
        How many factors.
    """

    def __init__(
        self, store: CoreStore, rows: Rows, space: str, groups: Groups, n_factors: int
    ) -> None:
        self._store, self._rows, self._space, self._groups = store, rows, space, groups
        self._n_factors = n_factors
        # Of all rows: a sum over groups would round otherwise for other lots of factors.
        self._whole = _Sums.zero(1, n_factors)
        self._positions = _Sums.zero(len(groups.position_rows), n_factors)
        self._tokens = _Sums.zero(len(groups.token_ids), n_factors)
        none = np.empty(0, np.int64)
        self._open = _Documents(none, none, _Sums.zero(0, n_factors))
        self._leading = [self._open.by_factor() for _ in _KEYS]

    def update(self, segment: int, scores: Scores) -> None:
        """Take in the scores of the chosen rows of a segment, ``(rows, n_factors)``, in row order.

        Segments come in ascending order, each once.
        """
        position, token, document = group_columns(self._store, self._rows, self._space, segment)
        self._whole.add(scores, np.zeros_like(position))
        self._positions.add(scores, position)
        self._tokens.add(scores, np.searchsorted(self._groups.token_ids, token))
        numbers, which = np.unique(document, return_inverse=True)
        sums = _Sums.zero(len(numbers), self._n_factors)
        sums.add(scores, which)
        held = self._open.joined(_Documents(numbers, np.bincount(which), sums))
        finished = held.numbers < self._groups.later_documents[segment]
        self._open = held.part(~finished)
        self._rank(held.part(finished))

    def _rank(self, documents: _Documents) -> None:
        """Let finished documents compete for the places of each factor."""
        new = documents.by_factor()
        for i, key in enumerate(_KEYS):
            both = [np.concatenate(pair) for pair in zip(self._leading[i], new, strict=True)]
            best = np.argsort(-key(*both[1:]), axis=0, kind="stable")[:LEADING_DOCUMENTS]
            self._leading[i] = tuple(np.take_along_axis(column, best, axis=0) for column in both)

    @property
    def position_shares(self) -> Float64:
        """The share of each factor's energy at each position, ``(n_positions, n_factors)``."""
        shares: Float64 = self._positions.squares / np.maximum(self._whole.squares[0], _TINY)
        return shares

    def tables(self, first_factor: int, one_sided: bool) -> dict[str, pa.Table]:
        """Return the tables ``factor_positions``, ``factor_documents`` and ``factor_tokens``.

        Parameters
        ----------
        first_factor : int
            Number of the first of the factors.
        one_sided : bool
            Whether no score is below zero: else the mean over all rows is next to nothing, and
            there is no lift.

        Returns
        -------
        dict of Table
            By name, factor after factor; documents and token types of each by `rank`, the place
            of their mean.  Those on which a factor is zero are left out.
        """
        numbers = np.arange(first_factor, first_factor + self._n_factors, dtype=np.int32)
        n = self._groups.position_rows
        (some,) = np.nonzero(n)
        positions = {
            "factor": np.repeat(numbers, len(some)),
            "position": np.tile(some.astype(np.int32), len(numbers)),
            "n": np.tile(n[some], len(numbers)),
            "mean": (self._positions.values[some] / n[some, None]).T.ravel(),
            "share": self.position_shares[some].T.ravel(),
        }
        energies = self._whole.squares[0]
        means = self._whole.values[0] / max(1, int(n.sum()))
        documents, tokens = [], []
        for j, factor in enumerate(numbers.tolist()):
            both = [
                np.concatenate([column[:, j] for column in columns])
                for columns in zip(*self._leading, strict=True)
            ]
            _, once = np.unique(both[0], return_index=True)
            sums = _OnGroups(*(column[once] for column in both)).leading(LEADING_DOCUMENTS)
            documents.append(sums.table(factor, "document", energies[j]))
            sums = _OnGroups(
                self._groups.token_ids,
                self._groups.token_rows,
                self._tokens.values[:, j],
                self._tokens.squares[:, j],
            ).leading(LEADING_TOKENS)
            table = sums.table(factor, "token_id", energies[j])
            lift = table["mean"] / means[j] if one_sided else np.full(len(sums.n), np.nan)
            tokens.append({**table, "lift": lift})
        return {
            "factor_positions": pa.table(positions),
            "factor_documents": _joined(documents),
            "factor_tokens": _joined(tokens),
        }


@dataclass(frozen=True)
class _Sums:
    """Sums over the rows of each group, ``(groups, factors)``."""

    values: Float64
    """Of the scores."""
    squares: Float64
    """Of their squares."""

    @classmethod
    def zero(cls, n_groups: int, n_factors: int) -> _Sums:
        return cls(np.zeros((n_groups, n_factors)), np.zeros((n_groups, n_factors)))

    def add(self, scores: Scores, groups: Ids) -> None:
        """Add rows, each to the group whose number it has."""
        _add(scores, groups, self.values, self.squares)


@compiled
def _add(scores: Scores, groups: Ids, values: Float64, squares: Float64) -> None:
    for i in range(len(groups)):
        group = groups[i]
        for j in range(scores.shape[1]):
            score = np.float64(scores[i, j])
            values[group, j] += score
            squares[group, j] += score * score


@dataclass(frozen=True)
class _Documents:
    """Some documents and the sums over those of their rows that came so far."""

    numbers: Ids
    """The documents, ascending."""
    n: Ids
    """Their rows."""
    sums: _Sums
    """The sums over them."""

    def part(self, chosen: npt.NDArray[np.bool_]) -> _Documents:
        """Return some of the documents."""
        sums = _Sums(self.sums.values[chosen], self.sums.squares[chosen])
        return _Documents(self.numbers[chosen], self.n[chosen], sums)

    def joined(self, other: _Documents) -> _Documents:
        """Return the documents of both; where one is in both it has the rows of both."""
        numbers = np.union1d(self.numbers, other.numbers)
        n = np.zeros(len(numbers), np.int64)
        sums = _Sums.zero(len(numbers), self.sums.values.shape[1])
        for part in (self, other):
            places = np.searchsorted(numbers, part.numbers)
            n[places] += part.n
            sums.values[places] += part.sums.values
            sums.squares[places] += part.sums.squares
        return _Documents(numbers, n, sums)

    def by_factor(self) -> tuple[npt.NDArray[Any], ...]:
        """Return number, rows and both sums, ``(documents, factors)`` each."""
        shape = self.sums.values.shape
        numbers, n = (np.broadcast_to(x[:, None], shape) for x in (self.numbers, self.n))
        return numbers, n, self.sums.values, self.sums.squares


def _by_mean(n: Ids, values: Float64, squares: Float64) -> Float64:
    """Rank by the size of the mean, groups of few rows behind all others."""
    mean = np.abs(values) / n
    key: Float64 = np.where(n >= FEW_ROWS, mean, -1 / (mean + _TINY))
    return key


def _by_share(n: Ids, values: Float64, squares: Float64) -> Float64:
    return squares


_KEYS = (_by_mean, _by_share)
_TINY = 1e-300


class _OnGroups(NamedTuple):
    """The sums of one factor over some groups."""

    numbers: Ids
    n: Ids
    values: Float64
    squares: Float64

    def leading(self, most: int) -> _OnGroups:
        """Return the groups among the first by mean or by share, in the order of their mean."""
        order = np.argsort(-_by_mean(self.n, self.values, self.squares), kind="stable")
        by_share = np.argsort(-self.squares, kind="stable")[:most]
        wanted = np.isin(order, np.concatenate([order[:most], by_share]))
        order = order[wanted & (self.squares[order] > 0)]
        return _OnGroups(
            self.numbers[order], self.n[order], self.values[order], self.squares[order]
        )

    def table(self, factor: int, name: str, energy: float) -> dict[str, npt.NDArray[Any]]:
        """Return the columns of a table of these groups, in their order."""
        return {
            "factor": np.full(len(self.n), factor, np.int32),
            "rank": np.arange(1, len(self.n) + 1, dtype=np.int32),
            name: self.numbers.astype(np.int32 if name == "token_id" else np.int64),
            "n": self.n,
            "mean": self.values / self.n,
            "share": self.squares / max(energy, _TINY),
        }


def _joined(tables: list[dict[str, npt.NDArray[Any]]]) -> pa.Table:
    return pa.table({name: np.concatenate([t[name] for t in tables]) for name in tables[0]})


def _added(a: Ids, b: Ids) -> Ids:
    """Return the sum of two vectors, the shorter with zeros behind it."""
    total = np.zeros(max(len(a), len(b)), np.int64)
    total[: len(a)] += a
    total[: len(b)] += b
    return total
