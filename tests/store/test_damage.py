"""No changed or missing byte of a store ever yields a number."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from actstore.capturing.lists import GenerationReader
from actstore.errors import ActstoreError
from actstore.store import CoreStore
from actstore.store.segment_writer import read_partial
from tests.captured import Captured, capture
from tests.toys import TEXT


@pytest.fixture(scope="module")
def small(toy_gpt2: Any, tmp_path_factory: pytest.TempPathFactory) -> Captured:
    """Return a store of a few rows, as small as its files can be."""
    path = tmp_path_factory.mktemp("small") / "store"
    return capture(
        toy_gpt2,
        [TEXT[:60], TEXT[60:90]],
        path,
        sites="mlp_post.0, resid_post.1",
        context=8,
        segment_rows=16,
        chunk_rows=8,
    )


def everything(path: Path) -> dict[str, Any]:
    """Return all that can be read of a store, by a process that opens it anew."""
    store = CoreStore(path)
    found: dict[str, Any] = {
        "meta": store.meta,
        "plan": (store.parts, dict(store.planned), store.committed, store.n_rows()),
        "commits": [store.commit_of(segment) for segment in store.planned],
        "documents": [store.document(i) for i in range(store.n_documents)],
        "vocabulary": store.vocabulary.to_pydict(),
        "windows": [store.windows(segment).to_pydict() for segment in store.planned],
        "tokens": [store.tokens(segment).to_pydict() for segment in store.planned],
    }
    for info in store.meta.sites:
        ids = [s * store.meta.segment_rows for s in store.planned]
        found[f"rows of {info.site}"] = store[info.site][ids].tobytes()
        found[f"all of {info.site}"] = store[info.site][:].tobytes()
        columns = [store.read_column(info, s, 3).tobytes() for s in store.planned]
        found[f"columns of {info.site}"] = columns
    generation = store.index()
    assert generation is not None
    store.verifier.check(generation.files)
    found["index"] = {
        name.removeprefix(generation.folder): pq.read_table(path / name).to_pydict()
        for name in generation.files
        if name.endswith(".parquet")
    }
    with np.load(path / f"{generation.folder}/moments.npz", allow_pickle=False) as arrays:
        found["moments"] = {name: arrays[name].tobytes() for name in arrays.files}
    return found


def files(path: Path) -> list[Path]:
    """Return the files of a store that actstore reads: neither locks, nor groups for Zarr."""
    found = (p for p in path.rglob("*") if p.is_file() and "work" not in p.parts)
    return sorted(p for p in found if p.parent == path or b'"group"' not in p.read_bytes()[:100])


def kind(path: Path, root: Path) -> str:
    """Return what a file is, without its numbers."""
    return "/".join(part for part in path.relative_to(root).parts if not part[0].isdigit())


def same(a: Any, b: Any) -> bool:
    """Return whether two readings are equal, NaN equal to itself."""
    return repr(a) == repr(b)


@pytest.mark.parametrize("bit", [0, 1, 4, 7])
def test_a_flipped_bit_is_found(bit: int, small: Captured, tmp_path: Path) -> None:
    """In any file, at any place: an error of the tree, or what was there before the flip."""
    path = tmp_path / "store"
    shutil.copytree(small.store.path, path)
    whole = everything(path)
    rng = np.random.default_rng(bit)
    n_found = 0
    for file in files(path):
        data = file.read_bytes()
        places = {0, len(data) - 1, *rng.integers(0, len(data), 3)}
        for place in places:
            changed = bytearray(data)
            changed[place] ^= 1 << bit
            file.write_bytes(changed)
            try:
                found = everything(path)
            except ActstoreError:
                n_found += 1
            else:
                # White space of JSON, and what only other readers read, may change.
                assert file.suffix == ".json", (file, place)
                assert same(found, whole), (file, place)
        file.write_bytes(data)
    assert same(everything(path), whole)
    assert n_found > 3 * len(files(path))


def test_every_byte_of_the_facts_counts(small: Captured, tmp_path: Path) -> None:
    """Commits, plan parts and manifests vouch for all others; they vouch for themselves."""
    path = tmp_path / "store"
    shutil.copytree(small.store.path, path)
    whole = everything(path)
    index = small.store.index()
    for name in ("commits/00000000.json", "plan/00000.json", "zarr.json",
                 f"{index.folder}/manifest.json", "vocabulary.json"):  # fmt: skip
        data = (path / name).read_bytes()
        for place in range(0, len(data), max(1, len(data) // 120)):
            changed = bytearray(data)
            # A digit becomes another digit, so that the JSON stays well-formed.
            changed[place] ^= 1
            (path / name).write_bytes(changed)
            try:
                found = everything(path)
            except ActstoreError:
                continue
            assert same(found, whole), (name, place)
        (path / name).write_bytes(data)


def test_missing_files_and_bytes_are_found(small: Captured, tmp_path: Path) -> None:
    """A file that is cut short or gone is an error of the tree wherever it is needed."""
    path = tmp_path / "store"
    shutil.copytree(small.store.path, path)
    whole = everything(path)
    for file in files(path):
        data = file.read_bytes()
        for rest in (None, b"", data[: len(data) // 2], data[:-3]):
            if rest is None:
                file.unlink()
            else:
                file.write_bytes(rest)
            with pytest.raises((ActstoreError, AssertionError)) as caught:
                everything(path)
            if caught.errisinstance(AssertionError):
                # Without its manifest a generation is not there at all.
                assert file.name == "manifest.json"
                assert rest is None
        file.write_bytes(data)
    assert same(everything(path), whole)


def test_a_shard_of_another_segment_or_store_is_found(small: Captured, tmp_path: Path) -> None:
    """A whole, undamaged shard in the wrong place is not the one that was committed."""
    path = tmp_path / "store"
    shutil.copytree(small.store.path, path)
    info = small.store.site("mlp_post.0")
    full = [s for s, segment in small.store.planned.items() if segment.rows[""] > 8]
    a, b = (path / info.path / f"c/{segment}/0" for segment in full[:2])
    assert a.stat().st_size == b.stat().st_size
    a.write_bytes(b.read_bytes())
    store = CoreStore(path)
    with pytest.raises(ActstoreError, match=rf"c/{full[0]}/0 of .* \(segment {full[0]}\) is not"):
        store["mlp_post.0"][full[0] * 16]
    assert store["mlp_post.0"][full[1] * 16].shape == (64,)


def test_partials_are_checked(
    toy_capture: Callable[..., Captured], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a segment adds to a fold is verified before it is merged."""
    monkeypatch.setattr("actstore.capturing.run.compact", lambda *_, **__: None)
    store = toy_capture().store
    for segment in store.committed:
        path = store.path / f"partials/folds/{segment:08d}.npz"
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 4
        path.write_bytes(data)
        with pytest.raises(ActstoreError, match=rf"{segment:08d}.npz in .* has changed since"):
            read_partial(CoreStore(store.path), segment, "folds")


def test_lists_read_back_from_the_index_are_those_merged(small: Captured) -> None:
    """What the next compaction goes on from is what the last one wrote."""
    store = small.store
    info = store.site("mlp_post.0")
    top = GenerationReader(store, store.index()).lists(info)["top"]
    values = store["mlp_post.0"][store.rows().row_ids()].astype(np.float32)
    ordered = -np.sort(-values, axis=0)[:100]
    n = len(ordered)
    assert (top.counts == n).all()
    assert np.array_equal(top.values[:, :n], ordered.T)
