"""Tables of the index, a neuron at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.captured import capture


def test_an_index_without_exemplars_has_empty_lists(toy_gpt2: Any, tmp_path: Path) -> None:
    """A store of one token has no content row, so no neuron has a highest one."""
    store = capture(toy_gpt2, ["a"], tmp_path / "store", sites="mlp_post.0", context=8).store
    generation = store.index()
    assert generation is not None
    found = store.index_tables.ranked(generation, store.meta.sites[0], 3, "top")
    assert found is not None
    assert (len(found.row_ids), found.longest) == (0, 0)
