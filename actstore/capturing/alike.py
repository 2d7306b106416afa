"""New text captured as a store was: the same model, sites, windows, in a temporary store."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from actstore.capturing.replay import model_of
from actstore.capturing.run import Settings, run_capture
from actstore.site import Site
from actstore.store import CoreStore
from actstore.store.budget import Progress


def capture_alike(
    store: CoreStore,
    text: str | Iterable[str],
    sites: Iterable[Site],
    *,
    model: Any = None,
    tokenizer: Any = None,
    device: str = "auto",
    budget: int | str | None = None,
    progress: Progress | None = None,
) -> CoreStore:
    """Return a temporary store of new documents, captured with the settings of another.

    Parameters
    ----------
    store : CoreStore
        The store to be like: its model, context, overlap, and the dtype of its sites.
    text : str or iterable of str
        Documents.
    sites : iterable of Site
        The sites to capture.
    model, tokenizer, device
        As for `model_of`.
    budget : int or str, optional
        Peak memory beyond the model.
    progress : callable, optional
        ``progress(stage, done, total)``.

    Raises
    ------
    ModelError, StoreMismatch
        If the model cannot be loaded, or is another.
    CorpusError
        If there is no text.
    """
    names = tuple(sites)
    dtypes = {store.site(name).dtype for name in names}
    settings = Settings(
        names,
        # One for all sites: where they differ, the one that holds what any of them holds.
        dtypes.pop() if len(dtypes) == 1 else "float32",
        context=store.meta.context,
        overlap=store.meta.overlap,
        keep="all",
    )
    found, _ = run_capture(
        model_of(store, model, tokenizer, device),
        text=text,
        settings=settings,
        budget=budget,
        progress=progress,
    )
    return found
