from __future__ import annotations

import duckdb
import pyarrow as pa
import pytest

from actstore.query import Answer, visible

HOSTILE = "a\x1b[2Jb\nc\td\u202ee\x00f\x7f\u2028<script>alert('&')</script>[bold]"


@pytest.fixture
def answer() -> Answer:
    """Two rows, with a NULL and a NaN."""
    return Answer(pa.table({"site": ["mlp_post.0", None], "value": [0.1 + 0.2, float("nan")]}))


def test_an_answer_is_a_table(answer: Answer) -> None:
    """Its rows come as Arrow, pandas, tuples or dicts."""
    assert len(answer) == 2
    assert answer.columns == ["site", "value"]
    assert answer.rows()[0] == ("mlp_post.0", 0.1 + 0.2)
    assert next(iter(answer)) == {"site": "mlp_post.0", "value": 0.1 + 0.2}
    assert answer.df()["value"].isna().tolist() == [False, True]
    assert answer.to_arrow().num_rows == 2


def test_an_answer_is_taken_for_a_table(answer: Answer) -> None:
    """Arrow and DuckDB read it as it is."""
    assert pa.table(answer).column("site").to_pylist() == ["mlp_post.0", None]
    assert duckdb.sql("SELECT count(site) FROM answer").fetchall() == [(1,)]


def test_it_prints_as_a_table(answer: Answer) -> None:
    """Numbers are aligned and shortened, NULL is empty."""
    assert repr(answer).splitlines() == [
        "site        value",
        "mlp_post.0    0.3",
        "              nan",
    ]


def test_long_tables_are_cut_and_say_so() -> None:
    """Beyond forty rows a line tells how many there are."""
    answer = Answer(pa.table({"row_id": range(1729)}))
    lines = repr(answer).splitlines()
    assert len(lines) == 42
    assert lines[-1] == "… 1,689 more of 1,729 rows"
    assert "… 1,689 more of 1,729 rows" in answer._repr_html_()


def test_columns_that_do_not_fit_are_named() -> None:
    """What the terminal is too narrow for is listed below the table."""
    answer = Answer(pa.table({f"column_number_{i}": [10**15] for i in range(13)}))
    lines = repr(answer).splitlines()
    assert all(len(line) <= 120 for line in lines[:-1])
    assert lines[-1].startswith("… not shown: column_number_6, column_number_7")


def test_cells_are_cut_no_more_than_shows_another_column() -> None:
    """Where no width shows all columns, it is the widest of those that show as many."""
    columns = {f"c{i}": ["x" * 14] for i in range(7)}
    lines = repr(Answer(pa.table({"name": ["y" * 20], **columns}))).splitlines()
    assert "y" * 20 in lines[1]
    assert lines[-1] == "… not shown: c6"


def test_numbers_are_printed_to_what_tells_them_apart() -> None:
    """Four digits of what is small, six of what is large; the data have them all."""
    answer = Answer(pa.table({"value": [0.123456, 12345.678, -1e-7]}))
    assert [line.strip() for line in repr(answer).splitlines()[1:]] == [
        "0.1235",
        "12345.7",
        "-1e-07",
    ]
    assert answer.rows()[0] == (0.123456,)


def test_an_answer_without_rows_says_so() -> None:
    """The columns are printed all the same."""
    empty = Answer(pa.table({"a": pa.array([], pa.int64())}))
    assert repr(empty).splitlines() == ["a", "no rows"]
    assert list(empty) == []
    assert empty.rows() == []


def test_of_the_text_before_a_token_the_end_is_kept() -> None:
    """A cell cut short keeps what is nearest to the token."""
    text = " ".join(f"word{i}" for i in range(30))
    lines = repr(Answer(pa.table({"before": [text], "after": [text]}))).splitlines()
    assert "word28 word29  word0 word1" in lines[1]


def test_hostile_text_is_shown_and_not_obeyed() -> None:
    """No control character, line break or direction mark reaches the terminal."""
    printed = repr(Answer(pa.table({HOSTILE: [HOSTILE], "l": [[HOSTILE, None]]})))
    assert all(c.isprintable() for c in printed.replace("\n", ""))
    assert len(printed.splitlines()) == 2
    assert "a\\x1b[2Jb↵c⇥d\\u202ee\\x00f" in printed
    assert visible(HOSTILE).endswith("\\x7f\\u2028<script>alert('&')</script>[bold]")


def test_hostile_text_is_escaped_in_a_notebook() -> None:
    """Markup from a corpus is text in HTML."""
    page = Answer(pa.table({HOSTILE: [HOSTILE]}))._repr_html_()
    assert "<script" not in page
    assert page.count("&lt;script&gt;alert(&#x27;&amp;&#x27;)&lt;/script&gt;") == 2
    assert "\x1b" not in page
    assert "\u202e" not in page


def test_wide_characters_are_measured() -> None:
    """Cells of double width are cut where the cell ends."""
    line = repr(Answer(pa.table({"text": ["語" * 100], "n": [7]}))).splitlines()[1]
    assert line == "語" * 23 + "…  7"


def test_text_of_any_length_is_printed_by_its_ends() -> None:
    """A token of 100,000 characters fills a cell, not the memory of the terminal or notebook."""
    text = "a" + "\u202e" * 99_998 + "z"
    answer = Answer(pa.table({"token": [text], "before": [text]}))
    (line,) = repr(answer).splitlines()[1:]
    assert line.startswith("a\\u202e")
    assert line.endswith("\\u202ez")
    assert len(line) < 120
    assert len(answer._repr_html_()) < 40_000
    assert answer.rows() == [(text, text)]
