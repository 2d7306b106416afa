"""All folds of all sites on the device that holds the bands, in PyTorch's own operations.

`DeviceFolds` does for bands on an accelerator what `actstore.folds.cpu.BandFolds` does on the
processor, and leaves the same folds: counts, extremes, lists, zones and samples to the bit, sums to
rounding.  Only what a segment comes to crosses to the CPU, when it is finished.

A band of a site takes these steps, all launched without waiting but for one number:

1. *Screen*: the extremes of each *piece* (`actstore.folds.device.pieces`), in the dtype of the
   store, and from them the windows' highest values, the band's zone, and which pieces and windows
   pass the limits of the lists.  How many do, and whether there is NaN or an infinity, is sent to
   the CPU.
2. *Count bins* of the histogram, while that number travels.
3. *Look* at the values of what passed, which are few once many rows were seen, and add candidates
   to the lists (`actstore.folds.device.lists`).
4. *Add up* powers about the mean of the first rows (`actstore.folds.device.sums`).

NaN and infinities are rare.  Where the number says there are some, the infinities are mended in the
band, and it is screened again without the NaN.

**Bins.**  The 256 bins follow from 16 bits of a value, so a table of 65,536 places gives them.  A
float32 is cut to its higher 16 bits, with the lowest of them set where any was lost: that changes
no bin and keeps tiny values apart from 0.  Zeros have a bin of their own until the end: with them
apart, bins also tell how many values were positive.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actstore.errors import ArgumentError
from actstore.folds.base import read_values
from actstore.folds.device.band import BLOCK_VALUES, INTEGERS, TORCH_DTYPES, BandView, mend
from actstore.folds.device.lists import (
    EMPTY,
    DeviceLists,
    keys_of,
    list_bytes,
    nth_true,
    offsets_of,
    values_of,
)
from actstore.folds.device.pieces import Fetched, Pieces, cut, to_device
from actstore.folds.device.sums import GramSums, RunningSums, power_sums, signs
from actstore.folds.histogram import N_BINS, HistogramState, bins_of
from actstore.folds.passes import (
    BandRows,
    FaultsMet,
    RunningSites,
    SiteFolds,
    SiteThresholds,
    check_layout,
    check_order,
    check_sites,
)
from actstore.folds.running import NAN, NO_BIN, OVERFLOW
from actstore.folds.sample import EVERY_HASH, Sample, SampleState
from actstore.folds.topk import Ranked, TopKState, empty_list
from actstore.folds.zones import zones_of
from actstore.shard import DTYPES

# Holds zeros until the end; no value is in it by definition.
_ZERO_BIN = N_BINS - 2
_FIRST_POSITIVE = N_BINS // 2
# Special and first rows that are added together.
_HELD_ROWS = 512
# Values of pieces that passed a limit, looked at together.
_LOOK_VALUES = 2**20
# Of a value: what sums take at once in float64, and what a look at a piece takes.
_BLOCK_BYTES = 4 + 3 * 8
_LOOK_BYTES = 84
# Of a column: sums of content and of other rows, and the open window.
_SMALL_BYTES = 192


class DeviceFolds:
    """The running folds of all sites of one segment, on the device where their bands are.

    Memory of the device is `state_bytes` a site, and what `temporary_bytes` says for one of them.
    One thread updates; another may finish.

    Parameters
    ----------
    widths : sequence of int
        Columns of each site.
    dtypes : sequence of str
        Stored dtype of each site: ``"float16"``, ``"bfloat16"`` or ``"float32"``.
    first_row_id : int
        The row_id of the segment's first row.
    device : torch.device
        Where the bands will be.  It must have float64.
    k : int, default 100
        Length of the lists.
    sample : Sample, optional
        Which rows are sampled.
    gram_sites : collection of int
        The sites whose Gram is wanted, in the order of `widths`; 8 bytes x width**2 each.

    Raises
    ------
    ArgumentError
        If a dtype cannot be stored, or the parameters do not fit together.

    See Also
    --------
    actstore.folds.cpu.BandFolds : the same on the processor.

    Examples
    --------
    >>> folds = DeviceFolds([3], ["float16"], first_row_id=0, device=torch.device("cpu"), k=2)
    >>> band = torch.arange(12, dtype=torch.float16).reshape(1, 4, 3)
    >>> windows = np.array([5, 5, 6])
    >>> folds.update(0, band, content=np.arange(1, 4), others=np.arange(1), windows=windows)
    (0, 0)
    >>> found = folds.finish(0)
    >>> found.topk.top.row_ids[0], found.window_top.row_ids[0]
    (array([3, 2]), array([3, 2]))
    """

    def __init__(
        self,
        widths: Sequence[int],
        dtypes: Sequence[str],
        *,
        first_row_id: int,
        device: torch.device,
        k: int = 100,
        sample: Sample | None = None,
        gram_sites: Collection[int] = (),
    ) -> None:
        check_sites(widths, dtypes, k)
        self.first_row_id = first_row_id
        self._device = device
        # Another thread that finishes must queue behind the last band.
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        tables = {
            (dtype, width): to_device(_bin_table(dtype) * np.int32(width), device)
            for width, dtype in zip(widths, dtypes, strict=True)
        }
        self._sites = RunningSites(
            partial(
                _Site, width, dtype, k, sample or Sample(), i in gram_sites, tables[dtype, width]
            )
            for i, (width, dtype) in enumerate(zip(widths, dtypes, strict=True))
        )
        self._cut: tuple[BandRows, Pieces] | None = None

    @property
    def n_bytes(self) -> int:
        """Bytes of the device that the running state takes."""
        return sum(tensor.nbytes for site in self._sites for tensor in site.tensors())

    def update(
        self,
        site_index: int,
        band: Tensor,
        content: NDArray[np.integer[Any]],
        others: NDArray[np.integer[Any]],
        windows: NDArray[np.integer[Any]],
        first_offset: int = 0,
        thresholds: SiteThresholds | None = None,
    ) -> tuple[int, int]:
        """Add a band of one site, replacing its infinities by the largest finite value.

        Waits once for the device, for a number that other work is queued behind.  The bands of a
        site must come in the order of their rows.

        Parameters
        ----------
        site_index : int
            Which site, in the order of `widths`.
        band : torch.Tensor, shape (n_column_chunks, chunk_rows, chunk_columns), contiguous
            Stored values on the device, in the site's dtype or as its bits; columns beyond the
            width and rows not named below are not looked at.  Infinities are replaced in place.
        content, others, windows, first_offset, thresholds
            As in `BandFolds.update`: NumPy arrays.

        Returns
        -------
        n_nan, n_overflow : int
            Values of this band that were NaN, and that were infinite.

        Raises
        ------
        ArgumentError
            If the band's shape, dtype or layout, or the rows, are not as described, or the site
            was finished.
        """
        site = self._sites.running(site_index)
        where = f"site_index = {site_index}"
        view = site.view(band, where)
        rows = BandRows.of(content, others, windows, view.n_rows, where)
        check_order(first_offset, site.next_offset, view.n_rows, where)
        if thresholds is not None:
            site.tighten(thresholds, self.first_row_id + first_offset, where)
        site.next_offset = first_offset + view.n_rows
        return site.fold(view, rows, self._pieces(rows), first_offset, self.first_row_id)

    def _pieces(self, rows: BandRows) -> Pieces:
        """Return the pieces of a band, which are cut for the first of its sites."""
        if self._cut is None or not all(map(np.array_equal, rows, self._cut[0])):
            held = BandRows(*(part.copy() for part in rows))
            self._cut = held, cut(held, self._device)
        return self._cut[1]

    def finish(self, site_index: int) -> SiteFolds:
        """Return what the segment adds to the folds of one site, and let its running state go.

        Waits for the device.
        """
        ordered: AbstractContextManager[Any] = nullcontext()
        if self._stream is not None:
            ordered = torch.cuda.stream(self._stream)
        with ordered:
            return self._sites.finished(site_index).finish(self.first_row_id)


def state_bytes(
    width: int, dtype: str, k: int, n_sampled: int, n_bands: int, with_gram: bool = False
) -> int:
    """Return the bytes of the device that a site takes at most, after so many bands."""
    n_values = n_sampled + _HELD_ROWS
    column = 3 * list_bytes(k) + 4 * N_BINS + 8 * n_bands + n_values * DTYPES[dtype].itemsize
    return width * (column + _SMALL_BYTES) + (8 * width**2 if with_gram else 0)


def temporary_bytes(chunk_rows: int, width: int, k: int) -> int:
    """Return the bytes that folding one band of a site takes for a while, for usual windows.

    Sums and bins take a block of columns at a time, and screening some bytes for each piece, which
    is 16 rows where windows are long; windows of one row need up to 40 bytes a value.
    """
    n_values = chunk_rows * width
    blocks = min(n_values, BLOCK_VALUES) * _BLOCK_BYTES
    looks = min(n_values, _LOOK_VALUES) * _LOOK_BYTES
    merging = 3 * width * k * 3 * 8
    return 40 * n_values // 16 + max(blocks, looks, merging)


@dataclass(frozen=True)
class _Screened:
    """What the screening of a band found."""

    ends: Tensor
    """Running count of the pieces and then the windows that pass a limit, all of one side and
    piece after each other."""
    window_keys: Tensor
    """Of each window and column the highest value and the first piece that has it."""
    zone: Tensor
    """Largest and smallest value, (2, width)."""
    others: Tensor
    """The special and first rows, (n, width)."""
    numbers: Tensor
    """Pieces that pass, pieces and windows that pass, extremes that are no number."""


class _Site:
    """The running state of one site."""

    def __init__(
        self, width: int, dtype: str, k: int, sample: Sample, with_gram: bool, bin_table: Tensor
    ) -> None:
        device = bin_table.device
        self.width, self.dtype, self.k, self.device = width, dtype, k, device
        self.next_offset = 0
        self.content, self.others = RunningSums(width, device), RunningSums(width, device)
        # Of the other rows; those of content follow from the bins.
        self.n_others, self.n_others_positive = (
            torch.zeros(width, dtype=torch.int64, device=device) for _ in range(2)
        )
        # Of the highest values, of the highest negated ones, and over windows.
        self.lists = DeviceLists(3 * width, k, device)
        self.given: NDArray[np.float32] | None = None
        self.open = torch.full((width,), EMPTY, device=device)
        self.window_id: int | None = None
        self.bin_table = bin_table
        # Special and first rows that wait to be added.
        self.held: list[Tensor] = []
        self.counts = torch.zeros(N_BINS * width, dtype=torch.int32, device=device)
        self.zones: dict[int, Tensor] = {}
        self.sample, self.sample_threshold = sample, EVERY_HASH
        self.sampled = np.empty(0, np.int64)
        self.sampled_bits = torch.empty((0, width), dtype=self._bits_dtype, device=device)
        self.gram = GramSums(width, device) if with_gram else None
        self.faults = FaultsMet()

    @property
    def _bits_dtype(self) -> torch.dtype:
        return INTEGERS[DTYPES[self.dtype].itemsize][0]

    def tensors(self) -> list[Tensor]:
        """Return what takes memory between bands."""
        return [
            *(*self.content.tensors(), *self.others.tensors(), *self.lists.tensors()),
            *(self.n_others, self.n_others_positive, self.open, self.counts, self.sampled_bits),
            *(
                *self.held,
                *self.zones.values(),
                *([] if self.gram is None else self.gram.tensors()),
            ),
        ]

    def view(self, band: Tensor, where: str) -> BandView:
        """Return the band, after checking that it is one of this site."""
        dtype = TORCH_DTYPES[self.dtype]
        if band.dtype != dtype and band.dtype not in INTEGERS[dtype.itemsize]:
            name = str(band.dtype).removeprefix("torch.")
            raise ArgumentError(f"band of {where} is {name}; expected {self.dtype} or its bits.")
        check_layout(tuple(band.shape), band.is_contiguous(), self.width, where)
        return BandView(band.view(dtype), self.width)

    def tighten(self, thresholds: SiteThresholds, first_row_id: int, where: str) -> None:
        """Raise the limits to the thresholds; they cross to the device where they are new."""
        limits = thresholds.limits(self.width, first_row_id, where)
        limits[1] *= -1
        if self.given is None or not np.array_equal(limits, self.given):
            self.given = limits
            own = self.lists.limits
            torch.maximum(own, to_device(limits.ravel(), self.device), out=own)
        self.sample_threshold = thresholds.sample

    def fold(
        self, view: BandView, rows: BandRows, pieces: Pieces, first_offset: int, segment_row_id: int
    ) -> tuple[int, int]:
        """Add a band; return how many NaN and infinities it had."""
        screened = self._screen(view, pieces, hide_nan=False)
        fetched = Fetched(torch.cat([screened.numbers, self.lists.n_loose[None]]))
        if rows.content.size:
            self._count_bins(view, pieces.content)
        n_pieces, n_passed, n_faulty, n_loose = fetched.wait().tolist()
        self.lists.settle(n_loose)
        n_nan = n_overflow = 0
        if n_faulty:
            found = mend(view, torch.cat([pieces.content, pieces.others]), first_offset)
            n_nan, n_overflow = self.faults.add([found])
            screened = self._screen(view, pieces, hide_nan=True)
            n_pieces, n_passed, _ = Fetched(screened.numbers).wait().tolist()
        if rows.content.size:
            self._look(view, pieces, screened, (n_pieces, n_passed), first_offset)
            own = self.content.extremes
            torch.maximum(own, screened.zone, out=own)
            self.zones[segment_row_id + first_offset] = screened.zone
            shift = self.content.begin_at(view, pieces.content)
            for block in view.blocks():
                values = block.values.index_select(1, pieces.content)
                sums = power_sums(values, block.of(shift)[:, None], n_nan > 0)
                self.content.powers[:, block.columns] += sums
            self._draw(view, rows.content, segment_row_id + first_offset)
            if self.gram is not None:
                self.gram.add(view, pieces.content, shift)
        if rows.others.size:
            self.held.append(screened.others)
            if sum(map(len, self.held)) >= _HELD_ROWS:
                self._add_others()
        return n_nan, n_overflow

    # -- screening and candidates ------------------------------------------------------------

    def _screen(self, view: BandView, pieces: Pieces, *, hide_nan: bool) -> _Screened:
        """Find the extremes of pieces, and what of them passes the limits."""
        width, (n_pieces, n_rows) = self.width, pieces.rows.shape
        extremes = torch.empty((2, n_pieces, width), device=self.device)
        for block in view.blocks():
            values = block.values.index_select(1, pieces.rows.flatten())
            values = values.view(len(values), n_pieces, n_rows, values.shape[2])
            if hide_nan:
                is_nan = values.isnan()
                high = values.masked_fill(is_nan, -torch.inf).amax(2)
                low = values.masked_fill(is_nan, torch.inf).amin(2)
            else:
                low, high = values.aminmax(dim=2)
            for target, extreme in zip(block.of(extremes), (high, low), strict=True):
                target.copy_(extreme.transpose(0, 1))
        extremes[1].neg_()
        extremes += 0.0  # no -0.0
        n_faulty = extremes.isfinite().logical_not_().sum()
        others = view.rows(pieces.others)
        if len(others):
            n_faulty = n_faulty + others.isfinite().logical_not_().sum()
        passed = (extremes > self.lists.limits[: 2 * width].view(2, 1, width)).flatten()
        # The first piece with a window's highest value, in the form of a place in a list.
        keys = keys_of(extremes[0], torch.arange(n_pieces, device=self.device)[:, None])
        window_keys = torch.full((pieces.n_windows, width), EMPTY, device=self.device)
        window_keys.scatter_reduce_(0, pieces.windows[:, None].expand(-1, width), keys, "amax")
        # The first and the last may go on in other bands.
        windows_passed = values_of(window_keys[1:-1]) > self.lists.limits[2 * width :]
        ends = torch.cat([passed, windows_passed.flatten()]).cumsum(0, dtype=torch.int32)
        # A band without content rows has no ends.
        counts = [
            ends[n - 1] if n else torch.zeros_like(n_faulty) for n in (len(passed), len(ends))
        ]
        return _Screened(
            ends,
            window_keys,
            extremes.amax(1) if n_pieces else extremes.new_empty((2, width)),
            others,
            torch.stack([*(count.to(torch.int64) for count in counts), n_faulty]),
        )

    def _look(
        self,
        view: BandView,
        pieces: Pieces,
        screened: _Screened,
        passed: tuple[int, int],
        first_offset: int,
    ) -> None:
        """Add the rows of pieces and windows that passed to the lists."""
        width, (n_pieces, n_rows) = self.width, pieces.rows.shape
        lists, numbers = self.lists, torch.arange(n_rows, device=self.device)
        step = max(1, _LOOK_VALUES // n_rows)
        sign = signs(lists.limits)
        for first in range(0, passed[0], step):
            places = nth_true(screened.ends, first, min(first + step, passed[0]))
            column, piece = places % width, places // width % n_pieces
            side = places // (width * n_pieces)
            rows = pieces.rows[piece]
            values = view.take(rows, column) * sign[side] + 0.0
            which = side * width + column
            # Not those that repeat the last row of a short piece.
            is_row = numbers < pieces.sizes[piece][:, None]
            is_candidate = is_row & (values > lists.limits[which][:, None])
            keys = keys_of(values, rows + first_offset).where(is_candidate, EMPTY)
            which = which.to(torch.int32)[:, None].expand_as(keys)
            lists.add(keys.flatten(), which.flatten())

        self._end_windows(view, pieces, screened, passed, first_offset)
        lists.close()

    def _end_windows(
        self,
        view: BandView,
        pieces: Pieces,
        screened: _Screened,
        passed: tuple[int, int],
        first_offset: int,
    ) -> None:
        """Add the windows that passed and have ended to the lists, and carry the open one on."""
        width, n_windows, lists = self.width, pieces.n_windows, self.lists
        window_keys = screened.window_keys.flatten()

        def highest(places: Tensor) -> tuple[Tensor, Tensor]:
            """Return the first rows with the highest values of some windows, and their columns."""
            keys, column = window_keys[places], places % width
            high, rows = values_of(keys), pieces.rows[offsets_of(keys)]
            has_it = view.take(rows, column) == high[:, None]
            first = rows.where(has_it, view.n_rows).amin(1)
            return keys_of(high, first_offset + first), column

        def end(keys: Tensor, column: Tensor) -> None:
            """Add windows that have ended, by the limits as they are now."""
            which = column + 2 * width
            is_candidate = values_of(keys) > lists.limits[which]
            lists.add(keys.where(is_candidate, EMPTY), which.to(torch.int32))

        step = max(1, _LOOK_VALUES // pieces.rows.shape[1])
        every = torch.arange(width, device=self.device)
        # Of the first and the last window all columns, with the others that passed.
        edges = [every, every + (n_windows - 1) * width]
        for first in range(passed[0], max(passed[1], passed[0] + 1), step):
            places = nth_true(screened.ends, first, min(first + step, passed[1]))
            places -= 2 * pieces.rows.shape[0] * width - width
            keys, column = highest(torch.cat([*edges, places]))
            if edges:
                # In the order of rows: a later one that ties with a limit has lost.
                here, behind = keys[: 2 * width].view(2, width)
                if pieces.window_ids[0] == self.window_id:
                    self.open = torch.maximum(self.open, here)
                else:
                    end(self.open, every)
                    self.open = here
                if n_windows > 1:
                    end(self.open, every)
                    self.open = behind
                self.window_id = pieces.window_ids[1]
                keys, column, edges = keys[2 * width :], column[2 * width :], []
            end(keys, column)

    # -- counts and sums -----------------------------------------------------------------------

    def _count_bins(self, view: BandView, content: Tensor) -> None:
        """Count the bins of content rows; of infinities as of what will replace them."""
        one = torch.ones(1, dtype=torch.int32, device=self.device)
        columns = torch.arange(self.width, dtype=torch.int32, device=self.device)
        for block in view.blocks():
            codes = block.values.view(self._bits_dtype).index_select(1, content).to(torch.int32)
            if self.dtype == "float32":
                has_more = (codes & 0xFFFF) != 0
                codes = (codes >> 16) | has_more
            places = self.bin_table.index_select(0, codes.bitwise_and_(0xFFFF).flatten())
            places.view(codes.shape).add_(block.of(columns)[:, None])
            self.counts.index_add_(0, places, one.expand_as(places))

    def _add_others(self) -> None:
        """Add special and first rows, some bands' at once: each has few."""
        if not self.held:
            return
        values, self.held = torch.cat(self.held), []
        shift = self.others.begin(values)
        is_nan = values.isnan()
        self.n_others += is_nan.logical_not().sum(0)
        self.n_others_positive += (values > 0).sum(0)
        for extreme, sign in zip(self.others.extremes, (1, -1), strict=True):
            high = (values.float() * sign).masked_fill_(is_nan, -torch.inf).amax(0)
            torch.maximum(extreme, high, out=extreme)
        self.others.powers += power_sums(values[None], shift, hide_nan=True)

    def _draw(self, view: BandView, content: NDArray[np.int64], first_row_id: int) -> None:
        """Take the rows of a band that may be in the sample."""
        fold = self.sample
        limit = min(self.sample_threshold, fold.threshold(self.sampled))
        new = first_row_id + content
        new = new[fold.passes(new, limit)]
        if not new.size:
            return
        # The rows follow from their numbers alone: only those that stay are copied.
        nothing = np.empty((self.sampled.size, 0), np.float16), np.empty((new.size, 0), np.float16)
        old, added = SampleState(self.sampled, nothing[0]), SampleState(new, nothing[1])
        chosen = fold.merge(old, added).row_ids
        is_old = chosen < first_row_id
        kept = to_device(np.searchsorted(self.sampled, chosen[is_old]), self.device)
        rows = to_device(chosen[~is_old] - first_row_id, self.device)
        bits = view.rows(rows).view(self._bits_dtype)
        self.sampled_bits = torch.cat([self.sampled_bits[kept], bits])
        self.sampled = chosen

    # -- the result ----------------------------------------------------------------------------

    def finish(self, first_row_id: int) -> SiteFolds:
        """Return the folds."""
        self._add_others()
        counts = self.counts.view(N_BINS, self.width).T.to(torch.int64).cpu().numpy()
        n_positive = counts[:, _FIRST_POSITIVE:_ZERO_BIN].sum(axis=1)
        counts[:, _FIRST_POSITIVE] += counts[:, _ZERO_BIN]
        counts[:, [_ZERO_BIN, NO_BIN]] = 0
        zones = {row: (zone * signs(zone) + 0.0).cpu().numpy() for row, zone in self.zones.items()}
        top, bottom, window_top = self._ranked(first_row_id)
        sampled = self.sample.start(self.width)
        if self.sampled.size:
            bits = self.sampled_bits.cpu().numpy()
            sampled = SampleState(self.sampled, bits.view(DTYPES[self.dtype]))
        return SiteFolds(
            moments=self.content.state(counts.sum(axis=1), n_positive),
            moments_others=self.others.state(
                self.n_others.cpu().numpy().copy(), self.n_others_positive.cpu().numpy().copy()
            ),
            topk=TopKState(top, bottom),
            window_top=window_top,
            histogram=HistogramState(counts),
            zones=zones_of(zones, self.width),
            sample=sampled,
            gram=None if self.gram is None else self.gram.state(self.content.shift),
            nan=self.faults.of(NAN, first_row_id),
            overflow=self.faults.of(OVERFLOW, first_row_id),
        )

    def _ranked(self, first_row_id: int) -> Iterator[Ranked]:
        """Yield the lists in order: top, bottom, windows, that of the open one among them."""
        keys = self.lists.best()
        limits = self.lists.limits[2 * self.width :]
        open_ = self.open.where(values_of(self.open) > limits, EMPTY)
        for side, mine in enumerate(keys.view(3, self.width, self.k)):
            mine = torch.cat([mine, open_[:, None]], dim=1) if side == 2 else mine
            mine = mine.sort(dim=1, descending=True).values[:, : self.k]
            values = values_of(mine) * (-1 if side == 1 else 1) + 0.0
            is_place = (mine != EMPTY).cpu().numpy()
            ranked = empty_list(self.width, self.k)
            ranked.counts[:] = is_place.sum(axis=1)
            ranked.values[is_place] = values.cpu().numpy()[is_place]
            offsets = offsets_of(mine).cpu().numpy()
            ranked.row_ids[is_place] = first_row_id + offsets[is_place]
            yield ranked


@lru_cache
def _bin_table(dtype: str) -> NDArray[np.int32]:
    """Return the bin of each pattern of 16 bits: of a float16, or of the head of a float32."""
    head = "float16" if dtype == "float16" else "bfloat16"
    values = read_values(np.arange(2**16, dtype=np.uint16).view(DTYPES[head]), np.float32)
    bins = bins_of(values)
    bins[values == 0] = _ZERO_BIN
    bins[np.isnan(values)] = NO_BIN
    return bins.astype(np.int32)
