"""Parts of a plan: how much of a corpus is planned, and can be captured, at a time.

The first is small, so that the model begins while the corpus is still being read; each next one is
larger, as every part ends a segment.
"""

from __future__ import annotations

from collections.abc import Iterable

PART_ROWS = 1 << 20
"""Rows that are wanted of a part; it ends with a document, see `part_ends`, or with the corpus."""

FIRST_PART_ROWS = 1 << 16
"""The same of the first part of a corpus; each next one may be twice as large, up to the above."""


def part_rows(n_before: int) -> int:
    """Return the rows wanted of a part, given how many parts of the same corpus there are."""
    return min(PART_ROWS, FIRST_PART_ROWS << min(n_before, 32))


def part_ends(
    segment_rows: int,
    wanted_rows: int,
    n_rows: int,
    n_documents: int,
    n_segments: int,
    open_rows: int,
    window_rows: Iterable[int],
) -> bool:
    """Return whether a part of so many rows, documents and segments ends before a document.

    It ends when it has the rows that are wanted of it, or half of them and the document needs a
    segment more than all of them do: a segment of a few rows costs as much as a long one.

    Parameters
    ----------
    segment_rows : int
        Most rows of a segment.
    wanted_rows : int
        Rows that are wanted of the part, see `part_rows`.
    n_rows, n_documents, n_segments : int
        What there is of it, the open segment counted.
    open_rows : int
        Rows of the open segment.
    window_rows : iterable of int
        Rows of each window of the document.
    """
    # Documents count too: those without a token would fill the memory unseen.
    if max(n_rows, n_documents) >= wanted_rows:
        return True
    for rows in window_rows:
        open_rows += rows
        if open_rows > segment_rows:
            n_segments, open_rows = n_segments + 1, rows
    return 2 * n_rows > wanted_rows and n_segments > max(1, wanted_rows // segment_rows)
