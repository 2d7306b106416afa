"""Replay: the activations of any planned rows, computed again from the stored tokens.

The plan holds everything a forward pass needs: the ids of every window, and those of its leading
context.  So rows that were not kept, or not captured yet, are one forward of their windows away,
and no other window is run.  Values are cast and saturated as capture does it; other windows in the
batch change them by rounding alone (see `actstore.capturing.verify`).

Windows that were run are kept in memory, whole: the text around a row is asked for next.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from actstore import arrow
from actstore.capturing.batches import Batch
from actstore.counted import counted
from actstore.errors import BudgetExceeded, ModelError, SiteNotFound, StoreMismatch
from actstore.models import LanguageModel, load
from actstore.shard import DTYPES
from actstore.site import Site, summarize
from actstore.store import CoreStore, SiteInfo
from actstore.store.rows import as_row_ids

Values = npt.NDArray[Any]
Window = Mapping[str, Any]
"""A row of the plan's table of windows."""


class Replayed(Mapping[Site, Values]):
    """Activations of some rows: for each site an array ``(n_rows, width)`` in its stored dtype.

    ``found["mlp_post.5"][i]`` belongs to ``found.row_ids[i]``.
    """

    def __init__(self, row_ids: npt.NDArray[np.int64], values: Mapping[Site, Values]) -> None:
        self.row_ids = row_ids
        self._values = values

    def __getitem__(self, site: str | Site) -> Values:
        parsed = site if isinstance(site, Site) else Site.parse(site)
        if parsed not in self._values:
            raise SiteNotFound(
                f"site {str(parsed)!r} was not replayed; {summarize(self._values)} was. Name it "
                "in store.replay(rows, sites)."
            )
        return self._values[parsed]

    def __iter__(self) -> Iterator[Site]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return f"<Replayed: {counted(len(self.row_ids), 'row')} x {summarize(self)}>"


def model_of(
    store: CoreStore, model: Any = None, tokenizer: Any = None, device: str = "auto"
) -> LanguageModel:
    """Return the model that a store was captured from, loaded and proved to be it.

    One read of all weights, for their fingerprint.

    Parameters
    ----------
    model : str, Path or module, optional
        Where it is now; default the name in the store, which is a name on the hub, or the last two
        parts of a path.
    tokenizer, device
        As for `actstore.capture`.

    Raises
    ------
    ModelError
        If it cannot be loaded.
    StoreMismatch
        If it is another model, or has another tokenizer.
    """
    facts = store.meta.model
    if isinstance(model, LanguageModel):
        loaded = model
    elif model is None or isinstance(model, (str, Path)):
        try:
            loaded = load(
                facts["name"] if model is None else model,
                tokenizer,
                dtype=facts["dtype"],
                device=device,
                revision=facts["revision"] if model is None else None,
            )
        except ModelError as error:
            if model is not None:
                raise
            raise ModelError(
                f"the model of {store.path}, {facts['name']!r}, is not found under that name, "
                "which of a local directory is the end of its path. Give the directory, or the "
                f"name it has now, as model= (--model). ({error})"
            ) from error
    else:
        loaded = load(model, tokenizer, device=device)
    for what, old, new in (
        ("weights", facts["weights"], loaded.weights_fingerprint),
        ("tokenizer", store.meta.tokenizer, loaded.tokenizer_fingerprint),
    ):
        if old != new:
            raise StoreMismatch(
                f"{store.path} was captured from {facts['name']} ({facts['architecture']}) with "
                f"{what} {old[:12]}…; {loaded.name} ({loaded.architecture}) has {new[:12]}…. Give "
                "the model it was captured from as model= (--model)."
            )
    return loaded


def windows_of(store: CoreStore, row_ids: npt.NDArray[np.int64]) -> list[Window]:
    """Return the windows that hold some planned rows, each once, in row order.

    Raises
    ------
    RowNotFound
        If a row is a hole.
    """
    found: list[Window] = []
    segments = row_ids // store.meta.segment_rows
    for segment in np.unique(segments).tolist():
        ids = row_ids[segments == segment]
        if segment not in store.planned:
            store.check_row(int(ids[0]))
        # The highest id of a segment is a hole if any of its ids is.
        if ids.max() - segment * store.meta.segment_rows >= store.planned[segment].rows[""]:
            store.check_row(int(ids.max()))
        table = store.windows(segment)
        places = np.searchsorted(arrow.numbers(table.column("first_row")), ids, side="right") - 1
        found += arrow.take(table, np.unique(places)).to_pylist()
    return found


def run_windows(
    store: CoreStore,
    model: LanguageModel,
    windows: Iterable[Window],
    infos: Sequence[SiteInfo],
    n_bytes: int,
) -> Iterator[tuple[Window, dict[Site, Values]]]:
    """Yield each window with the values of its rows at some sites, as they would be stored.

    Neighbours in the given order go through the model together, as many as the store's
    `batch_tokens` and `n_bytes` of values allow.
    """
    most = min(store.meta.batch_tokens, n_bytes // sum(info.row_bytes for info in infos))
    for chosen in _batched(windows, most):
        rows = [np.arange(w["first_row"], w["first_row"] + w["rows"]) for w in chosen]
        ends = np.cumsum([len(ids) for ids in rows])[:-1]
        ids = arrow.numbers(store.tokens_of(np.concatenate(rows)).column("token_id"))
        batch = Batch.of(chosen, np.split(ids, ends), model)
        found = _run(model, batch, infos)
        pieces = {site: np.split(values, ends) for site, values in found.items()}
        for i, window in enumerate(chosen):
            yield window, {site: parts[i] for site, parts in pieces.items()}


def _run(model: LanguageModel, batch: Batch, infos: Sequence[SiteInfo]) -> dict[Site, Values]:
    """Return the stored rows of a batch at some sites."""
    dtypes = {info.site: info.dtype for info in infos}
    found: dict[Site, Values] = {}

    def sink(site: Site, values: torch.Tensor) -> None:
        found[site] = stored_form(torch.cat(list(batch.stored(values))), dtypes[site])

    model.forward(batch.input_ids, batch.lengths, dtypes, sink)
    return found


def _batched(windows: Iterable[Window], most: int) -> Iterator[list[Window]]:
    """Yield windows that are at most so many tokens together, padding counted, or one alone."""
    batch: list[Window] = []
    longest = 0
    for window in windows:
        longest = max(longest, window["context_tokens"] + window["rows"])
        if batch and longest * (len(batch) + 1) > most:
            yield batch
            batch, longest = [], window["context_tokens"] + window["rows"]
        batch.append(window)
    if batch:
        yield batch


def stored_form(values: torch.Tensor, dtype: str) -> Values:
    """Return values as capture stores them: cast, infinities as the largest finite value."""
    cast = values.to("cpu", getattr(torch, dtype))
    largest = torch.finfo(cast.dtype).max
    # Capture saturates what the cast has made infinite; NaN passes through both.
    bits = torch.clamp(cast, -largest, largest).view(torch.uint8)
    found: Values = bits.numpy().view(DTYPES[dtype])
    return found


class Replayer:
    """The model of a store, and the values of the windows it has lately run.

    Parameters
    ----------
    store : CoreStore
        The store.
    model : LanguageModel
        Its model, as `model_of` returns it.
    """

    def __init__(self, store: CoreStore, model: LanguageModel) -> None:
        self.model = model
        self._store = store
        self._known: OrderedDict[tuple[int, Site], Values] = OrderedDict()
        self._known_bytes = 0

    def replay(self, rows: Any, sites: Any, budget: int) -> Replayed:
        """Return the activations of some rows; see `actstore.Store.replay`."""
        store = self._store
        row_ids, infos = as_row_ids(rows), store.select(sites)
        needed = len(row_ids) * sum(info.row_bytes for info in infos)
        if needed > budget // 2:
            raise BudgetExceeded(
                f"{len(row_ids):,} rows of {summarize(info.site for info in infos)} take "
                f"{needed / 1e6:,.0f} MB, and a replay may fill half of the budget of "
                f"{budget / 1e6:,.0f} MB. Ask for fewer rows or sites at a time, or give a larger "
                "budget=."
            )
        out = {
            info.site: np.empty((len(row_ids), info.width), DTYPES[info.dtype]) for info in infos
        }
        order = np.argsort(row_ids, kind="stable")
        ascending = row_ids[order]

        def give(window: Window, found: Mapping[Site, Values]) -> None:
            first = window["first_row"]
            low, high = np.searchsorted(ascending, [first, first + window["rows"]])
            for site, values in found.items():
                out[site][order[low:high]] = values[ascending[low:high] - first]

        unknown = []
        for window in windows_of(store, row_ids):
            keys = {site: (window["window_id"], site) for site in out}
            if all(key in self._known for key in keys.values()):
                give(window, {site: self._look_up(key) for site, key in keys.items()})
            else:
                unknown.append(window)
        # Longest first, as in a segment: neighbours need little padding.
        unknown.sort(key=lambda w: -(w["context_tokens"] + w["rows"]))
        for window, found in run_windows(store, self.model, unknown, infos, budget // 4):
            give(window, found)
            self._keep(window, found, budget // 4)
        return Replayed(row_ids, out)

    def _look_up(self, key: tuple[int, Site]) -> Values:
        self._known.move_to_end(key)
        return self._known[key]

    def _keep(self, window: Window, found: Mapping[Site, Values], most_bytes: int) -> None:
        """Remember the values of a window, and forget those not asked for longest."""
        for site, values in found.items():
            key = (window["window_id"], site)
            if key not in self._known:
                self._known[key] = values.copy()  # a view would hold all of its batch
                self._known_bytes += values.nbytes
            self._known.move_to_end(key)
        while self._known_bytes > most_bytes:
            _, values = self._known.popitem(last=False)
            self._known_bytes -= values.nbytes
