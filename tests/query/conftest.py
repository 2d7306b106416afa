"""The store that tests of queries read and never write."""

from __future__ import annotations

import pytest

from actstore.store import CoreStore
from tests.query.stores import make_store, write_index, write_result


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> CoreStore:
    """A whole store with an index over all of it and one result; its path is a hard one."""
    store = make_store(tmp_path_factory.mktemp("it's [a] layer=3") / "store*")
    write_index(store, store.committed)
    write_result(store, "first", [(0, 0.75), (1, 0.25)])
    return store


@pytest.fixture(autouse=True)
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal of 120 columns, whoever runs the tests."""
    monkeypatch.setenv("COLUMNS", "120")
