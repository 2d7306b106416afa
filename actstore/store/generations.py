"""Generations of the compacted index: each is whole, immutable, and names the commits it covers.

A generation that covers segments 0 … n without a gap is a *prefix*: the next one goes on from it.
Sums of floating-point numbers depend on their order, so only a merge in segment order gives the
same bytes whatever was interrupted; a generation made while segments are missing answers queries,
and is not built upon.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from actstore import durable
from actstore.durable import FileFacts
from actstore.errors import DamagedFile
from actstore.site import Site


def site_file(site: Site, kind: str, file: str) -> str:
    """Return the path of a file of a site inside a generation."""
    space = f"space={site.space}/" if site.space else ""
    return f"{kind}/{space}hook={site.hook}/layer={site.layer}/{file}"


def space_file(space: str, kind: str, file: str) -> str:
    """Return the path of a file of all sites of a space inside a generation."""
    return f"{kind}/space={space}/{file}" if space else f"{kind}/{file}"


@dataclass(frozen=True)
class Generation:
    """A published generation of the index."""

    number: int
    """Its number; the highest whole one counts."""
    covers: tuple[int, ...]
    """The segments whose commits went into it."""
    files: Mapping[str, FileFacts]
    """Its Parquet files by path inside the store."""

    @property
    def is_prefix(self) -> bool:
        """Whether it covers segments 0 … n without a gap."""
        return self.covers == tuple(range(len(self.covers)))

    @property
    def folder(self) -> str:
        """Its folder inside the store."""
        return f"index/{self.number:06d}"

    def named(self, start: str) -> dict[str, FileFacts]:
        """Return its files whose path inside the generation begins with `start`."""
        prefix = f"{self.folder}/{start}"
        return {name: facts for name, facts in self.files.items() if name.startswith(prefix)}


def _read(root: Path, number: int) -> Generation | None:
    manifest = root / f"index/{number:06d}/manifest.json"
    try:
        facts = manifest.stat()
    except FileNotFoundError:
        return None  # a crash came before its manifest: it is not there
    return _parsed(manifest, number, facts.st_ino, facts.st_mtime_ns, facts.st_size)


@functools.lru_cache(maxsize=16)
def _parsed(manifest: Path, number: int, *_: int) -> Generation:
    """Return the generation of a manifest; what else is given tells the file from another."""
    document = durable.read_sealed(manifest)
    try:
        files = {n: FileFacts.from_json(entry) for n, entry in document["files"].items()}
        return Generation(number, tuple(int(s) for s in document["covers"]), files)
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedFile(f"{manifest} breaks the format: {error!r}.") from error


def _newest_first(root: Path) -> Iterator[Generation]:
    folder = root / "index"
    numbers = sorted((int(p.name) for p in folder.glob("*") if p.name.isdigit()), reverse=True)
    found = (_read(root, number) for number in numbers)
    return (generation for generation in found if generation is not None)


def latest(root: Path) -> Generation | None:
    """Return the newest whole generation."""
    return next(_newest_first(root), None)


def latest_prefix(root: Path) -> Generation | None:
    """Return the newest whole generation that is a prefix."""
    return next((generation for generation in _newest_first(root) if generation.is_prefix), None)


def new_number(root: Path) -> int:
    """Return the number for the next generation."""
    folder = root / "index"
    return max((int(p.name) for p in folder.glob("*") if p.name.isdigit()), default=-1) + 1


def publish(root: Path, generation: Generation) -> None:
    """Write the manifest that makes a generation whole; its files are already durable."""
    document = {
        "covers": list(generation.covers),
        "files": {name: facts.to_json() for name, facts in generation.files.items()},
    }
    durable.create(
        root / generation.folder / "manifest.json", durable.to_json(durable.sealed(document))
    )


def sweep(root: Path) -> None:
    """Delete all generations but the newest whole one and the prefix that the next builds on."""
    wanted = {g.folder for g in (latest(root), latest_prefix(root)) if g is not None}
    for path in (root / "index").glob("*"):
        if path.name.isdigit() and f"index/{path.name}" not in wanted:
            shutil.rmtree(path)
