"""Capture from end to end: corpus and model in, a finished store out.

The same call makes a store, goes on with an interrupted one, and finds that nothing is left to do.
What would be refused is refused before the model runs: paths, names, another model or corpus, and
disk space.
"""

from __future__ import annotations

import errno
import platform
import tempfile
import uuid
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from actstore.capturing.compact import compact
from actstore.capturing.corpus import Corpus, open_corpus
from actstore.capturing.plan import Limits, encode_documents, make_plan
from actstore.capturing.worker import OnFault, Timing, Worker, affordable_bands, list_bytes
from actstore.errors import ArgumentError, CorpusError, NotEnoughDisk, StoreMismatch, StoreNotFound
from actstore.models import LanguageModel, load
from actstore.shard import ShardLayout
from actstore.site import Site, summarize
from actstore.store import CoreStore, SiteInfo, StoreMeta, is_vacant
from actstore.store.budget import Progress, parse_budget

SEGMENT_BYTES = 512 * 2**20
"""A segment takes at most this, or an eighth of the budget if that is more."""

DEFAULT_SITES = ("mlp_post", "resid_pre.0", "resid_post")
"""All neurons and hidden states, none of them twice: resid_pre.i is resid_post.(i-1)."""

DTYPES = ("auto", "float16", "float32", "bfloat16")

_PROBE_TOKENS = 1024
_FLOAT16_SAFE = 1000.0
_DEFAULT_CONTEXT = 512
_COMPACT_EVERY = 64
_LIST_BYTES = 10_000
_NO_TOKEN = "the corpus holds no token; give one with text in it."


@dataclass(frozen=True)
class Settings:
    """How a model is captured; None leaves it to the defaults, or to the store that exists."""

    sites: str | Site | Sequence[str | Site] | None = None
    """Sites or patterns such as ``"mlp_post"`` or ``"resid_post.3-5"``; default `DEFAULT_SITES`."""
    dtype: str = "auto"
    """Stored dtype, one of `DTYPES`; ``"auto"`` decides for each site."""
    context: int | None = None
    """Tokens of a window, special ones counted; default 512, or the model's limit if less."""
    overlap: int | None = None
    """Leading tokens of later windows that are context only; default 0."""
    batch_tokens: int | None = None
    """Tokens of one forward pass, padding counted; default 4,096, less where memory is short."""
    limits: Limits = field(default_factory=Limits)
    """How much of the corpus is wanted."""


def _pow2_up(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def segment_rows(row_bytes: int, budget: int, context: int) -> int:
    """Return S: the largest power of two in 4,096 … 65,536 whose segment is not too large."""
    limit = max(SEGMENT_BYTES, budget // 8)
    size = 65_536
    while size > 4_096 and size * row_bytes > limit:
        size //= 2
    return max(size, _pow2_up(8 * context))


def chunk_rows(rows: int, affordable_rows: int, text_bytes: int | None) -> int:
    """Return the rows of a chunk: 4,096, less where bands would not fit or texts are short.

    A text has at most as many tokens as bytes, and a chunk is written whole: one prompt should not
    take the space of four thousand rows.
    """
    size = min(4_096, rows)
    if text_bytes is not None:
        size = min(size, max(64, _pow2_up(text_bytes + text_bytes // 8 + 64)))
    while size > 64 and 4 * size > affordable_rows:
        size //= 2
    return size


def batch_rows(chunk: int, affordable_rows: int, context: int) -> int:
    """Return the tokens of a batch: 4,096, less where they and two bands would not fit."""
    size = 4_096
    while size > context and size + 2 * chunk > affordable_rows:
        size //= 2
    return max(size, context)


def choose_dtypes(
    model: LanguageModel, sites: Iterable[Site], dtype: str, corpus: Corpus
) -> dict[Site, str]:
    """Return the stored dtype of each site, by a probe where the model computes in float32.

    Models of 16 bits keep theirs.  Of float32 models, ``mlp_post`` is stored as float16, residual
    sites too unless the probe, one window of the corpus, exceeds 1,000 there.

    Raises
    ------
    ArgumentError
        If `dtype` is not one of `DTYPES`.
    """
    if dtype not in DTYPES:
        raise ArgumentError(f"dtype = {dtype!r} is not one of {', '.join(DTYPES)}.")
    sites = list(sites)
    if dtype != "auto":
        return dict.fromkeys(sites, dtype)
    if model.dtype in ("float16", "bfloat16"):
        return dict.fromkeys(sites, model.dtype)
    largest = probe(model, sites, corpus)
    return {
        site: "float16" if site.hook == "mlp_post" or largest[site] < _FLOAT16_SAFE else "float32"
        for site in sites
    }


def probe(model: LanguageModel, sites: Iterable[Site], corpus: Corpus) -> dict[Site, float]:
    """Return the largest magnitude at each site over the first tokens of the corpus."""
    ids: list[int] = []
    for _, _, encoded in encode_documents(iter(_first(corpus)), 0, model):
        ids += encoded.ids[:_PROBE_TOKENS].tolist()
    special = [*model.prefix_ids, *model.suffix_ids]
    limit = min(_PROBE_TOKENS, model.context_limit) - len(special)
    fed = [*model.prefix_ids, *ids[:limit], *model.suffix_ids] or [model.pad_id]
    largest: dict[Site, float] = {}
    model.forward(
        torch.tensor([fed]),
        [len(fed)],
        list(sites),
        lambda site, values: largest.update({site: float(values.abs().max())}),
    )
    return largest


def _first(corpus: Corpus) -> list[Any]:
    for document in corpus:
        if document.text.strip():
            return [document]
    return []


def new_meta(model: LanguageModel, corpus: Corpus, settings: Settings, budget: int) -> StoreMeta:
    """Return the facts of a store to be made."""
    wanted = model.select(DEFAULT_SITES if settings.sites is None else settings.sites)
    context, overlap, batch_tokens = settings.context, settings.overlap or 0, settings.batch_tokens
    if context is None:
        context = min(_DEFAULT_CONTEXT, model.context_limit)
    n_special = len(model.prefix_ids) + len(model.suffix_ids)
    if not n_special < context <= model.context_limit:
        raise ArgumentError(
            f"context = {context} cannot be: {model.name} takes at most {model.context_limit} "
            f"tokens, and {n_special} of a window are special ones. Give another context= "
            "(--context)."
        )
    if not 0 <= overlap < context - n_special:
        raise ArgumentError(
            f"overlap = {overlap} must be at least 0 and less than the {context - n_special} "
            "tokens of text in a window."
        )
    if batch_tokens is not None and batch_tokens < context:
        raise ArgumentError(
            f"batch_tokens = {batch_tokens} must hold a window of context = {context} tokens; give "
            "more batch_tokens= (--batch-tokens) or less context= (--context)."
        )
    for name in ("max_tokens", "max_document_tokens"):
        limit = getattr(settings.limits, name)
        if limit is not None and limit <= n_special:
            raise ArgumentError(
                f"{name} = {limit} leaves no token of text: {n_special} of a window are special "
                f"ones. Give more than {n_special}, or leave {name} out."
            )
    dtypes = choose_dtypes(model, wanted, settings.dtype, corpus)
    points = model.points
    infos = tuple(
        SiteInfo(site, points[site].module, points[site].side, points[site].width, dtypes[site])
        for site in wanted
    )
    row_bytes = sum(info.row_bytes for info in infos)
    rows = segment_rows(row_bytes, budget, context)
    affordable_rows = max(0, budget - list_bytes(infos)) // row_bytes
    chunk = chunk_rows(rows, affordable_rows, corpus.text_bytes())
    return StoreMeta(
        store_id=uuid.uuid4().hex,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        model={
            "name": model.name,
            "revision": model.revision,
            "architecture": model.architecture,
            "dtype": model.dtype,
            "n_parameters": model.n_parameters,
            "weights": model.weights_fingerprint,
        },
        tokenizer=model.tokenizer_fingerprint,
        segment_rows=rows,
        chunk_rows=chunk,
        keep="all",
        context=context,
        overlap=overlap,
        batch_tokens=batch_tokens or batch_rows(chunk, affordable_rows, context),
        versions={
            "python": platform.python_version(),
            **{name: version(name) for name in ("actstore", "torch", "transformers", "numpy")},
        },
        sites=infos,
    )


def check_same_capture(store: CoreStore, model: LanguageModel, settings: Settings) -> None:
    """Raise `StoreMismatch` if the store was made from another model, or with other settings."""
    meta = store.meta

    def named(name: str, architecture: str, weights: str) -> str:
        return f"{name} ({architecture}, weights {weights[:12]}…)"

    facts = meta.model
    pairs: list[tuple[str, Any, Any]] = [
        (
            "model",
            named(facts["name"], facts["architecture"], facts["weights"]),
            named(model.name, model.architecture, model.weights_fingerprint),
        ),
        ("tokenizer", meta.tokenizer, model.tokenizer_fingerprint),
    ]
    if settings.sites is not None:
        wanted = summarize(model.select(settings.sites))
        pairs.append(("sites", summarize(store.sites), wanted))
    for name in ("context", "overlap", "batch_tokens"):
        if getattr(settings, name) is not None:
            pairs.append((name, getattr(meta, name), getattr(settings, name)))
    if settings.dtype != "auto":
        pairs += [(f"dtype of {i.site}", i.dtype, settings.dtype) for i in meta.sites]
    for what, old, new in pairs:
        if old != new:
            raise StoreMismatch(
                f"{store.path} was captured from {meta.model['name']} with another {what}: it has "
                f"{old}, now it would be {new}. Give what it was made with, or name a new store."
            )


def bytes_needed(store: CoreStore, segments: Iterable[int]) -> int:
    """Return the bytes the shards of some planned segments will take, exactly."""
    # Partials, and two generations of the index: the old one goes when the new one is there.
    total = sum(info.width for info in store.meta.sites) * _LIST_BYTES
    layouts = [store.layout(info) for info in store.meta.sites]
    for segment in segments:
        rows = sum(store.planned[segment].rows.values())
        total += sum(shard_bytes(layout, rows) for layout in layouts)
    return total


def shard_bytes(layout: ShardLayout, rows: int) -> int:
    """Return the bytes of a shard that holds some rows: whole bands and the index."""
    return -(-rows // layout.chunk_rows) * layout.band_bytes + layout.index_bytes


def check_disk(store: CoreStore, needed: int) -> None:
    """Raise `NotEnoughDisk` if the store's disk cannot hold so many bytes more."""
    free = store.free_bytes()
    if needed > free:
        raise NotEnoughDisk(
            f"capturing into {store.path} needs {needed:,} bytes and {free:,} are free there. "
            "Free some and run the same capture again; or delete that folder, and name one on "
            "another disk, or give fewer sites= (--sites) or max_tokens= (--max-tokens)."
        )


def open_or_create(
    path: str | Path | None, model: LanguageModel, corpus: Corpus, settings: Settings, budget: int
) -> CoreStore:
    """Return the store at a path, made if need be; None makes one that ends with the process."""
    if path is not None and (Path(path) / "zarr.json").exists():
        store = CoreStore(path)
    else:
        if not any(document.text for document in corpus):
            raise CorpusError(_NO_TOKEN)
        meta = new_meta(model, corpus, settings, budget)
        affordable_bands(meta, budget)  # refuse before there is a store
        if path is None:
            folder = tempfile.TemporaryDirectory(prefix="actstore-")
            store = CoreStore.create(folder.name, meta)
            weakref.finalize(store, folder.cleanup)
            return store
        store = CoreStore.create(path, meta)  # or open what another process has made meanwhile
    check_same_capture(store, model, settings)
    return store


def run_capture(
    model: str | Path | LanguageModel | Any,
    corpus: Any = None,
    path: str | Path | None = None,
    *,
    text: str | Iterable[str] | None = None,
    tokenizer: Any = None,
    settings: Settings = Settings(),
    device: str = "auto",
    budget: int | str | None = None,
    encoding: str = "utf-8",
    errors: str = "strict",
    on_nan: OnFault = "error",
    on_overflow: OnFault = "count",
    progress: Progress | None = None,
) -> tuple[CoreStore, Timing]:
    """Capture a corpus into a store, or go on with it; see `actstore.capture`."""
    n_bytes = parse_budget(budget)
    documents = open_corpus(corpus, text=text, encoding=encoding, errors=errors)
    check_path(path)
    loaded = model if isinstance(model, LanguageModel) else load(model, tokenizer, device=device)
    store = open_or_create(path, loaded, documents, settings, n_bytes)
    timing = Timing()
    try:
        make_plan(store, loaded, documents, settings.limits, progress)
        if not store.planned:
            raise CorpusError(_NO_TOKEN)
        while missing := sorted(set(store.planned) - set(store.committed)):
            before = len(store.committed)
            check_disk(store, bytes_needed(store, missing))
            worker = Worker(
                store,
                loaded,
                budget=n_bytes,
                on_nan=on_nan,
                on_overflow=on_overflow,
                progress=progress,
                compact_every=_COMPACT_EVERY,
            )
            worker.run(missing)
            timing = worker.timing
            store.refresh()
            if len(store.committed) == before:
                # Other processes have all that is left; if one dies, its segment is taken up here.
                store.wait_for_segment(missing[0])
        compact(store, progress=progress)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NotEnoughDisk(
                f"the disk of {store.path} is full: {store.free_bytes():,} bytes are free. What is "
                "committed stands; free some and run the same capture again."
            ) from error
        raise
    return store, timing


def check_path(path: str | Path | None) -> None:
    """Raise `StoreNotFound` if a store can neither be opened nor made at a path."""
    if path is None:
        return
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise StoreNotFound(f"{folder} is a file; name a folder for the store.")
    if not is_vacant(folder):
        CoreStore(folder)
