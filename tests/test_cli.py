"""The command line, in process."""

import csv
import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from actstore.capturing import DTYPES
from actstore.cli import main
from actstore.cli.printing import Bars
from actstore.decompose import MEASURES
from actstore.decompose.measuring import METHODS, VARIANTS
from actstore.exporting import FORMS


def lines(result):
    """Return the JSON lines a command printed."""
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.fixture
def run():
    """Return a function that runs a command and checks its exit status."""

    def run(*args, code=0):
        result = CliRunner().invoke(main, [str(arg) for arg in args])
        assert result.exit_code == code, result.output + str(result.exception)
        return result

    return run


def test_every_command_has_help_that_ends_in_an_example(run):
    """`--help` of each command says what it does and ends in a line that runs."""
    for name in main.commands:
        text = run(name, "--help").output
        assert text.rstrip().splitlines()[-1].strip().startswith(f"actstore {name}")


@pytest.mark.parametrize(
    ("command", "option", "values"),
    [
        ("capture", "dtype", DTYPES),
        ("similarity", "measure", MEASURES),
        ("similarity", "method", METHODS),
        ("similarity", "variant", VARIANTS),
        ("export", "form", FORMS),
    ],
)
def test_options_name_what_the_library_takes(run, command, option, values):
    """Values of an option are those of the argument, and help says them."""
    (found,) = (p for p in main.commands[command].params if p.name == option)
    assert set(found.type.choices) == set(values)
    assert all(value in run(command, "--help").output for value in values)


def test_capture_and_ask(run, tmp_path, model_folder, texts_folder):
    """A store is captured, shown, queried, factorised, compared and exported by commands alone."""
    store = tmp_path / "store"

    said = run("capture", model_folder, f"{texts_folder}/*.txt", store, "--context", 16).output
    assert "tokens in 1 segment\n" in said

    rows = lines(run("top", store, "mlp_post.1", 7, "-k", 3))
    assert [row["rank"] for row in rows] == [1, 2, 3]

    asked = run("top", store, "mlp_post.1", 7, "-k", 3, "--where", "position > 2", "--activations")
    assert all(row["position"] > 2 and row["values"] for row in lines(asked))
    assert "content row" in asked.stderr or "(index)" in asked.stderr
    shown = run("top", store, "mlp_post.1", 7, "--distinct", "document", "--format", "table").stdout
    assert "⟦" in shown
    refused = run("top", store, "mlp_post.1", 7, "--where", "postion > 2", code=1).stderr
    assert "position" in refused

    (count,) = lines(run("sql", store, "SELECT count(*) n FROM tokens"))
    assert count["n"] > 0
    assert len(run("nmf", store, "--components", 2, "--name", "two").stdout.splitlines()) == 2
    brief = run("nmf", store, "--components", 2, "--name", "brief", "--format", "table").stdout
    assert "brief: 2 factors of mlp_post" in brief
    assert "KKT residual" in brief
    for command in ("pca", "ica"):
        (row,) = lines(run(command, store, "--components", 1, "--sites", "mlp_post.1"))
        assert row["share"] > 0
    again = run("stability", store, "two", "--seeds", 2, "--nulls", 1)
    assert next(iter(lines(again)[0])) == "factor"
    assert list(lines(again)[0])[1] == "stable"
    assert [row["factor"] for row in lines(again)] == [0, 1]
    assert "of 2 factors of 'two' are stable" in again.stderr
    assert "site_a" in run("similarity", store, "--format", "csv", "--tolerance", 0.5).output
    for name in ("factors.html", "similarity.html"):
        run("export", store, name.split(".")[0], "--to", tmp_path / name)
        assert (tmp_path / name).read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    (info,) = lines(run("info", store))
    made = [
        "nmf/two",
        "nmf/brief",
        "pca/pca-1",
        "ica/ica-1",
        "stability/stability-1",
        "similarity/similarity-1",
    ]
    assert info["results"] == made
    run("finish", store)


def test_export_writes_what_the_library_writes(run, tmp_path, small_store):
    """`export` writes neurons and factors as JSON and rows as Parquet or safetensors."""
    store = small_store.path
    run("export", store, "neuron", "mlp_post.1", 7, "--to", tmp_path / "7.json", "-k", 3)
    small_store.export_neuron("mlp_post.1", 7, tmp_path / "same.json", k=3)
    assert (tmp_path / "7.json").read_bytes() == (tmp_path / "same.json").read_bytes()

    run("export", store, "factor", 1, "--name", "first", "--to", tmp_path / "1.json")
    assert json.loads((tmp_path / "1.json").read_bytes())["layer"] == "nmf-first"

    run("export", store, "neuron", "mlp_post.1", 7, "--to", tmp_path / "7.html", "--by", "document")
    small_store.neuron("mlp_post.1", 7, by="document").to_html(tmp_path / "same.html")
    assert (tmp_path / "7.html").read_bytes() == (tmp_path / "same.html").read_bytes()
    run("export", store, "overview", "--to", tmp_path / "x.html")
    assert (tmp_path / "x.html").read_text(encoding="utf-8") == small_store.view().page()
    to = tmp_path / "compared.html"
    run("export", store, "factors", "--name", "first", "--compare", "first", "--to", to)
    assert '"other":{"name":"first"' in to.read_text(encoding="utf-8")

    small_store.pca("mlp_post.1", 2)
    run("export", store, "factor", 0, "--kind", "pca", "--to", tmp_path / "pca.json")
    assert json.loads((tmp_path / "pca.json").read_bytes())["layer"] == "pca-pca-1"
    to = tmp_path / "none" / "7.json"
    refused = run("export", store, "neuron", "mlp_post.1", 7, "--to", to, code=2).stderr
    assert "does not exist" in refused
    assert not to.parent.exists()

    rows = small_store["mlp_post.1"].row_ids()[3:6]
    ids = ",".join(map(str, rows))
    to = tmp_path / "x.parquet"
    said = run("export", store, "slice", "--rows", ids, "--sites", "mlp_post", "--to", to).stdout
    assert said.strip() == str(to)
    assert pq.read_table(to).column("row_id").to_pylist() == rows.tolist()
    run("export", store, "slice", "--rows", "position < 3", "--to", tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    "words",
    [
        ["neuron", "mlp_post.1", "--to", "x.json"],
        ["neuron", "mlp_post.1", "seven", "--to", "x.json"],
        ["neuron", "mlp_post.1", "7", "--to", "x.parquet"],
        ["factors", "--to", "x.html", "--rows", "all"],
        ["neuron", "mlp_post.1", "7", "--to", "x.html", "-k", "3"],
        ["neuron", "mlp_post.1", "7", "--to", "x.json", "--by", "source"],
        ["overview", "--to", "x.json"],
        ["slice", "--to", "x.json"],
        ["overview", "seven", "--to", "x.html"],
    ],
)
def test_exports_that_make_no_sense_are_usage(run, small_store, words):
    """Arguments, options and files that do not belong to what is exported exit 2."""
    assert "Usage" in run("export", small_store.path, *words, code=2).stderr


def test_dry_run_writes_nothing(run, tmp_path, model_folder, texts_folder):
    """`--dry-run` prints rows, bytes, seconds and memory, and leaves no store behind."""
    store = tmp_path / "store"
    said = run("capture", model_folder, texts_folder, store, "--dry-run").output

    assert not store.exists()
    for word in ("rows", "bytes", "seconds", "memory", "mlp_post.2"):
        assert word in said


def test_known_errors_are_one_line_and_exit_1(run, tmp_path):
    """An error of the tree shows its message, no traceback."""
    result = run("info", tmp_path / "nothing", code=1)

    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: ")
    assert "actstore.capture(model, corpus, path)" in result.stderr


def test_sql_errors_pass_on_what_duckdb_says(run, small_store):
    """A misspelt view gets DuckDB's own message, without a traceback."""
    result = run("sql", small_store.path, "SELECT * FROM neuron", code=1)

    assert "neurons" in result.stderr
    assert "Traceback" not in result.stderr


HOSTILE = "a\x1b[2Jb\nc\td\u202ee\x7f\x9b\u2028\U000e0041<b>\"'=1+1, 語"


def test_text_comes_out_of_every_format_as_it_is(run, small_store, tmp_path):
    """JSON, CSV and Parquet give hostile text back to the last character, a row a line of JSON."""
    query = "SELECT n, text FROM (VALUES (7, " + "'{}'), (NULL, '')) t(n, text)"
    query = query.format(HOSTILE.replace("'", "''"))

    as_json = run("sql", small_store.path, query, "--format", "json").stdout
    as_csv = run("sql", small_store.path, query, "--format", "csv").stdout
    as_parquet = run("sql", small_store.path, query, "--format", "parquet").stdout_bytes

    assert [json.loads(line) for line in as_json.splitlines()] == [
        {"n": 7, "text": HOSTILE},
        {"n": None, "text": ""},
    ]
    assert as_json.replace("\n", "").isprintable()
    assert "語" in as_json
    read = list(csv.reader(io.StringIO(as_csv, newline="")))
    assert read == [["n", "text"], ["7", HOSTILE], ["", ""]]
    table = pq.read_table(pa.BufferReader(as_parquet))
    assert table.to_pylist() == [{"n": 7, "text": HOSTILE}, {"n": None, "text": ""}]


def test_a_terminal_gets_text_that_does_nothing(run, small_store, monkeypatch):
    """On a terminal table and CSV show what would act; Parquet is refused."""
    monkeypatch.setattr("actstore.cli.printing.is_terminal", lambda: True)
    query = "SELECT '{}' AS text".format(HOSTILE.replace("'", "''"))

    for form in ((), ("--format", "csv"), ("--format", "json")):
        printed = run("sql", small_store.path, query, *form).stdout
        assert printed.replace("\n", "").isprintable()
        assert len(printed.splitlines()) <= 2
    refused = run("sql", small_store.path, query, "--format", "parquet", code=2)
    assert "> answer.parquet" in refused.stderr


def test_values_of_every_type_are_printed(run, small_store):
    """Sums are numbers in JSON, NaN and infinity null; lists and dicts are JSON in CSV."""
    query = (
        "SELECT sum(n) AS s, any_value('inf'::DOUBLE) AS i, [1, 2] AS l, {'a': 1.5::DECIMAL(9, 2)} "
        "AS d, DATE '2020-01-02' AS t, 1.5::DECIMAL(9, 2) AS x FROM range(5) t(n)"
    )
    (row,) = lines(run("sql", small_store.path, query))
    assert row == {"s": 10, "i": None, "l": [1, 2], "d": {"a": 1.5}, "t": "2020-01-02", "x": 1.5}
    printed = run("sql", small_store.path, query, "--format", "csv").stdout.splitlines()[1]
    assert printed == '10,inf,"[1, 2]","{""a"": 1.5}",2020-01-02,1.50'


def test_usage_errors_exit_2(run, small_store):
    """A missing argument, or an export to a kind of file that is not known, is usage."""
    run("top", small_store.path, code=2)
    run("nmf", small_store.path, "--components", "many", code=2)


def test_sites_of_a_model(run, model_folder):
    """`sites` lists module, side and width of each capture point."""
    rows = lines(run("sites", model_folder))

    assert {"site": "mlp_post.2", "width": 64, "side": "input", "module": "h.2.mlp.c_proj"} in rows


def test_what_is_said_between_bars_is_printed_safely(capsys: pytest.CaptureFixture[str]) -> None:
    """Text that comes from a store does not act on the terminal, and any object can be said."""
    with Bars() as bars:
        bars.say("a\x1b[31mb")
        bars.say(Path("folder"))
    assert capsys.readouterr().out == "a\\x1b[31mb\nfolder\n"
