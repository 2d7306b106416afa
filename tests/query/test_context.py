from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from actstore.errors import ArgumentError, RowNotFound
from actstore.query import snippets
from actstore.store import CoreStore
from tests.query.stores import make_store


def test_a_snippet_is_the_text_around_a_row(shared: CoreStore) -> None:
    """For every word of the store the context is the document's words, across windows."""
    tokens = shared.tokens_of(shared["mlp_post.0"].row_ids())
    words = tokens.filter(np.asarray(tokens["doc_position"]) >= 0)
    found = snippets(shared, words["row_id"].to_numpy(), before=5, after=3)
    texts = {d: str(shared.document(d)["text"]).split() for d in range(shared.n_documents)}
    for snippet, row in zip(found, words.to_pylist(), strict=True):
        text, at = texts[row["document"]], row["doc_position"]
        assert snippet.before.split() == text[max(0, at - 5) : at]
        assert snippet.token == text[at]
        assert snippet.after.split() == text[at + 1 : at + 4]
        assert (snippet.row_id, snippet.document) == (row["row_id"], row["document"])
        assert snippet.source == f"document-{row['document']}.txt"
        whole = " ".join(text[max(0, at - 5) : at + 4])
        assert str(snippet) == whole


def test_snippets_keep_the_order_given(shared: CoreStore) -> None:
    """Rows may be in any order, and stand twice."""
    ids = [900, 3, 700, 3]
    assert [snippet.row_id for snippet in snippets(shared, ids)] == ids
    assert snippets(shared, []) == []


def test_a_special_token_shows_its_name_between_its_neighbours(shared: CoreStore) -> None:
    """A token that is not in the text has its vocabulary text."""
    words = str(shared.document(0)["text"]).split()
    first, second = snippets(shared, [0, 48], before=2, after=2)
    assert (first.before, first.token, first.after) == ("", "[CLS]", " ".join(words[:2]))
    assert (second.before, second.token, second.after) == (
        " ".join(words[45:47]),
        "[CLS]",
        " ".join(words[47:49]),
    )


def test_no_context_is_only_the_token(shared: CoreStore) -> None:
    """With before = after = 0 nothing stands around it."""
    (snippet,) = snippets(shared, [2], before=0, after=0)
    assert (snippet.before, snippet.after) == ("", "")


def test_context_ends_where_nothing_is_committed(tmp_path: Path) -> None:
    """Neighbours in a segment that is not committed are left out; rows there are refused."""
    documents = [130] * 13 + [111]  # so that one goes on in the next segment
    store = make_store(tmp_path / "s", commit=[0], documents=documents)
    last = int(store["mlp_post.0"].row_ids()[-1])
    assert snippets(store, [last])[0].after == ""
    whole = make_store(tmp_path / "whole", documents=documents)
    assert snippets(whole, [last])[0].after != ""
    with pytest.raises(RowNotFound, match=r"planned but not captured yet.*capture again"):
        snippets(store, [512])


def test_wrong_arguments_are_refused(shared: CoreStore) -> None:
    """A hole is no row, and numbers of tokens count from 0."""
    with pytest.raises(RowNotFound, match="is a hole"):
        snippets(shared, [511])
    with pytest.raises(ArgumentError, match=r"before = -1, after = 8 .*expected numbers"):
        snippets(shared, [1], before=-1)
