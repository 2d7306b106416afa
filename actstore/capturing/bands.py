"""Bands: the buffers that activations pass through, from the model to the folds and to the disk.

A *band* is `chunk_rows` rows of every site in the order the shard will have.  The hooks cast and
re-lay activations straight into it, so each value is touched once between the model and what comes
of it.  Where a band lies follows from where the model runs:

- `HostBands`: the model runs on the CPU.  Its bands are folded there, and the writer thread gets
  the very same ones.
- `DeviceBands`: the model runs on a GPU.  Bands lie on it and are folded there.  Only of sites that
  store rows a copy goes to pinned memory, on a stream of its own, and from there to the writer; the
  model goes on meanwhile.

Bands come from pools of fixed size: when the disk is slow a pool runs dry and the model waits;
memory does not grow.
"""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import replace
from typing import Any, Protocol

import ml_dtypes
import numpy as np
import numpy.typing as npt
import torch

from actstore.capturing.batches import Batch
from actstore.capturing.lists import SAMPLE, TOPK
from actstore.folds import device as device_folds
from actstore.folds.cpu import BandFolds
from actstore.folds.device import TORCH_DTYPES, DeviceFolds
from actstore.folds.passes import SiteFolds, SiteThresholds
from actstore.site import Site
from actstore.store import CoreStore, SiteInfo, StoreMeta
from actstore.store.stored_rows import ALL

Int64 = npt.NDArray[np.int64]


class Band:
    """One buffer of `chunk_rows` rows for some sites, in chunk order."""

    def __init__(
        self,
        meta: StoreMeta,
        infos: Iterable[SiteInfo],
        empty: Callable[[tuple[int, ...], torch.dtype], torch.Tensor],
    ) -> None:
        self.buffers: dict[Site, torch.Tensor] = {}
        self.copied: torch.cuda.Event | None = None
        """When a copy from or to this band is done, which another stream makes."""
        for info in infos:
            layout = meta.layout(replace(info, keep=ALL))
            shape = (layout.n_column_chunks, layout.chunk_rows, layout.chunk_columns)
            # NaN marks what no row fills: padded columns, and the hole at a segment's end.
            self.buffers[info.site] = empty(shape, TORCH_DTYPES[info.dtype]).fill_(torch.nan)

    def put(self, site: Site, row: int, values: torch.Tensor) -> None:
        """Cast rows ``(n, width)`` into the band from a row on."""
        buffer = self.buffers[site]
        n, width = values.shape
        columns = buffer.shape[2]
        full = width // columns
        buffer[:full, row : row + n].copy_(
            values[:, : full * columns].reshape(n, full, columns).transpose(0, 1)
        )
        if width % columns:
            buffer[full, row : row + n, : width % columns].copy_(values[:, full * columns :])

    def end_at(self, row: int) -> None:
        """Mark the rows from one on as not there."""
        for buffer in self.buffers.values():
            buffer[:, row:] = torch.nan

    def array(self, site: Site) -> npt.NDArray[Any]:
        """Return the site's buffer as NumPy, without a copy; only of bands of the CPU."""
        if self.copied is not None:
            self.copied.synchronize()
        buffer = self.buffers[site]
        if buffer.dtype == torch.bfloat16:
            return buffer.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        found: npt.NDArray[Any] = buffer.numpy()
        return found


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
        """Return what the segment adds to the folds of one site."""
        ...


Wait = Callable[["queue.Queue[Band]"], Band]
"""Returns what a queue gives, once it does."""


class _Pool:
    """Bands that are made when one is needed that has not come back yet, up to a number."""

    def __init__(self, n_bands: int, make: Callable[[], Band]) -> None:
        self._free: queue.Queue[Band] = queue.Queue()
        self._n_left, self._make = n_bands, make

    def take(self, wait: Wait) -> Band:
        """Return a band, once there is one."""
        if self._free.empty() and self._n_left:
            self._n_left -= 1
            return self._make()
        return wait(self._free)

    def give_back(self, band: Band) -> None:
        """Let others take the band."""
        self._free.put(band)


class HostBands:
    """The bands of a model that runs on the CPU.

    Parameters
    ----------
    store : CoreStore
        A store with a plan.
    device : torch.device
        Where the model runs.
    n_bands : int
        Bands that may lie in the memory of the CPU.
    """

    def __init__(self, store: CoreStore, device: torch.device, n_bands: int) -> None:
        self._meta = store.meta
        self._pool = _Pool(n_bands, lambda: Band(store.meta, store.meta.sites, _in_ram))

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

    def take(self, wait: Wait) -> Band:
        """Return a band for the model to fill; waits where the disk has not kept up."""
        return self._pool.take(wait)

    def values(self, band: Band, site: Site) -> npt.NDArray[Any]:
        """Return what the folds take of a band."""
        return band.array(site)

    def pass_on(self, band: Band, wait: Wait) -> Band:
        """Return a folded band as the writer gets it."""
        return band

    def drop(self, band: Band) -> None:
        """Take back a folded band that nothing is stored of."""
        self._pool.give_back(band)

    def written(self, band: Band) -> None:
        """Take back a band that was passed on; called by the writer."""
        self._pool.give_back(band)


class DeviceBands:
    """The bands of a model that runs on a GPU; parameters as of `HostBands`."""

    def __init__(self, store: CoreStore, device: torch.device, n_bands: int) -> None:
        self._meta, self._device = store.meta, device
        kept = store.meta.kept_sites
        self._there: deque[Band] = deque()
        # A batch may begin in one band and end in another; one more may be on its way to the CPU.
        self._most_there = -(-store.meta.batch_tokens // store.meta.chunk_rows) + 1 + bool(kept)
        self._n_there = 0
        is_gpu = device.type == "cuda"
        # PyTorch gives this no types.
        self._stream = torch.cuda.Stream(device) if is_gpu else None  # type: ignore[no-untyped-call]
        empty = _pinned if is_gpu else _in_ram
        self._here = _Pool(n_bands, lambda: Band(store.meta, kept, empty))
        self._positions: tuple[Batch, torch.Tensor] | None = None

    @property
    def device_bytes(self) -> int:
        """Bytes of a GPU that the capture takes beyond the model, about.

        They are the bands, the states of two segments under way, and what folding one site takes
        for a while.
        """
        meta = self._meta
        n_bands = meta.segment_rows // meta.chunk_rows
        states = sum(
            device_folds.state_bytes(
                *(info.width, info.dtype, TOPK.k, SAMPLE.n_rows, n_bands),
                str(info.site) in meta.grams,
            )
            for info in meta.sites
        )
        folding = max(
            device_folds.temporary_bytes(meta.chunk_rows, info.width, TOPK.k) for info in meta.sites
        )
        return self._most_there * meta.chunk_rows * meta.row_bytes + 2 * states + folding

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

    def take(self, wait: Wait) -> Band:
        """Return a band for the model to fill, behind the copy that may still be made of it."""
        if not self._there or (self._n_there < self._most_there and self._there[0].copied):
            self._n_there += 1
            return Band(self._meta, self._meta.sites, self._on_device)
        band = self._there.popleft()
        if band.copied is not None:
            torch.cuda.current_stream(self._device).wait_event(band.copied)
            band.copied = None
        return band

    def _on_device(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=self._device)

    def values(self, band: Band, site: Site) -> torch.Tensor:
        """Return what the folds take of a band."""
        return band.buffers[site]

    def pass_on(self, band: Band, wait: Wait) -> Band:
        """Return a folded band as the writer gets it: a copy that may still be under way.

        Waits where the disk has not kept up.
        """
        copy = self._here.take(wait)
        if self._stream is None:
            _copy(band, copy)
        else:
            # Behind the folds, which have mended the band; beside what the model does next.
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(self._stream):
                _copy(band, copy)
            band.copied = copy.copied = self._stream.record_event()
        self._there.append(band)
        return copy

    def drop(self, band: Band) -> None:
        """Take back a folded band that nothing is stored of."""
        self._there.append(band)

    def written(self, band: Band) -> None:
        """Take back a band that was passed on; called by the writer."""
        self._here.give_back(band)


def bands_of(device: torch.device) -> type[HostBands] | type[DeviceBands]:
    """Return the bands of a model that runs on a device.

    Apple's GPUs have no float64, which the folds need: there activations are copied to the CPU.
    """
    return DeviceBands if device.type == "cuda" else HostBands


def _copy(source: Band, target: Band) -> None:
    for site, buffer in target.buffers.items():
        buffer.copy_(source.buffers[site], non_blocking=True)


def _in_ram(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    # NumPy's memory comes in huge pages, where there are any.
    return torch.from_numpy(np.empty(shape, f"i{dtype.itemsize}")).view(dtype)


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
