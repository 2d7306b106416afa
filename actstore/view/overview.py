"""The overview: a store at a glance, its model, corpus, rows, sites, size and results."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from actstore.counted import counted
from actstore.site import Site, summarize
from actstore.store import CoreStore, Generation, Result, SiteInfo
from actstore.store.info import Info, info, module_pattern
from actstore.store.stored_rows import keep_text
from actstore.view.factor_detail import short
from actstore.view.page import PlainTable, View

_DOCUMENTS = 6
_CHARACTERS = 160


def overview(store: CoreStore) -> View:
    """Return a store at a glance.

    Reads its commits, the statistics of its neurons, a few documents and the provenance of its
    results; no activations.

    Parameters
    ----------
    store : CoreStore
        The store.

    See Also
    --------
    actstore.store.info : the same facts as text.
    """
    facts = info(store)
    name = facts.model.get("name", store.path)
    title = f"{name}: {counted(facts.n_rows, 'row')} at {counted(len(store.sites), 'site')}"
    model, corpus, sites = _model(facts), _corpus(store, facts), _sites(store)
    results = [_result(result) for result in store.results()]
    return View(
        title,
        "overview",
        {
            "facts": [
                ["store", facts.path],
                ["captured", store.meta.created[:10]],
                ["size", _size(facts.n_bytes)],
            ],
            "warnings": _warnings(facts),
            "done": facts.n_rows / facts.n_rows_planned if facts.n_rows_planned else 1.0,
            "model": model,
            "corpus": corpus,
            "documents": _documents(store),
            "sites": sites,
            "results": results,
        },
        PlainTable(
            title,
            ["what", "value"],
            [
                *model,
                *corpus,
                *(["sites", f"{s['sites']}: {s['width']:,} x {s['dtype']}"] for s in sites),
                *([r["kind"], f"{r['name']}: {r['what']}"] for r in results),
            ],
        ),
    )


def _size(n_bytes: int) -> str:
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if n_bytes >= scale:
            return f"{n_bytes / scale:,.1f} {unit}"
    return f"{n_bytes} bytes"


def _warnings(facts: Info) -> list[str]:
    found = []
    if facts.n_segments < facts.n_segments_planned:
        found.append(
            f"{facts.n_segments:,} of {facts.n_segments_planned:,} planned segments are captured; "
            "the same capture command goes on."
        )
    if facts.indexed < facts.n_segments:
        found.append(
            f"The index covers {facts.indexed:,} of {counted(facts.n_segments, 'segment')}; "
            "store.finish() brings it up to date."
        )
    if facts.n_nan or facts.n_overflow:
        found.append(f"{facts.n_overflow:,} values saturated, {facts.n_nan:,} NaN.")
    return found


def _model(facts: Info) -> list[list[str]]:
    model = facts.model
    return [
        ["name", str(model.get("name"))],
        ["architecture", str(model.get("architecture"))],
        ["parameters", f"{model.get('n_parameters', 0):,}"],
        ["computed in", str(model.get("dtype"))],
    ]


def _corpus(store: CoreStore, facts: Info) -> list[list[str]]:
    windows = sum(part.n_windows for part in store.parts)
    return [
        ["documents", f"{facts.n_documents:,}"],
        ["windows", f"{windows:,} of at most {counted(facts.context, 'token')}"],
        ["rows", f"{facts.n_rows:,} of {facts.n_rows_planned:,} planned"],
        ["segments", f"{facts.n_segments:,} of {facts.n_segments_planned:,}"],
        ["kept", "all rows" if facts.keep == "all" else f"{facts.keep} of the content rows"],
        ["columns", f"{facts.n_neurons:,}"],
    ]


def _documents(store: CoreStore) -> list[dict[str, Any]]:
    """Return the beginnings of a few documents, spread over all."""
    if not store.n_documents:
        return []
    places = np.linspace(0, store.n_documents - 1, min(_DOCUMENTS, store.n_documents)).round()
    found = []
    for number in np.unique(places.astype(np.int64)).tolist():
        row = store.document(number)
        text = str(row["text"] or "")
        found.append(
            {
                "document": number,
                "source": str(row["source"]),
                "n_tokens": int(row["n_tokens"]),
                "text": text[:_CHARACTERS],
                "cut": len(text) > _CHARACTERS,
            }
        )
    return found


def _sites(store: CoreStore) -> list[dict[str, Any]]:
    """Return the sites of each hook point and width, with what the index says of each."""
    groups: dict[tuple[str, int, str], list[SiteInfo]] = {}
    for site in sorted(store.meta.sites, key=lambda i: i.site):
        groups.setdefault((site.site.family, site.width, site.dtype), []).append(site)
    n_bytes = _bytes(store)
    generation = store.index()
    strengths = {} if generation is None else _strengths(store, generation)
    return [
        {
            "sites": summarize(i.site for i in infos),
            "width": width,
            "dtype": dtype,
            "kept": ", ".join(sorted({keep_text(i.keep) for i in infos})),
            "module": f"{infos[0].side} of {module_pattern(infos[0])}",
            "size": _size(sum(n_bytes.get(i.path, 0) for i in infos)),
            "layers": [[str(i.site), *strengths.get(str(i.site), (None, None))] for i in infos],
        }
        for (_, width, dtype), infos in groups.items()
    ]


def _bytes(store: CoreStore) -> dict[str, int]:
    """Return the bytes of each site on disk, by its path inside the store."""
    paths = {info.path for info in store.meta.sites}
    found: dict[str, int] = {}
    for segment in store.committed:
        for name, facts in store.commit_of(segment).files.items():
            path = name.rsplit("/c/", 1)[0]
            if path in paths:
                found[path] = found.get(path, 0) + facts.n_bytes
    return found


def _strengths(store: CoreStore, generation: Generation) -> dict[str, tuple[float, int]]:
    """Return each site's root mean square over content rows, and its neurons never above zero."""
    name = f"{generation.folder}/neurons.parquet"
    store.verifier.check({name: generation.files[name]})
    table = pq.read_table(store.path / name, columns=["site", "n", "energy", "max"])
    found = {}
    for row in table.group_by("site").aggregate([("energy", "sum"), ("n", "sum")]).to_pylist():
        mean = (row["energy_sum"] or 0.0) / max(1, row["n_sum"] or 0)
        found[row["site"]] = (short(math.sqrt(mean)), 0)
    for site, highest in zip(
        table.column("site").to_pylist(), table.column("max").to_pylist(), strict=True
    ):
        if highest is not None and highest <= 0:
            found[site] = (found[site][0], found[site][1] + 1)
    return found


_OPENS = {
    "nmf": "store.factors({name}).view()",
    "pca": 'store.factors({name}, kind="pca").view()',
    "ica": 'store.factors({name}, kind="ica").view()',
    "similarity": "store.similarity_result({name}).view()",
    "stability": "store.stability_result({name}).df()",
}


def _result(result: Result) -> dict[str, Any]:
    document = result.document
    what = ""
    if result.kind == "stability":
        what = f"{document['n_stable']} of {counted(document['n_components'], 'factor')} of "
        what += f"{document['factors']} {'is' if document['n_stable'] == 1 else 'are'} stable"
    elif "n_components" in document:
        what = counted(document["n_components"], "factor")
        if document.get("error") is not None:
            what += f", relative error {document['error']:.3f}"
    elif result.kind == "similarity":
        half = document["half_width"]
        what = f"{str(document['measure']).upper()}, {f'± {half:.4f}' if half else 'exact'}"
    return {
        "kind": result.kind,
        "name": result.name,
        "created": str(document["created"])[:16].replace("T", " "),
        "sites": _summary(document.get("sites", ())),
        "what": what,
        "code": _OPENS.get(result.kind, "").format(name=json.dumps(result.name)),
    }


def _summary(sites: Iterable[str]) -> str:
    return summarize(Site.parse(name) for name in sites) if sites else ""
