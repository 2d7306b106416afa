"""What a store says of itself: its sites, plan parts, segments and commits, as JSON and back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

from actstore.durable import FileFacts, unsealed
from actstore.errors import FormatError
from actstore.shard import ShardLayout
from actstore.site import Site
from actstore.store.stored_rows import ALL, NONE, shard_rows

FORMAT = 1
"""Version of the format on disk that this code writes and reads."""

SPECIAL, FIRST, GENERATED = 1, 2, 4
"""Bits of the column `flags` of a token."""


@dataclass(frozen=True)
class SiteInfo:
    """A captured site: where it is in the model, and how it is stored."""

    site: Site
    """Hook point, layer and space."""
    module: str
    """Dotted path of the module whose input or output is stored."""
    side: str
    """``"input"`` or ``"output"`` of that module."""
    width: int
    """Number of neurons, or channels in a residual site."""
    dtype: str
    """Stored dtype: ``"float16"``, ``"float32"`` or ``"bfloat16"``."""
    keep: float = ALL
    """The part of its rows that is stored: 1, 2^-j of the content rows, or 0."""

    @property
    def path(self) -> str:
        """Folder of the Zarr array inside the store."""
        return f"activations/{self.site.folder}"

    @property
    def row_bytes(self) -> int:
        """Bytes one row takes at this site."""
        return self.width * (4 if self.dtype == "float32" else 2)

    def to_json(self) -> dict[str, Any]:
        """Return the entry of the site in the root metadata."""
        return {
            "name": str(self.site),
            "space": self.site.space,
            "hook": self.site.hook,
            "layer": self.site.layer,
            "path": self.path,
            "width": self.width,
            "dtype": self.dtype,
            "module": self.module,
            "side": self.side,
            "keep": self.keep,
        }

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> SiteInfo:
        """Return the site of an entry of the root metadata."""
        site = Site(str(entry["hook"]), int(entry["layer"]), str(entry["space"]))
        return cls(
            site,
            str(entry["module"]),
            str(entry["side"]),
            int(entry["width"]),
            str(entry["dtype"]),
            float(entry.get("keep", ALL)),
        )


@dataclass(frozen=True)
class StoreMeta:
    """The facts of a store that never change once it exists."""

    store_id: str
    """Random identifier of this store."""
    created: str
    """Time of creation, ISO 8601, UTC."""
    model: Mapping[str, Any]
    """Name, revision, architecture, dtype, parameters and fingerprint of the weights."""
    tokenizer: str
    """Fingerprint of the tokenizer."""
    segment_rows: int
    """S: rows a segment can hold; a power of two. Row ids are ``segment * S + offset``."""
    chunk_rows: int
    """Rows of a chunk; a power of two that divides S."""
    keep: str
    """Which rows are kept, in words: ``"all"``, ``"none"``, ``"1/256"``, or by sites."""
    context: int
    """Tokens of a window, special ones counted."""
    overlap: int
    """Leading tokens of a later window that are context only and not stored."""
    batch_tokens: int
    """Tokens, padding counted, that one forward pass may hold."""
    versions: Mapping[str, str]
    """Versions of the libraries that made the store."""
    sites: tuple[SiteInfo, ...]
    """The captured sites, sorted."""
    sample_seed: int = 0
    """Seed of the sample of rows that sites keep which do not keep all."""
    grams: tuple[str, ...] = ()
    """Names of the sites whose Gram matrix is folded."""

    @property
    def row_bytes(self) -> int:
        """Bytes one row takes over all sites, kept or not."""
        return sum(info.row_bytes for info in self.sites)

    @property
    def kept_sites(self) -> tuple[SiteInfo, ...]:
        """The sites that store rows, all or some."""
        return tuple(info for info in self.sites if info.keep != NONE)

    def layout(self, info: SiteInfo) -> ShardLayout:
        """Return how the array of a site that stores rows is laid out."""
        rows = shard_rows(self.segment_rows, info.keep)
        return ShardLayout.for_width(info.width, rows, info.dtype, self.chunk_rows)

    @property
    def spaces(self) -> tuple[str, ...]:
        """The spaces of the sites; ``("",)`` for most models."""
        return tuple(dict.fromkeys(info.site.space for info in self.sites))

    def to_json(self) -> dict[str, Any]:
        """Return the document kept as ``attributes.actstore`` of the root group."""
        document = {"format": FORMAT, **asdict(self)}
        document["sites"] = [info.to_json() for info in self.sites]
        return document

    @classmethod
    def from_json(cls, document: Any, where: str) -> StoreMeta:
        """Return the facts in ``attributes.actstore``.

        Raises
        ------
        FormatError
            If the version is not ours or the document does not follow it.
        DamagedFile
            If the document has changed since it was written.
        """
        version = document.get("format") if isinstance(document, Mapping) else None
        if version != FORMAT:
            raise FormatError(
                f"{where} has format version {version!r}; this actstore reads version {FORMAT}. "
                "Install the actstore that wrote it, or capture again."
            )
        document = unsealed(document, f"the metadata of {where}")
        try:
            values = {
                field.name: document[field.name]
                for field in fields(cls)
                if field.default is MISSING or field.name in document
            }
            values["sites"] = tuple(SiteInfo.from_json(entry) for entry in document["sites"])
            values["grams"] = tuple(document.get("grams", ()))
            return cls(**values)
        except (KeyError, TypeError, ValueError) as error:
            raise FormatError(f"the metadata of {where} breaks the format: {error!r}.") from error


@dataclass(frozen=True)
class Segment:
    """The unit of work, commit and retry: whole windows with at most S rows in every space."""

    segment: int
    """Its number; its rows have the ids from ``segment * S``."""
    part: int
    """The plan part that planned it."""
    rows: Mapping[str, int]
    """Rows in each space."""


@dataclass(frozen=True)
class Part:
    """A published part of the plan: documents, windows and tokens of a range of segments."""

    part: int
    """Its number."""
    segments: tuple[Segment, ...]
    """The segments it planned, in order."""
    n_documents: int
    """Documents in this part."""
    n_windows: int
    """Windows in this part, over all spaces."""
    complete: bool
    """Whether the corpus ended with this part."""
    corpus: Mapping[str, Any]
    """What the documents came from, to recognise the same corpus again."""
    files: Mapping[str, FileFacts]
    """Bytes and crc32c of the part's Parquet files, by path inside the store."""

    def file(self, kind: str, space: str = "") -> str:
        """Return the path of the part's file of a kind: documents, windows or tokens."""
        if kind == "windows":
            return f"plan/{self.part:05d}.windows.parquet"
        folder = f"{kind}/{space}" if space else kind
        return f"{folder}/{self.part:05d}.parquet"

    def to_json(self) -> dict[str, Any]:
        """Return the document kept as ``plan/<part>.json``."""
        return {
            "part": self.part,
            "segments": [{"segment": s.segment, "rows": dict(s.rows)} for s in self.segments],
            "n_documents": self.n_documents,
            "n_windows": self.n_windows,
            "complete": self.complete,
            "corpus": dict(self.corpus),
            "files": {name: facts.to_json() for name, facts in self.files.items()},
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Part:
        """Return the part of a ``plan/<part>.json``."""
        part = int(document["part"])
        return cls(
            part,
            tuple(
                Segment(int(s["segment"]), part, {k: int(v) for k, v in s["rows"].items()})
                for s in document["segments"]
            ),
            int(document["n_documents"]),
            int(document["n_windows"]),
            bool(document["complete"]),
            document["corpus"],
            {name: FileFacts.from_json(entry) for name, entry in document["files"].items()},
        )


@dataclass(frozen=True)
class SiteCounts:
    """Values of one site and segment that could not be stored as the model made them."""

    n_nan: int = 0
    """NaN values."""
    n_overflow: int = 0
    """Values outside the stored dtype, saturated to its largest."""
    places: tuple[tuple[int, int], ...] = ()
    """The first of them as (row_id, neuron)."""


def ranges(segments: Iterable[int]) -> tuple[tuple[int, int], ...]:
    """Return segments as ranges (first, last).

    >>> ranges([0, 1, 2, 7])
    ((0, 2), (7, 7))
    """
    found: list[tuple[int, int]] = []
    for segment in sorted(segments):
        if found and segment == found[-1][1] + 1:
            found[-1] = (found[-1][0], segment)
        else:
            found.append((segment, segment))
    return tuple(found)


@dataclass(frozen=True)
class Commit:
    """The fact that a segment is stored: its rows, files and counts."""

    segment: int
    """The segment."""
    rows: Mapping[str, int]
    """Rows in each space."""
    files: Mapping[str, FileFacts]
    """Bytes and crc32c of its shards and partials, by path inside the store."""
    counts: Mapping[str, SiteCounts]
    """Sites with NaN or overflow."""
    relied_on: tuple[tuple[int, int], ...]
    """Segments whose committed top-k lists served as thresholds for this one's, as ranges (first,
    last): most rely on all before them."""
    writer: Mapping[str, Any]
    """Host, process and time."""

    def to_json(self) -> dict[str, Any]:
        """Return the document kept as ``commits/<segment>.json``."""
        return {
            "segment": self.segment,
            "rows": dict(self.rows),
            "files": {name: facts.to_json() for name, facts in self.files.items()},
            "counts": {name: asdict(counts) for name, counts in self.counts.items()},
            "relied_on": [list(pair) for pair in self.relied_on],
            "writer": dict(self.writer),
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Commit:
        """Return the commit of a ``commits/<segment>.json``."""
        return cls(
            int(document["segment"]),
            {space: int(n) for space, n in document["rows"].items()},
            {name: FileFacts.from_json(entry) for name, entry in document["files"].items()},
            {
                name: SiteCounts(
                    int(entry["n_nan"]),
                    int(entry["n_overflow"]),
                    tuple((int(row), int(neuron)) for row, neuron in entry["places"]),
                )
                for name, entry in document["counts"].items()
            },
            tuple((int(first), int(last)) for first, last in document["relied_on"]),
            document["writer"],
        )
