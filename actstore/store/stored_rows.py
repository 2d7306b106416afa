"""Which rows of a segment a site stores: all, none, or one seeded sample of the content rows.

A site keeps a fraction of its rows, 1, 0 or 2^-j.  With 2^-j, of the n content rows of a segment
those ceil(n x 2^-j) are stored whose row_id has the smallest hash.  The hash is a bijection, so
there are no ties, and the choice follows from the plan and the seed alone: every site, worker and
restart makes the same one.  Two things follow.  A segment of S rows never stores more than
S x 2^-j, so a shard has that many rows; and the rows of a smaller fraction are among those of a
larger one, so sites that keep different fractions still share the rows of the smallest.

What was chosen is written beside the segment, and readers go by that file: where a row lies in its
shard is its place among the offsets there.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from actstore.errors import ArgumentError

ALL, NONE = 1.0, 0.0
"""The fractions that keep every row, special and first ones too, and no row."""

MAX_EXPONENT = 16
"""The smallest fraction is 2^-16."""

_MASK = (1 << 64) - 1


def parse_keep(keep: Any) -> float:
    """Return the fraction of the rows that ``"all"``, ``"none"`` or a power of two stands for.

    Raises
    ------
    ArgumentError
        If it is none of them.

    Examples
    --------
    >>> parse_keep("1/256") == parse_keep("2^-8") == parse_keep(2**-8)
    True
    """
    fraction = {"all": ALL, "none": NONE}.get(keep) if isinstance(keep, str) else None
    if fraction is None:
        fraction = _number(keep)
    if fraction in (ALL, NONE) or (
        2.0**-MAX_EXPONENT <= fraction < 1 and math.frexp(fraction)[0] == 0.5
    ):
        return fraction
    raise ArgumentError(
        f"keep = {keep!r} is not 'all', 'none' or a power of two from 1/2 to 1/{2**MAX_EXPONENT}, "
        "such as '1/256' or '2^-8'."
    )


def _number(keep: Any) -> float:
    """Return a number, a quotient or a power as it is written; NaN for anything else."""
    if isinstance(keep, bool):
        return math.nan
    try:
        if isinstance(keep, str) and "/" in keep:
            above, below = keep.split("/")
            return int(above) / int(below)
        if isinstance(keep, str) and "^" in keep:
            base, exponent = keep.split("^")
            return float(int(base)) ** int(exponent)
        return float(keep)
    except (ArithmeticError, TypeError, ValueError):
        return math.nan


def keep_text(keep: float) -> str:
    """Return a fraction as people write it: ``"all"``, ``"none"`` or ``"1/256"``."""
    return {ALL: "all", NONE: "none"}.get(keep) or f"1/{round(1 / keep)}"


def is_sample(keep: float) -> bool:
    """Return whether a fraction is neither all nor nothing."""
    return NONE < keep < ALL


def shard_rows(segment_rows: int, keep: float) -> int:
    """Return how many rows of a segment of S rows a shard has room for, a power of two."""
    return max(1, int(segment_rows * keep))


def sample_name(space: str, keep: float, segment: int) -> str:
    """Return the path of the file that names the stored rows of a segment."""
    folder = f"stored_rows/{space}/" if space else "stored_rows/"
    return f"{folder}{1 - math.frexp(keep)[1]}/{segment:08d}.npy"


def sample(
    content: npt.NDArray[np.int64], first_row_id: int, keep: float, seed: int
) -> npt.NDArray[np.int64]:
    """Return which of a segment's content rows are stored, as offsets, ascending.

    Parameters
    ----------
    content : int array
        Offsets of the content rows.
    first_row_id : int
        The row_id of offset 0.
    keep : float
        The fraction, 2^-j.
    seed : int
        Seed of the store.
    """
    n_stored = math.ceil(len(content) * keep)
    if not n_stored:
        return np.empty(0, dtype=np.int64)
    hashes = hash_rows(content + first_row_id, seed)
    chosen = np.argpartition(hashes, n_stored - 1)[:n_stored]
    return np.sort(content[chosen])


def hash_rows(row_ids: npt.NDArray[np.int64], seed: int) -> npt.NDArray[np.uint64]:
    """Return a hash of each row_id, different for different rows.

    References
    ----------
    Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014, the
    function ``mix64`` of SplitMix64 after one step of its sequence.
    """
    z = row_ids.astype(np.uint64) ^ np.uint64(seed & _MASK)
    z = z + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: npt.NDArray[np.uint64] = z ^ (z >> np.uint64(31))
    return mixed
