"""A band on a device, seen as a site's columns and rows, and what is mended in it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from actstore.folds.running import N_PLACES, NAN, OVERFLOW, Found, nothing_found

TORCH_DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}
"""The stored dtypes as PyTorch's."""

INTEGERS = {2: (torch.int16, torch.uint16), 4: (torch.int32, torch.uint32)}
"""What the bits of stored values may be seen as, by their bytes; the first is used here."""

BLOCK_VALUES = 2**23
"""Values taken at once: what bounds temporary memory."""

_INFINITY = {torch.float16: 0x7C00, torch.bfloat16: 0x7F80, torch.float32: 0x7F800000}


class Block(NamedTuple):
    """Some columns of a band: whole chunks, or what is not padding of the last one."""

    values: Tensor
    """Stored values, (chunks, rows, columns)."""
    columns: slice
    """Which columns of the site."""

    def of(self, tensor: Tensor) -> Tensor:
        """Return these columns of what has the site's columns last, as (…, chunks, columns)."""
        n_chunks, _, n_columns = self.values.shape
        found = tensor[..., self.columns]
        return found.view(*found.shape[:-1], n_chunks, n_columns)


class BandView:
    """A band, and ways to look at it."""

    def __init__(self, values: Tensor, width: int) -> None:
        self.values = values
        self.width = width
        _, self.n_rows, self.n_columns = values.shape
        self.bits = values.view(INTEGERS[values.itemsize][0])

    def blocks(self) -> Iterator[Block]:
        """Yield the columns, some million values at a time."""
        n_whole = self.width // self.n_columns
        step = max(1, BLOCK_VALUES // (self.n_rows * self.n_columns))
        for first in range(0, n_whole, step):
            last = min(first + step, n_whole)
            columns = slice(first * self.n_columns, last * self.n_columns)
            yield Block(self.values[first:last], columns)
        if rest := self.width % self.n_columns:
            columns = slice(n_whole * self.n_columns, self.width)
            yield Block(self.values[n_whole:, :, :rest], columns)

    def rows(self, rows: Tensor) -> Tensor:
        """Return some rows, (n, width)."""
        return self.values.index_select(1, rows).transpose(0, 1).flatten(1)[:, : self.width]

    def take(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Return values by row and column, of shapes (n, m) and (n,), as float32; -0.0 as 0.0."""
        chunks = (columns // self.n_columns)[:, None]
        places = (chunks * self.n_rows + rows) * self.n_columns + (columns % self.n_columns)[
            :, None
        ]
        return self.values.take(places).float() + 0.0


def mend(view: BandView, rows: Tensor, first_offset: int) -> Found:
    """Replace the infinities of some rows, and return what faults were in them."""
    bits = view.bits.index_select(1, rows)
    chunks, columns = (torch.arange(n, device=rows.device) for n in (len(bits), view.n_columns))
    column = (chunks[:, None] * view.n_columns + columns)[:, None]
    infinity = _INFINITY[view.values.dtype]
    magnitude = torch.where(column < view.width, bits & torch.iinfo(bits.dtype).max, 0)
    # The largest finite number is the one before infinity.
    view.bits.index_copy_(1, rows, bits - (magnitude == infinity).to(bits.dtype))
    found = nothing_found()
    for kind, is_fault in ((NAN, magnitude > infinity), (OVERFLOW, magnitude == infinity)):
        found.counts[kind] = int(is_fault.sum())
        # The first of them are in the first of their rows.
        own = is_fault.any(2).any(0).nonzero().flatten()
        own = own[rows[own].argsort()[:N_PLACES]]
        chunk, row, place = is_fault[:, own].nonzero(as_tuple=True)
        codes = (first_offset + rows[own[row]] << 32) | (chunk * view.n_columns + place)
        first = codes.sort().values[:N_PLACES].cpu().numpy().astype(np.uint64)
        found.places[kind, : len(first)] = first
    return found
