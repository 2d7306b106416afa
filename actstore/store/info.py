"""A store at a glance: model, corpus, rows, sites, size, results."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

from actstore.counted import counted
from actstore.site import summarize
from actstore.store.core import CoreStore
from actstore.store.meta import SiteInfo


@dataclass(frozen=True)
class SiteSummary:
    """Sites of one hook point and width."""

    sites: str
    """Names: ``"mlp_post.0–5"``."""
    n_sites: int
    """How many."""
    width: int
    """Neurons, or channels."""
    dtype: str
    """Stored dtype."""
    module: str
    """Module whose input or output is stored, the layer as ``*``."""


@dataclass(frozen=True)
class Info:
    """What a store holds."""

    path: str
    """Folder of the store."""
    model: Mapping[str, Any]
    """Name, architecture, dtype, parameters and fingerprint of the model."""
    context: int
    """Tokens of a window."""
    n_documents: int
    """Documents planned."""
    n_rows: int
    """Rows captured."""
    n_rows_planned: int
    """Rows planned."""
    n_segments: int
    """Segments committed."""
    n_segments_planned: int
    """Segments planned."""
    n_neurons: int
    """Columns over all sites."""
    keep: str
    """What part of the rows is stored."""
    n_bytes: int
    """Bytes of the committed segments."""
    n_overflow: int
    """Values saturated because the stored dtype could not hold them."""
    n_nan: int
    """NaN values stored."""
    indexed: int
    """Segments the index covers."""
    sites: tuple[SiteSummary, ...]
    """The sites."""
    results: tuple[str, ...]
    """Results, as ``kind/name``."""

    def to_dict(self) -> dict[str, Any]:
        """Return the facts as plain values, for JSON."""
        return asdict(self)

    def lines(self) -> list[tuple[str, str]]:
        """Return the facts as labelled lines, as they are printed."""
        model = self.model
        complete = "" if self.n_rows == self.n_rows_planned else f" of {self.n_rows_planned:,}"
        segments = counted(self.n_segments, "segment")
        if complete:
            segments = f"{self.n_segments:,} of {counted(self.n_segments_planned, 'segment')}"
        lines = [
            ("store", self.path),
            (
                "model",
                f"{model['name']} ({model['architecture']}, {model['n_parameters']:,} parameters, "
                f"{model['dtype']})",
            ),
            (
                "documents",
                f"{self.n_documents:,} in windows of at most {counted(self.context, 'token')}",
            ),
            (
                "rows",
                f"{self.n_rows:,}{complete} tokens in {segments}",
            ),
            (
                "columns",
                f"{self.n_neurons:,} over {counted(sum(s.n_sites for s in self.sites), 'site')}",
            ),
        ]
        for site in self.sites:
            lines.append(
                ("", f"{site.sites}: {site.width:,} x {site.dtype}, {site.module}"),
            )
        of_what = " of the content rows" if self.keep.startswith("1/") else ""
        lines.append(("kept", f"{self.keep}{of_what}"))
        lines.append(("size", _size(self.n_bytes)))
        if self.n_overflow or self.n_nan:
            lines.append(("warning", f"{self.n_overflow:,} values saturated, {self.n_nan:,} NaN"))
        if self.indexed < self.n_segments:
            found = f"covers {self.indexed:,} of {counted(self.n_segments, 'segment')}"
            lines.append(("index", f"{found}: actstore finish {self.path}"))
        lines.append(("results", ", ".join(self.results) or "none yet"))
        return lines

    def __str__(self) -> str:
        return "\n".join(f"{label:<10} {text}" for label, text in self.lines())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><th style='text-align:left'>{html.escape(label)}</th>"
            f"<td style='text-align:left'>{html.escape(text)}</td></tr>"
            for label, text in self.lines()
        )
        return f"<table>{rows}</table>"


def _size(n_bytes: int) -> str:
    """Return bytes as people read them."""
    for unit, scale in (("GB", 10**9), ("MB", 10**6)):
        if n_bytes >= scale:
            return f"{n_bytes / scale:,.2f} {unit}"
    return f"{n_bytes:,} bytes"


def info(store: CoreStore) -> Info:
    """Return what a store holds; reads its commits, no activations."""
    commits = [store.commit_of(segment) for segment in store.committed]
    generation = store.index()
    summaries = []
    for _, group in groupby(
        store.meta.sites, key=lambda i: (i.site.family, i.width, i.dtype, i.side, module_pattern(i))
    ):
        infos = list(group)
        first = infos[0]
        summaries.append(
            SiteSummary(
                summarize(i.site for i in infos),
                len(infos),
                first.width,
                first.dtype,
                f"{first.side} of {module_pattern(first) if len(infos) > 1 else first.module}",
            )
        )
    return Info(
        str(store.path),
        store.meta.model,
        store.meta.context,
        store.n_documents,
        store.n_rows(),
        sum(s.rows.get(store.meta.spaces[0], 0) for s in store.planned.values()),
        len(store.committed),
        len(store.planned),
        sum(i.width for i in store.meta.sites),
        store.meta.keep,
        store.n_bytes(),
        sum(c.n_overflow for commit in commits for c in commit.counts.values()),
        sum(c.n_nan for commit in commits for c in commit.counts.values()),
        len(generation.covers) if generation else 0,
        tuple(summaries),
        tuple(f"{result.kind}/{result.name}" for result in store.results()),
    )


def module_pattern(info: SiteInfo) -> str:
    """Return the module's path with the layer's number as a star."""
    parts = ["*" if part == str(info.site.layer) else part for part in str(info.module).split(".")]
    return ".".join(parts)
