from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from actstore.errors import (
    ArgumentError,
    DamagedFile,
    NeuronNotFound,
    QueryError,
    SiteNotFound,
)
from actstore.query import Database, Top, snippets, top
from actstore.store import CoreStore
from tests.query.stores import WIDTHS, activations, make_store, ranked, write_index
from tests.synthetic import synthetic_store


def pairs(answer: Top) -> list[tuple[int, float]]:
    """Return an answer as (row_id, value)."""
    return [(row["row_id"], row["value"]) for row in answer]


def test_it_equals_sorting_all_rows(shared: CoreStore) -> None:
    """For 200 random neurons, k and sides the rows are NumPy's, ties in the order of rows."""
    rng = np.random.default_rng(1)
    reached = set()
    for _ in range(200):
        site = str(rng.choice(list(WIDTHS)))
        neuron = int(rng.integers(WIDTHS[site]))
        k = int(rng.choice([1, 2, 7, 20, 21, 61]))
        largest = bool(rng.integers(2))
        answer = top(shared, site, neuron, k, largest=largest, before=0, after=0)
        assert pairs(answer) == ranked_once(shared, site, neuron, largest)[:k]
        assert answer.to_arrow()["rank"].to_pylist() == list(range(1, k + 1))
        reached.add(answer.reached.split(":")[0])
    assert reached == {"index", "column scan"}


_CACHE: dict[tuple[str, int, bool], list[tuple[int, float]]] = {}


def ranked_once(store: CoreStore, site: str, neuron: int, largest: bool) -> list[tuple[int, float]]:
    """Return `ranked` of the shared store, computed once."""
    key = (site, neuron, largest)
    if key not in _CACHE:
        _CACHE[key] = ranked(store, site, neuron, largest)
    return _CACHE[key]


@pytest.mark.parametrize("covers", [[], [0], [1], [0, 2], [0, 1, 2]])
def test_every_way_gives_the_same_rows(
    shared: CoreStore, tmp_path: Path, covers: list[int]
) -> None:
    """Index, index and scan, and scan agree, whatever the index covers."""
    store = make_store(tmp_path / "s")
    if covers:
        write_index(store, covers)
    for largest in (True, False):
        answer = top(store, "mlp_post.10", 3, 20, largest=largest)
        assert pairs(answer) == ranked_once(shared, "mlp_post.10", 3, largest)[:20]
    expected = {
        0: f"column scan: 4 segments, {store.n_rows():,} rows",
        1: "index + 3 segments scanned",
        2: "index + 2 segments scanned",
        3: "index + 1 segment scanned",
    }
    assert answer.reached == expected[len(covers)]


@pytest.mark.parametrize("covers", [[], [0, 2], [0, 1, 2]])
@pytest.mark.parametrize("k", [7, 61])
def test_without_text_the_facts_of_each_row_are_its_own(
    tmp_path: Path, covers: list[int], k: int
) -> None:
    """Document, position, token type and source are those of the tables, however it is reached."""
    store = make_store(tmp_path / "s")
    if covers:
        write_index(store, covers)
    answer = top(store, "mlp_post.10", 3, k, before=0, after=0)
    database = Database(store)
    for row in answer:
        (expected,) = database.sql(
            "SELECT row_id, document, position, t.text AS token, source FROM tokens t "
            "JOIN documents d USING (document) WHERE row_id = $row_id",
            row_id=row["row_id"],
        )
        assert {name: row[name] for name in expected} == expected
        assert (row["before"], row["after"]) == ("", "")


def test_a_store_being_captured_answers_with_what_is_committed(tmp_path: Path) -> None:
    """Rows of segments that are planned only are not there."""
    store = make_store(tmp_path / "s", commit=[1, 2])
    answer = top(store, "mlp_post.0", 2, 50)
    assert pairs(answer) == ranked(store, "mlp_post.0", 2, True)[:50]
    assert min(row for row, _ in pairs(answer)) >= 512


def test_an_index_newer_than_the_open_store_is_understood(tmp_path: Path) -> None:
    """Segments that were committed and indexed since the store was opened are seen."""
    whole = make_store(tmp_path / "s")
    commit = tmp_path / "s/commits/00000002.json"
    commit.rename(tmp_path / "later")
    early = CoreStore(tmp_path / "s")
    assert early.committed == (0, 1, 3)
    (tmp_path / "later").rename(commit)
    write_index(whole, whole.committed)
    answer = top(early, "mlp_post.0", 2, 13)
    assert answer.reached == "index"
    assert pairs(answer) == ranked(whole, "mlp_post.0", 2, True)[:13]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_stored_values_are_what_is_ordered(tmp_path: Path, dtype: str) -> None:
    """Order and ties are those of the values as stored, in every dtype."""
    values = {"mlp_post.0": np.random.default_rng(5).normal(size=(300, 3))}
    store = synthetic_store(
        tmp_path / "s", values, dtype=dtype, segment_rows=256, chunk_rows=64, special=False
    )
    assert pairs(top(store, "mlp_post.0", 1, 100)) == ranked(store, "mlp_post.0", 1, True)[:100]


def test_zeros_of_both_signs_are_equal_and_nan_is_absent(shared: CoreStore) -> None:
    """-0.0 and 0.0 stand in the order of rows, and no NaN is among all rows."""
    answer = top(shared, "mlp_post.0", 0, 10**6, before=0, after=0)
    values = answer.to_arrow()["value"].to_numpy()
    assert not np.isnan(values).any()
    assert not np.signbit(values[values == 0]).any()
    zeros = answer.to_arrow()["row_id"].to_numpy()[values == 0]
    assert len(zeros) > 100
    assert (np.diff(zeros) > 0).all()
    assert np.isnan(activations()["mlp_post.0"][:, 0]).any()


def test_a_k_beyond_the_rows_gives_all_and_says_so(shared: CoreStore) -> None:
    """The answer is short, and tells why."""
    answer = top(shared, "mlp_post.0", 0, 5000, before=0, after=0)
    n = len(ranked_once(shared, "mlp_post.0", 0, True))
    assert len(answer) == n
    assert answer.reached.endswith(f"; k = 5,000, and there are {n:,} content rows with a value")


def test_rows_come_with_their_text(shared: CoreStore) -> None:
    """Document, position, token and context are those of the row."""
    answer = top(shared, "resid_post.2", 1, 5, before=2, after=3)
    assert answer.columns == [
        "rank", "row_id", "value", "document", "position", "token", "before", "after", "source",
    ]  # fmt: skip
    for row in answer:
        (snippet,) = snippets(shared, [row["row_id"]], 2, 3)
        assert (row["before"], row["token"], row["after"]) == (
            snippet.before,
            snippet.token,
            snippet.after,
        )
        assert (row["document"], row["position"]) == (snippet.document, snippet.position)
    assert repr(answer).endswith("\n(index)")


def test_an_empty_store_has_no_rows(tmp_path: Path) -> None:
    """Before the first commit the answer is empty, not an error."""
    answer = top(make_store(tmp_path / "s", commit=[]), "mlp_post.0", 0)
    assert len(answer) == 0
    assert answer.reached.startswith("column scan: 0 segments, 0 rows")


def test_wrong_arguments_are_refused(shared: CoreStore) -> None:
    """Site, neuron and k are checked, and the message says what there is."""
    with pytest.raises(SiteNotFound, match=r"Did you mean 'mlp_post\.0'"):
        top(shared, "mlp_pots.0", 0)
    with pytest.raises(NeuronNotFound, match=r"neuron = 7 is not at mlp_post\.0 .*neurons 0 … 6"):
        top(shared, "mlp_post.0", 7)
    with pytest.raises(NeuronNotFound, match="neuron = -1"):
        top(shared, "mlp_post.0", -1)
    with pytest.raises(ArgumentError, match="k = 0; expected the number of rows"):
        top(shared, "mlp_post.0", 0, 0)
    with pytest.raises(ArgumentError, match=r"neuron = 1\.5; expected an integer"):
        top(shared, "mlp_post.0", 1.5)  # type: ignore[arg-type]


def test_a_damaged_list_raises(shared: CoreStore, tmp_path: Path) -> None:
    """A flipped bit in the index is found before it is read."""
    root = tmp_path / "copy"
    shutil.copytree(shared.path, root)
    file = root / "index/000000/exemplars/hook=mlp_post/layer=0/exemplars.parquet"
    data = bytearray(file.read_bytes())
    data[100] ^= 1
    file.write_bytes(data)
    with pytest.raises(DamagedFile, match=r"exemplars\.parquet in .* has changed"):
        top(CoreStore(root), "mlp_post.0", 0)


@pytest.fixture(scope="module")
def sampled(tmp_path_factory: pytest.TempPathFactory) -> CoreStore:
    """Return the store of these tests with an eighth of its rows, and the index of all of them."""
    path = tmp_path_factory.mktemp("sampled")
    whole = make_store(path / "whole")
    write_index(whole, whole.committed)
    keep = {"mlp_post.0": 1 / 8, "mlp_post.10": 0.0, "resid_post.2": 1.0}
    store = make_store(path / "s", keep=keep)
    shutil.copytree(whole.path / "index", store.path / "index")
    return store


@pytest.mark.parametrize("site", ["mlp_post.0", "mlp_post.10"])
@pytest.mark.parametrize("largest", [True, False])
def test_the_index_answers_for_rows_that_are_not_stored(
    sampled: CoreStore, shared: CoreStore, site: str, largest: bool
) -> None:
    """The strongest rows are those of all rows, their text with them."""
    for k in (1, 20):
        answer = top(sampled, site, 2, k, largest=largest)
        assert pairs(answer) == ranked_once(shared, site, 2, largest)[:k]
        assert answer.reached == "index"
    ids = answer.to_arrow()["row_id"].to_pylist()
    assert not set(ids) <= set(sampled[site].row_ids())


def test_what_the_index_cannot_answer_is_refused_where_rows_are_missing(
    sampled: CoreStore, shared: CoreStore, tmp_path: Path
) -> None:
    """A scan of a sample would be wrong: the message says why, and what can be asked."""
    why = r"not every row of mlp_post\.0 is stored in .* \(keep = '1/8'\)"
    with pytest.raises(ArgumentError, match=rf"k = 21 is more than .*{why}\. Ask for k <= 20, or"):
        top(sampled, "mlp_post.0", 2, 21)
    with pytest.raises(ArgumentError, match=r"\(keep = 'none'\)\. Ask for k <= 20"):
        top(sampled, "mlp_post.10", 2, 5000)
    whole = top(sampled, "resid_post.2", 2, 61)
    assert pairs(whole) == ranked_once(shared, "resid_post.2", 2, True)[:61]
    root = tmp_path / "copy"
    shutil.copytree(sampled.path, root)
    shutil.rmtree(root / "index")
    with pytest.raises(ArgumentError, match=r"does not cover 4 segments yet.*Run `actstore finish"):
        top(CoreStore(root), "mlp_post.0", 2)
    write_index_of(root, covers=[0, 1])
    with pytest.raises(ArgumentError, match=rf"cover 2 segments yet, .* scanned: {why}"):
        top(CoreStore(root), "mlp_post.0", 2, 5)


def write_index_of(root: Path, covers: list[int]) -> None:
    """Give a sampled store the index that a whole one has over some segments."""
    whole = make_store(root.with_name("whole"))
    write_index(whole, covers)
    shutil.copytree(whole.path / "index", root / "index")


def test_a_list_that_is_all_there_is_answers_any_k(tmp_path: Path) -> None:
    """Where a neuron has fewer values than the index keeps, no k is too large."""
    values = {"mlp_post.0": np.random.default_rng(5).normal(size=(13, 3))}
    options = {"segment_rows": 256, "chunk_rows": 64, "special": False}
    whole = synthetic_store(tmp_path / "whole", values, **options)
    write_index(whole, whole.committed)
    store = synthetic_store(tmp_path / "s", values, keep=0.5, **options)
    shutil.copytree(whole.path / "index", store.path / "index")
    answer = top(store, "mlp_post.0", 1, 1000)
    assert pairs(answer) == ranked(whole, "mlp_post.0", 1, True)
    assert answer.reached == "index; k = 1,000, and there are 12 content rows with a value"


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("postion < 12", r'where = .*"postion" not found(.|\n)*"position".*Expected what stands'),
        ("position <", r"where = .* is not a condition on rows: .*syntax error"),
        ("true; DROP VIEW tokens", "is not a condition on rows"),
        ("true) OR (special", "syntax error"),
        ("row_id IN (SELECT row_id FROM read_parquet('/etc/passwd'))", "'read_parquet' is not"),
        ("true /*", "is not a condition on rows"),
        ("true UNION SELECT 1", "is not a condition on rows"),
        ("max(position) > 3", "is not a condition on rows"),
        ("", "is not an SQL condition"),
    ],
)
def test_what_is_no_condition_is_refused(shared: CoreStore, where: str, message: str) -> None:
    """A condition is one expression over known columns, and it only reads."""
    with pytest.raises((QueryError, ArgumentError), match=message):
        top(shared, "mlp_post.0", 0, where=where)


def test_a_condition_that_nothing_meets_gives_no_rows(shared: CoreStore) -> None:
    """The answer is empty and says why."""
    answer = top(shared, "mlp_post.0", 0, where="position = 123456")
    assert len(answer) == 0
    assert answer.reached.endswith(
        "and there are 0 content rows with a value that meet the condition"
    )


def test_distinct_takes_two_words(shared: CoreStore) -> None:
    """Anything else is refused with what there is."""
    with pytest.raises(ArgumentError, match=r"distinct = 'speaker'; expected 'window', 'document'"):
        top(shared, "mlp_post.0", 0, distinct="speaker")


def test_a_subset_is_answered_or_refused_where_rows_are_missing(
    sampled: CoreStore, shared: CoreStore
) -> None:
    """The list answers for the first rows that meet a condition; beyond, the nearest is named."""
    best = ranked_once(shared, "mlp_post.0", 2, True)
    odd = [pair for pair in best[:20] if pair[0] % 2]
    answer = top(sampled, "mlp_post.0", 2, len(odd), where="row_id % 2 = 1")
    assert (pairs(answer), answer.reached) == (odd, "index")
    ask = rf"Ask for k <= {len(odd)}, without them for k <= 20, or capture"
    with pytest.raises(ArgumentError, match=rf"with where = 'row_id % 2 = 1', and .*{ask}"):
        top(sampled, "mlp_post.0", 2, len(odd) + 1, where="row_id % 2 = 1")
    with pytest.raises(ArgumentError, match="Nothing can be said of the first place, without"):
        top(sampled, "mlp_post.0", 2, 1, where="position = 123456")


def test_an_answer_says_how_much_of_the_plan_is_committed(tmp_path: Path) -> None:
    """While a capture goes on the answer is for what it has committed."""
    answer = top(make_store(tmp_path / "s", commit=[1, 2]), "mlp_post.0", 2, 5)
    assert answer.reached.endswith("; 2 of 4 segments are committed")


@pytest.mark.parametrize("site", ["mlp_post.0", "mlp_post.10", "resid_post.2"])
def test_activations_are_those_of_the_snippets_rows(
    sampled: CoreStore, shared: CoreStore, site: str
) -> None:
    """Each token has the value of its own row where that is stored, or among the answer."""
    answer = top(sampled, site, 2, 20, before=5, after=4, activations=True)
    assert "the neuron over each context: .df(), or --format json" in repr(answer)
    known = set(sampled[site].row_ids().tolist()) if site != "mlp_post.10" else set()
    known |= set(answer.to_arrow()["row_id"].to_pylist())
    for row in answer:
        (snippet,) = snippets(shared, [row["row_id"]], 5, 4)
        assert "".join(row["tokens"]) == row["before"] + row["token"] + row["after"]
        assert len(row["tokens"]) == len(row["values"]) == len(snippet.token_rows)
        assert snippet.token_rows[row["place"]] == row["row_id"]
        assert row["tokens"][row["place"]].strip() == row["token"]
        for token, value, row_id in zip(
            row["tokens"], row["values"], snippet.token_rows, strict=True
        ):
            (around,) = snippets(shared, [row_id], 0, 0)
            assert token.strip() == around.token
            if row_id in known:
                np.testing.assert_equal(value, float(shared[site][row_id][2]))
            else:
                assert value is None


def test_replay_fills_in_what_is_not_stored(sampled: CoreStore) -> None:
    """Only rows without a stored value are asked for, each once."""
    asked: list[int] = []

    def replay(row_ids: np.ndarray) -> np.ndarray:
        asked.extend(row_ids.tolist())
        return row_ids.astype(np.float32)

    answer = top(sampled, "mlp_post.0", 2, 20, replay=replay)
    stored = set(sampled["mlp_post.0"].row_ids().tolist())
    assert asked
    assert len(asked) == len(set(asked))
    assert not set(asked) & (stored | set(answer.to_arrow()["row_id"].to_pylist()))
    assert all(value is not None for row in answer for value in row["values"])


def test_the_token_is_marked_where_it_is_printed(shared: CoreStore) -> None:
    """Tokens stand below each other in their context; the data has no marks."""
    answer = top(shared, "resid_post.2", 1, 5)
    lines = repr(answer).splitlines()[1:6]
    assert len({line.index("⟦") for line in lines}) == 1
    for line, row in zip(lines, answer, strict=True):
        assert f"⟦{row['token']}⟧{row['after'][:10]}" in line
        assert "⟦" not in row["token"] + row["before"] + row["after"]
    assert "⟦" in answer._repr_html_()


def test_hostile_text_is_cut_and_shown(shared: CoreStore) -> None:
    """A token of 100,000 characters, controls and markup stay in their line and their column."""
    table = top(shared, "resid_post.2", 1, 2).to_arrow()
    hostile = "\x1b[2J\n\u202e\x9b<script>" + "x" * 100_000
    for name in ("before", "token", "after"):
        place = table.schema.get_field_index(name)
        table = table.set_column(place, name, pa.array([hostile, "a"]))
    answer = Top(table, "index")
    printed = repr(answer)
    assert printed.splitlines()[-1] == "(index)"
    assert all(c.isprintable() for c in printed.replace("\n", ""))
    assert max(map(len, printed.splitlines())) <= 120
    assert len({line.index("⟦") for line in printed.splitlines()[1:3]}) == 1
    page = answer._repr_html_()
    assert "<script" not in page
    assert len(page) < 3000
    assert answer.to_arrow()["token"][0].as_py() == hostile
