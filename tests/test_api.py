"""The public face over a small captured store."""

import inspect

import numpy as np
import pytest

import actstore
from actstore import decompose
from actstore.errors import ArgumentError, QueryError, RowNotFound, StoreNotFound
from tests.synthetic import synthetic_store
from tests.toys import toy_model


def test_one_prompt_is_one_line():
    """Without a store path the store is temporary, small, and holds the prompt's tokens."""
    module, tokenizer = toy_model("gpt2")

    store = actstore.capture(module, text="The keys to the cabinet", tokenizer=tokenizer)

    texts = [row["text"] for row in store.sql("SELECT text FROM tokens ORDER BY row_id")]
    assert "".join(texts) == "The keys to the cabinet"
    assert store.n_bytes() < 1_000_000


def test_a_temporary_store_goes_with_its_object():
    """The folder of a temporary store is deleted when nothing refers to the store."""
    module, tokenizer = toy_model("gpt2")
    store = actstore.capture(module, text="The keys", tokenizer=tokenizer)
    path = store.path
    assert path.exists()

    del store
    import gc

    gc.collect()

    assert not path.exists()


def test_dask_gives_the_rows_and_their_ids(small_store):
    """Row i of the dask array is the token row_ids[i], at every site."""
    for site in small_store.sites:
        array, row_ids = small_store.dask(site)

        np.testing.assert_array_equal(array.compute(scheduler="sync"), small_store[site][row_ids])


def test_rows_take_an_sql_condition(small_store):
    """A decomposition over rows of a condition uses just the content rows that meet it."""
    wanted = "documents.source = 'text 1'"
    factors = small_store.nmf("mlp_post", 2, rows=wanted, name="some-rows")

    (expected,) = small_store.sql(
        "SELECT count(*) FROM tokens JOIN documents USING (document) "
        f"WHERE {wanted} AND NOT special AND NOT first"
    ).rows()[0]

    assert factors.summary["n_rows"] == expected
    assert factors.summary["rows"] == wanted


def test_a_column_takes_an_sql_condition(small_store):
    """Of a neuron's column a condition chooses the rows that SQL finds with it."""
    wanted = "documents.source = 'text 2' AND position > 3"
    column = small_store.activations("mlp_post.1", 7, rows=wanted)
    found = small_store.sql(
        "SELECT row_id, value FROM activations('mlp_post.1', 7) JOIN tokens USING (row_id) "
        f"JOIN documents USING (document) WHERE {wanted} ORDER BY row_id"
    )

    assert column.to_arrow() == found.to_arrow()
    assert 0 < len(column) < len(small_store.activations("mlp_post.1", 7))


def test_rows_of_no_token_are_refused(small_store):
    """A condition that holds for no row says so, and what could be given."""
    with pytest.raises(ArgumentError, match="expected 'content', 'all', or an SQL condition"):
        small_store.nmf("mlp_post", 2, rows="position = 123456")


def test_results_reopen_without_computing(small_store):
    """Factors and similarities are found again by name."""
    made = small_store.nmf("mlp_post", 3, name="kept")
    reopened = actstore.open(small_store.path).factors("kept")

    np.testing.assert_array_equal(made.loadings, reopened.loadings)


def test_factors_of_no_kind_are_refused(small_store):
    """What is no kind of factors is no folder to look in."""
    with pytest.raises(ArgumentError, match=r"kind = '\.\./x'; expected one of nmf, pca, ica"):
        small_store.factors(kind="../x")


@pytest.mark.parametrize("name", ["ica", "nmf", "pca", "shuffle", "similarity"])
def test_every_argument_of_a_decomposition_can_be_given(name):
    """What messages of the function name is an argument of the store's method too."""
    function = inspect.signature(getattr(decompose, name)).parameters
    method = inspect.signature(getattr(actstore.Store, name)).parameters

    assert function.keys() - {"store", "engine"} <= method.keys()


@pytest.mark.parametrize(
    ("ask", "columns"),
    [
        (lambda f: f.top_neurons(0, 3), "site    space  hook      layer  neuron  loading"),
        (lambda f: f.top_tokens(0, 3), "rank"),
        (lambda f: f.token_types(0, 3), "lift"),
        (lambda f: f.top_documents(0, 3), "source"),
        (lambda f: f.top_positions(0, 3), "position"),
        (lambda f: f.clusters(3), "cosine"),
    ],
)
def test_what_factors_are_asked_prints_as_a_table(small_store, ask, columns):
    """In a terminal and in a notebook it is a table with a row a line, as of SQL."""
    found = ask(small_store.factors("first"))
    head, *rows = repr(found).splitlines()
    for column in columns.split():
        assert column in head.split()
    assert len(rows) >= 3
    assert found._repr_html_().startswith("<table>")
    assert list(found.df().columns) == found.columns


def test_a_page_in_no_folder_is_refused_before_the_work(small_store, tmp_path):
    """The folder is looked for before the view is made, which would be refused too."""
    to = tmp_path / "none" / "x.html"
    with pytest.raises(ArgumentError, match="none, which does not exist"):
        small_store.factors().to_html(to, document=10**6)
    with pytest.raises(ArgumentError, match="none, which does not exist"):
        small_store.neuron("mlp_post.1", 7, by="no column").to_html(to)


def test_info_names_the_module_and_width_of_every_site(small_store):
    """`info` shows where each site was found."""
    text = str(small_store.info())

    assert "mlp_post.0–2: 64 x float16, input of h.*.mlp.c_proj" in text
    assert "resid_pre.0: 32 x float16, input of h.0" in text


def test_estimate_counts_the_bytes_that_capture_then_takes(tmp_path, texts):
    """Rows and bytes of an estimate are those of the capture."""
    module, tokenizer = toy_model("gpt2")
    options = {"text": texts, "tokenizer": tokenizer, "context": 16}

    expected = actstore.estimate(module, **options)
    store = actstore.capture(module, store=tmp_path / "store", **options)

    assert expected.rows == store.n_rows()
    assert expected.total_bytes == store.n_bytes()


def test_opening_a_folder_without_a_store_says_how_to_make_one(tmp_path):
    """The error names the folder and the remedy."""
    with pytest.raises(StoreNotFound, match=r"actstore\.capture\(model, corpus, path\)"):
        actstore.open(tmp_path)


def test_a_policy_that_is_none_is_refused_before_the_model_loads():
    """on_nan takes two words."""
    with pytest.raises(ArgumentError, match="on_nan = 'maybe' is not 'error' or 'count'"):
        actstore.capture("no/such/model", text="x", on_nan="maybe")


def test_a_condition_is_taken_as_it_reads(small_store):
    """A condition cannot close our bracket, and `text` in it is the token's."""
    with pytest.raises(QueryError):
        small_store.nmf("mlp_post", 2, rows="true) OR (first")
    (text,) = small_store.sql("SELECT text FROM tokens WHERE NOT first LIMIT 1").rows()[0]
    factors = small_store.nmf("mlp_post", 1, rows=f"text = '{text}'", name="one-word")
    assert factors.summary["n_rows"] >= 1


def test_a_store_is_found_though_the_process_changes_its_folder(small_store, monkeypatch, tmp_path):
    """A relative path is that of the moment the store was opened."""
    monkeypatch.chdir(small_store.path.parent)
    store = actstore.open(small_store.path.name)
    monkeypatch.chdir(tmp_path)

    assert store.n_rows() == small_store.n_rows()
    assert len(store.top("mlp_post.1", 3, k=2)) == 2


@pytest.mark.parametrize("rows", [True, [True, False], [1.5], "a", None, [[1]], [2**63 + 5]])
def test_row_ids_are_integers_everywhere(small_store, rows):
    """What is no row id is refused alike by sites and by factors; nothing is rounded or wrapped."""
    for ask in (small_store["mlp_post.1"].__getitem__, small_store.factors("first").scores):
        with pytest.raises(RowNotFound):
            ask(rows)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: s.nmf(n_components=1.5), "n_components = 1.5 is not a whole number"),
        (lambda s: s.nmf(seed=-1), "seed = -1 was given; expected 0"),
        (lambda s: s.top("mlp_post.1", 3, k=0), "k = 0 was given; expected 1"),
        (lambda s: s.top("mlp_post.1", 3, before="a"), "before = 'a' is not a whole number"),
    ],
)
def test_numbers_that_are_none_are_refused(small_store, call, message):
    """Counts are whole numbers in their range."""
    with pytest.raises(ArgumentError, match=message):
        call(small_store)


def test_a_store_inside_its_corpus_folder_goes_on(tmp_path, model_folder):
    """A directory is searched for documents, not for stores."""
    (tmp_path / "a.txt").write_text("The keys to the cabinet", encoding="utf-8")
    for _ in range(2):
        store = actstore.capture(model_folder, tmp_path, tmp_path / "store", context=16)

    assert store.n_documents == 1


def test_top_of_a_subset_in_context(small_store):
    """Rows meet the condition, each document stands once, and every token has its stored value."""
    found = small_store.top(
        "mlp_post.1", 3, 4, where="source <> 'text 1'", distinct="document", activations=True
    )

    documents = [row["document"] for row in found]
    assert len(set(documents)) == len(documents) == 4
    for row in found:
        assert row["source"] != "text 1"
        assert row["values"][row["place"]] == row["value"]
        assert None not in row["values"]


def test_top_replays_what_is_not_stored(tmp_path, texts):
    """Values over the context are those of a store that keeps all rows, to rounding."""
    module, tokenizer = toy_model("gpt2")
    options = {"text": texts, "tokenizer": tokenizer, "context": 16}
    whole = actstore.capture(module, store=tmp_path / "whole", **options)
    none = actstore.capture(module, store=tmp_path / "none", keep="none", **options)

    expected = whole.top("mlp_post.1", 3, 5, activations=True)
    found = none.top("mlp_post.1", 3, 5, replay=True, model=module, tokenizer=tokenizer)

    for row, other in zip(found, expected, strict=True):
        assert (row["row_id"], row["tokens"]) == (other["row_id"], other["tokens"])
        np.testing.assert_allclose(row["values"], other["values"], atol=2e-3)


def test_rows_are_chosen_in_the_space_of_the_sites(tmp_path, monkeypatch):
    """Content rows of a decoder are not those of its encoder, which comes first."""
    values = {f"{space}.mlp_post.0": np.ones((200, 5)) for space in ("encoder", "decoder")}
    store = actstore.open(synthetic_store(tmp_path / "s", values).path)
    asked = []
    chosen = type(store).rows

    def rows(self, rule="content", space=None):
        asked.append(space)
        return chosen(self, rule, space)

    monkeypatch.setattr(type(store), "rows", rows)
    store.nmf("decoder.mlp_post", 2)
    store.pca(iter(["decoder.mlp_post"]), 1)
    store.loader("decoder.mlp_post", 50)

    assert set(asked) == {"decoder"}
