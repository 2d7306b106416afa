"""The content rows of a band cut into *pieces*: runs of up to 16 rows of one window.

A device screens bands piece by piece, as the compiled pass does with groups of eight rows: the
extremes of a piece say whether one of its rows can enter a list, and as no piece spans two windows,
those of the windows follow from them.  Pieces follow from the plan alone, are the same for all
sites, and are cut on the CPU; they cross to the device once a band.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actstore.folds.base import Array
from actstore.folds.passes import BandRows

_MOST_ROWS = 16


@dataclass(frozen=True)
class Pieces:
    """The rows of a band on the device, and how they fall into pieces and windows."""

    content: Tensor
    """Content rows, counted from the band's first."""
    others: Tensor
    """Special and first rows."""
    rows: Tensor
    """The rows of each piece, (n_pieces, n); shorter ones repeat their last row."""
    sizes: Tensor
    """Rows of each piece, repeats not counted."""
    windows: Tensor
    """The window of each piece, counted from the band's first."""
    window_ids: tuple[int, int]
    """The first and the last window_id."""
    n_windows: int
    """Windows that have a row in the band."""


def cut(band_rows: BandRows, device: torch.device) -> Pieces:
    """Return the pieces of a band; one transfer.

    There are at most ``n / 16 + n_windows`` pieces of n rows, and with the repeats they hold at
    most 3 x n.
    """
    content, others, window_ids = band_rows
    starts = np.flatnonzero(np.append(True, window_ids[1:] != window_ids[:-1])[: content.size])
    ends = np.append(starts[1:], content.size)[: starts.size]
    n_windows = len(starts)
    mean = -(-content.size // max(n_windows, 1))
    n_rows = min(_MOST_ROWS, 1 << max(mean - 1, 0).bit_length())
    n_pieces = -(-(ends - starts) // n_rows)
    windows = np.repeat(np.arange(n_windows), n_pieces)
    nth = np.arange(windows.size) - np.repeat(n_pieces.cumsum() - n_pieces, n_pieces)
    first = starts[windows] + n_rows * nth
    sizes = np.minimum(n_rows, ends[windows] - first)
    rows = content[first[:, None] + np.minimum(np.arange(n_rows), sizes[:, None] - 1)]
    parts = (content, others, rows.ravel(), sizes, windows)
    lengths = [part.size for part in parts]
    there = torch.split(to_device(np.concatenate(parts), device), lengths)
    return Pieces(
        *(there[0], there[1], there[2].view(rows.shape), there[3], there[4]),
        (int(window_ids[0]), int(window_ids[-1])) if window_ids.size else (-1, -1),
        n_windows,
    )


def to_device(array: Array, device: torch.device) -> Tensor:
    """Return a copy of an array on a device, which is not waited for."""
    host = torch.from_numpy(np.array(array))
    if device.type == "cuda":
        # From pinned memory alone a copy does not make both sides wait.
        return host.pin_memory().to(device, non_blocking=True)
    return host.to(device)


class Fetched:
    """A few numbers on their way from the device; what is launched meanwhile need not wait."""

    def __init__(self, numbers: Tensor) -> None:
        self._arrived: torch.cuda.Event | None = None
        if numbers.device.type == "cuda":
            self._numbers = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._numbers.copy_(numbers, non_blocking=True)
            self._arrived = torch.cuda.current_stream(numbers.device).record_event()
        else:
            self._numbers = numbers

    def wait(self) -> NDArray[np.int64]:
        """Return the numbers once they are here."""
        if self._arrived is not None:
            self._arrived.synchronize()
        found: NDArray[np.int64] = self._numbers.cpu().numpy()
        return found
