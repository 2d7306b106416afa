"""Non-negative codes: how much of each component a row holds, the components being fixed.

For a row a and components L, the code is the h >= 0 that minimises ``|a - h L|``.  It depends on
the row through ``L a`` alone, k numbers, so all rows are solved together by coordinate descent
(HALS) on ``k x k``: one coordinate of all rows at a time.
"""

from __future__ import annotations

import torch

_CHECK_EVERY = 8


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
    others = gram * inverse * inverse[:, None]
    others.fill_diagonal_(0)
    targets = products * inverse[:, None]
    codes = torch.zeros_like(targets)
    n_moving = 0
    for sweep in range(1, n_sweeps + 1):
        checked = tolerance > 0 and (sweep % _CHECK_EVERY == 0 or sweep == n_sweeps)
        before = codes.clone() if checked else codes
        for j, target in enumerate(targets):
            torch.clamp(torch.addmv(target, codes.T, others[j], alpha=-1), min=0, out=codes[j])
        if checked:
            moved = (codes - before).abs().amax(0)
            n_moving = int((moved > tolerance * codes.amax(0)).sum())
            if not n_moving:
                break
    return codes.mul_(inverse[:, None]), n_moving
