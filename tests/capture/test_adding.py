"""Adding documents to a finished store: what is there stays, what comes is as if always there."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import actstore
from actstore.capturing import Limits, parts, plan
from actstore.cli import main
from actstore.errors import CorpusError, StoreMismatch
from actstore.models import LanguageModel
from actstore.store import CoreStore
from tests.captured import (
    DOCUMENTS,
    Captured,
    all_tokens,
    brute_lists,
    capture,
    indexed_lists,
    stored_bytes,
)
from tests.toys import TEXT

ROOT = Path(__file__).parents[2]
MORE = [TEXT[40:400], "", "the people of the union"]
STILL_MORE = ["war, peace. " * 5, TEXT[:99]]
SITES = ["mlp_post.1", "resid_post.2"]


@pytest.fixture
def toy_capture(toy_capture: Callable[..., Captured]) -> Callable[..., Captured]:
    """Return the function that captures with the toy BERT, for two sites."""
    return functools.partial(toy_capture, sites=SITES)


def named(texts: list[str], first: int = 0) -> list[dict[str, str]]:
    """Return documents that tell where they come from."""
    return [{"text": text, "source": f"speech {first + i}"} for i, text in enumerate(texts)]


def files(path: Path) -> dict[str, tuple[int, bytes]]:
    """Return time and content of all files of a store that hold rows, text or commits."""
    kinds = ("activations", "tokens", "documents", "plan", "commits")
    found = [p for kind in kinds for p in (path / kind).rglob("*") if p.is_file()]
    return {
        str(p.relative_to(path)): (p.stat().st_mtime_ns, p.read_bytes())
        for p in found
        if p.name != "zarr.json"  # of an array, says how many rows there may be
    }


def test_documents_added_twice_are_as_if_always_there(
    toy_capture: Callable[..., Captured], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows, tokens and index are the bytes of one capture whose parts end where corpora do."""
    first = toy_capture(named(DOCUMENTS)).store
    before = files(first.path)
    for texts, start in ((MORE, len(DOCUMENTS)), (STILL_MORE, len(DOCUMENTS) + len(MORE))):
        added = toy_capture(named(texts, start), add=True).store
    n_rows = [sum(s.rows[""] for s in part.segments) for part in added.parts]
    assert [part.complete for part in added.parts] == [True] * 3
    assert [part.n_documents for part in added.parts] == [len(DOCUMENTS), 3, 2]
    assert all(files(first.path)[name] == before[name] for name in before), "nothing is touched"
    for site in added.sites:
        assert indexed_lists(added, str(site)) == brute_lists(added, str(site)), site

    monkeypatch.setattr(
        *(plan._PartBuilder, "ends_before"),
        lambda builder, cut: builder.n_rows >= n_rows[builder.part],
    )
    whole = toy_capture(named([*DOCUMENTS, *MORE, *STILL_MORE]), "whole").store
    assert len(whole.parts) == 3
    found, expected = stored_bytes(added), stored_bytes(whole)
    assert found.keys() == expected.keys()
    different = [name for name in sorted(expected) if found[name] != expected[name]]
    assert different == [f"plan/{part:05d}.json" for part in range(3)], "they name the corpus"


def test_rows_keep_their_ids(toy_capture: Callable[..., Captured]) -> None:
    """Values, tokens and documents are found under the numbers they had; new ones come behind."""
    first = toy_capture().store
    row_ids = first["mlp_post.1"].row_ids()
    values, tokens = first["mlp_post.1"][row_ids], all_tokens(first)
    store = toy_capture(MORE, add=True).store
    assert (store["mlp_post.1"][row_ids] == values).all()
    assert all_tokens(store).slice(0, len(tokens)).equals(tokens)
    new = all_tokens(store).slice(len(tokens))
    assert new["row_id"][0].as_py() == store.meta.segment_rows * len(first.planned)
    assert set(new["document"].to_pylist()) == {len(DOCUMENTS), len(DOCUMENTS) + 2}
    assert new["window_id"][0].as_py() == max(tokens["window_id"].to_pylist()) + 1
    for number, text in enumerate([*DOCUMENTS, *MORE]):
        assert store.document(number)["text"] == text


def test_what_a_store_has_is_not_added_again(toy_capture: Callable[..., Captured]) -> None:
    """A script of several captures can run again: it goes through, and says nothing was added."""
    steps: list[tuple[list[str], dict[str, Any]]] = [
        (DOCUMENTS, {}),
        (MORE, {"add": True}),
        (STILL_MORE, {"add": True}),
    ]
    for documents, options in steps:
        store = toy_capture(documents, **options).store
    before = stored_bytes(store)
    assert toy_capture(DOCUMENTS).windows_fed == 0
    for documents in (DOCUMENTS, MORE, STILL_MORE):
        with pytest.warns(UserWarning, match=r"nothing was added to .*store: it holds this corpus"):
            assert toy_capture(documents, add=True).windows_fed == 0
    assert stored_bytes(CoreStore(store.path)) == before


def test_the_same_text_can_be_added_as_another_corpus(
    toy_capture: Callable[..., Captured],
) -> None:
    """A corpus is more than its texts: told apart by source or limits, they are captured again."""
    toy_capture(MORE)
    store = toy_capture(named(MORE), add=True).store
    assert [store.document(i)["text"] for i in range(6)] == MORE * 2


def test_limits_count_for_what_is_added_alone(toy_capture: Callable[..., Captured]) -> None:
    """The rows there were before take nothing from max_tokens."""
    n_before = toy_capture().store.n_rows()
    store = toy_capture(MORE, limits=Limits(max_tokens=30), add=True).store
    assert 25 < store.n_rows() - n_before <= 30
    assert store.parts[-1].corpus["max_tokens"] == 30


def test_adding_to_nothing_makes_a_store(toy_capture: Callable[..., Captured]) -> None:
    """A loop over corpora need not treat the first apart."""
    store = toy_capture(add=True).store
    assert stored_bytes(store) == stored_bytes(toy_capture(name="plain").store)


def test_another_corpus_needs_to_be_added(toy_capture: Callable[..., Captured]) -> None:
    """Without add= it is refused, and the remedy is named; nothing changes."""
    store = toy_capture().store
    before = stored_bytes(store)
    message = r"crc32c was \d+, now it is \d+\..*add=True \(--add\) to add these documents to it"
    with pytest.raises(StoreMismatch, match=message):
        toy_capture(MORE)
    with pytest.raises(StoreMismatch, match="another context: it has 24, now it would be 16"):
        toy_capture(MORE, add=True, context=16)
    with pytest.raises(CorpusError, match="the corpus holds no token"):
        toy_capture(["", ""], add=True)
    assert stored_bytes(CoreStore(store.path)) == before


def test_an_unfinished_corpus_comes_first(
    toy_capture: Callable[..., Captured], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While documents of the last corpus are not planned, others cannot be put behind them."""
    monkeypatch.setattr(parts, "PART_ROWS", 150)
    publish = CoreStore.publish_part

    def fail(store: CoreStore, part: Any) -> None:
        if part.part == 2:
            raise RuntimeError("stopped")
        publish(store, part)

    with monkeypatch.context() as patch:
        patch.setattr(CoreStore, "publish_part", fail)
        with pytest.raises(RuntimeError, match="stopped"):
            toy_capture()
    with pytest.raises(StoreMismatch, match="not planned to its end: give the same corpus and lim"):
        toy_capture(MORE, add=True)
    toy_capture()
    assert toy_capture(MORE, add=True).store.n_documents == len(DOCUMENTS) + len(MORE)


@pytest.fixture(scope="module")
def run() -> Iterator[Callable[..., object]]:
    """Return a function that captures in a process of its own, and says how that ended."""
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.capture.killed_capture"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
    )
    assert server.stdin
    assert server.stdout
    assert json.loads(server.stdout.readline()) == "ready"

    def ask(path: Path, **request: Any) -> object:
        server.stdin.write(json.dumps({"path": str(path), **request}) + "\n")
        server.stdin.flush()
        return json.loads(server.stdout.readline())

    yield ask
    server.stdin.close()
    server.wait()


def test_killed_while_adding(run: Callable[..., object], tmp_path: Path) -> None:
    """Killed at some of its durable steps, an addition goes on to the same bytes."""
    addition: dict[str, Any] = {
        "documents": [*MORE, *STILL_MORE, *DOCUMENTS[:6]],
        "options": {"add": True},
    }
    assert run(tmp_path / "first") == 0
    shutil.copytree(tmp_path / "first", tmp_path / "whole")
    assert run(tmp_path / "whole", log=str(tmp_path / "log"), **addition) == 0
    expected = stored_bytes(CoreStore(tmp_path / "whole"))
    steps = (tmp_path / "log").read_text().splitlines()
    creates = [i for i, step in enumerate(steps) if step.startswith("create")]
    assert len(creates) > 8
    # The first part, commits before and after the second, and the generation of the index.
    for number in {creates[0], *creates[2:-1:4], creates[-1]}:
        path = tmp_path / str(number)
        shutil.copytree(tmp_path / "first", path)
        assert run(path, kill=number, **addition) == "killed", steps[number]
        assert run(path, **addition) == 0
        assert stored_bytes(CoreStore(path)) == expected


def test_the_command_adds(model_folder: Path, tmp_path: Path) -> None:
    """`--add` puts a second corpus behind the first; without it the error names the option."""
    for name, text in (("a.txt", "the war was over"), ("b.txt", "the people went back to work")):
        (tmp_path / name).write_text(text)
    command = ["capture", str(model_folder)]
    store = str(tmp_path / "store")

    def go(*args: str) -> Any:
        return CliRunner().invoke(main, [*command, *args])

    assert go(str(tmp_path / "a.txt"), store).exit_code == 0
    refused = go(str(tmp_path / "b.txt"), store)
    assert refused.exit_code == 1
    assert "--add" in refused.output
    for said in ("", "warning: nothing was added"):
        added = go(str(tmp_path / "b.txt"), store, "--add")
        assert added.exit_code == 0
        assert said in added.output
    sources = actstore.open(store).sql("SELECT source FROM documents ORDER BY document")
    assert [row["source"] for row in sources] == ["a.txt", "b.txt"]


def test_a_generator_can_be_added(toy_bert: LanguageModel, tmp_path: Path) -> None:
    """What can be read only once is read once, whole."""
    capture(toy_bert, DOCUMENTS, tmp_path / "store")
    store = capture(toy_bert, (t for t in MORE), tmp_path / "store", add=True).store
    assert [store.document(len(DOCUMENTS) + i)["text"] for i in range(3)] == MORE
