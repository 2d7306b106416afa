"""Two stores are compared over the same places of the same text, or not at all."""

import numpy as np
import pytest

from actstore.decompose import alignment, similarity
from actstore.decompose.alignment import align
from actstore.decompose.engine import Engine
from actstore.errors import (
    ArgumentError,
    BudgetExceeded,
    NonFiniteActivation,
    SiteNotFound,
    StoreNotFound,
)
from tests.captured import DOCUMENTS as TEXTS
from tests.captured import capture
from tests.decompose import references
from tests.synthetic import synthetic_store

DOCUMENTS = [101, 67, 90, 150, 23] * 5
N_ROWS = sum(DOCUMENTS)


def values(seed: int, width: int = 17) -> dict[str, np.ndarray]:
    """Return two sites of all rows, in the order of the text."""
    rng = np.random.default_rng(seed)
    return {f"mlp_post.{i}": rng.normal(size=(N_ROWS, width)) for i in range(2)}


def two_stores(folder, theirs, **options):
    """Return a store of `values(0)` and another of the same text, cut into other windows."""
    common = {"documents": DOCUMENTS, "special": False}
    a = synthetic_store(folder / "a", values(0), **common)
    b = synthetic_store(folder / "b", theirs, context=25, segment_rows=256, **common, **options)
    assert a.document(7)["text"] == b.document(7)["text"]
    return a, b


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two stores whose sites are rotations of each other, row by row."""
    turn = np.linalg.qr(np.random.default_rng(1).normal(size=(17, 17)))[0]
    theirs = {name: 3 * block @ turn + 1 for name, block in values(0).items()}
    return two_stores(tmp_path_factory.mktemp("pair"), theirs)


def by_place(store, site, rule="content"):
    """Return the values of a site by document and last character."""
    ids = store.rows(rule).row_ids()
    tokens = store.tokens_of(ids)
    keys = zip(tokens["document"].to_pylist(), tokens["char_end"].to_pylist(), strict=True)
    return dict(zip(keys, store[site][ids].astype(np.float64), strict=True))


@pytest.mark.parametrize(
    "options", [{}, {"method": "exact"}, {"measure": "cca"}, {"measure": "pwcca"}]
)
def test_values_meet_those_of_the_same_place(pair, options):
    """A rotation of the same rows is at 1 and another site is not, for every measure."""
    a, b = pair
    found = similarity(a, None, other=b, **options)

    np.testing.assert_allclose(np.diagonal(found.matrix), 1, atol=1e-4)
    assert np.abs(found.matrix[0, 1]) < 0.3
    assert found.matrix.shape == found.low.shape == (2, 2)
    assert [str(site) for site in found.other_sites] == ["mlp_post.0", "mlp_post.1"]
    assert str(b.path) in repr(found)


def test_the_rows_are_those_both_have(pair):
    """Exact CKA is that of the rows that are content in both stores, and of no others."""
    a, b = pair
    found = similarity(a, ["mlp_post.0"], other=b.path, method="exact")
    mine, theirs = by_place(a, "mlp_post.0"), by_place(b, "mlp_post.0")
    common = sorted(mine.keys() & theirs.keys())
    blocks = [np.array([site[place] for place in common]) for site in (mine, theirs)]

    assert found.summary["n_rows"] == len(common) < a.rows().n_rows
    assert found.summary["share_aligned"] == pytest.approx(len(common) / a.rows().n_rows, abs=1e-6)
    expected = references.debiased_cka(blocks)[0, 1]
    np.testing.assert_allclose(found.matrix, [[expected]], atol=1e-6)


def test_tokenizers_may_differ(toy_bert, toy_gpt2, tmp_path):
    """Tokens of two tokenizers are paired where they end at the same character."""
    a = capture(toy_bert, TEXTS, tmp_path / "a").store
    b = capture(toy_gpt2, TEXTS, tmp_path / "b").store

    aligned = align(a, a.rows(), b, b.rows(), ("", ""), 2**28)

    ids, other_ids = aligned.rows.row_ids(), aligned.other_rows.row_ids()[aligned.order]
    assert len(ids) == len(other_ids) > 50
    mine, theirs = a.tokens_of(ids), b.tokens_of(other_ids)
    assert mine["document"].equals(theirs["document"])
    assert mine["char_end"].equals(theirs["char_end"])
    assert similarity(a, "resid_post", other=b, measure="cka", batch_rows=8).matrix.shape == (3, 2)


@pytest.mark.parametrize("least", [7, 40, 160, 3000])
def test_parts_of_the_text_give_the_same(pair, monkeypatch, least):
    """Looked for a few rows at a time, single documents cut too, partners are those of places."""
    a, b = pair
    monkeypatch.setattr(alignment, "_LEAST_PLACES", least)
    rows, other_rows = a.rows("all"), b.rows()
    needed = 16 * rows.n_rows + 9 * other_rows.n_rows + 160 * least
    sizes = []
    places = alignment._Index.places
    monkeypatch.setattr(
        alignment._Index,
        "places",
        lambda *args: sizes.append(len((found := places(*args))[0])) or found,
    )
    aligned = align(a, rows, b, other_rows, ("", ""), needed)

    ids, other_ids = aligned.rows.row_ids(), aligned.other_rows.row_ids()[aligned.order]
    mine, theirs = (
        list(zip(t["document"].to_pylist(), t["char_end"].to_pylist(), strict=True))
        for t in (a.tokens_of(ids), b.tokens_of(other_ids))
    )
    assert mine == theirs
    assert set(mine) == by_place(a, "mlp_post.0", "all").keys() & by_place(b, "mlp_post.0").keys()
    assert aligned.n_documents == len(DOCUMENTS)
    assert aligned.share == len(ids) / rows.n_rows
    assert max(sizes) <= least + 1  # words of one document are of unlike length
    assert np.ptp(np.diff(ids)) > 0  # rows of the first store rise, those of the other need not
    with pytest.raises(BudgetExceeded, match=rf"takes {needed:,} bytes, .*budget={needed} or more"):
        align(a, rows, b, other_rows, ("", ""), needed - 1)


def test_other_documents_are_refused(pair, tmp_path):
    """The message names the document and the character where they part."""
    a, _ = pair
    before = [result.name for result in a.results()]
    b = synthetic_store(tmp_path / "b", values(0), documents=DOCUMENTS, special=False, seed=4)
    with pytest.raises(
        ArgumentError, match=r"document 0 differs from that of .* at character \d+\. .*same corpus"
    ):
        similarity(a, None, other=b)
    assert [result.name for result in a.results()] == before


def test_other_bad_input(pair, tmp_path):
    """No store, a site it lacks, workers beside it, and a number that is none in either."""
    a, b = pair
    with pytest.raises(StoreNotFound, match="nowhere"):
        similarity(a, None, other=tmp_path / "nowhere")
    with pytest.raises(SiteNotFound, match="resid_post"):
        similarity(a, "resid_post", other=b)
    with pytest.raises(ArgumentError, match=r"other and workers were given; .*Leave workers="):
        similarity(a, None, other=b, engine=Engine(object()))
    theirs = values(0)
    theirs["mlp_post.1"][340, 5] = np.inf
    a, b = two_stores(tmp_path, theirs)
    bad = b["mlp_post.1"].row_ids()[340]
    with pytest.raises(
        NonFiniteActivation,
        match=rf"mlp_post\.1 of {b.path} is inf at row_id = {bad}, neuron 5",
    ):
        similarity(a, None, other=b, method="exact")
