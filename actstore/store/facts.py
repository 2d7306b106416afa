"""The published facts of a store: its root metadata, the plan, the vocabulary, the commits.

Each is a file that is published once, whole, and never changes.  Who reads them again sees more of
them, as other processes plan and commit; what was seen stays as it was.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from actstore import arrow, durable
from actstore.durable import FileFacts, Verifier
from actstore.errors import DamagedFile, StoreNotFound
from actstore.store.meta import Commit, Part, Segment, StoreMeta
from actstore.store.tables import VOCABULARY

_GROUP: dict[str, Any] = {"zarr_format": 3, "node_type": "group", "attributes": {}}


def is_vacant(folder: Path) -> bool:
    """Return whether a store can be made in a folder: it is empty, or not there at all.

    What a process left that was killed while it made a store there does not count.
    """
    if not folder.is_dir():
        return not folder.exists()
    return all(re.fullmatch(r"zarr\.json\.\d+\.partial", e.name) for e in folder.iterdir())


class Facts:
    """What is published of a store.

    Parameters
    ----------
    path : str or Path
        Folder of the store.

    Raises
    ------
    StoreNotFound
        If the folder does not exist or holds no store.
    FormatError
        If its format version is not the one this code reads.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).absolute()  # a process may change its folder
        root = self.path / "zarr.json"
        if not root.is_file():
            found = "does not exist"
            if self.path.exists():
                found = "is a folder without a store" if self.path.is_dir() else "is not a folder"
            raise StoreNotFound(
                f"store = {str(path)!r} was given; expected the folder of a store, with its "
                f"zarr.json, and {self.path} {found}. Check the path, or make a store there with "
                "actstore.capture(model, corpus, path) (actstore capture MODEL CORPUS STORE)."
            )
        document = durable.read_json(root)
        attributes = document.get("attributes") if isinstance(document, dict) else None
        if not isinstance(attributes, dict) or "actstore" not in attributes:
            raise StoreNotFound(
                f"store = {str(path)!r} was given; expected the folder of a store, and {self.path} "
                "is a Zarr group that actstore did not make. Check the path."
            )
        self.meta = StoreMeta.from_json(attributes["actstore"], str(self.path))
        for info in self.meta.sites:
            durable.confined(self.path, info.path)
        self.verifier = Verifier(self.path)
        self._commits: dict[int, Commit] = {}
        self.refresh()

    @classmethod
    def create(cls, path: str | Path, meta: StoreMeta) -> Self:
        """Make an empty store, or open the one that another process made meanwhile.

        Raises
        ------
        StoreNotFound
            If the folder exists, is not empty, and holds no store.
        """
        folder = Path(path)
        if not is_vacant(folder) and not (folder / "zarr.json").exists():
            raise StoreNotFound(
                f"{folder} is not empty and holds no store. Name a new or empty folder."
            )
        durable.make_folder(folder)
        document = {
            "zarr_format": 3,
            "node_type": "group",
            "attributes": {"actstore": durable.sealed(meta.to_json())},
        }
        with suppress(FileExistsError):
            durable.create(folder / "zarr.json", durable.to_json(document))
        return cls(folder)

    # -- the plan ------------------------------------------------------------------------------

    def refresh(self) -> None:
        """See what other processes have published since."""
        self._read_plan()
        self.refresh_commits()
        for name in ("vocabulary", "_texts"):
            self.__dict__.pop(name, None)

    def refresh_commits(self) -> None:
        """See which segments are committed by now."""
        self.committed = self._list_commits()
        self._stored = frozenset(self.committed)

    def _read_plan(self) -> None:
        self.parts = self._read_parts()
        self._segments = {s.segment: s for part in self.parts for s in part.segments}
        self._places: dict[str, dict[int, int]] = {}

    def _read_parts(self) -> list[Part]:
        names = sorted(path for path in (self.path / "plan").glob("*.json") if path.stem.isdigit())
        parts = []
        for number, path in enumerate(names):
            try:
                part = Part.from_json(durable.read_sealed(path))
            except (KeyError, TypeError, ValueError) as error:
                raise DamagedFile(f"{path} breaks the format: {error!r}.") from error
            if part.part != number:
                raise DamagedFile(f"plan part {number} is missing from {self.path}/plan.")
            parts.append(part)
        return parts

    @property
    def planned(self) -> Mapping[int, Segment]:
        """The planned segments by number."""
        return self._segments

    @property
    def plan_complete(self) -> bool:
        """Whether the plan has reached the end of the corpus."""
        return bool(self.parts) and self.parts[-1].complete

    def plan_lock(self) -> Any:
        """Hold the right to publish plan parts."""
        return durable.lock(self.path / "work" / "plan.lock", f"the plan of {self.path}", True)

    def publish_part(self, part: Part) -> None:
        """Publish a plan part whose Parquet files are written, and grow the arrays to hold it."""
        durable.make_folder(self.path / "plan")
        durable.create(
            self.path / f"plan/{part.part:05d}.json",
            durable.to_json(durable.sealed(part.to_json())),
        )
        self.refresh()
        self.grow_arrays()

    def grow_arrays(self) -> None:
        """Give every array the shape the plan asks for; it has it already, unless a crash came."""
        n_segments = max(self._segments, default=-1) + 1
        for info in self.meta.kept_sites:
            layout = self.meta.layout(info)
            attributes = {"site": str(info.site), "module": info.module, "side": info.side}
            documents = {self.path / info.path: layout.zarr_metadata(n_segments, attributes)}
            for parent in Path(info.path).parents[:-1]:  # Zarr readers walk down by groups
                documents[self.path / parent] = _GROUP
            for folder, document in documents.items():
                path, data = folder / "zarr.json", durable.to_json(document)
                if not path.exists() or path.read_bytes() != data:
                    durable.make_folder(folder)
                    durable.replace(path, data)

    @property
    def has_vocabulary(self) -> bool:
        """Whether the token types have been written."""
        return (self.path / "vocabulary.json").exists()

    def write_vocabulary(self, table: pa.Table) -> None:
        """Write the token types of the tokenizer."""
        path = self.path / "vocabulary.parquet"
        facts = durable.write_table(path, table.cast(VOCABULARY))
        document = durable.sealed({"files": {path.name: facts.to_json()}})
        durable.replace(self.path / "vocabulary.json", durable.to_json(document))

    def vocabulary_files(self) -> dict[str, FileFacts]:
        """Return the facts of the vocabulary file."""
        document = durable.read_sealed(self.path / "vocabulary.json")
        return {n: FileFacts.from_json(entry) for n, entry in document["files"].items()}

    @cached_property
    def vocabulary(self) -> pa.Table:
        """The token types: token_id, text, piece."""
        self.verifier.check(self.vocabulary_files())
        return durable.read_table(self.path / "vocabulary.parquet")

    def texts_of(self, token_ids: npt.NDArray[np.integer[Any]]) -> pa.Array:
        """Return the texts of token types, in their order; null where there is no such type."""
        known, texts = self._texts
        places = np.minimum(np.searchsorted(known, token_ids), len(known) - 1)
        found: pa.Array = texts.take(arrow.column(places, is_null=known[places] != token_ids))
        return found

    @cached_property
    def _texts(self) -> tuple[npt.NDArray[np.int32], pa.Array]:
        vocabulary = self.vocabulary.sort_by("token_id").combine_chunks()
        return arrow.numbers(vocabulary["token_id"]), vocabulary["text"].combine_chunks()

    # -- commits -------------------------------------------------------------------------------

    def _list_commits(self) -> tuple[int, ...]:
        folder = self.path / "commits"
        if not folder.is_dir():
            return ()
        names = (entry.name for entry in folder.iterdir())
        found = sorted(int(m[1]) for name in names if (m := re.fullmatch(r"(\d+)\.json", name)))
        if not self._segments.keys() >= set(found):
            self._read_plan()  # another process may have published a part since
        unplanned = [segment for segment in found if segment not in self._segments]
        if unplanned:
            raise DamagedFile(
                f"segment {unplanned[0]} of {self.path} is committed but no plan part names it; "
                "a file under plan/ is missing. Restore it from a copy."
            )
        return tuple(found)

    def commit_of(self, segment: int) -> Commit:
        """Return the commit of a committed segment."""
        if segment not in self._commits:
            path = self.path / f"commits/{segment:08d}.json"
            try:
                commit = Commit.from_json(durable.read_sealed(path))
            except (KeyError, TypeError, ValueError) as error:
                raise DamagedFile(f"{path} breaks the format: {error!r}.") from error
            if commit.segment != segment or dict(commit.rows) != dict(self.planned[segment].rows):
                raise DamagedFile(f"{path} does not agree with the plan. Restore it from a copy.")
            self._commits[segment] = commit
        return self._commits[segment]

    def committed_rows(self, space: str = "") -> dict[int, int]:
        """Return the number of rows of each committed segment."""
        return {s: self.planned[s].rows.get(space, 0) for s in self.committed}

    def n_rows(self, space: str | None = None) -> int:
        """Return how many rows are committed."""
        space = self.meta.spaces[0] if space is None else space
        return sum(self.committed_rows(space).values())

    def wait_for_segment(self, segment: int) -> None:
        """Return when no process holds the lock of a segment any more."""
        path = self.path / "work" / f"segment-{segment:08d}.lock"
        with durable.lock(path, f"segment {segment} of {self.path}", wait=True):
            self.refresh_commits()
