"""Capture from end to end: corpus and model in, a finished store out.

The same call makes a store, goes on with an interrupted one, and finds that nothing is left to do.
What would be refused is refused before the model runs: paths, names, another model or corpus, and
disk space.
"""

from __future__ import annotations

import errno
import math
import platform
import tempfile
import time
import uuid
import warnings
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from actstore.capturing.cluster import Alone, Cluster, Share, Workers
from actstore.capturing.compact import compact
from actstore.capturing.corpus import Corpus, open_corpus
from actstore.capturing.keep import choose_keeps, describe_keeps, named_keeps
from actstore.capturing.plan import Limits, encode_documents
from actstore.capturing.read_ahead import ReadAhead
from actstore.capturing.worker import OnFault, Timing, list_bytes, spare_bands
from actstore.errors import ArgumentError, CorpusError, NotEnoughDisk, StoreMismatch, StoreNotFound
from actstore.models import LanguageModel, load
from actstore.site import Site, select, summarize
from actstore.store import CoreStore, SiteInfo, StoreMeta, is_vacant
from actstore.store.budget import Progress, parse_budget
from actstore.store.stored_rows import is_sample, keep_text

SEGMENT_BYTES = 16 * 2**30
"""A segment takes at most this, or an eighth of the budget if that is more.

What a kill can lose is a segment; what every segment costs anew (its lists, histograms and samples
of all neurons, written and merged) is as much as the forward pass of one to three thousand rows."""

DEFAULT_SITES = ("mlp_post", "resid_pre.0", "resid_post")
"""All neurons and hidden states, none of them twice: resid_pre.i is resid_post.(i-1)."""

DTYPES = ("auto", "float16", "float32", "bfloat16")

_LEAST_ROWS = 4_096
# Of bands lower than the usual 4,096 rows: their extremes then add 4 % to what a segment holds, and
# twice as many would save little more of what each segment costs anew.
_SEGMENT_BANDS = 32
_PROBE_TOKENS = 1024
_FLOAT16_SAFE = 1000.0
_DEFAULT_CONTEXT = 512
COMPACT_EVERY = 64
_INDEX_BYTES = 14_000  # a column, in two generations of the index
_PARTIAL_BYTES = 900  # a column, in the partials of a segment
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
    keep: str | float | Mapping[str, str | float] | None = None
    """What part of the rows is stored, of all sites or by site: see `named_keeps`; default all,
    or a sample where that would take too much: see `choose_keeps`."""
    grams: tuple[str, ...] = ()
    """Captured sites or patterns whose Gram matrix is folded; 8 bytes x width**2 each on disk."""


def _pow2_up(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def segment_rows(row_bytes: float, budget: int, context: int) -> int:
    """Return S: the largest power of two in 4,096 … 65,536 whose segment is not too large.

    What counts are the bytes that are stored of a row, on average.
    """
    limit = max(SEGMENT_BYTES, budget // 8)
    size = 65_536
    while size > _LEAST_ROWS and size * row_bytes > limit:
        size //= 2
    return max(size, _pow2_up(8 * context))


def chunk_rows(
    rows: int, affordable_rows: int, text_bytes: int | None, sampled: float = 0.0
) -> int:
    """Return the rows of a chunk: 4,096, less where bands would not fit or texts are short.

    Sites that keep a sample need a band more; they are the part `sampled` of a row's bytes.

    A text has at most as many tokens as bytes, and a chunk is written whole: one prompt should not
    take the space of four thousand rows.
    """
    size = min(4_096, rows)
    if text_bytes is not None:
        size = min(size, max(64, _pow2_up(text_bytes + text_bytes // 8 + 64)))
    while size > 64 and (4 + sampled) * size > affordable_rows:
        size //= 2
    return size


def batch_rows(chunk: int, affordable_rows: int, context: int, sampled: float = 0.0) -> int:
    """Return the tokens of a batch: 4,096, less where they and two bands a site would not fit."""
    size = 4_096
    while size > context and size + (2 + sampled) * chunk > affordable_rows:
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
    site_bytes = {info.site: info.row_bytes for info in infos}
    keeps = choose_keeps(settings.keep, site_bytes, corpus, settings.limits, model.name)
    infos = tuple(replace(info, keep=keeps[info.site]) for info in infos)
    row_bytes = sum(site_bytes.values())
    rows = segment_rows(sum(info.row_bytes * info.keep for info in infos), budget, context)
    grams: tuple[str, ...] = ()
    if settings.grams:
        grams = tuple(str(site) for site in select(settings.grams, wanted, "what is captured"))
    affordable_rows = max(0, budget - list_bytes(infos, _SEGMENT_BANDS, grams)) // row_bytes
    sampled = sum(info.row_bytes for info in infos if is_sample(info.keep)) / row_bytes
    chunk = chunk_rows(rows, affordable_rows, corpus.text_bytes(), sampled)
    # Zones of all bands of a segment are held: of low bands a segment has no more than it needs.
    rows = min(rows, max(_SEGMENT_BANDS * chunk, _LEAST_ROWS, _pow2_up(8 * context)))
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
        keep=describe_keeps(infos),
        context=context,
        overlap=overlap,
        batch_tokens=batch_tokens or batch_rows(chunk, affordable_rows, context, sampled),
        versions={
            "python": platform.python_version(),
            **{name: version(name) for name in ("actstore", "torch", "transformers", "numpy")},
        },
        sites=infos,
        grams=grams,
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
    if settings.grams:
        wanted_grams = select(settings.grams, store.sites, str(store.path))
        pairs.append(("grams", ", ".join(meta.grams), ", ".join(map(str, wanted_grams))))
    for name in ("context", "overlap", "batch_tokens"):
        if getattr(settings, name) is not None:
            pairs.append((name, getattr(meta, name), getattr(settings, name)))
    if settings.dtype != "auto":
        pairs += [(f"dtype of {i.site}", i.dtype, settings.dtype) for i in meta.sites]
    keeps = named_keeps(settings.keep, store.sites, str(store.path))
    pairs += [
        (f"keep of {i.site}", keep_text(i.keep), keep_text(keeps[i.site]))
        for i in meta.sites
        if i.site in keeps
    ]
    for what, old, new in pairs:
        if old != new:
            raise StoreMismatch(
                f"{store.path} was captured from {meta.model['name']} with another {what}: it has "
                f"{old}, now it would be {new}. Give what it was made with, or name a new store."
            )


def bytes_needed(store: CoreStore, segments: Iterable[int]) -> int:
    """Return the bytes the shards of some planned segments will take at most."""
    # Partials, and two generations of the index: the old one goes when the new one is there.
    n_partials = min(COMPACT_EVERY, len(store.planned))
    n_columns = sum(info.width for info in store.meta.sites)
    total = n_columns * (_INDEX_BYTES + n_partials * _PARTIAL_BYTES)
    layouts = [(info.keep, store.layout(info)) for info in store.meta.kept_sites]
    for segment in segments:
        rows = sum(store.planned[segment].rows.values())
        total += sum(layout.file_bytes(math.ceil(rows * keep)) for keep, layout in layouts)
    return total


def check_disk(store: CoreStore, needed: int) -> None:
    """Raise `NotEnoughDisk` if the store's disk cannot hold so many bytes more."""
    store.check_disk(
        needed,
        "capturing into",
        "Free some and run the same capture again; or delete that folder, and name one on another "
        "disk, or give fewer sites= (--sites) or max_tokens= (--max-tokens).",
    )


def open_or_create(
    path: str | Path | None, model: LanguageModel, corpus: Corpus, settings: Settings, budget: int
) -> CoreStore:
    """Return the store at a path, made if need be; None makes one that ends with the process."""
    if not any(document.text for document in corpus):
        raise CorpusError(_NO_TOKEN)
    if path is not None and (Path(path) / "zarr.json").exists():
        store = CoreStore(path)
    else:
        meta = new_meta(model, corpus, settings, budget)
        spare_bands(meta, budget)  # refuse before there is a store
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
    workers: int | None = None,
    scheduler: str | None = None,
    segments: str | slice | None = None,
    order: str = "corpus",
    add: bool = False,
    progress: Progress | None = None,
) -> tuple[CoreStore, Timing]:
    """Capture a corpus into a store, or go on with it; see `actstore.capture`."""
    n_bytes = parse_budget(budget)
    share = Share.parse(segments, path)
    many = Workers.wanted(workers, scheduler, model, tokenizer, device)
    documents = open_corpus(corpus, text=text, encoding=encoding, errors=errors)
    check_path(path)
    if many:
        device = "cpu"  # the devices are the workers'; here the model is only looked at
    loaded = model if isinstance(model, LanguageModel) else load(model, tokenizer, device=device)
    store = open_or_create(path, loaded, documents, settings, n_bytes)
    n_parts = len(store.parts)
    plan = ReadAhead(
        store, loaded, documents, settings.limits, order=order, add=add, progress=progress
    )
    common: dict[str, Any] = {
        "budget": n_bytes,
        "on_nan": on_nan,
        "on_overflow": on_overflow,
        "progress": plan.tell if progress else None,
        "compact_every": COMPACT_EVERY,
    }
    crew: Cluster | Alone = (
        Cluster(store, many, budget_given=budget is not None, **common)
        if many
        else Alone(store, loaded, **common)
    )
    try:
        with plan, crew:
            captured, waited = _capture_planned(store, plan, crew, share)
        if not store.planned:
            raise CorpusError(_NO_TOKEN)
        if share.is_all:
            compact(store, progress=progress)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NotEnoughDisk(
                f"the disk of {store.path} is full: {store.free_bytes():,} bytes are free. What is "
                "committed stands; free some and run the same capture again."
            ) from error
        raise
    if add and not captured and len(store.parts) == n_parts:
        warnings.warn(
            f"nothing was added to {store.path}: it holds this corpus, with these limits, already.",
            stacklevel=3,  # where `actstore.capture` was called
        )
    return store, replace(crew.timing, planning=waited)


def _capture_planned(
    store: CoreStore, plan: ReadAhead, crew: Cluster | Alone, share: Share
) -> tuple[bool, float]:
    """Capture what is planned and not committed until there is no more.

    Returns whether there was any, and the seconds waited for the plan.  What was planned before an
    error of the corpus is captured before it is raised.
    """
    captured = False
    waited = 0.0
    while True:
        finished = plan.finished  # looked at first: all that was planned by then is seen below
        store.refresh()
        missing = sorted(share.of(set(store.planned) - set(store.committed)))
        plan.begin(len(store.parts))
        if missing and plan.may_capture(store):
            captured = True
            before = len(store.committed)
            check_disk(store, bytes_needed(store, missing))
            crew.run(missing)
            store.refresh()
            if len(store.committed) == before and not crew.under_way:
                # Other processes have all that is left; what one leaves is taken up here.
                store.wait_for_segment(missing[0])
        elif finished and not missing:
            return captured, waited
        else:
            started = time.perf_counter()
            plan.wait(len(store.parts))
            waited += time.perf_counter() - started


def check_path(path: str | Path | None) -> None:
    """Raise `StoreNotFound` if a store can neither be opened nor made at a path."""
    if path is None:
        return
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise StoreNotFound(f"{folder} is a file; name a folder for the store.")
    if not is_vacant(folder):
        CoreStore(folder)
