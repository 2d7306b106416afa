"""Non-negative codes: how much of each component a row holds, the components being fixed.

For a row a and components L, the code is the h >= 0 that minimises ``|a - h L|``.  It depends on
the row through ``L a`` alone, k numbers, so all rows are solved together by coordinate descent
(HALS) on ``k x k``: one coordinate of all rows at a time.  The same descent, with rows and
components changing places, improves the loadings of an online pass.

Codes of a signed factorisation (loadings of any sign) may use a few components each: those that the
unrestricted code holds most of, for which it is then solved again.

On a processor it runs tile by tile: some rows with all their coordinates stay in the first cache
until they have converged.  Tensor by tensor it costs ten times as much, and is for other devices.
"""

from __future__ import annotations

import itertools
from concurrent.futures import Executor
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from actstore.compiled import compiled

_CHECK_EVERY = 4
_PART = 2048  # columns a thread takes at once
_TILE = 128  # rows of a tile: 32 coordinates of them fill 16 KiB


def solve_codes(
    products: torch.Tensor,
    gram: torch.Tensor,
    *,
    n_sweeps: int,
    tolerance: float = 0.0,
) -> tuple[torch.Tensor, int]:
    """Return the codes of some rows.

    Cost ``2 n k^2`` operations a sweep.

    Parameters
    ----------
    products : Tensor (k, n)
        ``L A^T``: the product of every component with every row.
    gram : Tensor (k, k)
        ``L L^T``.  Components of length zero get codes of zero.
    n_sweeps : int
        Sweeps at most.
    tolerance : float, default 0
        Stop once no code of a row moves by more than this part of the row's largest; 0 never
        stops early.

    Returns
    -------
    codes : Tensor (k, n)
        Non-negative, of the dtype of `products`.
    n_moving : int
        Rows that still moved by more; 0 where `tolerance` is 0.

    References
    ----------
    Cichocki & Phan, Fast local algorithms for large scale nonnegative matrix and tensor
    factorizations, IEICE Trans. Fundamentals E92-A (2009), algorithm 2.
    """
    # With components of unit length a coordinate's new value is one product and one clamp.
    lengths = gram.diagonal().sqrt()
    inverse = torch.where(lengths > 0, 1 / lengths, 0)
    targets = products * inverse[:, None]
    codes = torch.zeros_like(targets)
    weights = gram * inverse * inverse[:, None]
    n_moving = descend(targets, weights, codes, n_sweeps=n_sweeps, tolerance=tolerance)
    return codes.mul_(inverse[:, None]), n_moving


def solve_sparse_codes(
    products: torch.Tensor,
    gram: torch.Tensor,
    n_active: int,
    *,
    n_sweeps: int,
    tolerance: float = 0.0,
) -> tuple[torch.Tensor, int]:
    """Return codes of which at most `n_active` a row are above zero.

    The non-negative code is solved, its largest parts (in units of the rows) are kept, and solved
    for again by themselves.

    Parameters
    ----------
    products, gram, n_sweeps, tolerance
        As for `solve_codes`.
    n_active : int
        How many components a row may use.

    Returns
    -------
    codes : Tensor (k, n)
        Non-negative, of the dtype of `products`.
    n_moving : int
        Rows that still moved by more; 0 where `tolerance` is 0.
    """
    if n_active >= len(gram):
        return solve_codes(products, gram, n_sweeps=n_sweeps, tolerance=tolerance)
    lengths = gram.diagonal().sqrt()
    inverse = torch.where(lengths > 0, 1 / lengths, 0)
    targets = products * inverse[:, None]
    codes = torch.zeros_like(targets)
    weights = gram * inverse * inverse[:, None]
    descend(targets, weights, codes, n_sweeps=n_sweeps, tolerance=tolerance)
    largest = codes.topk(n_active, dim=0).indices
    chosen = torch.zeros_like(codes, dtype=torch.bool).scatter_(0, largest, True)
    # What is never above its target stays at zero.
    targets = torch.where(chosen, targets, -torch.inf)
    codes = torch.where(chosen, codes, 0)
    n_moving = descend(targets, weights, codes, n_sweeps=n_sweeps, tolerance=tolerance)
    return codes.mul_(inverse[:, None]), n_moving


def descend(
    targets: torch.Tensor,
    weights: torch.Tensor,
    values: torch.Tensor,
    *,
    n_sweeps: int,
    tolerance: float = 0.0,
    threads: Executor | None = None,
) -> int:
    """Set each coordinate in turn to ``max(0, target - Σ weights of the others x the others)``.

    Parameters
    ----------
    targets : Tensor (k, n)
        What each coordinate would be if it were alone.
    weights : Tensor (k, k)
        How much a coordinate holds of each other; the diagonal is not looked at.
    values : Tensor (k, n)
        Where to begin; changed in place.
    n_sweeps, tolerance
        As for `solve_codes`.
    threads : Executor, optional
        Shares the columns out; on a processor only.

    Returns
    -------
    int
        Columns that still moved by more than the tolerance.
    """
    others = weights.clone().fill_diagonal_(0)
    if values.device.type == "cpu" and values.dtype == torch.float32 and values.is_contiguous():
        t, w = targets.contiguous().numpy(), others.contiguous().numpy()
        v, limit = values.numpy(), np.float32(tolerance)
        if threads is None:
            return int(_descend_by_tile(t, w, v, 0, v.shape[1], n_sweeps, limit))
        parts = [
            threads.submit(_descend_by_tile, t, w, v, first, stop, n_sweeps, limit)
            for first, stop in itertools.pairwise([*range(0, v.shape[1], _PART), v.shape[1]])
        ]
        return sum(int(part.result()) for part in parts)
    return _descend_by_tensor(targets, others, values, n_sweeps, tolerance)


def _descend_by_tensor(
    targets: torch.Tensor,
    others: torch.Tensor,
    values: torch.Tensor,
    n_sweeps: int,
    tolerance: float,
) -> int:
    n_moving = 0
    for sweep in range(1, n_sweeps + 1):
        checked = tolerance > 0 and (sweep % _CHECK_EVERY == 0 or sweep == n_sweeps)
        before = values.clone() if checked else values
        for j, target in enumerate(targets):
            torch.clamp(torch.addmv(target, values.T, others[j], alpha=-1), min=0, out=values[j])
        if checked:
            moved = (values - before).abs().amax(0)
            n_moving = int((moved > tolerance * values.amax(0)).sum())
            if not n_moving:
                break
    return n_moving


@compiled
def _descend_by_tile(
    targets: npt.NDArray[np.float32],
    others: npt.NDArray[np.float32],
    values: npt.NDArray[np.float32],
    begin: int,
    end: int,
    n_sweeps: int,
    tolerance: Any,
) -> int:
    k = len(values)
    tile = np.zeros((k, _TILE), np.float32)
    best = np.zeros(_TILE, np.float32)
    moved = np.zeros(_TILE, np.float32)
    most = np.zeros(_TILE, np.float32)
    n_moving = 0
    for first in range(begin, end, _TILE):
        width = min(_TILE, end - first)
        best[:] = 0
        tile[:, width:] = 0
        tile[:, :width] = values[:, first : first + width]
        still = 0
        for sweep in range(1, n_sweeps + 1):
            checked = tolerance > 0 and (sweep % _CHECK_EVERY == 0 or sweep == n_sweeps)
            moved[:] = 0
            most[:] = 0
            for j in range(k):
                best[:width] = targets[j, first : first + width]
                i = 0
                # Four at a time: the tile's values are then loaded and stored a quarter as often.
                while i + 4 <= k:
                    a, b, c, d = others[j, i], others[j, i + 1], others[j, i + 2], others[j, i + 3]
                    for x in range(_TILE):
                        best[x] -= (a * tile[i, x] + b * tile[i + 1, x]) + (
                            c * tile[i + 2, x] + d * tile[i + 3, x]
                        )
                    i += 4
                while i < k:
                    a = others[j, i]
                    for x in range(_TILE):
                        best[x] -= a * tile[i, x]
                    i += 1
                if checked:
                    for x in range(_TILE):
                        new = max(best[x], np.float32(0))
                        moved[x] = max(moved[x], abs(new - tile[j, x]))
                        most[x] = max(most[x], new)
                        tile[j, x] = new
                else:
                    for x in range(_TILE):
                        tile[j, x] = max(best[x], np.float32(0))
            if checked:
                still = 0
                for x in range(width):
                    still += moved[x] > tolerance * most[x]
                if still == 0:
                    break
        n_moving += still
        values[:, first : first + width] = tile[:, :width]
    return n_moving
