"""Bands: the buffers that activations pass through, from the model to the folds and to the disk.

A *band* is `chunk_rows` rows of one site in the order the shard will have.  The hooks cast and
re-lay activations straight into it, so each value is touched once between the model and what comes
of it.  Each site has a band, which the next batch may have to go on with; some more wait for the
folds or for the disk.  Where a band lies follows from where the model runs:

- `HostBands`: the model runs on the CPU.  Its bands are folded there, and the writer thread gets
  the very same ones.
- `DeviceBands`: the model runs on a GPU.  Bands lie on it and are folded there.  Only of sites that
  store rows a copy goes to pinned memory, on a stream of its own, and from there to the writer; the
  model goes on meanwhile.

Bands come from pools of fixed size, one for each width and dtype: when the disk is slow a pool runs
dry and the model waits; memory does not grow.
"""

from __future__ import annotations

import math
import mmap
import queue
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import ml_dtypes
import numpy as np
import numpy.typing as npt
import torch

from actstore.capturing.batches import Batch
from actstore.capturing.lists import SAMPLE, TOPK
from actstore.capturing.sampled import band_bytes
from actstore.folds import device as device_folds
from actstore.folds.cpu import BandFolds
from actstore.folds.device import TORCH_DTYPES, DeviceFolds
from actstore.folds.passes import SiteFolds, SiteThresholds
from actstore.shard import ShardLayout
from actstore.store import CoreStore, SiteInfo, StoreMeta
from actstore.store.stored_rows import ALL

Int64 = npt.NDArray[np.int64]
Empty = Callable[[tuple[int, ...], torch.dtype], torch.Tensor]
Kind = tuple[int, str]
"""Width and dtype: bands of sites that share them take each other's place."""


class Band:
    """One buffer of `chunk_rows` rows of a site, in chunk order."""

    def __init__(self, meta: StoreMeta, info: SiteInfo, empty: Empty) -> None:
        layout = _layout(meta, info)
        shape = (layout.n_column_chunks, layout.chunk_rows, layout.chunk_columns)
        # NaN marks what no row fills: padded columns, and the hole at a segment's end.
        self.values = empty(shape, TORCH_DTYPES[info.dtype]).fill_(torch.nan)
        self.copied: torch.cuda.Event | None = None
        """When a copy from or to this band is done, which another stream makes."""

    def put(self, row: int, rows: torch.Tensor) -> None:
        """Cast rows ``(n, width)`` into the band from a row on."""
        n, width = rows.shape
        columns = self.values.shape[2]
        full = width // columns
        self.values[:full, row : row + n].copy_(
            rows[:, : full * columns].reshape(n, full, columns).transpose(0, 1)
        )
        if width % columns:
            self.values[full, row : row + n, : width % columns].copy_(rows[:, full * columns :])

    def end_at(self, row: int) -> None:
        """Mark the rows from one on as not there."""
        self.values[:, row:] = torch.nan

    def array(self) -> npt.NDArray[Any]:
        """Return the buffer as NumPy, without a copy; only of bands of the CPU."""
        if self.copied is not None:
            self.copied.synchronize()
        if self.values.dtype == torch.bfloat16:
            return self.values.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        found: npt.NDArray[Any] = self.values.numpy()
        return found


def kind_of(info: SiteInfo) -> Kind:
    """Return which bands a site takes."""
    return info.width, info.dtype


def n_bands(infos: Iterable[SiteInfo], n_spare: int) -> dict[Kind, int]:
    """Return how many bands of each kind there are, so many spare ones wanted.

    One for each site, which the model fills, and at most as many that wait for the folds and as
    many for the disk.
    """
    return {kind: n + min(2 * n, n_spare) for kind, n in Counter(map(kind_of, infos)).items()}


def bands_bytes(meta: StoreMeta, counts: Mapping[Kind, int]) -> int:
    """Return the bytes of so many bands of each kind."""
    one = {kind_of(info): band_bytes(_layout(meta, info)) for info in meta.sites}
    return sum(n * one[kind] for kind, n in counts.items())


def _layout(meta: StoreMeta, info: SiteInfo) -> ShardLayout:
    # Of every row, whatever part of them is stored.
    return meta.layout(replace(info, keep=ALL))


class Folds(Protocol):
    """The running folds of a segment: `BandFolds` or `DeviceFolds`."""

    def update(
        self,
        site_index: int,
        band: Any,
        content: Int64,
        others: Int64,
        windows: Int64,
        first_offset: int,
        thresholds: SiteThresholds | None,
    ) -> tuple[int, int]:
        """Add a band of one site."""
        ...

    def finish(self, site_index: int) -> SiteFolds:
        """Return what the segment adds to the folds of one site, and let its state go."""
        ...


Wait = Callable[["queue.Queue[Band]"], Band]
"""Returns what a queue gives, once it does."""


class _Pool:
    """Bands of one kind, made when one is needed that has not come back yet, up to a number."""

    def __init__(self, n_bands: int, make: Callable[[], Band]) -> None:
        self._free: queue.Queue[Band] = queue.Queue()
        self._n_left, self._make = n_bands, make

    @property
    def has_free(self) -> bool:
        """Whether `take` need not wait."""
        return self._n_left > 0 or not self._free.empty()

    def take(self, wait: Wait) -> Band:
        """Return a band, once there is one."""
        if self._free.empty() and self._n_left:
            self._n_left -= 1
            return self._make()
        return wait(self._free)

    def give_back(self, band: Band) -> None:
        """Let others take the band."""
        self._free.put(band)


def _pools(
    meta: StoreMeta, infos: Collection[SiteInfo], n_spare: int, empty: Empty
) -> dict[Kind, _Pool]:
    example = {kind_of(info): info for info in infos}
    return {
        kind: _Pool(n, partial(Band, meta, example[kind], empty))
        for kind, n in n_bands(infos, n_spare).items()
    }


class HostBands:
    """The bands of a model that runs on the CPU.

    Parameters
    ----------
    store : CoreStore
        A store with a plan.
    device : torch.device
        Where the model runs.
    n_spare : int
        Bands of each kind that may lie in the memory of the CPU beside one for each site.
    """

    def __init__(self, store: CoreStore, device: torch.device, n_spare: int) -> None:
        self._meta = store.meta
        self._pools = _pools(store.meta, store.meta.sites, n_spare, _in_ram)

    @property
    def device_bytes(self) -> int:
        """Bytes of a GPU that the capture takes beyond the model, about."""
        return 0

    def start_folds(self, first_row_id: int) -> Folds:
        """Return the folds of a segment before its first band."""
        return BandFolds(
            **_folds_options(self._meta, first_row_id), n_threads=torch.get_num_threads()
        )

    def stored(self, batch: Batch, values: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield the stored rows ``(n, width)`` of what a site gave, in row order."""
        return batch.stored(values)

    def has_free(self, info: SiteInfo) -> bool:
        """Whether `take` need not wait."""
        return self._pools[kind_of(info)].has_free

    def take(self, info: SiteInfo, wait: Wait) -> Band:
        """Return a band for the model to fill; waits where the disk has not kept up."""
        return self._pools[kind_of(info)].take(wait)

    def values(self, band: Band) -> npt.NDArray[Any]:
        """Return what the folds take of a band."""
        return band.array()

    def pass_on(self, info: SiteInfo, band: Band, wait: Wait) -> Band:
        """Return a folded band as the writer gets it."""
        return band

    def drop(self, info: SiteInfo, band: Band) -> None:
        """Take back a folded band that nothing is stored of."""
        self._pools[kind_of(info)].give_back(band)

    def written(self, info: SiteInfo, band: Band) -> None:
        """Take back a band that was passed on; called by the writer."""
        self._pools[kind_of(info)].give_back(band)


class DeviceBands:
    """The bands of a model that runs on a GPU; parameters as of `HostBands`.

    On the GPU there are what a batch fills, a band of each site that the next one goes on with, and
    one that a copy may be made of.
    """

    def __init__(self, store: CoreStore, device: torch.device, n_spare: int) -> None:
        self._meta, self._device = store.meta, device
        kept = store.meta.kept_sites
        self._there: dict[Kind, deque[Band]] = {kind_of(info): deque() for info in store.meta.sites}
        self._n_to_make = self._n_there()
        is_gpu = device.type == "cuda"
        # PyTorch gives this no types.
        self._stream = torch.cuda.Stream(device) if is_gpu else None  # type: ignore[no-untyped-call]
        self._here = _pools(store.meta, kept, n_spare, _pinned if is_gpu else _in_ram)
        self._positions: tuple[Batch, torch.Tensor] | None = None

    @property
    def device_bytes(self) -> int:
        """Bytes of a GPU that the capture takes beyond the model, about.

        They are the bands, the states of two segments under way, and what folding one site takes
        for a while.
        """
        meta = self._meta
        n_folded = meta.segment_rows // meta.chunk_rows
        states = sum(
            device_folds.state_bytes(
                *(info.width, info.dtype, TOPK.k, SAMPLE.n_rows, n_folded),
                str(info.site) in meta.grams,
            )
            for info in meta.sites
        )
        folding = max(
            device_folds.temporary_bytes(meta.chunk_rows, info.width, TOPK.k) for info in meta.sites
        )
        return bands_bytes(meta, self._n_there()) + 2 * states + folding

    def _n_there(self) -> dict[Kind, int]:
        meta = self._meta
        n_each = -(-meta.batch_tokens // meta.chunk_rows) + 1 + bool(meta.kept_sites)
        return {kind: n * n_each for kind, n in n_bands(meta.sites, n_spare=0).items()}

    def start_folds(self, first_row_id: int) -> Folds:
        """Return the folds of a segment before its first band."""
        return DeviceFolds(**_folds_options(self._meta, first_row_id), device=self._device)

    def stored(self, batch: Batch, values: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield the stored rows ``(n, width)`` of what a site gave, all at once.

        Windows may be many and short: on a GPU their number must not be that of the copies.
        """
        rows = values.flatten(0, 1)
        if len(rows) > batch.rows:
            if self._positions is None or self._positions[0] is not batch:
                self._positions = batch, device_folds.to_device(batch.positions(), self._device)
            rows = rows.index_select(0, self._positions[1])
        yield rows

    def has_free(self, info: SiteInfo) -> bool:
        """Whether there is a band for `take` to return."""
        return bool(self._there[kind_of(info)]) or self._n_to_make[kind_of(info)] > 0

    def take(self, info: SiteInfo, wait: Wait) -> Band:
        """Return a band for the model to fill, behind the copy that may still be made of it."""
        kind, there = kind_of(info), self._there[kind_of(info)]
        if not there or (self._n_to_make[kind] and there[0].copied):
            self._n_to_make[kind] -= 1
            return Band(self._meta, info, self._on_device)
        band = there.popleft()
        if band.copied is not None:
            torch.cuda.current_stream(self._device).wait_event(band.copied)
            band.copied = None
        return band

    def _on_device(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=self._device)

    def values(self, band: Band) -> torch.Tensor:
        """Return what the folds take of a band."""
        return band.values

    def pass_on(self, info: SiteInfo, band: Band, wait: Wait) -> Band:
        """Return a folded band as the writer gets it: a copy that may still be under way.

        Waits where the disk has not kept up.
        """
        copy = self._here[kind_of(info)].take(wait)
        if self._stream is None:
            _copy(band, copy)
        else:
            # Behind the folds, which have mended the band; beside what the model does next.
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(self._stream):
                _copy(band, copy)
            band.copied = copy.copied = self._stream.record_event()
        self.drop(info, band)
        return copy

    def drop(self, info: SiteInfo, band: Band) -> None:
        """Take back a folded band that nothing more is wanted of."""
        self._there[kind_of(info)].append(band)

    def written(self, info: SiteInfo, band: Band) -> None:
        """Take back a band that was passed on; called by the writer."""
        self._here[kind_of(info)].give_back(band)


def bands_of(device: torch.device) -> type[HostBands] | type[DeviceBands]:
    """Return the bands of a model that runs on a device.

    Apple's GPUs have no float64, which the folds need: there activations are copied to the CPU.
    """
    return DeviceBands if device.type == "cuda" else HostBands


def _copy(source: Band, target: Band) -> None:
    target.values.copy_(source.values, non_blocking=True)


def _in_ram(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    # Pages of its own: in the heap it would lie between what a forward pass takes and frees, and
    # leave holes that the next one does not fit into.
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, private)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel may have none
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def _pinned(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, pin_memory=True)


def _folds_options(meta: StoreMeta, first_row_id: int) -> dict[str, Any]:
    grams: Collection[str] = meta.grams
    return {
        "widths": [info.width for info in meta.sites],
        "dtypes": [info.dtype for info in meta.sites],
        "first_row_id": first_row_id,
        "k": TOPK.k,
        "sample": SAMPLE,
        "gram_sites": [i for i, info in enumerate(meta.sites) if str(info.site) in grams],
    }
