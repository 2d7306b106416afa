"""Which neurons stand out at each token: those furthest above their means, in deviations."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from actstore.store import CoreStore, SiteInfo
from actstore.store.stored_rows import ALL

N_NEURONS = 3
"""Neurons that are kept of each token."""

STEP = 1 / 8
"""Deviations that one step of a code stands for."""

_MOST_VALUES = 1 << 24


def standing_out(
    store: CoreStore,
    infos: Sequence[SiteInfo],
    row_ids: npt.NDArray[np.int64],
    usable: npt.NDArray[np.bool_],
) -> npt.NDArray[np.uint8] | None:
    """Return the neurons furthest above their means at rows, or None where that is too much.

    Reads the rows at all sites: 2 to 4 bytes a value, of at most 16 million; there must be an
    index, for means and deviations, and the sites must store all rows.

    Parameters
    ----------
    store : CoreStore
        The store.
    infos : sequence of SiteInfo
        The sites, of one space; neurons are numbered through them.
    row_ids : ndarray of int64, shape (n,)
        Committed rows.
    usable : ndarray of bool, shape (n,)
        The rows to tell of: at others, such as the first of a window, nothing stands out.

    Returns
    -------
    ndarray of uint8, shape (n, N_NEURONS, 4), or None
        Number of the neuron, three bytes from the lowest, and its deviation in steps of `STEP`;
        the neuron that stands out most first; a deviation of 0 is no neuron.
    """
    generation = store.index()
    n_values = len(row_ids) * sum(info.width for info in infos)
    if generation is None or n_values > _MOST_VALUES or any(i.keep != ALL for i in infos):
        return None
    name = f"{generation.folder}/neurons.parquet"
    store.verifier.check({name: generation.files[name]})
    best = np.zeros((len(row_ids), N_NEURONS), np.float32)
    which = np.zeros((len(row_ids), N_NEURONS), np.int64)
    first = 0
    for info in infos:
        mine = [("site", "=", str(info.site))]
        table = pq.read_table(store.path / name, columns=["neuron", "mean", "std"], filters=mine)
        table = table.sort_by("neuron")
        mean, std = (table.column(c).to_numpy().astype(np.float32) for c in ("mean", "std"))
        values = store[info.site][row_ids].astype(np.float32)
        with np.errstate(invalid="ignore", divide="ignore"):
            above = np.nan_to_num((values - mean) / std, nan=0.0, posinf=0.0, neginf=0.0)
        few = min(N_NEURONS, info.width)
        places = np.argpartition(-above, few - 1, axis=1)[:, :few]
        found = np.concatenate([best, np.take_along_axis(above, places, axis=1)], axis=1)
        numbers = np.concatenate([which, places + first], axis=1)
        order = np.argsort(-found, axis=1, kind="stable")[:, :N_NEURONS]
        best = np.take_along_axis(found, order, axis=1)
        which = np.take_along_axis(numbers, order, axis=1)
        first += info.width
    steps = np.clip(np.round(best / STEP), 0, 255) * usable[:, None]
    codes = np.empty((len(row_ids), N_NEURONS, 4), np.uint8)
    for byte in range(3):
        codes[..., byte] = which >> (8 * byte) & 255
    codes[..., 3] = steps
    return codes
