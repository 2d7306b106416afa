"""Opening, making and locking stores; what their metadata may not say."""

from __future__ import annotations

import json
import multiprocessing
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from actstore import durable
from actstore.errors import ActstoreError, DamagedFile, FormatError, StoreBusy, StoreNotFound
from actstore.site import Site
from actstore.store import CoreStore, SiteInfo, is_vacant
from actstore.store.budget import parse_budget
from tests.captured import Captured
from tests.store.test_machine import META


def test_metadata_comes_back(tmp_path: Path) -> None:
    """What a store is made with is what it says when opened."""
    sites = (
        SiteInfo(Site("mlp_post", 10), "h.10.mlp", "input", 37, "bfloat16"),
        SiteInfo(Site("resid_post", 2, "encoder"), "encoder.2", "output", 5, "float32"),
    )
    meta = replace(META, sites=sites, model={"name": "a", "n": 3}, versions={"torch": "2"})
    CoreStore.create(tmp_path / "store", meta)
    again = CoreStore(tmp_path / "store")
    assert again.meta == meta
    assert again.sites == [info.site for info in sites]
    assert again.meta.row_bytes == 37 * 2 + 5 * 4
    assert again.meta.spaces == ("", "encoder")


def test_a_store_made_meanwhile_is_opened(tmp_path: Path) -> None:
    """Two processes that make one store get the store of the first."""
    first = CoreStore.create(tmp_path, META)
    second = CoreStore.create(tmp_path, replace(META, store_id="late"))
    assert second.meta == first.meta == META


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda path: None,
            r"store = .* with its zarr.json.* does not exist.*actstore.capture\(model",
        ),
        (lambda path: path.mkdir(), "is a folder without a store"),
        (lambda path: path.write_text("x"), "is not a folder"),
        (
            lambda path: (path.mkdir(), (path / "zarr.json").write_text('{"attributes": {}}')),
            "is a Zarr group that actstore did not make",
        ),
        (
            lambda path: (path.mkdir(), (path / "zarr.json").write_text("[]")),
            "is a Zarr group that actstore did not make",
        ),
    ],
)
def test_a_path_without_a_store_is_refused(
    make: Callable[[Path], Any], message: str, tmp_path: Path
) -> None:
    """A folder that holds no store is named, with what would make one."""
    make(tmp_path / "runs")
    with pytest.raises(StoreNotFound, match=message):
        CoreStore(tmp_path / "runs")
    with pytest.raises(FileNotFoundError):
        CoreStore(tmp_path / "runs")


def test_a_foreign_folder_is_left_alone(tmp_path: Path) -> None:
    """A store is not made among other files, and these are not touched."""
    (tmp_path / "thesis.tex").write_text("years of work")
    assert not is_vacant(tmp_path)
    with pytest.raises(StoreNotFound, match=r"not empty and holds no store\. Name a new or empty"):
        CoreStore.create(tmp_path, META)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
    assert is_vacant(tmp_path / "new")


def rewrite(store: CoreStore, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the root metadata and seal it again, as somebody who means harm would."""
    path = store.path / "zarr.json"
    document = json.loads(path.read_text())
    content = durable.unsealed(document["attributes"]["actstore"], path)
    change(content)
    document["attributes"]["actstore"] = durable.sealed(content)
    path.write_text(json.dumps(document))


def test_another_format_version_is_refused(tmp_path: Path) -> None:
    """A store of version 2 is named as such, with what reads it."""
    store = CoreStore.create(tmp_path, META)
    rewrite(store, lambda d: d.update(format=2))
    with pytest.raises(FormatError, match="has format version 2; this actstore reads version 1"):
        CoreStore(tmp_path)


@pytest.mark.parametrize("hook", ["../../../etc", "/etc", "a/../../../b"])
def test_metadata_cannot_point_out_of_the_store(hook: str, tmp_path: Path) -> None:
    """A site whose folder would lie elsewhere is refused, or its folder lies inside after all."""
    store = CoreStore.create(tmp_path / "store", META)
    rewrite(store, lambda d: d["sites"][0].update(hook=hook))
    with suppress(DamagedFile):
        opened = CoreStore(tmp_path / "store")
        folder = (opened.path / opened.meta.sites[0].path).resolve()
        assert folder.is_relative_to(opened.path.resolve())


@pytest.mark.parametrize("name", ["../secret.parquet", "/etc/passwd", "plan/../../secret"])
def test_files_outside_are_never_read(name: str, tmp_path: Path) -> None:
    """A commit or manifest that names a file outside of the store is refused."""
    (tmp_path / "secret.parquet").write_bytes(b"1")
    (tmp_path / "store").mkdir()
    verifier = durable.Verifier(tmp_path / "store")
    facts = durable.FileFacts.of(tmp_path / "secret.parquet")
    with pytest.raises(DamagedFile, match="lies outside of the store"):
        verifier.check({name: facts})


@pytest.mark.parametrize("key", ["segment_rows", "sites", "model", "keep", "store_id"])
def test_metadata_without_a_key_is_refused(key: str, tmp_path: Path) -> None:
    """Metadata that misses something names the store and what is missing."""
    store = CoreStore.create(tmp_path, META)
    rewrite(store, lambda d: d.pop(key))
    with pytest.raises(FormatError, match=rf"metadata of .* breaks the format: KeyError\('{key}'"):
        CoreStore(tmp_path)


def hold(lock: str, path: str, held: Any) -> None:
    """Hold a lock of a store until killed (in a process of its own)."""
    store = CoreStore(path)
    with getattr(store, lock)() if lock != "segment" else store.write_segment(0):
        held.set()
        time.sleep(60)


@pytest.mark.parametrize("lock", ["plan_lock", "segment"])
def test_locks_keep_other_processes_out(lock: str, toy_capture: Callable[..., Captured]) -> None:
    """While one process writes a segment another is told so; for the plan it waits its turn."""
    store = toy_capture().store
    context = multiprocessing.get_context("spawn")
    held = context.Event()
    process = context.Process(target=hold, args=(lock, str(store.path), held))
    process.start()
    try:
        assert held.wait(60)
        if lock == "segment":
            busy = r"is being written by another process .* end it\."
            with pytest.raises(StoreBusy, match=busy):
                store.write_segment(0).__enter__()
        killer = threading.Timer(0.5, process.kill)
        killer.start()
        if lock == "segment":
            killer.join()
            process.join()
        # The kernel frees the lock of a process that is gone.
        with store.plan_lock() if lock == "plan_lock" else store.write_segment(0):
            process.join(10)
            assert process.exitcode is not None
    finally:
        process.kill()


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("2GB", 2 * 10**9),
        ("512MiB", 2**29),
        ("1.5 gb", 15 * 10**8),
        (2**30, 2**30),
        ("64Mi", 2**26),
    ],
)
def test_budgets_are_sizes(text: int | str, n_bytes: int) -> None:
    """Bytes, or sizes as people write them."""
    assert parse_budget(text) == n_bytes


@pytest.mark.parametrize("text", ["", "2 apples", "-1GB", "GB", 1000, "1MB", -5])
def test_other_budgets_are_refused(text: int | str) -> None:
    """What is no size, or too little to work in, is named."""
    with pytest.raises(ActstoreError, match=r"budget = .* expected"):
        parse_budget(text)
    assert 0 < parse_budget(None) <= 4 * 2**30
