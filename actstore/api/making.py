"""Opening a store, making one, and saying beforehand what that would take."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actstore.api.arguments import Keep, Sites, settings
from actstore.api.store import Store
from actstore.errors import ArgumentError
from actstore.store.budget import Progress

if TYPE_CHECKING:
    from actstore.capturing import Estimate


def open(path: str | Path) -> Store:
    """Open the store in a folder.

    Raises
    ------
    StoreNotFound
        If the folder holds no store.
    FormatError
        If another version of the format wrote it.
    """
    return Store(path)


def capture(
    model: Any,
    corpus: Any = None,
    store: str | Path | None = None,
    *,
    text: str | Iterable[str] | None = None,
    tokenizer: Any = None,
    sites: Sites = None,
    keep: Keep = None,
    grams: Sites = None,
    dtype: str = "auto",
    context: int | None = None,
    overlap: int | None = None,
    batch_tokens: int | None = None,
    max_tokens: int | None = None,
    max_document_tokens: int | None = None,
    device: str = "auto",
    budget: int | str | None = None,
    encoding: str = "utf-8",
    errors: str = "strict",
    on_nan: str = "error",
    on_overflow: str = "count",
    order: str = "corpus",
    add: bool = False,
    workers: int | None = None,
    scheduler: str | None = None,
    segments: str | slice | None = None,
    progress: Progress | None = None,
) -> Store:
    """Run a corpus through a model once and keep its activations.

    Called again with the same arguments it goes on where it was stopped, and does nothing when all
    is there.  One forward pass of every window; memory is bounded by the budget.

    Parameters
    ----------
    model : str, Path or torch.nn.Module
        Hub name, local directory (safetensors, or one .gguf), or a transformers model.
    corpus : str, Path, dataset or iterable, optional
        A file (.txt, .jsonl, .jsonl.gz, .jsonl.zst, .parquet), a directory or glob of them, a
        Hugging Face dataset, streaming or not, or an iterable of str or of
        ``{"text": …, metadata}``.
    store : str or Path, optional
        Folder of the store; without one it is temporary and goes with the returned object.
    text : str or iterable of str, optional
        Documents themselves, instead of `corpus`.
    tokenizer : PreTrainedTokenizerFast, optional
        Needed where `model` is a module.
    sites : str, Site or iterable, optional
        Sites or patterns: ``"mlp_post"``, ``"resid_post.3-5"``; default all ``mlp_post``,
        ``resid_pre.0`` and all ``resid_post``.
    keep : str, float or mapping, optional
        Which rows are stored: ``"all"``, ``"none"``, or a fraction of the content rows that is a
        power of two, such as ``"1/256"``: one seeded sample for all sites.  By site:
        ``{"mlp_post": "1/64", "resid_post": "all"}``.  Default ``"all"``, or 1/256 where that
        would take more than 10 GB, with a warning.  Statistics and exemplars cover every row all
        the same, and `Store.replay` computes any row again.
    grams : str, Site or iterable, optional
        Sites whose Gram matrix is added up too: 8 bytes x width**2 each on disk, and a product of
        ``rows x width**2``.  Default none.
    dtype : {"auto", "float16", "float32", "bfloat16"}
        Stored dtype.  "auto": 16-bit models keep theirs; of float32 models ``mlp_post`` becomes
        float16, and residual sites too unless a probe exceeds 1,000 there.
    context : int, optional
        Tokens of a window, special ones counted; default 512, or the model's limit if less.
    overlap : int, optional
        Leading tokens of a later window that are context only and not stored; default 0.
    batch_tokens : int, optional
        Tokens of one forward pass, padding counted; default 4,096.
    max_tokens, max_document_tokens : int, optional
        Rows wanted in all, and of each document, special tokens counted.  Of a corpus that is
        added, they count for it alone.
    device : str
        ``"auto"``, ``"cpu"``, ``"cuda"``, ….
    budget : int or str, optional
        Peak memory beyond the model, such as ``"2GB"``; default the smaller of 4 GiB and half of
        what is free.
    encoding, errors : str
        How text files are decoded, as in `open`.
    on_nan, on_overflow : {"error", "count"}
        Whether NaN, and values outside the stored dtype, stop the capture, or are counted (and
        the latter saturated).
    order : {"corpus", "shuffled"}
        "shuffled": documents are taken in a random order, the same every time; while they are
        planned they take disk once more.  With `max_tokens` a random sample of them is captured.
    add : bool
        Add another corpus to a store that has all documents of its own; what is there does not
        change, and rows keep their ids.  A corpus that the store has is not added again.
    workers : int, optional
        Capture with so many processes of this machine, one a GPU, or the CPU's threads divided;
        they share the budget.  `model` must then be a name or directory.  The rows and the index
        are the same for any number.
    scheduler : str, optional
        Capture on the workers of a running Dask scheduler, ``"tcp://host:8786"``, which must see
        the store under its path; the budget is then that of each worker.
    segments : str or slice, optional
        ``"I::N"``: capture only the segments I, I + N, I + 2N, … of the plan, and leave the index
        to `Store.finish`.  For batch systems, which start N processes with one store.
    progress : callable, optional
        ``progress(stage, done, total)``; a total of 0 is not known yet.

    Returns
    -------
    Store

    Raises
    ------
    CorpusError, ModelError, SiteNotFound, StoreMismatch, NotEnoughDisk, ArgumentError
        Before the model runs, with the remedy in the message.
    NonFiniteActivation
        If the model yields NaN, and `on_nan` is "error".
    """
    from actstore.capturing import ORDERS, run_capture

    for name, value in (("on_nan", on_nan), ("on_overflow", on_overflow)):
        if value not in ("error", "count"):
            raise ArgumentError(f"{name} = {value!r} is not 'error' or 'count'.")
    if order not in ORDERS:
        raise ArgumentError(f"order = {order!r} is not one of {', '.join(ORDERS)}.")
    found, timing = run_capture(
        model,
        corpus,
        store,
        text=text,
        tokenizer=tokenizer,
        settings=settings(
            *(sites, dtype, context, overlap, batch_tokens, max_tokens, max_document_tokens),
            keep,
            grams,
        ),
        device=device,
        budget=budget,
        encoding=encoding,
        errors=errors,
        on_nan=on_nan,  # type: ignore[arg-type]  # checked above
        on_overflow=on_overflow,  # type: ignore[arg-type]
        order=order,
        add=add,
        workers=workers,
        scheduler=scheduler,
        segments=segments,
        progress=progress,
    )
    opened = Store(found.path)
    opened.timing = timing
    # A temporary store lives as long as what made it.
    opened.__dict__["_made_by"] = found
    return opened


def estimate(
    model: Any,
    corpus: Any = None,
    store: str | Path | None = None,
    *,
    text: str | Iterable[str] | None = None,
    tokenizer: Any = None,
    sites: Sites = None,
    keep: Keep = None,
    grams: Sites = None,
    dtype: str = "auto",
    context: int | None = None,
    overlap: int | None = None,
    batch_tokens: int | None = None,
    max_tokens: int | None = None,
    max_document_tokens: int | None = None,
    device: str = "auto",
    budget: int | str | None = None,
    encoding: str = "utf-8",
    errors: str = "strict",
    progress: Progress | None = None,
) -> Estimate:
    """Return what `capture` with the same arguments would take: rows, bytes, time, memory.

    Tokenises the corpus once and captures a few batches into a temporary folder.
    """
    from actstore.capturing import run_estimate

    return run_estimate(
        model,
        corpus,
        store,
        text=text,
        tokenizer=tokenizer,
        settings=settings(
            *(sites, dtype, context, overlap, batch_tokens, max_tokens, max_document_tokens),
            keep,
            grams,
        ),
        device=device,
        budget=budget,
        encoding=encoding,
        errors=errors,
        progress=progress,
    )
